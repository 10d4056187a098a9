"""What one operation of everyday networks costs, operator by operator: those that are not pointwise, and some that are.

    python benchmarks/operators.py [--quick] [--case TEXT ...] [--device cuda]

As in per_op.py the cost is the slope between two chains of an operator on small tensors, where the kernels cost little;
functrans and torch.func run the same code. The gradient of each example includes the way back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from per_op import APIS
from report import Part, Settings, Table, Target, main, progress
from timing import Call, interleave, ratio
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Tensor], Tensor]
SIZE, EXAMPLES = 4, 3


def operations(device: str, dtype: torch.dtype) -> dict[str, Operation]:
    """By the names of the rows: each takes a matrix and returns one of its shape."""
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(SIZE, SIZE, generator=generator, dtype=dtype) * 0.3).to(device)
    b = w[0].clone()
    places = torch.tensor([1, 0, 3, 2], device=device)
    mask = w > 0
    return {
        "leaky_relu": F.leaky_relu,
        "gelu": F.gelu,
        "clamp": lambda x: x.clamp(-1, 1),
        "where": lambda x: torch.where(mask, x, x * 0.5),
        "matmul": lambda x: x @ w,
        "linear": lambda x: F.linear(x, w, b),
        "bmm": lambda x: torch.bmm(x.unsqueeze(0), w.unsqueeze(0)).squeeze(0),
        "conv1d": lambda x: F.conv1d(x.unsqueeze(0), w.unsqueeze(-1)).squeeze(0),
        "avg_pool2d": lambda x: F.avg_pool2d(x.unsqueeze(0), 1).squeeze(0),
        "softmax": lambda x: x.softmax(-1),
        "layer_norm": lambda x: F.layer_norm(x, (SIZE,), b, b),
        "mean": lambda x: x - x.mean(-1, keepdim=True),
        "amax": lambda x: x - x.amax(-1, keepdim=True),
        "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
        "norm": lambda x: x / (1 + x.norm()),
        "cumsum": lambda x: x.cumsum(0) * 0.5,
        "transpose": lambda x: x.mT,
        "reshape": lambda x: x.reshape(2, 2 * SIZE).reshape(SIZE, SIZE),
        "expand": lambda x: x[:1].expand(SIZE, SIZE) + x,
        "slices, cat": lambda x: torch.cat([x[1:], x[:1]]),
        "select, stack": lambda x: torch.stack([x[1], x[0], x[3], x[2]]),
        "x[places]": lambda x: x[places],
        "gather": lambda x: x.gather(0, places.unsqueeze(1).expand(SIZE, SIZE)),
        "pad": lambda x: F.pad(x, (1, 0))[:, 1:],
        "x.add_": lambda x: x.clone().add_(w),
        "solve": lambda x: torch.linalg.solve(w + 3 * torch.eye(SIZE, dtype=w.dtype, device=w.device), x),
    }


def repeated(operation: Operation, length: int) -> Operation:
    def chain(x: Tensor) -> Tensor:
        for _ in range(length):
            x = operation(x)
        return x

    return chain


TRANSFORMS: dict[str, Callable[[Any, Operation], Callable[[Tensor], Any]]] = {
    "vmap": lambda api, f: api.vmap(f),
    "grad": lambda api, f: lambda x: api.grad(lambda one: f(one).sum())(x[0]),
    "jvp": lambda api, f: lambda x: api.jvp(f, (x[0],), (x[1],)),
    "vmap grad": lambda api, f: api.vmap(api.grad(lambda x: f(x).sum())),
}
#: functrans / torch.func, the geometric mean of all rows.
TARGETS = {"vmap": 2.0, "grad": 1.0, "jvp": 1.0, "vmap grad": 1.2}


def makers(transform: str, operation: str, length: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(EXAMPLES, SIZE, SIZE, generator=generator, dtype=dtype).to(device)
    chain = repeated(operations(device, dtype)[operation], length)

    def transformed(api: Any) -> Call:
        return lambda: TRANSFORMS[transform](api, chain)(x)

    return {name: lambda api=api: transformed(api) for name, api in APIS.items()}


def run(settings: Settings) -> Part:
    part = Part()
    short, long = (2, 6) if settings.quick else (2, 12)
    ratios: dict[str, list[float]] = {name: [] for name in TRANSFORMS}
    rows = []
    for operation in settings.chosen(list(operations("cpu", torch.float32))):
        row = [operation]
        for transform in TRANSFORMS:
            name = f"{transform} of {operation}"
            agree = part.agreeing(name, makers(transform, operation, long, settings.device, torch.float64))
            cells = ["", ""]
            with part.attempt(name):
                calls = {}
                for length in (short, long):
                    single = makers(transform, operation, length, settings.device, torch.float32)
                    calls |= {(column, length): single[column]() for column in agree}
                times = interleave(calls, max(settings.rounds // 2, 3), slice_seconds=0.01)
                slopes = {c: [(b - a) / (long - short) for a, b in zip(times[c, short], times[c, long])] for c in agree}
                cells[0] = f"{1e6 * statistics.median(slopes['functrans']):.1f}"
                spread = ratio(slopes["functrans"], slopes["torch.func"])
                ratios[transform].append(spread.median)
                cells[1] = f"{spread.median:.2f}"
            row += cells
        rows.append(row)
        progress(operation)
    if rows:
        text = (
            f"Microseconds, medians of the rounds: the slope between chains of {short} and {long} operations on "
            f"matrices of {SIZE} by {SIZE}, {EXAMPLES} examples. The ratio is functrans / torch.func."
        )
        header = ["operation", *(cell for name in TRANSFORMS for cell in (name, "ratio"))]
        mean = {name: statistics.geometric_mean(found) for name, found in ratios.items()}
        rows.append(["geometric mean", *(cell for name in TRANSFORMS for cell in ("", f"{mean[name]:.2f}"))])
        part.tables.append(Table("Cost of an operation, by operator", text, header, rows))
        part.targets += [Target(f"per op, {name}, all operators", mean[name], TARGETS[name]) for name in TRANSFORMS]
    return part


if __name__ == "__main__":
    raise SystemExit(main(run, "Cost of everyday operators, functrans against torch.func."))
