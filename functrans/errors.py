"""Every deliberate error of functrans: one class each, with its sentence and its cure."""

from __future__ import annotations

from typing import Any


class FunctransError(RuntimeError):
    """Base of all errors that functrans raises on purpose."""


class DuplicateRuleError(FunctransError):
    """An operator was given a second rule in the same table.

    Cure: change the first rule where it stands, or register yours for another operator.
    """

    def __init__(self, title: str, op: Any, place: str) -> None:
        super().__init__(f"{title}: {op} already has a rule, registered at {place}. Change that one instead.")


class NotAnOverloadError(FunctransError, TypeError):
    """A rule was registered for something that is not an operator overload.

    Cure: name the overload, e.g. ``torch.ops.aten.sin.default`` instead of ``torch.ops.aten.sin``.
    """

    def __init__(self, title: str, op: Any) -> None:
        super().__init__(
            f"{title}: expected an operator overload such as torch.ops.aten.sin.default, got {op!r}. "
            "Name one of its overloads."
        )


class DerivativeEntryError(FunctransError, ValueError):
    """An entry of the derivative table names something that its operator does not have.

    Cure: use the names of the operator's schema, printed by ``op._schema``.
    """

    def __init__(self, op: Any, what: str) -> None:
        super().__init__(f"derivative({op}, ...): the entry {what}. Schema: {op._schema}")
