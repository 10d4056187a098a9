"""Taylor mode: all derivatives of a function along a curve, up to any order, in one pass.

A wrapper carries the Taylor coefficients x₁, x₂, ... of its value along the curve, which are the derivatives divided by
n!, so that products have no factors. What an operator makes of them follows from the derivative table
(functrans/derivatives): pointwise code becomes a program that computes them (jet_programs.py), what is not pointwise is
in jet_by_table.py, and jet_rules.py has rules by hand. The level itself is in jet_level.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import check_callable, check_dense
from functrans.api.compiled import TRACED, manner
from functrans.errors import Call, CallTypeError, CallValueError
from functrans.errors.wording import shown, what
from functrans.shipped.jet_level import JetInterpreter, run_jet
from functrans.tensors.pytrees import tree_flatten, tree_unflatten

__all__ = ["JetInterpreter", "jet"]


@manner(at_once=True)
def jet(f: Callable[..., Any], primals: Sequence[Tensor], series: Sequence[Sequence[Tensor | None]]) -> tuple[Any, Any]:
    """The derivatives of ``f`` along a curve, up to any order.

    With curves x(t) whose values at t = 0 are ``primals`` and whose derivatives there are ``series``, it returns the
    value and the derivatives of f(x(t)) at t = 0. (Derivatives, not Taylor coefficients: the n-th is not divided by
    n!.)

    Args:
        f: takes tensors and returns a pytree.
        primals: the tensors that ``f`` takes, floating-point or complex.
        series: for each of them a list of its first, second, ... derivative, tensors of its shape and dtype; all lists
            of one length. None is a derivative of zeros, with which nothing is computed: the straight line through x
            along v is ``[v, None, None, ...]``.

    Returns:
        ``(value, series)``: in the place of each tensor of the value, ``series`` has the list of its derivatives, all
        of them tensors. In the place of what has none (whole numbers, truth values, Python values) it has None.

    Raises:
        CallTypeError: a primal or a term is no tensor, or has no derivatives.
        CallValueError: the lists differ in length, are empty, or a term has another shape or dtype than its primal.

    Example:
        >>> import torch
        >>> from functrans import jet
        >>> x, one = torch.tensor(0.0), torch.tensor(1.0)
        >>> jet(torch.exp, (x,), ([one, None, None],))
        (tensor(1.), [tensor(1.), tensor(1.), tensor(1.)])
    """
    if is_dynamo_compiling():
        return TRACED(jet, f, {}, tuple(primals), {}, series)
    check_callable("jet", f)
    call = Call("jet", f, {})
    order = check_series(call, primals, series)
    unit = unit_of(order)
    factors = [Fraction(unit**k, math.factorial(k)) for k in range(1, order + 1)]
    terms = [tuple([times(t, f) for t, f in zip(ts, factors, strict=True)]) for ts in series]
    value, found = run_jet(call, f, primals, terms, order)
    values, spec = tree_flatten(value)
    derivatives = [
        ts and [torch.zeros_like(v) if t is None else times(t, 1 / f) for t, f in zip(ts, factors, strict=True)]
        for v, ts in zip(values, found, strict=True)
    ]
    return value, tree_unflatten(spec, derivatives)


def unit_of(order: int) -> int:
    """The unit of t: 1, and for high orders a power of two that keeps the coefficients in the range of numbers.

    The n-th derivative is divided by n! / unitⁿ, which for the last is near to 1.
    """
    return 1 if order <= 16 else 2 ** round(math.log2(math.factorial(order)) / order)


def times(t: Tensor | None, factor: Fraction) -> Tensor | None:
    return t if t is None or factor == 1 else t * float(factor)


def check_series(call: Call, primals: Any, series: Any) -> int:
    """The order; everything fits."""
    for name, given in (("primals", primals), ("series", series)):
        if not isinstance(given, tuple | list) or not given:
            raise CallTypeError(call, f"{what(given)} as {name}", "a tuple with an entry for each argument")
    if len(primals) != len(series):
        raise CallValueError(call, f"{len(series)} lists in series for {len(primals)} primals", "one for each")
    for i, (x, terms) in enumerate(zip(primals, series, strict=True)):
        check_dense(call, f"primals[{i}]", x, "a floating-point or complex tensor", kinds="fc")
        if not isinstance(terms, tuple | list) or not terms or len(terms) != len(series[0]):
            got = f"{len(terms)} terms" if isinstance(terms, tuple | list) else what(terms)
            raise CallValueError(call, f"{got} as series[{i}]", "a list of terms, as many for each primal")
        for k, t in enumerate(terms):
            if t is None:
                continue
            check_dense(call, f"series[{i}][{k}]", t)
            if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
                raise CallValueError(call, f"{shown(t)} as series[{i}][{k}]", f"one like its primal, {shown(x)}")
    return len(series[0])
