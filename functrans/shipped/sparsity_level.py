"""The level that finds out which elements of the inputs each element of a tensor depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import lower, map_tensors
from functrans.core.tensor import WrapperTensor
from functrans.derivatives.table import DERIVATIVES, NO_TANGENT
from functrans.door.autograd_function import FUNCTION_RULES, send
from functrans.extension.table_interpreter import TableInterpreter
from functrans.operators.info import DIFFERENTIABLE, op_info
from functrans.operators.rules import RuleTable
from functrans.programs.fusible import by_our_rules
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.element_sets import ElementSets
from functrans.tensors.pytrees import tensors_in, tree_flatten, tree_map

aten = torch.ops.aten

Pattern = Callable[["OperatorCall"], Any]


class OperatorCall:
    """What a rule is given: an operator's call, its outputs, and what its arguments depend on."""

    def __init__(self, level: SparsityLevel, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], out: Any):
        self.level = level
        self.op = op
        self.sets = level.sets
        self.args, self.kwargs = args, kwargs
        self.outs = tensors_in(out if isinstance(out, list | tuple) else (out,))

    @cached_property
    def named(self) -> dict[str, Any]:
        """All arguments, in the schema's order."""
        known = op_info(self.op)
        named = {**dict(zip(known.arguments, known.defaults, strict=True)), **self.kwargs}
        named.update(zip(known.arguments, self.args, strict=False))
        return named

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def tensors(self, *names: str) -> list[Tensor]:
        """The tensors among the arguments of these names; without names, all."""
        if names:
            return tensors_in([self.named.get(name) for name in names])
        return tensors_in(self.named.values() if self.kwargs else self.args)

    def carried(self, x: Tensor) -> Tensor | None:
        """The numbers of ``x``; None for a constant."""
        return x.numbers if self.level.owns(x) else None

    def numbers(self, x: Tensor) -> Tensor:
        found = self.carried(x)
        return torch.zeros(x.shape, dtype=torch.int64) if found is None else found

    def known(self, x: Tensor) -> Tensor | None:
        """The numbers in memory of a tensor that is the same for whatever inputs, or None.

        A tensor of an outer transform has others for each example, or a derivative of its own.
        """
        value: Any = x
        while type(value) is WrapperTensor:
            if not value.interpreter.is_constant(value):
                return None
            value = value.value
        if value.requires_grad or value.device.type == "meta" or type(value) not in (Tensor, torch.nn.Parameter):
            return None
        return value.detach().cpu()

    def union(self, *numbers: Tensor) -> Tensor:
        found = numbers[0]
        for more in numbers[1:]:
            found = self.sets.union(found, more)
        return found


class SparsityLevel(TableInterpreter):
    """Its wrappers carry ``numbers``, of the set of input elements that each element depends on (``ElementSets``).

    A tensor with numbers, even if they are all 0, may have other values for other inputs; a constant has none. So a
    comparison of inputs is no constant, and what is read at such places may be any element.
    """

    kind = "sparsity"
    payload = ("numbers",)
    differentiates = True

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.sets = ElementSets()
        #: elements of the inputs so far
        self.count = 0
        #: whether the pattern may be another one for other inputs, since the function read numbers or shapes of them
        self.local = False
        #: whether the function runs another time, for its values
        self.rehearsal = False

    def input(self, x: Tensor) -> WrapperTensor:
        """A new input."""
        with running_at(None):
            numbers = self.sets.singletons(self.count, x.shape)
        self.count += x.numel()
        return self.carry(x, numbers=numbers)

    def variable(self, x: Tensor) -> WrapperTensor:
        """What may have other values another time, and no derivative here."""
        with running_at(None):
            numbers = torch.zeros(x.shape, dtype=torch.int64)
        return self.carry(x, numbers=numbers)

    def process(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super().process(op, args, kwargs)
        if op_info(op).random:  # another draw, another value
            out = map_tensors(self.settled, out)
        return out

    def run_rule(self, rule: Callable[..., Any], op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return rule(self, *args, **kwargs)  # all of them end in ``apply``, which needs no check

    def settled(self, x: Any) -> Any:
        return self.variable(x.value) if self.is_constant(x) else x

    def opaque(self, out: Any, args: Sequence[Any]) -> Any:
        """``out``, values one level down, of a function of ``args`` with a derivative of its own: it may be anything.
        """
        mine = [a for a in tree_flatten(list(args))[0] if self.owns(a)]
        whole = self.sets.everything(a.numbers for a in mine if a.numbers is not None)

        def carry(x: Tensor) -> WrapperTensor:
            with running_at(None):
                numbers = torch.full(x.shape, whole if x.dtype in DIFFERENTIABLE else 0)
            return self.carry(x, numbers=numbers)

        return map_tensors(carry, out)

    def apply(self, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], pattern: Pattern) -> Any:
        """Run ``op`` one level down; its outputs depend on what ``pattern`` says."""
        values, by_keyword = self.value_of(args), {name: self.value_of(a) for name, a in kwargs.items()}
        out = lower(self, op, values, by_keyword)
        return self.depending(OperatorCall(self, op, args, kwargs, out), out, pattern)

    def depending(self, call: OperatorCall, out: Any, pattern: Pattern) -> Any:
        smooth = any(o.dtype in DIFFERENTIABLE for o in call.outs)
        with running_at(None):
            found = pattern(call) if smooth else [None] * len(call.outs)
            numbers = iter([found] * len(call.outs) if isinstance(found, Tensor) else found)
            if isinstance(out, Tensor):
                return self.carried(out, numbers)
            return tree_map(lambda leaf: self.carried(leaf, numbers), out)

    def carried(self, leaf: Any, numbers: Iterator[Tensor | None]) -> Any:
        """A leaf of an operator's result with its numbers, the next ones if it is a tensor."""
        if not isinstance(leaf, Tensor):
            self.local = self.local or leaf is not None  # a number that was read
            return leaf
        found = next(numbers)
        if found is None or leaf.dtype not in DIFFERENTIABLE:
            return self.variable(leaf)
        return self.carry(leaf, numbers=found if found.shape == leaf.shape else found.expand(leaf.shape))


def everything(call: OperatorCall) -> list[Tensor]:
    """Every element of every output depends on every element of every argument: always right."""
    whole = call.sets.everything(n for x in call.tensors() if (n := call.carried(x)) is not None)
    return [torch.full(o.shape, whole) for o in call.outs]


def nothing(call: OperatorCall) -> list[None]:
    return [None] * len(call.outs)


def pointwise(call: OperatorCall) -> Any:
    """Each element depends on those at its place, if the arguments do have the output's places."""
    given, shape = call.tensors(), call.outs[0].shape
    if any(x.shape != shape for x in given):
        try:
            shape = torch.broadcast_shapes(*(x.shape for x in given))
        except RuntimeError:
            return everything(call)
    if any(o.shape != shape for o in call.outs):
        return everything(call)
    return call.union(*(n for x in given if (n := call.carried(x)) is not None))


def by_table(op: OpOverload) -> Pattern:
    """What an operator that has no rule here depends on: the derivative table knows which are pointwise, and which
    constant."""
    entry = DERIVATIVES.get(op)
    if entry is not None and entry.tangent == NO_TANGENT:
        return nothing
    if entry is not None and entry.tangent == "elementwise":
        return pointwise
    return pointwise if torch.Tag.pointwise in op.tags and by_our_rules(op) and op.namespace == "aten" else everything


def without_rule(level: SparsityLevel, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if torch.Tag.dynamic_output_shape in op.tags:
        level.local = True
    return level.apply(op, args, kwargs, by_table(op))


SparsityLevel.rules = RuleTable("sparsity rules", default=without_rule)


def pattern_of(*ops: OpOverload) -> Callable[[Pattern], Pattern]:
    """Decorator: what the outputs of these operators depend on, unless the user has replaced their derivatives."""

    def decorate(pattern: Pattern) -> Pattern:
        for op in ops:

            def rule(level: SparsityLevel, *args: Any, op: OpOverload = op, **kwargs: Any) -> Any:
                return level.apply(op, args, kwargs, pattern if by_our_rules(op) else by_table(op))

            SparsityLevel.rules.add(op, rule)
        return pattern

    return decorate


def function_rule(level: SparsityLevel, cls: Any, args: Sequence[Any]) -> Any:
    """An ``autograd.Function`` runs one level down."""
    with running_at(level.below):
        out = send(level.below, cls, tree_map(level.value_of, list(args)))
    return level.opaque(out, args)


FUNCTION_RULES[SparsityLevel] = function_rule
