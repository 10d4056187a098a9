"""Layer and group normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import pad_rank
from functrans.interpreters.vmap.rules.folding import fold_c, fold_channel_vector, fold_n, unfold_c, unfold_n
from functrans.interpreters.vmap.table import (
    BatchInfo,
    batching_rule,
    logical_rank,
    logical_shape,
    materialize,
    to_front,
)

aten = torch.ops.aten

Dim = int | None
LOW_PRECISION = (torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------
# Layer norm


@batching_rule(aten.native_layer_norm.default)
def native_layer_norm_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The statistics are those of the operator; batched parameters are applied to its bare output."""
    x_dim, _, weight_dim, bias_dim = in_dims[:4]
    x = to_front(x, x_dim)
    stat_dim = None if x_dim is None else 0
    if weight_dim is None and bias_dim is None:
        return aten.native_layer_norm.default(x, normalized_shape, weight, bias, eps), (0, stat_dim, stat_dim)
    rank = logical_rank(x, x_dim)
    for value, dim in ((weight, weight_dim), (bias, bias_dim)):
        if value is not None and logical_shape(value, dim) != list(normalized_shape):
            raise RuntimeError(f"expected weight and bias of the shape normalized_shape = {list(normalized_shape)}")
    dtype, stat_dtype = x.dtype, layer_norm_stat_dtype(x, weight, bias)
    if dtype in LOW_PRECISION:
        x = x.float()  # one rounding at the end, as in the operator
    output, mean, rstd = aten.native_layer_norm.default(x, normalized_shape, None, None, eps)
    if weight is not None:
        output = output * parameter(weight, weight_dim, rank)
    if bias is not None:
        output = output + parameter(bias, bias_dim, rank)
    return (output.to(dtype), mean.to(stat_dtype), rstd.to(stat_dtype)), (0, stat_dim, stat_dim)


def layer_norm_stat_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """On the CPU the statistics have the dtype of the parameters, elsewhere at least float32."""
    given = weight if weight is not None else bias
    dtype = x.dtype if given is None else given.dtype
    return dtype if x.device.type == "cpu" else torch.promote_types(dtype, torch.float32)


def parameter(x: Tensor, bdim: Dim, rank: int) -> Tensor:
    """A parameter to be combined with examples of rank ``rank``."""
    return x if bdim is None else pad_rank(x, bdim, rank)


@batching_rule(aten.layer_norm.default)
def layer_norm_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, int]:
    """Shared parameters leave the operator whole for the level below."""
    weight_dim, bias_dim = (*in_dims, None, None)[2:4]
    if weight_dim is None and bias_dim is None:
        return aten.layer_norm.default(to_front(x, in_dims[0]), normalized_shape, weight, bias, eps, cudnn_enable), 0
    dims = (in_dims[0], None, weight_dim, bias_dim, None)
    return native_layer_norm_rule(info, dims, x, normalized_shape, weight, bias, eps)[0][0], 0


@batching_rule(aten.native_layer_norm_backward.default)
def native_layer_norm_backward_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    grad_output: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The input's gradient is the operator's, row by row; those of the parameters are sums within one example."""
    size = info.batch_size
    grad_dim, x_dim, _, mean_dim, rstd_dim, weight_dim = in_dims[:6]
    rank = logical_rank(x, x_dim)
    outer = list(range(1, 1 + rank - len(normalized_shape)))
    grads: list[Any] = [None, None, None]
    grad_front = materialize(grad_output, grad_dim, size)
    # The kernel reads the statistics as contiguous, whatever their strides (torch 2.13).
    stored = ((x, x_dim), (mean, mean_dim), (rstd, rstd_dim))
    rows = [materialize(value, bdim, size).contiguous() for value, bdim in stored]
    if output_mask[0]:
        cotangent, scale = grad_front, weight
        if weight is not None and weight_dim is not None:
            cotangent, scale = (grad_front * pad_rank(weight, weight_dim, rank)).to(grad_front.dtype), None
        grads[0] = aten.native_layer_norm_backward.default(
            cotangent, rows[0], normalized_shape, rows[1], rows[2], scale, None, [True, False, False]
        )[0]
    if output_mask[1] and weight is not None:
        accumulate = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        centred = (rows[0].to(accumulate) - rows[1]) * rows[2]
        grads[1] = sum_over(grad_front * centred, outer).to(weight.dtype)
    if output_mask[2] and bias is not None:
        accumulate = torch.promote_types(grad_front.dtype, torch.float32)
        grads[2] = sum_over(grad_front.to(accumulate), outer).to(bias.dtype)
    return tuple(grads), tuple(None if grad is None else 0 for grad in grads)


def sum_over(x: Tensor, dims: list[int]) -> Tensor:
    """The sum over ``dims``, where an empty list means none."""
    return x.sum(dims) if dims else x


# ---------------------------------------------------------------------------------------------------------------
# Group norm


@batching_rule(aten.native_group_norm.default)
def native_group_norm_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    channels: int,
    spatial: int,
    groups: int,
    eps: float,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Folded into N; batched parameters are applied to the bare output."""
    size = info.batch_size
    x_dim, weight_dim, bias_dim = in_dims[:3]
    if x_dim is None:
        folded, rows, stat_dim = x, n, None
    else:
        folded, rows, stat_dim = fold_n(x, x_dim, size).contiguous(), size * n, 0
    if weight_dim is None and bias_dim is None:
        outputs = aten.native_group_norm.default(folded, weight, bias, rows, channels, spatial, groups, eps)
        return tuple(unfold_n(one, size, n) for one in outputs), (0, 0, 0)
    dtype = x.dtype
    given = weight if weight is not None else bias
    assert given is not None
    # The operator allows float32 parameters for a low-precision input, and then keeps float32 statistics.
    stat_dtype = torch.promote_types(dtype, given.dtype)
    output, mean, rstd = aten.native_group_norm.default(
        folded.float() if dtype in LOW_PRECISION else folded, None, None, rows, channels, spatial, groups, eps
    )
    mean, rstd = mean.to(stat_dtype), rstd.to(stat_dtype)
    if x_dim is not None:
        output, mean, rstd = (unfold_n(one, size, n) for one in (output, mean, rstd))
    trailing = x.dim() - (x_dim is not None) - 2
    for param, bdim, combine in ((weight, weight_dim, torch.mul), (bias, bias_dim, torch.add)):
        if param is not None:
            output = combine(output, per_channel(param, bdim, trailing))
    return (output.to(dtype), mean, rstd), (0, stat_dim, stat_dim)


def per_channel(x: Tensor, bdim: Dim, trailing: int) -> Tensor:
    """``[C]`` examples, to be combined with ``[B, N, C, ...]`` or ``[N, C, ...]``."""
    ones = [1] * trailing
    if bdim is None:
        return x.reshape(x.shape[0], *ones)
    x = to_front(x, bdim)
    return x.reshape(x.shape[0], 1, x.shape[1], *ones)


@batching_rule(aten.native_group_norm_backward.default)
def native_group_norm_backward_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    channels: int,
    spatial: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Folded into the channels, where each example's parameters are its own; the input's gradient alone into N."""
    size = info.batch_size
    weight_dim = in_dims[4]
    if weight is not None and (output_mask[1] or output_mask[2]):
        folded = [fold_c(v, d, size).contiguous() for v, d in zip((grad_output, x, mean, rstd), in_dims)]
        sizes = n, size * channels, spatial, size * groups
        of_input, of_weight, of_bias = aten.native_group_norm_backward.default(
            *folded, fold_channel_vector(weight, weight_dim, size), *sizes, output_mask
        )
        return (
            unfold_c(of_input, size, channels) if output_mask[0] else None,
            of_weight.reshape(size, channels) if output_mask[1] else None,
            of_bias.reshape(size, channels) if output_mask[2] else None,
        ), tuple(place if wanted else None for place, wanted in zip((1, 0, 0), output_mask, strict=True))
    values = [materialize(value, bdim, size) for value, bdim in zip((grad_output, x, mean, rstd), in_dims)]
    grads: list[Any] = [None, None, None]
    if output_mask[0]:
        cotangent, scale = values[0], weight
        if weight is not None and weight_dim is not None:
            trailing = values[1].dim() - 3
            cotangent, scale = (values[0] * per_channel(weight, weight_dim, trailing)).to(x.dtype), None
        folded = [fold_n(value, 0, size).contiguous() for value in (cotangent, *values[1:])]
        grads[0] = unfold_n(
            aten.native_group_norm_backward.default(
                *folded, scale, size * n, channels, spatial, groups, [True, False, False]
            )[0],
            size,
            n,
        )
    if output_mask[1] or output_mask[2]:
        dtype = grad_output.dtype if weight is None else weight.dtype
        accumulate = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
        grouped = [size, n, groups, channels // groups, spatial]
        cotangent = values[0].reshape(grouped).to(accumulate)
        if output_mask[1]:
            statistics = [value.reshape(size, n, groups, 1, 1) for value in values[2:]]
            normalized = (values[1].reshape(grouped) - statistics[0]) * statistics[1]
            grads[1] = (cotangent * normalized).sum([1, 4]).reshape(size, channels).to(dtype)
        if output_mask[2]:
            grads[2] = cotangent.sum([1, 4]).reshape(size, channels).to(dtype)
    return tuple(grads), tuple(None if grad is None else 0 for grad in grads)
