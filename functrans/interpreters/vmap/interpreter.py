"""Batching: an interpreter whose wrappers stand for one value per example."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import call_below
from functrans.core.dispatch import NO_KWARGS, lower, map_tensors, unwrap
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, carried_as, strides_of, tensor_of, wrap_as
from functrans.decompositions.table import decompose
from functrans.errors import (
    BatchingRuleError,
    DataDependentError,
    FunctransError,
    InsideTransformError,
    SparseOperatorError,
)
from functrans.errors.call_sites import definition
from functrans.functionalization.in_place import OWN_MEMORY
from functrans.interpreters.constants import constants
from functrans.interpreters.own_methods import overrides
from functrans.interpreters.own_results import fitting_batches, looked_at
from functrans.interpreters.vmap import higher_order
from functrans.interpreters.vmap.checks import CHECKS, asked_for_all, holds
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.hooks import BatchedGradFn, on_batch
from functrans.interpreters.vmap.one_by_one import example, run_one_by_one
from functrans.interpreters.vmap.one_example import check, kinds_of
from functrans.interpreters.vmap.programs import run_program
from functrans.interpreters.vmap.rule_calls import described, for_each, in_dims, refusal_of, rule_of
from functrans.interpreters.vmap.rules.random import RANDOM_RULES, RandomnessError, draws_nothing, random_rule
from functrans.interpreters.vmap.seen_calls import SeenCall, as_operator, look_of, remember
from functrans.interpreters.vmap.specialized import DATA_DEPENDENT, Specialized, rule_here
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo, materialize
from functrans.interpreters.vmap.written_down import run_and_write
from functrans.operators.info import OpInfo
from functrans.operators.rules import place_in
from functrans.operators.scopes import SCOPES
from functrans.pytorch.thread_state import lowered, running_at
from functrans.pytorch.torch_private import (
    HigherOrderOperator,
    OpOverload,
    vmap_rule_of_library,
)
from functrans.tensors.sparse import has_sparse

aten = torch.ops.aten


ITEM = (aten.item.default, aten._local_scalar_dense.default)
TRUTH = (*ITEM, aten.is_nonzero.default)
READING_A_NUMBER = "tensor.item(), or a tensor where PyTorch takes a number,"


class VmapInterpreter(Interpreter, whole=True):
    """A wrapper holds all examples in one tensor, along its dimension ``bdim``; None: the same for every example."""

    kind = "vmap"
    payload = ("bdim",)
    repeats_writes = True

    #: the name by which collective operations find it; see shipped/collectives.py
    axis_name: Hashable | None = None

    #: of a chunk that shares its draws with others: the states from which generators started that the function passes
    generators: dict[torch.Generator, Tensor] | None = None

    def __init_subclass__(cls, *, whole: bool = False) -> None:
        super().__init_subclass__(whole=whole)
        looked_at(cls, fitting_batches)
        if overrides(cls, VmapInterpreter, "batched", "constant"):
            cls.left, cls.again = left_by_batched, again_by_batched  # type: ignore[method-assign]

    def __init__(self, batch_size: int, randomness: str, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.batch_size = batch_size
        self.randomness = randomness
        #: what is wrong if the function returns; see NOTE [Checks under vmap]
        self.undecided: DataDependentError | None = None

    @property
    def info(self) -> BatchInfo:
        """What rules are told; made when asked for: kept, it would be a cycle that holds what the function captured."""
        return tuple.__new__(BatchInfo, (self.batch_size, self.randomness, self))  # quicker than by its own

    def returned(self) -> None:
        if self.undecided is not None:
            raise self.undecided

    def batched(self, value: Tensor, bdim: int | None, of: Any = None) -> WrapperTensor:
        """A wrapper for the physical ``value``, batched along ``bdim``, which a rule for ``of`` may have got wrong."""
        if bdim is None:
            return self.constant(value)
        if bdim:
            value = tensor_of(value)
        shape, strides = value.shape, strides_of(value)
        if of is not None and (not -len(shape) <= bdim < len(shape) or shape[bdim] != self.batch_size):
            raise refusal_of(of, shape, bdim, self.batch_size)
        if bdim == 0:
            shape = shape[1:]  # type: ignore[assignment]
            if strides is not None:
                strides = strides[1:]
        else:
            if strides is None:
                strides = value.stride() if value.layout is torch.strided else None
            bdim %= len(shape)
            shape = shape[:bdim] + shape[bdim + 1 :]  # type: ignore[assignment]
            strides = None if strides is None else strides[:bdim] + strides[bdim + 1 :]
        wrapper = wrap_as(self, value, shape, strides)
        wrapper.bdim = bdim
        return wrapper

    #: what a rule returned, as ``batched`` makes a wrapper of it
    left = batched

    def rewrap(self, source: WrapperTensor, value: Tensor) -> WrapperTensor:
        return self.batched(value, source.bdim)

    def grad_fn(self, wrapper: WrapperTensor) -> Any:
        node = wrapper.value.grad_fn
        return node if node is None or wrapper.bdim is None else BatchedGradFn(self, node)

    def add_hook(self, wrapper: WrapperTensor, hook: Callable[[Tensor], Any]) -> Any:
        """Run ``hook`` on the gradients of the examples, which a level below computes for all."""
        if wrapper.bdim is None:
            cure = "it outside of vmap: the gradient is one for all examples"
            raise InsideTransformError("Tensor.register_hook() of a tensor that is not batched", self.name, cure)
        return wrapper.value.register_hook(on_batch(self, hook, wrapper.bdim))

    def hides_layout(self, wrapper: WrapperTensor) -> bool:
        if wrapper.bdim is None or wrapper.strides is None or wrapper.layout is not torch.strided:
            return False
        span = 1 + sum((n - 1) * s for n, s in zip(wrapper.shape, wrapper.strides, strict=True))
        return self.batch_size > 1 and 0 < wrapper.value.stride(wrapper.bdim) < span

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        return False  # where the batch dimension is has nothing to do with derivatives

    def aligned(self, old: WrapperTensor, new: WrapperTensor) -> tuple[Tensor, WrapperTensor]:
        if old.bdim == new.bdim:
            return old.value, new
        with lowered(self), torch.enable_grad():  # what is kept of the old value is its derivative
            if new.bdim is None:
                new = self.batched(materialize(new.value, None, self.batch_size), 0)
            return materialize(old.value, old.bdim, self.batch_size).movedim(0, new.bdim), new  # type: ignore[arg-type]

    def describe(self, wrapper: WrapperTensor) -> str:
        return f"bdim={wrapper.bdim}"

    def details(self) -> list[str]:
        named = [] if self.axis_name is None else [f"axis_name={self.axis_name!r}"]
        return [f"batch_size={self.batch_size}", f"randomness={self.randomness!r}", *named]

    def rule_place(self, op: Any) -> str | None:
        found = place_in(op, BATCHING_RULES)
        return found or (definition(vmap_rule_of_library(op)) if isinstance(op, OpOverload) else None)

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known: OpInfo = op._functrans  # type: ignore[attr-defined]
        if known.program:
            return run_program(self, op, args)  # type: ignore[arg-type]
        try:
            found = known.specialized[Specialized] if not SCOPES else rule_here(op, known)
        except KeyError:
            found = rule_here(op, known)
        rule, _, _, seen, definition, _ = found
        if definition is not None:
            return definition.run(self, args, kwargs)
        looked = None if seen is None or kwargs else look_of(self, args)
        call: SeenCall | None = None
        look = None
        if looked is not None:
            look, values = looked
            try:
                call = seen.get(look)  # type: ignore[union-attr]
            except TypeError:  # a symbolic size
                look = None
        if call is None:
            return self._process_anew(op, known, args, kwargs, look)
        if call.op is not None:
            return self.again(call, values)
        if not call.dims:
            return constants(self, lower(self, op, values, NO_KWARGS))
        try:
            if call.script and self.on_base:
                return self.leave(op, call_below(self, call.script, values, NO_KWARGS))
            given = self.info, [list(d) if type(d) is list else d for d in call.dims], *values
            if call.script is None and self.on_base:
                return self.leave(op, call_below(self, run_and_write, (seen, look, rule, *given), NO_KWARGS, values))
            return self.leave(op, call_below(self, rule, given, NO_KWARGS, values))
        except RuleDeclined:
            return self._process_anew(op, known, args, kwargs, None)

    def _process_anew(self, op: OpOverload, known: OpInfo, args: Any, kwargs: dict[str, Any], look: Any) -> Any:
        """``process`` of a call that is not known; ``look``: what to remember it by."""
        rule, rewrite, accepted, seen, _, decomposed = rule_here(op, known)
        values, below_kwargs, bdims = unwrap(self, op, args, kwargs)
        by_keyword = bool(kwargs) and any(place >= len(args) for place in bdims)
        if known.random:
            out = self._run_random(op, known, values, in_dims(values, bdims), below_kwargs, bool(bdims), by_keyword)
            if out is not NotImplemented:
                return out
        elif not bdims:
            if look is not None and seen is not None:
                remember(seen, look, SeenCall(()))
            return constants(self, lower(self, op, values, below_kwargs))
        if accepted is not None and (key := kinds_of(args)) not in accepted:
            self.check_example(op, args, kwargs)
            accepted.add(key)
        if rule is not None and bdims and not by_keyword:
            dims = in_dims(values, bdims) if known.tensor_lists else list(map(bdims.get, range(len(values))))
            try:
                if rewrite is not None and (rewritten := rewrite(dims, *values)) is not None:
                    op_below, physical, bdim = rewritten
                    out = lower(self, op_below, physical, below_kwargs)
                    plain = isinstance(out, Tensor) and not known.tensor_lists
                    shown = self._leave(op, out, bdim)
                    if look is not None and seen is not None and type(self).left is VmapInterpreter.left:
                        call = as_operator(dims, values, op_below, physical, shown) if plain else SeenCall(dims)
                        remember(seen, look, call)
                    return shown
                inputs = (*values, *below_kwargs.values()) if below_kwargs else values
                shown = self.leave(op, call_below(self, rule, (self.info, dims, *values), below_kwargs, inputs))
                if look is not None and seen is not None:
                    remember(seen, look, SeenCall(in_dims(values, bdims)))
                return shown
            except RuleDeclined:
                pass
            except RuntimeError as error:
                refused = isinstance(error, FunctransError) and not isinstance(error, SparseOperatorError)
                if refused or not has_sparse(values):
                    raise  # else one by one, or in pieces: see NOTE [Sparse operands]
        cure = DATA_DEPENDENT.get(op)
        if cure is not None:
            if op in TRUTH and asked_for_all(args[0]):
                return holds(self, args[0])
            raise DataDependentError(READING_A_NUMBER if op in ITEM else op, self, cure)
        if op in CHECKS:
            with running_at(self):
                return CHECKS[op](*args, **kwargs)
        if known.composite:
            return decompose(self, op, args, kwargs)
        if decomposed is not None and not has_sparse(values):
            out = decomposed.run(self, args, kwargs)
            if out is not NotImplemented:
                return out
        return self.loop(op, args, kwargs)

    def process_higher_order(self, op: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = BATCHING_RULES.get(op)  # type: ignore[arg-type]
        return NotImplemented if rule is None else higher_order.run_rule(self, op, rule, args, kwargs)

    def again(self, call: SeenCall, values: Sequence[Any]) -> WrapperTensor:
        """What ``call`` is for these values."""
        out = lower(self, call.op, call.arguments(values), NO_KWARGS)
        if type(out) is not Tensor:
            self.check_below(call.op, out)
            return self.batched(out, call.bdim)
        wrapper = wrap_as(self, out, call.shape, call.strides)
        wrapper.bdim = call.bdim
        return wrapper

    def _run_random(
        self,
        op: OpOverload,
        known: OpInfo,
        values: Any,
        dims: Any,
        kwargs: dict[str, Any],
        batched: bool,
        by_keyword: bool,
    ) -> Any:
        """Run a random operator by the vmap's randomness; NotImplemented if it has to be run as another operator, or
        one by one."""
        drawing = not draws_nothing(op, values)
        if drawing and self.generators is not None:
            for a in (*values, *kwargs.values()):
                if isinstance(a, torch.Generator) and a not in self.generators:
                    self.generators[a] = a.get_state()
        rule = rule_here(op, known).rule
        randomness = self.randomness
        if not (batched or by_keyword) and (not drawing or (rule is not None and randomness == "same")):
            return map_tensors(self.constant, lower(self, op, values, kwargs))
        if not drawing and (rule is not None or by_keyword):
            return NotImplemented
        if drawing and (rule is not None or by_keyword):
            if randomness == "error" or (by_keyword and randomness == "same"):
                raise RandomnessError(op, values, randomness)
            if by_keyword:
                return NotImplemented
            try:
                with lowered(self):
                    result = rule(self.info, *for_each(self.info, dims, values), **kwargs)
                return self.leave(op, result)
            except RuleDeclined:
                pass
        if known.composite and op not in RANDOM_RULES:
            return NotImplemented
        try:
            with lowered(self):
                result = random_rule(self.info, op, tuple(dims), tuple(values), kwargs)
        except RuleDeclined:
            return NotImplemented
        return self.leave(op, result)

    def check_example(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise what ``op`` raises for one example, where it does; see NOTE [Operators refuse examples, not
        batches]."""

        def run() -> None:
            with lowered(self):
                op(*example(self, args, 0), **{k: example(self, v, 0) for k, v in kwargs.items()})

        check(op, args, kwargs, self.batch_size, run)

    def leave(self, of: Any, result: Any) -> Any:
        """What a batching rule of ``of`` returned, ``(output, out_dims)``, as values of this level.

        Every rule passes here: ours, those of ``torch.library.register_vmap``, and ``autograd.Function.vmap``.
        """
        if type(result) is not tuple or len(result) != 2:
            if result is NotImplemented and isinstance(of, OpOverload):
                raise RuleDeclined("not for this call")
            raise BatchingRuleError(rule_of(of), described(result), "a pair (output, out_dims)")
        out, bdim = result
        return self.left(out, bdim, of) if type(out) is Tensor and type(bdim) is int else self._leave(of, out, bdim)

    def check_below(self, of: Any, out: Tensor) -> None:
        """A rule's result is of a level below: not of this one, which its code may have had at hand."""
        if type(out) is WrapperTensor and out.interpreter.level >= self.level:
            raise BatchingRuleError(
                rule_of(of),
                f"a value of level {out.interpreter.level}",
                f"one below level {self.level}, computed from its arguments",
            )

    def _leave(self, of: Any, out: Any, out_dims: Any) -> Any:
        if isinstance(out, Tensor):
            if out_dims is not None and type(out_dims) is not int:
                raise BatchingRuleError(rule_of(of), f"out_dims {out_dims!r} for one tensor", "an int or None")
            self.check_below(of, out)
            return self.left(out, out_dims, of)
        if isinstance(out, tuple | list):
            if not isinstance(out_dims, tuple | list):
                out_dims = [out_dims] * len(out)
            elif len(out_dims) != len(out):
                raise BatchingRuleError(
                    rule_of(of), f"{len(out_dims)} out_dims for {len(out)} outputs", "one for each, or one for all"
                )
            left = [self._leave(of, o, d) for o, d in zip(out, out_dims, strict=True)]
            return left if type(out) is list else tuple(left)
        return out

    def loop(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run ``op`` once per example; warns once per operator."""
        return run_one_by_one(self, op, args, kwargs)


carried_as("bdim")


def left_by_batched(self: VmapInterpreter, value: Tensor, bdim: int | None, of: Any = None) -> WrapperTensor:
    """``left`` of a class that overrides ``batched``."""
    shape = value.shape
    if bdim is not None and (not -len(shape) <= bdim < len(shape) or shape[bdim] != self.batch_size):
        raise refusal_of(of, shape, bdim, self.batch_size)
    return self.batched(value, bdim)


def again_by_batched(self: VmapInterpreter, call: SeenCall, values: Sequence[Any]) -> WrapperTensor:
    """``again`` of such a class."""
    return self.batched(lower(self, call.op, call.arguments(values), NO_KWARGS), call.bdim)


def own_memory(level: VmapInterpreter, wrapper: WrapperTensor, new: Tensor, alone: bool) -> WrapperTensor:
    """What ``write_in_place`` writes to: ``wrapper``, or a copy of it that has room for the batch that ``new`` has."""
    if wrapper.bdim is None and level.owns(new) and new.bdim is not None:
        value = materialize(wrapper.value, None, level.batch_size)
        return level.batched(value.clone(memory_format=torch.contiguous_format), 0)
    return wrapper if alone else level.batched(wrapper.value.clone(), wrapper.bdim)


OWN_MEMORY[VmapInterpreter] = own_memory
