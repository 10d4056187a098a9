"""How forward mode runs a function: primals and tangents in, values and their tangents out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.api.arguments import (
    ALL,
    Argnums,
    Inputs,
    argument_cure,
    check_outputs,
    gradients_by,
    is_smooth,
    pick,
)
from functrans.api.mismatches import refuse_tangent
from functrans.api.structures import difference, path_of
from functrans.boundary.facades import bare
from functrans.boundary.leftovers import as_here
from functrans.boundary.made_at import note_results
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.errors import Call, CallError, CallValueError
from functrans.errors.wording import what
from functrans.interpreters.constants import as_own
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.operators.info import DIFFERENTIABLE
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import set_forward_enabled
from functrans.tensors.pytrees import TreeSpec, leaves_like, tree_flatten, tree_unflatten


def jvp_with_argnums(
    call: Call,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: Any,
    argnums: Argnums,
    strict: bool,
    has_aux: bool,
    kwargs: Any = None,
    cls: type[JvpInterpreter] = JvpInterpreter,
    beside_tensors: bool = False,
) -> tuple[Any, Any, Any]:
    """jvp with respect to some of the primals; ``tangents`` belongs to these.

    ``beside_tensors``: the function may return other things among the tensors.
    """
    if not isinstance(primals, tuple):
        cure = "Write tuple(primals)." if isinstance(primals, list) else "Write (x,) for one primal."
        raise CallError(call, f"{what(primals)} as primals", "a tuple, so that f(*primals) is a valid call", cure)
    moving = primals if argnums is ALL else pick(call, primals, argnums)
    leaves, spec = tree_flatten(moving)
    tangent_leaves, tangent_spec = leaves_like(tangents, spec)
    if spec != tangent_spec:
        raise CallError(call, *difference("tangents", tangents, "primals", moving))
    if not leaves:
        raise CallError(call, f"{what(primals)} as primals", "at least one tensor")
    for place, (p, t) in enumerate(zip(leaves, tangent_leaves, strict=True)):
        if t is None and argnums is ALL and not is_smooth(p):
            continue
        if not isinstance(p, Tensor):
            cure = argument_cure(p)
            raise CallError(call, f"{what(p)} as {path_of('primals', moving, place)}", "a tensor", cure)
        if p.dtype not in DIFFERENTIABLE:
            got = f"a tensor of dtype {p.dtype} as {path_of('primals', moving, place)}"
            cure = "Convert it, e.g. with .float(); where it is not to move, its tangent is None."
            raise CallValueError(call, got, "a floating-point or complex dtype", cure)
        if not isinstance(t, Tensor) or p.shape != t.shape or p.dtype != t.dtype or p.device != t.device:
            refuse_tangent(call, p, t, place, moving)
    along = [t for t in tangent_leaves if t is not None]
    if not along:
        raise CallError(call, f"{what(tangents)} as tangents", "at least one that is a tensor")
    values, found, out_spec, aux, inputs = run_forward(
        call, func, primals, along, argnums, strict, has_aux, kwargs, cls, beside_tensors
    )
    inputs.write_back()
    pairs = zip(values, found, strict=True)
    moved = [torch.zeros_like(bare(v)) if t is None and isinstance(v, Tensor) else t for v, t in pairs]
    out_tangents = gradients_by(values, moved)
    if STATE.top is not None:
        note_results(2, values, out_tangents, aux)
    return tree_unflatten(out_spec, values), tree_unflatten(out_spec, out_tangents), aux


def run_forward(
    call: Call,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: list[Tensor],
    argnums: Argnums,
    strict: bool,
    has_aux: bool,
    kwargs: Any = None,
    cls: type[JvpInterpreter] = JvpInterpreter,
    beside_tensors: bool = False,
) -> tuple[list[Any], list[Tensor | None], TreeSpec, Any, Inputs]:
    """Run ``func`` on primals with tangents: the outputs, their tangents (None: zero, or no tensor), their structure,
    aux, and the arguments, which are not written back yet."""
    interpreter = cls(func)
    interpreter.seeds = tangents
    pairs = map(bare, tangents)
    dual = lambda v: interpreter.dual(v, as_here(next(pairs)))
    inputs = Inputs(interpreter, call, argnums, primals, kwargs or {}, dual)

    def body() -> tuple[Any, Any, Any, Any]:
        set_forward_enabled(True)
        out, aux = inputs.run(func, has_aux)
        out_leaves, out_spec = tree_flatten(out)
        check_outputs(call, out, out_leaves, beside_tensors=beside_tensors)
        values = [inputs.leave(o) for o in out_leaves]
        below = map(bare, out_leaves)
        found = [
            as_own(interpreter.below, o.tangent) if type(o) is WrapperTensor and o.interpreter is interpreter else None
            for o in below
        ]
        constants = [i for i, t in enumerate(found) if t is None and isinstance(values[i], Tensor)]
        if strict and constants:
            independent = path_of("output", out, constants[0])
            raise CallError(
                call,
                f"{independent}, which does not depend on the primals",
                "outputs that do, since strict=True",
                "Pass strict=False for zero tangents.",
            )
        return values, found, out_spec, aux

    return (*run_transformed(interpreter, body), inputs)
