"""How an operator on tracked values is recorded: by its entry in the derivative table, in pieces, or by PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functrans.core.dispatch import lower, map_tensors
from functrans.core.tensor import WrapperTensor, wrap
from functrans.decompositions.table import decompose, decomposition
from functrans.derivatives.table import DERIVATIVES, NO_TANGENT, Derivative
from functrans.interpreters.autograd_fallback import run_recorded
from functrans.interpreters.constants import constants
from functrans.interpreters.fitting import spec
from functrans.interpreters.grad.nodes import (
    BORROWED,
    BorrowedPullback,
    CheckedNode,
    TableNode,
)
from functrans.operators.info import DIFFERENTIABLE, OpInfo
from functrans.operators.rules import RuleTable
from functrans.programs.fusible import by_our_rules
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.broadcasting import same_shape
from functrans.tensors.pytrees import tensors_in

if TYPE_CHECKING:
    from functrans.interpreters.grad.interpreter import GradInterpreter

aten = torch.ops.aten

#: Operators that grad treats in a way of its own: rule(interpreter, op, values, kwargs) -> output of this level.
GRAD_RULES: RuleTable[Callable[..., Any]] = RuleTable("grad rules", cached=True)


def choose_method(op: OpOverload, known: OpInfo, by_table: Callable[[Derivative, OpInfo], Any]) -> Callable[..., Any]:
    """How ``op`` is recorded; ``by_table``: TableMethod, or ByHooks for a class that overrides what that does."""
    rule = GRAD_RULES.get(op)
    if rule is not None:
        return lambda self, op, given, values, kwargs, places, indices: rule(self, op, values, kwargs)
    entry = DERIVATIVES.get(op)
    if entry is not None:
        return run_constant if entry.tangent == NO_TANGENT else by_table(entry, known)
    if known.composite or decomposition(op) is not None:
        return take_apart
    return borrow


def run_constant(
    self: GradInterpreter, op: OpOverload, given: Any, values: Any, kwargs: Any, places: Any, indices: Any
) -> Any:
    """Run an operator whose outputs do not depend differentiably on its arguments."""
    return constants(self, lower(self, op, values, kwargs))


def take_apart(
    self: GradInterpreter, op: OpOverload, given: Any, values: Any, kwargs: Any, places: Any, indices: Any
) -> Any:
    """Run the pieces of a composite operator through this level again."""
    return decompose(self, op, *given)


class TableMethod:
    """Records an operator by its entry in the derivative table."""

    def __init__(self, entry: Derivative, known: OpInfo) -> None:
        self.entry = entry
        self.known = known
        self.nodes: dict[Any, Any] = {}
        #: whether the formulas are a user's: what they return is checked
        self.foreign = not by_our_rules(known.op)
        #: whether arguments can be broadcast or promoted: not with one tensor and no number
        operands = [a for a in known.op._schema.arguments if "Tensor" in str(a.type) or "number" in str(a.type)]
        self.fixes = entry.broadcasts or (entry.pointwise and len(operands) > 1)

    def __call__(
        self,
        grad: GradInterpreter,
        op: OpOverload,
        given: Any,
        values: Any,
        kwargs: Any,
        places: list[int],
        indices: list[Any],
    ) -> Any:
        key = places[0] if len(places) == 1 else tuple(places)
        try:
            node = self.nodes[key]
        except KeyError:
            node = self.nodes[key] = self.make_node(places)
        if node is None:
            return self.fall_back(grad, op, given, values, kwargs, places, indices)
        out = lower(grad, op, values, kwargs)
        outs: Any
        wrapped: Any
        if isinstance(out, Tensor):
            wrapped = wrap(grad, out)
            if out.dtype not in DIFFERENTIABLE:
                wrapped.tape_index = None
                return wrapped
            grad.last_index = outs = wrapped.tape_index = grad.last_index + 1
        else:
            wrapped = map_tensors(grad.output, out)
            outs = [grad.index_of(w) for w in wrapped]
        if node.last_save < len(values):
            saved = [values[i] for i in node.saves]
        else:
            if kwargs:
                values = [*values, *(self.default(i, kwargs) for i in range(len(values), len(self.known.defaults)))]
            else:
                values = [*values, *self.known.defaults[len(values) :]]
            saved = [values[i] for i in node.saves]
        if node.saves_result:
            saved.append(out)
        if self.foreign:
            saved += [spec(values[p] if p < len(values) else self.default(p, kwargs)) for p in places]
        elif self.fixes:
            shape, dtype = out.shape, out.dtype
            for p in places:
                v = values[p]
                saved.append(None if same_shape(v.shape, shape) and v.dtype is dtype else (v.shape, v.dtype))
        grad.tape.append((node, outs, indices, saved))
        return wrapped

    def fall_back(self, grad: GradInterpreter, op: OpOverload, *call: Any) -> Any:
        """Record an operator where the table says nothing of some tracked argument."""
        method = take_apart if self.known.composite or decomposition(op) is not None else borrow
        return method(grad, op, *call)

    def default(self, i: int, kwargs: dict[str, Any]) -> Any:
        return kwargs.get(self.known.arguments[i], self.known.defaults[i])

    def make_node(self, places: list[int]) -> TableNode | CheckedNode | None:
        names = [self.known.arguments[p] for p in places]
        if any(n not in self.entry.formulas for n in names):
            return None
        if self.foreign:
            return CheckedNode(TableNode(self.entry, self.known, names, fixes=False))
        return TableNode(self.entry, self.known, names, self.fixes)


class ByHooks(TableMethod):
    """The same for a class of a user's that overrides ``track``, ``record`` or ``constant``: by these."""

    def __call__(self, grad: GradInterpreter, op: OpOverload, *call: Any) -> Any:
        if self.make_node(call[-2]) is None:
            return self.fall_back(grad, op, *call)
        last, tape, grad.tape = grad.last_index, grad.tape, []
        try:
            made = super().__call__(grad, op, *call)
        finally:
            records, grad.tape, grad.last_index = grad.tape, tape, last

        def again(w: WrapperTensor) -> WrapperTensor:
            return grad.constant(w.value) if w.tape_index is None else grad.track(w.value)

        made = map_tensors(again, made)
        for node, outs, ins, saved in records:
            outs = grad.index_of(made) if type(outs) is int else [grad.index_of(w) for w in made]
            grad.record(node, outs, ins, saved)
        return made


def borrow(
    self: GradInterpreter, op: OpOverload, given: Any, values: Any, kwargs: Any, places: Any, indices: Any
) -> Any:
    """Record ``op`` by PyTorch's own derivative."""
    wanted = [self.index_of(a) for a in tensors_in([*given[0], *given[1].values()])]
    out, linked, pullback = run_recorded(self, op, values, kwargs, lambda i: wanted[i] is not None)
    flags = iter(linked)
    wrapped = map_tensors(lambda o: self.track(o) if next(flags) else self.constant(o), out)
    if any(linked):
        outs = [self.index_of(o) for o in tensors_in([wrapped])]
        saved = BorrowedPullback(pullback, tensors_in(values), [False])
        self.record(BORROWED, outs, [w for w in wanted if w is not None], (op, saved))
    return wrapped


#: What there is without a rule of ours: which one it is, PyTorch may say otherwise tomorrow of operators that are not
#: its own.
WITHOUT_RULE = (take_apart, borrow)


@GRAD_RULES.register(torch.ops.aten.detach.default, torch.ops.aten.detach_copy.default)
def detach(self: GradInterpreter, op: OpOverload, values: Any, kwargs: Any) -> Any:
    """The constant that ``detach`` makes, at this level and at every level below."""
    return self.constant(lower(self, op, values, kwargs))
