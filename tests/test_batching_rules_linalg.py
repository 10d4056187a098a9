"""Every batching rule of linear algebra and Fourier transforms against the loop."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from batching_checker import Call, check_rule, recorded_calls
from rule_cases import rules_of
from torch import Tensor
from torch._ops import OpOverload

import functrans
from functrans.derivatives.nuclear import lyapunov, nuclear, polar
from functrans.interpreters.vmap.rules import fft, linalg, solves
from functrans.interpreters.vmap.rules.linalg import example_is_contiguous
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo

aten = torch.ops.aten

DETERMINANTS = (aten._linalg_det.default, aten._linalg_slogdet.default)
# Lazily conjugated intermediates inside of these operators are lost under the checker's dispatch mode.
REAL_ONLY = (aten.linalg_pinv.atol_rtol_tensor, aten.linalg_lstsq.default)
RULES = rules_of(linalg, solves, fft)
NO_OUTPUT = (aten._linalg_check_errors.default,)


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def definite(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = rand(*shape, dtype=dtype)
    return x @ x.mH + torch.eye(shape[-1], dtype=dtype)


@cache
def from_samples() -> dict[OpOverload, list[Call]]:
    """Calls that PyTorch's samples make, real and complex."""
    parts = ("linalg", "cholesky", "lu", "solve", "qr", "svd", "eig", "det", "inv", "fft", "matrix_exp", "cross")

    def names(name: str) -> bool:
        return any(part in name for part in parts) and not name.startswith("nn.")

    calls: dict[OpOverload, list[Call]] = {op: [] for op in RULES}
    for dtype in (torch.float64, torch.complex128):
        for op, found in recorded_calls(RULES, dtypes=(dtype,), names=names, per_op=6, samples=12).items():
            if op not in REAL_ONLY or dtype is torch.float64:
                calls[op] += found
    return calls


@cache
def by_hand() -> dict[OpOverload, list[Call]]:
    """Calls that the samples do not make: shapes that broadcast, outputs switched off."""
    torch.manual_seed(0)
    calls: dict[OpOverload, list[Call]] = {}

    def add(op: OpOverload, *args: Any, **kwargs: Any) -> None:
        if op in REAL_ONLY and args[0].is_complex():
            return
        calls.setdefault(op, []).append((args, kwargs))

    for dtype in (torch.float64, torch.complex128):
        a, b = definite(3, 3, dtype=dtype), rand(3, 3, dtype=dtype)
        add(aten._linalg_eigvals.default, a)
        add(aten._linalg_svd.default, rand(4, 3, dtype=dtype), False, False)
        add(aten._linalg_eigh.default, a, "L", False)
        add(aten.linalg_qr.default, rand(4, 3, dtype=dtype), "r")
        add(aten.linalg_lu.default, a, pivot=False)
        for matrix, side in (
            (a, b),
            (a, b[0]),
            (definite(2, 3, 3, dtype=dtype), b),
            (definite(2, 3, 3, dtype=dtype), rand(2, 3, dtype=dtype)),
            (a, rand(2, 3, 4, dtype=dtype)),
            (definite(1, 3, 3, dtype=dtype), rand(4, 2, 3, 4, dtype=dtype)),
        ):
            add(aten._linalg_solve_ex.default, matrix, side)
            if side.dim() >= 2 and side.shape[-2] == 3:
                add(aten._linalg_solve_ex.default, matrix, side.mT, left=False)
                add(aten.linalg_solve_triangular.default, matrix, side, upper=True)
                add(aten.triangular_solve.default, side, matrix)
                add(aten.cholesky_solve.default, side, matrix)
                lu, pivots = torch.linalg.lu_factor(matrix)
                add(aten.linalg_lu_solve.default, lu, pivots, side)
                add(aten.lu_unpack.default, lu, pivots, False, True)
                if matrix.shape[:-2] == side.shape[:-2]:
                    factors, pivots, _ = torch.linalg.ldl_factor_ex(matrix)
                    add(aten.linalg_ldl_solve.default, factors, pivots, side)
        tall = rand(5, 3, dtype=dtype)
        for driver in (None, "gelsy", "gels", "gelsd", "gelss"):
            add(aten.linalg_lstsq.default, tall, rand(5, 2, dtype=dtype), driver=driver)
            add(aten.linalg_lstsq.default, tall.mT, rand(3, dtype=dtype), driver=driver)
            add(aten.linalg_lstsq.default, rand(2, 5, 3, dtype=dtype), rand(2, 5, dtype=dtype), driver=driver)
    tolerance = torch.tensor([0.1, 0.2], dtype=torch.float64)
    add(aten.linalg_pinv.atol_rtol_tensor, rand(4, 3), atol=tolerance[0])
    add(aten.linalg_pinv.atol_rtol_tensor, rand(4, 3), rtol=tolerance)
    add(aten.linalg_pinv.atol_rtol_tensor, definite(2, 3, 3), atol=tolerance, rtol=tolerance, hermitian=True)
    add(aten.linalg_cross.default, rand(2, 3, 4), rand(1, 3, 4), dim=-2)
    for dtype in (torch.float64, torch.complex128):
        add(nuclear, rand(2, 4, 3, dtype=dtype))
        add(polar, rand(4, 3, dtype=dtype))
        for shape in ((3, 3), (2, 3, 3)):
            add(lyapunov, definite(*shape, dtype=dtype), rand(*shape, dtype=dtype))
    return calls


@pytest.mark.parametrize("op", [op for op in RULES if op not in DETERMINANTS + NO_OUTPUT], ids=str)
def test_rule_against_the_loop(op: OpOverload) -> None:
    calls = from_samples()[op] + by_hand().get(op, [])
    compared = sum(
        check_rule(op, args, kwargs, batch_sizes=(3, 0) if k % 2 else (3, 1), seed=k)
        for k, (args, kwargs) in enumerate(calls)
    )
    assert compared > 0, f"nothing exercises the rule of {op}"


def factors_rows(x: Tensor, lu: Tensor, pivots: Tensor, transposed: bool) -> None:
    p, lower, upper = torch.lu_unpack(lu, pivots)
    torch.testing.assert_close(p @ lower @ upper, x.mT if transposed else x)


@pytest.mark.parametrize("op", DETERMINANTS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128), ids=str)
@pytest.mark.parametrize("shape", ((4, 4), (2, 4, 4), (0, 0)), ids=str)
def test_determinants(op: OpOverload, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The factors are those of the transposed matrix exactly where an example's strides say so."""
    rule = BATCHING_RULES.get(op)
    assert rule is not None
    batch = rand(3, *shape, dtype=dtype)
    layouts = [batch.movedim(0, bdim).contiguous().movedim(bdim, 0) for bdim in range(batch.dim())]
    layouts += [torch.stack([batch, batch], dim=1)[:, 0], batch.mT.contiguous().mT]
    for x in layouts:
        for bdim in range(x.dim()):
            moved = x.movedim(0, bdim)
            (*values, lu, pivots), dims = rule(BatchInfo(3, "error"), (bdim,), moved)
            assert set(dims) == {0}
            for i in range(3):
                torch.testing.assert_close([value[i] for value in values], list(op(x[i])[: len(values)]))
            contiguous = moved.select(bdim, 0).is_contiguous()
            assert example_is_contiguous(moved, bdim) == contiguous or 0 in shape
            if 0 not in shape:
                factors_rows(x, lu, pivots, contiguous and not dtype.is_complex)


@pytest.mark.parametrize("bdim", (0, 1, 2))
def test_gradient_of_determinants(bdim: int) -> None:
    """PyTorch's derivative asks the matrix for its strides: a mistake there is a wrong gradient, not an error."""
    x = rand(3, 4, 4) + 2 * torch.eye(4, dtype=torch.float64)
    moved = x.movedim(0, bdim).contiguous()
    for f in (torch.linalg.det, lambda a: torch.linalg.slogdet(a)[1]):
        expected = torch.stack([torch.autograd.functional.jacobian(f, a) for a in x])
        torch.testing.assert_close(functrans.vmap(functrans.grad(f), in_dims=bdim)(moved), expected)
        over = functrans.grad(lambda a, f=f: functrans.vmap(f, in_dims=bdim)(a).sum())(moved)
        torch.testing.assert_close(over.movedim(bdim, 0), expected)


def test_right_hand_side_that_looks_like_vectors() -> None:
    """A batch of 3 matrices 3 x 3 with one shared 3 x 3 right-hand side."""
    a, b = definite(3, 3, 3), rand(3, 3)
    expected = torch.stack([torch.linalg.solve(one, b) for one in a])
    torch.testing.assert_close(functrans.vmap(torch.linalg.solve, in_dims=(0, None))(a, b), expected)
    expected = torch.stack([torch.linalg.lstsq(one, b).solution for one in a])
    got = functrans.vmap(lambda a, b: torch.linalg.lstsq(a, b).solution, in_dims=(0, None))(a, b)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("driver", ("gelsy", "gels"))
def test_complex_operators_that_conjugate_inside(driver: str) -> None:
    a, b = rand(3, 5, 3, dtype=torch.complex128), rand(3, 5, 2, dtype=torch.complex128)
    expected = torch.stack([torch.linalg.pinv(one) for one in a])
    torch.testing.assert_close(functrans.vmap(torch.linalg.pinv)(a), expected)
    got = functrans.vmap(lambda a, b: tuple(torch.linalg.lstsq(a, b, driver=driver))[:2])(a, b)
    rows = [torch.linalg.lstsq(one, other, driver=driver) for one, other in zip(a, b)]
    torch.testing.assert_close(got[0], torch.stack([row.solution for row in rows]))
    torch.testing.assert_close(got[1], torch.stack([row.residuals for row in rows]))


def test_ldl_solve_with_a_leading_dimension_of_one() -> None:
    """The kernel reads beyond its factors there; the rule expands them."""
    a, b = definite(1, 3, 3), rand(2, 4, 3, 2)
    factors, pivots = torch.linalg.ldl_factor(a)
    got = functrans.vmap(lambda b: torch.linalg.ldl_solve(factors, pivots, b))(b)
    torch.testing.assert_close(a @ got, b)


def test_singular_example_is_reported() -> None:
    a = definite(3, 3, 3)
    a[1] = 0
    with pytest.raises(torch.linalg.LinAlgError, match="Batch element 1"):
        functrans.vmap(torch.linalg.inv)(a)


@pytest.mark.parametrize("bdim", (0, 1, 2))
def test_what_checks_for_errors_takes_any_layout(bdim: int) -> None:
    check = lambda status: (aten._linalg_check_errors.default(status, "linalg.inv", is_matrix=False), status)[1]
    status = torch.zeros(2, 3, 4, dtype=torch.int32)
    functrans.vmap(check, in_dims=bdim)(status)
    status[1, 1, 1] = 1
    with pytest.raises(torch.linalg.LinAlgError):
        functrans.vmap(check, in_dims=bdim)(status)


@pytest.mark.parametrize("name", ("fft", "rfft", "irfft", "fft2", "rfft2", "irfftn", "fftshift"))
@pytest.mark.parametrize("bdim", (0, 1, 2))
def test_fourier(name: str, bdim: int) -> None:
    f, x = getattr(torch.fft, name), rand(4, 5, 6, dtype=torch.complex128)
    x = x.real if name.startswith("r") else x
    torch.testing.assert_close(functrans.vmap(f, in_dims=bdim)(x), torch.stack([f(one) for one in x.unbind(bdim)]))
