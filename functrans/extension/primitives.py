"""Operations of one's own that visit every level of the stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable, check_flag, check_kind
from functrans.api.compiled import CALLED
from functrans.boundary.calls import lift
from functrans.core.dispatch import scan
from functrans.core.interpreter import Interpreter
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.errors import CallTypeError, DeadWrapperError, DuplicateRuleError, MissingRuleError
from functrans.errors.wording import what
from functrans.extension.calls import check_running
from functrans.extension.primitive_batching import PrimitiveBatching
from functrans.extension.primitive_derivatives import Modes, PrimitiveDerivative
from functrans.extension.table_interpreter import TableInterpreter
from functrans.interpreters.branch import BranchInterpreter
from functrans.interpreters.failures import note_rule
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.linearize import LinearizeInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.operators.info import DIFFERENTIABLE
from functrans.operators.rules import caller_place
from functrans.pytorch.thread_state import STATE, in_modes, lowered, running_at
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
    carries something there is an error. (A rule is made of a derivative by ``derivative``, of a batching rule by
    ``batching``; ``by_base`` is the rule that says: as the operators that it is made of.) Where no level answers,
    ``base`` is called where the primitive was, as any function.

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
        #: what to do where a level has no rule; empty: register one
        self.cure = ""

    def __repr__(self) -> str:
        return f"<Primitive {self.name}, rules for {', '.join(cls.__name__ for cls in self.rules) or 'no level'}>"

    def __str__(self) -> str:
        return self.name

    def rule(self, *classes: type[Interpreter]) -> Callable[[Rule], Rule]:
        """Decorator: what the function below it says is the answer at levels of these classes.

        Raises:
            CallTypeError: one of them is no class of interpreters, or what it decorates no function.
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
            check_callable(f"{self.name}.rule", rule)
            for cls in classes:
                self.rules[cls] = rule, place
            return rule

        return decorate

    def by_base(self, level: Interpreter, *args: Any, **kwargs: Any) -> Any:
        """A rule for levels that have operators of their own: ``base`` is run there, and its operators are seen.

        Levels below see these operators then, and not the primitive.

        Example:
            >>> import torch
            >>> from functrans import vmap
            >>> from functrans.extend import Primitive, VmapInterpreter
            >>> centered = Primitive("centered", lambda x: x - x.mean())
            >>> _ = centered.rule(VmapInterpreter)(centered.by_base)
            >>> vmap(centered)(torch.tensor([[1.0, 3.0], [5.0, 6.0]]))
            tensor([[-1.0000,  1.0000],
                    [-0.5000,  0.5000]])
        """
        with running_at(level):
            return call_function(f"{self.name}(...)", self.base, args, kwargs)

    def batching(self, rule: Rule) -> Rule:
        """Decorator: the rule for vmap, in the form that ``batching_rule`` has.

        It is called as ``rule(info, in_dims, *args, **kwargs)``, where ``in_dims`` has for each positional argument the
        batch dimension of its physical value, or None (of a pytree a tree of these), and returns ``(out, out_dims)``.
        It is for calls with a batched tensor in the positional arguments. The primitive, called in it, goes on to the
        levels below.

        Example:
            >>> import torch
            >>> from functrans import grad, vmap
            >>> from functrans.extend import Primitive
            >>> twice = Primitive("twice", lambda x: 2 * x)
            >>> twice.derivative(pullback=lambda grad, result, x: twice(grad))
            >>> @twice.batching
            ... def of_batch(info, in_dims, x):
            ...     return twice(x), in_dims[0]
            >>> vmap(grad(twice))(torch.ones(3))
            tensor([2., 2., 2.])
        """
        check_callable(f"{self.name}.batching", rule)
        place = caller_place()
        self.check_new(VmapInterpreter, place)
        self.rules[VmapInterpreter] = PrimitiveBatching(self, rule, place), place
        return rule

    def derivative(
        self,
        *,
        pullback: Callable[..., Any] | None = None,
        tangent: Callable[..., Any] | None = None,
        linear: bool = False,
    ) -> None:
        """Say how levels of grad and jvp differentiate the primitive by the tensors in its positional arguments.

        Arguments may be pytrees, whose tangents and cotangents are trees of the same structure. Both functions run one
        level down, with the values of that level, and are differentiated by the levels below. What an argument holds
        that is no pytree (a closure's variables, say) is a constant; a result that depends on such a variable of the
        level, or on one that is given by keyword, is an error. Transforms that follow from derivatives (``jet``,
        ``laplacian``, tables with ``default="jvp"``) go by ``tangent`` too. (One with ``default="loop"`` needs no
        rule.)

        Args:
            pullback: called as ``pullback(grad, result, *args, **kwargs)``; returns a tuple with a cotangent for each
                positional argument (None where there is none), or one for the first, which is no tuple or list: of the
                argument's shape, or of one that it broadcasts to, over which it is summed. ``grad`` is the cotangent of
                the result, in its structure (None where none arrived).
            tangent: called as ``tangent(tangents, result, *args, **kwargs)``, with a tangent for each positional
                argument (None where there is none); returns that of the result, in its structure (None where it is
                zero).
            linear: the primitive is linear in these arguments, so that ``linear_transpose`` goes through it by its
                pullback. It refuses others.

        Raises:
            CallTypeError: one of them is no function, or both are missing.
            RuleResultError: (where it is used) one of them returned something else.

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
        call = f"{self.name}.derivative(pullback=..., tangent=...)"
        if pullback is None and tangent is None:
            raise CallTypeError(call, "neither", "one of them at least")
        for function in (pullback, tangent):
            if function is not None and not callable(function):
                raise CallTypeError(call, what(function), "functions")
        check_flag(call, "linear", linear)
        place = caller_place()
        rules = PrimitiveDerivative(self, pullback, tangent, linear, place)
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
        if is_dynamo_compiling():
            return CALLED(self, args, kwargs)
        top = STATE.top
        scan(tree_flatten((args, kwargs))[0])  # brings views up to date
        out = self.ask(top, args, kwargs)
        return out if top is None else tree_map(lambda x: at_top(x, top), out)

    def below(self, level: Interpreter, *args: Any, **kwargs: Any) -> Any:
        """The answer of the levels below ``level``, on values of these levels."""
        check_running(f"{self.name}.below(level, ...)", level)
        return self.ask(level.below, args, kwargs)

    def ask(self, top: Interpreter | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, level = (args, kwargs), top
        modes = Modes(torch.is_grad_enabled(), is_forward_enabled())
        while level is not None:
            rule = self.rule_of(level)
            if rule is not None:
                out = self.answer(level, rule, modes, args, kwargs)
                if out is not NotImplemented:
                    return out
            args, kwargs = self.values_below(level, (args, kwargs))
            modes = modes.below(level)
            level = level.below
        with running_at(top):
            return call_function(f"{self.name}(...)", self.base, *given)

    def answer(self, level: Interpreter, rule: Callable[..., Any], modes: Modes, args: Any, kwargs: Any) -> Any:
        """What ``rule`` says at ``level``, where these modes were on."""
        at_level = rule == self.by_base
        if isinstance(getattr(rule, "__self__", None), PrimitiveDerivative):
            rule = functools.partial(rule, modes)
        if STATE.observer is not None:
            rule = STATE.observer.asked(self.name, rule)
        try:
            if at_level:
                with running_at(level), in_modes(*modes):
                    return rule(level, *args, **kwargs)
            with lowered(level):
                return rule(level, *args, **kwargs)
        except Exception as error:
            note_rule(error, f"the rule for {self.name}", level)
            raise

    def rule_of(self, level: Interpreter) -> Callable[..., Any] | None:
        for cls in type(level).__mro__:
            if cls in self.rules:
                return self.rules[cls][0]
        if isinstance(level, TableInterpreter) and (level.loops or (level.derives and JvpInterpreter in self.rules)):
            return self.by_policy
        return None

    def by_policy(self, level: TableInterpreter, *args: Any, **kwargs: Any) -> Any:
        """The rule of a transform by a table whose policy has a meaning for any function, or any with a derivative."""
        moving = [x for x in tree_flatten((args, kwargs))[0] if level.owns(x) and not level.is_constant(x)]
        if not moving or (level.derives and not any(x.dtype in DIFFERENTIABLE for x in moving)):
            return NotImplemented
        args, kwargs = tree_map(lambda x: level.own(x) if isinstance(x, Tensor) else x, (list(args), kwargs))
        return level.without_rule(level, self, args, kwargs)

    def values_below(self, level: Interpreter, args: Any) -> Any:
        """The arguments one level below ``level``, where they must be constants."""
        if isinstance(level, BranchInterpreter):
            args = tree_map(level.enter, args)
        for leaf in tree_flatten(args)[0]:
            if type(leaf) is WrapperTensor and not leaf.interpreter.alive:
                raise DeadWrapperError(leaf)
            if level.owns(leaf) and not level.is_constant(leaf):
                if self.cure:
                    raise MissingRuleError(self.name, level, self.cure)
                levels = ", ".join(f"{i.level} {i.name}" for i in reversed(interpreter_stack()))
                cls = type(level).__name__
                cure = f"Levels: {levels}. Register one: @{self.name}.rule({cls})."
                if level.differentiates:
                    cure += f" That of grad and jvp is made by {self.name}.derivative(...)."
                if isinstance(level, VmapInterpreter):
                    cure += f" That of vmap is made by @{self.name}.batching."
                cure += f" {self.name}.rule({cls})({self.name}.by_base) runs the operators that it is made of there."
                raise MissingRuleError(self.name, level, cure)
        return tree_map(lambda x: x.value if level.owns(x) else x, args)


def at_top(x: Any, top: Interpreter) -> Any:
    """A tensor of a level below as what code at the top makes: its own."""
    if not isinstance(x, Tensor):
        return x
    owner = x.interpreter if type(x) is WrapperTensor else None
    return x if owner is top else lift(x, owner, top)
