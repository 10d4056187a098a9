"""Linear algebra: the operators take leading batch dimensions themselves. (Equations are in solves.py.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.nuclear import lyapunov, nuclear, polar
from functrans.interpreters.vmap.families import RuleDeclined, family, pad_rank, physical_dim, tensor_positions
from functrans.interpreters.vmap.table import (
    BatchInfo,
    batching_rule,
    logical_rank,
    logical_shape,
    materialize,
    to_front,
)
from functrans.pytorch.torch_private import OpOverload
from functrans.pytorch.versions import present

aten = torch.ops.aten


def one_batch_dim(outputs: Any, skippable: bool) -> tuple[Any, Any]:
    """Batch dimension 0 for every output; ``skippable`` ones of size ``[0]`` were not computed and have none."""
    if isinstance(outputs, Tensor):
        return outputs, 0
    return outputs, tuple(None if skippable and one.dim() == 1 and one.shape[0] == 0 else 0 for one in outputs)


# ---------------------------------------------------------------------------------------------------------------
# One shape of leading dimensions for all tensors


@family
def leading_batch(op: OpOverload, skippable: bool = False) -> Callable[..., tuple[Any, Any]]:
    """Operators whose tensors all have the same leading dimensions.

    ``skippable``: arguments may switch an output off, which is then a tensor of shape ``[0]``; the others are matrices
    or vectors per example.
    """
    positions = tensor_positions(op)

    def leading(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        arguments = list(args)
        for k in positions:
            arguments[k] = materialize(args[k], in_dims[k], info.batch_size)
        return one_batch_dim(op(*arguments, **kwargs), skippable)

    return leading


leading_batch(
    *present("cholesky"),
    aten.cholesky_inverse.default,
    aten.linalg_cholesky_ex.default,
    aten.linalg_eig.default,
    aten._linalg_eigvals.default,
    aten.linalg_inv_ex.default,
    aten.linalg_lu_factor_ex.default,
    aten.linalg_ldl_factor_ex.default,
    aten.linalg_householder_product.default,
    aten.geqrf.default,
    aten.ormqr.default,
)
# Composites: their pieces, among wrappers, would compute the vectors too.
leading_batch(aten.linalg_eigvalsh.default, aten.linalg_svdvals.default, nuclear, polar, lyapunov)
leading_batch(
    aten.linalg_qr.default,
    aten._linalg_svd.default,
    aten._linalg_eigh.default,
    aten.linalg_lu.default,
    aten.lu_unpack.default,
    skippable=True,
)


@batching_rule(aten.linalg_matrix_exp.default)
def matrix_exp_rule(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[Tensor, int]:
    """The kernel takes views that need contiguous input (torch 2.13)."""
    return aten.linalg_matrix_exp.default(to_front(x, in_dims[0]).contiguous()), 0


@family
def determinant(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """Determinants, whose last outputs are LU factors: of the transposed matrix, if it is real and contiguous.

    PyTorch's derivatives ask the matrix which it was, so that the strides of an example decide, not those of the batch.
    """

    def determinant(info: BatchInfo, in_dims: Sequence[Any], a: Tensor) -> tuple[Any, Any]:
        transposed = example_is_contiguous(a, in_dims[0])
        a = to_front(a, in_dims[0])
        if transposed:
            a = a.contiguous()
        *values, lu, pivots = op(a)
        if a.is_contiguous() != transposed and not a.is_complex():
            lu, pivots, _ = aten.linalg_lu_factor_ex.default(a.mT if transposed else a)
        outputs = (*values, lu, pivots)
        return outputs, (0,) * len(outputs)

    return determinant


def example_is_contiguous(x: Tensor, bdim: int) -> bool:
    """Whether one example has the strides of a contiguous tensor."""
    expected = 1
    for k in reversed([k for k in range(x.dim()) if k != bdim]):
        if x.shape[k] != 1 and x.stride(k) != expected:
            return False
        expected = expected * x.shape[k]
    return True


determinant(aten._linalg_det.default, aten._linalg_slogdet.default)


@batching_rule(aten.linalg_pinv.atol_rtol_tensor)
def pinv_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    a: Tensor,
    *,
    atol: Tensor | None = None,
    rtol: Tensor | None = None,
    hermitian: bool = False,
) -> tuple[Tensor, int]:
    """The tolerances are keyword-only, so shared; they broadcast with the leading dimensions of one example."""
    outer = a.dim() - 3
    for tolerance in (atol, rtol):
        outer = outer if tolerance is None else max(outer, tolerance.dim())
    if info.batch_size == 0:
        # The operator forgets to broadcast what is empty.
        example = a.new_zeros(logical_shape(a, in_dims[0]))
        output = aten.linalg_pinv.atol_rtol_tensor(example, atol=atol, rtol=rtol, hermitian=hermitian)
        return output.new_zeros([0, *output.shape]), 0
    a = pad_rank(a, in_dims[0], outer + 2)
    return aten.linalg_pinv.atol_rtol_tensor(a, atol=atol, rtol=rtol, hermitian=hermitian), 0


@batching_rule(aten.linalg_cross.default)
def cross_rule(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, y: Tensor, *, dim: int = -1) -> tuple[Tensor, int]:
    """PyTorch wants equal ranks; sizes broadcast."""
    rank = logical_rank(x, in_dims[0])
    if logical_rank(y, in_dims[1]) != rank or rank == 0:
        raise RuleDeclined("linalg.cross refuses different ranks")
    x = x.unsqueeze(0) if in_dims[0] is None else to_front(x, in_dims[0])
    y = y.unsqueeze(0) if in_dims[1] is None else to_front(y, in_dims[1])
    return aten.linalg_cross.default(x, y, dim=physical_dim(dim, rank, 0)), 0


@batching_rule(aten._linalg_check_errors.default)
def check_errors_rule(
    info: BatchInfo, in_dims: Sequence[Any], status: Tensor, api_name: str, *, is_matrix: bool
) -> tuple[None, None]:
    """Raises if any example failed, and names it as a batch element."""
    aten._linalg_check_errors.default(to_front(status, in_dims[0]).contiguous(), api_name, is_matrix=False)
    return None, None
