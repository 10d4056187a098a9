"""What a transform by a table does with an operator that has no rule: the policies that ``RuleTable(default=…)`` names.

Each is a function ``(interpreter, op, args, kwargs)``, as an author's own may be, and is asked last: after the rules,
after what carries nothing, and after a composite operator was taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functrans.api.transforms import jvp
from functrans.core.dispatch import lower, map_tensors
from functrans.core.tensor import WrapperTensor
from functrans.derivatives.table import DERIVATIVES, NO_TANGENT
from functrans.errors import RegistrationError
from functrans.errors.wording import shown
from functrans.extension.calls import check_arguments, check_running
from functrans.extension.case_by_case import looped
from functrans.extension.missing_rule import missing_rule_error
from functrans.extension.own_metadata import check_values
from functrans.operators.info import DIFFERENTIABLE
from functrans.pytorch.thread_state import lowered, running_at
from functrans.pytorch.torch_private import DECOMPOSITION_TABLE, OpOverload
from functrans.tensors.pytrees import tree_flatten, tree_map, tree_unflatten

if TYPE_CHECKING:
    from functrans.extension.table_interpreter import TableInterpreter


class OperatorFunction(NamedTuple):
    """An operator's call as a function of what carries a payload; made by ``as_function``."""

    #: takes a tensor for each of ``values``; returns a tuple of the operator's floating-point and complex outputs
    f: Callable[..., tuple[Tensor, ...]]
    #: the wrappers that carry a payload, in the order of the arguments
    carrying: tuple[WrapperTensor, ...]
    #: their values, one level down
    values: tuple[Tensor, ...]
    #: takes a wrapper for each of ``f``'s outputs, after ``f`` has run; returns what the operator returns
    rebuild: Callable[[Sequence[WrapperTensor]], Any]


def as_function(
    interpreter: TableInterpreter, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> OperatorFunction:
    """An operator, called with wrappers of ``interpreter``, as a differentiable function of those that carry a payload.

    The other arguments are fixed: constants and numbers, and tensors that no derivative can be of (integers, truth
    values). A tensor that is passed twice is one of ``carrying``.

    Args:
        interpreter: whose wrappers are meant.
        op: the operator overload.
        args: its positional arguments, as ``process`` and a policy get them.
        kwargs: its keyword-only arguments.

    Returns:
        ``(f, carrying, values, rebuild)``. ``f`` is called one level down, as a rule's code runs. An operator of whole
        numbers or truth values has an ``f`` without outputs; ``rebuild([])`` returns them as constants all the same.

    Example:
        >>> import torch
        >>> from functrans import jvp
        >>> from functrans.extend import RuleTable, TableInterpreter, as_function, lowered, transform
        >>> def push_forward(interpreter, op, args, kwargs):
        ...     f, carrying, values, rebuild = as_function(interpreter, op, args, kwargs)
        ...     with lowered(interpreter):
        ...         outs, slopes = jvp(f, values, tuple(x.slope for x in carrying))
        ...     return rebuild([interpreter.carry(y, slope=t) for y, t in zip(outs, slopes)])
        >>> class Forward(TableInterpreter):
        ...     kind, payload, rules = "forward", ("slope",), RuleTable("forward", default=push_forward)
        >>> from functrans.extend import Carried
        >>> out = transform(Forward, lambda x: (x * x).sin())(Carried(torch.tensor(2.0), slope=torch.tensor(1.0)))
        >>> torch.allclose(out.slope, 4 * torch.tensor(4.0).cos())
        True
    """
    call = "as_function(interpreter, op, args, kwargs)"
    check_running(call, interpreter)
    check_arguments(call, args, kwargs)
    leaves, spec = tree_flatten((list(args), kwargs))
    check_values(interpreter, op, leaves, "as_function")
    fixed = [a.value if interpreter.owns(a) else a for a in leaves]
    places: dict[int, list[int]] = {}
    for i, a in enumerate(leaves):
        mine = interpreter.owns(a) and a.dtype in DIFFERENTIABLE
        if mine and not interpreter.is_constant(a):
            places.setdefault(id(a), []).append(i)
    carrying = tuple(leaves[where[0]] for where in places.values())
    found: list[Any] = []

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        given = list(fixed)
        for where, value in zip(places.values(), values, strict=True):
            for i in where:
                given[i] = value
        positional, by_keyword = tree_unflatten(spec, given)
        leaves_out, spec_out = tree_flatten(op(*positional, **by_keyword))
        # what is smooth is given to rebuild; it is not kept
        found[:] = [SMOOTH if is_smooth(out) else out for out in leaves_out], spec_out
        return tuple(out for out in leaves_out if is_smooth(out))

    def rebuild(outs: Sequence[WrapperTensor]) -> Any:
        if not found:
            with lowered(interpreter):
                f(*(x.value for x in carrying))
        rest = iter(outs)
        if any(isinstance(out, WrapperTensor) and out.interpreter.level >= interpreter.level for out in found[0]):
            with lowered(interpreter):  # f was run by a transform, of which nothing may stay
                f(*(x.value for x in carrying))
        whole = [
            next(rest) if out is SMOOTH else interpreter.constant(out) if isinstance(out, Tensor) else out
            for out in found[0]
        ]
        return tree_unflatten(found[1], whole)

    return OperatorFunction(f, carrying, tuple(x.value for x in carrying), rebuild)


#: in the place of an output that has a derivative
SMOOTH: Any = object()


def is_smooth(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in DIFFERENTIABLE


def by_jvp(interpreter: TableInterpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Each name of the payload is a tangent, which the operator's derivative pushes forward."""
    leaves = tree_flatten((list(args), kwargs))[0]
    check_values(interpreter, op, leaves, 'default="jvp"')
    f, carrying, values, rebuild = as_function(interpreter, op, args, kwargs)
    entry = DERIVATIVES.get(op)
    if not values or (entry is not None and entry.tangent == NO_TANGENT):  # whole numbers have no tangent
        return passed(interpreter, op, args, kwargs)
    pushed: dict[str, Any] = {}
    outs: tuple[Tensor, ...] = ()
    with lowered(interpreter):
        if (entry is None or any(isinstance(a, torch.dtype) for a in leaves)) and not f(*values):
            return rebuild([])
        for name in interpreter.payload:
            tangents = [getattr(x, name) for x in carrying]
            if any(t is not None for t in tangents):
                zeros = (torch.zeros_like(v) if t is None else t for t, v in zip(tangents, values, strict=True))
                outs, pushed[name] = jvp(f, values, tuple(zeros))
    return rebuild([
        interpreter.carry(out, **{name: tangents[i] for name, tangents in pushed.items()})
        for i, out in enumerate(outs)
    ])  # fmt: skip


def passed(interpreter: TableInterpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator runs one level down, and its results carry nothing."""

    def value(a: Any) -> Any:
        return a.value if interpreter.owns(a) else a

    check_values(interpreter, op, tree_flatten((list(args), kwargs))[0], 'default="pass"')
    values, below_kwargs = tree_map(value, list(args)), tree_map(value, kwargs)
    return map_tensors(interpreter.constant, lower(interpreter, op, values, below_kwargs))


def decomposed(interpreter: TableInterpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """PyTorch's decomposition of an operator that is not composite (``torch._decomp``), if it has one.

    What leads back to the operator itself (by a write into a part of a complex tensor, say) is none, and what comes to
    PyTorch's ``prims`` is an error about the operator that came there.
    """
    if op.namespace == "prims" and interpreter.taking_apart:
        return refused(interpreter, interpreter.taking_apart[-1], args, kwargs)
    definition = DECOMPOSITION_TABLE.get(op)
    if definition is not None and op not in interpreter.taking_apart:
        interpreter.taking_apart.append(op)
        try:
            with running_at(interpreter):
                out = definition(*args, **kwargs)
        finally:
            interpreter.taking_apart.pop()
        if out is not NotImplemented:
            return out
    return refused(interpreter, op, args, kwargs)


def refused(interpreter: TableInterpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """MissingRuleError."""
    raise missing_rule_error(interpreter, op)


POLICIES: dict[str, Callable[..., Any]] = {
    "error": refused,
    "jvp": by_jvp,
    "decompose": decomposed,
    "loop": looped,
    "pass": passed,
}


def policy_of(title: str, default: Any) -> Callable[..., Any]:
    """The function that a table's ``default`` means."""
    if callable(default):
        return default
    if isinstance(default, str) and default in POLICIES:
        return POLICIES[default]
    expected = f"one of {', '.join(map(repr, POLICIES))}, or a function (interpreter, op, args, kwargs)"
    raise RegistrationError(f"{title}: got default={shown(default)}; expected {expected}.")
