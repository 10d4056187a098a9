"""The Laplacian in one forward pass.

A wrapper carries the derivatives of its value along all directions, stacked, and the sum of its second derivatives
along them. That sum is pushed forward as one tensor: where a function bends, the squares of the first derivatives are
summed before anything is multiplied by its second derivative. (Li et al., A computational framework for neural
network-based variational Monte Carlo with Forward Laplacian, Nature Machine Intelligence, 2024; Dangel et al.,
Collapsing Taylor Mode Automatic Differentiation, arXiv:2505.13644.)

    y = f(x):   y_d = f'(x)·x_d      Σ y_dd = f'(x)·Σ x_dd + Σ f''(x)[x_d, x_d]

The level is in laplacian_level.py; pointwise code becomes programs (laplacian_programs.py), what is not pointwise is in
laplacian_by_table.py, and laplacian_rules.py has rules by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable, check_dense, check_flag
from functrans.api.compiled import TRACED, named_after
from functrans.core.stack import run_transformed
from functrans.errors import Call, CallValueError
from functrans.errors.wording import shown, what
from functrans.pytorch.thread_state import lowered
from functrans.shipped.laplacian_level import LaplacianInterpreter
from functrans.tensors.pytrees import tree_flatten, tree_unflatten

__all__ = ["LaplacianInterpreter", "check_directions", "check_samples", "laplacian"]


def laplacian(
    f: Callable[..., Any],
    *,
    with_value: bool = False,
    directions: Tensor | None = None,
    samples: int | None = None,
) -> Callable[..., Any]:
    """The Laplacian of ``f``: the trace of its Hessian by the first argument, in one forward pass.

    Args:
        f: takes a real floating-point tensor, and maybe further arguments, and returns a tensor or a pytree of tensors.
        with_value: return ``(value, gradient, laplacian)``, all of the same pass.
        directions: a tensor ``[D, *x.shape]``: the sum of the second derivatives along these D directions v, that is
            Σ vᵀHv, in the place of that along the axes. With √w·axis as directions it is a weighted Laplacian. The
            gradient then has the D derivatives along them.
        samples: estimate the Laplacian by this many random directions of independent signs (Hutchinson's estimator,
            exact for quadratic functions of separate coordinates). Inside of vmap, it asks for its ``randomness``.

    Returns:
        A function of the same arguments. For each tensor of shape S that ``f`` returns, the Laplacian has shape S, and
        the gradient ``[*S, *x.shape]`` (``[*S, D]`` with directions or samples). Python values have None.

    Raises:
        CallTypeError: the first argument is no real floating-point tensor.
        CallValueError: ``directions`` do not fit the argument, or ``samples`` is no positive number.

    Example:
        >>> import torch
        >>> from functrans import laplacian
        >>> f = lambda x: (x**3).sum()
        >>> laplacian(f)(torch.tensor([1.0, 2.0]))
        tensor(18.)
        >>> laplacian(f, with_value=True)(torch.tensor([1.0, 2.0]))
        (tensor(9.), tensor([ 3., 12.]), tensor(18.))
        >>> laplacian(laplacian(lambda x: (x**4).sum()))(torch.tensor([1.0, 2.0]))
        tensor(48.)
    """
    check_callable("laplacian", f)
    call = Call("laplacian", f, {})
    check_flag("laplacian(f)", "with_value", with_value)
    check_samples(call, samples, directions)

    @named_after(f)
    def function(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            options = {"with_value": with_value, "samples": samples}
            return TRACED(laplacian, f, options, (x, *args), kwargs, {"directions": directions})
        check_dense(call, "first argument", x, "a real floating-point tensor", kinds="f")
        along = directions
        if along is None and samples is not None:
            signs = torch.randint(0, 2, (samples, *x.shape), device=x.device).to(x.dtype) * 2 - 1
            along = signs * samples**-0.5
        elif along is None:
            along = torch.eye(x.numel(), dtype=x.dtype, device=x.device).view(x.numel(), *x.shape)
        check_directions(call, directions, x)
        interpreter = LaplacianInterpreter(len(along), f)

        def body() -> list[Any]:
            leaves, spec = tree_flatten(
                call_function(call, f, (interpreter.carry(x, slopes=along, bend=None), *args), kwargs)
            )
            with lowered(interpreter):
                found = [interpreter.parts_of(leaf) for leaf in leaves]
            return [tree_unflatten(spec, [part[i] for part in found]) for i in range(3)]

        value, slopes, bend = run_transformed(interpreter, body)
        if not with_value:
            return bend
        leaves, spec = tree_flatten(slopes)
        axes = x.shape if directions is None and samples is None else along.shape[:1]
        placed = [s.movedim(0, -1).reshape([*s.shape[1:], *axes]) if isinstance(s, Tensor) else s for s in leaves]
        return value, tree_unflatten(spec, placed), bend

    return function


def check_samples(call: Call, samples: Any, directions: Any) -> None:
    if samples is not None and (type(samples) is not int or not 0 < samples < 2**31 or directions is not None):
        got = f"samples={shown(samples)}" + (" with directions" if directions is not None else "")
        raise CallValueError(call, got, "a positive number of samples, or directions")


def check_directions(call: Call, directions: Any, x: Tensor) -> None:
    if directions is not None:
        expected = f"a tensor of dtype {x.dtype} and shape [D, {', '.join(map(str, x.shape))}]"
        check_dense(call, "directions", directions, expected)
        if directions.dim() == 0 or directions.shape[1:] != x.shape or directions.dtype != x.dtype:
            raise CallValueError(call, f"{what(directions)} as directions", expected)
