"""What a piece of ordinary code was seen to do, written down as straight-line Python.

Code that looks at shapes and numbers and calls PyTorch makes the same calls whenever these are the same. Who can tell
that they are sees such code once, and runs what is written here from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.errors.call_sites import PROGRAM_FILE

#: Constants that Python writes as they are.
WRITTEN = (int, bool, str, type(None))
CONSTANTS = (float, complex, torch.dtype, torch.layout, torch.memory_format, slice, type(Ellipsis))


class Unwritable(Exception):
    """What was seen does not follow from what the script is given."""


class Script:
    """A function in the making: its parameters, which stand for ``values``, and the calls it makes."""

    #: types of what may be in its calls beside tensors, numbers and names
    constants: tuple[type, ...] = CONSTANTS

    def __init__(self, values: Sequence[Any], *parameters: str) -> None:
        own = [f"a{i}" for i in range(len(values))]
        self.parameters = [*parameters, *own]
        self.names: dict[int, str] = {}
        self.lines: list[tuple[str, list[str]]] = []
        #: whether two of the values are one tensor, of which it does not show which was meant
        self.ambiguous = False
        for name, value in zip(own, values, strict=True):
            if isinstance(value, Tensor):
                self.give_name(value, name)
            elif isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value):
                items = [f"{name}_{i}" for i in range(len(value))]
                self.lines.append((f"{', '.join(items)}, = {name}", []))
                for item, x in zip(items, value, strict=True):
                    if isinstance(x, Tensor):
                        self.give_name(x, item)
        #: whatever has a name, lest another object get its id
        self.kept: list[Any] = list(values)
        self.scope: dict[str, Any] = {}

    def give_name(self, x: Tensor, name: str) -> None:
        if self.names.setdefault(id(x), name) != name:
            self.ambiguous = True

    def is_given(self, x: Any) -> bool:
        """Whether ``x`` is among the values."""
        return self.names.get(id(x), "").startswith("a")

    def write(self, call: str, used: list[str], out: Any) -> None:
        """Write ``call``, which uses these names, down; it returned ``out``: tensors, and None."""
        if out is None or id(out) in self.names:  # it wrote one of its arguments
            self.lines.append((call, used))
            return
        outs = out if isinstance(out, tuple | list) else [out]
        new_tensors = all(o is None or isinstance(o, Tensor) and id(o) not in self.names for o in outs)
        if not outs or not new_tensors:
            raise Unwritable
        self.kept.append(out)
        if isinstance(out, Tensor):
            name = self.names[id(out)] = f"v{len(self.kept)}"
        else:
            new = [f"v{len(self.kept)}_{i}" for i in range(len(outs))]
            self.names.update((id(o), n) for o, n in zip(outs, new, strict=True) if o is not None)
            name = f"{', '.join(new)},"
        self.lines.append((f"{name} = {call}", used))

    def text(self, x: Any, used: list[str]) -> str:
        """How an argument is written; ``used`` gets the names in it."""
        if isinstance(x, Tensor):
            name = self.names.get(id(x))
            if name is None:
                raise Unwritable
            used.append(name)
            return name
        if type(x) in (list, tuple, torch.Size):
            items = ", ".join(self.text(i, used) for i in x)
            return f"[{items}]" if type(x) is list else f"({items},)" if x else "()"
        if type(x) in WRITTEN:
            return repr(x)
        if type(x) in self.constants:
            return self.constant(x)
        raise Unwritable

    def constant(self, x: Any) -> str:
        name = f"c{len(self.scope)}"
        self.scope[name] = x
        return name

    def compiled(self, result: Any) -> Callable[..., Any]:
        """The function that does what was seen, and returns what stands for ``result``."""
        returned: list[str] = []
        text = self.text(result, returned)
        alive = set(returned)
        lines = [f"    return {text}"]
        for line, used in reversed(self.lines):  # what is not used again is let go, as where variables of code end
            last = sorted({n for n in used if n not in alive and n.startswith("v")})
            alive.update(used)
            lines += [f"    del {', '.join(last)}", f"    {line}"] if last else [f"    {line}"]
        source = "\n".join([f"def script({', '.join(self.parameters)}):", *reversed(lines)])
        exec(compile(source, PROGRAM_FILE, "exec"), self.scope)  # noqa: S102 - the source was written above
        function: Callable[..., Any] = self.scope.pop("script")
        return function
