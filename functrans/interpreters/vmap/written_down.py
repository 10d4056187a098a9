"""Batching rules that were run once, written down as straight-line Python.

A rule is ordinary code: it looks at shapes, folds the batch in here and takes it out there, and calls PyTorch. All that
it may look at is in the look of a call (seen_calls.py), so that calls of one look make the same calls of PyTorch. One
such call is run under a mode that sees them, and what it saw is compiled; later calls run that.

NOTE [What is written down]
The library's own rules, where they run at the base. A rule is left as it is if it reads anything that the look does not
say (a number, a device, an address, how memory lies that a kernel laid out), if it uses a tensor that the call does not
hand over, or if two arguments of the call are one tensor, since it does not show which of them was meant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functrans.errors.call_sites import PROGRAM_FILE
from functrans.interpreters.vmap.seen_calls import SeenCall
from functrans.operators.schemas import direct_call
from functrans.pytorch.torch_private import OpOverload, function_mode_enabled

#: What a rule may ask of every tensor, and what of the call's own alone.
METADATA = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "layout", "ndim", "is_sparse")
) | {
    Tensor.dim, Tensor.ndimension, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex,
}  # fmt: skip
OF_ARGUMENTS = frozenset((Tensor.stride, Tensor.is_contiguous))

#: Constants that Python writes as they are.
WRITTEN = (int, bool, str, type(None))
CONSTANTS = (float, complex, torch.dtype, torch.layout, torch.memory_format, slice, type(Ellipsis))


class Unwritable(Exception):
    """See NOTE [What is written down]."""


class Writer(TorchFunctionMode):
    """Sees the calls of PyTorch that a rule makes on the values of a call, and writes them down."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()
        self.parameters = [f"a{i}" for i in range(len(values))]
        self.names: dict[int, str] = {}
        self.lines: list[tuple[str, list[str]]] = []
        for name, value in zip(self.parameters, values, strict=True):
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

    refused = False

    def give_name(self, x: Tensor, name: str) -> None:
        if self.names.setdefault(id(x), name) != name:
            self.refused = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in METADATA or (func in OF_ARGUMENTS and self.names.get(id(args[0]), "").startswith("a")):
            return out
        if not self.refused:
            try:
                self.write(func, args, kwargs or {}, out)
            except Unwritable:
                self.refused = True
        return out

    def write(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        used: list[str] = []
        texts = [self.text(a, used) for a in args]
        texts += [f"{name}={self.text(a, used)}" for name, a in kwargs.items()]
        function = (direct_call(func) if isinstance(func, OpOverload) and not kwargs else None) or func
        call = f"{self.constant(getattr(function, '_op', function))}({', '.join(texts)})"
        if out is None or id(out) in self.names:  # it wrote one of its arguments
            self.lines.append((call, used))
            return
        outs = out if isinstance(out, tuple | list) else [out]
        new_tensors = all(o is None or isinstance(o, Tensor) and id(o) not in self.names for o in outs)
        if not outs or not new_tensors:
            raise Unwritable(func)
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
                raise Unwritable(x)
            used.append(name)
            return name
        if type(x) in (list, tuple, torch.Size):
            items = ", ".join(self.text(i, used) for i in x)
            return f"[{items}]" if type(x) is list else f"({items},)" if x else "()"
        if type(x) in WRITTEN:
            return repr(x)
        if type(x) in CONSTANTS:
            return self.constant(x)
        raise Unwritable(x)

    def constant(self, x: Any) -> str:
        name = f"c{len(self.scope)}"
        self.scope[name] = x
        return name

    def compiled(self, result: Any) -> Callable[..., Any] | bool:
        """The function of the call's values that does what was seen, and returns what the rule returned; or False."""
        if self.refused:
            return False
        returned: list[str] = []
        try:
            text = self.text(result, returned)
        except Unwritable:
            return False
        alive = set(returned)
        lines = [f"    return {text}"]
        for line, used in reversed(self.lines):  # what is not used again is let go, as where the rule's variables end
            last = sorted({n for n in used if n not in alive and n.startswith("v")})
            alive.update(used)
            lines += [f"    del {', '.join(last)}", f"    {line}"] if last else [f"    {line}"]
        source = "\n".join([f"def rule({', '.join(self.parameters)}):", *reversed(lines)])
        exec(compile(source, PROGRAM_FILE, "exec"), self.scope)  # noqa: S102 - the source was written above
        function: Callable[..., Any] = self.scope.pop("rule")
        return function


def run_and_write(
    seen: dict[Any, SeenCall], look: Any, rule: Callable[..., Any], info: Any, dims: list[Any], *values: Any
) -> Any:
    """What ``rule`` returns for a seen call; the later ones of that look run what is written down."""
    if function_mode_enabled():
        return rule(info, dims, *values)
    given = tuple(dims)  # the rule may write to the list
    script: Any = False
    if not getattr(rule, "__module__", "").startswith("functrans."):
        result = rule(info, dims, *values)
    else:
        with Writer(values) as writer:
            result = rule(info, dims, *values)
        script = writer.compiled(result)
    seen[look] = SeenCall(given, script=script)
    return result
