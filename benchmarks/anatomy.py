"""Where the microseconds of one small operator at one level go: each part timed by itself, and what is left over.

    python benchmarks/anatomy.py

The parts are timed by repeating them alone, so they add up to the whole only nearly: the last row of each table is the
difference.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from typing import Any

import torch
from report import Part, Settings, Table, main

import functrans
from functrans.core.dispatch import lower
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor, wrap_like
from functrans.door.torch_function import ENTRANCES
from functrans.programs.operators import operator_program
from functrans.pytorch.thread_state import DOOR, STATE
from functrans.pytorch.torch_private import (
    autocast_enabled,
    function_mode_enabled,
    mode_stack_size,
    pop_mode,
    push_mode,
)

aten = torch.ops.aten


Clock = Callable[[Callable[[], Any]], float]


def clock(number: int) -> Clock:
    """A function that times calls in microseconds, as often as ``number`` says in each of seven repetitions."""

    def microseconds(call: Callable[[], Any]) -> float:
        """The least of the repetitions, without what calling a lambda costs."""
        call()
        empty = min(timeit.repeat(lambda: None, number=number, repeat=7))
        return 1e6 * (min(timeit.repeat(call, number=number, repeat=7)) - empty) / number

    return microseconds


class Bare(torch.Tensor):
    """A wrapper whose function protocol does nothing: what is left is PyTorch's way to it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def checks() -> bool:
    return mode_stack_size() == STATE.door_depth and not autocast_enabled() and not function_mode_enabled()


def modes() -> None:
    pop_mode(None)
    push_mode(DOOR)


def line() -> tuple[Any, int]:
    frame = sys._getframe(1)
    return frame.f_code, frame.f_lasti


Rows = list[tuple[str, float]]


def shared_parts(x: WrapperTensor, microseconds: Clock) -> Rows:
    """What ``torch.sin(x)`` costs at every level alike."""
    value, interpreter = x.value, interpreter_stack()[0]
    bare = torch.Tensor._make_wrapper_subclass(Bare, x.shape, dtype=x.dtype)
    sin = operator_program(aten.sin.default)
    assert sin is not None
    pop_mode(None)  # as while the door handles an operator
    try:
        base = microseconds(lambda: torch.sin(value))
        lowering = microseconds(lambda: lower(interpreter, sin, [value], {})) - base
        wrapper = microseconds(lambda: wrap_like(interpreter, value, x))
    finally:
        push_mode(DOOR)
    return [
        ("PyTorch's way from `torch.sin` to `__torch_function__`", microseconds(lambda: torch.sin(bare))),
        ("look-up of what takes the function's place", microseconds(lambda: ENTRANCES.get(torch.sin))),
        ("is the short way open?", microseconds(checks)),
        ("the door off PyTorch's mode stack, and on again", microseconds(modes)),
        ("lowering", lowering),
        ("the operator itself", base),
        ("the wrapper of the result", wrapper),
        ("where it was made, for errors", microseconds(line)),
    ]


def with_rest(parts: Rows, whole: float) -> Rows:
    return [*parts, ("the interpreter, and what else is between", whole - sum(t for _, t in parts)), ("**all**", whole)]


def at_vmap(found: dict[str, Rows], microseconds: Clock) -> None:
    def body(x: Any) -> Any:
        found["vmap: `torch.sin(x)`"] = with_rest(shared_parts(x, microseconds), microseconds(lambda: torch.sin(x)))
        method = microseconds(lambda: x.sin())
        dispatched = microseconds(lambda: torch.add(x, x, alpha=2))
        base = x.value
        pop_mode(None)
        plain = microseconds(lambda: torch.add(base, base, alpha=2))
        push_mode(DOOR)
        found["vmap: other ways in"] = [
            ("`x.sin()`, a method of the wrapper", method),
            ("`torch.add(x, x, alpha=2)`, through PyTorch's dispatcher", dispatched),
            ("of that, the operator itself", plain),
        ]
        return x

    functrans.vmap(body)(torch.rand(8))


def at_jvp(found: dict[str, Rows], microseconds: Clock) -> None:
    def body(x: Any) -> Any:
        value, tangent = x.value, x.tangent
        parts = shared_parts(x, microseconds)
        pop_mode(None)
        parts.insert(6, ("the tangent: `cos` and a product", microseconds(lambda: tangent * torch.cos(value))))
        push_mode(DOOR)
        found["jvp: `torch.sin(x)`"] = with_rest(parts, microseconds(lambda: torch.sin(x)))
        return x

    functrans.jvp(body, (torch.rand(()),), (torch.rand(()),))


def at_grad(found: dict[str, Rows], microseconds: Clock) -> None:
    length = 64
    seed = torch.ones(())

    def body(x: Any) -> Any:
        tape = interpreter_stack()[0].tape  # type: ignore[attr-defined]

        def record() -> None:
            torch.sin(x)
            tape.clear()

        found["grad: `torch.sin(x)`"] = with_rest(shared_parts(x, microseconds), microseconds(record))
        return x

    functrans.grad(body)(torch.rand(()))

    def chain(x: Any) -> Any:
        for _ in range(length):
            x = torch.sin(x)
        return x

    value = torch.rand(())
    _, pullback = functrans.vjp(chain, value)
    own = microseconds(lambda: seed * torch.cos(value))
    whole = clock(200)(lambda: pullback(seed)) / length
    found["grad: pulling back through one `sin`"] = [
        ("`cos` and a product", own),
        ("the tape, the record, the sum", whole - own),
        ("**all**", whole),
    ]


def run(settings: Settings) -> Part:
    """The tables. They are of the host's work, which a CUDA device does not change."""
    found: dict[str, Rows] = {}
    microseconds = clock(1000 if settings.quick else 20000)
    for at_level in (at_vmap, at_jvp, at_grad):
        at_level(found, microseconds)
    text = "Microseconds, each part by itself; see [profile.md](profile.md)."
    return Part(
        [Table(title, text, ["part", "µs"], [[name, f"{t:.2f}"] for name, t in rows]) for title, rows in found.items()]
    )


if __name__ == "__main__":
    raise SystemExit(main(run, "Where the microseconds of one small operator go."))
