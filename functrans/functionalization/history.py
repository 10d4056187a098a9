"""What a write leaves of the derivative of what is written.

NOTE [Writes and grad mode]
A write under no_grad changes the numbers and leaves the derivative of what is written as it was, as in eager PyTorch;
level by level, ``with_history_of`` does the same for the pure result. A write through ``detach()`` does so at every
level. What ``detach()`` returned has the derivative of what was written to it, of its own: the step of the view keeps
it (``ViewLink.history``), since its numbers are those of its base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.pytorch.thread_state import running_at


def with_history_of(old: Tensor, new: Tensor, *, everywhere: bool = False) -> Tensor:
    """``new``, but with ``old``'s derivative at each level where nothing is recorded now, or at every level.

    See NOTE [Writes and grad mode].
    """
    recording = torch.is_grad_enabled()
    if type(old) is WrapperTensor and old.leaf is not None:
        if everywhere or not recording:
            return old.leaf(_merge(old, new, recording, everywhere))
        if not (new.requires_grad and new.is_leaf):
            raise RuntimeError("a leaf that requires grad is used in an in-place operation: use torch.no_grad()")
        return new
    if not everywhere and recorded_everywhere():
        return new
    level = old.interpreter.level if type(old) is WrapperTensor else 0
    for interpreter in interpreter_stack():
        if interpreter.level > level:
            recording = recording and interpreter.outer_grad_mode
    return _merge(old, new, recording, everywhere)


def recorded_everywhere() -> bool:
    """Whether every level records what is computed now."""
    return torch.is_grad_enabled() and all(interpreter.outer_grad_mode for interpreter in interpreter_stack())


def _merge(old: Tensor, new: Tensor, recording: bool, everywhere: bool) -> Tensor:
    if type(old) is not WrapperTensor and type(new) is not WrapperTensor:
        if recording and not everywhere or not old.requires_grad:
            return new
        with running_at(None), torch.enable_grad():
            merged = old.clone()
            with torch.no_grad():
                return merged.copy_(new)
    interpreter = max((x.interpreter for x in (old, new) if type(x) is WrapperTensor), key=lambda i: i.level)
    old, new = (x if interpreter.owns(x) else interpreter.constant(x) for x in (old, new))
    old_value, new = interpreter.aligned(old, new)
    value = _merge(old_value, new.value, recording and interpreter.outer_grad_mode, everywhere)
    if interpreter.keeps_history(recording, everywhere):
        return interpreter.rewrap(old, value)
    merged = interpreter.rewrap(new, value)
    interpreter.merge_payload(merged, old, lambda of_old, of_new: _merge(of_old, of_new, recording, everywhere))
    return merged
