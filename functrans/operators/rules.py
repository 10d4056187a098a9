"""Rule tables: one per transform, mapping an operator to what the transform does with it.

NOTE [What is made of rules]
Rules are looked up once; what is made of them (specialized rules, programs, the short ways in) is kept. There is one
way in which all of that is given up: a table that changes calls every function in ``FORGET`` with itself and the
operator, and those drop the container that they keep things in. They drop it rather than empty it: whoever is just
making something by the old rule took the container before it looked, and puts what it made where nobody looks any more.
So no thread keeps what no longer holds, without a lock.

What is made by the rules of a scope (operators/scopes.py) is kept by the scope; outside, nothing is given up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from functrans.errors import DuplicateRuleError, NotAnOverloadError, RegistrationError
from functrans.errors.wording import shown
from functrans.operators.scopes import LOCK, SCOPES, covered, covering, scope_here
from functrans.pytorch.torch_private import HigherOrderOperator, OpOverload, overload_of_library

Rule = TypeVar("Rule")

#: called with (table, operator) when a rule changes: every cache of what is made of rules has a function here
FORGET: list[Callable[[RuleTable[Any], OpOverload], None]] = []


class RuleTable(Generic[Rule]):
    """The rules of one transform.

    A table knows where each rule was registered, refuses a second rule for the same operator and says
    where the first one stands. Operators are overloads (``torch.ops.aten.sin.default``): a packet
    (``torch.ops.aten.sin``) would silently cover the in-place and ``out=`` forms, which never reach a rule.

    Args:
        title: what messages call it.
        cached: whether something is kept of what is made of its rules; see NOTE [What is made of rules].
        writing: whether it is asked about operators that write to their arguments. (Interpreters never see those.)
        kind: the class of its rules; None: anything that can be called.
        takes_functions: whether it may have rules for operators that take functions, such as
            ``torch.ops.higher_order.cond``; None: if it is not ``cached``.
        default: what happens to an operator without a rule: the name of a policy, or a function
            ``(interpreter, op, args, kwargs)``. Whose table it is gives it its meaning; see
            functrans/extension/without_rule.py.
    """

    def __init__(
        self,
        title: str,
        *,
        cached: bool = False,
        writing: bool = False,
        kind: type | None = None,
        default: str | Callable[..., Any] = "error",
        takes_functions: bool | None = None,
    ) -> None:
        if not isinstance(title, str):
            raise RegistrationError(f"RuleTable(title): got {shown(title)}; expected what messages call it, a string.")
        self.title = title
        self.default = default
        self.cached = cached
        self.writing = writing
        self.kind = kind
        self.takes_functions = not cached if takes_functions is None else takes_functions
        self._rules: dict[OpOverload, Rule] = {}
        self._places: dict[OpOverload, str] = {}

    def check(self, op: Any) -> None:
        """Refuse what is no operator overload, or one that is never looked up here."""
        if isinstance(op, HigherOrderOperator) and self.takes_functions:
            return
        if not isinstance(op, OpOverload):
            raise NotAnOverloadError(self.title, op, overload_of_library(op))
        if not self.writing and any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments):
            raise RegistrationError(
                f"{self.title}: {op} writes to its arguments ({op._schema}); a transform never sees it, "
                "since it sees the form that returns the new values instead. Register the rule for that operator."
            )

    def check_rule(self, op: OpOverload, rule: Any) -> None:
        """Refuse what cannot be a rule."""
        if callable(rule) if self.kind is None else isinstance(rule, self.kind):
            return
        expected = "a function" if self.kind is None else f"what {self.kind.__name__.lower()}(...) makes"
        raise RegistrationError(f"{self.title}: got {shown(rule)} as the rule of {op}; expected {expected}.")

    def add(self, op: OpOverload, rule: Rule, *, place: str | None = None) -> None:
        """Register ``rule`` for ``op``; ``place`` is the ``file:line`` that messages show.

        A second one from the same place, as when the cell of a notebook runs again, takes the first one's.
        """
        self.check(op)
        self.check_rule(op, rule)
        place = place or caller_place()
        with LOCK:
            if op in self and self.place(op) != place:
                raise DuplicateRuleError(self.title, op, self.place(op))
            scope = covering(self, op)
            if scope is not None:
                scope.entries[op] = rule, place
                scope.forget()
            else:
                self._set(op, rule, place)

    def remove(self, op: OpOverload) -> None:
        """Take out the rule of ``op``, if it has one, so that another can be registered."""
        self.check(op)
        with LOCK:
            scope = covering(self, op)
            if scope is not None:
                scope.entries[op] = None
                scope.forget()
            elif op in self._rules:
                self._set(op, None, "")

    def _set(self, op: OpOverload, rule: Rule | None, place: str) -> None:
        try:
            if rule is None:
                del self._rules[op], self._places[op]
            else:
                self._rules[op], self._places[op] = rule, place
            self._changed(op)
        except BaseException:  # an interrupt must not leave what was made of the old rule
            self._changed(op)
            raise

    def _changed(self, op: OpOverload) -> None:
        # nothing is made of an operator's rules before its OpInfo (operators/info.py)
        if not self.cached or not hasattr(op, "_functrans"):
            return
        for scope in SCOPES:
            scope.kept = {}
        for forget in FORGET:
            forget(self, op)

    def register(self, *ops: OpOverload) -> Callable[[Rule], Rule]:
        """Decorator: register the function below it for every operator in ``ops``."""
        if not ops:
            raise RegistrationError(
                f"{self.title}: a rule was registered for no operator. "
                "Name at least one: torch.ops.aten.sin.default, for example."
            )
        for op in ops:
            self.check(op)
        place = caller_place()

        def decorate(rule: Rule) -> Rule:
            for op in ops:
                self.add(op, rule, place=place)
            return rule

        return decorate

    def get(self, op: OpOverload) -> Rule | None:
        """The rule for ``op``, or None."""
        if SCOPES and (scope := covering(self, op)) is not None:
            entry = scope.entries[op]
            return None if entry is None else entry[0]
        try:
            return self._rules.get(op)
        except TypeError:  # an unhashable thing
            raise NotAnOverloadError(self.title, op, overload_of_library(op)) from None

    def rule_outside(self, op: OpOverload) -> Rule | None:
        """The rule for ``op`` outside of all scopes, or None."""
        return self._rules.get(op)

    def place(self, op: OpOverload) -> str:
        """``file:line`` of the registration of ``op``."""
        if op not in self:
            self.check(op)
            raise RegistrationError(f"{self.title}: got {op}, which has no rule; expected one that has.")
        entry = scope.entries[op] if SCOPES and (scope := covering(self, op)) is not None else None
        return self._places[op] if entry is None else entry[1]

    def __repr__(self) -> str:
        return f"<RuleTable {self.title!r}, {len(self)} rules>"

    def __contains__(self, op: object) -> bool:
        return self.get(op) is not None  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[OpOverload]:
        if not SCOPES:
            return iter(self._rules)
        return iter([op for op in dict.fromkeys([*self._rules, *covered(self)]) if op in self])

    def __len__(self) -> int:
        return len(self._rules) if not SCOPES else len(list(iter(self)))


#: stands for what a cache does not have, where None is a value
MISSING: Any = object()


class RuleCache:
    """What is made of rules, by key; outside of scopes it is in ``entries``. See NOTE [What is made of rules]."""

    def __init__(self) -> None:
        self.entries: dict[Any, Any] = {}
        FORGET.append(self.forget)

    def forget(self, table: RuleTable[Any], op: OpOverload) -> None:
        self.entries = {}

    def find(self, key: Any, make: Callable[..., Any], *args: Any) -> Any:
        """What is kept under ``key`` for the rules that hold here; if nothing is, what ``make(*args)`` makes."""
        scope = scope_here() if SCOPES else None
        entries = self.entries if scope is None else scope.kept.setdefault(self, {})
        found = entries.get(key, MISSING)
        if found is MISSING:
            found = entries[key] = make(*args)
        return found


def place_in(op: Any, *tables: RuleTable[Any]) -> str | None:
    """Where ``tables`` have a rule for ``op``, an operator or the program of several; None: nowhere."""
    ops = [i.op for i in op.instructions] if hasattr(op, "instructions") else [op]
    return ", ".join(dict.fromkeys(table.place(o) for o in ops for table in tables if o in table)) or None


def caller_place(skip: int = 2) -> str:
    """``file:line`` of the code that called the function that calls this one."""
    frame = sys._getframe(skip)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
