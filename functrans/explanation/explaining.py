"""``explain``: one run of a function, observed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable, check_flag
from functrans.api.compiled import UNTRACED
from functrans.core.interpreter import Interpreter
from functrans.errors import CallTypeError
from functrans.errors.wording import callable_name, what
from functrans.explanation.explanation import Explanation
from functrans.explanation.recording import Observer, observing


def explain(func: Callable[..., Any], *args: Any, example: int = 0, catch: bool = False, **kwargs: Any) -> Explanation:
    """Run ``func(*args, **kwargs)`` once, and return what happened, as a tree.

    For every operator: the line that called it, the levels that were asked about it, what each did (a rule with file
    and line, a program, an entry of the derivative table, taken apart, borrowed, looped), and what ran at the base. For
    every walk back along a tape: its records, and the operators that made them. With it go shapes, dtypes, batch
    dimensions, tape indices and tangents as the levels see them, the numbers of one example, time, and memory for
    results.

    The results are those of the plain call, to the bit. What other threads do, and what compiled code does inside, is
    not seen.

    Args:
        func: any function; it may apply transforms, or be what a transform returned.
        *args: its arguments.
        example: the example of every vmap whose numbers are kept; of a smaller batch the last one.
        catch: whether an exception of ``func`` ends the explanation (its ``error``), instead of being raised.
        **kwargs: its keyword arguments.

    Returns:
        An Explanation: printed, the tree. ``.result`` is what ``func`` returned, ``.save("x.html")`` writes a page for
        the browser, ``.find(...)`` looks for events, ``.to_json()`` is for programs.

    Raises:
        CallTypeError: ``func`` is no function, or ``example`` no int from 0 on.

    Example:
        >>> import torch
        >>> from functrans import explain, vmap
        >>> rows = torch.ones(2, 3)
        >>> print(explain(vmap(torch.logsumexp, in_dims=(0, None)), rows, 0))  # doctest: +SKIP
        explain(logsumexp)
        └ vmap(logsumexp) is level 1, batch_size=2, randomness='error'
          └ level 1 vmap  aten.logsumexp.default(float32[3], [0]) -> float32[]
            · rule, functrans/interpreters/vmap/rules/reductions.py:140
            · self: bdim=0
            └ base  aten.logsumexp.default(float32[2, 3], [1]) -> float32[2]
        >>> explain(vmap(torch.logsumexp, in_dims=(0, None)), rows, 0).base_operators()
        ['aten.logsumexp.default']
    """
    if is_dynamo_compiling():
        options = {"example": example, "catch": catch, **kwargs}
        return UNTRACED("explain", "It returns what ran, as an object.", explain, (func, *args), options)
    check_callable("explain", func)
    call = f"explain({callable_name(func)}, ...)"
    if not isinstance(example, int) or isinstance(example, bool) or example < 0:
        raise CallTypeError(call, f"{what(example)} as example", "an int from 0 on")
    check_flag(call, "catch", catch)
    result, error, name = None, None, callable_name(func)
    observer = Observer(example)
    try:
        with observing(observer):
            for x in (func, *args):  # a pullback was recorded by an interpreter that has ended
                recorder = getattr(x, "interpreter", None)
                if isinstance(recorder, Interpreter) and not recorder.alive:
                    observer.watch(recorder)
            result = call_function(call, func, args, kwargs)
    except Exception as caught:
        if not catch:
            raise
        error = caught
    return Explanation(name, result, error, example, observer.events, observer.levels)
