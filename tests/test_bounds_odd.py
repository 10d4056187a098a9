"""bounds of both kinds where numbers are infinite, written in place, huge, or come first: sound, and in order."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

from functrans import bounds, grad, vmap
from functrans.errors import MissingRuleError

Function = Callable[[Tensor], Tensor]
METHODS = ("intervals", "linear")
MASK = torch.tensor([False, True, False, False, True, False])
CAUSAL = torch.ones(2, 2, dtype=torch.bool).triu(1)
INFINITE = torch.tensor([0.0, -torch.inf, 0.0, torch.inf, 0.0, 0.0], dtype=torch.float64)


def within(f: Function, low: Tensor, high: Tensor, method: str, points: Any = None) -> tuple[Tensor, Tensor]:
    """The bounds, which contain what ``f`` returns at ends and points inside, and are NaN where nothing is known."""
    least, most = bounds(f, method=method)(low, high)
    assert not bool((least > most).any())
    if points is None:
        sides = torch.rand(80, *low.shape, dtype=low.dtype, generator=torch.Generator().manual_seed(0))
        points = [low + (high - low) * s for s in (*sides, *sides.round())]
    for x in points:
        y, room = f(x), 1e-11 * (1 + x[x.isfinite()].abs().sum())
        assert not bool(((y < least - room) | (y > most + room)).any())
    return least, most


def softplus(beta: float, threshold: float) -> Function:
    return lambda x: F.softplus(x, beta, threshold) - x


def halved(x: Tensor) -> Tensor:
    y = torch.full_like(x, 2.0)
    y.sub_(x)
    z = y + x  # of y as it is now
    y.mul_(x)
    return z * y - x


ODD: dict[str, Function] = {
    "masked": lambda x: x.masked_fill(MASK, -torch.inf).exp() - x,
    "masked with the least number": lambda x: x.masked_fill(MASK, torch.finfo(x.dtype).min).sigmoid() - x,
    "infinite numbers added": lambda x: (x + INFINITE).tanh() + (2 * (x - INFINITE)).tanh() - x,
    "greatest of masked": lambda x: x.masked_fill(MASK, -torch.inf).view(2, 3).amax(1) - x[:2],
    "logsumexp of masked": lambda x: x.masked_fill(MASK, -torch.inf).view(2, 3).logsumexp(1) - x[:2],
    "masked softmax": lambda x: (x[:4].view(2, 2).masked_fill(CAUSAL, -torch.inf).softmax(1) @ x.view(2, 3)).flatten(),
    "causal attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 2, 3)] * 3, is_causal=True).flatten(),
    "multiplied by infinity": lambda x: (x.exp() * (1 + INFINITE.abs())).sigmoid() - x,
    "divided by zero": lambda x: (1 + x * x) / MASK.double() - x,
    "a constant that is written": lambda x: torch.ones_like(x).sub_(x) + x,
    "written twice": halved,
    "written in parts": lambda x: torch.zeros(6, dtype=x.dtype).index_copy_(0, torch.tensor([0, 3]), x[:2]).mul_(x) - x,
    "hinge": lambda x: F.hinge_embedding_loss(x[:3], MASK[:3] * 2.0 - 1, reduction="none") + x[:3],
    "numbers first": lambda x: torch.sub(1.0, x) + torch.mul(2, x) + torch.add(3, x) - torch.div(1, 3 + x),
    "zero by": lambda x: torch.div(0.0, x.square() + 1) + torch.mul(0, x),
    "softplus that jumps": softplus(3.0, 0.2),
    "softplus turned": softplus(-2.0, 0.5),
    "softplus": softplus(1.0, -1.0),
    "pooled with a sign": lambda x: F.avg_pool2d(x.view(1, 1, 6), 1, divisor_override=3).flatten() - x,
    "truth of numbers": lambda x: torch.stack([x.all(), x.any(), x.view(2, 3).all(0)[1], x.clamp(0.1).all()]).double(),
    "product of a number": lambda x: x[0].prod(0, keepdim=True) * x.prod(0, keepdim=True),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ODD)
def test_odd_programs(name: str, method: str) -> None:
    for seed, width in itertools.product(range(4), (0.0, 0.1, 3.0)):
        generator = torch.Generator().manual_seed(seed)
        middle = torch.randn(6, dtype=torch.float64, generator=generator)
        radius = width * torch.rand(6, dtype=torch.float64, generator=generator)
        within(ODD[name], middle - radius, middle + radius, method)


def test_what_is_masked_does_not_loosen_the_others() -> None:
    low, high = torch.tensor([0.25, 1.0, 2.0]), torch.tensor([0.75, 1.5, 3.0])
    masked = lambda x: (x - x.masked_fill(torch.tensor([False, True, False]), -torch.inf))[[0, 2]]
    least, most = bounds(masked, method="linear")(low, high)
    assert least.abs().max() < 1e-6 and most.abs().max() < 1e-6
    at = torch.linspace(-1, 1, 6, dtype=torch.float64)
    attended = bounds(ODD["causal attention"], method="linear")
    wide = lambda radius: torch.sub(*reversed(attended(at - radius, at + radius))).sum()
    tokens = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    causal = lambda x: F.scaled_dot_product_attention(*[x.unsqueeze(0)] * 3, is_causal=True)
    for method in METHODS:
        assert all(end.isfinite().all() for end in within(causal, tokens - 0.1, tokens + 0.1, method))
    radii = torch.tensor([0.1, 0.3], dtype=torch.float64)
    slopes = (vmap(wide)(radii + 1e-6) - vmap(wide)(radii - 1e-6)) / 2e-6
    torch.testing.assert_close(vmap(grad(wide))(radii), slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_one_end_may_be_known(method: str) -> None:
    """An interval of a product that is NaN at one end says nothing there, and is not closed by the other end."""
    x, y = torch.tensor([[-torch.inf, 1.0], [0.0, 2.0]]), torch.tensor([[1.0, -2.0], [2.0, 1.0]])
    product = bounds(lambda z: z["x"] @ z["y"], method=method)
    least, most = product({"x": x[0], "y": y[0]}, {"x": x[1], "y": y[1]})
    assert not least > -4 and not most < 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["clamp_min", "relu", "abs", "tanh", "exp", "sin", "square", "sigmoid", "hardtanh"])
def test_widths_that_overflow(name: str, method: str) -> None:
    f = {"clamp_min": lambda x: x.clamp_min(-6), "hardtanh": F.hardtanh}.get(name, getattr(torch, name, None))
    ends = torch.tensor([1e308, 1.7e308, 3.0, 1e200], dtype=torch.float64)
    within(f, -ends, ends, method, [-ends, ends, ends / 2, -ends / 3, ends * 0])


def test_pools_that_fall_are_no_monotone_functions() -> None:
    with pytest.raises(MissingRuleError):
        bounds(lambda x: F.avg_pool2d(x, 2, divisor_override=-3))(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))


#: what draws, rounds to another dtype, or has a pole in the box: at a zero of either sign
UNFIT = (
    "rand", "dropout", "rrelu", "bernoulli", "multinomial", "empty", "attention", "uniform", "cauchy", "exponential",
    "geometric", "log_normal", "normal",
)  # fmt: skip
ROUNDED = ("bfloat16", "half", "float", "to", "type_as", "_to_copy")
POLES = ("reciprocal", "div", "true_divide", "addcdiv", "pow", "rsqrt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_every_operator(method: str) -> None:
    """The samples of PyTorch's operators, in small, wide, half infinite boxes and such that end in 0."""
    compared = set()
    for info in op_db:
        if torch.float64 not in info.dtypes or info.name in ROUNDED or any(part in info.name for part in UNFIT):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(info.name.encode()))
        for sample in itertools.islice(info.sample_inputs("cpu", torch.float64, requires_grad=False), 4):
            middle = [a for a in (sample.input, *sample.args) if is_float(a)]
            fits = is_float(sample.input) and all(x.layout is torch.strided for x in middle)
            if not fits or sum(map(torch.numel, middle)) > 80 or not all(x.isfinite().all() for x in middle):
                continue
            draw = lambda x, generator=generator: torch.rand(x.shape, dtype=x.dtype, generator=generator)
            for kind in ("small", "wide", "infinite", "zero"):
                if kind == "zero" and info.name in POLES:
                    continue
                if compare(info, sample, [ends(kind, x, draw) for x in middle], draw, method):
                    compared.add(info.name)
    assert len(compared) > 150


def is_float(a: Any) -> bool:
    return isinstance(a, Tensor) and a.dtype is torch.float64


def ends(kind: str, x: Tensor, draw: Function) -> tuple[Tensor, Tensor]:
    if kind == "zero":
        return -draw(x) * (draw(x) < 0.5), draw(x) * (draw(x) < 0.5)
    radius = (0.1 if kind == "small" else 3) * draw(x)
    low, high = x - radius, x + radius
    if kind == "infinite":
        low, high = torch.where(draw(x) < 0.2, -torch.inf, low), torch.where(draw(x) < 0.2, torch.inf, high)
    return low, high


def compare(info: Any, sample: Any, box: list[tuple[Tensor, Tensor]], draw: Function, method: str) -> bool:
    def f(xs: list[Tensor]) -> list[Tensor]:
        rest = iter(xs)
        args = [next(rest) if is_float(a) else a for a in (sample.input, *sample.args)]
        return [y.double() for y in tree_leaves(info.op(*args, **sample.kwargs)) if isinstance(y, Tensor)]

    try:
        least, most = bounds(f, method=method)([low for low, _ in box], [high for _, high in box])
    except (MissingRuleError, NotImplementedError, AssertionError, LookupError):  # without a rule, or a kernel
        return False
    for _ in range(6):
        xs = [point(low, high, draw(low)) for low, high in box]
        try:
            ys = f(xs)
        except RuntimeError:  # a matrix that is not definite, say
            continue
        room = 1e-8 * (1 + sum(x.abs().sum() for x in xs))
        for y, low, high in zip(ys, least, most, strict=True):
            what = f"{info.name} {sample.kwargs}"
            assert not bool((low > high + room).any()), what
            assert not bool(((y < low - room * (1 + y.abs())) | (y > high + room * (1 + y.abs()))).any()), what
    return True


def point(low: Tensor, high: Tensor, at: Tensor) -> Tensor:
    """Inside, each third number at an end; no infinite ones."""
    low = torch.where(low.isinf(), torch.where(high.isinf(), -50, high - 50), low)
    high = torch.where(high.isinf(), low + 50, high)
    return torch.where(at < 1 / 6, low, torch.where(at > 5 / 6, high, low + (high - low) * at)) + 0.0
