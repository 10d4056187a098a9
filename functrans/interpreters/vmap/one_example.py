"""Whether an operator takes one example at all.

NOTE [Operators refuse examples, not batches]
A rule runs an operator on physical tensors, which have a dimension more than the examples. An operator that wants
matrices would take a batch of vectors for a matrix and answer, where a loop raises. So before a rule sees arguments of
some ranks and dtypes for the first time, the operator is run on one example that has shapes and no data; PyTorch's own
checks then say what they have to say. Where dtypes are mixed or unusual it is run on the first example. Later calls
with the same ranks and dtypes cost a look-up, those of rules that count an example's dimensions themselves
(``any_rank``) nothing. What is wrong with sizes, positions or numbers for other reasons the physical tensors show as
well, or the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.core.torch_private import OpOverload
from functrans.functionalize.without_data import run_without_data

#: What PyTorch's checks raise, and its operators without a kernel for tensors without data.
REFUSALS = (RuntimeError, IndexError, TypeError, ValueError, AssertionError)


def kinds_of(args: Sequence[Any]) -> tuple[Any, ...]:
    """Dtypes and ranks of the tensors among ``args``, as the code at this level sees them."""
    return tuple([
        (a.dtype, len(a.shape)) if isinstance(a, Tensor)
        else kinds_of(a) if (type(a) is list or type(a) is tuple) and a and type(a[0]) is not int
        else None
        for a in args
    ])  # fmt: skip


def check(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], size: int, run: Callable[[], Any]) -> None:
    """Raise what ``op`` raises for one example; ``run()`` runs it on the first one.

    See NOTE [Operators refuse examples, not batches].
    """
    found = dtypes(args)
    if size and not (len(found) == 1 and found <= USUAL):
        with torch.random.fork_rng():
            run()  # what dtypes an operator takes together its kernel knows, not the checks
        return
    try:
        run_without_data(op, args, kwargs)
    except REFUSALS as error:
        if size:
            with torch.random.fork_rng():
                run()  # PyTorch may refuse only what has no data
        elif not isinstance(error, NotImplementedError):
            raise


USUAL = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def dtypes(a: Any) -> set[torch.dtype]:
    """The dtypes of all tensors in ``a``."""
    if isinstance(a, Tensor):
        return {a.dtype}
    return set().union(*map(dtypes, a)) if type(a) is list or type(a) is tuple else set()
