"""Methods of grad, jvp and vmap that a user's subclass overrides, and the short ways that go past them.

What an interpreter makes wrappers and records by is open to subclasses: ``track``, ``record``, ``dual``, ``batched``,
``constant``. The library's own classes do the same without a call for each operator. Which way a class goes is found
once, when it is made, so that the short ways ask nothing.
"""

from __future__ import annotations

from typing import Any

from functrans.core.interpreter import Interpreter
from functrans.errors import RegistrationError


def overrides(cls: type[Interpreter], base: type[Interpreter], *names: str) -> bool:
    """Whether ``cls`` has methods of its own in the place of those that ``base`` has a short way for.

    Raises:
        RegistrationError: it takes programs, too, which go past them.
    """
    own = [name for name in names if getattr(cls, name) is not getattr(base, name)]
    if own and cls.whole:
        raise RegistrationError(
            f"class {cls.__name__}: got whole=True with {' and '.join(own)} of its own; expected one of them, since "
            f"programs are run without {base.__name__}.{own[0]}. Leave whole=True out: operators come one by one then."
        )
    return bool(own)


def method_of(interpreter: Interpreter, name: str) -> Any:
    """The method of an interpreter's class, whether or not it is watched (functrans/explanation/watching.py)."""
    method = getattr(type(interpreter), name)
    return getattr(method, "watched", method)
