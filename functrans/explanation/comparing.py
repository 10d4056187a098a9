"""``diff``: two compositions side by side, and where they first differ."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from functrans.api.checks import check_callable
from functrans.errors import CallTypeError
from functrans.errors.wording import what
from functrans.explanation.aligning import aligned
from functrans.explanation.diff_page import diff_page
from functrans.explanation.differences import apart, culprit, difference, in_arguments, in_derivatives, in_results
from functrans.explanation.events import Event, inside_of_a_rule
from functrans.explanation.explaining import explain
from functrans.explanation.explanation import Explanation, in_frame, write_as
from functrans.explanation.looks import Look, Looking, looks
from functrans.explanation.side_by_side import as_text

#: How two steps compare: the same; the same results, taken another way; other results; a step of one side alone.
SAME, OTHERWISE, DIFFERENT, LEFT, RIGHT = "same", "otherwise", "different", "left only", "right only"


@dataclass(frozen=True)
class Row:
    """A step of both sides, or of one: events of one expression of the user's, or of one pull.

    Where both sides have the same operators, each is a row. See NOTE [Aligned by operators] for which belong together.
    """

    left: tuple[Event, ...]
    right: tuple[Event, ...]
    status: str
    #: what is different; of a row with the same results, the derivative that one of them lacks
    why: str = ""
    #: what differs in the arguments already, where the results do
    before: str = ""
    #: inside of events that are different, the innermost that give something else for the same arguments, if any do
    inside: Row | None = None

    @property
    def event(self) -> Event:
        """The last event of the left side; of the right one where the left one has none."""
        return (self.left or self.right)[-1]


class Diff:
    """Two runs side by side. Printed, it is that, with the first difference marked.

    Attributes:
        left: the Explanation of the first function; ``right`` that of the second.
        rows: the steps in order.
        first: the first row whose results differ; if its arguments differ already, and one of them is what a step of
            one side alone gave, the first of those steps. If there is none, the first of one side alone; if there is
            none either, the first that was taken another way; None if all is the same. Where the results of its events
            differ because those of an operator inside do, ``first.inside`` is that row.
        results: what is different between what the functions returned; empty if nothing is.
    """

    def __init__(self, left: Explanation, right: Explanation, rtol: float | None) -> None:
        self.left = left
        self.right = right
        self.results = "" if left.error or right.error else difference(returned(left), returned(right), rtol)
        self.rows = joined([*compared(left, right, rtol)], not (left.error or right.error or self.results))
        by_weight = ((DIFFERENT,), (LEFT, RIGHT), (OTHERWISE,))
        self.first = next((r for statuses in by_weight for r in self.rows if r.status in statuses), None)
        if self.first is not None and self.first.before:
            self.first = self.reason_of(self.first, rtol)

    def reason_of(self, row: Row, rtol: float | None) -> Row:
        """The step of one side alone that gave what is different among the arguments of ``row``; else ``row``."""
        place = next(i for i, one in enumerate(self.rows) if one is row)
        arguments = apart(row.left[-1], row.right[-1], rtol)
        for i in reversed(range(place)):
            one = self.rows[i]
            argument = arguments and arguments[one.status == RIGHT]
            if one.status not in (LEFT, RIGHT) or argument is None:
                continue
            if any(not difference([look], [argument], rtol) for look in one.event.gives):
                while i and self.rows[i - 1].status in (LEFT, RIGHT):
                    i -= 1
                why = f"{self.rows[i].why}; so the argument {argument.name} of {row.event.name} differs"
                self.rows[i] = replace(self.rows[i], why=why)
                return self.rows[i]
        return row

    @property
    def same(self) -> bool:
        """Whether all steps have the same results."""
        return all(row.status in (SAME, OTHERWISE) for row in self.rows)

    def __repr__(self) -> str:
        return self.text()

    def text(self, *, width: int = 72) -> str:
        """Both sides as text.

        Args:
            width: of each side.
        """
        return as_text(self, width)

    def to_html(self) -> str:
        """The page: both sides in columns, in one file that needs nothing else."""
        return diff_page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, to be opened in a browser.

        Args:
            path: where to; its name ends in ``.html``, or in ``.txt`` for what ``text()`` returns.

        Raises:
            CallTypeError: ``path`` is no path, or ends otherwise.
        """
        write_as("Diff.save(path)", path, {".html": self.to_html, ".txt": self.text})

    def _repr_html_(self) -> str:
        return in_frame(self.to_html())


def diff(
    f: Callable[..., Any], g: Callable[..., Any], *args: Any, example: int = 0, rtol: float | None = None, **kwargs: Any
) -> Diff:
    """Run ``f`` and ``g`` on the same arguments, and compare what happened step by step.

    A step is what an expression of the user's called, with the result that the code there sees, for one example; or a
    record that was pulled back, with its cotangents; of a write, the tensor that was written. So a batch is comparable
    with a loop over the examples (with its first turn), forward mode with reverse mode, a rule with the one that it
    takes the place of. Steps on the same line belong together. Where the functions stand on other lines, as two
    versions of one model do, the operators are aligned by name, levels, shapes and numbers. Both runs start from the
    same state of PyTorch's random numbers. (Arguments that ``f`` writes to are those that ``g`` gets.)

    Args:
        f: any function.
        g: another one.
        *args: the arguments of both.
        example: the example of every vmap whose numbers are compared.
        rtol: how far numbers may be apart, relative to the largest of a result; None: by the dtype.
        **kwargs: the keyword arguments of both.

    Returns:
        A Diff. Its ``first`` is the row of the first difference. If one of the functions raises, its side ends there.

    Raises:
        CallTypeError: ``f`` or ``g`` is no function, or an option is of the wrong type.

    Example:
        >>> import torch
        >>> from functrans import diff, vmap
        >>> from functrans.extend import BATCHING_RULES, overriding
        >>> cumsum = torch.ops.aten.cumsum.default
        >>> def f(x):
        ...     return x.cumsum(0) + 1
        >>> def wrong(x):
        ...     with overriding(BATCHING_RULES, cumsum):
        ...         @BATCHING_RULES.register(cumsum)
        ...         def batched(info, dims, x, dim):
        ...             return x.cumsum(0), 0
        ...         return vmap(f)(x)
        >>> found = diff(lambda x: torch.stack([f(row) for row in x]), wrong, torch.ones(2, 3))
        >>> found.first.event.name, found.first.status
        ('aten.cumsum.default', 'different')
    """
    check_callable("diff", f)
    if not callable(g):
        raise CallTypeError("diff(f, g, ...)", f"{what(g)} as g", "a function")
    if rtol is not None and (not isinstance(rtol, float | int) or isinstance(rtol, bool) or rtol < 0):
        raise CallTypeError("diff(f, g, ...)", f"{what(rtol)} as rtol", "a number from 0 on, or None")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        left = explain(f, *args, example=example, catch=True, **kwargs)
    return Diff(left, explain(g, *args, example=example, catch=True, **kwargs), rtol)


def returned(explanation: Explanation) -> list[Look]:
    return looks([("", Looking(explanation.example).look(explanation.result))])


def compared(left: Explanation, right: Explanation, rtol: float | None) -> Iterator[Row]:
    a, b = steps(left), steps(right)
    shared = {key for key, _ in a} & {key for key, _ in b}
    matcher = difflib.SequenceMatcher(None, [key for key, _ in a], [key for key, _ in b], autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            for (_, x), (_, y) in zip(a[i:i_end], b[j:j_end], strict=True):
                yield from paired(x, y, rtol)
        else:
            yield from between(a[i:i_end], b[j:j_end], shared, (left, right), rtol)


def between(
    a: list[Step], b: list[Step], shared: Collection[Any], runs: tuple[Explanation, Explanation], rtol: float | None
) -> Iterator[Row]:
    """The rows of steps that no line connects. Those of lines that are in both runs, elsewhere, stay alone."""
    left, right = runs
    only = [[group for key, group in side if key in shared] for side in (a, b)]
    own = [[event for key, group in side if key not in shared for event in group] for side in (a, b)]

    def before(side: int, number: float) -> Iterator[Row]:
        while only[side] and only[side][0][-1].number < number:
            group = only[side].pop(0)
            yield Row((), group, RIGHT, alone(right, left)) if side else Row(group, (), LEFT, alone(left, right))

    for pair in aligned(own[0], own[1], runs):
        for side, events in enumerate(pair):
            if events:
                yield from before(side, events[0].number)
        x, y = pair
        if x and y and comparable(x[-1], y[-1]):
            yield row(x, y, rtol)
        else:
            yield from (Row((event,), (), LEFT, alone(left, right)) for event in x)
            yield from (Row((), (event,), RIGHT, alone(right, left)) for event in y)
    for side in (0, 1):
        yield from before(side, float("inf"))


def comparable(x: Event, y: Event) -> bool:
    """Whether events of other lines can be said to be one step: they are the same operator, or give as much.

    What unlike operators pull back to are the cotangents of unlike arguments.
    """
    if x.name == y.name:
        return True
    few, many = sorted(([g.text for g in x.gives], [g.text for g in y.gives]), key=len)
    return "pull" not in (x.kind, y.kind) and few != [] and all(text in many for text in few)


def alone(mine: Explanation, other: Explanation) -> str:
    if other.error is None:
        return f"only in {mine.name}" if mine.name != other.name else "only on one side"
    return f"the other side was ended by {type(other.error).__name__}: {other.error}"


def joined(rows: list[Row], same_results: bool) -> list[Row]:
    """``rows``, with pulls of one side alone that stand beside such of the other taken for one step, if what goes on
    from there is the same."""
    found: list[Row] = []
    end = 0
    for alone, group in itertools.groupby(rows, lambda row: row.status in (LEFT, RIGHT) and row.event.kind == "pull"):
        block = [*group]
        end += len(block)
        goes_on = rows[end].status in (SAME, OTHERWISE) if end < len(rows) else same_results
        ours = tuple(event for row in block for event in row.left)
        theirs = tuple(event for row in block for event in row.right)
        found += [Row(ours, theirs, OTHERWISE)] if alone and ours and theirs and goes_on else block
    return found


#: What a step is known by, and its events.
Step = tuple[Any, tuple[Event, ...]]


def steps(explanation: Explanation) -> list[Step]:
    """What is compared, in order: the events of an expression, or a pull, with what it is known by."""
    found = [e for e in explanation.events if e.is_written or (e.kind == "pull" and not inside_of_a_rule(e.parent))]
    return [(key, tuple(group)) for key, group in itertools.groupby(found, key_of)]


def key_of(event: Event) -> Any:
    """What an event has in common with the same step of another run."""
    site = event.site if event.kind != "pull" else None if event.made_by is None else event.made_by.site
    where = None if site is None else (site.file, site.line, site.columns)
    return (event.kind == "pull", where, event.name if where is None or event.kind == "pull" else "")


def paired(left: tuple[Event, ...], right: tuple[Event, ...], rtol: float | None) -> Iterator[Row]:
    """The rows of two steps that belong together."""
    if [e.name for e in left] == [e.name for e in right]:
        for x, y in zip(left, right, strict=True):
            yield row((x,), (y,), rtol)
    else:
        yield row(left, right, rtol)


def row(left: tuple[Event, ...], right: tuple[Event, ...], rtol: float | None) -> Row:
    x, y = left[-1], right[-1]
    if x.error is not None or y.error is not None:
        if x.error == y.error:
            return Row(left, right, SAME)
        return Row(left, right, DIFFERENT, x.error or y.error or "")
    why = in_results(x, y, rtol)
    if why:
        a, b = culprit(x, y, rtol)
        inside = None if a is x else Row((a,), (b,), DIFFERENT, difference(a.gives, b.gives, rtol))
        return Row(left, right, DIFFERENT, why, in_arguments(x, y, rtol), inside)
    same_way = [shape_of(e) for e in left] == [shape_of(e) for e in right]
    return Row(left, right, SAME if same_way else OTHERWISE, in_derivatives(x, y))


def shape_of(event: Event) -> list[Any]:
    """What took an event, and what it did below."""
    below = [shape_of(child) for child in event.children if child.kind != "check"]
    return [event.kind, event.name, event.way, event.level and event.level.kind, *below]
