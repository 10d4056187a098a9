"""How messages and reprs show wrappers, and an operator's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from functrans.pytorch.torch_private import OpOverload, no_dispatch


def given(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Arguments as a message shows them: tensors by dtype and shape, as the code at their level sees them."""
    return ", ".join([*map(shown, args), *(f"{name}={shown(a)}" for name, a in kwargs.items())])


def shown(a: Any) -> str:
    if isinstance(a, Tensor) and a.is_nested:
        return "a nested tensor"
    if isinstance(a, Tensor) or is_wrapper(a):
        return f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
    if isinstance(a, list | tuple):
        rest = [f"{len(a) - 8} more"] if len(a) > 9 else []
        return f"[{', '.join([*map(shown, a[: 8 if rest else 9]), *rest])}]"
    return str(a) if isinstance(a, OpOverload) else a.__name__ if callable(a) and hasattr(a, "__name__") else repr(a)


def is_wrapper(x: Any) -> bool:
    return hasattr(type(x), "_carried")


def describe(x: Any, name: str = "WrapperTensor") -> str:
    """The layers of a wrapper, outermost first: kind, level, dtype and shape, what its transform keeps; its value."""
    if not is_wrapper(x):
        with no_dispatch():
            return repr(x)
    i = x.interpreter
    ended = "" if i.alive else ", ended"
    if x.view_link is not None and i.alive:
        x.view_link.refresh(x)
    dtype = str(x.dtype).removeprefix("torch.")
    head = ", ".join(filter(None, (f"{i.kind} level {i.level}{ended}", f"{dtype}{list(x.shape)}", i.describe(x))))
    fields = {"value": x._value, **i.parts(x)}
    return "\n".join([f"{name}({head}", *(line for name, part in fields.items() for line in field(name, part))]) + ")"


def treescope_repr(x: Any, path: str | None, subtree_renderer: Any) -> Any:
    """How treescope shows a wrapper: the same layers, each of which folds. (It would look at plain tensors by
    operators, which belong to the running transforms; so these are text.)"""
    from treescope import repr_lib  # type: ignore[import-not-found, unused-ignore]

    slots = {name: f"_{name}" if hasattr(type(x), f"_{name}") else name for name in x.interpreter.payload}
    fields = {"shape": tuple(x.shape), **{name: getattr(x, slot) for name, slot in slots.items()}, "value": x._value}
    shown = {name: AsText(describe(v)) if type(v) in (Tensor, Parameter) else v for name, v in fields.items()}
    attributes = {"interpreter": x.interpreter, "dtype": x.dtype, **shown}
    return repr_lib.render_object_constructor(type(x), attributes, path, subtree_renderer)


class AsText:
    """Something that is shown as ``text``, in one line."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())

    def __repr__(self) -> str:
        return self.text


def field(name: str, x: Any) -> list[str]:
    """The lines that show one attribute of a wrapper."""
    first, *rest = describe(x).split("\n")
    pad = " " * (2 if is_wrapper(x) else 3 + len(name))
    return [f"  {name}={first}", *((pad + line).rstrip() for line in rest)]
