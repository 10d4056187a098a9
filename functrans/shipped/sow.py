"""Named intermediate values: ``sow`` names one, ``reap`` takes them out of a function, ``plant`` puts others in.

``sow`` asks the levels from the top: the innermost ``plant`` that has the name gives the value, and every ``reap``
around sees the one that is used, one level after the other taken off it, as it would be without the transforms inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable, check_kind
from functrans.api.compiled import CALLED, TRACED, UNTRACED, named_after
from functrans.core.interpreter import Interpreter
from functrans.core.stack import interpreter_stack, run_transformed
from functrans.core.tensor import check_layout
from functrans.errors import CallTypeError, CallValueError, MissingRuleError
from functrans.errors.wording import shown, what
from functrans.extension.carried import is_carried
from functrans.extension.levels import Handler
from functrans.extension.primitives import Primitive
from functrans.extension.table_interpreter import TableInterpreter
from functrans.interpreters.branch import BranchInterpreter
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.linearize import LinearizeInterpreter
from functrans.interpreters.transpose import TransposeInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.interpreters.vmap.table import materialize
from functrans.shipped.by_derivatives import DerivativeInterpreter
from functrans.shipped.interval_rules.level import IntervalLevel
from functrans.shipped.sparsity_level import SparsityLevel
from functrans.tensors.pytrees import TreeSpec, leaves_like, tree_flatten, tree_map, tree_unflatten

SOW, REAP, PLANT = "sow(value, name)", "reap(func)", "plant(func, values)"


def sow(value: Any, name: str) -> Any:
    """Name an intermediate value, so that ``reap`` can return it and ``plant`` replace it.

    Args:
        value: a tensor, or a pytree of tensors.
        name: a string; a function that is reaped sows each name once.

    Returns:
        ``value``, or what a ``plant`` around the call has for this name. Without a ``reap`` or ``plant`` around, this
        is all that happens.

    Raises:
        CallTypeError: the name is no string, or something in ``value`` no tensor.
        CallValueError: the name was sown before in the same ``reap``, or what is planted does not fit ``value``.

    Example:
        >>> import torch
        >>> from functrans import grad, reap, sow
        >>> def f(x):
        ...     return sow(x.square(), "square").sum()
        >>> reap(f)(torch.tensor([1.0, 2.0]))
        (tensor(5.), {'square': tensor([1., 4.])})
        >>> reap(grad(f))(torch.tensor([1.0, 2.0]))
        (tensor([2., 4.]), {'square': tensor([1., 4.])})
    """
    if is_dynamo_compiling():
        return CALLED(sow, (value, name), {})
    check_kind(SOW, "name", name, str, "a string")
    leaves, spec = tree_flatten(value)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise CallTypeError(SOW, f"{what(leaf)} in the value of {name!r}", "tensors", "Write torch.as_tensor(x).")
        check_layout(leaf)
    if not any(isinstance(level, Reaping | Planting) for level in interpreter_stack()):
        return value
    planted = planting(name)
    if planted is not None:
        if callable(planted):
            planted = call_function(PLANT, planted, (value,), {})
        leaves = fitting(name, planted, leaves, spec)
        value = tree_unflatten(spec, leaves)
    sowing(*leaves, name=name, spec=spec)
    return value


def reap(func: Callable[..., Any]) -> Callable[..., Any]:
    """The values that ``func`` sows, by name, beside its result.

    Args:
        func: any function; it may apply transforms and be transformed.

    Returns:
        A function of the same arguments that returns ``(output, {name: value})``. The values are those of the code that
        sows, without what the transforms inside of ``func`` make of them: under ``grad`` and ``jvp`` (and ``hessian``)
        the plain value, under ``vmap`` those of all examples, stacked in front; under ``bounds`` a pair, the bounds of
        the value, and under a transform of one's own by a table what the value would leave it as (a ``Carried``). They
        are copies: later writes to what was sown do not show. Transforms around see them as any other result:
        ``jvp(reap(f), ...)`` has their tangents, ``vmap(reap(f))`` a value for each example. (For cotangents see
        ``plant``.)

    Raises:
        CallValueError: a name was sown twice.
        MissingRuleError: a name was sown inside a transform, by no table, that carries something else beside values, or
            in a branch that only some of the examples take.

    Example:
        >>> import torch
        >>> from functrans import jvp, reap, sow, vmap
        >>> f = lambda x: sow(x * x, "square") + 1
        >>> reap(vmap(f))(torch.tensor([1.0, 2.0]))
        (tensor([2., 5.]), {'square': tensor([1., 4.])})
        >>> _, (_, tangents) = jvp(reap(f), (torch.tensor(3.0),), (torch.tensor(1.0),))
        >>> tangents
        {'square': tensor(6.)}
    """
    check_callable("reap", func)

    @named_after(func)
    def reaped(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        if is_dynamo_compiling():
            return TRACED(reap, func, {}, args, kwargs, None)
        level = Reaping(func)
        out = run_transformed(level, lambda: call_function(REAP, func, args, kwargs))
        return out, level.found

    return reaped


def plant(func: Callable[..., Any], values: Mapping[str, Any]) -> Callable[..., Any]:
    """``func`` with other values in the place of those that it sows.

    Args:
        func: any function; it may apply transforms and be transformed.
        values: by name, what takes the place of the value that is sown: of its structure, shapes and dtypes, as
            ``reap(func)`` returns it (under a ``vmap`` inside of ``func`` with the examples in front). Or a function
            from the one to the other, which runs where the value is sown.

    Returns:
        A function of the same arguments and the result of ``func``. Nothing in it depends on what was replaced, and it
        can be differentiated by what took its place: the cotangents of named values are the gradient by something that
        is added to them.

    Raises:
        CallTypeError: ``values`` is no dict from names.
        CallValueError: a value does not fit what is sown under its name, or nothing is sown under it.

    Example:
        >>> import torch
        >>> from functrans import grad, plant, sow
        >>> f = lambda x: sow(x * x, "square").sin()
        >>> plant(f, {"square": torch.tensor(0.0)})(torch.tensor(3.0))
        tensor(0.)
        >>> x, zero = torch.tensor(3.0), torch.tensor(0.0)
        >>> cotangent = grad(lambda added: plant(f, {"square": lambda square: square + added})(x))(zero)
        >>> torch.allclose(cotangent, torch.tensor(9.0).cos())
        True
    """
    check_callable("plant", func)
    check_kind(PLANT, "values", values, Mapping, "a dict from names to values")
    for name in values:
        check_kind(PLANT, "a name", name, str, "a string")

    @named_after(func)
    def planted(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            if any(map(callable, values.values())):
                why = "A function among the values runs where the value is sown, and that graph has been written."
                return UNTRACED("plant", why, plant(func, values), args, kwargs)
            return TRACED(plant, func, {}, args, kwargs, {"values": values})
        level = Planting(func)
        level.values = values
        out = run_transformed(level, lambda: call_function(PLANT, func, args, kwargs))
        unused = [name for name in values if name not in level.met]
        if unused:
            got = f"{', '.join(map(repr, unused))}, which {'is' if len(unused) == 1 else 'are'} not sown"
            raise CallValueError(PLANT, got, f"names of what was: {sorted(level.met)}")
        return out

    return planted


class Reaping(Handler):
    """Where what is sown is kept."""

    kind = "reap"

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__(func)
        self.found: dict[str, Any] = {}


class Planting(Handler):
    """Where what takes the place of sown values is found."""

    kind = "plant"
    values: Mapping[str, Any]

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__(func)
        #: the names that were sown
        self.met: set[str] = set()


def fitting(name: str, planted: Any, leaves: list[Tensor], spec: TreeSpec) -> list[Any]:
    """The leaves of what is planted, which are like those that were sown."""
    new, new_spec = leaves_like(planted, spec)
    if new_spec != spec:
        raise CallValueError(PLANT, f"{what(planted)} for {name!r}", "a value of the structure of the one that is sown")
    for old, leaf in zip(leaves, new, strict=True):
        if not isinstance(leaf, Tensor) or leaf.shape != old.shape or leaf.dtype != old.dtype:
            raise CallValueError(PLANT, f"{what(leaf)} for {name!r}", f"{what(old)}, as is sown", "reap shows it.")
    return new


#: The value that is planted under a name, or the function that makes it; None: none is.
planting = Primitive("plant", lambda name: None)
#: Shows a value, given by its leaves, to every ``reap`` around.
sowing = Primitive("sow", lambda *leaves, name, spec: None)
sowing.cure = "It is not known what the level carries beside a value. Sow outside of it."


@planting.rule(Planting)
def replaced(level: Planting, name: str) -> Any:
    # copies, since what is planted may be written
    return tree_map(copied, level.values[name]) if name in level.values else NotImplemented


def goes_on(level: Interpreter) -> Any:
    """What is sown is shown further out, if somebody is there to look."""
    below = level.below
    while below is not None and not isinstance(below, Reaping | Planting):
        below = below.below
    return None if below is None else NotImplemented


@sowing.rule(Reaping)
def collected(level: Reaping, *leaves: Tensor, name: str, spec: TreeSpec) -> Any:
    if name in level.found:
        cure = "Number the names of a loop; give vmap and jacfwd no chunks."
        raise CallValueError(f"sow(value, {shown(name)})", "a name that was sown before", "a new name", cure)
    level.found[name] = tree_unflatten(spec, [copied(x) for x in leaves])
    return goes_on(level)


@sowing.rule(Planting)
def met(level: Planting, *leaves: Tensor, name: str, spec: TreeSpec) -> Any:
    level.met.add(name)
    return goes_on(level)


def copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


@sowing.rule(GradInterpreter, JvpInterpreter, LinearizeInterpreter, DerivativeInterpreter)
def primal(level: Interpreter, *leaves: Any, **rest: Any) -> Any:
    return sowing.below(level, *map(level.value_of, leaves), **rest)


@sowing.rule(SparsityLevel)
def unless_rehearsed(level: SparsityLevel, *leaves: Any, **rest: Any) -> Any:
    return None if level.rehearsal else primal(level, *leaves, **rest)


@sowing.rule(IntervalLevel)
def bounded(level: IntervalLevel, *leaves: Any, spec: TreeSpec, **rest: Any) -> Any:
    """The bounds of the value: two values like it."""
    ends = [level.ends(x) if level.owns(x) else (x, x) for x in leaves]
    pair = tuple(tree_unflatten(spec, [end[i] for end in ends]) for i in (0, 1))
    leaves_of_pair, spec_of_pair = tree_flatten(pair)
    return sowing.below(level, *leaves_of_pair, spec=spec_of_pair, **rest)


@sowing.rule(BranchInterpreter)
def of_some(level: BranchInterpreter, *leaves: Any, **rest: Any) -> Any:
    below = level.below
    while below is not None and not isinstance(below, Reaping):
        below = below.below
    if below is None:
        return NotImplemented
    cure = "Only some of the examples run it, or it is not known whether one does. Sow the value that is chosen."
    raise MissingRuleError("sow", level, cure)


@sowing.rule(TableInterpreter)
def as_it_leaves(level: TableInterpreter, *leaves: Any, spec: TreeSpec, **rest: Any) -> Any:
    """What the caller of the transform would get for the value: with its payload, where it carries one."""
    left = tree_unflatten(spec, [level.leave(x) if level.owns(x) else x for x in leaves])
    leaves_left, spec_left = tree_flatten(left)
    return sowing.below(level, *leaves_left, spec=spec_left, **rest)


@planting.rule(TableInterpreter)
def as_it_enters(level: TableInterpreter, name: str) -> Any:
    planted = planting.below(level, name)
    if callable(planted):
        return planted
    leaves, spec = tree_flatten(planted, is_carried)
    return tree_unflatten(spec, [level.enter(x) for x in leaves])


@sowing.rule(TransposeInterpreter)
def of_linear_function(level: TransposeInterpreter, *leaves: Tensor, **rest: Any) -> Any:
    raise MissingRuleError("sow", level, "A linear function is transposed without values. Reap the function itself.")


@sowing.rule(VmapInterpreter)
def stacked(level: VmapInterpreter, *leaves: Any, **rest: Any) -> Any:
    def of_all(x: Any) -> Tensor:
        value, bdim = (x.value, x.bdim) if level.owns(x) else (x, None)
        return value if bdim is None and of_basis(level) else materialize(value, bdim, level.batch_size)

    return sowing.below(level, *map(of_all, leaves), **rest)


@planting.rule(VmapInterpreter)
def for_each(level: VmapInterpreter, name: str) -> Any:
    """Of what was planted for all examples, that of each."""
    return of_each(level, planting.below(level, name), PLANT, name)


def of_each(level: VmapInterpreter, given: Any, call: str, name: str) -> Any:
    """An example's part of what ``call`` was given for all of them, with the examples in front."""
    if given is None or callable(given) or of_basis(level):
        return given

    def example(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != level.batch_size:
            expected = f"tensors with the {level.batch_size} examples of {level.name} in front"
            raise CallValueError(call, f"{what(x)} for {name!r}", expected, "reap shows the shape.")
        return level.batched(x, 0)

    return tree_map(example, given)


def of_basis(level: VmapInterpreter) -> bool:
    """Whether it is the vmap of a Jacobian, over tangents: code inside knows of no examples."""
    return getattr(level.func, "of_basis", False)
