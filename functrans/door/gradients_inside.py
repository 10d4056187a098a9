"""Gradients of what levels know, each by what its level is.

NOTE [Gradients inside]
A gradient of what levels know goes down the stack. Under vmap it is that of each example: of the whole batch, since the
examples do not depend on each other; by a tensor that they share, one example after the other. At a jvp level its
tangent is the gradient of the tangent. At a grad level it is differentiated in turn if that was asked for, by
``create_graph=True``: NOTE [Gradients of gradients on one tape]. Else it is a constant, at that level and at the grad
levels below, as a gradient without a graph is in PyTorch, which has one graph for all; tangents it has all the same.
What is left at the base is PyTorch's: a graph of captured tensors that require grad, or of leaves: NOTE [Leaves made
inside].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.core.dispatch import scan
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.errors import InsideTransformError
from functrans.interpreters.grad.again import CURE, pull_again, pull_to, record_gradients
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.own_methods import method_of
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.interpreters.vmap.table import materialize
from functrans.pytorch.thread_state import lowered, running_at


class How(NamedTuple):
    """How gradients are asked for.

    ``create``: with a graph. ``rows``: cotangents have a dimension in front, and so have the gradients.
    """

    create: bool
    rows: bool = False


def gradients(outs: list[Any], ins: list[Any], cotangents: list[Any], how: How) -> list[Any]:
    """The gradients for ``ins``, each of the level that knows most of it; None where nothing depends on it."""
    if not outs:
        return [None] * len(ins)
    level = scan([*outs, *ins, *cotangents])[0]
    if level is None:
        return at_the_base(outs, ins, cotangents, how)
    rule = next((RULES[kind] for kind in type(level).__mro__ if kind in RULES), constant_rule)
    with running_at(level):
        return rule(level, outs, ins, cotangents, how)


def constant_rule(level: Interpreter, outs: list[Any], ins: list[Any], cotangents: list[Any], how: How) -> list[Any]:
    """At a level of another kind, where it knows nothing of what the gradient is made of."""
    if not all(level.is_constant(x) for x in (*outs, *ins, *cotangents) if level.owns(x)):
        raise InsideTransformError("torch.autograd.grad", level.name, CURE)
    values, below, given = (values_at(level, xs) for xs in (outs, ins, cotangents))
    with lowered(level):
        found = gradients(values, below, given, how)
    return [None if g is None else level.constant(g) for g in found]


def at_the_base(outs: list[Tensor], ins: list[Tensor], cotangents: list[Any], how: How) -> list[Any]:
    recorded = [(o, c) for o, c in zip(outs, cotangents, strict=True) if o.requires_grad]
    places = [i for i, x in enumerate(ins) if x.requires_grad]
    results: list[Any] = [None] * len(ins)
    if recorded and places:
        found: Any
        options: Any = {"create_graph": how.create, "retain_graph": True, "allow_unused": True}
        given, wanted, seeds = [o for o, _ in recorded], [ins[i] for i in places], [c for _, c in recorded]
        with running_at(None):
            if how.rows:  # one by one: PyTorch would batch them by its own vmap
                each = [torch.autograd.grad(given, wanted, row, **options) for row in rows_of(seeds)]
                found = [joined(parts, len(seeds[0])) for parts in zip(*each, strict=True)]
            else:
                found = torch.autograd.grad(given, wanted, seeds, **options)
        for i, g in zip(places, found, strict=True):
            results[i] = g
    return results


def rows_of(seeds: list[Tensor]) -> list[list[Tensor]]:
    """The rows of cotangents; of none one of zeros, which says what has a gradient."""
    if not len(seeds[0]):
        return [[c.new_zeros(c.shape[1:]) for c in seeds]]
    return [list(row) for row in zip(*(c.unbind(0) for c in seeds), strict=True)]


def joined(parts: tuple[Any, ...], count: int) -> Tensor | None:
    """The gradients of ``count`` rows as one tensor."""
    return None if parts[0] is None else torch.stack(parts)[:count]


def over_rows(function: Callable[[list[Any]], list[Any]], cotangents: list[Any]) -> list[Any]:
    """``function`` of each row of the cotangents, for all of them at once: by a vmap on top of the level that runs."""
    level = VmapInterpreter(len(cotangents[0]), "same", function)

    def body() -> list[Any]:
        found = function([level.batched(c, 0) for c in cotangents])
        pairs = [(g.value, g.bdim) if level.owns(g) else (g, None) for g in found]
        with lowered(level):
            return [None if g is None else materialize(g, d, level.batch_size) for g, d in pairs]

    return run_transformed(level, body)


def values_at(level: Interpreter, xs: Iterable[Any]) -> list[Any]:
    """What ``xs`` are one level down."""
    return [level.value_of(x) for x in xs]


def added(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def vmap_rule(level: VmapInterpreter, outs: list[Any], ins: list[Any], cotangents: list[Any], how: How) -> list[Any]:
    if not any(bdim_at(level, x) is not None for x in (*outs, *ins)):
        return of_cotangents_alone(level, outs, ins, cotangents, how)
    pairs = list(zip(outs, cotangents, strict=True))
    own = [i for i, x in enumerate(ins) if bdim_at(level, x) is not None]
    common = [i for i, x in enumerate(ins) if bdim_at(level, x) is None]
    varying: list[tuple[Any, Any]] = []
    alike: list[tuple[Any, Any]] = []
    for o, c in pairs:
        both = bdim_at(level, o), bdim_at(level, c)
        (alike if both == (None, None) else varying).append((o, c))
    results: list[Any] = [None] * len(ins)
    with lowered(level):
        if own:  # which what has no batch cannot depend on
            batched = [(o, of_batch(level, c, o, how.rows)) for o, c in varying if bdim_at(level, o) is not None]
            given = values_at(level, [o for o, _ in batched]), values_at(level, [ins[i] for i in own])
            for i, g in zip(own, gradients(*given, [c for _, c in batched], how), strict=True):
                results[i] = None if g is None else level.batched(g, ins[i].bdim + how.rows)
        if common:
            below = values_at(level, [ins[i] for i in common])
            given = values_at(level, [o for o, _ in alike]), values_at(level, [c for _, c in alike])
            for i, g in zip(common, gradients(given[0], below, given[1], how), strict=True):
                results[i] = None if g is None else level.constant(g)
            values, of_each = values_at(level, [o for o, _ in varying]), []
            for k in range(level.batch_size if varying else 0):  # each has a gradient of its own by what they share
                of_each.append(gradients(values, below, [of_one(level, o, c, k, how.rows) for o, c in varying], how))
            for i, gs in zip(common, zip(*of_each, strict=True), strict=False):
                batch = None if gs[0] is None else level.batched(torch.stack(gs), 0)
                with running_at(level):
                    results[i] = added(results[i], batch)
    return results


def of_cotangents_alone(
    level: VmapInterpreter, outs: list[Any], ins: list[Any], cotangents: list[Any], how: How
) -> list[Any]:
    """Gradients of one graph for the cotangents of all examples: for so many rows."""
    values, below = values_at(level, outs), values_at(level, ins)
    with lowered(level):
        pairs = zip(values_at(level, cotangents), [bdim_at(level, c) for c in cotangents], strict=True)
        given = [materialize(c, d, level.batch_size) for c, d in pairs]
        if how.rows:
            sizes = given[0].shape[:2]
            given = [c.flatten(0, 1) for c in given]
        found = gradients(values, below, given, How(how.create, rows=True))
        if how.rows:
            found = [None if g is None else g.unflatten(0, sizes) for g in found]
    return [None if g is None else level.batched(g, 0) for g in found]


def bdim_at(level: VmapInterpreter, x: Any) -> int | None:
    return x.bdim if level.owns(x) else None


def of_batch(level: VmapInterpreter, c: Any, like: WrapperTensor, rows: bool = False) -> Tensor:
    """The cotangent ``c`` of ``like``, for the whole batch."""
    if level.owns(c):
        if c.bdim is not None:
            return c.value.movedim(c.bdim, like.bdim + rows)
        c = c.value
    return c.unsqueeze(like.bdim + rows).expand(*c.shape[:rows], *like.value.shape)


def of_one(level: VmapInterpreter, out: Any, c: Any, k: int, rows: bool) -> Tensor:
    """The cotangent of example ``k`` alone, for the batch if ``out`` has one."""
    if bdim_at(level, out) is None:
        return c.value.select(c.bdim, k)
    whole, dim = of_batch(level, c, out, rows), out.bdim + rows
    return torch.zeros_like(whole).select_scatter(whole.select(dim, k), dim, k)


def jvp_rule(level: JvpInterpreter, outs: list[Any], ins: list[Any], cotangents: list[Any], how: How) -> list[Any]:
    """The tangent of a gradient by ``z`` is the gradient of the tangent, less its part by the tangent of ``z``."""
    tangent_of = lambda x: x.tangent if level.owns(x) else None
    values, below, given = (values_at(level, xs) for xs in (outs, ins, cotangents))
    moving = [(tangent_of(o), c) for o, c in zip(outs, given, strict=True) if tangent_of(o) is not None]
    of_cotangents = [(o, tangent_of(c)) for o, c in zip(values, cotangents, strict=True) if tangent_of(c) is not None]
    if (moving or of_cotangents) and (level.seeds is None or any(t.requires_grad for t in level.seeds)):
        what = "torch.autograd.grad along tangents that are no constants"
        raise InsideTransformError(what, level.name, "the tangents' detach(), or functrans.grad")
    with lowered(level):
        primals = gradients(values, below, given, how)
        tangents: list[Any] = [None] * len(ins)
        for pairs in (moving, of_cotangents):
            if pairs:
                found = gradients([o for o, _ in pairs], below, [c for _, c in pairs], how)
                tangents = list(map(added, tangents, found))
        for i, (x, g) in enumerate(zip(ins, primals, strict=True)):
            t = tangent_of(x)
            if t is not None and g is not None:
                (own,) = gradients([t], [below[i]], [-g], how)
                tangents[i] = added(tangents[i], own)
    return [None if p is None else level.dual(p, t) for p, t in zip(primals, tangents, strict=True)]


def grad_rule(level: GradInterpreter, outs: list[Any], ins: list[Any], cotangents: list[Any], how: How) -> list[Any]:
    pairs = list(zip(outs, cotangents, strict=True))
    recorded = [(o, c) for o, c in pairs if level.index_of(o) is not None]
    moving = [c for o, c in pairs if level.index_of(c) is not None]
    if recorded and method_of(level, "pull") is not GradInterpreter.pull:
        raise InsideTransformError("torch.autograd.grad past a way back of its own", level.name, CURE)
    if not (how.create and (recorded or moving)):
        for x in (*(o for o, _ in recorded), *moving):
            for tracker in recording(x):
                tracker.detached = True
        return detached(level, recorded, outs, ins, cotangents, how)
    results: list[Any] = [None] * len(ins)
    own = [i for i, x in enumerate(ins) if level.index_of(x) is not None]
    further = [i for i, x in enumerate(ins) if level.index_of(x) is None]
    if recorded and own:
        again = lambda cs: pull_again(level, by_index(recorded, cs), [ins[i] for i in own])
        given = [c for _, c in recorded]
        for i, g in zip(own, over_rows(again, given) if how.rows else again(given), strict=True):
            results[i] = g
    if further:
        below = values_at(level, [ins[i] for i in further])
        ahead = lambda o, i, c: gradients(o, i, c, How(create=True))
        sorted_pairs = [*recorded, *((o, c) for o, c in pairs if level.index_of(o) is None)]
        roots, given = [o for o, _ in sorted_pairs], [c for _, c in sorted_pairs]
        record = lambda cs: record_gradients(level, ahead, roots, below, cs)
        for i, g in zip(further, one_by_one(record, given) if how.rows else record(given), strict=True):
            results[i] = g
    return results


def detached(
    level: GradInterpreter, recorded: list[Any], outs: list[Any], ins: list[Any], cotangents: list[Any], how: How
) -> list[Any]:
    """Gradients that are constants to ``level``; of what it records also to the levels below."""
    own = [i for i, x in enumerate(ins) if level.index_of(x) is not None]
    further = [i for i, x in enumerate(ins) if level.index_of(x) is None]
    if further and recorded and any((level.hooks or {}).values()):
        raise InsideTransformError("a gradient by what is not recorded, past a hook", level.name, CURE)
    results: list[Any] = [None] * len(ins)
    with lowered(level), torch.set_grad_enabled(torch.is_grad_enabled() and not recorded):
        if recorded and own:
            pull = lambda cs: pull_to(level, by_index(recorded, cs), [ins[i] for i in own])
            given = values_at(level, [c for _, c in recorded])
            for i, g in zip(own, over_rows(pull, given) if how.rows else pull(given), strict=True):
                results[i] = g
        if further:
            values, below, given = (values_at(level, xs) for xs in (outs, [ins[i] for i in further], cotangents))
            for i, g in zip(further, gradients(values, below, given, how), strict=True):
                results[i] = g
    return [None if g is None else level.constant(g) for g in results]


def recording(x: Any) -> Iterator[GradInterpreter]:
    """The levels that record ``x``."""
    while type(x) is WrapperTensor:
        if isinstance(x.interpreter, GradInterpreter) and x.tape_index is not None:
            yield x.interpreter
        x = x.value


def by_index(outs: list[tuple[Any, Any]], cotangents: list[Any]) -> dict[int, Any]:
    """The cotangents of tracked outputs, by their tape index."""
    found: dict[int, Any] = {}
    for (o, _), c in zip(outs, cotangents, strict=True):
        found[o.tape_index] = added(found.get(o.tape_index), c)
    return found


def one_by_one(function: Callable[[list[Any]], list[Any]], cotangents: list[Any]) -> list[Any]:
    """``function`` of each row of the cotangents, one after the other."""
    rows = [function([c[k] for c in cotangents]) for k in range(len(cotangents[0]))]
    return [None if gs[0] is None else torch.stack(gs) for gs in zip(*rows, strict=True)]


#: By kind of interpreter: from outputs, inputs and cotangents to gradients of that level.
RULES: dict[type[Interpreter], Callable[..., list[Any]]] = {
    VmapInterpreter: vmap_rule,
    JvpInterpreter: jvp_rule,
    GradInterpreter: grad_rule,
}
