"""Transforms that torch.func does not have, beside what one would write without them, in time and in memory.

python benchmarks/shipped.py [--quick] [--case TEXT ...] [--device cuda]
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from report import Makers, Part, Settings, Table, Target, main, peak_of, progress
from timing import interleave, ratio
from torch import Tensor, nn

from functrans import (
    bounds,
    clipped_grad,
    explain,
    functional_call,
    grad,
    hessian,
    jacfwd,
    jet,
    jvp,
    laplacian,
    per_example_norms,
    sparse_jacobian,
    sparsity,
    vmap,
)

#: The transform and what is in its place without it: two functions of the same inputs.
Pair = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def network(*layers: nn.Module, device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    net = nn.Sequential(*layers).to(device, dtype).requires_grad_(False)
    return lambda x: net(x).squeeze(-1)


def nested_jvp(f: Callable[[Tensor], Tensor], order: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The derivative of an order at x along v."""

    def nested(x: Tensor, v: Tensor) -> Tensor:
        def derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: jvp(f, (x,), (v,))[1]

        g = f
        for _ in range(order):
            g = derivative(g)
        return g(x)

    return nested


def along_a_line(order: int) -> Callable[[str, torch.dtype], Pair]:
    """All derivatives up to an order of a network, for a batch of points and a direction each."""

    def make(device: str, dtype: torch.dtype) -> Pair:
        weights = [torch.randn(64, 64, device=device, dtype=dtype) / 8 for _ in range(3)]
        x, v = torch.randn(2, 256, 64, device=device, dtype=dtype)

        def f(x: Tensor) -> Tensor:
            for w in weights:
                x = torch.tanh(x @ w)
            return x

        return lambda x, v: jet(f, (x,), ([v, *[None] * (order - 1)],))[1][-1], nested_jvp(f, order), (x, v)

    return make


def of_points(*layers: Callable[[], nn.Module]) -> Callable[[str, torch.dtype], Pair]:
    """The Laplacian of a network at 128 points of dimension 16."""

    def make(device: str, dtype: torch.dtype) -> Pair:
        f = network(*[layer() for layer in layers], device=device, dtype=dtype)
        points = torch.randn(128, 16, device=device, dtype=dtype)
        return vmap(laplacian(f)), vmap(lambda x: hessian(f)(x).trace()), (points,)

    return make


def matrix(x: Tensor) -> Tensor:
    """A well-conditioned matrix of 16 numbers."""
    return x.view(4, 4) + 4 * torch.eye(4, device=x.device, dtype=x.dtype)


#: functions of 16 numbers that are made of an operator beside those that networks are made of
RARER: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda x: torch.linalg.solve(matrix(x), x[:4]),
    "inv": lambda x: torch.linalg.inv(matrix(x)),
    "cholesky": lambda x: torch.linalg.cholesky(matrix(x) @ matrix(x).mT),
    "svd": lambda x: torch.linalg.svdvals(matrix(x)),
    "slogdet": lambda x: torch.linalg.slogdet(matrix(x)).logabsdet,
    "norm": lambda x: torch.linalg.vector_norm(x.view(4, 4), dim=1),
    "std": lambda x: x.view(4, 4).std(1),
    "prod": lambda x: x.view(4, 4).prod(1),
    "cross_entropy": lambda x: nn.functional.cross_entropy(x, torch.tensor(3, device=x.device)),
    "max_pool2d": lambda x: nn.functional.max_pool2d(x.view(1, 4, 4), 2),
}


def rarer_along_a_line(f: Callable[[Tensor], Tensor]) -> Callable[[str, torch.dtype], Pair]:
    """The derivatives up to the fourth, at a point."""

    def make(device: str, dtype: torch.dtype) -> Pair:
        x, v = torch.randn(2, 16, device=device, dtype=dtype)

        return lambda x, v: jet(f, (x,), ([v, None, None, None],))[1][-1], nested_jvp(f, 4), (x, v)

    return make


def rarer_of_points(f: Callable[[Tensor], Tensor]) -> Callable[[str, torch.dtype], Pair]:
    """The Laplacian of the sum of squares at 32 points."""

    def make(device: str, dtype: torch.dtype) -> Pair:
        total = lambda x: f(x).square().sum()
        points = torch.randn(32, 16, device=device, dtype=dtype)
        return vmap(laplacian(total)), vmap(lambda x: hessian(total)(x).trace()), (points,)

    return make


def stencil(x: Tensor) -> Tensor:
    return x.roll(1) * x - x.roll(-1).sin()


def pattern(device: str, dtype: torch.dtype) -> Pair:
    x = torch.randn(2000, device=device, dtype=dtype)
    return lambda x: sparsity(stencil)(x).to_dense(), lambda x: jacfwd(stencil)(x) != 0, (x,)


def values(device: str, dtype: torch.dtype) -> Pair:
    x = torch.randn(2000, device=device, dtype=dtype)
    return lambda x: sparse_jacobian(stencil)(x).to_dense(), jacfwd(stencil), (x,)


class Layers(nn.Sequential):
    """Layers for a batch, whose loss is that of one example."""

    def loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(self, params, (x.unsqueeze(0),)).flatten(0, -2)
        return nn.functional.cross_entropy(out, y.reshape(-1))


def linear() -> tuple[Layers, Tensor, Tensor]:
    layers = [layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return Layers(*layers, nn.Linear(512, 10)), torch.randn(64, 512), torch.randint(10, (64,))


def many_rows() -> tuple[Layers, Tensor, Tensor]:
    return linear()[0], torch.randn(1024, 512), torch.randint(10, (1024,))


def convolutional() -> tuple[Layers, Tensor, Tensor]:
    net = Layers(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 49, 10),
    )  # fmt: skip
    return net, torch.randn(64, 3, 28, 28), torch.randint(10, (64,))


def of_words() -> tuple[Layers, Tensor, Tensor]:
    block = (nn.LayerNorm(128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.LayerNorm(128))
    words = torch.randint(2000, (2, 16, 32))
    return Layers(nn.Embedding(2000, 128), *block, nn.Linear(128, 2000)), *words


def clipping(
    make: Callable[[], tuple[Layers, Tensor, Tensor]], other: str, what: str = "sum"
) -> Callable[[str, torch.dtype], Pair]:
    """The clipped sum or the norms, beside the plain gradient of the summed loss or what vmap(grad) makes of it."""

    def pair(device: str, dtype: torch.dtype) -> Pair:
        net, x, y = make()
        net.to(device, dtype)
        params = {name: p.detach() for name, p in net.named_parameters()}
        x, y = (t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in (x, y))
        dims = (None, 0, 0)

        def summed(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
            return grad(lambda p: vmap(net.loss, in_dims=dims)(p, x, y).sum())(params)

        def norms(gradients: dict[str, Tensor]) -> Tensor:
            return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()

        def by_examples(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
            gradients = vmap(grad(net.loss), in_dims=dims)(params, x, y)
            if what == "norms":
                return norms(gradients)
            weights = (1 / norms(gradients)).clamp(max=1)
            return {name: torch.tensordot(weights, g, 1) for name, g in gradients.items()}

        if what == "norms":
            return per_example_norms(net.loss), by_examples, (params, x, y)
        # beside the plain gradient nothing is clipped, so that the results can be compared
        return (
            clipped_grad(net.loss, 1e9 if other == "grad" else 1.0),
            (summed if other == "grad" else by_examples),
            (params, x, y),
        )

    return pair


def of_boxes(device: str, dtype: torch.dtype) -> Pair:
    """Linear bounds of a network of relu on 32 boxes, beside CROWN as one would write it for such networks alone."""
    sizes = (16, 64, 64, 64, 10)
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    layers = [m for layer in linear for m in (layer, nn.ReLU())][:-1]
    net = nn.Sequential(*layers).to(device, dtype).requires_grad_(False)
    x = torch.randn(32, 16, device=device, dtype=dtype)

    def by_hand(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        known: list[tuple[Tensor, Tensor]] = []
        before = low, high
        for depth, layer in enumerate(linear):
            middle, radius = (before[0] + before[1]) / 2, (before[1] - before[0]) / 2
            center, far = layer(middle), radius @ layer.weight.abs().T
            rows = torch.cat([layer.weight, -layer.weight]).expand(len(x), -1, -1)
            rest = torch.cat([layer.bias, -layer.bias]).expand(len(x), -1)
            for inner, (a, b) in zip(linear[:depth][::-1], known[::-1], strict=True):
                crossing = (a < 0) & (b > 0)
                upper = torch.where(crossing, b / torch.where(crossing, b - a, 1.0), (b > 0).to(dtype))
                below, above = rows.clamp(min=0), rows.clamp(max=0)
                rest = rest + (above @ torch.where(crossing, -upper * a, 0.0).unsqueeze(-1)).squeeze(-1)
                rows = below * (b > -a).to(dtype).unsqueeze(1) + above * upper.unsqueeze(1)
                rows, rest = rows @ inner.weight, rest + rows @ inner.bias
            ends = [(rows.clamp(min=0) @ low.unsqueeze(-1)), rows.clamp(max=0) @ high.unsqueeze(-1)]
            least, most = ((ends[0] + ends[1]).squeeze(-1) + rest).chunk(2, 1)
            known.append((torch.maximum(least, center - far), torch.minimum(-most, center + far)))
            before = known[-1][0].relu(), known[-1][1].relu()
        return known[-1]

    return vmap(bounds(net, method="linear")), by_hand, (x - 0.1, x + 0.1)


def explained(derivative: Callable[..., Any]) -> Callable[[str, torch.dtype], Pair]:
    """``explain`` of derivatives of a small network's loss, an example each, beside the run that it explains."""

    def make(device: str, dtype: torch.dtype) -> Pair:
        weights = [torch.randn(a, b, device=device, dtype=dtype) for a, b in ((4, 16), (16, 1))]
        biases = [torch.randn(n, device=device, dtype=dtype) for n in (16, 1)]

        def loss(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
            hidden = torch.tanh(x @ weights[0] + biases[0])
            return ((hidden @ weights[1] + biases[1]) ** 2).sum()

        of_examples = vmap(derivative(loss), in_dims=(None, None, 0))
        inputs = weights, biases, torch.randn(32, 4, device=device, dtype=dtype)
        return lambda *args: explain(of_examples, *args).result, of_examples, inputs

    return make


HIDDEN = (lambda: nn.Linear(16, 64), nn.Tanh, lambda: nn.Linear(64, 64), nn.Tanh, lambda: nn.Linear(64, 1))
NORMALIZED = (
    lambda: nn.Linear(16, 64), lambda: nn.LayerNorm(64), nn.Tanh, lambda: nn.Linear(64, 64), lambda: nn.Softmax(-1),
    lambda: nn.Linear(64, 1),
)  # fmt: skip


class Case(NamedTuple):
    make: Callable[[str, torch.dtype], Pair]
    #: what the ratios are to
    beside: str
    #: the most that they should be; None: no limit is set
    time: float | None = None
    memory: float | None = None


NETS = {"linear": linear, "convolutions": convolutional, "embedding, norms": of_words}

CASES = {
    **{
        f"jet of order {n}, 3-layer MLP, 256 points": Case(along_a_line(n), f"jvp nested {n} times", limit)
        for n, limit in ((2, None), (3, None), (5, 1.0))
    },
    "laplacian, MLP": Case(of_points(*HIDDEN), "vmap(trace(hessian))", 0.48),
    "laplacian, LayerNorm and softmax": Case(of_points(*NORMALIZED), "vmap(trace(hessian))", 1.0),
    **{f"jet of order 4, {name}": Case(rarer_along_a_line(f), "jvp nested 4 times", 1.0) for name, f in RARER.items()},
    **{f"laplacian, {name}": Case(rarer_of_points(f), "vmap(trace(hessian))", 1.0) for name, f in RARER.items()},
    "sparsity, stencil of 2,000": Case(pattern, "jacfwd", 0.05),
    "sparse_jacobian, stencil of 2,000": Case(values, "jacfwd", 1.0),
    "linear bounds, MLP of relu, 32 boxes": Case(of_boxes, "CROWN by hand", None),
    **{
        f"clipped_grad, {name}": Case(clipping(net, "grad"), "grad of the summed loss", 1.25, 1.05)
        for name, net in {**NETS, "linear, 1,024 examples": many_rows}.items()
    },
    **{
        f"clipped_grad, {name}, examples": Case(clipping(net, "vmap(grad)"), "vmap(grad), clipped")
        for name, net in NETS.items()
    },
    "explain, gradients of 32 examples": Case(explained(grad), "the run itself"),
    "explain, Hessians of 32 examples": Case(explained(lambda loss: hessian(loss, argnums=2)), "the run itself"),
    "per_example_norms, linear": Case(clipping(linear, "vmap(grad)", "norms"), "norms of vmap(grad)"),
}


def makers(pair: Pair) -> Makers:
    transform, plain, inputs = pair
    return {"plain": lambda: lambda: plain(*inputs), "transform": lambda: lambda: transform(*inputs)}


def run(settings: Settings) -> Part:
    part = Part()
    rows = []
    for name in settings.chosen(list(CASES)):
        case = CASES[name]
        torch.manual_seed(0)
        agree = part.agreeing(name, makers(case.make(settings.device, torch.float64)))
        with part.attempt(name):
            if len(agree) < 2:
                continue
            calls = {key: single() for key, single in makers(case.make(settings.device, torch.float32)).items()}
            times = interleave(calls, settings.rounds, 0.02 if settings.quick else 0.1)
            peaks = {key: peak_of(call, settings.device) for key, call in calls.items()}
            found = ratio(times["transform"], times["plain"])
            memory = peaks["transform"] / peaks["plain"] if peaks["plain"] else None
            cells = [f"{1e3 * statistics.median(times[key]):.2f}" for key in ("transform", "plain")]
            rows.append([name, case.beside, *cells, f"{found:.2f}", f"{memory:.2f}" if memory else ""])
            if case.time is not None:
                part.targets.append(Target(f"time, {name}", found.median, case.time))
            if case.memory is not None and memory is not None:
                part.targets.append(Target(f"memory, {name}", memory, case.memory))
        progress(name)
    if rows:
        part.tables.append(
            Table(
                "Transforms that torch.func does not have",
                "Milliseconds, medians of the rounds. The ratio is to what one would write in functrans without it, "
                "with its quartiles; the last column that of peak memory.",
                ["transform", "beside", "transform", "without it", "ratio", "memory"],
                rows,
            )
        )
    return part


if __name__ == "__main__":
    raise SystemExit(main(run, "Transforms that torch.func does not have, beside what is written without them."))
