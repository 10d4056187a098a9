"""Products of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.operators.products import PRODUCTS
from functrans.shipped.sparsity_level import OperatorCall, pattern_of

aten = torch.ops.aten


@pattern_of(*(product.op for product in PRODUCTS.values() if product.summed or product.adds))
def product(call: OperatorCall) -> Any:
    *more, left, right = call.tensors()
    added = map(call.numbers, more)
    if not PRODUCTS[call.op].summed:
        return call.union(call.numbers(left).unsqueeze(1), call.numbers(right), *added)
    found = multiplied(call, left, right)
    if len(PRODUCTS[call.op].summed) == 2:
        found = call.sets.union_last(found.movedim(0, -1))
    return call.union(found.reshape(call.outs[0].shape), *added)


def multiplied(call: OperatorCall, left: Tensor, right: Tensor) -> Tensor:
    """[batch, n, m] of the product of ``left``, [(batch,) n, k] or [k], and ``right``, [(batch,) k, m] or [k]."""

    def as_left(t: Tensor) -> Tensor:
        return t if t.dim() == 3 else t.unsqueeze(0) if t.dim() == 2 else t[None, None]

    def as_right(t: Tensor) -> Tensor:
        return t if t.dim() == 3 else t.unsqueeze(0) if t.dim() == 2 else t[None, :, None]

    return call.union(
        half(call, as_left(call.numbers(left)), call.carried(left), right, as_right),
        half(call, as_right(call.numbers(right)).mT, call.carried(right), left, lambda t: as_left(t).mT).mT,
    )


def half(call: OperatorCall, numbers: Tensor, carried: Tensor | None, other: Tensor, shaped: Any) -> Tensor:
    """What the product depends on by one factor: a sum along the last dimension of ``numbers``, [batch, n, k], without
    what a known matrix ``other``, [batch, k, m], multiplies by zero."""
    batch, n, _ = numbers.shape
    m = shaped(torch.empty(other.shape, device="meta")).shape[-1]
    if carried is None or not carried.any():
        return torch.zeros(batch, n, m, dtype=torch.int64)
    known = call.known(other) if call.carried(other) is None else None
    if known is None or bool((known != 0).all()):
        return call.sets.union_last(numbers).unsqueeze(-1).expand(batch, n, m)
    kept = shaped(known != 0)
    columns = [
        call.sets.union_last(numbers[b][:, kept[b, :, j]]) for b in range(batch) for j in range(m)
    ]  # fmt: skip
    return torch.stack(columns).reshape(batch, m, n).mT if columns else torch.zeros(batch, n, m, dtype=torch.int64)
