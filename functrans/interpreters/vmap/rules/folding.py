"""Layers that already have a batch of their own: the vmap dimension is folded into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrans.core.rules import caller_place
from functrans.core.torch_private import OpOverload
from functrans.interpreters.vmap.families import argument_place, tensor_positions
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo, logical_rank, materialize


def fold_n(x: Tensor, bdim: int | None, batch_size: int) -> Tensor:
    """``[N, ...]`` examples as ``[B * N, ...]``; an unbatched tensor is repeated (a view where possible)."""
    x = materialize(x, bdim, batch_size)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def unfold_n(x: Tensor, batch_size: int, n: int) -> Tensor:
    """``[B * N, ...]`` as ``[B, N, ...]``."""
    return x.reshape(batch_size, n, *x.shape[1:])


def fold_c(x: Tensor, bdim: int | None, batch_size: int) -> Tensor:
    """``[N, C, ...]`` examples as ``[N, B * C, ...]``; an unbatched tensor is repeated."""
    x = materialize(x, bdim, batch_size).transpose(0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def unfold_c(x: Tensor, batch_size: int, channels: int) -> Tensor:
    """``[N, B * C, ...]`` as ``[N, B, C, ...]``: the batch dimension is 1."""
    return x.reshape(x.shape[0], batch_size, channels, *x.shape[2:])


def fold_channel_vector(x: Tensor, bdim: int | None, batch_size: int) -> Tensor:
    """``[C]`` examples as ``[B * C]``, in the order of :func:`fold_c`."""
    x = materialize(x, bdim, batch_size)
    return x.reshape(x.shape[0] * x.shape[1])


def empty_batch(op: OpOverload, in_dims: Sequence[Any], *args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A batch of no examples, for kernels that refuse it: the operator says on an example of zeros what it returns."""
    example = list(args)
    for k, bdim in enumerate(in_dims[: len(args)]):
        if isinstance(args[k], Tensor) and bdim is not None:
            example[k] = args[k].new_zeros([extent for d, extent in enumerate(args[k].shape) if d != bdim])
    outputs = op(*example)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    batches = tuple(None if one is None else one.new_zeros([0, *one.shape]) for one in outputs)
    return batches, tuple(None if one is None else 0 for one in batches)


def fold_into_n(*ops: OpOverload, rank: int) -> None:
    """Operators whose tensors are all ``[N, ...]`` of rank ``rank``, or all of one rank less, without N."""
    place = caller_place()
    for op in ops:
        BATCHING_RULES.add(op, fold_into_n_rule(op, rank), place=place)


def fold_into_n_rule(op: OpOverload, rank: int) -> Callable[..., tuple[Any, Any]]:
    """The rule of one operator; all its outputs have an N as its inputs do."""
    positions = tensor_positions(op)
    indices = argument_place(op, "indices")

    def folded(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        arguments = list(args)
        has_n = logical_rank(args[positions[0]], in_dims[positions[0]]) >= rank
        for k in positions:
            repeat = fold_n if has_n else materialize
            arguments[k] = repeat(args[k], in_dims[k], size)
        if indices is not None:
            # adaptive_max_pool3d_backward reads its indices as contiguous, whatever their strides (torch 2.13).
            arguments[indices] = arguments[indices].contiguous()
        output = op(*arguments, **kwargs)
        if not has_n:
            return output, tuple(0 for _ in output) if isinstance(output, tuple) else 0
        n = args[positions[0]].shape[0 if in_dims[positions[0]] != 0 else 1]
        if isinstance(output, tuple):
            return tuple(unfold_n(one, size, n) for one in output), tuple(0 for _ in output)
        return unfold_n(output, size, n), 0

    return folded
