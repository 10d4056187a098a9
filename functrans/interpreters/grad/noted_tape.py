"""A tape that knows which line of the user's made each record, for messages: under anomaly detection, or when asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from functrans.errors.call_sites import Site, user_site

NOTING: ContextVar[bool] = ContextVar("noting lines", default=False)


class NotedTape(list[Any]):
    """A tape that notes which line made each record."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[Site | None] = []

    def append(self, record: Any) -> None:
        super().append(record)
        self.sites.append(user_site(sys._getframe(1)))

    def clear(self) -> None:
        super().clear()
        self.sites.clear()


def new_tape() -> list[Any]:
    return NotedTape() if torch.is_anomaly_enabled() or NOTING.get() else []


def site_of(tape: list[Any], i: int) -> Site | None:
    """The user's line that made record ``i``, where it was noted."""
    return tape.sites[i] if isinstance(tape, NotedTape) else None


@contextmanager
def noting_lines() -> Iterator[None]:
    """Context: ``grad``, ``vjp`` and their like note for each operator which line called it, for ``origin``.

    It holds in this thread, or task of asyncio. (``torch.autograd.set_detect_anomaly`` has them noted, too.)

    Example:
        >>> import torch
        >>> from functrans import grad
        >>> from functrans.extend import noting_lines, origin
        >>> places = []
        >>> def loss(x):
        ...     y = x.sin()
        ...     y.register_hook(lambda g: places.append(origin()))
        ...     return y.exp()
        >>> with noting_lines():
        ...     _ = grad(loss)(torch.tensor(1.0))
        >>> places[0].op, places[0].place.endswith(", in loss")
        (<OpOverload(op='aten.sin', overload='default')>, True)
    """
    token = NOTING.set(True)
    try:
        yield
    finally:
        NOTING.reset(token)
