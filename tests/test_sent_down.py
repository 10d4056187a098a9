"""Composites that are sent on as the operators they are: for all arguments what PyTorch's own definition says."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from functrans import grad, jvp, vmap
from functrans.decompositions.sent_down import SENT_DOWN
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.extend import rules_in_scope

aten = torch.ops.aten
DOUBLE = torch.float64


def normal(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def of_convolutions(rank: int, transposed: bool) -> Iterator[tuple[Any, ...]]:
    image = (5, 6, 4)[:rank]
    weight = normal(2, 4, *[3] * rank)
    for bias, groups in itertools.product((None, normal(4 if not transposed else 8)), (1, 2)):
        x = normal(3, 2 if transposed else 4, *image)
        own = weight if transposed else normal(4, 4 // groups, *[3] * rank)
        if transposed and bias is not None:
            bias = normal(4 * groups)
        yield x, own, bias, [1], [0], *([[0], groups, [1]] if transposed else [[1], groups])
        stride, padding = [2] * rank, [1] * rank
        yield x, own, bias, stride, padding, *([[1] * rank, groups, [1] * rank] if transposed else [[1] * rank, groups])
        yield x[0], own, bias, stride, padding, *([[0], groups] if transposed else [[1], groups])
    if transposed:
        yield x, own
    else:
        yield x[:, :2], own
    yield x, own, None, [1], [2], *([[0], groups, [2]] if transposed else [[2], groups])
    if not transposed:
        z = x.to(torch.complex128)
        yield z, own.to(z.dtype), None, [1], [0], [1], groups


def of_layer_norm() -> Iterator[tuple[Any, ...]]:
    x = normal(3, 4, 5)
    yield x, [5]
    yield x, [4, 5], normal(4, 5), normal(4, 5), 1e-3
    yield x, [5], normal(5), None, 1e-5, False
    yield x.mT, [4], None, normal(4)


def of_cross_entropy() -> Iterator[tuple[Any, ...]]:
    x, labels = normal(4, 3), torch.tensor([0, 2, 1, 2])
    for weight, reduction in itertools.product((None, torch.rand(3, dtype=DOUBLE)), (0, 1, 2)):
        yield x, labels, weight, reduction
        yield x, labels, weight, reduction, 2
        yield x, labels, weight, reduction, -100, 0.1
        yield x[0], labels[1], weight, reduction
        yield normal(4, 3, 2), labels.unsqueeze(1).expand(4, 2), weight, reduction
        yield x, x.softmax(1), weight, reduction
    yield x, labels


CALLS: dict[Any, list[tuple[Any, ...]]] = {}
with torch.random.fork_rng():
    torch.manual_seed(3)
    for _rank, _op in enumerate((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), 1):
        CALLS[_op] = list(of_convolutions(_rank, False))
    for _rank, _op in enumerate(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), 1
    ):
        CALLS[_op] = list(of_convolutions(_rank, True))
    CALLS[aten.layer_norm.default] = list(of_layer_norm())
    CALLS[aten.cross_entropy_loss.default] = list(of_cross_entropy())


def test_every_one_is_tried() -> None:
    assert set(CALLS) == set(SENT_DOWN)


@pytest.mark.parametrize("op", CALLS, ids=str)
def test_it_is_what_the_operator_is(op: Any) -> None:
    taken = 0
    for args in CALLS[op]:
        out = SENT_DOWN[op](lambda other, *given: other(*given), *args)
        if out is NotImplemented:
            continue
        taken += 1
        torch.testing.assert_close(out, op(*args), rtol=1e-12, atol=1e-12)
    assert 2 * taken >= len(CALLS[op])


@pytest.mark.parametrize("op", CALLS, ids=str)
def test_derivatives_are_those_of_plain_autograd(op: Any) -> None:
    for args in CALLS[op]:
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype is DOUBLE]
        if op is aten.cross_entropy_loss.default:
            places = [0]  # PyTorch has no derivative by the class weights
        if not places:
            continue

        def f(*moving: Tensor) -> Tensor:
            given = list(args)  # noqa: B023
            for i, x in zip(places, moving, strict=True):  # noqa: B023
                given[i] = x
            return op(*given).sin().sum()

        tensors = [args[i] for i in places]
        plain = [x.clone().requires_grad_() for x in tensors]
        expected = torch.autograd.grad(f(*plain), plain, allow_unused=True)
        expected = [torch.zeros_like(x) if g is None else g for g, x in zip(expected, tensors, strict=True)]
        got = grad(f, argnums=tuple(range(len(places))))(*tensors)
        torch.testing.assert_close(list(got), expected)
        tangents = [torch.ones_like(x) for x in tensors]
        slope = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
        torch.testing.assert_close(jvp(f, tuple(tensors), tuple(tangents))[1], slope)
        rows = [torch.stack([x, 2 * x, x - 1]) for x in tensors]
        by_loop = [torch.stack(g) for g in zip(*(grad(f, argnums=tuple(range(len(places))))(*r) for r in zip(*rows)))]
        torch.testing.assert_close(list(vmap(grad(f, argnums=tuple(range(len(places)))))(*rows)), by_loop)


def test_what_pytorch_refuses_is_refused() -> None:
    x, weight = normal(1, 2, 5, 5), normal(3, 2, 3, 3)
    for call in (
        lambda x: F.conv2d(x, weight.float()),
        lambda x: F.conv2d(x, weight, normal(3).float()),
        lambda x: F.conv2d(x[:, :1], weight),
        lambda x: F.conv2d(x, weight, groups=2),
        lambda x: F.layer_norm(x, (4,)),
        lambda x: F.cross_entropy(x[0, 0], torch.tensor([0, 1])),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call(x)
        with pytest.raises((RuntimeError, ValueError)):
            grad(lambda x: call(x).sum())(x)  # noqa: B023


def test_a_decomposition_of_the_users_comes_first() -> None:
    x = normal(2, 3)
    twice = lambda x, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True: 2 * x
    with rules_in_scope(DECOMPOSITIONS, {aten.layer_norm.default: twice}):
        torch.testing.assert_close(grad(lambda x: F.layer_norm(x, (3,)).sum())(x), torch.full_like(x, 2.0))
    assert not torch.allclose(grad(lambda x: F.layer_norm(x, (3,)).sin().sum())(x), torch.full_like(x, 2.0))
