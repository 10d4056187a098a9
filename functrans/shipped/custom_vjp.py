"""Functions whose derivative in reverse mode is given, as JAX has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrans.errors import CallError, CallValueError
from functrans.errors.wording import what
from functrans.shipped.functions_with_rules import Arguments, Results, WithRule, fitting
from functrans.shipped.vjp_rules import VjpRule
from functrans.tensors.pytrees import leaves_like, tree_flatten, tree_unflatten


class custom_vjp(WithRule):
    """A function whose derivative in reverse mode is given.

    Args:
        func: takes and returns pytrees.
        nondiff_argnums: positions of arguments that no derivative is taken of. They come first in ``bwd``.

    ``defvjp(fwd, bwd)`` gives the rule: ``fwd(*args)`` returns ``(output, residuals)``, and
    ``bwd(*nondiff_args, residuals, cotangent)`` the cotangents of the other arguments, a tuple with one for each, of
    its structure; None where there is none. Both are code of the level below the one that differentiates, which may
    differentiate them again. Arguments that are no tensors are passed on as they are.

    Raises:
        CallError: the function is called before ``defvjp``, or differentiated in forward mode: a ``custom_jvp`` can be
            differentiated in both.
        CallValueError: ``bwd`` returns something that does not fit the arguments.

    Example:
        >>> import torch
        >>> from functrans import custom_vjp, grad, vmap
        >>> @custom_vjp
        ... def clipped(x):
        ...     return x
        >>> clipped.defvjp(lambda x: (x, None), lambda residuals, cotangent: (cotangent.clamp(-1, 1),))
        >>> vmap(grad(lambda x: clipped(x) ** 2))(torch.tensor([0.2, 3.0]))
        tensor([0.4000, 1.0000])
    """

    kind = "custom_vjp"
    definition = "func.defvjp(fwd, bwd)"

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Give the rule; see the class."""
        self.take("defvjp", fwd, bwd)

    def of_tensors(self, given: Arguments) -> Any:
        results: list[Results] = []

        def note(out: Any) -> tuple[Tensor, ...]:
            results[:] = [Results(out)]
            return results[0].tensors

        def fwd(*tensors: Tensor) -> tuple[tuple[Tensor, ...], list[Any]]:
            pair = self.pair(given.whole(tensors), "residuals", "fwd")
            leaves, spec = tree_flatten(pair[1])
            residual_specs[:] = [spec]
            return note(pair[0]), leaves

        def bwd(residuals: Sequence[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
            cotangent = results[0].whole(grads)
            saved = tree_unflatten(residual_specs[0], list(residuals))
            found = self.run(self.rules[1], (*given.fixed, saved, cotangent))
            return self.cotangents(given, found)

        residual_specs: list[Any] = []
        rule = VjpRule(self, lambda *tensors: note(self.run(self.func, given.whole(tensors))), fwd, bwd)
        outs = rule(*given.tensors)
        return results[0].whole(outs)

    def forward_mode(self) -> CallError:
        cure = "Give the function a rule for both modes: functrans.custom_jvp."
        return self.error(CallError, "forward mode (jvp, jacfwd, ...)", "reverse mode, that of its rule", cure)

    def cotangents(self, given: Arguments, found: Any) -> tuple[Any, ...]:
        """What ``bwd`` returned, by tensor."""
        moving = given.moving
        if not isinstance(found, tuple | list) or len(found) != len(moving):
            got = f"{len(found)} cotangents" if isinstance(found, tuple | list) else what(found)
            raise self.error(CallValueError, f"{got} from bwd", f"a tuple of {len(moving)}, one for each argument")
        by_leaf: list[Any] = []
        for i, a in enumerate(given.args):
            leaves, spec = tree_flatten(a)
            c = None if i in self.fixed else found[moving.index(i)]
            if c is None:
                by_leaf += [None] * len(leaves)
                continue
            own, own_spec = leaves_like(c, spec)
            if own_spec != spec:
                raise self.error(CallValueError, f"{what(c)} from bwd for args[{i}]", "a cotangent of its structure")
            by_leaf += own
        refuse = lambda got, wanted: self.error(CallValueError, f"{got} from bwd", wanted)
        return tuple(fitting(given.tensors, [by_leaf[i] for i in given.places], refuse))
