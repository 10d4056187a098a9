"""How tensors of any level look at one moment.

NOTE [Looks are taken at once and read later]
By the time that somebody reads an explanation a tensor may be another thing than it was, so a look is taken when an
event happens. It costs as little as can be: metadata, what each transform says of its wrapper, a copy of the numbers at
the base. The rest (text, the numbers of one example, what an operator calls its arguments) is made of that when it is
read. Each level sees the same tensors, on the way down and back. So they are looked at once for as long as no code of
the user's and no write can have come between, which is for the observer to say (``Looking.forget``). No tensor is held
for that: PyTorch makes another one, by an operator, of a new tensor that somebody else holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from functrans.core.tensor import WRAPPERS, PendingWrapper
from functrans.explanation.looking import PLAIN, kept, unseen
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.torch_private import (
    DisableTorchFunction,
    base_of,
    function_mode_stack_size,
    mode_stack_size,
    no_dispatch,
)
from functrans.tensors.described import is_wrapper, shown

#: Kinds of arguments that are no tensors and never change.
FIXED = frozenset((int, float, bool, complex, str, type(None), torch.dtype, torch.layout, torch.device))
TENSORS = PLAIN | {*WRAPPERS}


class Seen:
    """A tensor as it looked, of which there is a text alone; its repr is that."""

    __slots__ = ("text",)

    #: whether it is of a tensor too large to be copied, all of which is there until ``Looking.look`` returns
    large = False

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def still(self, x: Any, looking: Looking) -> bool:
        """Whether ``x`` is what it was, as far as code of the package can have changed it."""
        return True

    def layers(self) -> tuple[str, ...]:
        return (self.text,)

    def boxes(self) -> list[tuple[int, str]]:
        """The same as a picture shows it: level and text, outermost first (see ``functrans.pictures.layers``)."""
        return [(0, self.text)]

    def whole(self) -> dict[str, Tensor]:
        """All numbers of one example, by what they are."""
        return {}

    def numbers(self) -> dict[str, Tensor]:
        """The numbers of one example that are kept, by what they are."""
        return {}


class SeenPlain(Seen):
    """A tensor of the base."""

    __slots__ = ("all", "dtype", "kept", "large", "shape")

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        self.shape = x.shape
        self.kept = kept(x)
        self.large = self.kept.shape != self.shape
        self.all = x if self.large else self.kept

    @property
    def text(self) -> str:  # type: ignore[override]
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"

    def whole(self) -> dict[str, Tensor]:
        return {"value": self.all}

    def numbers(self) -> dict[str, Tensor]:
        return {"value": self.kept}


class SeenWrapper(SeenPlain):
    """A wrapper, with what is inside."""

    __slots__ = ("about", "below", "example", "found", "kind", "level", "parts", "version")

    def __init__(self, x: Any, looking: Looking) -> None:
        interpreter = x.interpreter
        self.dtype = x.dtype
        self.shape = x.shape
        self.version = getattr(x, "version", 0)
        self.level = interpreter.level
        self.kind = interpreter.kind
        self.about = interpreter.describe(x)
        self.below = looking.seen(x._value)
        self.large = self.below.large
        self.parts = interpreter.parts(x)
        if self.parts:
            self.parts = {name: looking.tree(part) for name, part in self.parts.items()}
            for part in self.parts.values():
                self.large |= isinstance(part, Seen) and part.large
        #: where the numbers of one example are: batch dimension, its size, the example
        self.example: tuple[int, int, int] | None = None
        if isinstance(interpreter, VmapInterpreter) and x.bdim is not None:
            self.example = x.bdim, interpreter.batch_size, min(looking.example, interpreter.batch_size - 1)
        self.found = self.kept_parts() if self.large else None

    def kept_parts(self) -> dict[str, Tensor]:
        with no_dispatch(), DisableTorchFunction():
            return {name: kept(x) for name, x in self.whole().items()}

    def still(self, x: Any, looking: Looking) -> bool:
        return self.version == getattr(x, "version", 0) and looking.seen(x._value) is self.below

    def layers(self) -> tuple[str, ...]:
        about = self.about or ", ".join(f"{name} {shown(part)}" for name, part in self.parts.items())
        return (f"level {self.level} {self.kind}{', ' if about else ''}{about}", *self.below.layers())

    def boxes(self) -> list[tuple[int, str]]:
        about = filter(None, [self.about, *(f"{name}: {shown(part)}" for name, part in self.parts.items())])
        return [(self.level, "\n".join([f"{self.kind}: {self.text}", *about])), *self.below.boxes()]

    def whole(self) -> dict[str, Tensor]:
        found = dict(self.below.whole())
        for name, part in self.parts.items():
            if isinstance(part, Seen):
                found.update({f"{name} at level {self.level}": x for x in part.whole().values()})
        if self.example is None:
            return found
        bdim, size, example = self.example
        fitting = {name: x for name, x in found.items() if x.dim() > bdim and x.shape[bdim] == size > 0}
        return {name: x.select(bdim, example) for name, x in fitting.items()}

    def numbers(self) -> dict[str, Tensor]:
        if self.found is None:
            with unseen():
                self.found = self.whole()
        return self.found


class Text(str):
    """What is no tensor, as it was shown."""

    __slots__ = ()
    __repr__ = str.__str__


class Mapping(dict[str, Any]):
    """A dict with ``Seen`` in it, and as it was shown."""

    text = ""

    def __repr__(self) -> str:
        return self.text


class Look(NamedTuple):
    """How a tensor looked."""

    #: what an operator calls it
    name: str
    seen: Seen

    @property
    def text(self) -> str:
        """Dtype and shape, as the code at its level sees them."""
        return self.seen.text

    @property
    def layers(self) -> tuple[str, ...]:
        """What the transforms keep on it, innermost transform first, as in ``level 2 grad, tape_index=1``; last, what
        is at the base."""
        return self.seen.layers()

    @property
    def numbers(self) -> dict[str, Tensor]:
        """The numbers of one example, by what they are (the value, a tangent); of a large tensor a selection."""
        return self.seen.numbers()


class Looking:
    """Takes looks, with the numbers of the example ``example``."""

    def __init__(self, example: int) -> None:
        self.example = example
        #: by the number that Python knows a tensor by, a reference that does not hold it, and how it looked
        self.known: dict[int, tuple[Callable[[], Any], Seen]] = {}
        self.large: list[SeenPlain] = []

    def forget(self) -> None:
        """What was seen may look otherwise from now on."""
        self.known.clear()

    def look(self, x: Any) -> Any:
        """How an argument or a result looks: ``Seen`` in the place of tensors, in lists and dicts, and texts."""
        found = self.tree(x)
        if self.large:
            for seen in self.large:
                seen.all = seen.kept
            self.large.clear()
        return found

    def whole(self, x: Any) -> Any:
        """How the tensor looks that ``x`` is a view of; None if it is none, or nobody knows."""
        with DisableTorchFunction():
            base = base_of(x) if type(x) in PLAIN else None
        return None if base is None else self.look(base)

    def seen(self, x: Any) -> Seen:
        """How a tensor looks."""
        number, kind = id(x), type(x)
        known = self.known.get(number)
        if known is not None:
            reference, found = known
            if reference() is x and (kind in PLAIN or found.still(x, self)):
                return found
        if kind in WRAPPERS:
            found = SeenWrapper(x, self)
        elif kind in PLAIN and not (mode_stack_size() or function_mode_stack_size()):
            found = self.seen_at_base(x)
        else:
            with no_dispatch(), DisableTorchFunction():
                found = self.seen_at_base(x)
        if not found.large:
            self.known[number] = (lambda: x) if kind is PendingWrapper else ref(x), found
        return found

    def seen_at_base(self, x: Any) -> Seen:
        """How a tensor looks that is no wrapper, unless a class of the user's is in front of one."""
        if type(x) not in PLAIN:
            return SeenWrapper(x, self) if is_wrapper(x) else Seen(shown(x))
        if x.is_nested or x.layout is not torch.strided or x.is_quantized or x.is_meta:
            return Seen(shown(x))
        found = SeenPlain(x)
        if found.large:
            self.large.append(found)
        return found

    def tree(self, x: Any) -> Any:
        kind = type(x)
        if kind in FIXED:
            return x
        if kind in TENSORS or isinstance(x, Tensor):
            return self.seen(x)
        if isinstance(x, list | tuple):
            return list(map(self.tree, x))
        if isinstance(x, dict):
            found = Mapping({str(key): self.tree(v) for key, v in x.items()})
            found.text = shown(x)
            return found
        return Text(shown(x.func if isinstance(x, functools.partial) else x))


def looks(trees: Iterable[tuple[str, Any]]) -> list[Look]:
    """The tensors in trees, by names: those of the trees, and for what is inside of one the place in it."""
    return [Look(*found) for name, x in trees for found in named(name, x)]


def named(name: str, x: Any) -> Iterator[tuple[str, Seen]]:
    if isinstance(x, Seen):
        yield name, x
    elif isinstance(x, list):
        for i, v in enumerate(x):
            yield from named(f"{name}[{i}]", v)
    elif isinstance(x, Mapping):
        for key, v in x.items():
            yield from named(key, v)
