"""torch.compile and torch.export of programs that use transforms, and compiled functions inside of transforms."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.autograd.function import once_differentiable
from torch.distributions import Normal
from torch.fx.experimental.proxy_tensor import make_fx

from functrans import (
    chunk_vmap,
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    hvp,
    jacfwd,
    jacfwd_and_value,
    jacrev,
    jacrev_and_value,
    jet,
    jvp,
    laplacian,
    linear_transpose,
    linearize,
    lowp,
    rearrange,
    sparse_jacobian,
    value_and_grad,
    vjp,
    vmap,
)
from functrans.errors import CallError, MixedTransformsError
from functrans.extend import Interpreter, lower, map_tensors, run_transformed, wrap

x = torch.tensor([0.3, 1.0, 2.0])
rows = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [1.0, 1.0, 0.0], [2.0, 0.5, 1.0]])
eye = torch.eye(3)
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def f(x: Tensor) -> Tensor:
    return (x.sin() * x).sum()


def slope(x: Tensor) -> Tensor:
    """The gradient of ``f``."""
    return x.cos() * x + x.sin()


def curve(x: Tensor) -> Tensor:
    """The diagonal of its Hessian."""
    return 2 * x.cos() - x * x.sin()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.scale: Tensor

    def energy(self, x: Tensor) -> Tensor:
        return (self.weight * x.sin() * self.scale).sum()

    def forward(self, x: Tensor) -> Tensor:
        return grad(self.energy)(x)


class Bent(torch.autograd.Function):
    """Its derivative is 7, and not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7


class Square:
    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def method(self, x: Tensor) -> Tensor:
        return (self.factor * x**2).sum()


def writes(x: Tensor) -> Any:
    seen, own = torch.zeros(3), x.clone()

    def g(y: Tensor) -> Tensor:
        seen.add_(1)
        return (y.mul_(2) ** 2).sum()

    grad(g)(own)
    return seen, own


def closure(x: Tensor) -> Tensor:
    k = x * 2
    return grad(lambda y: (y.sin() * k).sum())(x)


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return vmap(grad(lambda row: (row @ (2 * eye)).float().square().sum()))(rows) * x


def through_tree(x: Tensor) -> Any:
    def g(d: Any, n: int, *, k: Tensor) -> Any:
        return (d["b"] * d["a"][0] ** n * k).sum(), {"n": n, "b": d["b"] * 2, "name": "aux"}

    found, aux = grad(g, has_aux=True)({"b": x, "a": [x * 2]}, 2, k=x)
    return found["b"], found["a"][0], aux["n"] * aux["b"]


def pulled(x: Tensor) -> Any:
    out, pullback, aux = vjp(lambda a, b: ({"o": a * b.sin()}, b.cos()), x, x + 1, has_aux=True)
    return out["o"], vmap(lambda r: pullback({"o": r}))(eye), aux, pullback(out)


def without_grad_outside(x: Tensor) -> Tensor:
    def g(y: Tensor) -> Tensor:
        with torch.no_grad():
            k = y * 2
        return (k * y).sum()

    with torch.no_grad():
        return grad(g)(x)


def nested(x: Tensor) -> Tensor:
    return grad(lambda y: (y * vmap(grad(lambda z, w: (z * w * y).sum()), (0, None))(rows, y)).sum())(x)


parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
scaled = Scaled()
layer = nn.Linear(3, 1)
outside = grad(f)
square = Square(torch.full((3,), 5.0))


#: Programs of x that go into one graph, each with what it is by hand.
def linearized(x: Tensor) -> Any:
    out, jvp_fn, aux = linearize(lambda y: (f(y), y + 1), x, has_aux=True)
    return out, aux, vmap(jvp_fn)(eye), grad(lambda y: linearize(f, y)[1](x))(x)


def functionalized(x: Tensor) -> Any:
    def pure(y: Tensor) -> Tensor:
        z = y + 1
        z.mul_(2).view(-1).sub_(1)
        return z * 2

    own = x.clone()
    functionalize(lambda y: y.mul_(3))(own)
    without_views = functionalize(pure, remove="mutations_and_views")
    slopes = grad(lambda y: (functionalize(lambda z: z.clone().mul_(2))(y) ** 2).sum())(x)
    return functionalize(pure)(x), without_views(x), slopes, own


PROGRAMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "made outside": (outside, slope),
    "called outside": (lambda x: outside(x) + 1, lambda x: slope(x) + 1),
    "made inside": (lambda x: grad(f)(x), slope),
    "vmap": (vmap(grad(f)), slope),
    "vmap inside": (lambda x: vmap(vmap(grad(torch.sin)))(rows * x), lambda x: (rows * x).cos()),
    "in_dims": (
        lambda x: vmap(lambda d, k, n: d["a"] * k + n, ({"a": 1, "c": None}, 0, None), 1)({"a": rows, "c": x}, x, 5),
        lambda x: rows * x + 5,
    ),
    "chunks": (lambda x: vmap(torch.sin, chunk_size=2)(rows * x), lambda x: (rows * x).sin()),
    "chunk_vmap": (lambda x: chunk_vmap(torch.sin)(rows * x), lambda x: (rows * x).sin()),
    "hessian": (hessian(f), lambda x: torch.diag(curve(x))),
    "hessian inside": (lambda x: hessian(f)(x), lambda x: torch.diag(curve(x))),
    "jacrev": (lambda x: jacrev(torch.sin)(x), lambda x: torch.diag(x.cos())),
    "jacobians and values": (
        lambda x: (jacrev_and_value(torch.sin)(x), jacfwd_and_value(torch.sin)(x)),
        lambda x: ((torch.diag(x.cos()), x.sin()), (torch.diag(x.cos()), x.sin())),
    ),
    "holomorphic": (
        lambda x: grad(lambda z: (z**2).sum(), holomorphic=True)(x + 1j),
        lambda x: 2 * (x + 1j),
    ),
    "hvp": (lambda x: hvp(f, (x,), (x + 1,)), lambda x: (f(x), (curve(x) * (x + 1),))),
    "jacfwd": (
        lambda x: jacfwd(lambda a, b: a * b, argnums=(0, 1))(x, x + 1),
        lambda x: (torch.diag(x + 1), torch.diag(x)),
    ),
    "argnums": (lambda x: grad(lambda a, b: (a * b.sin()).sum(), (0, -1))(x, x), lambda x: (x.sin(), x * x.cos())),
    "values": (lambda x: (grad_and_value(f)(x), value_and_grad(f)(x)), lambda x: ((slope(x), f(x)), (f(x), slope(x)))),
    "trees and aux": (through_tree, lambda x: ((2 * x) ** 2 * x, 4 * x * x * x, 4 * x)),
    "jvp": (lambda x: jvp(torch.sin, (x,), (x,)), lambda x: (x.sin(), x.cos() * x)),
    "jvp of jvp": (
        lambda x: jvp(lambda y: jvp(torch.sin, (y,), (x,))[1], (x,), (x,))[1],
        lambda x: -x.sin() * x * x,
    ),
    "vjp": (
        pulled,
        lambda x: (
            x * (x + 1).sin(),
            (torch.diag((x + 1).sin()), torch.diag(x * (x + 1).cos())),
            (x + 1).cos(),
            (x * (x + 1).sin() ** 2, x * (x + 1).sin() * x * (x + 1).cos()),
        ),
    ),
    "third derivative": (lambda x: grad(lambda a: grad(grad(lambda c: c**4))(a) * a)(x[1]), lambda x: 36 * x[1] ** 2),
    "closure": (closure, lambda x: x.cos() * x * 2),
    "partial": (
        lambda x: grad(functools.partial(lambda k, y: (k * y.sin()).sum(), x * 2))(x),
        lambda x: x.cos() * x * 2,
    ),
    "object": (lambda x: grad(square.method)(x), lambda x: 10 * x),
    "object made inside": (lambda x: grad(Square(x).method)(x), lambda x: 2 * x * x),
    "object as argument": (lambda x: grad(lambda y, m: m(y).sum())(x, layer), lambda x: layer.weight[0]),
    "torch function": (lambda x: grad(torch.sum)(x), torch.ones_like),
    "functional_call": (
        lambda x: grad(lambda p: functional_call(layer, p, (x,)).sum())(dict(layer.named_parameters()))["weight"][0],
        lambda x: x.clone(),
    ),
    "nested": (
        nested,  # each of the four rows gives y² inside: of 4 y³
        lambda x: 12 * x**2,
    ),
    "custom derivative": (lambda x: grad(lambda y: (Bent.apply(y) * y).sum())(x), lambda x: 7 * x + 2 * x),
    "custom derivative, vmap": (
        lambda x: grad(lambda y: vmap(lambda z: z * Bent.apply(y).sum())(y).sum())(x),
        lambda x: 2 * x.sum() + 7 * x.sum() + 0 * x,
    ),
    "no_grad": (without_grad_outside, lambda x: 2 * x),
    "writes": (writes, lambda x: (torch.ones(3), 2 * x)),
    "parameter": (lambda x: grad(lambda y: (parameter * y.sin()).sum())(x), lambda x: parameter * x.cos()),
    "module": (scaled, lambda x: scaled.weight * x.cos() * scaled.scale),
    "linearize": (linearized, lambda x: (f(x), x + 1, slope(x), curve(x) * x)),
    "linear_transpose": (
        lambda x: vmap(linear_transpose(lambda y: y * x, x))(rows)[0],
        lambda x: rows * x,
    ),
    "functionalize": (functionalized, lambda x: (4 * x + 2, 4 * x + 2, 8 * x, 3 * x)),
    "jet": (
        lambda x: jet(lambda a, b: a * b, (x, x), ([x, None], [eye[0], x])),
        lambda x: (x * x, [x * x + x * eye[0], x * x + 2 * x * eye[0]]),
    ),
    "laplacian": (
        lambda x: vmap(laplacian(lambda y: (y**3).sum(), with_value=True))(torch.stack([x, parameter])),
        lambda x: tuple(
            map(torch.stack, zip(*[((y**3).sum(), 3 * y * y, (6 * y).sum()) for y in (x, parameter)], strict=True))
        ),
    ),
    "grad of laplacian": (
        lambda x: grad(lambda p: laplacian(lambda y: (p * y**3).sum())(x))(parameter),
        lambda x: 6 * x,
    ),
    "lowp": (lambda x: lowp(grad(f), torch.bfloat16)(x).round(decimals=1), lambda x: slope(x).round(decimals=1)),
    "constants": (
        lambda x: grad(lambda y: (y * torch.tensor([1.0, 2.0, 3.0]) + torch.as_tensor(2) * torch.tensor(3.0)).sum())(x),
        lambda x: torch.tensor([1.0, 2.0, 3.0]),
    ),
    "a constant that is written": (
        lambda x: vmap(lambda y: torch.tensor([1.0, 2.0]).add_(y))(x),
        lambda x: x[:, None] + torch.tensor([1.0, 2.0]),
    ),
    "distribution": (
        lambda x: vmap(lambda m: Normal(m, 1.0, validate_args=False).log_prob(m + 1))(x),
        lambda x: 0 * x - (1 + math.log(2 * math.pi)) / 2,
    ),
    "rearrange": (
        lambda x: vmap(lambda y: rearrange(y, "(a b) -> b a", a=1))(rows * x),
        lambda x: (rows * x)[..., None],
    ),
    "jet of several": (
        lambda x: jet(lambda a, b: {"product": a * b}, (x, x + 1), ((x, x), (None, x))),
        lambda x: ({"product": x * (x + 1)}, {"product": [x * (x + 1), x * (x + 1) + x * x]}),
    ),
    "under autocast": (under_autocast, lambda x: 8 * rows * x),
    "laplacian along": (lambda x: laplacian(f, directions=eye[:2] * x)(x), lambda x: (curve(x) * x**2)[:2].sum()),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_go_into_one_graph(name: str, backend: str) -> None:
    program, by_hand = PROGRAMS[name]
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    for point in (x.clone(), x + 1):  # compiled, and run again
        result = compiled(point.clone())
        torch.testing.assert_close(result, by_hand(point))
        torch.testing.assert_close(result, program(point.clone()))


WITH_BACKWARD = [
    "made inside", "vmap", "hessian", "jacrev", "vjp", "jvp", "closure", "nested", "parameter", "module", "linearize",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_autograd_flows_through_the_graph(name: str, backend: str) -> None:
    program, by_hand = PROGRAMS[name]
    at = [x.clone().requires_grad_(), parameter, scaled.weight]

    def slopes(program: Callable[[Tensor], Any]) -> Any:
        out = sum((leaf.sin().sum() for leaf in torch.utils._pytree.tree_leaves(program(at[0]))), torch.zeros(()))
        return torch.autograd.grad(out, at, allow_unused=True)

    torch.testing.assert_close(slopes(torch.compile(program, backend=backend, fullgraph=True)), slopes(by_hand))


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_of_what_is_captured_are_seen(backend: str) -> None:
    module, factor = Scaled(), torch.ones(3)
    holder = {"k": torch.ones(3)}

    def program(x: Tensor) -> Tensor:
        return grad(lambda y: module.energy(y) + (factor * y).sum() + (holder["k"] * y).sum())(x)

    def by_hand() -> Tensor:
        return module.weight * x.cos() * module.scale + factor + holder["k"]

    compiled = torch.compile(program, backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), by_hand())
        with torch.no_grad():
            module.weight.mul_(2)
        module.scale.add_(1)
        factor.mul_(3)
        holder["k"] = holder["k"] + 1
        torch.testing.assert_close(compiled(x), by_hand())
        factor = factor + 1
        module.weight = nn.Parameter(module.weight + 1)
    torch.testing.assert_close(compiled(x), by_hand())


def test_a_module_trains_as_uncompiled() -> None:
    def trained(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))

        def loss(batch: Tensor) -> Tensor:
            slopes = grad(lambda z: functional_call(net, dict(net.named_parameters()), (z,)).sum())(batch)
            return (net(batch) ** 2).mean() + slopes.pow(2).sum()

        step = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for i in range(3):
            optimizer.zero_grad()
            step(rows + i).backward()
            optimizer.step()
        return [t.detach() for t in net.state_dict().values()]

    torch.testing.assert_close(trained(True), trained(False))


def test_dynamic_shapes_are_compiled_once() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def program(x: Tensor) -> Any:
        value, n = grad(lambda y: ((y**2).sum(), y.shape[0]), has_aux=True)(x[0])
        return vmap(grad(lambda y: (y**2).sum() * y.shape[0]))(x) + x.shape[0] * n, value

    for options in ({"backend": backend}, {"backend": "aot_eager"}):
        compiled = torch.compile(program, dynamic=True, fullgraph=True, **options)
        for n in (3, 5, 6):
            point = torch.arange(n * (n + 1.0)).view(n, n + 1)
            by_hand = 2 * point * (n + 1) + n * (n + 1), 2 * point[0]
            torch.testing.assert_close(compiled(point), by_hand)
    assert len(graphs) == 1


effects: list[str] = []
left: dict[str, Tensor] = {}


def with_effect(x: Tensor) -> Tensor:
    def g(y: Tensor) -> Tensor:
        effects.append("g")
        left["y"] = y * 2
        return (y**2).sum()

    return grad(g)(x)


def returned_pullback(x: Tensor) -> Any:
    return vjp(torch.sin, x)[1]


def broken_between(x: Tensor) -> Tensor:
    out, pullback = vjp(torch.sin, x)
    torch._dynamo.graph_break()
    return pullback(out)[0]


def tangents_between(x: Tensor) -> Any:
    jvp_fn, transposed = linearize(torch.sin, x)[1], linear_transpose(lambda y: y * x, x)
    torch._dynamo.graph_break()
    return jvp_fn(x), transposed(x)[0]


class Doubling(Interpreter):
    """A transform of somebody else's: what is computed inside is twice what it is."""

    kind = "doubling"

    def constant(self, value: Tensor) -> Any:
        return wrap(self, value)

    def process(self, op: Any, args: Any, kwargs: Any) -> Any:
        return map_tensors(self.constant, lower(self, op, [getattr(a, "value", a) for a in args], kwargs) * 2)


def doubled(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    doubling = Doubling(f)
    out: Any = run_transformed(doubling, lambda: f(doubling.constant(x)))
    return out.value


#: Programs that do not go into one graph: what Dynamo says of each, and what it is by hand.
OUTSIDE: dict[str, tuple[Callable[[Tensor], Any], str, Callable[[Tensor], Any]]] = {
    "effect": (with_effect, "leaves a tensor", lambda x: 2 * x),
    "branch": (
        lambda x: grad(lambda y: (y**2).sum() if y.sum() > 0 else (y**3).sum())(x),
        "branching",
        lambda x: 2 * x,
    ),
    "pullback kept": (broken_between, "graph_break", lambda x: x.cos() * x.sin()),
    "tangents kept": (tangents_between, "graph_break", lambda x: (x.cos() * x, x * x)),
    "sparse": (lambda x: sparse_jacobian(lambda y: y**2)(x).to_dense(), "functrans|trace", lambda x: (2 * x).diag()),
    "loop": (
        lambda x: vmap(lambda y: while_loop(lambda z: z < 5, lambda z: (z + 1,), (y,))[0])(x),
        "while_loop",
        lambda x: x + (5 - x).ceil(),
    ),
    "somebody else's": (lambda x: doubled(torch.sin, x) + grad(f)(x), "trace", lambda x: 2 * x.sin() + slope(x)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OUTSIDE)
def test_what_does_not_go_into_a_graph_is_run_outside_of_it(name: str, backend: str) -> None:
    program, said, by_hand = OUTSIDE[name]
    effects.clear()
    torch.testing.assert_close(torch.compile(program, backend=backend)(x.clone()), by_hand(x))
    assert effects == (["g"] if name == "effect" else [])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=said):
        torch.compile(program, backend=backend, fullgraph=True)(x.clone())


class Box:
    """A container that batches itself, as a TensorDict does: tensors by name, which have a batch size in common."""

    def __init__(self, tensors: dict[str, Tensor], batch_size: tuple[int, ...]) -> None:
        self.tensors, self.batch_size, self.is_locked = tensors, torch.Size(batch_size), False

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.tensors[key]
        return self.apply(lambda value: value[key], self.batch_size[:-1])

    @property
    def shape(self) -> torch.Size:
        return self.batch_size

    def dim(self) -> int:
        return len(self.batch_size)

    def clone(self, recurse: bool) -> Box:
        return Box(dict(self.tensors), self.batch_size)

    def values(self, nested: bool, leaves: bool) -> Any:
        return self.tensors.values()

    def apply(self, f: Callable[[Tensor], Tensor], batch_size: Any) -> Box:
        return Box({name: f(value) for name, value in self.tensors.items()}, batch_size)

    def _add_batch_dim(self, *, in_dim: int, vmap_level: int) -> Box:
        sizes = [n for i, n in enumerate(self.batch_size) if i != in_dim]
        return self.apply(lambda value: torch._C._functorch._add_batch_dim(value, in_dim, vmap_level), sizes)

    def _maybe_remove_batch_dim(self, name: str, vmap_level: int, batch_size: int, out_dim: int) -> Box:
        back = torch._functorch.vmap._maybe_remove_batch_dim  # type: ignore[attr-defined]
        sizes = list(self.batch_size)
        sizes.insert(out_dim, batch_size)
        return self.apply(lambda value: back(name, value, vmap_level, batch_size, out_dim), sizes)


torch.utils._pytree.register_pytree_node(
    Box,
    lambda box: (list(box.tensors.values()), (tuple(box.tensors), tuple(box.batch_size))),
    lambda values, context: Box(dict(zip(context[0], values, strict=True)), context[1]),
)


def by_example(box: Box, factor: Tensor) -> tuple[Tensor, Box]:
    assert box.batch_size == () and box["a"].shape == (3,)
    box["a"][0].mul_(2)
    return box["a"].sum() * factor, Box({"b": box["a"].sin() * factor, "c": factor}, ())


CONTAINERS: dict[str, Callable[..., Any]] = {
    "in and out": lambda box, y: vmap(by_example)(box, y),
    "in a dict": lambda box, y: vmap(lambda tree: by_example(tree["box"], tree["y"]))({"box": box, "y": y}),
    "gradients": lambda box, y: vmap(grad(lambda w, b: (b["a"] * w).sum()), (None, 0))(x, box),
    "the same for all": lambda box, y: vmap(lambda b, y: b["a"].sum() * y, (None, 0))(box, y),
    "made inside": lambda box, y: vmap(lambda y: Box({"d": y * 2}, ()), out_dims=-1)(y),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_that_batch_themselves(name: str) -> None:
    program, y = CONTAINERS[name], torch.arange(4.0)
    outcomes = []
    for run in (program, torch.compile(program, fullgraph=True, backend="aot_eager")):
        box = Box({"a": rows.clone()}, (4,))
        outcomes.append(torch.utils._pytree.tree_flatten((run(box, y), box)))
    (expected, how), (found, as_expected) = outcomes
    assert how == as_expected
    torch.testing.assert_close(found, expected)


def test_a_pullback_may_leave_a_compiled_function() -> None:
    pullback = torch.compile(returned_pullback, backend="eager")(x)
    torch.testing.assert_close(pullback(x), (x.cos() * x,))
    torch.testing.assert_close(torch.compile(lambda c: pullback(c)[0] + 1, backend="eager")(x), x.cos() * x + 1)


def test_errors_are_those_of_the_uncompiled_program() -> None:
    for program, error in (
        (lambda x: grad(lambda y: y * 2)(x), CallError),
        (lambda x: vmap(torch.sin, in_dims=3)(x), CallError),
        (lambda x: jvp(torch.sin, (x,), (x[0],)), CallError),
        (lambda x: torch.func.vmap(grad(torch.sin))(x), MixedTransformsError),
    ):
        with pytest.raises(error) as uncompiled:
            program(x)
        with pytest.raises(error) as compiled:
            torch.compile(program, backend="eager")(x)
        assert str(compiled.value) == str(uncompiled.value)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected a scalar tensor"):
        torch.compile(lambda x: grad(lambda y: y * 2)(x), backend="eager", fullgraph=True)(x)


class BentForward(torch.autograd.Function):
    """Its tangent is 5, and neither that of its forward nor of its backward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_custom_tangent_is_used(backend: str) -> None:
    def program(x: Tensor) -> Any:
        slopes = vmap(grad(lambda y: BentForward.apply(y) * y))(x)
        return jvp(BentForward.apply, (x,), (x,))[1], jacfwd(BentForward.apply)(x), slopes

    compiled = torch.compile(program, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), (5 * x, 5 * eye, 7 * x + 2 * x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_numbers_are_drawn_at_every_call(backend: str) -> None:
    def noise(randomness: str) -> Callable[[Tensor], Tensor]:
        return torch.compile(
            vmap(lambda y: torch.rand(3) + 0 * y, randomness=randomness), backend=backend, fullgraph=True
        )

    different, same = noise("different"), noise("same")
    first, second = different(rows), different(rows)
    assert first.flatten().unique().numel() == 12 and not first.equal(second)
    first, second = same(rows), same(rows)
    assert first.unique(dim=0).shape[0] == 1 and not first.equal(second)

    def dropped(x: Tensor) -> tuple[Tensor, Tensor]:
        out, pullback = vjp(lambda y: nn.functional.dropout(y, 0.5), x)
        return out, pullback(torch.ones(100))[0]

    out, slopes = torch.compile(dropped, backend=backend, fullgraph=True)(torch.ones(100))
    assert out.equal(slopes) and set(out.tolist()) == {0.0, 2.0}  # the pullback has the mask of its forward


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_function_inside_a_transform(backend: str, fullgraph: bool) -> None:
    compiled = torch.compile(f, backend=backend, fullgraph=fullgraph)
    module = torch.compile(layer, backend=backend, fullgraph=fullgraph)
    for _ in range(2):
        torch.testing.assert_close(grad(compiled)(x), slope(x))
        torch.testing.assert_close(vmap(grad(lambda y: compiled(y) * 2))(rows), 2 * slope(rows))
        torch.testing.assert_close(hessian(compiled)(x), torch.diag(curve(x)))
        torch.testing.assert_close(jvp(compiled, (x,), (x,))[1], (slope(x) * x).sum())
        torch.testing.assert_close(grad(lambda y: module(y).sum())(x), layer.weight[0])
        torch.testing.assert_close(compiled(x), f(x))


def test_inside_a_transform_nothing_is_compiled_and_outside_all_is_as_before() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(f, backend=backend)
    grad(compiled)(x)
    assert graphs == []
    compiled(x)
    grad(compiled)(x)
    with pytest.raises(ZeroDivisionError):
        grad(lambda y: compiled(y) / 0 + 1 // 0)(x)
    compiled(x)
    assert len(graphs) == 1


def test_another_thread_is_compiled_while_a_transform_runs() -> None:
    graphs, results = [], []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(f, backend=backend)

    def holding(y: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: results.append(compiled(x)))
        other.start()
        other.join()
        return compiled(y)

    torch.testing.assert_close(grad(holding)(x), slope(x))
    torch.testing.assert_close(results, [f(x)])
    assert len(graphs) == 1


def test_what_a_compiled_function_captures_is_differentiated_by_autograd() -> None:
    captured = torch.ones(3, requires_grad=True)
    compiled = torch.compile(lambda: (captured * 2).sum(), backend="aot_eager", fullgraph=True)
    compiled()
    gradient = grad(lambda y: (y * compiled()).sum())(x)
    torch.testing.assert_close(gradient, torch.full((3,), 6.0))
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), captured), (torch.full((3,), 6.0),))


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: Tensor) -> Any:
        return vmap(grad(self.inner.energy))(x), jacrev(lambda y: y * self.inner.weight)(x[0])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, dynamic: bool) -> None:
    module = Exported()
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    exported = torch.export.export(module, (rows,), strict=strict, dynamic_shapes=shapes).module()
    batch = torch.cat([rows, rows[:2]]) if dynamic else rows + 1
    with torch.no_grad():
        exported.get_parameter("inner.weight").mul_(3)
    weight = torch.tensor([3.0, 6.0, 9.0])
    torch.testing.assert_close(exported(batch), (weight * batch.cos() * 2, torch.diag(weight)))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx(mode: str, pre_dispatch: bool) -> None:
    graph = make_fx(vmap(grad(f)), tracing_mode=mode, pre_dispatch=pre_dispatch)(rows)
    torch.testing.assert_close(graph(rows + 1), slope(rows + 1))
    assert torch.sin(x).equal(x.sin()) and not torch._C._dispatch_tls_is_dispatch_key_included(
        torch._C.DispatchKey.PreDispatch
    )


def test_dynamo_is_imported_only_when_something_is_compiled() -> None:
    program = """
import sys
import torch, functrans
assert "torch._dynamo" not in sys.modules
functrans.grad(torch.sin)(torch.tensor(1.0))
assert "torch._dynamo" not in sys.modules
def inside(x):  # the first of all compiled functions, in a transform
    return torch.compile(torch.sin, backend="eager", fullgraph=True)(x)
assert functrans.grad(inside)(torch.tensor(0.0)) == 1
assert "torch._dynamo" in sys.modules
assert torch.compile(functrans.grad(torch.sin), backend="eager", fullgraph=True)(torch.tensor(0.0)) == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_dynamo_may_be_imported_first() -> None:
    program = """
import torch, torch._dynamo, functrans
assert torch.compile(functrans.grad(torch.sin), backend="eager", fullgraph=True)(torch.tensor(0.0)) == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vmap", "hessian", "vjp", "parameter", "writes", "linearize", "functionalize"])
def test_inductor(name: str) -> None:
    program, by_hand = PROGRAMS[name]
    compiled = torch.compile(program, fullgraph=True)
    for point in (x.clone(), x + 1):
        torch.testing.assert_close(compiled(point.clone()), by_hand(point))


@pytest.mark.slow
def test_inductor_tells_graphs_apart_that_differ_in_the_function_alone() -> None:
    for function, by_hand in ((torch.sin, x.cos()), (torch.cos, -x.sin()), (torch.exp, x.exp())):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(vmap(grad(function)), fullgraph=True)(x), by_hand)
