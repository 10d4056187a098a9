"""How vmap runs a program: as it is, since code that is pointwise is pointwise in the batch, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functrans.boundary.calls import call_below
from functrans.core.dispatch import NO_KWARGS, lower, map_tensors
from functrans.core.tensor import PendingWrapper, WrapperTensor, tensor_of, wrap_like
from functrans.interpreters.program_arguments import are_alike, pend
from functrans.interpreters.vmap.elementwise import align
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
    flags: list[bool] = []
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
                    values.append(a._value)
                    flags.append(True)
                    continue
                a = a._value
            loose = max(loose, len(a.shape))
        elif isinstance(a, Tensor):
            loose = max(loose, a.dim())
        values.append(a)
        flags.append(False)
    if first is None:
        return map_tensors(self.constant, lower(self, program.inner, values, NO_KWARGS))
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
        found.append(self.batched(out, bdim if any(flags[i] for i in sources) else None))
    return found[0] if program.single else found


def run_aligned(self: VmapInterpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run the program on physical tensors brought to one rank with the batch in front."""
    args = [tensor_of(a) for a in args]
    values = [a.value if type(a) is WrapperTensor and a.interpreter is self else a for a in args]
    dims = [a.bdim if type(a) is WrapperTensor and a.interpreter is self else None for a in args]
    tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    outs = lower(self, program.inner, call_below(self, align, (values, dims, tensors), {}, values), NO_KWARGS)
    found = []
    for out, sources in zip((outs,) if program.single else outs, program.sources, strict=True):
        if any(dims[i] is not None for i in sources):
            # What does not depend on the argument of the highest rank was aligned with it all the same.
            rank = max(len(args[i].shape) for i in sources if isinstance(args[i], Tensor))
            extra = len(out.shape) - 1 - rank
            if extra:
                out = lower(self, aten.view.default, (tensor_of(out), out.shape[:1] + out.shape[1 + extra :]), {})
            found.append(self.batched(out, 0))
        else:
            found.append(self.constant(out))
    return found[0] if program.single else found
