"""torch.cond inside transforms, whose operator takes no operands in containers where it is not compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from functrans.core.thread_state import STATE
from functrans.core.torch_private import torch_pytree

_cond = type(torch.ops.higher_order.cond)
_original = _cond.__call__


@functools.wraps(_original)
def call(
    self: Any, pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any]
) -> Any:
    if STATE.top is None:
        return _original(self, pred, true_fn, false_fn, operands)
    leaves, spec = torch_pytree.tree_flatten(tuple(operands))

    def flat(branch: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(branch, updated=())
        def run(*leaves: Any) -> Any:
            return branch(*torch_pytree.tree_unflatten(leaves, spec))

        return run

    return _original(self, pred, flat(true_fn), flat(false_fn), tuple(leaves))


_cond.__call__ = call
