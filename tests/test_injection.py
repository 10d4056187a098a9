"""An exception at any moment leaves nothing behind: not in the thread, and not in a cache."""

from __future__ import annotations

import gc
import os
from typing import Any
from unittest import mock

import pytest
from injection import violations

from functrans.functionalization import out_of_place
from functrans.operators.info import OpInfo
from functrans.pytorch.thread_state import Snapshot

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each exception is raised in a process of its own")

#: Where state is switched, and what is found of an operator is kept.
CORE = ("pytorch/thread_state.py", "core/stack.py", "door/torch_dispatch.py", "functionalization/out_of_place.py")
#: By default every so many lines of the rest; all of them take a quarter of an hour.
EVERY = 30


def test_exceptions_in_the_core_leave_nothing_behind() -> None:
    assert list(violations(lambda shown, number: shown.startswith(CORE))) == []


def test_exceptions_anywhere_leave_nothing_behind() -> None:
    assert list(violations(lambda shown, number: number % EVERY == 0 and not shown.startswith(CORE))) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, EVERY))
def test_exceptions_at_every_line_leave_nothing_behind(part: int) -> None:
    assert list(violations(lambda shown, number: number % EVERY == part and not shown.startswith(CORE))) == []


def test_a_thread_that_is_not_put_back_is_found() -> None:
    def restore_but_the_keys(self: Any) -> None:
        self.autograd = True
        original(self)

    original = Snapshot.restore
    with mock.patch.object(Snapshot, "restore", restore_but_the_keys):
        found = list(
            violations(
                lambda shown, number: shown.startswith("interpreters/jvp/interpreter.py"), ["pullbacks", "depth"]
            )
        )
    assert found and all("keys" in text or "numbers" in text for text in found)


def test_a_cache_that_is_filled_too_early_is_found() -> None:
    def filled_too_early(known: Any) -> Any:
        known.specialized[out_of_place.Functional] = NotImplemented
        return original(known)

    original = out_of_place.by_name
    with mock.patch.object(out_of_place, "by_name", filled_too_early):
        for known in [x for x in gc.get_objects() if type(x) is OpInfo]:
            known.specialized = {}  # other tests filled it
        chosen = lambda shown, number: shown.startswith("functionalization/out_of_place.py")
        found = list(violations(chosen, ["writes"]))
    assert found and all("has no pure form" in text for text in found)
