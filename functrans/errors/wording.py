"""How errors show values, functions and places in pytrees: in Python notation, and short."""

from __future__ import annotations

import functools
import inspect
import reprlib
import types
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor

OpOverloadPacket = type(torch.ops.aten.sin)
HigherOrderOperator: Any = type(torch.ops.higher_order.cond).__base__

#: where the rules of an operator that takes functions belong: it has no schema, and other tables go by that
FUNCTIONS_TAKEN = (
    "It has no schema, by whose arguments this table goes. What it is for all transforms is defined in "
    "functrans.extend.DEFINITIONS; a functrans.extend.Primitive there has rules of its own for grad, jvp and vmap."
)


def what(x: Any) -> str:
    """A value that came, with article: ``the float 3.0``, ``a tensor of shape (3,)``, ``a dict with keys 'a', 'b'``."""
    kind = type(x)
    if x is None:
        return "None"
    if isinstance(x, Tensor):
        return _tensor(x)
    if isinstance(x, type):
        return f"the class {x.__name__}"
    if isinstance(x, types.ModuleType):
        return f"the module {x.__name__}"
    if isinstance(x, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return f"the function {callable_name(x)}"
    if isinstance(x, bool | int | float | complex | str | bytes):
        return f"the {kind.__name__} {shown(x)}"
    if kind in (tuple, list, dict, set):
        if not x:
            return f"an empty {kind.__name__}"
        return f"a dict with {_keys(x)}" if kind is dict else f"a {kind.__name__} of {len(x)}"
    name = f"numpy.{kind.__name__}" if kind.__module__ == "numpy" else kind.__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _keys(x: dict[Any, Any]) -> str:
    names = [shown(k) for k in x]
    return f"key{'s' * (len(x) != 1)} {', '.join(names[:5])}{', ...' * (len(names) > 5)}"


def _tensor(x: Tensor) -> str:
    if x.is_nested:
        return "a nested tensor"
    dtype = "" if x.dtype is torch.float32 else f" and dtype {x.dtype}"
    layout = "" if x.layout is torch.strided else f"{x.layout} "
    return f"a {layout}tensor of shape {tuple(x.shape)}{dtype}"


class _Short(reprlib.Repr):
    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            return "tensor(...)"
        if callable(x):
            return callable_name(x)
        text = super().repr1(x, level)
        return f"<{type(x).__name__}>" if " at 0x" in text else text


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(x: Any) -> str:
    """A value as it stands in a call, shortened; safe for values whose own repr fails."""
    return _SHORT.repr(x)


def callable_name(func: Any) -> str:
    """A function's name for messages."""
    if isinstance(func, functools.partial):
        return f"partial({callable_name(func.func)}, ...)"
    owner = getattr(func, "__self__", None) if inspect.ismethod(func) else None
    if owner is not None:
        return f"{owner.__name__ if isinstance(owner, type) else type(owner).__name__}.{func.__name__}"
    name = getattr(func, "__name__", None)
    return name if isinstance(name, str) else type(func).__name__


def what_was_named(op: Any) -> str:
    """What was given for an operator overload."""
    if isinstance(op, OpOverloadPacket):
        return f"the packet torch.ops.{op}, which stands for all its overloads"
    if isinstance(op, HigherOrderOperator):
        return f"torch.ops.higher_order.{op}, which takes functions"
    return f"the function {op.__qualname__}" if inspect.isfunction(op) else what(op)


def overloads_meant(op: Any, title: str, overload: Any) -> str:
    """What to write instead of ``op``, which may be a custom operator with an ``overload``."""
    if isinstance(op, OpOverloadPacket):
        return f"Name one of its overloads: {overload_names(str(op), op)}."
    if isinstance(op, HigherOrderOperator):
        return FUNCTIONS_TAKEN
    if overload is not None:
        return f"Write torch.ops.{overload} for this custom operator."
    if isinstance(op, str):
        name = op.removeprefix("torch.ops.").replace("::", ".")
        return f"Write torch.ops.{name if name.count('.') > 1 else name + '.default'}, without quotes."
    name = getattr(op, "__name__", "")
    if isinstance(op, BuiltinFunctionType | MethodDescriptorType) and hasattr(torch.ops.aten, name):
        return f"Its operator is one of {overload_names(f'aten.{name}', getattr(torch.ops.aten, name))}."
    if callable(op) and title == "derivative table":
        return (
            "The operator comes first: derivative(torch.ops.aten.sin.default, "
            "self=lambda grad, self: grad * self.cos()). "
            "It is no decorator."
        )
    if callable(op):
        return (
            "A decorator takes the operator in parentheses, and the rule stands below it: "
            "@batching_rule(torch.ops.aten.sin.default)."
        )
    return "Name one of its overloads."


def overload_names(name: str, packet: Any) -> str:
    return ", ".join(f"torch.ops.{name}.{overload}" for overload in packet.overloads())
