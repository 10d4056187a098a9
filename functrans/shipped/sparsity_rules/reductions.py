"""What depends on all along some dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.shipped.sparsity_level import OperatorCall, pattern_of, pointwise

aten = torch.ops.aten


def dims_of(call: OperatorCall) -> Sequence[int] | None:
    dim = call.named.get("dim")
    return [dim] if isinstance(dim, int) else dim


def carried_by(call: OperatorCall) -> list[Tensor]:
    """The numbers of all arguments that carry some."""
    return [n for x in call.tensors() if (n := call.carried(x)) is not None]


@pattern_of(
    aten.sum.default, aten.sum.dim_IntList, aten.nansum.default, aten.mean.default, aten.mean.dim, aten.prod.default,
    aten.prod.dim_int, aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.max.dim,
    aten.min.dim, aten.aminmax.default, aten.median.default, aten.median.dim, aten.nanmedian.default,
    aten.nanmedian.dim, aten.kthvalue.default, aten.mode.default, aten.logsumexp.default, aten.var.correction,
    aten.std.correction, aten.var_mean.correction, aten.std_mean.correction, aten.linalg_vector_norm.default,
    aten.norm.Scalar, aten.norm.ScalarOpt_dim,
)  # fmt: skip
def reduced(call: OperatorCall) -> Any:
    found = call.sets.union_along(call.numbers(call["self"]), dims_of(call))
    return [found.reshape(o.shape) for o in call.outs]


@pattern_of(
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int,
    aten._log_softmax.default, aten._softmax_backward_data.default, aten._log_softmax_backward_data.default,
    aten.sort.default, aten.sort.stable, aten.topk.default, aten._fft_c2c.default, aten._fft_r2c.default,
    aten._fft_c2r.default,
)  # fmt: skip
def mixed(call: OperatorCall) -> Any:
    """Each line along the dimensions depends on all of itself."""
    dims = dims_of(call)
    if dims == []:
        return pointwise(call)
    found = call.union(*(call.sets.union_along(n, dims) for n in carried_by(call)))
    return [found.expand(o.shape) for o in call.outs]


@pattern_of(
    aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default
)
def scanned(call: OperatorCall) -> Any:
    numbers, dim = call.numbers(call["self"]), call["dim"]
    if numbers.numel() == 0 or numbers.dim() == 0:
        return numbers
    so_far, found = None, []
    for here in numbers.unbind(dim):
        so_far = here if so_far is None else call.sets.union(so_far, here)
        found.append(so_far)
    return torch.stack(found, dim)
