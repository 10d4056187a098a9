"""Products with sparse matrices for which PyTorch has kernels of their own, as others.

No wrapper could hold the matrix for the kernels' derivatives where it is compressed, and ``smm`` and ``sspaddmm`` are
defined by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.functionalization.hidden_effects import enter, stands_in_for
from functrans.operators.info import OpInfo

aten = torch.ops.aten


@stands_in_for(aten._sparse_addmm.default)
def sparse_addmm(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return enter(aten.addmm.default, *args, **kwargs)


@stands_in_for(aten.smm.default)
def smm(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (args[0] @ args[1]).to_sparse()


@stands_in_for(aten.sspaddmm.default)
def sspaddmm(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    start, sparse, dense = args
    return start * kwargs.get("beta", 1) + (sparse @ dense).to_sparse() * kwargs.get("alpha", 1)


@stands_in_for(aten._sparse_mm.reduce)
def reduced(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The sum, mean or extreme of the rows of ``dense`` that a row of the CSR matrix has, each by its factor."""
    sparse, dense, reduce = args
    if reduce == "sum":
        return enter(aten._sparse_mm.default, sparse, dense)
    start, columns, values = sparse.crow_indices(), sparse.col_indices(), sparse.values()
    rows = torch.arange(sparse.shape[0], device=start.device).repeat_interleave(start.diff())
    parts = dense.index_select(0, columns) * values.unsqueeze(1)
    total: Tensor = parts.new_zeros(sparse.shape[0], dense.shape[1])
    return total.scatter_reduce(0, rows.unsqueeze(1).expand_as(parts), parts, reduce, include_self=False)
