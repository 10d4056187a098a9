"""Pointwise code as programs of Taylor coefficients and of second derivatives: every operator of which they are known,
against nested forward mode."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import Listing
from torch import Tensor
from torch.nn import functional as F

from functrans import grad, hessian, jet, jvp, laplacian, vmap
from functrans.core.stack import run_transformed
from functrans.derivatives.table import NO_TANGENT
from functrans.extend import DERIVATIVES, derivative, overriding, rules_in_scope
from functrans.programs.operators import operator_program
from functrans.shipped.by_derivatives import KNOWN
from functrans.shipped.jet import JetInterpreter
from functrans.shipped.jet_programs import FIXED, NUMBER, coefficients
from functrans.shipped.laplacian import LaplacianInterpreter
from functrans.shipped.laplacian_programs import bending
from functrans.shipped.power_series import DERIVATIVE

aten = torch.ops.aten
DOUBLE = torch.float64
#: on both sides of 0, and away from it
X = torch.tensor([-0.7, 0.4, 0.6], dtype=DOUBLE)
TERMS = [torch.tensor(t, dtype=DOUBLE) for t in ([1.0, -0.5, 0.7], [0.3, 0.2, -1.1], [-0.4, 0.9, 0.8])]

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in (
            "abs", "acos", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "erfc", "erfinv", "exp",
            "exp2", "expm1", "floor", "frac", "log1p", "neg", "reciprocal", "relu", "sgn", "sigmoid", "sign", "sin",
            "sinh", "square", "tan", "tanh", "trunc",
        )
    },
    **{name: lambda x, name=name: getattr(torch, name)(x + 1.5) for name in ("log", "log2", "log10", "sqrt", "rsqrt")},
    "acosh": lambda x: (x + 2).acosh(),
    **{name: getattr(F, name) for name in (
        "silu", "gelu", "softplus", "elu", "selu", "celu", "mish", "logsigmoid", "hardsigmoid", "hardswish",
    )},
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus with numbers": lambda x: F.softplus(x, 3.0, 1.5),
    "elu with a number": lambda x: F.elu(x, 0.3),
    **{f"** {p}": lambda x, p=p: x**p for p in (0, 1, 2, 3, 7, 9, -1, -3)},
    **{f"** {p}": lambda x, p=p: (x + 1) ** p for p in (0.5, 2.5, -0.5, 1.3)},
    "2 ** x": lambda x: 2**x,
    "numbers": lambda x: (3 - x) * 2 / (1.5 + x) - x / 4 + 2 / (x - 3),
    "rsub": lambda x: torch.rsub(x * x, 2.0) + torch.rsub(x, x * x) + torch.rsub(x, 1, alpha=3),
    "numbers in a sum": lambda x: -(x * 3) * 0.5 + 1 - (2 - x) / 3,
    "alpha": lambda x: torch.add(x, x * x, alpha=3) - torch.sub(x.sin(), x, alpha=0.5),
    "where of masks": lambda x: torch.where(torch.tensor([True, False, True]), x, -x * x),
    "addcmul": lambda x: torch.addcmul(x, x, x.sin()) + torch.addcmul(x, x, x, value=0.3),
    "where": lambda x: torch.where(x > 0, x * x, x.sin()) + torch.where(x > 0, 1.0, x * x) + torch.where(x < 0, x, 2),
    "product of a quotient": lambda x: (x / (x * x + 1)) * x.exp() / (2 + x),
    "tanh_backward": lambda x: aten.tanh_backward(x, x.sin()),
    "sigmoid_backward": lambda x: aten.sigmoid_backward(x.exp(), x),
    "threshold_backward": lambda x: aten.threshold_backward(x * x, x, 0.5),
    "maximum": lambda x: torch.maximum(x * x, x.sin()) + torch.minimum(x.exp(), 1 - x),
    "a broadcast": lambda x: x.unsqueeze(0) * x.unsqueeze(1) + x,
    "a tensor of another dtype": lambda x: x * torch.arange(3) + (x > 0) * x / torch.tensor([1, 2, 4]),
    "a narrower tensor": lambda x: torch.ones(3) * x + torch.full((), 0.5) * x.sin(),
}  # fmt: skip


def curve(terms: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: X + sum(term * t**k / math.factorial(k) for k, term in enumerate(terms, 1))


def by_nesting(f: Callable[[Tensor], Tensor], order: int) -> list[Tensor]:
    """The derivatives at 0 of a function of a number."""
    t, one, found = torch.tensor(0.0, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE), []
    for _ in range(order):
        f = functools.partial(lambda inner, t: jvp(inner, (t,), (one,))[1], f)
        found.append(f(t))
    return found


def by_trace(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.einsum("...ii->...", hessian(f)(x))


def close(found: Any, expected: Any, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", UNARY)
def test_every_known_operator(name: str) -> None:
    f = UNARY[name]
    value, found = jet(f, (X,), (TERMS,))
    close(value, f(X))
    close(found, by_nesting(lambda t: f(curve(TERMS)(t)), 3))
    # at a level between, the programs are batched, differentiated and taken apart
    second = lambda x: jet(f, (x,), ([TERMS[0], None],))[1][1]
    expected = lambda x: jvp(lambda x: jvp(f, (x,), (TERMS[0],))[1], (x,), (TERMS[0],))[1]
    close(grad(lambda x: second(x).sum())(X), grad(lambda x: expected(x).sum())(X))
    rows = torch.stack([X, X * 0.9])
    close(vmap(second)(rows), torch.stack([expected(row) for row in rows]))
    close(laplacian(f)(X), by_trace(f)(X))
    once_more = lambda x: f(x * 0.5 + 0.1).sin()
    close(vmap(laplacian(once_more))(rows), torch.stack([by_trace(once_more)(row) for row in rows]))


def test_all_that_is_known_is_tried_and_written() -> None:
    """Every operator with power series is among those that the functions above call, and becomes a program."""
    seen: set[Any] = set()
    taken_apart: set[Any] = set()

    def watched(cls: Any) -> Any:
        class Watched(cls, whole=True):  # type: ignore[misc]
            rule_kind = cls.rule_kind

            def run_program(self, program: Any, args: Any, whole: bool = True) -> Any:
                out = super().run_program(program, args, whole)
                operators = {instruction.op for instruction in program.instructions}
                seen.update(operators)
                taken_apart.update(operators if out is NotImplemented else ())
                return out

        return Watched

    for f in UNARY.values():
        jet_level = watched(JetInterpreter)(2, f)
        run_transformed(jet_level, lambda: f(jet_level.carry(X, terms=(TERMS[0], None))))  # noqa: B023
        laplacian_level = watched(LaplacianInterpreter)(1, f)
        run_transformed(laplacian_level, lambda: f(laplacian_level.carry(X, slopes=TERMS[0][None], bend=None)))  # noqa: B023
    constant = {op for op in KNOWN if op is not DERIVATIVE and DERIVATIVES.get(op).tangent == NO_TANGENT}
    # of two arguments that move, below; and what only formulas are made of
    others = {aten.pow.Tensor_Tensor, aten.zeros_like.default, DERIVATIVE}
    assert KNOWN - seen - constant - others == set()
    # by a number, in laplacian; and what is programs for grad, vmap and jvp, and an operator with a rule here
    assert taken_apart == {aten.div.Tensor, aten.celu.default, aten.hardswish.default}


def test_two_arguments() -> None:
    y = torch.tensor([0.9, -1.2, 0.5], dtype=DOUBLE)
    others = [TERMS[1], None, TERMS[0]]
    for f in (
        lambda x, y: x * y, lambda x, y: x / y, lambda x, y: torch.where(x > y, x * y, y / x), lambda x, y: x - 2 * y,
        lambda x, y: (x + 2) ** y, lambda x, y: torch.atan2(x, y), lambda x, y: aten.tanh_backward(x, y * x),
    ):  # fmt: skip
        along = lambda t, f=f: f(curve(TERMS)(t), y + TERMS[1] * t + TERMS[0] * t**3 / 6)
        close(jet(f, (X, y), (TERMS, others))[1], by_nesting(along, 3))
        both = lambda z, f=f: f(z[:3], z[3:])
        close(laplacian(both)(torch.cat([X, y])), by_trace(both)(torch.cat([X, y])))


def test_none_is_a_term_of_zeros() -> None:
    f = lambda x: (x @ x.outer(x)).tanh() / (x * x + 1)
    zero = torch.zeros(3, dtype=DOUBLE)
    for pattern in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)):
        terms = [t if there else None for t, there in zip(TERMS, pattern, strict=True)]
        value, found = jet(f, (X,), (terms,))
        close(found, jet(f, (X,), ([zero if t is None else t for t in terms],))[1])
        assert all(isinstance(t, Tensor) and t.shape == value.shape for t in found)


def test_complex_numbers() -> None:
    z = torch.complex(X, X.flip(0))
    terms = [torch.complex(a, b) for a, b in zip(TERMS, TERMS[1:] + TERMS[:1], strict=True)]
    for f in (torch.exp, torch.tanh, torch.sigmoid, torch.log, torch.sqrt, lambda z: 1j * z / (z * z + 2), torch.square,
              lambda z: z.abs() * z, lambda z: aten.tanh_backward(z, z.sin()), lambda z: z * X):  # fmt: skip
        along = lambda t, f=f: f(z + sum(term * t**k / math.factorial(k) for k, term in enumerate(terms, 1)))
        close(jet(f, (z,), (terms,))[1], by_nesting(along, 3))
    turned = lambda x: (x * 1j).exp() / (2j + x) + x
    close(jet(turned, (X,), (TERMS,))[1], by_nesting(lambda t: turned(curve(TERMS)(t)), 3))
    close(
        laplacian(turned)(X),
        torch.complex(*(by_trace(lambda x, f=f: f(turned(x)))(X) for f in (torch.real, torch.imag))),
    )


def test_what_is_broadcast_and_promoted() -> None:
    row, column = torch.randn(1, 3, dtype=DOUBLE), torch.randn(2, 1, dtype=DOUBLE)
    f = lambda x: x + column
    (first, second) = jet(f, (row,), ([row, None],))[1]
    assert first.shape == second.shape == (2, 3) and torch.equal(first, row.expand(2, 3)) and not second.any()
    narrow = torch.randn(3)
    value, (first,) = jet(lambda x: x * 1 + X, (narrow,), ([narrow],))
    assert value.dtype is first.dtype is DOUBLE
    value, slopes, bend = laplacian(lambda x: (x * x + X, x.float() + column.float()), with_value=True)(narrow)
    assert [t.dtype for t in (*value, *slopes, *bend)] == [DOUBLE, torch.float32] * 3
    assert [tuple(t.shape) for t in (*slopes, *bend)] == [(3, 3), (2, 3, 3), (3,), (2, 3)]
    close(bend[0], torch.full((3,), 2.0, dtype=DOUBLE))


def test_high_orders() -> None:
    x, one = torch.tensor(0.3), torch.tensor(1.0)
    line = [one, *[None] * 59]
    assert torch.allclose(torch.stack(jet(torch.exp, (x,), (line,))[1]), x.exp())  # 60! is no number of float32
    wave = jet(lambda x: (2 * x).sin(), (x,), (line,))[1]
    expected = [2.0**n * math.sin(0.6 + n * math.pi / 2) for n in range(1, 61)]
    torch.testing.assert_close(torch.stack(wave), torch.tensor(expected), rtol=1e-4, atol=1e-3)
    # sums of 41 products: of e^(at) and e^(bt) the product is e^((a+b)t)
    one, both = (
        torch.ones((), dtype=DOUBLE),
        [[torch.tensor(c**n, dtype=DOUBLE) for n in range(1, 41)] for c in (0.9, 0.4)],
    )
    for f in (torch.mul, lambda x, y: x / (1 / y), lambda x, y: (x.log() + y.log()).exp()):
        found = jet(f, (one, one), both)[1]
        close(torch.stack(found), torch.tensor([1.3**n for n in range(1, 41)], dtype=DOUBLE))


def test_how_little_is_computed() -> None:
    """Operators, counted: no zero, no factor 1 and no value takes part twice."""
    size = lambda name, pattern, order: len(coefficients(operator_program(name), pattern, order).program.instructions)
    assert size(aten.tanh.default, ((True, False),), 2) == 5
    assert size(aten.exp.default, ((True, False, False),), 3) == 1 + 3 + 2
    assert size(aten.mul.Tensor, ((True, True), (True, True)), 2) == 1 + 2 + 3
    assert size(aten.mul.Tensor, ((True, True), FIXED), 2) == size(aten.mul.Tensor, ((True, True), NUMBER), 2) == 3
    assert size(aten.add.Tensor, ((True, True), FIXED), 2) == 1
    product = bending(operator_program(aten.mul.Tensor), (0, 1), (), ())
    assert product is not None and product.products == ((0, 1),)
    assert len(product.values.program.instructions) == 2 and len(product.slopes.program.instructions) == 2
    sum_ = bending(operator_program(aten.add.Tensor), (0, 1), (0,), ())
    assert sum_ is not None and sum_.products == () and len(sum_.values.program.instructions) == 1


def test_layers_do_not_double_from_order_to_order() -> None:
    layers = ("linear", "mm", "matmul", "addmm", "convolution", "conv1d")

    def count(listing: Listing) -> int:
        return sum(op.name().removeprefix("aten::") in layers for op in listing.ops)

    x, w = logits(3, 3), logits(3, 3)
    for f in (
        F.linear,
        lambda x, w: F.linear(x, w, X),
        lambda x, w: F.conv1d(x, w[:, None, :2], X, groups=3),
        torch.mm,
    ):
        with Listing() as counted:
            jet(f, (x, w), ([x] * 6, [w] * 6))
        assert count(counted) == 1 + sum(n + 1 for n in range(1, 7))
        with Listing() as counted:
            jet(lambda x, f=f: f(x, w), (x,), ([x, None, x, None, None, None],))
        assert count(counted) == 3


def test_rules_and_derivatives_of_the_users_own() -> None:
    sin = aten.sin.default
    x, line = X, ([TERMS[0], None],)
    twice = lambda x: (x.sin(), x.sin() * 2)
    plain = jet(twice, (x,), line)[1]

    def rule(level: Any, x: Any) -> Any:
        return level.constant(x.value.sin())

    with rules_in_scope(JetInterpreter.rules, {sin: rule}):
        assert not any(t.any() for terms in jet(twice, (x,), line)[1] for t in terms)
    with rules_in_scope(LaplacianInterpreter.rules, {sin: rule}):
        assert not laplacian(torch.sin)(x).any()
    with overriding(DERIVATIVES, sin):
        derivative(sin, self=lambda grad, self: 2 * self * grad, tangent="elementwise")  # that of the square
        close(jet(torch.sin, (x,), line)[1], jet(torch.square, (x,), line)[1])
        close(laplacian(torch.sin)(x), laplacian(torch.square)(x))
    close(jet(twice, (x,), line)[1], plain)


def logits(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=DOUBLE, generator=generator) * 3


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: (x * x).softmax(0),
    "softmax along a row": lambda x: x.view(2, 3).softmax(-1),
    "softmax along a column": lambda x: x.view(2, 3).softmax(0),
    "softmax of large numbers": lambda x: (400 * x).softmax(0),
    "softmax to another dtype": lambda x: x.softmax(0, dtype=torch.float32).double(),
    "softmax of a number": lambda x: x[0].softmax(0) * x,
    "log_softmax": lambda x: (x * x).log_softmax(0),
    "log_softmax of a line": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: (x.view(2, 3) * x[0]).logsumexp([0, 1], keepdim=True),
    "layer_norm": lambda x: F.layer_norm(x * x, (6,)),
    "layer_norm of a line": lambda x: F.layer_norm(
        x, (6,), torch.arange(6.0, dtype=DOUBLE), torch.ones(6, dtype=DOUBLE)
    ),
    "layer_norm over two": lambda x: F.layer_norm(x.view(1, 2, 3) * x[:3], (2, 3), eps=0.1),
    "layer_norm by moving weights": lambda x: F.layer_norm(x, (6,), x.sin(), x),
    "linear": lambda x: F.linear(x.view(2, 3), torch.arange(6.0, dtype=DOUBLE).view(2, 3)),
    "linear by moving weights": lambda x: F.linear(x.view(2, 3), x.view(2, 3).sin(), x[:2]),
    "a convolution": lambda x: F.conv1d(
        x.view(1, 2, 3), torch.ones(2, 2, 2).double(), torch.ones(2).double(), padding=1
    ),
    "a convolution by moving weights": lambda x: F.conv1d(x.view(1, 1, 6), x[:2].view(1, 1, 2), x[3:4]),
    "addmm": lambda x: torch.addmm(x[:3], x.view(2, 3), torch.outer(x[3:], x[:3])),
    "addmm with numbers": lambda x: torch.addmm(x[:3], x.view(2, 3), torch.ones(3, 3).double(), beta=0.5, alpha=-2),
    "baddbmm": lambda x: torch.baddbmm(x[:1], x.view(1, 2, 3), x.view(1, 3, 2), alpha=0.5),
    "addmv": lambda x: torch.addmv(x[:2], x.view(2, 3), x[:3], beta=2),
    "reshapes": lambda x: (x.view(2, 3).flatten() * x).unflatten(0, (3, 2)).squeeze() + x[0].reshape_as(x[0]),
    "a constant like a moving one": lambda x: torch.ones(6, dtype=DOUBLE).view_as(x.view(2, 3).T.reshape(6)) * x,
    "cat": lambda x: torch.cat([x * x, torch.ones(2, dtype=DOUBLE), x.sin()]),
    "stack": lambda x: torch.stack([torch.ones(6, dtype=DOUBLE), x * x], 1),
    "products": lambda x: (x.view(2, 3) @ x.view(3, 2)) @ torch.ones(2, 4, dtype=DOUBLE),
    "sums and moves": lambda x: (x * x).view(2, 3).sum(1).mean() * x.view(2, 3).T.movedim(0, 1)[1].flip(0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    f, x, v, w = LAYERS[name], logits(6) / 3, logits(6), logits(6).flip(0)
    rtol = 1e-4 if "dtype" in name else 1e-8
    value, slopes, bend = laplacian(f, with_value=True)(x)
    close(value, f(x))
    close(slopes, torch.stack([jvp(f, (x,), (e,))[1] for e in torch.eye(6, dtype=DOUBLE)], -1), rtol)
    close(bend, by_trace(f)(x), rtol)
    along = lambda t: f(x + v * t + w * t**3 / 6)
    close(jet(f, (x,), ([v, None, w],))[1], by_nesting(along, 3), rtol)


def test_nothing_but_minus_infinity() -> None:
    x = torch.full((2, 3), -math.inf, dtype=DOUBLE)
    x[1, 0] = 2.0
    value, (first, second) = jet(lambda x: x.logsumexp(1), (x,), ([torch.ones_like(x), None],))
    assert value.tolist() == [-math.inf, 2.0] and first.tolist() == [0.0, 1.0] and second.tolist() == [0.0, 0.0]
