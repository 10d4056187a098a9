"""Entries for linear algebra, Fourier transforms, distances and circular padding, against PyTorch's own derivatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from derivative_checker import Call, check_entry
from torch import Tensor

import functrans
from functrans.derivatives import distances, linalg
from functrans.derivatives.table import DERIVATIVES

aten = torch.ops.aten
FILES = {m.__file__ for m in (distances, linalg)}
ENTRIES = [op for op in DERIVATIVES if DERIVATIVES.place(op).rsplit(":", 1)[0] in FILES]
DTYPES = (torch.float64, torch.complex128)
INF = math.inf


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def definite(*shape: int, dtype: torch.dtype) -> Tensor:
    x = randn(*shape, dtype=dtype)
    return x @ x.mH + torch.eye(shape[-1], dtype=dtype)


def solver_calls(dtype: torch.dtype) -> list[Call]:
    calls: list[Call] = []
    for a, b in (
        ((3, 3), (3,)),
        ((3, 3), (3, 2)),
        ((2, 3, 3), (2, 3)),
        ((2, 3, 3), (3,)),
        ((2, 1, 3, 3), (4, 3, 2)),
        ((3, 3), (2, 3, 2)),
    ):
        calls.append(Call(aten._linalg_solve_ex.default, (randn(*a, dtype=dtype), randn(*b, dtype=dtype)), {}))
    calls.append(
        Call(aten._linalg_solve_ex.default, (randn(2, 3, 3, dtype=dtype), randn(4, 3, dtype=dtype)), {"left": False})
    )
    for upper, left, unit in itertools.product((False, True), repeat=3):
        for a, b in (((3, 3), (3, 3)), ((2, 3, 3), (3, 3)), ((3, 3), (2, 3, 3))):
            options = {"upper": upper, "left": left, "unitriangular": unit}
            matrix = randn(*a, dtype=dtype) + 2 * torch.eye(3)
            calls.append(Call(aten.linalg_solve_triangular.default, (matrix, randn(*b, dtype=dtype)), options))
    return calls


def cholesky_calls(dtype: torch.dtype) -> list[Call]:
    calls: list[Call] = []
    for upper in (False, True):
        calls.append(Call(aten.linalg_cholesky_ex.default, (definite(2, 3, 3, dtype=dtype),), {"upper": upper}))
        factor = torch.linalg.cholesky(definite(2, 3, 3, dtype=dtype), upper=upper)
        calls.append(Call(aten.cholesky_inverse.default, (factor[0], upper)))
        calls.append(Call(aten.cholesky_inverse.default, (factor, upper)))
        for b in ((2, 3, 4), (3, 1), (5, 1, 3, 1)):
            calls.append(Call(aten.cholesky_solve.default, (randn(*b, dtype=dtype), factor, upper)))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_algebra(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    calls = solver_calls(dtype) + cholesky_calls(dtype)
    for shape in ((3, 3), (2, 1, 3, 3)):
        calls.append(Call(aten.linalg_inv_ex.default, (randn(*shape, dtype=dtype),)))
        calls.append(Call(aten._linalg_slogdet.default, (randn(*shape, dtype=dtype),)))
    assert {call.op for call in calls} == {
        op for op in ENTRIES if DERIVATIVES.place(op).startswith(str(linalg.__file__))
    }
    for call in calls:
        # A factor is of the Hermitian part, or of the lower triangle; beyond the first order PyTorch mixes the two.
        order = 1 if call.op is aten.linalg_cholesky_ex.default else 2
        # PyTorch's tangent of cholesky_inverse is not the derivative (torch 2.13); see the test below.
        check_entry(call, order=order, trust_forward=call.op is not aten.cholesky_inverse.default)


@pytest.mark.parametrize("upper", [False, True])
def test_tangent_of_an_inverse_from_its_factor(upper: bool) -> None:
    """Against finite differences."""
    torch.manual_seed(0)
    factor = torch.linalg.cholesky(definite(3, 3, dtype=torch.float64), upper=upper)
    tangent = randn(3, 3).triu() if upper else randn(3, 3).tril()
    got = functrans.jvp(lambda x: torch.cholesky_inverse(x, upper), (factor,), (tangent,))[1]
    ends = [torch.cholesky_inverse(factor + step * tangent, upper) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(got, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("upper", [False, True])
def test_higher_derivatives_of_a_cholesky_factor(upper: bool) -> None:
    torch.manual_seed(0)
    root, weight = randn(3, 3), randn(3, 3)

    def f(root: Tensor) -> Tensor:
        return (torch.linalg.cholesky(root @ root.mT + torch.eye(3), upper=upper) * weight).sin().sum()

    expected = torch.autograd.functional.hessian(f, root)
    torch.testing.assert_close(functrans.hessian(f)(root), expected)
    torch.testing.assert_close(functrans.jacrev(functrans.jacrev(f))(root), expected)
    third = torch.autograd.functional.jacobian(
        lambda r: torch.autograd.functional.hessian(f, r, create_graph=True), root
    )
    torch.testing.assert_close(functrans.jacfwd(functrans.hessian(f))(root), third)


def pairs(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``pdist`` in pieces that PyTorch differentiates as often as one likes."""

    def of_pairs(x: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(len(x), len(x), 1).unbind(0)
        return f(x[rows] - x[columns])

    return of_pairs


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0, 3.0, INF])
def test_distances(p: float) -> None:
    """PyTorch has the gradients alone: first order, and the oracle of tangents is the definition."""
    torch.manual_seed(0)

    def norm(d: Tensor) -> Tensor:
        return torch.linalg.vector_norm(d, p, -1)

    check_entry(Call(aten._pdist_forward.default, (randn(5, 3), p)), order=1, native=lambda x, p: pairs(norm)(x))
    for left, right in (((4, 3), (5, 3)), ((2, 4, 3), (5, 3)), ((4, 3), (2, 5, 3))):
        call = Call(aten._cdist_forward.default, (randn(*left), randn(*right), p, None))
        check_entry(call, order=1, native=lambda x, y, *_: norm(x.unsqueeze(-2) - y.unsqueeze(-3)))


def test_distances_by_a_product() -> None:
    torch.manual_seed(0)
    for left, right in (((4, 3), (5, 3)), ((2, 4, 3), (5, 3)), ((4, 3), (2, 5, 3))):
        check_entry(
            Call(aten._euclidean_dist.default, (randn(*left), randn(*right))),
            native=lambda x, y: torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), 2, -1),
        )


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0, 3.0, INF])
def test_vectors_that_coincide(p: float) -> None:
    """The subgradient at no distance is 0, in both modes."""
    torch.manual_seed(0)
    x, tangent, weight = randn(5, 3), randn(5, 3), randn(10)
    x[3] = x[1]

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.pdist(x, p) @ weight

    slope = functrans.grad(f)(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(f(leaf), leaf)[0])
    torch.testing.assert_close(functrans.jvp(f, (x,), (tangent,))[1], (slope * tangent).sum())


@pytest.mark.parametrize("pad", [(1, 2), (5, 5), (0, 3), (-1, 2), (-2, -1), (4, 0)], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_circular_padding(dims: int, pad: tuple[int, int]) -> None:
    torch.manual_seed(0)
    call = Call(aten._pad_circular.default, (randn(2, 1, *[5] * dims), list(pad * dims)))
    check_entry(call)
    x = randn(3, 2, 1, *[5] * dims)
    program: Any = functrans.vmap(lambda x: torch.nn.functional.pad(x, pad * dims, mode="circular"), in_dims=1)
    expected = torch.stack([torch.nn.functional.pad(one, pad * dims, mode="circular") for one in x])
    torch.testing.assert_close(program(x.movedim(0, 1)), expected)


SHAPES = [(5,), (6,), (1,), (2,), (3, 4), (4, 5), (2, 3, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fourier_transforms(shape: tuple[int, ...]) -> None:
    """Spectra of even and odd length, complete and halved, along any dimensions."""
    torch.manual_seed(0)
    x, spectrum = randn(*shape), randn(*shape, dtype=torch.complex128)
    orders = [order for d in range(1, len(shape) + 1) for order in itertools.permutations(range(len(shape)), d)]
    for order, norm in itertools.product(orders, (0, 1, 2)):
        dims, half = list(order), shape[order[-1]]
        for flag in (True, False):
            check_entry(Call(aten._fft_r2c.default, (x, dims, norm, flag)))
            check_entry(Call(aten._fft_c2c.default, (spectrum, dims, norm, flag)))
        for n in (2 * half - 2, 2 * half - 1):
            if n:
                check_entry(Call(aten._fft_c2r.default, (spectrum, dims, norm, n)))
    check_entry(Call(aten._fft_r2c.default, (x.float(), [-1], 0, True)))
