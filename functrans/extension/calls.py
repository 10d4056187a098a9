"""What ``functrans.extend`` offers of the core, with checks of what is given; the core calls the same without them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrans.api.checks import call_function, check_callable, check_flag, check_kind
from functrans.core import dispatch, stack, tensor
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.decompositions import table
from functrans.errors import CallError, CallTypeError
from functrans.errors.wording import shown
from functrans.operators import info as operators
from functrans.pytorch import thread_state
from functrans.pytorch.torch_private import OpOverload


def check_interpreter(call: str, interpreter: Any) -> None:
    cure = "Make one of the class." if isinstance(interpreter, type) and issubclass(interpreter, Interpreter) else ""
    check_kind(call, "interpreter", interpreter, Interpreter, "an Interpreter", cure)


def check_running(call: str, interpreter: Any) -> None:
    check_interpreter(call, interpreter)
    if not interpreter.alive:
        raise CallError(
            call, f"{interpreter.name}, which has ended", "an interpreter that runs", "Call it inside run_transformed."
        )


def check_operator(call: str, op: Any) -> None:
    check_kind(
        call, "op", op, OpOverload, "an operator overload", "Name the overload, as in torch.ops.aten.sin.default."
    )


def check_arguments(call: str, args: Any, kwargs: Any) -> None:
    check_kind(call, "args", args, list | tuple, "a list or tuple with the operator's positional arguments")
    check_kind(call, "kwargs", kwargs, dict, "a dict with the operator's keyword-only arguments")


def run(call: str, function: Callable[..., Any], interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
    """``function`` with these arguments, checked; those of the operator are compared with its schema if it failed."""
    check_running(call, interpreter)
    check_operator(call, op)
    check_arguments(call, args, kwargs)
    try:
        return function(interpreter, op, args, kwargs)
    except (IndexError, RuntimeError, TypeError):
        check_schema(call, op, args, kwargs)
        raise


def check_schema(call: str, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> None:
    """Find what of an operator's arguments does not fit its schema."""
    schema = op._schema
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(positional):
        raise CallTypeError(call, f"{len(args)} positional arguments", f"what {schema} takes")
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    known = {a.name: a for a in schema.arguments}
    for name in given:
        if name not in known:
            raise CallTypeError(call, f"an argument {shown(name)}", f"what {schema} takes")
    for name, argument in known.items():
        if name not in given and not argument.has_default_value():
            raise CallTypeError(call, f"no argument {name!r}", f"what {schema} takes")
        if str(argument.type) == "Tensor" and name in given:
            check_kind(call, f"argument {name!r} of {op}", given[name], Tensor, "a tensor")


@functools.wraps(operators.op_info)
def op_info(op: OpOverload) -> operators.OpInfo:
    check_operator("op_info(op)", op)
    return operators.op_info(op)


@functools.wraps(dispatch.lower)
def lower(interpreter: Interpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    return run("lower(interpreter, op, args, kwargs)", dispatch.lower, interpreter, op, args, kwargs)


@functools.wraps(table.decompose)
def decompose(interpreter: Interpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    call = "decompose(interpreter, op, args, kwargs)"
    out = run(call, table.decompose, interpreter, op, args, kwargs)
    if out is NotImplemented:
        raise CallError(
            call, f"{op} as op", "a composite operator", "Ask functrans.extend.op_info(op).composite."
        )
    return out


@functools.wraps(tensor.wrap)
def wrap(interpreter: Interpreter, value: Tensor) -> WrapperTensor:
    check_running("wrap(interpreter, value)", interpreter)
    check_kind("wrap(interpreter, value)", "value", value, Tensor, "a tensor of a level below")
    return tensor.wrap(interpreter, value)


@functools.wraps(dispatch.map_tensors)
def map_tensors(function: Callable[[Tensor], Any], out: Any) -> Any:
    check_callable("map_tensors", function)
    return dispatch.map_tensors(lambda x: call_function("map_tensors(function, out)", function, (x,), {}), out)


@functools.wraps(stack.run_transformed)
def run_transformed(interpreter: Interpreter, body: Callable[[], Any], *, enable_grad: bool = False) -> Any:
    call = "run_transformed(interpreter, body)"
    check_interpreter(call, interpreter)
    check_kind(call, "body", body, Callable, "a function without arguments")
    check_flag(call, "enable_grad", enable_grad)
    return stack.run_transformed(interpreter, lambda: call_function(call, body, (), {}), enable_grad=enable_grad)


@functools.wraps(thread_state.lowered, updated=())
def lowered(interpreter: Interpreter) -> thread_state.lowered:
    check_running("lowered(interpreter)", interpreter)
    return thread_state.lowered(interpreter)


@functools.wraps(thread_state.running_at, updated=())
def running_at(level: Interpreter | None) -> thread_state.running_at:
    if level is not None:
        check_running("running_at(level)", level)
    return thread_state.running_at(level)
