"""Families of batching rules: one generic rule each, registered for a list of operators in two lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo, materialize, to_front
from functrans.operators.rules import caller_place
from functrans.operators.schemas import schema_default
from functrans.operators.views import wrap_dim
from functrans.pytorch.torch_private import OpOverload

Rule = TypeVar("Rule", bound=Callable[..., Any])


class RuleDeclined(Exception):
    """A batching rule does not cover these arguments: the interpreter goes on to decomposition or the loop."""


# ---------------------------------------------------------------------------------------------------------------
# Helpers for rules


@cache
def tensor_positions(op: OpOverload) -> tuple[int, ...]:
    """Places of the positional ``Tensor`` and ``Tensor?`` arguments in the schema of ``op``."""
    found = []
    for place, argument in enumerate(positional_arguments(op)):
        kind = argument.type.getElementType() if isinstance(argument.type, torch.OptionalType) else argument.type
        if isinstance(kind, torch.TensorType):
            found.append(place)
    return tuple(found)


@cache
def positional_arguments(op: OpOverload) -> tuple[Any, ...]:
    """The schema's arguments without the keyword-only ones."""
    BATCHING_RULES.check(op)
    return tuple(argument for argument in op._schema.arguments if not argument.kwarg_only)


def argument_place(op: OpOverload, *names: str) -> int | None:
    """Place of the first positional argument with one of ``names``, or None."""
    for place, argument in enumerate(positional_arguments(op)):
        if argument.name in names:
            return place
    return None


def with_defaults(op: OpOverload, args: Sequence[Any]) -> list[Any]:
    """The positional arguments, the ones left out filled in from the schema."""
    return [*args, *default_values(op)[len(args) :]]


@cache
def default_values(op: OpOverload) -> tuple[Any, ...]:
    """The defaults of the positional arguments; None where there is none."""
    return tuple(schema_default(argument) for argument in positional_arguments(op))


def pad_rank(x: Tensor, bdim: int, rank: int) -> Tensor:
    """Batch dimension to the front, size-1 dimensions behind it, until the logical rank is ``rank``."""
    x = to_front(x, bdim)
    missing = rank - (x.dim() - 1)
    if missing <= 0:
        return x
    shape = x.shape
    return x.view([shape[0], *([1] * missing), *shape[1:]])


def physical_dim(dim: int, rank: int, bdim: int) -> int:
    """Where the logical dimension ``dim`` of an example of rank ``rank`` stands in the physical tensor."""
    dim = wrap_dim(dim, rank)
    return dim if dim < bdim else dim + 1


def same_dims(output: Any, bdim: int | None) -> Any:
    """``out_dims`` for an output, or for a tuple or list of outputs, which all have ``bdim``."""
    if isinstance(output, (tuple, list)):
        return tuple(same_dims(one, bdim) for one in output)
    return bdim if isinstance(output, Tensor) else None


def any_rank(rule: Rule) -> Rule:
    """Mark a frequent rule that counts an example's dimensions; see NOTE [Operators refuse examples, not batches]."""
    rule.any_rank = True  # type: ignore[attr-defined]
    return rule


def family(rule_of: Callable[..., Callable[..., Any]]) -> Callable[..., None]:
    """Decorator: from a function that makes one operator's rule, ``rule_of(op, ...)``, to one that registers the rules
    of several, ``family(*ops, ...)``."""

    @wraps(rule_of)
    def register(*ops: OpOverload, **options: Any) -> None:
        place = caller_place()
        for op in ops:
            BATCHING_RULES.add(op, rule_of(op, **options), place=place)

    return register


# ---------------------------------------------------------------------------------------------------------------
# Rules that are one operator


def one_operator(rewrite: Callable[..., Any], otherwise: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The rule that is one operator on the physical tensors: the interpreter sends it down by a Python call.

    Args:
        rewrite: called as ``rewrite(in_dims, *args)`` with the arguments that came, it returns the operator, its
            arguments and the batch dimension of its outputs; None where it takes more than that. Options by keyword
            stay as they are.
        otherwise: the rule for where it returned None.
    """

    def rule(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        rewritten = rewrite(in_dims, *args)
        if rewritten is None:
            if otherwise is None:
                raise RuleDeclined("more than one operator")
            return otherwise(info, in_dims, *args, **kwargs)
        op, physical, bdim = rewritten
        output = op(*physical, **kwargs)
        return output, same_dims(output, bdim)

    rule.rewrite = rewrite  # type: ignore[attr-defined]
    return rule


# ---------------------------------------------------------------------------------------------------------------
# Reductions and operators along a dimension


@family
def reduction(op: OpOverload, empty_means_all: bool = True) -> Callable[..., tuple[Any, Any]]:
    """Reductions of one tensor with a ``dim`` argument (a number, a list or None) and perhaps ``keepdim``.

    The dimensions are renumbered around the batch dimension; nothing is moved.
    """
    dim_place = argument_place(op, "dim")
    if dim_place is None:
        raise TypeError(f"reduction({op}): the operator has no dim argument. Use full_reduction(op, dim_op).")
    keepdim_place = argument_place(op, "keepdim")
    keepdim_is_keyword = any(a.name == "keepdim" and a.kwarg_only for a in op._schema.arguments)
    takes_list = not isinstance(unwrapped_type(positional_arguments(op)[dim_place]), torch.IntType)

    def reduced(in_dims: Sequence[Any], *args: Any) -> Any:
        arguments = with_defaults(op, args)
        x, bdim = arguments[0], in_dims[0]
        if bdim is None:
            raise RuleDeclined(f"{op}: only the reduced tensor may be batched")
        rank = x.dim() - 1
        if rank == 0 or (keepdim_is_keyword and bdim):
            return None
        dim = arguments[dim_place]
        if dim is None and not takes_list and rank > 1:
            raise RuleDeclined(f"{op}: dim=None is not a list of all dimensions here")
        dims = reduced_dims(dim, rank, empty_means_all)
        physical = [dim if dim < bdim else dim + 1 for dim in dims]
        arguments[dim_place] = physical if takes_list else physical[0]
        if bdim and (keepdim_place is None or not arguments[keepdim_place]):
            bdim -= sum(dim < bdim for dim in dims)
        return op, arguments, bdim

    def in_front(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        arguments = with_defaults(op, args)
        x, dim = to_front(arguments[0], in_dims[0]), arguments[dim_place]
        dims = reduced_dims(dim, x.dim() - 1, empty_means_all)
        if x.dim() == 1 and (dims or empty_means_all or dim is None):
            # Only dim 0 or -1 is left: the example is reduced as one of size 1, and keepdim keeps nothing.
            x, dims = x.unsqueeze(-1), (0,)
            if keepdim_is_keyword:
                kwargs["keepdim"] = False
            elif keepdim_place is not None:
                arguments[keepdim_place] = False
        physical = [dim + 1 for dim in dims]
        arguments[0], arguments[dim_place] = x, physical if takes_list else physical[0]
        output = op(*arguments, **kwargs)
        return output, same_dims(output, 0)

    return any_rank(one_operator(reduced, in_front))


def unwrapped_type(argument: Any) -> Any:
    """The type of a schema argument, without Optional."""
    return argument.type.getElementType() if isinstance(argument.type, torch.OptionalType) else argument.type


def reduced_dims(dim: Any, rank: int, empty_means_all: bool = True) -> tuple[int, ...]:
    """The logical dimensions that a ``dim`` argument names, non-negative and without repetition."""
    if dim is None:
        return tuple(range(rank))
    given = (dim,) if isinstance(dim, int) else tuple(dim)
    if not given and empty_means_all:
        return tuple(range(rank))
    dims = tuple(wrap_dim(one, rank) for one in given)
    if len(set(dims)) != len(dims):
        twice = next(one for one in dims if dims.count(one) > 1)
        raise RuntimeError(f"dim {twice} appears multiple times in the list of dims")
    return dims


def full_reduction_over(op: OpOverload, dims_op: Callable[..., Any]) -> None:
    """An operator that reduces everything: ``dims_op(x, dims, *args, **kwargs)`` reduces a list of dimensions."""

    def all_dims(in_dims: Sequence[Any], x: Tensor, *args: Any) -> Any:
        rank, bdim = x.dim(), in_dims[0]
        if rank == 1 or x.layout is not torch.strided:
            return None
        return dims_op, (x, [dim for dim in range(rank) if dim != bdim], *args), 0

    def scalars(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if x.layout is torch.strided:
            output = dims_op(x.unsqueeze(-1), [1], *args, **kwargs)
        elif op is torch.ops.aten.sum.default:  # of all dimensions a dense tensor
            output = dims_op(x, [dim for dim in range(x.dim()) if dim != in_dims[0]], *args, **kwargs).to_dense()
        else:
            raise RuleDeclined(f"{op}: a sparse tensor")
        return output, same_dims(output, 0)

    rule = one_operator(all_dims, scalars)
    if not isinstance(dims_op, OpOverload):
        rule.rewrite = None  # type: ignore[attr-defined]
    BATCHING_RULES.add(op, rule, place=caller_place())


def full_reduction(op: OpOverload, dim_op: Callable[..., Any]) -> None:
    """An operator that reduces everything: ``dim_op(flat, *args, **kwargs)`` reduces dimension 1 of ``[B, n]``."""

    def reduce_all(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        output = dim_op(flat_examples(x, in_dims[0]), *args, **kwargs)
        return output, same_dims(output, 0)

    BATCHING_RULES.add(op, reduce_all, place=caller_place())


def flat_examples(x: Tensor, bdim: int) -> Tensor:
    """The batch as ``[B, n]``, one flattened example per row."""
    x = to_front(x, bdim)
    size = 1
    for length in x.shape[1:]:
        size = size * length
    return x.reshape(x.shape[0], size)


@family
def along_dim(op: OpOverload, dim_names: tuple[str, ...] = ("dim", "dims", "axis")) -> Callable[..., tuple[Any, Any]]:
    """Operators of the tensors in front along one ``dim`` (or several), which keep the rank of their input.

    One batched tensor is not moved; several get their batch dimensions in front.
    """
    dim_place: int | str | None = argument_place(op, *dim_names)
    if dim_place is None:
        dim_place = next((a.name for a in op._schema.arguments if a.kwarg_only and a.name in dim_names), None)
    if dim_place is None:
        raise TypeError(f"along_dim({op}): the operator has no argument named {' or '.join(dim_names)}.")
    return along_dim_rule(op, dim_place)


def along_dim_rule(op: OpOverload, dim_place: int | str) -> Callable[..., tuple[Any, Any]]:
    """The rule of one operator along a dimension; ``dim_place`` is a keyword where ``dim`` is keyword-only."""
    positions = tensor_positions(op)

    def renumbered(in_dims: Sequence[Any], *args: Any) -> Any:
        arguments = with_defaults(op, args)
        present = [place for place in positions if isinstance(arguments[place], Tensor)]
        if len(present) > 1 or isinstance(dim_place, str) or arguments[dim_place] is None:
            return None
        bdim, rank, dim = in_dims[present[0]], arguments[present[0]].dim() - 1, arguments[dim_place]
        if rank == 0:
            return None
        arguments[dim_place] = physical_dims(dim, rank, bdim)
        return op, arguments, bdim

    def along(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        arguments = with_defaults(op, args)
        if isinstance(dim_place, str):
            default = next(a.default_value for a in op._schema.arguments if a.name == dim_place)
            dim = kwargs.get(dim_place, default)
        else:
            dim = arguments[dim_place]
        if dim is None:
            raise RuleDeclined(f"{op}: no dimension is given")
        present = [place for place in positions if isinstance(arguments[place], Tensor)]
        for place in present:
            arguments[place] = materialize(arguments[place], in_dims[place], info.batch_size)
        rank = arguments[present[0]].dim() - 1
        if rank == 0:
            for place in present:
                arguments[place] = arguments[place].unsqueeze(-1)
        shifted = physical_dims(dim, rank, 0)
        if isinstance(dim_place, str):
            kwargs[dim_place] = shifted
        else:
            arguments[dim_place] = shifted
        output = op(*arguments, **kwargs)
        if rank == 0:
            several = isinstance(output, tuple)
            outputs = output if several else (output,)
            if any(one.shape[-1] != 1 for one in outputs):
                raise RuleDeclined(f"{op}: a 0-d example becomes a vector")
            outputs = tuple(one.squeeze(-1) for one in outputs)
            output = outputs if several else outputs[0]
        return output, same_dims(output, 0)

    return one_operator(renumbered, along)


def physical_dims(dim: Any, rank: int, bdim: int) -> Any:
    """Where a logical dimension, or each of several, stands in the physical tensor."""
    return physical_dim(dim, rank, bdim) if isinstance(dim, int) else [physical_dim(one, rank, bdim) for one in dim]
