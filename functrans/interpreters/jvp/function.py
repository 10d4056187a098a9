"""An ``autograd.Function`` on values with tangents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.boundary.leftovers import suspended
from functrans.core.dispatch import map_tensors
from functrans.errors import CustomFunctionError
from functrans.interpreters.function_context import (
    as_tuple,
    overrides,
    run_below,
    shape_of,
    tangents_of,
    unwrapped,
)
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.operators.info import DIFFERENTIABLE
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import is_forward_enabled


def jvp_rule(interpreter: JvpInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    mine, values = unwrapped(interpreter, args)
    tangents = [a.tangent if m else None for a, m in zip(args, mine, strict=True)]
    if all(t is None for t in tangents) or not is_forward_enabled():
        with suspended(interpreter), lowered(interpreter):
            out = cls.apply(*values)
        return map_tensors(interpreter.constant, out)
    if not overrides(cls, "jvp"):
        with suspended(interpreter), lowered(interpreter):
            out = cls.apply(*values)
        if all(isinstance(o, Tensor) and not o.numel() for o in as_tuple(out)):
            return map_tensors(interpreter.constant, out)  # nothing of it moves: checkpoint's, of torch 2.11
        raise CustomFunctionError(
            cls, f"was applied inside {interpreter.name} and has no jvp", "Define the staticmethod jvp(ctx, *tangents)."
        )
    out, ctx = run_below(interpreter, cls, values, tuple(t is not None for t in tangents))
    ctx._forward_mode = True
    with suspended(interpreter), lowered(interpreter):
        if ctx.materialize_grads:
            tangents = [
                torch.zeros_like(v) if t is None and isinstance(v, Tensor) and v.dtype in DIFFERENTIABLE else t
                for t, v in zip(tangents, values, strict=True)
            ]
        outs = as_tuple(out)
        found = tangents_of(cls, ctx, tangents, [shape_of(o) for o in outs])
    wrapped = tuple(interpreter.dual(o, t) if isinstance(o, Tensor) else o for o, t in zip(outs, found, strict=True))
    return wrapped if isinstance(out, tuple) else wrapped[0]
