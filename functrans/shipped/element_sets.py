"""Sets of the elements of a transform's inputs: what each element of a tensor depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

#: A set is ``(first, bits)``: bit i of ``bits`` says that element ``first + i`` is in it; ``bits`` is odd, or 0 for the
#: empty set. Elements that lie close together, as those of a stencil, take few bits, wherever they are.
ElementSet = tuple[int, int]
EMPTY: ElementSet = (0, 0)


class ElementSets:
    """The sets of one run, each under a number; 0 is the empty set.

    A tensor's *numbers* are an int64 tensor of its shape. What moves elements moves numbers, and sets that many
    elements share, such as the outputs of a dense layer, are kept once.
    """

    def __init__(self) -> None:
        self.sets: list[ElementSet] = [EMPTY]
        self.number_of: dict[ElementSet, int] = {EMPTY: 0}

    def number(self, found: ElementSet) -> int:
        n = self.number_of.get(found)
        if n is None:
            n = self.number_of[found] = len(self.sets)
            self.sets.append(found)
        return n

    def singletons(self, first: int, shape: Sequence[int]) -> Tensor:
        """Numbers for a new input, whose elements are called ``first``, ``first + 1``, ... and in no set yet."""
        start, count = len(self.sets), math.prod(shape)
        new = [(first + i, 1) for i in range(count)]
        self.sets += new
        self.number_of.update(zip(new, range(start, start + count), strict=True))
        return torch.arange(start, start + count).reshape(tuple(shape))

    def union_of(self, numbers: Iterable[int]) -> int:
        """The number of the union of the sets with these numbers."""
        members = [self.sets[n] for n in set(numbers) if n]
        if not members:
            return 0
        first = min(low for low, _ in members)
        bits = 0
        for low, some in members:
            bits |= some << (low - first)
        return self.number((first, bits))

    def union_of_two(self, a: int, b: int) -> int:
        """The same for two: most unions are, and many of them."""
        if a == b or a == 0:
            return b
        (low, some), (high, more) = self.sets[a], self.sets[b]
        if low > high:
            low, some, high, more = high, more, low, some
        return self.number((low, some | more << (high - low)))

    def union(self, a: Tensor, b: Tensor) -> Tensor:
        """Element by element, with broadcasting."""
        a, b = torch.broadcast_tensors(a, b)
        shape = a.shape
        pairs = torch.stack([torch.minimum(a, b), torch.maximum(a, b)], -1)
        return self.union_last(pairs).reshape(shape)

    def union_last(self, numbers: Tensor) -> Tensor:
        """Along the last dimension, which goes."""
        shape, width = numbers.shape[:-1], numbers.shape[-1]
        if width == 0 or numbers.numel() == 0:
            return torch.zeros(shape, dtype=torch.int64)
        if width == 1:
            return numbers.squeeze(-1)
        rows = numbers.reshape(-1, width).numpy()
        if width == 2:  # a key for each pair: much faster to sort than rows
            count = len(self.sets)
            keys, inverse = np.unique(rows[:, 0] * count + rows[:, 1], return_inverse=True)
            found = [self.union_of_two(*divmod(key, count)) for key in keys.tolist()]
            return torch.from_numpy(np.array(found, dtype=np.int64)[inverse.reshape(-1)]).reshape(shape)
        seen: dict[bytes, int] = {}
        out = np.empty(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            key = row.tobytes()
            n = seen.get(key)
            if n is None:
                n = seen[key] = self.union_of(row.tolist())
            out[i] = n
        return torch.from_numpy(out).reshape(shape)

    def union_along(self, numbers: Tensor, dims: Sequence[int] | None, keepdim: bool = True) -> Tensor:
        """Along ``dims``; None or none at all: along all of them, as in PyTorch's reductions."""
        rank = numbers.dim()
        if rank == 0:
            return numbers
        over = sorted({d % rank for d in dims}) if dims else list(range(rank))
        rest = [d for d in range(rank) if d not in over]
        found = self.union_last(numbers.permute(*rest, *over).flatten(len(rest)))
        if keepdim:
            for d in over:
                found = found.unsqueeze(d)
        return found

    def everything(self, numbers: Iterable[Tensor]) -> int:
        """The number of the union of all of these."""
        return self.union_of(n for t in numbers for n in torch.unique(t).tolist())

    def elements(self, number: int) -> list[int] | np.ndarray:
        """The elements of a set, in order."""
        first, bits = self.sets[number]
        if bits < 1 << 64:
            return [first + i for i in range(bits.bit_length()) if bits >> i & 1]
        packed = np.frombuffer(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(packed, bitorder="little")) + first
