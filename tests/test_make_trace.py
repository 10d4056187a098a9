"""make_trace: the program that a function and its transforms come to, as Python that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import functrans
from functrans import functional_call, grad, hessian, jacfwd, jvp, linearize, make_trace, vmap

F64 = torch.float64
X = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
ROWS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], dtype=F64)
OTHER = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]], dtype=F64)
WEIGHTS = torch.linspace(-1.0, 1.0, 60, dtype=F64).reshape(3, 20)


def loss(x: Tensor) -> Tensor:
    y = torch.tanh(x) @ WEIGHTS
    y = y.clone()
    y[0].mul_(2)
    return (y * torch.tensor(0.5, dtype=F64)).sum()


def test_the_source() -> None:
    assert_expected_inline(make_trace(vmap(grad(lambda x: (x * 2).sum())))(torch.ones(2, 3)).source, """\
import torch


def program(arg0):
    ones = torch.ops.aten.ones.default([], dtype=torch.float32, device=torch.device('cpu'), pin_memory=False)
    expand = torch.ops.aten.expand.default(ones, [3])
    mul_1 = torch.ops.aten.mul.Tensor(expand, 2)
    unsqueeze = torch.ops.aten.unsqueeze.default(mul_1, 0)
    expand_1 = torch.ops.aten.expand.default(unsqueeze, [2, 3])
    return [expand_1]""")
    assert_expected_inline(repr(make_trace(vmap(torch.sum))(torch.ones(2, 3))), """\
import torch


def sum(arg0):
    sum_1 = torch.ops.aten.sum.dim_IntList(arg0, [1])
    return [sum_1]""")


COMPOSITIONS: dict[str, tuple[Callable[[Tensor], Any], Tensor, Tensor]] = {
    "vmap of grad": (vmap(grad(loss)), ROWS, OTHER),
    "hessian": (hessian(loss), X, OTHER[0]),
    "jvp of grad": (lambda x: jvp(grad(loss), (x,), (x,)), X, OTHER[1]),
    "grad of vmap": (grad(lambda x: vmap(loss)(x).prod()), ROWS, OTHER),
    "a Jacobian": (jacfwd(lambda x: {"y": x.cumsum(0), "z": [x.sum()]}), X, OTHER[0]),
    "linearize": (lambda x: linearize(loss, x)[1](torch.ones(3, dtype=F64)), X, OTHER[0]),
    "no transform": (loss, X, OTHER[0]),
    "several results": (vmap(lambda x: x.topk(2)), ROWS, OTHER),
    "a function of numbers": (vmap(lambda x: x.softmax(0).clamp(min=0.1)), ROWS, OTHER),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_program_does_the_same_for_other_numbers(name: str) -> None:
    function, x, other = COMPOSITIONS[name]
    trace = make_trace(function)(x)
    for given in (x, other):
        torch.testing.assert_close(trace(given), function(given), rtol=0, atol=0)
    # the source stands for itself
    scope: dict[str, Any] = {}
    exec(trace.source, scope)  # noqa: S102 - what the library wrote
    (function_of_source,) = [v for name, v in scope.items() if callable(v) and not name.startswith("_")]
    flat = [v for v in torch.utils._pytree.tree_leaves(function(other)) if isinstance(v, Tensor)]
    torch.testing.assert_close(function_of_source(other, **trace.captured), flat, rtol=0, atol=0)
    assert not [line for line in trace.source.splitlines() if "_." in line.split("(")[0]], "it writes to nothing"


def test_what_is_captured() -> None:
    trace = make_trace(grad(loss))(X)
    assert [v is WEIGHTS or torch.equal(v, WEIGHTS) for v in trace.captured.values()] == [True]
    assert "torch.tensor(0.5, dtype=torch.float64)" in trace.source, "a few numbers are written down"


def test_trees_options_and_modules() -> None:
    model = torch.nn.Linear(3, 2).double()
    params = dict(model.named_parameters())

    def f(params: Any, x: Tensor, *, power: int) -> Any:
        return {"out": functional_call(model, params, (x,)).sum() ** power, "power": power}

    trace = make_trace(grad(lambda *a, **k: f(*a, **k)["out"]))(params, X, power=2)
    changed = {name: p.detach() + 1 for name, p in params.items()}
    found, expected = trace(changed, X, power=2), grad(lambda p: f(p, X, power=2)["out"])(changed)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert make_trace(f)(params, X, power=3)(params, X, power=3)["power"] == 3


def test_names_and_numbers_that_need_care() -> None:
    def torch_(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, float("-inf")).logsumexp(0) * complex(0, float("inf"))

    for name in ("torch", "arg0", "class", "mul", "a b"):
        torch_.__name__ = name
        trace = make_trace(vmap(torch_))(ROWS)
        torch.testing.assert_close(trace(OTHER), vmap(torch_)(OTHER), equal_nan=True, rtol=0, atol=0)
    generator = torch.Generator()
    with pytest.raises(functrans.FunctransError, match=r"make_trace\(<lambda>\): got .*Generator"):
        make_trace(lambda x: torch.rand(3, generator=generator) + x)(X)


def test_other_arguments_are_refused() -> None:
    trace = make_trace(vmap(torch.cumsum, in_dims=(0, None)))(ROWS, 0)
    for args in ((ROWS[:1], 0), (ROWS.float(), 0), (ROWS, 1), (ROWS,), ((ROWS, 0),)):
        with pytest.raises(functrans.FunctransError, match="trace of cumsum: got"):
            trace(*args)
    torch.testing.assert_close(trace(OTHER, 0), OTHER.cumsum(1))


def test_inside_of_a_transform_and_what_is_no_function() -> None:
    with pytest.raises(functrans.FunctransError, match="outside of them"):
        vmap(lambda x: make_trace(torch.sin)(x)(x))(ROWS)
    with pytest.raises(functrans.FunctransError, match="make_trace"):
        make_trace(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of the user's"):
        make_trace(vmap(raises))(ROWS)


def raises(x: Tensor) -> Tensor:
    raise ValueError("of the user's")
