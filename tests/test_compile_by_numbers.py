"""torch.compile of programs in which numbers decide on places and sizes: ``x[i]`` and ``x[mask]`` inside transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, mse_loss

from functrans import grad, hessian, jacfwd, jvp, linearize, vjp, vmap

x = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, -0.7], [-0.4, 0.9, 1.1], [0.6, -0.3, 0.8]])
weight = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.0]])
#: Where the programs look, at the first call and at the next, which is to find the same graph.
PLACES = [torch.tensor(2), torch.tensor(-1)]
EACH = [torch.tensor([0, 2, 1, 0]), torch.tensor([-1, 0, 0, 1])]
MASKS = [torch.tensor([True, False, True, True]), torch.tensor([False, True, False, True])]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def written(x: Tensor, key: Any, value: Any) -> Tensor:
    x = x.clone()
    x[key] = value
    return x


def written_through_views(x: Tensor, i: Tensor) -> Tensor:
    x = x.clone()
    x[i].mul_(3)
    x[:, i] += 1
    return (x**2).sum()


def by_rows(of_row: Callable[[Tensor, int], Tensor], x: Tensor, each: Tensor) -> Tensor:
    return torch.stack([of_row(row, int(k)) for row, k in zip(x, each, strict=True)])


def autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def along(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of ``f`` along ``x`` by central differences, in twice the precision."""
    x = x.double()
    return ((f(x + 1e-5 * x) - f(x - 1e-5 * x)) / 2e-5).float()


def spread(x: Tensor, mask: Tensor) -> Tensor:
    chosen = x[mask]
    return ((chosen - chosen.mean(0, keepdim=True)) @ chosen.t()).tanh().sum() + (chosen - x[:1]).square().mean().sqrt()


def fit(w: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return mse_loss(linear(x[mask], w), (x * x)[mask, :2])


#: program(x, where), what it is by hand, and where it looks
PROGRAMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]] = {
    "one place": (
        lambda x, i: grad(lambda x: (x[i] ** 2).sum())(x),
        lambda x, i: written(0 * x, int(i), 2 * x[int(i)]),
        PLACES,
    ),
    "places that are computed": (
        lambda x, i: jvp(lambda x: x[0, -i * i // 4] * x[i + 1 - 1, :2], (x,), (x,))[1],
        lambda x, i: along(lambda x: x[0, -int(i * i // 4)] * x[int(i), :2], x),
        [torch.tensor(2), torch.tensor(-2)],
    ),
    "of each example": (
        lambda x, each: vmap(lambda row, k: row[k] * row[..., None, k])(x, each),
        lambda x, each: by_rows(lambda row, k: row[k] * row[k].view(1), x, each),
        EACH,
    ),
    "of what is captured": (
        lambda x, each: vmap(grad(lambda s, k: (x[k] * s).sum()))(torch.ones(4), each),
        lambda x, each: x[each].sum(1),
        EACH,
    ),
    "the greatest": (
        lambda x, each: vmap(grad(lambda row, k: row[row.argmax()] * row[k]))(x, each),
        lambda x, each: by_rows(lambda row, k: autograd(lambda row: row.max() * row[k], row), x, each),
        EACH,
    ),
    "written": (
        lambda x, each: vmap(grad(lambda row, k: (written(row, k, row.sum()) ** 2).sum()))(x, each),
        lambda x, each: by_rows(lambda row, k: autograd(lambda r: (written(r, k, r.sum()) ** 2).sum(), row), x, each),
        EACH,
    ),
    "written through views": (
        lambda x, i: jvp(grad(lambda x: written_through_views(x, i)), (x,), (x,))[1],
        lambda x, i: along(lambda x: autograd(lambda x: written_through_views(x, int(i)), x), x),
        [torch.tensor(2), torch.tensor(1)],
    ),
    "written where it is true": (
        lambda x, limit: vmap(grad(lambda row: (written(row, row.sum() > limit, 0.0) ** 2).sum()))(x),
        lambda x, limit: 2 * x * (x.sum(1) <= limit)[:, None],
        [torch.tensor(1.0), torch.tensor(1.2)],
    ),
    "mask": (
        lambda x, mask: grad(lambda x: (x[mask] ** 2).sum() + x[x > 0.5].sum())(x),
        lambda x, mask: 2 * x * mask[:, None] + (x > 0.5),
        MASKS,
    ),
    "masked_select, nonzero and unique": (
        lambda x, mask: grad(
            lambda x: (
                (torch.masked_select(x, mask[:, None]).sum())
                + x[mask.nonzero().squeeze(1)].sum()
                + (x[torch.where(mask)] * 2).sum()
                + (mask.unique() * x[:1, :1]).sum()
            )
        )(x),
        lambda x, mask: 4.0 * mask[:, None] + torch.eye(4, 3)[:1] * torch.eye(4)[:, :1] + 0 * x,
        MASKS,
    ),
    "written by mask": (
        lambda x, mask: grad(lambda x: (written(x, mask, x[mask] * 2) ** 2).sum())(x),
        lambda x, mask: 2 * x * (1 + 3 * mask[:, None]),
        MASKS,
    ),
    "sizes that broadcast": (
        lambda x, mask: jvp(grad(lambda x: spread(x, mask)), (x,), (x,))[1],
        lambda x, mask: along(lambda x: autograd(lambda x: spread(x, mask), x), x),
        MASKS,
    ),
    "a batch of them": (
        lambda x, mask: vmap(grad(lambda w: fit(w, x, mask)))(torch.stack([weight, weight + 1])),
        lambda x, mask: torch.stack([autograd(lambda w: fit(w, x, mask), w) for w in (weight, weight + 1)]),
        MASKS,
    ),
    "classes": (
        lambda x, mask: grad(lambda x: cross_entropy(x[mask], EACH[0][mask]))(x),
        lambda x, mask: autograd(lambda x: cross_entropy(x[mask], EACH[0][mask]), x),
        MASKS,
    ),
    "what has the size is returned": (
        lambda x, mask: (vjp(lambda x: x[mask] ** 2, x)[1](x[mask])[0], linearize(lambda x: x[mask] ** 2, x)[1](x) + 1),
        lambda x, mask: (2 * x**2 * mask[:, None], 2 * x[mask] ** 2 + 1),
        MASKS,
    ),
    "Jacobians": (
        lambda x, mask: (
            jacfwd(lambda w: (x[mask] * w).sum(0))(x[0]),
            hessian(lambda w: (x[mask] @ w).square().sum())(x[0]),
        ),
        lambda x, mask: (x[mask].sum(0).diag(), 2 * x[mask].t() @ x[mask]),
        MASKS,
    ),
    "a number": (
        lambda x, i: grad(lambda x: (x * x.sum().item() + x[: i.item()].sum()).sum())(x),
        lambda x, i: x.sum() + x.numel() * (torch.arange(4)[:, None] < i) + 0 * x,
        [torch.tensor(2), torch.tensor(3)],
    ),
}


@pytest.mark.parametrize(
    ("name", "backend"), [(name, "aot_eager") for name in PROGRAMS] + [(name, "eager") for name in list(PROGRAMS)[::3]]
)
def test_numbers_decide_in_a_graph(name: str, backend: str) -> None:
    program, by_hand, where = PROGRAMS[name]
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for place in where:
            torch.testing.assert_close(compiled(x, place), by_hand(x, place), rtol=2e-4, atol=1e-4)
