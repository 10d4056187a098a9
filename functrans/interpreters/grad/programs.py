"""How grad records a program: whole, with a pullback that is a program, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from functrans.core.dispatch import NO_KWARGS, lower, sending
from functrans.core.tensor import wrap, wrap_like
from functrans.interpreters.constants import constants
from functrans.interpreters.grad.nodes import ProgramNode
from functrans.interpreters.program_arguments import are_alike, pend, unwrap_program
from functrans.programs.program import Program
from functrans.programs.tracing import Untraceable
from functrans.tensors.broadcasting import same_shape

if TYPE_CHECKING:
    from functrans.interpreters.grad.interpreter import GradInterpreter


def record_program(self: GradInterpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run the program one level down and record it as one."""
    make: Callable[..., Any] = pend if program.pending else wrap_like
    count = program.inputs if program.single else 0
    if count == 1:  # the frequent cases, in a few steps
        (x,) = args
        known = program.records.get((0,))
        if (
            known is not None
            and not known.keeps
            and x.strides is None
            and x._carried is not None
            and torch.is_grad_enabled()
        ):
            value = x._value
            out = lower(self, known.forward, (value,), NO_KWARGS)
            wrapper = make(self, out, x)
            self.last_index = wrapper._carried = index = self.last_index + 1
            saves = known.saves
            if len(saves) == 1:
                saved = [value] if saves[0] else [out]
            else:
                saved = [value if i else out for i in saves]
            self.tape.append((known, index, [x._carried], saved))
            return wrapper
    elif count == 2:
        x, y = args
        known = program.records.get((0, 1))
        if (
            known is not None
            and not known.keeps
            and are_alike(x, y)
            and x._carried is not None
            and y._carried is not None
            and torch.is_grad_enabled()
        ):
            values = (x._value, y._value)
            out = lower(self, known.forward, values, NO_KWARGS)
            wrapper = make(self, out, x)
            self.last_index = wrapper._carried = index = self.last_index + 1
            saved = [values[-1 - i] if i < 0 else out for i in known.saves]
            self.tape.append((known, index, [x._carried, y._carried], saved))
            return wrapper
    return record_anew(self, program, args, make)


def record_anew(self: GradInterpreter, program: Program, args: Sequence[Any], make: Callable[..., Any]) -> Any:
    """``record_program`` of any program, which may have to be derived first; ``make`` makes wrappers of its results."""
    values, places, indices, first, alike, same = unwrap_program(self, args)
    if not places or not torch.is_grad_enabled():
        return constants(self, lower(self, program.inner, values, NO_KWARGS))
    node = program.records.get(places)
    if node is None:
        try:
            node = program.records[places] = ProgramNode(program, places)
        except Untraceable:
            return program.decompose(*args, send=sending(self.watcher))
    outs = lower(self, node.forward, values, NO_KWARGS)
    if (
        not same
        and not node.single
        and not all(same_shape(o.shape, outs[0].shape) for o in outs[: len(program.outputs)])
    ):
        # Cotangents of different shapes cannot be added up before they are summed to the shapes of the inputs.
        return program.decompose(*args, send=sending(self.watcher))
    alike = alike and same
    saved = node.save(values, outs)
    if not same:
        saved.extend(values[p].shape for p in places)
    if node.single:
        out = outs[0] if node.keeps else outs
        wrapper = make(self, out, first) if alike else wrap(self, out)
        self.last_index = wrapper.tape_index = index = self.last_index + 1
        self.tape.append((node, index, indices, saved))
        return wrapper
    wrapped = []
    for out, reached in zip(outs, node.reached, strict=False):
        wrapper = make(self, out, first) if alike else wrap(self, out)
        if reached:
            self.last_index += 1
        wrapper.tape_index = self.last_index if reached else None
        wrapped.append(wrapper)
    self.tape.append((node, [w.tape_index for w in wrapped], indices, saved))
    return wrapped
