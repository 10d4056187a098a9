"""Whole workloads: functrans, torch.func and plain autograd side by side, in time and in peak memory.

    python benchmarks/workloads.py [--quick] [--case TEXT ...] [--compile] [--device cuda]

All candidates of a workload must agree in float64 before they are timed in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.func
from cases import WORKLOADS, Build, Workload
from timing import assert_same_results, interleave, machine, peak_memory, ratio, table

import functrans


def candidates(workload: Workload, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What computes the workload, by the name of its column."""
    functions = {"functrans": workload.transformed(functrans), "torch.func": workload.transformed(torch.func)}
    if workload.plain is not None:
        functions["autograd"] = workload.plain
    if compiled:
        functions["compiled torch.func"] = torch.compile(workload.transformed(torch.func))

    def call(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(*workload.inputs)

    return {name: call(function) for name, function in functions.items()}


def build(make: Build, device: str, dtype: torch.dtype) -> Workload:
    """The workload on the same random values every time."""
    torch.manual_seed(0)
    return make(device, dtype)


def measure(make: Build, rounds: int, device: str, compiled: bool, slice_seconds: float) -> dict[str, str]:
    """One row of the table: milliseconds and megabytes by candidate, and the ratios functrans / torch.func."""
    double = candidates(build(make, device, torch.float64), False)
    assert_same_results({name: call() for name, call in double.items()})
    single = candidates(build(make, device, torch.float32), compiled)
    times = interleave(single, rounds, slice_seconds)
    peaks = {name: peak_memory(call, device) for name, call in single.items()}
    row = {f"{name}, ms": f"{1e3 * statistics.median(values):.2f}" for name, values in times.items()}
    row["time ratio"] = f"{ratio(times['functrans'], times['torch.func']):.2f}"
    row |= {f"{name}, MB": f"{peak / 1e6:.1f}" for name, peak in peaks.items()}
    row["memory ratio"] = f"{peaks['functrans'] / max(peaks['torch.func'], 1):.2f}"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description="Workloads: functrans against torch.func and plain autograd.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only workloads whose name contains TEXT")
    parser.add_argument("--compile", action="store_true", help="a column for torch.compile of torch.func")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, slice_seconds = (3, 0.02) if options.quick else (11, 0.1)
    chosen = [name for name in WORKLOADS if not options.case or any(text in name for text in options.case)]
    if not chosen:
        parser.error(f"no workload's name contains {options.case}; there are: {', '.join(WORKLOADS)}")

    rows: dict[str, dict[str, str]] = {}
    failed = []
    for name in chosen:
        try:
            rows[name] = measure(WORKLOADS[name], rounds, options.device, options.compile, slice_seconds)
        except Exception as error:  # noqa: BLE001 - one workload that fails must not hide the others
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        print(f"  {name}: done", file=sys.stderr, flush=True)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"{machine(options.device)}; {rounds} rounds.")
    print("Medians; ratios are functrans / torch.func: median of the rounds (quartiles). Memory is each call's peak.\n")
    print(table(["workload", *columns], [[name, *(row.get(c, "") for c in columns)] for name, row in rows.items()]))
    for failure in failed:
        print(f"\nFAILED {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
