"""An ``autograd.Function`` on tracked values."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.boundary.leftovers import suspended
from functrans.core.dispatch import map_tensors
from functrans.errors.call_sites import definition
from functrans.interpreters.function_context import (
    Context,
    as_tuple,
    gradients,
    run_below,
    shape_of,
    unwrapped,
)
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import snapshot
from functrans.pytorch.thread_state import lowered
from functrans.tensors.pytrees import tensors_in


def grad_rule(interpreter: GradInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    _, values = unwrapped(interpreter, args)
    indices = [interpreter.index_of(a) for a in args]
    needs = tuple(s is not None for s in indices)
    if not any(needs) or not torch.is_grad_enabled():
        with suspended(interpreter), lowered(interpreter):
            out = cls.apply(*values)
        return map_tensors(interpreter.constant, out)
    out, ctx = run_below(interpreter, cls, values, needs)
    outs = as_tuple(out)
    wrapped = tuple(
        (interpreter.constant(o) if ctx.is_non_differentiable(o) else interpreter.output(o))
        if isinstance(o, Tensor)
        else o
        for o in outs
    )
    saved = FunctionRecord(interpreter, cls, ctx, outs, [shape_of(v) for v in values])
    made = [interpreter.index_of(w) for w in wrapped]
    interpreter.record(FUNCTION_NODE, made, [s for s in indices if s is not None], saved)
    return wrapped if isinstance(out, tuple) else wrapped[0]


class FunctionRecord:
    """One tracked call of a Function."""

    def __init__(
        self,
        interpreter: GradInterpreter,
        cls: type[Function],
        ctx: Context,
        outs: tuple[Any, ...],
        inputs: list[Any],
    ) -> None:
        self.interpreter = ref(interpreter)  # which holds the record
        self.cls = cls
        self.ctx = ctx
        self.outs = outs
        self.inputs = inputs

    def __repr__(self) -> str:
        return f"<call of {self.cls.__name__}>"


class FunctionNode:
    op: Any = "an autograd.Function"

    def operator(self, saved: FunctionRecord) -> str:
        return f"{saved.cls.__name__}.apply"

    def rule_place(self, saved: FunctionRecord) -> str | None:
        return definition(saved.cls.backward)

    def __repr__(self) -> str:
        return f"<FunctionNode of {self.op}>"

    def pull(self, saved: FunctionRecord, grad: list[Tensor | None]) -> list[Any]:
        ctx = saved.ctx
        if ctx.materialize_grads:
            grad = [
                torch.zeros_like(o) if g is None and isinstance(o, Tensor) else g
                for g, o in zip(grad, saved.outs, strict=True)
            ]
        interpreter = saved.interpreter()
        with nullcontext() if interpreter is None else suspended(interpreter):  # None: nothing can refer to it
            found = gradients(saved.cls, ctx, grad, saved.inputs)
        return [f for f, needed in zip(found, ctx.needs_input_grad, strict=True) if needed]

    def protect(self, saved: FunctionRecord, target: Tensor) -> FunctionRecord:
        saved.ctx._saved = tuple(snapshot(x, target) for x in saved.ctx._saved)
        return saved

    def saved_tensors(self, saved: FunctionRecord) -> list[Tensor]:
        return tensors_in(saved.ctx._saved)


FUNCTION_NODE = FunctionNode()
