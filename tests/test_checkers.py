"""The checkers that functrans.extend offers to authors: what is right passes, and what is wrong is found, each kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import hessian, jet, laplacian, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError
from functrans.extend import (
    BATCHING_RULES,
    DERIVATIVES,
    CheckFailedError,
    RuleTable,
    TableInterpreter,
    batching_rule,
    check_batching_rule,
    check_derivative,
    check_transform,
    derivative,
    missing_rules,
    overriding,
)
from functrans.shipped.jet import JetInterpreter

aten = torch.ops.aten


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("f", "args"),
    [
        (torch.sin, (some(3),)),
        (torch.mul, (some(2, 3), some(3))),
        (torch.cumsum, (some(3), 0)),
        (aten.linear.default, (some(2, 3), some(4, 3), some(4))),
        (torch.linalg.slogdet, (some(3, 3),)),
        (torch.gather, (some(3), 0, torch.tensor([2, 0]))),
        (torch.var_mean, (some(4),)),
    ],
)
def test_derivatives_that_are_right(f: Any, args: Any) -> None:
    state = torch.get_rng_state()
    check_derivative(f, *args)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"self": lambda grad, dim: grad, "tangent": "elementwise"}, "the derivative by jvp"),
        ({"self": lambda grad, dim: grad, "tangent": "linear"}, "the derivative by vjp"),
        ({"self": lambda grad, dim: grad.flip(0).cumsum(0).flip(0) * 2, "tangent": "linear"}, "the derivative by vjp"),
        ({"self": lambda grad, dim: grad.flip(0).cumsum(0).flip(0), "tangent": lambda self_t, dim: self_t}, "by jvp"),
    ],
)
def test_derivatives_that_are_wrong(entry: Any, said: str) -> None:
    op = aten.cumsum.default
    with overriding(DERIVATIVES, op):
        derivative(op, **entry)
        with pytest.raises(CheckFailedError, match=said):
            check_derivative(op, some(3), 0)
    check_derivative(op, some(3), 0)
    assert interpreter_stack() == []


def test_a_derivative_that_is_wrong_at_second_order_only() -> None:
    """A formula that takes something for a constant."""
    op = aten.sin.default
    with overriding(DERIVATIVES, op):
        derivative(op, self=lambda grad, self: grad * self.detach().cos(), tangent="elementwise")
        check_derivative(op, some(3), order=1)
        with pytest.raises(CheckFailedError, match="second derivative"):
            check_derivative(op, some(3))


def test_a_derivative_that_is_wrong_for_one_argument_only() -> None:
    op = aten.atan2.default
    with overriding(DERIVATIVES, op):
        derivative(
            op,
            self=lambda grad, self, other: grad * other / (self * self + other * other),
            other=lambda grad, self, other: grad * self / (self * self + other * other),  # the sign
            tangent="elementwise",
        )
        with pytest.raises(CheckFailedError, match="argument 1: the derivative by jvp"):
            check_derivative(op, some(3), some(3) + 5)


def test_batching_rules_that_are_right() -> None:
    for f, args in (
        (torch.outer, (some(2), some(3))),
        (torch.sort, (some(3),)),
        (torch.index_select, (some(3, 2), 0, torch.tensor([2, 0]))),
        (torch.where, (torch.tensor([True, False]), some(2), some(2))),
        (torch.nn.functional.layer_norm, (some(3), (3,), some(3), some(3))),
    ):
        check_batching_rule(f, *args)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda info, in_dims, x, dims: (x.flip(1), in_dims[0]), "in_dims"),  # right for the batch in front only
        (lambda info, in_dims, x, dims: (x.movedim(in_dims[0], 0).flip(0).flip(1), 0), "in_dims"),  # examples swapped
        (lambda info, in_dims, x, dims: (x.movedim(in_dims[0], 0)[:1].flip(1).expand(4, 3), 0), "in_dims"),
    ],
)
def test_batching_rules_that_are_wrong(rule: Any, said: str) -> None:
    op = aten.flip.default
    with overriding(BATCHING_RULES, op):
        batching_rule(op)(rule)
        with pytest.raises(Exception, match=said):
            check_batching_rule(op, some(3), [0])
    check_batching_rule(op, some(3), [0])


def test_examples_of_ones_own() -> None:
    spd = [m @ m.T + torch.eye(3, dtype=m.dtype) for m in some(4, 3, 3)]
    check_batching_rule(torch.linalg.cholesky, spd[0], examples=[(m,) for m in spd])


def test_a_batching_rule_knows_its_vmap() -> None:
    seen = []
    with overriding(BATCHING_RULES, aten.flip.default):

        @batching_rule(aten.flip.default)
        def rule(info: Any, in_dims: Any, x: Tensor, dims: Any) -> Any:
            seen.append((info.level, info.axis_name, info.batch_size, info.interpreter.kind))
            return x.movedim(in_dims[0], 0).flip([d + 1 for d in dims]), 0

        vmap(vmap(lambda x: x.flip(0), axis_name="inner"))(some(2, 5, 3))
    assert seen == [(2, "inner", 5, "vmap"), (1, None, 2, "vmap")]


def test_transforms() -> None:
    f = lambda x: (x.sin() ** 2).sum()
    trace = lambda x: hessian(f)(x).trace()
    check_transform(laplacian(f), trace, some(3))
    x, zero = some(3), torch.zeros(3, dtype=torch.float64)
    check_transform(
        lambda x, v: jet(f, (x,), ([v, zero],))[1][1], lambda x, v: v @ hessian(f)(x) @ v, x, some(3)
    )
    for wrong, said in (
        (lambda x: laplacian(f)(x) + 1e-3, "its value"),
        (lambda x: laplacian(f)(x.detach()), "jvp of it"),
        (lambda x: laplacian(f)(x) + (x - x.detach()).sum(), "jvp of it"),
    ):
        with pytest.raises(CheckFailedError, match=said):
            check_transform(wrong, trace, some(3))
    check_transform(lambda x: x > 0, lambda x: x > 0, some(3), differentiable=False)
    batch_mean = lambda x: x - x.mean()
    check_transform(batch_mean, batch_mean, some(3))


def test_arguments() -> None:
    for call in (
        lambda: check_derivative(3, some(2)),
        lambda: check_derivative(torch.sin, torch.randn(3)),
        lambda: check_derivative(torch.sin, 3),
        lambda: check_batching_rule(torch.sin, 3.0),
        lambda: check_batching_rule("sin", some(2)),
        lambda: check_transform(torch.sin, torch.sin, torch.tensor([1, 2])),
        lambda: check_transform(torch.sin, None, some(2)),
        lambda: missing_rules(int, torch.sin, some(2)),
        lambda: missing_rules(JetInterpreter, None, some(2)),
    ):
        with pytest.raises(CallTypeError):
            call()


class Plain(TableInterpreter):
    kind = "plain"
    payload = ("label",)
    rules: RuleTable[Any] = RuleTable("plain")


def test_missing_rules() -> None:
    captured = some(3)

    def f(x: Tensor, tree: Any) -> Tensor:
        y = (x @ tree["w"]).relu_()
        y[0] = captured.sin().sum() + 1
        return y.flatten() + x.new_ones(2).cos().sum() + tree["n"]

    found = missing_rules(Plain, f, some(2, 3), {"w": some(3, 2), "n": 3})
    names = [str(op) for op in found]
    assert names[:2] == ["aten.mm.default", "aten.relu.default"] and "aten.sin.default" not in names
    assert "aten.cos.default" not in names and len(set(names)) == len(names)
    lines = found[aten.mm.default].splitlines()
    assert lines[:2] == ["@Plain.rules.register(torch.ops.aten.mm.default)", "def mm(interpreter, self, mat2):"]
    with_rule = {aten.mm.default: lambda interpreter, x, y: None}
    for op, rule in with_rule.items():
        Plain.rules.add(op, rule)
    try:
        assert [str(op) for op in missing_rules(Plain, f, some(2, 3), {"w": some(3, 2), "n": 3})] == names[1:]
    finally:
        Plain.rules.remove(aten.mm.default)
    assert missing_rules(JetInterpreter, f, some(2, 3), {"w": some(3, 2), "n": 3}) == {}
    assert interpreter_stack() == []
