"""The shape that shapes broadcast to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch


def broadcast_shapes(*shapes: Sequence[Any]) -> torch.Size:
    """As ``torch.broadcast_shapes``, whose first call imports sympy, which takes longer than most programs' work."""
    found = []
    for sizes in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        size = 1
        for n in sizes:
            if n != 1 and n != size:
                if size != 1:
                    given = ", ".join(str(list(shape)) for shape in shapes)
                    raise RuntimeError(f"expected shapes that broadcast, but got {given}")
                size = n
        found.append(size)
    return torch.Size(found[::-1])
