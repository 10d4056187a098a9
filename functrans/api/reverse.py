"""How reverse mode runs a function: its arguments in, its value and its pullback out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import (
    ALL,
    Argnums,
    Inputs,
    check_argnums_kind,
    check_complex,
    check_graph,
    check_outputs,
    check_scalar,
)
from functrans.api.checks import check_callable, check_flag
from functrans.api.linear_functions import like
from functrans.api.pullbacks import Pullback, conjugated
from functrans.boundary.facades import bare
from functrans.boundary.factories import ones_for
from functrans.boundary.made_at import note_results
from functrans.core.stack import run_transformed
from functrans.errors import Call, CallTypeError
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.pytorch.thread_state import STATE
from functrans.tensors.pytrees import TreeSpec, tree_flatten, tree_map, tree_unflatten


def differentiating(transform: str, func: Any, argnums: Any, has_aux: Any, holomorphic: Any = False) -> Call:
    """The call ``transform(func, argnums)``, checked as far as it can be without the arguments."""
    if not (is_dynamo_compiling() or callable(func)):  # Dynamo does not know what is callable
        check_callable(transform, func)
    call = Call(transform, func, {"argnums": argnums} if has_aux is False else {"argnums": argnums, "has_aux": has_aux})
    if holomorphic is not False:
        call.arguments["holomorphic"] = holomorphic
        check_flag(call, "holomorphic", holomorphic)
    if type(argnums) is not int:
        check_argnums_kind(call, argnums)
    if has_aux is not False:
        check_flag(call, "has_aux", has_aux)
    return call


def grad_and_value_of(
    call: Call,
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    holomorphic: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cls: type[GradInterpreter] = GradInterpreter,
) -> tuple[Any, Any]:
    interpreter = cls(func)
    inputs, value, index, aux = run_scalar(interpreter, call, func, argnums, has_aux, args, kwargs, holomorphic)
    cotangents = {} if index is None else interpreter.pull({index: ones_for(bare(value))}, consume=True)
    grads = inputs.collect(cotangents)
    if holomorphic:
        grads = tree_map(conjugated, grads)
    inputs.write_back()
    if STATE.top is not None:
        note_results(2, grads, value, aux)
    return grads, (value, aux) if has_aux else value


def run_scalar(
    interpreter: GradInterpreter,
    call: Call,
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    holomorphic: bool = False,
) -> tuple[Inputs, Any, int | None, Any]:
    """Run ``func``, which returns a scalar, at the level of ``interpreter``: the arguments, which are not written back
    yet, the value, its index, aux."""
    inputs = Inputs(interpreter, call, argnums, args, kwargs)
    if holomorphic:
        check_complex(call, "args", args, inputs.order)

    def body() -> tuple[Any, Any, Any]:
        out, aux = inputs.run(func, has_aux)
        check_scalar(call, out, bool(holomorphic))
        value, index = inputs.leave(out), interpreter.index_of(bare(out))  # in this order: it may be a view to refresh
        if index is None:
            check_graph(interpreter)
        return value, index, aux

    return (inputs, *run_transformed(interpreter, body, enable_grad=True))


def vjp_with_argnums(
    call: Call,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    argnums: Argnums,
    has_aux: bool,
    kwargs: Any = None,
    cls: type[GradInterpreter] = GradInterpreter,
) -> tuple[Any, Pullback, Any]:
    """vjp with respect to some of the primals (for ALL the pullback returns a tuple)."""
    interpreter = cls(func)
    values, spec, pullback, aux = run_recorded(interpreter, call, func, primals, argnums, has_aux, kwargs)
    if STATE.top is not None:
        note_results(2, values, aux)
    return tree_unflatten(spec, values), pullback, aux


def run_recorded(
    interpreter: GradInterpreter,
    call: Call,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    argnums: Argnums,
    has_aux: bool,
    kwargs: Any = None,
    *,
    conjugate: bool = False,
) -> tuple[list[Tensor], TreeSpec, Pullback, Any]:
    """Run ``func`` at the level of ``interpreter``: the outputs, their structure, the pullback, aux."""
    if not primals and argnums is ALL:
        cure = f"The primals follow the function: {call.transform}(f, x, y)."
        raise CallTypeError(call, "no primals", "at least one", cure)
    inputs = Inputs(interpreter, call, argnums, primals, kwargs or {})

    def body() -> tuple[Any, Any, Any, Any]:
        out, aux = inputs.run(func, has_aux)
        leaves, spec = tree_flatten(out)
        check_outputs(call, out, leaves, differentiable=True)
        values = [inputs.leave(o) for o in leaves]
        indices = [interpreter.index_of(bare(o)) for o in leaves]
        if not any(indices):
            check_graph(interpreter)
        return values, indices, spec, aux

    values, indices, spec, aux = run_transformed(interpreter, body, enable_grad=True)
    inputs.write_back()
    pullback = Pullback(call, interpreter, inputs, [like(bare(v)) for v in values], indices, spec, conjugate=conjugate)
    return values, spec, pullback, aux
