"""Rules that hold for the length of a block, over those of the tables: ``rules_in_scope``.

They hold in one context: a thread, or a task of asyncio, and the tasks started from it. While no scope is open
anywhere, all of this costs the look at an empty list.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from functrans.pytorch.torch_private import OpOverload

if TYPE_CHECKING:
    from functrans.operators.rules import RuleTable

#: the scopes that are open in any context
SCOPES: list[Scope] = []
LOCK = threading.RLock()
_innermost: ContextVar[Scope | None] = ContextVar("functrans.operators.scopes", default=None)


class Scope:
    """Rules that hold in one context for the length of a block."""

    def __init__(self, table: RuleTable[Any], entries: Mapping[OpOverload, tuple[Any, str] | None]) -> None:
        self.table = table
        #: by operator its rule and the place of that; None: no rule
        self.entries = dict(entries)
        self.outer = _innermost.get()
        self.open = True
        #: what is made of rules here, by who keeps it
        self.kept: dict[Any, dict[Any, Any]] = {}

    def outwards(self) -> Iterator[Scope]:
        """This scope and those that it was opened in."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer

    def chain(self) -> Iterator[Scope]:
        """Those of them that are open: one that a task was started in may have been closed meanwhile."""
        return (scope for scope in self.outwards() if scope.open)

    def forget(self) -> None:
        """Give up what was made by this scope's rules, here and in the scopes inside."""
        for scope in SCOPES:
            if self in scope.outwards():
                scope.kept = {}

    def close(self) -> None:
        self.open = False
        try:
            with LOCK:
                self.forget()
                SCOPES[:] = [scope for scope in SCOPES if scope.open]
        finally:
            if _innermost.get() is self:
                _innermost.set(self.outer)


def scope_here() -> Scope | None:
    """The innermost open scope of this context that changes a rule of which something is kept."""
    innermost = _innermost.get()
    return None if innermost is None else next((s for s in innermost.chain() if s.table.cached), None)


def covering(table: RuleTable[Any], op: OpOverload) -> Scope | None:
    """The innermost open scope of this context that has a say about ``op`` in ``table``."""
    innermost = _innermost.get()
    if innermost is None:
        return None
    return next((s for s in innermost.chain() if s.table is table and op in s.entries), None)


def covered(table: RuleTable[Any]) -> list[OpOverload]:
    """The operators about which open scopes of this context have a say in ``table``."""
    innermost = _innermost.get()
    return [] if innermost is None else [op for s in innermost.chain() if s.table is table for op in s.entries]


@contextmanager
def scope_of(table: RuleTable[Any], entries: Mapping[OpOverload, tuple[Any, str] | None]) -> Iterator[RuleTable[Any]]:
    """Context: these rules lie over those of ``table``; see ``Scope``."""
    scope = Scope(table, entries)
    try:
        try:
            with LOCK:
                SCOPES.append(scope)
            _innermost.set(scope)
            yield table
        finally:
            scope.close()
    except BaseException:
        scope.close()  # once more: the exception may have come while it was closed
        raise


@contextmanager
def rules_of(scope: Scope | None) -> Iterator[None]:
    """Context: the rules of ``scope`` hold (None: those outside of all scopes), whatever else does."""
    if not SCOPES:
        yield
        return
    here = _innermost.get()
    _innermost.set(scope)
    try:
        yield
    finally:
        _innermost.set(here)
