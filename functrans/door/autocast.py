"""Autocast, which stands in front of the door: composite operators come to it in pieces.

Autocast chooses dtypes for some operators, and leaves the others as they are. What PyTorch makes of others in front of
autograd, such as ``einsum``, comes to the door whole, past autocast, which would have seen its pieces. So while
autocast is on, such operators are taken apart in front of the door.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from functrans.decompositions.table import decomposition
from functrans.operators.defaults import completed
from functrans.operators.info import PURE, op_info
from functrans.operators.schemas import taken_apart
from functrans.pytorch.torch_private import (
    AUTOCAST_KEYS,
    CONJUGATE,
    NEGATIVE,
    EnableTorchFunction,
    Mode,
    OpOverload,
    RestorePythonTLSSnapshot,
    autocast_enabled,
    is_key_excluded,
    pop_mode,
    push_mode,
    set_key_excluded,
)


class Pieces(Mode):
    """On the mode stack, above the door, for one call of a torch function while autocast is on for ``keys``."""

    supports_higher_order_operators = True

    def __init__(self, keys: list[Any]) -> None:
        super().__init__()
        self.keys = keys

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(op, OpOverload) or not self.takes_apart(op):
            return op(*args, **kwargs)
        # A handler runs with every key above it excluded, autocast's among them.
        set_key_excluded(CONJUGATE, False)
        set_key_excluded(NEGATIVE, False)
        push_mode(self)
        try:
            for key in self.keys:
                set_key_excluded(key, False)
            ours = decomposition(op)
            if ours is None:
                return taken_apart(op, *args, **kwargs)
            with EnableTorchFunction():
                return completed(ours, op)(*args, **kwargs)
        finally:
            for key in self.keys:
                set_key_excluded(key, True)
            pop_mode(None)

    def takes_apart(self, op: OpOverload) -> bool:
        if op.namespace == "prim":  # PyTorch asks a tensor of another subclass for its device: no operator
            return False
        known = op_info(op)
        if not known.composite or known.kind_by_schema != PURE:
            return False
        return not any(op.has_kernel_for_dispatch_key(key) for key in self.keys)


def pieces_at_door(op: OpOverload) -> Pieces | None:
    """What takes ``op`` apart that came to the door with captured tensors alone, which no torch function announces.

    Autocast is asked as the caller has it: PyTorch switches it off while a handler runs.
    """
    with RestorePythonTLSSnapshot():
        if not autocast_enabled():
            return None
        mode = Pieces([key for key in AUTOCAST_KEYS if not is_key_excluded(key)])
    return mode if mode.takes_apart(op) else None


def in_pieces(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, with composite operators taken apart in front of the door."""
    mode = Pieces([key for key in AUTOCAST_KEYS if not is_key_excluded(key)])
    push_mode(mode)
    try:
        return function(*args)
    finally:
        pop_mode(None)
