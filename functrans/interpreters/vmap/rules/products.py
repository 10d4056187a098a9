"""Batching rules of matrix products.

A product of a batched and an unbatched operand is one large product: the batch joins the rows of the left operand or
the columns of the right one. Where the batched operand would have to be copied for that, it is a ``bmm`` of matrices as
they lie, and the unbatched operand is expanded, not copied. Two batched operands are a ``bmm``, or a multiplication
where there is nothing to sum (the weight gradient of one example through a linear layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import bilinear as torch_bilinear
from torch.nn.functional import linear as torch_linear

from functrans.interpreters.vmap.families import RuleDeclined, one_operator, pad_rank
from functrans.interpreters.vmap.table import (
    BATCHING_RULES,
    BatchInfo,
    Dims,
    Output,
    batching_rule,
    logical_rank,
    materialize,
    to_front,
)
from functrans.operators.products import PRODUCTS, Product
from functrans.operators.views import wrap_dim
from functrans.tensors.broadcasting import known_contiguous

aten = torch.ops.aten

# A bmm of matrices with fewer rows or columns than this loses more than the copy costs.
FEW = 16

# From this many elements on, a batch of matrices is as fast as one matrix with all their rows.
LARGE_MATRIX = 4096


def matmul_pair(x: Tensor, x_dim: int | None, y: Tensor, y_dim: int | None) -> Output:
    """``matmul`` of examples of rank 1 or more, of which at least one operand is batched.

    A batch of sparse matrices is taken as a dense one: PyTorch has next to no products of them.
    """
    if x_dim is not None and x.layout is not torch.strided:
        x = x.to_dense()
    if y_dim is not None and y.layout is not torch.strided:
        y = y.to_dense()
    if y_dim is None:
        return matmul_rows(x, x_dim, y)  # type: ignore[arg-type]
    if x_dim is None:
        return matmul_columns(x, y, y_dim)
    x, y = to_front(x, x_dim), to_front(y, y_dim)
    x_rank, y_rank = x.dim() - 1, y.dim() - 1
    if x_rank == 2 and y_rank == 2:
        return matmul_each(x, y), 0
    if y_rank == 1:
        # A row times the transpose: kernels are slower for a single column.
        y = y.unsqueeze(1)
        if x_rank == 1:
            return matmul_each(x.unsqueeze(1), y.mT).squeeze(2).squeeze(1), 0
        if x_rank == 2:
            return matmul_each(y, x.mT).squeeze(1), 0
        return matmul_each(x, pad_rank(y.mT, 0, x_rank)).squeeze(-1), 0
    if x_rank == 1:
        return matmul_each(pad_rank(x, 0, y_rank), y).squeeze(-2), 0
    return matmul_each(pad_rank(x, 0, y_rank), pad_rank(y, 0, x_rank)), 0


def matmul_each(x: Tensor, y: Tensor) -> Tensor:
    """Pairs of matrices; with nothing to sum, multiplication is faster."""
    if x.shape[-1] == 1 and y.shape[-2] == 1 and x.dtype is y.dtype and x.dtype is not torch.bool:
        return x * y
    return torch.bmm(x, y) if x.dim() == 3 else torch.matmul(x, y)


def matmul_rows(x: Tensor, x_dim: int, y: Tensor) -> Output:
    """The batch joins the rows of ``x``."""
    last = x.dim() - 1
    if y.dim() <= 2:
        if x_dim == last:
            x, x_dim = to_front(x, x_dim), 0
        if last == 2 and x_dim == 0 and y.dim() == 2 and x.shape[1] >= FEW and known_contiguous(x.mT):
            return torch.bmm(x, y.expand(x.shape[0], *y.shape)), 0
        # Only contiguous rows are folded into one product.
        return torch.matmul(x if last == 1 or known_contiguous(x) else x.contiguous(), y), x_dim
    if last == 1:
        out = torch.matmul(to_front(x, x_dim), y)
        return out, out.dim() - 2
    x = x.movedim(x_dim, last - 2)
    *lead, size, rows, inner = x.shape
    out = torch.matmul(x.reshape(*lead, size * rows, inner), y).unflatten(-2, (size, rows))
    return out, out.dim() - 3


def matmul_columns(x: Tensor, y: Tensor, y_dim: int) -> Output:
    """The batch joins the columns of ``y``."""
    if y.dim() == 2:
        out = torch.matmul(x, y if y_dim == 1 else y.t())
        return out, out.dim() - 1
    if y.dim() == 3 and x.dim() <= 2:
        y = to_front(y, y_dim)
        if x.dim() == 1:
            return torch.matmul(x, y), 0
        if y.shape[2] >= FEW:
            return torch.bmm(x.expand(y.shape[0], *x.shape), y), 0
        y_dim = 0
    y = y.movedim(y_dim, -2)
    *lead, size, columns = y.shape
    out = torch.matmul(x, y.reshape(*lead, size * columns)).unflatten(-1, (size, columns))
    return out, out.dim() - 2


# ---------------------------------------------------------------------------------------------------------------
# Products alone


def pair_as_it_lies(in_dims: Dims, x: Tensor, y: Tensor) -> Any:
    """Batches whose product is one operator on tensors as they lie; what is frequent of ``matmul_pair``."""
    x_dim, y_dim = in_dims
    if x_dim is None:
        return (aten.linear.default, (y, x), 0) if x.dim() == 2 and y_dim == 0 and y.dim() == 2 else None
    rank = x.dim() - 1
    if y_dim is None:
        fits = x_dim < rank <= 2 and 1 <= y.dim() <= 2 and x.layout is torch.strided
        return (aten.matmul.default, (x, y), x_dim) if fits and (rank == 1 or known_contiguous(x)) else None
    if x_dim != 0 or rank != 2 or x.shape[2] == 1 or y_dim != 0 or y.dim() != 3 or y.layout is not torch.strided:
        return None
    return aten.bmm.default, (x, y), 0


def matrices_as_they_lie(in_dims: Dims, x: Tensor, y: Tensor) -> Any:
    """The same for ``mm``, which takes matrices alone."""
    fit = logical_rank(x, in_dims[0]) == 2 == logical_rank(y, in_dims[1])
    return pair_as_it_lies(in_dims, x, y) if fit else None


def matmul(info: BatchInfo, in_dims: Dims, x: Tensor, y: Tensor) -> Output:
    """Any ranks from 1 on."""
    expect_ranks(in_dims, x, y)
    return matmul_pair(x, in_dims[0], y, in_dims[1])


batching_rule(aten.matmul.default, aten.linalg_matmul.default)(one_operator(pair_as_it_lies, matmul))


def multiplied(product: Product, in_dims: Dims, x: Tensor, y: Tensor) -> Output:
    """What ``product`` says, of which at least one factor is batched."""
    expect_ranks(in_dims, x, y, ranks=(len(product.x), len(product.y)))
    x_dim, y_dim = in_dims
    if product.conjugates and x.is_complex():
        x = x.conj()
    if len(product.x) == 3:
        expect_same_length(in_dims, x, y)
    if not product.summed:
        return to_front(x, x_dim).unsqueeze(-1) * to_front(y, y_dim).unsqueeze(-2), 0
    if len(product.summed) == 1:
        return matmul_pair(x, x_dim, y, y_dim)
    # The sum of the products of pairs of matrices is one product of longer rows and columns. (Their lengths are
    # multiplied out: flatten cannot infer them where the batch is empty.)
    x, y = to_front(x, x_dim).transpose(-3, -2), to_front(y, y_dim)
    x = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    y = y.reshape(*y.shape[:-3], y.shape[-3] * y.shape[-2], y.shape[-1])
    return matmul_pair(x, None if x_dim is None else 0, y, None if y_dim is None else 0)


def expect_ranks(in_dims: Dims, *tensors: Tensor, ranks: Sequence[int] | None = None) -> None:
    """Decline examples that PyTorch refuses, although their batch would look right to it."""
    for place, x in enumerate(tensors):
        rank = x.dim() if in_dims[place] is None else x.dim() - 1
        if rank != ranks[place] if ranks is not None else rank == 0:
            raise RuleDeclined(f"operand {place} has rank {rank}")


def expect_same_length(in_dims: Dims, x: Tensor, y: Tensor) -> None:
    """The first dimension of the examples. (Unlike ``matmul``, batches of matrices do not broadcast.)"""
    x_place, y_place = (0 if d is None or d > 0 else 1 for d in in_dims[:2])
    if x.shape[x_place] != y.shape[y_place]:
        raise RuleDeclined("batch1 and batch2 differ in their first dimension")


# ---------------------------------------------------------------------------------------------------------------
# Products and sums


def add_product(
    addend: Tensor, addend_dim: int | None, out: Tensor, out_dim: int | None, beta: Any, alpha: Any
) -> Output:
    """``beta * addend + alpha * out``, where an addend with ``beta=0`` is not looked at."""
    rank, given = logical_rank(out, out_dim), logical_rank(addend, addend_dim)
    if given > rank:
        raise RuntimeError(f"expected an addend of at most {rank} dimensions, those of the product, but got {given}")
    if addend.dtype is not out.dtype or out.dtype is torch.bool:
        raise RuleDeclined("PyTorch refuses, or does not multiply")
    if not out.is_floating_point() and not out.is_complex() and (isinstance(alpha, float) or isinstance(beta, float)):
        raise RuleDeclined("a factor that is not integral")
    out = to_front(out, out_dim)
    addend = addend if addend_dim is None else pad_rank(addend, addend_dim, rank)
    sizes = addend.shape[addend.dim() - given :]
    if any(a != 1 and a != b for a, b in zip(reversed(sizes), reversed(out.shape))):
        # Refused here: PyTorch's own pieces of addmm would expand the product.
        product_shape = list(out.shape)[-rank:]
        raise RuntimeError(f"an addend of shape {list(sizes)} does not expand to the product, of {product_shape}")
    if beta == 0:
        out = out if alpha == 1 else out * alpha
        return out, None if out_dim is None else 0
    return torch.add(addend if beta == 1 else addend * beta, out, alpha=alpha), 0


def rule_of(product: Product) -> Callable[..., Output]:
    """The rule of ``op(x, y)``, or of ``op(addend, x, y, *, beta, alpha)``."""

    def multiply(info: BatchInfo, in_dims: Dims, x: Tensor, y: Tensor) -> Output:
        return multiplied(product, in_dims, x, y)

    def add(
        info: BatchInfo, in_dims: Dims, addend: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> Output:
        if not product.summed:  # it promotes, and takes an addend without dimensions for one that has them
            dtype = torch.promote_types(addend.dtype, torch.promote_types(x.dtype, y.dtype))
            addend, x, y = addend.to(dtype), x.to(dtype), y.to(dtype)
        batched = in_dims[1] is not None or in_dims[2] is not None
        out, out_dim = multiplied(product, in_dims[1:], x, y) if batched else (product.multiply(x, y), None)
        return add_product(addend, in_dims[0], out, out_dim, beta, alpha)

    return add if product.adds else multiply


RULES = {op: rule_of(product) for op, product in PRODUCTS.items()}
RULES[aten.mm.default] = one_operator(matrices_as_they_lie, RULES[aten.mm.default])


@batching_rule(aten.addmm.default)
def addmm(
    info: BatchInfo, in_dims: Dims, addend: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Output:
    """One fused kernel where the addend is a row of the product, or both factors are batched."""
    addend_dim, x_dim, y_dim = in_dims
    rank = logical_rank(addend, addend_dim)
    if x_dim is not None and rank <= 2:
        expect_ranks(in_dims[1:], x, y, ranks=(2, 2))
        if y_dim is None and addend_dim is None and rank <= 1:
            x = to_front(x, x_dim)
            size, rows, inner = x.shape
            out = torch.addmm(addend, x.reshape(size * rows, inner), y, beta=beta, alpha=alpha)
            return out.unflatten(0, (size, rows)), 0
        if y_dim is not None:
            addend = addend if addend_dim is None else pad_rank(addend, addend_dim, 2)
            return torch.baddbmm(addend, to_front(x, x_dim), to_front(y, y_dim), beta=beta, alpha=alpha), 0
    return RULES[aten.addmm.default](info, in_dims, addend, x, y, beta=beta, alpha=alpha)


for _op, _rule in RULES.items():
    if _op not in BATCHING_RULES:
        BATCHING_RULES.add(_op, _rule)


# ---------------------------------------------------------------------------------------------------------------
# Layers


def layer_as_it_lies(in_dims: Dims, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """One layer for all examples."""
    bdim = in_dims[0]
    if bdim is None or bdim == x.dim() - 1 or any(d is not None for d in in_dims[1:]) or not known_contiguous(x):
        return None
    return aten.linear.default, (x, weight, bias), bdim


def linear(info: BatchInfo, in_dims: Dims, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Output:
    """The whole layer; a batched weight with an unbatched input is a layer with more outputs."""
    x_dim, weight_dim = in_dims[0], in_dims[1]
    bias_dim = None if bias is None else in_dims[2]
    if weight_dim is None and bias_dim is None:
        last = x.dim() - 1
        if last == 0:
            raise RuleDeclined("linear of a scalar")
        if x_dim == last:
            x, x_dim = to_front(x, x_dim), 0
        if last > 1 and not known_contiguous(x):
            x = x.contiguous()
        return torch_linear(x, weight, bias), x_dim
    if logical_rank(weight, weight_dim) != 2 or logical_rank(x, x_dim) == 0:
        raise RuleDeclined("linear with a weight that is no matrix")
    if bias is not None and logical_rank(bias, bias_dim) != 1:
        raise RuleDeclined("linear with a bias that is no vector")
    if weight_dim is None:
        out = torch_linear(to_front(x, x_dim), weight)
        return out + pad_rank(bias, bias_dim, logical_rank(x, x_dim)), 0  # type: ignore[arg-type]
    weight = to_front(weight, weight_dim)
    size, outputs, inputs = weight.shape
    count = math.prod(x.shape[:-1]) if x_dim is None else 0
    if inputs * outputs >= LARGE_MATRIX and count > 1:
        # Not one wide product: its result would have the batch inside, and what follows would have to rearrange it.
        x, x_dim = x.unsqueeze(0).expand(size, *x.shape), 0
    if x_dim is None:
        folded = weight.reshape(size * outputs, inputs)
        if bias_dim is None:
            out = torch_linear(x, folded).unflatten(-1, (size, outputs))
            return out if bias is None else out + bias, out.dim() - 2
        bias = to_front(bias, bias_dim)  # type: ignore[arg-type]
        if bias.shape[1] != outputs:
            raise RuleDeclined("a bias that does not fit the weight")
        out = torch_linear(x, folded, bias.reshape(size * outputs)).unflatten(-1, (size, outputs))
        return out, out.dim() - 2
    x = to_front(x, x_dim)
    lead = x.shape[1:-1]
    rows = x if len(lead) == 1 else x.reshape(size, math.prod(lead), x.shape[-1])
    if bias is None:
        out = torch.bmm(rows, weight.mT)
    else:
        bias = bias if bias_dim is None else to_front(bias, bias_dim).unsqueeze(1)
        out = torch.baddbmm(bias, rows, weight.mT)
    return out if len(lead) == 1 else out.reshape(size, *lead, outputs), 0


batching_rule(aten.linear.default)(one_operator(layer_as_it_lies, linear))


@batching_rule(aten.bilinear.default)
def bilinear(
    info: BatchInfo, in_dims: Dims, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Output:
    """A batched weight multiplies one input by a matrix product, and the other by a second one."""
    weight_dim, bias_dim = in_dims[2], None if bias is None else in_dims[3]
    x_rank, y_rank = (logical_rank(v, d) for v, d in zip((x, y), in_dims))
    if x_rank != y_rank or x_rank == 0 or logical_rank(weight, weight_dim) != 3:
        raise RuleDeclined("bilinear takes inputs of one rank")
    x, y = (materialize(v, d, info.batch_size) for v, d in zip((x, y), in_dims))
    if weight_dim is None:
        if bias_dim is None:
            return torch_bilinear(x, y, weight, bias), 0
        out = torch_bilinear(x, y, weight)
    else:
        weight = to_front(weight, weight_dim)
        size, outputs, inner, other = weight.shape
        lead = x.shape[1:-1]
        if y.shape[1:-1] != lead:
            raise RuleDeclined("bilinear takes inputs of one shape")
        rows = math.prod(lead)
        columns = weight.permute(0, 2, 1, 3).reshape(size, inner, outputs * other)
        partial = torch.bmm(x.reshape(size, rows, inner), columns).reshape(size * rows, outputs, other)
        out = torch.bmm(partial, y.reshape(size * rows, other, 1)).reshape(size, *lead, outputs)
    if bias is not None:
        out = out + (bias if bias_dim is None else pad_rank(bias, bias_dim, out.dim() - 1))
    return out, 0


@batching_rule(aten._trilinear.default)
def trilinear(
    info: BatchInfo,
    in_dims: Dims,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Output:
    """Every dimension that is named counts in the expanded operands."""
    operands = [materialize(v, d, info.batch_size) for v, d in zip((x, y, z), in_dims)]
    rank = operands[0].dim() - 1 + len(expand1)
    shifted = [[wrap_dim(d, rank) + 1 for d in dims] for dims in (expand1, expand2, expand3, sumdim)]
    return aten._trilinear.default(*operands, *shifted, wrap_dim(unroll_dim, rank) + 1), 0
