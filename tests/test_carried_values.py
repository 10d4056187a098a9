"""What a transform by a table carries, and what its rules return:
a payload that would get lost is refused where it happens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from functrans import grad, vmap
from functrans.errors import CarriedValueError, DeadWrapperError, MissingRuleError, RuleResultError
from functrans.extend import (
    RuleTable,
    TableInterpreter,
    interpreter_stack,
    lowered,
    overriding,
    run_transformed,
    running_at,
    wrap,
)

aten = torch.ops.aten
X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


class SlopeInterpreter(TableInterpreter):
    """Forward mode by a table: ``u`` is the derivative."""

    kind = "slope"
    payload = ("u",)
    rules = RuleTable("slope rules")


@SlopeInterpreter.rules.register(aten.sin.default)
def sin(interpreter: Any, x: Any) -> Any:
    return interpreter.carry(x.value.sin(), u=x.u * x.value.cos())


@SlopeInterpreter.rules.register(aten.sum.default)
def total(interpreter: Any, x: Any, **kwargs: Any) -> Any:
    return interpreter.carry(x.value.sum(), u=x.u.sum())


@SlopeInterpreter.rules.register(aten.mul.Tensor)
def mul(interpreter: Any, x: Any, y: Any) -> Any:
    return interpreter.carry(x.value * y.value, u=x.u * y.value + x.value * y.u)


def slope(f: Callable[..., Any], x: Tensor) -> Tensor:
    """The derivative of ``f`` along ones."""
    interpreter = SlopeInterpreter(f)
    ones = torch.ones_like(x)
    out: Any = run_transformed(interpreter, lambda: interpreter.own(f(interpreter.carry(x, u=ones))))
    return out.u


@contextmanager
def rule_of(op: Any, rule: Callable[..., Any]) -> Iterator[None]:
    with overriding(SlopeInterpreter.rules, op):
        SlopeInterpreter.rules.add(op, rule)
        yield


def text(error: BaseException) -> str:
    return re.sub(r"\S*(test_carried_values.py):\d+", r"\1:N", str(error))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    assert interpreter_stack() == []


def test_rules_that_are_right() -> None:
    torch.testing.assert_close(slope(torch.sin, X), X.cos())
    torch.testing.assert_close(grad(lambda x: slope(torch.sin, x).sum())(X), -X.sin())
    torch.testing.assert_close(slope(lambda x: (x * x.sin()).sum(), X), (X.sin() + X * X.cos()).sum())
    batch = torch.stack([X, 2 * X])
    torch.testing.assert_close(vmap(lambda x: slope(torch.sin, x))(batch), batch.cos())


# ---- what is carried


def carrying(make: Callable[[Any, Any], Any]) -> Callable[[Tensor], Any]:
    """A function of a tensor that runs ``make(interpreter, x)`` in a transformed function,
    where x is of the transform's level.
    """

    def run(x: Tensor) -> Any:
        interpreter = SlopeInterpreter(make)
        entered = interpreter.carry(x, u=1.0)
        return run_transformed(interpreter, lambda: make(interpreter, entered))

    return run


@pytest.mark.parametrize(
    "make",
    [
        lambda i, x: i.carry(x.value, u=torch.ones_like(x)),  # of this level
        lambda i, x: i.carry(x.value, u=torch.ones(3)),  # a factory's result is, too
        lambda i, x: i.carry(x, u=1.0),
        lambda i, x: i.carry(torch.zeros(3)),
        lambda i, x: i.carry(x.value, u=[1.0, (x.value, x)]),  # inside of something
        lambda i, x: i.carry(x.value, u={"a": {"b": x}}),
        lambda i, x: i.constant(x),
        lambda i, x: grad(lambda y: i.carry(y).sum())(x.value),  # of a level further in
        lambda i, x: grad(lambda y: i.carry(x.value, u=y).sum())(x.value),
        lambda i, x: vmap(lambda y: i.carry(x.value, u=y))(torch.stack([x.value, x.value])),
    ],
)
@pytest.mark.parametrize(
    "around", [lambda f: f, lambda f: grad(lambda x: f(x).sum()), lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x]))]
)
def test_what_is_carried_is_of_the_levels_below(make: Callable[..., Any], around: Callable[..., Any]) -> None:
    with pytest.raises(CarriedValueError):
        around(carrying(make))(X)


def test_the_cures_work() -> None:
    def in_lowered(i: Any, x: Any) -> Any:
        with lowered(i):
            u = torch.ones_like(x.value)
        return i.carry(x.value, u=u).sin()

    def in_running_at(i: Any, x: Any) -> Any:
        with running_at(i.below):
            u = x.value * 2
        return i.carry(x.value, u=u).sin()

    for make, value, second in (
        (in_lowered, X.cos(), -X.sin()),
        (in_running_at, 2 * X * X.cos(), 2 * (X.cos() - X * X.sin())),
    ):
        torch.testing.assert_close(carrying(make)(X).u, value)
        torch.testing.assert_close(grad(lambda x, make=make: carrying(make)(x).u.sum())(X), second)


def test_any_python_value_may_be_carried() -> None:
    for value in (1, "a", None, [X, 2.0], {"a": X}, object(), (torch.float32, None)):
        assert carrying(lambda i, x, value=value: i.carry(x.value, u=value))(X).u is value


def test_values_of_ended_transforms_and_of_transforms_that_are_not_below() -> None:
    kept: list[Tensor] = []
    grad(lambda x: (kept.append(x * 2), x.sum())[1])(X)
    with pytest.raises(DeadWrapperError):
        carrying(lambda i, x: i.carry(x.value, u=kept[0]))(X)
    early = SlopeInterpreter(None)  # of the base

    def carry_early(x: Tensor) -> Tensor:
        return early.carry(x).sum()

    with pytest.raises(CarriedValueError, match="further in|not below"):
        grad(carry_early)(X)


def test_texts_of_carried_values() -> None:
    found = []
    for make in (
        lambda i, x: i.carry(x.value, u=torch.ones_like(x)),
        lambda i, x: grad(lambda y: i.carry(y).sum())(x.value),
        lambda i, x: i.carry(2.0),
    ):
        with pytest.raises(CarriedValueError) as info:
            carrying(make)(X)
        found.append(str(info.value))
    assert_expected_inline(
        "\n".join(found),
        """\
carry of slope(<lambda>) at level 1, u: got float64[3] of slope(<lambda>) at level 1; expected values of the levels below 1. What code in the transformed function makes is of this level: compute what is carried from x.value, in a rule or inside `with lowered(interpreter):`, where code runs one level down.
carry of slope(<lambda>) at level 1, value: got float64[3] of grad(<lambda>) at level 2; expected values of the levels below 1. That level is further in: compute what is carried inside `with running_at(interpreter.below):`, from values of that level.
carry of slope(<lambda>) at level 1, value: got a float; expected a tensor. Numbers and the like are payload.""",  # noqa: E501
    )


# ---- what rules return


def returning(make: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def rule(interpreter: Any, x: Any, *args: Any) -> Any:
        return make(interpreter, x)

    return rule


@pytest.mark.parametrize(
    "make",
    [
        lambda i, x: x.value.sin(),  # carry forgotten
        lambda i, x: None,
        lambda i, x: 1.0,
        lambda i, x: (i.carry(x.value.sin(), u=x.u),),
        lambda i, x: [i.carry(x.value.sin(), u=x.u)],
        lambda i, x: i.carry(x.value.sin().sum(), u=x.u),  # shapes
        lambda i, x: i.carry(x.value.sin().unsqueeze(0), u=x.u),
        lambda i, x: wrap(i, x.value.sin()),  # a wrapper by hand, without what is carried
    ],
)
@pytest.mark.parametrize(
    "around", [lambda f: f, lambda f: grad(lambda x: f(x).sum()), lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x]))]
)
def test_what_a_rule_may_not_return(make: Callable[..., Any], around: Callable[..., Any]) -> None:
    with rule_of(aten.sin.default, returning(make)), pytest.raises(RuleResultError):
        around(lambda x: slope(torch.sin, x))(X)


def test_a_rule_that_declines_is_none() -> None:
    with rule_of(aten.sin.default, returning(lambda i, x: NotImplemented)), pytest.raises(MissingRuleError) as caught:
        slope(torch.sin, X)
    assert "returned NotImplemented for this call" in caught.value.__notes__[0]


def test_a_rule_that_returns_its_argument_makes_a_tensor_of_its_own() -> None:
    def program(x: Any) -> Any:
        y = x.sin()
        y.mul_(y)
        return x.sum()

    with rule_of(aten.sin.default, returning(lambda i, x: x)):
        torch.testing.assert_close(slope(torch.sin, X), torch.ones_like(X))
        torch.testing.assert_close(slope(program, X), torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("op", "call", "make"),
    [
        (aten.max.dim, lambda x: x.max(0)[0], lambda i, x: i.carry(x.value.max(0)[0], u=0)),
        (aten.max.dim, lambda x: x.max(0)[0], lambda i, x: (i.carry(x.value.max(0)[0], u=0),)),
        (aten.max.dim, lambda x: x.max(0)[0], lambda i, x: (i.carry(x.value.max(0)[0], u=0), x.value.max(0)[1])),
        (aten.max.dim, lambda x: x.max(0)[0], lambda i, x: (i.carry(x.value.max(0)[0], u=0), None)),
        (aten.unbind.int, lambda x: x.unbind(0)[0], lambda i, x: [i.carry(v, u=0) for v in x.value.unbind(0)][:2]),
        (aten.unbind.int, lambda x: x.unbind(0)[0], lambda i, x: list(x.value.unbind(0))),
        (aten.unbind.int, lambda x: x.unbind(0)[0], lambda i, x: i.carry(x.value, u=0)),
        (aten.split.Tensor, lambda x: x.split(2)[0], lambda i, x: [i.carry(v, u=0) for v in x.value.split(1)[:2]]),
    ],
)
def test_operators_with_several_outputs(op: Any, call: Callable[..., Any], make: Callable[..., Any]) -> None:
    with rule_of(op, returning(make)), pytest.raises(RuleResultError):
        slope(call, X)


def test_operators_with_several_outputs_whose_rules_are_right() -> None:
    with rule_of(
        aten.max.dim,
        returning(lambda i, x: (i.carry(x.value.max(0)[0], u=x.u[x.value.argmax()]), i.constant(x.value.argmax()))),
    ):
        assert slope(lambda x: x.max(0)[0], X) == 1
        assert slope(lambda x: x.max(0).values, X) == 1
    with rule_of(aten.unbind.int, returning(lambda i, x: [i.carry(v, u=u) for v, u in zip(x.value, x.u, strict=True)])):
        assert slope(lambda x: x.unbind(0)[2], X) == 1


def test_the_shape_of_a_result_that_depends_on_numbers_is_the_rules() -> None:
    with rule_of(aten.nonzero.default, returning(lambda i, x: i.constant(x.value.nonzero()))):
        interpreter = SlopeInterpreter(torch.nonzero)
        entered = interpreter.carry(X, u=torch.ones_like(X))
        assert run_transformed(interpreter, lambda: torch.nonzero(entered)).shape == (3, 1)


def test_texts_of_results() -> None:
    found = []
    for make in (
        lambda i, x: x.value.sin(),
        lambda i, x: None,
        lambda i, x: i.carry(x.value.sum(), u=x.u),
        lambda i, x: wrap(i, x.value),
    ):
        with rule_of(aten.sin.default, returning(make)), pytest.raises(RuleResultError) as info:
            vmap(lambda x: slope(torch.sin, x))(torch.stack([X, X]))
        found.append(text(info.value))
    with rule_of(aten.max.dim, returning(lambda i, x: x)), pytest.raises(RuleResultError) as info:
        slope(lambda x: x.max(0), X)
    found.append(text(info.value))
    assert_expected_inline(
        "\n".join(found),
        """\
the rule for aten.sin.default of slope(sin) at level 2, registered at test_carried_values.py:N: got float64[3] of vmap(<lambda>) at level 1; expected a tensor of slope(sin) at level 2. Return interpreter.carry(value, u=...); interpreter.constant(value) where nothing is carried.
the rule for aten.sin.default of slope(sin) at level 2, registered at test_carried_values.py:N: got None; expected a tensor of slope(sin) at level 2. Return interpreter.carry(value, u=...); interpreter.constant(value) where nothing is carried.
the rule for aten.sin.default of slope(sin) at level 2, registered at test_carried_values.py:N: got float64[]; expected shape [3], the operator's for these arguments. Mend the rule.
the rule for aten.sin.default of slope(sin) at level 2, registered at test_carried_values.py:N: got a tensor without u; expected one made by carry of slope(sin). Return interpreter.carry(value, u=...); interpreter.constant(value) where nothing is carried.
the rule for aten.max.dim of slope(<lambda>) at level 1, registered at test_carried_values.py:N: got float64[3] of slope(<lambda>) at level 1; expected a tuple of 2, one for each output of aten::max.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices). Return them all.""",  # noqa: E501
    )
