"""Backward operators that PyTorch has no derivative of, taken apart: a traced gradient is made of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.attention import scores_of
from functrans.derivatives.helpers import where_or_zero
from functrans.derivatives.losses import MEAN, bce_self, soft_margin_self
from functrans.derivatives.pointwise import logit_self
from functrans.derivatives.weight_norm import norm_shape
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten


def averaged(grad: Tensor, reduction: int, *tensors: Tensor | None) -> Tensor:
    """The cotangent of each element of a loss."""
    if reduction != MEAN:
        return grad
    return grad / max(math.prod(broadcast_shapes(*(t.shape for t in tensors if t is not None))), 1)


@DECOMPOSITIONS.register(aten.binary_cross_entropy_backward.default)
def bce_backward(
    grad_output: Tensor, self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    return averaged(grad_output, reduction, self, target, weight) * bce_self(self, target, weight)


@DECOMPOSITIONS.register(aten.soft_margin_loss_backward.default)
def soft_margin_backward(grad_output: Tensor, self: Tensor, target: Tensor, reduction: int) -> Tensor:
    return averaged(grad_output, reduction, self, target) * soft_margin_self(self, target)


@DECOMPOSITIONS.register(aten.logit_backward.default)
def logit_backward(grad_output: Tensor, self: Tensor, eps: float | None = None) -> Tensor:
    return logit_self(grad_output, self, eps)


@DECOMPOSITIONS.register(aten.hardsigmoid_backward.default)
def hardsigmoid_backward(grad_output: Tensor, self: Tensor) -> Tensor:
    return where_or_zero((self > -3) & (self < 3), grad_output / 6)


@DECOMPOSITIONS.register(aten._weight_norm_interface_backward.default)
def weight_norm_backward(
    grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    shape, others = norm_shape(saved_v, dim)
    g, norms = saved_g.reshape(shape), saved_norms.reshape(shape)
    along = (grad_w * saved_v).sum(others, keepdim=True) if others else grad_w * saved_v
    of_v = g / norms * (grad_w - saved_v * (along / norms.square()))
    return of_v.to(saved_v.dtype), (along / norms).reshape(saved_g.shape).to(saved_g.dtype)


@DECOMPOSITIONS.register(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``logsumexp`` counts as an argument of its own, as ``out`` does.

    Algorithm 4 of T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    weights = (scores_of(query, key, attn_mask, is_causal, scale)[0] - logsumexp.unsqueeze(-1)).exp()
    of_weights = grad_out @ value.mT - (grad_out * out).sum(-1, keepdim=True)
    of_scores = weights * of_weights * factor
    return of_scores @ key, of_scores.mT @ query, weights.mT @ grad_out
