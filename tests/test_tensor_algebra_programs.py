"""Composite functions of tensors, as programs of linear algebra and of shapes use them, and programs that failed once:
against loops and PyTorch's autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from slow_ways import some
from torch import Tensor
from torch.nn import functional

from functrans import grad, hessian, jvp, vmap
from functrans.errors import CallIndexError, InsideTransformError

F64 = torch.float64


def rearranged(x: Tensor, order: str, split: int) -> Tensor:
    """``(a b) c -> b (c a)``, as libraries of patterns do it."""
    a, c = split, x.shape[1]
    parts = x.reshape(a, -1, c)
    return parts.permute(*["abc".index(name) for name in order]).reshape(parts.shape["abc".index(order[0])], -1)


#: Functions of a tensor of shape (4, 5).
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensordot": lambda x: torch.tensordot(x, x, ([0], [0])),
    "tensordot with a captured one": lambda x: torch.tensordot(x, torch.ones(4, 5, dtype=F64), 2),
    "tensordot of one dimension": lambda x: torch.tensordot(x, x.T, 1),
    "block_diag": lambda x: torch.block_diag(x, x[0], x[0, 0]),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0], x[1]),
    "cartesian_prod of one": lambda x: torch.cartesian_prod(x[0]),
    "combinations": lambda x: torch.combinations(x[0], 2),
    "einsum": lambda x: torch.einsum("ab,cb->ac", x, x),
    "multi_dot": lambda x: torch.linalg.multi_dot([x, x.T, x]),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[0])[1],
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij")[0],
    "cdist": lambda x: torch.cdist(x, x + 1),
    "kron": lambda x: torch.kron(x, x),
    "norm": lambda x: torch.norm(x, dim=0),
    "patterns": lambda x: rearranged(x, "bca", 2),
    "hardsigmoid": lambda x: functional.hardsigmoid(4 * x),
    "hardswish": lambda x: functional.hardswish(4 * x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    f = FUNCTIONS[name]
    x, batch = some(4, 5), some(3, 4, 5, seed=1)

    def loss(x: Tensor) -> Tensor:
        return (f(x) ** 2).sum()

    def slope(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    torch.testing.assert_close(vmap(f)(batch), torch.stack([f(x) for x in batch]))
    slopes = torch.stack([slope(x) for x in batch])
    torch.testing.assert_close(vmap(grad(loss))(batch), slopes)
    torch.testing.assert_close(grad(lambda b: vmap(loss)(b).sum())(batch), slopes)
    v, h = some(4, 5, seed=2), 1e-6
    torch.testing.assert_close(jvp(loss, (x,), (v,))[1], (slope(x) * v).sum())
    along = (slope(x + h * v) - slope(x - h * v)) / (2 * h)
    torch.testing.assert_close(jvp(grad(loss), (x,), (v,))[1], along, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hessian(loss)(x).flatten(2) @ v.flatten(), along, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [-5, -4, 3, 7])
def test_an_out_dim_out_of_range_is_an_index_error(place: int) -> None:
    with pytest.raises(CallIndexError) as info:
        vmap(lambda x: x.sum(0), out_dims=place)(some(3, 4, 5))
    assert isinstance(info.value, IndexError)
    with pytest.raises(IndexError):
        torch.func.vmap(lambda x: x.sum(0), out_dims=place)(some(3, 4, 5))


def test_as_strided_of_examples_that_lie_between_each_other_is_refused() -> None:
    """The strides that such an example shows are those of a loop only if it is the caller's own memory."""
    with pytest.raises(InsideTransformError, match="lay between each other"):
        vmap(lambda x: (x * 2).as_strided((2,), (2,)), in_dims=1)(some(4, 2))
