"""Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import family
from functrans.interpreters.vmap.table import BatchInfo, logical_shape
from functrans.operators.views import wrap_dim
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


@family
def fourier(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """The transformed dimensions are renumbered behind the batch dimension."""

    def transform(
        info: BatchInfo, in_dims: Sequence[Any], x: Tensor, dims: Sequence[int], *rest: Any
    ) -> tuple[Tensor, int]:
        bdim, rank = in_dims[0], x.dim() - 1
        logical = [wrap_dim(dim, rank) for dim in dims]
        if info.batch_size == 0:
            example = x.new_zeros(logical_shape(x, bdim))
            output = op(example, logical, *rest)
            return output.new_zeros([0, *output.shape]), 0
        return op(x, [dim if dim < bdim else dim + 1 for dim in logical], *rest), bdim

    return transform


fourier(aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default)
