"""Transforms that are not shipped, by the public API alone: errors with a common source, complex steps, leaks between
examples, zonotopes, enumeration of random choices; each against an oracle, and with grad, vmap, jvp, jet and laplacian
around and inside."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import functrans as ft
from functrans.extend import (
    Carried,
    Primitive,
    RuleTable,
    TableInterpreter,
    as_function,
    interpreter_stack,
    is_affine,
    lower,
    lowered,
    map_tensors,
    missing_rule,
    transform,
)

aten = torch.ops.aten
X = torch.tensor([0.3, -0.7, 1.2], dtype=torch.float64)
ROWS = torch.randn(4, 3, dtype=X.dtype, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(3, 3, dtype=X.dtype, generator=torch.Generator().manual_seed(1))


# --- errors with a common source --------------------------------------------------------------------------------------


def along_each(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
    f, carrying, values, rebuild = as_function(level, op, args, kwargs)
    with lowered(level):
        outs = f(*values)
        if not outs:
            return rebuild([])
        pushed = ft.vmap(lambda *tangents: ft.jvp(f, values, tangents)[1])(*[x.parts for x in carrying])
    return rebuild([level.carry(o, parts=p) for o, p in zip(outs, pushed, strict=True)])


class Errors(TableInterpreter):
    """What each of some independent sources does to a value, to first order."""

    kind, payload, rules = "errors", ("parts",), RuleTable("errors", default=along_each)


def deviation(f: Callable[..., Any], x: Tensor, sources: Tensor) -> Tensor:
    out = transform(Errors, f)(Carried(x, parts=torch.diag(sources)))
    return out.parts.square().sum(0).sqrt()


SOURCES = torch.tensor([0.1, 0.2, 0.3], dtype=X.dtype)


def test_correlated_errors() -> None:
    f = lambda x: torch.stack([x[0] * x[1], torch.linalg.norm(x), x.softmax(0)[1]])
    by_hand = lambda x: (ft.jacrev(f)(x) ** 2 @ SOURCES**2).sqrt()
    found = lambda x: deviation(f, x, SOURCES)
    assert not deviation(lambda x: x - x, X, SOURCES).any()
    torch.testing.assert_close(found(X), by_hand(X))
    torch.testing.assert_close(ft.vmap(found)(ROWS), torch.stack([by_hand(x) for x in ROWS]))
    torch.testing.assert_close(ft.jacrev(found)(X), ft.jacfwd(by_hand)(X))
    line = ([SOURCES, None],)
    torch.testing.assert_close(ft.jet(found, (X,), line), ft.jet(by_hand, (X,), line))
    torch.testing.assert_close(ft.laplacian(found)(X), ft.laplacian(by_hand)(X))
    twice = deviation(found, X, SOURCES)  # of a deviation, which is known as well as x is
    torch.testing.assert_close(twice, (ft.jacrev(by_hand)(X) ** 2 @ SOURCES**2).sqrt())
    of_slope = deviation(ft.grad(lambda x: x.sin().prod()), X, SOURCES)
    torch.testing.assert_close(of_slope, (ft.hessian(lambda x: x.sin().prod())(X) ** 2 @ SOURCES**2).sqrt())


# --- complex steps: the value is complex, and shows as a real one -----------------------------------------------------


def in_complex_numbers(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
    steps: list[Tensor] = []

    def below(a: Any) -> Any:
        if a.step is not None:
            steps.append(a.step)
        return a.value.to(torch.complex128) if a.value.is_floating_point() else a.value

    out = lower(level, op, map_tensors(below, args), {name: map_tensors(below, a) for name, a in kwargs.items()})
    return map_tensors(lambda o: level.carry(o, step=steps[0]) if o.is_complex() else level.constant(o), out)


class ComplexStep(TableInterpreter):
    kind, payload, rules = "complex step", ("step",), RuleTable("complex steps", default=in_complex_numbers)

    def shows(self, value: Tensor, step: Tensor) -> tuple[Any, torch.dtype]:
        return value.shape, step.dtype


@ComplexStep.rules.register(aten.relu.default)
def relu_of_real_part(level: Any, x: Any) -> Any:
    return level.carry(torch.where(x.value.real > 0, x.value, 0), step=x.step)


@ComplexStep.rules.register(aten.threshold_backward.default)
def chosen_by_real_part(level: Any, grad: Any, x: Any, threshold: float) -> Any:
    step = x.step if grad.step is None else grad.step
    return level.carry(torch.where(x.value.real > threshold, grad.value, 0).to(x.value.dtype), step=step)


def complex_step(f: Callable[..., Any], x: Tensor, v: Tensor, size: float = 1e-30) -> Tensor:
    given = Carried(torch.complex(x, size * v), step=torch.tensor(size, dtype=x.dtype))
    out = transform(ComplexStep, f)(given)
    return out.value.imag / out.step


def test_complex_steps() -> None:
    f = lambda x: (WEIGHT @ x).relu().exp().sum() * x[0].sin()
    v = X.flip(0)
    slope = lambda x: ft.grad(f)(x) @ v
    torch.testing.assert_close(complex_step(f, X, v), slope(X))
    torch.testing.assert_close(ft.vmap(lambda x: complex_step(f, x, v))(ROWS), ft.vmap(slope)(ROWS))
    torch.testing.assert_close(ft.grad(lambda x: complex_step(f, x, v))(X), ft.hessian(f)(X) @ v)
    torch.testing.assert_close(complex_step(ft.grad(f), X, v), ft.hessian(f)(X) @ v)
    torch.testing.assert_close(complex_step(ft.vmap(lambda a: a**3), X, v), 3 * X**2 * v)
    line = ([v, None],)
    torch.testing.assert_close(ft.jet(lambda x: complex_step(f, x, v), (X,), line), ft.jet(slope, (X,), line))
    of_both = deviation(lambda x: complex_step(f, x, v)[None], X, SOURCES)
    torch.testing.assert_close(of_both, ((ft.hessian(f)(X) @ v * SOURCES) ** 2).sum()[None].sqrt())


# --- leaks: on which examples of a batch an element may depend --------------------------------------------------------


def at_random(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
    """Where a derivative along random numbers, at a point nearby, is not zero."""
    f, carrying, values, rebuild = as_function(level, op, args, kwargs)
    with lowered(level):
        outs = f(*values)
        if not outs:
            return rebuild([])
        nearby = tuple(v + 0.1 * torch.rand_like(v) for v in values)
        moved: list[list[Tensor]] = [[] for _ in outs]
        for i in range(len(carrying[0].examples)):
            along = tuple(
                x.examples[i].to(v.dtype) * (torch.rand_like(v) + 0.5) for x, v in zip(carrying, values, strict=True)
            )
            for marks, t in zip(moved, ft.jvp(f, nearby, along)[1], strict=True):
                marks.append(t != 0)
        found = [torch.stack(marks) for marks in moved]
    return rebuild([level.carry(o, examples=e) for o, e in zip(outs, found, strict=True)])


class Leaks(TableInterpreter):
    kind, payload, rules = "leaks", ("examples",), RuleTable("leaks", default=at_random)


def leaks(f: Callable[..., Any], batch: Tensor) -> Tensor:
    """By example of the argument: which examples of the result it reaches."""
    n = len(batch)
    own = torch.eye(n, dtype=torch.bool).view(n, n, *[1] * (batch.dim() - 1)).expand(n, *batch.shape)
    return transform(Leaks, f)(Carried(batch, examples=own)).examples.flatten(2).any(-1)


def test_leaks_between_examples() -> None:
    none = torch.eye(4, dtype=torch.bool)
    layer = lambda x: (WEIGHT @ x).softmax(0)
    assert leaks(nn.BatchNorm1d(3, track_running_stats=False).double(), ROWS).all()
    assert torch.equal(leaks(nn.LayerNorm(3).double().requires_grad_(False), ROWS), none)
    assert torch.equal(leaks(ft.vmap(layer), ROWS), none)
    assert torch.equal(leaks(ft.vmap(ft.grad(lambda x: layer(x)[0])), ROWS), none)
    assert leaks(ft.vmap(lambda x: ft.psum(layer(x), "examples"), axis_name="examples"), ROWS).all()
    shifted = lambda rows: leaks(lambda x: x.roll(1, 0), rows)
    assert torch.equal(shifted(ROWS), none.roll(1, 1))
    batches = torch.stack([ROWS, 2 * ROWS])
    assert torch.equal(ft.vmap(shifted, randomness="different")(batches), none.roll(1, 1).expand(2, 4, 4))


# --- zonotopes: x is its center and a sum of sources, each times a number between -1 and 1 ----------------------------


def exact_where_affine(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
    if not is_affine(level, op, args, kwargs):
        raise missing_rule(level, op)
    f, carrying, values, rebuild = as_function(level, op, args, kwargs)
    with lowered(level):
        outs = f(*values)
        count = max(len(x.sources) for x in carrying)
        pushed = ft.vmap(lambda *along: ft.jvp(f, values, along)[1])(*[padded(x.sources, count) for x in carrying])
    return rebuild([level.carry(o, sources=p) for o, p in zip(outs, pushed, strict=True)])


def padded(sources: Tensor, count: int) -> Tensor:
    return torch.cat([sources, sources.new_zeros(count - len(sources), *sources.shape[1:])])


class Zonotopes(TableInterpreter):
    kind, payload, rules = "zonotopes", ("sources",), RuleTable("zonotopes", default=exact_where_affine)

    def widened(self, center: Tensor, sources: Tensor, error: Tensor) -> Any:
        """With a source of its own for the error of each element."""
        fresh = torch.diag_embed(error.flatten()).unflatten(-1, error.shape)
        return self.carry(center, sources=torch.cat([sources, fresh]))


@Zonotopes.rules.register(aten.relu.default)
def relu_of_zonotope(level: Any, x: Any) -> Any:
    radius = x.sources.abs().sum(0)
    low, high = x.value - radius, x.value + radius
    slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low)))
    middle = torch.where((low < 0) & (high > 0), -slope * low / 2, 0.0)
    return level.widened(slope * x.value + middle, slope * x.sources, middle)


@Zonotopes.rules.register(aten.mul.Tensor)
def product_of_zonotopes(level: Any, x: Any, y: Any) -> Any:
    if not all(isinstance(a, Tensor) and a.sources is not None for a in (x, y)):
        return NotImplemented
    count = max(len(x.sources), len(y.sources))
    a, b = padded(x.sources, count), padded(y.sources, count)
    return level.widened(x.value * y.value, x.value * b + y.value * a, a.abs().sum(0) * b.abs().sum(0))


def enclosed(f: Callable[..., Tensor], x: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    out = transform(Zonotopes, f)(Carried(x, sources=torch.diag(radius.expand(x.shape))))
    radius = out.sources.abs().sum(0)
    return out.value - radius, out.value + radius


def test_zonotopes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    net.requires_grad_(False)
    product = lambda x: net(x) * (x.flip(0)[:2] - x[0])
    radius = torch.tensor(0.1, dtype=X.dtype)
    slope = ft.grad(lambda x: (x * x * x.flip(0)).sum())
    for f in (net, product, slope):
        low, high = enclosed(f, X, radius)
        for _ in range(100):
            y = f(X + radius * (2 * torch.rand_like(X) - 1))
            assert bool((low <= y).all() and (y <= high).all())
    by_intervals = ft.bounds(net)(X - radius, X + radius)
    low, high = enclosed(net, X, radius)
    assert bool(((high - low) < 0.9 * (by_intervals[1] - by_intervals[0])).all())
    exact = lambda x: x - WEIGHT @ x + x.cumsum(0)
    low, high = enclosed(exact, X, radius)
    torch.testing.assert_close((high - low) / 2, ft.jacrev(exact)(X).abs().sum(1) * radius)

    def width(x: Tensor, radius: Tensor) -> Tensor:
        low, high = enclosed(product, x, radius)
        return (high - low).sum()

    torch.testing.assert_close(
        ft.vmap(width, in_dims=(0, None))(ROWS, radius), torch.stack([width(x, radius) for x in ROWS])
    )
    batch = enclosed(lambda x: ft.vmap(product)(torch.stack([x, x.flip(0)])), X, radius)
    torch.testing.assert_close(batch[0][0], enclosed(product, X, radius)[0])
    by_radius = ft.grad(width, argnums=1)(X, radius)
    difference = (width(X, radius + 1e-6) - width(X, radius - 1e-6)) / 2e-6
    torch.testing.assert_close(by_radius, difference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ft.jvp(lambda r: width(X, r), (radius,), (radius,))[1], by_radius * radius)


# --- random choices, one after the other taken for all that they may be -----------------------------------------------

choose = Primitive("choose", lambda name, chances: torch.multinomial(chances, 1)[0].to(chances.dtype))
choose.derivative(
    pullback=lambda grad, result, name, chances: None,
    tangent=lambda tangents, result, name, chances: None,
)


class Enumeration(TableInterpreter):
    """All runs at once: ``runs`` has the value of each."""

    kind, payload, rules = "enumeration", ("runs",), RuleTable("enumeration", default="loop")

    def __init__(self, func: Any, sizes: dict[str, int]) -> None:
        super().__init__(func)
        self.picks = list(itertools.product(*map(range, sizes.values())))
        self.names = list(sizes)
        self.weights = torch.ones(len(self.picks), dtype=X.dtype)

    def cases(self, wrapper: Any) -> Any:
        return wrapper.runs.unbind(0)

    def of_cases(self, values: Any) -> Any:
        return self.carry(values[0], runs=torch.stack(values))


@choose.rule(Enumeration)
def every_choice(level: Any, name: str, chances: Any) -> Any:
    taken = [pick[level.names.index(name)] for pick in level.picks]
    wrapper = level.own(chances)
    each = [wrapper.value] * len(taken) if level.is_constant(wrapper) else level.cases(wrapper)
    level.weights = level.weights * torch.stack([c[k] for c, k in zip(each, taken, strict=True)])
    return level.of_cases([torch.tensor(float(k), dtype=X.dtype) for k in taken])


def expectation(f: Callable[..., Tensor], **sizes: int) -> Callable[..., Tensor]:
    def expected(*args: Any) -> Tensor:
        level = Enumeration(f, sizes)
        out = transform(level, f)(*args)
        return level.weights @ out.runs

    return expected


def test_enumeration() -> None:
    def program(t: Tensor) -> Tensor:
        a = choose("a", torch.stack([t, 1 - t]))
        chance = torch.where(a > 0, t * t, t / 2)
        b = choose("b", torch.stack([chance, 1 - chance]))
        return (3 * a + b * t * (1 + a)).sin()

    def by_hand(t: Tensor) -> Tensor:
        total = 0 * t
        for a, b in itertools.product(range(2), range(2)):
            chance = t * t if a else t / 2
            total = total + (t, 1 - t)[a] * (chance, 1 - chance)[b] * (3 * a + b * t * (1 + a)).sin()
        return total

    found, t = expectation(program, a=2, b=2), torch.tensor(0.3, dtype=X.dtype)
    ts = torch.tensor([0.1, 0.5, 0.7], dtype=X.dtype)
    for around in (
        lambda f: f(t), lambda f: ft.grad(f)(t), lambda f: ft.hessian(f)(t), lambda f: ft.vmap(ft.grad(f))(ts),
        lambda f: ft.jvp(f, (t,), (t,)), lambda f: ft.grad(lambda ts: ft.vmap(f)(ts).prod())(ts),
        lambda f: ft.jet(f, (t,), ([t, None, None],)),
    ):  # fmt: skip
        torch.testing.assert_close(around(found), around(by_hand))
    # inside: the slope of a program, along each of its runs
    slope = expectation(lambda t: ft.grad(lambda s: choose("a", torch.stack([t, 1 - t])) * s**3)(t), a=2)
    torch.testing.assert_close(slope(t), (1 - t) * 3 * t**2)
    batch = expectation(lambda t: ft.vmap(lambda s: s * choose("a", torch.stack([t, 1 - t])))(ts)[0], a=2)
    torch.testing.assert_close(batch(t), (1 - t) * ts[0])
    assert interpreter_stack() == []
