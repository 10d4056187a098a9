"""Whole workloads: functrans, torch.func, plain autograd, formulas by hand and JAX side by side, in time and in memory.

    python benchmarks/workloads.py [--quick] [--case TEXT ...] [--compile] [--device cuda]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.func
from by_hand import BY_HAND
from cases import WORKLOADS, Build, Workload
from in_jax import IN_JAX, Compiled, usable
from report import Makers, Part, Settings, Table, Target, main, peak_of, progress
from timing import Call, interleave, ratio

import functrans

COLUMNS = ("functrans", "torch.func", "autograd", "by hand", "compiled functrans", "compiled torch.func", "jax.jit")
#: functrans / torch.func; 1 for all others.
TIME_TARGETS = {
    "Hessian 64x64 of an MLP, one point": 0.5,
    "Hessian 64x64 of an MLP, 32 points": 0.5,
    "HVP of a transformer block": 0.5,
    "Laplacian of an MLP, 128 points of dim 16": 0.5,
    "NTK 16x16 by vjp and jvp products": 0.5,
}


def build(make: Build, device: str, dtype: torch.dtype) -> Workload:
    """The workload on the same random values every time."""
    torch.manual_seed(0)
    return make(device, dtype)


def makers(name: str, workload: Workload, settings: Settings) -> Makers:
    """What computes the workload, by the name of its column. Autograd is first: the others must agree with it."""

    def maker(function: Callable[..., Any], captured: Mapping[str, Any]) -> Callable[[], Call]:
        return lambda: lambda: function(*workload.inputs, **captured)

    def compiled(library: Any) -> Callable[[], Call]:
        return lambda: maker(torch.compile(workload.transformed(library)), {})()

    found: dict[str, Callable[[], Call]] = {
        "autograd": maker(workload.plain, {}),
        "functrans": maker(workload.transformed(functrans), {}),
        "torch.func": maker(workload.transformed(torch.func), {}),
    }
    if name in BY_HAND:
        found["by hand"] = maker(BY_HAND[name], workload.captured)
    if settings.compiled:
        torch.compiler.reset()  # what was compiled for another dtype would only be generalized
        found["compiled functrans"] = compiled(functrans)
        found["compiled torch.func"] = compiled(torch.func)
    if name in IN_JAX and usable(settings.device):
        found["jax.jit"] = lambda: Compiled(IN_JAX[name], workload.inputs, workload.captured)
    return found


def run(settings: Settings) -> Part:
    part = Part()
    times: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, dict[str, int]] = {}
    for name in settings.chosen(list(WORKLOADS)):
        make = WORKLOADS[name]
        agree = part.agreeing(name, makers(name, build(make, settings.device, torch.float64), settings))
        with part.attempt(name):
            single = makers(name, build(make, settings.device, torch.float32), settings)
            calls = {column: single[column]() for column in COLUMNS if column in agree}
            times[name] = interleave(calls, settings.rounds, 0.02 if settings.quick else 0.1)
            peaks[name] = {column: peak_of(call, settings.device) for column, call in calls.items()}
        progress(name)

    columns = [column for column in COLUMNS if any(column in row for row in times.values())]
    time_rows, memory_rows, time_targets, memory_targets = [], [], [], []
    for name, row in times.items():
        time_rows.append([name, *(f"{1e3 * statistics.median(row[c]):.2f}" if c in row else "" for c in columns), ""])
        memory_rows.append([name, *(f"{peaks[name][c] / 1e6:.2f}" if c in row else "" for c in columns), ""])
        if {"functrans", "torch.func"} <= row.keys():
            time = ratio(row["functrans"], row["torch.func"])
            memory = peaks[name]["functrans"] / peaks[name]["torch.func"]
            time_rows[-1][-1], memory_rows[-1][-1] = f"{time:.2f}", f"{memory:.2f}"
            time_targets.append(Target(f"time, {name}", time.median, TIME_TARGETS.get(name, 1.0)))
            memory_targets.append(Target(f"peak memory, {name}", memory, 1.0))
        if {"compiled functrans", "compiled torch.func"} <= row.keys():
            time = ratio(row["compiled functrans"], row["compiled torch.func"])
            time_targets.append(Target(f"time, both compiled, {name}", time.median, 1.0))
    if times:
        part.targets += time_targets + memory_targets
        part.tables += [
            Table(
                "Workloads: time",
                "Milliseconds, medians of the rounds. The ratio is functrans / torch.func, with its quartiles.",
                ["workload", *columns, "ratio"],
                time_rows,
            ),
            Table(
                "Workloads: peak memory",
                "Megabytes that a call allocates at its peak. The ratio is functrans / torch.func.",
                ["workload", *columns, "ratio"],
                memory_rows,
            ),
        ]
    return part


if __name__ == "__main__":
    raise SystemExit(main(run, "Workloads: functrans against its peers, in time and in peak memory."))
