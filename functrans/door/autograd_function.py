"""torch.autograd.Function inside transforms.

Left alone, ``Function.apply`` would run its forward with autograd off, operator by operator, and a transform would see a constant or
the forward's own derivative. ``apply`` is therefore part of the door: the Function goes down the stack as one operator,
and every level gives it its meaning with values of the level below.

NOTE [Contexts per level]
Each grad or jvp level that tracks a call fills a context of its own with values of the level below, and its pullback runs the Function's
``backward`` on these; so ``backward`` is differentiated by the levels below, and each level uses the custom derivative.
A combined forward(ctx, ...) both computes and saves. It is run on the values once to fill the context, and the result proper comes from
applying the Function one level down; outputs that were saved are replaced by these.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.utils.checkpoint import CheckpointFunction

from functrans.core.dispatch import WITHOUT_TENSORS, highest, lift, map_tensors
from functrans.core.errors import CustomFunctionError
from functrans.core.made_at import note_site
from functrans.core.pytrees import tree_flatten, tree_map, tree_unflatten
from functrans.core.stack import Interpreter, run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import STATE, lowered, running_at
from functrans.core.torch_private import is_forward_enabled, no_setup_context
from functrans.interpreters.fitting import expect_tangent, fitted, spec
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.recording import DIFFERENTIABLE, snapshot, tensors_in
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter

_original: Any = Function.__dict__["apply"]


def _original_apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    return _original.__get__(None, cls)(*args, **kwargs)


def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """``Function.apply``: the Function goes down the interpreter stack as one operator."""
    top = STATE.top
    if top is None or top.carries_autograd:
        return _original_apply(cls, *args, **kwargs)
    if is_setup_style(cls) or kwargs:
        signature = inspect.signature(cls.forward).bind(*(args if is_setup_style(cls) else (None, *args)), **kwargs)
        signature.apply_defaults()
        args = signature.args if is_setup_style(cls) else signature.args[1:]
        if signature.kwargs:
            raise CustomFunctionError(cls, f"was called with keyword-only arguments {sorted(signature.kwargs)}", "Make them positional.")
    if cls is CheckpointFunction:
        raise CustomFunctionError(cls, "runs autograd inside its backward", "Call checkpoint(..., use_reentrant=False).")
    owner = highest([leaf for a in args for leaf in within(a)], {}, False)
    out = send(owner, cls, args)
    if owner is not top:
        out = lift(out, owner, top)
    note_site(as_tuple(out), sys._getframe(0), 0)
    return out


def send(owner: Interpreter | None, cls: type[Function], args: Sequence[Any]) -> Any:
    """Apply ``cls`` at ``owner``'s level, on arguments of that level."""
    if owner is None:
        with running_at(None):
            return _original_apply(cls, *args)
    for kind in type(owner).__mro__:
        if kind in FUNCTION_RULES:
            return FUNCTION_RULES[kind](owner, cls, args)
    raise CustomFunctionError(
        cls, f"was applied inside {owner.name}, which has no rule for it", "Add one to functrans.door.autograd_function.FUNCTION_RULES."
    )


def within(a: Any) -> Sequence[Any]:
    """The leaves of an argument: itself, or what a list, dict or other container holds."""
    return (a,) if isinstance(a, Tensor) or type(a) in WITHOUT_TENSORS else tree_flatten(a)[0]


def unwrapped(interpreter: Interpreter, args: Sequence[Any]) -> tuple[list[bool], list[Any]]:
    """Which arguments are wrappers of ``interpreter``, and all of them one level down, in containers too.

    As without transforms, what containers hold is a constant for backward and jvp; vmap batches it.
    """

    def below(x: Any) -> Any:
        return x.value if type(x) is WrapperTensor and x.interpreter is interpreter else x

    mine = [type(a) is WrapperTensor and a.interpreter is interpreter for a in args]
    return mine, [a if type(a) in WITHOUT_TENSORS else tree_map(below, a) for a in args]


def is_setup_style(cls: type[Function]) -> bool:
    return cls.setup_context is not no_setup_context


def overrides(cls: type[Function], name: str) -> bool:
    return getattr(cls, name) is not getattr(Function, name)


class Context:
    """What forward and setup_context save for backward and jvp: the methods of PyTorch's FunctionCtx."""

    def __init__(self, cls: type[Function], needs_input_grad: tuple[bool, ...]) -> None:
        self._cls = cls
        self.needs_input_grad = needs_input_grad
        self.materialize_grads = True
        self._saved: tuple[Any, ...] = ()
        self._saved_forward: tuple[Any, ...] = ()
        self._forward_mode = False
        self._non_differentiable: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self._saved = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        self._saved_forward = tensors

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        return self._saved_forward if self._forward_mode and self._saved_forward else self._saved

    def mark_dirty(self, *tensors: Tensor) -> None:
        raise CustomFunctionError(self._cls, "writes to an input (ctx.mark_dirty)", "Return a new tensor instead.")

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value

    def replace(self, olds: Sequence[Any], news: Sequence[Any]) -> None:
        """Let saved outputs be the outputs proper; see NOTE [Contexts per level]."""
        pairs = [(o, n) for o, n in zip(olds, news, strict=True) if isinstance(o, Tensor)]

        def new(x: Any) -> Any:
            return next((n for o, n in pairs if o is x), x)

        self._saved = tuple(new(x) for x in self._saved)
        self._saved_forward = tuple(new(x) for x in self._saved_forward)
        self._non_differentiable = tuple(new(x) for x in self._non_differentiable)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, new(value))

    def is_non_differentiable(self, out: Any) -> bool:
        return any(out is t for t in self._non_differentiable)


def shape_of(x: Any) -> Any:
    """Shape and dtype of a tensor; None for anything else, lists included, which are constants to a Function."""
    return spec(x) if isinstance(x, Tensor) else None


def as_tuple(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def run_below(interpreter: Interpreter, cls: type[Function], values: Sequence[Any], needs: tuple[bool, ...]) -> tuple[Any, Context]:
    """The output one level down, and a context that holds values of that level."""
    ctx = Context(cls, needs)
    with lowered(interpreter):
        out = cls.apply(*values)
        if is_setup_style(cls):
            cls.setup_context(ctx, tuple(values), out)
        else:
            with torch.no_grad():
                trial = cls.forward(ctx, *values)
            ctx.replace(as_tuple(trial), as_tuple(out))
    return out, ctx


# --- grad -----------------------------------------------------------------------------------------------------------


def grad_rule(interpreter: GradInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    mine, values = unwrapped(interpreter, args)
    slots = [a.slot if m else None for a, m in zip(args, mine, strict=True)]
    needs = tuple(s is not None for s in slots)
    if not any(needs) or not torch.is_grad_enabled():
        with lowered(interpreter):
            out = cls.apply(*values)
        return map_tensors(interpreter.constant, out)
    out, ctx = run_below(interpreter, cls, values, needs)
    outs = as_tuple(out)
    wrapped = tuple(
        o if not isinstance(o, Tensor) else interpreter.constant(o) if ctx.is_non_differentiable(o) else interpreter.output(o)
        for o in outs
    )
    saved = FunctionRecord(cls, ctx, outs, [shape_of(v) for v in values])
    interpreter.record(FUNCTION_PLAN, [getattr(w, "slot", None) for w in wrapped], [s for s in slots if s is not None], saved)
    return wrapped if isinstance(out, tuple) else wrapped[0]


class FunctionRecord:
    """One tracked call of a Function."""

    def __init__(self, cls: type[Function], ctx: Context, outs: tuple[Any, ...], inputs: list[Any]) -> None:
        self.cls = cls
        self.ctx = ctx
        self.outs = outs
        self.inputs = inputs

    def __repr__(self) -> str:
        return f"<call of {self.cls.__name__}>"


class FunctionPlan:
    op: Any = "an autograd.Function"

    def operator(self, saved: FunctionRecord) -> str:
        return f"{saved.cls.__name__}.apply"

    def __repr__(self) -> str:
        return f"<FunctionPlan of {self.op}>"

    def pull(self, saved: FunctionRecord, grad: list[Tensor | None]) -> list[Any]:
        ctx = saved.ctx
        if ctx.materialize_grads:
            grad = [
                torch.zeros_like(o) if g is None and isinstance(o, Tensor) else g for g, o in zip(grad, saved.outs, strict=True)
            ]
        found = gradients(saved.cls, ctx, grad, saved.inputs)
        return [f for f, needed in zip(found, ctx.needs_input_grad, strict=True) if needed]

    def protect(self, saved: FunctionRecord, target: Tensor) -> FunctionRecord:
        saved.ctx._saved = tuple(snapshot(x, target) for x in saved.ctx._saved)
        return saved

    def saved_tensors(self, saved: FunctionRecord) -> list[Tensor]:
        return tensors_in(saved.ctx._saved)


FUNCTION_PLAN = FunctionPlan()


class Refusal:
    """The error for something that a method returned."""

    def __init__(self, cls: type[Function], where: str) -> None:
        self.cls = cls
        self.where = where

    def __call__(self, got: str, wanted: str) -> CustomFunctionError:
        return CustomFunctionError(self.cls, f"returned {got} {self.where}", f"Return {wanted}.")


def gradients(cls: type[Function], ctx: Context, grad: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """What ``backward`` returns, fitted to the shapes and dtypes of the inputs."""
    found = as_tuple(cls.backward(ctx, *grad))
    count = len(inputs)
    if len(found) > count and all(f is None for f in found[count:]):
        found = found[:count]
    if len(found) != count:
        raise CustomFunctionError(
            cls, f"returned {len(found)} gradients from backward for {count} inputs", "Return one per input, None where there is none."
        )

    return [
        fitted(f, given, Refusal(cls, f"from backward as gradient of input {i}")) if f is not None and given is not None else None
        for i, (f, given) in enumerate(zip(found, inputs, strict=True))
    ]


def tangents_of(cls: type[Function], ctx: Context, tangents: Sequence[Any], outs: Sequence[Any]) -> tuple[Any, ...]:
    """What ``jvp`` returns, of the shapes and dtypes ``outs``."""
    found = as_tuple(cls.jvp(ctx, *tangents))
    if len(found) != len(outs):
        raise CustomFunctionError(cls, f"returned {len(found)} tangents from jvp for {len(outs)} outputs", "Return one per output, None where there is none.")
    for i, (t, o) in enumerate(zip(found, outs, strict=True)):
        expect_tangent(t, o, Refusal(cls, f"from jvp as tangent of output {i}"))
    return found


# --- jvp ------------------------------------------------------------------------------------------------------------


def jvp_rule(interpreter: JvpInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    mine, values = unwrapped(interpreter, args)
    tangents = [a.tangent if m else None for a, m in zip(args, mine, strict=True)]
    if all(t is None for t in tangents) or not is_forward_enabled():
        with lowered(interpreter):
            out = cls.apply(*values)
        return map_tensors(interpreter.constant, out)
    if not overrides(cls, "jvp"):
        raise CustomFunctionError(cls, f"was applied inside {interpreter.name} and has no jvp", "Define the staticmethod jvp(ctx, *tangents).")
    out, ctx = run_below(interpreter, cls, values, tuple(t is not None for t in tangents))
    ctx._forward_mode = True
    with lowered(interpreter):
        if ctx.materialize_grads:
            tangents = [
                torch.zeros_like(v) if t is None and isinstance(v, Tensor) and v.dtype in DIFFERENTIABLE else t
                for t, v in zip(tangents, values, strict=True)
            ]
        outs = as_tuple(out)
        found = tangents_of(cls, ctx, tangents, [shape_of(o) for o in outs])
    wrapped = tuple(interpreter.dual(o, t) if isinstance(o, Tensor) else o for o, t in zip(outs, found, strict=True))
    return wrapped if isinstance(out, tuple) else wrapped[0]


# --- vmap -----------------------------------------------------------------------------------------------------------


def vmap_rule(interpreter: VmapInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:

    def bdim(x: Any) -> int | None:
        return x.bdim if type(x) is WrapperTensor and x.interpreter is interpreter else None

    _, values = unwrapped(interpreter, args)
    in_dims = tuple(None if type(a) in WITHOUT_TENSORS else tree_map(bdim, a) for a in args)
    if all(d is None for d in tree_flatten(in_dims)[0]):
        with lowered(interpreter):
            out = cls.apply(*values)
        return map_tensors(interpreter.constant, out)
    if overrides(cls, "vmap"):
        if cls.generate_vmap_rule:
            raise CustomFunctionError(cls, "has both generate_vmap_rule=True and a vmap staticmethod", "Keep one of them.")
        with lowered(interpreter):
            result = cls.vmap(interpreter.info, in_dims, *values)
        return interpreter.leave(cls, result)
    batched = batched_function(cls, interpreter, in_dims)
    with lowered(interpreter):
        out = batched.apply(*values)
    wrapped = tuple(interpreter.batched(o, 0) if isinstance(o, Tensor) else o for o in as_tuple(out))
    return wrapped if isinstance(out, tuple) else wrapped[0]


def batched_function(cls: type[Function], outer: VmapInterpreter, in_dims: tuple[int | None, ...]) -> type[Function]:
    """The Function on physical values: each of its methods, run once under vmap."""

    def inside(body: Callable[[VmapInterpreter], Any]) -> Any:
        interpreter = VmapInterpreter(outer.batch_size, outer.info.randomness, cls)
        return run_transformed(interpreter, lambda: body(interpreter))

    def physical(interpreter: VmapInterpreter, x: Any) -> tuple[Any, int | None]:
        if type(x) is WrapperTensor and x.interpreter is interpreter:
            return x.value, x.bdim
        return x, None

    def entered(interpreter: VmapInterpreter, value: Any, dim: Any) -> Any:
        if isinstance(value, Tensor):
            return interpreter.batched(value, dim)
        if type(value) in WITHOUT_TENSORS:
            return value
        leaves, spec = tree_flatten(value)
        dims = tree_flatten(dim)[0]
        return tree_unflatten(spec, [interpreter.batched(v, d) if isinstance(v, Tensor) else v for v, d in zip(leaves, dims, strict=True)])

    def to_dim(x: Any, bdim: int | None, dim: int) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.unsqueeze(dim).expand(*x.shape[:dim], outer.batch_size, *x.shape[dim:]) if bdim is None else x.movedim(bdim, dim)

    class Batched(Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> Any:
            inner = Context(cls, ctx.needs_input_grad)

            def body(interpreter: VmapInterpreter) -> Any:
                args = [entered(interpreter, v, d) for v, d in zip(values, in_dims, strict=True)]
                if is_setup_style(cls):
                    out = cls.forward(*args)
                    cls.setup_context(inner, tuple(args), out)
                else:
                    out = cls.forward(inner, *args)
                outs = [physical(interpreter, o) for o in as_tuple(out)]
                differentiable = [not inner.is_non_differentiable(o) for o in as_tuple(out)]
                ctx.inputs = [shape_of(a) for a in args]
                ctx.outputs = [shape_of(o) for o in as_tuple(out)]
                return outs, differentiable, isinstance(out, tuple), [physical(interpreter, s) for s in inner._saved], [
                    physical(interpreter, s) for s in inner._saved_forward
                ]

            outs, differentiable, many, saved, saved_forward = inside(body)
            results = [to_dim(o, d, 0) for o, d in outs]
            by_value = {id(o): r for (o, _), r in zip(outs, results, strict=True)}
            ctx.dims = [d if id(s) not in by_value else 0 for s, d in saved]
            ctx.forward_dims = [d if id(s) not in by_value else 0 for s, d in saved_forward]
            ctx.save_for_backward(*[by_value.get(id(s), s) for s, _ in saved])
            ctx.save_for_forward(*[by_value.get(id(s), s) for s, _ in saved_forward])
            ctx.mark_non_differentiable(*[r for r, d in zip(results, differentiable, strict=True) if not d and isinstance(r, Tensor)])
            ctx.set_materialize_grads(inner.materialize_grads)
            ctx.inner = inner
            return tuple(results) if many else results[0]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            def body(interpreter: VmapInterpreter) -> Any:
                ctx.inner._forward_mode = False
                ctx.inner._saved = rewrapped(interpreter, ctx.saved_tensors, ctx.dims)
                given = [interpreter.batched(g, 0) if isinstance(g, Tensor) else g for g in grads]
                return [physical(interpreter, f) for f in gradients(cls, ctx.inner, given, ctx.inputs)]

            found = inside(body)
            return tuple(
                f if not isinstance(f, Tensor) else (to_dim(f, d, 0).sum(0) if in_dim is None else to_dim(f, d, in_dim))
                for (f, d), in_dim in zip(found, in_dims, strict=True)
            )

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            def body(interpreter: VmapInterpreter) -> Any:
                ctx.inner._forward_mode = True
                wrapped = rewrapped(interpreter, ctx.saved_tensors, ctx.forward_dims or ctx.dims)
                if ctx.inner._saved_forward:
                    ctx.inner._saved_forward = wrapped
                else:
                    ctx.inner._saved = wrapped
                given = [interpreter.batched(t, d) if isinstance(t, Tensor) else t for t, d in zip(tangents, in_dims, strict=True)]
                return [physical(interpreter, f) for f in tangents_of(cls, ctx.inner, given, ctx.outputs)]

            return tuple(to_dim(f, d, 0) for f, d in inside(body))

    if not overrides(cls, "jvp"):
        Batched.jvp = Function.jvp  # type: ignore[method-assign]
    Batched.__name__ = f"Batched{cls.__name__}"
    return Batched


def rewrapped(interpreter: VmapInterpreter, saved: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, ...]:
    return tuple(interpreter.batched(s, d) if isinstance(s, Tensor) else s for s, d in zip(saved, dims, strict=True))


#: How each kind of interpreter gives an autograd.Function its meaning: rule(interpreter, cls, args) -> output of that level.
FUNCTION_RULES: dict[type[Interpreter], Callable[..., Any]] = {
    GradInterpreter: grad_rule,
    JvpInterpreter: jvp_rule,
    VmapInterpreter: vmap_rule,
}

# The only place where PyTorch can be told of the stack: apply has no dispatch of its own.
Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
