"""The batching rule of a ``Primitive``: its rule for the levels of vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functrans.errors import BatchingRuleError
from functrans.extension.primitive_derivatives import constants_below, for_argument, values_of
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.tensors.pytrees import broadcast_prefix, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from functrans.extension.primitives import Primitive


class PrimitiveBatching:
    """What ``Primitive.batching`` was given, as a rule of vmap."""

    def __init__(self, primitive: Primitive, rule: Callable[..., Any], place: str) -> None:
        self.rule = rule
        #: what messages call it
        self.name = f"The batching rule of {primitive.name}, registered at {place},"

    def __call__(self, level: VmapInterpreter, *args: Any, **kwargs: Any) -> Any:
        dims = [for_argument(a, lambda x: x.bdim if level.owns(x) else None) for a in args]
        if all(d is None for d in dims):
            return NotImplemented
        result = self.rule(level.info, dims, *values_of(level, args), **constants_below(level, kwargs))
        if result is NotImplemented or type(result) is not tuple or len(result) != 2:
            return result if result is NotImplemented else level.leave(self.name, result)
        out, out_dims = result
        leaves, spec = tree_flatten(out)
        each = broadcast_prefix(out_dims, out)
        if each is None:
            got = f"out_dims {out_dims!r}"
            raise BatchingRuleError(self.name, got, "an int or None, for all of the output or in its structure")
        pairs = zip(leaves, each, strict=True)
        return tree_unflatten(spec, [level.leave(self.name, (x, d)) if isinstance(x, Tensor) else x for x, d in pairs])
