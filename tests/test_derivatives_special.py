"""Functions of ``torch.special`` that PyTorch calls non-differentiable, and their neighbours:
orders 1 to 3 against mpmath.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from functrans import grad, hessian, jvp, vmap

special = torch.special


def by_grad(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return grad(lambda x: f(x).sum())


def by_jvp(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


def by_vmap(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return vmap(grad(f))


STEPS = {"grad": by_grad, "jvp": by_jvp}
WAYS = [way for order in (1, 2, 3) for way in itertools.product(STEPS, repeat=order)] + [
    ("vmap",),
    ("vmap", "jvp"),
    ("grad", "vmap"),
]


def derived(f: Callable[[Tensor], Tensor], way: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
    for step in way:
        f = by_vmap(f) if step == "vmap" else STEPS[step](f)
    return f


def alternating(f: Callable[[int, Any], Any], signs: tuple[int, int]) -> Callable[[int], Callable[[Any, int], Any]]:
    """The k-th derivative of a family with ``2 f[n]' = signs[0] f[n - 1] + signs[1] f[n + 1]`` (DLMF 10.6.7, 10.29.5).
    """

    def of_order(n: int) -> Callable[[Any, int], Any]:
        def differentiated(x: Any, k: int) -> Any:
            if k == 0:
                return f(n, x)
            low, high = of_order(n - 1), of_order(n + 1)
            return (signs[0] * low(x, k - 1) + signs[1] * high(x, k - 1)) / 2

        return differentiated

    return of_order


J, Y = alternating(mpmath.besselj, (1, -1)), alternating(mpmath.bessely, (1, -1))
I, K = alternating(lambda n, x: mpmath.re(mpmath.besseli(n, x)), (1, 1)), alternating(mpmath.besselk, (-1, -1))


def scaled(f: Callable[[Any, int], Any], falling: bool) -> Callable[[Any, int], Any]:
    """By the rule of Leibniz, of the product with ``exp(-abs(x))`` or ``exp(x)``."""

    def differentiated(x: Any, k: int) -> Any:
        rate = -mpmath.sign(x) if falling else 1
        return mpmath.exp(rate * x) * sum(mpmath.binomial(k, i) * rate ** (k - i) * f(x, i) for i in range(k + 1))

    return differentiated


def airy(x: Any, k: int) -> Any:
    """By Airy's equation, ``Ai'' = x Ai``."""
    value, slope = mpmath.airyai(x), mpmath.airyai(x, derivative=1)
    return (value, slope, x * value, value + x * slope)[k]


#: of each function: its derivatives of order 0 to 3, whether it is defined for negative numbers,
#: and how exact PyTorch's values are
FUNCTIONS: dict[str, tuple[Callable[[Any, int], Any], bool, float]] = {
    "bessel_j0": (J(0), True, 2e-9),
    "bessel_j1": (J(1), True, 2e-9),
    "bessel_y0": (Y(0), False, 2e-9),
    "bessel_y1": (Y(1), False, 2e-9),
    "i0": (I(0), True, 0),
    "i1": (I(1), True, 0),
    "i0e": (scaled(I(0), True), True, 0),
    "i1e": (scaled(I(1), True), True, 0),
    "modified_bessel_i0": (I(0), True, 0),
    "modified_bessel_i1": (I(1), True, 0),
    "modified_bessel_k0": (K(0), False, 0),
    "modified_bessel_k1": (K(1), False, 0),
    "scaled_modified_bessel_k0": (scaled(K(0), False), False, 0),
    "scaled_modified_bessel_k1": (scaled(K(1), False), False, 0),
    "spherical_bessel_j0": (lambda x, k: mpmath.diff(mpmath.sinc, x, k), True, 0),
    "sinc": (lambda x, k: mpmath.diff(lambda y: mpmath.sinc(mpmath.pi * y), x, k), True, 0),
    "airy_ai": (airy, True, 2e-6),
}
POINTS = (1e-8, 1e-4, 0.02, 0.45, 0.999, 1.2, 2.7, 9.6, 12.4, 29.0, 31.5, 80.0)
KINKS = ("i0e", "i1e")  # at 0, where exp(-abs(x)) is not smooth


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_number(name: str) -> None:
    f, negative, inexact = FUNCTIONS[name]
    points = [*POINTS, *([-x for x in POINTS] if negative else []), *([0.0] if negative and name not in KINKS else [])]
    x = torch.tensor(points, dtype=torch.float64)
    with mpmath.workdps(30):
        expected = [torch.tensor([float(f(mpmath.mpf(p), k)) for p in points], dtype=torch.float64) for k in range(4)]
    for way in WAYS:
        got = derived(getattr(special, name), way)(x)
        torch.testing.assert_close(
            got,
            expected[len(way)],
            rtol=1e-9 + inexact,
            atol=1e-13 + inexact,
            msg=lambda m, way=way: f"{name}, {way}: {m}",
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_single_precision(name: str) -> None:
    f, negative, _ = FUNCTIONS[name]
    points = [*POINTS[1:], *([-x for x in POINTS[1:]] if negative else [])]
    x = torch.tensor(points)
    with mpmath.workdps(30):
        expected = [
            torch.tensor([float(f(mpmath.mpf(float(p)), k)) for p in x], dtype=torch.float64).float() for k in range(3)
        ]
    for way in (("grad",), ("jvp",), ("grad", "jvp"), ("vmap", "grad")):
        got = derived(getattr(special, name), way)(x)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got, expected[len(way)], rtol=2e-4, atol=2e-5, msg=lambda m, way=way: f"{name}, {way}: {m}"
        )


@pytest.mark.parametrize(
    ("name", "signs"),
    [
        ("bessel_y0", (1, -1)),
        ("bessel_y1", (1, -1)),
        ("modified_bessel_k0", (-1, 1)),
        ("modified_bessel_k1", (-1, 1)),
        ("scaled_modified_bessel_k0", (-1, 1)),
        ("scaled_modified_bessel_k1", (-1, 1)),
    ],
)
def test_poles_and_what_lies_beyond(name: str, signs: tuple[int, int]) -> None:
    """At 0 the limit from the right, which is infinite; for negative numbers NaN, as the value is."""
    x = torch.tensor([0.0, -1.5], dtype=torch.float64)
    for way in WAYS:
        if len(way) < 3:
            at_zero, below = derived(getattr(special, name), way)(x).tolist()
            assert at_zero == signs[len(way) - 1] * math.inf, way
            assert math.isnan(below), way


@pytest.mark.parametrize(("name", "slope"), [("i0e", 0.0), ("i1e", 0.5)])
def test_slopes_at_kinks(name: str, slope: float) -> None:
    x = torch.zeros(2, dtype=torch.float64)
    for way in (("grad",), ("jvp",), ("vmap",)):
        assert derived(getattr(special, name), way)(x).tolist() == [slope, slope]


def normal(x: Any) -> Any:
    return mpmath.erfc(-x / mpmath.sqrt(2)) / 2


#: functions that PyTorch differentiates, where its formulas lose digits or overflow at the second or third order
NEIGHBOURS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any], tuple[float, ...]]] = {
    "erfcx": (special.erfcx, lambda x: mpmath.exp(x * x) * mpmath.erfc(x),
        (-3.0, -0.5, 0.0, 0.5, 3.0, 9.0, 30.0, 1e3, 1e5)),
    "log_ndtr": (special.log_ndtr, lambda x: mpmath.log(normal(x)),
        (-1e5, -1e3, -30.0, -19.0, -3.0, 0.0, 0.5, 3.0, 8.0)),
    "ndtri": (special.ndtri, lambda p: mpmath.sqrt(2) * mpmath.erfinv(2 * p - 1), (1e-6, 0.1, 0.5, 0.9)),
    "logaddexp": (
        lambda x: torch.logaddexp(x, torch.zeros_like(x)), lambda x: mpmath.log(1 + mpmath.exp(x)),
        (-800.0, -40.0, -1.0, 0.0, 2.0, 40.0, 800.0),
    ),
    "logaddexp2": (
        lambda x: torch.logaddexp2(torch.zeros_like(x), x), lambda x: mpmath.log(1 + 2**x, 2),
        (-1100.0, -40.0, -1.0, 0.0, 2.0, 40.0, 1100.0),
    ),
    "logit": (torch.logit, lambda x: mpmath.log(x / (1 - x)), (1e-6, 0.3, 0.9)),
    "entr": (special.entr, lambda x: -x * mpmath.log(x), (1e-6, 0.3, 2.0, 100.0)),
    "polygamma": (lambda x: torch.polygamma(2, x), lambda x: mpmath.polygamma(2, x), (0.01, 0.7, 3.0, 50.0)),
    "mvlgamma": (lambda x: torch.mvlgamma(x, 2), lambda x: mpmath.loggamma(x) + mpmath.loggamma(x - 0.5),
        (0.7, 3.0, 50.0)),
    "xlog1py": (lambda x: special.xlog1py(x, x), lambda x: x * mpmath.log(1 + x), (1e-6, 0.3, 5.0)),
    "zeta": (lambda x: special.zeta(2.5, x), lambda x: mpmath.zeta(2.5, x), (0.1, 0.7, 3.0)),
    "igamma": (
        lambda x: torch.igamma(torch.full_like(x.detach(), 1.7), x),
        lambda x: mpmath.gammainc(1.7, 0, x, regularized=True), (0.1, 0.7, 3.0),
    ),
    "ldexp": (lambda x: torch.ldexp(x, x), lambda x: x * 2**x, (-3.0, 0.0, 0.2)),
    "float_power": (lambda x: torch.float_power(x, x), lambda x: x**x, (0.1, 1.0, 2.5)),
}  # fmt: skip


SYMMETRIC = {"logaddexp": 1e-17, "logaddexp2": 1e-17}  # the third derivative is 0 at 0


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours(name: str) -> None:
    f, truth, points = NEIGHBOURS[name]
    x = torch.tensor(points, dtype=torch.float64)
    with mpmath.workdps(60):
        expected = [
            torch.tensor([float(mpmath.diff(truth, mpmath.mpf(p), k)) for p in points], dtype=torch.float64)
            for k in range(4)
        ]
    for way in WAYS:
        got = derived(f, way)(x)
        torch.testing.assert_close(
            got,
            expected[len(way)],
            rtol=1e-7,
            atol=SYMMETRIC.get(name, 1e-25),
            msg=lambda m, way=way: f"{name}, {way}: {m}",
        )


def test_log_ndtr_far_out() -> None:
    x = torch.tensor([-math.inf, -1e200, 40.0, math.inf], dtype=torch.float64)
    assert by_grad(special.log_ndtr)(x).tolist()[:2] == [math.inf, 1e200]
    assert by_grad(by_grad(special.log_ndtr))(x).tolist()[1:3] == [-1.0, 0.0]


def test_what_vanishes_at_infinity() -> None:
    x = torch.tensor([math.inf, 1e12], dtype=torch.float64)
    for name in (
        "scaled_modified_bessel_k0",
        "scaled_modified_bessel_k1",
        "i0e",
        "i1e",
        "spherical_bessel_j0",
        "modified_bessel_k0",
    ):
        assert derived(getattr(special, name), ("grad",))(x).abs().max() < 1e-11


# ------------------------------------------------------------------------------------------- polynomials

Polynomial = list[Fraction]


def times_x(p: Polynomial) -> Polynomial:
    return [Fraction(0), *p]


def combined(a: Fraction | int, p: Polynomial, b: Fraction | int, q: Polynomial) -> Polynomial:
    return [a * x + b * y for x, y in itertools.zip_longest(p, q, fillvalue=Fraction(0))]


def chebyshev(k: int, p: Polynomial, q: Polynomial) -> Polynomial:
    return combined(2, times_x(p), -1, q)


#: of each family: p[1], and p[k + 1] of p[k] and p[k - 1] (DLMF 18.9.1, 18.9.2)
FAMILIES: dict[str, tuple[tuple[int, ...], Callable[[int, Polynomial, Polynomial], Polynomial]]] = {
    "chebyshev_polynomial_t": ((0, 1), chebyshev),
    "chebyshev_polynomial_u": ((0, 2), chebyshev),
    "chebyshev_polynomial_v": ((-1, 2), chebyshev),
    "chebyshev_polynomial_w": ((1, 2), chebyshev),
    "hermite_polynomial_h": ((0, 2), lambda k, p, q: combined(2, times_x(p), -2 * k, q)),
    "hermite_polynomial_he": ((0, 1), lambda k, p, q: combined(1, times_x(p), -k, q)),
    "laguerre_polynomial_l": (
        (1, -1),
        lambda k, p, q: combined(
            Fraction(1, k + 1), combined(2 * k + 1, p, -1, times_x(p)), Fraction(-k, k + 1), q
        ),
    ),
    "legendre_polynomial_p": (
        (0, 1),
        lambda k, p, q: combined(Fraction(2 * k + 1, k + 1), times_x(p), Fraction(-k, k + 1), q),
    ),
}
SHIFTED = [f"shifted_chebyshev_polynomial_{c}" for c in "tuvw"]


def value(name: str, n: int, x: float, order: int) -> float:
    """The exact value of a derivative in ``x``."""
    shifted = name.startswith("shifted_")
    first, step = FAMILIES[name.removeprefix("shifted_")]
    polynomials: list[Polynomial] = [[Fraction(1)], [Fraction(c) for c in first]]
    while len(polynomials) <= n:
        polynomials.append(step(len(polynomials) - 1, polynomials[-1], polynomials[-2]))
    p = polynomials[n] if n >= 0 else []
    for _ in range(order):
        p = [k * c for k, c in enumerate(p)][1:]
    y = 2 * Fraction(x) - 1 if shifted else Fraction(x)
    return float(sum((c * y**k for k, c in enumerate(p)), Fraction(0)) * (2**order if shifted else 1))


XS = (-2.5, -1.0, -0.6, 0.0, 0.3, 0.5, 0.9999999, 1.0, 1.7)
NS = (-2, -1, 0, 1, 2, 3, 5, 9, 14)


@pytest.mark.parametrize("name", [*FAMILIES, *SHIFTED])
def test_polynomials(name: str) -> None:
    f = getattr(special, name)
    x = torch.tensor(XS, dtype=torch.float64)
    n = torch.tensor(NS, dtype=torch.float64)
    expected = [
        torch.tensor([[value(name, k, v, order) for v in XS] for k in NS], dtype=torch.float64) for order in range(4)
    ]

    def close(got: Tensor, truth: Tensor, what: Any) -> None:
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-8, msg=lambda m: f"{name}, {what}: {m}")

    for way in WAYS:
        order = len(way)
        for row, k in enumerate(NS):
            close(derived(lambda x, k=k: f(x, k), way)(x), expected[order][row], ("number", k, way))
        # broadcast orders of x's own dtype, of integers, and with a fraction, which PyTorch cuts off
        if "vmap" in way:
            continue
        wide = x.expand(len(NS), -1)
        for orders in (n.unsqueeze(1), n.unsqueeze(1).int(), (n + 0.25 * n.sign()).unsqueeze(1)):
            close(derived(lambda x, orders=orders: f(x, orders), way)(wide), expected[order], ("tensor", way))
        close(vmap(lambda k, way=way: derived(lambda x: f(x, k), way)(x))(n), expected[order], ("batched order", way))
        batched = vmap(lambda x, k, way=way: derived(lambda x: f(x, k), way)(x), in_dims=(1, None), out_dims=1)
        close(batched(wide, n), expected[order], ("batched x", way))


@pytest.mark.parametrize("name", [*FAMILIES, *SHIFTED])
def test_the_order_of_a_polynomial_is_cut_to_an_integer(name: str) -> None:
    """So the value is constant between integers, and its derivative in the order is 0, as that of floor is."""
    f = getattr(special, name)
    n = torch.tensor([0.5, 3.4, 6.7], dtype=torch.float64)
    x = torch.tensor([0.3, -0.2, 1.4], dtype=torch.float64)
    step = 1e-3
    assert torch.equal(f(x, n + step), f(x, n - step))
    assert torch.equal(grad(lambda n: f(x, n).sum())(n), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(jvp(lambda n: f(0.3, n), (n,), (torch.ones_like(n),))[1], torch.zeros(3, dtype=torch.float64))
    slopes = grad(lambda x, n: f(x, n).sum(), argnums=(0, 1))(x, n)
    close = torch.tensor([value(name, int(k), float(v), 1) for v, k in zip(x, n, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(slopes[0], close)
    assert not slopes[1].any()


def test_a_hessian_of_coefficients() -> None:
    """Gauss points: the Hessian of a sum over all orders at once."""
    c = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    f = lambda x: (c * special.legendre_polynomial_p(x, torch.arange(4.0, dtype=torch.float64))).sum()
    x = torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(hessian(f)(x), 2.0 * 3 + 0.25 * 15 * x)


def test_plain_autograd_of_a_result() -> None:
    """What the formulas are made of is differentiable where no transform is left."""
    x = torch.tensor([-11.0, -0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    for f in (
        special.airy_ai,
        lambda x: special.legendre_polynomial_p(x, 4),
        lambda x: special.laguerre_polynomial_l(x, 4),
    ):
        assert torch.autograd.gradcheck(by_grad(f), (x,))
