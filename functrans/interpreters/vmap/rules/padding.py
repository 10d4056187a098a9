"""Batching rules of operators that repeat, pad and rearrange: unlike views, their outputs are new memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import (
    RuleDeclined,
    family,
    flat_examples,
    pad_rank,
    physical_dim,
    tensor_positions,
)
from functrans.interpreters.vmap.table import (
    BatchInfo,
    Dims,
    Output,
    batching_rule,
    materialize,
    to_front,
)
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------------------------
# Repetition


@batching_rule(aten.repeat.default)
def repeat(info: BatchInfo, in_dims: Dims, x: Tensor, repeats: Any) -> Output:
    """New dimensions go behind the batch dimension."""
    if len(repeats) < x.dim() - 1:
        raise RuleDeclined("repeat takes a number for every dimension")
    return pad_rank(x, in_dims[0], len(repeats)).repeat(1, *repeats), 0


@batching_rule(aten.tile.default)
def tile(info: BatchInfo, in_dims: Dims, x: Tensor, repeats: Any) -> Output:
    """Missing repeats count as 1."""
    return repeat(info, in_dims, x, [*[1] * (x.dim() - 1 - len(repeats)), *repeats])


@batching_rule(aten.repeat_interleave.self_int)
def repeat_interleave(
    info: BatchInfo, in_dims: Dims, x: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None
) -> Output:
    """Without ``dim``, of the flattened example."""
    if dim is None:
        return torch.repeat_interleave(flat_examples(x, in_dims[0]), repeats, 1, output_size=output_size), 0
    if x.dim() == 1:
        raise RuleDeclined("repeat_interleave of a scalar")
    dim = physical_dim(dim, x.dim() - 1, in_dims[0])
    return torch.repeat_interleave(x, repeats, dim, output_size=output_size), in_dims[0]


@batching_rule(aten.repeat_interleave.self_Tensor)
def repeat_interleave_each(
    info: BatchInfo, in_dims: Dims, x: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: Any = None
) -> Output:
    """As above, where all examples have the same repeats; else their outputs differ in size."""
    if in_dims[1] is not None:
        raise RuleDeclined("repeat_interleave: the output's size depends on the batched repeats")
    return repeat_interleave(info, in_dims, x, repeats, dim, output_size=output_size)


# ---------------------------------------------------------------------------------------------------------------
# Operators on the last dimensions, with any number of dimensions before them


@family
def on_last_dims(op: OpOverload, rank: int) -> Callable[..., Output]:
    """Operators of the last ``rank`` dimensions that take any number of leading ones.

    Examples of a lower rank go on to PyTorch's own message.
    """

    def last_dims(info: BatchInfo, in_dims: Dims, x: Tensor, *args: Any) -> Output:
        if x.dim() <= rank:
            raise RuleDeclined(f"{op} takes at least {rank} dimensions")
        return op(to_front(x, in_dims[0]), *args), 0

    return last_dims


on_last_dims(aten.tril.default, aten.triu.default, rank=2)


@family
def on_pixels(op: OpOverload) -> Callable[..., Output]:
    """Images ``[..., C, H, W]``: the kernel takes them as ``[N, C, H, W]``, and no memory format of five dimensions."""

    def pixels(info: BatchInfo, in_dims: Dims, x: Tensor, factor: Any) -> Output:
        if x.dim() <= 3:
            raise RuleDeclined(f"{op} takes at least 3 dimensions")
        x = to_front(x, in_dims[0])
        before = x.shape[:-3]
        if 0 in before:  # pixel_unshuffle returns an empty tensor as it is, with the wrong shape: that of an example
            out = op(x.new_zeros(x.shape[1:]), factor)
            return out.expand(info.batch_size, *out.shape), 0
        out = op(x.reshape(math.prod(before), *x.shape[-3:]), factor)
        return out.reshape(*before, *out.shape[1:]), 0

    return pixels


on_pixels(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)


@batching_rule(aten.constant_pad_nd.default)
def constant_pad_nd(info: BatchInfo, in_dims: Dims, x: Tensor, pad: Any, value: Any = 0) -> Output:
    """Pads count from the last dimension."""
    if len(pad) > 2 * (x.dim() - 1):
        raise RuleDeclined("more pads than dimensions")
    return aten.constant_pad_nd.default(to_front(x, in_dims[0]), pad, value), 0


@batching_rule(aten.pad.default)
def pad_any(
    info: BatchInfo, in_dims: Dims, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None
) -> Output:
    """Constants are at hand; the other modes are composed of their own operators."""
    if mode != "constant":
        raise RuleDeclined("composed of operators that have rules")
    return constant_pad_nd(info, in_dims, x, pad, 0 if value is None else value)


# ---------------------------------------------------------------------------------------------------------------
# Operators on the last dimensions, with one optional dimension before them


@family
def folding(op: OpOverload, rank: int, optional: bool = True) -> Callable[..., Output]:
    """Operators on examples of ``rank`` dimensions or, if ``optional``, one more: that one takes the batch in."""
    positions = tensor_positions(op)

    def fold(info: BatchInfo, in_dims: Dims, *args: Any) -> Output:
        arguments = list(args)
        lead: Any = ()
        for place in positions:
            x = materialize(args[place], in_dims[place], info.batch_size)
            if x.dim() != rank + 2 and not (optional and x.dim() == rank + 1):
                raise RuleDeclined(f"{op} takes examples of {rank} dimensions")
            lead = x.shape[:-rank]
            arguments[place] = x.reshape(math.prod(lead), *x.shape[-rank:])
        output = op(*arguments)
        return output.reshape(*lead, *output.shape[1:]), 0

    return fold


folding(
    aten.reflection_pad1d.default,
    aten.reflection_pad1d_backward.default,
    aten.replication_pad1d.default,
    aten.replication_pad1d_backward.default,
    rank=2,
)
folding(
    aten.reflection_pad2d.default,
    aten.reflection_pad2d_backward.default,
    aten.replication_pad2d.default,
    aten.replication_pad2d_backward.default,
    rank=3,
)
folding(
    aten.reflection_pad3d.default,
    aten.reflection_pad3d_backward.default,
    aten.replication_pad3d.default,
    aten.replication_pad3d_backward.default,
    rank=4,
)


@batching_rule(aten._pad_circular.default)
def pad_circular(info: BatchInfo, in_dims: Dims, x: Tensor, pad: Sequence[Any]) -> Output:
    """The batch joins N, which every example has."""
    x = to_front(x, in_dims[0])
    if x.dim() != len(pad) // 2 + 3:
        raise RuleDeclined("PyTorch refuses these sizes")
    out = aten._pad_circular.default(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), pad)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


@batching_rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(info: BatchInfo, in_dims: Dims, x: Tensor, groups: Any) -> Output:
    """The channels, after the dimension that takes the batch in, are taken as ``[groups, rest]`` and transposed."""
    x = to_front(x, in_dims[0])
    if x.dim() < 4 or groups <= 0 or x.shape[2] % groups:
        raise RuleDeclined("PyTorch refuses these sizes")
    shape = x.shape
    return x.reshape(*shape[:2], groups, shape[2] // groups, *shape[3:]).transpose(2, 3).reshape(shape), 0
