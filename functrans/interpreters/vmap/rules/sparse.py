"""Products with a sparse matrix, of which there is no batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import BatchInfo, batching_rule

aten = torch.ops.aten


@batching_rule(aten._sparse_mm.default)
def sparse_mm(info: BatchInfo, in_dims: Sequence[Any], sparse: Tensor, dense: Tensor) -> tuple[Tensor, int]:
    """A batch of dense matrices joins their columns."""
    if in_dims[0] is not None:
        raise RuleDeclined("sparse.mm: there is no batch of sparse matrices")
    dense = dense.movedim(in_dims[1], 1)
    out = aten._sparse_mm.default(sparse, dense.flatten(1))
    return out.unflatten(1, dense.shape[1:]), 1
