"""The transforms that ship, by twos, with each other, themselves and the transforms of the core in all places.

The function computes with small whole numbers, which bfloat16 holds exactly, so that each leaves values as they are.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from functrans import (
    condition,
    count,
    grad,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    log_density,
    lowp,
    observe,
    plant,
    reap,
    sample,
    sanitize,
    seed,
    sow,
    vjp,
    vmap,
)
from functrans.core.stack import interpreter_stack

X, V = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, -1.0, 2.0])
W = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])


def f(x: Tensor) -> Tensor:
    return (sow(W @ x, "product") * x).sum() + x[0] ** 2


def matrix(x: Tensor) -> Tensor:
    """The gradient of f, by hand."""
    return (W + W.T) @ x + torch.stack([2 * x[0], 0 * x[0], 0 * x[0]])


SECOND = W + W.T + torch.diag(torch.tensor([2.0, 0.0, 0.0]))

SHIPPED: dict[str, Callable[..., Any]] = {
    "reap": lambda f: lambda x: reap(f)(x)[0],
    "plant": lambda f: plant(f, {}),
    "plant a function": lambda f: plant(f, {"product": lambda y: y}),
    "count": lambda f: lambda x: count(f)(x)[0],
    "sanitize": sanitize,
    "lowp": lambda f: lowp(f, torch.bfloat16),
    "condition": lambda f: condition(f, {}),
    "seed": lambda f: seed(f, 0),
}
CORE: dict[str, tuple[Callable[..., Any], Any]] = {
    "grad": (grad, matrix(X)),
    "jvp": (lambda f: lambda x: jvp(f, (x,), (V,))[1], matrix(X) @ V),
    "vjp": (lambda f: lambda x: vjp(f, x)[1](torch.tensor(2.0))[0], 2 * matrix(X)),
    "vmap": (lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x])), torch.stack([f(X), f(2 * X)])),
    "vmap of grad": (lambda f: lambda x: vmap(grad(f))(torch.stack([x, -x])), torch.stack([matrix(X), matrix(-X)])),
    "grad of vmap": (lambda f: grad(lambda x: vmap(f)(torch.stack([x, 2 * x])).sum()), 5 * matrix(X)),
    "jacfwd": (jacfwd, matrix(X)),
    "jacrev": (jacrev, matrix(X)),
    "hessian": (hessian, SECOND),
    "hvp": (lambda f: lambda x: hvp(f, (x,), (V,))[1][0], SECOND @ V),
    "linearize": (lambda f: lambda x: linearize(f, x)[1](V), matrix(X) @ V),
}


@pytest.mark.parametrize("core", CORE)
@pytest.mark.parametrize(("one", "other"), itertools.product(SHIPPED, SHIPPED))
def test_by_twos(one: str, other: str, core: str) -> None:
    transform, expected = CORE[core]
    a, b = SHIPPED[one], SHIPPED[other]
    both_plant = one == other == "plant a function"
    programs = [transform(b(f)), b(transform(f))]
    if not both_plant:
        programs += [a(b(transform(f))), a(transform(b(f))), transform(a(b(f)))]
    for program in programs:
        torch.testing.assert_close(program(X), expected, rtol=0, atol=0)
        assert interpreter_stack() == []


def model(x: Tensor) -> Tensor:
    y = sample(Normal(W @ x, 1.0), "y")
    observe(Normal(y, 2.0), x)
    return y


@pytest.mark.parametrize("name", sorted(SHIPPED.keys() - {"plant a function"}))  # of a name that the model does not sow
def test_densities(name: str) -> None:
    a, values = SHIPPED[name], {"y": torch.tensor([2.0, 0.0, 1.0])}
    expected = -((values["y"] - W @ X) ** 2).sum() / 2 - ((X - values["y"]) ** 2).sum() / 8
    plain = lambda x: log_density(model)(values, x)
    constant = plain(X) - expected
    slope = W.T @ (values["y"] - W @ X) - (X - values["y"]) / 4
    tolerance = {"rtol": 0.02, "atol": 0.02} if name == "lowp" else {}
    for density in (a(plain), lambda x: log_density(a(model))(values, x)):
        torch.testing.assert_close(density(X) - constant, expected, **tolerance)
        torch.testing.assert_close(grad(density)(X), slope, **tolerance)
        torch.testing.assert_close(vmap(grad(density))(X.expand(2, 3)), slope.expand(2, 3), **tolerance)
    torch.testing.assert_close(a(grad(plain))(X), slope, **tolerance)
