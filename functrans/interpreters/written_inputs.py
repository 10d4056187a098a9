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

from functrans.errors import CustomFunctionError
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


def check_marked(cls: type[Function], marking: Marking, given: Sequence[Any], out: Any) -> dict[int, int]:
    """For each input that was marked as written, the output that it became."""
    found = {}
    for x in marking.dirty:
        i, j = place_of(x, given), place_of(x, as_tuple(out))
        if i is None or j is None:
            what = "is no input of the Function" if i is None else "it does not return"
            raise CustomFunctionError(cls, f"marked a tensor as written that {what}", "Mark and return inputs.")
        found[i] = j
    return found


def on_copies(cls: type[Function], written: dict[int, int]) -> type[Function]:
    """``cls`` as a Function that writes to copies; a call notes in ``written`` which output each input became."""

    def run(*args: Any) -> Any:
        given = copies(args)
        out = cls.forward(*given)
        places = {i: place_of(x, as_tuple(out)) for i, x in enumerate(given) if isinstance(x, Tensor)}
        written.update((i, j) for i, j in places.items() if j is not None)
        return out

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outs, marking = as_tuple(output), Marking(ctx)
        given = [outs[written[i]] if i in written else x for i, x in enumerate(inputs)]
        cls.setup_context(marking, tuple(given), output)
        marked = check_marked(cls, marking, given, output)
        for i in set(written) - set(marked):  # returned as it was
            del written[i]

    def run_both(ctx: Any, *args: Any) -> Any:
        given, marking = copies(args), Marking(ctx)
        out = cls.forward(marking, *given)
        written.update(check_marked(cls, marking, given, out))
        return out

    class OnCopies(Function):
        generate_vmap_rule = cls.generate_vmap_rule

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

    OnCopies.forward = staticmethod(run if is_setup_style(cls) else run_both)  # type: ignore[method-assign]
    if is_setup_style(cls):
        OnCopies.setup_context = staticmethod(set_up)  # type: ignore[method-assign]
    for name in ("jvp", "vmap"):
        if not overrides(cls, name):
            setattr(OnCopies, name, getattr(Function, name))
    OnCopies.__name__ = cls.__name__
    return OnCopies
