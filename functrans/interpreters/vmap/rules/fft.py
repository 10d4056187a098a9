"""Fourier transforms: the transformed dimensions are renumbered behind the batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo, logical_shape
from functrans.operators.views import wrap_dim
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def fourier_rule(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """The rule of one transform."""

    def fourier(
        info: BatchInfo, in_dims: Sequence[Any], x: Tensor, dims: Sequence[int], *rest: Any
    ) -> tuple[Tensor, int]:
        bdim, rank = in_dims[0], x.dim() - 1
        logical = [wrap_dim(dim, rank) for dim in dims]
        if info.batch_size == 0:
            example = x.new_zeros(logical_shape(x, bdim))
            output = op(example, logical, *rest)
            return output.new_zeros([0, *output.shape]), 0
        return op(x, [dim if dim < bdim else dim + 1 for dim in logical], *rest), bdim

    return fourier


for transform in (aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default):
    BATCHING_RULES.add(transform, fourier_rule(transform), place=f"{__file__}:{fourier_rule.__code__.co_firstlineno}")
