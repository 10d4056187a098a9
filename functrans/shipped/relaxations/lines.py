"""Two straight lines around a function of one number, element by element: one below and one above on an interval.

A line that is a tangent or a chord is below or above by the function's shape. Where the interval is so narrow that its
chord is lost in rounding the slope is taken in the middle; the offset is then what makes the line a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from functrans.shipped.relaxations.level import Node

Function = Callable[[Tensor], Tensor]


class Line(NamedTuple):
    """``slope * x + offset``, for each element."""

    slope: Tensor
    offset: Tensor

    @property
    def pointwise(self) -> bool:
        return True

    def back(self, sources: Sequence[Node], rows: Tensor, one_sign: bool) -> tuple[Sequence[Tensor], Tensor]:
        return (rows * self.slope,), against(rows, self.offset, one_sign)

    def at(self, x: Tensor) -> Tensor:
        return self.slope * x + self.offset


Lines = tuple[Line, Line]


def against(rows: Tensor, x: Tensor, one_sign: bool) -> Tensor:
    """``rows · x``, [n], of ``rows`` [n, *shape]: NaN where a row asks for an element that is infinite or NaN.

    A row that has 0 there, as one of another element's bound has at what is masked by -inf, does not.
    With ``one_sign`` no row has numbers of both signs, which could make up for each other.
    """
    n = math.prod(x.shape)
    rows, x = rows.reshape(len(rows), n), x.reshape(n).to(rows.dtype)
    known = x.isfinite()
    found, unknown = torch.where(known, x, 0.0), (~known).to(rows.dtype)
    if one_sign:
        total, asked = (rows @ torch.stack([found, unknown], 1)).unbind(1)
    else:
        total, asked = rows @ found, rows.abs() @ unknown
    return torch.where(asked != 0, math.nan, total)


def through(x: Tensor, y: Tensor, slope: Tensor) -> Line:
    return Line(slope, y - slope * x)


def chord(f: Function, slope: Function, low: Tensor, high: Tensor) -> Tensor:
    """The slope between the ends; in the middle of an interval that is too narrow for that."""
    width, size = high - low, low.abs() + high.abs() + 1
    wide = width > torch.finfo(low.dtype).eps ** 0.5 * size
    return torch.where(wide, (f(high) - f(low)) / torch.where(wide, width, 1.0), slope((low + high) / 2))


def over_both(f: Function, slope: Tensor, low: Tensor, high: Tensor) -> Line:
    """The line of this slope that is not below ``f`` at either end."""
    return Line(slope, torch.maximum(f(low) - slope * low, f(high) - slope * high))


def convex(f: Function, slope: Function) -> Callable[[Tensor, Tensor], Lines]:
    """A tangent below, a chord above."""

    def lines(low: Tensor, high: Tensor) -> Lines:
        middle = (low + high) / 2
        below = through(middle, f(middle), slope(middle))
        return below, over_both(f, chord(f, slope, low, high), low, high)

    return lines


def concave(f: Function, slope: Function) -> Callable[[Tensor, Tensor], Lines]:
    of_negative = convex(lambda x: -f(x), lambda x: -slope(x))
    return lambda low, high: negated(*of_negative(low, high))


def negated(below: Line, above: Line) -> Lines:
    """Of ``-f``, from the lines of ``f``."""
    return Line(-above.slope, -above.offset), Line(-below.slope, -below.offset)


def s_shaped(f: Function, slope: Function, place: Function) -> Callable[[Tensor, Tensor], Lines]:
    """``f`` has its steepest place at 0, bends up left and down right of it, and ``f - f(0)`` is odd.

    ``place(s)`` is the number right of 0 where the slope is ``s``.
    """
    mirrored: Function = lambda x: -f(-x)

    def lines(low: Tensor, high: Tensor) -> Lines:
        turned = above_s(mirrored, slope, place, -high, -low)
        return Line(turned.slope, -turned.offset), above_s(f, slope, place, low, high)

    return lines


def above_s(f: Function, slope: Function, place: Function, low: Tensor, high: Tensor) -> Line:
    """A chord, if ``f`` reaches the upper end from below it; else the tangent that meets ``f`` at the lower end.

    That tangent's place is found by ``d -> place(slope of the chord from low to d)``, which comes down from ``high``
    quadratically. Every tangent on the way is above ``f``, so that four steps are enough.
    """
    secant = chord(f, slope, low, high)
    by_chord = (low < 0) & (slope(high) >= secant)
    searched = (low < 0) & (high > 0) & ~by_chord
    start = torch.where(searched, low, -0.5)
    touching = torch.where(searched, high, 0.9)
    for _ in range(4):
        touching = torch.minimum(place((f(touching) - f(start)) / (touching - start)), touching)
    touching = torch.where(searched, touching, (low + high) / 2)
    tangent = slope(touching)
    offset = torch.maximum(f(touching) - tangent * touching, f(low) - tangent * low)
    over = over_both(f, secant, low, high)
    return Line(torch.where(by_chord, secant, tangent), torch.where(by_chord, over.offset, offset))


def kinked(place: float, left: float, right: float, value: float = 0.0) -> Callable[[Tensor, Tensor], Lines]:
    """A function of slope ``left`` until ``place``, where it is ``value``, and of slope ``right`` from there."""
    if left > right:
        of_negative = kinked(place, -left, -right, -value)
        return lambda low, high: negated(*of_negative(low, high))

    def lines(low: Tensor, high: Tensor) -> Lines:
        before, after = (place - low).clamp(min=0), (high - place).clamp(min=0)
        of_left = torch.full_like(low, left)
        inside = (before > 0) & (after > 0)
        width = torch.where(inside, before + after, 1.0)
        secant = torch.where(inside, (left * before + right * after) / width, torch.where(after > 0, right, of_left))
        # at the lower end the function is value - left * before, or on the right piece
        start = value - left * before + right * (low - place).clamp(min=0)
        nearer = torch.where(after > before, right, of_left)
        return Line(nearer, value - nearer * place), through(low, start, secant)

    return lines


def mean_value(
    f: Function, low: Tensor, high: Tensor, slopes: tuple[Tensor, Tensor], box: tuple[Tensor, Tensor]
) -> Lines:
    """``f`` has ``slopes`` from the least to the greatest, and lies in ``box``: the lines that are best in the middle.

    Along the least slope ``f`` is above the line through its lower end, along the greatest above that through the upper
    one; and between the two ends of a chord it falls by no more than the slopes let it come back.
    """
    least, most = slopes
    secant = torch.minimum(torch.maximum(chord(f, lambda x: (least + most) / 2, low, high), least), most)
    spread = most - least
    falls = (most - secant) * (secant - least) * (high - low) / torch.where(spread > 0, spread, 1.0)
    flat = torch.zeros_like(low)
    ends = f(low) - secant * low, f(high) - secant * high
    below = [
        Line(flat, box[0]), through(low, f(low), least), through(high, f(high), most),
        Line(secant, torch.minimum(*ends) - falls),
    ]  # fmt: skip
    above = [
        Line(flat, box[1]), through(high, f(high), least), through(low, f(low), most),
        Line(secant, torch.maximum(*ends) + falls),
    ]  # fmt: skip
    middle = (low + high) / 2
    return best(below, lambda line: line.at(middle)), best(above, lambda line: -line.at(middle))


def best(lines: list[Line], worth: Callable[[Line], Tensor]) -> Line:
    found, *others = lines
    for line in others:
        better = worth(line) > worth(found)
        found = Line(*(torch.where(better, a, b) for a, b in zip(line, found, strict=True)))
    return found


def finite(lines: Callable[[Tensor, Tensor], Lines], low: Tensor, high: Tensor, box: tuple[Tensor, Tensor]) -> Lines:
    """The ``lines`` on an interval. One that is none becomes the end of the box, and so do both over an infinite width,
    where they are of another interval, so that their derivatives are numbers."""
    narrow = (high - low).isfinite()
    found = lines(torch.where(narrow, low, 0.0), torch.where(narrow, high, 0.0))

    def or_flat(line: Line, end: Tensor) -> Line:
        known = line.slope.isfinite() & line.offset.isfinite() & narrow
        return Line(torch.where(known, line.slope, 0.0), torch.where(known, line.offset, end))

    return or_flat(found[0], box[0]), or_flat(found[1], box[1])
