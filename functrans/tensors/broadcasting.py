"""The shape that shapes broadcast to, and what holds of sizes that depend on numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

from functrans.pytorch.dynamo import check_when_run, guard_or_false


def broadcast_shapes(*shapes: Sequence[Any]) -> torch.Size:
    """As ``torch.broadcast_shapes``, whose first call imports sympy, which takes longer than most programs' work."""
    found = []
    for sizes in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        size = 1
        for n in sizes:
            if not holds(n == 1) and not holds(n == size):
                if not holds(size == 1):
                    given = ", ".join(str(list(shape)) for shape in shapes)
                    raise RuntimeError(f"expected shapes that broadcast, but got {given}")
                size = n
        found.append(size)
    return torch.Size(found[::-1])


def holds(comparison: Any) -> bool:
    """Whether a comparison of sizes is known to hold.

    That of a size which depends on numbers, as ``x[mask]`` has one while it is traced, is not known. For ``size == 1``
    it is then taken for no, as PyTorch's broadcasting takes it, which has the graph check the sizes when it runs.
    """
    return comparison if type(comparison) is bool else guard_or_false(comparison)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be the same."""
    try:
        return a == b
    except RuntimeError:  # sizes depend on numbers
        return len(a) == len(b) and all(holds(n == m) for n, m in zip(a, b))


def known_contiguous(x: torch.Tensor) -> bool:
    try:
        return x.is_contiguous()
    except RuntimeError:
        return False


def may_have_shape(x: torch.Tensor, shape: Sequence[Any]) -> bool:
    """Whether it is not known that ``x`` has another shape; a graph that is traced is to check it when it runs."""
    try:
        return x.shape == shape
    except RuntimeError:
        if x.dim() != len(shape) or any(holds(n != m) for n, m in zip(x.shape, shape)):
            return False
        for n, m in zip(x.shape, shape):
            check_when_run(n == m)
        return True
