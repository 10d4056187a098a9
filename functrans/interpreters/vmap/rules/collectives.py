"""Functional collectives: the batch travels along, in one collective. Its size is the same on all ranks.

A loop over the examples would touch results before the collective has filled them, which ``wait_tensor`` waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo
from functrans.pytorch.distributed import FUNCTIONAL_COLLECTIVES
from functrans.pytorch.torch_private import OpOverload

#: What works on every element, whatever the shape.
ELEMENTWISE = ("all_reduce", "broadcast", "wait_tensor", "_wrap_tensor_autograd", "all_reduce_coalesced")
#: What cuts and joins along the first dimension: there the examples' own has to be.
ALONG_FIRST = (
    "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_gather_into_tensor_coalesced",
    "reduce_scatter_tensor_coalesced",
)  # fmt: skip


def elementwise(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    def rule(info: BatchInfo, in_dims: Sequence[Any], x: Any, *rest: Any) -> tuple[Any, Any]:
        return op(x, *rest), in_dims[0]

    return rule


def along_first(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    def rule(info: BatchInfo, in_dims: Sequence[Any], x: Any, *rest: Any) -> tuple[Any, Any]:
        if isinstance(x, Tensor):
            return op(batch_second(x, in_dims[0]), *rest), 1
        dims = [None if d is None else 1 for d in in_dims[0]]
        return op([v if d is None else batch_second(v, d) for v, d in zip(x, in_dims[0], strict=True)], *rest), dims

    return rule


def batch_second(x: Tensor, bdim: int) -> Tensor:
    x = x.movedim(bdim, 0)
    return (x.unsqueeze(0) if x.dim() == 1 else x.movedim(0, 1)).contiguous()


for namespace in FUNCTIONAL_COLLECTIVES:
    for names, make in ((ELEMENTWISE, elementwise), (ALONG_FIRST, along_first)):
        for name in names:
            packet = getattr(namespace, name, None)
            if packet is not None:
                op = packet.default
                BATCHING_RULES.add(op, make(op), place=f"{__file__}:{make.__code__.co_firstlineno}")
