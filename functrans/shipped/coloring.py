"""Colours for the columns of a sparse matrix, so that those of one colour can be computed in one product.

Colours that are taken are bits of Python integers: a step looks at all of them at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Pattern(NamedTuple):
    """The places of the entries of a matrix that may differ from zero, sorted by row, then by column."""

    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int]

    def transposed(self) -> Pattern:
        order = np.lexsort((self.rows, self.columns))
        return Pattern(self.columns[order], self.rows[order], self.shape[::-1])

    def lines(self) -> list[list[int]]:
        """The columns of the entries of each row."""
        ends = np.searchsorted(self.rows, np.arange(self.shape[0] + 1)).tolist()
        columns = self.columns.tolist()
        return [columns[begin:end] for begin, end in itertools.pairwise(ends)]

    def symmetric(self) -> Pattern:
        """Without the entries whose mirror image is zero, for a matrix known to be symmetric."""
        n = self.shape[1]
        here, there = self.rows * n + self.columns, self.columns * n + self.rows
        kept = np.isin(here, there)
        return Pattern(self.rows[kept], self.columns[kept], self.shape)


def lowest_free(taken: int) -> int:
    return (~taken & (taken + 1)).bit_length() - 1


def colors_of_columns(pattern: Pattern) -> tuple[np.ndarray, int]:
    """Colours such that no two columns of one colour have entries in the same row, and how many there are."""
    by_column = pattern.transposed().lines()
    used = np.bincount(pattern.columns, minlength=pattern.shape[1]) > 0
    fullest = int(np.bincount(pattern.rows, minlength=1).max(initial=0))
    if fullest == used.sum():  # one row has them all
        return np.where(used, np.cumsum(used) - 1, 0), fullest
    best = greedy_colors(by_column, range(len(by_column)), pattern.shape[0])
    by_size = sorted(range(len(by_column)), key=lambda j: -len(by_column[j]))
    if best[1] > fullest and by_size != list(range(len(by_column))):
        best = min(best, greedy_colors(by_column, by_size, pattern.shape[0]), key=lambda found: found[1])
    if best[1] > fullest and (regular := lattice_colors(pattern, fullest)) is not None:
        return regular, fullest
    return best


def greedy_colors(by_column: list[list[int]], order: Iterable[int], rows: int) -> tuple[np.ndarray, int]:
    """Each column in turn gets the lowest colour that no other one has in its rows."""
    taken, colors = [0] * rows, [0] * len(by_column)
    for j in order:
        forbidden = 0
        for row in by_column[j]:
            forbidden |= taken[row]
        free = ~forbidden & (forbidden + 1)  # a bit: the lowest that is not set
        colors[j] = free.bit_length() - 1
        for row in by_column[j]:
            taken[row] |= free
    return np.array(colors, dtype=np.int64), max(colors, default=-1) + 1


def lattice_colors(pattern: Pattern, count: int) -> np.ndarray | None:
    """``count`` colours for a stencil on a grid in up to three dimensions, a linear function of a column's place on the
    grid: ``(x + 2 y) mod 5`` for five points in the plane, where a greedy colouring finds 7. None where there is none.
    """
    sizes = np.bincount(pattern.rows, minlength=pattern.shape[0])
    full = np.flatnonzero(sizes == count)
    starts = np.cumsum(sizes) - sizes
    stencils = pattern.columns[starts[full, None] + np.arange(count)]
    offsets, times = np.unique(stencils - stencils[:, count // 2, None], axis=0, return_counts=True)
    stencil = offsets[times.argmax()].tolist()
    wide = [o for o in stencil if o > 1]
    if count > 32 or len(wide) > 32:
        return None
    for strides in itertools.chain(itertools.combinations(wide, 1), itertools.combinations(wide, 2)):
        steps = []
        for offset in stencil:
            step = []
            for stride in reversed(strides):
                step.append(round(offset / stride))
                offset -= step[-1] * stride
            steps.append([offset, *reversed(step)])
        for factors in itertools.product((1,), *[range(count)] * len(strides)):
            there = {sum(f * s for f, s in zip(factors, step, strict=True)) % count for step in steps}
            if len(there) < count:  # inside of the grid two of the stencil's points would have one colour
                continue
            rest, colors = np.arange(pattern.shape[1]), 0
            for factor, stride in zip(factors[:0:-1], strides[::-1], strict=True):
                colors, rest = colors + factor * (rest // stride), rest % stride
            found = (colors + factors[0] * rest) % count
            if alone(pattern, found, count).all():
                return found
    return None


def star_colors(pattern: Pattern) -> tuple[np.ndarray, int]:
    """Colours for a symmetric matrix such that each entry, or its mirror image, is the only one of its colour in its
    row.

    A greedy star colouring (Gebremedhin, Manne and Pothen, "What color is your Jacobian?", 2005): neighbours differ,
    and so do the ends or the middles of every path of four.
    """
    n = pattern.shape[0]
    neighbors = [[j for j in line if j != i] for i, line in enumerate(pattern.lines())]
    colors = [-1] * n
    near = [0] * n  # the colours among the neighbours
    twice = [0] * n  # those that two of them have
    critical = [0] * n  # those of neighbours x that have a neighbour beside this node with this node's colour
    for v in sorted(range(n), key=lambda i: -len(neighbors[i])):
        forbidden = near[v]
        for w in neighbors[v]:
            if colors[w] >= 0:
                forbidden |= critical[w]
                if twice[v] >> colors[w] & 1:
                    forbidden |= near[w]
        color = colors[v] = lowest_free(forbidden)
        bit = 1 << color
        for x in neighbors[v]:
            if near[x] & bit and not twice[x] & bit:
                twice[x] |= bit
                if colors[x] >= 0:
                    for w in neighbors[x]:
                        if colors[w] == color:
                            critical[w] |= 1 << colors[x]
            elif near[x] & bit and colors[x] >= 0:
                critical[v] |= 1 << colors[x]
            near[x] |= bit
        for w in neighbors[v]:
            if colors[w] >= 0 and twice[v] >> colors[w] & 1:
                critical[w] |= bit
    return np.array(colors, dtype=np.int64), max(colors, default=-1) + 1


def alone(pattern: Pattern, colors: np.ndarray, count: int) -> np.ndarray:
    """Of each entry, whether it is the only one of its column's colour in its row."""
    keys = pattern.rows * count + colors[pattern.columns]
    _, inverse, times = np.unique(keys, return_inverse=True, return_counts=True)
    return times[inverse.reshape(-1)] == 1
