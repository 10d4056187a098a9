"""What a wrapper tensor refuses: how messages call it, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from functrans.core.errors import InsideTransformError, NoDataError

#: The methods that no wrapper has an answer to; None where NoDataError knows the cure.
REFUSED = {
    "__reduce_ex__": ("pickling a tensor", "the transform's outputs, after it returned"),
    "backward": ("Tensor.backward()", "functrans.grad or functrans.vjp"),
    "data_ptr": ("data_ptr()", None),
    "register_post_accumulate_grad_hook": ("Tensor.register_post_accumulate_grad_hook()", "Tensor.register_hook()"),
}

_KEEP = (
    "keep it a tensor, which arithmetic takes as it takes a number; "
    "what is the same for every example can be passed as a number, or as a tensor with in_dims=None"
)
_LOGIC = "`&`, `|` and `~` take the place of `and`, `or` and `not`"
_AFTER = "return the tensor from the function, and convert the result outside of vmap"
#: What asks for a tensor's number, which under vmap is another one for each example.
NUMBERS = {
    "bool": (
        "bool(tensor), which `if`, `while`, `assert`, `and`, `or` and `not` call,",
        "torch.where(condition, a, b) computes both and chooses for each example; " + _LOGIC,
    ),
    "index": (
        "a tensor as a Python integer, which range(n), list[i] and sizes ask for,",
        "index a tensor with it, x[i]; a length or size has to be the same for every example: pass it as an int",
    ),
    "item": ("tensor.item()", _KEEP),
    "tolist": ("tensor.tolist()", _AFTER),
    "format": (
        "format(tensor, spec), as in an f-string with a format,",
        f"leave the format out, f'{{x}}', to see all examples; or {_AFTER}",
    ),
    **{name: (f"{name}(tensor)", _KEEP) for name in ("int", "float", "complex")},
}


def refuse(x: Any, what: str, cure: str | None) -> NoReturn:
    """Say that ``what`` cannot be asked of the wrapper ``x``."""
    raise NoDataError(what, x) if cure is None else InsideTransformError(what, x.interpreter.name, cure)


def refused(what: str, cure: str | None) -> Callable[..., NoReturn]:
    """A method of wrappers that is refused, whatever it is called with."""
    return lambda self, *args, **kwargs: refuse(self, what, cure)
