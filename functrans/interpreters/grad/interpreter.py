"""Reverse mode: an interpreter that records a tape, and the walk back along it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from functrans.boundary.calls import start, through_door
from functrans.boundary.leftovers import suspended
from functrans.core.dispatch import lower, unwrap
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WRAPPERS, WrapperTensor, carried_as, tensor_of, wrap
from functrans.derivatives.table import DERIVATIVES
from functrans.errors import HookError, ModifiedError
from functrans.interpreters.constants import constants
from functrans.interpreters.failures import explain_pull
from functrans.interpreters.fitting import described, spec
from functrans.interpreters.grad.anomaly import check_numbers, checks_numbers
from functrans.interpreters.grad.grad_fn import grad_fn_of
from functrans.interpreters.grad.nodes import BackwardNode, ProgramNode, matrix_of
from functrans.interpreters.grad.noted_tape import new_tape
from functrans.interpreters.grad.programs import record_program
from functrans.interpreters.grad.recording import GRAD_RULES, WITHOUT_RULE, ByHooks, TableMethod, choose_method
from functrans.interpreters.hooks_below import hook_below
from functrans.interpreters.own_methods import method_of, overrides
from functrans.interpreters.own_results import fitting_cotangents, looked_at
from functrans.operators.info import DIFFERENTIABLE, OpInfo, specialized_here
from functrans.operators.rules import place_in
from functrans.operators.scopes import SCOPES
from functrans.programs.fusible import REAL
from functrans.programs.operators import operator_program
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import (
    OpOverload,
    autocast_enabled,
    autocast_off,
    mode_stack_size,
    pop_mode,
    push_mode,
)
from functrans.tensors.described import given, shown

# A record of the tape: the node that can pull back, the output indices, the input indices, what was saved.
Record = tuple[Any, Any, Any, Any]
SPENT: Record = (None, 0, (), None)


class GradInterpreter(Interpreter, whole=True):
    """Records what depends on the inputs; ``pull`` walks the tape backwards.

    A tracked wrapper has a *tape index*, the number under which its cotangent is accumulated.
    """

    kind = "grad"
    payload = ("tape_index",)
    differentiates = True
    values_remain = True

    #: whether a gradient of what it records was taken without a graph; see door/gradients_inside.py
    detached = False
    #: whether ``Tensor.backward()`` left its arguments without a ``.grad``
    passed_by = False
    #: how operators with an entry in the derivative table are recorded
    method_by_table: ClassVar[type[TableMethod]] = TableMethod

    def __init_subclass__(cls, *, whole: bool = False) -> None:
        super().__init_subclass__(whole=whole)
        looked_at(cls, fitting_cotangents)
        if overrides(cls, GradInterpreter, "track", "record", "constant"):
            cls.method_by_table = ByHooks

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.by_table = self.method_by_table  # asked for with every operator, and found sooner here
        self.tape: list[Record] = new_tape()
        self.last_index = 0
        #: functions that see, and may replace, the cotangent of an index
        self.hooks: dict[int, OrderedDict[int, Callable[..., Any]]] | None = None
        #: what is called when a walk back is over, and whether once only; it needs hooks, too
        self.finishing: list[tuple[Callable[[], Any], bool]] = []
        #: wrappers that keep their cotangent; they need hooks, which see it first
        self.retaining: list[WrapperTensor] = []

    def track(self, value: Tensor) -> WrapperTensor:
        """A wrapper for ``value``, of a level below, that the tape follows: with a tape index of its own."""
        wrapper = wrap(self, value)
        self.last_index += 1
        wrapper.tape_index = self.last_index
        return wrapper

    def index_of(self, x: Any) -> int | None:
        """The tape index of ``x``, whatever it is; None if it is not tracked here."""
        return x.tape_index if type(x) is WrapperTensor and x.interpreter is self else None

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        return everywhere or not recording

    def describe(self, wrapper: WrapperTensor) -> str:
        return "constant" if wrapper.tape_index is None else f"tracked, tape_index={wrapper.tape_index}"

    def details(self) -> list[str]:
        return [f"a tape of {len(self.tape)}"]

    def rule_place(self, op: Any) -> str | None:
        return place_in(op, GRAD_RULES, DERIVATIVES)

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known: OpInfo = op._functrans  # type: ignore[attr-defined]
        if known.program:
            return record_program(self, op, args)  # type: ignore[arg-type]
        values, below_kwargs, indices = unwrap(self, op, args, kwargs)
        if not indices or not torch.is_grad_enabled():
            return constants(self, lower(self, op, values, below_kwargs))
        specialized = known.specialized if not SCOPES else specialized_here(known)
        try:
            method = specialized[self.by_table]
        except KeyError:
            method = choose_method(op, known, self.by_table)
            if known.settled or method not in WITHOUT_RULE:
                specialized[self.by_table] = method
        return method(self, op, (args, kwargs), values, below_kwargs, list(indices), list(indices.values()))

    def output(self, value: Tensor) -> WrapperTensor:
        """A tracked wrapper for an operator's output, or a constant if its dtype has no derivative."""
        return self.track(value) if value.dtype in DIFFERENTIABLE else self.constant(value)

    def records(self, wrapper: WrapperTensor) -> bool:
        return wrapper.tape_index is not None

    def grad_fn(self, wrapper: WrapperTensor) -> Any:
        return wrapper.value.grad_fn if wrapper.tape_index is None else grad_fn_of(self, wrapper.tape_index)

    def computed(self, wrapper: WrapperTensor) -> bool:
        outputs = (outs if isinstance(outs, list) else [outs] for _, outs, _, _ in self.tape)
        return any(wrapper.tape_index in outs for outs in outputs)

    def add_hook(self, wrapper: WrapperTensor, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Run ``hook`` on the cotangent of a tracked ``wrapper``; what it returns, if not None, takes its place."""
        if wrapper.tape_index is None:
            return hook_below(self, wrapper, hook)
        if self.hooks is None:
            self.hooks = {}
        hooks = self.hooks.setdefault(wrapper.tape_index, OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def at_end(self, function: Callable[[], Any], *, once: bool = False) -> None:
        """Call ``function`` at the end of every walk back along the tape, or of the one that goes on."""
        self.hooks = self.hooks or {}
        self.finishing.append((function, once))

    def retain(self, wrapper: WrapperTensor) -> None:
        """Let a tracked ``wrapper`` keep its cotangent as ``wrapper.grad``; of one that is written, the last one's."""
        if not any(x is wrapper for x in self.retaining):
            self.hooks = self.hooks or {}
            self.retaining.append(wrapper)

    def hooked(self, index: int, cotangent: Tensor) -> Tensor:
        cotangent = tensor_of(cotangent)
        for hook in list(self.hooks.get(index, {}).values()) if self.hooks else ():
            with suspended(self):  # what it closes over is read one level down
                new = hook(cotangent)
            if new is not None:
                if not isinstance(new, Tensor) or spec(new) != spec(cotangent):
                    raise HookError(hook, described(new), described(cotangent))
                cotangent = new
        for wrapper in self.retaining:
            if wrapper.tape_index == index:
                kept = wrapper.__dict__.get("cotangent")
                wrapper.cotangent = cotangent if kept is None else kept + cotangent
        return cotangent

    def record(self, node: Any, outs: Any, ins: Any, saved: Any) -> None:
        """Add a record to the tape.

        Args:
            node: a ``BackwardNode``; its ``pull(saved, grad)`` returns a list with a cotangent, or None, for each of
                ``ins``.
            outs: the tape index of the output, or a list with one for each of several (None: not tracked); ``grad`` is
                the cotangent of it, or a list of them with None for those that nothing depends on.
            ins: a list of the tape indices of the tracked inputs.
            saved: a list of what ``node`` needs: values of the level below, or anything else. Tensors in it are copied
                before they are written.
        """
        self.tape.append((node, outs, ins, saved))

    def rows_behind(self, index: int, diagonal: Any) -> tuple[Tensor, int, int] | None:
        """What the last steps to the vector ``index`` make of the rows of the identity, without multiplying it out.

        ``diagonal``: the ones on the identity's diagonal.

        Through pointwise steps a row of the identity stays a row of a diagonal matrix, and pulling that through the
        product of a matrix and a vector scales the matrix's rows. Returns these rows, the index that they are
        cotangents of, and how much of the tape is left to be walked; None if the last step is of another kind.
        """
        if self.hooks is not None or checks_numbers() or method_of(self, "pull") is not GradInterpreter.pull:
            return None
        size = diagonal.shape[0]
        end, found = len(self.tape), None
        while end:
            node, outs, ins, saved = self.tape[end - 1]
            if type(outs) is int and outs != index:
                end -= 1  # nothing of it reaches the index
                continue
            if type(outs) is not int or len(ins) != 1 or type(ins[0]) is not int:
                break
            if type(node) is ProgramNode and len(saved) == len(node.saves):
                diagonal = node.pull(saved, diagonal)[0]
                if diagonal is None:
                    return None
                index, end = ins[0], end - 1
                found = torch.diag_embed(tensor_of(diagonal))
                continue
            matrix = matrix_of(node, saved, size)
            if matrix is not None:
                found = tensor_of(diagonal).unsqueeze(1) * matrix
                index, end = ins[0], end - 1
            break
        return None if found is None else (found, index, end)

    def pull(self, cotangents: dict[int, Tensor], *, consume: bool, end: int | None = None) -> dict[int, Tensor]:
        """Walk the tape backwards.

        Args:
            cotangents: by index, the cotangents of the outputs.
            consume: drop each record once it is used.
            end: walk only so many records, the first ones; None: all.

        Returns:
            by index, the cotangents of the inputs.
        """
        if autocast_enabled():  # formulas work in the dtypes that it chose before
            with autocast_off():
                return self.pull(cotangents, consume=consume, end=end)
        tape = self.tape
        checking = checks_numbers()
        door: Any = None  # taken off PyTorch's mode stack while programs follow each other
        top = STATE.top
        closes = self.hooks is None and not checking and top is not None and top.watcher is None
        closes = closes and mode_stack_size() == STATE.door_depth
        try:
            for i in range((len(tape) if end is None else end) - 1, -1, -1):
                node, outs, ins, saved = tape[i]
                if type(node) is ProgramNode:
                    if closes and door is None:
                        door = pop_mode(None)
                elif door is not None:
                    door = push_mode(door)
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
                if type(node) is not ProgramNode:
                    grad = tensor_of(grad) if type(outs) is int else [tensor_of(g) for g in grad]
                if consume:
                    tape[i] = SPENT
                try:
                    found = node.pull(saved, grad)
                except Exception as error:
                    formula = isinstance(node, BackwardNode)
                    explain_pull(error, self, node.operator(saved), grad, formula, node.rule_place(saved))
                    raise
                if checking:
                    check_numbers(self, tape, i, node.operator(saved), found)
                for index, cotangent in zip(ins, found, strict=True):
                    if cotangent is None:
                        continue
                    if type(index) is int:
                        if index in cotangents:
                            cotangent = total(cotangents[index], cotangent)
                        cotangents[index] = cotangent
                    else:
                        for s, c in zip(index, cotangent, strict=True):
                            if s is not None and c is not None:
                                cotangents[s] = total(cotangents[s], c) if s in cotangents else c
        finally:
            if door is not None:
                push_mode(door)
        node = None  # for who asks from here on which record is pulled back through: see extension/provenance.py
        cotangents = {index: tensor_of(cotangent) for index, cotangent in cotangents.items()}
        if self.hooks is not None:
            cotangents = {index: self.hooked(index, cotangent) for index, cotangent in cotangents.items()}
            for function, _ in list(self.finishing):
                function()
            self.finishing = [entry for entry in self.finishing if not entry[1]]
        if consume:
            tape.clear()
        return cotangents

    def describe_tape(self) -> str:
        """The tape, a line for each record: the indices that it made, the operator, the indices that it took, and what
        it saved.

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
            if node is None
            else f"{shown(outs)} = {node.operator(saved)}({given(ins, {})}), saved {shown(saved)}"
            for node, outs, ins, saved in self.tape
        )

    def before_write(self, target: Tensor) -> None:
        for i, (node, outs, ins, saved) in enumerate(self.tape):
            self.tape[i] = (node, outs, ins, node.protect(saved, target))

    def saved_versions(self) -> list[tuple[OpOverload, Tensor, int]]:
        """What the tape refers to, with version counters, so that a later use can tell whether it was modified."""
        found: list[tuple[OpOverload, Tensor, int]] = []
        for node, _, _, saved in self.tape:
            for x in node.saved_tensors(saved):
                if type(x) is WrapperTensor:
                    found.append((node.op, x, x.version))
                elif not x.is_inference():
                    found.append((node.op, x, x._version))
        return found


carried_as("tape_index")


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
    if STATE.top is None and type(a) is type(b) is Tensor:  # what is frequent, in one step
        return torch.add(a, b)
    return through_door(torch.add, tensor_of(a), tensor_of(b))


def check_versions(versions: list[tuple[OpOverload, Tensor, int]]) -> None:
    for op, x, version in versions:
        if (x.version if type(x) is WrapperTensor else x._version) != version:
            raise ModifiedError(op)
