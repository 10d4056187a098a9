"""Sparse Jacobians among other tensors: what PyTorch computes with them, in every nesting, against dense ones; and what
it does not, which says what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functrans as ft
from functrans.errors import LayoutError, MissingRuleError, SparseOperatorError
from functrans.extend import interpreter_stack

N = 5
ROWS = torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DENSE = torch.randn(N - 1, N, dtype=ROWS.dtype, generator=torch.Generator().manual_seed(1))
MATRIX = torch.randn(N, 2, dtype=ROWS.dtype, generator=torch.Generator().manual_seed(2))


def f(x: Tensor) -> Tensor:
    return x[1:] * x[:-1] + x[1:].sin()


#: of a sparse matrix, and of the same as a dense one; the result is dense
OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "dense + J": (lambda J: DENSE + J, lambda J: DENSE + J),
    "dense - J": (lambda J: DENSE - J, lambda J: DENSE - J),
    "dense * J": (lambda J: (DENSE * J).to_dense(), lambda J: DENSE * J),
    "sum": (lambda J: J.sum(), lambda J: J.sum()),
    "sparse.sum": (lambda J: torch.sparse.sum(J, 0).to_dense(), lambda J: J.sum(0)),
    "norm": (lambda J: J.norm(), lambda J: J.norm()),
    "linear": (lambda J: torch.nn.functional.linear(MATRIX.T, J), lambda J: MATRIX.T @ J.T),
    "sin": (lambda J: J.sin().to_dense(), lambda J: J.sin()),
    "J * J": (lambda J: (J * J).to_dense(), lambda J: J * J),
    "J @ J.T": (lambda J: torch.sparse.mm(J, J.t()).to_dense(), lambda J: J @ J.T),
    "sparse.mm": (lambda J: torch.sparse.mm(J, MATRIX), lambda J: J @ MATRIX),
    "select": (lambda J: J[1].to_dense(), lambda J: J[1]),
    "cat": (lambda J: torch.cat([J, J]).to_dense(), lambda J: torch.cat([J, J])),
    "values": (lambda J: J.values().sum(), lambda J: J.sum()),
}

NESTINGS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda g: ft.grad(lambda x: g(x).sin().sum())(ROWS[0]),
    "jvp": lambda g: ft.jvp(g, (ROWS[0],), (ROWS[1],)),
    "vmap": lambda g: ft.vmap(g)(ROWS),
    "vmap of grad": lambda g: ft.vmap(ft.grad(lambda x: g(x).sin().sum()))(ROWS),
    "vmap of jvp": lambda g: ft.vmap(lambda x: ft.jvp(g, (x,), (ROWS[1],)))(ROWS),
    "grad of vmap": lambda g: ft.grad(lambda rows: ft.vmap(g)(rows).sin().sum())(ROWS),
    "hessian": lambda g: ft.hessian(lambda x: g(x).sin().sum())(ROWS[0]),
    "vmap of jvp of grad": lambda g: ft.vmap(lambda x: ft.jvp(ft.grad(lambda x: g(x).sin().sum()), (x,), (ROWS[1],)))(
        ROWS
    ),
}


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("name", OPERATORS)
def test_as_with_dense_matrices(name: str, nesting: str) -> None:
    sparse, dense = OPERATORS[name]
    run = NESTINGS[nesting]
    found, expected = run(lambda x: sparse(ft.sparse_jacobian(f)(x))), run(lambda x: dense(ft.jacfwd(f)(x)))
    torch.testing.assert_close(found, expected)


def computes(operator: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether PyTorch does, outside of transforms."""
    try:
        operator(x)
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
@pytest.mark.parametrize("nesting", ["grad", "jvp", "vmap of grad"])
def test_what_pytorch_does_not_compute_says_what_to_write(nesting: str) -> None:
    run = NESTINGS[nesting]
    refused: tuple[tuple[Callable[[Tensor], Any], type[Exception], str], ...] = (
        (lambda J: J + DENSE, SparseOperatorError, r"aten\.add\.Tensor was called with a sparse tensor.*to_dense\(\)"),
        (lambda J: torch.linalg.norm(J), SparseOperatorError, r"linalg_vector_norm.*to_dense\(\)"),
        (lambda J: J.amax(), SparseOperatorError, r"amax.*to_dense\(\)"),
        (lambda J: J.to_sparse_csr() @ ROWS[0], LayoutError, r"layout torch\.sparse_csr .* Use its to_dense\(\)"),
    )
    plain, found = ft.sparse_jacobian(f)(ROWS[0]), 0
    for operator, error, message in refused:
        if error is SparseOperatorError and computes(operator, plain):  # later versions compute more
            continue
        with pytest.raises(error, match=message):
            run(lambda x, operator=operator: operator(ft.sparse_jacobian(f)(x)))
        found += 1
    assert found >= 2
    with pytest.raises(MissingRuleError, match=r"Its result is sparse: use to_dense\(\) before it"):
        ft.jvp(lambda x: torch.hspmm(ft.sparse_jacobian(f)(x), MATRIX), (ROWS[0],), (ROWS[1],))
    assert interpreter_stack() == []


def test_what_is_wrong_for_another_reason_keeps_its_text() -> None:
    with pytest.raises(RuntimeError, match=r"expected self\.size\(-1\) == vec\.size\(-1\)") as caught:
        ft.grad(lambda x: torch.mv(ft.sparse_jacobian(f)(x), ROWS[0, :3]).sum())(ROWS[0])
    assert not isinstance(caught.value, SparseOperatorError)


def test_conversions_in_the_middle() -> None:
    sparse = lambda x: (torch.outer(x, x.sin()).to_sparse().coalesce() @ x).sum()
    dense = lambda x: (torch.outer(x, x.sin()) @ x).sum()
    for nesting in ("vmap of jvp of grad", "hessian", "grad of vmap"):
        torch.testing.assert_close(NESTINGS[nesting](sparse), NESTINGS[nesting](dense))


def test_sparse_examples_of_clipped_gradients() -> None:
    examples, weights = torch.randn(4, N, dtype=ROWS.dtype) * (torch.rand(4, N) > 0.5), ROWS[0]
    loss = lambda w, x: (x * w).sum() ** 2
    gradients = ft.vmap(ft.grad(loss), in_dims=(None, 0))(weights, examples)
    norms = gradients.norm(dim=1)
    torch.testing.assert_close(ft.per_example_norms(loss)(weights, examples.to_sparse()), norms)
    clipped = ((0.5 / norms).clamp(max=1).nan_to_num(1.0).unsqueeze(1) * gradients).sum(0)
    torch.testing.assert_close(ft.clipped_grad(loss, 0.5)(weights, examples.to_sparse()), clipped)
