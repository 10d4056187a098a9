"""What a function costs: floating-point operations and bytes, counted where ``count`` stands among the levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils.flop_counter import flop_registry

from functrans.api.checks import check_callable
from functrans.api.compiled import TRACED, named_after
from functrans.errors import LayoutError
from functrans.extension.levels import PassThrough
from functrans.extension.transforming import transform
from functrans.operators.info import VIEW, op_info
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tree_flatten


class OperatorCounts(NamedTuple):
    """What the calls of one operator cost together."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0


class Counts(NamedTuple):
    """What a function cost: all together, and by operator."""

    flops: int
    bytes: int
    operators: dict[str, OperatorCounts]


def count(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func``, and what running it costs.

    The place among other transforms says what is counted. ``count(vmap(f))`` counts the operators of the whole batch,
    ``count(f)`` inside of vmap those of one example; ``count(grad(f))`` counts the backward pass too, ``count(f)``
    inside of grad what the function itself does.

    FLOPs are those of ``torch.utils.flop_counter``: of products of matrices, convolutions and attention, with an
    addition and a multiplication as two. At the base, ``count(f)`` finds what its ``FlopCounterMode`` finds. Bytes are
    those of the tensors that an operator takes and returns, by their shapes, each argument once; of views none. (They
    are an upper bound for what goes to memory: caches and fused kernels take less.)

    Args:
        func: any function; it may apply transforms and be transformed.

    Returns:
        A function of the same arguments that returns ``(output, Counts(flops, bytes, operators))``. ``operators`` has
        ``OperatorCounts(calls, flops, bytes)`` by the operator's name; composite operators count as their pieces.

    Raises:
        CustomFunctionError: an ``autograd.Function`` was applied inside.

    Example:
        >>> import torch
        >>> from functrans import count, grad, vmap
        >>> f = lambda w, x: (w @ x.unsqueeze(1)).sum()
        >>> w, xs = torch.ones(2, 3), torch.ones(10, 3)
        >>> count(f)(w, xs[0])[1].flops, count(vmap(f, in_dims=(None, 0)))(w, xs)[1].flops
        (12, 120)
        >>> count(grad(f))(w, xs[0])[1].operators["aten.mm.default"]
        OperatorCounts(calls=2, flops=24, bytes=88)
    """
    check_callable("count", func)

    @named_after(func)
    def counted(*args: Any, **kwargs: Any) -> tuple[Any, Counts]:
        if is_dynamo_compiling():
            return TRACED(count, func, {}, args, kwargs, None)
        level = Counting(func)
        out = transform(level, func)(*args, **kwargs)
        return out, level.counts()

    return counted


class Counting(PassThrough):
    """Adds up what the operators that it sees cost."""

    kind = "count"
    pieces = True

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__(func)
        self.operators: dict[str, OperatorCounts] = {}

    def after(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        formula = flop_registry.get(op.overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        moved = 0 if op_info(op).kind_by_schema == VIEW else bytes_of((args, kwargs)) + bytes_of(out)
        before = self.operators.get(str(op), OperatorCounts())
        self.operators[str(op)] = OperatorCounts(before.calls + 1, before.flops + flops, before.bytes + moved)

    def counts(self) -> Counts:
        costs = self.operators.values()
        return Counts(sum(c.flops for c in costs), sum(c.bytes for c in costs), self.operators)


def bytes_of(tree: Any) -> int:
    """The bytes of the tensors in ``tree``, each once."""
    tensors = {id(x): x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)}
    return sum(size_of(x) for x in tensors.values())


def size_of(x: Tensor) -> int:
    if x.layout is torch.strided:
        return x.numel() * x.dtype.itemsize
    if x.layout is not torch.sparse_coo:
        raise LayoutError(x)
    x = x.coalesce()
    return size_of(x.indices()) + size_of(x.values())
