"""Programs around the operators that fold a batch, in every composition of vmap and grad,
against loops in plain PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from loop import for_each
from rule_cases import positions, quiet_thread, values
from torch import Tensor

import functrans

quiet = pytest.fixture(scope="module", autouse=True)(quiet_thread)
SIZES = (3, 2)
WEIGHTS = values(5).abs()


class Program(NamedTuple):
    """``f`` of a differentiable argument and another one, with the shapes of one example,
    or numbers below which it has positions.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    x: tuple[int, ...]
    y: tuple[int, ...]
    below: int | None = None


def conv(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: F.conv2d(x, w, **options)


def definite(x: Tensor) -> Tensor:
    return x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype)


PROGRAMS = {
    "convolution": Program(conv(padding=1), (2, 3, 5, 5), (4, 3, 3, 3)),
    "convolution of groups, with steps": Program(conv(stride=2, dilation=(1, 2), groups=2), (1, 4, 6, 7), (6, 2, 3, 2)),
    "convolution of many channels": Program(conv(), (1, 9, 4, 4), (2, 9, 3, 3)),
    "pointwise convolution": Program(conv(), (2, 9, 4, 4), (3, 9, 1, 1)),
    "transposed convolution": Program(
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1), (1, 4, 3, 3), (4, 2, 3, 3)
    ),
    "linear of many rows": Program(F.linear, (3, 64), (65, 64)),
    "matmul of many columns": Program(torch.matmul, (3, 4), (4, 18)),
    "index_select": Program(lambda x, i: x.index_select(0, i), (4, 5), (6,), 4),
    "index": Program(lambda x, i: x[i - 2], (4, 5), (6,), 4),
    "index of a matrix's columns": Program(lambda x, i: x[:, i], (4, 5), (6,), 5),
    "index_put": Program(lambda x, i: (x * 2).index_put((i,), x[:3].sin(), accumulate=True), (4, 5), (3,), 4),
    "index_add": Program(lambda x, i: (x * 2).index_add(0, i, x[:3].sin(), alpha=2), (4, 5), (3,), 4),
    "index_copy": Program(lambda x, i: x.index_copy(0, i[:1], x[1:2].sin()), (4, 5), (3,), 4),
    "index_fill": Program(lambda x, i: x.sin().index_fill(0, i, 2.0), (4, 5), (3,), 4),
    "take": Program(lambda x, i: x.take(i - 3), (4, 5), (2, 3), 20),
    "embedding": Program(lambda w, i: F.embedding(i, w, padding_idx=1), (4, 5), (2, 3), 4),
    "embedding_bag, sum": Program(lambda w, i: F.embedding_bag(i, w, mode="sum", padding_idx=1), (4, 5), (2, 3), 4),
    "embedding_bag, mean": Program(lambda w, i: F.embedding_bag(i, w, mode="mean"), (4, 5), (2, 3), 4),
    "embedding_bag, max": Program(lambda w, i: F.embedding_bag(i, w, mode="max"), (4, 5), (2, 3), 4),
    "cross_entropy": Program(F.cross_entropy, (4, 5), (4,), 5),
    "cross_entropy that ignores": Program(lambda x, t: F.cross_entropy(x, t, ignore_index=1, reduction="sum"), (4, 5),
        (4,), 5),
    "cross_entropy of one": Program(lambda x, t: F.cross_entropy(x, t, weight=WEIGHTS), (5,), (), 5),
    "cross_entropy of images": Program(F.cross_entropy, (2, 5, 3, 2), (2, 3, 2), 5),
    "nll_loss, each": Program(lambda x, t: F.nll_loss(x, t, reduction="none"), (4, 5), (4,), 5),
    "multi_margin_loss": Program(lambda x, t: F.multi_margin_loss(x, t, weight=WEIGHTS), (4, 5), (4,), 5),
    "multilabel_margin_loss": Program(F.multilabel_margin_loss, (4, 5), (4, 5), 5),
    "cdist": Program(lambda x, y: torch.cdist(x, y, p=3.0), (4, 3), (5, 3)),
    "cdist by a product": Program(torch.cdist, (30, 3), (4, 3)),
    "pdist": Program(lambda x, y: F.pdist(x * y), (5, 3), ()),
    "pdist of a large set": Program(lambda x, y: F.pdist(x * y, 3.0), (33, 8), ()),
    "circular padding": Program(lambda x, y: F.pad(x * y, (1, 2, 3, 0), mode="circular"), (2, 2, 4, 4), ()),
    "max_pool1d": Program(lambda x, y: F.max_pool1d(x * y, 3, 2, 1), (2, 11), ()),
    "max_pool2d": Program(lambda x, y: F.max_pool2d(x * y, 2), (1, 2, 6, 5), ()),
    "solve": Program(lambda a, b: torch.linalg.solve(definite(a), b), (3, 3), (3, 2)),
    "solve for a vector": Program(lambda a, b: torch.linalg.solve(definite(a), b), (3, 3), (3,)),
    "solve on the right": Program(lambda a, b: torch.linalg.solve(definite(a), b, left=False), (3, 3), (2, 3)),
    "solve for one of several": Program(lambda b, a: torch.linalg.solve(definite(a), b), (3, 2), (3, 3)),
    "solve for shared sides": Program(lambda b, a: torch.linalg.solve(definite(a), b), (3, 3), (2, 3, 3)),
    "solve_triangular": Program(
        lambda b, a: torch.linalg.solve_triangular(definite(a).triu(), b, upper=True), (3, 2), (3, 3)
    ),
    "solve_triangular on the right": Program(
        lambda b, a: torch.linalg.solve_triangular(definite(a).tril(), b, upper=False, left=False), (2, 3), (3, 3)
    ),
    "cholesky_solve": Program(lambda b, a: torch.cholesky_solve(b, torch.linalg.cholesky(definite(a))), (3, 2), (3, 3)),
    "lu_solve": Program(lambda b, a: torch.linalg.lu_solve(*torch.linalg.lu_factor(definite(a)), b), (3, 2), (3, 3)),
    "inverse and determinant": Program(
        lambda a, b: torch.linalg.inv(definite(a)) @ b * torch.linalg.slogdet(definite(a))[1], (3, 3), (3, 3)
    ),
}  # fmt: skip


def batch(shape: tuple[int, ...], below: int | None, bdims: tuple[int | None, ...], seed: int) -> Tensor:
    """Distinct examples: ``bdims`` says at which dimension each of the vmaps, from the outermost, has its batch."""
    for size, bdim in zip(reversed(SIZES), reversed(bdims)):
        if bdim is not None:
            shape = (*shape[:bdim], size, *shape[bdim:])
    return values(*shape, seed=seed) if below is None else positions(*shape, below=below, seed=seed)


Dims = tuple[int | None, ...]


def batched(vmap: Any, f: Callable[..., Any], x_dims: Dims, y_dims: Dims) -> Callable[..., Any]:
    for x_dim, y_dim in zip(reversed(x_dims), reversed(y_dims)):
        f = vmap(f, (x_dim, y_dim))
    return f


def check(program: Program, x_dims: Dims, y_dims: Dims) -> None:
    f = program.f

    def ours(f: Callable[..., Any]) -> Callable[..., Any]:
        return batched(functrans.vmap, f, x_dims, y_dims)

    def loop(f: Callable[..., Any]) -> Callable[..., Any]:
        return batched(for_each, f, x_dims, y_dims)

    x, y = batch(program.x, None, x_dims, 1), batch(program.y, program.below, y_dims, 2)

    def total(x: Tensor, y: Tensor) -> Tensor:
        return f(x, y).sin().sum()

    torch.testing.assert_close(ours(f)(x, y), loop(f)(x, y))

    def slope(x: Tensor, y: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(total(leaf, y), leaf)[0]

    torch.testing.assert_close(ours(functrans.grad(total))(x, y), loop(slope)(x, y))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loop(total)(leaf, y).sum(), leaf)
    torch.testing.assert_close(functrans.grad(lambda x: ours(total)(x, y).sum())(x), expected)
    if program.below is None:
        leaf = y.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loop(total)(x, leaf).sum(), leaf, allow_unused=True)
        torch.testing.assert_close(functrans.grad(lambda y: ours(total)(x, y).sum())(y), expected)


@pytest.mark.filterwarnings("error:vmap has no batching rule")
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_vmap(name: str) -> None:
    program = PROGRAMS[name]
    last = len(program.x), len(program.y)
    for x_dim, y_dim in {(0, 0), (0, None), (None, 0), last, (last[0], None), (None, last[1])}:
        check(program, (x_dim,), (y_dim,))


@pytest.mark.filterwarnings("error:vmap has no batching rule")
@pytest.mark.parametrize("name", PROGRAMS)
def test_two_vmaps(name: str) -> None:
    """Operands that are batched at the same levels, and at different ones."""
    program = PROGRAMS[name]
    for x_dims, y_dims in (
        ((0, 0), (0, 0)),
        ((0, None), (None, 0)),
        ((None, 0), (0, None)),
        ((0, 1 if program.x else 0), (None, 0)),
    ):
        check(program, x_dims, y_dims)


def test_every_program_is_about_distinct_examples() -> None:
    for program, bdims in itertools.product(PROGRAMS.values(), ((0, 0),)):
        x, y = batch(program.x, None, bdims, 1), batch(program.y, program.below, bdims, 2)
        assert len({tuple(row.flatten().tolist()) for row in x.flatten(0, 1)}) == SIZES[0] * SIZES[1]
        assert not y[0].equal(y[1]) or not program.y
