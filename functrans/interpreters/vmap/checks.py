"""What code asks of all examples at once: whether a check holds.

NOTE [Checks under vmap]
A program checks its values with ``all()`` or ``any()`` of a tensor, with ``torch.allclose`` or ``torch.equal``, and
raises where the check fails; ``torch.distributions`` does so with every parameter. The truth of such an answer can be
had for a whole batch. Where it is the same for all examples, every example would go the same way. Where it is not, code
goes the way of the examples that fail (``all`` is false, ``any`` is true). If it raises there, so would a loop, at the
first of them. If the function returns after all, no result is right for all examples: then that is a DataDependentError
at the line of the question, raised when the function has returned. Any other truth of a batched value has no way that
a failing example goes, and is refused at once.

Which function made an answer is noted on the wrappers of every level (``quantifier``); a write takes it away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.errors import DataDependentError
from functrans.errors.misuse import RESERVED
from functrans.functionalization.hidden_effects import as_usual, stands_in_for
from functrans.operators.info import OpInfo
from functrans.pytorch.thread_state import lowered, running_at
from functrans.tensors.answers import NUMBERS

if TYPE_CHECKING:
    from functrans.interpreters.vmap.interpreter import VmapInterpreter

aten = torch.ops.aten

WrapperTensor.quantifier = None  # type: ignore[attr-defined]  # of most wrappers
RESERVED.add("quantifier")
QUANTIFIERS = {
    aten.all.default: torch.all,
    aten._is_all_true.default: torch.all,
    aten.any.default: torch.any,
    aten._is_any_true.default: torch.any,
}


@stands_in_for(*QUANTIFIERS)
def quantified(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator as it is; its answer may be asked for as a check."""
    out = layer = as_usual(known, args, kwargs)
    while type(layer) is WrapperTensor:
        layer.quantifier = QUANTIFIERS[known.op]
        layer = layer.value
    return out


def asked_for_all(x: WrapperTensor) -> bool:
    """Whether ``x`` is an answer of ``all`` or ``any``, as it was given."""
    return x.quantifier is not None and not x.version


def holds(interpreter: VmapInterpreter, answer: WrapperTensor) -> bool:
    """The truth of ``answer``, of ``all`` or ``any``, for all examples; see NOTE [Checks under vmap]."""
    with lowered(interpreter):
        for_all, for_any = torch.all(answer.value), torch.any(answer.value)
        if interpreter.undecided is None and interpreter.batch_size and anywhere(for_all != for_any):
            what, cure = NUMBERS["bool"]
            cure += "; a check that fails for some of the examples has to end in an exception"
            interpreter.undecided = DataDependentError(what, interpreter, cure)
        return bool(for_all if answer.quantifier is torch.all else for_any)


def anywhere(x: Tensor) -> bool:
    """Whether ``x``, of any level, is true for some example of some level."""
    while type(x) is WrapperTensor:
        x = x.value
    with running_at(None):
        return bool(x.any())


def equal(x: Tensor, y: Tensor) -> bool:
    """``torch.equal`` as the check that it is."""
    return x.shape == y.shape and bool((x == y).all())


def allclose(x: Tensor, y: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    """``torch.allclose`` as the check that it is."""
    return bool(torch.isclose(x, y, rtol=rtol, atol=atol, equal_nan=equal_nan).all())


#: Operators that return the truth of a check, as functions that ask for it.
CHECKS = {aten.equal.default: equal, aten.allclose.default: allclose}
