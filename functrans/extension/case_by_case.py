"""``RuleTable(default="loop")``: an operator without a rule runs once for each of the cases that a wrapper stands for.

vmap's loop runs an operator once per example and stacks. What a table's wrapper carries may be anything, so this has a
meaning for interpreters whose wrappers stand for a number of values (samples, particles, members of an ensemble): they
say by ``cases`` which these are, and make by ``of_cases`` a wrapper of as many results. An operator of several wrappers
runs case by case: what is the same in all cases is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.errors import CallError, RegistrationError
from functrans.errors.wording import what
from functrans.extension.rule_results import check_below
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.described import shown
from functrans.tensors.pytrees import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from functrans.extension.table_interpreter import TableInterpreter


def check_has_cases(cls: type[TableInterpreter], base: type[TableInterpreter]) -> None:
    missing = [name for name in ("cases", "of_cases") if getattr(cls, name) is getattr(base, name)]
    if missing:
        got = f'default="loop" for {cls.__name__}, which has no {" and no ".join(missing)}'
        expected = "cases(wrapper), the values that a wrapper stands for, and of_cases(values), a wrapper of as many"
        raise RegistrationError(f"{cls.rules.title}: got {got}; expected {expected}.")


def looped(interpreter: TableInterpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator once per case, one level down; each random one draws for itself."""
    leaves, spec = tree_flatten((list(args), kwargs))
    with lowered(interpreter):
        split = [cases_of(interpreter, op, a) for a in leaves]
        counts = {len(values): a for a, values in zip(leaves, split, strict=True) if values is not None}
        if len(counts) > 1:
            got = " and ".join(f"{n} cases of {shown(a)}" for n, a in counts.items())
            raise CallError(name_of(interpreter, op), got, "as many cases of each argument")
        outs = []
        for i in range(*counts):
            given: list[Any] = [a if values is None else values[i] for a, values in zip(leaves, split, strict=True)]
            given = [a.value if interpreter.owns(a) else a for a in given]
            positional, by_keyword = tree_unflatten(spec, given)
            outs.append(op(*positional, **by_keyword))
        return joined(interpreter, op, outs)


def name_of(interpreter: TableInterpreter, op: OpOverload) -> str:
    return f'default="loop" for {op} of {interpreter.name} at level {interpreter.level}'


def cases_of(interpreter: TableInterpreter, op: OpOverload, a: Any) -> Sequence[Tensor] | None:
    """The values of ``a`` in each case, checked; None: it is the same in all."""
    if not interpreter.owns(a) or interpreter.is_constant(a):
        return None
    values = interpreter.cases(a)
    if not isinstance(values, list | tuple) or not values:
        raise CallError(name_of(interpreter, op), f"{what(values)} from cases", "a list or tuple of tensors")
    for value in values:
        if not isinstance(value, Tensor) or value.shape != a.shape or value.dtype is not a.dtype:
            raise CallError(name_of(interpreter, op), f"{shown(value)} from cases", f"a tensor like {shown(a)}")
        check_below(interpreter, "cases", value)
    return values


def joined(interpreter: TableInterpreter, op: OpOverload, outs: list[Any]) -> Any:
    """What the operator returned in each case, as one."""
    first = outs[0]
    if isinstance(first, Tensor):
        if any(out.shape != first.shape for out in outs):
            got = "results of the shapes " + ", ".join(str(list(out.shape)) for out in outs)
            raise CallError(name_of(interpreter, op), got, "one shape in all cases", "Give the operator a rule.")
        wrapper = interpreter.of_cases(outs)
        if not interpreter.owns(wrapper) or wrapper.shape != first.shape or wrapper.dtype is not first.dtype:
            got = f"{shown(wrapper) if type(wrapper) is WrapperTensor else what(wrapper)} from of_cases"
            raise CallError(name_of(interpreter, op), got, f"what carry makes, like {shown(first)}")
        return wrapper
    if isinstance(first, list | tuple):
        if any(len(out) != len(first) for out in outs):
            got = "results of the lengths " + ", ".join(str(len(out)) for out in outs)
            raise CallError(name_of(interpreter, op), got, "one length in all cases", "Give the operator a rule.")
        parts = [joined(interpreter, op, list(part)) for part in zip(*outs, strict=True)]
        return parts if type(first) is list else tuple(parts)
    if isinstance(first, dict):  # of a primitive
        return {name: joined(interpreter, op, [out[name] for out in outs]) for name in first}
    if any(out != first for out in outs):
        got = "the results " + ", ".join(map(str, outs))
        raise CallError(name_of(interpreter, op), got, "one number in all cases", "Keep it in a tensor.")
    return first
