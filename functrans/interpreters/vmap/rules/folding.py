"""Layers that already have a batch of their own: the vmap dimension is folded into it.

NOTE [Where the batch is folded into N]
``[B, N, ...]`` and ``[N, B, ...]`` are both ``B * N`` images. Which of them a tensor is depends on what it comes from:
an ensemble's convolutions have the batch among the channels, and give ``[N, B, ...]``. So the batch stays on the side
of N where the largest operand has it, and nothing of that size is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrans.interpreters.vmap.families import argument_place, family, same_dims, tensor_positions
from functrans.interpreters.vmap.table import BatchInfo, logical_rank, materialize
from functrans.pytorch.torch_private import OpOverload


def side_of_n(*operands: tuple[Tensor, int | None]) -> int:
    """0 or 1, the batch dimension of the largest batched operand; see NOTE [Where the batch is folded into N]."""
    batched = [(x.numel(), bdim) for x, bdim in operands if bdim is not None]
    return int(max(batched, key=lambda entry: entry[0])[1] == 1) if batched else 0


def fold_n(x: Tensor, bdim: int | None, batch_size: int, side: int = 0) -> Tensor:
    """``[N, ...]`` examples as ``[B * N, ...]``, or as ``[N * B, ...]`` with the batch on side 1 of N.

    An unbatched tensor is repeated (a view where possible).
    """
    if side and bdim == 1:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    x = materialize(x, bdim, batch_size)
    x = x.transpose(0, 1) if side else x
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def unfold_n(x: Tensor, batch_size: int, n: int, side: int = 0) -> Tensor:
    """The inverse: the batch dimension is ``side``."""
    return x.reshape(n, batch_size, *x.shape[1:]) if side else x.reshape(batch_size, n, *x.shape[1:])


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


def placeholder(like: Tensor, shape: Sequence[Any]) -> Tensor:
    """Stands for a tensor of which only the shape matters."""
    return like.new_zeros(()).expand(shape)


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


@family
def fold_into_n(op: OpOverload, rank: int, shape_only: str | None = None) -> Callable[..., tuple[Any, Any]]:
    """Operators whose tensors are all ``[N, ...]`` of rank ``rank``, or all of one rank less, without N.

    Their outputs have an N as their inputs do. Of the argument ``shape_only`` they read no element.
    """
    positions = tensor_positions(op)
    indices = argument_place(op, "indices")
    unread = None if shape_only is None else argument_place(op, shape_only)

    def folded(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        arguments = list(args)
        has_n = logical_rank(args[positions[0]], in_dims[positions[0]]) >= rank
        if size and not has_n and not args[positions[0]].numel():
            # PyTorch takes an image of no channels, but no batch of such; they are all the same
            first = [x.select(d, 0) if isinstance(d, int) else x for x, d in zip(args, in_dims, strict=True)]
            output = op(*first, **kwargs)
            return output, same_dims(output, None)
        side = side_of_n(*((args[k], in_dims[k]) for k in positions)) if has_n else 0
        for k in positions:
            x = args[k]
            if k == unread and in_dims[k] is None:
                x = placeholder(x, x.shape)  # which is repeated without a copy
            arguments[k] = fold_n(x, in_dims[k], size, side) if has_n else materialize(x, in_dims[k], size)
        if indices is not None:
            # adaptive_max_pool3d_backward reads its indices as contiguous, whatever their strides (torch 2.13).
            arguments[indices] = arguments[indices].contiguous()
        output = op(*arguments, **kwargs)
        if not has_n:
            return output, tuple(0 for _ in output) if isinstance(output, tuple) else 0
        n = args[positions[0]].shape[0 if in_dims[positions[0]] != 0 else 1]
        if isinstance(output, tuple):
            return tuple(unfold_n(one, size, n, side) for one in output), (side,) * len(output)
        return unfold_n(output, size, n, side), side

    return folded
