"""The derivative of a ``Primitive``: its rules for the levels of grad, jvp and linearize."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.errors import MissingRuleError, RuleResultError
from functrans.errors.call_sites import definition
from functrans.interpreters.fitting import described, expect_tangent, fitted
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import BackwardNode
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.linearize import LinearizeInterpreter, Step, as_variables
from functrans.interpreters.transpose import TransposeInterpreter
from functrans.operators.info import DIFFERENTIABLE
from functrans.tensors.pytrees import TreeSpec, leaves_like, tree_flatten, tree_map, tree_unflatten

if TYPE_CHECKING:
    from functrans.core.interpreter import Interpreter
    from functrans.extension.primitives import Primitive


class Modes(NamedTuple):
    """Whether derivatives are followed where a primitive was called; the state in which its rules run has other ones,
    those around the level."""

    grad: bool
    forward: bool

    def below(self, level: Interpreter) -> Modes:
        return Modes(self.grad and level.outer_grad_mode, self.forward and level.outer_forward_mode)


class PrimitiveDerivative:
    """What ``Primitive.derivative`` was given, as rules of the levels that differentiate.

    These are called as others are, with the modes in front.
    """

    def __init__(
        self,
        primitive: Primitive,
        pullback: Callable[..., Any] | None,
        tangent: Callable[..., Any] | None,
        linear: bool,
        place: str,
    ) -> None:
        self.primitive = primitive
        self.linear = linear
        self.pullback = pullback
        self.tangent = tangent
        self.place = place

    def refusal(self, level: Interpreter, mode: str) -> MissingRuleError:
        cure = f"Give {self.primitive.name}.derivative(...) a {mode} as well."
        return MissingRuleError(f"{self.primitive.name}, which has no {mode}", level, cure)

    def unfit(self, level: Interpreter, of: str, cure: str) -> Callable[[str, str], RuleResultError]:
        """The error where ``of``, which a function of the author's returned, is something else than expected."""
        op = f"{of} of {self.primitive.name}"
        return lambda got, expected: RuleResultError(op, level, self.place, got, expected, cure)

    def value(self, level: Interpreter, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result, as the levels below have it."""
        out = self.primitive.below(level, *args, **kwargs)
        for x in tree_flatten(out)[0]:
            if type(x) is WrapperTensor and x.interpreter.level >= level.level:
                got = f"one that depends on a tensor of {x.interpreter.name} at level {x.interpreter.level}"
                cure = (
                    "A function or an object among the arguments holds that tensor, and no derivative is taken by what "
                    "is held. Give the tensor as an argument of its own."
                )
                raise self.unfit(level, "the result", cure)(got, f"values of the levels below {level.level}")
        return out

    def at_grad(self, modes: Modes, level: GradInterpreter, *args: Any, **kwargs: Any) -> Any:
        """Recorded on the tape."""
        given, given_spec = tree_flatten(args)
        indices = [level.index_of(a) for a in given]
        if all(index is None for index in indices):
            return NotImplemented
        values, kwargs = values_of(level, given), constants_below(level, kwargs)
        leaves, spec = tree_flatten(self.value(level, tree_unflatten(given_spec, values), kwargs))
        if not modes.grad:
            return tree_unflatten(spec, [level.constant(x) if isinstance(x, Tensor) else x for x in leaves])
        if isinstance(level, TransposeInterpreter) and not self.linear:
            why = "nothing says of a primitive that it is linear, unless derivative(..., linear=True) does"
            tracked = {i: index for i, index in enumerate(indices) if index is not None}
            return level.refuse_later(self.primitive, why, tracked, tree_unflatten(spec, leaves))
        if self.pullback is None:
            raise self.refusal(level, "pullback")
        wrapped = [level.output(x) if isinstance(x, Tensor) else x for x in leaves]
        outs = [level.index_of(w) for w in wrapped]
        places = [i for i, index in enumerate(indices) if index is not None]
        node = PrimitiveNode(self, level, given_spec, spec, kwargs, places)
        level.record(node, outs, [index for index in indices if index is not None], [leaves, *values])
        return tree_unflatten(spec, wrapped)

    def at_jvp(self, modes: Modes, level: JvpInterpreter, *args: Any, **kwargs: Any) -> Any:
        """Pushed forward."""
        tangents = tuple(for_argument(a, lambda x: x.tangent if level.owns(x) else None) for a in args)
        if all(t is None for t in tangents):
            return NotImplemented
        values, kwargs = values_of(level, args), constants_below(level, kwargs)
        out = self.value(level, values, kwargs)
        leaves, spec = tree_flatten(out)
        found: list[Any] = [None] * len(leaves)
        if modes.forward:
            if self.tangent is None:
                raise self.refusal(level, "tangent")
            found = self.tangents_of(level, leaves, spec, self.tangent(tangents, out, *values, **kwargs))
        duals = zip(leaves, found, strict=True)
        return tree_unflatten(spec, [level.dual(x, t) if isinstance(x, Tensor) else x for x, t in duals])

    def tangents_of(self, level: Interpreter, leaves: Sequence[Any], spec: TreeSpec, found: Any) -> list[Any]:
        """What the tangent's function returned, for each leaf of the result."""
        refuse = self.unfit(level, "the tangent", "Return a tangent for the result, in its structure; None is zeros.")
        tangents = [None] * len(leaves) if found is None else matched(spec, found)
        if tangents is None:
            raise refuse(described(found), f"the structure of the result, {tree_unflatten(spec, leaves)!r}")
        for x, t in zip(leaves, tangents, strict=True):
            if isinstance(x, Tensor) and x.dtype in DIFFERENTIABLE:
                expect_tangent(t, (x.shape, x.dtype), refuse)
        return tangents

    def at_linearize(self, modes: Modes, level: LinearizeInterpreter, *args: Any, **kwargs: Any) -> Any:
        """A step of the linear function, where it was applied to a tangent."""
        given, given_spec = tree_flatten(args)
        variables = [a.variable if level.owns(a) else None for a in given]
        if all(variable is None for variable in variables):
            return NotImplemented
        values, kwargs = values_of(level, given), constants_below(level, kwargs)
        leaves, spec = tree_flatten(self.value(level, tree_unflatten(given_spec, values), kwargs))
        wrapped: list[Any] = [level.track(x) if isinstance(x, Tensor) else x for x in leaves]
        along = [as_variables(v, n) for v, n in zip(values, variables, strict=True)]
        outs = [w.variable for w in wrapped if isinstance(w, Tensor)]  # type: ignore[attr-defined]
        level.steps.append(Step(OfLeaves(self.primitive, given_spec), along, kwargs, outs, not modes.grad))
        return tree_unflatten(spec, wrapped)


@dataclass(frozen=True)
class OfLeaves:
    """A primitive as a function from the leaves of its positional arguments to those of its result."""

    primitive: Callable[..., Any]
    spec: TreeSpec

    def __call__(self, *leaves: Any, **kwargs: Any) -> list[Any]:
        return tree_flatten(self.primitive(*tree_unflatten(self.spec, list(leaves)), **kwargs))[0]


class PrimitiveNode(BackwardNode):
    """One call on the tape; saved are the leaves of its result, and those of its arguments."""

    def __init__(
        self,
        derivative: PrimitiveDerivative,
        level: Interpreter,
        given: TreeSpec,
        spec: TreeSpec,
        kwargs: dict[str, Any],
        places: list[int],
    ) -> None:
        self.op = derivative.primitive
        self.derivative = derivative
        #: weakly, since its tape holds this
        self.level: Any = weakref.ref(level)
        self.given = given
        self.spec = spec
        self.kwargs = kwargs
        self.places = places

    def rule_place(self, saved: Any) -> str | None:
        return definition(self.derivative.pullback)

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        leaves, *values = saved
        args = tree_unflatten(self.given, values)
        out = tree_unflatten(self.spec, list(leaves))
        found = self.derivative.pullback(  # type: ignore[misc]
            tree_unflatten(self.spec, list(grad)), out, *args, **self.kwargs
        )
        cure = "Return a cotangent for each positional argument, or one for the first; None where there is none."
        refuse = self.derivative.unfit(self.level(), "the pullback", cure)
        cotangents = list(found) if type(found) in (tuple, list) else [found]
        if len(cotangents) > len(args):
            raise refuse(f"{len(cotangents)} cotangents", f"at most {len(args)}")
        cotangents += [None] * (len(args) - len(cotangents))
        by_leaf: list[Any] = []
        for i, (a, c) in enumerate(zip(args, cotangents, strict=True)):
            of_argument, spec = tree_flatten(a)
            of_cotangent = [None] * len(of_argument) if c is None else matched(spec, c)
            if of_cotangent is None:
                raise refuse(f"{described(c)} for argument {i}", f"the structure of that argument, {a!r}")
            by_leaf += of_cotangent
        return [
            None if by_leaf[i] is None else fitted(by_leaf[i], (values[i].shape, values[i].dtype), refuse)
            for i in self.places
        ]


def matched(spec: TreeSpec, tree: Any) -> list[Any] | None:
    """The leaves of ``tree``, if it has the structure ``spec``; a list does for a tuple."""
    for given in (tree, tuple(tree)) if isinstance(tree, list) else (tree,):
        leaves, own = leaves_like(given, spec)
        if own == spec:
            return leaves
    return None


def for_argument(argument: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of each leaf of an argument, in its structure; None where it is None of all."""
    leaves, spec = tree_flatten(argument)
    found = [function(x) for x in leaves]
    return None if all(x is None for x in found) else tree_unflatten(spec, found)


def values_of(level: Interpreter, args: Sequence[Any]) -> list[Any]:
    """Arguments one level down."""
    return [tree_map(lambda x: x.value if level.owns(x) else x, a) for a in args]


def constants_below(level: Interpreter, tree: Any) -> Any:
    """``tree`` with the values of the constants of ``level`` in their places."""
    return tree_map(lambda x: x.value if level.owns(x) and level.is_constant(x) else x, tree)
