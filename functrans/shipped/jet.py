"""Taylor mode: all derivatives of a function along a curve, up to any order, in one pass.

A wrapper carries the derivatives x', x'', ... of its value along the curve. What an operator makes of them follows from
the derivative table (functrans/derivatives): a linear operator is applied to each; a multilinear one obeys Leibniz's
rule; for every other the table has the tangent y' as a function F(x, x', y), and the further derivatives of y are those
of F along the same curve, one order less (Griewank and Walther, Evaluating Derivatives, 2008, chapter 13). Where F
needs y, the derivatives of y are found one after the other. An operator that the table does not have is differentiated
by ``jvp`` in the place of F.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from functrans.api.checks import call_function, check_callable, check_dense
from functrans.api.transforms import jvp
from functrans.core.dispatch import map_tensors
from functrans.core.errors import Call, CallTypeError, CallValueError
from functrans.core.errors.wording import shown, what
from functrans.core.operators import DIFFERENTIABLE, op_info
from functrans.core.pytrees import tree_flatten, tree_unflatten
from functrans.core.rules import RuleTable
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import door_closed, lowered
from functrans.derivatives.table import NO_TANGENT
from functrans.extension.without_rule import as_function, passed
from functrans.functionalization.views import contents_of
from functrans.interpreters.jvp.interpreter import TableMethod
from functrans.shipped.by_derivatives import DerivativeInterpreter, DerivativeRule, value_of

aten = torch.ops.aten

#: A value's derivatives along the curve: the first, the second, ...; None is zero.
Terms = tuple[Tensor | None, ...]


def jet(
    f: Callable[..., Any], primals: Sequence[Tensor], series: Sequence[Sequence[Tensor]]
) -> tuple[Any, Any]:
    """The derivatives of ``f`` along a curve, up to any order.

    With curves x(t) whose values at t = 0 are ``primals`` and whose derivatives there are ``series``, it returns the
    value and the derivatives of f(x(t)) at t = 0. (Derivatives, not Taylor coefficients: the n-th is not divided by
    n!.)

    Args:
        f: takes tensors and returns a pytree.
        primals: the tensors that ``f`` takes, floating-point or complex.
        series: for each of them a list of its first, second, ... derivative, tensors of its shape and dtype; all lists
            of one length. The straight line through x along v is ``[v, zeros, zeros, ...]``.

    Returns:
        ``(value, series)``: in the place of each tensor of the value, ``series`` has the list of its derivatives. In
        the place of what has none (whole numbers, truth values, Python values) it has None.

    Raises:
        CallTypeError: a primal or a term is no tensor, or has no derivatives.
        CallValueError: the lists differ in length, are empty, or a term has another shape or dtype than its primal.

    Example:
        >>> import torch
        >>> from functrans import jet
        >>> x, one, zero = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.0)
        >>> jet(torch.exp, (x,), ([one, zero, zero],))
        (tensor(1.), [tensor(1.), tensor(1.), tensor(1.)])
    """
    check_callable("jet", f)
    call = Call("jet", f, {})
    order = check_series(call, primals, series)
    return run_jet(call, f, list(primals), [tuple(terms) for terms in series], order)


def check_series(call: Call, primals: Any, series: Any) -> int:
    """The order; everything fits."""
    for name, given in (("primals", primals), ("series", series)):
        if not isinstance(given, tuple | list) or not given:
            raise CallTypeError(call, f"{what(given)} as {name}", "a tuple with an entry for each argument")
    if len(primals) != len(series):
        raise CallValueError(call, f"{len(series)} lists in series for {len(primals)} primals", "one for each")
    for i, (x, terms) in enumerate(zip(primals, series, strict=True)):
        check_dense(call, f"primals[{i}]", x, "a floating-point or complex tensor", kinds="fc")
        if not isinstance(terms, tuple | list) or not terms or len(terms) != len(series[0]):
            got = f"{len(terms)} terms" if isinstance(terms, tuple | list) else what(terms)
            raise CallValueError(call, f"{got} as series[{i}]", "a list of terms, as many for each primal")
        for k, t in enumerate(terms):
            check_dense(call, f"series[{i}][{k}]", t)
            if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
                raise CallValueError(call, f"{shown(t)} as series[{i}][{k}]", f"one like its primal, {shown(x)}")
    return len(series[0])


def run_jet(call: Call | str, f: Callable[..., Any], primals: list[Tensor], series: list[Terms], order: int) -> Any:
    interpreter = JetInterpreter(order, f)
    entered: list[WrapperTensor] = []

    def body() -> tuple[Any, Any]:
        entered.extend(interpreter.carry(x, terms=terms) for x, terms in zip(primals, series, strict=True))
        leaves, spec = tree_flatten(call_function(call, f, tuple(entered), {}))
        with lowered(interpreter):
            pairs = [interpreter.value_and_terms(leaf) for leaf in leaves]
        return tree_unflatten(spec, [p[0] for p in pairs]), tree_unflatten(spec, [p[1] for p in pairs])

    out = run_transformed(interpreter, body)
    for wrapper, x in zip(entered, primals, strict=True):
        if wrapper.version:
            x.copy_(contents_of(wrapper).value)
    return out


class JetInterpreter(DerivativeInterpreter):
    """Values with their derivatives along a curve."""

    kind = "jet"
    payload = ("terms",)
    rules: ClassVar[Any] = RuleTable("jet rules", default=lambda interpreter, *call: derived(interpreter, *call))

    def __init__(self, order: int, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.order = order

    def details(self) -> list[str]:
        return [f"order={self.order}"]

    def with_terms(self, value: Any, terms: Sequence[Tensor | None]) -> WrapperTensor:
        """A wrapper for an operator's output, a constant if nothing of it moves."""
        moves = isinstance(value, Tensor) and value.dtype in DIFFERENTIABLE and any(t is not None for t in terms)
        return self.carry(value, terms=tuple(terms)) if moves else self.constant(value)

    def value_and_terms(self, leaf: Any) -> tuple[Any, list[Tensor] | None]:
        if not isinstance(leaf, Tensor):
            return leaf, None
        wrapper: Any = self.own(leaf)
        value, terms = wrapper.value, wrapper.terms or (None,) * self.order
        if value.dtype not in DIFFERENTIABLE:
            return value, None
        return value, [torch.zeros_like(value) if t is None else t for t in terms]


class ByTable(DerivativeRule):
    """The rule of an operator that the derivative table has."""

    def __init__(self, method: TableMethod) -> None:
        super().__init__(method)
        entry = method.entry
        kinds = {"linear": self.linear, "multilinear": self.multilinear}
        self.push = kinds.get(entry.tangent, self.by_formula) if isinstance(entry.tangent, str) else self.by_formula
        needs = entry.needs.get("tangent", ()) if callable(entry.tangent) else sum(entry.needs.values(), ())
        self.needs_result = "result" in needs or "results" in needs

    def __call__(self, jet: JetInterpreter, *args: Any, **kwargs: Any) -> Any:
        places = [*range(len(args)), *(op_info(self.op).arguments.index(name) for name in kwargs)]
        terms = {i: t for i, a in zip(places, (*args, *kwargs.values()), strict=True) if (t := terms_of(a)) is not None}
        constant = self.entry.tangent == NO_TANGENT
        if not constant and not self.method.answered.issuperset(terms):
            return derived(jet, self.op, args, kwargs)
        values, given = [value_of(a) for a in args], {name: value_of(a) for name, a in kwargs.items()}
        out = self.op(*values, **given)
        if constant:
            return map_tensors(jet.constant, out)
        several = isinstance(out, tuple | list)
        found = self.push(jet, values, given, terms, out)
        pairs = [
            jet.with_terms(o, t) if isinstance(o, Tensor) else o
            for o, t in zip(out if several else [out], found if several else [found], strict=True)
        ]
        return (pairs if type(out) is list else tuple(pairs)) if several else pairs[0]

    def at(self, terms: dict[int, Any], k: int) -> dict[int, Any]:
        """The k-th derivatives, counted from 0, of the arguments for which they are not zero."""
        found = {i: [None if t is None else t[k] for t in ts] if type(ts) is list else ts[k] for i, ts in terms.items()}
        return {i: t for i, t in found.items() if (any(p is not None for p in t) if type(t) is list else t is not None)}

    def linear(self, jet: JetInterpreter, values: Any, kwargs: Any, terms: dict[int, Any], out: Any) -> Any:
        found = []
        for k in range(jet.order):
            moving = self.at(terms, k)
            with door_closed():  # it sends operators down as a handler does
                new = self.method.linear(jet, values, kwargs, moving) if moving else None  # type: ignore[arg-type]
                found.append(new)
        if isinstance(out, tuple | list):
            return [[None if t is None else t[i] for t in found] for i in range(len(out))]
        return found

    def multilinear(self, jet: JetInterpreter, values: Any, kwargs: Any, terms: dict[int, Any], out: Any) -> Any:
        names = op_info(self.op).arguments
        found = []
        for n in range(1, jet.order + 1):
            total = None
            for orders in itertools.product(range(n + 1), repeat=len(terms)):
                parts = [None if k == 0 else ts[k - 1] for k, ts in zip(orders, terms.values(), strict=True)]
                if sum(orders) != n or any(k and p is None for k, p in zip(orders, parts, strict=True)):
                    continue
                args, given = list(values), dict(kwargs)
                for i, k, p in zip(terms, orders, parts, strict=True):
                    if k and i < len(args):
                        args[i] = p
                    elif k:
                        given[names[i]] = p
                ways = math.factorial(n) // math.prod(map(math.factorial, orders))
                part = self.op(*args, **given)
                part = part if ways == 1 else part * ways
                total = part if total is None else total + part
            found.append(total)
        return found

    def by_formula(self, jet: JetInterpreter, values: Any, kwargs: Any, terms: dict[int, Any], out: Any) -> Any:
        several = isinstance(out, tuple | list)
        outs = list(out) if several else [out]
        smooth = [i for i, o in enumerate(outs) if isinstance(o, Tensor) and o.dtype in DIFFERENTIABLE]
        moving = Moving(values, kwargs, terms, op_info(self.op).arguments)

        def rate(*tensors: Tensor) -> tuple[Tensor, ...]:
            """The tangent of the outputs, as a function of the arguments, their tangents and the outputs."""
            given, by_keyword, tangents = moving.put(tensors[: 2 * moving.count])
            results = list(outs)
            for i, y in zip(smooth, tensors[2 * moving.count :], strict=self.needs_result):
                results[i] = y
            pushed = self.method.tangent(given, by_keyword, tangents, tuple(results) if several else results[0])
            each = pushed if several and pushed is not None else [pushed] * len(outs)
            return tuple(torch.zeros_like(outs[i]) if each[i] is None else each[i] for i in smooth)

        found: list[Any] = [[None] * jet.order for _ in outs]
        pushed = along(rate, moving, [outs[i] for i in smooth] if self.needs_result else [], jet.order)
        for i, terms_out in zip(smooth, pushed, strict=True):
            found[i] = terms_out
        return found if several else found[0]


class Moving:
    """The arguments of an operator that move along the curve, as a flat list, and how they are put in their places."""

    def __init__(self, values: Sequence[Any], kwargs: dict[str, Any], terms: dict[int, Any], names: Sequence[str]):
        self.values = values
        self.kwargs = kwargs
        self.names = names
        #: by moving tensor: the argument's position, and its place in that if it is a list
        self.places: list[tuple[int, int | None]] = []
        self.tensors: list[Tensor] = []
        self.terms: list[Terms] = []
        for i, ts in terms.items():
            value = values[i] if i < len(values) else kwargs[names[i]]
            pairs = enumerate(ts) if type(ts) is list else [(None, ts)]
            for j, t in pairs:
                if t is not None:
                    self.places.append((i, j))
                    self.tensors.append(value if j is None else value[j])
                    self.terms.append(t)
        self.count = len(self.places)

    def put(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any], dict[int, Any]]:
        """The arguments with the first half of ``tensors`` in their places, and the second half as tangents."""
        values, kwargs = list(self.values), dict(self.kwargs)
        tangents: dict[int, Any] = {}
        for (i, j), x, t in zip(self.places, tensors[: self.count], tensors[self.count :], strict=True):
            at_keyword = i >= len(values)
            old = kwargs[self.names[i]] if at_keyword else values[i]
            if j is not None:
                tangents.setdefault(i, [None] * len(old))[j] = t
                old = list(old)
                old[j] = x
            else:
                tangents[i], old = t, x
            if at_keyword:
                kwargs[self.names[i]] = old
            else:
                values[i] = old
        return values, kwargs, tangents


def along(
    rate: Callable[..., tuple[Tensor, ...]], moving: Any, results: Sequence[Tensor], order: int
) -> list[list[Tensor | None]]:
    """The derivatives of y, whose first is ``rate(x, x', y)``, for each of its tensors; ``results``: y, if it is asked
    for.
    """
    first = [torch.zeros_like(x) if t[0] is None else t[0] for x, t in zip(moving.tensors, moving.terms, strict=True)]
    tensors = [*moving.tensors, *first, *results]
    found: list[list[Tensor | None]] = [[y] for y in rate(*tensors)]
    for n in range(2, order + 1) if results else [order] * (order > 1):
        # of order n - 1: the derivatives of y up to that are known, and more are not asked for
        series = [*(t[: n - 1] for t in moving.terms), *(t[1:n] for t in moving.terms)]
        series += [tuple(y) for y in found] if results else []
        _, higher = run_jet("jet(...)", rate, tensors, [padded(t, n - 1) for t in series], n - 1)
        for y, terms in zip(found, higher, strict=True):
            y[1:] = terms
    return found


def padded(terms: Terms, order: int) -> Terms:
    return (*terms, *[None] * (order - len(terms)))


def derived(interpreter: JetInterpreter, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator that the table does not have: its tangent by ``jvp``, and the derivatives of that."""
    f, carrying, values, rebuild = as_function(interpreter, op, args, kwargs)
    if not values:
        return passed(interpreter, op, args, kwargs)
    moving: Any = Straight(list(values), [x.terms for x in carrying])
    with lowered(interpreter):
        outs = f(*values)
        if not outs:
            return rebuild([])
        count = len(values)
        found = along(lambda *xs: jvp(f, xs[:count], xs[count:])[1], moving, [], interpreter.order)
    return rebuild([interpreter.with_terms(out, terms) for out, terms in zip(outs, found, strict=True)])


class Straight:
    """Tensors and their derivatives."""

    def __init__(self, tensors: list[Tensor], terms: list[Terms]) -> None:
        self.tensors = tensors
        self.terms = terms


def terms_of(a: Any) -> Any:
    """The derivatives of an argument: a tuple, a list of them for a list of tensors; None where nothing moves."""
    if isinstance(a, WrapperTensor):
        return a.terms if a.dtype in DIFFERENTIABLE else None
    if type(a) in (list, tuple) and any(isinstance(v, WrapperTensor) for v in a):
        found = [terms_of(v) for v in a]
        return found if any(t is not None for t in found) else None
    return None


@JetInterpreter.rules.register(aten.detach.default, aten.detach_copy.default)
def detach(jet: JetInterpreter, x: WrapperTensor) -> WrapperTensor:
    return jet.constant(x.value.detach())


JetInterpreter.rule_kind = ByTable
