"""Containers that take part in vmap by methods of their own: those of tensordict.

NOTE [Containers that batch themselves]
A TensorDict has a batch size, which a batch dimension is taken out of and put into. As a mere pytree it would come out
with the batch size lost. It has methods for vmap: ``_add_batch_dim`` and ``_maybe_remove_batch_dim`` take the number of
a level, and call PyTorch's private names of theirs on each tensor. So vmap keeps such a container whole as it flattens
arguments and results, calls its methods, and lets these names answer for our levels (api/private_names.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.pytorch.torch_func import ADD_BATCH_DIM, REMOVE_BATCH_DIM
from functrans.pytorch.torch_private import TREE_NODES


class Level(int):
    """The number of a level, which knows its interpreter, where PyTorch's names deal in numbers alone."""

    interpreter: Interpreter
    #: what was batched by the number: the wrapper, what of the caller's it is, and the dimension
    entered: list[tuple[WrapperTensor, Tensor, int]]

    def __new__(cls, interpreter: Interpreter) -> Level:  # noqa: PYI034 - Self is not in typing before 3.11
        level = super().__new__(cls, interpreter.level)
        level.interpreter, level.entered = interpreter, []
        return level


def is_container(x: Any) -> bool:
    """Whether ``x`` has methods of its own for vmap; see NOTE [Containers that batch themselves]."""
    return hasattr(type(x), ADD_BATCH_DIM) and not isinstance(x, Tensor)


_seen = 0
_containers: set[type] = set()


def in_container(x: Any) -> bool:
    return type(x) in _containers


def whole() -> Callable[[Any], bool] | None:
    """What says of a node of a pytree that it is such a container; None as long as PyTorch's pytrees know none."""
    global _seen
    if _seen != len(TREE_NODES):
        _seen = len(TREE_NODES)
        _containers.update(kind for kind in TREE_NODES if hasattr(kind, ADD_BATCH_DIM) and not issubclass(kind, Tensor))
    return in_container if _containers else None


def entered(container: Any, in_dim: int | None, level: Level) -> Any:
    """``container`` as the function gets it: one of its own, for it may be written to.

    An unlocked copy is what it is made from: a locked one keeps what it returned for a level of this number.
    """
    copy = container.clone(False)
    if in_dim is None:
        return copy
    if copy.is_locked:
        copy.unlock_()
    inside = getattr(copy, ADD_BATCH_DIM)(in_dim=in_dim, vmap_level=level)
    return inside.lock_() if container.is_locked else inside


def brought_back(container: Any, out_dim: int, level: Level, size: int, name: str) -> Any:
    """``container`` one level down, with its batch at ``out_dim``, which is not negative."""
    return getattr(container, REMOVE_BATCH_DIM)(name, vmap_level=level, batch_size=size, out_dim=out_dim)


def part(x: Any, dim: int, start: int, length: int) -> Any:
    """``x``, a tensor or a container, from ``start`` on along ``dim``."""
    if isinstance(x, Tensor):
        return x.narrow(dim, start, length)
    return x[(slice(None),) * dim + (slice(start, start + length),)]

