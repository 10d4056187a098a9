"""The workloads by hand: formulas derived on paper, in plain PyTorch, as one would write them without any transform.

Each is called with the workload's inputs, and with what the workload captures as keyword arguments. There is none for
the Hessian-vector product of the transformer block, whose second derivatives nobody would write out.

NOTE [Derivatives of an MLP]
``z[l] = W[l] a[l-1] + b[l]`` and ``a[l] = tanh(z[l])``, with the last layer left linear;
``s[l] = 1 - a[l]**2`` is the slope of tanh and ``-2 a[l] s[l]`` its second derivative. Points are rows, so a layer is
``a @ W.T + b``, and the cotangent of ``a[l-1]`` is ``delta[l] @ W[l]``, with ``delta[l]`` that of ``z[l]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
Layers = list[tuple[Tensor, Tensor]]
BY_HAND: dict[str, Callable[..., Any]] = {}


def by_hand(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the formula of the workloads of these names."""

    def register(formula: Callable[..., Any]) -> Callable[..., Any]:
        BY_HAND.update(dict.fromkeys(names, formula))
        return formula

    return register


def _layers(params: Params) -> Layers:
    """Weights and biases in order; ``params`` has a weight and then its bias for every layer."""
    values = list(params.values())
    return list(zip(values[::2], values[1::2]))


def _activations(layers: Layers, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """What each layer of an MLP gets, and the output."""
    inputs = [x]
    for weight, bias in layers[:-1]:
        inputs.append(F.linear(inputs[-1], weight, bias).tanh())
    return inputs, F.linear(inputs[-1], *layers[-1])


def _cross_entropy_delta(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each row's cross entropy."""
    delta = logits.softmax(-1)
    rows = torch.arange(len(labels), device=labels.device)
    delta[..., rows, labels] -= 1
    return delta


@by_hand("per-example gradients, MLP 784-256-256-10, batch 64")
def per_example_mlp(params: Params, images: Tensor, labels: Tensor) -> Params:
    layers = _layers(params)
    inputs, logits = _activations(layers, images)
    delta = _cross_entropy_delta(logits, labels)
    gradients: list[Tensor] = []
    for (weight, _), a in zip(reversed(layers), reversed(inputs)):
        gradients += [delta, delta.unsqueeze(2) * a.unsqueeze(1)]
        if a is not images:
            delta = (delta @ weight) * (1 - a * a)
    return dict(zip(params, reversed(gradients)))


@by_hand("per-example gradients, CNN, batch 32")
def per_example_cnn(params: Params, images: Tensor, labels: Tensor) -> Params:
    (w1, b1), (w2, b2), (w3, b3) = _layers(params)

    def weights(patches: Tensor, delta: Tensor, like: Tensor) -> Tensor:
        return torch.bmm(delta.flatten(2), patches.transpose(1, 2)).unflatten(2, like.shape[1:])

    def unpool(delta: Tensor) -> Tensor:
        return F.interpolate(delta, scale_factor=2, mode="nearest") / 4

    z1 = F.conv2d(images, w1, b1, padding=1)
    a1 = F.avg_pool2d(z1.relu(), 2)
    z2 = F.conv2d(a1, w2, b2, padding=1)
    a2 = F.avg_pool2d(z2.relu(), 2).flatten(1)
    delta3 = _cross_entropy_delta(F.linear(a2, w3, b3), labels)
    delta2 = unpool((delta3 @ w3).view(*z2.shape[:2], z2.shape[2] // 2, -1)) * (z2 > 0)
    delta1 = unpool(F.conv_transpose2d(delta2, w2, padding=1)) * (z1 > 0)
    gradients = (
        weights(F.unfold(images, 3, padding=1), delta1, w1),
        delta1.sum((2, 3)),
        weights(F.unfold(a1, 3, padding=1), delta2, w2),
        delta2.sum((2, 3)),
        delta3.unsqueeze(2) * a2.unsqueeze(1),
        delta3,
    )
    return dict(zip(params, gradients))


@by_hand("Hessian 64x64 of an MLP, one point", "Hessian 64x64 of an MLP, 32 points")
def hessian(points: Tensor, params: Params) -> Tensor:
    """The sum over the layers of J.T diag(cotangent of a * tanh'') J, with J = dz/dx: a layer itself is linear."""
    layers = _layers(params)
    inputs, _ = _activations(layers, points)
    jacobians = [layers[0][0]]
    for (weight, _), a in zip(layers[1:-1], inputs[1:]):
        jacobians.append((weight * (1 - a * a).unsqueeze(-2)) @ jacobians[-1])
    cotangent = layers[-1][0]  # of the last activation: its row is the same for every point
    result = None
    for (weight, _), a, jacobian in zip(reversed(layers[:-1]), reversed(inputs[1:]), reversed(jacobians)):
        delta = cotangent * (1 - a * a)
        scaled = (-2 * a * delta).view(a.shape).unsqueeze(-1) * jacobian
        term = jacobian.mT @ scaled
        result = term if result is None else result + term
        cotangent = delta @ weight
    return result


@by_hand("Laplacian of an MLP, 128 points of dim 16")
def laplacian(points: Tensor, params: Params) -> Tensor:
    """The value, the Jacobian and the Laplacian of each activation, carried forward together."""
    layers = _layers(params)
    (weight, bias), *middle, (last, _) = layers
    a = F.linear(points, weight, bias).tanh()
    slope = 1 - a * a
    jacobian = weight  # of z; its square is summed over the directions
    second = -2 * a * slope * jacobian.square().sum(1)
    for weight, bias in middle:
        jacobian = weight @ (slope.unsqueeze(2) * jacobian)
        a = F.linear(a, weight, bias).tanh()
        slope = 1 - a * a
        second = slope * (second @ weight.T) - 2 * a * slope * jacobian.square().sum(2)
    return (second @ last.T).squeeze(1)


@by_hand("gradient of an ensemble of 10 MLPs")
def ensemble(stacked: Params, x: Tensor, labels: Tensor) -> Params:
    layers = _layers(stacked)
    inputs = [x.expand(len(layers[0][0]), -1, -1)]
    for i, (weight, bias) in enumerate(layers):
        z = torch.baddbmm(bias.unsqueeze(1), inputs[-1], weight.mT)
        if i < len(layers) - 1:
            inputs.append(z.tanh_())
    delta = _cross_entropy_delta(z, labels) / len(x)
    gradients: list[Tensor] = []
    for i in reversed(range(len(layers))):
        gradients += [delta.sum(1), delta.mT @ inputs[i]]
        if i:
            delta = (delta @ layers[i][0]) * (1 - inputs[i] * inputs[i])
    return dict(zip(stacked, reversed(gradients)))


@by_hand("jacrev R^256 -> R^256")
def jacobian(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.tanh(weight @ x.sin())
    return (1 - y * y).unsqueeze(1) * weight * x.cos()


@by_hand("NTK 16x16 by contraction", "NTK 16x16 by vjp and jvp products")
def ntk(params: Params, left: Tensor, right: Tensor) -> Tensor:
    """The sum over the layers of <delta, delta'> (<a, a'> + 1): the gradient of W is the outer product of both,
    b's is delta.
    """
    layers = _layers(params)

    def factors(points: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        inputs, logits = _activations(layers, points)
        outputs = logits.shape[1]
        delta = torch.eye(outputs, device=points.device, dtype=points.dtype).expand(len(points), -1, -1)
        deltas = [delta]
        for (weight, _), a in zip(reversed(layers[1:]), reversed(inputs[1:])):
            deltas.append((deltas[-1] @ weight) * (1 - a * a).unsqueeze(1))
        return inputs, deltas[::-1]

    (inputs, deltas), (others, other_deltas) = factors(left), factors(right)
    kernel: Any = 0
    for a, delta, b, other in zip(inputs, deltas, others, other_deltas):
        kernel = kernel + torch.einsum("nah,mbh->nmab", delta, other) * (a @ b.T + 1)[:, :, None, None]
    return kernel


@by_hand("jvp with Python-number operands")
def numbers(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The map is affine, so the tangent goes through it without the constants: both at once, as two rows."""
    state = torch.stack((x, t))
    constant = torch.tensor([[1.0], [0.0]], device=x.device, dtype=x.dtype)
    velocity = constant - state
    for _ in range(20):
        acceleration = torch.add(constant * 0.25, state, alpha=-0.5).sub_(velocity, alpha=0.2)
        velocity.add_(acceleration, alpha=0.05)
        state.add_(velocity, alpha=0.05)
    state = state / 3.0 + constant
    return state[0], state[1]


def chain_by_hand(length: int, operands: str, scale: Tensor, shift: Tensor, order: int) -> Callable[..., list[Any]]:
    """The chain of per_op.py and its derivatives along a direction, up to the order, from one operation to the next."""

    def chain(start: Tensor, direction: Tensor | None = None) -> list[Any]:
        captured = operands != "inputs"
        times, plus = {"inputs": (start, start), "constants": (scale, shift), "numbers": (1.25, 0.5)}[operands]
        x, first, second = start, direction, 0.0
        for i in range(length):
            kind = i % 4
            if kind in (0, 2):
                y = x.sin() if kind == 0 else x.tanh()
                if order:
                    slope = x.cos() if kind == 0 else 1 - y * y
                if order == 2:
                    curvature = -y if kind == 0 else -2 * y * slope
                    second = slope * second + curvature * first * first
                if order:
                    first = slope * first
                x = y
            elif kind == 1:
                if order == 2:
                    second = second * times if captured else second * times + 2 * first * direction
                if order:
                    first = first * times if captured else first * times + x * direction
                x = x * times
            else:
                if order and not captured:
                    first = first + direction
                x = x + plus
        return [x, first, second]

    return chain
