"""What every level does alike with an ``autograd.Function``: contexts, arguments one level down, checks of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.boundary.leftovers import suspended
from functrans.core.dispatch import WITHOUT_TENSORS
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.errors import CustomFunctionError
from functrans.interpreters.fitting import expect_tangent, fitted, reduce_to, spec
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import no_setup_context
from functrans.tensors.pytrees import tree_flatten, tree_map


def within(a: Any) -> Sequence[Any]:
    """The leaves of an argument: itself, or what a list, dict or other container holds."""
    return (a,) if isinstance(a, Tensor) or type(a) in WITHOUT_TENSORS else tree_flatten(a)[0]


def unwrapped(interpreter: Interpreter, args: Sequence[Any]) -> tuple[list[bool], list[Any]]:
    """Which arguments are wrappers of ``interpreter``, and all of them one level down, in containers too.

    As without transforms, what containers hold is a constant for backward and jvp; vmap batches it.
    """
    mine = [interpreter.owns(a) for a in args]
    return mine, [a if type(a) in WITHOUT_TENSORS else tree_map(interpreter.value_of, a) for a in args]


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
        self.output_grad_dtypes: tuple[torch.dtype | None, ...] | None = None
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

    @property
    def input_grad_buffers(self) -> tuple[None, ...]:
        """What gradients of the arguments so far may be added to in place: none of any. (Of torch 2.15.)"""
        return (None,) * len(self.needs_input_grad)

    def mark_dirty(self, *tensors: Tensor) -> None:
        cure = "Call ctx.mark_dirty in the method itself, or return a new tensor."
        raise CustomFunctionError(self._cls, "marks an input as written in another function that it calls", cure)

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value

    def set_output_grad_dtype(self, *dtypes: torch.dtype | None) -> None:
        """The dtypes in which ``backward`` gets the gradients of the outputs; None: as they come. (Of torch 2.14.)"""
        if self.output_grad_dtypes is not None:
            raise CustomFunctionError(
                self._cls, "called ctx.set_output_grad_dtype twice", "Give the dtypes of all outputs in one call."
            )
        self.output_grad_dtypes = dtypes

    def check_grad_dtypes(self, outs: Sequence[Any]) -> None:
        """Refuse dtypes of gradients that do not fit the outputs, as PyTorch does with a Function at the base."""
        dtypes = self.output_grad_dtypes
        if dtypes is None:
            return
        if len(dtypes) != len(outs):
            got = f"declared {len(dtypes)} dtypes for the gradients of {len(outs)} outputs (ctx.set_output_grad_dtype)"
            raise CustomFunctionError(self._cls, got, "Give one per output, None where there is no gradient.")
        for i, (dtype, out) in enumerate(zip(dtypes, outs, strict=True)):
            smooth = isinstance(out, Tensor) and (out.dtype.is_floating_point or out.dtype.is_complex)
            if dtype is not None and (not smooth or self.is_non_differentiable(out)):
                got = f"declared {dtype} for the gradient of output {i}, which has none (ctx.set_output_grad_dtype)"
                raise CustomFunctionError(self._cls, got, "Give None in its place.")

    def in_declared_dtypes(self, grads: Sequence[Any]) -> Sequence[Any]:
        """``grads`` as ``backward`` asked for them."""
        if self.output_grad_dtypes is None:
            return grads
        pairs = zip(grads, self.output_grad_dtypes, strict=True)
        return [g if g is None or dtype is None else reduce_to(g, g.shape, dtype) for g, dtype in pairs]

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


def run_below(
    interpreter: Interpreter, cls: type[Function], values: Sequence[Any], needs: tuple[bool, ...]
) -> tuple[Any, Context]:
    """The output one level down, and a context that holds values of that level."""
    ctx = Context(cls, needs)
    with suspended(interpreter), lowered(interpreter):
        before = versions(values)
        out = cls.apply(*values)
        if versions(values) != before:
            cure = "Write to a clone(), or declare the write with ctx.mark_dirty in the method itself."
            raise CustomFunctionError(cls, "writes to an input in its forward", cure)
        if is_setup_style(cls):
            cls.setup_context(ctx, tuple(values), out)
        else:
            with torch.no_grad():
                trial = cls.forward(ctx, *values)
            ctx.replace(as_tuple(trial), as_tuple(out))
    return out, ctx


def without(interpreter: Interpreter, cls: type[Function]) -> suspended:
    """Context: methods of ``cls`` run in the place of ``interpreter``, whose values say too little to close over."""

    def refuse(x: WrapperTensor) -> NoReturn:
        what = f"closes over a tensor of {interpreter.name}"
        raise CustomFunctionError(cls, what, "Pass it to apply, as an argument.")

    return suspended(interpreter, refuse)


def versions(values: Sequence[Any]) -> list[int]:
    """How often the tensors among ``values`` were written."""
    return [
        v.version if type(v) is WrapperTensor else v._version
        for v in values
        if isinstance(v, Tensor) and (type(v) is WrapperTensor or not v.is_inference())
    ]


class Refusal:
    """The error for something that a method returned."""

    def __init__(self, cls: type[Function], where: str) -> None:
        self.cls = cls
        self.where = where

    def __call__(self, got: str, wanted: str) -> CustomFunctionError:
        return CustomFunctionError(self.cls, f"returned {got} {self.where}", f"Return {wanted}.")


def gradients(cls: type[Function], ctx: Context, grad: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """What ``backward`` returns, fitted to the shapes and dtypes of the inputs."""
    found = as_tuple(cls.backward(ctx, *ctx.in_declared_dtypes(grad)))
    count = len(inputs)
    if len(found) > count and all(f is None for f in found[count:]):
        found = found[:count]
    if len(found) != count:
        raise CustomFunctionError(
            cls,
            f"returned {len(found)} gradients from backward for {count} inputs",
            "Return one per input, None where there is none.",
        )

    return [
        fitted(f, given, Refusal(cls, f"from backward as gradient of input {i}"))
        if f is not None and given is not None
        else None
        for i, (f, given) in enumerate(zip(found, inputs, strict=True))
    ]


def tangents_of(cls: type[Function], ctx: Context, tangents: Sequence[Any], outs: Sequence[Any]) -> tuple[Any, ...]:
    """What ``jvp`` returns, of the shapes and dtypes ``outs``."""
    found = as_tuple(cls.jvp(ctx, *tangents))
    if len(found) != len(outs):
        raise CustomFunctionError(
            cls,
            f"returned {len(found)} tangents from jvp for {len(outs)} outputs",
            "Return one per output, None where there is none.",
        )
    for i, (t, o) in enumerate(zip(found, outs, strict=True)):
        expect_tangent(t, o, Refusal(cls, f"from jvp as tangent of output {i}"))
    return found
