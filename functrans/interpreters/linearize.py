"""Writing down what is computed of tangents, so that it can be run again for others.

``linearize`` runs its function at a jvp level above one of these. What the jvp level computes of primals alone runs one
level down and is over; what it computes of tangents arrives here, and is recorded. The jvp of a function at a point is
linear, so that is all that a call with other tangents has to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.core.dispatch import lower, map_tensors, unwrap
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, carried_as, wrap
from functrans.derivatives.constants import ABOUT_METADATA
from functrans.errors import InsideTransformError
from functrans.functionalization.history import with_history_of
from functrans.interpreters.function_context import unwrapped, without
from functrans.interpreters.grad.nodes import snapshot
from functrans.operators.info import OpInfo, op_info
from functrans.pytorch.thread_state import in_modes, lowered
from functrans.pytorch.torch_private import OpOverload, is_forward_enabled
from functrans.tensors.pytrees import tensors_in


class Variable(NamedTuple):
    """A recorded value among a step's arguments."""

    number: int


@dataclass(frozen=True)
class Step:
    """A recorded operator; ``args`` and ``kwargs`` hold variables, and what does not depend on the tangents."""

    op: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    #: the variables of its outputs, None where one is no tensor
    outs: list[int]
    #: whether it was run under no_grad, which keeps a derivative around the call from following it
    cut: bool

    def run(self, values: dict[int, Tensor]) -> None:
        """Run it again, on ``values`` by variable, and add its outputs to them."""
        args, kwargs = in_place_of_variables(self.args, values), in_place_of_variables(self.kwargs, values)
        if self.cut:
            with in_modes(False, is_forward_enabled()):
                out = self.op(*args, **kwargs)
        else:
            out = self.op(*args, **kwargs)
        values.update(zip(self.outs, tensors_in([out]), strict=True))


def in_place_of_variables(x: Any, values: dict[int, Tensor]) -> Any:
    if type(x) is Variable:
        return values[x.number]
    if type(x) is dict:
        return {k: in_place_of_variables(v, values) for k, v in x.items()}
    return [in_place_of_variables(v, values) for v in x] if type(x) in (list, tuple) else x


def variables_in(x: Any) -> list[int]:
    if type(x) is Variable:
        return [x.number]
    if type(x) is dict:
        x = x.values()
    elif type(x) not in (list, tuple):
        return []
    return [n for v in x for n in variables_in(v)]


class LinearizeInterpreter(Interpreter):
    """Records every operator on a wrapper that has a *variable*, the number by which later steps refer to it."""

    kind = "linearize"
    payload = ("variable",)
    differentiates = True

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.steps: list[Step] = []
        self.variables = 0
        #: of the write that goes on: whether it is recorded, and whether it goes through ``detach()``
        self.writing = True, False

    def track(self, value: Tensor) -> WrapperTensor:
        wrapper = wrap(self, value)
        self.variables += 1
        wrapper.variable = self.variables
        return wrapper

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        self.writing = recording, everywhere
        return False  # what is written are numbers, which others will take the place of

    def merge_payload(
        self, merged: WrapperTensor, old: WrapperTensor, merge: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """A step that gives new numbers the history of the old ones, for derivatives around the call."""
        recording, everywhere = self.writing
        variables = [old.variable, merged.variable]
        if (recording and not everywhere) or variables == [None, None]:
            return
        given = [as_variables(x.value, variable) for x, variable in zip((old, merged), variables, strict=True)]
        self.variables += 1
        merged.variable = self.variables
        keep = partial(with_history_of, everywhere=everywhere)
        self.steps.append(Step(keep, given, {}, [self.variables], not recording))

    def describe(self, wrapper: WrapperTensor) -> str:
        return "constant" if wrapper.variable is None else f"variable={wrapper.variable}"

    def details(self) -> list[str]:
        return [f"{len(self.steps)} steps"]

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known: OpInfo = op_info(op)
        values, below_kwargs, variables = unwrap(self, op, args, kwargs)
        if not variables:
            return map_tensors(self.constant, lower(self, op, values, below_kwargs))
        if known.random:
            what = f"drawing random numbers by a tangent ({op})"
            raise InsideTransformError(what, self.name, "a number drawn by the shape of the primal")
        out = lower(self, op, values, below_kwargs)
        if op._schema.name in ABOUT_METADATA:
            return out
        if not isinstance(out, Tensor | list | tuple):
            what = f"reading numbers of a tangent ({op})"
            raise InsideTransformError(what, self.name, "a derivative that is linear in the tangent")
        wrapped = map_tensors(self.track, out)
        names = known.arguments
        given = [as_variables(v, variables.get(i)) for i, v in enumerate(values)]
        given_kwargs = {name: as_variables(v, variables.get(names.index(name))) for name, v in below_kwargs.items()}
        outs = [w.variable for w in tensors_in([wrapped])]  # type: ignore[attr-defined]
        self.steps.append(Step(op, given, given_kwargs, outs, not torch.is_grad_enabled()))
        return wrapped

    def before_write(self, target: Tensor) -> None:
        for i, step in enumerate(self.steps):
            kwargs = {name: snapshot(v, target) for name, v in step.kwargs.items()}
            self.steps[i] = replace(step, args=snapshot(step.args, target), kwargs=kwargs)

    def steps_to(self, outputs: list[int]) -> list[Step]:
        """The steps that these variables depend on."""
        needed, found = set(outputs), []
        for step in reversed(self.steps):
            if not needed.isdisjoint(step.outs):
                needed.update(variables_in(step.args), variables_in(step.kwargs))
                found.append(step)
        return found[::-1]


carried_as("variable")


def as_variables(value: Any, variables: Any) -> Any:
    """An argument with variables in place of what was recorded."""
    if variables is None:
        return value
    if type(variables) is list:
        return [as_variables(v, n) for v, n in zip(value, variables, strict=True)]
    return Variable(variables)


def record_function(interpreter: LinearizeInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    """An ``autograd.Function`` applied to tangents, by another's ``jvp``: a step as any other."""
    mine, values = unwrapped(interpreter, args)
    with without(interpreter, cls), lowered(interpreter):
        out = cls.apply(*values)
    variables = [a.variable if m else None for a, m in zip(args, mine, strict=True)]
    if all(variable is None for variable in variables):
        return map_tensors(interpreter.constant, out)
    wrapped = map_tensors(interpreter.track, out)
    given = [as_variables(v, n) for v, n in zip(values, variables, strict=True)]
    outs = [w.variable for w in tensors_in([wrapped])]  # type: ignore[attr-defined]
    interpreter.steps.append(Step(cls.apply, given, {}, outs, not torch.is_grad_enabled()))
    return wrapped
