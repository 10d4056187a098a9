"""Where two events differ: in what they give, in what they took, or inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.explanation.events import Event, names_of
from functrans.explanation.looking import number_text, unseen
from functrans.explanation.looks import Look, Seen, looks
from functrans.explanation.text import places_text
from functrans.pytorch.torch_private import OpOverload


def in_results(left: Event, right: Event, rtol: float | None) -> str:
    """What is different between the results of two events; empty if nothing is.

    Where a write to a view is a write on one side and a pure operator on the other, the whole counts that was written.
    An operator that is run as another one may return more than it: then those of its results count that are there.
    """
    x, y = results(left, right), results(right, left)
    if left.name == right.name or len(x) == len(y):
        return difference(x, y[::-1] if exchanged(left, right, rtol) else y, rtol)
    few, many = sorted((x, y), key=len)
    for one in few:
        if all(difference([one], [other], rtol) for other in many):
            return f"{one.text} against {', '.join(other.text for other in many)}"
    return ""


def exchanged(left: Event, right: Event, rtol: float | None) -> bool:
    """Whether two events pull back through one operator whose two arguments stand in the other order on one side."""
    if left.made_by is None or right.made_by is None or not left.name == right.name == left.made_by.name:
        return False
    x, y = left.made_by.takes, right.made_by.takes
    two = len(x) == len(y) == len(left.gives) == len(right.gives) == 2
    return two and difference(x, y, rtol) != "" and difference(x, y[::-1], rtol) == ""


def results(event: Event, other: Event) -> list[Look]:
    return event.gives if event.whole is None or other.name == event.name else looks([("", event.whole)])


def in_derivatives(left: Event, right: Event) -> str:
    """Which level records, or has a tangent of, a result on one side alone; that shows in a later step."""
    for x, y in zip(left.gives, right.gives, strict=False):
        for ours, theirs in zip(x.layers, y.layers, strict=False):
            (level, *mine), (other, *its) = ours.split(", "), theirs.split(", ")
            if level == other and mine != its and ["constant"] in (mine, its):
                states = (" ".join(state[:1]) or "a tangent" for state in (mine, its))
                return f"{x.name}{' ' * bool(x.name)}at {level}: {' against '.join(states)}"
    return ""


def in_arguments(left: Event, right: Event, rtol: float | None) -> str:
    """What is different between what two events took; empty if nothing is, or they are not comparable."""
    found = apart(left, right, rtol)
    if found is not None:
        x, y = found
        writers = [writer for event, look in ((left, x), (right, y)) if (writer := written_in(event, look))]
        return "; ".join([f"{x.name}: {difference([x], [y], rtol)}", *writers])
    if left.name == right.name and [x.text for x in left.takes] == [y.text for y in right.takes]:
        ours, theirs = constants(left), constants(right)
        for name, text in ours.items():
            if theirs.get(name, text) != text:
                return f"{name}: {text} against {theirs[name]}"
    return ""


def apart(left: Event, right: Event, rtol: float | None) -> tuple[Look, Look] | None:
    """The first tensors that two events of one operator took, of the same shape, whose numbers differ."""
    if left.name == right.name and len(left.takes) == len(right.takes):
        for x, y in zip(left.takes, right.takes, strict=True):
            if x.text == y.text and difference([x], [y], rtol):
                return x, y
    return None


def written_in(event: Event, argument: Look) -> str:
    """Which operator, inside of what a level did with another one, wrote to an argument before; empty if none did."""
    (*_, run) = ancestors(event)
    for one in reversed([e for e in run.walk() if e.number < event.number and e.kind == "base" and not e.is_written]):
        writes = isinstance(one.op, OpOverload) and one.op._schema.is_mutable
        if writes and same_at_base(one.gives, argument):
            around = next(e for e in ancestors(one) if e.kind in ("operator", "pull"))
            place = "" if around.place is None else f" ({around.way}, {places_text(around.place)})"
            return f"{one.name} wrote that inside of {around.name}{place}"
    return ""


def ancestors(event: Event) -> Iterator[Event]:
    """The events around ``event``, innermost first; last the run."""
    while event.parent is not None:
        event = event.parent
        yield event


def same_at_base(results: Sequence[Look], argument: Look) -> bool:
    """Whether a result of plain PyTorch is what ``argument`` consists of."""
    seen: Any = argument.seen
    while hasattr(seen, "below"):
        seen = seen.below
    written = [x for look in results for x in look.seen.whole().values()]
    with unseen():
        return any(torch.equal(x, y) for x in written for y in seen.whole().values())


def constants(event: Event) -> dict[str, str]:
    """By name, the arguments of an event that are no tensors, as text."""
    args, kwargs = event.arguments
    named = {**dict(zip(names_of(event.op, len(args)), args, strict=True)), **kwargs}
    return {name: str(x) for name, x in named.items() if not isinstance(x, Seen)}


def culprit(left: Event, right: Event, rtol: float | None) -> tuple[Event, Event]:
    """Of two events whose results differ, the innermost that give something else for the same arguments."""
    for x, y in matching(left, right):
        if difference(x.gives, y.gives, rtol):
            if x.given == y.given and not in_arguments(x, y, rtol):
                return culprit(x, y, rtol)
            break
    return left, right


def matching(left: Event, right: Event) -> Iterator[tuple[Event, Event]]:
    """The operators inside of two events that are asked about in both, as far as these go the same way."""
    inside = [[e for e in event.children if e.kind in ("operator", "pull")] for event in (left, right)]
    for x, y in zip(*inside, strict=False):
        if (x.name, x.level and x.level.kind) != (y.name, y.level and y.level.kind):
            return
        yield x, y


def difference(left: Sequence[Look], right: Sequence[Look], rtol: float | None) -> str:
    """What is different between results; empty if nothing is."""
    if len(left) != len(right):
        return f"{len(left)} results against {len(right)}"
    for x, y in zip(left, right, strict=True):
        if x.text != y.text:
            return f"{x.text} against {y.text}"
        mine, other = by_part(x), by_part(y)
        for part in mine.keys() & other.keys():
            if len(mine[part]) == len(other[part]):
                for a, b in zip(mine[part], other[part], strict=True):
                    apart = distance(a, b, rtol)
                    if apart:
                        named = f"{x.name} " if len(left) > 1 and x.name else ""
                        named += "" if part == "value" else f"{part}: "
                        return f"{named}{number_text(a)} against {number_text(b)}, {apart}"
    return ""


def by_part(look: Look) -> dict[str, list[Tensor]]:
    """The numbers by what they are, whatever the level that carries them."""
    found: dict[str, list[Tensor]] = {}
    for part, x in look.numbers.items():
        found.setdefault(part.split(" at level ")[0], []).append(x)
    return found


def distance(a: Tensor, b: Tensor, rtol: float | None) -> str:
    """How far apart two tensors are, if they are further apart than rounding explains."""
    if a.shape != b.shape or a.dtype is not b.dtype:
        return "of other sizes"
    with unseen():
        if not (a.is_floating_point() or a.is_complex()):
            count = int((a != b).sum())
            return f"{count} of {a.numel()} numbers apart" if count else ""
        wide = torch.complex128 if a.is_complex() else torch.float64
        exact = torch.finfo(a.dtype).eps ** (2 / 3) if rtol is None else rtol
        a, b = a.to(wide), b.to(wide)
        equal = (a == b) | (a.isnan() & b.isnan())
        apart = (a - b).abs()[~equal]
        if apart.numel() == 0:
            return ""
        sizes = torch.cat([a.abs().reshape(-1), b.abs().reshape(-1)])
        finite = sizes[sizes.isfinite()]
        scale = float(finite.max()) if finite.numel() else 0.0
        furthest = float(apart.max())
        return "" if furthest <= exact * scale else f"{furthest:.3g} apart"
