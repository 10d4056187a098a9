"""Which operators may be in a program; see NOTE [What programs cover]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functrans.derivatives.table import DERIVATIVES, NO_TANGENT
from functrans.operators import facts
from functrans.rules import RuleTable
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
_tables: list[tuple[RuleTable[Any], dict[OpOverload, Any]]] = []
_replaced: set[OpOverload] = set()
#: called when the programs of operators are no longer valid
FORGET: list[Callable[[], None]] = []


def watch(*tables: RuleTable[Any]) -> None:
    """Take the rules that are now in ``tables`` for those that programs stand for; an operator one of whose rules changes has no program."""
    for table in tables:
        _tables.append((table, {op: table.get(op) for op in table}))
        table.on_change(rules_changed)


def rules_changed(op: OpOverload) -> None:
    if any(table.get(op) is not rules.get(op) for table, rules in _tables):
        _replaced.add(op)
    else:
        _replaced.discard(op)
    for forget in FORGET:
        forget()


def by_our_rules(op: Any) -> bool:
    """Whether all rules of ``op`` are those of the library."""
    return op not in _replaced


def admitted(op: OpOverload) -> bool:
    """Whether ``op`` may be an instruction: pointwise, with one output, and by the rules that programs stand for."""
    entry = DERIVATIVES.get(op)
    if entry is None or op in _replaced or entry.outputs != 1 or facts(op).random:
        return False
    return entry.tangent in ("elementwise", NO_TANGENT) or op in POINTWISE
