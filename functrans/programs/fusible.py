"""Which operators may be in a program; see NOTE [What programs cover]."""

from __future__ import annotations

from typing import Any

import torch

from functrans.derivatives.table import DERIVATIVES, NO_TANGENT
from functrans.operators.info import op_info
from functrans.operators.rules import RuleCache, RuleTable
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

#: The dtypes whose programs know no promotion and no conjugate.
REAL = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))

#: Pointwise operators whose tangent the table gives as a function: for real numbers the formulas of reverse mode are
#: those of forward mode, since the Jacobian of a pointwise operator is diagonal.
POINTWISE = frozenset(
    (aten.abs.default, aten.sgn.default, aten.div.Tensor, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf,
     aten.tanh_backward.default, aten.sigmoid_backward.default)
)  # fmt: skip

#: oneDNN's kernel takes operands of one shape alone, and programs those that broadcast.
NOT_BROADCAST = frozenset((aten.gelu_backward.default,))

#: the tables whose rules programs stand for, with the rules that the library itself registered
_tables: list[tuple[RuleTable[Any], dict[OpOverload, Any]]] = []


def watch(*tables: RuleTable[Any]) -> None:
    """Take the rules that are now in ``tables`` for those that programs stand for; an operator one of whose rules is
    another has no program."""
    _tables.extend((table, {op: table.get(op) for op in table}) for table in tables)


def by_our_rules(op: Any) -> bool:
    """Whether all rules of ``op`` are those of the library."""
    return all(table.get(op) is rules.get(op) for table, rules in _tables)


FUSIBLE = RuleCache()
UNCHANGED = RuleCache()


def own_derivatives() -> bool:
    """Whether all derivatives are those of the library, but for operators that it does not know."""
    return UNCHANGED.find(DERIVATIVES, look_through)


def look_through() -> bool:
    own = next(rules for table, rules in _tables if table is DERIVATIVES)
    return all(DERIVATIVES.get(op) is entry for op, entry in own.items())


def fusible(op: OpOverload) -> bool:
    """Whether ``op`` may be an instruction: pointwise, with one output, and by the rules that programs stand for."""
    return FUSIBLE.find(op, decide, op)


def decide(op: OpOverload) -> bool:
    known = op_info(op)
    entry = DERIVATIVES.get(op)
    if entry is None or not by_our_rules(op) or entry.outputs != 1 or known.random or op in NOT_BROADCAST:
        return False
    return entry.tangent in ("elementwise", NO_TANGENT) or op in POINTWISE
