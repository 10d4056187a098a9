"""PyTorch's own checks of an operator's arguments, asked of tensors that have shapes and dtypes and no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.core.thread_state import running_at
from functrans.core.torch_private import DisableTorchFunction, OpOverload, no_dispatch

aten = torch.ops.aten


def run_without_data(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run ``op`` on arguments of the same shapes and dtypes that take no memory; raises what ``op`` raises for them."""
    with running_at(None), torch.no_grad(), no_dispatch(), DisableTorchFunction():
        return op(*without_data(args), **{k: without_data(v) for k, v in kwargs.items()})


def without_data(a: Any) -> Any:
    """``a`` with tensors of the same shapes and dtypes that take no memory."""
    if isinstance(a, Tensor):
        return aten.empty.memory_format(list(a.shape), dtype=a.dtype, device="meta")
    if type(a) is list or type(a) is tuple:
        return [without_data(x) for x in a]
    return torch.device("meta") if isinstance(a, torch.device) else a
