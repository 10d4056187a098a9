"""Batching rules of operators whose result's size a mask decides: only a mask that all examples share will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined, pad_rank
from functrans.interpreters.vmap.table import BatchInfo, batching_rule
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten


@batching_rule(aten.masked_select.default)
def masked_select(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, mask: Tensor) -> tuple[Any, Any]:
    """The places where the mask is True, from every example."""
    if in_dims[1] is not None:
        raise RuleDeclined("masked_select: the mask is batched")
    x = pad_rank(x, in_dims[0], max(mask.dim(), 1))
    shape = broadcast_shapes(x.shape[1:], mask.shape)
    chosen = mask.expand(shape).flatten().nonzero().squeeze(1)
    return x.expand(x.shape[0], *shape).flatten(1).index_select(1, chosen), 0
