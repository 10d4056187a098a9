"""Whether the LU factors that ``det``, ``slogdet`` and ``solve`` return beside their result are seen by anybody.

``aten._linalg_det`` and its like return them for the backward pass. The functions of ``torch`` drop them, and forward
mode, which computes a tangent before it is known who asks for it, need not follow what is dropped.
"""

from __future__ import annotations

import threading

from functrans.operators.scopes import SCOPES
from functrans.pytorch.thread_state import STATE

#: composites that drop the factors, by the names in their schemas
DROPPING = frozenset(("aten::linalg_det", "aten::linalg_slogdet", "aten::linalg_solve_ex"))


class _Seen(threading.local):
    #: whether who called the operator that is running gets its factors
    factors: bool = True


SEEN = _Seen()


def by_others() -> bool:
    """Whether a rule that is not the library's may look at factors: in a scope, or of a transform of the user's."""
    interpreter = STATE.top
    while interpreter is not None:
        if not type(interpreter).__module__.startswith("functrans."):
            return True
        interpreter = interpreter.below
    return bool(SCOPES)


class FactorsDropped:
    """In its block, at every level, nobody sees factors."""

    __slots__ = ("before",)

    before: bool

    def __enter__(self) -> None:
        self.before, SEEN.factors = SEEN.factors, by_others()

    def __exit__(self, *error: object) -> None:
        SEEN.factors = self.before
