"""Which steps of two runs belong together where the runs were written on other lines: a matter of the operators.

NOTE [Aligned by operators]
Steps that one line called in both runs belong together, whatever they did; that is found first (``comparing.steps``).
What is left between two such steps are the user's own versions of the same thing. There events are aligned, in order,
by what they have in common, most of it first: operator, levels, shapes and numbers; the numbers of the results alone,
for which all that was done since the last such place belongs together (``x * x`` and ``x.pow(2)``, a norm in pieces and
``layer_norm``); operator, levels and shapes; operator and levels; the operator. Each time the longest runs of agreement
are taken, and what is between two of them goes on to the next. Before all that, what has operator, levels, shapes and
numbers in common but comes at another time, as independent steps may, is put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from functrans.explanation.events import Event
from functrans.explanation.explanation import Explanation
from functrans.explanation.looking import unseen
from functrans.explanation.looks import Look

#: Events of the left side and of the right one that belong together; of one side alone, if the other has none.
Pair = tuple[tuple[Event, ...], tuple[Event, ...]]
#: How many numbers of a result tell it from another.
FEW = 16


def aligned(left: Sequence[Event], right: Sequence[Event], runs: tuple[Explanation, Explanation]) -> Iterator[Pair]:
    """The events of both sides in order, those together that belong together; ``runs`` are what they are of."""
    moved = at_other_times(left, right, runs)
    elsewhere = {event for pair in moved for event in pair}
    ours, theirs = ([event for event in side if event not in elsewhere] for side in (left, right))
    for pair in by_keys(ours, theirs, runs, [by_numbers, by_results, by_shapes, by_levels, by_operator]):
        while moved and pair[0] and moved[0][0].number < pair[0][0].number:
            x, y = moved.pop(0)
            yield (x,), (y,)
        yield pair
    yield from (((x,), (y,)) for x, y in moved)


def at_other_times(
    left: Sequence[Event], right: Sequence[Event], runs: tuple[Explanation, Explanation]
) -> list[tuple[Event, Event]]:
    """Events that are alike, numbers and all, and not in the same order on both sides; by the order of the left."""
    ours, theirs = ([by_numbers(event, run) for event in side] for side, run in zip((left, right), runs, strict=True))
    blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    here = {block.a + k for block in blocks for k in range(block.size)}
    there = {block.b + k for block in blocks for k in range(block.size)}
    waiting: dict[Any, list[Event]] = {}
    for j, event in enumerate(right):
        if j not in there and not says_nothing(event.gives):
            waiting.setdefault(theirs[j], []).append(event)
    alone = [(event, key) for i, (event, key) in enumerate(zip(left, ours, strict=True)) if i not in here]
    return [(event, waiting[key].pop(0)) for event, key in alone if waiting.get(key)]


def by_keys(
    left: Sequence[Event],
    right: Sequence[Event],
    runs: tuple[Explanation, Explanation],
    keys: list[Callable[[Event, Explanation], Any]],
) -> Iterator[Pair]:
    if not (left and right and keys):
        if left or right:
            yield (*left,), (*right,)
        return
    key, *rest = keys
    ours, theirs = ([key(event, run) for event in side] for side, run in zip((left, right), runs, strict=True))
    if key is by_results:
        yield from up_to_results(left, right, runs, ours, theirs, rest)
        return
    for tag, i, i_end, j, j_end in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if tag == "equal":
            for x, y in zip(left[i:i_end], right[j:j_end], strict=True):
                yield (x,), (y,)
        else:
            yield from by_keys(left[i:i_end], right[j:j_end], runs, rest)


def up_to_results(
    left: Sequence[Event],
    right: Sequence[Event],
    runs: tuple[Explanation, Explanation],
    ours: list[Any],
    theirs: list[Any],
    keys: list[Callable[[Event, Explanation], Any]],
) -> Iterator[Pair]:
    """All that led to the same results on both sides, together; the rest by ``keys``."""
    begun, other = 0, 0
    for i, j, size in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        for k in range(size):
            yield (*left[begun : i + k + 1],), (*right[other : j + k + 1],)
            begun, other = i + k + 1, j + k + 1
    yield from by_keys(left[begun:], right[other:], runs, keys)


def by_operator(event: Event, run: Explanation) -> Any:
    return event.kind == "pull", event.name


def by_levels(event: Event, run: Explanation) -> Any:
    return *by_operator(event, run), *(run.levels[place].kind for place in event.stack)


def by_shapes(event: Event, run: Explanation) -> Any:
    return *by_levels(event, run), event.given, event.returned


def by_numbers(event: Event, run: Explanation) -> Any:
    return *by_shapes(event, run), *numbers(event.gives)


def by_results(event: Event, run: Explanation) -> Any:
    """The first result; results that say nothing are like no others."""
    if says_nothing(event.gives[:1]):
        return event
    return event.kind == "pull", event.gives[0].text, *numbers(event.gives[:1])


def says_nothing(found: Sequence[Look]) -> bool:
    return all(number in TELLING_NOTHING for _, few in numbers(found) for number in few)


#: Numbers that results of unlike operators have in common.
TELLING_NOTHING = frozenset(f"{v:.2e}" for v in (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf")))


def numbers(found: Sequence[Look]) -> list[tuple[str, tuple[str, ...]]]:
    """The first numbers of tensors, to three digits."""
    with unseen():
        return [
            (name.split(" at level ")[0], tuple(f"{v:.2e}" for v in x.reshape(-1)[:FEW].tolist()))
            for look in found
            for name, x in look.numbers.items()
        ]
