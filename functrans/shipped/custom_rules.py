"""Functions with a rule of their own for one transform, as JAX has them: custom_vjp, custom_jvp, custom_vmap.

Each call becomes an ``autograd.Function`` of the tensors among the arguments, so that there is one mechanism: what
docs/extending.md says of these holds of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.api.checks import check_callable
from functrans.api.transforms import jvp, vjp
from functrans.core.errors import CallError, CallValueError
from functrans.core.errors.wording import callable_name, what
from functrans.core.operators import DIFFERENTIABLE
from functrans.core.pytrees import leaves_like, tree_flatten, tree_unflatten
from functrans.shipped.functions_with_rules import Arguments, Results, WithRule, fitting, unlike
from functrans.shipped.vjp_rules import VjpRule


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
    fwd: Callable[..., Any] | None = None
    bwd: Callable[..., Any] | None = None

    def __init__(self, func: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        super().__init__(func)
        self.fixed = self.checked(nondiff_argnums)

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Give the rule; see the class."""
        check_callable("defvjp", fwd)
        check_callable("defvjp", bwd)
        self.fwd, self.bwd = fwd, bwd

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fwd is None or self.bwd is None:
            raise self.without_rule()
        args = self.bound(args, kwargs)
        if any(i >= len(args) for i in self.fixed):
            got = f"nondiff_argnums={self.fixed} in a call with {len(args)} arguments"
            raise self.error(CallValueError, got, "positions of arguments that are given")
        given = Arguments(args, self.fixed)
        if not given.tensors:
            return self.run(self.func, args)
        results: list[Results] = []

        def note(out: Any) -> tuple[Tensor, ...]:
            results[:] = [Results(out)]
            return results[0].tensors

        def fwd(*tensors: Tensor) -> tuple[tuple[Tensor, ...], list[Any]]:
            pair = self.run(self.fwd, given.whole(tensors))
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise self.error(CallValueError, f"{what(pair)} from fwd", "a pair (output, residuals)")
            leaves, spec = tree_flatten(pair[1])
            residual_specs[:] = [spec]
            return note(pair[0]), leaves

        def bwd(residuals: Sequence[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
            fixed = [args[i] for i in self.fixed]
            cotangent = results[0].whole(grads)
            saved = tree_unflatten(residual_specs[0], list(residuals))
            found = self.run(self.bwd, (*fixed, saved, cotangent))
            return self.cotangents(given, args, found)

        residual_specs: list[Any] = []
        rule = VjpRule(self, lambda *tensors: note(self.run(self.func, given.whole(tensors))), fwd, bwd)
        outs = rule(*given.tensors)
        return results[0].whole(outs)

    def forward_mode(self) -> CallError:
        cure = "Give the function a rule for both modes: functrans.custom_jvp."
        return self.error(CallError, "forward mode (jvp, jacfwd, ...)", "reverse mode, that of its rule", cure)

    def cotangents(self, given: Arguments, args: tuple[Any, ...], found: Any) -> tuple[Any, ...]:
        """What ``bwd`` returned, by tensor."""
        moving = [i for i in range(len(args)) if i not in self.fixed]
        if not isinstance(found, tuple | list) or len(found) != len(moving):
            got = f"{len(found)} cotangents" if isinstance(found, tuple | list) else what(found)
            raise self.error(CallValueError, f"{got} from bwd", f"a tuple of {len(moving)}, one for each argument")
        by_leaf: list[Any] = []
        for i, a in enumerate(args):
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


def keeping_inputs(custom: WithRule, given: Arguments, found: list[Results]) -> type[Function]:
    """A Function that runs ``custom``'s function and saves its inputs; the result is left in ``found``, taken apart."""

    class Keeping(Function):
        @staticmethod
        def forward(*tensors: Tensor) -> Any:
            out = Results(custom.run(custom.func, given.whole(tensors)))
            found[:] = [out]
            return unlike(out.tensors, tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)
            ctx.mark_non_differentiable(*[x for x in output if x.dtype not in DIFFERENTIABLE])
            ctx.smooth = [x.dtype in DIFFERENTIABLE for x in output]

    return Keeping


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
    rule: Callable[..., Any] | None = None

    def __init__(self, func: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        super().__init__(func)
        self.fixed = self.checked(nondiff_argnums)

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Give the rule; see the class."""
        check_callable("defjvp", rule)
        self.rule = rule
        return rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.rule is None:
            raise self.without_rule()
        args = self.bound(args, kwargs)
        if any(i >= len(args) for i in self.fixed):
            got = f"nondiff_argnums={self.fixed} in a call with {len(args)} arguments"
            raise self.error(CallValueError, got, "positions of arguments that are given")
        given = Arguments(args, self.fixed)
        if not given.tensors:
            return self.run(self.func, args)
        return self.apply(self.function(given, args), given)

    def pushed(
        self, given: Arguments, args: tuple[Any, ...], values: Sequence[Any], tangents: Sequence[Any]
    ) -> Results:
        """The tangents of the output, for a tangent of each tensor."""
        fixed = [args[i] for i in self.fixed]
        moving = [i for i in range(len(args)) if i not in self.fixed]
        primals, pushed = given.whole(values), given.whole(tangents)
        pair = self.run(self.rule, (*fixed, tuple(primals[i] for i in moving), tuple(pushed[i] for i in moving)))
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise self.error(CallValueError, f"{what(pair)} from its rule", "a pair (output, tangent)")
        out, tangent = Results(pair[0]), Results(pair[1])
        if tangent.spec != out.spec or len(tangent.tensors) != len(out.tensors):
            got = f"{what(pair[1])} as tangent from its rule"
            raise self.error(CallValueError, got, "one of the output's structure")
        refuse = lambda got, wanted: self.error(CallValueError, f"{got} as tangent from its rule", wanted)
        fitting(out.tensors, tangent.tensors, refuse)
        return tangent

    def function(self, given: Arguments, args: tuple[Any, ...]) -> type[Function]:
        custom: Any = self
        found: list[Any] = []

        class Custom(keeping_inputs(custom, given, found)):  # type: ignore[misc]
            results: Any = found

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                values = ctx.saved_tensors
                filled = [torch.zeros_like(x) if t is None else t for x, t in zip(values, tangents, strict=True)]
                pushed = custom.pushed(given, args, values, filled).tensors
                return tuple(t if smooth else None for t, smooth in zip(pushed, ctx.smooth, strict=True))

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                values = ctx.saved_tensors
                smooth = [i for i, x in enumerate(values) if x.dtype in DIFFERENTIABLE]

                def linear(*moving: Tensor) -> tuple[Tensor, ...]:
                    tangents = [torch.zeros_like(x) for x in values]
                    for i, t in zip(smooth, moving, strict=True):
                        tangents[i] = t
                    pushed = custom.pushed(given, args, values, tangents).tensors
                    return tuple(t for t, s in zip(pushed, ctx.smooth, strict=True) if s)

                _, transposed = vjp(linear, *[torch.zeros_like(values[i]) for i in smooth])
                cotangents = transposed(tuple(g for g, s in zip(grads, ctx.smooth, strict=True) if s))
                by_place = dict(zip(smooth, cotangents, strict=True))
                return tuple(by_place.get(i) for i in range(len(values)))

        Custom.__name__ = Custom.__qualname__ = callable_name(self.func)
        return Custom


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
    rule: Callable[..., Any] | None = None

    def def_vmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Give the rule; see the class."""
        check_callable("def_vmap", rule)
        self.rule = rule
        return rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.rule is None:
            raise self.without_rule()
        args = self.bound(args, kwargs)
        given = Arguments(args)
        if not given.tensors:
            return self.run(self.func, args)
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
                pair = custom.run(custom.rule, (info.batch_size, list(everywhere), *given.whole(in_front)))
                if not isinstance(pair, tuple) or len(pair) != 2:
                    raise custom.error(CallValueError, f"{what(pair)} from its rule", "a pair (output, out_batched)")
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
