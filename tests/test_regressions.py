"""Bugs that programs written for torch.func found, one test each. The oracle is torch.func, or plain PyTorch in a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

import functrans
from functrans import FunctransError, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
ROWS = torch.arange(6.0, dtype=torch.float64).view(3, 2) / 4 - 0.6


def test_jacobians_of_a_scalar_by_a_scalar() -> None:
    x = X[0]
    assert jacrev(torch.sin)(x).shape == jacfwd(torch.sin)(x).shape == hessian(torch.sin)(x).shape == ()
    torch.testing.assert_close(jacrev(torch.sin)(x), x.cos())
    torch.testing.assert_close(jacfwd(lambda a: (a, a * X))(x)[0], torch.ones_like(x))
    torch.testing.assert_close(hessian(torch.sin)(x), -x.sin())


def test_jacrev_row_by_row_takes_derivatives_that_vmap_cannot_batch() -> None:
    class Double(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            assert len(cotangent.nonzero()) == 1
            return 2 * cotangent

    torch.testing.assert_close(jacrev(Double.apply, chunk_size=1)(X), 2 * torch.eye(3, dtype=X.dtype))
    with pytest.raises(FunctransError):
        jacrev(Double.apply, chunk_size=2)(X)


# --- what PyTorch's autograd outside must be told
# ----------------------------------------------------------------------


def returns_view(x: Tensor) -> None:
    vmap(lambda row: row.view(1))(x).add_(1)


def returns_argument(x: Tensor) -> None:
    vmap(lambda row: row)(x).add_(1)


def returns_view_of_primal(x: Tensor) -> None:
    vjp(lambda a: a.view(3, 1), x)[0].add_(1)


def writes_captured(x: Tensor) -> None:
    def f(a: Tensor) -> Tensor:
        x.add_(1)
        return a.sum()

    grad(f)(X)


def writes_view_of_captured(x: Tensor) -> None:
    def f(a: Tensor) -> Tensor:
        x[:2].mul_(2)
        return a.sum()

    grad(f)(X)


def writes_argument(x: Tensor) -> None:
    def f(a: Tensor) -> Tensor:
        a[:2].mul_(2)
        return a.sum()

    grad(f)(x)


@pytest.mark.parametrize(
    "program",
    [returns_view, returns_argument, returns_view_of_primal, writes_captured, writes_view_of_captured, writes_argument],
    ids=lambda program: program.__name__,
)
def test_a_write_is_noticed_by_a_backward_that_needs_the_old_value(program: Callable[[Tensor], None]) -> None:
    x, weight = X.clone(), torch.ones(3, dtype=X.dtype, requires_grad=True)
    out = (weight * x).sum()
    _, pullback = vjp(lambda w: (w * x).sum(), torch.ones(3, dtype=X.dtype))
    program(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with pytest.raises(FunctransError, match="modified in place"):
        pullback(torch.tensor(1.0, dtype=X.dtype))


# --- operators that return their argument or a view of it, as eager PyTorch does -------------------------------------

ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout_evaluating": lambda y: F.dropout(y, 0.5, training=False),
    "dropout_of_none": lambda y: F.dropout(y, 0.0, training=True),
    "alpha_dropout_evaluating": lambda y: F.alpha_dropout(y, 0.5, training=False),
    "to_same_dtype": lambda y: y.to(y.dtype),
    "to_same_device": lambda y: y.to(y.device),
    "to_like_another": lambda y: y.to(X),
    "double": lambda y: y.double(),
    "cpu": lambda y: y.cpu(),
    "type_as": lambda y: y.type_as(X),
    "contiguous": lambda y: y.contiguous(),
    "resolve_conj": lambda y: y.resolve_conj(),
    "sum_to_size": lambda y: y.sum_to_size(y.shape),
    "atleast_1d": torch.atleast_1d,
    "atleast_2d": torch.atleast_2d,
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, X[0])[0],
    "meshgrid": lambda y: torch.meshgrid(y, indexing="ij")[0],
    "to_float": lambda y: y.float(),  # a copy: the write must not reach the original
    "copy_to_same_dtype": lambda y: y.to(y.dtype, copy=True),
}


@pytest.mark.parametrize("name", ALIASES)
def test_a_write_to_what_an_operator_returned_reaches_its_argument_as_in_eager(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        z = ALIASES[name](y)
        z.mul_(3)
        return y * z.reshape(-1)[:2]

    expected = torch.stack([f(row) for row in ROWS])
    torch.testing.assert_close(vmap(f)(ROWS), expected)
    torch.testing.assert_close(vmap(lambda row: vjp(f, row)[0])(ROWS), expected)
    torch.testing.assert_close(torch.stack([jvp(f, (row,), (row,))[0] for row in ROWS]), expected)
    torch.testing.assert_close(
        vmap(jacrev(f))(ROWS), torch.stack([torch.autograd.functional.jacobian(f, row) for row in ROWS])
    )


@pytest.mark.parametrize("out_dims", [0, 1, -1])
def test_what_an_in_place_function_returns_is_the_callers_tensor(out_dims: int) -> None:
    x = ROWS.clone()
    out = vmap(Tensor.sin_, out_dims=out_dims)(x)
    torch.testing.assert_close(x, ROWS.sin())
    out.add_(1)
    torch.testing.assert_close(x, ROWS.sin() + 1)
    torch.testing.assert_close(out, x if out_dims == 0 else x.T)


# --- autograd.Function with tensors in lists and dicts ----------------------------------------------------------------


class MulAdd(Function):
    """x * parts[0] + parts[1]; as in eager mode, what the list holds is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, parts: Any) -> Tensor:
        return x * parts[0] + parts[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, parts = inputs
        ctx.save_for_backward(x, parts[0])
        ctx.save_for_forward(x, parts[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent * ctx.saved_tensors[1], None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent * ctx.saved_tensors[1]


class MulAddWithRule(MulAdd):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, parts: Any) -> Any:
        dims = in_dims[1] if isinstance(in_dims[1], list) else list(in_dims[1].values())
        assert in_dims[0] == 0 and dims == [0, 0]
        return MulAddWithRule.apply(x, parts), 0


@pytest.mark.parametrize("container", [lambda a, b: [a, b], lambda a, b: {0: a, 1: b}], ids=["list", "dict"])
@pytest.mark.parametrize("cls", [MulAdd, MulAddWithRule])
def test_functions_with_tensors_in_containers(cls: Any, container: Callable[[Any, Any], Any]) -> None:
    def f(x: Tensor) -> Tensor:
        return cls.apply(x, container(2 * x, x))

    def programs(m: Any) -> list[Any]:
        return [
            m.vmap(f)(X),
            m.grad(lambda x: f(x).sum())(X),
            m.jvp(f, (X,), (X,)),
            m.vmap(m.grad(f))(X),
            m.grad(lambda x: m.vmap(f)(x).sum())(X),
            m.vmap(lambda x: m.jvp(f, (x,), (x,))[1])(X),
        ]

    torch.testing.assert_close(programs(functrans), programs(torch.func))


def test_out_dims_of_a_functions_vmap_that_do_not_fit() -> None:
    class Wrong(MulAdd):
        generate_vmap_rule = False

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor, parts: Any) -> Any:
            return x, (0, 0)

    with pytest.raises(FunctransError, match="out_dims"):
        vmap(lambda x: Wrong.apply(x, [x, x]))(X)


# --- PyTorch's own autograd inside a transform ------------------------------------------------------------------------


def test_views_in_a_backward_by_pytorchs_engine_under_vmap() -> None:
    x = ROWS.clone().requires_grad_()
    out = torch.logsumexp(x, -1)
    got = vmap(lambda v: torch.autograd.grad(out, x, v, retain_graph=True)[0])(torch.eye(3, dtype=X.dtype))
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(lambda a: torch.logsumexp(a, -1), ROWS))


def test_models_of_which_some_are_frozen_are_not_stacked() -> None:
    models = [torch.nn.Linear(2, 2) for _ in range(3)]
    models[0].weight.requires_grad_(False)
    with pytest.raises(FunctransError, match="requires_grad"):
        functrans.stack_module_state(models)


def test_jvp_views_what_was_broadcast() -> None:
    """The tangent of a broadcast sum has other strides than the sum, and still follows its views and writes."""
    row, x, direction = torch.randn(3), torch.randn(3), torch.randn(3)

    def f(v):
        table = row + v.unsqueeze(1)
        table.view(9)[2:5].copy_(v)
        return table * table

    torch.testing.assert_close(functrans.jvp(f, (x,), (direction,)), torch.func.jvp(f, (x,), (direction,)))


@pytest.mark.parametrize("op", [torch.sin, torch.nn.functional.gelu, torch.square])
def test_a_tangent_written_to_zero_under_no_grad_keeps_its_history(op: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``zero_`` leaves no tangent, which is a tangent of zeros: written without being recorded, as its primal is."""

    def program(api: Any) -> Any:
        def inner(x: torch.Tensor) -> torch.Tensor:
            y = op(x)
            with torch.no_grad():
                y.zero_().add_(x)
            return y

        def outer(x: torch.Tensor) -> torch.Tensor:
            value, tangent = api.jvp(inner, (x,), (direction,))
            return (value * 2 + tangent).sum()

        return api.grad_and_value(outer)(point)

    point, direction = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(program(functrans), program(torch.func))
