"""Rules for the length of a block: ``rules_in_scope`` and ``overriding``, with checks of what is given."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from functrans.errors import CallTypeError, RegistrationError
from functrans.errors.wording import what
from functrans.operators.rules import RuleTable, caller_place
from functrans.operators.scopes import scope_of
from functrans.pytorch.torch_private import OpOverload

Rule = TypeVar("Rule")


def rules_in_scope(
    table: RuleTable[Rule], rules: Mapping[OpOverload, Rule | None]
) -> AbstractContextManager[RuleTable[Rule]]:
    """Context: ``table`` has these rules; None takes out the rule of an operator.

    Rules registered inside for these operators end with it.
    They hold for the code in this context (see ``contextvars``): in this thread or task of asyncio, and in tasks that
    are started inside and as long as the block lasts. Other threads do not see them. Scopes nest; an exception ends
    them like anything else.

    Example:
        >>> import torch, functrans
        >>> from functrans.extend import BATCHING_RULES, rules_in_scope
        >>> sort = torch.ops.aten.sort.default
        >>> def rule(info, in_dims, x, dim=-1, descending=False):
        ...     print("sorting", info.batch_size, "examples")
        ...     return torch.sort(x.movedim(in_dims[0], 0), dim % (x.dim() - 1) + 1, descending), (0, 0)
        >>> with rules_in_scope(BATCHING_RULES, {sort: rule}):
        ...     functrans.vmap(lambda x: x.sort().values)(torch.tensor([[2, 1], [5, 7]]))
        sorting 2 examples
        tensor([[1, 2],
                [5, 7]])
    """
    check_table("rules_in_scope(table, rules)", table)
    if not isinstance(rules, Mapping):
        cure = "Write overriding(table, op) to take rules out." if isinstance(rules, OpOverload) else ""
        raise CallTypeError(
            "rules_in_scope(table, rules)", f"{what(rules)} as rules", "a dict from operators to rules", cure
        )
    if not rules:
        raise RegistrationError(f"{table.title}: a scope of rules was opened for no operator. Name at least one.")
    place = caller_place()
    for op, rule in rules.items():
        table.check(op)
        if rule is not None:
            table.check_rule(op, rule)
    return scope_of(table, {op: None if rule is None else (rule, place) for op, rule in rules.items()})


def check_table(call: str, table: Any) -> None:
    if not isinstance(table, RuleTable):
        cure = "The table comes first, then the operators." if isinstance(table, OpOverload) else ""
        raise CallTypeError(call, f"{what(table)} as table", "a RuleTable, such as functrans.extend.DERIVATIVES", cure)


def overriding(table: RuleTable[Rule], *ops: OpOverload) -> AbstractContextManager[RuleTable[Rule]]:
    """Context: the table's rules for ``ops`` are taken out, so that others can be registered; afterwards they are back.

    In this thread or task of asyncio only, as with ``rules_in_scope``. To replace a rule for good, change it where it
    stands: the error for a second rule names the place.

    Example:
        >>> import torch, functrans
        >>> from functrans.extend import DERIVATIVES, derivative, overriding
        >>> round_ = torch.ops.aten.round.default
        >>> with overriding(DERIVATIVES, round_):
        ...     derivative(round_, self=lambda grad: grad, tangent="elementwise")  # straight through
        ...     functrans.grad(torch.round)(torch.tensor(0.7))
        tensor(1.)
        >>> functrans.grad(torch.round)(torch.tensor(0.7))
        tensor(0.)
    """
    check_table("overriding(table, *ops)", table)
    for op in ops:
        table.check(op)
    return rules_in_scope(table, dict.fromkeys(ops))
