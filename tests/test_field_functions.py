"""``autograd.Function`` as users write it: methods that close over tensors of levels, writes to inputs, checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from slow_ways import close
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from functrans import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linear_transpose,
    linearize,
    vjp,
    vmap,
)
from functrans.errors import CapturedOnceError, CustomFunctionError, NonLinearError

F64 = torch.float64
X = torch.tensor([0.5, -1.2, 2.0, 0.3], dtype=F64)
W = torch.tensor([1.5, 0.4, -0.7, 2.2], dtype=F64)


# --- methods that close over what belongs to a level


def scaling(w: Tensor, setup: bool) -> type[Function]:
    """x * w, with the derivative 2 w; every method closes over ``w``."""

    class Scaling(Function):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            assert ctx.seen.shape == g.shape
            return 2 * g * w

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Tensor:
            return 2 * t * w

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.seen = inputs[0] + w

    def combined(ctx: Any, x: Tensor) -> Tensor:
        ctx.seen = x + w
        return x * w

    Scaling.forward = staticmethod((lambda x: x * w) if setup else combined)  # type: ignore[method-assign]
    if setup:
        Scaling.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    return Scaling


def slope(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


#: of x * Scaling(x): the value, and its derivatives by x
ORDERS = (lambda x, w: w * x * x, lambda x, w: 3 * w * x, lambda x, w: 4 * w + 0 * x)


@pytest.mark.parametrize("setup", [True, False])
@pytest.mark.parametrize("order", [c for n in (0, 1, 2) for c in itertools.product((grad, slope), repeat=n)])
def test_a_function_may_close_over_tensors_of_any_level(order: tuple[Any, ...], setup: bool) -> None:
    def derivative(w: Tensor) -> Callable[[Tensor], Tensor]:
        f = lambda x: scaling(w, setup).apply(x) * x
        for transform in order:
            f = transform(f)
        return f

    expected = ORDERS[len(order)]
    close(derivative(W[0])(X[0]), expected(X[0], W[0]))
    # w of vmap's level, of the level of one vmap and x of another's, of both; and of levels between the derivatives
    close(vmap(lambda x, w: derivative(w)(x))(X, W), expected(X, W))
    close(vmap(lambda w: derivative(w)(X[0]))(W), expected(X[0], W))
    close(vmap(lambda x: vmap(lambda w: derivative(w)(x))(W))(X), expected(X[:, None], W))
    close(vmap(lambda w: vmap(lambda x: derivative(w)(x))(X), out_dims=1)(W), expected(X[:, None], W))
    inner = lambda x, w: scaling(w, setup).apply(x) * x
    total = lambda x: vmap(inner)(x, W).sum()
    if order == (grad,):
        close(grad(total)(X), expected(X, W))
        close(jacrev(lambda x: vmap(inner)(x, W))(X), torch.diag(expected(X, W)))
    if order == (slope,):
        close(jacfwd(lambda x: vmap(inner)(x, W))(X), torch.diag(expected(X, W)))
    if order == (grad, slope):
        close(hessian(total)(X), torch.diag(expected(X, W)))


def test_other_levels_between() -> None:
    f = lambda x, w: scaling(w, True).apply(x) * x
    batched = lambda x, w: vmap(f)(x, w)
    close(functionalize(batched)(X, W), W * X * X)
    close(functionalize(vmap(grad(f)))(X, W), 3 * W * X)
    close(vmap(functionalize(grad(f)))(X, W), 3 * W * X)
    close(grad(lambda x: functionalize(batched)(x, W).sum())(X), 3 * W * X)
    close(linearize(lambda x: batched(x, W), X)[1](X), 3 * W * X * X)
    close(linearize(batched, X, W)[1](X, W), 3 * W * X * X)  # by w there is none
    close(vmap(lambda x, w: linearize(lambda x: f(x, w), x)[1](x))(X, W), 3 * W * X * X)
    with pytest.raises(CustomFunctionError, match=r"closes over a tensor of linear_transpose"):  # which is not 0
        linear_transpose(lambda w: scaling(w, True).apply(X), W)
    x = X.clone().requires_grad_()
    close(torch.autograd.grad(batched(x, W).sum(), x)[0], 3 * W * X)


def test_what_is_closed_over_is_a_constant_and_backward_is_differentiated() -> None:
    """As in PyTorch, where forward records nothing and backward what it computes."""
    f = lambda x, w: scaling(w, True).apply(x) * x
    x, w = X[0].clone().requires_grad_(), W[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x, w), x, create_graph=True)
    (mixed,) = torch.autograd.grad(g, w)
    assert grad(f, 1)(X[0], W[0]) == 0
    close(grad(lambda w: grad(f)(X[0], w))(W[0]), mixed)
    close(vmap(grad(lambda w, x: grad(f)(x, w)))(W, X), 2 * X)


def test_a_view_that_is_closed_over_is_up_to_date() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        w = w * 1
        part = w[0]
        w.mul_(3)
        return scaling(part, True).apply(x)

    close(vmap(f)(X, W[:, None]), 3 * X * W)
    close(grad(f)(X[0], W[:1]), 6 * W[0])


def test_a_vmap_staticmethod_that_closes_over_a_batch_is_refused() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        class Own(Function):
            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return x * w

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                pass

            @staticmethod
            def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
                return x * w, 0

        return Own.apply(x)

    with pytest.raises(CustomFunctionError, match="closes over a batched tensor in its vmap staticmethod"):
        vmap(f)(X, W)


def test_a_function_is_not_taken_for_linear() -> None:
    with pytest.raises(NonLinearError, match="nothing says of an autograd.Function that it is linear"):
        linear_transpose(scaling(W, True).apply, X)


# --- writes to inputs


class Tripled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float = 3.0) -> Tensor:
        ctx.mark_dirty(x.mul_(factor))
        ctx.factor = factor
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.factor * g, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:
        return t.mul_(ctx.factor)


class Swapped(Function):
    """The second input is scaled in place, and comes first."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return y.mul_(2), x + 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_dirty(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Any:
        return h, 2 * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor, u: Tensor) -> Any:
        return 2 * u, t


class Exponential(Function):
    """It reads numbers, and so has to be run on those at every depth."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        numbers = x.numpy()
        np.exp(numbers, numbers)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_dirty(*inputs)
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t.mul_(ctx.saved_tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Exponential.apply(x), in_dims[0]


def exponential(x: Tensor) -> Tensor:
    y = x * 2
    z = Exponential.apply(y)
    assert z is y
    return (z * x).sum() + y[0]


def tripled(x: Tensor) -> Tensor:
    y = x * 1
    before, view = y.sin(), y[:2]
    z = Tripled.apply(y)
    assert z is y
    return (y * z).sum() + before.sum() + view.sum()


def swapped(x: Tensor) -> Tensor:
    y = x * 1
    first, second = Swapped.apply(x, y)
    assert first is y
    return (first * second).sum() + y[0]


WRITING = {
    tripled: lambda x: (9 * x * x).sum() + x.sin().sum() + 3 * x[:2].sum(),
    swapped: lambda x: (2 * x * (x + 1)).sum() + 2 * x[0],
    exponential: lambda x: ((2 * x).exp() * x).sum() + (2 * x[0]).exp(),
}


@pytest.mark.parametrize("f", WRITING)
def test_functions_that_write_to_their_inputs(f: Callable[[Tensor], Tensor]) -> None:
    x = X.clone().requires_grad_()
    value = WRITING[f](x)
    (slopes,) = torch.autograd.grad(value, x, create_graph=True)
    rows = torch.stack([X, 2 * X, -X])
    loop = [WRITING[f](row) for row in rows]
    close(f(X), value.detach())
    close(grad(f)(X), slopes.detach())
    close(jvp(f, (X,), (W,))[1], (slopes @ W).detach())
    close(vmap(f)(rows), torch.stack(loop))
    close(vmap(f, in_dims=1)(rows.T), torch.stack(loop))
    expected = torch.stack([grad(WRITING[f])(row) for row in rows])
    close(vmap(grad(f))(rows), expected)
    close(grad(lambda rows: vmap(f)(rows).sum())(rows), expected)
    close(hessian(f)(X), torch.autograd.functional.hessian(WRITING[f], X))


def test_the_callers_tensor_is_written() -> None:
    for transformed in (
        lambda x: grad(lambda x: Tripled.apply(x).sum())(x),
        lambda x: vmap(Tripled.apply)(x),
        lambda x: vjp(Tripled.apply, x),
        lambda x: jvp(Tripled.apply, (x,), (X,)),
    ):
        x = X.clone()
        transformed(x)
        close(x, 3 * X)
    x = X.clone()
    assert grad(lambda s: (Tripled.apply(x) * s).sum())(torch.tensor(1.0, dtype=F64)) == (3 * X).sum()
    close(x, 3 * X)
    with pytest.raises(CapturedOnceError):  # a loop would multiply three times
        vmap(lambda s: Tripled.apply(x) * s)(torch.ones(3, dtype=F64))


def test_writes_that_are_not_declared_are_refused() -> None:
    class Undeclared(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.mul_(3).clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 3 * g

    class Elsewhere(Undeclared):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            mark(ctx, x)
            return x

    mark = lambda ctx, x: ctx.mark_dirty(x)
    with pytest.raises(CustomFunctionError, match="writes to an input in its forward"):
        grad(lambda x: Undeclared.apply(x * 1).sum())(X)
    with pytest.raises(CustomFunctionError, match=r"declare the write with ctx.mark_dirty in the method itself"):
        grad(lambda x: Elsewhere.apply(x * 1).sum())(X)


# --- checkpoints

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
ROWS = torch.randn(4, 3, dtype=F64)
WEIGHTS = {name: p.detach() for name, p in NET.named_parameters()}

CHECKPOINTED: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: grad(lambda x: f(x).sum())(ROWS[0]),
    "jvp": lambda f: jvp(f, (ROWS[0],), (ROWS[1],)),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).sum()))(ROWS),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).sum())(ROWS),
    "hessian": lambda f: hessian(lambda x: f(x).sum())(ROWS[0]),
    "grad of grad": lambda f: grad(lambda x: grad(lambda y: f(y).sum())(x).square().sum())(ROWS[0]),
    "weights": lambda f: grad(lambda p: functional_call(NET, p, (ROWS,)).sum())(WEIGHTS),
    "gradients of the base": lambda f: torch.autograd.grad(vmap(f)(ROWS).sum(), list(NET.parameters())),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints_of_both_kinds(name: str, reentrant: bool) -> None:
    f = lambda x: checkpoint(NET, x, use_reentrant=reentrant)
    found, expected = CHECKPOINTED[name](f), CHECKPOINTED[name](NET)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    sequential = lambda x: checkpoint_sequential(NET, 2, x, use_reentrant=reentrant)
    torch.testing.assert_close(CHECKPOINTED[name](sequential), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_draws_the_same_numbers_again(reentrant: bool) -> None:
    dropped = lambda x: nn.functional.dropout(x, 0.5) * x
    torch.manual_seed(1)
    found = grad(lambda x: checkpoint(dropped, x, use_reentrant=reentrant).sum())(X)
    torch.manual_seed(1)
    close(found, 2 * X * nn.functional.dropout(torch.ones_like(X), 0.5))
