"""torch.compile of programs that use transforms, and compiled functions inside of transforms.

NOTE [Compiled transforms]
Dynamo, which traces Python for torch.compile and torch.export, does not see how a transform works. What a transform
returns asks whether it is being traced (``is_dynamo_compiling``, which Dynamo answers itself), and if so calls
``TRACED``: for Dynamo a higher-order operator, whose meaning ``dynamo_variable`` hands over. It has the function traced
into a graph of its own, at the shapes that one example has, which makes all that the function captures (tensors of
closures, parameters, buffers) inputs of that graph; then it writes one call into the graph around it, that of the
transform proper on the function's graph. Whoever runs the graph around it, Python or AOTAutograd with its tracers,
thereby runs the transform as it is, with whatever stands in the graph inside: also transforms of the same kind.

Where that does not go (the function has effects, reads numbers, cannot be traced, or what is asked for is an error),
Dynamo breaks the graph, and the call takes place outside of it; under ``fullgraph=True``, that is Dynamo's error.

Inside of a running transform, a compiled function is run as it was written: the transform has to see its operators.
Both are connected when torch._dynamo is imported, which functrans itself never does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch import Tensor

from functrans.api.in_dims import check_inputs
from functrans.core.errors import Call
from functrans.core.thread_state import STATE
from functrans.core.torch_private import (
    HigherOrderOperator,
    dynamo_names,
    torch_pytree,
)

#: Transforms that are called with the function and its arguments at once.
AT_ONCE = ("jvp", "vjp")
#: Those that switch grad mode on for the function.
RECORDING = ("grad", "grad_and_value", "value_and_grad", "vjp", "jacrev", "hessian")


def transformed(
    transform: Callable[..., Any], func: Any, options: dict[str, Any], args: Any, kwargs: Any, tangents: Any = None
) -> Any:
    """The call that ``TRACED`` stands for."""
    if transform.__name__ not in AT_ONCE:
        return transform(func, **options)(*args, **kwargs)
    return transform(func, args, tangents, **options) if tangents is not None else transform(func, *args, **options)


class Traced(HigherOrderOperator):
    """The name under which Dynamo knows a call of a transform; called as any function, it is that call, untraced."""

    def __init__(self) -> None:
        super().__init__("functrans_transform")

    def __call__(self, *args: Any) -> Any:
        return transformed(*args)


TRACED: Any = Traced()


def call_with(func: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
    args, kwargs = torch_pytree.tree_unflatten(leaves, spec)
    return func(*args, **kwargs)


def example_of(x: Tensor, dim: int | None, differentiated: bool) -> Tensor:
    """What the function is to see of ``x`` while Dynamo traces it.

    If it requires grad, Dynamo writes an autograd.Function down as one, and not the operators of its forward.
    """
    if dim is not None:
        return x.select(dim, 0)
    if not differentiated or not (x.is_floating_point() or x.is_complex()):
        return x
    with torch.enable_grad():
        return x.detach().requires_grad_().clone()  # a leaf might not be written to


class Node:
    """One call of a transform in Dynamo's graph: what has to be known beside the tensors to run it."""

    def __init__(self, transform: Callable[..., Any], options: dict[str, Any], leaves: list[Any], spec: Any) -> None:
        self.transform = transform
        self.options = options
        #: leaves of args and kwargs, with HOLE where a tensor or a symbolic number goes
        self.leaves = leaves
        self.spec = spec
        self.tangents_spec: Any = None
        self.tangents: list[Any] = []
        #: what the function returns: HOLE where its graph has an output
        self.outputs: list[Any] = []
        self.out_spec: Any = None
        #: what the transform returns, known after it ran
        self.results: list[Any] = []
        self.result_spec: Any = None

    def target(self) -> Callable[..., Any]:
        """The function that stands in the graph: from the function's graph and tensors to tensors."""

        def call(graph: Callable[..., Any], *tensors: Any) -> tuple[Any, ...]:
            rest = iter(tensors)
            leaves, tangents = filled(self.leaves, rest), filled(self.tangents, rest)
            captured = tuple(rest)

            def func(*args: Any, **kwargs: Any) -> Any:
                given = self.spec.flatten_up_to((args, kwargs))
                seen = (x for x, own in zip(given, self.leaves, strict=True) if own is HOLE)
                out = filled(self.outputs, iter(graph(*seen, *captured)))
                return torch_pytree.tree_unflatten(out, self.out_spec)

            args, kwargs = torch_pytree.tree_unflatten(leaves, self.spec)
            extra = None if self.tangents_spec is None else torch_pytree.tree_unflatten(tangents, self.tangents_spec)
            result = transformed(self.transform, func, self.options, args, kwargs, extra)
            found, self.result_spec = torch_pytree.tree_flatten(result)
            self.results = [HOLE if isinstance(x, Tensor) else x for x in found]
            return tuple(x for x in found if isinstance(x, Tensor))

        call.__name__ = call.__qualname__ = f"functrans_{self.transform.__name__}"
        return call


HOLE: Any = type("Hole", (), {"__repr__": lambda self: "HOLE"})()


def filled(leaves: list[Any], values: Any) -> list[Any]:
    return [next(values) if x is HOLE else x for x in leaves]


def dims_of_example(transform: Callable[..., Any], options: dict[str, Any], args: Any, kwargs: Any) -> list[int | None]:
    """For each leaf of the arguments, the dimension in which the function sees one example of it."""
    rest = [None] * len(torch_pytree.tree_leaves(kwargs))
    if transform.__name__ != "vmap":
        return [None] * len(torch_pytree.tree_leaves(args)) + rest
    in_dims = options["in_dims"]
    leaves, dims, _, _ = check_inputs(Call("vmap", len, {"in_dims": in_dims}), in_dims, args)
    by_leaf = {id(x): d for x, d in zip(leaves, dims, strict=True) if isinstance(x, Tensor)}
    return [by_leaf.get(id(x)) for x in torch_pytree.tree_leaves(args)] + rest


def dynamo_variable(names: Any) -> type:
    """What Dynamo makes of ``TRACED``; the class is made here since its base is imported with Dynamo."""

    class Body(names.VariableTracker):
        """The function, called by leaves: those that are in the graph are given, the others are in place."""

        def __init__(self, func: Any, leaves: list[Any], spec: Any, **more: Any) -> None:
            super().__init__(**more)
            self.func, self.leaves, self.spec = func, leaves, spec

        def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            leaves = names.ListVariable(filled(self.leaves, iter(args)))
            return names.make_inlined(tx, call_with)(self.func, leaves, self.spec)

    class TracedVariable(names.TorchHigherOrderOperatorVariable):
        _HOP_NAME = "functrans_transform"

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            args, _ = names.LazyVariableTracker.realize_all((list(args), {}))
            transform = args[0].as_python_constant()
            try:
                return self.write(tx, transform, *args[1:])
            except names.TorchRuntimeError as error:
                broken(transform, error)
            except names.TorchDynamoException:
                raise
            except Exception as error:
                broken(transform, error)

        def write(self, tx: Any, transform: Any, func: Any, options: Any, args: Any, kwargs: Any, extra: Any = None) -> Any:
            if transform.__name__ == "vjp":
                broken(transform, "its pullback cannot leave Dynamo's graph")
            pair, spec = flat(tx, names.TupleVariable([args, kwargs]))
            node = Node(transform, options.as_python_constant(), [kept(x) for x in pair], spec.as_python_constant())
            given = [x for x, own in zip(pair, node.leaves, strict=True) if own is HOLE]
            if extra is not None:
                tangents, tangents_spec = flat(tx, extra)
                node.tangents, node.tangents_spec = [kept(x) for x in tangents], tangents_spec.as_python_constant()
                tangents = [x for x, own in zip(tangents, node.tangents, strict=True) if own is HOLE]
            else:
                tangents = []

            values = filled(node.leaves, (x.as_proxy().node.meta["example_value"] for x in given))
            dims = dims_of_example(transform, node.options, *torch_pytree.tree_unflatten(values, node.spec))
            with names.discard_graph_changes(tx):
                examples = [
                    names.wrap_fx_proxy(
                        tx,
                        tx.output.create_proxy(
                            "call_function", example_of, (x.as_proxy(), dim, transform.__name__ != "vmap"), {}
                        ),
                    )
                    if x.is_tensor()
                    else x
                    for x, dim in zip(
                        given, (d for d, own in zip(dims, node.leaves, strict=True) if own is HOLE), strict=True
                    )
                ]
            body = Body(func, [HOLE if own is HOLE else x for x, own in zip(pair, node.leaves, strict=True)], spec)
            (_, outputs), graph, captured = names.speculate_subgraph(
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
            node.outputs = [
                constant if masked else HOLE
                for constant, masked in zip(outputs.const_values, outputs.masks_to_filter_const_values, strict=True)
            ]
            node.out_spec = outputs.treespec.as_python_constant()
            name = tx.output.install_subgraph(
                "functrans_body", torch.fx.GraphModule(dict(tx.output.nn_modules), graph)
            )
            proxies = [x.as_proxy() for x in (*given, *tangents)]
            found = names.wrap_fx_proxy(
                tx,
                tx.output.create_proxy(
                    "call_function", node.target(), (names.make_attr(tx, name), *proxies, *captured), {}
                ),
            )
            results = iter(names.items(tx, found))
            leaves = [next(results) if x is HOLE else names.VariableTracker.build(tx, x) for x in node.results]
            spec = names.VariableTracker.build(tx, node.result_spec)
            return names.make_inlined(tx, torch_pytree.tree_unflatten)(names.ListVariable(leaves), spec)

    def flat(tx: Any, tree: Any) -> tuple[list[Any], Any]:
        leaves, spec = names.items(tx, names.make_inlined(tx, torch_pytree.tree_flatten)(tree))
        return names.LazyVariableTracker.realize_all(names.items(tx, leaves)), spec

    def kept(x: Any) -> Any:
        """What ``Node`` keeps of a leaf: a constant as it is, a hole for what is in the graph, else what it is to us."""
        if x.is_tensor() or isinstance(x, names.SymNodeVariable):
            return HOLE
        return x.as_python_constant() if x.is_python_constant() else OPAQUE

    def broken(transform: Any, reason: Any) -> None:
        names.unimplemented(
            gb_type="functrans transform outside of the graph",
            context=f"{transform.__name__}: {type(reason).__name__}",
            explanation=f"This call of functrans.{transform.__name__} cannot be written into a graph: {reason}",
            hints=["Without fullgraph=True, the call is run outside of the graph, with the results of the uncompiled program."],
            from_exc=reason if isinstance(reason, Exception) else None,
        )

    return TracedVariable


OPAQUE: Any = type("Opaque", (), {"__repr__": lambda self: "an object"})()


def connect() -> None:
    """Tell Dynamo, which has been imported, of transforms."""
    names = dynamo_names()
    names.operators[TRACED.__name__] = dynamo_variable(names)
    Traced.__call__ = names.disable(Traced.__call__)  # type: ignore[method-assign]
    original = names.eval_frame._callback_from_stance

    def callback_outside(callback: Any) -> Any:
        if STATE.top is None:
            return original(callback)
        count = names.set_fullgraph_compiled_frame_count  # fullgraph=True asks for one frame that was compiled
        if count is not None and count(1) < 0:
            count(-1)
        return None

    names.eval_frame._callback_from_stance = callback_outside


class WhenImported(MetaPathFinder):
    """Calls ``connect`` when Dynamo has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_connect(module: Any) -> None:
                execute(module)
                connect()

            spec.loader.exec_module = execute_and_connect  # type: ignore[method-assign]
        return spec


if "torch._dynamo" in sys.modules:
    connect()
else:
    sys.meta_path.insert(0, WhenImported())
