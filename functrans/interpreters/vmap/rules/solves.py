"""Linear equations: a matrix, or its factors, and right-hand sides; the leading dimensions of the two broadcast.

Where all examples share the matrix it is factored once, and the batch joins the right-hand sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined, any_rank, family, pad_rank
from functrans.interpreters.vmap.table import (
    BatchInfo,
    batching_rule,
    logical_rank,
    logical_shape,
    materialize,
    to_front,
)
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------------------------
# Matrices on both sides


def fold_sides(b: Tensor, bdim: int, left: bool = True) -> Tensor:
    """A batch of right-hand sides for one matrix: the batch joins the columns, or the rows of a matrix on the right."""
    b = to_front(b, bdim)
    at = b.dim() - 2 - (not left)
    return b.movedim(0, at).flatten(at, at + 1)


def unfold_sides(x: Tensor, batch_size: int, left: bool = True) -> tuple[Tensor, int]:
    """The inverse for the solutions, with where the batch is then."""
    at = x.dim() - 1 - (not left)
    return x.unflatten(at, (batch_size, x.shape[at] // batch_size)), at


@batching_rule(aten.linalg_solve_triangular.default)
def solve_triangular_rule(
    info: BatchInfo, in_dims: Sequence[Any], a: Tensor, b: Tensor, *, left: bool = True, **kwargs: Any
) -> tuple[Tensor, int]:
    """One matrix for all examples has one set of right-hand sides."""
    if in_dims[0] is None and info.batch_size:
        out = aten.linalg_solve_triangular.default(a, fold_sides(b, in_dims[1], left), left=left, **kwargs)
        return unfold_sides(out, info.batch_size, left)
    a, b = padded_pair(in_dims, a, b)
    return aten.linalg_solve_triangular.default(a, b, left=left, **kwargs), 0


@batching_rule(aten.cholesky_solve.default)
def cholesky_solve_rule(
    info: BatchInfo, in_dims: Sequence[Any], b: Tensor, factor: Tensor, upper: bool = False
) -> tuple[Tensor, int]:
    """One matrix for all examples has one set of right-hand sides."""
    if in_dims[1] is None and info.batch_size:
        return unfold_sides(aten.cholesky_solve.default(fold_sides(b, in_dims[0]), factor, upper), info.batch_size)
    return aten.cholesky_solve.default(*padded_pair(in_dims, b, factor), upper), 0


def padded_pair(in_dims: Sequence[Any], *pair: Tensor) -> list[Tensor]:
    """Two matrices with leading dimensions that broadcast behind the batch."""
    rank = max(2, *(logical_rank(x, bdim) for x, bdim in zip(pair, in_dims)))
    return [x if bdim is None else pad_rank(x, bdim, rank) for x, bdim in zip(pair, in_dims)]


@family
def factored_solve(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """``op(factors, pivots, b)``: factors and pivots have the same leading dimensions, which broadcast with ``b``'s."""

    def solve(
        info: BatchInfo, in_dims: Sequence[Any], factors: Tensor, pivots: Tensor, b: Tensor, **kwargs: Any
    ) -> tuple[Tensor, int]:
        factors_dim, pivots_dim, b_dim = in_dims[:3]
        shape = logical_shape(factors, factors_dim)
        if len(shape) < 2 or logical_rank(b, b_dim) < 2:
            raise RuntimeError(
                f"{op}: expected matrices, got tensors of {len(shape)} and {logical_rank(b, b_dim)} dimensions"
            )
        if logical_shape(pivots, pivots_dim) != shape[:-1]:
            raise RuntimeError(f"{op}: expected pivots of the shape of the factors {shape} without the last dimension")
        if factors_dim is None and pivots_dim is None and info.batch_size:
            left = kwargs.get("left", True)
            sides = fold_sides(b, b_dim, left)
            if factors.dim() > 2:
                factors, pivots = expanded_factors(factors, pivots, sides)
            return unfold_sides(op(factors, pivots, sides, **kwargs), info.batch_size, left)
        rank = max(logical_rank(factors, factors_dim), logical_rank(b, b_dim))
        b = b.unsqueeze(0) if b_dim is None else pad_rank(b, b_dim, rank)
        if factors_dim is not None or pivots_dim is not None or factors.dim() > 2:
            factors = pad_rank(materialize(factors, factors_dim, info.batch_size), 0, rank)
            pivots = pad_rank(materialize(pivots, pivots_dim, info.batch_size), 0, rank - 1)
            factors, pivots = expanded_factors(factors, pivots, b)
        return op(factors, pivots, b, **kwargs), 0

    # one of the kernels must not be run on an example that is not expanded, see expanded_factors
    return any_rank(solve)


def expanded_factors(factors: Tensor, pivots: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """linalg.ldl_solve reads beyond its factors where a leading dimension of size 1 broadcasts (torch 2.13)."""
    leading = broadcast_shapes(factors.shape[:-2], b.shape[:-2])
    return factors.expand(*leading, *factors.shape[-2:]), pivots.expand(*leading, *pivots.shape[-1:])


factored_solve(aten.linalg_lu_solve.default, aten.linalg_ldl_solve.default)


@batching_rule(aten.triangular_solve.default)
def triangular_solve_rule(
    info: BatchInfo, in_dims: Sequence[Any], b: Tensor, a: Tensor, *flags: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Both results have the broadcast leading dimensions."""
    b, a = padded_pair(in_dims, b, a)
    return aten.triangular_solve.default(b, a, *flags), (0, 0)


# ---------------------------------------------------------------------------------------------------------------
# Right-hand sides that are vectors or matrices


def is_vector_side(a: Tensor, a_dim: int | None, b: Tensor, b_dim: int | None) -> bool:
    """PyTorch's rule for one example: ``b`` is a (batch of) vectors if 1-d, or of the shape of ``a`` less its last dim.

    The physical shapes must not be asked: a batch of 3 x 3 matrices and one shared 3 x 3 ``b`` look like vectors.
    """
    a_shape = logical_shape(a, a_dim)
    b_shape = logical_shape(b, b_dim)
    return len(b_shape) == 1 or (len(a_shape) - 1 == len(b_shape) and a_shape[:-1] == b_shape)


def matrix_sides(info: BatchInfo, in_dims: Sequence[Any], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both as matrices of one rank, batched ones with their dimension in front; the last says that ``b`` was vectors.

    With equal ranks, PyTorch takes ``b`` for matrices.
    """
    a_dim, b_dim = in_dims[0], in_dims[1]
    vector = is_vector_side(a, a_dim, b, b_dim)
    if vector:
        b = b.unsqueeze(-1)
        b_dim = b_dim if b_dim is None or b_dim >= 0 else b_dim - 1
    rank = max(logical_rank(a, a_dim), logical_rank(b, b_dim))
    a = pad_rank(to_front(a, a_dim) if a_dim is not None else a.unsqueeze(0), 0, rank)
    b = pad_rank(to_front(b, b_dim) if b_dim is not None else b.unsqueeze(0), 0, rank)
    return a, b, vector


@batching_rule(aten._linalg_solve_ex.default)
def solve_ex_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    a: Tensor,
    b: Tensor,
    *,
    left: bool = True,
    check_errors: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The factors have the leading dimensions of ``a`` alone."""
    a_dim = in_dims[0]
    if a_dim is None and info.batch_size:
        return solve_shared(info, in_dims[1], a, b, left, check_errors)
    a_shape = logical_shape(a, a_dim)
    full_a, full_b, vector = matrix_sides(info, in_dims, a, b)
    if vector and not left:
        raise RuleDeclined("linalg.solve refuses vectors on the left")
    result, lu, pivots, status = aten._linalg_solve_ex.default(full_a, full_b, left=left, check_errors=check_errors)
    if vector:
        result = result.squeeze(-1)
    outer = [] if a_dim is None else [info.batch_size]
    factors = (
        lu.reshape(outer + a_shape),
        pivots.reshape(outer + a_shape[:-1]),
        status.reshape(outer + a_shape[:-2]),
    )
    return (result, *factors), (0, *[None if a_dim is None else 0] * 3)


def solve_shared(
    info: BatchInfo, b_dim: int, a: Tensor, b: Tensor, left: bool, check_errors: bool
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """One matrix for all examples: it is factored once, and vectors are columns of a matrix."""
    if is_vector_side(a, None, b, b_dim):
        if not left:
            raise RuleDeclined("linalg.solve refuses vectors on the left")
        sides = b.movedim(b_dim, -1)
        # Of as many dimensions as the matrix, so that it is not taken for vectors itself.
        sides = sides.reshape([1] * (a.dim() - sides.dim()) + list(sides.shape))
        result, *factors = aten._linalg_solve_ex.default(a, sides, left=True, check_errors=check_errors)
        return (result, *factors), (result.dim() - 1, None, None, None)
    sides = fold_sides(b, b_dim, left)
    if sides.dim() < a.dim():
        sides = sides.reshape([1] * (a.dim() - sides.dim()) + list(sides.shape))
    result, *factors = aten._linalg_solve_ex.default(a, sides, left=left, check_errors=check_errors)
    result, out_dim = unfold_sides(result, info.batch_size, left)
    return (result, *factors), (out_dim, None, None, None)


@batching_rule(aten.linalg_lstsq.default)
def lstsq_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    a: Tensor,
    b: Tensor,
    rcond: float | None = None,
    *,
    driver: str | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Outputs that a driver leaves out are empty."""
    rank = logical_rank(a, in_dims[0])
    rows, columns = logical_shape(a, in_dims[0])[-2:]
    if rows > columns and driver in ("gelsd", "gelss"):
        raise RuleDeclined("these drivers return residuals for full-rank examples only, and none for a mixed batch")
    if info.batch_size == 0 or logical_rank(b, in_dims[1]) > rank:
        raise RuleDeclined("linalg.lstsq of no examples, or with leading dimensions of the right-hand side only")
    full_a, full_b, vector = matrix_sides(info, in_dims, a, b)
    if not vector and logical_rank(b, in_dims[1]) != rank:
        raise RuleDeclined("linalg.lstsq makes vectors of a right-hand side of lower rank, or refuses it")
    full_a = full_a.expand(info.batch_size, *full_a.shape[1:])
    full_b = full_b.expand(info.batch_size, *full_b.shape[1:])
    solution, *others = aten.linalg_lstsq.default(full_a, full_b, rcond, driver=driver)
    if vector:
        solution = solution.squeeze(-1)  # the residuals keep their last dimension, as the operator's do
    return (solution, *others), (0, *[None if one.numel() == 0 and one.dim() == 1 else 0 for one in others])
