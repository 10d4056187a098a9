"""Batching rules of counting, margin losses and the CTC loss, against a loop over distinct examples."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import ByHand, by_hand, compare_all, declines, positions, quiet_thread, rules_of, values
from torch import Tensor
from torch._ops import OpOverload

import functrans
from functrans.interpreters.vmap.rules import counting, ctc, margins

aten = torch.ops.aten
OPS = rules_of(counting, margins, ctc)
quiet = pytest.fixture(scope="module", autouse=True)(quiet_thread)


def bincount_calls() -> list[tuple[Any, ...]]:
    x = positions(40, below=9)
    weights = (None, values(40), values(40).float(), positions(40, below=3))
    calls: list[tuple[Any, ...]] = [(x, w, 12) for w in weights]
    return [*calls, (x.int(), None, 9), (x.to(torch.uint8), None, 12), (x[:0], None, 3)]


def histc_calls() -> list[tuple[Any, ...]]:
    """On both sides of the size from which each example is a call of its own; on bounds of bins, and none inside."""
    calls: list[tuple[Any, ...]] = []
    ranges = ((50, -3, 3), (7, -1, 2.5), (13,), (100, 0, 1), (10, 0.1, 0.7), (10, 2.0, 2.0), (5, 90, 91))
    for n, dtype, given in itertools.product((90, 2100), (torch.float32, torch.float64), ranges):
        calls.append((values(n).to(dtype).round(decimals=2), *given))
    return [*calls, (values(3, 4, 5), 6), (torch.ones(5), 4), (values(), 3, -2, 2), (values(0), 4)]


def margin_calls(backward: bool) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    for shape, reduction, p, weight in itertools.product(((6,), (4, 6)), (0, 1, 2), (1, 2), (None, values(6).abs())):
        args = (values(*shape), positions(*shape[:-1], below=6), p, 1.2, weight, reduction)
        calls.append((values(*aten.multi_margin_loss.default(*args).shape), *args) if backward else args)
    return calls


def multilabel_calls(backward: bool) -> list[tuple[Any, ...]]:
    """The targets of a sample end at the first -1."""
    calls: list[tuple[Any, ...]] = []
    targets = torch.tensor([[3, 0, -1, 1, 2, 2], [5, 4, 3, 2, 1, 0], [-1, 1, 1, 1, 1, 1], [2, -1, -1, -1, -1, -1]])
    for target, reduction in itertools.product((targets[0], targets), (0, 1, 2)):
        x = values(*target.shape)
        loss, chosen = aten.multilabel_margin_loss_forward.default(x, target, reduction)
        calls.append((values(*loss.shape), x, target, reduction, chosen) if backward else (x, target, reduction))
    return calls


LOG_PROBS = values(9, 3, 6).log_softmax(-1)
LENGTHS = (9, 7, 8), (4, 2, 0)
LABELS = 1 + positions(3, 4, below=5), 1 + positions(6, below=5)


def ctc_calls(backward: bool, tensors: bool) -> list[tuple[Any, ...]]:
    """Targets in a matrix, and one after the other.

    The kernel leaves a part of the forward variables of short sequences uninitialized, so the ones compared are full.
    """
    calls: list[tuple[Any, ...]] = []
    for targets, blank in itertools.product(LABELS if backward else (LABELS[0], LABELS[0].flatten()), (0, 5)):
        full = LENGTHS if backward else ((9, 9, 9), (4, 4, 4))
        lengths = [torch.tensor(n) for n in full] if tensors else full
        args = (LOG_PROBS, targets.remainder(5) if blank else targets, *lengths)
        losses, log_alpha = aten._ctc_loss(*args, blank)
        calls.append((values(3), *args, losses, log_alpha, blank) if backward else (*args, blank))
    return calls


BY_HAND: ByHand = {
    aten.bincount.default: bincount_calls(),
    aten.histc.default: histc_calls(),
    aten.multi_margin_loss.default: margin_calls(False),
    aten.multi_margin_loss_backward.default: margin_calls(True),
    aten.multilabel_margin_loss_forward.default: multilabel_calls(False),
    aten.multilabel_margin_loss_backward.default: multilabel_calls(True),
    aten._ctc_loss.default: ctc_calls(False, False),
    aten._ctc_loss.Tensor: ctc_calls(False, True),
    aten._ctc_loss_backward.default: ctc_calls(True, False),
    aten._ctc_loss_backward.Tensor: ctc_calls(True, True),
}


@pytest.mark.parametrize("op", OPS, ids=str)
def test_rule_equals_the_loop(op: OpOverload) -> None:
    assert compare_all(op, [], by_hand(BY_HAND, op))


def test_every_rule_has_calls() -> None:
    assert set(BY_HAND) == set(OPS)


def test_what_cannot_be_batched_is_declined() -> None:
    x = torch.tensor([[0, 1, 5], [2, 2, 2], [5, 1, 0]])
    assert declines(aten.bincount.default, (0, None, None), x, None, 4)  # the sizes differ
    assert declines(aten.bincount.default, (0, None, None), x, None, 0)
    assert declines(aten.histc.default, (0, None), x)
    weights = values(3, 5)
    assert declines(
        aten.multi_margin_loss.default, (0, 0, None, None, 0), values(3, 4, 5), x.new_zeros(3, 4), 1, 1, weights
    )
    assert declines(aten.multi_margin_loss.default, (0, 0), values(3, 4, 5), x.new_zeros(3, 5))


def test_counts_whose_size_all_examples_share() -> None:
    """Without minlength, or with one that is too small, the loop answers."""
    x = torch.tensor([[0, 1, 5], [5, 2, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for minlength in (0, 3):
            got = functrans.vmap(lambda x: torch.bincount(x, minlength=minlength))(x)  # noqa: B023
            assert got.tolist() == [[1, 1, 0, 0, 0, 1], [0, 0, 2, 0, 0, 1]]


def test_values_that_have_no_bin_are_errors() -> None:
    with pytest.raises(RuntimeError, match="non-negative"):
        functrans.vmap(lambda x: torch.bincount(x, minlength=9))(torch.tensor([[1, -1], [2, 3]]))
    for n in (4, 3000):
        x = values(3, n)
        x[1, 2] = torch.inf
        with pytest.raises((RuntimeError, IndexError)):
            functrans.vmap(lambda x: torch.histc(x, 9))(x)
    x[1, 2] = torch.nan
    expected = torch.stack([torch.histc(row, 9, -1, 1) for row in x])
    assert torch.equal(functrans.vmap(lambda x: torch.histc(x, 9, -1, 1))(x), expected)


def slow_ctc(log_probs: Tensor, label: list[int], blank: int = 0) -> Tensor:
    """The loss of one sequence by its definition, in operators that PyTorch differentiates right."""
    states = [blank]
    for place in label:
        states += [place, blank]
    never = torch.tensor(-torch.inf, dtype=log_probs.dtype)
    alpha = [log_probs[0, s] if k < 2 else never for k, s in enumerate(states)]
    for row in log_probs[1:]:
        ways = []
        for k, s in enumerate(states):
            first = k - 2 if k > 1 and s not in (blank, states[k - 2]) else max(k - 1, 0)
            before = [a for a in alpha[first : k + 1] if a > -torch.inf]
            ways.append(row[s] + torch.stack(before).logsumexp(0) if before else never)
        alpha = ways
    return -torch.stack(alpha[-2:]).logsumexp(0)


@pytest.mark.parametrize("normalized", [True, False])
def test_ctc_loss_by_log_probs(normalized: bool) -> None:
    """PyTorch's gradient is that of what went into a log_softmax before (torch 2.13)."""
    x, labels = values(7, 3, 5), [[1, 2, 2], [3], []]
    x = x.log_softmax(-1) if normalized else x
    ends, counts = [7, 5, 6], [len(label) for label in labels]
    weights = values(3)

    def loss(x: Tensor) -> Tensor:
        return F.ctc_loss(x, torch.tensor([1, 2, 2, 3]), ends, counts, reduction="none") @ weights

    leaf = x.clone().requires_grad_()
    slow = torch.stack([slow_ctc(leaf[:n, i], label) for i, (n, label) in enumerate(zip(ends, labels))]) @ weights
    (slopes,) = torch.autograd.grad(slow, leaf)
    torch.testing.assert_close(loss(x), slow.detach())
    torch.testing.assert_close(functrans.grad(loss)(x), slopes)
    tangent = values(*x.shape)
    torch.testing.assert_close(functrans.jvp(loss, (x,), (tangent,))[1], (slopes * tangent).sum())


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("labels", LABELS, ids=["matrix", "vector"])
def test_ctc_loss(labels: Tensor, tensors: bool, reduction: str, zero_infinity: bool) -> None:
    """Whole, since its pieces are ours; and PyTorch has no tangent to compare with but the gradient's.

    Of what goes into a log_softmax, which is what its gradient is right for.
    """
    lengths = [torch.tensor(n) for n in LENGTHS] if tensors else LENGTHS

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return F.ctc_loss(x.log_softmax(-1), labels, *lengths, reduction=reduction, zero_infinity=zero_infinity).sum()

    x = torch.stack([LOG_PROBS, LOG_PROBS.flip(2).roll(1, 0)])
    labels = torch.stack([labels, labels.flip(0)])
    leaf = x.clone().requires_grad_()
    losses = torch.stack([loss(one, label) for one, label in zip(leaf, labels)])
    (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(functrans.vmap(loss)(x, labels), losses.detach())
    torch.testing.assert_close(functrans.vmap(functrans.grad(loss))(x, labels), slopes)
    torch.testing.assert_close(functrans.grad(lambda x: functrans.vmap(loss)(x, labels).sum())(x), slopes)
    tangent = values(*x.shape)
    moved = functrans.vmap(lambda x, y, t: functrans.jvp(lambda x: loss(x, y), (x,), (t,))[1])(x, labels, tangent)
    torch.testing.assert_close(moved, (slopes * tangent).sum((1, 2, 3)))
    single = F.ctc_loss(x[0, :, 0], LABELS[0][0], (9,), (4,), reduction=reduction)
    batched = functrans.vmap(lambda x: F.ctc_loss(x, LABELS[0][0], (9,), (4,), reduction=reduction))(x[:, :, 0])
    torch.testing.assert_close(batched[0], single)


def test_ctc_loss_with_lengths_of_each_example() -> None:
    x = values(4, 9, 3, 6)
    loss = lambda x, *rest: F.ctc_loss(x.log_softmax(-1), *rest)
    labels, ends, counts = 1 + positions(4, 3, 4, below=5), 6 + positions(4, 3, below=4), positions(4, 3, below=5)
    got = functrans.vmap(functrans.grad(loss))(x, labels, ends, counts)
    for i in range(4):
        leaf = x[i].clone().requires_grad_()
        torch.testing.assert_close(got[i], torch.autograd.grad(loss(leaf, labels[i], ends[i], counts[i]), leaf)[0])
