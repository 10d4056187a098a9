"""An interpreter runs once, at the level that it was made at; its payload has names that no tensor has."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import grad, vmap
from functrans.core.tensor import WrapperTensor
from functrans.errors import InterpreterError, PayloadError
from functrans.extend import Interpreter, RuleTable, TableInterpreter, interpreter_stack, lowered, run_transformed
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter

X = torch.tensor([0.3, 0.7, 1.1])


class Marking(TableInterpreter):
    kind = "marking"
    payload = ("mark",)
    rules = RuleTable("marks")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    assert interpreter_stack() == [] and torch.is_grad_enabled()


def f(x: Tensor) -> Tensor:
    return x


def test_it_runs_once() -> None:
    interpreter = Marking(f)
    assert run_transformed(interpreter, lambda: 3) == 3
    with pytest.raises(
        InterpreterError, match=r"run_transformed\(marking\(f\)\): got one that has run already; expected one that"
    ):
        run_transformed(interpreter, lambda: 3)


def test_it_runs_once_if_it_failed_too() -> None:
    interpreter = Marking(f)
    with pytest.raises(ZeroDivisionError):
        run_transformed(interpreter, lambda: 1 / 0)
    with pytest.raises(InterpreterError, match="has run already"):
        run_transformed(interpreter, lambda: 3)


def test_it_is_not_entered_again_while_it_runs() -> None:
    interpreter = Marking(f)
    with pytest.raises(InterpreterError, match="got one that is running"):
        run_transformed(interpreter, lambda: run_transformed(interpreter, lambda: 3))

    def below() -> Any:
        with lowered(interpreter):
            return run_transformed(interpreter, lambda: 3)

    interpreter = Marking(f)
    with pytest.raises(InterpreterError, match="got one that is running"):
        run_transformed(interpreter, below)


def test_it_runs_at_the_level_that_it_was_made_at() -> None:
    outside = Marking(f)
    with pytest.raises(
        InterpreterError, match=r"made outside of all transforms, and is run inside vmap\(<lambda>\) at level 1"
    ):
        vmap(lambda x: run_transformed(outside, lambda: x))(X)
    made = []
    vmap(lambda x: (made.append(Marking(f)), x)[1])(X)
    with pytest.raises(
        InterpreterError, match=r"made inside vmap\(<lambda>\) at level 1, and is run outside of all transforms"
    ):
        run_transformed(made[0], lambda: 3)
    with pytest.raises(
        InterpreterError,
        match=r"made inside vmap\(<lambda>\) at level 1, and is run inside vmap\(<lambda>\) at level 1",
    ):
        vmap(lambda x: run_transformed(made[0], lambda: x))(X)  # of another vmap

    def inner(x: Tensor) -> Tensor:
        made.append(Marking(f))
        return x

    with pytest.raises(
        InterpreterError, match=r"made inside grad\(inner\) at level 2, and is run inside vmap\(<lambda>\) at level 1"
    ):
        vmap(lambda x: (grad(inner)(x), run_transformed(made[-1], lambda: x))[1])(X)


def test_a_draw_inside_is_one_for_each_example() -> None:
    drawn = lambda x: run_transformed(interpreter := Marking(f), lambda: interpreter.own(torch.rand(()))).value + x
    found = vmap(drawn, randomness="different")(torch.zeros(5))
    assert len(found.unique()) == 5


def test_switches_are_those_where_it_was_made() -> None:
    interpreter = Marking(f)
    with torch.no_grad():
        with pytest.raises(InterpreterError, match="grad mode"):
            run_transformed(interpreter, lambda: 3)
        assert not torch.is_grad_enabled()
    with torch.no_grad():
        interpreter = Marking(f)
    with pytest.raises(InterpreterError, match="grad mode"):
        run_transformed(interpreter, lambda: 3)


def test_other_threads() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_transformed, Marking(f), lambda: 3).result() == 3  # at the base here as there
        made: list[Any] = []
        vmap(lambda x: (made.append(Marking(f)), x)[1])(X)
        with pytest.raises(InterpreterError, match="is run outside of all transforms"):
            pool.submit(run_transformed, made[0], lambda: 3).result()
        running = Marking(f)

        def elsewhere() -> Any:
            return pool.submit(run_transformed, running, lambda: 3).result()

        with pytest.raises(InterpreterError, match="got one that is running"):
            run_transformed(running, elsewhere)


def test_of_many_threads_one_runs_it() -> None:
    interpreter, start = Marking(f), threading.Barrier(8)

    def run() -> str:
        start.wait()
        try:
            return str(run_transformed(interpreter, lambda: "ran"))
        except InterpreterError:
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        found = [one.result() for one in [pool.submit(run) for _ in range(8)]]
    assert sorted(found) == ["ran"] + ["refused"] * 7


BORROWED = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import torch
from torch.autograd import forward_ad
import functrans as ft

class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

x, v = torch.randn(2, 4, 4, dtype=torch.float64)
borrowed = lambda: ft.jvp(lambda x: torch.linalg.householder_product(x, x[0]), (x,), (v,))[1]
looked_at = lambda: ft.count(Square.apply)(x)[0]
expected = borrowed(), looked_at()
start = threading.Barrier(12)
sys.setswitchinterval(1e-6)

def rounds(n):
    start.wait()
    for _ in range(20):
        torch.testing.assert_close(looked_at() if n % 3 == 0 else borrowed(), expected[n % 3 == 0])

with ThreadPoolExecutor(12) as pool:
    for done in [pool.submit(rounds, n) for n in range(12)]:
        done.result()
assert forward_ad._current_level == -1
"""


def test_threads_that_borrow_tangents_share_the_level_of_forward_ad() -> None:
    """In a process of its own: what is freed under another thread's hands ends it."""
    done = subprocess.run([sys.executable, "-c", BORROWED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- payloads

TAKEN = ["shape", "dtype", "device", "layout", "strides", "tape_index", "bdim", "tangent", "value", "interpreter",
    "view_link", "version", "alias_group", "synced_version",
         "made_at", "_value", "_tangent", "grad", "data", "T", "max", "size", "requires_grad", "__class__",
         "self"]  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("base", [Interpreter, TableInterpreter, Marking])
def test_names_that_every_wrapper_has(base: type[Interpreter], name: str) -> None:
    with pytest.raises(PayloadError, match=f"class Mine: payload has '{name}', which every wrapper tensor has already"):
        type("Mine", (base,), {"payload": ("mark", name)})


def test_all_slots_of_a_wrapper_are_refused() -> None:
    for name in (*WrapperTensor.__slots__, *vars(WrapperTensor)):
        with pytest.raises(PayloadError):
            type("Mine", (TableInterpreter,), {"payload": (name,)})


@pytest.mark.parametrize("payload", ["mark", ["mark"], ("mark", 3), ("no name",), ("mark", "mark"), None])
def test_what_is_no_payload(payload: Any) -> None:
    with pytest.raises(PayloadError, match="class Mine: payload"):
        type("Mine", (TableInterpreter,), {"payload": payload})


def test_a_subclass_keeps_what_it_inherits() -> None:
    for base in (GradInterpreter, VmapInterpreter, JvpInterpreter):
        mine: Any = type("Mine", (base,), {"payload": (*base.payload, "mark")})
        assert mine.payload == (*base.payload, "mark")
    with pytest.raises(PayloadError):
        type("Mine", (GradInterpreter,), {"payload": ("tape_index", "bdim")})


def test_a_payload_of_free_names_arrives() -> None:
    interpreter: Any = type(
        "Mine", (TableInterpreter,), {"payload": ("upper", "lower_bound", "mask"), "rules": RuleTable("rules")}
    )(f)
    upper, mask = X + 1, X > 0.5
    out = run_transformed(interpreter, lambda: interpreter.carry(X, upper=upper, mask=mask))
    assert out.upper is upper and out.lower_bound is None and out.mask is mask
