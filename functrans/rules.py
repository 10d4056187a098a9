"""Rule tables: one per transform, mapping an operator to what the transform does with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch._ops import OpOverload

from functrans.errors import DuplicateRuleError, NotAnOverloadError

Rule = TypeVar("Rule")


class RuleTable(Generic[Rule]):
    """The rules of one transform.

    A table knows where each rule was registered, refuses a second rule for the same operator and says
    where the first one stands. Operators are overloads (``torch.ops.aten.sin.default``): a packet
    (``torch.ops.aten.sin``) would silently cover the in-place and ``out=`` forms, which never reach a rule.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._rules: dict[OpOverload, Rule] = {}
        self._places: dict[OpOverload, str] = {}
        self._listeners: list[Callable[[OpOverload], None]] = []

    def add(self, op: OpOverload, rule: Rule, *, place: str | None = None) -> None:
        """Register ``rule`` for ``op``; ``place`` is the ``file:line`` that messages show."""
        if not isinstance(op, OpOverload):
            raise NotAnOverloadError(self.title, op)
        if op in self._rules:
            raise DuplicateRuleError(self.title, op, self._places[op])
        self._rules[op] = rule
        self._places[op] = place or caller_place()
        self._changed(op)

    def remove(self, op: OpOverload) -> None:
        """Take out the rule of ``op``, if it has one, so that another can be registered."""
        self._rules.pop(op, None)
        self._places.pop(op, None)
        self._changed(op)

    def _changed(self, op: OpOverload) -> None:
        for notify in self._listeners:
            notify(op)

    def register(self, *ops: OpOverload) -> Callable[[Rule], Rule]:
        """Decorator: register the function below it for every operator in ``ops``."""
        place = caller_place()

        def decorate(rule: Rule) -> Rule:
            for op in ops:
                self.add(op, rule, place=place)
            return rule

        return decorate

    def get(self, op: OpOverload) -> Rule | None:
        """The rule for ``op``, or None."""
        return self._rules.get(op)

    def place(self, op: OpOverload) -> str:
        """``file:line`` of the registration of ``op``."""
        return self._places[op]

    def on_change(self, notify: Callable[[OpOverload], None]) -> None:
        """Call ``notify(op)`` whenever a rule is added, so that cached look-ups can be dropped."""
        self._listeners.append(notify)

    def __repr__(self) -> str:
        return f"<RuleTable {self.title!r}, {len(self)} rules>"

    def __contains__(self, op: OpOverload) -> bool:
        return op in self._rules

    def __iter__(self) -> Iterator[OpOverload]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


def place_in(op: Any, *tables: RuleTable[Any]) -> str | None:
    """Where ``tables`` have a rule for ``op``, an operator or the program of several; None: nowhere."""
    ops = [i.op for i in op.instructions] if hasattr(op, "instructions") else [op]
    return ", ".join(dict.fromkeys(table.place(o) for o in ops for table in tables if o in table)) or None


def caller_place(skip: int = 2) -> str:
    """``file:line`` of the code that called the function that calls this one."""
    frame = sys._getframe(skip)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
