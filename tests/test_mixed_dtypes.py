"""Arguments of different dtypes: a tangent has its value's dtype and a gradient its argument's, under every nesting.

Programs, batching rules and cotangents that are added up count on it: after one tangent of a wider dtype, gradients
further back come out in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opinfo_problem import UNINITIALIZED
from sampling import reseed, sampling
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

from functrans import grad, jvp, vjp, vmap
from functrans.errors import CallError

Function = Callable[..., Any]


def is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def first(x: Tensor) -> Tensor:
    return x.reshape(-1)[0].clone()


def casts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The same numbers in other dtypes: all in half precision; each narrower or wider, or without dimensions."""
    yield [x.bfloat16() for x in tensors]
    for k in range(len(tensors) if len(tensors) > 1 else 0):
        yield [x.float() if i == k else x for i, x in enumerate(tensors)]
        yield [x.bfloat16() if i == k else x.float() for i, x in enumerate(tensors)]
        yield [first(x) if i == k else x.float() for i, x in enumerate(tensors)]
        yield [first(x).float() if i == k else x.bfloat16() for i, x in enumerate(tensors)]


def functions(name: str, samples: int) -> Iterator[tuple[Function, list[Tensor]]]:
    """Of samples of an operator: a function of its tensors of floats, and these."""
    info = next(op for op in op_db if op.full_name == name)
    with sampling():
        reseed(0)
        found = [s for s, _ in zip(info.sample_inputs("cpu", torch.float64), range(samples), strict=False)]
    for sample in found:
        flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, a in enumerate(flat) if is_number(a)]
        if not places or any(flat[i].layout is not torch.strided or not flat[i].numel() for i in places):
            continue

        def f(*tensors: Tensor, flat: Any = flat, places: Any = places, spec: Any = spec) -> list[Tensor]:
            reseed(0)
            given = list(flat)
            for i, x in zip(places, tensors, strict=True):
                given[i] = x
            x, args, kwargs = tree_unflatten(given, spec)
            return list(filter(is_number, tree_flatten(info(x, *args, **kwargs))[0]))

        yield f, [flat[i].detach() for i in places]


def dtypes(x: Any) -> list[torch.dtype]:
    return [t.dtype for t in tree_flatten(x)[0]]


def fit(f: Function, tensors: list[Tensor]) -> bool:
    """Check all dtypes, where the operator takes the arguments; say whether it does."""
    every, x = tuple(range(len(tensors))), tuple(tensors)
    try:
        values = f(*x)
    except Exception:  # noqa: BLE001 - not with these
        return False
    wanted, asked = dtypes(values), dtypes(x)
    loss = lambda *x: sum(o.double().real.sum() if o.is_complex() else o.double().sum() for o in f(*x))
    forward = lambda *y: jvp(f, y, x)
    forward_slopes = lambda *y: grad(lambda *z: jvp(loss, z, x)[1], argnums=every)(*y)
    rows = [torch.stack([t, t]) for t in x]
    for run, expected in (
        (lambda: forward(*x), wanted * 2),
        (lambda: vjp(f, *x)[1](values), asked),
        (lambda: jvp(grad(loss, argnums=every), x, x), asked * 2),
        (lambda: forward_slopes(*x), asked),
        (lambda: vmap(forward, randomness="same")(*rows), wanted * 2),
        (lambda: vmap(forward_slopes, randomness="same")(*rows), asked),
    ):
        try:
            found = dtypes(run())
        except Exception:  # noqa: BLE001, S112 - a kernel that takes no such arguments: no wrong numbers
            continue
        assert found == expected
    return True


#: operators whose kernels, or whose derivatives' formulas, mix dtypes in a way of their own
MIXING = (
    "add", "addcdiv", "addcmul", "addr", "atan2", "block_diag", "clamp", "copysign", "cross",
    "div.no_rounding_mode", "dist", "fmax", "frexp", "hypot", "index_add", "index_fill", "index_put", "inner",
    "ldexp", "lerp", "linalg.vector_norm", "logaddexp", "masked.mean", "masked.var", "masked_fill",
    "masked_scatter", "maximum", "mul", "nn.functional.conv3d", "nn.functional.conv_transpose1d",
    "nn.functional.huber_loss", "nn.functional.mse_loss", "nn.functional.prelu", "nn.functional.rms_norm",
    "nn.functional.smooth_l1_loss", "nn.functional.soft_margin_loss", "outer", "pow", "remainder", "std_mean",
    "sub", "true_divide", "special.xlog1py", "where", "xlogy",
)  # fmt: skip

NAMES = [
    op.full_name for op in op_db
    if torch.float64 in op.supported_dtypes("cpu") and op.name not in UNINITIALIZED and "jiterator" not in op.name
]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in MIXING if n in NAMES])
def test_dtypes(name: str) -> None:
    assert sum(fit(f, given) for f, tensors in functions(name, 2) for given in casts(tensors))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_of_every_operator(name: str) -> None:
    for f, tensors in functions(name, 4):
        for given in casts(tensors):
            fit(f, given)


def test_values_of_mixed_dtypes() -> None:
    """By the same numbers in float64."""
    single, double = torch.tensor([0.5, -1.5, 2.0]), torch.tensor(0.75, dtype=torch.float64)
    for f, rest in ((torch.addr, (single, single)), (torch.block_diag, (single,)), (torch.div, (single,))):
        batch = torch.stack([double, 2 * double])
        exact = tuple(x.double() for x in rest)
        for run in (vmap(f, in_dims=(0, *[None] * len(rest))), lambda x, *r, f=f: torch.stack([f(a, *r) for a in x])):
            torch.testing.assert_close(run(batch, *rest).double(), vmap(f, (0, *[None] * len(rest)))(batch, *exact))
        assert vmap(f, (0, *[None] * len(rest)))(batch, *rest).dtype is f(double, *rest).dtype


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss])
def test_losses_against_truth_values(loss: Function) -> None:
    x = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
    for f in (lambda x: loss(x, x > 0), lambda x: loss(x > 0, x)):
        plain = lambda x: loss(x, (x > 0).double())
        for transformed in (
            grad,
            lambda f: lambda x: jvp(f, (x,), (x,))[1],
            lambda f: lambda x: jvp(grad(f), (x,), (x,))[1],
        ):
            torch.testing.assert_close(transformed(f)(x), transformed(plain)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_frexp_of_large_numbers(dtype: torch.dtype) -> None:
    """The mantissa of x is x / 2**e, whose power may be more than the dtype holds."""
    x = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, 3.0], dtype=dtype)
    mantissa = lambda x: torch.frexp(x)[0]
    assert torch.equal(jvp(mantissa, (x,), (x,))[1], mantissa(x))
    assert torch.equal(vjp(mantissa, x)[1](x)[0], mantissa(x))


def test_a_loss_of_complex_numbers_is_conjugate() -> None:
    """Real inputs keep real gradients; the real part of <J v, u> is that of <v, J^H u>."""
    x, y = torch.tensor([0.3, -1.2], dtype=torch.float64), torch.tensor([0.5 + 0.4j, 1 - 2j], dtype=torch.complex128)
    u = torch.tensor([0.7 - 0.2j, 0.1 + 0.9j], dtype=torch.complex128)
    for f in (
        lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none"),
        lambda x, y: F.soft_margin_loss(x.to(y.dtype), y, reduction="none"),
    ):
        tangents = x.flip(0), y.flip(0)
        moved = jvp(f, (x, y), tangents)[1]
        pulled = vjp(f, x, y)[1](u)
        assert dtypes(pulled) == [torch.float64, torch.complex128]
        back = sum((p.conj() * t).real.sum() for p, t in zip(pulled, tangents, strict=True))
        torch.testing.assert_close((u.conj() * moved).real.sum(), back)
        step = 1e-6
        ahead, behind = (f(*(p + s * t for p, t in zip((x, y), tangents, strict=True))) for s in (step, -step))
        torch.testing.assert_close(moved, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


def test_primals_that_do_not_move() -> None:
    """Integers, truth values and other objects have None for a tangent."""
    x, n = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([1, 2])
    slope = n * x ** (n - 1)
    power = lambda x, n: x**n
    torch.testing.assert_close(jvp(power, (x, n), (x, None)), (x**n, slope * x))
    primals, tangents = ({"x": x, "n": n}, 2), ({"x": x, "n": None}, None)
    torch.testing.assert_close(jvp(lambda d, k: d["x"] * d["n"] * k, primals, tangents)[1], 2 * n * x)
    torch.testing.assert_close(vmap(lambda x, n: jvp(power, (x, n), (x, None))[1])(x, n), slope * x)
    second = grad(lambda x: jvp(power, (x, n), (torch.ones_like(x), None))[1].sum())(x)
    torch.testing.assert_close(second, n * (n - 1) * x ** (n - 2))
    nested = jvp(lambda x, n: jvp(power, (x, n), (x, None))[1], (x, n), (x, None))[1]
    torch.testing.assert_close(nested, (n - 1) * slope * x + slope * x)
    _, tangents = jvp(lambda x, n: (x > 2, n + 1, x), (x, n), (x, None))
    torch.testing.assert_close(tangents, (torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), x))
    with pytest.raises(CallError, match="at least one that is a tensor"):
        jvp(torch.abs, (n,), (None,))
    with pytest.raises(CallError, match=r"got None as tangents\[1\]"):
        jvp(torch.mul, (x, x), (x, None))


# ---------------------------------------------------------------------------------------------- small integers

INTEGERS = {
    torch.uint8: [0, 1, 5, 128, 200, 255],
    torch.int8: [0, 1, 5, -3, 100, -128],
    torch.int16: [0, 1, 5, -3, 300, 20000],
    torch.bool: [0, 1, 1, 0, 1, 0],
}
#: Functions of a number and an integer, which is an operand of their derivatives.
OF_INTEGERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "rpow": lambda x, n: torch.pow(n, x),
    "atan2": torch.atan2, "atan2 of it": lambda x, n: torch.atan2(n, x), "hypot": torch.hypot,
    "ldexp": lambda x, n: torch.ldexp(x, n.clamp(max=200)), "xlogy": torch.xlogy,
    "xlogy of it": lambda x, n: torch.xlogy(n, x), "xlog1py": lambda x, n: torch.special.xlog1py(n, x),
    "addcmul": lambda x, n: torch.addcmul(x, n, n), "addcdiv": lambda x, n: torch.addcdiv(x, x, n + 300),
    "maximum": torch.maximum, "copysign": torch.copysign, "fmod": lambda x, n: torch.fmod(x, n + 300),
    "where": lambda x, n: torch.where(x > 2, x * n, n), "lerp": lambda x, n: x + (n - x) * x,
    "igamma": lambda x, n: torch.igamma(n.abs().clamp(max=60) if n.dtype.is_signed else n, x),
    "zeta": lambda x, n: torch.special.zeta(n.abs() if n.dtype.is_signed else n, x + 1),
    "soft_margin_loss": lambda x, n: F.soft_margin_loss(x / 100, n, reduction="none"),
    "poisson_nll_loss": lambda x, n: F.poisson_nll_loss(x / 100, n, reduction="none"),
    "smooth_l1_loss": lambda x, n: F.smooth_l1_loss(x, n, reduction="none"),
    "hermite": lambda x, n: torch.special.hermite_polynomial_h(x / 10, n.clamp(max=140)),
    "chebyshev": lambda x, n: torch.special.chebyshev_polynomial_u(x / 10, n.clamp(max=140)),
    "laguerre": lambda x, n: torch.special.laguerre_polynomial_l(x / 10, n.clamp(max=100)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", OF_INTEGERS)
def test_small_integers_do_not_wrap_around(name: str, dtype: torch.dtype) -> None:
    """A derivative by the other operand is that beside the same numbers in double precision."""
    f, whole = OF_INTEGERS[name], torch.tensor(INTEGERS[dtype]).to(dtype)
    x, v = torch.linspace(0.3, 4.1, 6, dtype=torch.float64), torch.linspace(-1, 2, 6, dtype=torch.float64)
    try:
        value, expected = f(x, whole), f(x, whole.double())
    except RuntimeError:
        return  # PyTorch has no such function
    if value.dtype is not torch.float64 or not torch.allclose(value, expected, equal_nan=True):
        return

    def derivatives(n: Tensor) -> list[Tensor]:
        slope = grad(lambda x: f(x, n).sum())
        first = jvp(lambda x: f(x, n), (x,), (v,))[1], slope(x), vmap(slope)(torch.stack([x, x + 1]))
        return [*first, jvp(slope, (x,), (v,))[1], grad(lambda x: slope(x) @ v)(x)]

    for found, wanted in zip(derivatives(whole), derivatives(whole.double()), strict=True):
        assert found.dtype is torch.float64
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.complex64, torch.bool], ids=str)
def test_numbers_are_copied_as_in_eager(dtype: torch.dtype) -> None:
    for number in (1.5, 1 + 2j, 2j, True, 3):
        copied = vmap(lambda x, number=number: x.clone().copy_(number))(torch.zeros(2, dtype=dtype))
        assert torch.equal(copied, torch.zeros(2, dtype=dtype).copy_(number))


def test_ldexp_keeps_the_dtype() -> None:
    x, n = torch.ones(2, dtype=torch.half), torch.tensor([1, 2], dtype=torch.uint8)
    assert grad(lambda x: torch.ldexp(x, n).sum())(x).dtype is torch.half
