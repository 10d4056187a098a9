"""An ``autograd.Function`` at a level that looks on: its forward is code, where nobody asks for its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.errors import CustomFunctionError
from functrans.interpreters.function_context import Context, as_tuple, is_setup_style
from functrans.pytorch.thread_state import is_forward_level_open, running_at
from functrans.tensors.pytrees import tree_flatten


def seen_function(level: Interpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    """The output of ``cls`` at ``level``, whose wrappers carry nothing."""
    if follows([x for x in tree_flatten(args)[0] if isinstance(x, Tensor)]):
        what = f"was applied inside {level.name}, which would not see it, and is differentiated around it"
        raise CustomFunctionError(cls, what, "Differentiate inside.")
    ctx = Context(cls, (False,) * len(args))
    with running_at(level), torch.no_grad():
        out = cls.forward(*args) if is_setup_style(cls) else cls.forward(ctx, *args)
        # an input that is returned is another tensor outside of the Function
        outs = tuple(o.view_as(o) if any(o is a for a in args) and isinstance(o, Tensor) else o for o in as_tuple(out))
    return outs if isinstance(out, tuple) else outs[0]


def follows(tensors: Sequence[Tensor]) -> bool:
    """Whether a level, or PyTorch's own autograd, takes a derivative by one of the tensors."""
    if is_forward_level_open():
        return True  # it may; at_base will tell
    for x in tensors:
        value: Any = x
        while type(value) is WrapperTensor:
            if value.interpreter.differentiates and not value.interpreter.is_constant(value):
                return True
            value = value.value
        if value.requires_grad and torch.is_grad_enabled():
            return True
    return False
