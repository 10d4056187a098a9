"""The fused layers that ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` take in evaluation mode, where
autograd has nothing to record: inference kernels without any derivative. With wrappers among the arguments the door
runs these in their place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functrans.core.dispatch import base, scan
from functrans.functionalization.hidden_effects import stands_in_for
from functrans.operators.info import OpInfo
from functrans.pytorch.thread_state import STATE, running_at

aten = torch.ops.aten

#: ``mask_type``: over pairs of positions, over the keys of each sequence, or both in one mask.
POSITIONS, KEYS, BOTH = 0, 1, 2


@stands_in_for(aten._nested_tensor_from_mask_left_aligned.default)
def not_left_aligned(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Asked by ``nn.TransformerEncoder``, which takes a yes to mean that it may go on with nested tensors."""
    return False if scan(args, kwargs)[0] is not None else base(known.op, args, kwargs)


@stands_in_for(aten._native_multi_head_attention.default)
def fused_attention(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_native_multi_head_attention``: output and weights."""
    if scan(args, kwargs)[0] is None:
        return base(known.op, args, kwargs)
    with running_at(STATE.top):
        return self_attention(*args, **kwargs)


@stands_in_for(aten._transformer_encoder_layer_fwd.default)
def fused_layer(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_transformer_encoder_layer_fwd``."""
    if scan(args, kwargs)[0] is None:
        return base(known.op, args, kwargs)
    with running_at(STATE.top):
        return encoder_layer(*args, **kwargs)


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention of ``[N, L, E]``; a mask is True where a key is left out, or added to the scores."""
    if query is key and key is value:
        q, k, v = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        pairs = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, w, b) for x, w, b in pairs)
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(-2, -3) for x in (q, k, v))
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if mask is not None:
        if mask_type == KEYS:
            mask = mask[:, None, None, :]
        # added, as documented; the kernels take every nonzero number for True (torch 2.13)
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    out = F.linear((weights @ v).transpose(-2, -3).flatten(-2), proj_weight, proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """Attention and a feed-forward block, each with a residual and a layer norm, before or after."""

    def attend(x: Tensor) -> Tensor:
        return self_attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
        )[0]  # fmt: skip

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else hidden.relu(), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))
