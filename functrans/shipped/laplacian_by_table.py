"""What ``laplacian`` does with operators that are not pointwise, by the derivative table.

A linear operator is applied to value, slopes and bend. Of a multilinear one the bend has a product for each pair of its
factors, and so of what an equation defines (remainders.py). For every other operator first and second derivatives are
found by nested ``jvp``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.api.transforms import jvp
from functrans.api.vmap import vmap
from functrans.core.dispatch import lower, map_tensors
from functrans.derivatives.table import NO_TANGENT
from functrans.extension.without_rule import as_function, passed
from functrans.interpreters.jvp.interpreter import COPYING
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.specialized import rule_here
from functrans.operators.info import DIFFERENTIABLE, op_info
from functrans.pytorch.thread_state import door_closed, lowered
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.by_derivatives import DerivativeRule
from functrans.shipped.laplacian_level import LaplacianInterpreter
from functrans.shipped.remainders import Bound, Product, has_remainder, remainder, tangent_of
from functrans.tensors.pytrees import tree_map

aten = torch.ops.aten


class ByTable(DerivativeRule):
    """The rule of an operator that the derivative table has."""

    def __call__(self, level: LaplacianInterpreter, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        moving = [i for i, a in enumerate(args) if level.carries(a)]
        constant = self.entry.tangent == NO_TANGENT
        by_keyword = any(map(level.carries, kwargs.values()))
        if not constant and (by_keyword or not self.method.answered.issuperset(moving)):
            return derived(level, self.op, args, kwargs)
        values, given = [level.value_of(a) for a in args], {name: level.value_of(a) for name, a in kwargs.items()}
        if constant:
            return map_tensors(level.constant, lower(level, self.op, values, given))
        if has_remainder(self.op, 2):
            out = lower(level, self.op, values, given)
            known = remainder(self.op, values, given, out, 2)
            if known is not None:
                return by_remainder(level, self.method.tangent, args, values, given, moving, out, *known)
        if self.entry.tangent == "linear":
            return self.linear(level, args, values, given, moving)
        if self.entry.tangent == "multilinear":
            return self.multilinear(level, args, values, given, moving)
        if self.entry.tangent == "elementwise" and len(moving) == 1 and not values[moving[0]].is_complex():
            with lowered(level):
                return self.elementwise(level, args[moving[0]], values, given, moving[0])
        return derived(level, self.op, args, kwargs)

    def elementwise(self, level: LaplacianInterpreter, x: Any, values: Any, kwargs: Any, place: int) -> Any:
        """The derivatives, element by element, do not depend on the direction."""
        out = self.op(*values, **kwargs)
        if out.dtype not in DIFFERENTIABLE:
            return level.constant(out)
        value = x.value

        def slope(value: Tensor, out: Tensor) -> Tensor:
            given = [*values[:place], value, *values[place + 1 :]]
            found = self.method.tangent(given, kwargs, {place: torch.ones_like(value)}, out)
            return torch.zeros_like(out) if found is None else found

        first = slope(value, out)
        _, second = jvp(slope, (value, out), (torch.ones_like(value), first.expand_as(out)))
        bend = second * (x.slopes * x.slopes).sum(0)
        if x.bend is not None:
            bend = bend + first * x.bend
        ones = [1] * (out.dim() - value.dim())
        slopes = x.slopes.reshape(level.count, *ones, *value.shape) if ones else x.slopes
        return level.moving(out, first * slopes, bend)

    def linear(self, level: LaplacianInterpreter, args: Any, values: Any, kwargs: Any, moving: list[int]) -> Any:
        out = lower(level, self.op, values, kwargs)
        if moving == [0] and len(self.entry.formulas) == 1 and isinstance(out, Tensor):
            op, rest = COPYING.get(self.op, self.op), values[1:]
            slopes, dims = slopes_of(level, args[0], values[0])
            slopes = for_directions(level, op, [slopes, *rest], kwargs, [dims, *[None] * len(rest)])
            bend = bend_of(level, args[0], values[0])
            return level.moving(out, slopes, None if bend is None else lower(level, op, [bend, *rest], kwargs))

        def push(tangents: dict[int, Any]) -> Any:
            with door_closed():  # it sends operators down as a handler does
                return self.method.linear(level, values, kwargs, tangents)  # type: ignore[arg-type]

        given = {i: part_of(level, args[i], "slopes") for i in moving}
        with lowered(level):
            slopes = vmap(push, in_dims=(tree_map(lambda s: None if s is None else 0, given),))(given)
            bends = {i: part_of(level, args[i], "bend") for i in moving}
            bends = {i: b for i, b in bends.items() if b is not None}
            bend = push(bends) if bends else None
        if isinstance(out, Tensor):
            return level.moving(out, slopes, bend)
        each = zip(out, slopes, bend if bend is not None else [None] * len(out), strict=True)
        parts = [level.moving(*parts) for parts in each]
        return parts if type(out) is list else tuple(parts)

    def multilinear(self, level: LaplacianInterpreter, args: Any, values: Any, kwargs: Any, moving: list[int]) -> Any:
        def run(parts: dict[int, Any]) -> Any:
            return lower(level, self.op, [parts.get(i, v) for i, v in enumerate(values)], kwargs)

        def run_for_directions(places: tuple[int, ...]) -> Any:
            given = [args[i].slopes if i in places else v for i, v in enumerate(values)]
            dims = [0 if i in places else None for i in range(len(values))]
            return for_directions(level, self.op, given, kwargs, dims)

        def plus(a: Any, b: Any) -> Any:
            return b if a is None else lower(level, aten.add.Tensor, (a, b), {})

        out = run({})
        slopes = bend = None
        for i in moving:
            slopes = plus(slopes, run_for_directions((i,)))
            if args[i].bend is not None:
                bend = plus(bend, run({i: args[i].bend}))
        for pair in itertools.combinations(moving, 2):
            total = lower(level, aten.sum.dim_IntList, (run_for_directions(pair), [0]), {})
            bend = plus(bend, lower(level, aten.mul.Tensor, (total, 2), {}))
        return level.moving(out, slopes, bend)


def by_remainder(
    level: LaplacianInterpreter, tangent: Callable[..., Any], args: Sequence[Any], values: Sequence[Any],
    kwargs: dict[str, Any], moving: Sequence[int], out: Any, call: Bound, products: Sequence[Product],
) -> Any:  # fmt: skip
    """See NOTE [Remainders] in ``remainders``: the products of slopes are part of the bend."""
    names = list(call.args)
    several = isinstance(out, tuple | list)
    smooth = [n for n, o in enumerate(call.results) if isinstance(o, Tensor) and o.dtype in DIFFERENTIABLE]

    def push(tangents: dict[int, Any]) -> list[Any]:
        """The tangents of the results that have one."""
        found = tangent(values, kwargs, tangents, out)
        each = found if several and found is not None else [found] * len(call.results)
        return [torch.zeros_like(call.results[n]) if each[n] is None else each[n] for n in smooth]

    given = {i: part_of(level, args[i], "slopes") for i in moving}
    bends = {i: part_of(level, args[i], "bend") for i in moving}
    bends = {i: b for i, b in bends.items() if b is not None}
    with lowered(level):
        slopes = vmap(push, in_dims=(tree_map(lambda s: None if s is None else 0, given),))(given)
        known: dict[str | int, Any] = {names[i]: s for i, s in given.items() if isinstance(s, Tensor)}
        known.update(zip(smooth, slopes, strict=True))
        squares = vmap(functools.partial(sums, call, products))(known) if products else {}
        added = {into: 2 * t.sum(0) for into, t in squares.items()}
        for i, name in enumerate(names):
            if name in added:
                bends[i] = bends[i] + added[name] if i in bends else added[name]
        bent = push(bends) if bends else [None] * len(smooth)
        bent = [
            t if n not in added else added[n] if t is None else t + added[n] for n, t in zip(smooth, bent, strict=True)
        ]
    parts = [level.constant(o) if isinstance(o, Tensor) else o for o in call.results]
    for n, s, t in zip(smooth, slopes, bent, strict=True):
        parts[n] = level.moving(call.results[n], s, t)
    return (parts if type(out) is list else tuple(parts)) if several else parts[0]


def sums(call: Bound, products: Sequence[Product], slopes: dict[str | int, Tensor]) -> dict[str | int, Tensor]:
    """The products of one direction's slopes, by what they are added to."""
    found: dict[str | int, Tensor] = {}
    for into, one, other, of in products:
        if one in slopes and other in slopes:
            part = of(call, slopes[one], slopes[other])
            found[into] = found[into] + part if into in found else part
    return found


def for_directions(
    level: LaplacianInterpreter, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], dims: Sequence[Any]
) -> Any:
    """``op`` for each direction: these are in front of the result, and of the arguments whose entry in ``dims`` is 0.

    By one operator, if the batching rule says which.
    """
    rewrite = rule_here(op, op_info(op)).rewrite
    try:
        rewritten = None if rewrite is None else rewrite(dims, *args)
    except RuleDeclined:  # vmap has other ways
        rewritten = None
    if rewritten is not None:
        op_below, physical, bdim = rewritten
        out = lower(level, op_below, physical, kwargs)
        return out if bdim == 0 else lower(level, aten.movedim.int, (out, bdim, 0), {})
    with lowered(level):
        return vmap(lambda *args: op(*args, **kwargs), in_dims=tuple(dims))(*args)


def slopes_of(level: LaplacianInterpreter, a: Any, value: Any) -> tuple[Any, Any]:
    """The slopes of an argument, of a list for each, and where their directions are."""
    if not isinstance(a, list | tuple):
        return a.slopes, 0
    found = []
    for x, v in zip(a, value, strict=True):
        if level.carries(x):
            found.append(x.slopes)
        else:
            zeros = lower(level, aten.zeros_like.default, (v,), {})
            found.append(lower(level, aten.expand.default, (zeros, [level.count, *v.shape]), {}))
    return found, [0] * len(found)


def bend_of(level: LaplacianInterpreter, a: Any, value: Any) -> Any:
    """The bend of an argument; of a list a list, if one of it has some."""
    if not isinstance(a, list | tuple):
        return a.bend
    found = [x.bend if level.carries(x) else None for x in a]
    if all(b is None for b in found):
        return None
    zeros_like = aten.zeros_like.default
    return [lower(level, zeros_like, (v,), {}) if b is None else b for b, v in zip(found, value, strict=True)]


def part_of(level: LaplacianInterpreter, a: Any, name: str) -> Any:
    """Slopes or bend of an argument; of a list a list, if one of it has some."""
    if not isinstance(a, list | tuple):
        return getattr(a, name)
    found = [getattr(v, name) if level.owns(v) else None for v in a]
    return found if any(p is not None for p in found) else None


def derived(level: LaplacianInterpreter, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operator of which the table does not say enough: its derivatives by nested ``jvp``."""
    moving = [i for i, a in enumerate(args) if level.carries(a)]
    if has_remainder(op, 2) and moving and not any(map(level.carries, kwargs.values())):
        below, given = [level.value_of(a) for a in args], {name: level.value_of(a) for name, a in kwargs.items()}
        out = lower(level, op, below, given)
        known = remainder(op, below, given, out, 2)
        if known is not None:
            return by_remainder(level, tangent_of(op), args, below, given, moving, out, *known)
    f, carrying, values, rebuild = as_function(level, op, args, kwargs)
    if not values:
        return passed(level, op, args, kwargs)
    with lowered(level):
        outs = f(*values)
        if not outs:
            return rebuild([])

        def along(*directions: Tensor) -> tuple[Any, Any]:
            first = lambda *xs: jvp(f, xs, directions)[1]
            return jvp(first, values, directions)

        slopes, seconds = vmap(along)(*(x.slopes for x in carrying))
        bends = [second.sum(0) for second in seconds]
        if any(x.bend is not None for x in carrying):
            pushed = [torch.zeros_like(v) if x.bend is None else x.bend for x, v in zip(carrying, values, strict=True)]
            bends = [b + t for b, t in zip(bends, jvp(f, values, tuple(pushed))[1], strict=True)]
    return rebuild([level.moving(*parts) for parts in zip(outs, slopes, bends, strict=True)])


LaplacianInterpreter.rule_kind = ByTable
LaplacianInterpreter.derived = derived
