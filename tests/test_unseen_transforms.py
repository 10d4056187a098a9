"""Transforms that are not shipped, by the public API alone: moments, provenance, finite differences, a memory of
results, random rounding; each against an oracle, and with grad, vmap and jvp around and inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functrans as ft
from functrans.errors import BatchingRuleError
from functrans.extend import (
    Carried,
    Handler,
    Interpreter,
    MissingRuleError,
    PassThrough,
    Primitive,
    RuleTable,
    TableInterpreter,
    as_function,
    batching_rule,
    interpreter_stack,
    lower,
    lowered,
    map_tensors,
    missing_rules,
    op_info,
    run_transformed,
    transform,
    wrap,
)

aten = torch.ops.aten
torch.manual_seed(0)
X = torch.randn(3, dtype=torch.float64)
ROWS = torch.randn(4, 3, dtype=torch.float64)
NET = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double().requires_grad_(False)


# --- means and variances ----------------------------------------------------------------------------------------------


def to_first_order(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
    f, carrying, values, rebuild = as_function(level, op, args, kwargs)
    with lowered(level):
        outs = f(*values)
        if not outs:
            return rebuild([])
        slopes = ft.jacrev(lambda *xs: f(*xs), argnums=tuple(range(len(values))))(*values)
        variances = [
            sum(torch.tensordot(j.square(), x.variance, x.variance.dim()) for j, x in zip(row, carrying, strict=True))
            for row in slopes
        ]
    return rebuild([level.carry(o, variance=v) for o, v in zip(outs, variances, strict=True)])


class Moments(TableInterpreter):
    """Independent normal numbers; exact through linear layers and relu."""

    kind, payload, rules = "moments", ("variance",), RuleTable("moments", default=to_first_order)


@Moments.rules.register(aten.linear.default)
def linear(level: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    if x.variance is None or weight.variance is not None:
        return NotImplemented
    value = nn.functional.linear(x.value, weight.value, None if bias is None else bias.value)
    return level.carry(value, variance=nn.functional.linear(x.variance, weight.value.square()))


@Moments.rules.register(aten.relu.default)
def relu(level: Any, x: Any) -> Any:
    mean, deviation = x.value, x.variance.sqrt()
    at = mean / deviation
    density, below = torch.exp(-at * at / 2) / (2 * torch.pi) ** 0.5, torch.special.ndtr(at)
    first = mean * below + deviation * density
    return level.carry(first, variance=(mean**2 + x.variance) * below + mean * deviation * density - first**2)


def spread(f: Callable[..., Any], x: Tensor, variance: Tensor) -> Any:
    return transform(Moments, f)(Carried(x, variance=variance))


def test_moments_are_those_of_samples() -> None:
    layer = lambda x: NET[1](NET[0](x))
    found = spread(layer, X, torch.full_like(X, 0.3))
    samples = layer(X + 0.3**0.5 * torch.randn(40_000, 3, dtype=X.dtype))
    torch.testing.assert_close(found.value, samples.mean(0), rtol=0.05, atol=5e-3)
    torch.testing.assert_close(found.variance, samples.var(0), rtol=0.05, atol=5e-3)


def test_moments_compose() -> None:
    variance = torch.tensor([0.1, 0.2, 0.3], dtype=X.dtype)
    total = lambda x, v: spread(lambda x: NET(torch.where(x > 0, x, 2 * x)).sum(), x, v).variance
    torch.testing.assert_close(
        ft.vmap(total, in_dims=(0, None))(ROWS, variance), torch.stack([total(x, variance) for x in ROWS])
    )
    step = 1e-6 * torch.eye(3, dtype=X.dtype)
    slopes = torch.stack([(total(X, variance + d) - total(X, variance - d)) / 2e-6 for d in step])
    torch.testing.assert_close(ft.grad(total, argnums=1)(X, variance), slopes, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        ft.jvp(lambda v: total(X, v), (variance,), (variance,))[1], slopes @ variance, rtol=1e-6, atol=1e-8
    )
    of_slope = spread(ft.grad(lambda x: x.sin().sum()), X, variance)
    torch.testing.assert_close(of_slope.variance, X.sin() ** 2 * variance)
    batch = spread(ft.vmap(NET), ROWS, variance.expand(4, 3))
    torch.testing.assert_close(batch.variance, torch.stack([spread(NET, x, variance).variance for x in ROWS]))


def test_a_rule_may_be_for_some_calls_only() -> None:
    """The weight is uncertain: the rule of ``linear`` declines, and its pieces go by the policy."""
    weight = torch.randn(2, 3, dtype=X.dtype)
    found = transform(Moments, lambda w: nn.functional.linear(X, w))(Carried(weight, variance=torch.ones_like(weight)))
    torch.testing.assert_close(found.variance, X.square().sum().expand(2))


# --- where a value comes from -----------------------------------------------------------------------------------------


def joined(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
    labels: set[str] = set()

    def value(x: Any) -> Any:
        labels.update(x.labels or ())
        return x.value

    out = lower(level, op, map_tensors(value, args), {name: map_tensors(value, a) for name, a in kwargs.items()})
    return map_tensors(lambda o: level.carry(o, labels=frozenset(labels)), out)


class Provenance(TableInterpreter):
    kind, payload, rules = "provenance", ("labels",), RuleTable("provenance", default=joined)


def named(value: Tensor, name: str) -> Carried:
    return Carried(value, labels=frozenset([name]))


def test_provenance() -> None:
    def f(a: Tensor, b: Tensor, c: Tensor) -> Any:
        y = a.clone()
        y[0] = b[1]
        return y, torch.zeros(3), nn.functional.linear(c, b[None]), a.sort()[1]

    given = named(X, "a"), named(2 * X, "b"), named(-X, "c")
    mixed, zeros, product, order = transform(Provenance, f)(*given)
    assert mixed.labels == {"a", "b"} and product.labels == {"b", "c"} and order.labels == {"a"}
    assert type(zeros) is Tensor
    assert mixed.value.tolist() == [2 * X[1], X[1], X[2]]
    by_a, by_b = transform(Provenance, ft.grad(lambda a, b: (a * b).sum(), argnums=(0, 1)))(*given[:2])
    assert (by_a.labels, by_b.labels) == ({"b"}, {"a"})  # a product's slope by the one is the other
    batched = ft.vmap(transform(Provenance, torch.sin))(named(ROWS, "a"))
    torch.testing.assert_close(batched.value, ROWS.sin())
    assert batched.labels == {"a"}


# --- what is carried is a pytree --------------------------------------------------------------------------------------


class Slopes(TableInterpreter):
    kind, payload, rules = "slopes", ("slope",), RuleTable("slopes", default="jvp")


def test_what_is_carried_is_batched_and_differentiated() -> None:
    ones = torch.ones_like(X)
    sine = transform(Slopes, torch.sin)
    run = lambda x: sine(Carried(x, slope=ones))
    for found in (ft.vmap(run)(ROWS), ft.vmap(sine)(Carried(ROWS, slope=torch.ones_like(ROWS)))):
        torch.testing.assert_close((found.value, found.slope), (ROWS.sin(), ROWS.cos()))
    _, pushed = ft.jvp(run, (X,), (ones,))
    torch.testing.assert_close((pushed.value, pushed.slope), (X.cos(), -X.sin()))
    (pulled,) = ft.vjp(run, X)[1](Carried(0 * X, slope=ones))
    torch.testing.assert_close(pulled, -X.sin())
    slope = ft.grad(lambda c: transform(Slopes, lambda x: (x**3).sum())(c).slope)(Carried(X, slope=X))
    torch.testing.assert_close((slope.value, slope.slope), (6 * X * X, 3 * X**2))
    _, aux = ft.grad(lambda x: (x.sum(), run(x)), has_aux=True)(X)
    torch.testing.assert_close((aux.value, aux.slope), (X.sin(), X.cos()))
    twice = transform(Slopes, run)(Carried(X, slope=ones))
    torch.testing.assert_close((twice.value.slope, twice.slope.slope), (X.cos(), -X.sin()))


# --- finite differences -----------------------------------------------------------------------------------------------


class Differences(TableInterpreter):
    kind, payload, rules = "differences", ("shifted",), RuleTable("differences", default="loop")

    def cases(self, wrapper: Any) -> Any:
        return wrapper.value, wrapper.shifted

    def of_cases(self, values: Any) -> Any:
        return self.carry(values[0], shifted=values[1])

    def leave(self, leaf: Any) -> Any:
        wrapper = self.own(leaf)
        return torch.zeros_like(wrapper.value) if wrapper.shifted is None else (wrapper.shifted - wrapper.value) / 1e-7


def difference(f: Callable[..., Any], x: Tensor, direction: Tensor) -> Any:
    return transform(Differences, f)(Carried(x, shifted=x + 1e-7 * direction))


def test_finite_differences_are_a_jvp() -> None:
    direction = torch.tensor([1.0, -0.5, 2.0], dtype=X.dtype)
    smooth = lambda x: torch.linalg.solve(torch.outer(x, x) + torch.eye(3, dtype=x.dtype), x.sort()[0].cumsum(0))
    close = {"rtol": 1e-5, "atol": 1e-6}
    expected = ft.jvp(smooth, (X,), (direction,))[1]
    torch.testing.assert_close(difference(smooth, X, direction), expected, **close)
    torch.testing.assert_close(difference(lambda x: torch.ones(3), X, direction), torch.zeros(3))
    columns = ft.vmap(lambda d: difference(smooth, X, d))(torch.eye(3, dtype=X.dtype))
    torch.testing.assert_close(columns, ft.jacfwd(smooth)(X).T, **close)
    loss = lambda x: smooth(x).sum()
    torch.testing.assert_close(difference(ft.grad(loss), X, direction), ft.hessian(loss)(X) @ direction, **close)
    of_difference = ft.grad(lambda x: difference(lambda x: (x**3).sum(), x, direction))(X)
    torch.testing.assert_close(of_difference, 6 * X * direction, **close)


# --- a memory of results ----------------------------------------------------------------------------------------------


class Memory(Interpreter):
    """Each operator runs once for the same arguments."""

    kind = "memory"

    def __init__(self, func: Any = None) -> None:
        super().__init__(func)
        self.known: dict[Any, Any] = {}
        self.hits = 0

    def constant(self, value: Tensor) -> Any:
        return wrap(self, value)

    def is_constant(self, wrapper: Any) -> bool:
        return True

    def process(self, op: Any, args: Any, kwargs: Any) -> Any:
        values = map_tensors(lambda t: t.value if self.owns(t) else t, args)
        key = op, str(map_tensors(id, values)), str(kwargs)
        if op_info(op).random or key not in self.known:
            self.known[key] = lower(self, op, values, kwargs), values
        else:
            self.hits += 1
        return map_tensors(self.constant, self.known[key][0])


def remembered(f: Callable[..., Any], x: Tensor) -> tuple[Any, int]:
    level = Memory(f)
    out = run_transformed(level, lambda: f(level.constant(x)))
    return out.value, level.hits


def test_a_memory_of_results() -> None:
    f = lambda x: (x.sin() + x.sin() * x.sin()).sum()
    assert remembered(f, X) == (f(X), 2)
    slope, hits = remembered(ft.grad(f), X)
    torch.testing.assert_close(slope, ft.grad(f)(X))
    assert hits > 2
    torch.testing.assert_close(ft.vmap(ft.grad(lambda x: remembered(f, x)[0]))(ROWS), ft.vmap(ft.grad(f))(ROWS))
    drawn, _ = remembered(lambda x: torch.rand_like(x) - torch.rand_like(x), X)
    assert bool((drawn != 0).all())

    def changed(x: Tensor) -> Tensor:
        y = x.clone()
        return y * 2 + y.mul_(3) * 2

    assert torch.equal(remembered(changed, X)[0], 8 * X) and torch.equal(changed(X), 8 * X)


# --- random rounding --------------------------------------------------------------------------------------------------

noise = Primitive("noise", torch.zeros_like)
noise.derivative(pullback=lambda grad, result, x: None, tangent=lambda tangents, result, x: torch.zeros_like(result))


class Noise(Handler):
    kind = "noise"


@noise.rule(Noise)
def drawn(level: Any, x: Tensor) -> Tensor:
    return 0.01 * torch.randn_like(x)


class Rounded(PassThrough):
    kind = "rounded"

    def after(self, op: Any, args: Any, kwargs: Any, out: Any) -> Any:
        return out + noise.below(self, out) if isinstance(out, Tensor) and out.is_floating_point() else None


def test_random_rounding_by_a_handler() -> None:
    f = lambda x: (x.sin() * 2).sum()
    rounded = transform(Rounded, f)
    assert rounded(X) == f(X)  # nobody answers
    torch.manual_seed(0)
    many = ft.vmap(lambda _: transform(Noise, rounded)(X), randomness="different")(torch.zeros(4000))
    torch.testing.assert_close(many.mean(), f(X), rtol=0, atol=5e-3)
    # three products with 2, a sum of three and the sum's own noise
    deviation = torch.tensor(0.01 * (3 * 4 + 3 + 1) ** 0.5, dtype=X.dtype)
    torch.testing.assert_close(many.std(), deviation, rtol=0.05, atol=0)
    for slope in (ft.grad(transform(Noise, rounded)), transform(Noise, ft.grad(rounded))):
        torch.testing.assert_close(slope(X), 2 * X.cos(), rtol=0, atol=1e-12)
    noisy = transform(Noise, transform(Rounded, ft.grad(f)))(X)
    assert 0 < (noisy - 2 * X.cos()).abs().max() < 0.2


# --- what authors are told --------------------------------------------------------------------------------------------


class Units(TableInterpreter):
    kind, payload, rules = "units", ("unit",), RuleTable("units")


@Units.rules.register(aten.exp.default)
def declined(units: Any, x: Any) -> Any:
    return NotImplemented


def test_a_rule_that_declines_where_nothing_else_is_at_hand() -> None:
    with pytest.raises(MissingRuleError, match="has no rule for aten.exp.default") as caught:
        transform(Units, torch.exp)(Carried(X, unit="m"))
    assert caught.value.__notes__[0].startswith("Its rule, registered at ")
    assert caught.value.__notes__[0].endswith("returned NotImplemented for this call.")
    assert interpreter_stack() == []


def test_missing_rules_takes_what_the_transform_takes() -> None:
    f = lambda x, y: (x.tanh() * y).sum()
    found = missing_rules(Units, f, Carried(X, unit="m"), y=X)
    assert list(found) == [aten.tanh.default, aten.mul.Tensor, aten.sum.default]


def test_a_primitive_that_grad_does_not_know_says_how_it_would() -> None:
    unknown = Primitive("unknown", lambda x: x)
    with pytest.raises(MissingRuleError, match=r"@unknown\.rule\(GradInterpreter\)\. .*unknown\.derivative"):
        ft.grad(lambda x: unknown(x).sum())(X)
    with pytest.raises(MissingRuleError, match=r"@unknown\.rule\(VmapInterpreter\)\. .*@unknown\.batching"):
        ft.vmap(unknown)(X)


@torch.library.custom_op("unseen::times", mutates_args=())
def times(x: Tensor, factor: int) -> Tensor:
    return x * factor


@batching_rule(torch.ops.unseen.times.default)
def times_rule(info: Any, in_dims: Any, x: Tensor, factor: int) -> Any:
    return (times(x, factor), in_dims[0]) if factor == 2 else NotImplemented if factor == 3 else None


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
def test_a_batching_rule_may_decline() -> None:
    for factor in (2, 3):
        assert torch.equal(ft.vmap(lambda x, factor=factor: times(x, factor))(ROWS), factor * ROWS)
    with pytest.raises(BatchingRuleError, match="NoneType"):
        ft.vmap(lambda x: times(x, 4))(ROWS)
