"""bounds(f, method="linear"): sound on its own, not only where the interval saves it; exact where it can be.

Results are met with those of interval arithmetic, so that functions are looked at through a random matrix, minus the
argument: there the interval is wide, and what counts is how the parts depend on each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from test_bounds import ANY, CASES, LAYERS, ROUNDING, VECTOR, Function, box, net, points
from torch import Tensor, nn
from torch.nn import functional as F

from functrans import bounds, grad, hessian, jacfwd, jvp, sparse_jacobian, vmap
from functrans.errors import CallValueError, MissingRuleError

MORE: dict[str, Function] = {
    "pairs of maxima": lambda x: torch.stack([torch.maximum(x[0], x[1]), torch.minimum(x[2] * x[3], x[4])]),
    "least and greatest": lambda x: (
        x.view(2, 3).amax(1) - x.view(2, 3).amin((0, 1)) + x.max() - x.view(3, 2).min(0)[0].sum()
    ),
    "between tensors": lambda x: x[:3].clamp(x[3:] - 1, x[3:] + 0.5),
    "softplus": lambda x: F.softplus(20 * x) + torch.logaddexp(x, x.flip(0)),
    "power": lambda x: x.abs() ** 1.5 + (x.abs() + 0.1) ** -0.5 + (x - 3) ** -3 + (x + 3) ** -2,
    "chosen": lambda x: torch.where(x.roll(1) > 0, x * x.roll(2), x.sin()),
    "attention": lambda x: (x.view(3, 2) @ x.view(3, 2).T).softmax(1) @ x.view(3, 2),
    "written": lambda x: x.clone().mul_(x.detach()).index_put_((torch.tensor([0, 3]),), x[1:3], accumulate=True),
    "products": lambda x: torch.addmm(x[:1], x.view(2, 3), x.view(3, 2), alpha=-2) + x.prod() + x[:2].dot(x[:2]),
    "kernel": lambda x: F.conv1d(x.view(1, 1, 6), x[:2].view(1, 1, 2), x[:1]),
    "single precision": lambda x: (x.float().double() - x).tanh() + x,
    "pooled": lambda x: F.max_pool1d(x.view(1, 1, 6), 3, 2, padding=1, ceil_mode=True) + x[0],
}
ALL = VECTOR | MORE


def mixed(f: Function) -> Function:
    def function(x: Tensor) -> Tensor:
        y = f(x).flatten()
        matrix = (torch.arange(4 * y.numel(), dtype=torch.float64) ** 2).cos().view(4, -1)
        return matrix @ y - torch.outer(torch.tensor([0.0, 0.5, -1.0, 2.0]).double(), x.flatten()).sum(1)

    return function


def check(f: Function, lows: Tensor, highs: Tensor, rounding: float = ROUNDING, count: int = 60) -> None:
    """For each box of a batch: sound, and not wider than the intervals."""
    least, most = vmap(bounds(f, method="linear"))(lows, highs)
    below, above = vmap(bounds(f))(lows, highs)
    found = torch.stack([vmap(f)(points(low, high, count)) for low, high in zip(lows, highs, strict=True)])
    assert bool((found >= least.unsqueeze(1) - rounding).all()) and bool((found <= most.unsqueeze(1) + rounding).all())
    assert bool((least >= below - rounding).all()) and bool((most <= above + rounding).all())
    assert bool((most - least).isfinite().all())


def boxes(limits: tuple[float, float], shape: tuple[int, ...] = (6,), seeds: int = 6) -> tuple[Tensor, Tensor]:
    """A batch of boxes, of which every second is narrow, and one a point."""
    ends = [box(shape, *limits, seed) for seed in range(seeds)]
    low, high = (torch.stack(end) for end in zip(*ends, strict=True))
    middle, scale = (low + high) / 2, torch.tensor([1.0, 1e-3, 1.0, 1e-7, 1.0, 0.0]).repeat(seeds // 6 + 1)[:seeds]
    scale = scale.double().view(-1, *[1] * len(shape))
    return middle + (low - middle) * scale, middle + (high - middle) * scale


@pytest.mark.parametrize("case", range(len(CASES)))
def test_lines_of_pointwise_functions(case: int) -> None:
    f, limits = CASES[case]
    check(mixed(f), *boxes(limits))


#: whose intervals lose in the square of the width; the others jump, or bend at a place of their own
SMOOTH = [
    torch.tanh,
    torch.sigmoid,
    torch.exp,
    torch.exp2,
    torch.expm1,
    torch.erf,
    torch.erfc,
    torch.square,
    torch.atan,
    torch.sinh,
    torch.cosh,
    torch.asinh,
    F.silu,
    F.mish,
    F.gelu,
    F.softplus,
    F.logsigmoid,
    F.celu,
    F.tanhshrink,
    torch.sin,
    torch.cos,
    lambda x: x**3,
    lambda x: x**4,
    lambda x: x * x,
    lambda x: x.exp() / (1 + x.exp()),
    lambda x: (x.abs() + 1).log(),
    lambda x: (x + 3).sqrt(),
    lambda x: (x + 3).rsqrt(),
    lambda x: 1 / (x - 3),
    lambda x: torch.softmax(x, 0),
    lambda x: x.logsumexp(0),
    lambda x: F.layer_norm(x, (6,)),
    lambda x: x.var(),
    lambda x: x[:3] * x[3:] / (x[1:4] + 3),
    lambda x: x.view(2, 3) @ x.view(3, 2),
    lambda x: x.prod(),
    lambda x: (x / 3).asin() + (x / 3).atanh() + (x + 4).acosh(),
]


@pytest.mark.parametrize("case", range(len(SMOOTH)))
def test_smooth_functions_minus_their_tangents_are_narrow_in_second_order(case: int) -> None:
    f = SMOOTH[case]
    middle = torch.tensor([-1.7, -0.9, -0.3, 0.4, 1.1, 1.6], dtype=torch.float64)
    jacobian = jacfwd(f)(middle)
    rest = lambda x: f(x).flatten() - jacobian.reshape(-1, 6) @ x
    radius = torch.tensor([1e-2, 5e-3], dtype=torch.float64).view(2, 1)
    least, most = vmap(bounds(rest, method="linear"))(middle - radius, middle + radius)
    wide, narrow = most - least
    assert bool((narrow <= 0.3 * wide + ROUNDING).all())


@pytest.mark.parametrize("name", ALL)
def test_functions_of_vectors(name: str) -> None:
    check(mixed(ALL[name]), *boxes((-1.0, 1.0)), rounding=1e-6 if name == "single precision" else ROUNDING)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "transformer" else ()) for name in LAYERS]
)
def test_layers(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double().requires_grad_(False)
    low, high = boxes((-1.0, 1.0), shape, 2)
    check(mixed(layer), low, high, count=20)


# ------------------------------------------------------------------------------------------- programs by chance

STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x + y,
    lambda x, y: x - 2 * y,
    lambda x, y: x * y,
    lambda x, y: torch.maximum(x, y),
    lambda x, y: x.tanh(),
    lambda x, y: x.relu(),
    lambda x, y: x.sin(),
    lambda x, y: x.sigmoid() * y,
    lambda x, y: x.softmax(0),
    lambda x, y: x.clamp(-1, 1).exp(),
    lambda x, y: x - y.mean(),
    lambda x, y: x.cumsum(0),
    lambda x, y: x / (1 + y.square()),
    lambda x, y: torch.where(x > y, x, -y),
    lambda x, y: x.flip(0).roll(1),
    lambda x, y: F.layer_norm(x, (6,), y),
    lambda x, y: F.leaky_relu(x, 0.2),
    lambda x, y: (x.view(2, 3) @ y.view(3, 2)).repeat(2, 1).view(8)[:6] / 4,
    lambda x, y: F.gelu(x),
    lambda x, y: torch.cat([x[:2], y[2:]]),
    lambda x, y: x.abs().sqrt(),
    lambda x, y: x.amax() - y,
]


def program(seed: int, steps: list[Callable[[Tensor, Tensor], Tensor]] = STEPS, length: int = 7) -> Function:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda most: int(torch.randint(most, (), generator=generator))
    plan = [(steps[draw(len(steps))], draw(1000), draw(1000)) for _ in range(length)]

    def f(x: Tensor) -> Tensor:
        made = [x]
        for step, i, j in plan:
            made.append(step(made[-1 - i % min(2, len(made))], made[j % len(made)]))
        return made[-1] - made[-2]

    return f


@pytest.mark.parametrize("seed", range(14))
def test_programs(seed: int) -> None:
    check(program(seed), *boxes((-1.5, 1.5)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(14, 224))
def test_many_programs(seed: int) -> None:
    check(program(seed, length=10), *boxes((-1.5, 1.5), seeds=12))


WEIGHT = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
AFFINE: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x + y,
    lambda x, y: y - 3 * x,
    lambda x, y: WEIGHT @ x,
    lambda x, y: x.cumsum(0),
    lambda x, y: x / -3,
    lambda x, y: x.flip(0) + y.mean(),
    lambda x, y: F.conv1d(x.view(1, 1, 6), WEIGHT[:2, :3].unsqueeze(1)).flatten()[:6],
    lambda x, y: torch.cat([x[3:], y[:3] * WEIGHT[0, :3]]),
    lambda x, y: F.linear(x, WEIGHT, WEIGHT[1]),
    lambda x, y: 1 - x,
    lambda x, y: x.clone().index_add_(0, torch.tensor([1, 1, 0]), y[:3]),
    lambda x, y: torch.where(WEIGHT[0] > 0, x, y),
    lambda x, y: F.pad(x, (1, 0), value=2.0)[1:] - y,
    lambda x, y: x.view(2, 3).t().reshape(6) + x.detach(),
]


@pytest.mark.parametrize("seed", range(8))
def test_affine_programs_are_exact(seed: int) -> None:
    f = program(seed, AFFINE)
    zero = f(torch.zeros(6, dtype=torch.float64))
    columns = torch.stack([f(e) - zero for e in torch.eye(6, dtype=torch.float64)], 1)
    low, high = box((6,), *ANY, seed)
    middle, radius = f((low + high) / 2), columns.abs() @ ((high - low) / 2)
    least, most = bounds(f, method="linear")(low, high)
    torch.testing.assert_close((least, most), (middle - radius, middle + radius), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------- networks


def multilayer(sizes: tuple[int, ...], seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double().requires_grad_(False)


def crown(network: nn.Sequential, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of a network of linear layers and relu by hand, as in Zhang et al. 2018, met with the intervals."""
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    known: list[tuple[Tensor, Tensor]] = []

    def ends(depth: int) -> tuple[Tensor, Tensor]:
        """Of what the layer ``depth`` returns."""
        found = []
        for sign in (1, -1):
            rows, rest = sign * linear[depth].weight, sign * linear[depth].bias
            for layer, (a, b) in zip(linear[:depth][::-1], known[::-1], strict=True):
                upper = torch.where(a >= 0, 1.0, torch.where(b <= 0, 0.0, b / (b - a)))
                lower = torch.where(b > -a, 1.0, 0.0).double()
                rest = rest + (rows.clamp(max=0) * torch.where((a < 0) & (b > 0), -upper * a, 0.0)).sum(1)
                rows = rows.clamp(min=0) * lower + rows.clamp(max=0) * upper
                rows, rest = rows @ layer.weight, rest + rows @ layer.bias
            found.append(rows.clamp(min=0) @ low + rows.clamp(max=0) @ high + rest)
        before = (low, high) if depth == 0 else tuple(t.relu() for t in known[-1])
        middle, radius = (before[0] + before[1]) / 2, (before[1] - before[0]) / 2
        center, far = linear[depth](middle), linear[depth].weight.abs() @ radius
        return torch.maximum(found[0], center - far), torch.minimum(-found[1], center + far)

    for depth in range(len(linear)):
        known.append(ends(depth))
    return known[-1]


def test_networks_of_relu_are_as_by_hand_and_much_tighter_than_intervals() -> None:
    network = multilayer((5, 24, 24, 24, 3))
    x = torch.randn(4, 5, dtype=torch.float64)
    for radius in (0.01, 0.1, 0.5):
        least, most = vmap(bounds(network, method="linear"))(x - radius, x + radius)
        for i in range(4):
            torch.testing.assert_close((least[i], most[i]), crown(network, x[i] - radius, x[i] + radius))
        below, above = vmap(bounds(network))(x - radius, x + radius)
        assert ((most - least) / (above - below)).mean() < 0.4


def test_a_convolutional_network_is_tighter() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(16, 3),
    ).eval().double().requires_grad_(False)  # fmt: skip
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    least, most = bounds(network, method="linear")(x - 0.01, x + 0.01)
    below, above = bounds(network)(x - 0.01, x + 0.01)
    found = network(x[0] - 0.01 + 0.02 * torch.rand(200, 1, 8, 8, dtype=torch.float64))
    assert bool((found >= least).all()) and bool((found <= most).all())
    assert ((most - least) / (above - below)).max() < 0.25


# ------------------------------------------------------------------------------------------- with the transforms


def width(f: Function) -> Callable[[Tensor], Tensor]:
    """How far the bounds lie apart, as a function of both ends of a box."""

    def function(ends: Tensor) -> Tensor:
        least, most = bounds(f, method="linear")(ends[0], ends[1])
        return (most - least).sum()

    return function


DIFFERENTIATED: dict[str, Function] = {
    "net": net,
    "relu": multilayer((6, 8, 8, 2)),
    "softmax": lambda x: WEIGHT @ x.softmax(0) - x,
    "norm": lambda x: F.layer_norm(WEIGHT @ x, (6,)) * x,
    "attention": MORE["attention"],
    "sines": lambda x: (WEIGHT @ x.sin()) * x.cos(),
    "pool": lambda x: WEIGHT[:, :3] @ F.max_pool1d((WEIGHT @ x).view(1, 1, 6), 2).flatten() - x,
    "gelu": lambda x: WEIGHT @ F.gelu(WEIGHT @ x) - x,
    "erf": lambda x: WEIGHT @ (WEIGHT @ x).erf() - x,
    "quotient": lambda x: x / (2 + (WEIGHT @ x).exp()),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_width_has_derivatives(name: str) -> None:
    measure = width(DIFFERENTIATED[name])
    ends = torch.stack(box((6,), -0.6, 0.7, 4))
    direction = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-6
    slope = grad(measure)(ends)
    numeric = (measure(ends + step * direction) - measure(ends - step * direction)) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), numeric, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(jvp(measure, (ends,), (direction,))[1], (slope * direction).sum())


def test_composed_with_the_transforms() -> None:
    low, high = boxes((-1.0, 1.0))
    least, most = vmap(bounds(net, method="linear"))(low, high)
    for i in range(6):
        torch.testing.assert_close((least[i], most[i]), bounds(net, method="linear")(low[i], high[i]))
    ends = torch.stack([low[0], high[0]])
    measure = width(net)
    second, v = hessian(measure)(ends), 1e-5 * torch.randn(2, 6, dtype=torch.float64)
    numeric = (grad(measure)(ends + v) - grad(measure)(ends - v)) / 2
    torch.testing.assert_close((second * v).sum((2, 3)), numeric, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(sparse_jacobian(measure)(ends).to_dense().view(2, 6), grad(measure)(ends))
    each = vmap(grad(measure))(torch.stack([low, high], 1)[:3])
    for i in range(3):
        torch.testing.assert_close(each[i], grad(measure)(torch.stack([low[i], high[i]])))
    check(grad(net), low, high)
    check(lambda x: hessian(net)(x).flatten(), low, high, count=20)
    check(lambda x: vmap(lambda row: (row * row).sum() * row)(x.view(2, 3)).flatten() - x, low, high)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        pytest.param("linear", "linear", marks=pytest.mark.slow),
        ("linear", "intervals"),
        ("intervals", "linear"),
    ],
)
def test_bounds_of_bounds(inner: str, outer: str) -> None:
    f = lambda x: torch.stack(bounds(lambda t: (WEIGHT @ t).tanh() * t, method=inner)(x - 0.1, x + 0.2)).flatten()
    low, high = box((6,), *ANY, 1)
    middle = (low + high) / 2
    low, high = middle + (low - middle) / 20, middle + (high - middle) / 20
    least, most = bounds(f, method=outer)(low, high)
    found = torch.stack([f(x) for x in points(low, high, 30)])
    assert bool((found >= least - ROUNDING).all()) and bool((found <= most + ROUNDING).all())


def test_what_is_used_twice_cancels() -> None:
    low, high = torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 1.0])
    assert bounds(lambda x: x - x, method="linear")(low, high)[1].tolist() == [0.0, 0.0]
    least, most = bounds(lambda x: x.relu() - x, method="linear")(low, high)
    assert (least.tolist(), most.tolist()) == ([0.0, 0.0], [1.0, 0.0])


def test_infinite_and_empty_boxes_and_wrong_order() -> None:
    low, high = torch.tensor([-1.0, -torch.inf]), torch.tensor([1.0, 2.0])
    least, most = bounds(lambda x: x.exp() + x.relu(), method="linear")(low, high)
    below, above = bounds(lambda x: x.exp() + x.relu())(low, high)
    assert bool((least >= below).all()) and bool((most <= above).all())
    assert bounds(torch.tanh, method="linear")(torch.ones(0, 2), torch.ones(0, 2))[0].shape == (0, 2)
    least, most = vmap(bounds(torch.exp, method="linear"))(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]]))
    assert least.isnan().tolist() == most.isnan().tolist() == [[False], [True]]


def test_what_is_missing_is_a_rule_for_intervals() -> None:
    with pytest.raises(MissingRuleError) as caught:
        bounds(torch.special.bessel_j0, method="linear")(torch.zeros(2), torch.ones(2))
    text = "def special_bessel_j0(interpreter, self):\n    return interpreter.carry(..., upper=...)"
    assert str(caught.value).endswith(text)
    assert "@IntervalLevel.rules.register" in str(caught.value)


@pytest.mark.parametrize("method", ["crown", None, 1, ["linear"]])
def test_unknown_methods(method: object) -> None:
    with pytest.raises(CallValueError, match="expected one of 'intervals', 'linear'"):
        bounds(torch.sin, method=method)  # type: ignore[arg-type]
