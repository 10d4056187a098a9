"""torch.compile of programs that use transforms, and compiled functions inside of transforms.

NOTE [Compiled transforms]
Dynamo, which traces Python for torch.compile and torch.export, does not see how a transform works. What a transform
returns asks whether it is being traced (``is_dynamo_compiling``, which Dynamo answers itself), and if so calls
``TRACED``: for Dynamo a higher-order operator, with a meaning from ``api/dynamo_variables.py``. It has the function
traced into a graph of its own, at the shapes that one example has, which makes all that the function captures (tensors
of closures, parameters, buffers) inputs of that graph; then it writes one call into the graph around it, that of the
transform proper on the function's graph. Whoever runs the graph around it, Python or AOTAutograd with its tracers,
thereby runs the transform as it is, with whatever stands in the graph inside: also transforms of the same kind.

Effects of the function on Python objects are Dynamo's, which has them once for each call (``Effects`` in
``api/dynamo_functions.py``). Where it does not go (the function leaves a tensor behind, branches by numbers, cannot be
traced, or asks for an error), Dynamo breaks the graph, and the call takes place outside of it; under
``fullgraph=True``, that is Dynamo's error.

What asks the levels around it (a ``Primitive``, ``psum``, ``sow``, a ``custom_vjp``) is one node, ``CALLED``, that runs
where it stands. While Dynamo traces, no level runs; what such a call returns there is found among the levels of the
transforms that are being traced, which are entered for it once more (``seen_inside``).

Inside of a running transform, a compiled function is run as it was written: the transform has to see its operators.
Both are connected when torch._dynamo is imported, which functrans itself never does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch.compiler import is_dynamo_compiling

from functrans.pytorch.thread_state import unchanged
from functrans.pytorch.torch_private import HigherOrderOperator

Transform = TypeVar("Transform", bound=Callable[..., Any])


class Manner(NamedTuple):
    """What a transform that calls ``TRACED`` does that others do not."""

    #: it is called with the function and its arguments at once
    at_once: bool = False
    #: it returns a function, which stays in the graph
    returns_function: bool = False
    #: it switches grad mode on for the function
    records: bool = False
    #: it runs the function once, so that effects of the function take place as often as without it
    once: bool = False


MANNERS: dict[Callable[..., Any], Manner] = {}


def manner(**facts: bool) -> Callable[[Transform], Transform]:
    """Note the ``Manner`` of a transform where it is defined; of those without a note nothing is true."""

    def note(transform: Transform) -> Transform:
        MANNERS[transform] = Manner(**facts)
        return transform

    return note


def manner_of(transform: Callable[..., Any]) -> Manner:
    return MANNERS.get(transform, Manner())


#: Why a pullback breaks the graph.
MADE_OUTSIDE = "It was made outside of the graph."


def transformed(
    transform: Callable[..., Any], func: Any, options: dict[str, Any], args: Any, kwargs: Any, tangents: Any = None
) -> Any:
    """The call that ``TRACED`` stands for. ``tangents``: those, or other tensors that the transform takes: options by
    name, or a tuple of what comes in front of the arguments, and is not for the function."""
    if manner_of(transform).at_once:
        return transform(func, args, tangents, **options) if tangents is not None else transform(func, *args, **options)
    if isinstance(tangents, tuple):
        return transform(func, **options)(*tangents, *args, **kwargs)
    return transform(func, **options, **(tangents or {}))(*args, **kwargs)


class Traced(HigherOrderOperator):
    """The name under which Dynamo knows a call of a transform; called as any function, it is that call, untraced."""

    def __init__(self) -> None:
        super().__init__("functrans_transform")

    def __call__(self, *args: Any) -> Any:
        return transformed(*args)


class Called(HigherOrderOperator):
    """The name of a call that means what the levels around it say: ``CALLED(function, args, kwargs)``."""

    def __init__(self) -> None:
        super().__init__("functrans_called")

    def __call__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Untraced(HigherOrderOperator):
    """Calls a function that Dynamo is not to look into: it breaks the graph, and says the reason."""

    def __init__(self) -> None:
        super().__init__("functrans_untraced")

    def __call__(self, what: str, reason: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)


TRACED: Any = Traced()
CALLED: Any = Called()
UNTRACED: Any = Untraced()


def named_after(func: Callable[..., Any]) -> Callable[[Any], Any]:
    """``functools.wraps``, which Dynamo does not trace for all functions, and which it has no use for."""
    return unchanged if is_dynamo_compiling() else functools.wraps(func, updated=())


def call_with(func: Callable[..., Any], given: tuple[Any, Any]) -> Any:
    args, kwargs = given
    return func(*args, **kwargs)
