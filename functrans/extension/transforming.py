"""A new transform as a function of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable
from functrans.api.compiled import UNTRACED, named_after
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.errors import CallError, CallTypeError
from functrans.errors.wording import what
from functrans.extension.carried import is_carried
from functrans.extension.rule_results import shows_own
from functrans.extension.table_interpreter import TableInterpreter
from functrans.functionalization.views import contents_of
from functrans.pytorch.thread_state import lowered
from functrans.tensors.pytrees import tree_flatten, tree_map, tree_unflatten


class Transforming(Protocol):
    """An interpreter that says what enters and what leaves, as TableInterpreter, PassThrough and Handler do."""

    def enter(self, leaf: Any) -> Any: ...
    def leave(self, leaf: Any) -> Any: ...


def transform(
    interpreter: Transforming | Callable[[Callable[..., Any]], Transforming], func: Callable[..., Any]
) -> Callable[..., Any]:
    """``func`` under a transform of one's own: arguments enter, results leave, as pytrees and by keyword.

    Args:
        interpreter: a subclass of ``TableInterpreter``, ``PassThrough`` or ``Handler``, or a function that makes an
            interpreter of ``func``: a new one for every call. An interpreter itself does too, for one call, since it
            runs once.
        func: the function to transform.

    Returns:
        A function of the same arguments. Each of their leaves goes through ``interpreter.enter``, and each of the
        result's through ``interpreter.leave``: unless a subclass says otherwise, a ``Carried(value, name=...)`` among
        them is a value with a payload, and everything else a constant.

    Raises:
        CallTypeError: ``interpreter`` is none of these.

    Example:
        >>> import torch
        >>> from functrans.extend import Carried, RuleTable, TableInterpreter, transform
        >>> class Dual(TableInterpreter):
        ...     kind, payload, rules = "dual", ("slope",), RuleTable("dual numbers", default="jvp")
        >>> f = transform(Dual, lambda x, scale: {"square": scale * x * x, "scale": scale})
        >>> f(Carried(torch.tensor(3.0), slope=torch.tensor(1.0)), scale=torch.tensor(2.0))
        {'square': Carried(18.0, slope=12.0), 'scale': tensor(2.)}
    """
    call = "transform(interpreter, func)"
    check_callable("transform", func)
    if not is_transforming(interpreter) and not callable(interpreter):
        expected = "a subclass of TableInterpreter, PassThrough or Handler, or what makes one"
        raise CallTypeError(call, f"{what(interpreter)} as interpreter", expected)

    @named_after(func)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            why = "A transform of one's own may note, count or print what it sees, which a graph would do but once."
            return UNTRACED("transform", why, transform(interpreter, func), args, kwargs)
        make: Any = interpreter
        running: Any = make if isinstance(make, Interpreter) else make(func)
        if not is_transforming(running):
            made = "an interpreter" if running is interpreter else f"{what(running)} made by {what(interpreter)}"
            raise CallTypeError(call, made, "one with the methods enter and leave", "TableInterpreter has them.")

        #: wrappers of arguments, with the argument, and whether the wrapper is it to look at
        entered: list[tuple[WrapperTensor, Any, bool]] = []

        def enter(leaf: Any) -> Any:
            wrapper = running.enter(leaf)
            if running.owns(wrapper):
                entered.append((wrapper, leaf, running.is_constant(wrapper) or not shows_own(running)))
            return wrapper

        def body() -> Any:
            with lowered(running):
                whole = is_carried if isinstance(running, TableInterpreter) else None
                leaves, spec = tree_flatten((args, kwargs), whole)
                given = tree_unflatten(spec, [enter(leaf) for leaf in leaves])
            out = call_function(running.name, func, *given)
            with lowered(running):
                return tree_map(running.leave, out)

        out = run_transformed(running, body)
        for wrapper, leaf, alike in entered:
            if wrapper.version:
                write_back(call, running, contents_of(wrapper), leaf, alike)
        return out

    return transformed


def write_back(call: str, interpreter: Any, wrapper: WrapperTensor, origin: Any, alike: bool) -> None:
    """Write an argument that was written inside for the caller, as a call without the transform would have."""
    if not isinstance(origin, Tensor) or not interpreter.is_constant(wrapper) or not alike:
        which = "with what carries a payload of" if alike else "that is read by the payload of"
        got = f"a write to {what(origin)}, an argument, {which} {interpreter.name}"
        raise CallError(call, got, "a write to what the function makes", "Clone it first, and return the clone.")
    origin.copy_(wrapper.value)


def is_transforming(x: Any) -> bool:
    return isinstance(x, Interpreter) and hasattr(x, "enter") and hasattr(x, "leave")
