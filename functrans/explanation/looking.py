"""Looking at tensors of the base without being seen: no operator that a mode sees, and nothing is kept but copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from functrans.pytorch.torch_private import DisableTorchFunction, no_dispatch

#: Of a larger tensor so many elements are kept, evenly spaced.
MOST = 1 << 16
#: The classes of tensors that are nothing else.
PLAIN = frozenset((Tensor, Parameter))


@contextmanager
def unseen() -> Iterator[None]:
    """Context: what runs is plain PyTorch that no transform, mode or subclass sees."""
    with torch.no_grad(), no_dispatch(), DisableTorchFunction():
        yield


def kept(x: Tensor) -> Tensor:
    """A copy that later writes and derivatives do not reach, of a selection where ``x`` is large."""
    if x.requires_grad or forward_ad._current_level >= 0:  # it would take longer than the copy
        x = x.detach()
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    if x.numel() > MOST:
        x = x.reshape(-1)[:: -(-x.numel() // MOST)]
    return x.clone()


def number_text(x: Tensor) -> str:
    """A few numbers of a tensor, as text."""
    with unseen():
        return nested_text(x, edge=3 if x.dim() < 2 else 2 if x.dim() == 2 else 1)


def nested_text(x: Tensor, edge: int) -> str:
    if x.dim() == 0:
        value = x.item()
        return f"{value:.4g}" if isinstance(value, float | complex) else str(value)
    n = x.shape[0]
    places: list[int | None] = list(range(n)) if n <= 2 * edge else [*range(edge), None, *range(n - edge, n)]
    return f"[{', '.join('...' if i is None else nested_text(x[i], edge) for i in places)}]"


def bytes_made(pure: bool, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The bytes of the tensors in ``out`` that do not share memory with the arguments; ``pure``: none of them does."""
    if pure and type(out) is Tensor and out.layout is torch.strided and not out.is_nested:
        return out.untyped_storage().nbytes()
    made = memory(out if isinstance(out, list | tuple) else (out,))
    taken = {} if pure or not made else memory([*args, *kwargs.values()])
    return sum(size for place, size in made.items() if place not in taken)


def memory(values: Sequence[Any]) -> dict[int, int]:
    """Where the strided tensors among ``values`` have their numbers, and the bytes there."""
    found = {}
    for x in values:
        kind = type(x)
        if kind in PLAIN:
            if x.layout is torch.strided and not x.is_nested:
                storage = x.untyped_storage()
                found[storage._cdata] = storage.nbytes()
        elif kind in (list, tuple):
            found.update(memory(x))
    return found
