"""Transforms that are not shipped, by the public API alone: errors with a common source, complex steps, leaks between
examples; each against an oracle, and with grad, vmap, jvp, jet and laplacian around and inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import functrans as ft
from functrans.extend import Carried, RuleTable, TableInterpreter, as_function, lower, lowered, map_tensors, transform

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
