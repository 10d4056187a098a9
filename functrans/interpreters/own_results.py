"""What a user's own grad, vmap or jvp makes of an operator, looked at where it happens.

A tangent or a cotangent of another shape would be broadcast further on, and be a wrong number at the end. The library's
own methods are not looked at, which would cost time with every operator; a class of the user's is that has a
``process`` of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functrans.errors import RuleResultError
from functrans.errors.call_sites import definition, is_users
from functrans.interpreters.fitting import Spec, expect_tangent, fitted
from functrans.interpreters.grad.nodes import BackwardNode
from functrans.tensors.pytrees import tensors_in

if TYPE_CHECKING:
    from functrans.core.interpreter import Interpreter

Process = Callable[[Any, Any, Any, Any], Any]


def looked_at(cls: type[Interpreter], look: Callable[[Process], Process]) -> None:
    """Put ``look(process)`` in the place of the ``process`` that ``cls`` has, if the user wrote it."""
    own = vars(cls).get("process")
    if own is not None and is_users(own.__code__.co_filename):
        cls.process = functools.wraps(own)(look(own))  # type: ignore[method-assign, assignment]


def refusal(interpreter: Interpreter, op: Any, place: str | None, what: str) -> Callable[[str, str], RuleResultError]:
    return lambda got, expected: RuleResultError(op, interpreter, place, f"{got} as {what}", expected, "")


def fitting_tangents(process: Process) -> Process:
    def with_fitting_tangents(self: Any, op: Any, args: Any, kwargs: Any) -> Any:
        out = process(self, op, args, kwargs)
        for x in tensors_in([out]):
            if self.owns(x) and x.tangent is not None:  # type: ignore[attr-defined]
                refuse = refusal(self, op, definition(process), "tangent")
                expect_tangent(x.tangent, (x.value.shape, x.value.dtype), refuse)  # type: ignore[attr-defined]
        return out

    return with_fitting_tangents


def fitting_batches(process: Process) -> Process:
    def with_fitting_batches(self: Any, op: Any, args: Any, kwargs: Any) -> Any:
        out = process(self, op, args, kwargs)
        for x in tensors_in([out]):
            batched: Any = x if self.owns(x) and x.bdim is not None else None  # type: ignore[attr-defined]
            if batched is not None and batched.value.shape[batched.bdim] != self.batch_size:
                refuse = refusal(self, op, definition(process), "a physical value")
                got = f"shape {tuple(batched.value.shape)} with bdim {batched.bdim}"
                raise refuse(got, f"the size of the batch, {self.batch_size}, there")
        return out

    return with_fitting_batches


def fitting_cotangents(process: Process) -> Process:
    def with_fitting_cotangents(self: Any, op: Any, args: Any, kwargs: Any) -> Any:
        before = len(self.tape)
        out = process(self, op, args, kwargs)
        specs = {
            x.tape_index: (x.value.shape, x.value.dtype)  # type: ignore[attr-defined]
            for x in tensors_in([*args, *kwargs.values()])
            if self.owns(x)
        }
        for i in range(before, len(self.tape)):
            node, outs, ins, saved = self.tape[i]
            if isinstance(node, BackwardNode) and is_users(type(node).pull.__code__.co_filename):
                refuse = refusal(self, op, definition(type(node).pull), "what pull returned")
                self.tape[i] = (FittedNode(node, specs_of(ins, specs), refuse), outs, ins, saved)
        return out

    return with_fitting_cotangents


def specs_of(ins: Any, specs: dict[int, Spec]) -> Any:
    return [specs_of(i, specs) if isinstance(i, list | tuple) else specs.get(i) for i in ins]


class FittedNode(BackwardNode):
    """A user's node; what it returns is looked at."""

    def __init__(self, node: BackwardNode, specs: Any, refuse: Callable[[str, str], Exception]) -> None:
        self.node, self.op = node, node.op
        self.specs = specs
        self.refuse = refuse

    def rule_place(self, saved: Any) -> str | None:
        return self.node.rule_place(saved)

    def operator(self, saved: Any) -> Any:
        return self.node.operator(saved)

    def __repr__(self) -> str:
        return repr(self.node)

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        return self.fit(self.node.pull(saved, grad), self.specs)

    def fit(self, found: Any, specs: Any) -> Any:
        if not isinstance(found, list | tuple) or len(found) != len(specs):
            got = f"{len(found)} cotangents" if isinstance(found, list | tuple) else f"a {type(found).__name__}"
            raise self.refuse(got, f"a list of {len(specs)}, one for each of ins, or None in its place")
        return [
            c if c is None or s is None else self.fit(c, s) if isinstance(s, list) else fitted(c, s, self.refuse)
            for c, s in zip(found, specs, strict=True)
        ]

    def protect(self, saved: list[Any], target: Tensor) -> list[Any]:
        return self.node.protect(saved, target)

    def saved_tensors(self, saved: list[Any]) -> list[Tensor]:
        return self.node.saved_tensors(saved)
