"""Formulas whose parameter names are computed: one function serves operators that differ only in their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from functrans.pytorch.torch_private import OpOverload


def with_names(names: Iterable[str], function: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A formula that asks for ``names`` and hands them to ``function`` as one dict."""
    names = tuple(dict.fromkeys(names))

    def formula(*args: Any, **kwargs: Any) -> Any:
        return function(dict(zip(names, args, strict=False), **kwargs))

    formula.__name__ = function.__name__
    return named(names, formula)


def named(names: Iterable[str], formula: Callable[..., Any]) -> Callable[..., Any]:
    """``formula``, whose arguments are ``names`` in this order."""
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    formula.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return formula


def arguments_of(op: OpOverload) -> list[str]:
    """What its schema calls the arguments behind the first."""
    return [a.name for a in op._schema.arguments[1:]]


def no_cotangent() -> None:
    """The formula of an argument that does not matter: only its shape is used, or another argument stands for it."""
