"""Primitives with derivatives and batching rules: implicit differentiation as a user would write it, what rules may
return, what arguments hold, and where the base runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functrans as ft
from functrans.errors import (
    BatchingRuleError,
    CallTypeError,
    MissingRuleError,
    NonLinearError,
    RuleResultError,
    SameLevelError,
)
from functrans.extend import (
    Carried,
    GradInterpreter,
    PassThrough,
    Primitive,
    RuleTable,
    TableInterpreter,
    VmapInterpreter,
    interpreter_stack,
    transform,
)
from functrans.interpreters.vmap.rules.random import RandomnessError
from functrans.shipped.bounds import IntervalLevel

X = torch.tensor([0.3, -0.7, 1.2], dtype=torch.float64)
ROWS = torch.randn(4, 3, dtype=X.dtype, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(3, 3, dtype=X.dtype, generator=torch.Generator().manual_seed(1)) / 4


# --- a fixed point, differentiated by the implicit function theorem ---------------------------------------------------


def iterated(f: Callable[..., Tensor], w: Tensor, t: Tensor, x: Tensor) -> Tensor:
    for _ in range(60):
        x = f(w, t, x)
    return x


fixed_point = Primitive("fixed_point", iterated)


def pull_fixed(grad: Tensor, x: Tensor, f: Callable[..., Tensor], w: Tensor, t: Tensor, start: Tensor) -> Any:
    """u = grad + (∂f/∂x)ᵀ u, and what that is of w and t."""
    _, back = ft.vjp(f, w, t, x)
    u = grad
    for _ in range(60):
        u = grad + back(u)[2]
    return None, *back(u)[:2], None


def push_fixed(tangents: Any, x: Tensor, f: Callable[..., Tensor], w: Tensor, t: Tensor, start: Tensor) -> Tensor:
    _, of_w, of_t, _ = tangents
    along = [torch.zeros_like(p) if d is None else d for p, d in ((w, of_w), (t, of_t))]
    pushed = torch.zeros_like(x)
    for _ in range(60):
        pushed = ft.jvp(f, (w, t, x), (*along, pushed))[1]
    return pushed


fixed_point.derivative(pullback=pull_fixed, tangent=push_fixed)


@fixed_point.batching
def fixed_of_batch(info: Any, dims: Any, f: Callable[..., Tensor], *args: Tensor) -> Any:
    batched = ft.vmap(f, in_dims=tuple(None if d is None else 0 for d in dims[1:3]) + (0,))
    w, t, start = (a if d is None else a.movedim(d, 0) for a, d in zip(args, dims[1:], strict=True))
    start = start if dims[3] is not None else start.expand(info.batch_size, *start.shape)
    return fixed_point(batched, w, t, start), 0


def cell(w: Tensor, t: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(w @ x + t)


def solved(w: Tensor, t: Tensor) -> Tensor:
    return fixed_point(cell, w, t, torch.zeros_like(t))


def unrolled(w: Tensor, t: Tensor) -> Tensor:
    return iterated(cell, w, t, torch.zeros_like(t))


IN_BOTH: dict[str, Callable[..., Any]] = {
    "value": lambda f: f(WEIGHT, X),
    "grad": lambda f: ft.grad(lambda w, t: f(w, t).sin().sum(), argnums=(0, 1))(WEIGHT, X),
    "jacfwd": lambda f: ft.jacfwd(f, argnums=(0, 1))(WEIGHT, X),
    "jacrev": lambda f: ft.jacrev(f, argnums=(0, 1))(WEIGHT, X),
    "hessian": lambda f: ft.hessian(lambda t: f(WEIGHT, t).sin().sum())(X),
    "grad of grad": lambda f: ft.grad(lambda w: ft.grad(lambda t: f(w, t).sin().sum())(X)[0])(WEIGHT),
    "linearize": lambda f: ft.linearize(lambda t: f(WEIGHT, t), X)[1](ROWS[0]),
    "vmap": lambda f: ft.vmap(f, in_dims=(None, 0))(WEIGHT, ROWS),
    "vmap of grad": lambda f: ft.vmap(ft.grad(lambda t, w: f(w, t).sin().sum()), in_dims=(0, None))(ROWS, WEIGHT),
    "grad of vmap": lambda f: ft.grad(lambda w: ft.vmap(f, in_dims=(None, 1))(w, ROWS.T).sin().sum())(WEIGHT),
    "jvp of vmap": lambda f: ft.jvp(lambda w: ft.vmap(f, in_dims=(None, 0))(w, ROWS), (WEIGHT,), (WEIGHT,)),
    "jet": lambda f: ft.jet(lambda t: f(WEIGHT, t), (X,), ([ROWS[0], ROWS[1]],)),
    "laplacian": lambda f: ft.laplacian(lambda t: f(WEIGHT, t).sin().sum(), with_value=True)(X),
}


@pytest.mark.parametrize("name", IN_BOTH)
def test_implicit_differentiation(name: str) -> None:
    torch.testing.assert_close(IN_BOTH[name](solved), IN_BOTH[name](unrolled), rtol=1e-9, atol=1e-12)


def test_what_an_argument_holds_has_no_derivative() -> None:
    """A closure's variables: no zeros by them, and where nobody asks the primitive they are followed by the base."""
    of_both = lambda w, t: fixed_point(lambda _, t, x: cell(w, t, x), WEIGHT, t, torch.zeros_like(t)).sum()
    of_closure = lambda w: of_both(w, X)
    expected = ft.grad(lambda w: unrolled(w, X).sum())(WEIGHT)
    torch.testing.assert_close(ft.grad(of_closure)(WEIGHT), expected, rtol=1e-9, atol=1e-12)
    runs: tuple[Callable[[], Any], ...] = (
        lambda: ft.grad(of_both, argnums=(0, 1))(WEIGHT, X),
        lambda: ft.jvp(of_both, (WEIGHT, X), (WEIGHT, X)),
        lambda: ft.linearize(of_both, WEIGHT, X),
        lambda: ft.grad(lambda t: ft.grad(lambda w: of_both(w, t))(WEIGHT).sum())(X),
    )
    for run in runs:
        with pytest.raises(RuleResultError, match="Give the tensor as an argument of its own"):
            run()
    assert interpreter_stack() == []
    batched = lambda w, t: fixed_point(lambda _, t, x: cell(w, t, x), WEIGHT, t, torch.zeros_like(t))
    with pytest.raises(SameLevelError, match="both at level 1"):
        ft.vmap(batched)(torch.stack([WEIGHT] * 4), ROWS)


# --- what rules return ------------------------------------------------------------------------------------------------


def primitive(base: Callable[..., Any], **functions: Any) -> Primitive:
    p = Primitive("p", base)
    p.derivative(**functions)
    return p


def test_results_in_any_structure() -> None:
    p = primitive(
        lambda x: {"square": x * x, "parts": (x.sin(), (x > 0).sum()), "name": "p"},
        pullback=lambda grad, out, x: sum(
            g * d for g, d in ((grad["square"], 2 * x), (grad["parts"][0], x.cos())) if g is not None
        ),
        tangent=lambda t, out, x: {"square": 2 * x * t[0], "parts": (x.cos() * t[0], None), "name": None},
    )
    p.batching(lambda info, dims, x: (p(x), {"square": dims[0], "parts": (dims[0], None), "name": None}))
    f = lambda x: p(x)["square"] * 3 + p(x)["parts"][0]
    expected = 6 * X + X.cos()
    torch.testing.assert_close(ft.grad(lambda x: f(x).sum())(X), expected)
    torch.testing.assert_close(ft.grad(lambda x: p(x)["parts"][0].sum())(X), X.cos())
    torch.testing.assert_close(ft.jacfwd(f)(X), expected.diag())
    torch.testing.assert_close(ft.linearize(f, X)[1](X), expected * X)
    torch.testing.assert_close(ft.hessian(lambda x: f(x).sum())(X), (6 - X.sin()).diag())
    torch.testing.assert_close(ft.vmap(ft.grad(f))(X), expected)
    out = p(X)
    assert out["name"] == "p" and ft.vmap(lambda x: (p(x)["name"], x)[1])(X).shape == (3,)


WRONG: dict[str, tuple[Callable[[], Primitive], Callable[[Primitive], Any], str]] = {
    "another shape": (
        lambda: primitive(torch.sin, pullback=lambda grad, out, x: grad[:2]),
        lambda p: ft.grad(lambda x: p(x).sum())(X),
        r"got a torch.float64 tensor of shape \(2,\); expected a tensor of the argument's shape \(3,\)",
    ),
    "a number": (
        lambda: primitive(torch.sin, pullback=lambda grad, out, x: 1.0),
        lambda p: ft.grad(lambda x: p(x).sum())(X),
        "got a float",
    ),
    "too many": (
        lambda: primitive(torch.sin, pullback=lambda grad, out, x: (grad, grad)),
        lambda p: ft.grad(lambda x: p(x).sum())(X),
        "got 2 cotangents; expected at most 1",
    ),
    "a tangent of another shape": (
        lambda: primitive(torch.sin, tangent=lambda t, out, x: t[0].sum()),
        lambda p: ft.jvp(p, (X,), (X,)),
        r"the tangent of p of jvp\(.*expected a torch.float64 tensor of shape \(3,\), like the output, or None",
    ),
    "a tangent of another dtype": (
        lambda: primitive(torch.sin, tangent=lambda t, out, x: t[0].float()),
        lambda p: ft.jvp(p, (X,), (X,)),
        "got a torch.float32 tensor",
    ),
    "one tangent for two": (
        lambda: primitive(lambda x: (x, x), tangent=lambda t, out, x: t[0]),
        lambda p: ft.jvp(p, (X,), (X,)),
        "expected the structure of the result",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_derivative_may_not_return(name: str) -> None:
    make, run, message = WRONG[name]
    with pytest.raises(RuleResultError, match=message) as caught:
        run(make())
    assert "test_primitives.py:" in str(caught.value) and interpreter_stack() == []


def test_a_cotangent_is_summed_to_an_argument_that_was_broadcast() -> None:
    p = primitive(torch.mul, pullback=lambda grad, out, x, y: (grad * y, grad * x))
    found = ft.grad(lambda x, y: p(x, y).sum(), argnums=(0, 1))(X, ROWS)
    torch.testing.assert_close(found, (ROWS.sum(0), X.expand(4, 3)))


def test_what_a_batching_rule_may_not_return() -> None:
    for result, message in ((3, r"returned a int"), ((X, 0), "out_dim 0"), (((X, X), [0]), "out_dims")):
        p = Primitive("p", torch.sin)
        p.batching(lambda info, dims, x, result=result: result)
        with pytest.raises(BatchingRuleError, match=f"batching rule of p, registered at .*{message}"):
            ft.vmap(p)(ROWS)


def test_registration() -> None:
    p = Primitive("p", torch.sin)
    for wrong in (
        lambda: p.derivative(),
        lambda: p.derivative(pullback=3),  # type: ignore[arg-type]
        lambda: p.batching(3),  # type: ignore[type-var]
        lambda: p.rule(VmapInterpreter)(3),  # type: ignore[type-var]
    ):
        with pytest.raises(CallTypeError):
            wrong()
    assert not p.rules
    with pytest.raises(MissingRuleError, match=r"made by @p\.batching\. p\.rule\(VmapInterpreter\)\(p\.by_base\)"):
        ft.vmap(p)(X)


# --- where the base runs ----------------------------------------------------------------------------------------------


class Seen(PassThrough):
    kind = "seen"

    def __init__(self, func: Any = None) -> None:
        super().__init__(func)
        self.ops: list[str] = []

    def before(self, op: Any, args: Any, kwargs: Any) -> None:
        self.ops.append(str(op))


def test_the_base_runs_where_the_primitive_was_called() -> None:
    noise = Primitive("noise", lambda like: torch.randn_like(like))
    drawn = lambda x: x * 0 + noise(torch.zeros(()))
    assert len(set(ft.vmap(drawn, randomness="different")(X).tolist())) == 3
    assert len(set(ft.vmap(drawn, randomness="same")(X).tolist())) == 1
    with pytest.raises(RandomnessError):
        ft.vmap(drawn)(X)
    level = Seen()
    transform(level, Primitive("sine", lambda x: x.sin()))(X)
    assert level.ops == ["aten.sin.default"]


class Slopes(TableInterpreter):
    kind, payload, rules = "slopes", ("slope",), RuleTable("slopes", default="jvp")


def test_as_the_operators_that_it_is_made_of() -> None:
    wave = Primitive("wave", lambda x, scale: (x * scale).sin())
    wave.rule(VmapInterpreter, IntervalLevel, Slopes)(wave.by_base)
    torch.testing.assert_close(ft.vmap(lambda x: wave(x, 2.0))(ROWS), (2 * ROWS).sin())
    low, high = ft.bounds(lambda x: wave(x, 2.0))(X - 0.1, X + 0.1)
    expected = ft.bounds(lambda x: (x * 2.0).sin())(X - 0.1, X + 0.1)
    torch.testing.assert_close((low, high), expected)
    carried = Carried(X, slope=torch.ones_like(X))
    torch.testing.assert_close(transform(Slopes, wave)(carried, 2.0).slope, 2 * (2 * X).cos())
    # derivatives around see the operators, and are followed as they are where the primitive is called
    torch.testing.assert_close(ft.grad(lambda x: ft.vmap(lambda x: wave(x, 2.0))(x).sum())(X), 2 * (2 * X).cos())
    sine = Primitive("sine", torch.sin)
    sine.rule(GradInterpreter)(sine.by_base)
    with torch.no_grad():  # around the call, which says nothing of what is inside
        torch.testing.assert_close(ft.grad(lambda x: sine(x).sum())(X), X.cos())

    def cut(x: Tensor) -> Tensor:
        with torch.no_grad():
            return sine(x).sum() + 0 * x.sum()

    assert not ft.grad(lambda x: cut(x) + x.sum())(X).sub(1).any()


def test_a_table_made_of_derivatives_goes_by_the_tangent() -> None:
    half = primitive(lambda x: x.sin(), tangent=lambda t, out, x: t[0] / 2)  # a straight-through estimator, by half
    assert torch.equal(transform(Slopes, half)(Carried(X, slope=X)).slope, X / 2)
    _, (first, second) = ft.jet(lambda x: half(x) ** 2, (X,), ([X, None],))
    torch.testing.assert_close((first, second), (X.sin() * X, X * X / 2))
    with pytest.raises(MissingRuleError, match="has no rule for p"):
        ft.bounds(half)(X, X + 1)


def test_the_transpose_of_a_primitive_is_that_of_one_declared_linear() -> None:
    functions = {"pullback": lambda grad, out, x, by: (grad * by, None), "tangent": lambda t, out, x, by: t[0] * by}
    p = primitive(lambda x, by: x * by, linear=True, **functions)
    transposed = ft.linear_transpose(lambda x: p(x, 3.0).cumsum(0), X)
    torch.testing.assert_close(transposed(ROWS[0]), (3 * ROWS[0].flip(0).cumsum(0).flip(0),))
    with pytest.raises(NonLinearError, match=r"derivative\(\.\.\., linear=True\)"):
        ft.linear_transpose(primitive(torch.sin, pullback=lambda grad, out, x: grad * x.cos()), X)(X)
    with pytest.raises(CallTypeError):
        Primitive("p", torch.sin).derivative(pullback=lambda grad, out, x: grad, linear="yes")  # type: ignore[arg-type]
    assert ft.linear_transpose(ft.sanitize(lambda x: 2 * x), X)(X)[0].tolist() == (2 * X).tolist()


class Samples(TableInterpreter):
    kind, payload, rules = "samples", ("samples",), RuleTable("samples", default="loop")

    def cases(self, wrapper: Any) -> Any:
        return wrapper.value, *wrapper.samples.unbind(0)

    def of_cases(self, values: Any) -> Any:
        return self.carry(values[0], samples=torch.stack(values[1:]))


def test_a_table_that_runs_case_by_case_needs_no_rule() -> None:
    p = Primitive("p", lambda x, options: {"scaled": x * options["by"], "sum": x.sum()})
    p.rule(GradInterpreter)(p.by_base)
    run = lambda x, samples: transform(Samples, lambda x: p(x, {"by": x[0]}))(Carried(x, samples=samples))
    found = run(X, ROWS)
    torch.testing.assert_close(found["scaled"].samples, ROWS * ROWS[:, :1])
    torch.testing.assert_close((found["sum"].value, found["sum"].samples), (X.sum(), ROWS.sum(1)))
    slope = ft.grad(lambda rows: run(X, rows)["sum"].samples.square().sum())(ROWS)
    torch.testing.assert_close(slope, 2 * ROWS.sum(1, keepdim=True).expand(4, 3))
