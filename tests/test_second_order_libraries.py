"""Derivatives of derivatives of ``torch.library`` operators, in every order of the two modes: beside closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import grad, hessian, hvp, jacfwd, jacrev, jvp, vmap

DOUBLE = torch.float64
ROWS = torch.rand(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) + 0.2
close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:vmap has no batching rule for second_order")


@torch.library.custom_op("second_order::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op("second_order::cosine", mutates_args=())
def cosine(x: Tensor) -> Tensor:
    return x.cos()


@torch.library.custom_op("second_order::exponential", mutates_args=())
def exponential(x: Tensor) -> Tensor:
    return x.exp()


@torch.library.custom_op("second_order::product", mutates_args=())
def product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * y, x / y


def saved(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def divided(ctx: Any, of_product: Tensor, of_quotient: Tensor) -> tuple[Tensor, Tensor]:
    x, y = ctx.saved_tensors
    return of_product * y + of_quotient / y, of_product * x - of_quotient * x / y**2


# the gradient of each of the first two is another operator of the library; that of the third is made of its output
sine.register_autograd(lambda ctx, g: g * cosine(*ctx.saved_tensors), setup_context=saved)
cosine.register_autograd(lambda ctx, g: -g * sine(*ctx.saved_tensors), setup_context=saved)
exponential.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0], setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output)
)
product.register_autograd(divided, setup_context=saved)

#: By name: a function of the library's operators, and the same of PyTorch's own.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sine": (lambda x: sine(x), lambda x: x.sin()),
    "sine, squared": (lambda x: sine(x) ** 2 * x, lambda x: x.sin() ** 2 * x),
    "of one another": (lambda x: sine(exponential(x) * cosine(x)), lambda x: (x.exp() * x.cos()).sin()),
    "its output": (lambda x: exponential(x * x), lambda x: (x * x).exp()),
    "several outputs": (
        lambda x: product(x, x.sin())[0].exp() * product(x, x + 1)[1],
        lambda x: (x * x.sin()).exp() * x / (x + 1),
    ),
}
SECOND: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
    "reverse over reverse": lambda f, x: jacrev(jacrev(lambda x: f(x).sum()))(x),
    "forward over forward": lambda f, x: jacfwd(jacfwd(lambda x: f(x).sum()))(x),
    "reverse over forward": lambda f, x: jacrev(jacfwd(lambda x: f(x).sum()))(x),
    "forward over reverse": lambda f, x: jvp(grad(lambda x: f(x).sum()), (x,), (x.flip(0),))[1],
    "hvp": lambda f, x: hvp(lambda x: f(x).sum(), (x,), (x.flip(0),))[1],
    "of a vmap": lambda f, x: jvp(vmap(grad(lambda x: f(x).sum())), (ROWS,), (ROWS.flip(0),))[1],
    "in a vmap": lambda f, x: vmap(lambda x: jvp(grad(lambda x: f(x).sum()), (x,), (x.flip(0),))[1])(ROWS),
    "third": lambda f, x: jvp(lambda x: jvp(grad(lambda x: f(x).sum()), (x,), (x,))[1], (x,), (x.flip(0),))[1],
    "third, in reverse": lambda f, x: grad(lambda x: (jvp(grad(lambda x: f(x).sum()), (x,), (x,))[1] * x).sum())(x),
}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_order(name: str, way: str) -> None:
    ours, same = FUNCTIONS[name]
    close(SECOND[way](ours, ROWS[0]), SECOND[way](same, ROWS[0]))


def test_the_oracle() -> None:
    """By differences of closed forms."""
    _, same = FUNCTIONS["several outputs"]
    step = torch.diag(torch.full((3,), 1e-6, dtype=DOUBLE))
    slopes = lambda x: grad(lambda x: same(x).sum())(x)
    rows = torch.stack([(slopes(ROWS[0] + s) - slopes(ROWS[0] - s)) / 2e-6 for s in step])
    close(SECOND["hessian"](same, ROWS[0]), rows, rtol=1e-6, atol=1e-7)
    close(SECOND["hessian"](FUNCTIONS["sine"][0], ROWS[0]), torch.diag(-ROWS[0].sin()))
