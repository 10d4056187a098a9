"""Levels that give operators no meaning of their own: one that looks on, and one that only answers primitives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrans.core.dispatch import lower, map_tensors
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, wrap
from functrans.decompositions.table import decompose
from functrans.door.autograd_function import FUNCTION_RULES
from functrans.errors import RuleResultError
from functrans.errors.call_sites import definition
from functrans.extension.functions_seen import seen_function
from functrans.extension.rule_results import check_carried, check_replacement, checked_result, kind_of
from functrans.operators.info import op_info
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tree_map

#: what a subclass of PassThrough overrides; the first of them is what messages point at
HOOKS = ("instead", "before", "after", "given")


class PassThrough(Interpreter):
    """A level that sees every operator, and lets it run one level down or answers in its place.

    A subclass sets ``kind`` and overrides ``given``, ``before``, ``instead`` or ``after``. They run one level down,
    with values of that level; what stands around it (an outer grad, vmap, ...) has its say about what they compute.
    Operators on captured tensors and on none are seen as well. (Not seen: views of captured tensors, and writes to
    them, which no level interprets.)

    Example:
        >>> import torch
        >>> from functrans import grad
        >>> from functrans.extend import PassThrough, transform
        >>> class Names(PassThrough):
        ...     kind = "names"
        ...     def before(self, op, args, kwargs):
        ...         print(op)
        >>> transform(Names, torch.dot)(torch.ones(2), torch.ones(2))
        aten.dot.default
        tensor(2.)
    """

    kind = "pass through"
    sees_everything = True
    #: Whether composite operators are seen as the operators that they are made of.
    pieces: bool = False

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        #: by id of a tensor among the arguments: what it is inside, and the tensor
        self.entered: dict[int, tuple[WrapperTensor, Tensor]] = {}

    def given(self, op: OpOverload, value: Tensor, own: bool) -> Tensor:
        """What ``op`` gets for a tensor among its arguments: the same. ``own``: it is not captured from below."""
        return value

    def before(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``op`` is about to run."""

    def instead(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``op`` is to return without being run; NotImplemented: it runs. (Then ``after`` is not asked.)

        As many outputs as the operator has, of their shapes: values of the level below, as the arguments are.
        """
        return NotImplemented

    def after(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """``op`` has run, and returned ``out``. What this returns takes its place, unless it is None.

        Of the shapes that ``out`` has.
        """

    def enter(self, leaf: Any) -> Any:
        """What the function gets for a leaf of its arguments: a tensor as one of this level."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.entered:
            self.entered[id(leaf)] = self.constant(leaf), leaf
        return self.entered[id(leaf)][0]

    def returned(self) -> None:
        self.entered.clear()  # wrappers hold their interpreter, and it itself: cycles, which hold the arguments
        self.watcher = None

    def leave(self, leaf: Any) -> Any:
        """What the caller gets for a leaf of the result: a tensor's value one level down."""
        if not self.owns(leaf):
            return leaf
        if leaf.view_link is not None:
            leaf.view_link.refresh(leaf)
        return leaf.value

    def rule_place(self, op: Any) -> str | None:
        names = [n for n in HOOKS if getattr(type(self), n) is not getattr(PassThrough, n)]
        return definition(getattr(type(self), names[0])) if names else None

    def constant(self, value: Tensor) -> WrapperTensor:
        return wrap(self, value)

    def is_constant(self, wrapper: WrapperTensor) -> bool:
        return True

    def process(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.pieces and op_info(op).composite:
            return decompose(self, op, args, kwargs)

        def value(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            own = self.owns(a)
            below = a.value if own else a  # type: ignore[attr-defined]
            found = self.given(op, below, own)
            if found is not below:
                self.check_given(op, found)
            return found

        with lowered(self):
            values, below_kwargs = tuple(tree_map(value, list(args))), tree_map(value, kwargs)
            self.before(op, values, below_kwargs)
            answer = self.instead(op, values, below_kwargs)
        if answer is not NotImplemented:
            check_carried(self, "the result", answer)
            return checked_result(self, op, map_tensors(self.constant, answer), values, below_kwargs)
        out = lower(self, op, values, below_kwargs)
        with lowered(self):
            other = self.after(op, values, below_kwargs, out)
        if other is not None and other is not out:
            check_replacement(self, op, definition(type(self).after) or "an unknown place", out, other)
            out = other
        return map_tensors(self.constant, out)

    def check_given(self, op: OpOverload, found: Any) -> None:
        if not isinstance(found, Tensor):
            place = definition(type(self).given) or "an unknown place"
            cure = "Return the value itself where it is to stay as it is."
            raise RuleResultError(op, self, place, kind_of(found), "a tensor to run it with", cure)
        check_carried(self, "what given returned", found)


FUNCTION_RULES[PassThrough] = seen_function


class Handler(Interpreter):
    """A level without wrappers: operators pass it by, and cost what they cost without it.

    It is there for each ``Primitive`` whose rules find it on the stack (an effect handler, a named scope, an
    environment).

    Example:
        >>> import torch
        >>> from functrans import grad
        >>> from functrans.extend import Handler, Primitive, transform
        >>> temperature = Primitive("temperature", lambda: 1.0)
        >>> class Heated(Handler):
        ...     kind = "heated"
        >>> @temperature.rule(Heated)
        ... def hotter(level):
        ...     return 2 * temperature.below(level)
        >>> f = lambda x: x**2 * temperature()
        >>> grad(f)(torch.tensor(3.0)), transform(Heated, grad(f))(torch.tensor(3.0))
        (tensor(6.), tensor(12.))
    """

    kind = "handler"
    transparent = True  # code at its level has the wrappers of the level below

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        #: whether what the level above lowers may run at the base at once; a ``process`` wants to see what is random
        self.passed_by = self.on_base and type(self).process is Handler.process

    def enter(self, leaf: Any) -> Any:
        """What the function gets for a leaf of its arguments: the same."""
        return leaf

    def leave(self, leaf: Any) -> Any:
        """What the caller gets for a leaf of the result: the same."""
        return leaf

    def constant(self, value: Tensor) -> Any:
        return value

    def process(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return lower(self, op, args, kwargs)  # only what is random comes here
