"""Autocast inside of transforms, and transforms inside of autocast: the dtypes of eager PyTorch, of results and of
gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrans import grad, jacrev, jvp, linear_transpose, linearize, vjp, vmap


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def autocast(enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def without(x: Tensor, w: Tensor) -> Tensor:
    with autocast(enabled=False):
        return x.float() @ w


ROWS, WEIGHT, WEIGHTS = random(3, 4, 4), random(4, 4, seed=1), random(2, 4, 4, seed=2)
LABELS = torch.tensor([0, 1, 2, 3])
CELL, ATTENTION = nn.GRUCell(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
RECURRENT = {"tanh": nn.RNN(4, 4), "relu, two layers": nn.RNN(4, 4, 2, nonlinearity="relu"), "gates": nn.GRU(4, 4)}

#: What autocast chooses a dtype for, what is made of such operators, and what is neither.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x @ WEIGHT,
    "layer": lambda x: F.linear(x, WEIGHT, WEIGHT[0]),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, WEIGHT),
    "einsum of three": lambda x: torch.einsum("ij,jk,kl->il", x, WEIGHT, x),
    "tensordot": lambda x: torch.tensordot(x, WEIGHT, 1),
    "multi_dot": lambda x: torch.linalg.multi_dot([x, WEIGHT, WEIGHT]),
    "captured einsum": lambda x: torch.einsum("ij,jk->ik", WEIGHT, WEIGHT) * x[0, 0].bfloat16(),
    "captured multi_dot": lambda x: torch.linalg.multi_dot([WEIGHT, WEIGHT, WEIGHT]) * x[0, 0].bfloat16(),
    "captured matrix_power": lambda x: torch.linalg.matrix_power(WEIGHT / 4, 3) * x[0, 0].bfloat16(),
    "captured, and distances in single precision": lambda x: torch.cdist(WEIGHT, WEIGHT) * x[0, 0],
    "inner": lambda x: torch.inner(x, WEIGHT),
    "matrix_power": lambda x: torch.linalg.matrix_power(x / 4, 3),
    "convolution": lambda x: F.conv1d(x.unsqueeze(0), WEIGHTS.transpose(1, 2)[:, :, :2]),
    "nll_loss": lambda x: F.nll_loss(F.log_softmax(x @ WEIGHT, -1), LABELS),
    "cross_entropy": lambda x: F.cross_entropy(x @ WEIGHT, LABELS),
    "attention": lambda x: F.scaled_dot_product_attention(x, WEIGHT, WEIGHT),
    "module of attention": lambda x: ATTENTION(x.unsqueeze(0), x.unsqueeze(0), x.unsqueeze(0))[0],
    "recurrent cell": lambda x: CELL(x),
    **{f"recurrent, {name}": lambda x, layer=layer: layer(x)[0] for name, layer in RECURRENT.items()},
    "cat": lambda x: torch.cat([x @ WEIGHT, x]),
    "layer_norm": lambda x: F.layer_norm(x @ WEIGHT, (4,)),
    "norm": lambda x: (x @ WEIGHT).norm(),
    "switched off inside": lambda x: without(x, WEIGHT),
    "off, and on again": lambda x: torch.einsum("ij,jk->ik", without(x, WEIGHT).tanh(), WEIGHT),
    "a write": lambda x: torch.zeros(4, 4).copy_(torch.einsum("ij,jk->ik", x, WEIGHT)),
    "pointwise": lambda x: x.sin() * 2,
}


def total(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def summed(x: Tensor) -> Tensor:
        out = f(x).float()
        return (out * torch.cos(torch.arange(out.numel())).view(out.shape)).sum()

    return summed


def eager_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(total(f)(x), x)[0]


def check(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    size = float(expected.abs().max()) + 1e-3
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.06 * size)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_and_numbers_are_those_of_eager(name: str, inside: bool) -> None:
    def f(x: Tensor) -> Tensor:
        with autocast() if inside else nullcontext():
            return FUNCTIONS[name](x)

    x, v = ROWS[0], ROWS[1]
    with nullcontext() if inside else autocast():
        value = f(x).detach()
        check(vjp(f, x)[0].detach(), value)
        out, tangent = jvp(f, (x,), (v,))
        check(out.detach(), value)
        assert tangent.dtype is out.dtype
        expected = torch.stack([f(row).detach() for row in ROWS])
        for batch in (0, -1):
            check(vmap(f, in_dims=batch)(ROWS.movedim(0, batch).contiguous()).detach(), expected)
        gradients = torch.stack([eager_gradient(f, row) for row in ROWS])
        check(grad(total(f))(x), gradients[0])
        check(vmap(grad(total(f)))(ROWS), gradients)
        check(grad(lambda rows: vmap(total(f))(rows).sum())(ROWS), gradients)
        pairing = (tangent.float() * torch.cos(torch.arange(out.numel())).view(out.shape)).sum()
        size = float(value.float().norm() * v.norm())
        torch.testing.assert_close(pairing.detach(), (gradients[0] * v).sum(), rtol=0, atol=0.05 * size + 0.01)
    assert not torch.is_autocast_enabled("cpu")


def test_pieces_are_seen_by_the_dtypes() -> None:
    """What the test above tells apart: an einsum past autocast is in single precision."""
    with autocast():
        assert FUNCTIONS["einsum"](ROWS[0]).dtype is torch.bfloat16
    assert FUNCTIONS["einsum"](ROWS[0]).dtype is torch.float32


@pytest.mark.parametrize("name", ["einsum", "attention", "off, and on again", "switched off inside"])
def test_gradients_have_the_dtype_of_the_argument(name: str) -> None:
    """Formulas work in the dtypes that autocast chose before, whether it is on by now or not."""
    f, x = FUNCTIONS[name], ROWS[0]
    with autocast():
        expected = eager_gradient(f, x)
        out, pullback = vjp(f, x)
        cotangent = torch.cos(torch.arange(16.0)).view(4, 4).to(out.dtype)
        check(pullback(cotangent)[0], expected)
        assert jacrev(f)(x).dtype is torch.float32
        value, jvp_fn = linearize(f, x)
        assert jvp_fn(ROWS[1]).dtype is value.dtype is out.dtype

        def penalty(x: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(f(x).float().sum(), x, create_graph=True)
            assert slope.dtype is torch.float32
            return (slope**2).sum()

        assert grad(penalty)(x).dtype is torch.float32
    check(pullback(cotangent)[0], expected)
    assert jvp_fn(ROWS[1]).dtype is out.dtype
    with autocast():
        matrix = linear_transpose(lambda x: without(x, WEIGHT), x)(torch.ones(4, 4))[0]
    torch.testing.assert_close(matrix, torch.ones(4, 4) @ WEIGHT.mT)


def test_an_error_leaves_autocast_as_it_was() -> None:
    with autocast():
        with pytest.raises(RuntimeError):
            vmap(lambda x: torch.einsum("ij,jk->ik", x, WEIGHT[:3]))(ROWS)
        assert torch.is_autocast_enabled("cpu") and torch._C._len_torch_dispatch_stack() == 0
        assert (ROWS[0] @ WEIGHT).dtype is torch.bfloat16
    assert (ROWS[0] @ WEIGHT).dtype is torch.float32
