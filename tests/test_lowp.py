"""lowp: against rounding by exact arithmetic, put in by hand after every operator."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import count, grad, hessian, jvp, lowp, psum, reap, sanitize, sow, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError, NonFiniteError
from functrans.pytorch.versions import INSTALLED

#: By dtype: bits of the significand behind the point, the least exponent, the greatest number, what is beyond it.
FORMATS = {
    torch.bfloat16: (7, -126, (2 - 2**-7) * 2.0**127, math.inf),
    torch.float16: (10, -14, 65504.0, math.inf),
    torch.float8_e4m3fn: (3, -6, 448.0, math.nan if INSTALLED < (2, 13) else 448.0),
    torch.float8_e5m2: (2, -14, 57344.0, math.inf),
}
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert interpreter_stack() == []


def nearest(x: float, dtype: torch.dtype) -> float:
    """Round to nearest, ties to even, by exact arithmetic."""
    bits, least, greatest, beyond = FORMATS[dtype]
    if x == 0 or not math.isfinite(x):
        return x
    exponent = max(math.frexp(x)[1] - 1, least)
    step = 2.0 ** (exponent - bits)
    found = round(x / step) * step  # division by a power of two is exact, and round() is to even
    return found if abs(found) <= greatest else math.copysign(beyond, x)


def r(x: Tensor, dtype: torch.dtype) -> Tensor:
    flat = [nearest(v, dtype) for v in x.double().reshape(-1).tolist()]
    return torch.tensor(flat, dtype=torch.float64).reshape(x.shape).to(x.dtype)


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@every_format
def test_rounding_is_exact(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(500) * 2.0**k for k in (-20, -8, -3, 0, 4, 8, 15)])
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1.0625, 1.1875, 1.125, 1.375, 464.0, 465.0, 6e4])
    same(lowp(lambda x: x, dtype)(torch.cat([x, ties])), r(torch.cat([x, ties]), dtype))


W = torch.randn(3, 3)


def f(x: Tensor) -> Tensor:
    return ((W @ x) * x + 1).tanh()


def rounded_f(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One example, or the rows of a batch."""
    x, w = r(x, dtype), r(W, dtype)
    y = r(r(r(x @ w.T, dtype) * x, dtype) + 1, dtype)
    return r(y.tanh(), dtype)


@every_format
def test_every_result_and_the_captured_weights(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3)
    expected = torch.stack([rounded_f(row, dtype) for row in x])
    same(torch.stack([lowp(f, dtype)(row) for row in x]), expected)
    for around in (vmap(lowp(f, dtype)), lowp(vmap(f), dtype), lowp(vmap(lowp(f, dtype)), dtype)):
        torch.testing.assert_close(around(x), expected, rtol=2.0 ** -FORMATS[dtype][0], atol=0)


@every_format
def test_derivatives_inside_and_around(dtype: torch.dtype) -> None:
    """Of x * x * 3: with every step rounded forward and back, by hand."""
    g = lambda x: x * x * 3
    for number in (1.1, -2.7, 0.3):
        x = torch.tensor(number)
        y = r(x, dtype)
        step = lambda v: r(v, dtype)
        back = step(step(step(torch.tensor(3.0)) * y) + step(step(torch.tensor(3.0)) * y))
        for gradient in (
            lowp(grad(g), dtype)(x),
            grad(lowp(g, dtype))(x),
            vmap(grad(lowp(g, dtype)))(x.expand(2))[0],
            lowp(vmap(grad(g)), dtype)(x.expand(2))[0],
        ):
            same(gradient, back)
        v = torch.tensor(0.7)
        t = step(step(v) * y)
        same(lowp(lambda x, v: jvp(g, (x,), (v,)), dtype)(x, v)[1], step(step(t + t) * 3))
        primal, tangent = jvp(lowp(g, dtype), (x,), (v,))
        same(primal, step(step(y * y) * 3))
        torch.testing.assert_close(tangent, 6 * x * v, rtol=4 * 2.0 ** -FORMATS[dtype][0], atol=0)
        torch.testing.assert_close(hessian(lowp(g, dtype))(x), torch.tensor(6.0))
        leaf = x.clone().requires_grad_()
        lowp(g, dtype)(leaf).backward()
        same(leaf.grad, back)


@every_format
def test_pieces_of_composites_are_rounded(dtype: torch.dtype) -> None:
    x, b = torch.randn(2, 3), torch.randn(3)
    step = lambda v: r(v, dtype)
    same(lowp(torch.nn.functional.linear, dtype)(x, W, b), step(torch.addmm(step(b), step(x), step(W).T)))


def test_dtypes_stay() -> None:
    out = lowp(lambda x, n, h: (x + n, n + 1, h * 3, torch.complex(x, x)), torch.float16)(
        torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(2), torch.tensor(1 / 3, dtype=torch.bfloat16)
    )
    assert [o.dtype for o in out] == [torch.float64, torch.int64, torch.bfloat16, torch.complex128]
    third = nearest(1 / 3, torch.float16)
    assert out[0] == nearest(third + 2, torch.float16) and out[3] == complex(third, third)
    assert out[2] == torch.tensor(1 / 3, dtype=torch.bfloat16) * 3  # no narrower


def test_what_is_written_and_what_is_made() -> None:
    def g(x: Tensor) -> Tensor:
        y = torch.full((2,), 0.1)
        y[0] = x
        y.add_(0.01)
        return y

    step = lambda v: nearest(v, torch.bfloat16)
    expected = [step(step(0.3) + 0.01), step(step(0.1) + 0.01)]
    assert lowp(g, torch.bfloat16)(torch.tensor(0.3)).tolist() == expected
    x = torch.tensor([0.3, 0.7])
    lowp(lambda x: x.mul_(1.1), torch.bfloat16)(x)
    same(x, r(torch.tensor([step(0.3), step(0.7)]) * 1.1, torch.bfloat16))


def test_with_the_others() -> None:
    x = torch.randn(3)
    e4m3 = torch.float8_e4m3fn
    _, named = reap(lowp(lambda x: sow(x * x, "square") + 1, e4m3))(x)
    same(named["square"], r(r(x, e4m3) ** 2, e4m3))
    same(lowp(lambda x: reap(f)(x)[0], e4m3)(x), lowp(f, e4m3)(x))
    for program in (
        lambda x: count(lowp(f, e4m3))(x)[0],
        lowp(lambda x: count(f)(x)[0], e4m3),
        sanitize(lowp(f, e4m3)),
        lowp(sanitize(f), e4m3),
        lowp(lowp(f, torch.float16), e4m3),
    ):
        torch.testing.assert_close(program(x), lowp(f, e4m3)(x), rtol=0.13, atol=0.02)
    with pytest.raises(NonFiniteError, match="got inf in the result of"):
        sanitize(lowp(lambda x: x * 100, torch.float16))(torch.tensor(1000.0))
    total = vmap(lowp(lambda x: psum(x, "i"), torch.bfloat16), axis_name="i")(torch.tensor([1.0, 2.0**-9, 2.0**-9]))
    assert total.tolist() == [1.0] * 3


def test_bad_input() -> None:
    call = r"lowp\(func, dtype\): got "
    with pytest.raises(CallValueError, match=call + "torch.float32 as dtype; expected one of torch.bfloat16, torch.fl"):
        lowp(f, torch.float32)
    with pytest.raises(CallTypeError, match=call + "the str 'bf16' as dtype"):
        lowp(f, "bf16")  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match="expected a function as the first argument"):
        lowp(W, torch.bfloat16)  # type: ignore[arg-type]
    negative: Callable[..., Any] = lowp(lambda x: x / (1 // 0), torch.bfloat16)
    with pytest.raises(ZeroDivisionError):
        negative(W)
