"""New tensors made after the model of a batched one: each example gets storage of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined, argument_place, family
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, to_front
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def in_memory_format(
    run: Callable[..., Any], x: Tensor, bdim: int, memory_format: torch.memory_format | None
) -> tuple[Any, Any]:
    """``run(x, memory_format=...)`` so that each example comes out in the memory format."""
    if memory_format is None or memory_format is torch.preserve_format:
        return run(x, memory_format=None), bdim  # to preserve it, without a word of it to sparse tensors
    x = to_front(x, bdim)
    if memory_format is torch.contiguous_format:
        return run(x, memory_format=memory_format), 0
    # Channels last wants the rank of an example: batches of images are one longer batch of images.
    if x.dim() < 2:
        raise RuleDeclined("channels_last needs a batch of images")
    sizes = x.shape[:2]
    return run(x.flatten(0, 1), memory_format=memory_format).unflatten(0, sizes), 0


@family
def factory_like(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """``op(self, ..., memory_format=None)`` with the shape of ``self``."""

    def like(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        memory_format = kwargs.pop("memory_format", None)

        def run(y: Tensor, memory_format: torch.memory_format) -> Tensor:
            return op(y, *args, memory_format=memory_format, **kwargs)

        return in_memory_format(run, x, in_dims[0], memory_format)

    return like


@family
def factory_new(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """``op(self, size, ...)`` with a size of its own."""
    size_place = argument_place(op, "size")
    assert size_place is not None

    def new(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        sized = list(args)
        sized[size_place] = [info.batch_size, *args[size_place]]
        return op(*sized, **kwargs), 0

    return new


factory_like(aten.empty_like.default, aten.full_like.default, aten.ones_like.default, aten.zeros_like.default)
factory_new(aten.new_empty.default, aten.new_full.default, aten.new_ones.default, aten.new_zeros.default)


@batching_rule(aten.new_empty_strided.default)
def new_empty_strided(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, size: Sequence[int], stride: Sequence[int], **kwargs: Any
) -> tuple[Any, Any]:
    """The examples lie one behind the other, each with the strides asked for."""
    extent = 1
    for length, step in zip(size, stride):
        if length == 0:
            extent = 0
            break
        extent = extent + (length - 1) * step
    return aten.new_empty_strided.default(x, [info.batch_size, *size], [extent, *stride], **kwargs), 0


@batching_rule(aten._new_zeros_with_same_feature_meta.default)
def zeros_for_a_tangent(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, like: Tensor, *, self_num_batch_dims: int = 0
) -> tuple[Any, Any]:
    """What forward mode asks for where a tangent is missing: ``like``'s shape behind the first dimensions of ``x``."""
    if self_num_batch_dims:
        raise RuleDeclined("zeros with dimensions of two tensors")
    return torch.zeros_like(like), in_dims[1]
