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


#: PyTorch's derivatives by a factor are not zero in the triangle that is not read (torch 2.14): here it is cut off.
#: Its tangent of a Cholesky factor is not the transpose of its gradient: here the matrix is made Hermitian before.
WHAT_IS_READ: dict[Any, Callable[..., Any]] = {
    aten.linalg_cholesky_ex.default: lambda a, upper: torch.linalg.cholesky_ex((a + a.mH) / 2, upper=upper),
    aten.cholesky_inverse.default: lambda a, upper: torch.cholesky_inverse(a.triu() if upper else a.tril(), upper),
    aten.cholesky_solve.default: lambda b, a, upper: torch.cholesky_solve(b, a.triu() if upper else a.tril(), upper),
}


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
        trusted = call.op is not aten.cholesky_inverse.default
        check_entry(call, order=order, trust_forward=trusted, native=WHAT_IS_READ.get(call.op))


@pytest.mark.parametrize("upper", [False, True])
def test_tangent_of_an_inverse_from_its_factor(upper: bool) -> None:
    """Against finite differences."""
    torch.manual_seed(0)
    factor = torch.linalg.cholesky(definite(3, 3, dtype=torch.float64), upper=upper)
    tangent = randn(3, 3).triu() if upper else randn(3, 3).tril()
    got = functrans.jvp(lambda x: torch.cholesky_inverse(x, upper), (factor,), (tangent,))[1]
    ends = [torch.cholesky_inverse(factor + step * tangent, upper) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(got, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-6)


#: functions of a matrix of which they read one triangle, and which: (upper, from which diagonal on)
ONE_TRIANGLE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool, int]] = {}
for _upper in (False, True):
    _name = "upper" if _upper else "lower"
    ONE_TRIANGLE |= {
        f"cholesky_solve, {_name}": (lambda a, b, u=_upper: torch.cholesky_solve(b, a, u), _upper, 0),
        f"cholesky_inverse, {_name}": (lambda a, b, u=_upper: torch.cholesky_inverse(a, u), _upper, 0),
        f"solve_triangular, {_name}": (lambda a, b, u=_upper: torch.linalg.solve_triangular(a, b, upper=u), _upper, 0),
        f"solve_triangular, {_name}, ones": (
            lambda a, b, u=_upper: torch.linalg.solve_triangular(a, b, upper=u, unitriangular=True),
            _upper, 1 if _upper else -1,
        ),
    }  # fmt: skip
ONE_TRIANGLE["householder_product"] = (lambda a, b: torch.linalg.householder_product(a, b[:, 0]), False, -1)
ONE_TRIANGLE["ormqr"] = (lambda a, b: torch.ormqr(a, b[:, 0], b), False, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ONE_TRIANGLE)
def test_the_triangle_that_is_not_read_has_no_derivative(name: str, dtype: torch.dtype) -> None:
    """The other one holds other numbers; first and second order by differences."""
    torch.manual_seed(0)
    f, upper, diagonal = ONE_TRIANGLE[name]
    part = (lambda x: x.triu(diagonal)) if upper else (lambda x: x.tril(diagonal))
    a, b, v = randn(3, 3, dtype=dtype), randn(3, 2, dtype=dtype), randn(3, 3, dtype=dtype)
    for matrix, number in ((a, 3), (v, 1)):  # diagonals of factors are real
        matrix.diagonal().fill_(number)
    b.mul_(0.3)

    def cosines(a: Tensor) -> Tensor:
        return torch.view_as_real(f(a, b) + 0j).cos().sum()

    slope = functrans.grad(cosines)
    along = lambda g: lambda x: functrans.jvp(g, (x,), (v,))[1]
    for lower, higher in (
        (lambda a: f(a, b), along(lambda a: f(a, b))),
        (cosines, along(cosines)),
        (slope, along(slope)),
        (along(cosines), along(along(cosines))),
    ):
        differences = (lower(a + 1e-5 * v) - lower(a - 1e-5 * v)) / 2e-5
        torch.testing.assert_close(higher(a), differences, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(functrans.jvp(lower, (a,), (v - part(v),))[1], torch.zeros_like(differences))
    assert torch.equal(slope(a), part(slope(a)))
    torch.testing.assert_close((slope(a).conj() * v).real.sum(), along(cosines)(a))


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


#: functions of a matrix that is taken to be Hermitian
HERMITIAN: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky": torch.linalg.cholesky,
    "cholesky, upper": lambda a: torch.linalg.cholesky(a, upper=True),
    "eigvalsh": torch.linalg.eigvalsh,
    "eigvalsh, upper": lambda a: torch.linalg.eigvalsh(a, "U"),
    "eigenvectors": lambda a: torch.linalg.eigh(a)[1].abs(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HERMITIAN)
def test_a_tangent_that_is_not_hermitian(name: str, dtype: torch.dtype) -> None:
    """Both modes speak of its Hermitian part, of which the differences are."""
    torch.manual_seed(0)
    f, a, v = HERMITIAN[name], definite(4, 4, dtype=dtype), randn(4, 4, dtype=dtype)
    out, tangent = functrans.jvp(f, (a,), (v,))
    u = torch.randn_like(out)
    (slope,) = functrans.vjp(f, a)[1](u)
    torch.testing.assert_close((tangent * u.conj()).real.sum(), (slope.conj() * v).real.sum())
    hermitian = (v + v.mH) / 2
    torch.testing.assert_close(functrans.jvp(f, (a,), (hermitian,))[1], tangent)
    slopes = (f(a + 1e-6 * hermitian) - f(a - 1e-6 * hermitian)) / 2e-6
    torch.testing.assert_close(tangent, slopes, rtol=1e-6, atol=1e-6)


def tall(*shape: int) -> Tensor:
    """Matrices with singular values far from each other, and from any tolerance below."""
    U, _, Vh = torch.linalg.svd(randn(*shape), full_matrices=False)
    return U * torch.tensor([3.0, 1.7, 0.5, 0.2], dtype=U.dtype)[: U.shape[-1]] @ Vh


def least_squares(right: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def f(a: Tensor, b: Tensor) -> Tensor:
        found = torch.linalg.lstsq(a, b[..., 0] if right == "vectors" else b[:1] if right == "shared" else b, **options)
        return torch.cat([found.solution.flatten(), found.residuals.flatten()])

    return f


#: functions of matrices and right-hand sides whose tolerance drops singular values, or not
TOLERANT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pinv": lambda a, b: torch.linalg.pinv(a),
    "pinv, rtol": lambda a, b: torch.linalg.pinv(a, rtol=0.3),
    "pinv, atol": lambda a, b: torch.linalg.pinv(a, atol=1.0),
    "pinv, rtol that drops none": lambda a, b: torch.linalg.pinv(a, rtol=1e-3),
    "pinv, another of each": lambda a, b: torch.linalg.pinv(a, atol=torch.tensor([1.0, 0.3], dtype=a.dtype)),
    "pinv, one for several": lambda a, b: torch.linalg.pinv(a[:1], atol=torch.tensor([1.0, 0.3], dtype=a.dtype)),
    "pinv, Hermitian": lambda a, b: torch.linalg.pinv(
        a @ a.mH - 1.5 * torch.eye(a.shape[-2], dtype=a.dtype), rtol=0.3, hermitian=True
    ),
    "pinv, of a lower rank": lambda a, b: torch.linalg.pinv(a[..., :2] @ b.mH, rtol=1e-6),
    "pinv, some of a lower rank": lambda a, b: torch.linalg.pinv(torch.cat([a, a[..., :1] @ a[..., :1, :]]), rtol=0.3),
} | {
    f"lstsq, {driver}, {right}, {rcond}": least_squares(right, driver=driver, rcond=rcond)
    for driver in ("gels", "gelsy", "gelsd", "gelss")
    for right in ("matrices", "vectors", "shared")
    for rcond in (None, 0.3)
    if rcond is None or driver != "gelsy"
}  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("name", TOLERANT)
def test_singular_values_that_are_dropped(name: str, shape: tuple[int, ...]) -> None:
    """First and second order by differences, in all modes; PyTorch takes nothing for dropped (torch 2.13)."""
    torch.manual_seed(1)
    f, a, b = TOLERANT[name], tall(*shape), randn(2, shape[1], 2)
    v, w = randn(*a.shape), randn(*b.shape)
    u = randn(f(a, b).numel())

    def total(t: Tensor) -> Tensor:
        return (f(a + t * v, b + t * t * w + t * w) * u.view(f(a, b).shape)).sum()

    def along(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: functrans.jvp(g, (t,), (torch.ones_like(t),))[1]

    def difference(g: Callable[[Tensor], Tensor]) -> Tensor:
        return (g(zero + 1e-6) - g(zero - 1e-6)) / 2e-6

    zero = torch.zeros((), dtype=a.dtype)
    for mode in (along, functrans.grad):
        torch.testing.assert_close(mode(total)(zero), difference(total), rtol=1e-6, atol=1e-6)
        for other in (along, functrans.grad):
            torch.testing.assert_close(other(mode(total))(zero), difference(mode(total)), rtol=1e-5, atol=1e-5)


def projection(vectors: Tensor) -> Tensor:
    return vectors @ vectors.mH


#: functions of the vectors beyond the singular values that do not depend on their basis
BEYOND: dict[str, Callable[[Tensor], Tensor]] = {
    "left": lambda a: projection(torch.linalg.svd(a)[0][..., a.shape[-1] :]),
    "left, squares": lambda a: torch.linalg.vector_norm(torch.linalg.svd(a)[0][..., a.shape[-1] :], dim=-1),
    "right": lambda a: projection(torch.linalg.svd(a.mH)[2][..., a.shape[-1] :, :].mH),
    "right of torch.svd": lambda a: projection(torch.svd(a.mH, some=False)[2][..., a.shape[-1] :]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BEYOND)
def test_vectors_beyond_the_singular_values(name: str, dtype: torch.dtype) -> None:
    """To the third order by differences; PyTorch takes them for constants (torch 2.13)."""
    torch.manual_seed(0)
    f, a, v = BEYOND[name], randn(2, 5, 3, dtype=dtype), randn(2, 5, 3, dtype=dtype)
    real = lambda x: torch.view_as_real(x) if x.is_complex() else x
    weight = torch.rand(real(f(a)).shape, dtype=torch.float64)
    total = lambda t: (real(f(a + t * v + t * t * a.flip(0))) * weight).sum()
    zero = torch.zeros((), dtype=torch.float64)
    along = lambda g: lambda t: functrans.jvp(g, (t,), (torch.ones_like(t),))[1]
    lower = total
    for _ in range(3):
        slope = (lower(zero + 1e-5) - lower(zero - 1e-5)) / 2e-5
        torch.testing.assert_close(along(lower)(zero), slope, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(functrans.grad(lower)(zero), slope, rtol=1e-6, atol=1e-6)
        assert slope.abs() > 1e-3
        lower = along(lower)
    slope = functrans.grad(lambda a: real(f(a)).square().sum() + real(f(a)).flatten()[1])
    torch.testing.assert_close(functrans.vmap(slope)(a), torch.stack([slope(e) for e in a]))


def test_what_gelsy_drops_is_not_known() -> None:
    torch.manual_seed(0)
    a, b = tall(5, 3), randn(5, 2)
    for options in ({"driver": "gelsy"}, {}):
        other = lambda a, options=options: torch.linalg.lstsq(a, b, rcond=0.3, **options).solution
        f = lambda a, other=other: functrans.jvp(other, (a,), (a,))[1]
        assert f(a).isnan().all()
        assert functrans.jvp(f, (a,), (a,))[1].isnan().all()
        assert functrans.grad(lambda a, other=other: other(a).sum())(a).isnan().all()


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
