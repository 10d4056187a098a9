"""The interpreter stack: what is on it, and how it is entered.

The stack is a linked list: ``STATE.top`` is the innermost interpreter, ``interpreter.below`` the next one, None the
base (plain PyTorch). It is thread-local, and so is all that is switched with it: see pytorch/thread_state.py.

NOTE [Grad mode per level]
PyTorch has one grad-mode flag per thread. A level's flag is that flag while the level is on top; entering the next
level stores it there (``outer_grad_mode``), and lowering applies it. An operator is thus recorded at a level
when the flags of that level and of every level above it are on. Forward mode has a switch of its own, treated alike.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch

from functrans.core.interpreter import Interpreter
from functrans.errors import MixedTransformsError
from functrans.errors.misuse import check_enterable
from functrans.pytorch import thread_state
from functrans.pytorch.export import traced_behind_autograd
from functrans.pytorch.thread_state import OBSERVERS, STATE, Snapshot
from functrans.pytorch.torch_private import (
    AUTOGRAD,
    INDEX_BATCHED,
    PRE_DISPATCH,
    VIEWS_AND_VERSIONS,
    is_key_included,
    is_torch_func_active,
    push_mode,
    set_eval_frame,
    set_grad_enabled,
    set_key_excluded,
)


def interpreter_stack() -> list[Interpreter]:
    """The interpreters of this thread, innermost first.

    Example:
        >>> import torch, functrans
        >>> from functrans.core.stack import interpreter_stack
        >>> def f(x):
        ...     print([(i.level, i.kind) for i in interpreter_stack()])
        ...     return x.sin()
        >>> _ = functrans.vmap(functrans.grad(f))(torch.zeros(2))
        [(2, 'grad'), (1, 'vmap')]
    """
    found, interpreter = [], STATE.top
    while interpreter is not None:
        found.append(interpreter)
        interpreter = interpreter.below
    return found


def run_transformed(interpreter: Interpreter, body: Callable[[], Any], *, enable_grad: bool = False) -> Any:
    """Run ``body`` with ``interpreter`` on top of the stack; whatever happens, leave the thread as it was.

    ``interpreter`` was made here and has not run, else InterpreterError. ``enable_grad``: with its grad mode on.
    """
    if STATE.top is None and is_key_included(PRE_DISPATCH):
        with traced_behind_autograd():
            return run_transformed(interpreter, body, enable_grad=enable_grad)
    before = Snapshot()
    check_enterable(interpreter, before)
    if is_torch_func_active():
        raise MixedTransformsError(interpreter.name)
    interpreter.thread = get_ident()
    dynamo = None
    try:
        try:
            if before.top is None:
                dynamo = set_eval_frame(None)  # torch.compile leaves alone what is called from here
                set_key_excluded(AUTOGRAD, True)
                set_key_excluded(VIEWS_AND_VERSIONS, True)
                set_key_excluded(INDEX_BATCHED, True)  # for good: a wrapper may outlive its transform
                STATE.packing = before.hooks
                STATE.door_depth = len(before.modes) + 1
                push_mode(thread_state.DOOR)
            STATE.top = interpreter
            if enable_grad and not before.grad:
                set_grad_enabled(True)
            if OBSERVERS and STATE.observer is not None:
                body = STATE.observer.around(interpreter, body)
            out = body()
            interpreter.returned()
            return out
        finally:
            leave(interpreter, before)
    except BaseException:
        leave(interpreter, before)  # once more: the exception may have come while the thread was put back
        raise
    finally:
        if dynamo is not None:
            set_eval_frame(dynamo)


def leave(interpreter: Interpreter, before: Snapshot) -> None:
    """End ``interpreter``; see NOTE [Put back]."""
    interpreter.alive = False
    before.restore()
    # Autocast caches its casts of captured weights; those made here belong to this transform.
    torch.clear_autocast_cache()
