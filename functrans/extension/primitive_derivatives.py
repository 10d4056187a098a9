"""The derivative of a ``Primitive``: its rules for the levels of grad, jvp and linearize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from functrans.core.dispatch import map_tensors
from functrans.errors import MissingRuleError
from functrans.errors.call_sites import definition
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import BackwardNode
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.linearize import LinearizeInterpreter, Step, as_variables, tensors_in

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

    def __init__(self, primitive: Primitive, pullback: Callable[..., Any] | None, tangent: Callable[..., Any] | None):
        self.primitive = primitive
        self.pullback = pullback
        self.tangent = tangent

    def refusal(self, level: Interpreter, mode: str) -> MissingRuleError:
        cure = f"Give {self.primitive.name}.derivative(...) a {mode} as well."
        return MissingRuleError(f"{self.primitive.name}, which has no {mode}", level, cure)

    def at_grad(self, modes: Modes, level: GradInterpreter, *args: Any, **kwargs: Any) -> Any:
        """Recorded on the tape."""
        indices = [level.index_of(a) for a in args]
        if all(index is None for index in indices):
            return NotImplemented
        values = values_of(level, args)
        out = self.primitive.below(level, *values, **kwargs)
        if not modes.grad:
            return map_tensors(level.constant, out)
        if self.pullback is None:
            raise self.refusal(level, "pullback")
        wrapped = map_tensors(level.output, out)
        outs = [level.index_of(w) for w in (wrapped if isinstance(wrapped, tuple | list) else [wrapped])]
        node = PrimitiveNode(self, kwargs, [i for i, index in enumerate(indices) if index is not None])
        level.record(node, outs, [index for index in indices if index is not None], [out, *values])
        return wrapped

    def at_jvp(self, modes: Modes, level: JvpInterpreter, *args: Any, **kwargs: Any) -> Any:
        """Pushed forward."""
        tangents = tuple(a.tangent if level.owns(a) else None for a in args)
        if all(t is None for t in tangents):
            return NotImplemented
        values = values_of(level, args)
        out = self.primitive.below(level, *values, **kwargs)
        if not modes.forward:
            return map_tensors(level.constant, out)
        if self.tangent is None:
            raise self.refusal(level, "tangent")
        found = self.tangent(tangents, out, *values, **kwargs)
        if isinstance(out, Tensor):
            return level.dual(out, found)
        return tuple(level.dual(o, t) if isinstance(o, Tensor) else o for o, t in zip(out, found, strict=True))

    def at_linearize(self, modes: Modes, level: LinearizeInterpreter, *args: Any, **kwargs: Any) -> Any:
        """A step of the linear function, where it was applied to a tangent."""
        variables = [a.variable if level.owns(a) else None for a in args]
        if all(variable is None for variable in variables):
            return NotImplemented
        values = values_of(level, args)
        wrapped: Any = map_tensors(level.track, self.primitive.below(level, *values, **kwargs))
        given = [as_variables(v, n) for v, n in zip(values, variables, strict=True)]
        outs = [w.variable for w in tensors_in([wrapped])]  # type: ignore[attr-defined]
        level.steps.append(Step(self.primitive, given, kwargs, outs, not modes.grad))
        return wrapped


class PrimitiveNode(BackwardNode):
    """One call on the tape; saved are its output and its arguments."""

    def __init__(self, derivative: PrimitiveDerivative, kwargs: dict[str, Any], places: list[int]) -> None:
        self.op = derivative.primitive
        self.derivative = derivative
        self.kwargs = kwargs
        self.places = places

    def rule_place(self, saved: Any) -> str | None:
        return definition(self.derivative.pullback)

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        out, *values = saved
        if isinstance(out, Tensor):
            (grad,) = grad
        found = self.derivative.pullback(grad, out, *values, **self.kwargs)  # type: ignore[misc]
        if not isinstance(found, tuple | list):
            found = (found,)
        return [found[i] if i < len(found) else None for i in self.places]


def values_of(level: Interpreter, args: Sequence[Any]) -> list[Any]:
    return [a.value if level.owns(a) else a for a in args]
