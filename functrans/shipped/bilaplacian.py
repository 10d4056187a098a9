"""The bilaplacian: the Laplacian of the Laplacian, or an estimate by the fourth derivatives along random lines.

Two nested levels carry one sum each (laplacian.py), which is less work than the D² lines that all fourth derivatives
can be put together from. For an estimate a line is enough: of directions v of independent normal numbers, the mean of
the fourth derivative along v is three times the bilaplacian, since E[vᵢ vⱼ vₖ vₗ] = δᵢⱼδₖₗ + δᵢₖδⱼₗ + δᵢₗδⱼₖ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import check_callable, check_dense
from functrans.api.compiled import TRACED, named_after
from functrans.api.vmap import vmap
from functrans.errors import Call
from functrans.shipped.jet_level import run_jet
from functrans.shipped.laplacian import check_directions, check_samples, laplacian
from functrans.tensors.pytrees import tree_flatten, tree_unflatten

#: 4! / 3: a fourth derivative from its Taylor coefficient, and the mean of such from the bilaplacian.
PER_COEFFICIENT = 8


def bilaplacian(
    f: Callable[..., Any], *, directions: Tensor | None = None, samples: int | None = None
) -> Callable[..., Any]:
    """The bilaplacian Δ²f by the first argument: the Laplacian of the Laplacian, in one forward pass.

    Args:
        f: takes a real floating-point tensor, and maybe further arguments, and returns a tensor or a pytree of tensors.
        directions: a tensor ``[D, *x.shape]``: the operator of ``laplacian(f, directions=...)``, twice, so that it is
            the sum of the fourth derivatives along v, v, w, w for all pairs of directions v and w.
        samples: estimate it by the fourth derivatives along this many random directions of normal numbers. Inside of
            vmap, it asks for its ``randomness``.

    Returns:
        A function of the same arguments, with results of the shapes that ``f`` returns. Python values have None.

    Raises:
        CallTypeError: the first argument is no real floating-point tensor.
        CallValueError: ``directions`` do not fit the argument, or ``samples`` is no positive number.

    Example:
        >>> import torch
        >>> from functrans import bilaplacian
        >>> bilaplacian(lambda x: (x**4).sum())(torch.tensor([1.0, 2.0]))
        tensor(48.)
    """
    check_callable("bilaplacian", f)
    call = Call("bilaplacian", f, {})
    check_samples(call, samples, directions)

    @named_after(f)
    def function(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(bilaplacian, f, {"samples": samples}, (x, *args), kwargs, {"directions": directions})
        check_dense(call, "first argument", x, "a real floating-point tensor", kinds="f")
        if samples is None:
            check_directions(call, directions, x)
            return laplacian(laplacian(f, directions=directions), directions=directions)(x, *args, **kwargs)

        def along(v: Tensor) -> list[Any]:
            value, found = run_jet(call, lambda x: f(x, *args, **kwargs), (x,), [(v, None, None, None)], 4)
            values, spec = tree_flatten(value)
            pairs = zip(values, found, strict=True)
            return tree_unflatten(spec, [fourth(y, None if terms is None else terms[3]) for y, terms in pairs])

        draws = torch.randn(samples, *x.shape, dtype=x.dtype, device=x.device)
        leaves, spec = tree_flatten(vmap(along, randomness="same")(draws))
        return tree_unflatten(spec, [c if c is None else mean(c) for c in leaves])

    return function


def fourth(value: Any, coefficient: Tensor | None) -> Tensor | None:
    """The coefficient of a leaf of what ``f`` returns: zeros where it has none, None where the leaf is no tensor."""
    return torch.zeros_like(value) if coefficient is None and isinstance(value, Tensor) else coefficient


def mean(coefficients: Tensor) -> Tensor:
    smooth = coefficients.is_floating_point() or coefficients.is_complex()
    return PER_COEFFICIENT * coefficients.mean(0) if smooth else coefficients[0]
