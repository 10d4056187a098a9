"""Whether an operator is affine in what a transform carries something on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functrans.derivatives.linearity import linear_group
from functrans.extension.calls import check_arguments, check_operator, check_running
from functrans.operators.info import op_info
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tree_flatten

if TYPE_CHECKING:
    from functrans.extension.table_interpreter import TableInterpreter


def is_affine(interpreter: TableInterpreter, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator, called with wrappers of ``interpreter``, is affine in those that carry a payload.

    Then what is known of a sum of things (a mean, the generators of a zonotope, the terms of a polynomial) is known of
    the result, by one call for each: the derivative is the same everywhere. The facts are those of the derivative
    table; where they do not say that an operator is affine, the answer is no.

    Args:
        interpreter: whose wrappers are meant.
        op: the operator overload.
        args: its positional arguments, as a rule and a policy get them.
        kwargs: its keyword-only arguments.

    Example:
        >>> import torch
        >>> from functrans.extend import Carried, RuleTable, TableInterpreter, is_affine, transform
        >>> def look(interpreter, op, args, kwargs):
        ...     print(op, is_affine(interpreter, op, args, kwargs))
        ...     return interpreter.carry(op(*[getattr(a, "value", a) for a in args]), mark=True)
        >>> class Marked(TableInterpreter):
        ...     kind, payload, rules = "marked", ("mark",), RuleTable("marked", default=look)
        >>> _ = transform(Marked, lambda x: (torch.ones(2, 2) @ x).mul(x))(Carried(torch.ones(2), mark=True))
        aten.mv.default True
        aten.mul.Tensor False
    """
    call = "is_affine(interpreter, op, args, kwargs)"
    check_running(call, interpreter)
    check_operator(call, op)
    check_arguments(call, args, kwargs)
    known = op_info(op)
    carrying = {
        name: sum(interpreter.owns(x) and not interpreter.is_constant(x) for x in tree_flatten(a)[0])
        for name, a in (*zip(known.arguments, args, strict=False), *kwargs.items())
        if a is not None and (isinstance(a, Tensor | list | tuple))
    }
    names = {name for name, count in carrying.items() if count}
    if not names:
        return True
    return not known.random and linear_group(op, names, sum(carrying.values())) is not None
