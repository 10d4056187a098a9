"""Batching rules of quantization that is imitated in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, materialize

aten = torch.ops.aten


@batching_rule(aten.fake_quantize_per_channel_affine_cachemask.default)
def fake_quantize_per_channel(
    info: BatchInfo,
    in_dims: Sequence[Any],
    self: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
) -> tuple[Any, Any]:
    """What each example scales for itself are channels of its own."""
    size, (of_self, of_scale, of_zero) = info.batch_size, in_dims[:3]
    x = materialize(self, of_self, size)
    if not 0 <= axis < x.dim() - 1 or scale.dim() != 1 + (of_scale is not None):
        raise RuleDeclined("fake_quantize_per_channel_affine: one scale for each place along an axis")
    if of_scale is None and of_zero is None:
        out, mask = aten.fake_quantize_per_channel_affine_cachemask.default(
            x, scale, zero_point, axis + 1, quant_min, quant_max
        )
        return (out, mask), (0, 0)
    scales, zeros = (materialize(v, d, size).flatten() for v, d in ((scale, of_scale), (zero_point, of_zero)))
    channels = x.movedim(axis + 1, 1)
    out, mask = aten.fake_quantize_per_channel_affine_cachemask.default(
        channels.flatten(0, 1), scales, zeros, 0, quant_min, quant_max
    )
    whole = [v.unflatten(0, channels.shape[:2]).movedim(1, axis + 1) for v in (out, mask)]
    return tuple(whole), (0, 0)
