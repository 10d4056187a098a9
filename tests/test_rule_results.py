"""What a batching rule returns is checked where all rules pass: ours,
those of custom operators and of autograd.Functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from identity_functions import identity
from torch import Tensor

from functrans import grad, jvp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import BatchingRuleError
from functrans.extend import overriding
from functrans.interpreters.vmap.table import BATCHING_RULES

X = torch.arange(12.0).reshape(4, 3)

#: By what is wrong: what a rule of the identity, called with (info, in_dims, x), returns for a batch (4, 3);
#: and words of the error.
WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "another dimension": (
        lambda info, in_dims, x: (x, 1),
        r"out_dim 1 for an output of shape \(4, 3\); expected the dimension of size 4",
    ),
    "the last dimension": (lambda info, in_dims, x: (x, -1), r"out_dim -1 for an output of shape \(4, 3\)"),
    "a dimension out of range": (lambda info, in_dims, x: (x, 2), r"out_dim 2 for an output of shape \(4, 3\)"),
    "a negative one out of range": (lambda info, in_dims, x: (x, -3), r"out_dim -3 for an output"),
    "a batch of another size": (lambda info, in_dims, x: (x[:2], 0), r"out_dim 0 for an output of shape \(2, 3\)"),
    "a batch that was summed": (lambda info, in_dims, x: (x.sum(), 0), r"out_dim 0 for an output of shape \(\)"),
    "no dimension": (lambda info, in_dims, x: x, r"a tensor of shape \(4, 3\); expected a pair"),
    "nothing": (lambda info, in_dims, x: None, "a NoneType; expected a pair"),
    "three values": (lambda info, in_dims, x: (x, 0, 0), "a tuple; expected a pair"),
    "a dimension that is no int": (
        lambda info, in_dims, x: (x, 0.0),
        r"out_dims 0.0 for one tensor; expected an int or None",
    ),
    "a list of dimensions": (lambda info, in_dims, x: (x, (0, 0)), r"out_dims \(0, 0\) for one tensor"),
    "a bool": (lambda info, in_dims, x: (x, True), "out_dims True for one tensor"),
    "too few dimensions": (
        lambda info, in_dims, x: ((x, x), (0,)),
        "1 out_dims for 2 outputs; expected one for each, or one for all",
    ),
}


def by_the_table(rule: Callable[..., Any]) -> Callable[[Tensor], Any]:
    def f(x: Tensor) -> Any:
        with overriding(BATCHING_RULES, torch.ops.aten.cumsum.default) as table:
            table.register(torch.ops.aten.cumsum.default)(lambda info, in_dims, x, dim: rule(info, in_dims, x))
            return torch.cumsum(x, 0)

    return f


def by_a_function(rule: Callable[..., Any]) -> Callable[[Tensor], Any]:
    return identity(backward=lambda ctx, grad: grad, vmap=rule).apply


@torch.library.custom_op("functrans_tests::same", mutates_args=())
def same(x: Tensor) -> Tensor:
    return x.clone()


@same.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Registered:
    """The rule that ``same`` has at the moment."""

    rule: Callable[..., Any]


@same.register_vmap
def _(info: Any, in_dims: Any, x: Tensor) -> Any:
    return Registered.rule(info, in_dims, x)


def by_register_vmap(rule: Callable[..., Any]) -> Callable[[Tensor], Any]:
    Registered.rule = staticmethod(rule)  # type: ignore[assignment]
    return same


WAYS = {"our table": by_the_table, "register_vmap": by_register_vmap, "Function.vmap": by_a_function}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("way", WAYS)
def test_wrong_results_are_refused(way: str, what: str) -> None:
    rule, words = WRONG[what]
    f = WAYS[way](rule)
    with pytest.raises(BatchingRuleError, match=words):
        vmap(f)(X)
    assert interpreter_stack() == []
    with pytest.raises(RuntimeError):
        vmap(vmap(f))(X.expand(2, 4, 3))


@pytest.mark.parametrize("way", WAYS)
def test_right_results_pass_at_any_place(way: str) -> None:
    for rule in (
        lambda info, in_dims, x: (x, in_dims[0]),
        lambda info, in_dims, x: (x.movedim(in_dims[0], -1), -1),
        lambda info, in_dims, x: (x.movedim(in_dims[0], 0), 0),
        lambda info, in_dims, x: (x.movedim(in_dims[0], -1), 1),
        lambda info, in_dims, x: (x.movedim(in_dims[0], 0), -2),
    ):
        f = WAYS[way](rule)
        for in_dim in (0, 1):
            assert torch.equal(vmap(f, in_dims=in_dim, out_dims=in_dim)(X), X)
    f = WAYS[way](lambda info, in_dims, x: (torch.ones(3), None))
    assert torch.equal(vmap(f)(X), torch.ones(4, 3))


def test_the_error_names_the_rule_and_its_place() -> None:
    for way, name in (
        ("our table", "aten.cumsum.default"),
        ("Function.vmap", "Identity.vmap"),
        ("register_vmap", "functrans_tests.same.default"),
    ):
        with pytest.raises(BatchingRuleError, match=name) as caught:
            vmap(WAYS[way](WRONG["another dimension"][0]))(X)
        assert "test_rule_results.py" in str(caught.value) or way == "register_vmap"


def test_a_wrapper_of_the_rule_s_own_level_is_refused() -> None:
    seen: list[Tensor] = []
    rule = lambda info, in_dims, x: (seen[0], None)
    with pytest.raises(BatchingRuleError, match="a value of level 1; expected one below level 1"):
        vmap(lambda x: (seen.append(x), by_the_table(rule)(x))[1])(X)


def test_rules_that_are_reached_at_a_lower_level() -> None:
    f = by_the_table(WRONG["another dimension"][0])
    for run in (
        lambda: vmap(grad(lambda x: f(x).sum()))(X),
        lambda: jvp(vmap(f), (X,), (X,)),
        lambda: grad(lambda x: vmap(f)(x).sum())(X),
    ):
        with pytest.raises(BatchingRuleError, match="out_dim 1"):
            run()
