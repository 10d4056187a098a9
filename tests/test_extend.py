"""New transforms from outside: what TableInterpreter does without rules, with them, among the others,
and what it says when one is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import functrans
from functrans import grad, jvp, vmap
from functrans.errors import CustomFunctionError, DuplicateRuleError
from functrans.extend import (
    BATCHING_RULES,
    DERIVATIVES,
    MissingRuleError,
    RuleTable,
    TableInterpreter,
    batching_rule,
    derivative,
    interpreter_stack,
    overriding,
    run_transformed,
)

aten = torch.ops.aten
X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


class ErrorInterpreter(TableInterpreter):
    """First-order error bounds: a wrapper stands for numbers at most ``error`` away from ``value``."""

    kind = "error"
    payload = ("error",)
    rules = RuleTable("error rules")


rule = ErrorInterpreter.rules.register


class EmptyInterpreter(TableInterpreter):
    """Has no rules."""

    kind = "empty"
    payload = ("mark", "other")
    rules = RuleTable("empty rules")


def amount(x: Any) -> Tensor:
    return torch.zeros_like(x.value) if x.error is None else x.error


@rule(aten.add.Tensor)
def add(interpreter: ErrorInterpreter, x: Any, y: Any) -> Any:
    if not isinstance(y, Tensor):
        return interpreter.carry(x.value + y, error=x.error)
    return interpreter.carry(x.value + y.value, error=amount(x) + amount(y))


@rule(aten.mul.Tensor)
def mul(interpreter: ErrorInterpreter, x: Any, y: Any) -> Any:
    y = y if isinstance(y, Tensor) else interpreter.constant(torch.tensor(y, dtype=x.dtype))
    return interpreter.carry(x.value * y.value, error=amount(x) * y.value.abs() + x.value.abs() * amount(y))


@rule(aten.sin.default)
def sin(interpreter: ErrorInterpreter, x: Any) -> Any:
    return interpreter.carry(x.value.sin(), error=amount(x) * x.value.cos().abs())


@rule(aten.clone.default)
def clone(interpreter: ErrorInterpreter, x: Any, **kwargs: Any) -> Any:
    return interpreter.carry(x.value.clone(**kwargs), error=amount(x).clone())


@rule(aten.select.int)
def select(interpreter: ErrorInterpreter, x: Any, dim: int, index: int) -> Any:
    return interpreter.carry(x.value.select(dim, index), error=amount(x).select(dim, index))


@rule(aten.select_scatter.default)
def select_scatter(interpreter: ErrorInterpreter, x: Any, src: Any, dim: int, index: int) -> Any:
    value = x.value.select_scatter(src.value, dim, index)
    return interpreter.carry(value, error=amount(x).select_scatter(amount(src), dim, index))


@rule(aten.sum.default)
def total(interpreter: ErrorInterpreter, x: Any) -> Any:
    return interpreter.carry(x.value.sum(), error=amount(x).sum())


@rule(aten.cat.default)
def cat(interpreter: ErrorInterpreter, xs: Any, dim: int = 0) -> Any:
    return interpreter.carry(torch.cat([x.value for x in xs], dim), error=torch.cat([amount(x) for x in xs], dim))


def with_error(f: Callable[..., Any], x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    interpreter = ErrorInterpreter(f)
    out: Any = run_transformed(interpreter, lambda: interpreter.own(f(interpreter.carry(x, error=error))))
    return out.value, amount(out)  # one level down, where zeros are the level's own


def marked(f: Callable[..., Any], x: Tensor) -> Any:
    interpreter = EmptyInterpreter(f)
    return run_transformed(interpreter, lambda: interpreter.own(f(interpreter.carry(x, mark=1))))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    assert interpreter_stack() == []


E = torch.full((3,), 0.01, dtype=torch.float64)


def test_rules_run_and_composite_operators_are_taken_apart() -> None:
    value, error = with_error(lambda x: torch.multiply(x, x).sin(), X, E)
    torch.testing.assert_close(value, (X * X).sin())
    torch.testing.assert_close(error, 2 * X.abs() * E * (X * X).cos().abs())


def test_what_carries_nothing_runs_below_without_rules() -> None:
    out = marked(lambda x: torch.linalg.norm(X) * torch.ones_like(x) + torch.rand(3).clamp(2, 2), X)
    torch.testing.assert_close(out.value, X.norm().expand(3) + 2)
    assert out.mark is None and out.other is None


def test_the_identity_keeps_its_payload() -> None:
    out = marked(lambda x: x, X)
    assert out.value is X and out.mark == 1 and out.other is None


def test_constants_of_outer_levels() -> None:
    # y belongs to the vmap around: a constant for the error transform
    outs, errors = vmap(lambda y: with_error(lambda x: x * y, X, E))(torch.tensor([2.0, -3.0], dtype=torch.float64))
    torch.testing.assert_close(outs, torch.stack([2 * X, -3 * X]))
    torch.testing.assert_close(errors, torch.stack([2 * E, 3 * E]))
    # the output may be of an outer level altogether
    outs, errors = vmap(lambda y: with_error(lambda x: y, X, E))(X)
    assert torch.equal(outs, X) and not errors.any()


def test_writes_and_views_need_no_rules_of_their_own() -> None:
    def f(x: Tensor) -> Tensor:
        x = x * 1.0
        y = x[0]
        y.mul_(3.0)
        x[1] = x[2].sin()
        x += 1
        return x

    value, error = with_error(f, X, E)
    torch.testing.assert_close(value, torch.stack([3 * X[0], X[2].sin(), X[2]]) + 1)
    torch.testing.assert_close(error, torch.stack([3 * E[0], E[2] * X[2].cos(), E[2]]))


def test_lists_of_tensors() -> None:
    value, error = with_error(lambda x: torch.cat([x, X, x.sin()]), X, E)
    torch.testing.assert_close(value, torch.cat([X, X, X.sin()]))
    torch.testing.assert_close(error, torch.cat([E, 0 * E, E * X.cos().abs()]))


def test_inside_and_around_the_other_transforms() -> None:
    f = lambda x: (x * x.sin()).sum()
    slope = lambda x: x.sin() + x * x.cos()
    # around: the error of a gradient needs a rule for every operator of the backward pass
    with pytest.raises(
        MissingRuleError, match=r"no rule for aten.exp.default. Levels: 1 error\(exp_sum\), 2 grad\(exp_sum\)"
    ):
        with_error(grad(exp_sum), X, E)
    # inside: the derivative of an error bound, by reverse and by forward mode and for a batch
    bound = lambda e: with_error(f, X, e)[1]
    expected = X.sin().abs() + X.abs() * X.cos().abs()
    torch.testing.assert_close(grad(bound)(E), expected)
    torch.testing.assert_close(jvp(bound, (E,), (torch.ones_like(E),))[1], expected.sum())
    torch.testing.assert_close(vmap(grad(bound))(torch.stack([E, 2 * E])), torch.stack([expected, expected]))
    torch.testing.assert_close(grad(lambda x: with_error(f, x, E)[0])(X), slope(X))
    # twice: each level keeps its own
    value, error = with_error(lambda x: with_error(lambda y: y + x * x, x, 2 * X)[0], X, E)
    torch.testing.assert_close((value, error), (X + X * X, E + 2 * X.abs() * E))
    # around vmap: the rules see the whole batch
    batch = torch.stack([X, 2 * X])
    value, error = with_error(vmap(lambda x: x.sin() * x), batch, 0.01 + 0 * batch)
    torch.testing.assert_close(value, batch.sin() * batch)
    torch.testing.assert_close(error, 0.01 * (batch.sin().abs() + batch.abs() * batch.cos().abs()))


def exp_sum(x: Tensor) -> Tensor:
    return x.exp().sum()


def text(error: BaseException) -> str:
    return str(error).replace(str(Path(__file__)), "<this file>")


def test_missing_rule_names_operator_transform_levels_file_and_the_lines_to_paste() -> None:
    def norm(x: Tensor) -> Tensor:
        return x.addcmul(x, x, value=2)

    with pytest.raises(MissingRuleError) as info:
        grad(lambda x: with_error(norm, x, E)[0].sum())(X)
    assert isinstance(info.value, NotImplementedError)
    assert_expected_inline(
        text(info.value),
        """\
error(norm) at level 2 has no rule for aten.addcmul.default. Levels: 1 grad(<lambda>), 2 error(norm). Schema: aten::addcmul(Tensor self, Tensor tensor1, Tensor tensor2, *, Scalar value=1) -> Tensor
The rules of error stand in <this file>. Add there:

@ErrorInterpreter.rules.register(torch.ops.aten.addcmul.default)
def addcmul(interpreter, self, tensor1, tensor2, *, value=1):
    return interpreter.carry(..., error=...)""",  # noqa: E501
    )


def test_missing_rule_of_a_transform_that_has_none() -> None:
    with pytest.raises(MissingRuleError) as info:
        marked(torch.sin, X)
    assert_expected_inline(
        text(info.value),
        """\
empty(sin) at level 1 has no rule for aten.sin.default. Levels: 1 empty(sin). Schema: aten::sin(Tensor self) -> Tensor
The rules of empty stand in <this file>. Add there:

@EmptyInterpreter.rules.register(torch.ops.aten.sin.default)
def sin(interpreter, self):
    return interpreter.carry(..., mark=..., other=...)""",
    )


def test_the_pasted_lines_are_python() -> None:
    for op, args in (
        (aten.uniform.default, (X,)),
        (aten.lerp.Scalar, (X, X, 0.5)),
        (aten.__and__.Scalar, (X.bool(), 1)),
    ):
        with pytest.raises(MissingRuleError) as info:
            marked(lambda x, op=op, rest=args[1:]: op(x, *rest), args[0])
        compile(str(info.value).split("\n\n")[1], "pasted", "exec")


def test_carry_refuses_what_is_not_in_the_payload() -> None:
    with pytest.raises(TypeError, match=r"got a payload \['eror'\]; expected names of its payload, \('error',\)"):
        ErrorInterpreter().carry(X, eror=E)


def test_functions_of_autograd_are_not_passed_through() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

    with pytest.raises(CustomFunctionError, match="FUNCTION_RULES"):
        with_error(Double.apply, X, E)


# ---- overriding


def test_overriding_puts_back_what_was_there() -> None:
    op = aten.sin.default
    entry, place = DERIVATIVES.get(op), DERIVATIVES.place(op)
    with pytest.raises(ZeroDivisionError), overriding(DERIVATIVES, op):
        assert op not in DERIVATIVES
        derivative(op, self=lambda grad: 7 * grad, tangent="elementwise")
        torch.testing.assert_close(grad(lambda x: x.sin().sum())(X), 7 * torch.ones_like(X))
        torch.testing.assert_close(jvp(torch.sin, (X,), (X,))[1], 7 * X)
        _ = 1 / 0
    assert DERIVATIVES.get(op) is entry and DERIVATIVES.place(op) == place
    torch.testing.assert_close(grad(lambda x: x.sin().sum())(X), X.cos())
    with pytest.raises(DuplicateRuleError):
        derivative(op, self=lambda grad: grad)


def test_overriding_with_nothing_shows_what_happens_without_the_rule() -> None:
    with overriding(DERIVATIVES, aten.sin.default):  # PyTorch's own derivative
        torch.testing.assert_close(grad(lambda x: x.sin().sum())(X), X.cos())


def test_overriding_a_batching_rule() -> None:
    op = aten.sin.default
    with overriding(BATCHING_RULES, op):

        @batching_rule(op)
        def wrong_sin(info: Any, in_dims: Any, x: Tensor) -> Any:
            return x * 0, in_dims[0]

        assert not functrans.vmap(torch.sin)(X).any()
    torch.testing.assert_close(functrans.vmap(torch.sin)(X), X.sin())


def test_overriding_a_rule_that_was_not_there() -> None:
    table: RuleTable[Any] = RuleTable("some rules")
    with overriding(table, aten.sin.default):
        table.add(aten.sin.default, len)
        assert table.get(aten.sin.default) is len
    assert aten.sin.default not in table
