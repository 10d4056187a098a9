"""Timing that can be compared: candidates take turns in rounds within one process, and medians are reported.

Between two processes, or between two minutes, the speed of a machine differs by more than what is to be measured. So
every round times every candidate once, in an order that changes from round to round, and the ratio of two candidates
is taken within each round before the median over the rounds is.

On the CPU the clock is the processor time of this process, which does not run while other programs do. The times of
several threads would add up, so everything runs with one: PyTorch and what it compiles by ``set_num_threads(1)``, JAX
by in_jax.py. With a CUDA device the clock is the time that passes.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """A median with its lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The ratio of two candidates, taken round by round."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleave(candidates: Mapping[Key, Call], rounds: int, slice_seconds: float = 0.02) -> dict[Key, list[float]]:
    """Seconds per call of every candidate, one value per round."""
    repeats = {}
    for key, call in candidates.items():
        call()  # fills caches, loads kernels
        repeats[key] = max(1, int(slice_seconds / max(_seconds(call, 1), 1e-7)))
    seconds: dict[Key, list[float]] = {key: [] for key in candidates}
    order = list(candidates)
    gc.collect()
    gc.freeze()  # so that the collections below look only at what is new
    try:
        for number in range(rounds):
            start = number % len(order)
            for key in order[start:] + order[:start]:
                gc.collect()  # what one candidate leaves behind is not the next one's cost
                seconds[key].append(_seconds(candidates[key], repeats[key]))
    finally:
        gc.unfreeze()
    return seconds


def _seconds(call: Call, repeats: int) -> float:
    if not torch.cuda.is_initialized():
        start = time.process_time()
        for _ in range(repeats):
            call()
        return (time.process_time() - start) / repeats
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def assert_same_results(results: Mapping[str, Any], rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Every candidate must compute the same thing, or timing it says nothing. Run in float64."""
    (first, expected), *others = results.items()
    for name, result in others:
        torch.testing.assert_close(
            result,
            expected,
            rtol=rtol,
            atol=atol,
            check_device=False,  # JAX's come back through NumPy
            msg=lambda text: f"{name} differs from {first}: {text}",  # noqa: B023
        )


def peak_memory(call: Call, device: str) -> int:
    """Bytes that a call holds at its peak, above what was held before it: by the allocator's own account."""
    call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine(device: str) -> str:
    """What it was measured on, and when, in one line."""
    hardware = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"
    if device == "cuda":
        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    packages = [f"{name} {version(name)}" for name in ("torch", "jax") if importlib.util.find_spec(name)]
    python = f"Python {platform.python_version()} on {sys.platform}"
    return f"{hardware}; {', '.join(packages)}, {python}; {datetime.date.today()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
