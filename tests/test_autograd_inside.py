"""``torch.autograd.grad``, ``requires_grad_`` and ``backward`` inside of transforms, beside the same without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from slow_ways import some
from torch import Tensor, nn
from torch.nn import functional as F

from functrans import functional_call, grad, jacrev, jvp, linearize, vjp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import InsideTransformError
from functrans.extend import PullbackInterpreter, PullbackTable

DOUBLE = torch.float64
close = torch.testing.assert_close
gradient = torch.autograd.grad


ROWS, M, ONE = some(4, 6), some(6, 6, seed=1), torch.ones((), dtype=DOUBLE)


def eager(f: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """For each row, the gradient of the sum of squares of ``f``."""
    leaves = [row.detach().clone().requires_grad_() for row in rows]
    return torch.stack([gradient((f(leaf) ** 2).sum(), leaf)[0] for leaf in leaves])


#: Each takes rows to what ``eager`` computes of them.
DIFFERENTIATED: dict[str, Callable[..., Tensor]] = {
    "grad": lambda f, rows: torch.stack([grad(lambda x: (f(x) ** 2).sum())(row) for row in rows]),
    "vmap of grad": lambda f, rows: vmap(grad(lambda x: (f(x) ** 2).sum()))(rows),
    "vmap along 1": lambda f, rows: vmap(grad(lambda x: (f(x) ** 2).sum()), 1)(rows.T.contiguous()),
    "grad of vmap": lambda f, rows: grad(lambda x: (vmap(f)(x) ** 2).sum())(rows),
    "vmap of vjp": lambda f, rows: vmap(lambda row: vjp(lambda x: (f(x) ** 2).sum(), row)[1](ONE)[0])(rows),
    "jacrev": lambda f, rows: torch.stack([2 * vjp(f, row)[0] @ jacrev(f)(row) for row in rows]),
    "twice vmap": lambda f, rows: vmap(vmap(grad(lambda x: (f(x) ** 2).sum())))(rows.view(2, 2, -1)).reshape(4, -1),
}  # fmt: skip


def energy(x: Tensor) -> Tensor:
    return (torch.tanh(x @ M) * x.exp()).sum() + (1 / (1 + x**2)).prod()


def asked(x: Tensor) -> Tensor:
    return gradient(energy(x), x, create_graph=True)[0]


def asked_again(x: Tensor) -> Tensor:
    (first,) = gradient(energy(x), [x], create_graph=True)
    return gradient((first.sin() * x).sum(), x, create_graph=True)[0]


def of_a_copy(x: Tensor) -> Tensor:
    y = x.clone().requires_grad_()
    return gradient(energy(y), y, create_graph=True)[0] * x


def with_its_cotangent(x: Tensor) -> Tensor:
    y = torch.stack([x.sin(), x * x.flip(0)])
    return gradient(y, x, torch.stack([x, x.cos()]), create_graph=True)[0]


def several(x: Tensor) -> Tensor:
    y, z = x * 2, x.exp()
    found = gradient([(y * z).sum(), z.prod()], [y, z, x], [x[0], x[1] ** 2], create_graph=True)
    return sum((k + 1) * g for k, g in enumerate(found))  # type: ignore[return-value]


def by_a_constant(x: Tensor) -> Tensor:
    place = torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_()
    return gradient(energy(place * x) * x[0], place, create_graph=True)[0]


def by_a_constant_with_cotangents(x: Tensor) -> Tensor:
    place = torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_()
    return gradient([place**3, (place * x).sin()], place, [x, x.exp()], create_graph=True)[0]


CAPTURED = torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_()


def by_what_is_captured(x: Tensor) -> Tensor:
    y = (CAPTURED * x).sin()
    return gradient([CAPTURED**2, y, y], CAPTURED, [x, x.exp(), x], create_graph=True)[0]


def by_both(x: Tensor) -> Tensor:
    place = torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_()
    by_place, by_x = gradient((place**2 * x.sin()).prod(), [place, x], create_graph=True)
    return by_place * by_x


WEIGHTS = torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE)


def batched(x: Tensor) -> Tensor:
    y, z = (x**3).cumsum(0), x.exp() * x.flip(0)
    rows = [torch.stack([x, x.sin(), x.flip(0)]), torch.stack([x.cos(), x, x * x])]
    by_x, by_y = gradient([y, z + y], [x, y], rows, create_graph=True, is_grads_batched=True)
    return WEIGHTS @ (by_x * by_y)


def batched_by_both(x: Tensor) -> Tensor:
    place = torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_()
    rows = torch.stack([x, x**2, x.exp()])
    y = (place**2 * x.sin()).cumsum(0)
    by_place, by_x = gradient(y, [place, x], rows, create_graph=True, is_grads_batched=True)
    return WEIGHTS @ (by_place * by_x)


def batched_by_constants(x: Tensor) -> Tensor:
    y = (CAPTURED * x).sin()
    rows = [torch.stack([x, x**2, x]), torch.stack([x.exp(), x, x.cos()])]
    return WEIGHTS @ gradient([CAPTURED**2, y], CAPTURED, rows, create_graph=True, is_grads_batched=True)[0]


def by_vmaps_of_cotangents(x: Tensor) -> Tensor:
    y = (x**3).cumsum(0)
    slopes = lambda v: gradient(y, x, torch.stack([v, v * x]), create_graph=True, is_grads_batched=True)[0]
    return (vmap(slopes)(M[:3]) * M[3]).sum((0, 1)) + vmap(lambda v: gradient(y, x, v, create_graph=True)[0])(M)[0]


FUNCTIONS = (asked, asked_again, of_a_copy, with_its_cotangent, several, by_a_constant, by_a_constant_with_cotangents,
             by_what_is_captured, by_both, batched, batched_by_both, batched_by_constants, by_vmaps_of_cotangents)
CONSTANTS = (by_a_constant, by_a_constant_with_cotangents, by_what_is_captured, batched_by_constants)


@pytest.mark.parametrize("transform", DIFFERENTIATED)
@pytest.mark.parametrize("f", FUNCTIONS)
def test_a_gradient_inside_is_differentiated(f: Callable[[Tensor], Tensor], transform: str) -> None:
    close(DIFFERENTIATED[transform](f, ROWS), eager(f, ROWS))
    assert interpreter_stack() == []


@pytest.mark.parametrize("f", FUNCTIONS)
def test_a_gradient_inside_has_tangents(f: Callable[[Tensor], Tensor]) -> None:
    """The levels below have the derivative: of the gradient at grad's level, and at a jvp level of what is followed."""
    row, t = ROWS[0], ROWS[1]
    by_hand = torch.autograd.functional.jvp(f, row, t)[1]
    close(grad(lambda s: (f(row + s * t) * ROWS[2]).sum())(torch.zeros((), dtype=DOUBLE)), (by_hand * ROWS[2]).sum())
    squares = lambda f: lambda x: (f(x) ** 2).sum()
    second = torch.autograd.functional.hvp(squares(f), row, t)[1]
    close(jvp(grad(squares(f)), (row,), (t,))[1], second)
    close(grad(lambda x: (grad(squares(f))(x) * t).sum())(row), second)
    if f in CONSTANTS:
        close(jvp(f, (row,), (t,))[1], by_hand)
        close(vmap(lambda t: jvp(f, (row,), (t,))[1])(ROWS)[1], by_hand)
    followed = row.clone().requires_grad_()  # by PyTorch itself
    close(jvp(f, (followed,), (t,))[1].detach(), by_hand)
    with pytest.raises(InsideTransformError, match="along tangents that are no constants"):
        jvp(f, (followed,), (followed * 2,))


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f.__name__: f for f in (torch.sigmoid, F.silu, F.gelu, F.softplus, F.mish, F.elu, torch.special.erfc)},
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "linear": lambda x: F.linear(x, M).tanh(),
    "matmul": lambda x: x @ M @ x,
    "norm": lambda x: x.norm(),
    "scans": lambda x: x.cumsum(0) ** 3 + x.cumprod(0),
    "joined": lambda x: torch.cat([x, x * x]) ** 2,
    "index": lambda x: x[torch.tensor([0, 0, 2])] ** 3,
    "where": lambda x: torch.where(x > 0, x**3, x**2),
    "written": lambda x: (x * 2).sin_().mul_(3) ** 2,
    "views written": lambda x: ((y := x.clone())[:3].mul_(x[3:]), y**2)[1],
    "pointwise": lambda x: x.relu() * (-x).exp() / (2 + x.cos()) + 1 / (1 + x**2),
    "statistics": lambda x: x.var() * x.std() + x.prod() + x.logsumexp(0),
    "sorted": lambda x: x.sort().values[1:] ** 3,
    "attention": lambda x: (x.view(2, 3) @ x.view(3, 2)).softmax(-1) @ x.view(2, 3),
    "convolution": lambda x: F.conv1d(x.view(1, 1, 6), M[:1, :3].view(1, 1, 3)) ** 3,
    "pooling": lambda x: F.max_pool1d(x.view(1, 1, 6), 2) ** 3 + F.avg_pool1d(x.view(1, 1, 6), 2) ** 3,
    "embedding": lambda x: F.embedding(torch.tensor([0, 1, 0]), x.view(3, 2)) ** 3,
    "inverse": lambda x: torch.linalg.inv(torch.diag(x) + M),
    "losses": lambda x: F.smooth_l1_loss(x, x.flip(0) ** 2) * F.cross_entropy(x, torch.tensor(1)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_through_every_kind_of_operator(name: str) -> None:
    f = lambda x: gradient((OPERATORS[name](x) * 1.3).sum(), x, create_graph=True)[0]
    expected = eager(f, ROWS)
    close(DIFFERENTIATED["grad"](f, ROWS[:1]), expected[:1])
    close(DIFFERENTIATED["vmap of grad"](f, ROWS), expected)
    close(DIFFERENTIATED["grad of vmap"](f, ROWS), expected)


# Without a graph


def cubes(x: Tensor) -> Tensor:
    return (x**3).cumsum(0)


def hooked_cubes(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: 3 * g)
    return gradient((y**3).sum(), x)[0] * x + gradient((y**3).sum(), y)[0]


def by_a_leaf(x: Tensor) -> Tensor:
    place = torch.linspace(-1, 1, 6, dtype=DOUBLE, requires_grad=True)
    return gradient((place**2 * x.sin()).sum(), place)[0] * x


#: From a tensor to its product with a gradient that is a constant to what records.
WITHOUT_GRAPH: dict[str, Callable[[Tensor], Tensor]] = {
    "of an argument": lambda x: gradient(energy(x), x)[0] * x.sin(),
    "of a result": lambda x: gradient(((y := x * x) ** 3).sum(), y)[0] * y,
    "several": lambda x: sum(gradient([(x * x).sin().sum(), (x**3).prod()], [x], [x[0], x[1]])) * x,
    "PyTorch's derivative": lambda x: gradient(torch.linalg.svdvals(torch.diag(x) + M).sum(), x)[0] * x,
    "a Function": lambda x: gradient(Cube.apply(x).sum(), x)[0] * x,
    "hooks": hooked_cubes,
    "by a leaf": by_a_leaf,
    "by what is captured": lambda x: gradient((CAPTURED**2 * x.sin()).sum(), CAPTURED)[0] * x,
    "rows": lambda x: WEIGHTS[:2] @ gradient(cubes(x), x, torch.stack([x, x**2]), is_grads_batched=True)[0] * x,
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_GRAPH)
def test_a_gradient_without_a_graph_is_a_constant_with_tangents(name: str) -> None:
    f = WITHOUT_GRAPH[name]
    expected = eager(f, ROWS)
    for transform in DIFFERENTIATED.values():
        close(transform(f, ROWS), expected)
    row, t, step = ROWS[0], ROWS[1], 1e-5
    value = lambda x: f(x.clone().requires_grad_()).detach()
    slope = lambda x: eager(f, x[None])[0]
    for function, by_loop in ((lambda x: vjp(f, x)[0], value), (grad(lambda x: (f(x) ** 2).sum()), slope)):
        differences = (by_loop(row + step * t) - by_loop(row - step * t)) / (2 * step)
        close(jvp(function, (row,), (t,))[1], differences, rtol=1e-6, atol=1e-6)
        close(vmap(lambda t: jvp(function, (row,), (t,))[1])(ROWS)[1], differences, rtol=1e-6, atol=1e-6)  # noqa: B023


def test_a_result_that_depends_by_such_gradients_alone_is_refused() -> None:
    """As by PyTorch, whose backward() finds nothing that requires grad."""
    alone = lambda x: gradient(energy(x), x)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        eager(alone, ROWS[:1])
    twice = lambda x: grad(lambda y: (gradient((x * y**3).sum(), y)[0] * y).sum())(ROWS[1])
    for f in (alone, twice):
        for transform in ("grad", "vmap of grad", "grad of vmap", "vmap of vjp"):
            with pytest.raises(InsideTransformError, match="without create_graph=True alone, .* Use create_graph=True"):
                DIFFERENTIATED[transform](f, ROWS)
            assert interpreter_stack() == []
    close(vmap(alone)(ROWS.clone().requires_grad_()), torch.stack([grad(energy)(row) for row in ROWS]))


FUNCTIONAL: dict[str, Callable[..., Any]] = {
    "jacobian": lambda x, **how: torch.autograd.functional.jacobian(cubes, x, **how),
    "vectorized": lambda x, **how: torch.autograd.functional.jacobian(cubes, x, vectorize=True, **how),
    "hessian": lambda x, **how: torch.autograd.functional.hessian(energy, x, **how),
    "vjp": lambda x, **how: torch.autograd.functional.vjp(cubes, x, M[0], **how)[1],
    "jvp": lambda x, **how: torch.autograd.functional.jvp(cubes, x, M[0], **how)[1],
    "hvp": lambda x, **how: torch.autograd.functional.hvp(energy, x, M[0], **how)[1],
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_autograd_functional_inside(name: str) -> None:
    f = lambda x, **how: (FUNCTIONAL[name](x, **how) * x).view(-1, 6).sum(0)
    close(vmap(f)(ROWS).detach(), torch.stack([f(row) for row in ROWS]))
    for how in ({}, {"create_graph": True}):
        g = lambda x: f(x, **how)  # noqa: B023
        expected = eager(g, ROWS)
        close(DIFFERENTIATED["vmap of grad"](g, ROWS).detach(), expected)
        close(DIFFERENTIATED["grad of vmap"](g, ROWS).detach(), expected)


# Under vmap alone


def leaf(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return gradient(energy(x), x)[0]


def own_argument(x: Tensor) -> Tensor:
    x.requires_grad_()
    assert x.requires_grad and x.is_leaf
    first = gradient(energy(x), x, create_graph=True)[0]
    return gradient(first.sum(), x)[0]


def left_in_grad(x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    assert x.grad is None
    energy(x).backward()
    energy(x).backward(x.detach()[0])
    (x * 2).backward(x.detach())
    return x.grad  # type: ignore[return-value]


def by_what_is_shared(x: Tensor) -> Tensor:
    place = torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_()
    return gradient([energy(place * x), (place**2).sum()], place)[0] * x


def set_as_an_attribute(x: Tensor) -> Tensor:
    x = x * 2
    x.requires_grad = True
    return gradient((x**3).sum(), x)[0]


@pytest.mark.parametrize("f", [leaf, own_argument, left_in_grad, by_what_is_shared, set_as_an_attribute])
def test_examples_that_are_leaves(f: Callable[[Tensor], Tensor]) -> None:
    expected = torch.stack([f(row.clone()) for row in ROWS]).detach()
    for in_dim, out_dim in ((0, 0), (1, 1)):
        rows = ROWS.movedim(0, in_dim).contiguous()
        close(vmap(f, in_dim, out_dim)(rows).detach().movedim(out_dim, 0), expected)
        assert not rows.requires_grad
    close(vmap(vmap(f))(ROWS.view(2, 2, 6)).detach().view(4, 6), expected)


def test_backward_adds_to_captured_leaves_as_a_loop_does() -> None:
    layer = nn.Linear(6, 2, dtype=DOUBLE)
    for row in ROWS:
        (layer(row) ** 2).sum().backward()
    expected = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    vmap(lambda row: ((layer(row) ** 2).sum().backward(), row)[1])(ROWS)
    close([p.grad for p in layer.parameters()], expected)
    layer.zero_grad()
    vmap(lambda row: ((layer(row) ** 2).sum().backward(inputs=[layer.bias]), row)[1])(ROWS)
    assert layer.weight.grad is None
    close(layer.bias.grad, expected[1])
    with pytest.raises(InsideTransformError, match="backward"):  # a loop would repeat it
        vmap(lambda row: ((layer(ROWS[0]) ** 2).sum().backward(), row)[1])(ROWS)
    with pytest.raises(InsideTransformError, match="backward"):
        vmap(lambda a: vmap(lambda row: ((layer(row) ** 2).sum().backward(), row)[1])(ROWS))(ROWS)


# Programs


class Potential(nn.Module):
    """Forces are a gradient, which training differentiates by the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 1))

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        places = places.requires_grad_()
        distances = torch.stack([(places[i] - places[j]).norm() for i, j in ((0, 1), (0, 2), (1, 2))])
        total = self.net(distances).sum()
        (slope,) = gradient(total, places, create_graph=True)
        return total, -slope


def test_training_by_forces() -> None:
    torch.manual_seed(0)
    model = Potential().double()
    molecules, targets = some(4, 3, 2), some(4, 3, 2, seed=1)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Any, places: Tensor, target: Tensor) -> Tensor:
        total, forces = functional_call(model, params, (places,))
        return total**2 + ((forces - target) ** 2).sum()

    expected: list[list[Tensor]] = []
    for places, target in zip(molecules, targets, strict=True):
        total, forces = model(places.clone())
        own = total**2 + ((forces - target) ** 2).sum()
        expected.append(list(gradient(own, list(model.parameters()))))
    each = vmap(grad(loss), (None, 0, 0))(params, molecules, targets)
    for k, found in enumerate(each.values()):
        close(found.detach(), torch.stack([e[k] for e in expected]))
    alone = grad(loss)(params, molecules[0].clone(), targets[0])
    for k, found in enumerate(alone.values()):
        close(found.detach(), expected[0][k])
    mean = grad(lambda p: vmap(loss, (None, 0, 0))(p, molecules, targets).mean())(params)
    for k, found in enumerate(mean.values()):
        close(found.detach(), sum(e[k] for e in expected) / 4)
    forces = torch.stack([model(places.clone())[1] for places in molecules])
    close(vmap(model)(molecules)[1], forces)


def test_a_physics_informed_network() -> None:
    """u_xx of a network inside of its loss, and per-point gradients of that for the parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def residual(params: Any, x: Tensor, run: Any = functional_call) -> Tensor:
        x = x.requires_grad_()
        (u_x,) = gradient(run(net, params, (x,)).sum(), x, create_graph=True)
        (u_xx,) = gradient(u_x.sum(), x, create_graph=True)
        return ((u_xx + u_x * x) ** 2).sum()

    points = some(5, 1)
    found = vmap(grad(residual), (None, 0))(params, points)
    rows = []
    for x in points:
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        rows.append(gradient(residual(leaves, x.clone()), list(leaves.values()), materialize_grads=True))
    for k, name in enumerate(params):
        close(found[name].detach(), torch.stack([row[k] for row in rows]))


# What is refused, and what is said


def test_options() -> None:
    def unused(x: Tensor, **options: Any) -> Any:
        y = x * 2
        return gradient(y.sum(), [y, x.sin()], create_graph=True, **options)

    by_grad = lambda f: grad(lambda x: f(x)[0].sum() * x.sum())(ROWS[0])
    by_vmap = lambda f: vmap(f)(ROWS.clone().requires_grad_())
    for transform in (by_grad, by_vmap):
        transform(lambda x: unused(x, allow_unused=True)[:1])
        transform(lambda x: unused(x, materialize_grads=True))
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            transform(unused)
        with pytest.raises(RuntimeError, match="only for scalar outputs"):
            transform(lambda x: gradient(x * 2, x, create_graph=True))
        with pytest.raises(RuntimeError, match=r"a cotangent of shape \(1,\) for an output of shape \(6,\)"):
            transform(lambda x: gradient(x * 2, x, x[:1], create_graph=True))
        def rows(x: Tensor, *cotangents: Any, **options: Any) -> Any:
            options = {"is_grads_batched": True, "create_graph": True, **options}
            return gradient([x * 2] * len(cotangents), [x, x.sin()], cotangents, **options)

        for wrong in ([None], [ONE], [torch.ones(2, 6), torch.ones(3, 6)]):
            with pytest.raises(RuntimeError, match="is_grads_batched=True with cotangents .* one batch of each"):
                transform(lambda x: rows(x, *wrong))  # noqa: B023
        with pytest.raises(RuntimeError, match=r"shape \(2, 1\), a batch of 2, for an output of shape \(6,\)"):
            transform(lambda x: rows(x, torch.ones(2, 1)))
        transform(lambda x: close(rows(x, M, materialize_grads=True)[1].detach() + M, M.expand(6, 6)) or [x])
    if "dict" in str(torch.autograd.grad.__doc__) and torch.__version__ >= "2.13":
        by_name = grad(lambda x: (gradient((x**3).sum(), {"x": x}, create_graph=True)["x"] ** 2).sum())
        close(by_name(ROWS[0]), eager(lambda x: 3 * x**2, ROWS[:1])[0])


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Any) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


def svd(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(torch.diag(x) + M)


def hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda g: 2 * g)
    return x.exp()


def inner(f: Callable[[Tensor], Tensor], **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: gradient(f(x).sum(), x, **options)[0]


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "PyTorch's derivative": (inner(svd, create_graph=True), "through aten._linalg_svd.default"),
    "a Function": (inner(Cube.apply, create_graph=True), r"through (Batched)?Cube.apply"),
    "hooks": (inner(hooked, create_graph=True), "has hooks"),
    "not a function of it": (lambda x: gradient(x.sum(), ROWS.clone(), create_graph=True)[0], "has not been recorded"),
    "backward": (lambda x: (energy(x).backward(), x.grad)[1], r"Tensor.backward\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_derivative_is_refused(name: str) -> None:
    f, why = REFUSED[name]
    for transform in ("grad", "vmap of grad", "grad of vmap"):
        with pytest.raises(InsideTransformError, match=why):
            DIFFERENTIATED[transform](f, ROWS)
        assert interpreter_stack() == []


def test_gradients_of_what_nobody_records_are_refused() -> None:
    with pytest.raises(InsideTransformError, match="torch.autograd.grad inside linearize"):
        linearize(lambda x: gradient(energy(x), x, create_graph=True)[0], ROWS[0].clone().requires_grad_())
    kept: list[Tensor] = []
    vmap(lambda x: (kept.append(x.exp()), x)[1])(ROWS)
    with pytest.raises(InsideTransformError, match="torch.autograd.grad inside vmap"):
        gradient(kept[0], ROWS)


class Noting(PullbackInterpreter):
    pullbacks = PullbackTable("noted on the way back")


def test_a_way_back_with_rules_of_its_own_is_not_passed_by() -> None:
    place = torch.ones(6, dtype=DOUBLE).requires_grad_()
    for f in (asked, lambda x: gradient((x * place**3).sum(), place, create_graph=True)[0]):
        with pytest.raises(InsideTransformError, match="torch.autograd.grad past a way back of its own"):
            grad(lambda x: f(x).sum(), interpreter=Noting)(ROWS[0])  # noqa: B023


class Alone(torch.autograd.Function):
    """The square, with a backward pass that takes one cotangent at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert grad.shape == x.shape and type(grad) is Tensor
        return 2 * x * grad * grad.sum().item() ** 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_go_through_a_graph_of_the_base_one_by_one(count: int) -> None:
    leaf = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE, requires_grad=True)
    unused = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    with torch.enable_grad():
        y = Alone.apply(leaf)
    rows = torch.arange(1.0, 3 * count + 1, dtype=DOUBLE).reshape(count, 3)

    def f(scale: Tensor) -> Tensor:
        options: Any = {"is_grads_batched": True, "allow_unused": True, "retain_graph": True}
        # of y itself the call would be PyTorch's alone
        found = torch.autograd.grad(y.clone(), [leaf, unused], rows * scale, **options)
        assert found[1] is None
        return found[0]

    scales = torch.tensor([1.0, -3.0], dtype=DOUBLE)
    expected = torch.stack([2 * leaf.detach() * rows * scale for scale in scales])
    torch.testing.assert_close(vmap(f)(scales), expected)


@pytest.mark.parametrize("leaf", ["made inside", "captured"])
def test_steps_of_training_from_a_leaf_of_pytorch_s_graph(leaf: str) -> None:
    """Each step's gradient is by what the last one made, and needs no way back through the gradients before."""
    start = torch.tensor([1.0, -1.0], dtype=DOUBLE)

    def trained(decay: Tensor, start: Tensor, target: Tensor) -> Tensor:
        weights = start.clone().requires_grad_() if leaf == "made inside" else start
        for _ in range(3):
            loss = ((weights - target) ** 4).sum() + decay * (weights**2).sum()
            weights = weights - 0.1 * torch.autograd.grad(loss, weights, create_graph=True)[0]
        return (weights**2).sum()

    decay, targets = torch.tensor(0.3, dtype=DOUBLE), torch.tensor([[0.5, 1.0], [2.0, -1.0]], dtype=DOUBLE)
    expected = []
    for target in targets:
        leaf_decay = decay.clone().requires_grad_()
        value = trained(leaf_decay, start.clone().requires_grad_(), target)
        expected.append(torch.autograd.grad(value, leaf_decay)[0])
    weights = start.clone().requires_grad_()
    got = vmap(grad(trained), in_dims=(None, None, 0))(decay, weights, targets)
    torch.testing.assert_close(got, torch.stack(expected))
