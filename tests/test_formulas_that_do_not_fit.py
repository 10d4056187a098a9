"""What a user's formula returns has the shape and dtype of what it is the derivative of,
or is refused where it is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import FunctransError, derivative, grad, jvp, vmap
from functrans.extend import DERIVATIVES

X = torch.tensor([1.0, 2.0, 3.0])


def function(forward: Any, backward: Any, tangent: Any = None) -> Any:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return forward(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return backward(g)

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Any:
            return tangent(t)

    return Doubled.apply


def by_engine(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf).sum(), leaf)[0]


TWICE: Callable[[Tensor], Tensor] = lambda x: x * 2
TOTAL: Callable[[Tensor], Tensor] = lambda x: x.sum()

REFUSED = {
    "a sum's gradient not spread": (TOTAL, lambda g: g, r"\(\) from backward.*\(3,\)"),
    "another size": (TWICE, lambda g: torch.ones(4), r"\(4,\) from backward.*\(3,\)"),
    "a dimension in front": (TWICE, lambda g: g.reshape(3, 1), r"\(3, 1\)"),
    "a number": (TWICE, lambda g: 2.0, "a float from backward"),
}

TAKEN = {
    "to be summed, as the input was broadcast": (TWICE, lambda g: torch.stack([g, g])),
    "another float dtype": (TWICE, lambda g: g.double() * 2),
    "None": (TWICE, lambda g: None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_gradients_of_functions_that_do_not_fit(name: str) -> None:
    forward, backward, message = REFUSED[name]
    f = function(forward, backward)
    with pytest.raises(RuntimeError):
        by_engine(f, X)
    total = lambda x: f(x).sum()
    for program in (
        lambda: grad(total)(X),
        lambda: vmap(grad(total))(X.expand(2, 3)),
        lambda: grad(lambda x: vmap(f)(x).sum())(X.expand(3, 3)),
    ):
        with pytest.raises(FunctransError, match=message):
            program()


@pytest.mark.parametrize("name", TAKEN)
def test_gradients_of_functions_that_fit(name: str) -> None:
    f = function(*TAKEN[name])
    if name == "None":
        assert grad(lambda x: f(x).sum())(X).tolist() == [0, 0, 0]
        return
    expected = by_engine(f, X)
    torch.testing.assert_close(grad(lambda x: f(x).sum())(X), expected)
    torch.testing.assert_close(vmap(grad(lambda x: f(x).sum()))(X.expand(3, 3)), expected.expand(3, 3))
    # the batch is no dimension that the input was broadcast along
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(X.expand(3, 3)), expected.expand(3, 3))


@pytest.mark.parametrize(
    ("forward", "tangent", "message"),
    [
        (TOTAL, lambda t: t, r"\(3,\) from jvp.*\(\)"), (TWICE, lambda t: t.sum(), r"\(\) from jvp.*\(3,\)"),
        (TWICE, lambda t: t.double(), r"float64 tensor.*from jvp.*float32"), (TWICE, lambda t: 2.0, "a float from jvp"),
    ],
)  # fmt: skip
def test_tangents_of_functions_that_do_not_fit(forward: Any, tangent: Any, message: str) -> None:
    f = function(forward, lambda g: g, tangent)
    for program in (
        lambda: jvp(f, (X,), (X,)),
        lambda: vmap(lambda x: jvp(f, (x,), (x,)))(X.expand(3, 3)),
        lambda: jvp(vmap(f), (X.expand(3, 3),), (X.expand(3, 3),)),
    ):
        with pytest.raises(FunctransError, match=message):
            program()


# ---- entries of the derivative table


@torch.library.custom_op("functrans_tests::unfit", mutates_args=())
def unfit(x: Tensor, others: list[Tensor]) -> Tensor:
    return x * 2


@unfit.register_fake
def _(x: Tensor, others: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


@unfit.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, others: list[Tensor]) -> Any:
    return unfit(x, []), in_dims[0]


OP = torch.ops.functrans_tests.unfit.default


@pytest.fixture
def entry() -> Iterator[Callable[..., None]]:
    yield lambda **formulas: derivative(OP, **formulas)
    DERIVATIVES.remove(OP)


def run(x: Tensor) -> Tensor:
    return torch.ops.functrans_tests.unfit(x, [X])


@pytest.mark.parametrize(
    ("formula", "got"),
    [
        (lambda grad: grad.sum(), r"shape \(\)"),
        (lambda grad: torch.ones(4), r"shape \(4,\)"),
        (lambda grad: 2.0, "a float"),
        (lambda grad: (grad,), "a tuple"),
    ],
)
def test_entries_whose_cotangents_do_not_fit(entry: Any, formula: Any, got: str) -> None:
    entry(x=formula)
    with pytest.raises(
        FunctransError,
        match=rf"functrans_tests.unfit.*registered at .*{__name__}.py:\d+ has a formula for 'x'.*{got}.*\(3,\)",
    ):
        grad(lambda x: run(x).sum())(X)
    with pytest.raises(FunctransError, match=got):
        vmap(grad(lambda x: run(x).sum()))(X.expand(2, 3))


def test_entries_whose_cotangents_are_fitted(entry: Any) -> None:
    entry(x=lambda grad: torch.stack([grad, grad]).double())
    got = grad(lambda x: run(x).sum())(X)
    assert got.tolist() == [2, 2, 2] and got.dtype == torch.float32


@pytest.mark.parametrize(
    "formula",
    [lambda grad: grad, lambda grad: [grad, grad], lambda grad: [grad.sum()]],
    ids=["tensor", "too many", "shape"],
)
def test_entries_whose_lists_do_not_fit(entry: Any, formula: Any) -> None:
    entry(x=lambda grad: grad, others=formula)
    with pytest.raises(FunctransError, match="'others'"):
        grad(lambda y: torch.ops.functrans_tests.unfit(X, [y]).sum())(X)


@pytest.mark.parametrize(
    ("tangent", "got"),
    [
        (lambda x_t: x_t.sum(), r"shape \(\)"),
        (lambda x_t: x_t.double(), "float64"),
        (lambda x_t: 2.0, "a float"),
        (lambda x_t: (x_t,), "a tuple"),
    ],
)
def test_entries_whose_tangents_do_not_fit(entry: Any, tangent: Any, got: str) -> None:
    entry(x=lambda grad: 2 * grad, tangent=tangent)
    with pytest.raises(
        FunctransError, match=rf"functrans_tests.unfit.*registered at .*:\d+ has a tangent formula.*{got}.*\(3,\)"
    ):
        jvp(run, (X,), (X,))


# ---- hooks, and gradients that PyTorch computes


def test_hooks_that_do_not_fit() -> None:
    def wider(g: Tensor) -> Tensor:
        return g.expand(2, 3)

    def f(x: Tensor, hook: Any) -> Tensor:
        y = x * 2
        y.register_hook(hook)
        return y.sum()

    with pytest.raises(FunctransError, match=r"register_hook\(wider\).*\(2, 3\).*\(3,\)"):
        grad(f)(X, wider)
    with pytest.raises(FunctransError, match="float64"):
        grad(f)(X, lambda g: g.double())
    assert grad(f)(X, lambda g: g * 5).tolist() == [10, 10, 10]


@torch.library.custom_op("functrans_tests::lost", mutates_args=())
def lost(x: Tensor) -> Tensor:
    return x * x


lost.register_fake(torch.empty_like)


def without_history(ctx: Any, g: Tensor) -> Tensor:
    return 2 * torch.tensor(g.tolist()) * ctx.saved_tensors[0]


lost.register_autograd(without_history, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def test_a_pullback_that_forgets_its_cotangent_has_no_transpose() -> None:
    """Forward mode of a custom operator is its reverse formula transposed;
    a formula that cuts the history would make it 0.
    """
    torch.testing.assert_close(grad(lambda x: lost(x).sum())(X), 2 * X)
    with pytest.raises(
        FunctransError,
        match="takes a Python number .* of native derivative.lost.default. .* its derivative would be lost",
    ):
        jvp(lost, (X,), (X,))
