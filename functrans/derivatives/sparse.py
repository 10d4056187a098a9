"""Derivatives of conversions to the sparse COO layout and back, of its constructor, ``torch.sparse.mm`` and softmax.

PyTorch's own of the former go through ``_values``, which has no derivative, so that second and forward derivatives
would be lost in silence; that of the product would have a wrapper hold the sparse matrix, which may be compressed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.derivatives.matmul import adjoint
from functrans.derivatives.named import no_cotangent
from functrans.derivatives.table import derivative
from functrans.tensors.sparse import coalesced, in_layout_of

aten = torch.ops.aten


def dense(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.to_dense()


def sparse_values(grad: Tensor, indices: Tensor) -> Tensor:
    return dense(grad)[tuple(indices.unbind(0))]


def sparse_entries(grad: Tensor, self: Tensor) -> Tensor:
    """What is known of a sparse matrix: its entries, which are no others for having been zeros."""
    return in_layout_of(dense(grad.to(self.dtype)), self)


def of_dense(grad: Tensor, self: Tensor, masked_grad: bool | None) -> Tensor:
    return grad.to(self.dtype).to_sparse(self.sparse_dim()) if masked_grad is False else sparse_entries(grad, self)


derivative(aten._coalesce.default, tangent="linear", self=lambda grad: grad)
derivative(aten._to_dense.default, tangent="linear", self=of_dense)
for _op in (aten._to_sparse.default, aten._to_sparse.sparse_dim):
    derivative(_op, tangent="linear", self=dense)
derivative(aten._sparse_coo_tensor_with_dims_and_tensors.default, tangent="linear", values=sparse_values)
derivative(aten._sparse_mm.default, tangent="multilinear", dense=lambda grad, sparse: adjoint(sparse).mm(grad))
derivative(
    aten._sparse_sparse_matmul.default,
    tangent="multilinear",
    self=lambda grad, other: dense(grad) @ adjoint(other),
    other=lambda grad, self: adjoint(self) @ dense(grad),
)
derivative(
    aten.sparse_mask.default,
    tangent=lambda self_t, mask: self_t.sparse_mask(mask),
    self=lambda grad, mask: in_layout_of(dense(grad), mask).to_dense(),
    mask=no_cotangent,  # type: ignore[arg-type]
)


def sum_over(grad: Tensor, self: Tensor, dim: list[int]) -> Tensor:
    grad = dense(grad)
    for d in sorted(d % self.dim() for d in dim):
        grad = grad.unsqueeze(d)
    return grad.expand(self.shape)


derivative(aten._sparse_sum.dim, tangent="linear", self=sum_over)


# The Jacobian of softmax is symmetric. That of its logarithm is the same, each row by the softmax. (PyTorch's backward
# operators take a negative dimension for another one.)


def softmax_backward(grad: Tensor, result: Tensor, dim: int, self: Tensor) -> Tensor:
    return aten._sparse_softmax_backward_data.default(grad, result, dim % self.dim(), self)


def log_softmax_backward(grad: Tensor, result: Tensor, dim: int, self: Tensor) -> Tensor:
    return aten._sparse_log_softmax_backward_data.default(grad, result, dim % self.dim(), self)


def log_softmax_tangent(self_t: Tensor, result: Tensor, dim: int, self: Tensor) -> Tensor:
    share = coalesced(result.indices(), result.values().exp(), result.shape)
    moved = softmax_backward(self_t, share, dim, self).coalesce()
    return coalesced(result.indices(), moved.values() / share.values(), result.shape)


derivative(
    aten._sparse_softmax.default,
    tangent=lambda self_t, result, dim, self: softmax_backward(self_t, result, dim, self),
    self=softmax_backward,
)
derivative(aten._sparse_log_softmax.default, tangent=log_softmax_tangent, self=log_softmax_backward)
