"""Arguments that a call leaves out reach rules as the operator's schema has them.

PyTorch does not pass arguments that were left out or that have their default. A rule that has a parameter for such an
argument gets the schema's default, unless the parameter's own default is the same; a rule that takes ``*args`` or
``**kwargs`` gets what came. Which of the two it is is found out when a rule is first used for an operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from functrans.errors import RegistrationError
from functrans.operators.schemas import schema_default
from functrans.pytorch.torch_private import OpOverload

Parameter = inspect.Parameter
BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
BY_NAME = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def completed(rule: Callable[..., Any], op: OpOverload, before: int = 0, listed: bool = False) -> Callable[..., Any]:
    """``rule`` as a function that is called with the arguments that came.

    Args:
        rule: takes ``before`` parameters of its own, then ``op``'s arguments.
        listed: whether the last of the ``before`` is a list with one item for every argument by position, None for what
            was left out.

    Raises:
        RegistrationError: the rule cannot be called with the operator's arguments.
    """
    find = completing if type(rule).__hash__ is not None else completing.__wrapped__
    return find(rule, op, before, listed)


@functools.lru_cache(maxsize=4096)
def completing(rule: Callable[..., Any], op: OpOverload, before: int, listed: bool) -> Callable[..., Any]:
    try:
        parameters = list(inspect.signature(rule).parameters.values())
    except ValueError:  # a function in C that does not say
        return rule
    fit = Fit(rule, op, parameters, before)
    own = [p for p in parameters if p.kind in BY_POSITION][before:]
    positional = [a for a in op._schema.arguments if not a.kwarg_only]
    filled = [
        i + 1
        for i, (p, a) in enumerate(zip(own, positional))
        if a.has_default_value() and not same(p.default, schema_default(a))
    ]
    defaults = [schema_default(a) for a in positional[: max(filled, default=0)]]
    by_name = {p.name: p.default for p in parameters if p.kind in BY_NAME}
    options = {
        a.name: schema_default(a)
        for a in op._schema.arguments
        if a.kwarg_only and a.has_default_value() and a.name in by_name and not same(by_name[a.name], schema_default(a))
    }
    if not defaults and not options and not fit.lacking:
        return rule

    @functools.wraps(rule)
    def complete(*args: Any, **kwargs: Any) -> Any:
        given = len(args) - before
        if fit.lacking:
            fit.check(given, kwargs)
        rest = defaults[given:]
        if rest and listed:
            args = (*args[: before - 1], [*args[before - 1], *[None] * len(rest)], *args[before:])
        return rule(*args, *rest, **{**options, **kwargs})

    return complete


class Fit:
    """How the parameters of a rule fit the arguments of an operator."""

    def __init__(
        self, rule: Callable[..., Any], op: OpOverload, parameters: Sequence[inspect.Parameter], before: int
    ) -> None:
        self.rule, self.op, self.before = rule, op, before
        kinds = {p.kind for p in parameters}
        self.arguments = [a.name for a in op._schema.arguments if not a.kwarg_only]
        options = [a.name for a in op._schema.arguments if a.kwarg_only]
        own = [p for p in parameters if p.kind in BY_POSITION]
        names = {p.name for p in parameters if p.kind in BY_NAME}
        self.lacking: list[str] = []
        if Parameter.VAR_POSITIONAL not in kinds:
            self.lacking += self.arguments[max(len(own) - before, 0) :]
        if Parameter.VAR_KEYWORD not in kinds:
            self.lacking += [name for name in options if name not in names]
        needed = [a.name for a in op._schema.arguments if not a.has_default_value() and a.name in self.lacking]
        if len(own) < before and Parameter.VAR_POSITIONAL not in kinds:
            self.refuse(f"takes {len(own)} arguments by position")
        if needed:
            self.refuse(f"has no parameter for {', '.join(needed)}")
        extra = [
            p.name
            for p in own[before + len(self.arguments) :]
            if p.default is Parameter.empty and p.name not in options
        ]
        extra += [
            p.name
            for p in parameters
            if p.kind is Parameter.KEYWORD_ONLY and p.default is Parameter.empty and p.name not in options
        ]
        if extra:
            self.refuse(f"asks for {', '.join(extra)}, which the operator does not have")

    def check(self, count: int, kwargs: dict[str, Any]) -> None:
        """Refuse a call with an argument that the rule has no parameter for."""
        given = [name for name in (*self.arguments[:count], *kwargs) if name in self.lacking]
        if given:
            self.refuse(f"has no parameter for {', '.join(given)}, which this call gives")

    def refuse(self, what: str) -> None:
        code = getattr(inspect.unwrap(self.rule), "__code__", None)
        place = "" if code is None else f" at {code.co_filename}:{code.co_firstlineno}"
        raise RegistrationError(
            f"The rule {getattr(self.rule, '__name__', self.rule)}{place} {what}. "
            f"Expected: {self.before} parameters of the transform's own, then the arguments of {self.op}. "
            f"Schema: {self.op._schema}"
        )


def same(given: Any, default: Any) -> bool:
    """Whether a parameter's default is the schema's. (PyTorch takes ``(1,)`` for ``[1, 1]``.)"""
    if isinstance(given, list | tuple) and isinstance(default, list | tuple):
        return list(given) * (len(default) if len(given) == 1 else 1) == list(default)
    return isinstance(given, bool) == isinstance(default, bool) and bool(given == default)
