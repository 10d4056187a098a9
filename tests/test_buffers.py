"""Buffers that are filled part by part: what is written in place, and what has to see the old contents all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from functrans import grad, jvp, vjp, vmap
from functrans.functionalization import writes

ROWS = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def filled(x: Tensor) -> Tensor:
    out = torch.zeros(3, 3, dtype=x.dtype)
    for i in range(3):
        out[i] = x * i
    return out


def accumulated(x: Tensor) -> Tensor:
    out = filled(x)
    out[0] += x
    out[:, 0] *= 2
    out[1, 2] = 5
    out.t()[0].add_(1)
    out.view(-1)[2:4] = x[:2]
    out.unbind(1)[1].sub_(x)
    return out


def with_views_that_live_on(x: Tensor) -> Tensor:
    out = x.repeat(3, 1)
    row, column, corner = out[1], out[:, 0], out[0][1:]
    for i in range(3):
        before = out[i - 1]
        out[i] = row * before + i
        column += corner.sum()
    row.mul_(3)
    out[0] = out[1]
    return out * row + column


def with_copies_that_live_on(x: Tensor) -> Tensor:
    out = filled(x)
    kept = [out.clone(), out * 1, (out.detach() > 0).to(x.dtype)]
    kept += [out.reshape(9), out[1].contiguous(), out.expand(2, 3, 3)]
    out[1] = x
    kept += [out.clone(), out.sum(0)]
    out[2] = 7
    return torch.cat([out.flatten(), *(k.flatten() for k in kept)])


def with_functions_that_saved_it(x: Tensor) -> Tensor:
    out = filled(x)
    scale = torch.ones(3, dtype=x.dtype)
    pullback = vjp(lambda s: s * out.clone(), scale)[1]
    out[1] = x
    slope = grad(lambda s: (s * out).sum())(scale)
    out[2] = slope
    tangent = jvp(lambda o: o * o, (out,), (out,))[1]
    out[0, 0] = 9
    return torch.cat([out.flatten(), tangent.flatten(), *pullback(torch.ones_like(out))])


def of_every_layout(x: Tensor) -> Tensor:
    outs = [torch.zeros(3, 2, dtype=x.dtype).t(), torch.zeros(1, dtype=x.dtype).expand(2, 3).clone(), x.outer(x)[::2]]
    outs.append(torch.zeros(2, 6, dtype=x.dtype)[:, ::2])
    for out in outs:
        out[1] = x
        out.movedim(0, 1)[0] += out.sum()
        out[:, 1:] += 1
    return torch.cat([out.flatten() for out in outs])


def tables_of_programming(x: Tensor) -> Tensor:
    table = torch.full((4, 4), 9.0, dtype=x.dtype)
    table[0, 0] = 0
    for i in range(1, 4):
        for j in range(1, 4):
            corner, above, left = table[i - 1, j - 1], table[i - 1, j], table[i, j - 1]
            table[i, j] = (x[i - 1] - j) ** 2 + torch.minimum(corner, torch.minimum(above, left))
    return table


PROGRAMS = [
    filled, accumulated, with_views_that_live_on, with_copies_that_live_on, with_functions_that_saved_it,
    of_every_layout, tables_of_programming,
]  # fmt: skip


def summed(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (f(x) ** 2).sum()


def differences(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    return torch.stack([(f(x + e) - f(x - e)) / (2 * step) for e in step * torch.eye(len(x), dtype=x.dtype)])


@pytest.mark.parametrize("f", PROGRAMS)
def test_programs_against_the_loop(f: Callable[[Tensor], Tensor]) -> None:
    looped = torch.stack([f(x) for x in ROWS])
    torch.testing.assert_close(vmap(f)(ROWS), looped)
    torch.testing.assert_close(vmap(f, in_dims=1)(ROWS.t().contiguous()), looped)
    torch.testing.assert_close(vmap(vmap(f))(torch.stack([ROWS, -ROWS])), torch.stack([looped, vmap(f)(-ROWS)]))
    with torch.no_grad():
        torch.testing.assert_close(vmap(f)(ROWS), looped)
    with torch.inference_mode():
        torch.testing.assert_close(vmap(f)(ROWS), looped)
    slopes = torch.stack([differences(summed(f), x) for x in ROWS])
    torch.testing.assert_close(vmap(grad(summed(f)))(ROWS), slopes, rtol=1e-6, atol=1e-6)
    leaf = ROWS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(vmap(summed(f))(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, slopes, rtol=1e-6, atol=1e-6)


def test_a_buffer_is_written_where_it_is() -> None:
    places: list[int] = []

    def f(x: Any) -> Tensor:
        out = torch.zeros(5, 3, dtype=x.dtype)
        for i in range(5):
            before = out[i - 1]
            out[i] = x + before
            out[i, 1:] += 1
            places.append(out.value.data_ptr())  # type: ignore[attr-defined]
        return out

    vmap(f)(ROWS)
    assert len(set(places)) == 1


def test_what_pytorch_saved_of_a_buffer_stays() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        out = filled(x)
        row = out[2]
        product, of_row = out * weight, row * weight
        out[1] = 7
        row.zero_()
        return product.sum() + of_row.sum(), out

    total, out = vmap(f)(ROWS)
    (gradient,) = torch.autograd.grad(total.sum(), weight)
    torch.testing.assert_close(gradient, (0 + 1 + 2 + 2) * ROWS.sum(0))
    assert (out[:, 1] == 7).all() and not out[:, 2].any()


def test_the_callers_tensors_are_written_once_it_is_over() -> None:
    mine = ROWS.clone()
    seen = []

    def f(x: Tensor) -> Tensor:
        x[0] = 5
        seen.append(mine[0, 0].item())
        x[1:] += 1
        return x[1].clone()

    got = vmap(f)(mine)
    expected = ROWS.clone()
    expected[:, 0], expected[:, 1:] = 5, ROWS[:, 1:] + 1
    assert torch.equal(mine, expected) and torch.equal(got, expected[:, 1]) and seen == [ROWS[0, 0].item()]


def test_a_graph_has_no_writes() -> None:
    graph = make_fx(vmap(accumulated))(ROWS)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not any(name.split(".")[-2].endswith("_") for name in names if name.startswith("aten"))
    torch.testing.assert_close(graph(2 * ROWS), vmap(accumulated)(2 * ROWS))


def test_an_increment_of_a_part_writes_once() -> None:
    """Python writes ``x[i] += y`` as a write to ``x[i]`` and a copy of ``x[i]`` to ``x[i]``."""

    def f(x: Tensor) -> Tensor:
        out = torch.zeros(3, 3, dtype=x.dtype)
        out[1] += x
        out[1, :2] *= x[:2]
        return out.sum()

    with mock.patch.object(writes, "write", wraps=writes.write) as write:
        grad(f)(ROWS[0])
    assert write.call_count == 2

    def moved(x: Tensor) -> Tensor:
        x[0:1], x[1:2] = x[2:3], x[0:1]  # another part of the same tensor is copied
        return x

    assert vmap(moved)(torch.arange(6.0).view(2, 3)).tolist() == [[2, 2, 2], [5, 5, 5]]
