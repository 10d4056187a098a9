"""How vmap runs a program: as it is, since code that is pointwise is pointwise in the batch, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functrans.core.dispatch import NO_KWARGS, lower
from functrans.core.tensor import WRAPPERS, PendingWrapper, WrapperTensor, tensor_of, wrap_like
from functrans.interpreters.constants import constants
from functrans.interpreters.program_arguments import are_alike, pend
from functrans.programs.program import Program

if TYPE_CHECKING:
    from functrans.interpreters.vmap.interpreter import VmapInterpreter

aten = torch.ops.aten


def run_program(self: VmapInterpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run the program as it is on the physical tensors, where they broadcast as the examples do."""
    make: Callable[..., Any] = pend if program.pending else wrap_like
    count = program.inputs if program.single else 0
    if count == 1:  # the frequent cases, in a few steps
        (x,) = args
        if x._carried == 0 and x.strides is None:
            wrapper = make(self, lower(self, program.inner, (x._value,), NO_KWARGS), x)
            wrapper._carried = 0
            return wrapper
    elif count == 2:
        x, y = args
        if are_alike(x, y) and x._carried == 0 == y._carried:
            wrapper = make(self, lower(self, program.inner, (x._value, y._value), NO_KWARGS), x)
            wrapper._carried = 0
            return wrapper
    values: list[Any] = []
    batched: set[int] = set()
    first: Any = None
    alike = True  # every result has the shape of ``first``, and is contiguous
    loose = -1  # the highest rank of an unbatched tensor
    for a in args:
        kind = type(a)
        if kind is WrapperTensor or kind is PendingWrapper:
            if a.interpreter is self:
                if a.bdim is not None:
                    if first is None:
                        first = a
                    elif a.bdim != first.bdim or len(a.shape) != len(first.shape):
                        return run_aligned(self, program, args)
                    elif a.shape != first.shape:
                        alike = False
                    if a.strides is not None:
                        alike = False
                    batched.add(len(values))
                    values.append(a._value)
                    continue
                a = a._value
            loose = max(loose, len(a.shape))
        elif isinstance(a, Tensor):
            loose = max(loose, a.dim())
        values.append(a)
    if first is None:
        return constants(self, lower(self, program.inner, values, NO_KWARGS))
    bdim = first.bdim
    if loose > len(first.shape) - bdim:
        return run_aligned(self, program, args)
    outs = lower(self, program.inner, values, NO_KWARGS)
    if alike and not bdim and (loose < 0 or loose == 0 and program.single):
        if program.single:
            wrapper = make(self, outs, first)
            wrapper.bdim = 0
            return wrapper
        found = []
        for out in outs:
            wrapper = make(self, out, first)
            wrapper.bdim = 0
            found.append(wrapper)
        return found
    found = []
    for out, sources in zip((outs,) if program.single else outs, program.sources, strict=True):
        found.append(constants(self, out) if batched.isdisjoint(sources) else self.batched(out, bdim))
    return found[0] if program.single else found


def run_aligned(self: VmapInterpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run the program on physical tensors brought to one rank with the batch in front."""
    ranks = [len(a.shape) if type(a) in WRAPPERS or isinstance(a, Tensor) else 0 for a in args]
    rank = max(ranks)
    values: list[Any] = []
    batched: set[int] = set()
    for a in args:
        if type(a) in WRAPPERS and a.interpreter is self:
            bdim = a.bdim
            a = a._value
            if bdim is not None:
                batched.add(len(values))
                a = in_front(self, a, bdim, rank)
        values.append(a)
    outs = lower(self, program.inner, values, NO_KWARGS)
    found = []
    for out, sources in zip((outs,) if program.single else outs, program.sources, strict=True):
        if batched.isdisjoint(sources):
            found.append(constants(self, out))
            continue
        # What does not depend on the argument of the highest rank was aligned with it all the same.
        shape = out.shape
        extra = len(shape) - 1 - max([ranks[i] for i in sources])
        if extra:
            out = lower(self, aten.view.default, (tensor_of(out), shape[:1] + shape[1 + extra :]), NO_KWARGS)
        found.append(self.batched(out, 0))
    return found[0] if program.single else found


def in_front(self: VmapInterpreter, value: Any, bdim: int, rank: int) -> Any:
    """The physical ``value`` with the batch in front, and behind it so many dimensions of size 1 that an example has
    ``rank``."""
    if bdim:
        others = [d for d in range(len(value.shape)) if d != bdim]
        value = lower(self, aten.permute.default, (tensor_of(value), [bdim, *others]), NO_KWARGS)
    shape = value.shape
    if len(shape) <= rank:
        padded = [shape[0], *[1] * (rank + 1 - len(shape)), *shape[1:]]
        value = lower(self, aten.view.default, (tensor_of(value), padded), NO_KWARGS)
    return value
