"""Derivatives of linear algebra up to third order, in every mix of forward and reverse mode,
at regular and at singular matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from four_mixes import along, check_mixes, derivative
from slow_ways import some
from torch import Tensor

from functrans import grad, hessian, jacfwd, jvp, vmap

linalg = torch.linalg
DTYPES = (torch.float64, torch.complex128)


def of_rank(rank: int, n: int, dtype: torch.dtype) -> Tensor:
    return some(n, rank, dtype=dtype, seed=1) @ some(rank, n, dtype=dtype, seed=2)


def matrices(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "regular": some(3, 3, dtype=dtype),
        "identity": torch.eye(3, dtype=dtype),
        "rank n - 1": of_rank(2, 3, dtype),
        "rank n - 2": of_rank(2, 4, dtype),
        "nearly singular": of_rank(2, 3, dtype) + 1e-9 * some(3, 3, dtype=dtype, seed=3),
        "ill-conditioned": torch.diag(torch.tensor([1.0, 1e-3, 1e-5, 1e-7])).to(dtype)
        + 1e-8 * some(4, 4, dtype=dtype),
        "zero": torch.zeros(3, 3, dtype=dtype),
        "zero of size 1": torch.zeros(1, 1, dtype=dtype),
        "size 1": some(1, 1, dtype=dtype),
        "size 0": torch.zeros(0, 0, dtype=dtype),
        "regular and singular": torch.stack(
            [some(3, 3, dtype=dtype), of_rank(1, 3, dtype), torch.eye(3, dtype=dtype)]
        ),
        "transposed": some(3, 3, dtype=dtype).mT,
        "no matrices": torch.zeros(0, 3, 3, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", matrices(torch.float64))
def test_determinant(name: str, dtype: torch.dtype) -> None:
    a = matrices(dtype)[name]
    f = along(linalg.det, (a,))
    if a.numel() == 0:
        assert all(
            float(derivative(f, mix)(torch.tensor(0.0, dtype=torch.float64))) == 0 for mix in ("f", "r", "fr", "rr")
        )
    else:
        check_mixes(f)


def test_determinant_closed_forms() -> None:
    def f(t: Tensor) -> Tensor:
        return linalg.det(torch.stack([torch.stack([t, t * 0 + 1]), torch.stack([t * 0 + 1, t])]))

    for mix in ("ff", "fr", "rf", "rr"):
        assert float(derivative(f, mix)(torch.tensor(3.0))) == pytest.approx(2, rel=1e-5)
    # the second derivative by a[i, j] and a[k, l] is the minor without these rows and columns
    expected = torch.zeros(3, 3, 3, 3)
    for i in range(3):
        for k in range(3):
            if i != k:
                expected[i, i, k, k], expected[i, k, k, i] = 1, -1
    for second in (hessian(linalg.det), jacfwd(jacfwd(linalg.det)), jacfwd(grad(linalg.det))):
        torch.testing.assert_close(second(torch.eye(3)), expected)


def test_determinant_of_a_larger_null_space() -> None:
    """A derivative of order n of a zero matrix of size n: n! times the determinant of the direction."""
    d = some(5, 5)
    f = lambda t: linalg.det(t * d)
    for mix in ("frfrf", "rrrrr", "fffff"):
        torch.testing.assert_close(derivative(f, mix)(torch.zeros((), dtype=torch.float64)), 120 * linalg.det(d))


def test_determinants_of_a_batch() -> None:
    batch = matrices(torch.float64)["regular and singular"]
    d = some(3, 3, 3, seed=4)
    f = lambda a, d: jvp(lambda a: (grad(linalg.det)(a) * d).sum(), (a,), (d.mT,))[1]
    torch.testing.assert_close(vmap(f)(batch, d), torch.stack([f(a, e) for a, e in zip(batch, d, strict=True)]))
    torch.testing.assert_close(vmap(hessian(linalg.det))(batch), torch.stack([hessian(linalg.det)(a) for a in batch]))


def shifted(a: Tensor) -> Tensor:
    return a + 3 * torch.eye(a.shape[-1], dtype=a.dtype)


def definite(a: Tensor) -> Tensor:
    return a @ a.mH + torch.eye(a.shape[-1], dtype=a.dtype)


def hermitian(a: Tensor) -> Tensor:
    return a + a.mH


def sine(w: Tensor, v: Tensor) -> Tensor:
    """The sine of a matrix, by its eigenvalues and eigenvectors."""
    return v @ torch.diag_embed(w.sin()) @ linalg.inv(v)


def projections(w: Tensor, v: Tensor) -> Tensor:
    return (v * torch.arange(v.shape[-1]).to(v.dtype)) @ v.mH


SQUARE: dict[str, Callable[..., Any]] = {
    "slogdet": lambda a: linalg.slogdet(shifted(a)),
    "logdet": lambda a: torch.logdet(definite(a)),
    "inv": lambda a: linalg.inv(shifted(a)),
    "inv_ex": lambda a: linalg.inv_ex(shifted(a))[0],
    "pinv hermitian": lambda a: linalg.pinv(definite(a), hermitian=True),
    "matrix_power": lambda a: linalg.matrix_power(shifted(a), -3),
    "matrix_power 5": lambda a: linalg.matrix_power(a, 5),
    "matrix_exp": torch.matrix_exp,
    "tensorinv": lambda a: linalg.tensorinv(shifted(a).reshape(3, 3, 1), ind=1),
    "cholesky": lambda a: linalg.cholesky(definite(a)),
    "cholesky upper": lambda a: linalg.cholesky(definite(a), upper=True),
    "cholesky_inverse": lambda a: torch.cholesky_inverse(linalg.cholesky(definite(a))),
    "cholesky_inverse upper": lambda a: torch.cholesky_inverse(linalg.cholesky(definite(a), upper=True), upper=True),
    "lu": linalg.lu,
    "lu_factor": lambda a: linalg.lu_factor(a)[0],
    "lu_unpack": lambda a: torch.lu_unpack(*linalg.lu_factor(a)),
    "eigvalsh": lambda a: linalg.eigvalsh(hermitian(a)),
    "eigh": lambda a: projections(*linalg.eigh(hermitian(a))),
    "eigh upper": lambda a: linalg.eigh(hermitian(a), UPLO="U")[1].abs(),
    "eigvals": linalg.eigvals,
    "eig": lambda a: projections(*linalg.eig(a)),
    "function of a matrix": lambda a: sine(*linalg.eig(a)),
    "svdvals": linalg.svdvals,
    "svd": lambda a: projections(*linalg.svd(a)[1::-1]) + projections(*linalg.svd(a.mH)[1::-1]),
    "qr": lambda a: projections(a, linalg.qr(a)[0]),
    "cond": linalg.cond,
}  # fmt: skip

WITH_SIDES: dict[str, Callable[..., Any]] = {
    "solve": lambda a, b: linalg.solve(shifted(a), b),
    "solve vector": lambda a, b: linalg.solve(shifted(a), b[:, 0]),
    "solve from the right": lambda a, b: linalg.solve(shifted(a), b.mT, left=False),
    "solve_triangular": lambda a, b: linalg.solve_triangular(shifted(a), b, upper=True),
    "triangular_solve": lambda a, b: torch.triangular_solve(b, shifted(a), upper=False)[0],
    "triangular_solve transposed": lambda a, b: torch.triangular_solve(b, shifted(a), transpose=True)[0],
    "triangular_solve unitriangular": lambda a, b: torch.triangular_solve(b, a, unitriangular=True)[0],
    "cholesky_solve": lambda a, b: torch.cholesky_solve(b, linalg.cholesky(definite(a))),
    "lu_solve": lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b),
    "lu_solve adjoint": lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b, adjoint=True),
    "lstsq": lambda a, b: linalg.lstsq(torch.cat([a, a.mH @ a + 1]), torch.cat([b, b * b]))[0],
    "lstsq of least norm": lambda a, b: linalg.lstsq(a[:2], b[:2])[0],
    "householder_product": lambda a, b: linalg.householder_product(a, b[:, 0]),
    "ormqr": lambda a, b: torch.ormqr(a, b[:, 0], b),
    "pinv": lambda a, b: linalg.pinv(torch.cat([a, b.mT])),
    "pinv of lower rank": lambda a, b: linalg.pinv(b @ a[:2], rtol=1e-6),
    "multi_dot": lambda a, b: linalg.multi_dot([a, a, b]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SQUARE)
def test_functions_of_a_matrix(name: str, dtype: torch.dtype) -> None:
    check_mixes(along(SQUARE[name], (some(3, 3, dtype=dtype, seed=5),)), radius=0.02, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("moving", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WITH_SIDES)
def test_solvers(name: str, dtype: torch.dtype, moving: tuple[int, ...]) -> None:
    args = some(3, 3, dtype=dtype, seed=5), some(3, 2, dtype=dtype, seed=6)
    check_mixes(along(WITH_SIDES[name], args, moving), radius=0.02, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ord", ["fro", "nuc", 2, -2, 1, float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrix_norms(ord: Any, dtype: torch.dtype) -> None:
    for shape in ((3, 3), (2, 4), (4, 2)):
        check_mixes(
            along(lambda a: linalg.matrix_norm(a, ord), (some(*shape, dtype=dtype, seed=7),)),
            radius=0.004,
            rtol=1e-4,
            atol=1e-6,
        )


def repeated(*shape: int, dtype: torch.dtype, values: tuple[float, ...]) -> Tensor:
    """A matrix with these singular values."""
    left, right = (
        linalg.qr(some(shape[0], shape[0], dtype=dtype, seed=8))[0],
        linalg.qr(some(shape[1], shape[1], dtype=dtype, seed=9))[0],
    )
    n = len(values)
    return left[:, :n] @ torch.diag(torch.tensor(values, dtype=torch.float64)).to(dtype) @ right[:n]


@pytest.mark.parametrize("values", [(2.0, 2.0, 2.0), (2.0, 2.0, 1.0), (2.0, 1 + 1e-13, 1.0), (1.5, 1.0, 0.5)], ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nuclear_norm_of_repeated_singular_values(
    dtype: torch.dtype, shape: tuple[int, int], values: tuple[float, ...]
) -> None:
    """It is smooth wherever no singular value is 0, although the singular vectors are not."""
    a = repeated(*shape, dtype=dtype, values=values)
    for norm in (lambda a: linalg.matrix_norm(a, "nuc"), lambda a: torch.norm(a, "nuc")):
        check_mixes(along(norm, (a,)), radius=0.05, rtol=1e-4, atol=1e-6)
    batch, v = torch.stack([a, 2 * a]), some(2, *shape, dtype=dtype, seed=3)
    product = lambda a, v: jvp(grad(lambda a: linalg.matrix_norm(a, "nuc")), (a,), (v,))[1]
    torch.testing.assert_close(
        vmap(product)(batch, v), torch.stack([product(*row) for row in zip(batch, v, strict=True)])
    )


def test_nuclear_norm_as_pytorch_has_it() -> None:
    """Its spellings, dimensions and errors; the subgradient at a singular matrix is PyTorch's."""
    x = some(2, 4, 3, dtype=torch.float64, seed=5)
    for f in (
        lambda x: linalg.matrix_norm(x, "nuc", dim=(2, 0), keepdim=True),
        lambda x: linalg.matrix_norm(x, "nuc", dim=(0, -1)),
        lambda x: linalg.matrix_norm(x.float(), "nuc", dtype=torch.float64),
        lambda x: x.norm("nuc", dim=(1, 2)),
        lambda x: linalg.norm(x[1], "nuc", keepdim=True),
        lambda x: linalg.matrix_norm(x[:, :0], "nuc"),
        lambda x: linalg.matrix_norm(x[..., :1].expand(2, 4, 3), "nuc"),
    ):
        leaf = x.clone().requires_grad_()
        out = f(leaf).sin().sum()
        out.backward()
        torch.testing.assert_close(grad(lambda x, f=f: f(x).sin().sum())(x), leaf.grad)
        value, moved = jvp(f, (x,), (x,))
        torch.testing.assert_close((value, moved), (f(x), f(x)))  # homogeneous
    for wrong in (
        lambda x: linalg.matrix_norm(x, "nuc", dim=(0, 0)),
        lambda x: linalg.matrix_norm(x[0, 0], "nuc"),
        lambda x: x.norm("nuc", dim=(0, 5)),
    ):
        for run in (wrong, lambda x, f=wrong: grad(lambda x: f(x).sum())(x)):
            with pytest.raises((RuntimeError, IndexError)):
                run(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [torch.logdet, lambda a: linalg.slogdet(a)[1]], ids=["logdet", "slogdet"])
def test_a_singular_matrix_does_not_spoil_its_batch(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Its logarithm is -inf and has no derivative, at any order; PyTorch in a loop has inf or NaN."""
    f = lambda a: function(a).real
    regular, other = some(3, 3, dtype=dtype), torch.eye(3, dtype=dtype)
    batch = torch.stack([regular, torch.ones_like(other), other, torch.zeros_like(other)])
    second = lambda a: jvp(grad(f), (a,), (other,))[1]
    for slope in (grad(f), lambda a: jvp(f, (a,), (other,))[1], second, grad(lambda a: grad(f)(a).real.sum())):
        found = vmap(slope)(batch)
        torch.testing.assert_close(found[0], slope(regular))
        torch.testing.assert_close(found[2], slope(other))
        assert found[[0, 2]].isfinite().all() and found[[1, 3]].isnan().all()
