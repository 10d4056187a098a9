"""``torch._weight_norm`` taken apart: PyTorch's formula for its second derivatives is wrong (torch 2.13)."""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS

HALF = (torch.float16, torch.bfloat16)


def norm_shape(v: Tensor, dim: int) -> tuple[list[int], list[int]]:
    """The shape of norms over all dimensions but ``dim``, and these dimensions."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    return [1 if d in others else n for d, n in enumerate(v.shape)], others


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """``v`` with norms of ``g`` over all dimensions but ``dim``, and the norms that it had."""
    x = v.float() if v.dtype in HALF else v
    _, others = norm_shape(v, dim)
    norms = torch.linalg.vector_norm(x, 2, others, keepdim=True) if others else x.abs()
    norms = norms.reshape(g.shape)
    return (x * (g / norms)).to(v.dtype), norms


DECOMPOSITIONS.add(torch.ops.aten._weight_norm_interface.default, weight_norm)
