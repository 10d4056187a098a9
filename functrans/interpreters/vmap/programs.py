"""How vmap runs a program: as it is, since code that is pointwise is pointwise in the batch, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functrans.boundary.calls import call_below
from functrans.core.dispatch import NO_KWARGS, lower
from functrans.core.tensor import WRAPPERS, PendingWrapper, WrapperTensor, tensor_of, wrap_as, wrap_like
from functrans.interpreters.constants import constants
from functrans.interpreters.program_arguments import are_alike, pend
from functrans.interpreters.vmap.elementwise import align
from functrans.interpreters.vmap.seen_calls import MOST
from functrans.programs.program import Program
from functrans.tensors.broadcasting import broadcast_shapes, known_contiguous, same_shape

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
    first: Any = None
    for a in args:
        kind = type(a)
        if kind is WrapperTensor or kind is PendingWrapper:
            if a.interpreter is not self or a._carried != 0 or a.strides is not None:
                break
            if first is None:
                first = a
            elif not same_shape(a.shape, first.shape):
                break
            a = a._value
        elif isinstance(a, Tensor):
            break
        values.append(a)
    else:  # all of one shape, in front, and numbers
        outs = lower(self, program.inner, values, NO_KWARGS)
        found = []
        for out in (outs,) if program.single else outs:
            wrapper = make(self, out, first)
            wrapper._carried = 0
            found.append(wrapper)
        return found[0] if program.single else found
    return run_placed(self, program, args)


def run_placed(self: VmapInterpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run the program on tensors that are contiguous with the batch in front, brought to one rank where they differ."""
    layout = layout_of(self, args)
    placement = None if layout is None else placement_of(program, layout)
    if placement is None:
        return run_as_it_lies(self, program, args)
    values = [a._value if type(a) in WRAPPERS and a.interpreter is self else a for a in args]
    for i, physical in placement.views:
        values[i] = lower(self, aten.view.default, (tensor_of(values[i]), physical), NO_KWARGS)
    outs = lower(self, program.inner, values, NO_KWARGS)
    found: list[Any] = []
    for out, shown in zip((outs,) if program.single else outs, placement.results, strict=True):
        if shown is None:
            found.append(constants(self, out))
            continue
        shape, batch = shown
        if batch is not None:
            out = lower(self, aten.view.default, (tensor_of(out), batch), NO_KWARGS)
        wrapper = pend(self, out, out, shape) if program.pending else wrap_as(self, out, shape, None)
        wrapper._carried = 0
        found.append(wrapper)
    return found[0] if program.single else found


class Placement(NamedTuple):
    """How a program's tensors are brought to one rank."""

    #: of which arguments a view is taken, and of which shape
    views: tuple[tuple[int, list[int]], ...]
    #: for each result the example's shape, and that of a view of the result, if it takes one; None: a constant
    results: tuple[tuple[torch.Size, list[int] | None] | None, ...]


def layout_of(self: VmapInterpreter, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """The arguments' shapes, and whether they are batched, in front; None if one is not contiguous like that."""
    found: list[Any] = [self.batch_size]
    for a in args:
        kind = type(a)
        if kind is WrapperTensor or kind is PendingWrapper:
            if a.strides is not None:
                return None
            bdim = a._carried if a.interpreter is self else None
            if bdim:
                return None
            found += a.shape, bdim
        elif isinstance(a, Tensor):
            if not known_contiguous(a):
                return None
            found += a.shape, None
        else:
            found += None, None
    return tuple(found)


def placement_of(program: Program, layout: tuple[Any, ...]) -> Placement | None:
    """What ``layout`` takes, found once; None if that cannot be said."""
    try:
        return program.placements[layout]
    except KeyError:
        if len(program.placements) >= MOST:
            program.placements.clear()
        found = program.placements[layout] = place(program, layout)
        return found
    except TypeError:  # a symbolic size
        return None


def place(program: Program, layout: tuple[Any, ...]) -> Placement | None:
    """What ``layout`` takes; None if the shapes do not go together."""
    batch_size, shapes, bdims = layout[0], layout[1::2], layout[2::2]
    batched = [i for i, bdim in enumerate(bdims) if bdim == 0]
    ranks = [0 if shape is None else len(shape) for shape in shapes]
    rank = max(ranks)
    aligned = any(ranks[i] < rank for i in batched)
    views = []
    for i in batched:
        if aligned and ranks[i] < rank:
            views.append((i, [batch_size, *[1] * (rank - ranks[i]), *shapes[i]]))
    results: list[Any] = []
    for sources in program.sources:
        if not any(i in batched for i in sources):
            results.append(None)
            continue
        try:
            shape = broadcast_shapes(*[shapes[i] for i in sources if shapes[i] is not None])
        except RuntimeError:
            return None
        # What does not depend on the argument of the highest rank was aligned with it all the same.
        results.append((shape, [batch_size, *shape] if aligned and len(shape) < rank else None))
    return Placement(tuple(views), tuple(results))


def run_as_it_lies(self: VmapInterpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run the program on physical tensors of any layout, where they broadcast as the examples do."""
    values: list[Any] = []
    batched: set[int] = set()
    first: Any = None
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
    found = []
    for out, sources in zip((outs,) if program.single else outs, program.sources, strict=True):
        found.append(constants(self, out) if batched.isdisjoint(sources) else self.batched(out, bdim))
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
        if all(dims[i] is None for i in sources):
            found.append(constants(self, out))
            continue
        # What does not depend on the argument of the highest rank was aligned with it all the same.
        shape = out.shape
        extra = len(shape) - 1 - max(len(args[i].shape) for i in sources if isinstance(args[i], Tensor))
        if extra:
            out = lower(self, aten.view.default, (tensor_of(out), shape[:1] + shape[1 + extra :]), NO_KWARGS)
        found.append(self.batched(out, 0))
    return found[0] if program.single else found
