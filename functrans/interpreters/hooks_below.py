"""Hooks on the gradients of a level's constants, which a level below or PyTorch's autograd computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.errors import InsideTransformError
from functrans.pytorch.thread_state import running_at


def hook_below(level: Interpreter, wrapper: WrapperTensor, hook: Callable[[Tensor], Any]) -> Any:
    """Run ``hook``, which is code at ``level``, on the gradient by the constant ``wrapper``."""

    def one_below(grad: Tensor) -> Any:
        if not level.alive:
            return hook(grad)
        with running_at(level):
            new = hook(level.constant(grad))
        if not level.owns(new):
            return new
        if not level.is_constant(new):
            what = "Tensor.register_hook() with a hook whose gradient depends on the arguments"
            cure = "an autograd.Function whose backward does what the hook does"
            raise InsideTransformError(what, level.name, cure)
        return new.value

    return wrapper.value.register_hook(one_below)
