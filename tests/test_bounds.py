"""bounds: every value of the function at sampled points and at all corners lies in between; where each number is used
once the ends are reached."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from functrans import bounds, grad, hessian, jvp, sparse_jacobian, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError, MissingRuleError

Function = Callable[[Tensor], Tensor]
#: what rounding may take an end off, in float64
ROUNDING = 1e-11


def box(shape: tuple[int, ...], low: float, high: float, seed: int) -> tuple[Tensor, Tensor]:
    """Intervals of different width inside of [low, high]."""
    generator = torch.Generator().manual_seed(seed)
    a, b = low + (high - low) * torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    middle, width = (a + b) / 2, torch.rand(shape, dtype=torch.float64, generator=generator)
    return middle + (torch.minimum(a, b) - middle) * width, middle + (torch.maximum(a, b) - middle) * width


def points(low: Tensor, high: Tensor, count: int = 200) -> Tensor:
    """Corners, all of them if they are few, and points inside."""
    n = low.numel()
    if n <= 7:
        sides = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    else:
        sides = (torch.rand(count, n) > 0.5).double()
    at = torch.cat([sides, torch.rand(count, n, dtype=torch.float64)]).reshape(-1, *low.shape)
    return low + at * (high - low)


def values(f: Function, low: Tensor, high: Tensor) -> Tensor:
    return torch.stack([f(x) for x in points(low, high)])


def check(f: Function, low: Tensor, high: Tensor) -> None:
    least, most = bounds(f)(low, high)
    found = values(f, low, high)
    assert least.shape == most.shape == found.shape[1:]
    assert bool((found >= least - ROUNDING).all()) and bool((found <= most + ROUNDING).all())
    assert bool((most - least).isfinite().all())


torch.manual_seed(0)
WEIGHT, KERNEL = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
MASK, PLACES = torch.tensor([True, False, True, False, False, True]), torch.tensor([5, 0, 0, 3, 1, 1])
ANY = (-2.0, 2.0)
POSITIVE = (0.1, 3.0)

#: pointwise functions, by where they are defined
POINTWISE: dict[tuple[float, float], list[Function]] = {
    ANY: [
        torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.exp2, torch.expm1, torch.erf, torch.erfc, torch.abs,
        torch.square, torch.neg, torch.floor, torch.ceil, torch.round, torch.trunc, torch.sign, torch.atan, torch.sinh,
        torch.cosh, torch.asinh, F.silu, F.mish, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.hardswish, F.elu,
        F.leaky_relu, F.hardtanh, F.relu6, F.hardsigmoid, F.softsign, F.softplus, F.logsigmoid, F.selu, F.celu,
        F.tanhshrink, F.softshrink, F.hardshrink, lambda x: x.clamp(-0.5, 0.7), lambda x: x**3, lambda x: x**4,
        lambda x: 1 - x, lambda x: x - 0.3, lambda x: -2 * x, lambda x: x / -3, lambda x: x * x,
        lambda x: torch.sub(1.0 + x, x, alpha=-2), lambda x: torch.where(x > 0.3, x, x * x - 1),
        lambda x: torch.where(x <= 0.3, x, -x), lambda x: x.clone().mul_(2).add_(x), lambda x: x.masked_fill(MASK, 3),
        lambda x: torch.where(MASK, x, -x), lambda x: torch.where((x > 0.3) & (x < 1) | (x == -1), x, -x),
        lambda x: torch.where(~(x.floor() != 0), x, -x), lambda x: x.clamp(min=0).pow(0),
    ],
    (-9.0, 9.0): [torch.sin, torch.cos, lambda x: (3 * x).sin() * x.cos()],
    POSITIVE: [
        torch.log, torch.log2, torch.log10, torch.log1p, torch.sqrt, torch.rsqrt, torch.reciprocal, lambda x: x**0.5,
        lambda x: x**-1, lambda x: x**-2, lambda x: 2 / x,
    ],
    (-0.9, 0.9): [torch.asin, torch.atanh],
    (1.0, 3.0): [torch.acosh],
}  # fmt: skip
CASES = [(f, limits) for limits, functions in POINTWISE.items() for f in functions]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_pointwise(case: int) -> None:
    f, limits = CASES[case]
    for seed in range(8):
        check(f, *box((6,), *limits, seed))


#: functions of a vector of 6
VECTOR: dict[str, Function] = {
    "products": lambda x: x[:3] * x[3:],
    "quotient": lambda x: x[:3] / (x[3:].abs() + 0.1),
    "quotient by a constant": lambda x: x / torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, 6.0], dtype=torch.float64),
    "lerp": lambda x: torch.lerp(x[:3], x[3:], 0.3),
    "addcmul": lambda x: torch.addcmul(x[:3], x[3:], x[:3], value=-2),
    "linear": lambda x: F.linear(x, WEIGHT, WEIGHT[:, 0]),
    "matrices": lambda x: x.view(2, 3) @ x.view(3, 2),
    "batched": lambda x: torch.einsum("bij,bjk->bik", x.view(1, 2, 3), x.view(1, 3, 2)),
    "dot": lambda x: x[:3].dot(x[3:]),
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.view(2, 3).log_softmax(1),
    "logsumexp": lambda x: x.view(2, 3).logsumexp(1),
    "cross entropy": lambda x: F.cross_entropy(x, torch.tensor(1)),
    "mean square": lambda x: F.mse_loss(x, torch.ones(6, dtype=torch.float64)),
    "layer norm": lambda x: F.layer_norm(x.view(2, 3), (3,), WEIGHT[0, :3], WEIGHT[1, :3]),
    "variance": lambda x: torch.stack([x.var(), x.view(2, 3).std(1).sum(), x.var(correction=0)]),
    "norm": lambda x: torch.stack([x.norm(), x.view(2, 3).norm(dim=1).sum()]),
    "extremes": lambda x: torch.stack([x.max(), x.amin(), x.view(2, 3).max(1)[0].sum()]),
    "product of all": lambda x: x.view(2, 3).prod(1) + x.prod(),
    "running": lambda x: x.cumsum(0) + x.cummax(0)[0],
    "moved": lambda x: torch.cat([x.flip(0)[2:], x[PLACES], x.view(2, 3).t().reshape(6).roll(1), x.gather(0, PLACES)]),
    "written": lambda x: x.clone().index_put_((PLACES[:2],), x[:2] * 2).scatter_add(0, PLACES, x),
    "padded": lambda x: F.pad(x, (1, 2), value=4.0).unfold(0, 3, 2),
    "maxima": lambda x: torch.maximum(x[:3], x[3:]) - torch.minimum(x[:3], x[1:4]),
    "cosine": lambda x: F.cosine_similarity(x[:3], x[3:], 0),
    "vmap": lambda x: vmap(lambda row: (row * row).sum() * row)(x.view(2, 3)),
    "gradient": grad(lambda x: (WEIGHT @ x).tanh().square().sum()),
    "gradient of relu": grad(lambda x: ((WEIGHT @ x).relu() * WEIGHT[:, 0]).sum()),
    "tangent": lambda x: jvp(lambda t: t.sin() * t.roll(1), (x,), (x.flip(0),))[1],
    "bounds": lambda x: torch.stack(bounds(lambda t: t * t.sin())(x - 0.1, x + 0.2)),
    "constant": lambda x: torch.ones(2, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTOR)
def test_functions_of_vectors(name: str) -> None:
    for seed in range(6):
        check(VECTOR[name], *box((6,), *ANY, seed))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=2), (1, 2, 5, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (1, 2, 3, 3)),
    "batch norm": (lambda: nn.BatchNorm2d(2).eval(), (2, 2, 3, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(2), (2, 2, 3, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "rms norm": (lambda: nn.RMSNorm(4), (2, 4)),
    "pools": (
        lambda: nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1)), (1, 2, 7, 6)
    ),
    "adaptive maximum": (lambda: nn.AdaptiveMaxPool2d(2), (1, 2, 5, 5)),
    "upsampling": (lambda: nn.Upsample(scale_factor=2), (1, 2, 3, 3)),
    "prelu": (lambda: nn.PReLU(), (2, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), (1, 3, 4)),
    "network": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).eval(), (5,)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double().requires_grad_(False)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for seed in range(2):
        check(layer, *box(shape, *ANY, seed))


#: functions whose numbers are used once, or in one direction: nothing is lost
REACHED: dict[str, Function] = {
    "linear": VECTOR["linear"],
    "softmax": VECTOR["softmax"],
    "log_softmax": VECTOR["log_softmax"],
    "products": VECTOR["products"],
    "convolution": lambda x: F.conv1d(x.view(1, 1, 6), WEIGHT[:2, :3].unsqueeze(1), padding=1),
}  # fmt: skip


@pytest.mark.parametrize("name", REACHED)
def test_the_ends_are_reached(name: str) -> None:
    low, high = box((6,), *ANY, 3)
    least, most = bounds(REACHED[name])(low, high)
    found = values(REACHED[name], low, high)  # with all corners
    torch.testing.assert_close(least, found.amin(0))
    torch.testing.assert_close(most, found.amax(0))


def test_a_point_is_its_value() -> None:
    x = torch.randn(6, dtype=torch.float64)
    for name, f in VECTOR.items():
        if name != "bounds":
            least, most = bounds(f)(x, x)
            torch.testing.assert_close(least, f(x), msg=name)
            torch.testing.assert_close(most, f(x), msg=name)


def test_waves_over_whole_periods() -> None:
    least, most = bounds(torch.sin)(torch.tensor([0.0, 1.0, 4.0, -9.0]), torch.tensor([2.0, 7.0, 5.0, 9.0]))
    torch.testing.assert_close(most, torch.tensor([1.0, 1.0, torch.sin(torch.tensor(4.0)), 1.0]))
    torch.testing.assert_close(least, torch.tensor([0.0, -1.0, -1.0, -1.0]))


def test_infinite_intervals() -> None:
    low, high = torch.tensor([-1.0, 0.0, 0.5]), torch.tensor([1.0, 2.0, torch.inf])
    least, most = bounds(lambda x: 1 / x)(low, high)
    assert least.tolist() == [-torch.inf, 0.5, 0.0] and most.tolist() == [torch.inf, torch.inf, 2.0]
    least, most = bounds(lambda x: 0 * x + x.relu() * 2)(low, high)
    assert least.tolist() == [0.0, 0.0, 1.0]
    assert bounds(torch.log)(torch.tensor(-1.0), torch.tensor(1.0)) == (-torch.inf, 0.0)


# ------------------------------------------------------------------------------------------- arguments and composition


def net(x: Tensor) -> Tensor:
    return ((WEIGHT @ x).tanh().square() - x[:4].sin()).sum()


def test_composed_with_the_transforms() -> None:
    low, high = box((6,), *ANY, 5)
    batch, wide = torch.stack([low, low - 0.1, low - 0.3]), torch.stack([high, high, high + 0.1])
    least, most = vmap(bounds(net))(batch, wide)
    for i in range(3):
        torch.testing.assert_close((least[i], most[i]), bounds(net)(batch[i], wide[i]))
    width: Callable[[Tensor], Tensor] = lambda high: bounds(net)(low, high)[1]
    slope, step = grad(width)(high), 1e-6 * torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(slope @ step, (width(high + step) - width(high - step)) / 2, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(jvp(width, (high,), (step,))[1], slope @ step)
    torch.testing.assert_close(sparse_jacobian(width)(high).to_dense()[0], slope)
    rows = bounds(hessian(net))(low, high)
    for x in points(low, high, 20)[::7]:
        found = hessian(net)(x)
        assert bool((found >= rows[0] - ROUNDING).all()) and bool((found <= rows[1] + ROUNDING).all())


def test_pytrees() -> None:
    low = {"a": torch.tensor([1.0]), "b": (torch.tensor(2.0),)}
    high = {"a": torch.tensor([3.0]), "b": (torch.tensor(2.5),)}
    least, most = bounds(lambda p: {"sum": p["a"] + p["b"][0], "same": p["a"]})(low, high)
    assert least == {"sum": torch.tensor([3.0]), "same": torch.tensor([1.0])}
    assert most == {"sum": torch.tensor([5.5]), "same": torch.tensor([3.0])}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone().round_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("method", ["intervals", "linear"])
def test_functions_with_a_derivative_of_their_own_have_the_bounds_of_their_value(method: str) -> None:
    assert bounds(lambda x: Double.apply(x).sum(), method=method)(ONE, TWO) == (6, 12)
    assert bounds(lambda x: Rounded.apply(x).sum(), method=method)(0.4 * ONE, 0.6 * ONE) == (0, 3)
    assert bounds(grad(lambda x: Rounded.apply(x).sum()), method=method)(ONE, TWO)[1].tolist() == [1, 1, 1]
    product = bounds(lambda x: Double.apply(x) - 2 * x, method=method)(ONE, TWO)
    assert product[1].tolist() == ([2, 2, 2] if method == "intervals" else [0, 0, 0])


@pytest.mark.parametrize("method", ["intervals", "linear"])
def test_numbers_that_are_read_are_known_where_both_ends_agree(method: str) -> None:
    def f(x: Tensor) -> Tensor:
        assert bool(torch.eq(x, x).all()) and not bool((x < 0).any())
        return x if x.min() > 0.5 else -x

    assert bounds(f, method=method)(ONE, TWO)[0].tolist() == [1, 1, 1]
    assert bounds(f, method=method)(0 * ONE, 0.5 * ONE)[0].tolist() == [-0.5, -0.5, -0.5]
    with pytest.raises(MissingRuleError, match="no rule for aten._local_scalar_dense"):
        bounds(f, method=method)(0 * ONE, ONE)


def test_masks_and_places_that_are_not_known_move() -> None:
    low, high = torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 2.0])
    least, most = bounds(lambda x: (x > 0).flip(0).float() + torch.cat([x > 0, x > 3]).float()[:2])(low, high)
    assert (least.tolist(), most.tolist()) == ([1.0, 1.0], [2.0, 2.0])
    least, most = bounds(lambda x: x.masked_fill(x < 0, 5.0))(low, high)
    assert (least.tolist(), most.tolist()) == ([-1.0, 1.0], [5.0, 2.0])
    least, most = bounds(lambda x: torch.nn.functional.max_pool1d(x.view(1, 1, 2), 2))(low, high)
    assert (least.item(), most.item()) == (1.0, 2.0)


ONE, TWO = torch.ones(3), 2 * torch.ones(3)


@pytest.mark.parametrize(
    ("run", "kind", "text"),
    [
        (lambda: bounds(3.0), CallTypeError, "bounds(3.0, ...): got the float 3.0"),
        (lambda: bounds(torch.sin)(TWO, ONE), CallValueError, "low greater than high; expected low <= high"),
        (lambda: bounds(torch.sin)(ONE, ONE[:2]), CallTypeError, "as high; expected one like low, "),
        (lambda: bounds(torch.sin)(ONE, ONE.double()), CallTypeError, "as high; expected one like low, "),
        (lambda: bounds(torch.sin)(ONE, (ONE,)), CallTypeError, "high"),
        (lambda: bounds(torch.sin)(1.0, 2.0), CallTypeError, "expected a dense real floating-point tensor"),
        (lambda: bounds(torch.sin)(ONE.long(), ONE.long()), CallTypeError, "expected a dense real floating-point"),
        (lambda: bounds(lambda x: 3.0)(ONE, TWO), CallTypeError, "as output; expected only tensors"),
        (lambda: bounds(torch.lgamma)(ONE, TWO), MissingRuleError, "has no rule for aten.lgamma.default"),
        (lambda: bounds(lambda x: x[x.argmax()])(ONE, TWO), MissingRuleError, "argmax"),
        (lambda: bounds(lambda x: x[x.max(0)[1]])(ONE, TWO), MissingRuleError, "no rule for aten"),
        (lambda: bounds(lambda x: x * x.sum().item())(ONE, TWO), MissingRuleError, "no rule for aten._local_scalar"),
        (lambda: bounds(lambda x: x if x.sum() > 0 else -x)(-ONE, TWO), MissingRuleError, "no rule for aten"),
    ],
)
def test_bad_input(run: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        run()
    assert text in str(caught.value)
    assert interpreter_stack() == []


def test_the_wrong_way_round_under_vmap_is_no_number() -> None:
    low, high = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]])
    least, most = vmap(bounds(torch.exp))(low, high)
    assert least.isnan().tolist() == most.isnan().tolist() == [[False], [True]]
