"""Calls that were seen before: what a rule that is one operator made of one like it.

A rule's rewriting (``families.one_operator``), the check of one example and the shape that the result shows follow from
the look of a call: the example's shape and dtype, and the arguments that are no tensors. So they are found once, for
calls of one tensor that is contiguous with the batch in front; all others go the rule's way each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.core.tensor import Strides, WrapperTensor

#: Types of arguments that say all by their value.
PLAIN = frozenset(
    (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
)
#: Those of lists of numbers.
LISTS = frozenset((list, tuple, torch.Size))

#: How many calls of one operator are kept.
MOST = 512


class SeenCall(NamedTuple):
    """What takes the place of a call, and what its result shows where it is plain PyTorch's."""

    op: Any
    rest: tuple[Any, ...]
    bdim: int
    shape: torch.Size
    strides: Strides


def look_of(args: Sequence[Any], batch_size: int) -> tuple[Any, ...] | None:
    """All that what becomes of a call depends on; None: of more than that, or of what cannot be a key."""
    x = args[0]
    if type(x) is not WrapperTensor or x.bdim != 0 or x.strides is not None or x.moved:
        return None
    if x.layout is not torch.strided:
        return None
    look: list[Any] = [batch_size, x.shape, x.dtype]
    for a in args[1:]:
        kind = type(a)
        if kind in LISTS:
            a = tuple(a)
            if a and type(a[0]) is not int:
                return None
        elif kind not in PLAIN:
            return None
        look += kind, a
    return tuple(look)


def remember(
    seen: dict[Any, SeenCall], look: Any, x: Tensor, op: Any, physical: Sequence[Any], out: Any, shown: WrapperTensor
) -> None:
    """Keep that a call became ``op`` of ``physical``, of which the first is the call's tensor ``x``."""
    rest = tuple(physical[1:])
    if physical[0] is not x or type(out) is not Tensor or any(isinstance(a, Tensor) for a in rest):
        return
    if len(seen) >= MOST:
        seen.clear()
    seen[look] = SeenCall(op, rest, shown.bdim, shown.shape, shown.strides)
