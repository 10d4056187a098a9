"""What Dynamo is told of transforms, once torch._dynamo is imported: NOTE [Compiled transforms] in api/compiled.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import getitem, setitem
from typing import Any

import torch
from torch.autograd import Function

from functrans.api.compiled import (
    HOLE,
    OPAQUE,
    RECORDING,
    RETURNING,
    TRACED,
    UNTRACED,
    PullbackNode,
    Traced,
    TransformNode,
    Tree,
    Untraced,
    at,
    call_with,
    example_of,
    filled,
    holes,
    is_linear,
    is_scalar,
    put_at,
    sights,
)
from functrans.api.linear_functions import LinearFunction
from functrans.api.private_names import PAIRS
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.core.tensor import NOT_READ
from functrans.functionalization.scalar_index import SCALAR_INDICES
from functrans.pytorch.imports import when_imported
from functrans.pytorch.thread_state import STATE, Snapshot
from functrans.pytorch.torch_private import dynamo_names, run_as_written_while, run_untraced, torch_pytree


@contextmanager
def inside_of_a_transform(tx: Any) -> Iterator[None]:
    """While Dynamo traces the function of a transform."""
    output = tx.output
    before, create_proxy = getattr(output, "inside_of_a_transform", False), output.create_proxy

    def create(kind: str, target: Any, args: Any, *rest: Any, **more: Any) -> Any:
        for operator, dtypes, other in INDEXING:
            if target is operator and has_scalars(args[1], dtypes):
                target = other
        return create_proxy(kind, target, args, *rest, **more)

    output.inside_of_a_transform = True
    if not before:
        output.create_proxy = create
    try:
        yield
    finally:
        output.inside_of_a_transform = before
        if not before:
            del output.create_proxy


#: What would read tensors without dimensions of these dtypes, which examples have one each of, and what does not.
INDEXING: Any = ((getitem, SCALAR_INDICES, at), (setitem, NOT_READ, put_at))


def has_scalars(key: Any, dtypes: frozenset[torch.dtype]) -> bool:
    """Whether an index in Dynamo's graph has tensors without dimensions, of such a dtype."""
    keys = key if isinstance(key, tuple) else (key,)
    values = [i.node.meta.get("example_value") for i in keys if isinstance(i, torch.fx.Proxy)]
    return any(isinstance(x, torch.Tensor) and is_scalar(x, dtypes) for x in values)


def dynamo_variables(names: Any) -> tuple[type, type]:
    """What Dynamo makes of ``TRACED`` and ``UNTRACED``; the classes are made here since their base is Dynamo's."""

    class Body(names.VariableTracker):
        """The function, by leaves: those that are in the graph are given, the others are in place; it returns leaves.

        (What it returns is taken apart here, since Dynamo forgets what was written to it as it leaves the function.)
        """

        def __init__(self, func: Any, leaves: list[Any], spec: Any, **more: Any) -> None:
            super().__init__(**more)
            self.func, self.leaves, self.spec, self.results = func, leaves, spec, None

        def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            leaves = names.ListVariable(filled(self.leaves, iter(args)))
            out = names.make_inlined(tx, call_with)(self.func, leaves, self.spec)
            found, spec = names.items(tx, names.make_inlined(tx, torch_pytree.tree_flatten)(out))
            self.results = spec.as_python_constant()
            return found

    class TracedVariable(names.TorchHigherOrderOperatorVariable):
        _HOP_NAME = "functrans_transform"

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            transform = args[0].as_python_constant()
            with breaking(f"functrans.{transform.__name__}"):
                if transform.__name__ in RETURNING and tx.output.root_tx.f_code is transform.__code__:
                    raise NotImplementedError("The function that it returns would leave the graph.")
                return self.write(tx, transform, *names.LazyVariableTracker.realize_all(list(args[1:])))

        def write(self, tx: Any, transform: Any, func: Any, options: Any, args: Any, kwargs: Any, extra: Any) -> Any:
            arguments, leaves, spec = flat(tx, names.TupleVariable([args, kwargs]))
            tangents, tangent_leaves, _ = flat(tx, extra)
            chosen = options.as_python_constant()
            given = holes(arguments, leaves)
            values = arguments.filled(x.as_proxy().node.meta["example_value"] for x in given)
            seen, seen_spec = sights(transform, chosen, *values)
            node = TransformNode(transform, chosen, arguments, tangents, Tree(arguments.leaves, seen_spec))
            if seen_spec != arguments.spec:
                spec = names.VariableTracker.build(tx, seen_spec)
            with names.discard_graph_changes(tx):
                examples = [example(tx, x, *how) for x, how in zip(given, holes(arguments, seen), strict=True)]
            own = [HOLE if kept is HOLE else x for kept, x in zip(arguments.leaves, leaves, strict=True)]
            body = Body(func, own, spec)
            with inside_of_a_transform(tx):
                (_, found), graph, captured = names.speculate_subgraph(
                    tx,
                    body,
                    examples,
                    {},
                    self._HOP_NAME,
                    source_target=self.value,
                    enable_grad=True if transform.__name__ in RECORDING else None,
                    set_subgraph_inputs="manual",
                    should_flatten_outputs=True,
                )
            constants = zip(found.const_values, found.masks_to_filter_const_values, strict=True)
            outputs = Tree([x if masked else HOLE for x, masked in constants], body.results)
            target = node.target(torch.fx.GraphModule(dict(tx.output.nn_modules), graph), outputs)
            proxies = [x.as_proxy() for x in (*given, *holes(tangents, tangent_leaves))]
            return put(tx, node, target, (*proxies, *captured))

    class UntracedVariable(names.TorchHigherOrderOperatorVariable):
        _HOP_NAME = "functrans_untraced"

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            with breaking("a pullback"):
                raise NotImplementedError("It was made outside of the graph.")

    class PullbackVariable(names.VariableTracker):
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
                arguments, leaves, _ = flat(tx, names.TupleVariable([names.TupleVariable(list(args)), keywords]))
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
        spec = names.VariableTracker.build(tx, node.results.spec)
        return names.make_inlined(tx, torch_pytree.tree_unflatten)(names.ListVariable(leaves), spec)

    def forget_sizes_inside(tx: Any) -> None:
        """Sizes that depend on numbers, as of ``x[mask]``, need not be there in what the transform returns."""
        sizes = tx.output.shape_env
        sizes.ignorable_fresh_unbacked_symbols.extend(sizes.pending_fresh_unbacked_symbols)

    def example(tx: Any, x: Any, dim: int | None, moves: bool) -> Any:
        if not x.is_tensor():
            return x
        call = tx.output.create_proxy("call_function", example_of, (x.as_proxy(), dim, moves), {})
        return names.wrap_fx_proxy(tx, call)

    def flat(tx: Any, variable: Any) -> tuple[Tree, list[Any], Any]:
        """A variable's tree and its leaves, and Dynamo's variable for the structure."""
        leaves, spec = names.items(tx, names.make_inlined(tx, torch_pytree.tree_flatten)(variable))
        leaves = names.LazyVariableTracker.realize_all(names.items(tx, leaves))
        return Tree([kept(x) for x in leaves], spec.as_python_constant()), leaves, spec

    def kept(x: Any) -> Any:
        """What the tree keeps of a leaf: a hole if it is in the graph, a constant as it is, nothing of an object."""
        if x.is_tensor() or isinstance(x, names.SymNodeVariable):
            return HOLE
        return x.as_python_constant() if x.is_python_constant() else OPAQUE

    @contextmanager
    def breaking(what: str) -> Iterator[None]:
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
                    "Compile without fullgraph=True: the call then runs outside of the graph, with the same results."
                ],
                from_exc=error,
            )

    return TracedVariable, UntracedVariable


def follow_functions(names: Any) -> None:
    """Have Dynamo write a call of an ``autograd.Function`` with a forward mode, which it refuses to trace, as a node of
    the graph, inside of a transform, which knows what to do with it."""
    call_apply = names.AutogradFunctionVariable.call_apply

    def apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if not getattr(tx.output, "inside_of_a_transform", False) or self.fn_cls.jvp is Function.jvp:
            return call_apply(self, tx, args, kwargs)
        call = tx.output.create_proxy("call_function", self.fn_cls.apply, *names.proxy_args_kwargs(args, kwargs))
        return names.wrap_fx_proxy(tx, call)

    names.AutogradFunctionVariable.call_apply = apply


def connect() -> None:
    """Tell Dynamo, which has been imported, of transforms."""
    names = dynamo_names()
    operators: list[type] = [Traced, Untraced]
    for operator, name, variable in zip(operators, (TRACED.__name__, UNTRACED.__name__), dynamo_variables(names)):
        names.operators[name] = variable
        operator.__call__ = names.disable(operator.__call__)  # type: ignore[method-assign]
    follow_functions(names)
    for function in (Interpreter.__init__, Snapshot.__init__, Snapshot.restore, run_transformed):
        run_untraced(function)  # where a transform of somebody else's comes to it
    for _, answer in PAIRS:
        run_untraced(answer)  # a function that is traced gets examples, which are no wrappers
    run_as_written_while(lambda: STATE.top is not None)


when_imported("torch._dynamo", connect)
