"""Values and functions of every kind, most of which are wrong for most arguments of most functions."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import functrans
from functrans import extend

aten = torch.ops.aten
V, W, X = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -1.0]), torch.arange(6.0).view(2, 3)


class Counting(extend.TableInterpreter):
    kind = "counting"
    payload = ("count",)
    rules = extend.RuleTable("counting rules")


@dataclasses.dataclass
class Point:
    x: Any


class Awkward:
    """Answers every attribute, and has no repr."""

    def __getattr__(self, name: str) -> Any:
        return 3

    def __repr__(self) -> str:
        raise ValueError("no repr")


class Callable_:
    def __call__(self, x: Any) -> Any:
        return x.sum()

    def method(self, x: Any) -> Any:
        return x.sum()


def escaped() -> Any:
    """A tensor whose transform has ended."""
    kept: list[Any] = []
    functrans.vmap(lambda x: kept.append(x * 2) or x)(V)
    return kept[0]


#: Values of every kind; functions, so that each call gets a fresh one.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "0": lambda: 0,
    "3": lambda: 3,
    "-7": lambda: -7,
    "10**30": lambda: 10**30,
    "2.5": lambda: 2.5,
    "nan": lambda: float("nan"),
    "1j": lambda: 1j,
    "True": lambda: True,
    "'text'": lambda: "text",
    "'0'": lambda: "0",
    "b'bytes'": lambda: b"bytes",
    "()": tuple,
    "[]": list,
    "{}": dict,
    "set()": set,
    "[0]": lambda: [0],
    "(0,)": lambda: (0,),
    "(0, 0)": lambda: (0, 0),
    "(5,)": lambda: (5,),
    "(None,)": lambda: (None,),
    "('a',)": lambda: ("a",),
    "((0,),)": lambda: ((0,),),
    "(0.5,)": lambda: (0.5,),
    "{'a': 0}": lambda: {"a": 0},
    "{1: V, 'a': V}": lambda: {1: V, "a": V},
    "({'a': 0},)": lambda: ({"a": 0},),
    "slice": lambda: slice(0, 1),
    "range(1)": lambda: range(1),
    "generator": lambda: (x for x in (V, V)),
    "iterator": lambda: iter([0]),
    "object": object,
    "awkward": Awkward,
    "class": lambda: int,
    "module": lambda: torch,
    "operator": lambda: aten.sin.default,
    "packet": lambda: aten.sin,
    "dtype": lambda: torch.float64,
    "Linear": lambda: nn.Linear(3, 2),
    "[Linear, Tanh]": lambda: [nn.Linear(3, 2), nn.Tanh()],
    "[Linear(3, 2), Linear(2, 2)]": lambda: [nn.Linear(3, 2), nn.Linear(2, 2)],
    "[Linear, no bias]": lambda: [nn.Linear(3, 2), nn.Linear(3, 2, bias=False)],
    "{'weight': text}": lambda: {"weight": "text"},
    "{'weight': X}": lambda: {"weight": X.T},
    "{'': V}": lambda: {"": V},
    "{'forward': V}": lambda: {"forward": V},
    "{'bias.x': V}": lambda: {"bias.x": V},
    "{'sub.weight': V}": lambda: {"sub.weight": V},
    "OrderedDict": lambda: collections.OrderedDict(a=V),
    "{'other': X}": lambda: {"other": X},
    "array": lambda: np.ones(3),
    "array of ints": lambda: np.arange(2),
    "numpy number": lambda: np.float64(1.5),
    "numpy int": lambda: np.int64(0),
    "int tensor": lambda: torch.arange(3),
    "0-d int tensor": lambda: torch.tensor(1),
    "bool tensor": lambda: V > 1.5,
    "complex tensor": lambda: V * 1j,
    "double tensor": lambda: V.double(),
    "0-d tensor": lambda: torch.tensor(1.5),
    "empty tensor": lambda: torch.zeros(0),
    "(4, 0)": lambda: torch.zeros(4, 0),
    "matrix": lambda: X.clone(),
    "sparse tensor": lambda: V.to_sparse(),
    "compressed tensor": lambda: X.to_sparse_csr(),
    "meta tensor": lambda: V.to("meta"),
    "nested tensor": lambda: torch.nested.nested_tensor([V, W]),
    "jagged tensor": lambda: torch.nested.nested_tensor([V, W], layout=torch.jagged),
    "quantized tensor": lambda: torch.quantize_per_tensor(V, 0.1, 0, torch.qint8),
    "half tensor": lambda: V.half(),
    "float8 tensor": lambda: V.to(torch.float8_e4m3fn),
    "conjugate view": lambda: (V * 1j).conj(),
    "deep": lambda: functools.reduce(lambda x, _: [x], range(50), V),
    "tensor that requires grad": lambda: V.clone().requires_grad_(),
    "parameter": lambda: nn.Parameter(V.clone()),
    "escaped": escaped,
    "(V,)": lambda: (V,),
    "(V, V)": lambda: (V, V),
    "[V]": lambda: [V],
    "{'a': V}": lambda: {"a": V},
    "(None, V)": lambda: (None, V),
    "(3.0,)": lambda: (3.0,),
    "((V,),)": lambda: ((V,),),
    "({'a': V},)": lambda: ({"a": V},),
    "(int tensor,)": lambda: (torch.arange(3),),
    "(W,)": lambda: (W,),
    "(meta,)": lambda: (V.to("meta"),),
    "(sparse,)": lambda: (V.to_sparse(),),
    "(double,)": lambda: (V.double(),),
    "(complex,)": lambda: (V * 1j,),
    "Point": lambda: Point(V),
    "interpreter": lambda: Counting(torch.sum),
    "interpreter class": lambda: Counting,
}


def returning(name: str, value: Callable[[Any], Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return value(next((a for a in args if isinstance(a, torch.Tensor)), V))

    function.__name__ = f"returning_{name}"
    return function


class OwnError(Exception):
    """Of the user's function."""


def failing(*args: Any, **kwargs: Any) -> Any:
    raise OwnError


#: Functions that take anything, and return what is wrong for some transform.
FUNCTIONS: dict[str, Callable[[], Any]] = {
    **{
        f"returning {name}": functools.partial(returning, name, value)
        for name, value in {
            "None": lambda x: None,
            "a number": lambda x: 3.0,
            "text": lambda x: "text",
            "a set": lambda x: {1},
            "nothing": lambda x: (),
            "no keys": lambda x: {},
            "an array": lambda x: np.ones(3),
            "a generator": lambda x: (y for y in [x]),
            "an object": lambda x: Awkward(),
            "a class": lambda x: int,
            "itself": lambda x: x,
            "a pair": lambda x: (x.sum(), x),
            "three": lambda x: (x.sum(), x, x),
            "a list": lambda x: [x.sum(), x],
            "a dict": lambda x: {"a": x, "b": x},
            "mixed keys": lambda x: {1: x, "b": x},
            "a pair with text": lambda x: (x.sum(), "text"),
            "a pair with an object": lambda x: (x.sum(), Awkward()),
            "text first": lambda x: ("text", x),
            "nested": lambda x: {"a": (x, [x, None])},
            "ints": lambda x: (x.real > 0).long(),
            "an int": lambda x: (x.real > 0).long().sum(),
            "bools": lambda x: x.real > 0,
            "complex": lambda x: x.sum() * 1j,
            "a constant": lambda x: torch.tensor(1.0),
            "sparse": lambda x: x.to_sparse(),
            "compressed": lambda x: torch.eye(2).to_sparse_csr(),
            "meta": lambda x: torch.ones((), device="meta"),
            "an escaped tensor": lambda x: escaped(),
            "a double": lambda x: x.sum().double(),
            "one row": lambda x: x.sum().view(1),
            "no elements": lambda x: x.new_zeros(0),
            "a dataclass": lambda x: Point(x),
        }.items()
    },
    "failing": lambda: failing,
    "partial": lambda: functools.partial(torch.sum, dim=0),
    "partial of a partial": lambda: functools.partial(functools.partial(torch.sum)),
    "callable object": Callable_,
    "method": lambda: Callable_().method,
    "of no arguments": lambda: lambda: V,
    "of three arguments": lambda: lambda a, b, c: a.sum(),
    "by keyword only": lambda: lambda *, x: x.sum(),
    "ending the run": lambda: lambda *a, **k: next(iter(())),
}
