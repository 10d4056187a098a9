"""Taylor mode against nested forward mode along the same curve."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from smooth_functions import FUNCTIONS, B
from torch import Tensor

from functrans import grad, hessian, jacfwd, jet, jvp, laplacian, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError
from functrans.extend import derivative


def curve(x: Tensor, terms: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The curve with these derivatives at 0."""
    return lambda t: x + sum(term * t ** (k + 1) / math.factorial(k + 1) for k, term in enumerate(terms))


def by_nesting(f: Callable[..., Any], order: int) -> list[Any]:
    """The derivatives at 0 of a function of a number."""
    t, one = torch.zeros(2, dtype=torch.float64)[0], torch.tensor(1.0, dtype=torch.float64)
    found = []
    for _ in range(order):
        f = functools.partial(lambda inner, t: jvp(inner, (t,), (one,))[1], f)
        found.append(f(t))
    return found


def some(order: int, *shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(order)]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kind_of_operator(name: str, order: int) -> None:
    torch.manual_seed(0)
    f = FUNCTIONS[name]
    x, terms = some(1, 3)[0], some(order, 3)
    value, series = jet(f, (x,), (terms,))
    close(value, f(x))
    expected = by_nesting(lambda t: f(curve(x, terms)(t)), order)
    if isinstance(series, tuple):
        close([list(s) for s in series], [list(s) for s in zip(*expected)])
    else:
        close(series, expected)


SOME = "tanh", "x * x * x", "softmax", "linear", "solve", "prod", "atan2", "cat", "qr", "svd", "lu", "std", "max_pool2d"


@pytest.mark.parametrize("name", SOME)
def test_under_and_over_other_transforms(name: str) -> None:
    torch.manual_seed(0)
    f = FUNCTIONS[name]
    x, a, b, c = some(4, 3)
    along = lambda x: jet(f, (x,), ([a, b, c],))[1][2]
    truth = lambda x: by_nesting(lambda t: f(curve(x, [a, b, c])(t)), 3)[2]
    rows = torch.stack([x, a + 1, b * 2])
    close(vmap(along)(rows), torch.stack([truth(row) for row in rows]))
    close(grad(lambda x: along(x).sum())(x), grad(lambda x: truth(x).sum())(x))
    close(jvp(along, (x,), (b,))[1], jvp(truth, (x,), (b,))[1])
    over_rows = lambda rows: jet(vmap(f), (rows,), ([rows, 2 * rows],))[1][1]
    close(over_rows(rows), torch.stack([jet(f, (row,), ([row, 2 * row],))[1][1] for row in rows]))
    slope = lambda x: grad(lambda x: f(x).sum())(x)
    close(jet(slope, (x,), ([a, b, c],))[1], by_nesting(lambda t: slope(curve(x, [a, b, c])(t)), 3))
    # a jet of a jet: third derivatives of the second derivative along another line
    zero = torch.zeros(3, dtype=torch.float64)
    inner = lambda x: jet(f, (x,), ([b, zero],))[1][1]
    outer = by_nesting(lambda t: by_nesting(lambda s: f(curve(x, [a])(t) + s * b), 2)[1], 3)
    close(jet(inner, (x,), ([a, zero, zero],))[1], outer)


def test_several_arguments_and_a_tree_of_results() -> None:
    x, y = some(2, 3)
    series = some(3, 3), some(3, 3)

    def f(x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"product": x * y, "fixed": B * 2, "index": x.argmax(), "n": 3, "none": None}

    value, terms = jet(f, (x, y), series)
    close(terms["product"], by_nesting(lambda t: curve(x, series[0])(t) * curve(y, series[1])(t), 3))
    close(terms["fixed"], [torch.zeros_like(B)] * 3)
    assert value["index"] == x.argmax() and value["n"] == 3 and value["none"] is None
    assert terms["index"] is None and terms["n"] is None


def test_order_ten_of_known_series() -> None:
    x, one, zero = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 1.0, 0.0))
    line = [one, *[zero] * 9]
    cycle = [x.cos(), -x.sin(), -x.cos(), x.sin()]
    close(jet(torch.sin, (x,), (line,))[1], [cycle[k % 4] for k in range(10)])
    close(jet(torch.exp, (x,), (line,))[1], [x.exp()] * 10)
    close(jet(lambda x: 1 / x, (x,), (line,))[1], [(-1) ** k * math.factorial(k) / x ** (k + 1) for k in range(1, 11)])
    close(jet(lambda x: x**3, (x,), (line,))[1], [3 * x**2, 6 * x, 6 * one, *[zero] * 7])


def test_against_derivatives_of_a_network() -> None:
    """Along a line, the second term is the Hessian's quadratic form, and the third that of the third derivatives."""
    weights = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    f = lambda x: (x @ weights[0]).tanh() @ weights[1]
    x, v = some(2, 3)
    _, (first, second, third) = jet(f, (x,), ([v, v * 0, v * 0],))
    close(first, grad(f)(x) @ v)
    close(second, v @ hessian(f)(x) @ v)
    close(third, torch.einsum("ijk,i,j,k", jacfwd(hessian(f))(x), v, v, v))


def test_detach_and_constants() -> None:
    x, v = some(2, 3)
    close(jet(lambda x: x.detach() * x, (x,), ([v, v],))[1], [x * v, x * v])
    value, terms = jet(lambda x: B, (x,), ([v, v],))
    assert torch.equal(value, B) and all(not t.any() for t in terms)


def test_an_operator_of_ones_own() -> None:
    @torch.library.custom_op("test_jet::cube", mutates_args=())
    def cube(x: Tensor) -> Tensor:
        return x**3

    derivative(torch.ops.test_jet.cube.default, x=lambda grad, x: 3 * x**2 * grad, tangent="elementwise")
    x, terms = some(1, 3)[0], some(3, 3)
    close(jet(cube, (x,), (terms,))[1], jet(lambda x: x**3, (x,), (terms,))[1])


def test_an_autograd_function() -> None:
    class Square(torch.autograd.Function):
        """With three times its derivative."""

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return 6 * ctx.saved_tensors[0] * tangent

    x, v = some(2, 3)
    close(jet(Square.apply, (x,), ([v, v * 0],))[1], [6 * x * v, 6 * v * v])


def test_arguments_that_are_written() -> None:
    x, v = torch.ones(2), torch.ones(2)
    value, (first,) = jet(lambda x: x.mul_(3), (x,), ([v],))
    assert x.tolist() == value.tolist() == first.tolist() == [3.0, 3.0]


def test_bad_input() -> None:
    x = torch.zeros(2)
    for primals, series, kind, said in (
        (x, ([x],), CallTypeError, "as primals"),
        ((x,), x, CallTypeError, "as series"),
        ((x,), ([x], [x]), CallValueError, "2 lists in series for 1 primals"),
        ((1.0,), ([x],), CallTypeError, r"as primals\[0\]"),
        ((x.long(),), ([x],), CallTypeError, r"as primals\[0\]"),
        ((x,), ([],), CallValueError, r"0 terms as series\[0\]"),
        ((x, x), ([x], [x, x]), CallValueError, r"2 terms as series\[1\]"),
        ((x,), ([1.0],), CallTypeError, r"as series\[0\]\[0\]"),
        ((x,), ([x.double()],), CallValueError, r"as series\[0\]\[0\]"),
        ((x,), ([torch.zeros(3)],), CallValueError, r"as series\[0\]\[0\]"),
    ):
        with pytest.raises(kind, match=said):
            jet(torch.sin, primals, series)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError):
        jet(3, (x,), ([x],))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        jet(lambda x: x / (1 // 0), (x,), ([x],))
    assert interpreter_stack() == []


NUMBERS = torch.tensor([0.0, 0.5, 2.0, -1.5, 0.0, 1.0], dtype=torch.float64)
#: functions of one number whose derivatives are all written down: at zeros, at whole powers, of an exponent
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "whole powers": lambda x: x.pow(torch.tensor([2, 0, 3, 2, 1, 5])),
    "powers": lambda x: x.pow(torch.tensor([2.0, 0.0, 0.5, -2.0, 3.0, 1.5], dtype=x.dtype)),
    "powers of another shape": lambda x: x.pow(torch.tensor([[2.0], [3.0]], dtype=x.dtype)),
    "exponent": lambda x: torch.tensor([0.0, 0.3, 2.0, -1.5, 0.0, 1.0], dtype=x.dtype).pow(x),
    "both": lambda x: (x * x + 1).pow(x),
    "lgamma": lambda x: (x * x + 0.5).lgamma(),
    "digamma": lambda x: (x * x + 0.5).digamma(),
    "polygamma": lambda x: torch.polygamma(2, x * x + 0.5),
}


@pytest.mark.parametrize("name", KNOWN)
def test_functions_of_which_every_derivative_is_known(name: str) -> None:
    f, (a, b, c) = KNOWN[name], some(3, 6)
    along = curve(NUMBERS, [a, b, c])
    value, terms = jet(f, (NUMBERS,), ([a, b, c],))
    expected = by_nesting(lambda t: f(along(t)), 3)
    torch.testing.assert_close(value, f(NUMBERS), equal_nan=True)
    torch.testing.assert_close(terms, expected, equal_nan=True, rtol=1e-8, atol=1e-8)
    straight = jet(f, (NUMBERS,), ([a, None, None],))[1]
    torch.testing.assert_close(straight, by_nesting(lambda t: f(NUMBERS + t * a), 3), equal_nan=True)


MATRIX = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def reflected(*extra: Any) -> Callable[[Tensor], Tensor]:
    """Products with reflectors that move with x, one of which is none."""

    def f(x: Tensor) -> Tensor:
        matrix, tau = MATRIX[:, :2].to(x.dtype) * x[0] + x[1], torch.stack([x[0] * 0.3, 0 * x[1]])
        if not extra:
            return torch.linalg.householder_product(matrix, tau)
        left, transpose = extra
        other = torch.outer(x, x.flip(0)) + MATRIX.to(x.dtype)
        return torch.ormqr(matrix, tau, other, left=left, transpose=transpose)

    return f


#: operators that are run as simpler ones
SIMPLER: dict[str, Callable[[Tensor], Any]] = {
    "householder_product": reflected(),
    **{f"ormqr, {left}, {turned}": reflected(left, turned) for left in (False, True) for turned in (False, True)},
    "wide qr": lambda x: torch.linalg.qr(torch.stack([MATRIX[:2] * x + x.flip(0), MATRIX[1:] * x])),
    "wide qr, complete": lambda x: torch.linalg.qr(MATRIX[:2] * x + x.flip(0), mode="complete"),
}


@pytest.mark.parametrize("name", SIMPLER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_operators_as_simpler_ones(name: str, dtype: torch.dtype) -> None:
    f = SIMPLER[name]
    x, v = (torch.tensor(t, dtype=dtype) for t in ([0.7, -0.4, 1.1], [0.5, 1.0, -0.3]))
    if dtype.is_complex:
        x, v = x + 0.3j * v, v - 0.2j * x
    value, terms = jet(f, (x,), ([v, None, None],))
    torch.testing.assert_close(tuple(value) if isinstance(value, tuple) else value, f(x))
    expected: list[Any] = []
    g = f
    for _ in range(3):
        g = functools.partial(lambda g, x: jvp(g, (x,), (v,))[1], g)
        expected.append(g(x))
    if isinstance(value, tuple):
        expected = [list(parts) for parts in zip(*expected, strict=True)]
    torch.testing.assert_close(list(terms), expected, rtol=1e-8, atol=1e-8)
    if not dtype.is_complex:
        total = lambda x: sum(part.sin().sum() for part in (f(x) if isinstance(value, tuple) else (f(x),)))
        torch.testing.assert_close(laplacian(total)(x), hessian(total)(x).trace(), rtol=1e-8, atol=1e-8)
