"""Outputs that are there for the backward pass of an operator: LU factors, statistics, logarithms of sums.

A function of ``torch`` drops them; a traced graph hands them on, and so may a program. Each output is differentiated by
itself, first by differences of values, then by differences of the first derivative, in every nesting and under vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from derivative_checker import Call
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from functrans import grad, jet, jvp, vmap
from functrans.derivatives import lu_factors
from functrans.derivatives.nuclear import lyapunov, nuclear, polar
from functrans.derivatives.table import DERIVATIVES
from functrans.extend import RuleTable, TableInterpreter, derivative, overriding, run_transformed
from functrans.operators.factors import SEEN

aten = torch.ops.aten
Line = Callable[[Tensor], Tensor]


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1


def is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def along(g: Line) -> Line:
    return lambda t: jvp(g, (t,), (torch.ones_like(t),))[1]


def difference(g: Line, t: float = 0.0) -> Tensor:
    """Central, and extrapolated once."""
    at = lambda h: g(torch.tensor(h, dtype=torch.float64))
    by = lambda h: (at(t + h) - at(t - h)) / (2 * h)
    return (4 * by(1e-4) - by(2e-4)) / 3


def line(f: Callable[..., Any], call: Call, output: int, prepared: Callable[[int, Tensor], Tensor]) -> Line:
    """A number of a number: the arguments move along a curve, and one output is weighted."""
    flat, spec = tree_flatten((call.args, call.kwargs))
    directions = {i: tensor(*a.shape, seed=i + 1, dtype=a.dtype) - 0.5 for i, a in enumerate(flat) if is_number(a)}

    def at(t: Tensor) -> Tensor:
        moved = list(flat)
        for i, v in directions.items():
            moved[i] = prepared(i, flat[i] + t * v + t * t * v.flip(tuple(range(v.dim()))))
        args, kwargs = tree_unflatten(moved, spec)
        out = f(*args, **kwargs)
        out = out if isinstance(out, Tensor) else list(filter(is_number, out))[output]
        parts = torch.view_as_real(out) if out.is_complex() else out
        return (parts * torch.cos(torch.arange(parts.numel(), dtype=torch.float64)).view(parts.shape)).sum()

    return at


def check(g: Line) -> None:
    """Both orders, and batches."""
    zero = torch.zeros((), dtype=torch.float64)
    first, close = along(g), torch.testing.assert_close
    for found in (first(zero), grad(g)(zero)):
        close(found, difference(g), rtol=1e-6, atol=1e-6)
    slope = difference(first)
    for second in (along(first), grad(first), along(grad(g)), grad(grad(g))):
        close(second(zero), slope, rtol=1e-5, atol=1e-5)
    rows = torch.tensor([0.0, 0.01, -0.02], dtype=torch.float64)
    for f in (g, first, grad(g), along(grad(g)), grad(first)):
        close(vmap(f)(rows), torch.stack([f(t) for t in rows]))


def turned(x: Tensor) -> Tensor:
    """The same numbers, column by column in memory."""
    return x.mT.contiguous().mT


as_it_is = lambda i, x: x
column_by_column = lambda i, x: turned(x) if i == 0 else x
SQUARE, SIDES, COLUMNS, PIXELS = tensor(3, 3), tensor(3, 2), tensor(5, 3), tensor(1, 2, 4, 4)
COMPLEX = torch.complex(SQUARE, tensor(3, 3, seed=9))
BATCH = tensor(2, 3, 3, seed=4) + torch.eye(3, dtype=torch.float64)
W, B = tensor(3, seed=5), tensor(3, seed=6)
HEADS = tuple(tensor(1, 2, 4, 3, seed=s) for s in (7, 8, 9))

STATISTICS = (COLUMNS, W, B, W - B, W + B)
LABELS, IMAGE = torch.tensor([0, 2, 2, 1, 0]), torch.tensor([[[0, 1, 1, 0]] * 4])

#: operator, arguments, how many outputs are numbers
CALLS: dict[str, tuple[Any, Call, int]] = {
    name: (call.op, call, outputs)
    for name, call, outputs in (
        ("det", Call(aten._linalg_det.default, (SQUARE,)), 2),
        ("slogdet", Call(aten._linalg_slogdet.default, (SQUARE,)), 3),
        ("slogdet, complex", Call(aten._linalg_slogdet.default, (COMPLEX,)), 3),
        ("slogdet, a batch", Call(aten._linalg_slogdet.default, (BATCH,)), 3),
        ("solve", Call(aten._linalg_solve_ex.default, (SQUARE, SIDES)), 2),
        ("solve, complex", Call(aten._linalg_solve_ex.default, (COMPLEX, COMPLEX)), 2),
        ("solve, from the right", Call(aten._linalg_solve_ex.default, (SQUARE, SIDES.mT), {"left": False}), 2),
        ("solve, a vector", Call(aten._linalg_solve_ex.default, (SQUARE, W)), 2),
        ("lu_factor", Call(aten.linalg_lu_factor_ex.default, (SQUARE,)), 1),
        ("log_sigmoid", Call(aten.log_sigmoid_forward.default, (SQUARE - 0.5,)), 2),
        ("layer_norm", Call(aten.native_layer_norm.default, (COLUMNS, [3], W, B, 1e-3)), 3),
        ("group_norm", Call(aten.native_group_norm.default, (PIXELS, W[:2], B[:2], 1, 2, 16, 1, 1e-3)), 3),
        ("batch_norm", Call(aten.native_batch_norm.default, (COLUMNS, W, B, None, None, True, 0.1, 1e-3)), 3),
        ("batch_norm, pure", Call(aten._native_batch_norm_legit_functional.default, (*STATISTICS, True, 0.1, 1e-3)), 3),
        ("batch_norm, traced", Call(aten._batch_norm_with_update_functional.default, (*STATISTICS, 0.1, 1e-3)), 3),
        ("nll_loss", Call(aten.nll_loss_forward.default, (COLUMNS, LABELS, W, 1, -100)), 2),
        ("nll_loss2d", Call(aten.nll_loss2d_forward.default, (PIXELS, IMAGE, W[:2], 1, -100)), 2),
        ("rms_norm", Call(aten._fused_rms_norm.default, (COLUMNS, [3], W, 1e-3)), 2),
        ("weight_norm", Call(aten._weight_norm_interface.default, (COLUMNS, tensor(5, 1, seed=2))), 2),
        ("attention", Call(aten._scaled_dot_product_flash_attention_for_cpu.default, HEADS), 2),
        ("attention, in pieces", Call(aten._scaled_dot_product_attention_math.default, HEADS), 2),
        ("max_pool", Call(aten.max_pool2d_with_indices.default, (PIXELS, [2, 2])), 1),
        ("prelu, backwards", Call(aten._prelu_kernel_backward.default, (SQUARE, SQUARE.T - 0.5, SQUARE.flip(0))), 2),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_output(name: str) -> None:
    op, call, outputs = CALLS[name]
    for output in range(outputs):
        check(line(op, call, output, as_it_is))


@pytest.mark.parametrize("name", ["batch_norm, pure", "batch_norm, traced"])
def test_running_statistics_are_constants(name: str) -> None:
    """As in PyTorch: a traced graph writes them to buffers, which would keep the derivative of every batch."""
    op, call, _ = CALLS[name]
    x, *rest = call.args
    for output in (-1, -2):
        f = lambda x, output=output: op(x, *rest)[output].sum()
        assert not grad(f)(x).any() and not jvp(f, (x,), (x,))[1].any()
        assert not f(x.clone().requires_grad_()).requires_grad
        assert f(2 * x) != f(x)


@pytest.mark.parametrize("name", ["det", "slogdet", "slogdet, complex", "slogdet, a batch", "solve"])
def test_factors_of_what_lies_column_by_column(name: str) -> None:
    """The factors of determinants are those of another matrix then."""
    op, call, outputs = CALLS[name]
    check(line(op, call, outputs - 1, column_by_column))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("op, place", [(aten._linalg_det.default, 1), (aten._linalg_slogdet.default, 2)], ids=str)
def test_batches_of_factors_in_any_layout(op: Any, place: int, dim: int) -> None:
    factors = lambda a: op(a)[place]
    moved = lambda a: jvp(factors, (a,), (a * a,))[1]
    stacked = torch.stack([SQUARE, SQUARE.T + 1, SQUARE @ SQUARE], dim)
    for batch in (stacked, stacked.transpose(0, -1).contiguous().transpose(0, -1)):
        for f in (factors, moved):
            torch.testing.assert_close(vmap(f, in_dims=dim)(batch), torch.stack([f(a) for a in batch.unbind(dim)]))


def test_taylor_mode_follows_factors() -> None:
    """Of what is returned, as of the result; nested forward mode is the oracle."""
    for name in ("det", "slogdet", "solve"):
        op, call, outputs = CALLS[name]
        g = line(op, call, outputs - 1, as_it_is)
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        _, series = jet(g, (zero,), ([one, 0 * one, 0 * one],))
        for found, wanted in zip(series, (along(g), along(along(g)), along(along(along(g)))), strict=True):
            torch.testing.assert_close(found, wanted(zero))


def test_functions_do_not_pay_for_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward mode computes no tangent of factors that the function drops, at any level, and asks again afterwards."""
    seen = []
    factors = lu_factors.factors
    monkeypatch.setattr(lu_factors, "factors", lambda M: seen.append(M) or factors(M))

    def run(a: Tensor) -> Tensor:
        return torch.linalg.det(a) + torch.logdet(a) + torch.linalg.solve(a, W).sum() + torch.linalg.inv(a).sum()

    definite, zero = SQUARE @ SQUARE.T + torch.eye(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    twice = along(along(lambda t: run(definite + t * SQUARE)))
    assert vmap(twice)(torch.stack([zero, zero + 0.1])).isfinite().all()
    assert seen == []
    jvp(aten._linalg_det.default, (SQUARE,), (SQUARE,))
    assert len(seen) == 1
    assert SEEN.factors
    with pytest.raises(RuntimeError, match="must be batches of square matrices"):
        jvp(torch.linalg.det, (SIDES,), (SIDES,))
    assert SEEN.factors


def test_a_transform_of_the_users_may_look_at_factors() -> None:
    """``det`` drops them; a rule for what it is made of need not."""

    class Pivots(TableInterpreter):
        kind, payload = "pivots", ("mark",)
        rules = RuleTable("pivots")

    @Pivots.rules.register(aten._linalg_det.default)
    def product_of_pivots(pivots: Any, A: Tensor) -> Any:
        value, LU, places = aten._linalg_det.default(A.value)
        signed = LU.diagonal().prod() * value.sign().detach() * LU.diagonal().prod().sign().detach()
        return tuple(pivots.carry(x, mark=1) for x in (signed, LU, places))

    def through(A: Tensor) -> Tensor:
        pivots = Pivots(through)
        return run_transformed(pivots, lambda: pivots.own(torch.linalg.det(pivots.carry(A, mark=1))).value)

    for f in (lambda t: through(SQUARE + t * SQUARE.T), lambda t: torch.linalg.det(SQUARE + t * SQUARE.T)):
        check(f)
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(
        along(lambda t: through(SQUARE + t * W))(zero), along(lambda t: torch.linalg.det(SQUARE + t * W))(zero)
    )


def hermitian(i: int, x: Tensor) -> Tensor:
    """The first argument made Hermitian and definite."""
    return x @ x.mH + torch.eye(3, dtype=x.dtype) if i == 0 else x


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_matrix_operators_of_ours(dtype: torch.dtype) -> None:
    """That the first argument of ``lyapunov`` is Hermitian is asked for, and so is it of its tangents."""
    square, tall = SQUARE.to(dtype), COLUMNS.to(dtype)
    if dtype.is_complex:
        square, tall = square + 1j * SQUARE.T, tall + 1j * COLUMNS.flip(0)
    check(line(lyapunov, Call(lyapunov, (square, square.T)), 0, hermitian))
    for op in (polar, nuclear):
        check(line(op, Call(op, (tall,)), 0, as_it_is))


def test_a_lost_output_is_found() -> None:
    op, call, _ = CALLS["log_sigmoid"]
    with overriding(DERIVATIVES, op):
        derivative(
            op,
            tangent=lambda self, self_t: (self_t * torch.sigmoid(-self), None),
            self=lambda grads, self: None if grads[0] is None else grads[0] * torch.sigmoid(-self),
        )
        check(line(op, call, 0, as_it_is))
        with pytest.raises(AssertionError):
            check(line(op, call, 1, as_it_is))
