"""Batching rules of indexing, gather, scatter and look-ups, against a loop over distinct examples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from batching_checker import Call
from rule_cases import ByHand, by_hand, compare_all, declines, positions, quiet_thread, record, rules_of, values
from torch import Tensor
from torch._ops import OpOverload

import functrans
from functrans.errors import FunctransError
from functrans.interpreters.vmap.rules import indexing, lookups, nll, scatter

aten = torch.ops.aten
OPS = rules_of(indexing, scatter, lookups, nll)
quiet = pytest.fixture(scope="module", autouse=True)(quiet_thread)


@pytest.fixture(scope="module")
def recorded(quiet: None) -> dict[OpOverload, list[Call]]:
    return record(OPS)


S, V, M, X = values(), values(4), values(3, 4), values(3, 4, 2, 5)
BELOW = (3, 4, 2, 5)
MASKS = [torch.tensor([True, False, True]), torch.tensor([False, True, True, False])]


def at(dim: int, *shape: int) -> Tensor:
    return positions(*shape, below=BELOW[dim], seed=dim)


def index_lists() -> list[list[Tensor | None]]:
    """Every choice of indexed dimensions of ``X``, with index shapes that broadcast in several ways."""
    lists: list[list[Tensor | None]] = []
    shapes = [[(3,), (3,), (3,), (3,)], [(2, 1), (3,), (), (2, 3)], [(), (), (), ()], [(2, 3), (1, 3), (2, 1), (3,)]]
    for chosen in itertools.product((False, True), repeat=4):
        if not any(chosen):
            continue
        for shape in shapes:
            indices = [at(d, *shape[d]) if used else None for d, used in enumerate(chosen)]
            while indices[-1] is None and len(lists) % 2:
                indices.pop()
            lists.append(indices)
    lists += [
        [MASKS[0]],
        [None, MASKS[1]],
        [MASKS[0], None, at(2, 2)],
        [None, MASKS[1], at(2, 2)],
        [M > 0],
        [None, at(1, 2, 1), None, torch.tensor([True, False, True, False, False])],
        [torch.tensor([-1, 0])],
        [None, torch.tensor([-1, -4]), None],
    ]
    return lists


def result_shape(indices: list[Tensor | None]) -> torch.Size:
    return aten.index.Tensor(X, indices).shape


def put_calls() -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    for k, indices in enumerate(index_lists()):
        shape = list(result_shape(indices))
        full = values(*shape)
        kinds = [full, S, values(*shape[-1:]), full[:1] if shape else S]
        calls.append((X, indices, kinds[k % 4], True))
        if k % 3 == 0 and len(indices) == 1:
            calls.append((X, indices, S, False))
    distinct = [torch.tensor([2, 0])]
    return [
        *calls,
        (X, distinct, values(2, 4, 2, 5)),
        (X, [None, *distinct, None], values(3, 2, 1, 5)),
        (M, [M > 0], S),
    ]


def mask_calls() -> list[tuple[Any, ...]]:
    """What a batched mask allows: the same value wherever it is true."""
    return [
        (M, [M > 0], S),
        (M, [M > 0], values(1)),
        (M, [MASKS[0]], S),
        (M, [MASKS[0]], V),
        (M, [MASKS[0]], values(1, 4)),
        (M, [None, MASKS[1]], values(3, 1)),
        (M, [None, MASKS[1]], values(1), True),
        (X, [None, torch.tensor([[True, False], [True, True], [False, False], [False, True]])], values(3, 1, 5)),
        (X, [None, torch.tensor([[True, False], [True, True], [False, False], [False, True]])], values(5), True),
    ]


def along(dim: int, *shape: int, below: int) -> Tensor:
    """Positions without repetition along ``dim``."""
    order = torch.argsort(torch.rand(*shape[:dim], below, *shape[dim + 1 :]), dim)
    return order.narrow(dim, 0, shape[dim])


def loss_calls(backward: bool, rank: int) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    shapes = [((4,), ()), ((5, 4), (5,)), ((0, 4), (0,))] if rank < 4 else [((3, 4, 2, 3), (3, 2, 3))]
    weights = (None, values(4).abs())
    for (shape, targets), weight, reduction, ignored in itertools.product(shapes, weights, (0, 1, 2), (-100, 1)):
        x, target = values(*shape), positions(*targets, below=4)
        if target.numel() and targets and ignored == 1:
            target.view(-1)[0] = 1
        forward = aten.nll_loss_forward.default if rank < 4 else aten.nll_loss2d_forward.default
        args = (x, target, weight, reduction, ignored)
        out, total = forward(*args)
        calls.append((values(*out.shape), *args, total + 0.5) if backward else args)
    return calls


def bag_calls() -> list[tuple[Any, ...]]:
    """Every kind of bag, empty ones among them; float32 has kernels of its own."""
    calls: list[tuple[Any, ...]] = []
    tokens, samples = torch.tensor([1, 2, 6, 0, 2, 2]), values(6).abs()
    starts = (torch.tensor([0, 2, 2, 5]), False), (torch.tensor([0, 2, 2, 5, 6]), True), (torch.tensor([0, 6]), False)
    for dtype, mode, padding, (offsets, last) in itertools.product(
        (torch.float64, torch.float32), (0, 1, 2), (-1, 2, 0), starts
    ):
        weights = (None, samples.to(dtype)) if mode == 0 else (None,)
        calls += [(values(7, 5).to(dtype), tokens, offsets, False, mode, False, w, last, padding) for w in weights]
    return calls


WEIGHT, TOKENS = values(6, 3), torch.tensor([[1, 4, 1], [5, 0, 2]])
REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")

BY_HAND: ByHand = {
    aten.index.Tensor: [(X, indices) for indices in index_lists()] + [(V, [at(1)]), (M.t(), [None, at(0, 2)])],
    aten._unsafe_index.Tensor: [(X, [None, at(1, 2), at(2, 1)])],
    aten.index_put.default: put_calls() + mask_calls(),
    aten._unsafe_index_put.default: [(X, [None, at(1, 2), at(2, 1)], values(2, 5), True)],
    aten._index_put_impl.default: [(X, [at(0, 2), None, at(2, 1)], values(2, 4, 5), True, True)],
    aten.take.default: [(M, torch.tensor([[0, -1], [5, 11]])), (M, torch.tensor(3)), (S, torch.tensor([0, 0]))],
    aten.put.default: [
        (M, torch.tensor([[0, -1], [5, 11]]), values(4), True),
        (M, torch.tensor([0, 3, 2]), values(3, 1)),
        (S, torch.tensor([0, 0]), values(2), True),
        (M.t(), torch.tensor(3), S),
    ],
    aten.masked_scatter.default: [(M, M > 0, values(3, 4)), (M, MASKS[1], values(20)), (V, M > 0, values(12)),
        (S, torch.tensor(True), V)],
    aten.gather.default: [
        (M, -1, positions(3, 7, below=4)),
        (M, 0, positions(1, 2, below=3)),
        (S, 0, torch.tensor(0)),
        (S, -1, torch.tensor([0, 0])),
        (values(1), 0, torch.tensor(0)),
        (X, 2, positions(2, 4, 3, 5, below=2)),
    ],
    aten.scatter.src: [(M, -1, along(1, 2, 3, below=4), values(3, 4)), (S, 0, torch.tensor(0), S * 2),
        (V, 0, torch.tensor(1), S)],
    aten.scatter.value: [(M, 0, along(0, 2, 4, below=3), 1.5), (S, 0, torch.tensor(0), 2)],
    aten.scatter.reduce: [(M, 1, positions(3, 4, below=4), values(3, 4), {"reduce": r}) for r in ("add", "multiply")],
    aten.scatter.value_reduce: [(M, -1, positions(3, 4, below=4), 1.5, {"reduce": r}) for r in ("add", "multiply")],
    aten.scatter_add.default: [(M, -1, positions(3, 7, below=4), values(3, 7)),
        (S, 0, torch.tensor([0, 0]), values(2))],
    aten.scatter_reduce.two: [
        (M, -1, positions(3, 7, below=4), values(3, 7), r,
            {"include_self": i}) for r in REDUCTIONS for i in (True, False)
    ],
    aten.index_select.default: [(X, d, at(d, 3)) for d in range(4)] + [(M, -1, torch.tensor(2)),
        (M, 0, positions(0, below=1))],
    aten.index_add.default: [
        (M, 0, positions(5, below=3), values(5, 4)),
        (X, -2, positions(3, below=2), values(3, 4, 3, 5), {"alpha": -2.5}),
        (S, 0, torch.tensor([0]), S),
        (V, 0, torch.tensor(2), values(1)),
        (M.long(), 1, positions(5, below=4), torch.arange(15).view(3, 5), {"alpha": 3}),
        (M > 0, 1, positions(5, below=4), values(3, 5) > 0),
    ],
    aten.index_copy.default: [(X, -1, along(0, 3, below=5), values(3, 4, 2, 3)), (M, 0, torch.tensor(1), values(1, 4))],
    aten.index_reduce.default: [
        (M, 1, positions(5, below=4), values(3, 5), r,
            {"include_self": i}) for r in REDUCTIONS[1:] for i in (True, False)
    ],
    aten.index_fill.int_Scalar: [(M, -1, torch.tensor([0, -1]), 2.5), (M.long(), 0, torch.tensor(2), 7),
        (S, 0, torch.tensor([0]), 3)],
    aten.index_fill.int_Tensor: [(M, -1, torch.tensor([0, -1]), S), (X, 1, torch.tensor([3, 3]), S),
        (S, 0, torch.tensor([0]), S)],
    aten.embedding.default: [
        (WEIGHT, TOKENS),
        (WEIGHT, TOKENS, 1),
        (WEIGHT, TOKENS.int()),
        (WEIGHT, torch.tensor(3), 3),
        (WEIGHT, TOKENS, 1, True),
        (WEIGHT, torch.zeros(0).long(), 0),
    ],
    aten.embedding_dense_backward.default: [
        (values(2, 3, 3), TOKENS, 6, padding, scale) for padding in (-1, 1) for scale in (False, True)
    ] + [(values(3), torch.tensor(3), 6, -1, False)],
    aten._embedding_bag.default: bag_calls(),
    aten.one_hot.default: [(TOKENS, 6), (torch.tensor(2), 3), (torch.zeros(0).long(), 3)],
    aten.nll_loss_forward.default: loss_calls(False, 2),
    aten.nll_loss2d_forward.default: loss_calls(False, 4),
    aten.nll_loss_backward.default: loss_calls(True, 2),
    aten.nll_loss2d_backward.default: loss_calls(True, 4),
    aten.isin.Scalar_Tensor: [(2, torch.tensor([1, 2])), (2, TOKENS, {"invert": True})],
}  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=str)
def test_rule_equals_the_loop(op: OpOverload, recorded: dict[OpOverload, list[Call]]) -> None:
    assert compare_all(op, recorded.get(op, []), by_hand(BY_HAND, op)), f"no call of {op} was compared"


def test_every_hand_made_call_has_a_rule() -> None:
    assert set(BY_HAND) <= set(OPS)


INDEX = torch.tensor([[0, 1], [1, 1], [3, 0]])


@pytest.mark.parametrize(
    ("op", "in_dims", "args"),
    [
        (aten.index.Tensor, (0, (0,)), (values(3, 4), [values(3, 4) > 0])),
        (aten.index_put.default, (0, (0,), 0), (values(3, 4), [values(3, 4) > 0], values(3, 2))),
        (aten.index_put.default, (0, (0,), None), (values(3, 4), [values(3, 4) > 0], torch.tensor(1))),
        (aten.gather.default, (0, None, 0), (values(3, 4, 2), 0, INDEX)),
        (aten.one_hot.default, (0, None), (INDEX, -1)),
        (aten.embedding.default, (None, 0, None, None), (values(6, 3), INDEX, -1, True)),
        (aten.index_add.default, (0, None, 0, 0), (values(3, 4) > 0, 0, INDEX, values(3, 2) > 0)),
        (aten.masked_scatter.default, (0, None, None), (values(3, 4), torch.ones(4).bool(), values(4).float())),
    ],
)
def test_what_cannot_be_batched_is_declined(op: OpOverload, in_dims: tuple, args: tuple) -> None:
    assert declines(op, in_dims, *args)


def test_a_batched_mask_that_selects_is_an_error() -> None:
    x = values(3, 4)
    with pytest.raises(FunctransError, match="vmap"):
        functrans.vmap(lambda x: x[x > 0])(x)


@pytest.mark.parametrize("wrong", [4, -5])
@pytest.mark.parametrize(
    "op",
    [
        "index_add",
        "index_copy",
        "index_select",
        "index_fill",
        "index",
        "index_put",
        "take",
        "gather",
        "scatter_add",
        "embedding",
        "embedding_bag",
        "one_hot",
    ],
)
@pytest.mark.parametrize("width", [(), (6,)])
def test_a_position_outside_of_its_example_is_an_error(op: str, width: tuple[int, ...], wrong: int) -> None:
    """It must not reach into the next example, nor into the one before."""
    x, at = values(3, 4, *width), torch.tensor([[0, 1], [wrong, 1], [3, 0]])
    programs: dict[str, Any] = {
        "index": lambda x, i: x[i],
        "index_put": lambda x, i: x.index_put((i,), x[:2], accumulate=True),
        "index_fill": lambda x, i: x.index_fill(0, i, 1.0),
        "take": lambda x, i: x[:, :1].take(i) if width else x.take(i),
        "embedding_bag": lambda x, i: torch.nn.functional.embedding_bag(i[None], x.reshape(4, -1), mode="sum"),
        "index_add": lambda x, i: x.index_add(0, i, x[:2]),
        "index_copy": lambda x, i: x.index_copy(0, i, x[:2]),
        "index_select": lambda x, i: x.index_select(0, i),
        "gather": lambda x, i: x.gather(0, i if x.dim() == 1 else i[:, None].expand(2, 6)),
        "scatter_add": lambda x, i: x.scatter_add(0, i if x.dim() == 1 else i[:, None].expand(2, 6), x[:2]),
        "embedding": lambda x, i: torch.nn.functional.embedding(i, x.reshape(4, -1)),
        "one_hot": lambda x, i: torch.nn.functional.one_hot(i, 4),
    }
    with pytest.raises((IndexError, RuntimeError)):
        functrans.vmap(programs[op])(x, at)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 1)])
@pytest.mark.parametrize("padding", [None, 1])
def test_padding_rows_of_embeddings_take_no_gradient(in_dims: tuple[int | None, ...], padding: int | None) -> None:
    """Neither with the derivative inside of the batching nor outside."""

    def loss(weight: Tensor, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, weight, padding_idx=padding).sin().sum()

    weight = WEIGHT if in_dims[0] is None else torch.stack([WEIGHT, WEIGHT * 2], in_dims[0])
    tokens = TOKENS[0] if in_dims[1] is None else torch.stack([TOKENS[0], TOKENS[1]], in_dims[1])
    examples = [
        (
            (WEIGHT if in_dims[0] is None else weight.select(in_dims[0], i)).clone().requires_grad_(),
            tokens if in_dims[1] is None else tokens.select(in_dims[1], i),
        )
        for i in range(2)
    ]
    expected = torch.stack([torch.autograd.grad(loss(*example), example[0])[0] for example in examples])
    inside = functrans.vmap(functrans.grad(loss), in_dims=in_dims)(weight, tokens)
    torch.testing.assert_close(inside, expected)
    outside = functrans.grad(lambda w: functrans.vmap(loss, in_dims=in_dims)(w, tokens).sum())(weight)
    torch.testing.assert_close(
        outside, expected.sum(0) if in_dims[0] is None else torch.stack(list(expected), in_dims[0])
    )
