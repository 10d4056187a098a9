"""How jvp runs a program: together with its tangent, which is a program, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from functrans.core.dispatch import NO_KWARGS, lower, sending
from functrans.core.tensor import WrapperTensor, tensor_of, wrap, wrap_like
from functrans.interpreters.constants import constants
from functrans.interpreters.program_arguments import are_alike, pend, unwrap_program
from functrans.programs.deriving import tangent as tangent_of
from functrans.programs.program import Program
from functrans.programs.tracing import Untraceable
from functrans.pytorch.torch_private import is_forward_enabled
from functrans.tensors.broadcasting import same_shape

if TYPE_CHECKING:
    from functrans.interpreters.jvp.interpreter import JvpInterpreter

aten = torch.ops.aten


def run_program(self: JvpInterpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run the program and its tangent as one, one level down."""
    make: Callable[..., Any] = pend if program.pending else wrap_like
    count = program.inputs if program.single else 0
    if count == 1:  # the frequent cases, in a few steps
        (x,) = args
        known = program.tangents.get((0,))
        if known is not None and known.plain and x.strides is None and x._carried is not None and is_forward_enabled():
            out, tangent = lower(self, known.program, (x._value, x._carried), NO_KWARGS)
            wrapper = make(self, out, x)
            wrapper._carried = tangent
            return wrapper
    elif count == 2:
        x, y = args
        known = program.tangents.get((0, 1))
        if (
            known is not None
            and known.plain
            and known.uses is None
            and are_alike(x, y)
            and x._carried is not None
            and y._carried is not None
            and is_forward_enabled()
        ):
            out, tangent = lower(self, known.program, (x._value, y._value, x._carried, y._carried), NO_KWARGS)
            wrapper = make(self, out, x)
            wrapper._carried = tangent
            return wrapper
    values, moving, tangents, first, alike, same = unwrap_program(self, args)
    if not moving or not is_forward_enabled():
        return constants(self, lower(self, program.inner, values, NO_KWARGS))
    try:
        derived = tangent_of(program, moving)
    except Untraceable:
        return program.decompose(*args, send=sending(self.watcher))
    # a tangent passed on as it is must not bring its derivative along
    if not derived.plain and not torch.is_grad_enabled():
        return program.decompose(*args, send=sending(self.watcher))
    outs = derived.of(values + tangents, partial(lower, self))
    found: list[Any] = []
    count = len(program.outputs)
    alike = alike and (same or count == 1)  # one of several may depend on an argument without dimensions alone
    for i in range(count):
        if alike:
            wrapper = make(self, outs[i], first)
            wrapper._tangent = outs[count + i]
        else:
            wrapper = dual_as_wide(self, outs[i], outs[count + i])
        found.append(wrapper)
    return found[0] if count == 1 else found


def dual_as_wide(self: JvpInterpreter, value: Any, tangent: Any) -> WrapperTensor:
    """A dual whose tangent is broadcast as the value was."""
    wrapper = wrap(self, value)
    if tangent is not None and not same_shape(tangent.shape, wrapper.shape):
        tangent = lower(self, aten.expand.default, (tensor_of(tangent), wrapper.shape), {})
    wrapper._tangent = tangent
    return wrapper
