"""A tensor that carries a derivative in the place of a Python number: right, or refused, and never zero."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dependence import Verdict, apart, floats, made_up_calls, verdict
from torch import Tensor
from torch._ops import OpOverload

from functrans import grad, jvp, vmap
from functrans.errors import DataDependentError, NumberArgumentError

A = torch.tensor(0.5, dtype=torch.float64)
Y = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

# ------------------------------------------------------------------------------------------- one by one

#: functions with no other wrapper among their arguments, which read the number in different ways
UNASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "window": lambda a: torch.kaiser_window(5, True, a),
    "dropout": lambda a: F.dropout(Y, a),
    "alpha dropout": lambda a: F.alpha_dropout(Y, a, training=True),
    "a draw, its mean": lambda a: torch.normal(a, 1.0, (3,)),
    "a draw, its deviation": lambda a: torch.normal(1.0, a, (3,)),
    "a draw, written": lambda a: Y.clone().normal_(a),
    "bounds": lambda a: Y.clone().uniform_(0, a),
    "initialized": lambda a: torch.nn.init.normal_(Y.clone(), a),
    "slope": lambda a: F.leaky_relu(Y, a),
    "loss": lambda a: F.smooth_l1_loss(Y, Y + 1, beta=3 * a),
    "eps": lambda a: F.layer_norm(Y, (3,), eps=a),
    "value": lambda a: F.pad(Y, (1, 1), value=a),
    "a module": lambda a: torch.nn.Dropout(a)(Y),
    "complex": lambda a: torch.full((3,), torch.complex(a, a)).real,
}


@pytest.mark.parametrize("name", UNASKED)
def test_nobody_asked_for_the_number(name: str) -> None:
    f = UNASKED[name]
    for run in (
        lambda: grad(lambda a: f(a).sum())(A),
        lambda: jvp(f, (A,), (A,)),
        lambda: grad(lambda a: vmap(lambda y: y + f(a), randomness="same")(Y).sum())(A),
        lambda: jvp(grad(lambda a: f(a).sum()), (A,), (A,)),
    ):
        with pytest.raises((NumberArgumentError, TypeError)):
            run()
    with pytest.raises((DataDependentError, TypeError)):
        vmap(f, randomness="same")(Y)
    # a constant is the number that it is
    torch.manual_seed(0)
    expected = f(A)
    torch.manual_seed(0)
    found = grad(lambda x: (x.sin(), f(x.detach())), has_aux=True)(A)[1]
    torch.testing.assert_close(found, expected)


def test_asked_for_it_is_a_number() -> None:
    """The same calls, with the number asked for in an expression of its own, before or in between."""
    asked: list[Callable[[Tensor], Any]] = [
        lambda a: F.dropout(Y, float(a)),
        lambda a: torch.kaiser_window(5, True, a.item()),
        lambda a: torch.full((3,), float(a)),
        lambda a: [float(a), torch.full((3,), 0.5)][1],
        lambda a: Y * max(map(float, [a, a])),
        lambda a: Y * math.sqrt(a),
        lambda a: Y * sum(float(f(a)) for f in (torch.sin, float, torch.cos)),
        lambda a: torch.full((3,), list(map(float, map(torch.sin, [a, Y[0]])))[1]),
    ]
    for f in asked:
        assert grad(lambda a, f=f: f(a).sum() * 0 + a)(A) == 1
        assert jvp(lambda a, f=f: f(a).sum() * 0 + a, (A,), (A,))[1] == A


def test_the_message_names_the_function() -> None:
    with pytest.raises(
        NumberArgumentError,
        match=r"^kaiser_window takes a Python number where it was given a tensor of grad\(<lambda>\) at level 1",
    ):
        grad(lambda a: torch.kaiser_window(5, True, a).sum())(A)


# ------------------------------------------------------------------------------------------- every function


def is_number(argument: Any) -> bool:
    kind = str(argument.type)
    return "float" in kind or "number" in kind


def operators(prefixes: tuple[str, ...] = ("",)) -> list[OpOverload]:
    """Every aten overload that takes a float or a Scalar and returns a tensor; those that write, too."""
    names = sorted(
        {
            n.removeprefix("aten::").split(".")[0]
            for n in torch._C._dispatch_get_all_op_names()
            if n.startswith("aten::")
        }
    )
    packets = [getattr(torch.ops.aten, n, None) for n in names if n.startswith(prefixes)]
    found = [getattr(p, o) for p in packets if p is not None for o in p.overloads()]
    return [
        op
        for op in found
        if any(map(is_number, op._schema.arguments)) and any("Tensor" in str(r.type) for r in op._schema.returns)
    ]


def functions(op: OpOverload) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The operator itself, and what calls it by PyTorch's other parser."""
    yield "aten", op
    name = op._schema.name.removeprefix("aten::")
    for spelling, holder, prefix in (
        ("torch", torch, ""), ("functional", F, ""), ("_nn", torch._C._nn, ""),
        ("_VariableFunctions", torch._C._VariableFunctions, ""), ("Tensor", Tensor, ""),
        ("linalg", torch.linalg, "linalg_"), ("special", torch.special, "special_"),
    ):  # fmt: skip
        function = getattr(holder, name.removeprefix(prefix), None) if name.startswith(prefix) else None
        if callable(function):
            yield spelling, function


def verdicts(op: OpOverload) -> list[Verdict]:
    return [
        v
        for call in made_up_calls(op, 1)
        for argument in filter(is_number, op._schema.arguments)
        for v in by_number(op, call, argument)
    ]


def by_number(op: OpOverload, call: Any, argument: Any) -> Iterator[Verdict]:
    """What the derivative by one number is, for every function that has the operator's arguments."""
    names = [a.name for a in op._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    for spelling, function in functions(op):

        def f(x: Tensor, function: Callable[..., Any] = function) -> tuple[Tensor, ...]:
            values = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}
            values[argument.name] = [x] if "List[" in str(argument.type) else x
            first = []
            for a in op._schema.arguments:
                if a.kwarg_only or a.name not in values:
                    break
                first.append(values.pop(a.name))
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return tuple(floats(function(*first, **values)))

        yield verdict(f"{op} as {spelling}", names.index(argument.name), f, A)


def check(prefixes: tuple[str, ...]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for op in operators(prefixes):
        for v in apart(partial(verdicts, op), op):
            found.setdefault(v.outcome, set()).add(v.op)
    # torch.normal takes tensors as well: a convention of PyTorch's, see functrans.derivatives.constants
    assert {
        name for outcome in ("zero", "wrong") for name in found.get(outcome, ()) if not name.startswith("aten.normal.")
    } == set()
    return found


def test_no_function_loses_it_among_a_few() -> None:
    found = check(("normal", "full", "uniform", "dropout", "huber", "add.", "leaky_relu", "quantile"))
    assert len(found["refused"]) >= 5 and "aten.normal_functional.default as aten" in found["crash"] | found["refused"]


@pytest.mark.slow
def test_no_function_loses_it() -> None:
    found = check(("",))
    assert len(found["refused"]) > 50 and len(found["right"]) > 60
