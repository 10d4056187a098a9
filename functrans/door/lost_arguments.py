"""Torch functions that lose something on their way to the door.

``handle_torch_function`` is called in Python by the function itself, with a list of its arguments written out by hand;
two of these lists lack one (torch 2.11 to 2.15), so that ``F.l1_loss(x, y, weight=w)`` would be the unweighted loss. It
still stands in the function's frame.

PyTorch's parser hands out what a factory makes without its history where anybody else, such as a mode that notes
results, holds it too. Of tensors that have one it makes ``linspace`` and ``logspace``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: By function: the argument that is lost.
LOST: dict[Callable[..., Any], str] = {functional.l1_loss: "weight", torch.chain_matmul: "out"}


def recovered(function: Callable[..., Any], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """``function``, which runs and has handed itself over, and the keyword arguments with the one that was lost."""
    name, frame = LOST[function], sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    lost = None if frame is None else frame.f_locals[name]
    return function, kwargs if lost is None else {**kwargs, name: lost}


def by_operator(function: Callable[..., Any], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A call of the operator in place of the parser's, which makes the same tensor."""
    return (function if kwargs.get("out") is not None else partial(between, RANGES[function])), kwargs


def between(
    packet: Any, start: Any, end: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any
) -> Tensor:
    """``linspace`` or ``logspace``, by the overload for these ends; that it is to be a leaf is seen to elsewhere."""
    overload = "_".join("Tensor" if isinstance(x, Tensor) else "Scalar" for x in (start, end))
    where = torch.get_default_device() if device is None else device
    found: Tensor = getattr(packet, overload)(start, end, *args, device=where, **kwargs)
    return found


RANGES: dict[Callable[..., Any], Any] = {
    torch.linspace: torch.ops.aten.linspace, torch.logspace: torch.ops.aten.logspace,
}  # fmt: skip
#: What is called in the place of a function, and with which keyword arguments.
MENDED: dict[Callable[..., Any], Any] = {**dict.fromkeys(LOST, recovered), **dict.fromkeys(RANGES, by_operator)}
