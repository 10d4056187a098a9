"""What several families of the derivative table share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.tensors.broadcasting import holds

aten = torch.ops.aten


def conj(x: Any) -> Any:
    """Complex conjugate; no operation at all for real tensors and Python numbers."""
    if isinstance(x, Tensor):
        return x.conj() if x.dtype.is_complex else x
    return x.conjugate() if isinstance(x, complex) else x


def times(x: Tensor, factor: Any) -> Tensor:
    """``x * factor`` for a Python number ``factor``; ``x`` itself if that is 1."""
    return x if not isinstance(factor, Tensor) and factor == 1 else x * factor


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two tangents or cotangents, either of which may be missing."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as ``dtype``; of a complex ``x`` the real part, if ``dtype`` is real."""
    if x.dtype == dtype:
        return x
    if x.dtype.is_complex and not dtype.is_complex:
        x = torch.real(x)
    return x.to(dtype)


def wide(x: Any) -> Any:
    """``x``; truth values and small integers as int64, whose sums and products do not wrap around."""
    if not isinstance(x, Tensor) or x.dtype.is_floating_point or x.dtype.is_complex:
        return x
    return cast(x, torch.int64)


def sum_to_shape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The transpose of broadcasting: sum ``x`` down to ``shape``."""
    extra = x.dim() - len(shape)
    if extra:
        x = x.sum(list(range(extra)))
    stretched = [i for i, n in enumerate(shape) if holds(n == 1) and not holds(x.shape[i] == 1)]
    return x.sum(stretched, keepdim=True) if stretched else x


def reduced_dims(dim: int | Sequence[int] | None, ndim: int) -> list[int]:
    """The dimensions that a reduction with argument ``dim`` reduces, ascending; None and () mean all."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(ndim))
    if ndim == 0:
        return []
    return sorted(d % ndim for d in ([dim] if isinstance(dim, int) else dim))


def restore_dims(x: Tensor, dim: int | Sequence[int] | None, keepdim: bool, ndim: int) -> Tensor:
    """Give a reduction's output its reduced dimensions back, as size 1, so that it broadcasts with the input."""
    if keepdim or x.dim() in (0, ndim):  # a 0-d tensor broadcasts as it is
        return x
    for d in reduced_dims(dim, ndim):
        x = x.unsqueeze(d)
    return x


def recorded_at_base(*tensors: Tensor | None) -> bool:
    """Whether PyTorch's own autograd records what is computed of the tensors.

    It takes what fused backward operators get besides (statistics, distances) for constants when it differentiates them
    twice, or has no derivative of them; a formula in plain operators is right at every order.
    """
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        while type(x) is WrapperTensor:
            x = x.value
        if x is not None and x.requires_grad:
            return True
    return False


def where_or_zero(condition: Tensor, x: Tensor) -> Tensor:
    """``x`` where ``condition`` holds and exactly 0 elsewhere, also where ``x`` is infinite or NaN."""
    return aten.where.ScalarOther(condition, x, 0)  # PyTorch's parser of torch.where does not survive a tracer


def subtrahend(result: Tensor) -> Tensor:
    """The logarithm of a sum of exponentials, to be subtracted from its terms: where all are -inf, each counts as 0."""
    return result.masked_fill(result == -math.inf, 0)


def linear_recurrence(a: Tensor, b: Tensor, dim: int, *, reverse: bool = False) -> Tensor:
    """Solve ``s[k] = b[k] + a[k] * s[k - 1]`` along ``dim`` (with ``reverse``: ``s[k + 1]``), where ``s`` starts at 0.

    Done by doubling in log2(n) steps of products and sums only: no division, so zeros and derivatives of every order
    are right.
    """
    n = b.shape[dim] if b.dim() else 1
    step = 1
    while step < n:
        rest = n - step
        if reverse:
            near, far, edge = (0, rest), (step, rest), (rest, step)
        else:
            near, far, edge = (step, rest), (0, rest), (0, step)
        grown = b.narrow(dim, *near) + a.narrow(dim, *near) * b.narrow(dim, *far)
        product = a.narrow(dim, *near) * a.narrow(dim, *far)
        # the values at the edge are final; their factor would multiply the start, which is 0
        parts = [(grown, b.narrow(dim, *edge)), (product, a.narrow(dim, *edge))]
        b, a = (torch.cat(p if reverse else p[::-1], dim) for p in parts)
        step *= 2
    return b


def shifted(x: Tensor, dim: int, fill: float, *, reverse: bool = False) -> Tensor:
    """``x[k - 1]`` at place ``k`` along ``dim`` (with ``reverse``: ``x[k + 1]``), and ``fill`` at the end left free."""
    n = x.shape[dim] if x.dim() else 1
    if n == 0:
        return x
    if x.dim() == 0:
        return torch.full_like(x, fill)
    end = torch.full_like(x.narrow(dim, 0, 1), fill)
    return torch.cat([x.narrow(dim, 1, n - 1), end] if reverse else [end, x.narrow(dim, 0, n - 1)], dim)
