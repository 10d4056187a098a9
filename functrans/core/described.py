"""How messages and reprs show an operator's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from functrans.core.tensor import PendingWrapper
from functrans.core.torch_private import OpOverload


def given(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Arguments as a message shows them: tensors by dtype and shape, as the code at their level sees them."""
    return ", ".join([*map(shown, args), *(f"{name}={shown(a)}" for name, a in kwargs.items())])


def shown(a: Any) -> str:
    if isinstance(a, Tensor | PendingWrapper):
        return f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
    if isinstance(a, list | tuple):
        rest = [f"{len(a) - 8} more"] if len(a) > 9 else []
        return f"[{', '.join([*map(shown, a[: 8 if rest else 9]), *rest])}]"
    return str(a) if isinstance(a, OpOverload) else a.__name__ if callable(a) and hasattr(a, "__name__") else repr(a)
