"""rearrange against loops over the elements; chunk_vmap and debug_unwrap."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import functrans
from functrans import chunk_vmap, debug_unwrap, extend, grad, jvp, rearrange, vmap
from functrans.errors import FunctransError

#: pattern, shape, sizes that are given, how an element's place on the right follows from that on the left
CASES: dict[str, tuple[tuple[int, ...], dict[str, int], Any]] = {
    "a b c -> c a b": ((2, 3, 4), {}, lambda a, b, c: (c, a, b)),
    "a b c->(a b) c": ((2, 3, 4), {}, lambda a, b, c: (a * 3 + b, c)),
    "a b c -> (c a) b": ((2, 3, 4), {}, lambda a, b, c: (c * 2 + a, b)),
    "(a b) c -> b (c a)": ((6, 4), {"a": 2}, lambda x, c: (x % 3, c * 2 + x // 3)),
    "(a b) c -> a b c": ((6, 4), {"b": 2}, lambda x, c: (x // 2, x % 2, c)),
    "( a b )   c -> a b c ": ((6, 4), {"a": 3, "b": 2, "c": 4}, lambda x, c: (x // 2, x % 2, c)),
    "... a -> a ...": ((2, 3, 4), {}, lambda x, y, a: (a, x, y)),
    "a ... -> (... a)": ((2, 3, 4), {}, lambda a, x, y: ((x * 4 + y) * 2 + a,)),
    "a ... b -> b (...) a": ((2, 3, 4, 5), {}, lambda a, x, y, b: (b, x * 4 + y, a)),
    "a ... b -> b ... a": ((2, 5), {}, lambda a, b: (b, a)),
    "a ... b -> b  (...) a": ((2, 5), {}, lambda a, b: (b, 0, a)),
    "a 1 b -> 1 b () a": ((2, 1, 3), {}, lambda a, _, b: (0, b, 0, a)),
    "a b -> (1 a) (b 1)": ((2, 3), {}, lambda a, b: (a, b)),
    "height width_2 -> width_2 height": ((2, 3), {}, lambda a, b: (b, a)),
    "->": ((), {}, lambda: ()),
    " -> 1": ((), {}, lambda: (0,)),
    "(a b) -> b a": ((0,), {"a": 3}, lambda x: (0, 0)),
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "case"), CASES.items())
def test_every_element_comes_where_it_belongs(pattern: str, case: Any) -> None:
    shape, sizes, place = case
    x = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(shape)
    out = rearrange(x, pattern, **sizes)
    assert out.numel() == x.numel()
    for index in itertools.product(*map(range, shape)):
        assert out[place(*index)] == x[index]


def test_a_list_is_stacked() -> None:
    parts = [torch.randn(2, 3) for _ in range(4)]
    assert torch.equal(rearrange(parts, "n a b -> (n a) b"), torch.cat(parts))
    assert torch.equal(rearrange(tuple(parts), "n a b -> a b n"), torch.stack(parts, 2))


def test_under_transforms() -> None:
    x, weights = torch.randn(5, 6, 4, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    f = lambda m: rearrange(m, "(a b) c -> c b a", a=2)
    assert torch.equal(vmap(f)(x), torch.stack([f(m) for m in x]))
    assert torch.equal(vmap(f, in_dims=2)(x.movedim(0, 2)), torch.stack([f(m) for m in x]))
    assert torch.equal(grad(lambda m: (f(m) * weights).sum())(x[0]), rearrange(weights, "c b a -> (a b) c"))
    assert torch.equal(jvp(f, (x[0],), (x[1],))[1], f(x[1]))
    assert rearrange(x[0], "a b -> b a").data_ptr() == x[0].data_ptr()


def test_a_dimension_of_size_1_has_that_size() -> None:
    with pytest.raises(functrans.FunctransError, match="got size 3 for the dimension 1; expected size 1"):
        rearrange(torch.ones(2, 3), "a 1 -> a")


# ---- chunk_vmap


@pytest.mark.parametrize("chunks", (1, 2, 3, 4, 7, 20))
@pytest.mark.parametrize("size", (1, 3, 7))
def test_chunks(size: int, chunks: int) -> None:
    x, sizes = torch.randn(2, size, dtype=torch.float64), []

    def f(row: Tensor, y: Tensor) -> Any:
        sizes.append(extend.interpreter_stack()[0].batch_size)
        return (row * y).sum(), {"row": row}

    total, rest = chunk_vmap(f, in_dims=(1, None), out_dims=(0, {"row": 1}), chunks=chunks)(x, x[:, 0])
    assert torch.allclose(total, torch.stack([(x[:, i] * x[:, 0]).sum() for i in range(size)]))
    assert torch.equal(rest["row"], x)
    assert sizes == [len(part) for part in torch.arange(size).chunk(chunks)]


def test_chunks_of_random_functions_and_of_nothing() -> None:
    x = torch.zeros(6)
    same = chunk_vmap(lambda x: x + torch.randn(()), randomness="same", chunks=3)(x)
    assert len(set(same.tolist())) == 1
    different = chunk_vmap(lambda x: x + torch.randn(()), randomness="different", chunks=3)(x)
    assert len(set(different.tolist())) == 6
    assert chunk_vmap(torch.sin, chunks=2)(torch.ones(0, 3)).shape == (0, 3)
    assert torch.equal(grad(lambda x: chunk_vmap(torch.sin, chunks=4)(x).sum())(x), torch.ones(6))


# ---- debug_unwrap


def test_debug_unwrap() -> None:
    x, seen = torch.randn(3), []

    def f(y: Tensor) -> Tensor:
        view = (2 * y).view(1)
        root = view[0]
        view.mul_(2)
        seen.append([debug_unwrap(y), debug_unwrap(y, recurse=False), y.value, debug_unwrap(root), debug_unwrap(x)])
        return y.sin()

    vmap(grad(f))(x)
    ((plain, once, value, written, captured),) = seen
    assert plain is x and captured is x and once is value
    assert torch.equal(written, 4 * x)
    assert debug_unwrap(x, recurse=False) is x


def test_debug_unwrap_of_what_outlived_its_transform() -> None:
    kept: list[Tensor] = []
    vmap(lambda x: kept.append(x * 2) or x)(torch.ones(3))
    assert torch.equal(debug_unwrap(kept[0]), 2 * torch.ones(3))
    with pytest.raises(FunctransError):
        kept[0] + 1
