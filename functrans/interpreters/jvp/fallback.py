"""Forward mode of operators without a tangent in the table: by PyTorch's forward formula, or its reverse one twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functrans.core.dispatch import map_tensors
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.derivatives.helpers import cast
from functrans.errors import MissingRuleError, NoFormulaError
from functrans.interpreters.autograd_fallback import run_forward_mode, run_recorded
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.operators.info import PYTORCH_NAMESPACES, op_info
from functrans.pytorch.thread_state import door_closed, lowered
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tensors_in

if TYPE_CHECKING:
    from functrans.interpreters.jvp.interpreter import JvpInterpreter


def of_tensors(a: Any, tangent: Any) -> Iterator[Tensor | None]:
    """The tangent, if any, of each tensor in ``a``, in order."""
    if isinstance(a, Tensor):
        yield tangent
    elif type(a) in (list, tuple):
        for i, v in enumerate(a):
            yield from of_tensors(v, None if tangent is None else tangent[i])


def borrow(self: JvpInterpreter, op: OpOverload, values: Any, kwargs: Any, tangents: Any) -> Any:
    """Run ``op`` with PyTorch's forward-mode formula, or, where it has none, with its reverse formula twice."""
    names = op_info(op).arguments
    carried = [tangents.get(i) for i in range(len(values))] + [tangents.get(names.index(name)) for name in kwargs]
    flat = {i: t for i, t in enumerate(of_tensors([*values, *kwargs.values()], carried)) if t is not None}
    try:
        if op.namespace not in PYTORCH_NAMESPACES:
            # torch.library operators have a reverse formula at most, and no forward one would be a silent zero.
            raise NotImplementedError("forward mode: a custom operator does not support it")
        expect_followed(self, op, values, kwargs, tangents, flat)
        out, found = run_forward_mode(self, op, values, kwargs, flat)
        if found and all(t is None for t in found):
            # a kernel that does not know forward mode: reverse mode says whether that is a zero
            raise NotImplementedError("forward mode: no output has a tangent, it does not support it")
    except (NotImplementedError, RuntimeError) as error:
        if not _lacks_forward(error):
            raise
        out, found = double_reverse(self, op, values, kwargs, flat)
    it = iter(found)

    def dual(o: Tensor) -> WrapperTensor:
        tangent = next(it)
        if tangent is not None and tangent.dtype is not o.dtype:  # PyTorch's formulas do not always promote
            with lowered(self):
                tangent = cast(tangent, o.dtype)
        return self.dual(o, tangent)

    return map_tensors(dual, out)


#: Operators and positions of arguments whose tangents PyTorch is known to follow.
FOLLOWED: set[tuple[OpOverload, tuple[int, ...]]] = set()


def expect_followed(
    self: JvpInterpreter, op: OpOverload, values: Any, kwargs: Any, tangents: Any, flat: dict[int, Tensor]
) -> None:
    """Refuse a tangent that PyTorch has no formula for: reverse mode says so, forward mode drops it without a word."""
    key = op, tuple(sorted(tangents))
    if key in FOLLOWED or op_info(op).random:
        return
    try:
        run_recorded(self, op, values, kwargs, lambda i: i in flat)
    except NoFormulaError:
        raise
    except RuntimeError:
        pass  # of what else reverse mode lacks, forward mode may have its own
    FOLLOWED.add(key)


def _lacks_forward(error: Exception) -> bool:
    text = str(error)
    return "does not support it" in text and "forward" in text


def double_reverse(
    self: JvpInterpreter, op: OpOverload, values: Any, kwargs: Any, tangents: dict[int, Tensor]
) -> tuple[Any, list[Tensor | None]]:
    """The tangent as the transpose of the transpose.

    The pullback is linear in its cotangent u; its own pullback, at any u, maps tangents of the inputs to the tangent of
    the output (J. Townsend, "A new trick for calculating Jacobian vector products", 2017).
    """
    with lowered(self):
        inner = GradInterpreter(op)
        order = sorted(tangents)
        count = -1

        def enter(a: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return inner.track(a) if count in tangents else a

        tracked = [map_tensors(enter, a) for a in values]
        tracked_kwargs = {k: map_tensors(enter, v) for k, v in kwargs.items()}
        wrappers = [x for x in tensors_in([*tracked, *tracked_kwargs.values()]) if type(x) is WrapperTensor]
        inputs = [w for w in wrappers if w.interpreter is inner]
        out = run_transformed(inner, lambda: op(*tracked, **tracked_kwargs), enable_grad=True)
        plain = map_tensors(inner.value_of, out)
        outputs: list[Any] = tensors_in([out])
        if any(o.layout is not torch.strided for o in outputs):
            # PyTorch's formulas for sparse tensors go through _values, where the second derivative is lost
            raise MissingRuleError(op, self, "Its result is sparse: use to_dense() before it.")

        outer = GradInterpreter(op)
        foreign = op.namespace not in PYTORCH_NAMESPACES
        # any u will do; ones tell a lost derivative from a zero one
        fill = torch.ones_like if foreign else torch.zeros_like
        made = [inner.index_of(o) for o in outputs]
        seeds = {index: outer.track(fill(o.value)) for index, o in zip(made, outputs, strict=True) if index}
        names: dict[int | None, int] = {index: w.tape_index for index, w in seeds.items() if w.tape_index is not None}

        def transpose() -> Any:
            return inner.pull(dict(seeds), consume=False)

        pulled = run_transformed(outer, transpose, enable_grad=True)
        given: dict[int, Tensor] = {}
        for w, i in zip(inputs, order, strict=True):
            back = None if w.tape_index is None else pulled.get(w.tape_index)
            index = outer.index_of(back)
            if index is not None:
                given[index] = given[index] + tangents[i] if index in given else tangents[i]
            elif foreign and back is not None and not is_zero(back):
                raise MissingRuleError(op, self, LOST)
        found = outer.pull(given, consume=True)
        result = [found.get(names[index]) if index in names else None for index in made]
    return plain, result


LOST = (
    "The gradients that its backward returns cannot be followed back to the gradient that it is given "
    "(it computes them by numpy, by Python numbers or by an operator without a derivative). "
    "Give it a tangent: functrans.derivative(op, tangent=...)."
)


def is_zero(x: Tensor) -> bool:
    """Whether the numbers of ``x`` are zeros, for all examples."""
    while type(x) is WrapperTensor:
        x = x.value
    with door_closed(), torch.no_grad():
        return not bool(x.any())
