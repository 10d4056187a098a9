"""Checks of what every public function is given.

Each raises a CallError that shows the call, what came, what was expected, the cure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.core.interpreter import Interpreter
from functrans.errors import Call, CallTypeError, CallValueError
from functrans.errors.wording import callable_name, shown, what


def check_callable(transform: str, func: Any) -> None:
    if callable(func):
        return
    cure = "Pass the function itself, not its result." if isinstance(func, Tensor | int | float | complex) else ""
    raise CallTypeError(f"{transform}({shown(func)}, ...)", what(func), "a function as the first argument", cure)


def check_flag(call: Call | str, name: str, value: Any) -> None:
    """A flag is a bool; 0, 1 and None stand for one."""
    if not isinstance(value, bool | int | None) or value not in (0, 1, None):
        raise CallTypeError(call, f"{what(value)} as {name}", "True or False")


def check_chunk_size(call: Call, chunk_size: Any) -> None:
    if chunk_size is not None and not (
        isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size > 0
    ):
        raise CallValueError(call, f"chunk_size={shown(chunk_size)}", "a positive int or None")


def check_randomness(call: Call, randomness: Any) -> None:
    if not (isinstance(randomness, str) and randomness in ("error", "different", "same")):
        raise CallValueError(call, f"randomness={shown(randomness)}", "'error', 'different' or 'same'")


def check_kind(call: Call | str, name: str, value: Any, kind: Any, expected: str, cure: str = "") -> None:
    """``value``, the argument ``name``, is of ``kind``, which ``expected`` says in words."""
    if not isinstance(value, kind):
        raise CallTypeError(call, f"{what(value)} as {name}", expected, cure)


def check_dense(call: Call | str, name: str, value: Any, expected: str = "a tensor", *, kinds: str = "bifc") -> None:
    """``value``, the argument ``name``, is a strided tensor of numbers that PyTorch computes with.

    ``kinds`` names those: b truth values, i integers, f floating-point, c complex.
    """
    if isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided and not value.is_quantized:
        dtype = value.dtype
        kind = "f" if dtype.is_floating_point else "c" if dtype.is_complex else "b" if dtype is torch.bool else "i"
        if kind in kinds and not (kind == "f" and dtype.itemsize == 1):
            return
    raise CallTypeError(call, f"{what(value)} as {name}", expected)


def check_interpreter(call: Call, cls: Any, base: type[Interpreter]) -> None:
    """``interpreter``, which the call shows from here on, is a class derived from ``base``."""
    if isinstance(call.arguments, dict):
        call.arguments["interpreter"] = cls
    else:
        call.arguments += f", interpreter={shown(cls)}"
    if isinstance(cls, type) and issubclass(cls, base):
        return
    cure = "Pass the class, of which each call makes one." if isinstance(cls, base) else ""
    if isinstance(cls, type) and issubclass(cls, Interpreter):
        runs = f"It is run by functrans.extend.transform({cls.__name__}, func)."
        cure = runs if hasattr(cls, "enter") else f"Derive it from {base.__name__}."
    raise CallTypeError(call, f"{what(cls)} as interpreter", f"a subclass of {base.__name__}", cure)


def call_function(call: Call | str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the user's function.

    What it raises passes; a call that does not fit its signature is told apart from that.
    """
    try:
        return func(*args, **kwargs)
    except TypeError as error:
        entered = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        if not entered:
            check_signature(call, func, args, kwargs)
        raise


def check_signature(call: Call | str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):  # a builtin without one
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        signature = inspect.Signature(parameters)
        given = [f"{len(args)} positional argument{'s' * (len(args) != 1)}", *(f"{name}=" for name in kwargs)]
        name = callable_name(func)
        raise CallTypeError(
            call,
            " and ".join([given[0], ", ".join(given[1:])] if kwargs else given),
            f"what {name}{signature} takes ({error})",
        ) from None
