"""``make_trace``: the pure program that is left of a function and its transforms, as Python."""

from __future__ import annotations

import functools
import keyword
import math
import operator
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.api.checks import call_function, check_callable, check_dense
from functrans.api.functionalize import functionalize
from functrans.errors import CallError, InsideTransformError
from functrans.errors.call_sites import TORCH
from functrans.errors.wording import callable_name, what
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.described import shown
from functrans.tensors.pytrees import tree_flatten, tree_unflatten

#: What is Python by its repr.
WRITTEN = (int, float, str, type(None), torch.dtype, torch.layout, torch.memory_format)
#: Captured tensors of up to so many numbers are written down as numbers.
FEW = 16


class Trace:
    """A program of operators on plain tensors, for arguments of one kind.

    Attributes:
        source: the program as Python. It defines a function of the tensors among the arguments, in order, and of what
            is ``captured``, by name; it returns the list of tensors among the results.
        captured: tensors that the function used without being given them, by name; those of a few numbers are in the
            source.
        graph: the program as a ``torch.fx.Graph``.
    """

    def __init__(self, name: str, graph: Any, held: Any, given: Any, out: Any) -> None:
        self.name = name
        self.graph = graph
        self._leaves, self._spec = given
        self._out_leaves, self._out_spec = out
        writer = Writer(name, graph, held)
        self.source = writer.source
        self.captured = writer.captured
        scope: dict[str, Any] = {}
        exec(compile(self.source, f"<trace of {name}>", "exec"), scope)  # noqa: S102 - written by Writer
        self.function: Callable[..., list[Tensor]] = scope[writer.function]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program.

        Raises:
            CallError: the arguments are not like those that it was traced with.
        """
        leaves, spec = tree_flatten((args, kwargs))
        call = f"trace of {self.name}"
        if spec != self._spec:
            raise CallError(call, "arguments of another structure", "that of the arguments of make_trace")
        for given, traced in zip(leaves, self._leaves, strict=True):
            if not alike(given, traced):
                raise CallError(call, shown(given), shown(traced), "A trace is for arguments of one shape and dtype.")
        tensors = iter(self.function(*[x for x in leaves if isinstance(x, Tensor)], **self.captured))
        return tree_unflatten(self._out_spec, [next(tensors) if x is Tensor else x for x in self._out_leaves])

    def __repr__(self) -> str:
        return self.source


def alike(given: Any, traced: Any) -> bool:
    """Whether an argument may take the place of the one that was traced: another tensor of its kind, or the same
    value."""
    if isinstance(traced, Tensor):
        return isinstance(given, Tensor) and (given.shape, given.dtype) == (traced.shape, traced.dtype)
    return type(given) is type(traced) and bool(given == traced)


def make_trace(func: Callable[..., Any]) -> Callable[..., Trace]:
    """The program of operators that ``func`` comes to, with all of its transforms.

    Args:
        func: any function; it may be what transforms returned.

    Returns:
        A function of the same arguments that returns a Trace: a function that does the same for other tensors of the
        same shapes and dtypes, and whose ``source`` is Python to be read and run. What is no tensor among the arguments
        is part of the program.

    Raises:
        InsideTransformError: called inside a transform.
        CallError: a program that was called with other arguments than it is for; an operator that takes functions.
        CallTypeError: ``func`` is no function; an argument or result is a sparse, nested or quantized tensor.

    Example:
        >>> import torch
        >>> from functrans import make_trace, vmap
        >>> trace = make_trace(vmap(torch.logsumexp, in_dims=(0, None)))(torch.zeros(2, 3), 0)
        >>> print(trace)
        import torch
        <BLANKLINE>
        <BLANKLINE>
        def logsumexp(arg0):
            logsumexp_ = torch.ops.aten.logsumexp.default(arg0, [1])
            return [logsumexp_]
        >>> trace(torch.ones(2, 3), 0)
        tensor([2.0986, 2.0986])
    """
    check_callable("make_trace", func)

    @functools.wraps(func, updated=())
    def traced(*args: Any, **kwargs: Any) -> Trace:
        from torch.fx.experimental.proxy_tensor import make_fx  # which takes long to import

        call = f"make_trace({callable_name(func)})"
        if STATE.top is not None:
            cure = "make_trace of the function with all of its transforms, outside of them"
            raise InsideTransformError(call, STATE.top.name, cure)
        leaves, spec = tree_flatten((args, kwargs))
        check_traceable(call, leaves, "argument")
        out: Any = None

        def flat(*tensors: Tensor) -> list[Tensor]:
            nonlocal out
            given = iter(tensors)
            args, kwargs = tree_unflatten(spec, [next(given) if isinstance(x, Tensor) else x for x in leaves])
            found, out_spec = tree_flatten(call_function(call, func, args, kwargs))
            check_traceable(call, found, "result")
            out = [Tensor if isinstance(x, Tensor) else x for x in found], out_spec
            return [x for x in found if isinstance(x, Tensor)]

        try:
            module = make_fx(functionalize(flat))(*[x for x in leaves if isinstance(x, Tensor)])
        except (RuntimeError, NotImplementedError) as error:
            if not is_tracers(error):
                raise
            raise CallError(call, f"what PyTorch's tracer refuses ({error})", "operators on strided tensors") from error
        module.graph.eliminate_dead_code()
        kept = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        return Trace(callable_name(func), module.graph, module, (kept, spec), out)

    return traced


def is_tracers(error: BaseException) -> bool:
    """Whether PyTorch's tracer raised ``error``, and not what it traced."""
    name = traceback.extract_tb(error.__traceback__)[-1].filename
    return name.startswith(tuple(TORCH + part for part in ("fx", "_subclasses")))


def check_traceable(call: str, leaves: Sequence[Any], what: str) -> None:
    for x in leaves:
        if isinstance(x, Tensor):
            check_dense(call, what, x, "a strided tensor")


class Writer:
    """A graph as Python."""

    def __init__(self, name: str, graph: Any, held: Any) -> None:
        self.name = name
        self.function = name if name.isidentifier() and not is_taken(name) else "program"
        self.captured: dict[str, Tensor] = {}
        #: by node, the expression that stands for it
        self.names: dict[Any, str] = {}
        parameters: list[str] = []
        lines: list[str] = []
        result = "[]"
        for node in graph.nodes:
            if node.op == "placeholder":
                self.names[node] = f"arg{len(parameters)}"
                parameters.append(self.names[node])
            elif node.op == "get_attr":
                self.names[node] = self.constant(getattr(held, node.target))
            elif node.op == "output":
                result = self.text(node.args[0])
            else:
                self.names[node] = f"{node.name}_" * (node.name == self.function or is_taken(node.name)) or node.name
                lines.append(f"    {self.names[node]} = {self.call(node)}")
        if self.captured:
            parameters += ["*", *self.captured]
        head = f"def {self.function}({', '.join(parameters)}):"
        self.source = "\n".join(["import torch", "", "", head, *lines, f"    return {result}"])

    def constant(self, x: Any) -> str:
        """What stands for a tensor that the function captured."""
        if not isinstance(x, Tensor):
            raise CallError(
                f"make_trace({self.name})", f"{what(x)} as an argument of an operator", "tensors and numbers"
            )
        if type(x) is Tensor and x.numel() <= FEW and x.device.type == "cpu" and not x.requires_grad:
            numbers = x.tolist()
            if x.layout is torch.strided and not x.is_complex() and all(map(math.isfinite, x.reshape(-1).tolist())):
                return f"torch.tensor({numbers}, dtype={x.dtype})"
        for known, held in self.captured.items():
            if held is x:
                return known
        self.captured[f"captured{len(self.captured)}"] = x
        return f"captured{len(self.captured) - 1}"

    def call(self, node: Any) -> str:
        target = node.target
        args = [*map(self.text, node.args), *(f"{key}={self.text(v)}" for key, v in node.kwargs.items())]
        if isinstance(target, OpOverload):
            return f"torch.ops.{target}({', '.join(args)})"
        if target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        raise CallError(f"make_trace({self.name})", str(target), "operators on tensors, and none that take functions")

    def text(self, x: Any) -> str:
        """An argument as Python."""
        if isinstance(x, torch.fx.Node):
            return self.names[x]
        if isinstance(x, list | tuple):
            inside = ", ".join(map(self.text, x))
            return f"[{inside}]" if isinstance(x, list) else f"({inside}{',' * (len(x) == 1)})"
        if isinstance(x, torch.device):
            return f"torch.device({str(x)!r})"
        if isinstance(x, float) and not math.isfinite(x):
            return f"float('{x}')"
        if isinstance(x, complex):
            return f"complex({self.text(x.real)}, {self.text(x.imag)})"
        if not isinstance(x, WRITTEN):
            raise CallError(
                f"make_trace({self.name})", f"{what(x)} as an argument of an operator", "tensors and numbers"
            )
        return repr(x)


def is_taken(name: str) -> bool:
    """Whether a name means something else in the source."""
    return keyword.iskeyword(name) or re.fullmatch(r"torch|float|complex|(arg|captured)\d+", name) is not None
