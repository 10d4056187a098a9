"""Reverse mode: an interpreter that records a tape, and the walk back along it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from functrans.core.described import given, shown
from functrans.core.dispatch import lower, map_tensors, start, unwrap
from functrans.core.errors import HookError, ModifiedError
from functrans.core.operators import DIFFERENTIABLE, Facts, plans_here
from functrans.core.rules import SCOPES, place_in
from functrans.core.stack import Interpreter
from functrans.core.tensor import WRAPPERS, WrapperTensor, carried_as, tensor_of, wrap
from functrans.core.thread_state import door_closed
from functrans.core.torch_private import OpOverload
from functrans.derivatives.table import DERIVATIVES
from functrans.interpreters.failures import explain_pull
from functrans.interpreters.fitting import described, spec
from functrans.interpreters.grad.plans import Plan, ProgramPlan, matrix_of
from functrans.interpreters.grad.programs import record_program
from functrans.interpreters.grad.recording import GRAD_RULES, WITHOUT_RULE, choose_method
from functrans.programs.admission import REAL
from functrans.programs.operators import operator_program

# A record of the tape: the plan that can pull back, the output slots, the input slots, what was saved.
Record = tuple[Any, Any, Any, Any]
SPENT: Record = (None, 0, (), None)


class GradInterpreter(Interpreter, whole=True):
    """Records what depends on the inputs; ``pull`` walks the tape backwards.

    A tracked wrapper has a *slot*, the number under which its cotangent is accumulated.
    """

    kind = "grad"
    payload = ("slot",)
    differentiates = True

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.tape: list[Record] = []
        self.slots = 0
        #: functions that see, and may replace, the cotangent of a slot
        self.hooks: dict[int, OrderedDict[int, Callable[..., Any]]] | None = None

    def constant(self, value: Tensor) -> WrapperTensor:
        wrapper = wrap(self, value)
        wrapper.slot = None
        return wrapper

    def is_constant(self, wrapper: WrapperTensor) -> bool:
        return wrapper.slot is None

    def track(self, value: Tensor) -> WrapperTensor:
        """A wrapper for ``value`` that the tape follows."""
        wrapper = wrap(self, value)
        self.slots += 1
        wrapper.slot = self.slots
        return wrapper

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        return everywhere or not recording

    def describe(self, wrapper: WrapperTensor) -> str:
        return "constant" if wrapper.slot is None else f"tracked, slot={wrapper.slot}"

    def details(self) -> list[str]:
        return [f"a tape of {len(self.tape)}"]

    def rule_place(self, op: Any) -> str | None:
        return place_in(op, GRAD_RULES, DERIVATIVES)

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known: Facts = op._functrans  # type: ignore[attr-defined]
        if known.program:
            return record_program(self, op, args)  # type: ignore[arg-type]
        values, below_kwargs, slots = unwrap(self, op, args, kwargs)
        if not slots or not torch.is_grad_enabled():
            return map_tensors(self.constant, lower(self, op, values, below_kwargs))
        plans = known.plans if not SCOPES else plans_here(known)
        try:
            method = plans[GradInterpreter]
        except KeyError:
            method = choose_method(op, known)
            if known.settled or method not in WITHOUT_RULE:
                plans[GradInterpreter] = method
        return method(self, op, (args, kwargs), values, below_kwargs, list(slots), list(slots.values()))

    def output(self, value: Tensor) -> WrapperTensor:
        """A tracked wrapper for an operator's output, or a constant if its dtype has no derivative."""
        return self.track(value) if value.dtype in DIFFERENTIABLE else self.constant(value)

    def records(self, wrapper: WrapperTensor) -> bool:
        return wrapper.slot is not None

    def add_hook(self, wrapper: WrapperTensor, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Run ``hook`` on the cotangent of a tracked ``wrapper``; what it returns, if not None, takes its place."""
        if self.hooks is None:
            self.hooks = {}
        hooks = self.hooks.setdefault(wrapper.slot, OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def hooked(self, slot: int, cotangent: Tensor) -> Tensor:
        cotangent = tensor_of(cotangent)
        for hook in list(self.hooks.get(slot, {}).values()) if self.hooks else ():
            new = hook(cotangent)
            if new is not None:
                if not isinstance(new, Tensor) or spec(new) != spec(cotangent):
                    raise HookError(hook, described(new), described(cotangent))
                cotangent = new
        return cotangent

    def record(self, plan: Any, outs: Any, ins: Any, saved: Any) -> None:
        self.tape.append((plan, outs, ins, saved))

    def rows_behind(self, slot: int, size: int, like: Tensor) -> tuple[Tensor, int, int] | None:
        """What the last steps to the vector ``slot`` make of the rows of the identity, without multiplying it out.

        Through pointwise steps a row of the identity stays a row of a diagonal matrix, and pulling that through the
        product of a matrix and a vector scales the matrix's rows. Returns these rows, the slot that they are
        cotangents of, and how much of the tape is left to be walked; None if the last step is of another kind.
        """
        if self.hooks is not None:
            return None
        with door_closed():
            diagonal: Any = torch.ones(size, dtype=like.dtype, device=like.device)
        end, found = len(self.tape), None
        while end:
            plan, outs, ins, saved = self.tape[end - 1]
            if type(outs) is int and outs != slot:
                end -= 1  # nothing of it reaches the slot
                continue
            if type(outs) is not int or len(ins) != 1 or type(ins[0]) is not int:
                break
            if type(plan) is ProgramPlan and len(saved) == len(plan.saves):
                diagonal = plan.pull(saved, diagonal)[0]
                if diagonal is None:
                    return None
                slot, end = ins[0], end - 1
                found = torch.diag_embed(tensor_of(diagonal))
                continue
            matrix = matrix_of(plan, saved, size)
            if matrix is not None:
                found = tensor_of(diagonal).unsqueeze(1) * matrix
                slot, end = ins[0], end - 1
            break
        return None if found is None else (found, slot, end)

    def pull(self, cotangents: dict[int, Tensor], *, consume: bool, end: int | None = None) -> dict[int, Tensor]:
        """Walk the tape backwards.

        Args:
            cotangents: by slot, the cotangents of the outputs.
            consume: drop each record once it is used.
            end: walk only so many records, the first ones; None: all.

        Returns:
            by slot, the cotangents of the inputs.
        """
        tape = self.tape
        for i in range((len(tape) if end is None else end) - 1, -1, -1):
            plan, outs, ins, saved = tape[i]
            grad: Any
            if type(outs) is int:
                grad = cotangents.pop(outs, None)
                if grad is None:
                    continue
                if self.hooks is not None:
                    grad = self.hooked(outs, grad)
            else:
                grad = [None if o is None else cotangents.pop(o, None) for o in outs]
                if all(g is None for g in grad):
                    continue
                if self.hooks is not None:
                    grad = [None if g is None else self.hooked(o, g) for o, g in zip(outs, grad, strict=True)]
            if type(plan) is not ProgramPlan:
                grad = tensor_of(grad) if type(outs) is int else [tensor_of(g) for g in grad]
            if consume:
                tape[i] = SPENT
            try:
                found = plan.pull(saved, grad)
            except Exception as error:
                explain_pull(error, self, plan.operator(saved), grad, isinstance(plan, Plan))
                raise
            for slot, cotangent in zip(ins, found, strict=True):
                if cotangent is None:
                    continue
                if type(slot) is int:
                    if slot in cotangents:
                        cotangent = total(cotangents[slot], cotangent)
                    cotangents[slot] = cotangent
                else:
                    for s, c in zip(slot, cotangent, strict=True):
                        if s is not None and c is not None:
                            cotangents[s] = total(cotangents[s], c) if s in cotangents else c
        cotangents = {slot: tensor_of(cotangent) for slot, cotangent in cotangents.items()}
        if self.hooks is not None:
            cotangents = {slot: self.hooked(slot, cotangent) for slot, cotangent in cotangents.items()}
        if consume:
            tape.clear()
        return cotangents

    def describe_tape(self) -> str:
        """The tape, a line for each record: the slots that it made, the operator, the slots that it took, and what it
        saved.

        Example:
            >>> import torch, functrans
            >>> from functrans.core.stack import interpreter_stack
            >>> def f(x):
            ...     y = torch.sin(x).sum()
            ...     print(interpreter_stack()[0].describe_tape())
            ...     return y
            >>> _ = functrans.grad(f)(torch.ones(3))
            2 = aten.sin.default(1), saved [float32[3]]
            3 = aten.sum.default(2), saved [float32[3]]
        """
        return "\n".join(
            "used"
            if plan is None
            else f"{shown(outs)} = {plan.operator(saved)}({given(ins, {})}), saved {shown(saved)}"
            for plan, outs, ins, saved in self.tape
        )

    def before_write(self, target: Tensor) -> None:
        for i, (plan, outs, ins, saved) in enumerate(self.tape):
            self.tape[i] = (plan, outs, ins, plan.protect(saved, target))

    def saved_versions(self) -> list[tuple[OpOverload, Tensor, int]]:
        """What the tape refers to, with version counters, so that a later use can tell whether it was modified."""
        found: list[tuple[OpOverload, Tensor, int]] = []
        for plan, _, _, saved in self.tape:
            for x in plan.saved_tensors(saved):
                if type(x) is WrapperTensor:
                    found.append((plan.op, x, x.version))
                elif not x.is_inference():
                    found.append((plan.op, x, x._version))
        return found


carried_as("slot")


def total(a: Any, b: Any) -> Any:
    """The sum of two cotangents of one value."""
    if (
        type(a) in WRAPPERS
        and type(b) in WRAPPERS
        and a.dtype is b.dtype
        and a.dtype in REAL
        and a.layout is b.layout is torch.strided
    ):
        program = operator_program(torch.ops.aten.add.Tensor)
        if program is not None:
            return start(program.inner, (a, b), {})
    return tensor_of(a) + tensor_of(b)


def check_versions(versions: list[tuple[OpOverload, Tensor, int]]) -> None:
    for op, x, version in versions:
        if (x.version if type(x) is WrapperTensor else x._version) != version:
            raise ModifiedError(op)
