"""Batching rules of distances between the vectors of two sets, or of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined, family, pad_rank
from functrans.interpreters.vmap.table import (
    BatchInfo,
    Dims,
    Output,
    batching_rule,
    logical_rank,
    materialize,
    to_front,
)
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


@family
def distances(op: OpOverload) -> Callable[..., Output]:
    """``op(x, y, ...)`` of matrices, with leading dimensions that broadcast."""

    def distance(info: BatchInfo, in_dims: Dims, x: Tensor, y: Tensor, *args: Any) -> Output:
        rank = max(logical_rank(v, d) for v, d in zip((x, y), in_dims))
        if min(logical_rank(v, d) for v, d in zip((x, y), in_dims)) < 2:
            raise RuleDeclined(f"{op} takes matrices")
        x, y = (pad_rank(materialize(v, d, info.batch_size), 0, rank) for v, d in zip((x, y), in_dims))
        return op(x, y, *args), 0

    return distance


distances(aten.cdist.default, aten._cdist_forward.default, aten._euclidean_dist.default)


@batching_rule(aten._cdist_backward.default)
def cdist_backward(
    info: BatchInfo, in_dims: Dims, grad: Tensor, x: Tensor, y: Tensor, p: float, cdist: Tensor
) -> Output:
    """``x`` and ``y`` broadcast to the leading dimensions of the output, and so does the result."""
    size = info.batch_size
    grad, cdist = (materialize(v, d, size).contiguous() for v, d in ((grad, in_dims[0]), (cdist, in_dims[4])))
    x, y = (pad_rank(materialize(v, d, size), 0, grad.dim() - 1) for v, d in ((x, in_dims[1]), (y, in_dims[2])))
    x, y = (v.expand(*grad.shape[:-2], *v.shape[-2:]).contiguous() for v in (x, y))
    return aten._cdist_backward.default(grad, x, y, p, cdist), 0


# ---------------------------------------------------------------------------------------------------------------
# Pairs from one set, in the order of ``torch.combinations``

#: ``compute_mode`` of ``_cdist_forward``: differences, not a matrix product, which is less exact
WITHOUT_PRODUCT = 2

# From this many products on, the kernel for one set, which halves the work and takes no batch, is faster called for
# each.
LARGE_SET = 8192


@batching_rule(aten._pdist_forward.default)
def pdist_forward(info: BatchInfo, in_dims: Dims, x: Tensor, p: float = 2) -> Output:
    """From the distances of all to all; from the kernel itself where that is less work."""
    x = to_front(x, in_dims[0])
    size, n, width = x.shape
    if n < 2:  # no pairs, in any dtype
        return x.new_empty(size, 0), 0
    if x.device.type == "cpu" and n * n * width >= LARGE_SET and size > 0:
        return torch.stack([aten._pdist_forward.default(one, p) for one in x.contiguous().unbind(0)]), 0
    whole = aten._cdist_forward.default(x, x, p, WITHOUT_PRODUCT)
    return whole.reshape(size, n * n).index_select(1, upper_places(n, x.device)), 0


@batching_rule(aten._pdist_backward.default)
def pdist_backward(info: BatchInfo, in_dims: Dims, grad: Tensor, x: Tensor, p: float, pdist: Tensor) -> Output:
    """``_cdist_backward`` with symmetric matrices: each pair counts for both of its vectors."""
    size = info.batch_size
    grad, x, pdist = (materialize(v, d, size) for v, d in ((grad, in_dims[0]), (x, in_dims[1]), (pdist, in_dims[3])))
    x = x.contiguous()
    grad, pdist = (symmetric(v, x.shape[1]) for v in (grad, pdist))
    return aten._cdist_backward.default(grad, x, x, p, pdist), 0


def upper_places(n: int, device: torch.device) -> Tensor:
    """Where the pairs stand in a flat ``n x n`` matrix."""
    rows, columns = torch.triu_indices(n, n, 1, device=device).unbind(0)
    return rows * n + columns


def symmetric(pairs: Tensor, n: int) -> Tensor:
    """``[B, n * (n - 1) / 2]`` as symmetric matrices with zeros on the diagonal."""
    upper = pairs.new_zeros(pairs.shape[0], n * n).index_copy(1, upper_places(n, pairs.device), pairs)
    upper = upper.reshape(pairs.shape[0], n, n)
    return upper + upper.mT
