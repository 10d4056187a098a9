"""Functions with a derivative of their own: a bound of the value asks for the value alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.autograd.function import Function

from functrans.door.autograd_function import FUNCTION_RULES
from functrans.interpreters.function_context import Context, is_setup_style
from functrans.pytorch.thread_state import running_at
from functrans.shipped.interval_rules.level import IntervalLevel


def forward(level: IntervalLevel, cls: type[Function], args: Sequence[Any]) -> Any:
    with running_at(level):
        if is_setup_style(cls):
            return cls.forward(*args)
        return cls.forward(Context(cls, (False,) * len(args)), *args)


FUNCTION_RULES[IntervalLevel] = forward
