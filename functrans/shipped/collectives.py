"""Sums and the like over the examples of a vmap that was given a name: ``vmap(f, axis_name="batch")``.

Each is a ``Primitive``: it goes down the stack to the vmap of that name, and through those of other names. Their
derivatives are JAX's: the derivative of the sum of what all examples compute, so that ``psum`` is its own transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import check_dense
from functrans.api.compiled import CALLED
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError, MissingRuleError
from functrans.errors.wording import shown, what
from functrans.extension.primitives import Primitive
from functrans.extension.table_interpreter import TableInterpreter
from functrans.interpreters.branch import BranchInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.interpreters.vmap.table import materialize
from functrans.shipped.interval_rules.level import IntervalLevel, is_interval
from functrans.shipped.jet import JetInterpreter
from functrans.shipped.laplacian import LaplacianInterpreter
from functrans.shipped.sparsity_level import SparsityLevel
from functrans.tensors.pytrees import tree_map

AxisName = Hashable | tuple[Hashable, ...]


def psum(x: Any, axis_name: AxisName) -> Any:
    """The sum over all examples of the vmap of this name; the same for every example.

    Args:
        x: a tensor, a number, or a pytree of these. What does not depend on the example is multiplied by their number.
        axis_name: the ``axis_name`` of a vmap around this call, or a tuple of several, summed over together.

    Returns:
        The sum, in the structure of ``x``.

    Raises:
        CallValueError: no vmap of this name is running.

    Example:
        >>> import torch
        >>> from functrans import psum, vmap
        >>> vmap(lambda x: x / psum(x, "batch"), axis_name="batch")(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    return over(psum, x, axis_name, summed)


def pmean(x: Any, axis_name: AxisName) -> Any:
    """The mean over all examples of the vmap of this name; see ``psum``.

    Example:
        >>> import torch
        >>> from functrans import pmean, vmap
        >>> vmap(lambda x: x - pmean(x, "batch"), axis_name="batch")(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
    """
    return over(pmean, x, axis_name, lambda t, name: summed(t, name) / axis_level("pmean", name).batch_size)


def pmax(x: Any, axis_name: AxisName) -> Any:
    """The greatest of all examples of the vmap of this name, element by element; see ``psum``.

    Its derivative is that of ``amax``, which shares it among examples that are equal.

    Example:
        >>> import torch
        >>> from functrans import pmax, vmap
        >>> vmap(lambda x: x == pmax(x, "batch"), axis_name="batch")(torch.tensor([1.0, 3.0]))
        tensor([False,  True])
    """
    return over(pmax, x, axis_name, lambda t, name: gathered(t, name).amax(0))


def pmin(x: Any, axis_name: AxisName) -> Any:
    """The least of all examples of the vmap of this name, element by element; see ``pmax``.

    Example:
        >>> import torch
        >>> from functrans import pmin, vmap
        >>> vmap(lambda x: x - pmin(x, "batch"), axis_name="batch")(torch.tensor([1.0, 3.0]))
        tensor([0., 2.])
    """
    return over(pmin, x, axis_name, lambda t, name: gathered(t, name).amin(0))


def all_gather(x: Any, axis_name: Hashable, *, axis: int = 0) -> Any:
    """What all examples of the vmap of this name have, along a new dimension; the same for every example.

    Args:
        x: a tensor, a number, or a pytree of these.
        axis_name: the ``axis_name`` of a vmap around this call.
        axis: where the new dimension goes.

    Raises:
        CallValueError: no vmap of this name is running, or ``axis`` is no dimension of the result.

    Example:
        >>> import torch
        >>> from functrans import all_gather, vmap
        >>> vmap(lambda x: x - all_gather(x, "batch"), axis_name="batch")(torch.tensor([1.0, 3.0]))
        tensor([[ 0., -2.],
                [ 2.,  0.]])
    """
    if is_dynamo_compiling():
        return CALLED(all_gather, (x, axis_name), {"axis": axis})
    call = "all_gather(x, axis_name)"
    if type(axis) is not int:
        raise CallTypeError(call, f"{what(axis)} as axis", "an int")

    def gather(t: Tensor, name: Hashable) -> Tensor:
        rank = t.dim() + 1
        if not -rank <= axis < rank:
            raise CallValueError(call, f"axis={axis} for a result of {rank} dimensions", f"{-rank} <= axis < {rank}")
        return gathered(t, name).movedim(0, axis)

    return over(all_gather, x, axis_name, gather)


def axis_index(axis_name: Hashable) -> Tensor:
    """Which example of the vmap of this name it is: 0, 1, ..., an int64 tensor without dimensions.

    Example:
        >>> import torch
        >>> from functrans import axis_index, vmap
        >>> vmap(lambda x: x * axis_index("batch"), axis_name="batch")(torch.ones(3))
        tensor([0., 1., 2.])
    """
    if is_dynamo_compiling():
        return CALLED(axis_index, (axis_name,), {})
    axis_level("axis_index", axis_name)
    return index(axis_name)


def axis_level(function: str, axis_name: Hashable) -> VmapInterpreter:
    """The innermost vmap of this name."""
    try:
        hash(axis_name)
    except TypeError:
        got = f"{what(axis_name)} as axis_name"
        raise CallTypeError(f"{function}(...)", got, "a name, or a tuple of some") from None
    names = []
    for level in interpreter_stack():
        if isinstance(level, VmapInterpreter) and level.axis_name is not None:
            if level.axis_name == axis_name:
                return level
            names.append(repr(level.axis_name))
    running = f"those that run are {', '.join(names)}" if names else "none of a name is running"
    raise CallValueError(
        f"{function}(..., axis_name={shown(axis_name)})",
        "that name",
        f"the axis_name of a vmap around the call; {running}",
        "Write vmap(f, axis_name=...).",
    )


def over(public: Any, x: Any, axis_name: AxisName, combine: Callable[[Tensor, Hashable], Tensor]) -> Any:
    """``combine`` of every leaf of ``x``, for one name after the other: what ``public`` returns."""
    if is_dynamo_compiling():
        return CALLED(public, (x, axis_name), {})
    function = public.__name__
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    levels = [axis_level(function, name) for name in names]
    if len({id(level) for level in levels}) < len(levels):
        raise CallValueError(f"{function}(..., axis_name={axis_name!r})", "a name twice", "each name once")

    def leaf(t: Any) -> Any:
        call = f"{function}(x, axis_name)"
        if not isinstance(t, Tensor):
            if not isinstance(t, bool | int | float | complex) or (isinstance(t, int) and not -(2**63) <= t < 2**63):
                raise CallTypeError(call, f"{what(t)} in x", "tensors and numbers")
            t = torch.as_tensor(t)
        ordered = function in ("pmax", "pmin")
        check_dense(call, "x", t, "a real tensor" if ordered else "a tensor", kinds="bif" if ordered else "bifc")
        for name in names:
            t = combine(t, name)
        return t

    return tree_map(leaf, x)


def no_level(*args: Any) -> Any:
    raise AssertionError("axis_level has found the vmap")


summed = Primitive("psum", no_level)
gathered = Primitive("all_gather", no_level)
index = Primitive("axis_index", no_level)
for looks_across in (summed, gathered):
    looks_across.cure = (
        "What the level carries beside a value may not be one example's alone. Call it outside of that transform, or "
        'give its table a default ("jvp", "loop") that has a meaning for every function.'
    )


def below(primitive: Primitive, level: VmapInterpreter, x: Any, name: Hashable) -> Any:
    """The answer of a level further down, for each example of this one."""
    if not level.owns(x):
        return NotImplemented
    out = primitive.below(level, x.value, name)
    return level.batched(out, None if x.bdim is None else x.bdim + (primitive is gathered))


def examples(level: VmapInterpreter, x: Any) -> Tensor:
    """What all examples have, along a dimension in front."""
    value, bdim = (x.value, x.bdim) if level.owns(x) else (x, None)
    return materialize(value, bdim, level.batch_size)


@summed.rule(VmapInterpreter)
def _(level: VmapInterpreter, x: Tensor, name: Hashable) -> Any:
    return below(summed, level, x, name) if level.axis_name != name else examples(level, x).sum(0)


@gathered.rule(VmapInterpreter)
def _(level: VmapInterpreter, x: Tensor, name: Hashable) -> Any:
    return below(gathered, level, x, name) if level.axis_name != name else examples(level, x)


def of_those_that_take_it(primitive: Primitive) -> None:
    @primitive.rule(BranchInterpreter)
    def in_branch(level: BranchInterpreter, x: Any, name: Hashable) -> Any:
        if not level.splits(axis_level(primitive.name, name)):
            return NotImplemented
        cure = f"Only some of the examples of {name!r} run it. Call {primitive} before, and choose by torch.where."
        raise MissingRuleError(primitive.name, level, cure)


of_those_that_take_it(summed)
of_those_that_take_it(gathered)


@index.rule(VmapInterpreter)
def _(level: VmapInterpreter, name: Hashable) -> Any:
    return NotImplemented if level.axis_name != name else level.batched(torch.arange(level.batch_size), 0)


def pull_gathered(grad: Tensor, result: Tensor, x: Tensor, name: Hashable) -> Tensor:
    """Of what all examples make of the gathered values, that which belongs to this one."""
    return summed(grad, name).index_select(0, index(name).view(1)).squeeze(0)


summed.derivative(
    pullback=lambda grad, result, x, name: summed(grad, name),
    tangent=lambda tangents, result, x, name: summed(tangents[0], name),
    linear=True,
)
gathered.derivative(
    pullback=pull_gathered,
    tangent=lambda tangents, result, x, name: gathered(tangents[0], name),
    linear=True,
)


def linear_at_levels(primitive: Primitive) -> None:
    """``primitive`` is linear and does not decrease: what is carried beside a value goes the way of the value."""

    @primitive.rule(JetInterpreter)
    def of_terms(level: JetInterpreter, x: Any, name: Hashable) -> Any:
        if not level.owns(x) or x.terms is None:
            return NotImplemented
        terms = [None if t is None else primitive.below(level, t, name) for t in x.terms]
        return level.with_terms(primitive.below(level, x.value, name), terms)

    @primitive.rule(IntervalLevel)
    def of_ends(level: IntervalLevel, x: Any, name: Hashable) -> Any:
        if not is_interval(x) or not level.owns(x):
            return NotImplemented
        low, high = (primitive.below(level, end, name) for end in level.ends(x))
        return level.between(low, high)

    @primitive.rule(LaplacianInterpreter, SparsityLevel)
    def of_one_example(level: TableInterpreter, x: Any, name: Hashable) -> Any:
        if not level.owns(x) or level.is_constant(x):
            return NotImplemented
        cure = f"It is of one example, and {primitive} looks at all of them. Take it around the vmap of that name."
        raise MissingRuleError(primitive.name, level, cure)


linear_at_levels(summed)
linear_at_levels(gathered)
