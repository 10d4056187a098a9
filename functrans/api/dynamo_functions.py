"""While Dynamo traces the function of a transform: what it then writes otherwise, and effects of the function.

Imported when torch._dynamo has been.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import getitem, setitem
from typing import Any

import torch

from functrans.api.compiled import manner_of
from functrans.api.graph_nodes import Around
from functrans.api.in_graphs import at, function_applied, is_scalar, put_at
from functrans.core.tensor import NOT_READ
from functrans.functionalization.scalar_index import SCALAR_INDICES
from functrans.interpreters.function_context import overrides
from functrans.pytorch.dynamo import dynamo_names

names: Any = dynamo_names()


def transforms_around(tx: Any) -> list[Around]:
    """Those whose functions Dynamo is tracing, the outermost first."""
    return getattr(tx.output, "functrans_around", [])


def calls_written(tx: Any) -> int:
    """How many calls that ask the levels around them are in the graphs by now."""
    return getattr(tx.output, "functrans_calls", 0)


@contextmanager
def inside_of(tx: Any, transform: Around) -> Iterator[None]:
    """While Dynamo traces the function of a transform."""
    output = tx.output
    before, create_proxy = transforms_around(tx), output.create_proxy

    def create(kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        for operator, dtypes, other in INDEXING:
            if target is operator and has_scalars(args[1], dtypes):
                target = other
        if target is names.function_in_graph and "saved_for_backward_idx" in kwargs:  # from PyTorch 2.13 on
            target = function_applied
        return create_proxy(kind, target, args, kwargs, *rest, **more)

    output.functrans_around = [*before, transform]
    if not before:
        output.create_proxy = create
    try:
        yield
    finally:
        output.functrans_around = before
        if not before:
            del output.create_proxy


#: What would read tensors without dimensions of these dtypes, which examples have one each of, and what does not.
INDEXING: Any = ((getitem, SCALAR_INDICES, at), (setitem, NOT_READ, put_at))


def has_scalars(key: Any, dtypes: frozenset[torch.dtype]) -> bool:
    """Whether an index in Dynamo's graph has tensors without dimensions, of such a dtype."""
    keys = key if isinstance(key, tuple) else (key,)
    values = [i.node.meta.get("example_value") for i in keys if isinstance(i, torch.fx.Proxy)]
    return any(isinstance(x, torch.Tensor) and is_scalar(x, dtypes) for x in values)


class Effects:
    """What the function of a transform does to objects from outside of it, while Dynamo traces it.

    Of an operator's function, which others may run anew, Dynamo has none; a transform runs its function once. After
    it no object may keep a tensor of the function's graph.
    """

    def __init__(self, tracer: Any) -> None:
        self.tracer, self.scope = tracer, names.current_scope_id()
        self.changed: list[Any] = []

    def note(self, item: Any) -> None:
        if item.mutation_type.scope < self.scope:  # what is younger ends with the function
            self.changed.append(item)

    def check(self, attributes: Any) -> None:
        """Refuse that something from outside keeps a value of the transform; ``attributes``: those that were set."""
        visit = partial(self.visit, attributes, set())
        names.VariableTracker.visit(visit, self.changed)
        for item in self.changed:
            visit(item)

    def visit(self, attributes: Any, seen: set[int], x: Any) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if getattr(getattr(x, "proxy", None), "tracer", None) is self.tracer:
            if not isinstance(x, names.SymNodeVariable):
                raise NotImplementedError("Its function leaves a tensor in an object from outside of it.")
            x.proxy = self.outside(x.proxy.node)
        if x in attributes:
            names.VariableTracker.visit(partial(self.visit, attributes, seen), list(attributes[x].values()))

    def outside(self, node: Any) -> Any:
        """A number of the function's graph, such as a count, computed in the graph around it."""
        around = self.tracer.parent
        for outer, inner in self.tracer.lifted_freevars.items():
            if inner.node is node:
                return outer if outer.tracer is around else around.lifted_freevars[outer]
        if node.op != "call_function":
            raise NotImplementedError("Its function leaves a number of an example in an object from outside of it.")
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.outside)
        proxy = around.create_proxy("call_function", node.target, args, kwargs)
        names.set_example_value(proxy.node, node.meta["example_value"])
        return proxy


def effects_around(tx: Any) -> list[Effects]:
    """Those of the transforms whose functions Dynamo is tracing, with no other operator's function among them."""
    found = getattr(tx.output, "functrans_effects", [])
    return found if found and found[-1].tracer is tx.output.current_tracer else []


def may_have_effects(tx: Any, transform: Any, options: Any) -> bool:
    """Whether the function of a transform that is called now may have effects."""
    directly = tx.output.current_tracer.parent is None or bool(effects_around(tx))
    return directly and manner_of(transform).once and options.get("chunk_size") is None


@contextmanager
def with_effects(tx: Any) -> Iterator[None]:
    """While the function of such a transform is traced."""
    output = tx.output
    side_effects, outer = output.side_effects, getattr(output, "functrans_effects", [])
    refuse = side_effects.check_allowed_side_effect

    def check(item: Any) -> bool:
        around = effects_around(tx)
        if not around or item.mutation_type is None:
            return refuse(item)
        for effects in around:
            effects.note(item)
        return True

    output.functrans_effects = [*outer, Effects(output.current_tracer)]
    side_effects.check_allowed_side_effect = check
    try:
        yield
        output.functrans_effects[-1].check(side_effects.store_attr_mutations)
    finally:
        output.functrans_effects, side_effects.check_allowed_side_effect = outer, refuse


def follow_functions() -> None:
    """Have Dynamo write a call of an ``autograd.Function`` with a forward mode, which it refuses to trace, or a rule
    for vmap, which it forgets, as a node of the graph, inside of a transform, which knows what to do with it."""
    call_apply = names.AutogradFunctionVariable.call_apply

    def apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        kept = any(overrides(self.fn_cls, name) for name in ("jvp", "vmap"))
        if not transforms_around(tx) or not kept:
            return call_apply(self, tx, args, kwargs)
        call = tx.output.create_proxy("call_function", self.fn_cls.apply, *names.proxy_args_kwargs(args, kwargs))
        return names.wrap_fx_proxy(tx, call)

    names.AutogradFunctionVariable.call_apply = apply
