"""What Dynamo makes of ``TRACED``, ``CALLED`` and ``UNTRACED``: NOTE [Compiled transforms] in api/compiled.py.

Imported when torch._dynamo has been, which the classes are made of.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from operator import getitem
from typing import Any

import torch

from functrans.api.compiled import CALLED, TRACED, UNTRACED, call_with, manner_of
from functrans.api.dynamo_functions import (
    calls_written,
    follow_functions,
    inside_of,
    may_have_effects,
    names,
    transforms_around,
    with_effects,
)
from functrans.api.graph_nodes import (
    HOLE,
    OPAQUE,
    Around,
    CalledNode,
    PullbackNode,
    TransformNode,
    Tree,
    filled,
    holes,
    is_linear,
    sights,
)
from functrans.api.in_graphs import example_of
from functrans.api.linear_functions import LinearFunction
from functrans.pytorch.torch_private import torch_pytree

Variable: Any = names.VariableTracker
Operator: Any = names.TorchHigherOrderOperatorVariable


def children_of(spec: Any) -> list[Any]:
    return list(spec.children()) if spec.num_children else []


def has_named_tuples(spec: Any) -> bool:
    return spec.type is namedtuple or any(map(has_named_tuples, children_of(spec)))


def rebuilt(tx: Any, spec: Any, leaves: Iterator[Any]) -> Any:
    """The tree of this structure, as Dynamo's variable."""
    if not has_named_tuples(spec):
        given = names.ListVariable(list(islice(leaves, spec.num_leaves)))
        return names.make_inlined(tx, torch_pytree.tree_unflatten)(given, names.VariableTracker.build(tx, spec))
    children = [rebuilt(tx, child, leaves) for child in children_of(spec)]
    if spec.type is namedtuple:  # of which Dynamo does not find out how it is rebuilt
        return names.VariableTracker.build(tx, spec.context).call_function(tx, children, {})
    alone = torch_pytree.TreeSpec(spec.type, spec.context, [torch_pytree.tree_structure(0) for _ in children])
    return rebuilt(tx, alone, iter(children))


class Body(Variable):
    """The function, by leaves: those that are in the graph are given, the others are in place; it returns leaves.

    (What it returns is taken apart here, since Dynamo forgets what was written to it as it leaves the function.)
    """

    def __init__(self, func: Any, leaves: list[Any], spec: Any, effects: bool, **more: Any) -> None:
        super().__init__(**more)
        self.func, self.leaves, self.spec, self.effects, self.results = func, leaves, spec, effects, None

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        with with_effects(tx) if self.effects else nullcontext():
            out = names.make_inlined(tx, call_with)(
                self.func, rebuilt(tx, self.spec, iter(filled(self.leaves, iter(args))))
            )
        found, spec = names.items(tx, names.make_inlined(tx, torch_pytree.tree_flatten)(out))
        self.results = spec.as_python_constant()
        return found


class TracedVariable(Operator):
    _HOP_NAME = "functrans_transform"

    def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        transform = args[0].as_python_constant()
        with breaking(f"functrans.{transform.__name__}"):
            if manner_of(transform).returns_function and tx.output.root_tx.f_code is transform.__code__:
                raise NotImplementedError("The function that it returns would leave the graph.")
            return self.write(tx, transform, *names.LazyVariableTracker.realize_all(list(args[1:])))

    def write(self, tx: Any, transform: Any, func: Any, options: Any, args: Any, kwargs: Any, extra: Any) -> Any:
        arguments, leaves = flat(tx, names.TupleVariable([args, kwargs]))
        tangents, tangent_leaves = flat(tx, extra)
        chosen = settled(tx, options)
        given = holes(arguments, leaves)
        values = arguments.filled(example_value(x) for x in given)
        seen, seen_spec = sights(transform, chosen, *values)
        node = TransformNode(transform, chosen, arguments, tangents, Tree(arguments.leaves, seen_spec))
        with names.discard_graph_changes(tx):
            examples = [example(tx, x, *how) for x, how in zip(given, holes(arguments, seen), strict=True)]
        own = [HOLE if kept is HOLE else x for kept, x in zip(arguments.leaves, leaves, strict=True)]
        body = Body(func, own, seen_spec, may_have_effects(tx, transform, chosen))
        calls = calls_written(tx)
        moved = tangents.filled(example_value(x) for x in holes(tangents, tangent_leaves))
        with inside_of(tx, Around(transform, chosen, values[0], values[1], moved)):
            (_, found), graph, captured = names.speculate_subgraph(
                tx,
                body,
                examples,
                {},
                self._HOP_NAME,
                source_target=self.value,
                enable_grad=True if manner_of(transform).records else None,
                restore_side_effects=not body.effects,
                set_subgraph_inputs="manual",
                should_flatten_outputs=True,
                supports_input_mutation=True,
                supports_aliasing=True,
            )
        constants = zip(found.const_values, found.masks_to_filter_const_values, strict=True)
        outputs = Tree([x if masked else HOLE for x, masked in constants], body.results)
        node.around = transforms_around(tx) if calls_written(tx) > calls else ()
        if node.around and manner_of(transform).returns_function:
            raise NotImplementedError("The function that it returns asks levels that run with the graph alone.")
        target = node.target(torch.fx.GraphModule(dict(tx.output.nn_modules), graph), outputs)
        proxies = [x.as_proxy() for x in (*given, *holes(tangents, tangent_leaves))]
        return put(tx, node, target, (*proxies, *captured))


class CalledVariable(Operator):
    _HOP_NAME = "functrans_called"

    def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        function = named(args[0])
        cure = "What it captures is no part of the graph: hand tensors in as arguments."
        with breaking(str(getattr(function, "__name__", function)), cure):
            arguments, leaves = flat(tx, names.TupleVariable(list(args[1:])))
            if any(x is OPAQUE for x in arguments.leaves):
                raise NotImplementedError("An argument is an object, and a graph holds tensors and constants.")
            node = CalledNode(function, arguments)
            node.around = transforms_around(tx)
            tx.output.functrans_calls = calls_written(tx) + 1
            return put(tx, node, node.target(), tuple(x.as_proxy() for x in holes(arguments, leaves)))


class UntracedVariable(Operator):
    _HOP_NAME = "functrans_untraced"

    def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        what, reason = (x.as_python_constant() for x in args[:2])
        with breaking(what):
            raise NotImplementedError(reason)


class PullbackVariable(Variable):
    """What vjp returns beside the value: an object that stays inside of the graph."""

    def __init__(self, proxy: Any, **more: Any) -> None:
        super().__init__(**more)
        self.proxy = proxy

    def as_proxy(self) -> Any:
        return self.proxy

    def python_type(self) -> type:
        return LinearFunction

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        with breaking("a pullback"):
            keywords = names.ConstDictVariable({names.ConstantVariable.create(k): v for k, v in kwargs.items()})
            arguments, leaves = flat(tx, names.TupleVariable([names.TupleVariable(list(args)), keywords]))
            node = PullbackNode(arguments)
            return put(tx, node, node.target(), (self.proxy, *(x.as_proxy() for x in holes(arguments, leaves))))


def put(tx: Any, node: Any, target: Any, args: tuple[Any, ...]) -> Any:
    """Write a call into the graph; what it returns, as Dynamo's variable."""
    call = tx.output.create_proxy("call_function", target, args, {})
    try:
        found = names.get_fake_value(call.node, tx)
    except names.TorchDynamoException:
        if node.failure is None:
            raise
        raise node.failure from None
    forget_sizes_inside(tx)
    names.set_example_value(call.node, found)
    variables = []
    for i, x in enumerate(found):
        proxy = tx.output.create_proxy("call_function", getitem, (call, i), {})
        if is_linear(x):
            proxy.node.meta["example_value"] = x
            variables.append(PullbackVariable(proxy))
        else:
            variables.append(names.wrap_fx_proxy(tx, proxy, example_value=x))
    rest = iter(variables)
    leaves = [next(rest) if x is HOLE else names.VariableTracker.build(tx, x) for x in node.results.leaves]
    return rebuilt(tx, node.results.spec, iter(leaves))


def named(variable: Any) -> Any:
    """The function, or object that is called as one, behind a variable, and behind the same name in other runs."""
    if not isinstance(variable, names.UserDefinedObjectVariable):
        return variable.as_python_constant()
    if variable.source is not None:
        names.install_guard(variable.source.make_guard(names.GuardBuilder.ID_MATCH))
    return variable.value


def example_value(x: Any) -> Any:
    return x.as_proxy().node.meta["example_value"]


def forget_sizes_inside(tx: Any) -> None:
    """Sizes that depend on numbers, as of ``x[mask]``, need not be there in what the transform returns."""
    sizes = tx.output.shape_env
    sizes.ignorable_fresh_unbacked_symbols.extend(sizes.pending_fresh_unbacked_symbols)


def example(tx: Any, x: Any, dim: int | None, moves: bool) -> Any:
    if not x.is_tensor():
        return x
    call = tx.output.create_proxy("call_function", example_of, (x.as_proxy(), dim, moves), {})
    return names.wrap_fx_proxy(tx, call)


def flat(tx: Any, variable: Any) -> tuple[Tree, list[Any]]:
    """A variable's tree and its leaves."""
    leaves, spec = names.items(tx, names.make_inlined(tx, torch_pytree.tree_flatten)(variable))
    leaves = names.LazyVariableTracker.realize_all(names.items(tx, leaves))
    return Tree([kept(x) for x in leaves], spec.as_python_constant()), leaves


def settled(tx: Any, variable: Any) -> Any:
    """A tree without tensors, for good: an int that Dynamo takes for one that changes is what it is now."""
    tree, leaves = flat(tx, variable)
    changing = (x.evaluate_expr(tx.output) for x in holes(tree, leaves))
    return tree.filled(changing)


def kept(x: Any) -> Any:
    """What the tree keeps of a leaf: a hole if it is in the graph, a constant as it is, nothing of an object."""
    if x.is_tensor() or isinstance(x, names.SymNodeVariable):
        return HOLE
    return x.as_python_constant() if x.is_python_constant() else OPAQUE


@contextmanager
def breaking(what: str, *hints: str) -> Iterator[None]:
    """What cannot be written into the graph breaks it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, names.TorchDynamoException) and not isinstance(error, names.fake_errors):
            raise
        names.unimplemented(
            gb_type="functrans call that does not go into a graph",
            context=f"{what}: {type(error).__name__}",
            explanation=f"This call of {what} cannot be written into a graph. {type(error).__name__}: {error}",
            hints=[
                *hints,
                "Compile without fullgraph=True: the call then runs outside of the graph, with the same results.",
            ],
            from_exc=error,
        )


for operator, variable in {TRACED: TracedVariable, CALLED: CalledVariable, UNTRACED: UntracedVariable}.items():
    names.operators[operator.__name__] = variable
    type(operator).__call__ = names.disable(type(operator).__call__)
follow_functions()
