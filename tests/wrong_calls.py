"""Wrong calls of every public function: a call that is right, with one argument, or two, of the wrong kind.

``python tests/wrong_calls.py`` prints what they end in.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import functrans
from functrans import extend
from functrans.extend import interpreter_stack
from functrans.stack import STATE
from functrans.torch_private import AUTOGRAD, VIEWS_AND_VERSIONS, is_forward_enabled, is_key_excluded, mode_stack_size

aten = torch.ops.aten
V, W, X, Y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -1.0]), torch.arange(6.0).view(2, 3), torch.ones(2, 3)


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


#: The interpreter that runs.
IT = object()

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


def total(*args: Any, **kwargs: Any) -> Any:
    return sum((a**2).sum() for a in args if isinstance(a, torch.Tensor))


def square(x: Any, *_: Any, **__: Any) -> Any:
    return x**2


@dataclasses.dataclass
class Case:
    """A right call: the function, how it is called, and with what."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Callable[[], Any]]
    #: of these, the functions, which are also given FUNCTIONS
    functions: tuple[str, ...] = ("func",)
    #: the given function called without the transform
    plain: Callable[..., Any] | None = None
    #: whether ``call`` is code of a transform, in which no error is the user's
    extends: bool = False


_LIBRARY: list[Any] = [functrans]


def library() -> Any:
    """The library under test: functrans, or what ``using`` says."""
    return _LIBRARY[-1]


@contextlib.contextmanager
def using(other: Any) -> Iterator[None]:
    _LIBRARY.append(other)
    try:
        yield
    finally:
        _LIBRARY.pop()


def plain(func: Any, x: Any, y: Any, k: Any = None, **_: Any) -> Any:
    """The given function called as it is, and differentiated by PyTorch where that can be done."""
    if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.requires_grad:
        x = x.clone().requires_grad_()
    out = func(x, y) if k is None else func(x, y, k=k)
    if isinstance(out, torch.Tensor) and out.requires_grad and out.dim() == 0 and not out.is_complex():
        out.backward()
    return out


def of_grad(name: str) -> Case:
    def call(func: Any, argnums: Any, has_aux: Any, x: Any, y: Any, k: Any) -> Any:
        return getattr(library(), name)(func, argnums, has_aux)(x, y, k=k)

    arguments = {"func": lambda: total, "argnums": lambda: 0, "has_aux": lambda: False, "x": V.clone, "y": X.clone, "k": V.clone}
    return Case(name, call, arguments, plain=plain)


def of_jacobian(name: str, **options: Callable[[], Any]) -> Case:
    def call(func: Any, argnums: Any, x: Any, y: Any, k: Any, **options: Any) -> Any:
        return getattr(library(), name)(func, argnums, **options)(x, y, k=k)

    arguments = {"func": lambda: total, "argnums": lambda: 0, "x": V.clone, "y": X.clone, "k": V.clone}
    return Case(name, call, {**arguments, "has_aux": lambda: False, "chunk_size": lambda: None, **options}, plain=plain)


def call_vmap(func: Any, in_dims: Any, out_dims: Any, randomness: Any, chunk_size: Any, x: Any, y: Any, k: Any) -> Any:
    return library().vmap(func, in_dims, out_dims, randomness, chunk_size=chunk_size)(x, y, k=k)


def call_vjp(func: Any, has_aux: Any, x: Any, y: Any, cotangent: Any) -> Any:
    return library().vjp(func, x, y, has_aux=has_aux)[1](cotangent)


def with_tensors(module: Any, parameter_and_buffer_dicts: Any, args: Any, kwargs: Any, **_: Any) -> Any:
    """A module called with the tensors themselves in place of its own."""
    module = copy.deepcopy(module)
    dicts = [parameter_and_buffer_dicts] if isinstance(parameter_and_buffer_dicts, dict) else parameter_and_buffer_dicts
    for name, value in (item for d in dicts for item in d.items()):
        if name in dict(module.named_parameters()):
            module.register_parameter(name, nn.Parameter(value.detach()))
    return module(*(args if isinstance(args, tuple) else () if args is None else (args,)), **(kwargs or {}))


def body_of(action: Callable[..., Any]) -> Callable[..., Any]:
    """``action(interpreter, **arguments)`` while an interpreter runs."""

    def call(**arguments: Any) -> Any:
        interpreter = Counting(action)
        return extend.run_transformed(interpreter, lambda: action(interpreter, **arguments))

    return call


CASES = [
    of_grad("grad"),
    of_grad("grad_and_value"),
    of_grad("value_and_grad"),
    of_jacobian("jacrev"),
    of_jacobian("jacfwd", randomness=lambda: "error"),
    of_jacobian("hessian"),
    Case(
        "vmap", call_vmap,
        {
            "func": lambda: square, "in_dims": lambda: 0, "out_dims": lambda: 0, "randomness": lambda: "error", "chunk_size": lambda: None,
            "x": X.clone, "y": W.clone, "k": V.clone,
        }, plain=plain,
    ),
    Case("vjp", call_vjp, {"func": lambda: square, "has_aux": lambda: False, "x": V.clone, "y": X.clone, "cotangent": V.clone}, plain=plain),
    Case(
        "jvp", lambda func, primals, tangents, **options: library().jvp(func, primals, tangents, **options),
        {
            "func": lambda: square, "primals": lambda: (V, X), "tangents": lambda: (V, X), "strict": lambda: False, "has_aux": lambda: False,
        }, plain=lambda func, primals, **_: func(*primals),
    ),
    Case(
        "functional_call", lambda *args, **kwargs: library().functional_call(*args, **kwargs),
        {
            "module": lambda: nn.Linear(3, 2), "parameter_and_buffer_dicts": lambda: {"weight": X.clone()}, "args": lambda: (V,),
            "kwargs": lambda: None, "tie_weights": lambda: True, "strict": lambda: False,
        }, (), plain=with_tensors,
    ),
    Case("stack_module_state", lambda *args, **kwargs: library().stack_module_state(*args, **kwargs), {"models": lambda: [nn.Linear(3, 2), nn.Linear(3, 2)]}, ()),
    Case("replace_all_batch_norm_modules_", lambda *args, **kwargs: library().replace_all_batch_norm_modules_(*args, **kwargs), {"root": lambda: nn.BatchNorm1d(3)}, ()),
    Case(
        "run_transformed", extend.run_transformed,
        {"interpreter": lambda: Counting(torch.sum), "body": lambda: lambda: 1, "enable_grad": lambda: False}, ("body",), plain=lambda body, **_: body(),
    ),
    Case(
        "lower", body_of(lambda i, interpreter, op, args, kwargs: extend.lower(i if interpreter is IT else interpreter, op, args, kwargs)),
        {"interpreter": lambda: IT, "op": lambda: aten.sin.default, "args": lambda: (V,), "kwargs": dict}, (), extends=True,
    ),
    Case(
        "decompose", body_of(lambda i, interpreter, op, args, kwargs: extend.decompose(i if interpreter is IT else interpreter, op, args, kwargs)),
        {"interpreter": lambda: IT, "op": lambda: aten.square.default, "args": lambda: (V,), "kwargs": dict}, (), extends=True,
    ),
    Case(
        "wrap", body_of(lambda i, interpreter, value: extend.wrap(i if interpreter is IT else interpreter, value)),
        {"interpreter": lambda: IT, "value": lambda: V}, (), extends=True,
    ),
    Case("map_tensors", extend.map_tensors, {"function": lambda: torch.sin, "out": lambda: [V]}, ("function",), plain=lambda function, out: function(out if isinstance(out, torch.Tensor) else V)),
    Case("interpreter_stack", extend.interpreter_stack, {}, ()),
    Case("carry", body_of(lambda i, value, **payload: i.carry(value, **payload)), {"value": lambda: V, "count": lambda: V}, (), extends=True),
    Case("own", body_of(lambda i, x: i.own(x)), {"x": lambda: V}, (), extends=True),
    Case("constant", body_of(lambda i, value: i.constant(value)), {"value": lambda: V}, (), extends=True),
    Case(
        "missing_rule", body_of(lambda i, interpreter, op: extend.missing_rule(i if interpreter is IT else interpreter, op)),
        {"interpreter": lambda: IT, "op": lambda: aten.sin.default}, (), extends=True,
    ),
    Case("lowered", body_of(lambda i, interpreter: within(extend.lowered(i if interpreter is IT else interpreter))), {"interpreter": lambda: IT}, (), extends=True),
    Case("running_at", body_of(lambda i, level: within(extend.running_at(i if level is IT else level))), {"level": lambda: IT}, (), extends=True),
]  # fmt: skip


def within(context: Any) -> Any:
    with context:
        return V + 1


def wrong_calls(cases: list[Case] = CASES, pairs: int = 0, seed: int = 0) -> Iterator[tuple[Case, dict[str, str], dict[str, Any]]]:
    """Every case with one argument replaced by every value; with two replaced, ``pairs`` times each."""
    random_ = random.Random(seed)
    for case in cases:
        kinds = {name: {**VALUES, **(FUNCTIONS if name in case.functions else {})} for name in case.arguments}
        for name, values in kinds.items():
            for kind in values:
                yield replaced(case, kinds, {name: kind})
        for names in itertools.islice(itertools.cycle(list(itertools.combinations(kinds, 2)) or [()]), pairs):
            if names:
                yield replaced(case, kinds, {name: random_.choice(list(kinds[name])) for name in names})


def replaced(case: Case, kinds: Any, chosen: dict[str, str]) -> tuple[Case, dict[str, str], dict[str, Any]]:
    return case, chosen, {name: kinds[name][chosen[name]]() if name in chosen else right() for name, right in case.arguments.items()}


def thread_state() -> tuple[Any, ...]:
    """What a call must leave as it was."""
    return (
        interpreter_stack(), mode_stack_size(), STATE.door_depth, is_key_excluded(AUTOGRAD), is_key_excluded(VIEWS_AND_VERSIONS),
        torch.is_grad_enabled(), is_forward_enabled(),
    )  # fmt: skip


def outcome(case: Case, arguments: dict[str, Any]) -> BaseException | None:
    try:
        case.call(**arguments)
    except Exception as error:  # noqa: BLE001 - which kind is the question
        return error
    return None


def meant(error: BaseException | None) -> bool:
    """Whether a ``raise`` raised the error, as against a mistake on the way."""
    return error is not None and str(traceback.extract_tb(error.__traceback__)[-1].line).startswith("raise")


def is_deliberate(error: Exception, case: Case, arguments: dict[str, Any]) -> bool:
    """Whether the error is one that the library means to raise, or that the given function raises."""
    if isinstance(error, functrans.FunctransError | OwnError):
        return True
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    if innermost == __file__ and not case.extends:
        return True
    if case.plain is not None:
        try:
            case.plain(**arguments)
        except Exception:  # noqa: BLE001 - what the function does by itself is its own affair
            return True
    return False


if __name__ == "__main__":
    counts: collections.Counter[str] = collections.Counter()
    for case, chosen, arguments in wrong_calls(pairs=100):
        error = outcome(case, arguments)
        if error is None:
            counts["succeeded"] += 1
        elif isinstance(error, functrans.FunctransError):
            counts["deliberate"] += 1
        elif is_deliberate(error, case, arguments):
            counts["of the function"] += 1
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            counts["raw"] += 1
            print(case.name, chosen, type(error).__name__, str(error)[:100].replace("\n", " "), f"{last.filename.rpartition('/')[2]}:{last.lineno}")
    print(counts)
