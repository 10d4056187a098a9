"""The public transform that makes a program pure: functionalize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import Inputs
from functrans.api.checks import call_function, check_callable
from functrans.api.compiled import TRACED, manner, named_after
from functrans.boundary.made_at import note_results
from functrans.core.stack import run_transformed
from functrans.errors import Call, CallValueError
from functrans.errors.wording import shown
from functrans.interpreters.functionalize import FunctionalizeInterpreter
from functrans.pytorch.thread_state import STATE
from functrans.tensors.pytrees import tree_map

REMOVE = ("mutations", "mutations_and_views")


@manner(once=True)
def functionalize(func: Callable[..., Any], *, remove: str = "mutations") -> Callable[..., Any]:
    """``func`` with the same results, but without in-place operators; for tracers, modes and backends below it.

    Writes to tensors that ``func`` makes become operators that return the new values. A write to an argument reaches
    the caller's tensor by one ``copy_`` at the end. What is not seen from here stays as it is: operators on captured
    tensors alone, and the methods of an ``autograd.Function``, which goes down as one operator.

    Args:
        func: takes pytrees of tensors and anything else, and returns the same.
        remove: ``"mutations"``; or ``"mutations_and_views"``, which has ``view_copy``, ``select_copy`` and so on in
            the place of views, too.

    Returns:
        A function of the same arguments and results.

    Raises:
        CallValueError: ``remove`` is neither of both.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from functrans import functionalize
        >>> def f(x):
        ...     y = x + 1
        ...     y.view(-1).mul_(2)
        ...     return y
        >>> graph = make_fx(functionalize(f))(torch.ones(2)).graph
        >>> [str(node.target) for node in graph.nodes if node.op == "call_function"]
        ['aten.add.Tensor', 'aten.view.default', 'aten.mul.Tensor', 'aten.view.default']
    """
    check_callable("functionalize", func)
    call = Call("functionalize", func, {"remove": remove})
    if not isinstance(remove, str) or remove not in REMOVE:
        raise CallValueError(call, f"remove={shown(remove)}", " or ".join(map(repr, REMOVE)))

    @named_after(func)
    def functionalized(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(functionalize, func, {"remove": remove}, args, kwargs, None)
        interpreter = FunctionalizeInterpreter(func, copies=remove == "mutations_and_views")
        inputs = Inputs(interpreter, call, (), args, kwargs, interpreter.constant)
        result = run_transformed(
            interpreter, lambda: tree_map(inputs.leave, call_function(call, func, inputs.args, inputs.kwargs))
        )
        inputs.write_back()
        if STATE.top is not None:
            note_results(1, result)
        return result

    return functionalized
