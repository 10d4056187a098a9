"""``scatter_reduce`` and ``index_reduce``, in every mix of forward and reverse mode, with zeros among the factors."""

from __future__ import annotations

import pytest
import torch
from four_mixes import along, check_mixes
from torch import Tensor

from functrans import grad, jvp, vmap

INDEX = torch.tensor([0, 2, 0, 2, 0])
REDUCTIONS = ("prod", "sum", "mean", "amax", "amin")


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


FACTORS = {
    "no zero": vector(0.7, -1.2, 2.1, 0.4, -0.9),
    "one": vector(0.7, -1.2, 0, 0.4, -0.9),
    "two at one place": vector(0, -1.2, 0, 0.4, 1.3),
    "at every place": vector(0, 0, 0.4, 0, 1.1),
    "all": vector(0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("moving", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("start", [vector(1.5, -0.3, 0.8), vector(0, 0.5, 0)], ids=["", "zeros in self"])
@pytest.mark.parametrize("src", FACTORS)
def test_products(src: str, start: Tensor, include_self: bool, moving: tuple[int, ...]) -> None:
    args = start, FACTORS[src]
    check_mixes(along(lambda a, b: a.scatter_reduce(0, INDEX, b, "prod", include_self=include_self), args, moving))
    check_mixes(
        along(lambda a, b: a.index_reduce(0, INDEX, b, "prod", include_self=include_self), args, moving), order=2
    )


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_matrices(dim: int, reduce: str, include_self: bool) -> None:
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, dtype=torch.float64, generator=make) for _ in range(2))
    # an index may speak of a part of src; PyTorch has no derivative then
    for index in (torch.tensor([[0, 1, 2, 1], [2, 1, 0, 0], [0, 0, 0, 1]]), torch.tensor([[0, 1], [2, 1]])):
        f = along(lambda a, b, index=index: a.scatter_reduce(dim, index, b, reduce, include_self=include_self), (a, b))
        check_mixes(f, radius=0.01, rtol=1e-4)
    rows = torch.tensor([0, 2, 2] if dim == 0 else [0, 2, 2, 1])
    if reduce != "sum":
        check_mixes(
            along(lambda a, b: a.index_reduce(dim, rows, b, reduce, include_self=include_self), (a, b)),
            radius=0.01,
            rtol=1e-4,
        )


@pytest.mark.parametrize("include_self", [True, False])
def test_no_dimension(include_self: bool) -> None:
    a, b = vector(0.7).reshape(()), vector(-1.3).reshape(())
    check_mixes(along(lambda a, b: a.scatter_reduce(0, torch.tensor(0), b, "prod", include_self=include_self), (a, b)))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_batches(reduce: str) -> None:
    make = torch.Generator().manual_seed(0)
    a, b, t = (torch.randn(4, n, dtype=torch.float64, generator=make) for n in (3, 5, 5))
    index = torch.randint(0, 3, (4, 5), generator=make)

    def f(a: Tensor, index: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return jvp(lambda b: a.scatter_reduce(0, index, b, reduce), (b,), (t,))[1]

    torch.testing.assert_close(
        vmap(f)(a, index, b, t), torch.stack([f(*row) for row in zip(a, index, b, t, strict=True)])
    )


def test_tangent_of_a_product() -> None:
    f = lambda s: torch.ones(1).scatter_reduce(0, torch.tensor([0, 0]), s, "prod")
    assert jvp(f, (torch.tensor([2.0, 3.0]),), (torch.ones(2),))[1].tolist() == [5]


def test_ties_share_evenly() -> None:
    for reduce in ("amax", "amin"):
        f = lambda a, b, reduce=reduce: a.scatter_reduce(0, torch.tensor([0, 0]), b, reduce)
        a, b = vector(1, 5), vector(1, 1)
        assert jvp(f, (a, b), (vector(3, 7), vector(6, 9)))[1].tolist() == [6, 7]
        # what is excluded does not share
        f = lambda a, b, reduce=reduce: a.scatter_reduce(0, torch.tensor([0, 0]), b, reduce, include_self=False)
        assert jvp(f, (a, b), (vector(3, 7), vector(6, 9)))[1].tolist() == [7.5, 7]


# ------------------------------------------------------------------------------------------- segments

SEGMENTS = {
    "lengths": {"lengths": torch.tensor([2, 0, 3])},
    "lengths that leave some out": {"lengths": torch.tensor([2, 0, 1]), "unsafe": True},
    "offsets": {"offsets": torch.tensor([0, 2, 2, 5])},
    "offsets that leave some out": {"offsets": torch.tensor([1, 2, 2, 4])},
    "of each row": {"lengths": torch.tensor([[1, 0, 4], [2, 2, 1]]), "axis": 1},
    "of each row, from the end": {"offsets": torch.tensor([[0, 1, 1, 5], [0, 2, 4, 5]]), "axis": -1},
}


@pytest.mark.parametrize("initial", [None, 0.5])
@pytest.mark.parametrize(
    ("reduce", "factors"),
    [*(("prod", name) for name in FACTORS), *((reduce, "no zero") for reduce in ("sum", "mean", "max", "min"))],
)
@pytest.mark.parametrize("name", SEGMENTS)
def test_segment_reduce(name: str, reduce: str, factors: str, initial: float | None) -> None:
    """Empty segments are left out of what is compared: their mean is NaN."""
    data, segments = FACTORS[factors], SEGMENTS[name]
    if "axis" in segments:
        data = torch.stack([data, data.flip(0)])
    elif reduce == "prod":
        data = data[:, None].expand(5, 2)
    run = lambda x: torch.segment_reduce(x, reduce, initial=initial, **segments).nan_to_num(0, 0, 0)
    check_mixes(
        along(run, (data,)), order=3 if reduce == "prod" and name == "lengths" else 2, rtol=1e-4, atol=1e-6, radius=0.05
    )


@pytest.mark.filterwarnings("error:vmap has no batching rule")
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_a_batch_with_segments_that_are_shared_is_one_call(name: str, reduce: str) -> None:
    segments = SEGMENTS[name]
    shape = (4, 2, 5) if "axis" in segments else (4, 5, 2)
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    run = lambda x: torch.segment_reduce(x, reduce, **segments)
    for dim in (0, 2):
        got = vmap(run, in_dims=dim)(batch.movedim(0, dim))
        torch.testing.assert_close(got, torch.stack([run(x) for x in batch]), equal_nan=True)
    with pytest.raises(RuntimeError, match="sum of lengths|Expected"):
        vmap(lambda x: torch.segment_reduce(x, reduce, lengths=torch.tensor([1, 2])))(torch.ones(4, 5))


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
@pytest.mark.parametrize("reduce", ["sum", "mean", "prod", "max", "min"])
def test_segments_of_a_batch(reduce: str) -> None:
    """Data alone, and lengths of each example."""
    data, lengths = (
        torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[2, 0, 3], [1, 1, 3], [5, 0, 0]]),
    )
    f = lambda x, lengths: torch.segment_reduce(x, reduce, lengths=lengths, initial=0.5).sin().sum()
    for in_dims in ((0, 0), (0, None)):
        rows = [(x, lengths[i] if in_dims[1] == 0 else lengths[0]) for i, x in enumerate(data)]
        got = vmap(grad(f), in_dims)(data, lengths if in_dims[1] == 0 else lengths[0])
        leaves = [x.clone().requires_grad_() for x, _ in rows]
        for leaf, (_, n) in zip(leaves, rows, strict=True):
            f(leaf, n).backward()
        torch.testing.assert_close(got, torch.stack([leaf.grad for leaf in leaves]))


def test_equal_elements_share_a_maximum_as_in_pytorch() -> None:
    x = vector(1.0, 3.0, 3.0, -1.0)
    for initial, expected in ((None, [0.0, 0.5, 0.5, 0.0]), (3.0, [0.0, 0.5, 0.5, 0.0]), (4.0, [0.0, 0.0, 0.0, 0.0])):
        run = lambda x, initial=initial: torch.segment_reduce(
            x, "max", lengths=torch.tensor([4]), initial=initial
        ).sum()
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        assert grad(run)(x).tolist() == expected == leaf.grad.tolist()
