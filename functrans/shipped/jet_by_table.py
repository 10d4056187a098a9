"""What ``jet`` does with operators that are not pointwise, by the derivative table.

A linear operator is applied to each coefficient; of a multilinear one each coefficient is a sum of products. For every
other the table has the tangent y' as a function F(x, x', y), and the coefficients of y are those of F along the same
curve, one order less (Griewank and Walther, Evaluating Derivatives, 2008, chapter 13). Where F needs y, they are found
one after the other. Of what an equation defines, each is one tangent (remainders.py). An operator that the table does
not have is differentiated by ``jvp`` in the place of F.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from functrans.api.transforms import jvp
from functrans.core.dispatch import lower, map_tensors
from functrans.core.tensor import WrapperTensor
from functrans.derivatives.table import NO_TANGENT
from functrans.extension.without_rule import as_function, passed
from functrans.interpreters.jvp.interpreter import COPYING, TableMethod
from functrans.operators.info import DIFFERENTIABLE, op_info
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.by_derivatives import DerivativeRule
from functrans.shipped.jet_level import JetInterpreter, Terms, run_jet
from functrans.shipped.remainders import Bound, Product, has_remainder, remainder, tangent_of

aten = torch.ops.aten

#: Operators that are products of the first two arguments, with the third added.
LAYERS = frozenset((aten.linear.default, aten.convolution.default))


class ByTable(DerivativeRule):
    """The rule of an operator that the derivative table has."""

    def __init__(self, method: TableMethod) -> None:
        super().__init__(method)
        entry = method.entry
        kinds = {"linear": self.linear, "multilinear": self.multilinear}
        self.push = kinds.get(entry.tangent, self.by_formula) if isinstance(entry.tangent, str) else self.by_formula
        if self.op in LAYERS and not method.foreign:
            self.push = self.layer
        needs = entry.needs.get("tangent", ()) if callable(entry.tangent) else sum(entry.needs.values(), ())
        self.needs_result = "result" in needs or "results" in needs
        #: of a linear operator with one differentiable argument: what is applied to the coefficients of that
        self.alone = COPYING.get(self.op, self.op) if len(entry.formulas) == 1 else None

    def __call__(self, jet: JetInterpreter, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        terms = {i: t for i, a in enumerate(args) if (t := terms_of(jet, a)) is not None}
        values = [jet.value_of(a) for a in args]
        if kwargs:
            names = op_info(self.op).arguments
            found = {names.index(name): terms_of(jet, a) for name, a in kwargs.items()}
            terms.update((i, t) for i, t in found.items() if t is not None)
        constant = self.entry.tangent == NO_TANGENT
        if not constant and not self.method.answered.issuperset(terms):
            return derived(jet, self.op, args, kwargs)
        given = {name: jet.value_of(a) for name, a in kwargs.items()}
        out = lower(jet, self.op, values, given)
        if constant or not terms:
            return map_tensors(jet.constant, out)
        known = remainder(self.op, values, given, out, jet.order)
        if known is not None:
            return by_remainder(jet, self.method.tangent, values, given, terms, out, *known)
        return with_terms(jet, out, self.push(jet, values, given, terms, out))

    def linear(self, jet: JetInterpreter, values: Any, kwargs: Any, terms: dict[int, Any], out: Any) -> Any:
        found: list[Any] = []
        if self.alone is not None and type(terms.get(0)) is tuple:
            rest = values[1:]
            found = [None if t is None else lower(jet, self.alone, [t, *rest], kwargs) for t in terms[0]]
        else:
            for k in range(jet.order):
                term: Any = None
                if moving := at(terms, k):
                    term = self.method.linear(jet, values, kwargs, moving)  # type: ignore[arg-type]
                found.append(term)
        if isinstance(out, tuple | list):
            return [[None if t is None else t[i] for t in found] for i in range(len(out))]
        return found

    def multilinear(self, jet: JetInterpreter, values: Any, kwargs: Any, terms: dict[int, Any], out: Any) -> Any:
        names = op_info(self.op).arguments
        found: list[Any] = []
        for products in ways(jet.order, len(terms)):
            total = None
            for orders in products:
                args, given = list(values), kwargs
                for i, k in zip(terms, orders, strict=True):
                    if k == 0:
                        continue
                    part = terms[i][k - 1]
                    if part is None:
                        break
                    if i < len(args):
                        args[i] = part
                    else:
                        given = {**given, names[i]: part}
                else:
                    part = lower(jet, self.op, args, given)
                    total = part if total is None else lower(jet, aten.add.Tensor, (total, part), {})
            found.append(total)
        return found

    def layer(self, jet: JetInterpreter, values: Any, kwargs: Any, terms: dict[int, Any], out: Any) -> Any:
        """A product and a bias, which the value has alone if it is fixed."""
        if 2 in terms:
            return self.by_formula(jet, values, kwargs, terms, out)
        return self.multilinear(jet, [*values[:2], None, *values[3:]], kwargs, terms, out)

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
        with lowered(jet):
            pushed = along(rate, moving, [outs[i] for i in smooth] if self.needs_result else [], jet.order)
        for i, terms_out in zip(smooth, pushed, strict=True):
            found[i] = terms_out
        return found if several else found[0]


def with_terms(jet: JetInterpreter, out: Any, terms: Any) -> Any:
    """What an operator returned, with the coefficients of it, of several outputs a list for each."""
    if not isinstance(out, tuple | list):
        return jet.with_terms(out, terms)
    pairs = [jet.with_terms(o, t) if isinstance(o, Tensor) else o for o, t in zip(out, terms, strict=True)]
    return pairs if type(out) is list else tuple(pairs)


def at(terms: dict[int, Any], k: int) -> dict[int, Any]:
    """The k-th coefficients, counted from 0, of the arguments for which they are not zero."""
    found = {i: [None if t is None else t[k] for t in ts] if type(ts) is list else ts[k] for i, ts in terms.items()}
    return {i: t for i, t in found.items() if (any(p is not None for p in t) if type(t) is list else t is not None)}


def by_remainder(
    jet: JetInterpreter, tangent: Callable[..., Any], values: Sequence[Any], kwargs: dict[str, Any],
    terms: dict[int, Any], out: Any, call: Bound, products: Sequence[Product],
) -> Any:  # fmt: skip
    """See NOTE [Remainders] in ``remainders``."""
    places = {name: i for i, name in enumerate(call.args)}
    several = isinstance(out, tuple | list)
    known: dict[str | int, list[Tensor | None]] = {n: [] for n in range(len(call.results))}
    known.update((name, terms[i]) for name, i in places.items() if i in terms)
    with lowered(jet):
        for k in range(1, jet.order + 1):
            added: dict[str | int, Tensor] = {}
            for product in products:
                for j in range(1, k):
                    a, b = (known.get(n, (None,) * k)[m - 1] for n, m in ((product.one, j), (product.other, k - j)))
                    if a is not None and b is not None:
                        part = product.of(call, a, b)
                        added[product.into] = added[product.into] + part if product.into in added else part
            moving = at(terms, k - 1)
            for name, i in places.items():
                if name in added:
                    moving[i] = moving[i] + added[name] if i in moving else added[name]
            pushed = tangent(values, kwargs, moving, out) if moving else None
            each = list(pushed) if several and pushed is not None else [pushed] * len(call.results)
            for n, t in enumerate(each):
                known[n].append(t if n not in added else added[n] if t is None else t + added[n])
    found = [known[n] for n in range(len(call.results))]
    return with_terms(jet, out, found if several else found[0])


@lru_cache
def ways(order: int, count: int) -> list[list[tuple[int, ...]]]:
    """For each coefficient up to an order, those of ``count`` factors whose products make it."""
    return [[ks for ks in itertools.product(range(n + 1), repeat=count) if sum(ks) == n] for n in range(1, order + 1)]


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
    """The coefficients of y, whose derivative is ``rate(x, x', y)``, for each of its tensors; ``results``: y, if it is
    asked for.
    """
    # x' = x₁ + 2·x₂·t + 3·x₃·t² + ...
    rates = [[t if t is None or k < 2 else t * k for k, t in enumerate(ts, 1)] for ts in moving.terms]
    first = [torch.zeros_like(x) if t[0] is None else t[0] for x, t in zip(moving.tensors, rates, strict=True)]
    tensors = [*moving.tensors, *first, *results]
    found: list[list[Tensor | None]] = [[y] for y in rate(*tensors)]
    for n in range(2, order + 1) if results else [order] * (order > 1):
        # of order n - 1: the coefficients of y up to that are known, and more are not asked for
        series: list[Any] = [*(t[: n - 1] for t in moving.terms), *(t[1:n] for t in rates), *found]
        _, higher = run_jet("jet(...)", rate, tensors, [tuple(ts) for ts in series[: len(tensors)]], n - 1)
        for y, ts in zip(found, higher, strict=True):
            y[1:] = [None if t is None else t / k for k, t in enumerate(ts or (), 2)] or [None] * (n - 1)
    return found


def derived(interpreter: JetInterpreter, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator that the table does not have: its tangent by ``jvp``, and the coefficients of that."""
    if has_remainder(op, interpreter.order):
        found = borrowed(interpreter, op, args, kwargs)
        if found is not None:
            return found
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


def borrowed(jet: JetInterpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """By the remainder and a tangent that the table does not have; None: the remainder is not known."""
    terms = {i: t for i, a in enumerate(args) if (t := terms_of(jet, a)) is not None}
    if not terms or any(terms_of(jet, a) is not None for a in kwargs.values()):
        return None
    values, given = [jet.value_of(a) for a in args], {name: jet.value_of(a) for name, a in kwargs.items()}
    out = lower(jet, op, values, given)
    known = remainder(op, values, given, out, jet.order)
    return None if known is None else by_remainder(jet, tangent_of(op), values, given, terms, out, *known)


class Straight:
    """Tensors and their coefficients."""

    def __init__(self, tensors: list[Tensor], terms: list[Terms]) -> None:
        self.tensors = tensors
        self.terms = terms


def terms_of(jet: JetInterpreter, a: Any) -> Any:
    """The coefficients of an argument: a tuple, a list of them for a list of tensors; None where nothing moves."""
    if type(a) is WrapperTensor:
        return a.terms if a.interpreter is jet and a.dtype in DIFFERENTIABLE else None
    if type(a) in (list, tuple):
        found = [terms_of(jet, v) for v in a]
        return found if any(t is not None for t in found) else None
    return None


JetInterpreter.rule_kind = ByTable
JetInterpreter.derived = derived
