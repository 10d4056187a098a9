"""The level at which the function of a ``jet`` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from functrans.api.checks import call_function
from functrans.core.dispatch import map_tensors
from functrans.core.stack import run_transformed
from functrans.core.tensor import PendingWrapper, WrapperTensor, tensor_of, wrap, wrap_like
from functrans.errors import Call
from functrans.functionalization.views import contents_of
from functrans.operators.info import DIFFERENTIABLE
from functrans.operators.rules import RuleTable
from functrans.programs.program import Program
from functrans.pytorch.thread_state import lowered
from functrans.shipped.by_derivatives import DerivativeInterpreter
from functrans.shipped.jet_programs import FIXED, NUMBER, coefficients
from functrans.tensors.pytrees import tree_flatten, tree_unflatten

#: A value's Taylor coefficients: the first, the second, ...; None is zero.
Terms = tuple[Tensor | None, ...]


class JetInterpreter(DerivativeInterpreter, whole=True):
    """Values with their Taylor coefficients along a curve."""

    kind = "jet"
    payload = ("terms",)
    rules: ClassVar[Any] = RuleTable("jet rules", default=lambda interpreter, *call: interpreter.derived(*call))
    #: what is done with an operator that the derivative table does not have; see jet_by_table.py
    derived: ClassVar[Callable[..., Any]]

    def __init__(self, order: int, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.order = order

    def details(self) -> list[str]:
        return [f"order={self.order}"]

    def with_terms(self, value: Any, terms: Sequence[Tensor | None]) -> WrapperTensor:
        """A wrapper for an operator's output, a constant if nothing of it moves."""
        wrapper = wrap(self, value)
        moves = value.dtype in DIFFERENTIABLE and any(t is not None for t in terms)
        wrapper.terms = tuple(terms) if moves else None
        return wrapper

    def entered(self, x: Tensor, terms: Terms) -> WrapperTensor:
        moves = any(t is not None for t in terms)
        return self.carry(x, terms=terms) if moves else self.constant(x)

    def value_and_terms(self, leaf: Any) -> tuple[Any, list[Tensor | None] | None]:
        if not isinstance(leaf, Tensor):
            return leaf, None
        wrapper: Any = self.own(leaf)
        if wrapper.value.dtype not in DIFFERENTIABLE:
            return wrapper.value, None
        return wrapper.value, list(wrapper.terms or (None,) * self.order)

    def run_program(self, program: Program, args: Sequence[Any], whole: bool = True) -> Any:
        values: list[Any] = []
        terms: list[Tensor] = []
        patterns: list[Any] = []
        for a in args:
            kind = type(a)
            if kind is WrapperTensor and a.interpreter is self:
                values.append(a._value)
                if a.terms is None:
                    patterns.append(FIXED)
                else:
                    patterns.append(tuple([t is not None for t in a.terms]))
                    terms.extend([t for t in a.terms if t is not None])
            else:
                values.append(a)
                patterns.append(FIXED if kind is PendingWrapper or isinstance(a, Tensor) else NUMBER)
        send = self.sender(whole)
        if not terms:
            return map_tensors(self.constant, send(program, values, {}))
        found = coefficients(program, tuple(patterns), self.order)
        if found is None:
            return NotImplemented
        outs = found.of(values + terms, send)
        like = self.model(args) if whole else None
        step = self.order + 1
        results = [self.result(outs[i], outs[i + 1 : i + step], like) for i in range(0, len(outs), step)]
        return results[0] if program.single else results

    def result(self, out: Any, terms: Sequence[Any], like: Any) -> WrapperTensor:
        """A program's output with its terms, which are broadcast and promoted as it is."""
        if like is not None:
            wrapper = wrap_like(self, out, like)
            found = tuple([tensor_of(t) for t in terms])
            wrapper.terms = found if any(t is not None for t in found) else None
            return wrapper
        out = tensor_of(out)
        return self.with_terms(out, [None if t is None else self.as_wide(tensor_of(t), out) for t in terms])


def run_jet(
    call: Call | str, f: Callable[..., Any], primals: Sequence[Tensor], terms: Sequence[Terms], order: int
) -> tuple[Any, list[Any]]:
    """The value of ``f``, and for each of its leaves the Taylor coefficients, by those of the arguments.

    None is a coefficient of zeros; in the place of a list it says that the leaf has none.
    """
    interpreter = JetInterpreter(order, f)
    entered: list[WrapperTensor] = []

    def body() -> tuple[Any, list[Any]]:
        entered.extend([interpreter.entered(x, ts) for x, ts in zip(primals, terms, strict=True)])
        leaves, spec = tree_flatten(call_function(call, f, tuple(entered), {}))
        with lowered(interpreter):
            pairs = [interpreter.value_and_terms(leaf) for leaf in leaves]
        return tree_unflatten(spec, [p[0] for p in pairs]), [p[1] for p in pairs]

    out = run_transformed(interpreter, body)
    for wrapper, x in zip(entered, primals, strict=True):
        if wrapper.version:
            x.copy_(contents_of(wrapper).value)
    return out
