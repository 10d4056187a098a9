"""An ``autograd.Function`` on batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import string_at
from types import new_class
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.boundary.leftovers import suspended
from functrans.core.dispatch import WITHOUT_TENSORS, map_tensors
from functrans.core.tensor import WrapperTensor
from functrans.errors import CustomFunctionError
from functrans.interpreters.function_context import (
    Context,
    as_tuple,
    gradients,
    is_setup_style,
    overrides,
    shape_of,
    tangents_of,
    unwrapped,
)
from functrans.interpreters.vmap.higher_order import in_its_place, physical, to_dim
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import lowered
from functrans.tensors.pytrees import tree_flatten, tree_map, tree_unflatten


def vmap_rule(interpreter: VmapInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:

    def bdim(x: Any) -> int | None:
        return x.bdim if interpreter.owns(x) else None

    _, values = unwrapped(interpreter, args)
    in_dims = tuple(None if type(a) in WITHOUT_TENSORS else tree_map(bdim, a) for a in args)
    closed_over: list[WrapperTensor] = []

    def closes_over(x: WrapperTensor) -> NoReturn:
        closed_over.append(x)
        raise CustomFunctionError(
            cls, "closes over a batched tensor in its vmap staticmethod", "Pass it to apply, as an argument."
        )

    if all(d is None for d in tree_flatten(in_dims)[0]):
        before = None if interpreter.randomness == "same" else Drawn()
        try:
            with suspended(interpreter, closes_over), lowered(interpreter):
                out = map_tensors(interpreter.constant, cls.apply(*values))
            if before is None or not before.more_since():
                return out
        except CustomFunctionError:
            if not closed_over:
                raise
    elif overrides(cls, "vmap"):
        if cls.generate_vmap_rule:
            raise CustomFunctionError(
                cls, "has both generate_vmap_rule=True and a vmap staticmethod", "Keep one of them."
            )
        with suspended(interpreter, closes_over), lowered(interpreter):
            result = cls.vmap(interpreter.info, in_dims, *values)
        return interpreter.leave(cls, result)
    batched = batched_function(cls, interpreter, in_dims)
    with lowered(interpreter):
        out = batched.apply(*values)
    wrapped = tuple(interpreter.batched(o, 0) if isinstance(o, Tensor) else o for o in as_tuple(out))
    return wrapped if isinstance(out, tuple) else wrapped[0]


class Drawn:
    """How far the generators are that draw where none is given."""

    def __init__(self) -> None:
        self.state = torch.default_generator.get_state()
        #: the same to be compared, as torch.equal would come in by the door
        self.numbers = string_at(self.state.data_ptr(), self.state.nbytes)
        self.gpus = [g.get_offset() for g in torch.cuda.default_generators] if torch.cuda.is_initialized() else []

    def more_since(self) -> bool:
        """Whether something was drawn since, for all examples at once; if so, the generators are put back."""
        now = Drawn()
        if now.numbers == self.numbers and now.gpus == self.gpus:
            return False
        torch.default_generator.set_state(self.state)
        for generator, offset in zip(torch.cuda.default_generators, self.gpus, strict=False):
            generator.set_offset(offset)
        return True


def batched_function(cls: type[Function], outer: VmapInterpreter, in_dims: tuple[int | None, ...]) -> type[Function]:
    """The Function on physical values: each of its methods, run once under vmap."""
    of_examples = Methods(cls, outer, in_dims)
    methods: dict[str, Any] = {"function": cls, "in_dims": in_dims}
    for name in ("forward", "backward", *(["jvp"] if overrides(cls, "jvp") else [])):
        methods[name] = staticmethod(getattr(of_examples, name))
    return new_class(f"Batched{cls.__name__}", (Function,), exec_body=lambda body: body.update(methods))


class Methods:
    """Methods of a Function, on physical values: those of ``cls``, which see one example."""

    def __init__(self, cls: type[Function], outer: VmapInterpreter, in_dims: tuple[int | None, ...]) -> None:
        self.cls = cls
        self.outer = outer
        self.in_dims = in_dims

    def inside(self, body: Callable[[VmapInterpreter], Any]) -> Any:
        return in_its_place(self.outer, self.cls, body)

    def forward(self, ctx: Any, *values: Any) -> Any:
        cls = self.cls
        inner = Context(cls, ctx.needs_input_grad)

        def body(interpreter: VmapInterpreter) -> Any:
            args = [entered(interpreter, v, d) for v, d in zip(values, self.in_dims, strict=True)]
            if is_setup_style(cls):
                out = cls.forward(*args)
                cls.setup_context(inner, tuple(args), out)
            else:
                out = cls.forward(inner, *args)
            inner.check_grad_dtypes(as_tuple(out))
            outs = [physical(interpreter, o) for o in as_tuple(out)]
            differentiable = [not inner.is_non_differentiable(o) for o in as_tuple(out)]
            ctx.inputs = [shape_of(a) for a in args]
            ctx.outputs = [shape_of(o) for o in as_tuple(out)]
            kept = [[physical(interpreter, s) for s in those] for those in (inner._saved, inner._saved_forward)]
            return outs, differentiable, isinstance(out, tuple), *kept

        outs, differentiable, many, saved, saved_forward = self.inside(body)
        results = [to_dim(self.outer.batch_size, o, d, 0) for o, d in outs]
        by_value = {id(o): r for (o, _), r in zip(outs, results, strict=True)}
        ctx.dims = [d if id(s) not in by_value else 0 for s, d in saved]
        ctx.forward_dims = [d if id(s) not in by_value else 0 for s, d in saved_forward]
        ctx.save_for_backward(*[by_value.get(id(s), s) for s, _ in saved])
        ctx.save_for_forward(*[by_value.get(id(s), s) for s, _ in saved_forward])
        ctx.mark_non_differentiable(
            *[r for r, d in zip(results, differentiable, strict=True) if not d and isinstance(r, Tensor)]
        )
        ctx.set_materialize_grads(inner.materialize_grads)
        ctx.inner = inner
        return tuple(results) if many else results[0]

    def backward(self, ctx: Any, *grads: Any) -> Any:
        def body(interpreter: VmapInterpreter) -> Any:
            ctx.inner._forward_mode = False
            ctx.inner._saved = rewrapped(interpreter, ctx.saved_tensors, ctx.dims)
            given = [interpreter.batched(g, 0) if isinstance(g, Tensor) else g for g in grads]
            return [physical(interpreter, f) for f in gradients(self.cls, ctx.inner, given, ctx.inputs)]

        def of_argument(x: Any, bdim: int | None, in_dim: int | None) -> Any:
            found = to_dim(self.outer.batch_size, x, bdim, in_dim or 0)
            return found.sum(0) if in_dim is None and isinstance(x, Tensor) else found

        return tuple(of_argument(x, bdim, d) for (x, bdim), d in zip(self.inside(body), self.in_dims, strict=True))

    def jvp(self, ctx: Any, *tangents: Any) -> Any:
        def body(interpreter: VmapInterpreter) -> Any:
            ctx.inner._forward_mode = True
            wrapped = rewrapped(interpreter, ctx.saved_tensors, ctx.forward_dims or ctx.dims)
            if ctx.inner._saved_forward:
                ctx.inner._saved_forward = wrapped
            else:
                ctx.inner._saved = wrapped
            pairs = zip(tangents, self.in_dims, strict=True)
            given = [interpreter.batched(t, d) if isinstance(t, Tensor) else t for t, d in pairs]
            return [physical(interpreter, f) for f in tangents_of(self.cls, ctx.inner, given, ctx.outputs)]

        return tuple(to_dim(self.outer.batch_size, f, d, 0) for f, d in self.inside(body))


def entered(interpreter: VmapInterpreter, value: Any, dim: Any) -> Any:
    """An argument of a method as code at the level sees it."""
    if isinstance(value, Tensor):
        return interpreter.batched(value, dim)
    if type(value) in WITHOUT_TENSORS:
        return value
    leaves, spec = tree_flatten(value)
    pairs = zip(leaves, tree_flatten(dim)[0], strict=True)
    return tree_unflatten(spec, [interpreter.batched(v, d) if isinstance(v, Tensor) else v for v, d in pairs])


def rewrapped(interpreter: VmapInterpreter, saved: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, ...]:
    return tuple(interpreter.batched(s, d) if isinstance(s, Tensor) else s for s, d in zip(saved, dims, strict=True))
