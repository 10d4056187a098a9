"""Operators on lists of tensors, as optimizers have them: each is an operator on one tensor, for one after the other.

So vmap has no loop over the examples, and forward mode none of PyTorch's own formulas: by these every element of
``_foreach_maximum`` is a tie, and the tangent of ``_foreach_norm`` has a wrong shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS

LISTS = (list, tuple)


def clamped(clamp: Callable[..., Tensor], choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: choose(x, y) if isinstance(y, Tensor) else clamp(x, y)


def scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``addcmul`` or ``addcdiv``, whose factor may be a tensor here."""

    def run(x: Tensor, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
        if isinstance(value, Tensor):
            return x + function(torch.zeros_like(x), a, b) * value
        return function(x, a, b, value=value)

    return run


UNARY = (
    "abs", "acos", "asin", "atan", "ceil", "clone", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor", "frac",
    "lgamma", "log", "log10", "log1p", "log2", "max", "neg", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin",
    "sinh", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
#: By the name after ``_foreach_``: what is done with one tensor.
OF_ONE: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in (*UNARY, "add", "sub", "mul", "div", "pow", "lerp", "mm")},
    "maximum": clamped(torch.clamp_min, torch.maximum),
    "minimum": clamped(torch.clamp_max, torch.minimum),
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "addcmul": scaled(torch.addcmul),
    "addcdiv": scaled(torch.addcdiv),
    "norm": lambda x, ord=2, dtype=None: torch.linalg.vector_norm(x, ord, dtype=dtype),
    "powsum": lambda x, ord=2, dtype=None: (x.abs() ** ord).sum(dtype=dtype),
}


def one_by_one(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    def of_lists(*args: Any, **kwargs: Any) -> list[Tensor]:
        count = len(next(a for a in args if type(a) in LISTS))
        each: list[Sequence[Any]] = [a if type(a) in LISTS else [a] * count for a in args]
        return [function(*given, **kwargs) for given in zip(*each, strict=True)]

    return of_lists


def with_scalars(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """The same with a last argument that is a tensor, of a number for each."""
    run = one_by_one(function)
    return lambda self, a, b, scalars: run(self, a, b, list(scalars))


for _name, _function in OF_ONE.items():
    _packet = getattr(torch.ops.aten, f"_foreach_{_name}", None)
    for _overload in _packet.overloads() if _packet is not None else ():
        if "out" not in _overload:
            _made = with_scalars if _overload == "Tensor" and _name in ("addcmul", "addcdiv") else one_by_one
            DECOMPOSITIONS.add(getattr(_packet, _overload), _made(_function))
