"""Sparse COO matrices of examples, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functrans as ft
from functrans.errors import DataDependentError

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CHAIN = lambda x: x[1:] * x[:-1].sin()


def matrix(x: Tensor) -> Tensor:
    return ft.sparse_jacobian(CHAIN)(x)


def twice(x: Tensor) -> Tensor:
    """A matrix with two entries at one place, which is not coalesced."""
    return torch.sparse_coo_tensor(torch.tensor([[1, 0, 1], [2, 1, 2]]), x[:3], (2, 4))


def blocks(x: Tensor) -> Tensor:
    """A matrix with a dense dimension."""
    return torch.sparse_coo_tensor(torch.tensor([[2, 0]]), x[:4].view(2, 2), (3, 2)).coalesce()


READ: dict[str, Callable[[Tensor], Any]] = {
    "indices": lambda x: matrix(x).indices(),
    "values": lambda x: matrix(x).values(),
    "dense": lambda x: matrix(x).to_dense(),
    "a copy": lambda x: matrix(x).clone().to_dense(),
    "coalesced": lambda x: twice(x).coalesce().to_dense(),
    "indices, coalesced": lambda x: twice(x).coalesce().indices(),
    "values, coalesced": lambda x: twice(x).coalesce().values(),
    "not coalesced": lambda x: twice(x)._values() * 2,
    "indices, not coalesced": lambda x: twice(x)._indices(),
    "blocks": lambda x: blocks(x).values(),
    "indices of blocks": lambda x: blocks(x).indices(),
    "blocks, dense": lambda x: blocks(x).to_dense(),
    "about it": lambda x: x.new_tensor([matrix(x).is_coalesced(), twice(x).is_coalesced(), blocks(x).sparse_dim(),
                                        blocks(x).dense_dim(), matrix(x)._nnz()]),
    "hessian": lambda x: ft.sparse_hessian(lambda x: CHAIN(x).prod())(x).indices(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
@pytest.mark.parametrize("name", READ)
def test_each_example_has_a_matrix(name: str) -> None:
    f = READ[name]
    torch.testing.assert_close(ft.vmap(f)(X), torch.stack([f(x) for x in X]))
    torch.testing.assert_close(ft.vmap(f, in_dims=1)(X.T), torch.stack([f(x) for x in X]))
    pairs = torch.stack([X, X.flip(1)])
    torch.testing.assert_close(ft.vmap(ft.vmap(f))(pairs), torch.stack([torch.stack([f(x) for x in p]) for p in pairs]))


def test_what_is_not_coalesced_is_refused_as_without_vmap() -> None:
    with pytest.raises(RuntimeError, match="uncoalesced tensor, please call"):
        ft.vmap(lambda x: twice(x).indices())(X)


def test_entries_that_differ_in_number_are_no_batch() -> None:
    masks = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    with pytest.raises(DataDependentError, match="it has another number of entries for each example"):
        ft.vmap(lambda m: m.to_sparse().coalesce().indices())(masks)
    same = masks.fliplr()
    same[1] += torch.tensor([0.0, 4.0, 0.0])
    found = ft.vmap(lambda m: m.to_sparse().coalesce().indices())(same)
    assert found.tolist() == [[[0, 2]], [[1, 2]]]


SMOOTH = {name: READ[name] for name in ("values", "dense", "coalesced", "values, coalesced", "blocks, dense")}


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
@pytest.mark.parametrize("name", SMOOTH)
def test_its_derivatives(name: str) -> None:
    f = SMOOTH[name]
    step = 1e-6 * torch.eye(5, dtype=X.dtype)
    by_differences = torch.stack([(f(X[0] + d) - f(X[0] - d)) / 2e-6 for d in step], -1)
    for jacobian in (ft.jacrev, ft.jacfwd):
        torch.testing.assert_close(jacobian(f)(X[0]), by_differences, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(ft.vmap(jacobian(f))(X), torch.stack([jacobian(f)(x) for x in X]))
    _, pushed = ft.linearize(f, X[0])
    torch.testing.assert_close(pushed(X[1]), by_differences @ X[1], rtol=1e-6, atol=1e-8)
    loss = lambda x: f(x).square().sum()
    hessian = torch.stack([(ft.grad(loss)(X[0] + d) - ft.grad(loss)(X[0] - d)) / 2e-6 for d in step])
    torch.testing.assert_close(ft.hessian(loss)(X[0]), hessian, rtol=1e-6, atol=1e-7)


def test_unmasked_gradients_of_a_sparse_argument() -> None:
    """``masked_grad=False``: zeros that are not stored have a gradient, too, as in PyTorch."""
    a = torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse()
    for masked in (None, True, False):
        found = ft.grad(lambda a, masked=masked: a.to_dense(masked_grad=masked).exp().sum())(a)
        leaf = a.clone().requires_grad_()
        leaf.to_dense(masked_grad=masked).exp().sum().backward()
        torch.testing.assert_close(found.to_dense(), leaf.grad.to_dense())
