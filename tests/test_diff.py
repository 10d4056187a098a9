"""diff: two compositions side by side. Rules with a mistake planted in them are found by diff and explain alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._higher_order_ops.scan import scan

import functrans
from functrans import diff, explain, grad, hessian, jacfwd, jacrev, jvp, vmap
from functrans.control_flow import definitions
from functrans.control_flow.table import DEFINITIONS
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.explanation.comparing import DIFFERENT, LEFT, OTHERWISE, RIGHT, SAME
from functrans.extend import (
    BATCHING_RULES,
    DERIVATIVES,
    Carried,
    RuleTable,
    TableInterpreter,
    derivative,
    overriding,
    transform,
)

aten = torch.ops.aten
HIGHER = torch.ops.higher_order
F64 = torch.float64
X = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
ROWS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], dtype=F64)
W = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 3.0], [2.0, 1.0, 0.0]], dtype=F64)


def network(x: Tensor) -> Tensor:
    y = torch.sin(x * 2)
    y = torch.cumsum(y, 0)
    y = torch.mv(W, y)
    y = torch.flip(y, [0])
    y = torch.cat([y, x.clamp(0.0, 1.0)])
    y = y * y.exp()
    return torch.logsumexp(y, 0)


class Slope(TableInterpreter):
    """Forward mode in two rules."""

    kind, payload = "slope", ("slope",)
    rules: RuleTable[Callable[..., Any]] = RuleTable("slopes of test_diff")


@Slope.rules.register(aten.sin.default)
def sine(level: Slope, x: Any) -> Any:
    return level.carry(x.value.sin(), slope=x.slope * x.value.cos())


@Slope.rules.register(aten.exp.default)
def exponential(level: Slope, x: Any) -> Any:
    return level.carry(x.value.exp(), slope=x.slope * x.value.exp())


def slopes(x: Tensor) -> Any:
    found = transform(Slope, lambda y: torch.exp(torch.sin(y)))(Carried(x, slope=torch.ones_like(x)))
    return found.value, found.slope


def one_by_one(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.stack([f(row) for row in rows])


def tangent(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


class Planted(NamedTuple):
    """A mistake: the table and the operator whose rule it is in, a composition that meets it, an independent one."""

    table: Any
    op: Any
    plant: Callable[[], Any]
    composition: Callable[[Tensor], Any]
    x: Tensor
    #: None: the same composition by PyTorch's own derivative, or the right rule
    other: Callable[[Tensor], Any] | None = None
    #: the kind of event that is to be found
    kind: str = "operator"


def batching(op: Any, rule: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: BATCHING_RULES.register(op)(rule)


PLANTED = {
    "cumsum along the batch": Planted(
        BATCHING_RULES, aten.cumsum.default,
        batching(aten.cumsum.default, lambda info, dims, x, dim: (x.cumsum(dims[0]), dims[0])),
        vmap(network), ROWS, one_by_one(network)),
    "a product with a matrix that is transposed": Planted(
        BATCHING_RULES, aten.mv.default, batching(aten.mv.default, lambda info, dims, w, x: (x @ w, 0)),
        vmap(network), ROWS, one_by_one(network)),
    "flipped along the batch": Planted(
        BATCHING_RULES, aten.flip.default,
        batching(aten.flip.default, lambda info, dims, x, d: (x.flip(dims[0]), dims[0])),
        vmap(network), ROWS, one_by_one(network)),
    "joined in the other order": Planted(
        BATCHING_RULES, aten.cat.default,
        batching(aten.cat.default, lambda info, dims, xs, dim=0: (
            torch.cat([x.movedim(d, 0) for x, d in zip(xs, dims[0], strict=True)][::-1], 1), 0)),
        vmap(network), ROWS, one_by_one(network)),
    "clamped on one side": Planted(
        BATCHING_RULES, aten.clamp.default,
        batching(aten.clamp.default, lambda info, dims, x, low=None, high=None: (x.clamp(low), 0)),
        vmap(grad(network)), ROWS, one_by_one(grad(network))),
    "the sign of a cosine": Planted(
        DERIVATIVES, aten.sin.default, lambda: derivative(aten.sin.default, self=lambda grad, self: -grad * self.cos()),
        grad(network), X, kind="pull"),
    "a factor that is forgotten": Planted(
        DERIVATIVES, aten.logsumexp.default,
        lambda: derivative(aten.logsumexp.default, self=lambda grad, self: torch.softmax(self, 0) + 0 * grad.sum() + 1),
        grad(network), X, kind="pull"),
    "the wrong factor of a product": Planted(
        DERIVATIVES, aten.mul.Tensor,
        lambda: derivative(
            aten.mul.Tensor, self=lambda grad, other: grad * other, other=lambda grad, other: grad * other),
        vmap(grad(network)), ROWS, kind="pull"),
    "a tangent that is not summed up": Planted(
        DERIVATIVES, aten.cumsum.default,
        lambda: derivative(aten.cumsum.default, self=lambda grad, dim: grad, tangent=lambda self_t: self_t),
        tangent(network), X),
    "a matrix that is not transposed, in a second derivative": Planted(
        DERIVATIVES, aten.mv.default,
        lambda: derivative(
            aten.mv.default, self=lambda grad, vec: torch.outer(grad, vec), vec=lambda grad, self: self @ grad),
        hessian(network), X, kind="pull"),
    "a piece of a decomposition": Planted(
        DECOMPOSITIONS, aten.kron.default,
        lambda: DECOMPOSITIONS.register(aten.kron.default)(lambda self, other: torch.outer(other, self).reshape(-1)),
        lambda x: jvp(lambda x: torch.kron(x, x + 1).cumsum(0), (x,), (x,)), X),
    "the rule of a transform of one's own": Planted(
        Slope.rules, aten.exp.default,
        lambda: Slope.rules.register(aten.exp.default)(lambda level, x: level.carry(x.value.exp(), slope=x.slope)),
        slopes, X, slopes),
}  # fmt: skip


@contextmanager
def planted(case: Planted) -> Iterator[None]:
    with overriding(case.table, case.op):
        case.plant()
        yield


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name: str) -> None:
    """The first difference is the operator whose rule is wrong; explain names the file of that rule."""
    case = PLANTED[name]

    def right(x: Tensor) -> Any:
        if case.other is not None:
            return case.other(x)
        with overriding(case.table, case.op):  # nothing in its place: PyTorch's own derivative, or definition
            return case.composition(x)

    def wrong(x: Tensor) -> Any:
        with planted(case):
            return case.composition(x)

    found = diff(right, wrong, case.x)
    assert not found.same and found.first is not None
    assert (found.first.status, found.first.event.name) == (DIFFERENT, str(case.op))
    assert {e.kind for e in found.first.right} == {case.kind}
    (event,) = found.first.right
    assert any("test_diff.py" in (e.place or "") for e in event.walk())
    assert "▶ first difference" in found.text()
    before = found.rows[: found.rows.index(found.first)]
    assert all(row.status in (SAME, OTHERWISE, LEFT, RIGHT) for row in before)

    fine = diff(right, case.composition, case.x)
    assert not [row for row in fine.rows if row.status == DIFFERENT], "without the mistake there is no difference"


def test_compositions_that_are_the_same() -> None:
    found = diff(hessian(network), jacfwd(jacrev(network)), X)
    assert found.first is None and found.same and {row.status for row in found.rows} == {SAME}
    assert len(found.rows) == 20


def test_a_composition_by_other_modes() -> None:
    found = diff(hessian(network), jacfwd(jacfwd(network)), X)
    statuses = [row.status for row in found.rows]
    assert statuses.count(OTHERWISE) >= 10 and DIFFERENT not in statuses
    assert found.first is not None and found.first.status == LEFT and found.first.event.kind == "pull"


def short(x: Tensor) -> Tensor:
    y = torch.sin(x)
    return y * 3


def test_side_by_side() -> None:
    def other(x: Tensor) -> Tensor:
        with overriding(BATCHING_RULES, aten.sin.default):
            BATCHING_RULES.register(aten.sin.default)(lambda info, dims, x: (x.cos(), 0))
            return vmap(short)(x)

    found = diff(vmap(short), other, torch.tensor([0.0, 1.0]))
    assert_expected_inline(re.sub(r"[^ ]*?(\w+\.py):\d+", r"\1:N", found.text(width=58)), """\
diff(short, other)
    test_diff.py:N  y = torch.sin(x)
▶ first difference: 0 against 1, 1 apart
≠ level 1 vmap  aten.sin.default(float32[]) -> float32[]     | level 1 vmap  aten.sin.default(float32[]) -> float32[]
    test_diff.py:N  return y * 3
≠ level 1 vmap  aten.mul.Tensor(float32[], 3) -> float32[]   | level 1 vmap  aten.mul.Tensor(float32[], 3) -> float32[]
2 different
results: [0, 2.524] against [3, 1.621], 3 apart

left, short
level 1 vmap  aten.sin.default(float32[]) -> float32[]
· program, pointwise.py:N
· a: bdim=0
= value 0
└ base  aten.sin.default(float32[2]) -> float32[2]
  = value [0, 0.8415]

right, other
level 1 vmap  aten.sin.default(float32[]) -> float32[]
· rule, test_diff.py:N
· self: bdim=0
= value 1
└ base  aten.cos.default(float32[2]) -> float32[2]
  = value [1, 0.5403]""")
    assert found._repr_html_().startswith("<iframe srcdoc=")


def test_an_error_ends_its_side() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    found = diff(short, fails, X)
    assert not found.same and found.right.error is not None and found.first is not None
    assert "the other side was ended by ValueError: no" in found.first.why


def test_random_numbers_and_exactness() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn(3)

    found = diff(vmap(noisy, randomness="same"), vmap(noisy, randomness="same"), ROWS)
    assert found.same and found.first is None
    one = lambda x: x * 1.0
    nearly = lambda x: x * (1 + 1e-12)
    assert [row.status for row in diff(one, nearly, X).rows] == [SAME]

    def times(by: float) -> Callable[[Tensor], Tensor]:
        return lambda x: x * by

    assert diff(times(1.0), times(1 + 1e-12), X).same
    assert not diff(times(1.0), times(1 + 1e-12), X, rtol=0.0).same
    assert not diff(times(1.0), times(1.001), X).same


def test_wrong_calls() -> None:
    for call in (lambda: diff(3, short, X), lambda: diff(short, 3, X), lambda: diff(short, short, X, rtol="far")):  # type: ignore[arg-type]
        with pytest.raises(functrans.FunctransError, match="got"):
            call()


def test_the_first_difference_is_the_events_of_both_sides() -> None:
    found = diff(vmap(short), one_by_one(short), ROWS)
    assert found.left.find("sin") and found.right.find("sin")
    assert isinstance(explain(short, X).events[0], type(found.rows[0].event))


# ------------------------------------------------------ mistakes that take a second look, and what else diff compares


def normalised(x: Tensor) -> Tensor:
    m = torch.outer(x, x)
    return (m - m.sum(1, keepdim=True)).sum()


def ordered(x: Tensor) -> Tensor:
    order = torch.argsort(x)
    return x[order] * 2


def written(x: Tensor) -> Tensor:
    y = x * 2
    y[0] = x[1] * 3
    return y.exp().sum()


def moments(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, 0)
    return variance * 2 + mean.exp()


def shifted(x: Tensor) -> Tensor:
    y = torch.addmm(x, W, W)
    return (y * y).sum()


def rooted(x: Tensor) -> Tensor:
    y = torch.sqrt(x * x + 1)
    return (y * 2).sum()


def turned(z: Tensor) -> Tensor:
    w = z * (z + 1)
    return w.abs().sum()


def summed(x: Tensor) -> Tensor:
    y = torch.cumsum(x * x, 0)
    return (y * torch.arange(3.0, dtype=F64)).sum()


def scanned(x: Tensor) -> Tensor:
    _, y = scan(lambda carry, v: (carry * v + 1, carry * v), torch.ones((), dtype=F64), x)
    return (y * y).sum()


def from_the_last(combine: Any, init: Any, xs: Any, more: Any) -> Any:
    return definitions.scan(combine, init, [x.roll(1, 0) for x in xs], more)


Z = torch.tensor([0.5 + 1j, -1.0 - 2j, 2.0 + 0.5j], dtype=torch.complex128)
MORE = {
    "an option that is ignored": Planted(
        BATCHING_RULES, aten.sum.dim_IntList,
        batching(aten.sum.dim_IntList, lambda info, dims, x, dim, keepdim=False, dtype=None: (x.sum(dim[0] + 1), 0)),
        vmap(normalised), ROWS, one_by_one(normalised)),
    "indices of another dtype": Planted(
        BATCHING_RULES, aten.argsort.default,
        batching(aten.argsort.default, lambda info, dims, x: (x.argsort(-1).to(torch.int32), 0)),
        vmap(ordered), ROWS, one_by_one(ordered)),
    "a write that is lost": Planted(
        BATCHING_RULES, aten.select_scatter.default,
        batching(aten.select_scatter.default, lambda info, dims, x, source, dim, index: (x.clone(), 0)),
        vmap(written), ROWS, one_by_one(written)),
    "one of two cotangents that is dropped": Planted(
        DERIVATIVES, aten.var_mean.correction,
        lambda: derivative(
            aten.var_mean.correction, tangent="linear", self=lambda grads, self: grads[0] * (self - self.mean())),
        grad(moments), X, kind="pull"),
    "the sum over the other dimension": Planted(
        DERIVATIVES, aten.addmm.default,
        lambda: derivative(aten.addmm.default, self=lambda grad: grad.sum(1)), grad(shifted), X, kind="pull"),
    "the argument in the place of the result": Planted(
        DERIVATIVES, aten.sqrt.default,
        lambda: derivative(aten.sqrt.default, self=lambda grad, self: grad / (2 * self), tangent="elementwise"),
        grad(rooted), X, kind="pull"),
    "a conjugate that is missing": Planted(
        DERIVATIVES, aten.mul.Tensor,
        lambda: derivative(
            aten.mul.Tensor, self=lambda grad, other: grad * other, other=lambda grad, self: grad * self),
        grad(turned), Z, kind="pull"),
    "one element too few": Planted(
        DERIVATIVES, aten.cumsum.default,
        lambda: derivative(
            aten.cumsum.default, self=lambda grad, dim: grad.flip(dim).cumsum(dim).flip(dim) - grad, tangent="linear"),
        grad(summed), X, kind="pull"),
    "a scan that begins with the last": Planted(
        DEFINITIONS, HIGHER.scan, lambda: DEFINITIONS.register(HIGHER.scan)(from_the_last),
        vmap(scanned), ROWS, vmap(scanned)),  # PyTorch's own, once it was run in a mode, does not run without
}  # fmt: skip


def batched_softplus(info: Any, dims: Any, x: Tensor, beta: float = 1, threshold: float = 20) -> Any:
    return torch.nn.functional.softplus(x.clamp(max=1), beta, threshold), 0


def arranged(x: Tensor) -> Tensor:
    a = torch.nn.functional.softplus(x)
    b = torch.sort(torch.roll(a, 1, 0)).values
    c = torch.where(b > 1, b, b * 0.1)
    d = torch.gather(c, 0, torch.tensor([2, 0, 1]))
    return d.prod() + torch.logcumsumexp(d, 0).sum() + torch.atan2(d, x).sum()


def framed(x: Tensor) -> Tensor:
    y = torch.constant_pad_nd(x, [1, 0], 0.5)
    z = torch.triu(torch.outer(y, y))
    return (z * z).sum()


def overwritten(x: Tensor) -> Tensor:
    y = x * 4
    y[1:] += x[:2]
    y.index_add_(0, torch.tensor([0]), x[2:])
    y.masked_fill_(y > 3, 1.0)
    return (y * y).sum()


def gathered(x: Tensor) -> Tensor:
    y = torch.sin(x)
    y.index_add_(0, torch.tensor([0]), x[2:])
    return (y * y).sum()


def expanded(x: Tensor) -> Tensor:
    y = torch.kron(torch.nn.functional.gelu(x), x)
    return (y * torch.arange(9.0, dtype=F64)).sum()


NEW = {
    "rolled along the batch": Planted(
        BATCHING_RULES, aten.roll.default,
        batching(aten.roll.default, lambda info, dims, x, shifts, d=(): (x.roll(shifts, [0]), 0)),
        vmap(arranged), ROWS, one_by_one(arranged)),
    "sorted the other way round": Planted(
        BATCHING_RULES, aten.sort.default,
        batching(aten.sort.default, lambda info, dims, x, dim=-1, falling=False: (x.sort(1, not falling), (0, 0))),
        vmap(grad(arranged)), ROWS, one_by_one(grad(arranged))),
    "the branches exchanged": Planted(
        BATCHING_RULES, aten.where.self,
        batching(aten.where.self, lambda info, dims, condition, a, b: (torch.where(condition, b, a), 0)),
        vmap(jacrev(arranged)), ROWS, one_by_one(jacrev(arranged))),
    "right for small numbers only": Planted(
        BATCHING_RULES, aten.softplus.default, batching(aten.softplus.default, batched_softplus),
        vmap(arranged), ROWS[:, [1, 0, 2]], one_by_one(arranged)),
    "a value to pad with that is ignored": Planted(
        BATCHING_RULES, aten.constant_pad_nd.default,
        batching(aten.constant_pad_nd.default, lambda info, dims, x, pad, value=0: (torch.constant_pad_nd(x, pad), 0)),
        vmap(framed), ROWS, one_by_one(framed)),
    "a diagonal too far": Planted(
        BATCHING_RULES, aten.triu.default,
        batching(aten.triu.default, lambda info, dims, x, diagonal=0: (x.triu(diagonal + 1), 0)),
        vmap(grad(framed)), ROWS, one_by_one(grad(framed))),
    "a write to the wrong places": Planted(
        BATCHING_RULES, aten.slice_scatter.default,
        batching(aten.slice_scatter.default, lambda info, dims, x, source, dim=0, start=None, end=None, step=1: (
            x.slice_scatter(source, 1, 0, 2), 0)),
        vmap(overwritten), ROWS, one_by_one(overwritten)),
    "scattered in the order of gathering": Planted(
        DERIVATIVES, aten.gather.default,
        lambda: derivative(aten.gather.default, self=lambda grad, self, dim, index: torch.zeros_like(self).scatter(
            dim, index.flip(0), grad)),
        grad(arranged), X, kind="pull"),
    "derivatives by the other argument": Planted(
        DERIVATIVES, aten.atan2.default,
        lambda: derivative(
            aten.atan2.default, self=lambda grad, self, other: -grad * self / (self**2 + other**2),
            other=lambda grad, self, other: grad * other / (self**2 + other**2)),
        vmap(grad(arranged)), ROWS, kind="pull"),
    "a tangent that is passed on": Planted(
        DERIVATIVES, aten.logcumsumexp.default,
        lambda: derivative(aten.logcumsumexp.default, self=lambda grad: grad, tangent=lambda self_t: self_t),
        tangent(arranged), X),
    "what was added gets nothing": Planted(
        DERIVATIVES, aten.index_add.default,
        lambda: derivative(
            aten.index_add.default, self=lambda grad: grad, source=lambda grad, source: torch.zeros_like(source)),
        grad(gathered), X, kind="pull"),
    "a tangent that should have been overwritten": Planted(
        DERIVATIVES, aten.masked_fill.Scalar,
        lambda: derivative(aten.masked_fill.Scalar, tangent="linear", self=lambda grad: grad),
        jacfwd(overwritten), X),
    "a decomposition with its factors exchanged": Planted(
        DECOMPOSITIONS, aten.kron.default,
        lambda: DECOMPOSITIONS.register(aten.kron.default)(lambda self, other: torch.outer(other, self).reshape(-1)),
        lambda x: vmap(grad(expanded))(x), ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MORE, *NEW])
def test_a_planted_mistake_of_another_kind_is_found(name: str) -> None:
    """The events of the first difference have the rule among them, and nothing differs before or without it."""
    case = {**MORE, **NEW}[name]

    def right(x: Tensor) -> Any:
        if case.other is not None:
            return case.other(x)
        with overriding(case.table, case.op):
            return case.composition(x)

    def wrong(x: Tensor) -> Any:
        with planted(case):
            return case.composition(x)

    found = diff(right, wrong, case.x)
    assert found.first is not None and found.first.status == DIFFERENT
    last = found.first.right[-1]
    assert last.kind == case.kind and last.name.removeprefix("higher_order::") in str(case.op)
    assert any("test_diff.py" in (e.place or "") for e in last.walk())
    assert "its arguments differ already" not in found.text() and "\nresults: " in found.text()

    fine = diff(right, case.composition, case.x)
    assert [row for row in fine.rows if row.status == DIFFERENT] == [] and fine.results == ""
    assert "results: the same" in fine.text()


def test_a_rule_that_writes_to_its_argument_is_found() -> None:
    """The operator with the rule gives the right thing; the first difference is said to come from there."""

    def reused(x: Tensor) -> Tensor:
        a = x * 2
        b = torch.cumprod(a, 0)
        c = a + 1
        return (b * c).sum()

    def writing(info: Any, dims: Any, x: Tensor, dim: int) -> Any:
        out = x.cumprod(1)
        x.mul_(3)
        return out, 0

    def wrong(x: Tensor) -> Any:
        with overriding(BATCHING_RULES, aten.cumprod.default):
            BATCHING_RULES.register(aten.cumprod.default)(writing)
            return vmap(grad(reused))(x)

    found = diff(one_by_one(grad(reused)), wrong, ROWS)
    assert found.first is not None and found.first.event.name == "aten.add.Tensor"
    said = r"arguments differ already, a: .* apart; aten.mul_.Tensor wrote that inside of aten.cumprod.default \(rule, "
    assert re.search(said + r"[^ ]*test_diff.py:\d+\)", found.text())


@pytest.mark.parametrize("composition", [lambda f: jacrev(jacrev(f)), hessian])
def test_a_derivative_that_is_right_once_and_a_constant_then_is_found(composition: Any) -> None:
    """The numbers of the pull are right; where they are differentiated, something is missing."""

    def wrong(x: Tensor) -> Any:
        with overriding(DERIVATIVES, aten.prod.default):
            derivative(aten.prod.default, self=lambda grad, self, result: (grad * result / self).detach())
            return composition(arranged)(x)

    found = diff(composition(arranged), wrong, X)
    said = r"aten.prod.default of .* has the same numbers, but \[0\] at level \d \w+: .* against constant\n"
    place = r"  derivative entry, .* against derivative entry, [^ ]*test_diff.py:\d+\n"
    assert found.first is not None and re.search(said + place, found.text()), found.text()


def test_a_sign_in_a_second_derivative_is_found_inside_of_the_first() -> None:
    """The entry of sin is right, and that of cos, which it calls, is not."""

    def twice(x: Tensor) -> Tensor:
        return torch.sin(x * 2).sum()

    def right(x: Tensor) -> Any:
        with overriding(DERIVATIVES, aten.cos.default):
            return hessian(twice)(x)

    def wrong(x: Tensor) -> Any:
        with overriding(DERIVATIVES, aten.cos.default):
            derivative(aten.cos.default, self=lambda grad, self: grad * self.sin(), tangent="elementwise")
            return hessian(twice)(x)

    found = diff(right, wrong, X)
    assert found.first is not None and found.first.event.name == "aten.sin.default" and found.first.inside is not None
    (cos,) = found.first.inside.right
    assert cos.name == "aten.cos.default" and "test_diff.py" in (cos.place or "")
    said = r"  inside, level 2 jvp  aten.cos.default\(.*\n  borrowed against derivative entry, .*test_diff.py"
    assert re.search(said, found.text())


def test_what_differs_before_a_step_is_said() -> None:
    scale = [1.0, 2.0]

    def first(x: Tensor) -> Tensor:
        return last(x * scale[0])

    def second(x: Tensor) -> Tensor:
        return last(x * scale[1])

    def last(x: Tensor) -> Tensor:
        return x.exp()

    found = diff(first, second, X)
    assert found.first is not None and found.first.event.name == "aten.mul.Tensor"
    assert "  its arguments differ already, other: 1.0 against 2.0" in found.text()
    rows = {row.event.name: row for row in found.rows}
    assert rows["aten.exp.default"].before == "self: [0.5, -1, 2] against [1, -2, 4], 2 apart"


def test_the_operators_of_a_scan_are_inside_of_it() -> None:
    found = explain(vmap(scanned), ROWS)
    (event,) = found.find("scan", level=1)
    assert event.way == "decomposed" and "definitions.py" in (event.place or "")
    assert event.returned == "[float64[], float64[3]]" and len(event.children) > 6
    assert all(child.parent is event for child in found.find("unbind", level=1))
    assert not any(child.is_written for child in event.walk() if child is not event)


# ---------------------------------------------------------------------------- two versions of one thing, on other lines

B = torch.tensor([0.25, -0.5, 0.125], dtype=F64)


def normed(x: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5)


def model(x: Tensor) -> Tensor:
    h = torch.relu(W @ x + B)
    h = normed(h)
    h = torch.tanh(W @ h)
    return (h**2).sum()


def fused(x: Tensor) -> Tensor:
    """The same by other operators."""
    h = torch.addmv(B, W, x)
    h = h.clamp(min=0)
    h = torch.nn.functional.layer_norm(h, (3,))
    h = torch.tanh(W @ h)
    return (h * h).sum()


def forgetful(x: Tensor) -> Tensor:
    """The same on other lines, but for the norm."""
    z = W @ x + B
    z = torch.relu(z)
    z = torch.tanh(W @ z)
    return (z**2).sum()


def smooth(x: Tensor) -> Tensor:
    """The same on other lines, but for the activation."""
    z = torch.nn.functional.softplus(W @ x + B)
    z = normed(z)
    z = torch.tanh(W @ z)
    return (z**2).sum()


def counts(found: functrans.explanation.Diff) -> dict[str, int]:
    return {status: sum(row.status == status for row in found.rows) for status in {row.status for row in found.rows}}


@pytest.mark.parametrize(
    ("composition", "x"), [(lambda f: f, X), (grad, X), (hessian, X), (lambda f: vmap(grad(f)), ROWS)]
)
def test_two_versions_by_other_operators_are_the_same_steps(composition: Any, x: Tensor) -> None:
    found = diff(composition(model), composition(fused), x)
    assert found.same and found.results == "" and counts(found).keys() == {SAME, OTHERWISE}
    forward = [row for row in found.rows if row.event.kind != "pull"]
    (norm,) = [row for row in forward if any("layer_norm" in e.name for e in row.right)]
    assert [e.name.split(".")[1] for e in norm.left] == ["mean", "sub", "var", "add", "sqrt", "div"]
    assert len(norm.right) == 1


@pytest.mark.parametrize("composition", [lambda f: f, grad, hessian, jacfwd])
def test_a_step_that_one_version_forgot_is_the_first_difference(composition: Any) -> None:
    found = diff(composition(model), composition(forgetful), X)
    assert found.first is not None and found.first.status == LEFT and found.first.event.name == "aten.mean.default"
    assert found.first.event.site is not None and found.first.event.site.function == "normed"
    before = found.rows[: found.rows.index(found.first)]
    assert (before[-1].event.name, before[-1].status) == ("aten.relu.default", SAME)
    said = r"▶ first difference: only in model; so the argument \w+ of aten\.(mv|matmul)\.default differs"
    assert re.search(said, found.text())


def test_another_operator_in_one_version_is_the_first_difference() -> None:
    found = diff(grad(model), grad(smooth), X)
    assert found.first is not None and found.first.status == DIFFERENT
    (left,), (right,) = found.first.left, found.first.right
    assert (left.name, right.name) == ("aten.relu.default", "aten.softplus.default")
    assert "test_diff.py" in found.text().split("▶")[0] and " | " in found.text().split("▶")[0]


def test_hessians_of_two_versions() -> None:
    again = lambda x: (torch.tanh(torch.matmul(W, normed(torch.relu(torch.matmul(W, x) + B)))) ** 2).sum()
    found = diff(hessian(model), jacfwd(jacrev(again)), X)
    assert found.same and found.first is None and counts(found).keys() == {SAME}


def test_operands_in_the_other_order() -> None:
    """The cotangents are, too, and are those of the same tensors; a rule that exchanges them is another thing."""

    def f(x: Tensor) -> Tensor:
        return (x.sin() + torch.logsumexp(x, 0)).exp().sum()

    def g(x: Tensor) -> Tensor:
        return (torch.logsumexp(x, 0) + x.sin()).exp().sum()

    found = diff(grad(f), grad(g), X)
    assert found.same and found.results == "" and any(row.event.name == "aten.add.Tensor" for row in found.rows)

    def wrong(x: Tensor) -> Any:
        with overriding(DERIVATIVES, aten.atan2.default):
            formula = {"self": lambda grad, self: -grad * self, "other": lambda grad, other: grad * other}
            derivative(aten.atan2.default, **formula)
            return grad(lambda x: torch.atan2(x * 2, x.exp()).sum())(x)

    found = diff(grad(lambda x: torch.atan2(x * 2, x.exp()).sum()), wrong, X)
    assert found.first is not None and found.first.event.name == "aten.atan2.default"
    assert found.first.status == DIFFERENT


def test_a_loop_that_goes_on_longer() -> None:
    def turns(n: int) -> Callable[[Tensor], Tensor]:
        def few(x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.sin(x) + x
            return x

        def many(x: Tensor) -> Tensor:
            for _ in range(n):
                x = torch.sin(x) + x
            return x

        return few if n == 3 else many

    found = diff(turns(3), turns(5), X)
    assert [row.status for row in found.rows] == [SAME] * 6 + [RIGHT] * 4 and "apart" in found.results


def test_versions_that_have_nothing_in_common() -> None:
    found = diff(lambda x: x.sin().sum(), lambda x: torch.zeros(7, dtype=torch.int64).flip(0), X)
    assert counts(found).keys() == {LEFT, RIGHT} and not found.same


def test_a_constant_that_is_another() -> None:
    """Zeros are no reason to take unlike operators for one step."""
    found = diff(lambda x: (x - x) * 3, lambda x: torch.zeros_like(x).exp(), X)
    assert found.first is not None and found.first.status in (DIFFERENT, LEFT)
    assert "results: [0, 0, 0] against [1, 1, 1], 1 apart" in found.text()


def test_a_page_of_two_versions(tmp_path: Path) -> None:
    def marked(x: Tensor) -> Tensor:
        return x.sin() * 2  # </details><script>alert(1)</script>

    found = diff(marked, lambda x: x.sin() * 3, X)
    page = found.to_html()
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert page.count('id="first"') == 1 and page.count("<details class=") == len(found.rows)
    for name in ("a.html", "b.txt"):
        found.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    with pytest.raises(functrans.FunctransError, match=r"expected a name that ends in \.html or \.txt"):
        found.save(tmp_path / "b.json")
