"""An ``autograd.Function`` that writes to its inputs, as one that does not.

NOTE [Functions that write]
What every level does with a Function it does with values, which no level may see written. So a Function that calls
``ctx.mark_dirty`` goes down the stack on copies of its inputs; the door then writes for the caller what was marked, as
it does for an in-place operator, and returns the caller's tensors. That it calls it is looked up in the code of its
methods, since the copies have to be made before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.autograd.function import Function

from functrans.core.errors import CustomFunctionError
from functrans.interpreters.function_context import as_tuple, is_setup_style, overrides

_known: WeakKeyDictionary[type[Function], bool] = WeakKeyDictionary()


def writes_inputs(cls: type[Function]) -> bool:
    """Whether a method of ``cls`` calls ``ctx.mark_dirty``."""
    if cls not in _known:
        codes = [getattr(inspect.unwrap(method), "__code__", None) for method in (cls.forward, cls.setup_context)]
        _known[cls] = any(code is not None and "mark_dirty" in code.co_names for code in codes)
    return _known[cls]


class Marking:
    """A context that keeps to itself what is marked as written."""

    def __init__(self, ctx: Any) -> None:
        vars(self).update(ctx=ctx, dirty=())

    def mark_dirty(self, *tensors: Tensor) -> None:
        vars(self)["dirty"] = tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)


def copies(args: Sequence[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def place_of(x: Any, among: Sequence[Any]) -> int | None:
    return next((i for i, other in enumerate(among) if other is x), None)


def on_copies(cls: type[Function], written: dict[int, int]) -> type[Function]:
    """``cls`` as a Function that writes to copies; a call notes in ``written`` which output each input became."""

    class OnCopies(Function):
        generate_vmap_rule = cls.generate_vmap_rule

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            given, marking = copies(args), Marking(ctx)
            if is_setup_style(cls):
                out = cls.forward(*given)
                cls.setup_context(marking, tuple(given), out)
            else:
                out = cls.forward(marking, *given)
            for x in marking.dirty:
                i, j = place_of(x, given), place_of(x, as_tuple(out))
                if i is None or j is None:
                    what = "is no input of the Function" if i is None else "it does not return"
                    raise CustomFunctionError(cls, f"marked a tensor as written that {what}", "Mark and return inputs.")
                written[i] = j
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return cls.backward(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return cls.jvp(ctx, *copies(tangents))  # which it writes, too

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            given = copies(args)
            out, out_dims = cls.vmap(info, in_dims, *given)
            for j, x in enumerate(as_tuple(out)):
                i = place_of(x, given) if isinstance(x, Tensor) else None
                if i is not None:
                    written[i] = j
            return out, out_dims

    for name in ("jvp", "vmap"):
        if not overrides(cls, name):
            setattr(OnCopies, name, getattr(Function, name))
    OnCopies.__name__ = cls.__name__
    return OnCopies
