"""Operations of one's own that visit every level of the stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from functrans.api.checks import call_function, check_callable, check_kind
from functrans.core.dispatch import lift, scan
from functrans.core.interpreter import Interpreter
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.errors import CallTypeError, DeadWrapperError, DuplicateRuleError, MissingRuleError
from functrans.errors.wording import what
from functrans.extension.calls import check_running
from functrans.extension.primitive_derivatives import Modes, PrimitiveDerivative
from functrans.interpreters.failures import note_rule
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.linearize import LinearizeInterpreter
from functrans.operators.rules import caller_place
from functrans.pytorch.thread_state import STATE, lowered, running_at
from functrans.pytorch.torch_private import is_forward_enabled
from functrans.tensors.pytrees import tree_flatten, tree_map

Rule = TypeVar("Rule", bound=Callable[..., Any])


class Primitive:
    """An operation that visits every level from the top, whatever its arguments are, until one has an answer.

    Operators go to the levels that their tensors belong to. A primitive asks all of them, and takes and returns any
    Python values: a distribution, a name, a closure, nothing at all.

    A level answers by a rule for its interpreter's class (or a class that this is derived from), called as
    ``rule(level, *args, **kwargs)``, which runs one level down. It is asked whether the arguments are of the level
    (``level.owns(x)``) or not. It may return ``NotImplemented`` (not for me: the
    primitive goes on below), call ``primitive.below(level, *args, **kwargs)`` itself, or return the result: tensors of
    its own level or of levels below.

    At a level without a rule the arguments must not depend on it: a tensor that is tracked, batched or otherwise
    carries something there is an error. Where no level answers, ``base`` is called.

    Args:
        name: what messages call it.
        base: a function of the same arguments.

    Raises:
        MissingRuleError: an argument carries something at a level that has no rule.

    Example:
        >>> import torch
        >>> from functrans import vmap
        >>> from functrans.extend import Primitive, VmapInterpreter
        >>> batch_sizes = Primitive("batch_sizes", lambda: ())
        >>> @batch_sizes.rule(VmapInterpreter)
        ... def of_vmap(level):
        ...     return (*batch_sizes.below(level), level.batch_size)
        >>> seen = []
        >>> _ = vmap(vmap(lambda x: (seen.append(batch_sizes()), x)[1]))(torch.zeros(2, 3))
        >>> batch_sizes(), seen
        ((), [(2, 3)])
    """

    def __init__(self, name: str, base: Callable[..., Any]) -> None:
        call = "Primitive(name, base)"
        check_kind(call, "name", name, str, "a string")
        check_callable("Primitive", base)
        self.name = self.__name__ = name
        self.base = base
        self.rules: dict[type[Interpreter], tuple[Callable[..., Any], str]] = {}

    def __repr__(self) -> str:
        return f"<Primitive {self.name}, rules for {', '.join(cls.__name__ for cls in self.rules) or 'no level'}>"

    def __str__(self) -> str:
        return self.name

    def rule(self, *classes: type[Interpreter]) -> Callable[[Rule], Rule]:
        """Decorator: what the function below it says is the answer at levels of these classes.

        Raises:
            CallTypeError: one of them is no class of interpreters.
            DuplicateRuleError: one of them has a rule already, from another place.
        """
        place = caller_place()
        for cls in classes:
            if not (isinstance(cls, type) and issubclass(cls, Interpreter)):
                raise CallTypeError(f"{self.name}.rule(*classes)", what(cls), "classes of interpreters")
            self.check_new(cls, place)
        if not classes:
            raise CallTypeError(f"{self.name}.rule(*classes)", "no class", "at least one class of interpreters")

        def decorate(rule: Rule) -> Rule:
            for cls in classes:
                self.rules[cls] = rule, place
            return rule

        return decorate

    def derivative(
        self, *, pullback: Callable[..., Any] | None = None, tangent: Callable[..., Any] | None = None
    ) -> None:
        """Say how levels of grad and jvp differentiate the primitive by its positional arguments that are tensors.

        Both functions run one level down, with the values of that level, and are differentiated by the levels below.
        What they return is not checked further than by what it meets.

        Args:
            pullback: called as ``pullback(grad, result, *args, **kwargs)``; returns a cotangent for each positional
                argument (None where there is none), or one for the first. ``grad`` is the cotangent of the result, or a
                list of them if that is a tuple.
            tangent: called as ``tangent(tangents, result, *args, **kwargs)``, with a tangent for each positional
                argument (None where there is none); returns the tangent of the result, or one for each.

        Example:
            >>> import torch
            >>> from functrans import grad, jvp
            >>> from functrans.extend import Primitive
            >>> scaled = Primitive("scaled", lambda x, by: x * by)
            >>> scaled.derivative(
            ...     pullback=lambda grad, result, x, by: scaled(grad, by),
            ...     tangent=lambda tangents, result, x, by: scaled(tangents[0], by),
            ... )
            >>> f = lambda x: scaled(x, 3.0) ** 2
            >>> grad(f)(torch.tensor(1.0)), grad(grad(f))(torch.tensor(1.0))
            (tensor(18.), tensor(18.))
            >>> jvp(f, (torch.tensor(1.0),), (torch.tensor(1.0),))
            (tensor(9.), tensor(18.))
        """
        rules = PrimitiveDerivative(self, pullback, tangent)
        place = caller_place()
        by_class: dict[type[Interpreter], Callable[..., Any]] = {
            GradInterpreter: rules.at_grad, JvpInterpreter: rules.at_jvp, LinearizeInterpreter: rules.at_linearize,
        }  # fmt: skip
        for cls, rule in by_class.items():
            self.check_new(cls, place)
            self.rules[cls] = rule, place

    def check_new(self, cls: type[Interpreter], place: str) -> None:
        if cls in self.rules and self.rules[cls][1] != place:
            raise DuplicateRuleError(f"rules of {self.name}", cls.__name__, self.rules[cls][1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        top = STATE.top
        scan(tree_flatten((args, kwargs))[0])  # brings views up to date
        out = self.ask(top, args, kwargs)
        return out if top is None else tree_map(lambda x: at_top(x, top), out)

    def below(self, level: Interpreter, *args: Any, **kwargs: Any) -> Any:
        """The answer of the levels below ``level``, on values of these levels."""
        check_running(f"{self.name}.below(level, ...)", level)
        return self.ask(level.below, args, kwargs)

    def ask(self, level: Interpreter | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        modes = Modes(torch.is_grad_enabled(), is_forward_enabled())
        while level is not None:
            rule = self.rule_of(level)
            if rule is not None:
                if isinstance(getattr(rule, "__self__", None), PrimitiveDerivative):
                    rule = functools.partial(rule, modes)
                if STATE.observer is not None:
                    rule = STATE.observer.asked(self.name, rule)
                try:
                    with lowered(level):
                        out = rule(level, *args, **kwargs)
                except Exception as error:
                    note_rule(error, f"the rule for {self.name}", level)
                    raise
                if out is not NotImplemented:
                    return out
            args, kwargs = self.values_below(level, (args, kwargs))
            modes = modes.below(level)
            level = level.below
        with running_at(None):
            return call_function(f"{self.name}(...)", self.base, args, kwargs)

    def rule_of(self, level: Interpreter) -> Callable[..., Any] | None:
        for cls in type(level).__mro__:
            if cls in self.rules:
                return self.rules[cls][0]
        return None

    def values_below(self, level: Interpreter, args: Any) -> Any:
        """The arguments one level below ``level``, where they must be constants."""
        for leaf in tree_flatten(args)[0]:
            if type(leaf) is WrapperTensor and not leaf.interpreter.alive:
                raise DeadWrapperError(leaf)
            if level.owns(leaf) and not level.is_constant(leaf):
                levels = ", ".join(f"{i.level} {i.name}" for i in reversed(interpreter_stack()))
                cure = f"Levels: {levels}. Register one: @{self.name}.rule({type(level).__name__})."
                if level.differentiates:
                    cure += f" That of grad and jvp is made by {self.name}.derivative(...)."
                raise MissingRuleError(self.name, level, cure)
        return tree_map(lambda x: x.value if level.owns(x) else x, args)


def at_top(x: Any, top: Interpreter) -> Any:
    """A tensor of a level below as what code at the top makes: its own."""
    if not isinstance(x, Tensor):
        return x
    owner = x.interpreter if type(x) is WrapperTensor else None
    return x if owner is top else lift(x, owner, top)
