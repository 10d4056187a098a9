"""Batching rules of products, against a loop over distinct examples; and that they are one large product."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from batching_checker import Call
from recorder import noted
from rule_cases import ByHand, by_hand, compare_all, declines, quiet_thread, record, rules_of, values
from torch._ops import OpOverload

import functrans
from functrans.interpreters.vmap.rules import distances, products
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo

aten = torch.ops.aten
OPS = rules_of(products, distances)
quiet = pytest.fixture(scope="module", autouse=True)(quiet_thread)


@pytest.fixture(scope="module")
def recorded(quiet: None) -> dict[OpOverload, list[Call]]:
    return record(OPS)


LEFT = [values(4), values(3, 4), values(2, 3, 4), values(5, 1, 3, 4), values(1, 4), values(2, 4)]
RIGHT = [values(4), values(4, 5), values(2, 4, 5), values(2, 4, 1), values(1, 4, 2), values(5, 2, 4, 3)]
INTEGERS = torch.arange(12).view(3, 4)
NAN = torch.full((3, 5), torch.nan, dtype=torch.float64)


def linear_calls() -> list[tuple[Any, ...]]:
    inputs = [values(4), values(3, 4), values(2, 3, 4), values(0, 4), values(3, 2, 4).transpose(0, 1)]
    calls: list[tuple[Any, ...]] = [(x, values(5, 4), *bias) for x in inputs for bias in ((), (values(5),))]
    wide = [
        (values(*lead, 64), values(65, 64), *bias) for lead in ((3,), (2, 3), (0,), ()) for bias in ((), (values(65),))
    ]
    return [
        *calls,
        *wide,
        (values(3, 1), values(5, 1), values(5)),
        (values(3, 1), values(5, 1)),
        (values(3, 4), values(4)),
    ]


def pdist_calls(backward: bool) -> list[tuple[Any, ...]]:
    """Sets on both sides of the size from which each example is a call of its own, with vectors that coincide."""
    calls: list[tuple[Any, ...]] = []
    for n, p in itertools.product((5, 34), (0.0, 1.0, 1.5, 2.0, 3.0, float("inf"))):
        x = values(n, 8)
        x[3] = x[1]
        pairs = torch.nn.functional.pdist(x, p)
        calls.append((values(*pairs.shape), x, p, pairs) if backward else (x, p))
    return calls


def sums(x: torch.Tensor, y: torch.Tensor, addends: list[torch.Tensor]) -> list[tuple[Any, ...]]:
    scales: list[dict[str, Any]] = [{}, {"beta": 0}, {"beta": 2.5, "alpha": -1.5}, {"alpha": 0.5}]
    return [(a, x, y, scale) for a, scale in itertools.product(addends, scales)]


A, B = values(2, 3, 4), values(2, 4, 5)

BY_HAND: ByHand = {
    aten.matmul.default: [(x, y) for x in LEFT for y in RIGHT if x.dim() < 4 or y.dim() < 3]
    + [(values(3, 1), values(1, 4)), (values(2, 3, 1), values(1, 4)), (values(1), values(1, 4)),
        (INTEGERS, INTEGERS.t())],
    aten.linalg_matmul.default: [(values(3, 4), values(4, 5))],
    aten.mm.default: [
        (values(3, 4), values(4, 5)),
        (values(3, 1), values(1, 4)),
        (values(1, 4), values(4, 5)),
        (values(0, 4), values(4, 5)),
        (values(3, 0), values(0, 5)),
        (values(3, 4, dtype=torch.complex128), values(4, 5, dtype=torch.complex128)),
        (values(17, 4), values(4, 18)),
        (values(4, 17).t(), values(4, 18)),
        (INTEGERS.repeat(6, 1).t(), INTEGERS.repeat(6, 6)),
    ],
    aten.bmm.default: [(A, B), (A[:, :, :1], B[:, :1]), (A[:1], B[:1]), (A[:, :0], B)],
    aten.mv.default: [(values(3, 4), values(4)), (values(3, 0), values(0)), (values(3, 1), values(1)),
        (INTEGERS, INTEGERS[0])],
    aten.dot.default: [(values(4), values(4)), (values(1), values(1)), (INTEGERS[0], INTEGERS[1])],
    aten.vdot.default: [(values(4, dtype=torch.complex128), values(4, dtype=torch.complex128, seed=1))],
    aten.outer.default: [(values(3), values(4)), (values(3).float(), values(4)), (INTEGERS[0], values(3))],
    aten.ger.default: [(values(3), values(4))],
    aten.addmm.default: sums(A[0], B[0], [values(), values(5), values(1, 5), values(3, 1), values(3, 5), NAN])
    + [(values(4), values(3, 1), values(1, 4)), (INTEGERS[:, :3], INTEGERS, INTEGERS.t(), {"beta": 2, "alpha": 3})],
    aten.addmv.default: sums(A[0], values(4), [values(), values(3), values(1), NAN[:, 0]]),
    aten.addbmm.default: sums(A, B, [values(), values(5), values(3, 5), NAN]),
    aten.baddbmm.default: sums(A, B, [values(), values(5), values(3, 1), values(2, 3, 5), NAN]),
    aten.addr.default: sums(values(3), values(5), [values(), values(5), values(3, 5), NAN]),
    aten.linear.default: linear_calls(),
    aten.bilinear.default: [
        (values(2, 3), values(2, 4), values(5, 3, 4), values(5)),
        (values(3), values(4), values(5, 3, 4)),
        (values(2, 1, 3), values(2, 1, 4), values(5, 3, 4), values(5)),
    ],
    aten._pdist_forward.default: pdist_calls(False),
    aten._pdist_backward.default: pdist_calls(True),
    aten._euclidean_dist.default: [(values(3, 4), values(5, 4)), (values(2, 3, 4), values(2, 5, 4))],
    aten._cdist_forward.default: [(values(3, 4), values(2, 5, 4), 2.0, None), (values(3, 4), values(5, 4), 1.0, None)],
    aten._cdist_backward.default: [
        (values(*lead, 3, 5), x, y, p, torch.cdist(x, y, p))
        for p in (1.0, 2.0, 3.0)
        for lead, x, y in (
            ((), values(3, 4), values(5, 4)),
            ((2,), values(2, 3, 4), values(5, 4)),
            ((2,), values(3, 4), values(2, 5, 4)),
        )
    ],
    aten.cdist.default: [(values(30, 4), values(5, 4)), (values(3, 4), values(2, 5, 4), 3.0)],
}  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=str)
def test_rule_equals_the_loop(op: OpOverload, recorded: dict[OpOverload, list[Call]]) -> None:
    assert compare_all(op, recorded.get(op, []), by_hand(BY_HAND, op)), f"no call of {op} was compared"


def test_every_hand_made_call_has_a_rule() -> None:
    assert set(BY_HAND) <= set(OPS)


PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.mv.default, aten.baddbmm.default}


def products_of(op: OpOverload, in_dims: tuple[Any, ...], *args: torch.Tensor) -> list[Any]:
    """The products that the rule runs, with the shapes of their operands."""
    rule = BATCHING_RULES.get(op)
    assert rule is not None
    with noted(PRODUCTS.__contains__) as calls:
        rule(BatchInfo(7, "error"), in_dims, *args)
    return [(call.op._schema.name[6:], [tuple(a.shape) for a in call.args]) for call in calls]


@pytest.mark.parametrize(
    ("op", "in_dims", "args", "expected"),
    [
        (aten.mm.default, (0, None), (values(7, 3, 4), values(4, 5)), ("mm", [(21, 4), (4, 5)])),
        (aten.mm.default, (1, None), (values(3, 7, 4), values(4, 5)), ("mm", [(21, 4), (4, 5)])),
        (aten.mm.default, (2, None), (values(3, 4, 7), values(4, 5)), ("mm", [(21, 4), (4, 5)])),
        (aten.mm.default, (None, 0), (values(3, 4), values(7, 4, 5)), ("mm", [(3, 4), (4, 35)])),
        (aten.mm.default, (0, 0), (values(7, 3, 4), values(7, 4, 5)), ("bmm", [(7, 3, 4), (7, 4, 5)])),
        (aten.mv.default, (None, 0), (values(3, 4), values(7, 4)), ("mm", [(3, 4), (4, 7)])),
        (aten.bmm.default, (0, None), (values(7, 2, 3, 4), values(2, 4, 5)), ("bmm", [(2, 21, 4), (2, 4, 5)])),
        (aten.bmm.default, (None, 0), (values(2, 3, 4), values(7, 2, 4, 5)), ("bmm", [(2, 3, 4), (2, 4, 35)])),
        (aten.linear.default, (0, None, None), (values(7, 3, 4), values(5, 4), values(5)),
            ("addmm", [(5,), (21, 4), (4, 5)])),
        (aten.linear.default, (None, 0, None), (values(3, 4), values(7, 5, 4), values(5)), ("mm", [(3, 4), (4, 35)])),
        (aten.linear.default, (None, 0), (values(3, 64), values(7, 65, 64)), ("bmm", [(7, 3, 64), (7, 64, 65)])),
        (aten.mm.default, (None, 0), (values(3, 4), values(7, 4, 18)), ("bmm", [(7, 3, 4), (7, 4, 18)])),
        (aten.mm.default, (0, None), (values(7, 4, 18).mT, values(4, 5)), ("bmm", [(7, 18, 4), (7, 4, 5)])),
    ],
)  # fmt: skip
def test_batched_with_unbatched_is_one_product(op: OpOverload, in_dims: Any, args: Any, expected: Any) -> None:
    assert products_of(op, in_dims, *args) == [expected]


@pytest.mark.parametrize(
    ("in_dims", "x", "y"),
    [
        ((None, 0), values(3, 4), values(7, 4, 18)),
        ((0, None), values(7, 4, 18).mT, values(4, 5)),
        ((0, None), values(7, 18, 4), values(4, 5)),
    ],
)
def test_operands_are_not_copied(in_dims: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    rule = BATCHING_RULES.get(aten.mm.default)
    assert rule is not None
    with torch.profiler.profile() as profile:
        rule(BatchInfo(7, "error"), in_dims, x, y)
    assert "aten::copy_" not in {event.name for event in profile.events()}


def test_nothing_to_sum_is_a_multiplication() -> None:
    assert products_of(aten.mm.default, (0, 0), values(7, 5, 1), values(7, 1, 4)) == []


@pytest.mark.parametrize(
    ("op", "in_dims", "args"),
    [
        (aten.mm.default, (0, None), (values(3, 4), values(4, 5))),
        (aten.matmul.default, (0, 0), (values(3), values(3, 3))),
        (aten.bmm.default, (0, None), (values(3, 1, 2, 4), values(2, 4, 5))),
        (aten.dot.default, (0, 0), (values(3), values(3))),
        (aten.linear.default, (0, None, None), (values(4), values(5, 4), None)),
    ],
)
def test_examples_that_pytorch_refuses_are_declined(op: OpOverload, in_dims: tuple, args: tuple) -> None:
    assert declines(op, in_dims, *args)


def test_an_addend_of_more_dimensions_than_the_product() -> None:
    for op, args in (
        (torch.addmm, (values(2, 3, 5), values(3, 4), values(4, 5))),
        (torch.addmv, (values(2, 3), values(3, 4), values(4))),
    ):
        with pytest.raises(RuntimeError):
            op(*args)
        for k in range(3):
            batch = [x.expand(7, *x.shape) if i == k else x for i, x in enumerate(args)]
            with pytest.raises(RuntimeError):
                functrans.vmap(op, in_dims=tuple(0 if i == k else None for i in range(3)))(*batch)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, 0), (0, 0, 0), (0, None, 0), (None, 1, None)])
def test_gradients_of_a_layer(in_dims: tuple[int | None, ...]) -> None:
    shapes = [(2, 4), (5, 4), (5,)]
    args = [
        values(*shape) if d is None else values(3, *shape).movedim(0, d).contiguous()
        for shape, d in zip(shapes, in_dims)
    ]

    def gradients(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return functrans.grad(lambda *a: torch.nn.functional.linear(*a).sin().sum(), argnums=(0, 1, 2))(x, weight, bias)

    got = functrans.vmap(gradients, in_dims=in_dims)(*args)
    for i in range(3):
        row = [a if d is None else a.select(d, i).requires_grad_() for a, d in zip(args, in_dims)]
        row = [a.detach().clone().requires_grad_() for a in row]
        expected = torch.autograd.grad(torch.nn.functional.linear(*row).sin().sum(), row)
        for g, e in zip(got, expected):
            torch.testing.assert_close(g[i], e)
