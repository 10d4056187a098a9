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
#: bits of a narrow set, of which many are united at once
NARROW = 63
#: stands in the array of bits for a set that is no narrow one
WIDE = -1
#: wide sets, of which it is not worth while to look for equal ones
FEW = 16
#: where the empty set begins: behind all others
BEHIND = 1 << 62


class ElementSets:
    """The sets of one run, each under a number; 0 is the empty set.

    A tensor's *numbers* are an int64 tensor of its shape. What moves elements moves numbers, and sets that many
    elements share, such as the outputs of a dense layer, are kept once. (Equal sets may have two numbers, if they were
    made in two ways.)
    """

    def __init__(self) -> None:
        self.count = 1
        self.first = np.full(64, BEHIND, dtype=np.int64)
        self.bits = np.zeros(64, dtype=np.int64)
        self.wide: dict[int, ElementSet] = {}
        self.number_of: dict[ElementSet, int] = {}

    def add(self, first: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Numbers for new sets."""
        start, self.count = self.count, self.count + len(first)
        if self.count > len(self.first):
            room = np.zeros(max(self.count, 2 * len(self.first)) - len(self.first), dtype=np.int64)
            self.first, self.bits = np.concatenate([self.first, room]), np.concatenate([self.bits, room])
        self.first[start : self.count], self.bits[start : self.count] = first, bits
        return np.arange(start, self.count)

    def number(self, found: ElementSet) -> int:
        n = self.number_of.get(found)
        if n is None:
            first, bits = found
            narrow = bits.bit_length() <= NARROW
            n = self.number_of[found] = int(self.add(np.array([first]), np.array([bits if narrow else WIDE]))[0])
            if not narrow:
                self.wide[n] = found
        return n

    def set_of(self, number: int) -> ElementSet:
        return self.wide.get(number) or (int(self.first[number]), int(self.bits[number]))

    def singletons(self, first: int, shape: Sequence[int]) -> Tensor:
        """Numbers for a new input, whose elements are called ``first``, ``first + 1``, ... and in no set yet."""
        count = math.prod(shape)
        numbers = self.add(np.arange(first, first + count), np.ones(count, dtype=np.int64))
        return torch.from_numpy(numbers).reshape(tuple(shape))

    def union_of(self, numbers: Iterable[int]) -> int:
        """The number of the union of the sets with these numbers."""
        different = set(numbers) - {0}
        if len(different) < 2:
            return different.pop() if different else 0
        members = [self.set_of(n) for n in different]
        first = min(low for low, _ in members)
        bits = 0
        for low, some in members:
            bits |= some << (low - first)
        return self.number((first, bits))

    def union(self, a: Tensor, b: Tensor) -> Tensor:
        """Element by element, with broadcasting."""
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        strides = list(zip(a.shape, a.stride(), b.stride(), strict=True))
        if any(n > 1 and s == t == 0 for n, s, t in strides):  # the same along a dimension: once is enough
            once = tuple(slice(0, 1) if s == t == 0 else slice(None) for _, s, t in strides)
            return self.union(a[once], b[once]).expand(a.shape)
        return torch.from_numpy(self.unions(a.reshape(-1).numpy(), b.reshape(-1).numpy())).reshape(a.shape)

    def unions(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The numbers of many unions of two."""
        first_a, first_b, bits_a, bits_b = self.first[a], self.first[b], self.bits[a], self.bits[b]
        low = np.minimum(first_a, first_b)
        first_a -= low
        first_b -= low
        shifted_a, shifted_b = bits_a << first_a, bits_b << first_b
        both = shifted_a | shifted_b
        # nothing was shifted out, and neither is WIDE
        narrow = (both >= 0) & (shifted_a >> first_a == bits_a) & (shifted_b >> first_b == bits_b)
        is_a = both == bits_a  # a union that begins before a has more bits than it
        out = np.where(is_a, a, b)
        new = narrow & ~is_a & (both != bits_b)
        if new.any():
            out[new] = self.add(low[new], both[new])
        if not narrow.all():
            rest = np.flatnonzero(~narrow)
            a, b = (self.same(n[rest]) if len(rest) > FEW else n[rest] for n in (a, b))
            known: dict[tuple[int, int], int] = {}
            for i, pair in zip(rest.tolist(), zip(a.tolist(), b.tolist(), strict=True), strict=True):
                n = known.get(pair)
                if n is None:
                    n = known[pair] = self.union_of(pair)
                out[i] = n
        return out

    def same(self, numbers: np.ndarray) -> np.ndarray:
        """One number for all of them that have the same narrow set."""
        kinds, inverse = np.unique(numbers, return_inverse=True)
        first, bits = self.first[kinds], self.bits[kinds]
        order = np.lexsort((np.where(bits == WIDE, kinds, 0), bits, first))
        first, bits, kinds = first[order], bits[order], kinds[order]
        begins = np.ones(len(kinds), dtype=bool)
        begins[1:] = (first[1:] != first[:-1]) | (bits[1:] != bits[:-1]) | (bits[1:] == WIDE)
        found = np.empty(len(kinds), dtype=np.int64)
        found[order] = kinds[begins][np.cumsum(begins) - 1]
        return found[inverse.reshape(-1)]

    def union_last(self, numbers: Tensor) -> Tensor:
        """Along the last dimension, which goes."""
        shape, width = numbers.shape[:-1], numbers.shape[-1]
        if width == 0 or numbers.numel() == 0:
            return torch.zeros(shape, dtype=torch.int64)
        if width == 1:
            return numbers.squeeze(-1)
        if width <= 16:  # by pairs, many at once
            half = width // 2
            united = self.union(numbers[..., :half], numbers[..., half : 2 * half])
            return self.union_last(torch.cat([united, numbers[..., 2 * half :]], -1))
        rows = numbers.reshape(-1, width).numpy()
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

    def places(self, numbers: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of a vector of numbers the places and elements, in order, one for each element of each set."""
        rows, columns = [], []
        for start in range(0, len(numbers), 1 << 14):
            part = numbers[start : start + (1 << 14)].numpy()
            bits = self.bits[part]
            wide = np.flatnonzero(bits == WIDE)
            bits[wide] = 0
            widest = int(bits.max()).bit_length()
            log = next(n for n in (3, 4, 5, 6) if widest <= 1 << n)  # of how many bits are looked at
            packed = bits.astype("<i8", copy=False).view(np.uint8).reshape(len(part), 8)[:, : 1 << log - 3]
            found = np.flatnonzero(np.unpackbits(packed, bitorder="little").view(bool))
            row, bit = found >> log, found & (1 << log) - 1
            column = self.first[part[row]] + bit
            if len(wide):
                several = [self.elements(n) for n in part[wide].tolist()]
                row = np.concatenate([row, np.repeat(wide, [len(found) for found in several])])
                column = np.concatenate([column, *several])
                order = np.argsort(row, kind="stable")
                row, column = row[order], column[order]
            rows.append(row + start)
            columns.append(column)
        none = np.zeros(0, dtype=np.int64)
        return np.concatenate([none, *rows]), np.concatenate([none, *columns])

    def elements(self, number: int) -> np.ndarray:
        """The elements of a set, in order."""
        first, bits = self.set_of(number)
        packed = np.frombuffer(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(packed, bitorder="little").view(bool)) + first
