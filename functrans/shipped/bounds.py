"""Bounds of everything that a function can return: interval arithmetic as a transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable
from functrans.api.compiled import TRACED, named_after
from functrans.api.structures import difference, path_of
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.errors import Call, CallTypeError, CallValueError
from functrans.errors.wording import shown, what
from functrans.pytorch.control_flow import TRACING_MODES, FakeTensor
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import mode_of_kind
from functrans.shipped.interval_rules import IntervalLevel
from functrans.shipped.relaxations import RelaxationLevel
from functrans.tensors.pytrees import leaves_like, tree_flatten, tree_unflatten

LEVELS: dict[Any, type[IntervalLevel]] = {"intervals": IntervalLevel, "linear": RelaxationLevel}


def bounds(func: Callable[..., Any], *, method: str = "intervals") -> Callable[..., Any]:
    """Bounds of ``func(x)`` for all ``x`` with ``low <= x <= high``, element by element.

    Every operator is computed on intervals, so that the bounds hold for all arguments in between, and are seldom
    reached: where a number is used twice, each use is taken for one of its own. They are rounded as the operators are,
    not outward: an end may be off by the rounding error of computing it. NaN says that there is no bound (an infinite
    interval went through a product). Bounds can be differentiated and batched, and those of derivatives taken, as in
    ``bounds(grad(f))``.

    Args:
        func: takes one argument, a pytree of real floating-point tensors, and returns a pytree of tensors.
        method: ``"intervals"``, or ``"linear"``: intervals that are made tighter by linear relaxations on the way back
            to the arguments (CROWN, Zhang et al., arXiv:1811.00866). These bounds are nowhere wider, those of an affine
            function are reached, and those of deep networks are much tighter; they take the time and memory of a
            pullback for each element that a nonlinear operator is applied to.

    Returns:
        A function ``(low, high) -> (low, high)``: of two pytrees like the argument, two like the output.

    Raises:
        CallTypeError: ``low`` and ``high`` do not have the same structure, shapes and dtypes.
        CallValueError: ``low`` is greater than ``high`` somewhere. (In tensors of an outer transform, whose numbers
            cannot be asked for, the bounds are NaN there; in those of an outer ``bounds`` it is not seen.)
        CallValueError: ``method`` is none of the two.
        MissingRuleError: for an operator no bounds are known.

    Example:
        >>> import torch
        >>> from functrans import bounds
        >>> bounds(lambda x: (x.sin() + x**2).sum())(torch.zeros(2), torch.ones(2))
        (tensor(0.), tensor(3.6829))
        >>> bounds(lambda x: x.cumsum(0).diff(), method="linear")(torch.zeros(2), torch.ones(2))
        (tensor([0.]), tensor([1.]))
    """
    check_callable("bounds", func)
    if type(method) is not str or method not in LEVELS:
        raise CallValueError("bounds(f)", f"method={shown(method)}", f"one of {', '.join(map(repr, LEVELS))}")

    @named_after(func)
    def bounded(low: Any, high: Any) -> tuple[Any, Any]:
        if is_dynamo_compiling():
            return TRACED(bounds, func, {"method": method}, (high,), {}, (low,))
        call = Call("bounds", func, "")
        ends, spec = checked_ends(call, low, high)
        level = LEVELS[method](func)

        def body() -> tuple[Any, Any]:
            with lowered(level):
                entered = [level.input(*ordered(a, b)) for a, b in ends]
            out, out_spec = tree_flatten(call_function(call, func, (tree_unflatten(spec, entered),), {}))
            for place, leaf in enumerate(out):
                if not isinstance(leaf, Tensor):
                    path = path_of("output", tree_unflatten(out_spec, out), place)
                    raise CallTypeError(call, f"{what(leaf)} as {path}", "only tensors", "Return the tensor itself.")
            with lowered(level):
                owned = [level.output(leaf) for leaf in out]
            return tree_unflatten(out_spec, [a for a, _ in owned]), tree_unflatten(out_spec, [b for _, b in owned])

        return run_transformed(level, body)

    return bounded


def checked_ends(call: Call, low: Any, high: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    lows, spec = tree_flatten(low)
    highs, high_spec = leaves_like(high, spec)
    if spec != high_spec:
        raise CallTypeError(call, *difference("high", high, "low", low))
    for place, (a, b) in enumerate(zip(lows, highs, strict=True)):
        for name, tree, x in (("low", low, a), ("high", high, b)):
            real = isinstance(x, Tensor) and x.dtype.is_floating_point
            if not real or x.is_nested or x.layout is not torch.strided:
                got = f"{what(x)} as {path_of(name, tree, place)}"
                cure = "Bind what has no bounds: lambda x: f(x, value)."
                raise CallTypeError(call, got, "a dense real floating-point tensor", cure)
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            got = f"{what(b)} on {b.device} as {path_of('high', high, place)}"
            raise CallTypeError(call, got, f"one like {path_of('low', low, place)}, {what(a)} on {a.device}")
        if has_numbers(a) and has_numbers(b) and bool((a > b).any()):
            got = f"{path_of('low', low, place)} greater than {path_of('high', high, place)}"
            raise CallValueError(call, got, "low <= high", "Are they in this order?")
    return list(zip(lows, highs, strict=True)), spec


def ordered(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends; NaN where they are the wrong way round. (Between the bounds of an outer level nobody can tell.)"""
    levels = levels_of(low) + levels_of(high)
    known = has_numbers(low) and has_numbers(high)  # and have been looked at
    if known or any(isinstance(level, IntervalLevel) for level in levels):
        return low, high
    wrong = low > high
    return torch.where(wrong, torch.nan, low), torch.where(wrong, torch.nan, high)


def has_numbers(x: Tensor) -> bool:
    """Whether they can be asked for: not of a wrapper, nor of what a program is traced with."""
    traced = any(map(mode_of_kind, TRACING_MODES)) or isinstance(x, FakeTensor)
    return not (traced or type(x) is WrapperTensor or x.is_meta)


def levels_of(x: Tensor) -> list[Interpreter]:
    found = []
    while type(x) is WrapperTensor:
        found.append(x.interpreter)
        x = x.value
    return found
