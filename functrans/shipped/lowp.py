"""``lowp``: a function as numbers of fewer bits would compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import check_callable
from functrans.api.compiled import TRACED, named_after
from functrans.core.dispatch import map_tensors
from functrans.errors import CallTypeError, CallValueError
from functrans.errors.wording import what
from functrans.extension.levels import PassThrough
from functrans.extension.transforming import transform
from functrans.pytorch.torch_private import OpOverload

#: The formats that results are rounded to.
DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def lowp(func: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """``func``, with every result rounded to the numbers of ``dtype``.

    Arguments and captured tensors are rounded where an operator takes them, results where it returns them; composite
    operators are taken apart, so that the results of their pieces are. Tensors keep their dtypes, and each operator
    computes in these, as hardware does that adds up in a wider format. What is wider than ``dtype`` is rounded, as
    ``x.to(dtype).to(x.dtype)`` does: to nearest, and what is too great to infinity. (``float8_e4m3fn`` has none: there
    it becomes NaN up to PyTorch 2.12, and the greatest number since.)

    Derivatives inside (``lowp(grad(f), dtype)``) are rounded like all else. Derivatives around (``grad(lowp(f,
    dtype))``) take rounding for the identity, and round cotangents and tangents where they pass it.

    Args:
        func: any function; it may apply transforms and be transformed.
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns:
        A function of the same arguments. Its results have the dtypes that those of ``func`` have.

    Raises:
        CallValueError: ``dtype`` is none of these.
        CustomFunctionError: an ``autograd.Function`` was applied inside, and is differentiated outside.

    Example:
        >>> import torch
        >>> from functrans import grad, lowp
        >>> f = lambda x: x * x + 1
        >>> x = torch.tensor(1.1)
        >>> f(x), lowp(f, torch.bfloat16)(x), lowp(f, torch.float8_e4m3fn)(x)
        (tensor(2.2100), tensor(2.2188), tensor(2.2500))
        >>> grad(lowp(f, torch.float8_e4m3fn))(x)
        tensor(2.2500)
    """
    check_callable("lowp", func)
    call = "lowp(func, dtype)"
    expected = f"one of {', '.join(map(str, DTYPES))}"
    if not isinstance(dtype, torch.dtype):
        raise CallTypeError(call, f"{what(dtype)} as dtype", expected)
    if dtype not in DTYPES:
        raise CallValueError(call, f"{dtype} as dtype", expected)

    @named_after(func)
    def rounded(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(lowp, func, {"dtype": dtype}, args, kwargs, None)
        level = Rounding(func)
        level.dtype = dtype
        return transform(level, func)(*args, **kwargs)

    return rounded


class Rounding(PassThrough):
    """Rounds every result."""

    kind = "lowp"
    pieces = True
    dtype: torch.dtype

    def given(self, op: OpOverload, value: Tensor, own: bool) -> Tensor:
        return self.round(value)  # of this level's too: an argument, or what a primitive returned

    def after(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return map_tensors(self.round, out)

    def leave(self, leaf: Any) -> Any:
        leaf = super().leave(leaf)
        return self.round(leaf) if isinstance(leaf, Tensor) else leaf

    def round(self, x: Tensor) -> Tensor:
        """``x``, rounded where its dtype is wider; runs one level down."""
        if x.dtype.is_complex:
            return torch.view_as_complex(self.round(torch.view_as_real(x.resolve_conj())))
        if not x.dtype.is_floating_point or x.dtype.itemsize <= self.dtype.itemsize:
            return x
        return x.to(self.dtype).to(x.dtype)
