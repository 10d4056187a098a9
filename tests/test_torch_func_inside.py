"""torch.func's transforms inside of ours, with integers and truth values without dimensions, which it once took for
tensors of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import grad, jvp, vmap
from functrans.errors import InsideTransformError
from functrans.pytorch.thread_state import STATE

ROWS = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 2.0]])
ONES = torch.ones(3)


def captured(number: Tensor, f: Callable[[Tensor, Tensor], Tensor], each: Any) -> Tensor:
    return each(lambda r: f(r, number))(ROWS)


#: Of a tensor, torch.func.vmap and torch.func.grad; in the place of these a loop and our grad.
PROGRAMS: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {
    "made inside": lambda x, each, slope: each(lambda r: r * x + torch.tensor(2))(ROWS),
    "made like another": lambda x, each, slope: each(lambda r: r * x + r.new_ones((), dtype=torch.int32))(ROWS),
    "captured": lambda x, each, slope: captured(torch.tensor(2), lambda r, n: r * x + n, each),
    "a truth": lambda x, each, slope: captured(torch.tensor(True), lambda r, t: torch.where(t, r * x, r), each),
    "a place": lambda x, each, slope: captured(x.argmax(), lambda r, i: (r * x).index_select(0, i[None]), each),
    "an index": lambda x, each, slope: each(lambda r: (r * x)[torch.tensor(1)])(ROWS),
    "written": lambda x, each, slope: each(
        lambda r: (r * x).index_put((torch.tensor([0]),), torch.tensor(1.0)) * r.to(torch.int64).new_ones(())
    )(ROWS),
    "a slope": lambda x, each, slope: slope(lambda r: (r * x * torch.tensor(3) + r.argmax()).sum())(ROWS[0]),
    "of a count": lambda x, each, slope: slope(lambda r: ((r * x) ** (x > 0).sum()).sum())(ROWS[0]),
}


def loop(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.stack([f(row) for row in rows])


@pytest.mark.parametrize("name", PROGRAMS)
def test_numbers_in_torch_func(name: str) -> None:
    program = PROGRAMS[name]
    mixed = lambda x: program(x, torch.func.vmap, torch.func.grad)
    ours = lambda x: program(x, loop, grad)
    for run in (
        lambda f: grad(lambda x: (f(x) ** 2).sum())(ONES),
        lambda f: jvp(f, (ONES,), (2 * ONES,)),
        lambda f: vmap(f)(torch.stack([ONES, 2 * ONES])),
        lambda f: vmap(grad(lambda x: f(x).sum()))(torch.stack([ONES, 2 * ONES])),
    ):
        torch.testing.assert_close(run(mixed), run(ours))
    assert STATE.foreign == 0


def test_a_number_of_ours_is_not_written_in_torch_func() -> None:
    def f(x: Tensor) -> Tensor:
        count = torch.tensor(0)
        return torch.func.vmap(lambda r: (count.add_(1), r * x)[1])(ROWS).sum()

    with pytest.raises(
        InsideTransformError, match="add_ of a number by a function that a transform of torch.func runs"
    ):
        grad(f)(ONES)
    assert STATE.foreign == 0
    with pytest.raises(ZeroDivisionError):
        grad(lambda x: torch.func.vmap(lambda r: r / (1 // 0))(ROWS).sum())(ONES)
    assert STATE.foreign == 0


def test_flex_attention_makes_its_masks_by_torch_func() -> None:
    """That of documents, which differ between the examples, by an autograd.Function."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k, v = torch.randn(3, 2, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    distance = (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs()

    def attention(q: Tensor, k: Tensor, v: Tensor, of: Tensor) -> Tensor:
        same = lambda b, h, i, j: (of[i] == of[j]) & (i >= j)
        mask = flex.create_block_mask(same, None, None, 4, 4, device="cpu")
        return flex.flex_attention(q, k, v, lambda s, b, h, i, j: s - (i - j).abs() * 0.1, mask)

    def by_hand(q: Tensor, k: Tensor, v: Tensor, of: Tensor) -> Tensor:
        scores = q @ k.mT / 8**0.5 - 0.1 * distance
        return scores.masked_fill((of[:, None] != of).logical_or(distance.triu(1) > 0), -torch.inf).softmax(-1) @ v

    without = vmap(lambda q, k, v: flex.flex_attention(q, k, v))(q, k, v)
    torch.testing.assert_close(without, (q @ k.mT / 8**0.5).softmax(-1) @ v)
    for run in (
        lambda f: vmap(f)(q, k, v, documents),
        lambda f: grad(lambda q: f(q, k[0], v[0], documents[0]).sin().sum())(q[0]),
        lambda f: jvp(lambda v: f(q[0], k[0], v, documents[0]), (v[0],), (v[1],)),
        lambda f: vmap(grad(lambda *args: f(*args).sin().sum()))(q, k, v, documents),
    ):
        torch.testing.assert_close(run(attention), run(by_hand), rtol=1e-4, atol=1e-5)


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_a_function_in_torch_func() -> None:
    inner = lambda x: torch.func.vmap(lambda r: Cube.apply(r * x))(ROWS).sum()
    cubes = (ROWS**3).sum(0)
    torch.testing.assert_close(grad(inner)(ONES), 3 * cubes)
    torch.testing.assert_close(vmap(grad(inner))(torch.stack([ONES, 2 * ONES])), torch.stack([3 * cubes, 12 * cubes]))
    slope = lambda x: torch.func.grad(lambda r: Cube.apply(r * x).sum())(ROWS[0]).sum()
    torch.testing.assert_close(grad(slope)(ONES), 9 * ROWS[0] ** 2)
