"""Primitives whose arguments are pytrees of tensors: derivatives and batches of what is inside, under each nesting.

The oracle is the same function as plain torch code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import functrans
from functrans import grad, hessian, jvp, vmap
from functrans.errors import MissingRuleError, RuleResultError
from functrans.extend import Primitive
from functrans.pytorch.torch_private import torch_pytree


@dataclass
class Affine:
    scale: Tensor
    shifts: dict[str, list[Tensor]]
    name: str


torch_pytree.register_dataclass(Affine)


def affine(given: Affine, x: Tensor, exponent: int = 2) -> dict[str, Tensor]:
    (shift,) = given.shifts["only"]
    return {"power": given.scale * x**exponent + shift * x, "shift": shift.sin()}


def pull_affine(grads: Any, out: Any, given: Affine, x: Tensor, exponent: int = 2) -> Any:
    (shift,) = given.shifts["only"]
    power, of_shift = (torch.zeros_like(x) if g is None else g for g in (grads["power"], grads["shift"]))
    of_given = Affine(power * x**exponent, {"only": [power * x + of_shift * shift.cos()]}, given.name)
    return of_given, power * (exponent * given.scale * x ** (exponent - 1) + shift)


def push_affine(tangents: Any, out: Any, given: Affine, x: Tensor, exponent: int = 2) -> Any:
    own, along = tangents[:2]
    (shift,) = given.shifts["only"]
    scale_t, shift_t = (None, None) if own is None else (own.scale, own.shifts["only"][0])
    scale_t, shift_t, along = (torch.zeros_like(x) if t is None else t for t in (scale_t, shift_t, along))
    by_x = exponent * given.scale * x ** (exponent - 1) + shift
    return {"power": scale_t * x**exponent + shift_t * x + by_x * along, "shift": shift_t * shift.cos()}


curved = Primitive("curved", affine)
curved.derivative(pullback=pull_affine, tangent=push_affine)


@curved.batching
def curved_batched(info: Any, in_dims: Any, given: Affine, x: Tensor, exponent: int = 2) -> Any:
    dims, dim = in_dims[:2]
    whole = (
        (given.scale, dims and dims.scale), (given.shifts["only"][0], dims and dims.shifts["only"][0]), (x, dim)
    )  # fmt: skip
    scale, shift, x = (v.expand(info.batch_size, *v.shape) if d is None else v.movedim(d, 0) for v, d in whole)
    return curved(Affine(scale, {"only": [shift]}, given.name), x, exponent), 0


def through_tree(f: Any) -> Any:
    """A function of three vectors through ``f``, which takes them in a tree."""

    def g(scale: Tensor, shift: Tensor, x: Tensor) -> Tensor:
        out = f(Affine(scale.sin(), {"only": [shift * x]}, "a name"), x, 3)
        return (out["power"] * out["shift"]).sum() + out["power"].square().sum()

    return g


NESTED: dict[str, Any] = {
    "grad": lambda f: grad(f, (0, 1, 2)),
    "one tracked": lambda f: grad(f, 1),
    "jvp": lambda f: lambda a, b, c: jvp(f, (a, b, c), (b, c, a)),
    "jvp of one": lambda f: lambda a, b, c: jvp(lambda a: f(a, b, c), (a,), (b,)),
    "hessian": lambda f: hessian(f, (0, 1, 2)),
    "jacrev of jacrev": lambda f: functrans.jacrev(functrans.jacrev(f, 1), 2),
    "jacfwd of jacfwd": lambda f: functrans.jacfwd(functrans.jacfwd(f, 0), (1, 2)),
    "vmap": lambda f: lambda a, b, c: vmap(f)(torch.stack([a, b]), torch.stack([b, c]), torch.stack([c, a])),
    "vmap of one": lambda f: lambda a, b, c: vmap(f, (None, 0, None))(a, torch.stack([b, c]), c),
    "vmap of grad": lambda f: lambda a, b, c: vmap(grad(f, (0, 1)), (0, None, None))(torch.stack([a, c]), b, c),
    "grad of vmap": lambda f: grad(
        lambda a, b, c: vmap(f, (None, 1, 0))(a, torch.stack([b, c], 1), torch.stack([c, a])).prod(), (0, 1)
    ),
    "linearize": lambda f: lambda a, b, c: functrans.linearize(f, a, b, c)[1](b, c, a),
    "grad of linearize": lambda f: grad(lambda a, b, c: functrans.linearize(f, a, b, c)[1](b, c, a), (0, 2)),
    "jet": lambda f: lambda a, b, c: functrans.jet(f, (a, b, c), ([b, None, c], [c, a, None], [a, None, None])),
    "laplacian": lambda f: lambda a, b, c: functrans.laplacian(lambda x: f(x, x * b, c))(a),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_tensors_in_trees_of_arguments(name: str) -> None:
    vectors = torch.randn(3, 2, dtype=torch.float64).unbind()
    found, expected = (NESTED[name](through_tree(f))(*vectors) for f in (curved, affine))
    torch.testing.assert_close(found, expected)


def test_what_a_pullback_returns_for_a_tree_is_looked_at() -> None:
    summed = Primitive("summed", lambda xs: xs[0] + xs[1])
    answers: list[tuple[Any, str]] = [
        (lambda g: [g, g], "2 cotangents; expected at most 1"),
        (lambda g: (g,), "for argument 0; expected the structure of that argument"),
        (lambda g: ([g],), "for argument 0; expected the structure of that argument"),
        (lambda g: ([g, g.sum().expand(3)],), r"of shape \(3,\)"),
    ]
    current: list[Any] = []
    summed.derivative(pullback=lambda g, out, xs: current[0](g))
    x = torch.ones(2, dtype=torch.float64)
    for current[:], said in (([answer], said) for answer, said in answers):
        with pytest.raises(RuleResultError, match=said):
            grad(lambda x: summed([x, x]).sum())(x)
    current[:] = [lambda g: ([g, None],)]
    assert grad(lambda x: summed([x, x]).sum())(x).tolist() == [1.0, 1.0]


def test_by_keyword_there_is_no_derivative() -> None:
    scaled = Primitive("scaled", lambda x, *, by: x * by["factor"])
    scaled.derivative(pullback=lambda g, out, x, *, by: g * by["factor"])
    x = torch.tensor(2.0)
    assert grad(lambda x: scaled(x, by={"factor": 3.0}))(x) == 3.0
    with pytest.raises(RuleResultError, match="Give the tensor as an argument of its own"):
        grad(lambda x: scaled(x, by={"factor": x}))(x)
    with pytest.raises(MissingRuleError, match="has no rule for scaled"):
        grad(lambda x: scaled(torch.ones(()), by={"factor": x}))(x)
