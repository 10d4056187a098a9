"""Functions whose derivative in forward mode is given, as JAX has them.

Each call becomes an ``autograd.Function`` of the tensors among the arguments, so that there is one mechanism: what
docs/extending.md says of these holds of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.api.transforms import vjp
from functrans.errors import CallValueError
from functrans.errors.wording import callable_name, what
from functrans.operators.info import DIFFERENTIABLE
from functrans.shipped.functions_with_rules import Arguments, Results, WithRule, fitting, keeping_inputs


class custom_jvp(WithRule):
    """A function whose derivative in forward mode is given; reverse mode transposes it.

    Args:
        func: takes and returns pytrees.
        nondiff_argnums: positions of arguments that no derivative is taken of. They come first in the rule.

    ``defjvp(rule)`` gives the rule: ``rule(*nondiff_args, primals, tangents)`` returns ``(output, tangent)``, where
    ``primals`` and ``tangents`` are tuples of the other arguments. It has to be linear in the tangents. As a decorator
    it returns the rule.

    Raises:
        CallError: the function is called before ``defjvp``.
        CallValueError: the rule returns something that does not fit the output.

    Example:
        >>> import torch
        >>> from functrans import custom_jvp, grad, jvp
        >>> @custom_jvp
        ... def log1pexp(x):
        ...     return torch.log(1 + torch.exp(x))
        >>> @log1pexp.defjvp
        ... def rule(primals, tangents):
        ...     return log1pexp(*primals), tangents[0] * (1 - 1 / (1 + torch.exp(primals[0])))
        >>> grad(log1pexp)(torch.tensor(100.0)), jvp(log1pexp, (torch.tensor(0.0),), (torch.tensor(1.0),))
        (tensor(1.), (tensor(0.6931), tensor(0.5000)))
    """

    kind = "custom_jvp"
    definition = "func.defjvp(rule)"

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Give the rule; see the class."""
        return self.take("defjvp", rule)

    def of_tensors(self, given: Arguments) -> Any:
        return self.apply(self.function(given), given)

    def pushed(self, given: Arguments, values: Sequence[Any], tangents: Sequence[Any]) -> Results:
        """The tangents of the output, for a tangent of each tensor."""
        both = (tuple(given.whole(xs)[i] for i in given.moving) for xs in (values, tangents))
        pair = self.pair((*given.fixed, *both), "tangent")
        out, tangent = Results(pair[0]), Results(pair[1])
        if tangent.spec != out.spec or len(tangent.tensors) != len(out.tensors):
            got = f"{what(pair[1])} as tangent from its rule"
            raise self.error(CallValueError, got, "one of the output's structure")
        refuse = lambda got, wanted: self.error(CallValueError, f"{got} as tangent from its rule", wanted)
        fitting(out.tensors, tangent.tensors, refuse)
        return tangent

    def function(self, given: Arguments) -> type[Function]:
        custom: Any = self
        found: list[Any] = []

        class Custom(keeping_inputs(custom, given, found)):  # type: ignore[misc]
            results: Any = found

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                values = ctx.saved_tensors
                filled = [torch.zeros_like(x) if t is None else t for x, t in zip(values, tangents, strict=True)]
                pushed = custom.pushed(given, values, filled).tensors
                return tuple(t if smooth else None for t, smooth in zip(pushed, ctx.smooth, strict=True))

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                values = ctx.saved_tensors
                smooth = [i for i, x in enumerate(values) if x.dtype in DIFFERENTIABLE]

                def linear(*moving: Tensor) -> tuple[Tensor, ...]:
                    tangents = [torch.zeros_like(x) for x in values]
                    for i, t in zip(smooth, moving, strict=True):
                        tangents[i] = t
                    pushed = custom.pushed(given, values, tangents).tensors
                    return tuple(t for t, s in zip(pushed, ctx.smooth, strict=True) if s)

                _, transposed = vjp(linear, *[torch.zeros_like(values[i]) for i in smooth])
                cotangents = transposed(tuple(g for g, s in zip(grads, ctx.smooth, strict=True) if s))
                by_place = dict(zip(smooth, cotangents, strict=True))
                return tuple(by_place.get(i) for i in range(len(values)))

        Custom.__name__ = Custom.__qualname__ = callable_name(self.func)
        return Custom
