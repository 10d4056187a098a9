"""PyTorch's own checks of an operator's arguments, asked of tensors that stand for them: without data, or zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import DisableTorchFunction, OpOverload, no_dispatch
from functrans.tensors.pytrees import elements

aten = torch.ops.aten

META, CPU = torch.device("meta"), torch.device("cpu")


def run_without_data(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run ``op`` on arguments of the same shapes and dtypes that take no memory; raises what ``op`` raises for them."""
    with running_at(None), torch.no_grad(), no_dispatch(), DisableTorchFunction():
        return op(*standing_in(args, META), **{k: standing_in(v, META) for k, v in kwargs.items()})


def run_on_zeros(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run ``op`` on zeros of the same shapes and dtypes, on the CPU; raises what ``op`` raises for them."""
    with running_at(None), torch.no_grad(), no_dispatch(), DisableTorchFunction(), torch.random.fork_rng(devices=[]):
        return op(*standing_in(args, CPU), **{k: standing_in(v, CPU) for k, v in kwargs.items()})


def refuse_as(op: OpOverload, *args: Any, run: Callable[..., Any] = run_without_data, **kwargs: Any) -> None:
    """Raise what ``op`` raises for these arguments, for what stands in its place and would answer.

    Symbolic sizes are not to be fixed: they are not looked at. ``run``: ``run_on_zeros`` where the kernel has checks.
    """
    if all(type(n) is int for a in elements((*args, *kwargs.values())) if isinstance(a, Tensor) for n in a.shape):
        run(op, args, kwargs)


def standing_in(a: Any, device: torch.device) -> Any:
    """``a`` with tensors of the same shapes and dtypes on ``device``: zeros, where it has data."""
    if isinstance(a, Tensor):
        make = aten.empty.memory_format if device is META else aten.zeros.default
        return make(list(a.shape), dtype=a.dtype, device=device)
    if type(a) is list or type(a) is tuple:
        return [standing_in(x, device) for x in a]
    return device if isinstance(a, torch.device) else a
