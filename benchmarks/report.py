"""What the benchmarks have in common: options, the comparison of results, tables, targets, and how failures are told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from in_jax import Compiled
from timing import Call, assert_same_results, machine, peak_memory

Makers = Mapping[str, Callable[[], Call]]


@dataclass(frozen=True)
class Settings:
    """What to run, and where."""

    device: str = "cpu"
    quick: bool = False
    compiled: bool = False
    cases: tuple[str, ...] = ()

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of the names that were asked for: all, or those that contain one of the texts."""
        return [name for name in names if not self.cases or any(text in name for text in self.cases)]

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 15


@dataclass(frozen=True)
class Table:
    title: str
    text: str
    header: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        """It reads well in a terminal, and is Markdown, too."""
        widths = [max(len(row[column]) for row in (self.header, *self.rows)) for column in range(len(self.header))]

        def line(cells: Sequence[str]) -> str:
            rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))
            return "| " + " | ".join([cells[0].ljust(widths[0]), *rest]) + " |"

        rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]) + "|"
        return "\n".join([f"### {self.title}\n\n{self.text}\n", line(self.header), rule, *map(line, self.rows)])


@dataclass(frozen=True)
class Target:
    """A figure with its limit. Both have two decimals, and are compared as they are printed."""

    what: str
    figure: float
    limit: float

    @property
    def met(self) -> bool:
        return round(self.figure, 2) <= self.limit


@dataclass
class Part:
    """What one of the benchmarks found."""

    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """One case that fails is told, and must not hide the others."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.failures.append(f"{name}: {type(error).__name__}: {error}")

    def agreeing(self, name: str, makers: Makers) -> list[str]:
        """The candidates whose results are those of the first. One that fails or differs is told and left out.

        They are run in float64, and timed in float32.
        """
        agree: list[str] = []
        expected: dict[str, Any] = {}
        for candidate, make in makers.items():
            with self.attempt(f"{name}, {candidate}"):
                result = result_of(make())
                if expected:
                    assert_same_results({**expected, candidate: result})
                else:
                    expected[candidate] = result
                agree.append(candidate)
        return agree


def result_of(call: Call) -> Any:
    return call.result() if isinstance(call, Compiled) else call()


def peak_of(call: Call, device: str) -> int:
    return call.peak_memory() if isinstance(call, Compiled) else peak_memory(call, device)


def progress(name: str) -> None:
    print(f"  {name}: done", file=sys.stderr, flush=True)


def targets_table(targets: Sequence[Target]) -> Table:
    missed = sum(not target.met for target in targets)
    return Table(
        "Targets",
        f"{len(targets) - missed} of {len(targets)} are met.",
        ["target", "measured", "at most", "result"],
        [[t.what, f"{t.figure:.2f}", f"{t.limit:.2f}", "met" if t.met else "**missed**"] for t in targets],
    )


def parse(description: str, **extra: dict[str, Any]) -> tuple[Settings, argparse.Namespace]:
    """The options of every benchmark, and the extra ones of this."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that it works, not to publish")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--compile", action="store_true", help="columns for torch.compile of both: minutes more")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, options in extra.items():
        parser.add_argument(f"--{name}", **options)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, for all candidates
    return Settings(options.device, options.quick, options.compile, tuple(options.case or ())), options


def text_of(parts: Sequence[Part], settings: Settings) -> str:
    """All that was found, as Markdown."""
    quick = " A quick run, with few rounds: to see that it works." if settings.quick else ""
    targets = [target for part in parts for target in part.targets]
    tables = [table for part in parts for table in part.tables]
    if targets:
        tables.insert(0, targets_table(targets))
    failures = [f"FAILED {failure.splitlines()[0]}" for part in parts for failure in part.failures]
    return "\n\n".join([f"{machine(settings.device)}.{quick}", *failures, *map(str, tables)]) + "\n"


def tell_failures(parts: Sequence[Part]) -> int:
    """The exit code."""
    failures = [failure for part in parts for failure in part.failures]
    for failure in failures:
        print(f"\nFAILED {failure}", file=sys.stderr)
    if not any(part.tables for part in parts):
        print("Nothing was measured.", file=sys.stderr)
        return 1
    return 1 if failures else 0


def main(run: Callable[[Settings], Part], description: str) -> int:
    """One benchmark as a command."""
    settings, _ = parse(description)
    part = run(settings)
    print(text_of([part], settings))
    return tell_failures([part])
