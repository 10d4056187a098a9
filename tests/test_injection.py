"""An exception at any moment leaves nothing behind: not in the thread, and not in a cache."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
from injection import violations

from functrans.core.thread_state import Snapshot

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each exception is raised in a process of its own")

#: Where state is switched and caches are filled.
CORE = ("core/thread_state.py", "core/stack.py", "door/torch_function.py", "core/dispatch.py", "interpreters/autograd_fallback.py", "functionalize/out_of_place.py", "core/operators.py", "core/rules.py")
EVERY = 12


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
        found = list(violations(lambda shown, number: shown.startswith("interpreters/jvp/interpreter.py"), ["pullbacks", "depth"]))
    assert found and all("keys" in text or "numbers" in text for text in found)
