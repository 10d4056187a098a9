"""What a transform by a table may carry on its wrappers, and what its rules may return: looked at where it happens.

A payload that gets lost is a wrong number at the end, and nothing else: a value of the interpreter's own level among
what it carries is a constant for everybody below, a result without a payload is a constant of the transform.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functrans.core.dispatch import WITHOUT_TENSORS
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.errors import CarriedValueError, DeadWrapperError, RuleResultError
from functrans.operators.info import Operator
from functrans.pytorch.torch_private import (
    DisableTorchFunction,
    HigherOrderOperator,
    OpOverload,
    no_dispatch,
    torch_pytree,
)
from functrans.tensors.described import shown
from functrans.tensors.pytrees import tensors_in, tree_flatten

if TYPE_CHECKING:
    from functrans.core.interpreter import Interpreter


def check_carried(interpreter: Interpreter, name: str, value: Any) -> None:
    """Refuse, in a value or a payload, tensors that are not of a level below ``interpreter``'s."""
    if isinstance(value, Tensor):
        check_below(interpreter, name, value)
    elif type(value) not in WITHOUT_TENSORS:
        for leaf in tree_flatten(value)[0]:
            if isinstance(leaf, Tensor):
                check_below(interpreter, name, leaf)


def check_below(interpreter: Interpreter, name: str, x: Tensor) -> None:
    if type(x) is not WrapperTensor:
        return
    owner = x.interpreter
    if not owner.alive:
        raise DeadWrapperError(x)
    below = interpreter.below
    while below is not None and below is not owner:
        below = below.below
    if below is owner:
        return
    if owner is interpreter:
        cure = (
            "What code in the transformed function makes is of this level: compute what is carried from x.value, "
            "in a rule or inside `with lowered(interpreter):`, where code runs one level down."
        )
    elif owner.level > interpreter.level:
        cure = (
            "That level is further in: compute what is carried inside `with running_at(interpreter.below):`, "
            "from values of that level."
        )
    else:
        cure = "That transform is not below this one on the stack: make the interpreter where it is run."
    raise CarriedValueError(
        interpreter,
        name,
        f"{shown(x)} of {owner.name} at level {owner.level}",
        f"values of the levels below {interpreter.level}",
        cure,
    )


def checked_result(
    interpreter: Interpreter, op: OpOverload, out: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """What a rule returned for ``op``, if it is a result of this level for each of its outputs; else an error.

    An argument that is returned as it is becomes a wrapper of its own, since a write to the one must not be one to the
    other.
    """
    returns = op._schema.returns
    shapes = shapes_of(op, described(args), described(sorted(kwargs.items())))
    if len(returns) == 1:
        return checked_output(interpreter, op, "", str(returns[0].type), out, shapes, args)
    if type(out) not in (tuple, list) or len(out) != len(returns):
        got = f"{len(out)} outputs" if type(out) in (tuple, list) else kind_of(out)
        raise wrong(
            interpreter, op, got, f"a tuple of {len(returns)}, one for each output of {op._schema}", "Return them all."
        )
    if shapes is None:
        shapes = [None] * len(returns)
    return tuple(
        checked_output(interpreter, op, f" as output {i}", str(r.type), o, s, args)
        for i, (r, o, s) in enumerate(zip(returns, out, shapes, strict=True))
    )


def checked_tree(interpreter: Interpreter, op: HigherOrderOperator, out: Any) -> Any:
    """What a rule returned for an operator that takes functions, if its tensors are of this level; else an error."""
    for i, x in enumerate(torch_pytree.tree_leaves(out)):
        if isinstance(x, Tensor):
            checked_output(interpreter, op, f" as result {i}", "Tensor", x, None, ())
    return out


def check_replacement(interpreter: Interpreter, op: OpOverload, place: str, out: Any, other: Any) -> None:
    """Refuse what is not of the shapes and the level of what ``op`` returned, in whose place it is."""
    if isinstance(out, Tensor):
        if not isinstance(other, Tensor) or other.shape != out.shape:
            expected = f"a tensor of shape {list(out.shape)}, as {op} returned"
            cure = "Return None where the result is to stay as it is."
            raise RuleResultError(op, interpreter, place, kind_of(other), expected, cure)
        check_below(interpreter, "the result", other)
    elif isinstance(out, tuple | list):
        if not isinstance(other, tuple | list) or len(other) != len(out):
            got = f"{len(other)} outputs" if isinstance(other, tuple | list) else kind_of(other)
            raise RuleResultError(op, interpreter, place, got, f"{len(out)}, as {op} returned", "Return them all.")
        for one, another in zip(out, other, strict=True):
            check_replacement(interpreter, op, place, one, another)


def checked_output(
    interpreter: Interpreter, op: Operator, which: str, kind: str, out: Any, shape: Any, args: Sequence[Any]
) -> Any:
    if kind.startswith("List[") and "Tensor" in kind:
        if type(out) not in (tuple, list):
            raise wrong(interpreter, op, kind_of(out) + which, "a list of tensors", "Return one for each part.")
        if type(shape) is list and len(shape) != len(out):
            raise wrong(
                interpreter,
                op,
                f"{len(out)} tensors{which}",
                f"{len(shape)}, as the operator returns",
                "Return one for each part.",
            )
        inner = shape if type(shape) is list else [None] * len(out)
        return [
            checked_output(interpreter, op, f" as part {i}", "Tensor", o, s, args)
            for i, (o, s) in enumerate(zip(out, inner, strict=True))
        ]
    if "Tensor" not in kind or (out is None and (shape is ABSENT or kind.startswith("Optional"))):
        return out
    place, expected = interpreter.name, f"a tensor of {interpreter.name} at level {interpreter.level}"
    payload = "".join(f", {name}=..." for name in interpreter.payload)
    cure = f"Return interpreter.carry(value{payload}); interpreter.constant(value) where nothing is carried."
    if not hasattr(interpreter, "carry"):
        expected, cure = "a tensor", "Return a value of the level below, as the arguments are."
    if not interpreter.owns(out):
        raise wrong(interpreter, op, kind_of(out) + which, expected, cure)
    missing = [name for name in interpreter.payload if not hasattr(out, name)]
    if missing:
        raise wrong(
            interpreter, op, f"a tensor without {', '.join(missing)}{which}", f"one made by carry of {place}", cure
        )
    if isinstance(shape, Like):
        wanted = f"shape {list(shape.shape)}" if out.shape != shape.shape else None
        if wanted is None and shows_own(interpreter) and out.dtype is not shape.dtype:
            wanted = f"dtype {shape.dtype}"
        if wanted is not None:
            expected = f"{wanted}, the operator's for these arguments"
            raise wrong(interpreter, op, f"{shown(out)}{which}", expected, "Mend the rule.")
    if any(out is a for a in tensors_in(args)):
        return interpreter.rewrap(out, out.value)
    return out


def shows_own(interpreter: Interpreter) -> bool:
    """Whether its wrappers may show another dtype than their values have, by their payload."""
    return getattr(interpreter, "shows_own", False)


def wrong(interpreter: Interpreter, op: Operator, got: str, expected: str, cure: str) -> RuleResultError:
    return RuleResultError(op, interpreter, interpreter.rule_place(op) or "an unknown place", got, expected, cure)


def kind_of(out: Any) -> str:
    if type(out) is WrapperTensor:
        return f"{shown(out)} of {out.interpreter.name} at level {out.interpreter.level}"
    if isinstance(out, Tensor):
        return f"{shown(out)} of no level"
    return "None" if out is None else f"a {type(out).__name__}"


# --- the shapes that an operator returns -----------------------------------------------------------------------------


class Like(NamedTuple):
    """What the shape of a result may depend on, of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


class Absent:
    """In the place of the shape of an output that the operator does not return."""


ABSENT = Absent()


def described(a: Any) -> Any:
    if isinstance(a, Tensor):
        return Like(a.shape, a.dtype)
    return tuple(described(v) for v in a) if isinstance(a, list | tuple) else a


#: Operators that have other shapes without data than on the CPU, which leaves out what it has not saved.
OF_THE_DEVICE = frozenset((torch.ops.aten._native_batch_norm_legit_no_training.default,))


def without_data(a: Any) -> Any:
    if type(a) is Like:
        return torch.empty(a.shape, dtype=a.dtype, device="meta")
    if type(a) is tuple:
        return [without_data(v) for v in a]
    return torch.device("meta") if isinstance(a, torch.device) else a


def shapes_in(out: Any) -> Any:
    if isinstance(out, Tensor):
        return Like(out.shape, out.dtype)
    return [shapes_in(o) for o in out] if isinstance(out, list | tuple) else ABSENT if out is None else None


@functools.lru_cache(maxsize=4096)
def shapes_of(op: OpOverload, args: Any, kwargs: Any) -> Any:
    """The shapes and dtypes of ``op``'s outputs, without data; None where they depend on numbers, or nobody says."""
    if op in OF_THE_DEVICE:
        return None
    with DisableTorchFunction(), no_dispatch(), torch.no_grad():
        try:
            return shapes_in(op(*map(without_data, args), **{name: without_data(value) for name, value in kwargs}))
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
            return None  # the rule has run: what is wrong with the arguments is for it to say
