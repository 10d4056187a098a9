"""torch.func's transforms inside of ours.

NOTE [Scalars in torch.func]
Its C++ takes each tensor that carries the key of batched nested tensors for one of its own, and reads on behind the end
of ours: NOTE [Scalar indices] has why integers without dimensions carry it. So it is counted how many of its transforms
run. While one does, no wrapper is made with that key, and where one that has it is an argument of a torch function,
another wrapper around the same value takes its place. (As an index of a plain tensor it has none to replace it.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from functrans.core.tensor import NOT_READ, WrapperTensor, wrap_as
from functrans.errors import InsideTransformError
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_func import NESTING
from functrans.tensors.pytrees import tree_map


def counted(enter: Callable[..., Any], step: int) -> Callable[..., Any]:
    @functools.wraps(enter)
    def nesting(*args: Any) -> Any:
        level = enter(*args)
        STATE.foreign += step
        return level

    return nesting


def for_torch_func(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of ``function``, none of which torch.func takes for a tensor of its own."""
    name = getattr(function, "__name__", "")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if writes and args and has_key(args[0]):
        what = f"{name} of a number by a function that a transform of torch.func runs"
        raise InsideTransformError(what, args[0].interpreter.name, "functrans for the inner transform, too")
    return tree_map(without_key, args), tree_map(without_key, kwargs)


def has_key(x: Any) -> bool:
    return type(x) is WrapperTensor and not x.shape and x.dtype in NOT_READ


def without_key(x: Any) -> Any:
    if not has_key(x):
        return x
    wrapper = wrap_as(x.interpreter, x.value, x.shape, x.strides)
    wrapper._carried = x._carried
    return wrapper


for _module, _names in NESTING.items():
    for _name in _names:
        for _how, _step in (("increment", 1), ("decrement", -1)):
            _full = f"_{_name}_{_how}_nesting"
            setattr(_module, _full, counted(getattr(_module, _full), _step))
