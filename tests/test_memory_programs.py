"""Random programs of views and writes inside of nested transforms agree with the same programs without either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from memory_programs import Generator, outcome

from functrans.functionalization import views, writes


def counted(seeds: range) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    wrong = []
    for seed in seeds:
        found, program = outcome(seed)
        known = found in ("right", "refused", "undecided")
        counts[found if known else "wrong"] += 1
        wrong += [] if known else [f"seed {seed}: {found}\n{program}"]
    return counts, wrong


@pytest.mark.parametrize("part", range(3))
def test_views_and_writes(part: int) -> None:
    counts, wrong = counted(range(100 * part, 100 * part + 100))
    assert not wrong, wrong[0]
    assert counts["right"] > 85 and not torch._C._len_torch_dispatch_stack()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_views_and_writes(part: int) -> None:
    _, wrong = counted(range(10_000 + 500 * part, 10_500 + 500 * part))
    assert not wrong, wrong[0]


def test_the_programs_have_everything() -> None:
    """Views, copies, writes to views, to arguments and to captured tensors, at three levels, by every transform."""
    text = "\n".join(Generator(seed).program()[0] for seed in range(300))
    for part in ("ravel()", "unbind", "einsum", ".copy_(", "out=", "] = ", "F.vmap", "F.jvp", "F.vjp", "F.grad("):
        assert part in text
    assert max(len(line) - len(line.lstrip()) for line in text.splitlines()) >= 16


def lost_write(original: Callable[..., Any]) -> Callable[..., Any]:
    """A write to a view that does not reach what is viewed."""
    return lambda view, new, filled: None


def copied_too(original: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever may be a copy is taken for a view."""
    return lambda *args, **kwargs: views.VIEWED


DEFECTS = {
    "a write is lost": (writes, "write_through", lost_write),
    "a copy is a view": (views, "what_returns", copied_too),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(name: str) -> None:
    module, function, defect = DEFECTS[name]
    with mock.patch.object(module, function, defect(getattr(module, function))):
        _, wrong = counted(range(120))
    assert wrong
