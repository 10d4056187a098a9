"""How each cost grows: with the operations, the batch, the nesting, the dimension, and with what was transformed
before.

    python benchmarks/growth.py [--quick] [--case TEXT ...] [--device cuda]
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cases import mlp
from per_op import APIS, CASES, make_chain, makers
from report import Part, Settings, Table, Target, main, peak_of, progress
from timing import Call, interleave, ratio
from torch import Tensor

#: What is called at one size, for an API and a dtype.
Point = Callable[[str, torch.dtype], Call]
Times = dict[str, list[float]]


def measure(part: Part, points: Mapping[str, Point], settings: Settings) -> dict[str, Times]:
    """Seconds per call, by point and API. Points whose results differ are told, and left out."""
    calls = {}
    for name, point in points.items():
        double = {api: functools.partial(point, api, torch.float64) for api in APIS}
        if part.agreeing(name, double) == list(APIS):
            calls |= {(name, api): point(api, torch.float32) for api in APIS}
    times = interleave(calls, settings.rounds)
    return {name: {api: times[name, api] for api in APIS} for name in points if (name, "functrans") in times}


def cells(times: Times, scale: float) -> list[str]:
    """Both medians and the ratio."""
    medians = [f"{scale * statistics.median(times[api]):.2f}" for api in APIS]
    return [*medians, f"{ratio(times['functrans'], times['torch.func']):.2f}"]


def slopes(short: Times, long: Times, difference: int) -> Times:
    """Seconds per operation, round by round."""
    return {api: [(b - a) / difference for a, b in zip(short[api], long[api])] for api in APIS}


def chain_point(name: str, length: int, settings: Settings) -> Point:
    """A case of per_op.py with so many operations."""
    return lambda api, dtype: makers(CASES[name], length, settings.device, dtype)[api]()


def memory(point: Point, settings: Settings) -> dict[str, int]:
    """Bytes at the peak of a call, by API."""
    return {api: peak_of(point(api, torch.float32), settings.device) for api in APIS}


def with_memory(
    part: Part, title: str, what: str, size: str, points: Mapping[str, Point], settings: Settings
) -> dict[str, dict[str, int]]:
    """Add a table of milliseconds and of megabytes at the peak by size; returns the bytes."""
    times = measure(part, {f"{title}, {name}": point for name, point in points.items()}, settings)
    peaks, rows = {}, []
    for name, point in points.items():
        of = times.get(f"{title}, {name}")
        if of is not None:
            peaks[name] = memory(point, settings)
            rows.append([name, *cells(of, 1e3), *(f"{peak / 1e6:.3f}" for peak in peaks[name].values())])
    header = [size, *(f"{api}, ms" for api in APIS), "ratio", *(f"{api}, MB" for api in APIS)]
    part.tables.append(Table(title, f"{what}: milliseconds, and megabytes at the peak.", header, rows))
    return peaks


HEADER = [*APIS, "ratio"]


def operations(part: Part, settings: Settings) -> None:
    """Chains of 10 to 1,000 operations: what each further one costs."""
    lengths = (10, 100, 400, 1000)
    steps = list(itertools.pairwise(lengths))
    rows, targets = [], []
    for name in ("grad", "grad grad", "vmap", "vmap grad", "jvp"):
        times = measure(part, {f"{name}, {n} operations": chain_point(name, n, settings) for n in lengths}, settings)
        if len(times) < len(lengths):
            continue
        by_length = dict(zip(lengths, times.values()))
        marginal = {b: slopes(by_length[a], by_length[b], b - a) for a, b in steps}
        rows.append([name, "10", *cells({api: [t / 10 for t in of] for api, of in by_length[10].items()}, 1e6)])
        rows += [[name, f"{a} to {b}", *cells(marginal[b], 1e6)] for a, b in steps]
        growth = ratio(marginal[1000]["functrans"], marginal[100]["functrans"])
        targets.append(Target(f"cost of an operation from 400 to 1,000 / from 10 to 100, {name}", growth.median, 1.25))
        progress(f"operations, {name}")
    text = "Microseconds per operation: of a whole call with 10, and then for each that is added between two lengths."
    part.tables.append(Table("Growth with the number of operations", text, ["transform", "operations", *HEADER], rows))
    part.targets += targets


def batch(part: Part, settings: Settings) -> None:
    """Per-example gradients of a small network, for batches of 1 to 4,096."""

    def point(size: int) -> Point:
        def call(column: str, dtype: torch.dtype) -> Call:
            api = APIS[column]
            torch.manual_seed(0)
            net = mlp(16, 32, 1).to(settings.device, dtype)
            params = {name: value.detach() for name, value in net.named_parameters()}
            x, y = (torch.randn(size, n, device=settings.device, dtype=dtype) for n in (16, 1))

            def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
                return F.mse_loss(api.functional_call(net, params, (x,)), y)

            return lambda: api.vmap(api.grad(loss), in_dims=(None, 0, 0))(params, x, y)

        return call

    points = {f"{size:,}": point(size) for size in (1, 8, 64, 512, 4096)}
    with_memory(part, "Growth with the batch", "Per-example gradients of an MLP 16-32-1", "batch", points, settings)


def nesting(part: Part, settings: Settings) -> None:
    """One to five levels of the same transform: what an operation costs, and what one more vmap adds."""
    for kind, (short, long) in (("vmap", (16, 96)), ("grad", (4, 12))):

        def point(depth: int, length: int, kind: str = kind) -> Point:
            def call(column: str, dtype: torch.dtype) -> Call:
                shape = (2,) * depth if kind == "vmap" else ()
                x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(settings.device)
                f = make_chain(length, "inputs", None, None)
                for _ in range(depth):
                    f = getattr(APIS[column], kind)(f)
                return lambda: f(x)

            return call

        depths = range(1, 6)
        points = {f"{kind}, {depth} deep, {n}": point(depth, n) for depth in depths for n in (short, long)}
        times = measure(part, points, settings)
        if len(times) < len(points):
            continue
        values = list(times.values())
        per_op = [slopes(a, b, long - short) for a, b in zip(values[::2], values[1::2])]
        rows = [[str(depth), *cells(of, 1e6)] for depth, of in zip(depths, per_op)]
        if kind == "vmap":
            added = {
                api: [1e6 * (last - first) / 4 for first, last in zip(per_op[0][api], per_op[-1][api])] for api in APIS
            }
            rows.append(["each level after the first", *(f"{statistics.median(added[api]):.2f}" for api in APIS), ""])
            part.targets.append(
                Target(
                    "nesting of vmap, microseconds per operation and level", statistics.median(added["functrans"]), 1.5
                )
            )
        text = f"Microseconds per operation: the slope between chains of {short} and {long}."
        part.tables.append(Table(f"Growth with the nesting of {kind}", text, ["levels", *HEADER], rows))
        progress(f"nesting of {kind}")


def dimension(part: Part, settings: Settings) -> None:
    """Hessians and Jacobians in 8 to 512 dimensions."""

    def hessian(size: int) -> Point:
        def call(column: str, dtype: torch.dtype) -> Call:
            api = APIS[column]
            torch.manual_seed(0)
            net = mlp(size, 64, 64, 1).to(settings.device, dtype).requires_grad_(False)
            x = torch.randn(size, device=settings.device, dtype=dtype)
            return lambda: api.hessian(lambda x: net(x).squeeze(-1))(x)

        return call

    def jacrev(size: int) -> Point:
        def call(column: str, dtype: torch.dtype) -> Call:
            api = APIS[column]
            torch.manual_seed(0)
            weight = torch.randn(size, size, device=settings.device, dtype=dtype) / size**0.5
            x = torch.randn(size, device=settings.device, dtype=dtype)
            return lambda: api.jacrev(lambda x: torch.tanh(weight @ torch.sin(x)))(x)

        return call

    for name, what, at in (("hessian", "An MLP n-64-64-1", hessian), ("jacrev", "tanh(W sin x)", jacrev)):
        points = {f"{size}": at(size) for size in (8, 32, 128, 512)}
        with_memory(part, f"Growth with the dimension: {name}", what, "n", points, settings)
        progress(f"dimension, {name}")


def _others(api: Any, count: int, device: str) -> None:
    """So many transforms of functions that differ in their operations, sizes and nesting."""
    operators = (torch.sin, torch.exp, torch.tanh, torch.sigmoid, torch.square, F.softplus, F.gelu)
    for i in range(count):
        one, two = operators[i % 7], operators[i // 7 % 7]

        def f(x: Tensor, one: Any = one, two: Any = two) -> Tensor:
            return two(one(x) * 0.5).sum()

        x = torch.rand(i // 49 % 5 + 1, i % 3 + 1, device=device)
        kind = i % 4
        if kind == 0:
            api.grad(f)(x)
        elif kind == 1:
            api.vmap(api.grad(f))(x)
        elif kind == 2:
            api.jvp(api.grad(f), (x,), (x,))
        else:
            api.vmap(api.hessian(f))(x)


def history(part: Part, settings: Settings) -> None:
    """The same call before and after 1,000 other transforms have run."""

    def times() -> dict[str, Times]:
        return measure(part, {name: chain_point(name, 10, settings) for name in names}, settings)

    names = ("grad", "vmap grad", "jvp")
    before = times()
    for api in APIS.values():
        _others(api, 1000, settings.device)
    after = times()
    rows = []
    for name in [name for name in names if name in before and name in after]:
        was, now = ({api: statistics.median(of[api]) for api in APIS} for of in (before[name], after[name]))
        rows.append([name, *(f"{1e6 * of[api]:.2f}" for api in APIS for of in (was, now))])
        # torch.func in the same rounds says how much faster or slower the machine was
        change = ratio(after[name]["functrans"], after[name]["torch.func"]).median
        change /= ratio(before[name]["functrans"], before[name]["torch.func"]).median
        part.targets.append(Target(f"after / before 1,000 other transforms, {name}", change, 1.1))
    header = ["transform", *(f"{api}, {when}" for api in APIS for when in ("before", "after"))]
    text = "Microseconds of a call with 10 operations, before and after 1,000 other transforms have run in the process."
    part.tables.append(Table("Growth with what was transformed before", text, header, rows))


def chunks(part: Part, settings: Settings) -> None:
    """Time and peak memory of per-example gradients in chunks."""
    sizes: Sequence[int | None] = (None, 16, 4, 1)

    def point(size: int | None) -> Point:
        def call(column: str, dtype: torch.dtype) -> Call:
            api = APIS[column]
            torch.manual_seed(0)
            net = mlp(784, 256, 256, 10).to(settings.device, dtype)
            params = {name: value.detach() for name, value in net.named_parameters()}
            x = torch.randn(64, 784, device=settings.device, dtype=dtype)
            labels = torch.randint(10, (64,), device=settings.device)

            def loss(params: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
                logits = api.functional_call(net, params, (x.unsqueeze(0),))
                return F.cross_entropy(logits, label.unsqueeze(0))

            def norm(params: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
                gradients = api.grad(loss)(params, x, label)
                return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()

            return lambda: api.vmap(norm, in_dims=(None, 0, 0), chunk_size=size)(params, x, labels)

        return call

    points = {f"{size}": point(size) for size in sizes}
    what = "The norms of 64 per-example gradients of an MLP 784-256-256-10"
    peaks = with_memory(part, "Memory and chunk_size", what, "chunk_size", points, settings)
    if {"None", "16"} <= peaks.keys():
        share = peaks["16"]["functrans"] / peaks["None"]["functrans"]
        part.targets.append(Target("peak memory with chunk_size=16 / of the whole batch of 64", share, 0.3))


CURVES = {
    "history": history,  # first, while little else has been transformed
    "operations": operations,
    "batch": batch,
    "nesting": nesting,
    "dimension": dimension,
    "chunk_size": chunks,
}


def run(settings: Settings) -> Part:
    part = Part()
    for name in settings.chosen(list(CURVES)):
        with part.attempt(name):
            CURVES[name](part, settings)
        progress(name)
    return part


if __name__ == "__main__":
    raise SystemExit(main(run, f"How the costs grow; cases: {', '.join(CURVES)}."))
