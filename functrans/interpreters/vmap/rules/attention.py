"""Scaled dot-product attention: the batch joins the leading dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined, pad_rank
from functrans.interpreters.vmap.rules.folding import fold_n, unfold_n
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, logical_rank, materialize

aten = torch.ops.aten


@batching_rule(aten.scaled_dot_product_attention.default)
def attention_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> tuple[Tensor, int]:
    """Whole, so that the level below may still choose a fused kernel: those take 4 dimensions, so B and N are one."""
    size = info.batch_size
    if dropout_p > 0:
        raise RuleDeclined("the dropout in the attention draws as the randomness of the vmap says")
    dims = [*in_dims, None, None][:4]
    rank = logical_rank(query, dims[0])
    if any(logical_rank(x, bdim) != rank for x, bdim in zip((key, value), dims[1:])) or rank < 2 or size == 0:
        raise RuleDeclined("attention with broadcasting ranks")
    mask_dim = dims[3]
    if mask is not None and logical_rank(mask, mask_dim) > rank:
        raise RuleDeclined("attention with a mask that adds dimensions to the output")
    triple = [materialize(x, bdim, size) for x, bdim in zip((query, key, value), dims)]
    if rank != 4:
        if mask is not None and mask_dim is not None:
            mask = pad_rank(mask, mask_dim, rank)
        return aten.scaled_dot_product_attention.default(*triple, mask, dropout_p, is_causal, **options), 0
    n = triple[0].shape[1]
    if any(x.shape[1] != n for x in triple):
        raise RuleDeclined("attention with broadcasting sizes")
    folded = [unit_stride(fold_n(x, 0, size)) for x in triple]
    mask = fold_mask(mask, mask_dim, size, n)
    output = aten.scaled_dot_product_attention.default(*folded, mask, dropout_p, is_causal, **options)
    return unfold_n(output, size, n), 0


def fold_mask(mask: Tensor | None, mask_dim: int | None, size: int, n: int) -> Tensor | None:
    """A mask that broadcasts to ``[N, H, L, S]`` per example, for ``[B * N, H, L, S]``."""
    if mask is None:
        return None
    if mask_dim is None and (mask.dim() < 4 or mask.shape[0] == 1):
        return mask
    mask = pad_rank(materialize(mask, mask_dim, size), 0, 4)
    return fold_n(mask.expand(size, n, *mask.shape[2:]), 0, size)


def unit_stride(x: Tensor) -> Tensor:
    """The fused kernels take the last dimension to have stride 1; only the whole operator checks (torch 2.13)."""
    return x if x.stride(-1) == 1 else x.contiguous()


@batching_rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_attention_for_cpu_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Folded into N; the mask is keyword-only, so shared."""
    size = info.batch_size
    if size == 0:
        raise RuleDeclined("flash attention of no examples")
    if dropout_p > 0 and info.randomness == "same":
        raise RuleDeclined("the examples would not share the dropout in the attention")
    folded = [unit_stride(fold_n(x, bdim, size)) for x, bdim in zip((query, key, value), in_dims)]
    n = folded[0].shape[0] // size
    outputs = aten._scaled_dot_product_flash_attention_for_cpu.default(
        *folded, dropout_p, is_causal, attn_mask=fold_mask(attn_mask, None, size, n), scale=scale
    )
    return (unfold_n(outputs[0], size, n), unfold_n(outputs[1], size, n)), (0, 0)


@batching_rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_attention_for_cpu_backward_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Folded into N; the mask is keyword-only, so shared."""
    size = info.batch_size
    if size == 0:
        raise RuleDeclined("flash attention of no examples")
    tensors = (grad_output, query, key, value, output, logsumexp)
    folded = [unit_stride(fold_n(x, bdim, size)) for x, bdim in zip(tensors, in_dims)]
    n = folded[0].shape[0] // size
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *folded, dropout_p, is_causal, attn_mask=fold_mask(attn_mask, None, size, n), scale=scale
    )
    return tuple(unfold_n(grad, size, n) for grad in grads), (0, 0, 0)
