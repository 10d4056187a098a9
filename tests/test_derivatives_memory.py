"""Derivatives where PyTorch's own are missing, wrong or lost: memory places, sparse tensors, bags, random slopes."""

from __future__ import annotations

import pytest
import torch
from slow_ways import some
from torch import Tensor

import functrans


def whole(x: Tensor) -> Tensor:
    return x if x.layout is torch.strided else x.to_dense()


def along(f, primals, tangents, step: float = 1e-6) -> Tensor:
    """The derivative of ``f`` in a direction, by central differences."""
    ahead, behind = ([p + s * step * t for p, t in zip(primals, tangents, strict=True)] for s in (1, -1))
    return (whole(f(*ahead)) - whole(f(*behind))) / (2 * step)


def check(f, *primals: Tensor, second: bool = True) -> None:
    """Forward, reverse, and both of the gradient, against finite differences."""
    tangents = [some(*p.shape, seed=1) if p.layout is torch.strided else p * 1.7 for p in primals]
    expected = along(f, primals, tangents)
    out, tangent = functrans.jvp(f, tuple(primals), tuple(tangents))
    torch.testing.assert_close(whole(out), whole(f(*primals)))
    torch.testing.assert_close(whole(tangent), expected, rtol=1e-5, atol=1e-6)
    cotangent = some(*expected.shape, seed=2)

    def loss(*args: Tensor) -> Tensor:
        return (whole(f(*args)).sin() * cotangent).sum()

    def slope(*args: Tensor) -> Tensor:
        found = functrans.grad(loss, argnums=tuple(range(len(args))))(*args)
        return sum((whole(g) * whole(t)).sum() for g, t in zip(found, tangents, strict=True))

    torch.testing.assert_close(slope(*primals), along(loss, primals, tangents), rtol=1e-5, atol=1e-6)
    if second and all(p.layout is torch.strided for p in primals):
        curvature = functrans.jvp(slope, tuple(primals), tuple(tangents))[1]
        torch.testing.assert_close(curvature, along(slope, primals, tangents), rtol=1e-4, atol=1e-5)


X = some(3, 4)
LAYOUTS = {  # of a tensor made from one of 24 numbers
    "contiguous": lambda base: base[:12].view(3, 4),
    "transposed": lambda base: base[:12].view(4, 3).t(),
    "offset": lambda base: base[1:13].view(3, 4),
    "gaps": lambda base: base.view(6, 4)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["as_strided", "as_strided_copy"])
def test_as_strided(layout, name):
    f, view, start = getattr(torch, name), LAYOUTS[layout], int(layout == "offset")
    check(lambda base: f(view(base), (2, 2), (1, 2), start), some(24))
    check(lambda base: f(view(base), (2, 2), (1, 1), start + 1), some(24))  # a place is read twice
    check(lambda base: f(view(base), (2,), (1,)), some(24))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_strided_scatter(layout):
    view, start = LAYOUTS[layout], int(layout == "offset")
    check(lambda base, y: torch.as_strided_scatter(view(base), y, (2, 2), (1, 2), start), some(24), some(2, 2, seed=3))


def test_as_strided_in_examples():
    x = some(5, 3, 4)
    f = lambda x: torch.as_strided(x, (2, 2), (1, 4)) * 2
    torch.testing.assert_close(functrans.vmap(f)(x), torch.stack([f(row.clone()) for row in x]))
    torch.testing.assert_close(
        functrans.vmap(functrans.grad(lambda x: f(x).sin().sum()))(x),
        torch.stack([functrans.grad(lambda x: f(x).sin().sum())(row.clone()) for row in x]),
    )
    with pytest.raises(RuntimeError, match="belong to other examples"):
        functrans.vmap(lambda x: torch.as_strided(x, (2,), (12,)))(x)
    with pytest.raises(functrans.errors.InsideTransformError, match="between each other"):
        functrans.vmap(lambda x: torch.as_strided(x, (2,), (1,)), in_dims=2)(x)


@pytest.mark.parametrize("shared", [some(6), some(2, 3), some(3, 2).T], ids=["vector", "matrix", "transposed"])
def test_as_strided_scatter_of_examples_into_what_they_share(shared):
    f = lambda y: torch.as_strided_scatter(shared, y, (2, 2), (1, 2), 1)
    rows, moved = some(4, 2, 2), some(4, 2, 2, seed=3)
    torch.testing.assert_close(functrans.vmap(f)(rows), torch.stack([f(row) for row in rows]))
    value, tangent = functrans.jvp(functrans.vmap(f), (rows,), (moved,))
    torch.testing.assert_close(tangent, torch.stack([functrans.jvp(f, (r,), (t,))[1] for r, t in zip(rows, moved)]))
    cotangent = functrans.vjp(functrans.vmap(f), rows)[1](value)[0]
    torch.testing.assert_close((cotangent * moved).sum(), (value * tangent).sum())
    assert tangent.any()


S = torch.tensor([[1.0, 0, 2], [0, 3, 0]], dtype=torch.float64).to_sparse()


def test_sparse():
    check(lambda x: x.to_sparse(), some(2, 3).relu() + 0.5, second=False)
    check(lambda v: torch.sparse_coo_tensor(S.indices(), v, (2, 3)) @ some(3, 2), S.values(), second=False)
    check(lambda s, d: torch.sparse.mm(s, d), S, some(3, 2))
    check(lambda s: s * 2 + s, S)


@pytest.mark.parametrize("convert", [Tensor.to_sparse_csr, Tensor.to_sparse_csc])
def test_layouts_that_cannot_be_wrapped(convert):
    with pytest.raises(functrans.errors.LayoutError, match="to_dense"):
        functrans.grad(lambda x: (convert(x) @ torch.ones(4, 1, dtype=x.dtype)).sum())(X)
    with pytest.raises(functrans.errors.LayoutError, match="to_dense"):
        functrans.grad(lambda x: (x @ torch.ones(4, 1, dtype=x.dtype)).sum())(convert(X))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"include_last_offset": True}], ids=str)
def test_embedding_bag(mode, options):
    indices, offsets = (
        torch.tensor([0, 2, 2, 1, 4]),
        torch.tensor([0, 0, 3, 5] if options.get("include_last_offset") else [0, 0, 3]),
    )
    check(lambda w: torch.nn.functional.embedding_bag(indices, w, offsets, mode=mode, **options), some(5, 3))


def test_embedding_bag_with_weights():
    indices, offsets = torch.tensor([0, 2, 2, 1, 4]), torch.tensor([0, 0, 3])
    check(
        lambda w, p: torch.nn.functional.embedding_bag(indices, w, offsets, mode="sum", per_sample_weights=p),
        some(5, 3), some(5, seed=4),
    )  # fmt: skip


def test_rrelu():
    def f(x):
        torch.manual_seed(0)
        return torch.nn.functional.rrelu(x, training=True) * x

    check(f, X)

    def pure(x):
        torch.manual_seed(0)
        return torch.ops.aten.rrelu_with_noise_functional(x, torch.zeros_like(x), training=True)[0] * x

    check(pure, X)


def test_index_fill_counts_repeated_positions_once():
    index = torch.tensor([[0, 0], [1, 2]])
    check(lambda v: functrans.vmap(lambda i: X.index_fill(0, i, v))(index), some())


def test_group_norm_can_be_differentiated_outside():
    weight, x = some(4, seed=1), some(2, 4, 3).requires_grad_()
    f = lambda x: torch.nn.functional.group_norm(x, 2, weight).sin().sum()
    mine, = torch.autograd.grad((functrans.grad(f)(x) * x).sum(), x)
    inner, = torch.autograd.grad(f(x), x, create_graph=True)
    torch.testing.assert_close(mine, torch.autograd.grad((inner * x).sum(), x)[0])
