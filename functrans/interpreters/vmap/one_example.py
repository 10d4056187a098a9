"""Whether an operator takes one example at all.

NOTE [Operators refuse examples, not batches]
A rule runs an operator on physical tensors, which have a dimension more than the examples. An operator that wants
matrices would take a batch of vectors for a matrix and answer, where a loop raises. So before a rule sees arguments of
some ranks and dtypes for the first time, the operator is run on one example; PyTorch's own checks then say what they
have to say. A small example of usual dtypes is one of zeros. If that is refused (a matrix of zeros is not everything's
matrix), and if it is larger, it has shapes and no data; the checks for those are written in Python, and the first of
them imports what takes a second (sympy, torch._dynamo). Where dtypes are mixed or unusual it is the first example.
Later calls with the same ranks and dtypes cost a look-up, those of rules that count an example's dimensions themselves
(``any_rank``) nothing. What is wrong with sizes, positions or numbers for other reasons the physical tensors show as
well, or the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.functionalization.without_data import run_on_zeros, run_without_data
from functrans.operators.info import PYTORCH_NAMESPACES
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import elements

#: What PyTorch's checks raise, and its operators without a kernel for tensors without data.
REFUSALS = (RuntimeError, IndexError, TypeError, ValueError, AssertionError)

#: Up to so many elements an operator on zeros takes less time than the imports.
SMALL = 1 << 20


def kinds_of(args: Sequence[Any]) -> tuple[Any, ...]:
    """Dtypes and ranks of the tensors among ``args``, as the code at this level sees them."""
    found: list[Any] = []
    for a in args:
        kind = type(a)
        if kind is WrapperTensor or isinstance(a, Tensor):
            found += (a.dtype, len(a.shape))
        elif (kind is list or kind is tuple) and a and type(a[0]) is not int:
            found.append(kinds_of(a))
        else:
            found.append(None)
    return tuple(found)


def check(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], size: int, run: Callable[[], Any]) -> None:
    """Raise what ``op`` raises for one example; ``run()`` runs it on the first one.

    See NOTE [Operators refuse examples, not batches].
    """
    found = dtypes(args)
    usual = len(found) == 1 and found <= USUAL
    if size and not usual:
        with torch.random.fork_rng():
            run()  # what dtypes an operator takes together its kernel knows, not the checks
        return
    if usual and takes_zeros(op, args, kwargs):
        return
    try:
        run_without_data(op, args, kwargs)
    except REFUSALS as error:
        if size:
            with torch.random.fork_rng():
                run()  # PyTorch may refuse only what has no data
        elif not isinstance(error, NotImplementedError):
            raise


def takes_zeros(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether ``op`` is seen to take zeros of the arguments' shapes and dtypes; False also if it was not tried."""
    given = [*elements(args), *elements([*kwargs.values()])]
    sizes = [n for a in given if isinstance(a, Tensor) for n in (*a.shape, a.numel())]
    if any(type(n) is not int or n > SMALL for n in sizes) or any(isinstance(a, torch.Generator) for a in given):
        return False  # symbolic sizes are not to be fixed, and a generator of the user's is not to draw
    if op.namespace not in PYTORCH_NAMESPACES:
        return False  # code of the user's is not to run once more
    try:
        run_on_zeros(op, args, kwargs)
    except REFUSALS:
        return False
    return True


USUAL = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def dtypes(a: Any) -> set[torch.dtype]:
    """The dtypes of all tensors in ``a``."""
    return {x.dtype for x in elements(a) if isinstance(x, Tensor)}
