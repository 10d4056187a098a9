"""functrans in the place of torch.func for a whole program: install().

NOTE [In the place of torch.func]
What is put in place are copies of the public functions, so that taking them out again finds them where modules that
were imported in between have them by ``from torch.func import grad``, and leaves alone what a program imports from
functrans itself. They call themselves torch.func's, which is where pickle looks for a function.
"""

from __future__ import annotations

import threading
from types import FunctionType, TracebackType
from typing import Any

import torch

import functrans
from functrans.api.exchange import put_in, take_out
from functrans.api.private_names import answer, answer_no_more

__all__ = ["Installation", "install"]


def copy_of(function: Any) -> Any:
    """Another function that does the same."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, function.__annotations__
    copy.__doc__, copy.__module__ = function.__doc__, "torch.func"
    return copy


#: Every function of torch.func, and what stands in its place.
PAIRS = [(getattr(torch.func, name), copy_of(getattr(functrans, name))) for name in torch.func.__all__]
_lock = threading.RLock()
_installed = 0


class Installation:
    """What ``install`` has put in place, until ``uninstall`` is called or the ``with`` block ends."""

    _in_place = True

    def uninstall(self) -> None:
        """Take it out again; the second call does nothing.

        Where ``install`` was called more than once, torch.func is back when all have been taken out.
        """
        global _installed
        with _lock:
            if not self._in_place:
                return
            self._in_place = False
            _installed -= 1
            answer_no_more()
            if _installed == 0:
                take_out(PAIRS)

    def __enter__(self) -> Installation:  # noqa: PYI034 - Self is not in typing before 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()


def install() -> Installation:
    """Put functrans in the place of ``torch.func`` and ``torch.vmap``, for all modules of the program.

    Modules that are imported later find it there. Those that are loaded and have a function by name (``from torch.func
    import grad``, at the top of a module) have ours instead; what is out of reach is in docs/compat.md. PyTorch's
    private names for looking into its wrappers (``torch._C._functorch.is_batchedtensor`` and its like) answer for ours.

    Returns:
        What takes it out again: by its ``uninstall``, or as a context manager.

    Example:
        >>> import torch
        >>> from functrans.compat import install
        >>> with install():
        ...     torch.func.grad(lambda x: torch.linspace(0, x, 3).sum())(torch.tensor(2.0))
        tensor(1.5000)
        >>> torch.func.grad(lambda x: torch.linspace(0, x, 3).sum())(torch.tensor(2.0))
        tensor(0.)
    """
    global _installed
    with _lock:
        _installed += 1
        answer()
        put_in(PAIRS)
    return Installation()
