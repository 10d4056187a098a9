"""Forward mode: an interpreter that carries a tangent beside each value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import call_below
from functrans.core.dispatch import lower, unwrap
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, carried_as, wrap
from functrans.decompositions.table import decompose, decomposition
from functrans.derivatives.helpers import cast
from functrans.derivatives.named import no_cotangent
from functrans.derivatives.table import DERIVATIVES, NO_TANGENT, Derivative
from functrans.errors import DerivativeEntryError
from functrans.interpreters.constants import constants
from functrans.interpreters.fitting import described, expect_tangent, spec
from functrans.interpreters.jvp.fallback import borrow
from functrans.interpreters.jvp.programs import run_program
from functrans.interpreters.own_methods import overrides
from functrans.interpreters.own_results import fitting_tangents, looked_at
from functrans.operators.info import DIFFERENTIABLE, OpInfo, op_info, specialized_here
from functrans.operators.rules import RuleTable, place_in
from functrans.operators.scopes import SCOPES
from functrans.programs.fusible import by_our_rules
from functrans.pytorch.torch_private import OpOverload, is_forward_enabled
from functrans.tensors.broadcasting import same_shape
from functrans.tensors.sparse import densified, has_sparse, in_layout_of

aten = torch.ops.aten

#: Operators that jvp treats in a way of its own: rule(interpreter, op, values, tangents, kwargs) -> output of this
#: level.
JVP_RULES: RuleTable[Callable[..., Any]] = RuleTable("jvp rules", cached=True)


class JvpInterpreter(Interpreter, whole=True):
    """Values with tangents; a tangent of None is a zero that is never computed with."""

    kind = "jvp"
    payload = ("tangent",)
    differentiates = True
    values_remain = True

    def __init_subclass__(cls, *, whole: bool = False) -> None:
        super().__init_subclass__(whole=whole)
        looked_at(cls, fitting_tangents)
        overrides(cls, JvpInterpreter, "dual", "constant")

    #: the tangents that it started from, where a transform has given them
    seeds: list[Tensor] | None = None

    def dual(self, value: Tensor, tangent: Tensor | None) -> WrapperTensor:
        """A wrapper for ``value`` with ``tangent``, of its shape and dtype (None: zeros), both of a level below.

        What is neither floating-point nor complex has no tangent.
        """
        wrapper = wrap(self, value)
        wrapper.tangent = tangent if value.dtype in DIFFERENTIABLE else None
        return wrapper

    def merge_payload(
        self, merged: WrapperTensor, old: WrapperTensor, merge: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        if old.tangent is not None:
            new = merged.tangent
            if new is None:  # a tangent of zeros, which takes over the history of the old one all the same
                new = lower(self, aten.zeros_like.default, (old.tangent,), {})
            merged.tangent = merge(old.tangent, new)

    def describe(self, wrapper: WrapperTensor) -> str:
        return "constant" if wrapper._tangent is None else ""

    def parts(self, wrapper: WrapperTensor) -> dict[str, Any]:
        return {} if wrapper._tangent is None else {"tangent": wrapper._tangent}

    def rule_place(self, op: Any) -> str | None:
        return place_in(op, JVP_RULES, DERIVATIVES)

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known: OpInfo = op._functrans  # type: ignore[attr-defined]
        if known.program:
            return run_program(self, op, args)  # type: ignore[arg-type]
        values, below_kwargs, tangents = unwrap(self, op, args, kwargs)
        if not tangents or not is_forward_enabled():
            return constants(self, lower(self, op, values, below_kwargs))
        specialized = known.specialized if not SCOPES else specialized_here(known)
        try:
            method = specialized[JvpInterpreter]
        except KeyError:
            method = choose_method(op, known)
            if known.settled or method not in (decompose, borrow):  # PyTorch may say otherwise tomorrow
                specialized[JvpInterpreter] = method
        if method is decompose:
            return decompose(self, op, args, kwargs)
        return method(self, op, values, below_kwargs, tangents)


carried_as("tangent", pending=True)


@JVP_RULES.register(aten.detach.default, aten.detach_copy.default)
def detach(self: JvpInterpreter, op: OpOverload, values: Any, kwargs: Any, tangents: Any) -> Any:
    """The constant that ``detach`` makes, at this level and at every level below."""
    return self.constant(lower(self, op, values, kwargs))


def choose_method(op: OpOverload, known: OpInfo) -> Callable[..., Any]:
    rule = JVP_RULES.get(op)
    if rule is not None:
        return rule
    entry = DERIVATIVES.get(op)
    if entry is not None and entry.tangent == NO_TANGENT:
        return run_constant
    if entry is not None and entry.tangent is not None:
        return TableMethod(entry, known)
    return decompose if known.composite or decomposition(op) is not None else borrow


def run_constant(self: JvpInterpreter, op: OpOverload, values: Any, kwargs: Any, tangents: Any) -> Any:
    """Run an operator whose outputs do not depend differentiably on its arguments."""
    return constants(self, lower(self, op, values, kwargs))


#: Views whose strides have to fit, and what does the same to a tangent, whose strides may be others than its primal's
#: (and which may be coalesced where that is not).
COPYING: dict[OpOverload, OpOverload] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
    aten._coalesce.default: aten.coalesce.default,
}

#: Where a formula's parameter comes from, beside the arguments' positions.
GIVEN, RESULT, MOVED = -1, -2, -3


def with_tangents(self: JvpInterpreter, out: Any, tangents: Any) -> Any:
    """An operator's output as wrappers of this level."""
    if isinstance(out, Tensor):
        return self.dual(out, tangents)
    pairs = [
        self.dual(o, t) if isinstance(o, Tensor) else o
        for o, t in zip(out, tangents if tangents is not None else [None] * len(out), strict=True)
    ]
    return pairs if type(out) is list else tuple(pairs)


def unrecorded(found: Any, given: list[Any]) -> Any:
    """Under no_grad, a tangent that a formula passes on as it is must not bring its derivative along."""
    if isinstance(found, Tensor):
        return found.clone() if any(found is t for t in given) else found
    return type(found)(unrecorded(f, given) for f in found) if isinstance(found, list | tuple) else found


def fall_back(self: JvpInterpreter, op: OpOverload, values: Any, kwargs: Any, tangents: Any) -> Any:
    """Run an operator whose entry says nothing of some argument that has a tangent."""
    if not op_info(op).composite and decomposition(op) is None:
        return borrow(self, op, values, kwargs, tangents)

    names = op_info(op).arguments
    given = [duals(self, value, tangents.get(i)) for i, value in enumerate(values)]
    by_keyword = {name: duals(self, value, tangents.get(names.index(name))) for name, value in kwargs.items()}
    return decompose(self, op, given, by_keyword)


def duals(self: JvpInterpreter, value: Any, tangent: Any) -> Any:
    """``value`` with ``tangent``, or each of a list with its own."""
    if isinstance(value, list | tuple) and tangent is not None:
        return [duals(self, v, t) for v, t in zip(value, tangent, strict=True)]
    return value if tangent is None else self.dual(value, tangent)


class TableMethod:
    """Runs an operator and its tangent by its entry in the derivative table."""

    def __init__(self, entry: Derivative, known: OpInfo) -> None:
        self.entry = entry
        self.known = known
        self.tangent: Callable[..., Any] = self.elementwise if entry.tangent == "elementwise" else self.formula
        #: how the tangent is computed by operators sent down one by one, instead of plain ``torch`` code that runs one
        #: level down
        by_kind: dict[Any, Callable[..., Any]] = {"linear": self.linear, "multilinear": self.multilinear}
        self.direct = by_kind.get(entry.tangent)
        #: argument positions that an elementwise tangent may come from, each with its formula and where its parameters
        #: are found
        self.partial = {
            known.arguments.index(name): (formula, [self.where(need) for need in entry.needs[name]])
            for name, formula in entry.formulas.items()
        }
        #: where the parameters of a tangent formula are found
        self.picked = [self.where(need) for need in entry.needs["tangent"]] if callable(entry.tangent) else []
        #: whether the formulas are a user's: what they return is checked
        self.foreign = not by_our_rules(known.op)
        #: argument positions whose tangents the entry speaks of
        self.answered = frozenset(i for i, name in enumerate(known.arguments) if self.answers(name))

    def answers(self, name: str) -> bool:
        formula = self.entry.formulas.get(name)
        return (
            f"{name}_t" in self.entry.needs["tangent"] or formula is no_cotangent
            if callable(self.entry.tangent)
            else formula is not None
        )

    def __call__(self, interpreter: JvpInterpreter, op: OpOverload, values: Any, kwargs: Any, tangents: Any) -> Any:
        if not self.answered.issuperset(tangents):
            return fall_back(interpreter, op, values, kwargs, tangents)
        out = lower(interpreter, op, values, kwargs)
        if self.direct is not None:
            found = self.direct(interpreter, values, kwargs, tangents)
        else:
            given = values, kwargs, tangents, out
            try:
                found = call_below(interpreter, self.tangent, given, {}, (out, *tangents.values()))
            except RuntimeError:
                if not has_sparse(given):
                    raise
                found = call_below(interpreter, self.tangent_of_dense, given, {})  # see NOTE [Sparse operands]
        if not torch.is_grad_enabled():
            found = call_below(interpreter, unrecorded, (found, list(tangents.values())), {})
        if self.foreign:
            self.expect(out, found)
        return with_tangents(interpreter, out, found)

    def expect(self, out: Any, found: Any) -> None:
        """Refuse tangents that do not fit their outputs."""

        def refusal(got: str, wanted: str) -> Exception:
            return DerivativeEntryError(
                self.entry.op,
                f"registered at {DERIVATIVES.place(self.entry.op)} has a tangent formula that returned {got}; "
                f"expected {wanted}",
            )

        if isinstance(out, Tensor):
            expect_tangent(found, spec(out), refusal)
        elif found is not None:
            if type(found) not in (list, tuple) or len(found) != len(out):
                raise refusal(described(found), f"a tuple of {len(out)}, one for each output")
            for o, t in zip(out, found, strict=True):
                expect_tangent(t, spec(o), refusal)

    def where(self, need: str) -> int:
        """The position of an argument, GIVEN for the tangent, RESULT, or MOVED less the position of an argument whose
        tangent it is."""
        names = self.known.arguments
        if need == "grad":
            return GIVEN
        if need in names:
            return names.index(need)
        return MOVED - names.index(need[:-2]) if need.endswith("_t") and need[:-2] in names else RESULT

    def named(self, name: str, values: Any, kwargs: Any) -> Any:
        return self.at(self.known.arguments.index(name), values, kwargs)

    def at(self, i: int, values: Any, kwargs: Any) -> Any:
        return values[i] if i < len(values) else kwargs.get(self.known.arguments[i], self.known.defaults[i])

    def elementwise(self, values: Any, kwargs: Any, tangents: Any, out: Any) -> Any:
        total: Any = None
        dtype = out.dtype
        for position, t in tangents.items():
            formula, places = self.partial[position]
            if t.is_complex():
                t = t.conj()
            part = formula(*[t if i == GIVEN else out if i == RESULT else self.at(i, values, kwargs) for i in places])
            if part is None:
                continue
            if part.is_complex():
                part = part.conj()
            total = part if total is None else total + part
        if total is None:
            return None
        if len(values) > 1:
            if not same_shape(total.shape, out.shape):
                total = total.expand(out.shape)
            if total.layout is not out.layout:
                total = in_layout_of(total, out)
        return total if total.dtype is dtype else cast(total, dtype)

    def tangent_of_dense(self, values: Any, kwargs: Any, tangents: Any, out: Any) -> Any:
        found = self.tangent(*densified((values, kwargs, tangents, out)))
        return in_layout_of(found, out) if isinstance(found, Tensor) else found

    def linear(self, interpreter: JvpInterpreter, values: Any, kwargs: Any, tangents: Any) -> Any:
        """The operator of the tangents, zeros where there is none."""

        def or_zero(tangent: Tensor | None, value: Tensor) -> Tensor:
            return lower(interpreter, aten.zeros_like.default, (value,), {}) if tangent is None else tangent

        given = list(values)
        kwargs = dict(kwargs)
        names = self.known.arguments
        for i, name in enumerate(names):
            if name not in self.entry.formulas:
                continue
            t = tangents.get(i)
            value = self.named(name, values, kwargs)
            if isinstance(value, list | tuple):
                t = [or_zero(p, v) for p, v in zip(t or [None] * len(value), value, strict=True)]
            elif isinstance(value, Tensor):
                t = or_zero(t, value)
            elif value is not None:
                t = 0
            if i < len(given):
                given[i] = t
            elif value is not None:
                kwargs[name] = t
        return lower(interpreter, COPYING.get(self.entry.op, self.entry.op), given, kwargs)

    def multilinear(self, interpreter: JvpInterpreter, values: Any, kwargs: Any, tangents: Any) -> Any:
        """The sum of the operator with one argument after the other replaced by its tangent."""
        total: Any = None
        for position, t in tangents.items():
            given = list(values)
            if position >= len(given):
                part = lower(interpreter, self.entry.op, given, {**kwargs, self.known.arguments[position]: t})
            else:
                given[position] = t
                part = lower(interpreter, self.entry.op, given, kwargs)
            total = part if total is None else lower(interpreter, aten.add.Tensor, (total, part), {})
        return total

    def formula(self, values: Any, kwargs: Any, tangents: Any, out: Any) -> Any:
        picked = [
            out if i == RESULT else self.at(i, values, kwargs) if i >= 0 else tangents.get(MOVED - i)
            for i in self.picked
        ]
        found = self.entry.tangent(*picked)  # type: ignore[operator, misc]
        if self.foreign or found is None:
            return found
        if isinstance(out, Tensor):
            return found if found.dtype is out.dtype else cast(found, out.dtype)
        return [t if t is None or t.dtype is o.dtype else cast(t, o.dtype) for t, o in zip(found, out, strict=True)]
