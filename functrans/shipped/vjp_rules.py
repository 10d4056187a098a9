"""How a ``custom_vjp`` goes down the stack: what each level makes of a function with a rule for its pullback.

The level that tracks an argument runs ``fwd`` one level down, where it is code as any other, records a step that will
run ``bwd`` there, and is done. vmap makes a batch of all three functions and hands them on. So every level further down
differentiates ``fwd`` and ``bwd``, as JAX does; an ``autograd.Function`` would be asked for its own rule again there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.api.vmap import vmap
from functrans.boundary.calls import lift
from functrans.core.dispatch import scan
from functrans.core.interpreter import Interpreter
from functrans.errors import MissingRuleError
from functrans.errors.call_sites import definition
from functrans.errors.wording import callable_name
from functrans.extension.functions_seen import follows
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import BackwardNode
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.operators.info import DIFFERENTIABLE
from functrans.pytorch.thread_state import STATE, lowered, running_at
from functrans.shipped.sparsity_level import SparsityLevel

Tensors = tuple[Tensor, ...]


class VjpRule:
    """A function of tensors with a rule.

    ``func(*tensors)`` returns a tuple of tensors, ``fwd(*tensors)`` that and a list of residuals, and
    ``bwd(residuals, grads)`` a cotangent or None for each tensor.
    """

    def __init__(self, custom: Any, func: Callable[..., Tensors], fwd: Callable[..., Any], bwd: Callable[..., Any]):
        self.custom = custom
        self.func = func
        self.fwd = fwd
        self.bwd = bwd

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Run it from code at the top level."""
        top = STATE.top
        owner = scan(tensors)[0]
        if owner is not top:
            with running_at(owner):
                outs = self.run(owner, tensors)
            return tuple(lift(out, owner, top) for out in outs)
        return self.run(owner, tensors)

    def run(self, owner: Interpreter | None, tensors: Sequence[Any]) -> Tensors:
        """Run it at the level of ``owner``, whose state the thread is in."""
        if not follows(tensors):
            return self.func(*tensors)  # nobody takes a derivative: it is code as any other
        if owner is None:
            return self.at_base(*tensors)
        mine = [owner.owns(x) for x in tensors]
        values = tuple(x.value if m else x for x, m in zip(tensors, mine, strict=True))
        constant = all(owner.is_constant(x) for x, m in zip(tensors, mine, strict=True) if m)
        if constant and not owner.sees_everything:
            with lowered(owner):
                outs = self(*values)
            return tuple(owner.constant(out) for out in outs)
        if isinstance(owner, GradInterpreter):
            return self.at_grad(owner, tensors, values)
        if isinstance(owner, VmapInterpreter):
            dims = [x.bdim if m else None for x, m in zip(tensors, mine, strict=True)]
            with lowered(owner):
                outs = self.batched(owner, dims)(*values)
            return tuple(owner.batched(out, 0) for out in outs)
        if isinstance(owner, SparsityLevel):
            with lowered(owner):
                outs = self(*values)
            return tuple(owner.opaque(outs, tensors))
        if owner.differentiates:
            raise self.custom.forward_mode()
        raise MissingRuleError(self.custom, owner, "Differentiate inside of it, or give the function no rule.")

    def at_grad(self, level: GradInterpreter, tensors: Sequence[Any], values: Sequence[Any]) -> Tensors:
        recording = torch.is_grad_enabled()  # here, and not around the level
        with lowered(level):
            if not recording:
                return tuple(level.constant(out) for out in self(*values))
            outs, residuals = self.fwd(*values)
        wrapped = tuple(level.output(out) for out in outs)
        indices = [level.index_of(x) for x in tensors]
        places = [i for i, index in enumerate(indices) if index is not None]
        node = VjpNode(self, len(outs), places)
        level.record(node, [level.index_of(w) for w in wrapped], [indices[i] for i in places], [*outs, *residuals])
        return wrapped

    def batched(self, level: VmapInterpreter, dims: Sequence[int | None]) -> VjpRule:
        """The same for all examples of a vmap."""

        def of_batch(f: Callable[..., Any], in_dims: tuple[Any, ...]) -> Callable[..., Any]:
            return vmap(
                f, in_dims, randomness=level.randomness, axis_name=level.axis_name, axis_size=level.batch_size,
                interpreter=type(level),
            )  # fmt: skip

        def bwd(residuals: Sequence[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
            along = [0 if isinstance(r, Tensor) else None for r in residuals]
            found = of_batch(self.bwd, (along, [0 if isinstance(g, Tensor) else None for g in grads]))(
                residuals, list(grads)
            )
            return tuple(
                c if c is None else c.sum(0) if dim is None else c.movedim(0, dim)
                for c, dim in zip(found, dims, strict=True)
            )

        return VjpRule(self.custom, of_batch(self.func, tuple(dims)), of_batch(self.fwd, tuple(dims)), bwd)

    def at_base(self, *tensors: Tensor) -> Tensors:
        """PyTorch's own autograd records a Function."""
        rule = self
        kept: list[bool] = []

        class Custom(Function):
            @staticmethod
            def forward(ctx: Any, *tensors: Tensor) -> Any:
                outs, residuals = rule.fwd(*tensors)
                kept[:] = [isinstance(r, Tensor) for r in residuals]
                ctx.residuals = [None if isinstance(r, Tensor) else r for r in residuals]
                ctx.save_for_backward(*tensors, *[r for r in residuals if isinstance(r, Tensor)])
                ctx.mark_non_differentiable(*[x for x in outs if x.dtype not in DIFFERENTIABLE])
                return tuple(x.view_as(x) if any(x is t for t in tensors) else x for x in outs)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                inputs, saved = ctx.saved_tensors[: len(tensors)], iter(ctx.saved_tensors[len(tensors) :])
                if torch.is_grad_enabled():  # create_graph: forward ran unrecorded, and its residuals have no history
                    residuals = rule.fwd(*inputs)[1]
                else:
                    residuals = [next(saved) if k else r for k, r in zip(kept, ctx.residuals, strict=True)]
                return rule.bwd(residuals, grads)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                raise rule.custom.forward_mode()

        Custom.__name__ = Custom.__qualname__ = callable_name(self.custom.func)
        return Custom.apply(*tensors)


class VjpNode(BackwardNode):
    """One call on the tape; saved are its outputs and its residuals."""

    def __init__(self, rule: VjpRule, outs: int, places: list[int]) -> None:
        self.op = rule.custom
        self.rule = rule
        self.outs = outs
        self.places = places

    def rule_place(self, saved: Any) -> str | None:
        return definition(self.rule.custom.rules[1])

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        outs, residuals = saved[: self.outs], saved[self.outs :]
        filled = [torch.zeros_like(out) if g is None else g for g, out in zip(grad, outs, strict=True)]
        found = self.rule.bwd(residuals, filled)
        return [found[i] for i in self.places]
