"""Batching rules of the operators that assert: what is asserted has to hold for every example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.table import BatchInfo, batching_rule

aten = torch.ops.aten


@batching_rule(aten._assert_async.default, aten._assert_async.msg)
def assert_async(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *message: str) -> tuple[None, None]:
    """One assertion for the whole batch."""
    op = aten._assert_async.msg if message else aten._assert_async.default
    op((x != 0).all(), *message)
    return None, None


@batching_rule(aten._functional_assert_async.msg)
def functional_assert_async(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, message: str, token: Tensor
) -> tuple[Tensor, Any]:
    """The same; the token says what comes after it."""
    if in_dims[0] is not None:
        x = (x != 0).all()
    return aten._functional_assert_async.msg(x, message, token), in_dims[2]
