"""Torch functions that hand themselves over without all of their arguments.

``handle_torch_function`` is called in Python by the function itself, with a list of its arguments written out by hand;
two of these lists lack one (torch 2.11 to 2.15), so that ``F.l1_loss(x, y, weight=w)`` would be the unweighted loss. It
still stands in the function's frame.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

#: By function: the argument that is lost.
LOST: dict[Callable[..., Any], str] = {functional.l1_loss: "weight", torch.chain_matmul: "out"}


def recovered(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of a call of ``function``, which runs and has handed itself over, with the argument that was lost."""
    name, frame = LOST[function], sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return kwargs if frame is None or frame.f_locals[name] is None else {**kwargs, name: frame.f_locals[name]}
