"""What the tour prints, and the account it keeps of its checks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: Times are the shortest of so many turns; after so many seconds two have to do.
TURNS, LONG = 5, 2.0


class Report:
    """Prints the tour and keeps account of its checks."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def heading(self, text: str) -> None:
        print(f"\n{text}\n{'-' * len(text)}", flush=True)

    def line(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def check(self, what: str, transformed: Callable[[], Any], plain: Callable[[], Any], names: tuple[str, str]) -> Any:
        """Compute the same thing both ways, print how far apart they are and what each took; return the first."""
        (ours, theirs), (our_time, their_time) = _timed(transformed, plain)
        difference, size = _largest_difference(ours, theirs)
        agrees = difference <= 1e-9 * max(1.0, size)  # false for nan, too
        if not agrees:
            self.failed.append(what)
        self.line(f"{what}")
        self.line(f"    {names[0]:<34} {duration(our_time):>9}")
        self.line(f"    {names[1]:<34} {duration(their_time):>9}   {their_time / our_time:.2f} times as long")
        self.line(f"    {'largest difference':<34} {difference:>9.1e}   {'ok' if agrees else 'FAILED'}")
        return ours

    def progress(self, steps: int, what: str) -> Iterable[int]:
        """``range(steps)`` with a progress bar; where the output is no terminal, one that is seldom redrawn."""
        from tqdm import tqdm

        redraw = 0.1 if sys.stderr.isatty() else 2.0
        yield from tqdm(range(steps), desc=f"  {what}", unit="step", mininterval=redraw, ascii=" -#", ncols=88)


def _timed(*computations: Callable[[], Any]) -> tuple[list[Any], list[float]]:
    """What they return, and the shortest time of each.

    They take turns, at least two each, so that neither is charged for what is done once only (loading kernels, filling
    caches), or for what else the machine does.
    """
    shortest = [math.inf] * len(computations)
    results: list[Any] = [None] * len(computations)
    begun = time.perf_counter()
    for turn in range(TURNS):
        if turn > 1 and time.perf_counter() - begun > LONG:
            break
        for i, compute in enumerate(computations):
            start = time.perf_counter()
            results[i] = compute()
            shortest[i] = min(shortest[i], time.perf_counter() - start)
    return results, shortest


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _largest_difference(ours: Any, theirs: Any) -> tuple[float, float]:
    pairs = list(zip(_tensors(ours), _tensors(theirs), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf, 0.0
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    size = torch.stack([b.abs().max() for _, b in pairs]).max()
    return difference.item(), size.item()


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree.detach()]
    values = [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else tree
    return [tensor for value in values for tensor in _tensors(value)]
