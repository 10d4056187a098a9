"""Sparse tensors where PyTorch has no kernel for them.

NOTE [Sparse operands]
PyTorch's sparse kernels are few, and those of derivatives and batches fewer. Nothing looks for sparse tensors before it
runs an operator; what fails with one among its arguments is run again in another way that is right: for one example
after the other (vmap), or, where a formula fails that the user did not write, with dense tensors in their place
(grad, jvp). What then still fails is an error that says what to write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: of a tensor that is sparse
LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def has_sparse(values: Any) -> bool:
    """Whether one of the tensors in a nest of lists, tuples and dicts is sparse."""
    if isinstance(values, Tensor):
        return values.layout in LAYOUTS
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return False
    return any(map(has_sparse, values))


def densified(values: Any) -> Any:
    """The same with dense tensors in the place of sparse ones."""
    if isinstance(values, Tensor):
        return values.to_dense() if values.layout in LAYOUTS else values
    if isinstance(values, dict):
        return {name: densified(v) for name, v in values.items()}
    return type(values)(map(densified, values)) if type(values) in (list, tuple) else values


def in_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """``x``, of which the numbers at the places of ``like`` count if that is sparse."""
    if x.layout is like.layout:
        return x
    if like.layout is torch.strided:
        return x.to_dense()
    indices = (like if like.is_coalesced() else like.coalesce()).indices()
    values = x[tuple(indices.unbind(0))]
    return coalesced(indices, values, like.shape)


def coalesced(indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A COO tensor with its entries in order, none of them twice, as is known and not looked at."""
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True, check_invariants=False)
