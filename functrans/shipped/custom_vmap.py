"""Functions whose form for a batch is given, as JAX has them.

Each call becomes an ``autograd.Function`` of the tensors among the arguments, as with ``custom_jvp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.api.transforms import jvp, vjp
from functrans.errors import CallValueError
from functrans.errors.wording import callable_name, what
from functrans.operators.info import DIFFERENTIABLE
from functrans.shipped.functions_with_rules import Arguments, Results, WithRule, keeping_inputs
from functrans.tensors.pytrees import leaves_like, tree_unflatten


class custom_vmap(WithRule):
    """A function whose form for a batch is given.

    Args:
        func: takes and returns pytrees.

    ``def_vmap(rule)`` gives the rule: ``rule(axis_size, in_batched, *args)`` gets the arguments with the batch in front
    of every tensor for which ``in_batched``, a list of trees like the arguments, says True, and returns
    ``(output, out_batched)``, a tree of truth values like the output (or one for all). It is code of the level below
    the vmap; other vmaps around ask it again. As a decorator it returns the rule. Derivatives are those of ``func``.

    Raises:
        CallError: the function is called before ``def_vmap``.
        CallValueError: the rule returns no such pair.

    Example:
        >>> import torch
        >>> from functrans import custom_vmap, vmap
        >>> @custom_vmap
        ... def solve(a, b):
        ...     return torch.linalg.solve(a, b)
        >>> @solve.def_vmap
        ... def rule(axis_size, in_batched, a, b):
        ...     if in_batched == [False, True]:  # one matrix for all: the batch is columns of one system
        ...         return torch.linalg.solve(a, b.mT).mT, True
        ...     a, b = (x if is_batched else x.expand(axis_size, *x.shape) for x, is_batched in zip((a, b), in_batched))
        ...     return torch.linalg.solve(a, b), True
        >>> vmap(solve, in_dims=(None, 0))(2 * torch.eye(2), torch.ones(3, 2)).sum()
        tensor(3.)
    """

    kind = "custom_vmap"
    definition = "func.def_vmap(rule)"

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__(func)

    def def_vmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Give the rule; see the class."""
        return self.take("def_vmap", rule)

    def of_tensors(self, given: Arguments) -> Any:
        return self.apply(self.function(given), given)

    def function(self, given: Arguments) -> type[Function]:
        custom: Any = self
        found: list[Any] = []

        class Custom(keeping_inputs(custom, given, found)):  # type: ignore[misc]
            results: Any = found

            @staticmethod
            def vmap(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> Any:
                batched = [d is not None for d in in_dims]
                in_front = [x if d is None else x.movedim(d, 0) for x, d in zip(tensors, in_dims, strict=True)]
                flags = Arguments(given.whole(batched))
                everywhere = tree_unflatten(given.spec, [flag is True for flag in flags.leaves])
                args = (info.batch_size, list(everywhere), *given.whole(in_front))
                pair = custom.pair(args, "out_batched")
                out = Results(pair[0])
                dims = custom.out_dims(out, pair[1])
                found[:] = [out]
                return out.tensors, dims

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                values = ctx.saved_tensors
                smooth = [i for i, x in enumerate(values) if x.dtype in DIFFERENTIABLE]
                outs, pull = vjp(custom.smooth_part(given, values, smooth), *[values[i] for i in smooth])
                kept = [g for g, s in zip(grads, Results(grads).smooth, strict=True) if s]
                by_place = dict(zip(smooth, pull(tuple(kept)), strict=True)) if outs else {}
                return tuple(by_place.get(i) for i in range(len(values)))

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                values = ctx.saved_tensors
                smooth = [i for i, x in enumerate(values) if x.dtype in DIFFERENTIABLE]
                filled = [torch.zeros_like(values[i]) if tangents[i] is None else tangents[i] for i in smooth]
                f = custom.smooth_part(given, values, smooth)
                pushed = iter(jvp(f, tuple(values[i] for i in smooth), tuple(filled))[1])
                return tuple(next(pushed) if s else None for s in found[0].smooth)

        Custom.__name__ = Custom.__qualname__ = callable_name(self.func)
        return Custom

    def smooth_part(self, given: Arguments, values: Sequence[Tensor], smooth: Sequence[int]) -> Callable[..., Any]:
        """The function from the tensors that have derivatives to the outputs that have some."""

        def f(*moving: Tensor) -> tuple[Tensor, ...]:
            tensors = list(values)
            for i, x in zip(smooth, moving, strict=True):
                tensors[i] = x
            out = Results(self.run(self.func, given.whole(tensors)))
            return tuple(x for x, s in zip(out.tensors, out.smooth, strict=True) if s)

        return f

    def out_dims(self, out: Results, batched: Any) -> tuple[int | None, ...]:
        if isinstance(batched, bool):
            flags = [batched] * len(out.leaves)
        else:
            flags, spec = leaves_like(batched, out.spec)
            if spec != out.spec or not all(isinstance(f, bool) for f in flags):
                got = f"{what(batched)} as out_batched"
                raise self.error(CallValueError, got, "truth values in the output's structure")
        return tuple(0 if flags[i] else None for i in out.places)
