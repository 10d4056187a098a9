"""Programs of users: what they pass as functions and data, and what else of PyTorch is at work around the transforms.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import for_each
from slow_ways import agree, gradient, jacobian, no_history
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from functrans import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from functrans.errors import MixedTransformsError

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def cubes(x: Tensor) -> Tensor:
    return (x**3).sum()


# --- functions and data ---------------------------------------------------------------------------------------------


def test_a_module_is_a_function() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), randn(5, 3)
    jacobians = torch.stack([jacobian(net, row) for row in x])
    agree(no_history(vmap(net)(x)), no_history(net(x)))
    agree(no_history(vmap(jacrev(net))(x)), jacobians)
    agree(no_history(vmap(jacfwd(net))(x)), jacobians)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(net.parameters())[:3]))

    agree(gradients(vmap(net)(x).pow(2).sum()), gradients(net(x).pow(2).sum()))
    by_autograd = torch.stack([torch.autograd.functional.jacobian(net, row, create_graph=True) for row in x])
    agree(gradients(vmap(jacrev(net))(x).pow(2).sum()), gradients(by_autograd.pow(2).sum()))


class Model:
    """A callable object, with methods."""

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def __call__(self, x: Tensor, *, factor: Any = 1.0) -> Tensor:
        return (self.w * x).sin().sum() * factor

    def loss(self, x: Tensor) -> Tensor:
        return self(x) ** 2


def test_callables_of_every_kind() -> None:
    model, x = Model(randn(3)), randn(4, 3)
    slopes = (model.w * x).cos() * model.w
    agree(vmap(grad(model))(x), slopes)
    agree(vmap(grad(functools.partial(model, factor=2.0)))(x), 2 * slopes)
    agree(vmap(grad(model))(x, factor=torch.tensor(2.0, dtype=DOUBLE)), 2 * slopes)
    agree(vmap(grad(model.loss))(x), 2 * (model.w * x).sin().sum(1, keepdim=True) * slopes)
    agree(vmap(torch.Tensor.sin)(x), x.sin())
    agree(vmap(F.softplus)(x), F.softplus(x))

    @vmap
    def dot(x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    @grad
    def slope(x: Tensor) -> Tensor:
        return cubes(x)

    agree(dot(x, x), (x * x).sum(1))
    agree(slope(x), 3 * x**2)
    assert dot.__name__ == "dot" and slope.__wrapped__.__name__ == "slope"


Point = namedtuple("Point", "a b")


@dataclasses.dataclass
class State:
    position: Tensor
    velocity: Tensor
    name: str = "a body"


_pytree.register_pytree_node(
    State, lambda s: ([s.position, s.velocity], s.name), lambda parts, name: State(*parts, name)
)


def test_containers_of_every_kind() -> None:
    point = Point(randn(4, 3), {"x": randn(4, 2), "o": OrderedDict(z=randn(4, 2), y=randn(4, 1))})

    def f(p: Point, options: dict[str, Any]) -> Tensor:
        assert options["nothing"] is None
        return (p.a**2).sum() * options["scale"] + cubes(p.b["x"]) + p.b["o"]["z"].prod() + p.b["o"]["y"].sum()

    options = {"nothing": None, "scale": 2.0, "names": ["a", None]}
    for in_dims in ((0, None), (Point(0, {"x": 0, "o": 0}), None)):
        got = vmap(grad(f), in_dims)(point, options)
        assert type(got) is Point and type(got.b["o"]) is OrderedDict and list(got.b["o"]) == ["z", "y"]
        agree((got.a, got.b["x"], got.b["o"]["z"]), (4 * point.a, 3 * point.b["x"] ** 2, point.b["o"]["z"].flip(1)))
    out = vmap(lambda x: {"a": x, "b": (x * 2, [None, "text"]), "c": Point(x, 3)})(point.a)
    agree((out["a"], out["b"][0]), (point.a, 2 * point.a))
    assert out["b"][1] == [None, "text"] and out["c"].b == 3

    state = State(randn(4, 3), randn(4, 3), "comet")
    got = vmap(grad(lambda s: (s.position**2 * s.velocity).sum()))(state)
    assert type(got) is State and got.name == "comet"
    agree(got.position, 2 * state.position * state.velocity)
    agree(
        vmap(lambda s: State(s.position + s.velocity, s.velocity * 2))(state).position, state.position + state.velocity
    )


def test_lambdas_that_close_over_values_of_outer_transforms() -> None:
    x, y = randn(3), randn(4)
    got = vmap(lambda a: vmap(lambda b: grad(lambda c: (c * a * b).sin())(b))(y))(x)
    agree(got, torch.cos(x[:, None] * y**2) * x[:, None] * y)
    agree(vmap(grad(lambda b: vmap(lambda c: b * c)(y).sum()))(x), y.sum().expand(3))
    agree(grad(lambda a: vmap(lambda b: jvp(lambda c: a * c * c, (b,), (a,))[1])(y).sum())(x[0]), (4 * x[0] * y).sum())


def test_two_batch_dimensions_in_other_places() -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] * b[None]).sum(0) - a.max()

    a, b = randn(3, 5, 4), randn(4, 6, 5)
    expected = torch.stack([torch.stack([f(a[:, i, j], b[j, :, i]) for j in range(4)], 1) for i in range(5)], 2)
    agree(vmap(vmap(f, (1, 0), 1), (1, 2), 2)(a, b), expected)
    agree(vmap(vmap(f, (-1, 0), -1), (-2, -1), -1)(a, b), expected)


# --- PyTorch around the transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("borrowed", [False, True])
def test_checkpoints_inside(borrowed: bool) -> None:
    w, x = randn(3, 3).requires_grad_(), randn(4, 3)

    def body(x: Tensor) -> Tensor:
        return torch.linalg.inv(torch.outer(x, x) + w).sum(0) if borrowed else torch.tanh(w @ x).pow(2)

    def plain(x: Tensor) -> Tensor:
        return body(body(x)).sum()

    def saving(x: Tensor) -> Tensor:
        return checkpoint(body, checkpoint(body, x, use_reentrant=False), use_reentrant=False).sum()

    def weights_gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, w)[0]

    expected = for_each(gradient(plain))(x)
    agree(no_history(vmap(grad(saving))(x)), no_history(expected))
    agree(no_history(jvp(saving, (x[0],), (x[1],))[1]), (expected[0] * x[1]).sum().detach(), rtol=1e-9, atol=1e-9)
    agree(no_history(hessian(saving)(x[0])), torch.autograd.functional.hessian(plain, x[0]), rtol=1e-7, atol=1e-7)
    got = weights_gradient(vmap(grad(saving))(x).pow(2).sum())
    agree(got, weights_gradient(expected.pow(2).sum()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_around(use_reentrant: bool) -> None:
    w, x = randn(3).requires_grad_(), randn(4, 3)

    def loss(w: Tensor) -> Tensor:
        return vmap(grad(lambda x: (x * w).sin().sum()))(x).pow(2).sum()

    (expected,) = torch.autograd.grad(loss(w), w)
    checkpoint(loss, w, use_reentrant=use_reentrant).backward()
    agree(w.grad, expected)


def test_hooks_around_pack_plain_tensors_and_hooks_inside_are_harmless() -> None:
    w, x, packed = randn(3).requires_grad_(), randn(4, 3), []

    def pack(t: Tensor) -> Tensor:
        packed.append(type(t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = vmap(grad(lambda x: (x * w).sin().sum()))(x).sum()
    assert packed and set(packed) <= {Tensor}
    (got,) = torch.autograd.grad(out, w)
    agree(got, ((x * w).cos() - x * w * (x * w).sin()).sum(0).detach())

    def inside(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return torch.linalg.det(torch.diag(x)) + cubes(x)

    agree(vmap(grad(inside))(x), x.prod(1, keepdim=True) / x + 3 * x**2)


@pytest.mark.parametrize("place", ["around", "inside"])
def test_autocast(place: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    params, x = {n: p.detach() for n, p in net.named_parameters()}, torch.randn(5, 3)

    def loss(p: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=place == "inside" or torch.is_autocast_enabled("cpu")):
            out = functional_call(net, p, (x,))
        assert out.dtype == torch.bfloat16
        return out.float().pow(2).sum()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=place == "around"):
        got = vmap(grad(loss), (None, 0))(params, x)
        again = [grad(loss)(params, row) for row in x]
        expected = no_history(for_each(gradient(loss), (None, 0))(params, x))
    assert all(g.dtype == torch.float32 for g in got.values())
    agree(got, expected, rtol=2e-2, atol=2e-2)
    agree({n: torch.stack([a[n] for a in again]) for n in params}, expected, rtol=2e-2, atol=2e-2)


def test_autograd_at_the_base_goes_through_every_transform() -> None:
    w, x = randn(3).requires_grad_(), randn(4, 3)

    def backward(out: Tensor) -> Tensor:
        return torch.autograd.grad(out.sum(), w)[0]

    ones = torch.ones(3, dtype=DOUBLE)
    agree(backward(jvp(lambda w: w**3, (w,), (ones,))[1]), 6 * w.detach())
    agree(backward(vjp(lambda w: w**3, w)[1](ones)[0]), 6 * w.detach())
    agree(backward(hessian(lambda w: (w**4).sum())(w)), 24 * w.detach())
    agree(backward(jacfwd(jacrev(lambda w: (w**4).sum()))(w)), 24 * w.detach())

    def per_example(w: Tensor) -> Tensor:
        return vmap(grad(lambda x, w: (x * w).sin().sum()), (0, None))(x, w)

    assert torch.autograd.gradcheck(per_example, (w,)) and torch.autograd.gradgradcheck(per_example, (w,))


def test_threads() -> None:
    x, found = randn(5, 3), {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = vmap(jacrev(lambda x: (x * i).sin()))(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        agree(found[i], torch.diag_embed((x * i).cos() * i))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode: Callable[[], Any]) -> None:
    x = randn(4, 3)

    def with_buffers(x: Tensor) -> Tensor:
        b = torch.zeros(3, dtype=DOUBLE)
        b[0] = x[1]
        x = x.clone()
        x[1:] *= 2
        return (b * x).sum() + torch.linalg.det(torch.outer(x, x) + torch.eye(3, dtype=DOUBLE))

    expected = no_history(for_each(gradient(with_buffers))(x))
    with mode():
        y = x.clone()
        agree(vmap(hessian(cubes))(y), torch.diag_embed(6 * x))
        agree(jacfwd(torch.sin)(y[0]), torch.diag(x[0].cos()))
        agree(vmap(grad(with_buffers))(y), expected)
        agree(vmap(grad(with_buffers))(x), expected)
    agree(vmap(grad(cubes))(y), 3 * x**2)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(tracing_mode: str) -> None:
    def jacobians(x: Tensor) -> Tensor:
        return vmap(jacrev(lambda x: (x.sin() * x.sum()).cumsum(0)))(x)

    def rows(i: Tensor, x: Tensor) -> Tensor:
        return vmap(lambda i, x: x[i] * 2)(i, x)

    x, y, i = randn(4, 3), randn(4, 3), torch.tensor([2, 0, 1, 0])
    agree(make_fx(jacobians, tracing_mode=tracing_mode)(x)(y), jacobians(y))
    agree(make_fx(rows, tracing_mode=tracing_mode)(torch.zeros_like(i), x)(i, y), rows(i, y))
    if tracing_mode == "real":
        curvature = hessian(lambda x: torch.linalg.det(x @ x.T))
        agree(make_fx(curvature)(x)(y), curvature(y))


def test_dual_numbers_of_pytorch_go_through() -> None:
    x, t = randn(3), randn(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        for out, tangent in (
            (grad(cubes)(dual), 6 * x * t),
            (vmap(lambda x: x.sin() * x)(dual), (x.cos() * x + x.sin()) * t),
            (jvp(lambda x: x**3, (dual,), (x,))[1], 6 * x * x * t),
        ):
            agree(forward_ad.unpack_dual(out).tangent, tangent)


# --- the other library ----------------------------------------------------------------------------------------------


X = torch.randn(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
THEIRS = torch.func
INSIDE: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
    "vmap of grad": (lambda: vmap(THEIRS.grad(cubes))(X), 3 * X**2),
    "grad of grad": (lambda: grad(lambda x: THEIRS.grad(cubes)(x).sum())(X[0]), 6 * X[0]),
    "jvp of grad": (lambda: jvp(THEIRS.grad(cubes), (X[0],), (X[0],))[1], 6 * X[0] ** 2),
    "vmap of vmap": (lambda: vmap(lambda x: THEIRS.vmap(torch.sin)(x))(X), X.sin()),
    "jacrev of vmap": (lambda: jacrev(lambda x: THEIRS.vmap(torch.sin)(x))(X[0]), torch.diag(X[0].cos())),
    "vmap of hessian": (lambda: vmap(THEIRS.hessian(cubes))(X), torch.diag_embed(6 * X)),
    "vmap of jvp": (lambda: vmap(lambda x: THEIRS.jvp(torch.sin, (x,), (x,))[1])(X), X * X.cos()),
    "vmap of vjp": (lambda: vmap(lambda x: THEIRS.vjp(torch.sin, x)[1](x)[0])(X), X * X.cos()),
    "captured by grad": (lambda: grad(lambda c: THEIRS.grad(lambda y: (y * c * c).sum())(X[0]).sum())(X[0]), 2 * X[0]),
    "captured by vmap": (lambda: vmap(lambda c: THEIRS.vmap(lambda y: y * c)(X[0]))(X[:, 0]), X[0] * X[:, :1]),
    "unused": (lambda: vmap(lambda c: THEIRS.vmap(lambda y: y * 2)(X[0]))(X), (X[0] * 2).expand(4, 3)),
    "buffers": (
        lambda: vmap(lambda c: THEIRS.vmap(lambda y: torch.ones(2, dtype=DOUBLE) + y)(X[0]) * c)(X[:, 0]),
        (X[0][:, None] + torch.ones(2, dtype=DOUBLE)) * X[:, :1, None],
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_transforms_of_torch_func_inside(name: str) -> None:
    program, expected = INSIDE[name]
    agree(program(), expected)


OUTSIDE: dict[str, Callable[[], Any]] = {
    "vmap of grad": lambda: THEIRS.vmap(grad(cubes))(X),
    "grad of grad": lambda: THEIRS.grad(lambda x: grad(cubes)(x).sum())(X[0]),
    "jvp of grad": lambda: THEIRS.jvp(grad(cubes), (X[0],), (X[0],)),
    "vmap of vmap": lambda: THEIRS.vmap(lambda x: vmap(torch.sin)(x))(X),
    "captured": lambda: THEIRS.vmap(lambda c: grad(lambda y: (y * c).sum())(X[0]))(X),
    "functionalize": lambda: THEIRS.functionalize(lambda x: grad(cubes)(x))(X[0]),
    "a pullback": lambda: THEIRS.vmap(vjp(torch.linalg.det, X[:3])[1])(torch.ones(2, dtype=DOUBLE)),
    "between": lambda: vmap(lambda x: THEIRS.vmap(lambda y: grad(torch.sin)(y))(x))(X),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_transforms_of_torch_func_outside_are_refused(name: str) -> None:
    with pytest.raises(MixedTransformsError, match="inside a transform of torch.func"):
        OUTSIDE[name]()
    agree(vmap(grad(cubes))(X), 3 * X**2)
    agree(THEIRS.vmap(THEIRS.grad(cubes))(X), 3 * X**2)
