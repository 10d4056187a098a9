"""Products, sums and softmax with sparse matrices, captured or of each example: batched, and differentiated."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, sparse

import functrans as ft
from functrans.interpreters.vmap import one_by_one

generator = torch.Generator().manual_seed(0)
random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
DENSE = random(3, 4) * torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]])
COO, CSR = DENSE.to_sparse(), DENSE.to_sparse_csr()
PLACES = COO.indices()
VALUES, RIGHT, LEFT, VECTORS, START = random(5, 7), random(5, 4, 2), random(5, 2, 3), random(5, 4), random(5, 3, 2)


def own(values: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(PLACES, values, DENSE.shape, is_coalesced=True, check_invariants=False)


def filled(values: Tensor) -> Tensor:
    """The same matrix, dense."""
    return values.new_zeros(DENSE.shape).index_put((PLACES[0], PLACES[1]), values)


def by_rows(dense: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``reduce`` makes of the rows of ``dense`` that each row of the matrix has, each by its factor."""
    return torch.stack([reduce(row[row != 0].unsqueeze(1) * dense[row != 0]) for row in DENSE])


def over_entries(dense: Tensor, dim: int, log: bool = False) -> Tensor:
    """softmax among the entries alone."""
    shares = dense.masked_fill(DENSE == 0, -torch.inf)
    found = shares.log_softmax(dim) if log else shares.softmax(dim)
    return torch.where(DENSE == 0, 0, found)


#: with sparse matrices, the same with dense ones, and what it is computed of; the results are dense
PROGRAMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "mm": (lambda d: COO @ d, lambda d: DENSE @ d, (RIGHT,)),
    "mm, CSR": (lambda d: CSR @ d, lambda d: DENSE @ d, (RIGHT,)),
    "mm from the left": (lambda d: d @ COO, lambda d: d @ DENSE, (LEFT,)),
    "mv": (lambda v: COO @ v, lambda v: DENSE @ v, (VECTORS,)),
    "sparse.mm": (lambda d: sparse.mm(COO, d), lambda d: DENSE @ d, (RIGHT,)),
    "sparse.mm of each": (lambda v, d: sparse.mm(own(v), d), lambda v, d: filled(v) @ d, (VALUES, RIGHT)),
    "of each by one": (lambda v: own(v) @ RIGHT[0], lambda v: filled(v) @ RIGHT[0], (VALUES,)),
    "addmm": (lambda a, d: torch.addmm(a, COO, d), lambda a, d: a + DENSE @ d, (START, RIGHT)),
    "sparse.addmm": (
        lambda a, d: sparse.addmm(a, COO, d, beta=0.5, alpha=2.0),
        lambda a, d: a / 2 + 2 * DENSE @ d,
        (START, RIGHT),
    ),
    "sparse.addmm, CSR": (lambda d: sparse.addmm(START[0], CSR, d), lambda d: START[0] + DENSE @ d, (RIGHT,)),
    "smm": (lambda d: torch.smm(COO, d).to_dense(), lambda d: DENSE @ d, (RIGHT,)),
    "sparse by sparse": (
        lambda v: sparse.mm(own(v), COO.t()).to_dense(),
        lambda v: filled(v) @ DENSE.t(),
        (VALUES,),
    ),
    "sparse by sparse, of each": (
        lambda v, w: sparse.mm(own(v).t(), own(w)).to_dense(),
        lambda v, w: filled(v).t() @ filled(w),
        (VALUES, VALUES.flip(0)),
    ),
    "sum by rows": (lambda d: sparse.mm(CSR, d, "sum"), lambda d: DENSE @ d, (RIGHT,)),
    "mean by rows": (lambda d: sparse.mm(CSR, d, "mean"), lambda d: by_rows(d, lambda r: r.mean(0)), (RIGHT,)),
    "maximum by rows": (lambda d: sparse.mm(CSR, d, "amax"), lambda d: by_rows(d, lambda r: r.amax(0)), (RIGHT,)),
    "minimum by rows": (lambda d: sparse.mm(CSR, d, "amin"), lambda d: by_rows(d, lambda r: r.amin(0)), (RIGHT,)),
    "sum": (lambda v: sparse.sum(own(v), 0).to_dense(), lambda v: filled(v).sum(0), (VALUES,)),
    "softmax": (lambda v: sparse.softmax(own(v), 1).to_dense(), lambda v: over_entries(filled(v), 1), (VALUES,)),
    "softmax along 0": (
        lambda v: sparse.softmax(own(v), 0).to_dense(),
        lambda v: over_entries(filled(v), 0),
        (VALUES,),
    ),
    "log_softmax": (
        lambda v: sparse.log_softmax(own(v), -1).to_dense(),
        lambda v: over_entries(filled(v), 1, log=True),
        (VALUES,),
    ),
    "to_sparse": (lambda d: d.to_sparse().to_dense(), lambda d: d, (RIGHT,)),
    "to_sparse, by rows": (lambda d: d.to_sparse(1).to_dense(), lambda d: d, (RIGHT,)),
    "sparse_mask": (
        lambda a: (a @ a.t()[:, :1].expand(-1, 4)).sparse_mask(COO).to_dense(),
        lambda a: torch.where(DENSE != 0, a @ a.t()[:, :1].expand(-1, 4), 0),
        (START,),
    ),
    "a layer of a graph network": (
        lambda x, w: sparse.mm(COO.t(), sparse.mm(COO, x @ w).relu()).sum(),
        lambda x, w: (DENSE.t() @ (DENSE @ x @ w).relu()).sum(),
        (RIGHT, random(5, 2, 3)),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_batched_at_once(name: str) -> None:
    program, dense, batches = PROGRAMS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a loop over the examples
        warnings.filterwarnings("ignore", "Sparse invariant checks")
        found = ft.vmap(program)(*batches)
        inside = ft.vmap(program, in_dims=(-1, *[0] * (len(batches) - 1)))(batches[0].movedim(0, -1), *batches[1:])
    by_hand = torch.stack([dense(*example) for example in zip(*batches, strict=True)])
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(inside, by_hand)


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
@pytest.mark.parametrize("name", PROGRAMS)
def test_derivatives(name: str) -> None:
    program, dense, batches = PROGRAMS[name]
    every = tuple(range(len(batches)))
    example = tuple(batch[0] for batch in batches)
    for run in (
        lambda f: ft.vmap(ft.grad(lambda *args: f(*args).sin().sum(), argnums=every))(*batches),
        lambda f: ft.vmap(lambda *args: ft.jvp(f, args, example))(*batches),
        lambda f: ft.grad(lambda *args: ft.vmap(f)(*args).sin().sum(), argnums=every)(*batches),
    ):
        torch.testing.assert_close(run(program), run(dense))


def test_sspaddmm() -> None:
    start = torch.eye(3, 2, dtype=DENSE.dtype)
    program = lambda d: torch.sspaddmm(start.to_sparse(), COO, d, beta=3, alpha=2).to_dense()
    torch.testing.assert_close(
        ft.grad(lambda d: program(d).sin().sum())(RIGHT[0]), 2 * DENSE.t() @ program(RIGHT[0]).cos()
    )


def test_a_compressed_matrix_beside_a_batch_is_taken_example_by_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_by_one, "WARNED", set())
    with pytest.warns(UserWarning, match="no batching rule for aten.add.Tensor"):
        found = ft.vmap(lambda a: a @ a.t()[:, :1].expand(-1, 4) + CSR)(START)
    torch.testing.assert_close(found, torch.stack([a @ a.t()[:, :1].expand(-1, 4) + DENSE for a in START]))
