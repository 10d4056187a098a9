"""The normal forms of views: each declaration is what PyTorch computes, and a wrong one is found; what is made of them
agrees with a loop, with plain autograd, and with writes to the base itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import grad, vmap
from functrans.functionalization.write_back import BY_INDEX, WRITE_BACK
from functrans.interpreters.vmap.table import BATCHING_RULES
from functrans.operators import views
from functrans.operators.views import (
    CONJUGATED,
    EXPANSIONS,
    PARTS,
    PERMUTATIONS,
    SPLITS,
    SWAPS,
    Part,
    inverse,
    order_of,
)

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning", "ignore:The use of `x.T`:UserWarning")
SHAPES = [(), (3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)]
ORDERED = [*SWAPS, *PERMUTATIONS]


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Numbers that all differ."""
    return torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


def arguments(op: Any, rank: int) -> list[tuple[Any, ...]]:
    """Arguments of an operator that orders dimensions."""
    dims = range(-rank, rank)
    if op is aten.permute.default:
        return [(list(order),) for order in itertools.permutations(range(rank))] + [(list(dims[:rank]),)]
    if op in (aten.movedim.intlist, aten.moveaxis.intlist):
        pairs = list(itertools.permutations(range(rank), min(rank, 2)))
        return [(list(a), list(b)) for a in pairs for b in pairs] + [([], [])]
    if len(op._schema.arguments) > 1:
        return list(itertools.product(dims, dims)) if rank else [(0, -1)]
    return [()] if op not in (aten.t.default, aten.matrix_H.default) or rank <= 2 else []


def calls(op: Any) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    for shape in SHAPES:
        if len(shape) == 1 and (op is aten.mT.default or op in CONJUGATED):
            continue  # PyTorch refuses vectors
        for args in arguments(op, len(shape)):
            yield numbered(shape), args


def orders_so(op: Any, order: Callable[..., Any]) -> bool:
    """Whether ``op`` brings dimensions into ``order(rank, ...)``; a number has none."""
    return all(torch.equal(op(x, *args), x.permute(list(order(x.dim(), *args)))) for x, args in calls(op))


@pytest.mark.parametrize("op", ORDERED, ids=str)
def test_orders(op: Any) -> None:
    assert orders_so(op, lambda rank, *args: order_of(op, rank, *args))
    for x, args in calls(op):
        order = order_of(op, x.dim(), *args)
        assert torch.equal(op(x, *args).permute(inverse(order)), x)


WRONG_ORDERS = {
    "t": (aten.t.default, lambda rank: range(rank)),
    "transpose": (aten.transpose.int, lambda rank, a, b: sorted(range(rank), key=lambda d: (d == a % rank, d))),
    "permute, inverted": (aten.permute.default, lambda rank, dims: inverse(dims)),
    "movedim, backwards": (aten.movedim.int, lambda rank, a, b: views.moved(rank, b, a)),
    "movedim of several": (aten.movedim.intlist, lambda rank, a, b: order_of(aten.movedim.intlist, rank, a, b[::-1])),
    "numpy_T": (aten.numpy_T.default, lambda rank: order_of(aten.t.default, rank)),
    "mT": (aten.mT.default, lambda rank: range(rank)[::-1]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ORDERS)
def test_a_wrong_order_is_found(name: str) -> None:
    op, order = WRONG_ORDERS[name]
    assert not orders_so(op, order)


@pytest.mark.parametrize("wrong", [(0, 3), (-4, 0), ([0, 0], [0, 1]), ([0, 1], [1, 1]), ([0, 1], [0])], ids=str)
def test_a_movement_that_is_none(wrong: tuple[Any, Any]) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of range|a destination for each source"):
        views.moved(3, *wrong)
    x = numbered((2, 2, 3, 4))
    vmap(lambda x: x.movedim(0, 1).movedim((0, 1), (1, 0)))(x)  # their ranks are known by now
    with pytest.raises((IndexError, RuntimeError), match="out of range|movedim: "):
        vmap(lambda x: x.movedim(*wrong))(x)


# --- parts

WHERE: dict[Any, list[tuple[Any, ...]]] = {
    aten.select.int: [(0, 1), (-1, 2), (1, -1)],
    aten.slice.Tensor: [(0, 0, 1, 1), (-1, 1, 4, 2), (1, -2, 3, 1)],
    aten.diagonal.default: [(0, 0, 1), (1, -1, 0), (-1, 1, 2)],
    aten.unfold.default: [(0, 2, 1), (-1, 2, 2), (1, 3, 1)],
    aten.narrow.default: [(0, 1, 1), (-1, 0, 3), (1, -2, 2)],
}


def test_every_part_is_tried() -> None:
    assert set(WHERE) == set(PARTS)


def is_part(op: Any, part: Part) -> bool:
    """Whether ``op`` drops the dimensions that ``part`` names, and the operators beside it put things in its place."""
    names = [a.name for a in op._schema.arguments[1:]]
    if {names.index(n) for n in names if n.startswith("dim")} != set(part.dims):
        return False
    for where in WHERE[op]:
        x = numbered((2, 3, 4))
        view = op(x, *where)
        others = [d for d in range(3) if d not in {where[i] % 3 for i in part.dims}]
        if any(view.shape[i if part.drops else d] != x.shape[d] for i, d in enumerate(others)):
            return False
        if part.backward is not None:
            put = numbered(tuple(view.shape)) ** 2
            back = part.backward(put, x.shape, *where)
            if back.shape != x.shape or (back * x).sum() != (put * view).sum():  # the transpose of viewing
                return False
        if part.scatter is not None:
            written = x.clone()
            op(written, *where).copy_(put)
            if not torch.equal(part.scatter(x, put, *where), written):
                return False
    return True


@pytest.mark.parametrize("op", PARTS, ids=str)
def test_parts(op: Any) -> None:
    assert is_part(op, PARTS[op])


SELECT, DIAGONAL = PARTS[aten.select.int], PARTS[aten.diagonal.default]
WRONG_PARTS = {
    "another argument is the dimension": (aten.select.int, SELECT._replace(dims=(1,))),
    "one dimension of two": (aten.diagonal.default, DIAGONAL._replace(dims=(1,))),
    "the dimension stays": (aten.select.int, SELECT._replace(drops=False)),
    "the dimension goes": (aten.narrow.default, PARTS[aten.narrow.default]._replace(drops=True)),
    "adds where it has to replace": (
        aten.diagonal.default,
        DIAGONAL._replace(scatter=lambda x, src, *where: aten.diagonal_scatter(x, src + x.diagonal(*where), *where)),
    ),
    "another place": (
        aten.select.int,
        SELECT._replace(backward=lambda grad, shape, dim, index: aten.select_backward(grad, shape, dim, 0)),
    ),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_wrong_part_is_found(name: str) -> None:
    assert not is_part(*WRONG_PARTS[name])


# --- splits


def ways(op: Any, length: int) -> list[Any]:
    """What ``op`` may be told of the pieces of a dimension of this length."""
    if SPLITS[op] is views.piece_of_sizes:
        return [[length], [0, length], [length // 2, length - length // 2], [1] * length]
    return [1, 2, 3, length + 2]


def splits_so(op: Any, piece: Callable[..., tuple[int, int]]) -> bool:
    """Whether ``op`` returns these slices."""
    for length in (1, 3, 5, 0):
        x = numbered((2, length))
        for how in ways(op, length):
            for i, part in enumerate(op(x, how, 1)):
                start, end = piece(length, how, i)
                if not torch.equal(part, x.narrow(1, start, end - start) if start <= end else x):
                    return False
    return True


@pytest.mark.parametrize("op", SPLITS, ids=str)
def test_splits(op: Any) -> None:
    assert splits_so(op, SPLITS[op])


WRONG_SPLITS = {
    "the last piece is as long": (aten.split.Tensor, lambda length, size, i: (i * size, (i + 1) * size)),
    "chunks for their size": (aten.chunk.default, views.piece_of_size),
    "only one piece before": (aten.split.sizes, lambda length, sizes, i: (i and sizes[0], (i and sizes[0]) + sizes[i])),
}


@pytest.mark.parametrize("name", WRONG_SPLITS)
def test_a_wrong_split_is_found(name: str) -> None:
    op, piece = WRONG_SPLITS[name]
    try:
        assert not splits_so(op, piece)
    except RuntimeError as error:
        assert "exceeds dimension size" in str(error)


@pytest.mark.parametrize("op", SPLITS, ids=str)
def test_every_split_is_batched_and_written_through(op: Any) -> None:
    assert op in BATCHING_RULES and op in WRITE_BACK
    x = numbered((2, 5))
    batch = torch.stack([x, -x, 2 * x], 1)
    for how in ways(op, 5):
        count = len(op(x, how, 1))

        def weighted(x: Tensor, how: Any = how) -> Tensor:
            return sum((p.sin() ** 2).sum() * (i + 2) for i, p in enumerate(op(x, how, 1)) if i != 1)

        def written(x: Tensor, how: Any = how, last: int = count - 1) -> Tensor:
            base = x.clone()
            op(base, how, 1)[last].mul_(3)
            op(base, how, -1)[0].copy_(op(x, how, 1)[0].flip(1) * 10)
            return base

        def by_index(x: Tensor, how: Any = how, last: int = count - 1) -> Tensor:
            base, pieces = x.clone(), op(torch.arange(5), how, 0)
            if "unsafe" in str(op):  # its pieces share no memory with x
                return base
            base[:, pieces[last]] *= 3
            base[:, pieces[0]] = x[:, pieces[0]].flip(1) * 10
            return base

        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(grad(weighted)(x), torch.autograd.grad(weighted(leaf), leaf)[0])
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(by_index(leaf).sin().sum(), leaf)[0]
        torch.testing.assert_close(grad(lambda x: written(x).sin().sum())(x), expected)
        for f, alone in ((grad(weighted), grad(weighted)), (written, by_index)):
            expected = torch.stack([alone(row) for row in batch.unbind(1)])
            torch.testing.assert_close(vmap(f, in_dims=1)(batch), expected)


# --- what is made of them


@pytest.mark.parametrize("op", EXPANSIONS, ids=str)
def test_every_expansion_is_batched(op: Any) -> None:
    assert op in BATCHING_RULES and op in BY_INDEX
    x, size = numbered((3, 1)), torch.zeros(2, 3, 4) if op is aten.expand_as.default else [2, 3, 4]
    weights = numbered((2, 3, 4)).cos()
    found = vmap(grad(lambda x: (op(x.sin(), size) * weights).sum()), in_dims=1)(torch.stack([x, -x], 1))
    torch.testing.assert_close(found, torch.stack([a.cos() * weights.sum((0, 2))[:, None] for a in (x, -x)]))


@pytest.mark.parametrize("op", [*ORDERED, *PARTS], ids=str)
def test_every_view_is_batched_and_written_through(op: Any) -> None:
    assert op in BATCHING_RULES and (op in WRITE_BACK or op in BY_INDEX)
    weights = numbered((200,)).cos()
    for x, args in [((numbered((2, 3, 4))), where) for where in WHERE[op]] if op in PARTS else list(calls(op))[::3]:

        def weighted(x: Tensor, args: Any = args) -> Tensor:
            view = op(x.sin(), *args)
            return (view.flatten() * weights[: view.numel()]).sum()

        def written(x: Tensor, args: Any = args) -> Tensor:
            base = x.clone()
            view = op(base, *args)
            view.copy_(weights[: view.numel()].reshape(view.shape) * 2)
            return base

        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(weighted(leaf), leaf)[0]
        torch.testing.assert_close(grad(weighted)(x), expected)
        if op is not aten.unfold.default:  # one place several times
            torch.testing.assert_close(grad(lambda x: written(x).sum())(x), (written(x) == x).to(x.dtype))
        for where in range(x.dim() + 1):
            batch = torch.stack([x, -x, 2 * x], where)
            rows = [grad(weighted)(b) for b in batch.unbind(where)]
            torch.testing.assert_close(vmap(grad(weighted), in_dims=where)(batch), torch.stack(rows))
            if op is not aten.unfold.default:
                rows = [written(b) for b in batch.unbind(where)]
                torch.testing.assert_close(vmap(written, in_dims=where)(batch), torch.stack(rows))
