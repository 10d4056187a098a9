"""Noting on wrappers where the user made them, for the error about a wrapper that is used too late."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.errors.call_sites import LIBRARY_FILES, OURS, USER_FILES, WITHIN_FILES, is_users
from functrans.pytorch.torch_private import TENSOR_MODULE
from functrans.tensors.pytrees import tree_flatten

MODULE_CALL = torch.nn.Module.__call__.__code__
#: PyTorch's code that hands on what it was called with to ``otherwise``, which notes the place.
SENT_ON = frozenset(m.__file__ for m in (torch.functional, torch.nn.functional, TENSOR_MODULE))


def several(out: Any) -> bool:
    """Whether an operator's output is several wrappers."""
    return isinstance(out, tuple | list) and len(out) > 0 and type(out[0]) is WrapperTensor


def note_site(made: Sequence[Any], frame: FrameType, up: int) -> None:
    """Note on wrappers which line of the user's made them.

    ``frame``, ``up`` above the caller's, is no code known to be the user's. To look at a frame takes longer than to
    pass it by, so those that come together are jumped over.
    """
    up += 1
    try:
        while True:
            code = frame.f_code
            name = code.co_filename
            if name in WITHIN_FILES:
                return
            if name in USER_FILES or (name not in LIBRARY_FILES and is_users(name)):
                break
            if name in WITHIN_FILES or code.co_name == "otherwise":
                return  # the operator being handled, or the door's ``otherwise``, notes its place
            if code.co_name == "forward" and sys._getframe(up + 2).f_code is MODULE_CALL:
                up += 3  # two functions of Module, and their caller
            else:
                up += 1
            frame = sys._getframe(up)
    except ValueError:  # no more frames: a thread that starts in library code
        return
    site = (code, frame.f_lasti)
    for out in made:
        if type(out) is WrapperTensor:
            out.made_at = site


def note_results(up: int, *trees: Any) -> None:
    """Note on what a transform returns inside of another where the user called it.

    That is ``up`` frames above the caller or further. What another transform called directly, as in
    ``vmap(grad(f))``, is seen by nobody else.
    """
    frame = sys._getframe(up + 1)
    if frame.f_code.co_name == "call_function" and frame.f_code.co_filename.startswith(OURS):
        return
    made = []
    for tree in trees:
        for v in (tree,) if tree is None or isinstance(tree, Tensor) else tree_flatten(tree)[0]:
            if type(v) is WrapperTensor and not hasattr(v, "made_at"):
                made.append(v)
    if made:
        note_site(made, frame, up + 1)
