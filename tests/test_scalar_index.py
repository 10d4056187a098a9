"""Indices without dimensions, of which each example has its own: views, as outside of vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import for_each
from slow_ways import agree, gradient, jacobian, no_history
from torch import Tensor

import functrans as ft
from functrans import grad, jacfwd, jacrev, jvp, vmap
from functrans.errors import CapturedWriteError, DataDependentError, DeadWrapperError

DOUBLE = torch.float64
TABLE = torch.randn(5, 4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
COLUMNS = torch.tensor([2, 0])
MASK = torch.tensor([True, False, True, True])

READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "first": lambda x, i: x[i],
    "after a slice": lambda x, i: x[1:3, i],
    "after an ellipsis": lambda x, i: x[..., i - 1],
    "negative": lambda x, i: x[i - 3],
    "twice": lambda x, i: x[i, i],
    "with a new dimension": lambda x, i: x[None, i, :, None],
    "before indices": lambda x, i: x[i, COLUMNS],
    "apart from indices": lambda x, i: x[i, :, COLUMNS],
    "behind indices": lambda x, i: x[COLUMNS, :, i],
    "behind a mask": lambda x, i: x[:3][i, MASK],
    "captured": lambda x, i: TABLE[i] * x[0, 0, 0],
    "captured and sliced": lambda x, i: TABLE[1:, i, 1] * x[0, 0, 0],
    "of another size": lambda x, i: x[i.to(torch.int32)],
    "of a row": lambda x, i: x[i][i],
}


def set_row(x: Tensor, i: Tensor) -> None:
    x[i] = x[0] * 2


def set_one(x: Tensor, i: Tensor) -> None:
    x[i, 1, i] = x[0, 0, 0]


def set_behind_a_slice(x: Tensor, i: Tensor) -> None:
    x[1:3, i - 1] = torch.ones(3, dtype=DOUBLE)


def set_with_indices(x: Tensor, i: Tensor) -> None:
    x[i, COLUMNS] = x[0, :1].clone() ** 2


def add_to_a_row(x: Tensor, i: Tensor) -> None:
    x[i] += x[1]


def write_to_the_view(x: Tensor, i: Tensor) -> None:
    x[i].mul_(x[0, 0, 0].clone())


def keep_a_view(x: Tensor, i: Tensor) -> None:
    row = x[i]
    row += 1.0
    x.mul_(2.0)
    x[0, 0] = row[0].clone() * row[1].clone()
    row[i] = 3.0


WRITES = [set_row, set_one, set_behind_a_slice, set_with_indices, add_to_a_row, write_to_the_view, keep_a_view]


def written(write: Callable[[Tensor, Tensor], None], made_of: str) -> Callable[[Tensor, Tensor], Tensor]:
    def f(x: Tensor, i: Tensor) -> Tensor:
        buffer = x * x if made_of == "the example" else torch.ones(5, 4, 3, dtype=DOUBLE)
        write(buffer, i)
        return buffer * x.sin()

    return f


def program(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name in READS:
        return READS[name]
    write, made_of = name.split(" on ")
    return written(next(w for w in WRITES if w.__name__ == write), made_of)


NAMES = [*READS, *(f"{w.__name__} on {made}" for w in WRITES for made in ("the example", "a buffer"))]


@pytest.fixture
def examples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 5, 4, 3, dtype=DOUBLE), torch.tensor([2, 0, 1])


@pytest.mark.parametrize("name", NAMES)
def test_like_a_loop(name: str, examples: Any) -> None:
    f = program(name)
    x, i = examples
    agree(vmap(f)(x, i), for_each(f)(x, i))
    agree(vmap(f, (None, 0))(x[1], i), for_each(f, (None, 0))(x[1], i))
    agree(vmap(vmap(f, (None, 0)), (0, None))(x, i), for_each(for_each(f, (None, 0)), (0, None))(x, i))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str, examples: Any) -> None:
    f = program(name)
    x, i = examples

    def cubed(x: Tensor, i: Tensor) -> Tensor:
        return (f(x, i) ** 3).sum()

    expected = no_history(for_each(gradient(cubed))(x, i))
    agree(vmap(grad(cubed))(x, i), expected)
    agree(grad(lambda x: vmap(cubed)(x, i).sum())(x), expected)
    agree(vmap(lambda x, i: jvp(lambda x: f(x, i), (x,), (x.cos(),))[1])(x, i),
          for_each(lambda x, i: torch.einsum("...abc,abc->...", jacobian(lambda x: f(x, i), x), x.cos()))(x,
              i))  # fmt: skip
    agree(
        vmap(jacfwd(grad(cubed)))(x[:2], i[:2]),
        for_each(lambda x, i: torch.autograd.functional.hessian(lambda x: cubed(x, i), x))(x[:2], i[:2]),
    )
    agree(jacrev(f)(x[0], i[0]), jacobian(lambda x: f(x, i[0]), x[0]))


def test_a_captured_tensor_is_not_written_through_a_row() -> None:
    i = torch.arange(3)
    for table in (torch.zeros(3, 2), torch.zeros(3, 2, requires_grad=True).clone()):
        for write in (lambda t, i: t[i].add_(1), lambda t, i: t[i].fill_(1), lambda t, i: t.__setitem__(i, 1.0)):
            with pytest.raises(CapturedWriteError):
                vmap(lambda i, table=table, write=write: write(table, i))(i)
            assert (table == 0).all()
    with pytest.raises(ft.FunctransError):
        vmap(lambda x: vmap(lambda i: x[i].add_(1))(i))(torch.zeros(2, 3, 2))


@pytest.mark.parametrize("truth", [True, False])
def test_a_truth_that_all_examples_share(truth: bool) -> None:
    """What is read by it may have no elements, and is written back."""
    mask, x = torch.tensor(truth), torch.tensor([0.5, 1.5], dtype=torch.float64)

    def scaled(x: Tensor) -> Tensor:
        y = x * 2
        y[mask] = y[mask] * 10
        return y

    factor = 20.0 if truth else 2.0
    agree(vmap(scaled)(x), factor * x)
    agree(vmap(grad(scaled))(x), factor * torch.ones_like(x))
    agree(jvp(scaled, (x[0],), (x[1],))[1], factor * x[1])


def test_out_of_range_and_escaped() -> None:
    x = torch.randn(3)
    for bad in (torch.tensor([0, 3]), torch.tensor([0, -4])):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            vmap(lambda i: x[i])(bad)
    kept = []
    vmap(kept.append)(torch.arange(2))
    with pytest.raises(DeadWrapperError):
        kept[0] + 1
    with pytest.raises(DeadWrapperError):
        x[kept[0]]


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "new_tensor": lambda i: i.new_tensor([1, 0]),
    "new_tensor of a number": lambda i: i.new_tensor(True) * i,
    "new_tensor of another dtype": lambda i: i.new_tensor([0.5, 2], dtype=DOUBLE) * i,
    "new_tensor of a tensor": lambda i: i.new_tensor(COLUMNS) * i,
    "new": lambda i: i.new([3, 0]) * i,
    "new by sizes": lambda i: i.new(2, 3).fill_(1) * i,
    "new of nothing": lambda i: i.new(),
    "new_full": lambda i: i.new_full((2,), 1) * i,
}


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("name", MADE)
def test_tensors_are_made_like_them(name: str) -> None:
    """Some of PyTorch's constructors look for the device among dispatch keys."""
    make = MADE[name]
    for of in (torch.tensor([2, 0, 1]), torch.tensor([True, False, True])):
        wanted = torch.stack([make(i) for i in of])
        for found in (vmap(make)(of), vmap(vmap(make))(of[None])[0], grad_beside(make, of)):
            assert found.dtype is wanted.dtype and torch.equal(found, wanted)


def grad_beside(make: Callable[[Tensor], Tensor], of: Tensor) -> Tensor:
    return vmap(lambda i: grad(lambda x: (x, make(i)), has_aux=True)(torch.tensor(1.0))[1])(of)


def test_methods_of_the_class_do_not_look_into_them() -> None:
    seen: list[str] = []

    def look(i: Tensor) -> Tensor:
        for of in (i, i.float(), i + TABLE[0, 0]):
            seen.append(Tensor.__repr__(of))
            assert (Tensor.__repr__(of), Tensor.__format__(of, "")) == (repr(of), f"{of}")
            with pytest.raises(DataDependentError):
                Tensor.tolist(of)
        return i

    vmap(look)(torch.tensor([2, 0, 1]))
    assert all(text.startswith("WrapperTensor(vmap level 1") for text in seen)
