"""Calls that were seen before: what vmap made of one like it.

What becomes of a call by a batching rule follows from the *look* of the call: of each tensor the shape, the dtype, how
it lies in memory and where its batch dimension is, and of every other argument its value. So it is found once: that
the operator takes such examples (one_example.py), where the batch dimensions are, and, for a rule that is one operator
(``families.one_operator``), that operator, its arguments and what its result shows. All later calls of that look are a
look-up, and the operator one level down, or what the rule was seen to do (written_down.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from functrans.core.dispatch import WITHOUT_TENSORS
from functrans.core.tensor import WRAPPERS, Strides, WrapperTensor, strides_of, tensor_of

if TYPE_CHECKING:
    from functrans.interpreters.vmap.interpreter import VmapInterpreter

#: Types of lists of numbers, and of tensors of the base.
LISTS = frozenset((list, tuple, torch.Size))
WHOLE = (int, bool)
OF_THE_BASE = frozenset((Tensor, Parameter))

#: How many calls of one operator are kept.
MOST = 512


class SeenCall(NamedTuple):
    """What becomes of a call.

    Without ``op`` the rule is called each time, and ``dims`` are its batch dimensions; or ``script``, what it does.
    Without ``dims`` nothing is batched, and the operator is sent down as it is.
    """

    dims: Sequence[Any]
    #: the operator one level down, and its arguments where they are no tensors
    op: Any = None
    physical: tuple[Any, ...] = ()
    #: by their places: which values of the call the tensors are
    places: tuple[tuple[int, int], ...] = ()
    bdim: int | None = None
    #: what the result shows where it is plain PyTorch's
    shape: Any = None
    strides: Strides = None
    #: the rule written down for such calls (written_down.py); None: not yet, False: it cannot be
    script: Any = None

    def arguments(self, values: Sequence[Any]) -> list[Any]:
        """Those of ``op``, for a call with these values."""
        physical = list(self.physical)
        for place, i in self.places:
            physical[place] = values[i]
        return physical


def look_of(interpreter: VmapInterpreter, args: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any]] | None:
    """All that what becomes of a call depends on, and the call's values one level down.

    None: it depends on more than that, or on what cannot be a key.
    """
    look: list[Any] = [interpreter.batch_size]
    values: list[Any] = []
    for a in args:
        kind = type(a)
        if kind is WrapperTensor:
            if a.layout is not torch.strided or a.moved:
                return None
            strides = a.strides
            if a.interpreter is interpreter:
                bdim, value = a._carried, a._value
                if type(value) in WRAPPERS:
                    value = a._value = tensor_of(value)
                if strides is not None:
                    strides = strides_of(value)  # which say where the batch lies
                look += a.shape, a.dtype, strides, bdim
                a = value
            else:
                look += a.shape, a.dtype, strides, None
        elif kind in WITHOUT_TENSORS:
            look += kind, a if a != 0 or kind is int else str(a)  # 0.0 and -0.0 are equal
        elif kind in LISTS:
            if not a or type(a[0]) in WHOLE:
                look += kind, tuple(a)
            else:
                found = look_of(interpreter, a)
                if found is None:
                    return None
                look.append(found[0])
                a = found[1]
        elif kind in OF_THE_BASE:
            if a.layout is not torch.strided:
                return None
            look += a.shape, a.dtype, None if a.is_contiguous() else a.stride(), None
        else:
            return None
        values.append(a)
    return tuple(look), values


def remember(seen: dict[Any, SeenCall], look: Any, call: SeenCall | None) -> None:
    """Keep what became of a call."""
    if call is None:
        return
    if len(seen) >= MOST:
        seen.clear()
    seen[look] = call


def as_operator(
    dims: Sequence[Any], values: Sequence[Any], op: Any, physical: Sequence[Any], shown: WrapperTensor
) -> SeenCall | None:
    """A call of ``values`` that became ``op`` of ``physical``.

    None: these are not the values themselves, or one tensor came twice, and it does not show which is which.
    """
    places = []
    for place, a in enumerate(physical):
        if isinstance(a, Tensor):
            found = [i for i, v in enumerate(values) if v is a]
            if len(found) != 1:
                return None
            places.append((place, found[0]))
    others = tuple(None if isinstance(a, Tensor) else a for a in physical)
    return SeenCall(dims, op, others, tuple(places), shown._carried, shown.shape, shown.strides)
