"""Reverse mode: an interpreter that records a tape, and the walk back along it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from functrans.decompositions import decompose
from functrans.derivatives.table import DERIVATIVES, NO_TANGENT, Derivative
from functrans.errors import ModifiedError
from functrans.native import run_recorded
from functrans.operators import Facts, facts
from functrans.rules import RuleTable
from functrans.stack import Interpreter
from functrans.tensor import WrapperTensor, lower, map_tensors, wrap
from functrans.torch_private import OpOverload

DIFFERENTIABLE = frozenset(
    d for d in vars(torch).values() if isinstance(d, torch.dtype) and (d.is_floating_point or d.is_complex)
)

#: Operators that grad treats in a way of its own: rule(interpreter, op, values, kwargs) -> output of this level.
GRAD_RULES: RuleTable[Callable[..., Any]] = RuleTable("grad rules")

# A record of the tape: the plan that can pull back, the output slots, the input slots, what was saved.
Record = tuple[Any, Any, Any, Any]
SPENT: Record = (None, 0, (), None)


class GradInterpreter(Interpreter):
    """Records what depends on the inputs; ``pull`` walks the tape backwards.

    A tracked wrapper has a *slot*, the number under which its cotangent is accumulated.
    """

    kind = "grad"
    payload = ("slot",)

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
        return "constant" if wrapper.slot is None else "tracked"

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        values: list[Any] = []
        places: list[int] = []
        slots: list[Any] = []
        for a in args:
            if type(a) is WrapperTensor:
                if a.interpreter is self:
                    slot = a.slot
                    if slot is not None:
                        places.append(len(values))
                        slots.append(slot)
                    a = a.value
            elif type(a) is list or type(a) is tuple:
                a, found = self._enter_list(a)
                if found is not None:
                    places.append(len(values))
                    slots.append(found)
            values.append(a)
        below_kwargs = self._enter_kwargs(op, kwargs, places, slots) if kwargs else kwargs
        if not places or not torch.is_grad_enabled():
            return map_tensors(self.constant, lower(self, op, values, below_kwargs))
        known: Facts = op._functrans  # type: ignore[attr-defined]
        try:
            method = known.plans[GradInterpreter]
        except KeyError:
            method = known.plans[GradInterpreter] = choose_method(op, known)
        return method(self, op, (args, kwargs), values, below_kwargs, places, slots)

    def _enter_list(self, items: Sequence[Any]) -> tuple[Any, list[int | None] | None]:
        """A list argument's values, and the slots of its tensors if one of them is tracked."""
        if not any(type(a) is WrapperTensor for a in items):
            return items, None
        mine = [type(a) is WrapperTensor and a.interpreter is self for a in items]
        slots = [a.slot if m else None for a, m in zip(items, mine, strict=True)]
        values = [a.value if m else a for a, m in zip(items, mine, strict=True)]
        return values, slots if any(s is not None for s in slots) else None

    def _enter_kwargs(self, op: OpOverload, kwargs: dict[str, Any], places: list[int], slots: list[Any]) -> dict[str, Any]:
        entered = {}
        for name, a in kwargs.items():
            if type(a) is WrapperTensor and a.interpreter is self:
                if a.slot is not None:
                    places.append(facts(op).arguments.index(name))
                    slots.append(a.slot)
                a = a.value
            elif type(a) is list or type(a) is tuple:
                a, found = self._enter_list(a)
                if found is not None:
                    places.append(facts(op).arguments.index(name))
                    slots.append(found)
            entered[name] = a
        return entered

    def output(self, value: Tensor) -> WrapperTensor:
        """A tracked wrapper for an operator's output, or a constant if its dtype has no derivative."""
        return self.track(value) if value.dtype in DIFFERENTIABLE else self.constant(value)

    def add_hook(self, slot: int, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Run ``hook`` on the cotangent of ``slot``; what it returns, if not None, takes its place."""
        if self.hooks is None:
            self.hooks = {}
        hooks = self.hooks.setdefault(slot, OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def hooked(self, slot: int, cotangent: Tensor) -> Tensor:
        for hook in list(self.hooks.get(slot, {}).values()) if self.hooks else ():
            new = hook(cotangent)
            cotangent = cotangent if new is None else new
        return cotangent

    def record(self, plan: Any, outs: Any, ins: Any, saved: Any) -> None:
        self.tape.append((plan, outs, ins, saved))

    def pull(self, cotangents: dict[int, Tensor], *, consume: bool) -> dict[int, Tensor]:
        """Walk the tape backwards.

        Args:
            cotangents: by slot, the cotangents of the outputs.
            consume: drop each record once it is used.

        Returns:
            by slot, the cotangents of the inputs.
        """
        tape = self.tape
        for i in range(len(tape) - 1, -1, -1):
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
            if consume:
                tape[i] = SPENT
            for slot, cotangent in zip(ins, plan.pull(saved, grad), strict=True):
                if cotangent is None:
                    continue
                if type(slot) is int:
                    if slot in cotangents:
                        cotangent = cotangents[slot] + cotangent
                    cotangents[slot] = cotangent
                else:
                    for s, c in zip(slot, cotangent, strict=True):
                        if s is not None and c is not None:
                            cotangents[s] = cotangents[s] + c if s in cotangents else c
        if self.hooks is not None:
            cotangents = {slot: self.hooked(slot, cotangent) for slot, cotangent in cotangents.items()}
        if consume:
            tape.clear()
        return cotangents

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


def check_versions(versions: list[tuple[OpOverload, Tensor, int]]) -> None:
    for op, x, version in versions:
        if (x.version if type(x) is WrapperTensor else x._version) != version:
            raise ModifiedError(op)


# --- how an operator on tracked values is recorded ------------------------------------------------------------------


def choose_method(op: OpOverload, known: Facts) -> Callable[..., Any]:
    rule = GRAD_RULES.get(op)
    if rule is not None:
        return lambda self, op, given, values, kwargs, places, slots: rule(self, op, values, kwargs)
    entry = DERIVATIVES.get(op)
    if entry is not None:
        return run_constant if entry.tangent == NO_TANGENT else TableMethod(entry, known)
    if known.composite:
        return take_apart
    return borrow


def run_constant(self: GradInterpreter, op: OpOverload, given: Any, values: Any, kwargs: Any, places: Any, slots: Any) -> Any:
    """Run an operator whose outputs do not depend differentiably on its arguments."""
    return map_tensors(self.constant, lower(self, op, values, kwargs))


def take_apart(self: GradInterpreter, op: OpOverload, given: Any, values: Any, kwargs: Any, places: Any, slots: Any) -> Any:
    """Run the pieces of a composite operator through this level again."""
    return decompose(self, op, *given)


class TableMethod:
    """Records an operator by its entry in the derivative table."""

    def __init__(self, entry: Derivative, known: Facts) -> None:
        self.entry = entry
        self.known = known
        self.plans: dict[Any, TablePlan | None] = {}
        #: whether arguments can be broadcast or promoted: not with one tensor and no number
        operands = [a for a in known.op._schema.arguments if "Tensor" in str(a.type) or "number" in str(a.type)]
        self.fixes = entry.broadcasts or (entry.pointwise and len(operands) > 1)

    def __call__(
        self, grad: GradInterpreter, op: OpOverload, given: Any, values: Any, kwargs: Any, places: list[int], slots: list[Any]
    ) -> Any:
        key = places[0] if len(places) == 1 else tuple(places)
        try:
            plan = self.plans[key]
        except KeyError:
            plan = self.plans[key] = self.make_plan(places)
        if plan is None:  # the table says nothing of some tracked argument
            fallback = take_apart if self.known.composite else borrow
            return fallback(grad, op, given, values, kwargs, places, slots)
        out = lower(grad, op, values, kwargs)
        outs: Any
        wrapped: Any
        if isinstance(out, Tensor):
            wrapped = wrap(grad, out)
            if out.dtype not in DIFFERENTIABLE:
                wrapped.slot = None
                return wrapped
            grad.slots = outs = wrapped.slot = grad.slots + 1
        else:
            wrapped = map_tensors(grad.output, out)
            outs = [getattr(w, "slot", None) for w in wrapped]
        if plan.last_save < len(values):
            saved = [values[i] for i in plan.saves]
        else:
            saved = [values[i] if i < len(values) else self.default(i, kwargs) for i in plan.saves]
        if plan.saves_result:
            saved.append(out)
        if self.fixes:
            shape, dtype = out.shape, out.dtype
            for p in places:
                v = values[p]
                saved.append(None if v.shape == shape and v.dtype is dtype else (v.shape, v.dtype))
        grad.tape.append((plan, outs, slots, saved))
        return wrapped

    def default(self, i: int, kwargs: dict[str, Any]) -> Any:
        return kwargs.get(self.known.arguments[i], self.known.defaults[i])

    def make_plan(self, places: list[int]) -> TablePlan | None:
        names = [self.known.arguments[p] for p in places]
        if any(n not in self.entry.formulas for n in names):
            return None
        return TablePlan(self.entry, self.known, names, self.fixes)


class TablePlan:
    """The formulas for one operator and one choice of tracked arguments, and what they need saved."""

    def __init__(self, entry: Derivative, known: Facts, names: list[str], fixes: bool) -> None:
        self.op = entry.op
        joint = entry.joint is not None and len(names) > 1
        formulas = ["joint"] if joint else names
        needed: list[str] = []
        for name in formulas:
            for need in entry.needs[name]:
                if need not in ("grad", "grads", "result", "results", "wanted") and need not in needed:
                    needed.append(need)
        #: positions of the arguments to save
        self.saves = [known.arguments.index(n) for n in needed]
        self.last_save = max(self.saves, default=-1)
        self.saves_result = any(n in ("result", "results") for name in formulas for n in entry.needs[name])
        place = {n: i for i, n in enumerate(needed)}
        place.update(grad=-1, grads=-1, result=len(needed), results=len(needed))
        if joint:
            self.pull = self.joint_pull(entry, names, place)  # type: ignore[method-assign, assignment]
        else:
            self.steps = [bind(entry.formulas[n], tuple(place[need] for need in entry.needs[n])) for n in names]
        #: where in what is saved the shapes and dtypes of arguments that were broadcast or promoted begin
        self.first_fix = len(needed) + self.saves_result if fixes else None

    def joint_pull(self, entry: Derivative, names: list[str], place: dict[str, int]) -> Callable[[list[Any], Any], list[Any]]:
        """``pull`` by one formula for all tracked arguments."""
        formula, wanted = entry.joint, tuple(names)
        picks = [None if need == "wanted" else place[need] for need in entry.needs["joint"]]

        def pull(saved: list[Any], grad: Any) -> list[Any]:
            found = formula(*[wanted if p is None else grad if p < 0 else saved[p] for p in picks])  # type: ignore[misc]
            return [found[n] for n in names]

        return pull

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        found = [step(grad, saved) for step in self.steps]
        if self.first_fix is not None:
            for i, fix in enumerate(saved[self.first_fix :]):
                if fix is not None and found[i] is not None:
                    found[i] = reduce_to(found[i], *fix)
        return found

    def protect(self, saved: list[Any], target: Tensor) -> list[Any]:
        return [snapshot(s, target) for s in saved]

    def saved_tensors(self, saved: list[Any]) -> list[Tensor]:
        return tensors_in(saved)


def bind(formula: Callable[..., Any], picks: tuple[int, ...]) -> Callable[[Any, list[Any]], Any]:
    """``formula`` as a function of the cotangent (-1 in ``picks``) and the list of what was saved."""
    if picks == (-1,):
        return lambda grad, saved: formula(grad)
    if len(picks) == 2 and picks[0] == -1:
        one = picks[1]
        return lambda grad, saved: formula(grad, saved[one])
    return lambda grad, saved: formula(*[grad if p < 0 else saved[p] for p in picks])


def reduce_to(cotangent: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Undo broadcasting and type promotion of a pointwise operator's argument."""
    if cotangent.shape != shape:
        cotangent = cotangent.sum_to_size(shape)
    if cotangent.dtype is not dtype:
        if cotangent.dtype.is_complex and not dtype.is_complex:
            cotangent = torch.real(cotangent)
        cotangent = cotangent.to(dtype)
    return cotangent


def snapshot(x: Any, target: Tensor) -> Any:
    """``x``, or a copy of it if it is ``target`` or shares its memory."""
    if type(x) in (list, tuple):
        return [snapshot(v, target) for v in x]
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return x
    if type(x) is WrapperTensor:
        if x is not target:
            return x
        return x.interpreter.rewrap(x, x.value)
    if type(target) is WrapperTensor or target.layout is not torch.strided:
        return x
    return x.clone() if x.untyped_storage()._cdata == target.untyped_storage()._cdata else x


def tensors_in(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for v in values:
        if isinstance(v, Tensor):
            found.append(v)
        elif type(v) in (list, tuple):
            found.extend(tensors_in(v))
    return found


def borrow(self: GradInterpreter, op: OpOverload, given: Any, values: Any, kwargs: Any, places: Any, slots: Any) -> Any:
    """Record ``op`` by PyTorch's own derivative."""
    wanted: list[int | None] = []

    def number(a: Any) -> None:
        if isinstance(a, Tensor):
            wanted.append(a.slot if type(a) is WrapperTensor and a.interpreter is self else None)
        elif type(a) in (list, tuple):
            for v in a:
                number(v)

    for a in (*given[0], *given[1].values()):
        number(a)
    out, linked, pullback = run_recorded(self, op, values, kwargs, lambda i: wanted[i] is not None)
    flags = iter(linked)
    wrapped = map_tensors(lambda o: self.track(o) if next(flags) else self.constant(o), out)
    outputs = [wrapped] if isinstance(wrapped, Tensor) else wrapped
    if any(linked):
        outs = [getattr(o, "slot", None) for o in outputs if isinstance(o, Tensor)]
        saved = BorrowedPullback(pullback, tensors_in(values), [False])
        self.record(BORROWED, outs, [w for w in wanted if w is not None], (op, saved))
    return wrapped


class BorrowedPullback:
    """A pullback that PyTorch keeps, with what it was made from."""

    def __init__(self, pullback: Callable[..., Any], inputs: list[Tensor], modified: list[bool]) -> None:
        self.pullback = pullback
        self.inputs = inputs
        self.modified = modified


class BorrowedPlan:
    op = "an operator by PyTorch's derivative"

    def pull(self, saved: tuple[OpOverload, BorrowedPullback], grad: Any) -> list[Any]:
        op, kept = saved
        if kept.modified[0]:
            raise ModifiedError(op)
        return kept.pullback(grad)

    def protect(self, saved: tuple[OpOverload, BorrowedPullback], target: Tensor) -> Any:
        kept = saved[1]
        if any(snapshot(x, target) is not x for x in kept.inputs):
            kept.modified[0] = True
        return saved

    def saved_tensors(self, saved: tuple[OpOverload, BorrowedPullback]) -> list[Tensor]:
        return saved[1].inputs


BORROWED = BorrowedPlan()


@GRAD_RULES.register(torch.ops.aten.detach.default)
def detach(self: GradInterpreter, op: OpOverload, values: Any, kwargs: Any) -> Any:
    """The constant that ``detach`` makes, at this level and at every level below."""
    return self.constant(lower(self, op, values, kwargs))
