"""What PyTorch does in front of its operators that take functions, and inside transforms must not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.control_flow.definitions import for_each_pair
from functrans.pytorch.control_flow import FLEX_ATTENTION, associative_module, kept_by, replace_in_flex_attention
from functrans.pytorch.imports import when_imported
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import torch_pytree

_cond = type(torch.ops.higher_order.cond)
_original_cond = _cond.__call__


@functools.wraps(_original_cond)
def call_cond(
    self: Any, pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any]
) -> Any:
    """torch.cond takes operands in containers, which its operator refuses where it is not compiled."""
    if STATE.top is None:
        return _original_cond(self, pred, true_fn, false_fn, operands)
    leaves, spec = torch_pytree.tree_flatten(tuple(operands))

    def flat(branch: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(branch, updated=())
        def run(*leaves: Any) -> Any:
            return branch(*torch_pytree.tree_unflatten(leaves, spec))

        return run

    return _original_cond(self, pred, flat(true_fn), flat(false_fn), tuple(leaves))


_original_scan = associative_module.generic_associative_scan


@functools.wraps(_original_scan)
def scan_pairs(operator: Callable[..., Any], leaves: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """associative_scan has torch.func's vmap run a function of one pair, and does not come to its operator, by which
    rules for it are found."""
    if not is_dynamo_compiling() and STATE.top is not None:
        vmapped = kept_by(operator, "combine_fn")
        combine_fn = None if vmapped is None else kept_by(vmapped, "func")
        if combine_fn is not None:
            of_many = for_each_pair(functools.partial(operator, combine_fn=combine_fn))
            return torch.ops.higher_order.associative_scan(of_many, list(leaves), ())
    return _original_scan(operator, leaves, *args, **kwargs)


def without_derivatives(original: Callable[..., None]) -> Callable[..., None]:
    """The check of devices of flex_attention, of which PyTorch has no derivative on the CPU."""

    @functools.wraps(original)
    def check(query: Tensor, key: Tensor, value: Tensor) -> None:
        if not is_dynamo_compiling() and STATE.top is not None:
            query, key, value = query.detach(), key.detach(), value.detach()
        original(query, key, value)

    return check


_cond.__call__ = call_cond  # type: ignore[method-assign]
associative_module.generic_associative_scan = scan_pairs
when_imported(FLEX_ATTENTION, lambda: replace_in_flex_attention(without_derivatives))
