"""torch.autograd.Function inside transforms.

Left alone, ``Function.apply`` would run its forward with autograd off, operator by operator, and a transform would see
a constant or the forward's own derivative. ``apply`` is therefore part of the door: the Function goes down the stack as
one operator, and every level gives it its meaning with values of the level below.

NOTE [Contexts per level]
Each grad or jvp level that tracks a call fills a context of its own with values of the level below, and its pullback
runs the Function's ``backward`` on these; so ``backward`` is differentiated by the levels below, and each level uses
the custom derivative. A combined forward(ctx, ...) both computes and saves. It is run on the values once to fill the
context, and the result proper comes from applying the Function one level down; outputs that were saved are replaced by
these.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.autograd.function import Function
from torch.utils.checkpoint import CheckpointFunction

from functrans.boundary.calls import lift
from functrans.boundary.facades import bare
from functrans.boundary.leftovers import all_as_here
from functrans.boundary.made_at import note_site
from functrans.core.dispatch import entered, scan
from functrans.core.interpreter import Interpreter
from functrans.errors import CustomFunctionError, DeadWrapperError
from functrans.functionalization.writes import write_outside_of_operators
from functrans.interpreters.branch import BranchInterpreter
from functrans.interpreters.failures import note_rule
from functrans.interpreters.function_context import as_tuple, is_setup_style, within, without
from functrans.interpreters.functionalize import FunctionalizeInterpreter, apply_below
from functrans.interpreters.grad.function import grad_rule
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.function import jvp_rule
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.linearize import LinearizeInterpreter, record_function
from functrans.interpreters.transpose import TransposeInterpreter, transpose_rule
from functrans.interpreters.vmap.function import vmap_rule
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.interpreters.written_inputs import on_copies, writes_inputs
from functrans.pytorch.modules import ModuleHook
from functrans.pytorch.thread_state import STATE, lowered, running_at
from functrans.pytorch.torch_private import is_torch_func_active, mode_stack_size

_original: Any = Function.__dict__["apply"]


def _original_apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    return _original.__get__(None, cls)(*args, **kwargs)


class BackwardHookFunction(Function):
    """What a module's backward hooks put around its inputs and outputs, in place of PyTorch's own.

    That one asks its inputs whether they require grad, which values one level down do not say. (Modules compare names.)
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        return args

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents


def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """``Function.apply``: the Function goes down the interpreter stack as one operator."""
    top = STATE.top
    if top is None or top.carries_autograd or mode_stack_size() < STATE.door_depth:
        # at the base, where an operator that PyTorch differentiates by a Function is run, too
        return _original_apply(cls, *args, **kwargs)
    if STATE.foreign and is_torch_func_active():  # its levels are above; it comes back here
        return _original_apply(cls, *args, **kwargs)
    if cls is ModuleHook:
        cls = BackwardHookFunction
    args = bare(args)
    if is_setup_style(cls) or kwargs:
        signature = inspect.signature(cls.forward).bind(*(args if is_setup_style(cls) else (None, *args)), **kwargs)
        signature.apply_defaults()
        args = signature.args if is_setup_style(cls) else signature.args[1:]
        if signature.kwargs:
            raise CustomFunctionError(
                cls, f"was called with keyword-only arguments {sorted(signature.kwargs)}", "Make them positional."
            )
    if cls is CheckpointFunction:  # its backward would run autograd, which sees nothing of what a level records
        return args[0](*args[2:])
    args = entered(top, args, {})[0]
    try:
        scan([leaf for a in args for leaf in within(a)])
    except DeadWrapperError:
        args = all_as_here(args)
    out = send(top, cls, args) if not writes_inputs(cls) else send_writing(top, cls, args)
    note_site(as_tuple(out), sys._getframe(0), 0)
    return out


def send_writing(top: Interpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    """Apply ``cls``, which writes to its inputs; see NOTE [Functions that write]."""
    written: dict[int, int] = {}
    out = send(top, on_copies(cls, written), args)
    outs = list(as_tuple(out))
    for i, j in written.items():
        write_outside_of_operators(args[i], outs[j], f"{cls.__name__}.apply")
        outs[j] = args[i]
    return tuple(outs) if isinstance(out, tuple) else outs[0]


def send(level: Interpreter | None, cls: type[Function], args: Sequence[Any]) -> Any:
    """Apply ``cls`` at ``level``, the top, which may have a part in it by what its methods close over alone."""
    if level is None:
        with running_at(None):
            return _original_apply(cls, *args)
    for kind in type(level).__mro__:
        if kind in FUNCTION_RULES:
            rule = FUNCTION_RULES[kind]
            if STATE.observer is not None:
                rule = STATE.observer.asked(f"{cls.__name__}.apply", rule)
            try:
                return rule(level, cls, args)
            except Exception as error:
                note_rule(error, f"{cls.__name__}.apply", level)
                raise
    owner = scan([leaf for a in args for leaf in within(a)])[0]
    if owner is not level:
        with without(level, cls), lowered(level):
            return lift(cls.apply(*args), level.below, level)
    raise CustomFunctionError(
        cls,
        f"was applied inside {level.name}, which has no rule for it",
        "Add one to functrans.extend.FUNCTION_RULES.",
    )


#: How each kind of interpreter gives an autograd.Function its meaning: rule(interpreter, cls, args) -> output of that
#: level.
FUNCTION_RULES: dict[type[Interpreter], Callable[..., Any]] = {
    GradInterpreter: grad_rule,
    TransposeInterpreter: transpose_rule,
    LinearizeInterpreter: record_function,
    FunctionalizeInterpreter: apply_below,
    BranchInterpreter: apply_below,
    JvpInterpreter: jvp_rule,
    VmapInterpreter: vmap_rule,
}

# apply has no dispatch of its own, so PyTorch is told of the stack here.
Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
