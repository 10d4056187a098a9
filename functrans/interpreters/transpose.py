"""Reverse mode of linear functions: a tape of linear operators, or the one that is not.

See NOTE [What is linear] in functrans/derivatives/linearity.py. What stands in the rest of a group and is no zero makes
an operator affine; so the function is run on zeros, and what does not return zeros is not linear. An operator that is
not linear is recorded as such, and refused if the output depends on it: with a gradient that is linear (that of a
quadratic function, say) the function itself, which is not, is computed on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.core.dispatch import lower, map_tensors, unwrap
from functrans.decompositions.table import decompose, decomposition
from functrans.derivatives.constants import ABOUT_METADATA, READS_NO_VALUES
from functrans.derivatives.linearity import JOINTLY, linear_group
from functrans.derivatives.table import DERIVATIVES
from functrans.errors import NonLinearError
from functrans.errors.call_sites import at_line
from functrans.interpreters.function_context import unwrapped, without
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import BackwardNode
from functrans.interpreters.grad.recording import GRAD_RULES
from functrans.interpreters.jvp.fallback import is_zero
from functrans.operators.info import DIFFERENTIABLE, OpInfo, op_info
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tensors_in


class NonLinear(BackwardNode):
    """In the place of a node: an operator that is not linear, why, and the user's line."""

    def __init__(self, op: Any, why: str) -> None:
        self.op = op
        self.why = why
        self.line = at_line()


class TransposeInterpreter(GradInterpreter):
    """Records linear operators as grad does, and notes the others. See NOTE [What is linear]."""

    kind = "linear_transpose"
    values_remain = False  # they are zeros

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        return False  # a linear function has no values beside its derivative

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known: OpInfo = op_info(op)
        values, below_kwargs, indices = unwrap(self, op, args, kwargs)
        if not indices or op in READS_NO_VALUES:
            return map_tensors(self.constant, lower(self, op, values, below_kwargs))
        if op._schema.name in ABOUT_METADATA:
            return lower(self, op, values, below_kwargs)
        entry = DERIVATIVES.get(op)
        tracked = {known.arguments[place] for place in indices}
        known_to_grad = op in GRAD_RULES or op in JOINTLY or (entry is not None and tracked <= entry.formulas.keys())
        if not known_to_grad and (known.composite or decomposition(op) is not None):
            return decompose(self, op, args, kwargs)
        group = linear_group(op, tracked, len([i for i in flat(indices.values()) if i is not None]))
        if group is None or not torch.is_grad_enabled():
            named = " and ".join(repr(name) for name in known.arguments if name in tracked)
            why = f"it is not known to be linear in {named}" if group is None else "under torch.no_grad() it is cut off"
            return self.refuse_later(op, why, indices, lower(self, op, values, below_kwargs))
        out = super().process(op, args, kwargs)
        outs = tensors_in([out])
        if len(outs) == 1 and outs[0].dtype not in DIFFERENTIABLE:
            why = f"it returns {outs[0].dtype}"
        elif is_zero_beside(known, group - tracked, indices, values, below_kwargs) or all(vanishes(o) for o in outs):
            return out
        else:
            why = "it does not map zeros to zeros"
        return self.refuse_later(op, why, indices, map_tensors(lambda o: o.value, out))

    def refuse_later(self, op: Any, why: str, indices: dict[int, Any], out: Any) -> Any:
        """Outputs that are tracked, by a record that says that ``op`` is not linear."""
        node = NonLinear(op, why)
        if not all(isinstance(o, Tensor) for o in (out if isinstance(out, list | tuple) else [out])):
            raise NonLinearError(op, self.name, f"{why}, and its result is no tensor", node.line)
        wrapped = map_tensors(self.track, out)
        made = [w.tape_index for w in tensors_in([wrapped])]  # type: ignore[attr-defined]
        self.record(node, made, list(indices.values()), [])
        return wrapped

    def check_linear(self, outputs: list[int | None]) -> None:
        """Refuse what the outputs depend on and is not linear: the first in the order of computation."""
        needed, found = set(outputs) - {None}, None
        for node, outs, ins, _ in reversed(self.tape):
            if not needed.isdisjoint([outs] if type(outs) is int else outs):
                needed.update(i for i in flat(ins) if i is not None)
                found = node if type(node) is NonLinear else found
        if found is not None:
            raise NonLinearError(found.op, self.name, found.why, found.line)


def flat(indices: Any) -> list[Any]:
    return [i for index in indices for i in (flat(index) if isinstance(index, list | tuple) else [index])]


def is_zero_beside(
    known: OpInfo, rest: frozenset[str], indices: dict[int, Any], values: list[Any], kwargs: dict[str, Any]
) -> bool:
    """Whether nothing that is not tracked stands in a group of arguments; else the result has to be looked at."""
    if any(None in flat([index]) for index in indices.values()):
        return False
    for name in rest:
        place = known.arguments.index(name)
        value = values[place] if place < len(values) else kwargs.get(name, known.defaults[place])
        if value is not None and (isinstance(value, Tensor | list | tuple) or value != 0):
            return False
    return True


def vanishes(x: Tensor) -> bool:
    """Whether ``x`` holds zeros, as far as it holds numbers."""
    return x.device.type == "meta" or is_zero(x)


def transpose_rule(interpreter: TransposeInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    """An ``autograd.Function``, of which nothing says that it is linear."""
    _, values = unwrapped(interpreter, args)
    indices = {i: index for i, index in enumerate(map(interpreter.index_of, args)) if index is not None}
    with without(interpreter, cls), lowered(interpreter):
        out = cls.apply(*values)
    if not indices:
        return map_tensors(interpreter.constant, out)
    why = "nothing says of an autograd.Function that it is linear"
    return interpreter.refuse_later(f"{cls.__name__}.apply", why, indices, out)

