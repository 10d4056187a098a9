"""Torch functions that hand themselves over without all of their arguments.

``handle_torch_function`` is called in Python by the function itself, with a list of its arguments written out by hand; two of these lists
lack one (torch 2.11 to 2.14), so that ``F.l1_loss(x, y, weight=w)`` would be the unweighted loss. It still stands in the function's frame.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from functrans.door import ENTRANCES
from functrans.torch_private import without_torch_function


def recovering(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The entrance of ``function`` that finds the argument ``name`` again."""
    code = function.__code__

    def entrance(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None and frame.f_locals[name] is not None:
            kwargs[name] = frame.f_locals[name]
        return without_torch_function(function, (), args, kwargs)

    return entrance


ENTRANCES[functional.l1_loss] = recovering(functional.l1_loss, "weight")
ENTRANCES[torch.chain_matmul] = recovering(torch.chain_matmul, "out")
