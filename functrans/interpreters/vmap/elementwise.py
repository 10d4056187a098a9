"""The family of elementwise operators: batch dimensions are aligned, and types promoted as for one example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import (
    RuleDeclined,
    family,
    one_operator,
    pad_rank,
    same_dims,
    tensor_positions,
)
from functrans.interpreters.vmap.table import BatchInfo, logical_rank, materialize
from functrans.pytorch.torch_private import OpOverload


@family
def elementwise(
    op: OpOverload, promoting: tuple[int, ...] | None = None, expand: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """Operators that broadcast and promote like ``add``, whatever their number of tensors.

    ``promoting`` names the places that take part in type promotion, where not all tensors do.
    ``expand`` is for kernels that want all their tensors in one shape.
    """
    positions = tensor_positions(op)
    if len(positions) == 1:
        return elementwise_unary(op, positions[0])
    if expand:
        return elementwise_expanded(op, positions)
    if positions == (0, 1) and promoting is None:
        return elementwise_binary(op)
    return elementwise_nary(op, positions, positions if promoting is None else promoting)


def elementwise_unary(op: OpOverload, place: int) -> Callable[..., tuple[Any, Any]]:
    """One tensor: nothing is moved."""
    return one_operator(lambda in_dims, *args: (op, args, in_dims[place]))


def elementwise_binary(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """Two tensors in front; see ``binary_in_place`` for the cases that need no extra view."""

    def as_they_are(in_dims: Sequence[Any], *args: Any) -> Any:
        bdim = binary_in_place(in_dims[0], in_dims[1], args[0], args[1])
        return None if bdim is None else (op, args, bdim)

    return one_operator(as_they_are, elementwise_nary(op, (0, 1), (0, 1)))


def binary_in_place(x_dim: int | None, y_dim: int | None, x: Any, y: Any) -> int | None:
    """The batch dimension of the output if the physical operands broadcast and promote as they are, else None."""
    if y_dim is None:
        if not isinstance(y, Tensor):
            return x_dim
        x_rank = x.dim()
        # An example of rank 0 is a 0-d tensor in promotion, but its batch is not.
        if x_dim is not None and y.dim() < x_rank - x_dim and (x_rank > 1 or x.dtype is y.dtype):
            return x_dim
    elif x_dim is None:
        if not isinstance(x, Tensor):
            return y_dim
        y_rank = y.dim()
        if x.dim() < y_rank - y_dim and (y_rank > 1 or x.dtype is y.dtype):
            return y_dim
    elif x_dim == y_dim and x.dim() == y.dim():
        return x_dim
    return None


def elementwise_nary(
    op: OpOverload, positions: tuple[int, ...], promoting: tuple[int, ...]
) -> Callable[..., tuple[Any, Any]]:
    """Any number of tensors: batch dimensions in front, ranks aligned, promotion as for one example."""
    several = len(op._schema.returns) > 1

    def nary(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        aligned: Sequence[Any] = args
        if not already_aligned(args, in_dims, positions):
            aligned = align(args, in_dims, positions)
            restore_promotion(aligned, args, in_dims, promoting)
        output = op(*aligned, **kwargs)
        return output, same_dims(output, 0) if several else 0

    return nary


def elementwise_expanded(op: OpOverload, positions: tuple[int, ...]) -> Callable[..., tuple[Any, Any]]:
    """Kernels that do not broadcast, or not always: every tensor gets the full physical shape."""
    several = len(op._schema.returns) > 1

    def expanded(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        full = list(args)
        present = [place for place in positions if place < len(args) and isinstance(args[place], Tensor)]
        for place in present:
            full[place] = materialize(args[place], in_dims[place], info.batch_size)
        first = full[present[0]]
        for place in present[1:]:
            if full[place].dim() != first.dim():
                raise RuleDeclined(f"{op}: its tensors have different ranks")
            if full[place].dtype is not first.dtype and first.dim() == 1:
                raise RuleDeclined(f"{op}: 0-d tensors of different dtypes")
        output = op(*full, **kwargs)
        return output, same_dims(output, 0) if several else 0

    return expanded


def already_aligned(args: Sequence[Any], in_dims: Sequence[Any], positions: Sequence[int]) -> bool:
    """Whether the physical tensors broadcast and promote as they are: the frequent case, decided quickly."""
    rank = 0
    for place in positions:
        if place < len(args) and in_dims[place] is not None:
            dims = args[place].dim()
            if in_dims[place] != 0 or (rank and dims != rank):
                return False
            rank = dims
    if rank == 1:
        return False
    for place in positions:
        if (
            place < len(args)
            and in_dims[place] is None
            and isinstance(args[place], Tensor)
            and args[place].dim() >= rank
        ):
            return False
    return True


def align(args: Sequence[Any], in_dims: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    """The arguments with batch dimensions in front and logical ranks that broadcast from the right."""
    positions = [place for place in positions if place < len(args) and isinstance(args[place], Tensor)]
    rank = max(logical_rank(args[place], in_dims[place]) for place in positions)
    aligned = list(args)
    for place in positions:
        if in_dims[place] is not None:
            aligned[place] = pad_rank(args[place], in_dims[place], rank)
    return aligned


def restore_promotion(
    aligned: list[Any], args: Sequence[Any], in_dims: Sequence[Any], promoting: Sequence[int]
) -> None:
    """Cast in ``aligned`` what the physical ranks would promote otherwise than the examples' ranks do.

    A batch of 0-d examples is not a 0-d tensor, so PyTorch would give its dtype too much weight.
    """
    places = [place for place in promoting if place < len(args) and isinstance(args[place], Tensor)]
    if len({args[place].dtype for place in places}) < 2:
        return
    hidden = [place for place in places if in_dims[place] is not None and args[place].dim() == 1]
    if not hidden:
        return
    operands = [(args[place], in_dims[place]) for place in promoting if place < len(args) and args[place] is not None]
    # Numbers count less than any tensor and are left to the operator itself.
    dtype = logical_result_type([pair for pair in operands if isinstance(pair[0], Tensor)])
    for place in places:
        if logical_rank(args[place], in_dims[place]) == 0 and aligned[place].dtype is not dtype:
            aligned[place] = aligned[place].to(dtype)


def combined_dtype(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    """Promotion between two categories: the lower one counts only if it is of a higher kind."""
    if higher is None or lower is None:
        return higher or lower
    if higher.is_complex:
        return higher
    if higher.is_floating_point:
        return higher.to_complex() if lower.is_complex else higher
    if higher is torch.bool or lower.is_floating_point or lower.is_complex:
        return torch.promote_types(higher, lower)
    return higher


def logical_result_type(operands: Sequence[tuple[Any, int | None]]) -> torch.dtype:
    """The dtype that PyTorch promotes one example's ``(operand, bdim)`` pairs to; operands may be numbers."""
    dimensioned = zero_dim = number = None
    for x, bdim in operands:
        if not isinstance(x, Tensor):
            kind = torch.bool if isinstance(x, (bool, torch.SymBool)) else torch.int64
            if isinstance(x, (float, torch.SymFloat)):
                kind = torch.get_default_dtype()
            elif isinstance(x, complex):
                kind = torch.get_default_dtype().to_complex()
            number = kind if number is None else torch.promote_types(number, kind)
        elif logical_rank(x, bdim) > 0:
            dimensioned = x.dtype if dimensioned is None else torch.promote_types(dimensioned, x.dtype)
        else:
            zero_dim = x.dtype if zero_dim is None else torch.promote_types(zero_dim, x.dtype)
    result = combined_dtype(combined_dtype(dimensioned, zero_dim), number)
    assert result is not None
    return result
