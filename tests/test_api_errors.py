"""Every check of arguments that torch.func makes has its counterpart: an exception of the same kind, with a pinned
text.

The calls and their texts stand in ``api_errors.txt``; ``PYTHONPATH=tests/checkers python
tests/test_api_errors.py`` writes the texts anew.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from wrong_calls import meant, thread_state

import functrans
from functrans import extend

FILE = Path(__file__).with_name("api_errors.txt")


def square(x: Any, *_: Any, **__: Any) -> Any:
    return x**2


def total(x: Any, *_: Any) -> Any:
    return x.sum()


def add(x: Any, y: Any) -> Any:
    return x + y


def with_aux(x: Any) -> Any:
    return x.sum(), x


def constant(_: Any) -> Any:
    return 3.0


def pair(x: Any) -> Any:
    return x, x


def nothing(_: Any) -> Any:
    return None


def empty(_: Any) -> Any:
    return ()


def number(x: Any) -> Any:
    return x.sum().detach().item()


def integer(x: Any) -> Any:
    return (x > 0).long()


def to_complex(x: Any) -> Any:
    return x * 1j


def item(x: Any) -> Any:
    return x * x.sum().item()


def branch(x: Any) -> Any:
    return x if (x > 0).all() else -x


def random(x: Any) -> Any:
    return x + torch.randn(())


class Pair(NamedTuple):
    a: Any
    b: Any


class Model:
    def loss(self, x: Any) -> Any:
        return x

    def __call__(self, x: Any) -> Any:
        return x


X = torch.arange(6.0).view(2, 3)
V = torch.tensor([1.0, 2.0, 3.0])
I3 = torch.arange(3)
C = torch.tensor([1j, 2.0, 3.0])
#: what the calls are made of
NAMES = {"collections": collections, "extend": extend, "functools": functools, "nn": nn, "np": np, **globals()}


def lines() -> list[str]:
    return FILE.read_text().split("\n")


def cases() -> list[tuple[str, str]]:
    """Calls, and the indented line below each: the kind of the error and its text."""
    found = lines()
    return [
        (call, text.strip()) for call, text in zip(found, [*found[1:], ""], strict=True) if call and call[0] not in "# "
    ]


def raised(call: str, library: Any) -> Exception | None:
    public = {name: value for name, value in vars(library).items() if not name.startswith("_")}
    try:
        eval(call, {**NAMES, **public})
    except Exception as error:  # noqa: BLE001 - which kind is the question
        return error
    return None


def shown(error: Exception | None) -> str:
    """Kind and text, without the line numbers of this file."""
    return re.sub(r"[^ ]*(test_api_errors\.py):\d+", r"\1:N", f"{type(error).__name__}: {error}").replace("\n", "\\n")


@pytest.mark.parametrize(("call", "text"), cases(), ids=[call for call, _ in cases()])
def test_error(call: str, text: str) -> None:
    before = thread_state()
    theirs, ours = raised(call, torch.func), raised(call, functrans)
    assert ours is not None, f"no error; torch.func: {theirs!r}"
    assert isinstance(ours, functrans.FunctransError), f"not a deliberate error: {ours!r}"
    for kind in (ValueError, TypeError, IndexError):
        if meant(theirs) and isinstance(theirs, kind):
            assert isinstance(ours, kind), f"{type(ours).__name__} is no {kind.__name__}, as torch.func's is: {theirs}"
    assert shown(ours) == text
    assert thread_state() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda F: F.grad(lambda n, x: (n * x).sum(), argnums=-1)(I3, V),
        lambda F: F.grad(lambda x, n: (x * n).sum())(V, 3),
        lambda F: F.grad(lambda d: (d["a"] * d["b"][0]).sum())({"a": V, "b": [V]}),
        lambda F: F.grad(lambda x, *, k: (x * k).sum())(V, k=V),
        lambda F: F.vmap(lambda d, n: d["a"] * n, in_dims=({"a": 0, "b": None}, None))({"a": X, "b": None}, 2.0),
        lambda F: F.vmap(lambda x: (x, {"b": x.sum()}), out_dims=(1, {"b": 0}))(X),
        lambda F: F.vmap(lambda x, y: x + y, in_dims=(0, None))(X, V),
        lambda F: F.vmap(lambda x: x, out_dims=(0,))(X),
        lambda F: F.vmap(lambda x: (x, V), out_dims=(0, None))(X),
        lambda F: F.vmap(lambda x: (x, V))(X),
        lambda F: F.vmap(lambda x: [x, 2 * x], out_dims=1)(X),
        lambda F: F.vmap(square, in_dims=1, out_dims=-1, chunk_size=2)(X),
        lambda F: F.vjp(lambda d: {"u": d["a"] + 1}, {"a": V})[1]({"u": V}),
        lambda F: F.jvp(lambda d, y: {"u": d["a"] * y}, ({"a": V}, V), ({"a": V}, V)),
        lambda F: F.jacrev(lambda d: {"u": d["a"] ** 2}, 0)({"a": V}),
        lambda F: F.jacfwd(lambda x, y: (x * y, x.sum()), (0, 1))(V, V + 1),
        lambda F: F.hessian(lambda x, y: (x**2 * y).sum(), (0, 1))(V, V),
        lambda F: F.jacrev(lambda x: (x**2, x), has_aux=True, chunk_size=2)(V),
        lambda F: F.grad_and_value(with_aux, has_aux=True)(V),
    ],
)
def test_structures_that_are_accepted_give_what_torch_func_gives(call: Callable[[Any], Any]) -> None:
    from plain import difference

    assert not difference(call(functrans), call(torch.func))


def test_outputs_of_vmap_that_are_not_tensors_are_passed_on() -> None:
    # torch.func refuses them unless out_dims is None
    assert functrans.vmap(constant)(X) == 3.0
    assert functrans.vmap(nothing)(X) is None
    squares, text = functrans.vmap(lambda x: (x**2, "text"))(X)
    assert torch.equal(squares, X**2) and text == "text"


if __name__ == "__main__":
    written = []
    for line in lines():
        if not line.startswith(" "):
            written.append(line)
        if line and line[0] not in "# ":
            written.append("    " + shown(raised(line, functrans)))
    FILE.write_text("\n".join(written))
