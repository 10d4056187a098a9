"""Attention and dropout.

Attention has no entry: PyTorch's fused kernels have first derivatives only, in reverse mode only. ``attention`` says
what the operator is made of, so that grad and jvp see products and a softmax, each with derivatives of every order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.factories import ones_for
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.named import with_names
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``aten.scaled_dot_product_attention`` in terms of simpler operators.

    As in PyTorch, half precision is computed in float32, and a row whose keys are all masked gives zero.
    """
    if is_causal and attn_mask is not None:
        raise RuntimeError("scaled_dot_product_attention: attn_mask and is_causal=True exclude each other; give one.")
    dtype = query.dtype
    if len({x.dtype for x in (query, key, value)}) > 1 or min(x.dim() for x in (query, key, value)) < 2:
        given = ", ".join(f"{x.dtype} of shape {tuple(x.shape)}" for x in (query, key, value))
        raise RuntimeError(
            f"scaled_dot_product_attention: got query, key and value {given}; "
            "expected one dtype, and at least two dimensions of each."
        )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, dtype):
        raise RuntimeError(
            f"scaled_dot_product_attention: got attn_mask of {attn_mask.dtype}; expected torch.bool or query's {dtype}."
        )
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores, masked = scores_of(query, key, attn_mask, is_causal, scale)
    weights = aten._safe_softmax.default(scores, -1) if masked else scores.softmax(-1)
    if dropout_p != 0:
        weights = torch.dropout(weights, dropout_p, True)
    out = torch.matmul(weights, value)
    return out if out.dtype == dtype else out.to(dtype)


def scores_of(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, bool]:
    """What the softmax is taken of, and whether a row of it may be masked as a whole."""
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else math.inf
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        above = ones_for(scores, *scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(above, -math.inf), False
    if mask is None:
        return scores, False
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask, True


def flash_attention_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``aten._scaled_dot_product_flash_attention_for_cpu``: the attention, and the logarithm of the softmax's divisor.

    PyTorch's own derivative takes the second output for a constant.
    """
    if dropout_p > 0:
        raise RuntimeError("_scaled_dot_product_flash_attention_for_cpu has no dropout: expected dropout_p=0.0.")
    out = attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    return out, scores_of(query, key, attn_mask, is_causal, scale)[0].logsumexp(-1)


# ---------------------------------------------------------------------------------------------- dropout


def dropout_scale(p: float, train: bool | None) -> float:
    if train is False:
        return 1.0
    return 0.0 if p == 1 else 1 / (1 - p)


def dropout_input(v: dict[str, Any]) -> Tensor:
    return aten.native_dropout_backward.default(v["grads"][0], v["results"][1], dropout_scale(v["p"], v["train"]))


def dropout_tangent(v: dict[str, Any]) -> tuple[Tensor, None]:
    return aten.native_dropout_backward.default(v["input_t"], v["results"][1], dropout_scale(v["p"], v["train"])), None


derivative(
    aten.native_dropout.default,
    tangent=with_names(("results", "p", "train", "input_t"), dropout_tangent),
    input=with_names(("grads", "results", "p", "train"), dropout_input),
)
derivative(
    aten.native_dropout_backward.default,
    tangent="linear",
    grad_output=lambda grad, mask, scale: aten.native_dropout_backward.default(grad, mask, scale),
)


DECOMPOSITIONS.add(aten.scaled_dot_product_attention.default, attention)
DECOMPOSITIONS.add(aten._scaled_dot_product_flash_attention_for_cpu.default, flash_attention_for_cpu)
