"""What ``explain`` returns: the tree of events, to be read, searched, saved and stepped through."""

from __future__ import annotations

import fnmatch
import html
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from functrans.api.checks import check_kind
from functrans.errors import CallTypeError
from functrans.errors.wording import what
from functrans.explanation.events import Event, Level
from functrans.explanation.page import page
from functrans.explanation.records import as_records
from functrans.explanation.text import Style, as_summary, as_text


class Explanation:
    """What happened in one run of a function. Printed, it is the tree.

    Attributes:
        name: the function's name.
        result: what the function returned.
        error: the exception that ended the run, if it was asked to be caught; else None.
        example: the example whose numbers are kept.
        levels: the interpreters that ran, in the order in which they were entered.
        events: all that happened, in the order in which it began (``functrans.explanation.events.Event``). What is
            inside of an event is in its ``children``.
    """

    def __init__(
        self,
        name: str,
        result: Any,
        error: BaseException | None,
        example: int,
        events: list[Event],
        levels: list[Level],
    ) -> None:
        self.name = name
        self.result = result
        self.error = error
        self.example = example
        self.levels = levels
        self.events = events

    def __repr__(self) -> str:
        return self.text()

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def find(
        self, operator: str | None = None, *, level: int | None = None, line: int | None = None, kind: str | None = None
    ) -> list[Event]:
        """The events that fit.

        Args:
            operator: a part of the operator's name, or a pattern such as ``"aten.*mm*"``.
            level: of this level; 0 is the base.
            line: called by this line of the user's.
            kind: of this kind; see ``functrans.explanation.events.Event``.

        Returns:
            The events, in order.

        Example:
            >>> import torch
            >>> from functrans import explain, grad, vmap
            >>> found = explain(vmap(grad(torch.sin)), torch.ones(2)).find("cos", level=0)
            >>> [event.name for event in found], found[0].parent.kind
            (['aten.cos.default'], 'operator')
        """
        for name, value, wanted, expected in (
            ("operator", operator, str, "a string"), ("level", level, int, "an int"), ("line", line, int, "an int"),
            ("kind", kind, str, "a string"),
        ):  # fmt: skip
            if value is not None:
                check_kind("Explanation.find(...)", name, value, wanted, expected)
        return [event for event in self.events if fits(event, operator, level, line, kind)]

    def base_operators(self) -> list[str]:
        """The names of the operators that plain PyTorch ran, in order.

        Example:
            >>> import torch
            >>> from functrans import explain, vmap
            >>> explain(vmap(torch.dot), torch.ones(2, 3), torch.ones(2, 3)).base_operators()[-1]
            'aten.squeeze.dim'
        """
        return [event.name for event in self.events if event.kind == "base"]

    def summary(self) -> str:
        """How many operators were taken in which way at each level, and how many the base ran.

        Example:
            >>> import torch
            >>> from functrans import explain, grad, vmap
            >>> print(explain(vmap(grad(torch.sin)), torch.ones(2)).summary())
            level 2 grad(sin): 1 program, 1 pulled back
            level 1 vmap(sin): 2 program
            base: 4 operators
        """
        return as_summary(self)

    def text(self, *, costs: bool = False, numbers: bool = False, checks: bool = False) -> str:
        """The tree as text.

        Args:
            costs: with the time that each event took, and the new memory for results.
            numbers: with a few numbers of one example.
            checks: with the checks of vmap whether an operator takes one example at all, which are made for the first
                call of its kind.
        """
        return as_text(self, Style(costs, numbers, checks))

    def to_dict(self) -> dict[str, Any]:
        """All of it as lists, dicts, strings and numbers; functrans/explanation/records.py says what stands where."""
        return as_records(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """``to_dict()`` as JSON.

        Args:
            indent: as ``json.dumps`` takes it.
        """
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self) -> str:
        """The page: the user's source beside the tree, in one file that needs nothing else."""
        return page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, to be opened in a browser.

        Args:
            path: where to; its name ends in ``.html``, or in ``.json`` or ``.txt`` for what ``to_json()`` and
                ``text()`` return.

        Raises:
            CallTypeError: ``path`` is no path, or ends otherwise.
        """
        made = {".html": self.to_html, ".json": self.to_json, ".txt": self.text}
        write_as("Explanation.save(path)", path, made)

    def _repr_html_(self) -> str:
        return in_frame(self.to_html())


def write_as(call: str, path: str | os.PathLike[str], made: dict[str, Callable[[], str]]) -> None:
    """Write what ``made`` makes for the ending of ``path`` to that file."""
    check_kind(call, "path", path, str | os.PathLike, "a path")
    make = made.get(Path(path).suffix)
    if make is None:
        *most, last = made
        raise CallTypeError(call, f"{what(os.fspath(path))}", f"a name that ends in {', '.join(most)} or {last}")
    Path(path).write_text(make(), encoding="utf-8")


def in_frame(page: str) -> str:
    """A page inside of a notebook."""
    style = "width: 100%; height: 640px; border: 1px solid #8888; border-radius: 6px"
    return f'<iframe srcdoc="{html.escape(page, quote=True)}" style="{style}" sandbox="allow-scripts"></iframe>'


def fits(event: Event, operator: str | None, level: int | None, line: int | None, kind: str | None) -> bool:
    if operator is not None:
        pattern = operator if set(operator) & set("*?[") else f"*{operator}*"
        if event.kind not in ("operator", "base", "pull") or not fnmatch.fnmatchcase(event.name, pattern):
            return False
    if level is not None and (level_number(event) != level):
        return False
    if line is not None and (event.site is None or event.site.line != line):
        return False
    return kind is None or event.kind == kind


def level_number(event: Event) -> int:
    """The level of an event; 0: the base."""
    return 0 if event.level is None else event.level.level
