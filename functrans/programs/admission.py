"""Which operators may be in a program; see NOTE [What programs cover]."""

from __future__ import annotations

from typing import Any

import torch

from functrans.derivatives.table import DERIVATIVES, NO_TANGENT
from functrans.operators import facts
from functrans.rules import FORGET, SCOPES, RuleTable, scope_here
from functrans.torch_private import OpOverload

aten = torch.ops.aten

#: The dtypes whose programs know no promotion and no conjugate.
REAL = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))

#: Pointwise operators whose tangent the table gives as a function: for real numbers the formulas of reverse mode are those of forward
#: mode, since the Jacobian of a pointwise operator is diagonal.
POINTWISE = frozenset(
    (aten.abs.default, aten.sgn.default, aten.div.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
     aten.tanh_backward.default, aten.sigmoid_backward.default)
)  # fmt: skip

#: the tables whose rules programs stand for, with the rules that the library itself registered
_tables: dict[RuleTable[Any], dict[OpOverload, Any]] = {}
#: the operators whose rules, outside of scopes, are others
_replaced: set[OpOverload] = set()


def watch(*tables: RuleTable[Any]) -> None:
    """Take the rules that are now in ``tables`` for those that programs stand for; an operator one of whose rules changes has no program."""
    for table in tables:
        _tables[table] = {op: table.get(op) for op in table}
    FORGET.insert(0, rules_changed)  # before those who ask whether an operator may be in a program


def rules_changed(table: RuleTable[Any], op: OpOverload) -> None:
    if has_our_rules(op, [table.rule_outside(op) for table in _tables]):
        _replaced.discard(op)
    else:
        _replaced.add(op)


def has_our_rules(op: OpOverload, found: list[Any]) -> bool:
    return all(rule is rules.get(op) for rule, rules in zip(found, _tables.values(), strict=True))


def by_our_rules(op: Any) -> bool:
    """Whether all rules of ``op`` are those of the library."""
    if SCOPES and scope_here() is not None:
        return has_our_rules(op, [table.get(op) for table in _tables])
    return op not in _replaced


def admitted(op: OpOverload) -> bool:
    """Whether ``op`` may be an instruction: pointwise, with one output, and by the rules that programs stand for."""
    entry = DERIVATIVES.get(op)
    if entry is None or not by_our_rules(op) or entry.outputs != 1 or facts(op).random:
        return False
    return entry.tangent in ("elementwise", NO_TANGENT) or op in POINTWISE
