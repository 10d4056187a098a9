"""The workloads: what people compute with function transforms, written once for any API that has torch.func's names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]


class Workload(NamedTuple):
    """``transformed(api)`` and ``plain`` compute the same thing of ``inputs``.

    ``plain`` is what a user of autograd alone would write. ``captured`` is what both close over, such as the parameters
    of a network that is not differentiated; the versions that have no modules take it as keyword arguments.
    """

    inputs: tuple[Any, ...]
    transformed: Callable[[Any], Callable[..., Any]]
    plain: Callable[..., Any]
    captured: Mapping[str, Any] = MappingProxyType({})


Build = Callable[[str, torch.dtype], Workload]
WORKLOADS: dict[str, Build] = {}


def workload(name: str) -> Callable[[Build], Build]:
    """Register a workload under the name that the table shows."""

    def register(build: Build) -> Build:
        WORKLOADS[name] = build
        return build

    return register


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """A small network for 3x16x16 images."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each after a normalization and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _params(net: nn.Module) -> Params:
    return {name: value.detach() for name, value in net.named_parameters()}


def _leaves(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _apply(net: nn.Module, params: Params, x: Tensor) -> Tensor:
    return torch.func.functional_call(net, params, (x,))


def _grad(value: Tensor, params: Params, **options: Any) -> Params:
    gradients = torch.autograd.grad(value, list(params.values()), **options)
    return dict(zip(params, gradients))


def _stack(rows: list[Params]) -> Params:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _per_example_gradients(net: nn.Module, images: Tensor, labels: Tensor) -> Workload:
    def transformed(api: Any) -> Callable[..., Any]:
        def loss(params: Params, image: Tensor, label: Tensor) -> Tensor:
            logits = api.functional_call(net, params, (image.unsqueeze(0),))
            return F.cross_entropy(logits, label.unsqueeze(0))

        return api.vmap(api.grad(loss), in_dims=(None, 0, 0))

    def plain(params: Params, images: Tensor, labels: Tensor) -> Params:
        leaves = _leaves(params)
        return _stack(
            [
                _grad(F.cross_entropy(_apply(net, leaves, image[None]), label[None]), leaves)
                for image, label in zip(images, labels)
            ]
        )

    return Workload((_params(net), images, labels), transformed, plain)


@workload("per-example gradients, MLP 784-256-256-10, batch 64")
def per_example_mlp(device: str, dtype: torch.dtype) -> Workload:
    net = mlp(784, 256, 256, 10).to(device, dtype)
    images = torch.randn(64, 784, device=device, dtype=dtype)
    return _per_example_gradients(net, images, torch.randint(10, (64,), device=device))


@workload("per-example gradients, CNN, batch 32")
def per_example_cnn(device: str, dtype: torch.dtype) -> Workload:
    net = convolutional().to(device, dtype)
    images = torch.randn(32, 3, 16, 16, device=device, dtype=dtype)
    return _per_example_gradients(net, images, torch.randint(10, (32,), device=device))


def _point_function(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x).squeeze(-1)


def _plain_hessians(f: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Rows, then points, then columns: the gradients of the sums over the points of each component of the gradient."""
    x = points.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    directions = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).unsqueeze(1).expand(-1, *x.shape)
    return torch.autograd.grad(slopes, x, directions, is_grads_batched=True)[0]


@workload("Hessian 64x64 of an MLP, one point")
def hessian_one(device: str, dtype: torch.dtype) -> Workload:
    net = mlp(64, 64, 64, 1).to(device, dtype).requires_grad_(False)
    f = _point_function(net)
    point = torch.randn(64, device=device, dtype=dtype)

    def plain(point: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(f, point, vectorize=True)

    return Workload((point,), lambda api: api.hessian(f), plain, {"params": _params(net)})


@workload("Hessian 64x64 of an MLP, 32 points")
def hessian_many(device: str, dtype: torch.dtype) -> Workload:
    net = mlp(64, 64, 64, 1).to(device, dtype).requires_grad_(False)
    f = _point_function(net)
    points = torch.randn(32, 64, device=device, dtype=dtype)

    def plain(points: Tensor) -> Tensor:
        return _plain_hessians(f, points).transpose(0, 1)

    return Workload((points,), lambda api: api.vmap(api.hessian(f)), plain, {"params": _params(net)})


@workload("HVP of a transformer block")
def hvp_transformer(device: str, dtype: torch.dtype) -> Workload:
    net = TransformerBlock(64, 4).to(device, dtype)
    x = torch.randn(4, 32, 64, device=device, dtype=dtype)
    params = _params(net)
    direction = {name: torch.randn_like(value) for name, value in params.items()}

    def transformed(api: Any) -> Callable[..., Any]:
        def product(params: Params, direction: Params, x: Tensor) -> Params:
            gradient = api.grad(lambda p: api.functional_call(net, p, (x,)).square().mean())
            return api.jvp(gradient, (params,), (direction,))[1]

        return product

    def plain(params: Params, direction: Params, x: Tensor) -> Params:
        leaves = _leaves(params)
        gradients = _grad(_apply(net, leaves, x).square().mean(), leaves, create_graph=True)
        slope = torch.stack([(gradients[name] * direction[name]).sum() for name in gradients]).sum()
        return _grad(slope, leaves)

    return Workload((params, direction, x), transformed, plain)


@workload("gradient of an ensemble of 10 MLPs")
def ensemble(device: str, dtype: torch.dtype) -> Workload:
    nets = [mlp(128, 128, 128, 10).to(device, dtype) for _ in range(10)]
    x = torch.randn(64, 128, device=device, dtype=dtype)
    labels = torch.randint(10, (64,), device=device)
    net, stacked = nets[0], _stack([_params(net) for net in nets])

    def transformed(api: Any) -> Callable[..., Any]:
        def loss(params: Params, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(api.functional_call(net, params, (x,)), labels)

        return api.vmap(api.grad(loss), in_dims=(0, None, None))

    def plain(stacked: Params, x: Tensor, labels: Tensor) -> Params:
        rows = []
        for i in range(len(nets)):
            leaves = _leaves({name: value[i] for name, value in stacked.items()})
            rows.append(_grad(F.cross_entropy(_apply(net, leaves, x), labels), leaves))
        return _stack(rows)

    return Workload((stacked, x, labels), transformed, plain)


@workload("jacrev R^256 -> R^256")
def jacobian(device: str, dtype: torch.dtype) -> Workload:
    weight = torch.randn(256, 256, device=device, dtype=dtype) / 16
    x = torch.randn(256, device=device, dtype=dtype)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(weight @ torch.sin(x))

    def plain(x: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(f, x, vectorize=True)

    return Workload((x,), lambda api: api.jacrev(f), plain, {"weight": weight})


@workload("Laplacian of an MLP, 128 points of dim 16")
def laplacian(device: str, dtype: torch.dtype) -> Workload:
    net = mlp(16, 64, 64, 1).to(device, dtype).requires_grad_(False)
    f = _point_function(net)
    points = torch.randn(128, 16, device=device, dtype=dtype)

    def transformed(api: Any) -> Callable[..., Any]:
        return api.vmap(lambda x: api.hessian(f)(x).trace())

    def plain(points: Tensor) -> Tensor:
        return torch.einsum("ini->n", _plain_hessians(f, points))

    return Workload((points,), transformed, plain, {"params": _params(net)})


def _ntk(device: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Params, Tensor, Tensor]]:
    net = mlp(32, 128, 128, 10).to(device, dtype)
    left, right = (torch.randn(16, 32, device=device, dtype=dtype) for _ in range(2))
    return net, (_params(net), left, right)


def _ntk_plain(net: nn.Module) -> Callable[[Params, Tensor, Tensor], Tensor]:
    def plain(params: Params, left: Tensor, right: Tensor) -> Tensor:
        leaves = _leaves(params)

        def jacobians(points: Tensor) -> Params:
            logits = _apply(net, leaves, points).flatten()
            directions = torch.eye(len(logits), device=logits.device, dtype=logits.dtype)
            return _grad(logits, leaves, grad_outputs=directions, is_grads_batched=True)

        one, two = jacobians(left), jacobians(right)
        kernel = sum(one[name].flatten(1) @ two[name].flatten(1).T for name in one)
        outputs = len(kernel) // len(left)
        return kernel.view(len(left), outputs, len(right), outputs).transpose(1, 2)

    return plain


@workload("NTK 16x16 by contraction")
def ntk_contraction(device: str, dtype: torch.dtype) -> Workload:
    net, inputs = _ntk(device, dtype)

    def transformed(api: Any) -> Callable[..., Any]:
        def kernel(params: Params, left: Tensor, right: Tensor) -> Tensor:
            def output(params: Params, x: Tensor) -> Tensor:
                return api.functional_call(net, params, (x,))

            jacobians = api.vmap(api.jacrev(output), in_dims=(None, 0))
            one, two = jacobians(params, left), jacobians(params, right)
            return sum(torch.einsum("naf,mbf->nmab", one[name].flatten(2), two[name].flatten(2)) for name in one)

        return kernel

    return Workload(inputs, transformed, _ntk_plain(net))


@workload("NTK 16x16 by vjp and jvp products")
def ntk_products(device: str, dtype: torch.dtype) -> Workload:
    net, inputs = _ntk(device, dtype)

    def transformed(api: Any) -> Callable[..., Any]:
        def kernel(params: Params, left: Tensor, right: Tensor) -> Tensor:
            def pair(x: Tensor, y: Tensor) -> Tensor:
                def at(point: Tensor) -> Callable[[Params], Tensor]:
                    return lambda p: api.functional_call(net, p, (point,))

                output, pullback = api.vjp(at(x), params)

                def product(cotangent: Tensor) -> Tensor:
                    return api.jvp(at(y), (params,), pullback(cotangent))[1]

                # one row of the result per cotangent, that is per output at x
                return api.vmap(product)(torch.eye(output.numel(), device=output.device, dtype=output.dtype))

            return api.vmap(lambda x: api.vmap(lambda y: pair(x, y))(right))(left)

        return kernel

    return Workload(inputs, transformed, _ntk_plain(net))


def oscillator(x: Any) -> Any:
    """A damped oscillator by small steps: arithmetic with numbers, for tensors and JAX's arrays alike."""
    velocity = 1.0 - x
    for _ in range(20):
        acceleration = -0.5 * x - 0.1 * velocity * 2.0 + 0.25
        velocity = velocity + 0.05 * acceleration
        x = x + 0.05 * velocity
    return x / 3.0 + 1.0


@workload("jvp with Python-number operands")
def numbers(device: str, dtype: torch.dtype) -> Workload:
    x, t = (torch.rand(1000, device=device, dtype=dtype) for _ in range(2))

    def transformed(api: Any) -> Callable[..., Any]:
        return lambda x, t: api.jvp(oscillator, (x,), (t,))

    def plain(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        forward = torch.autograd.forward_ad
        with forward.dual_level():
            primal, tangent = forward.unpack_dual(oscillator(forward.make_dual(x, t)))
            return primal, tangent

    return Workload((x, t), transformed, plain)
