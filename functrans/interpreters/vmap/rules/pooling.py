"""Pooling, upsampling, sliding windows and grid sampling: the batch is folded into N."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import argument_place, family
from functrans.interpreters.vmap.rules.folding import fold_c, fold_into_n, fold_n, side_of_n, unfold_c, unfold_n
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, materialize, to_front
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

fold_into_n(aten.col2im.default, rank=3)

# Composites: without their pieces they find kernels that do not look for the places of the maxima.
fold_into_n(aten.max_pool1d.default, rank=3)
fold_into_n(aten.max_pool2d.default, rank=4)

fold_into_n(
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool2d_backward.default,
    aten.fractional_max_pool2d_backward.default,
    aten.max_unpool2d.default,
    aten.im2col.default,
    rank=4,
)

fold_into_n(
    aten.max_pool3d_with_indices.default,
    aten.max_pool3d_with_indices_backward.default,
    aten.avg_pool3d.default,
    aten._adaptive_avg_pool3d.default,
    aten.adaptive_max_pool3d.default,
    aten.adaptive_max_pool3d_backward.default,
    aten.fractional_max_pool3d_backward.default,
    aten.max_unpool3d.default,
    rank=5,
)

fold_into_n(aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d_backward.default, rank=4, shape_only="self")
fold_into_n(aten.avg_pool3d_backward.default, aten._adaptive_avg_pool3d_backward.default, rank=5, shape_only="self")

for rank, upsampling in (
    (3, (aten.upsample_nearest1d, aten._upsample_nearest_exact1d, aten.upsample_linear1d)),
    (
        4,
        (
            aten.upsample_nearest2d,
            aten._upsample_nearest_exact2d,
            aten.upsample_bilinear2d,
            aten.upsample_bicubic2d,
            aten._upsample_bilinear2d_aa,
            aten._upsample_bicubic2d_aa,
        ),
    ),
    (5, (aten.upsample_nearest3d, aten._upsample_nearest_exact3d, aten.upsample_trilinear3d)),
):
    for packet in upsampling:
        fold_into_n(packet.default, packet.vec, rank=rank)


@family
def sized_like_input(op: OpOverload, name: str) -> Callable[..., tuple[Any, Any]]:
    """Operators of one tensor ``[N, ...]`` that are also told a size, argument ``name``, which counts N."""
    size_place = argument_place(op, name)
    assert size_place is not None

    def folded(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        side = side_of_n((x, in_dims[0]))
        arguments = [fold_n(x, in_dims[0], info.batch_size, side), *args]
        n, *rest = arguments[size_place]
        arguments[size_place] = [info.batch_size * n, *rest]
        return unfold_n(op(*arguments, **kwargs), info.batch_size, n, side), side

    return folded


sized_like_input(
    aten.upsample_nearest1d_backward.default,
    aten._upsample_nearest_exact1d_backward.default,
    aten.upsample_linear1d_backward.default,
    aten.upsample_nearest2d_backward.default,
    aten._upsample_nearest_exact2d_backward.default,
    aten.upsample_bilinear2d_backward.default,
    aten.upsample_bicubic2d_backward.default,
    aten._upsample_bilinear2d_aa_backward.default,
    aten._upsample_bicubic2d_aa_backward.default,
    aten.upsample_nearest3d_backward.default,
    aten._upsample_nearest_exact3d_backward.default,
    aten.upsample_trilinear3d_backward.default,
    name="input_size",
)
sized_like_input(aten.affine_grid_generator.default, name="size")


@family
def fractional_pooling(op: OpOverload, rank: int) -> Callable[..., tuple[Any, Any]]:
    """The samples ``[N, C, dimensions]``, which say where the windows begin, have an N even for an example without."""

    def pool(
        info: BatchInfo, in_dims: Sequence[Any], x: Tensor, kernel: Any, size: Any, samples: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        batch = info.batch_size
        samples = fold_n(samples, in_dims[3], batch)
        if x.dim() - (in_dims[0] is not None) < rank:
            return op(materialize(x, in_dims[0], batch), kernel, size, samples), (0, 0)
        n = x.shape[0 if in_dims[0] != 0 else 1]
        pooled, indices = op(fold_n(x, in_dims[0], batch), kernel, size, samples)
        return (unfold_n(pooled, batch, n), unfold_n(indices, batch, n)), (0, 0)

    return pool


fractional_pooling(aten.fractional_max_pool2d.default, rank=4)
fractional_pooling(aten.fractional_max_pool3d.default, rank=5)


@batching_rule(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler_rule(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, grid: Tensor, *modes: Any
) -> tuple[Tensor, int]:
    """One grid for all examples: fold into C. One image for all grids: fold into the grid's first spatial dim."""
    size = info.batch_size
    x_dim, grid_dim = in_dims[0], in_dims[1]
    sample = aten.grid_sampler_2d if grid.dim() - (grid_dim is not None) == 4 else aten.grid_sampler_3d
    if grid_dim is None:
        channels = x.shape[1] if x_dim > 1 else x.shape[2]
        return unfold_c(sample(fold_c(x, x_dim, size), grid, *modes), size, channels), 1
    if x_dim is None:
        grid = to_front(grid, grid_dim).transpose(0, 1)
        n, _, height, *rest = grid.shape
        output = sample(x, grid.reshape(n, size * height, *rest), *modes)
        return output.reshape(n, output.shape[1], size, height, *output.shape[3:]), 2
    n = x.shape[0 if x_dim != 0 else 1]
    return unfold_n(sample(fold_n(x, x_dim, size), fold_n(grid, grid_dim, size), *modes), size, n), 0


@batching_rule(aten.grid_sampler_2d_backward.default, aten.grid_sampler_3d_backward.default)
def grid_sampler_backward_rule(
    info: BatchInfo, in_dims: Sequence[Any], grad_output: Tensor, x: Tensor, grid: Tensor, *rest: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Everything is folded into N.

    A gradient that was not asked for is undefined, for ``grid`` as natively computed.
    """
    size = info.batch_size
    n = grad_output.shape[0 if in_dims[0] != 0 else 1]
    is_2d = grid.dim() - (in_dims[2] is not None) == 4
    backward = aten.grid_sampler_2d_backward if is_2d else aten.grid_sampler_3d_backward
    folded = [fold_n(value, bdim, size) for value, bdim in zip((grad_output, x, grid), in_dims)]
    grads = tuple(None if grad is None else unfold_n(grad, size, n) for grad in backward(*folded, *rest))
    return grads, tuple(None if grad is None else 0 for grad in grads)
