"""Calls of operators under vmap, again and again: what is kept of the first one must not show in later ones."""

import pytest
import torch
from loop import for_each
from torch import Tensor
from torch.nn import functional as F

from functrans import extend, grad, jvp, vmap
from functrans.interpreters.vmap import seen_calls
from functrans.interpreters.vmap.specialized import Specialized
from functrans.interpreters.vmap.table import BATCHING_RULES

aten = torch.ops.aten

#: Functions of one example of rank 2, by the text that a failure shows.
CALLS = {
    "sum": lambda x: x.sum(),
    "sum of a dim": lambda x: x.sum(0),
    "sum by name": lambda x: x.sum(dim=-1),
    "sum of two": lambda x: x.sum((0, 1)),
    "sum, kept": lambda x: x.sum(1, keepdim=True),
    "mean": lambda x: x.mean(-2),
    "amax": lambda x: x.amax(0),
    "amax, kept": lambda x: x.amax(0, True),
    "amax, kept not": lambda x: x.amax(0, False),
    "cumsum": lambda x: x.cumsum(0),
    "cumsum of the other": lambda x: x.cumsum(1),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "unsqueeze behind": lambda x: x.unsqueeze(-1),
    "unsqueeze by name": lambda x: torch.unsqueeze(x, dim=1),
    "squeeze": lambda x: x[:1].squeeze(0),
    "squeeze of nothing": lambda x: x.squeeze(0),
    "transpose": lambda x: x.transpose(0, 1),
    "t": lambda x: x.t(),
    "permute": lambda x: x.permute(1, 0),
    "view": lambda x: x.reshape(-1),
    "reshape of a transposed": lambda x: x.t().reshape(-1),
    "expand": lambda x: x[0].expand(3, -1),
    "select": lambda x: x[1],
    "select from the end": lambda x: x[-1],
    "select twice": lambda x: x[1][0],
    "slice": lambda x: x[1:],
    "flip": lambda x: x.flip(0),
    "tril": lambda x: x.tril(),
    "roll": lambda x: x.roll(1, 0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp at a whole number": lambda x: x.clamp(0, 1),
    "cat": lambda x: torch.cat([x, x.t()]) if x.shape[0] == x.shape[1] else torch.cat([x, 2 * x]),
    "cat along the last": lambda x: torch.cat((x, x + 1), -1),
    "cat by name": lambda x: torch.cat([x, x + 1], dim=1),
    "stack": lambda x: torch.stack([x, x + 1]),
    "stack behind": lambda x: torch.stack([x, x + 1], -1),
    "matmul": lambda x: x @ x.t(),
    "mm": lambda x: torch.mm(x.t(), x),
    "linear": lambda x: F.linear(x, torch.ones(5, x.shape[1])),
    "a matrix for all": lambda x: x @ torch.ones(x.shape[1], 2),
}  # fmt: skip


def batches() -> dict[str, tuple[Tensor, int]]:
    """Batches of examples [2, 3] or [3, 3], by how they lie in memory, and the dimension of the batch."""
    return {
        "in front": (torch.randn(4, 2, 3), 0),
        "in front, square": (torch.randn(3, 3, 3), 0),
        "in the middle": (torch.randn(2, 4, 3), 1),
        "last": (torch.randn(2, 3, 4), 2),
        "transposed examples": (torch.randn(4, 3, 2).mT, 0),
        "expanded": (torch.randn(1, 2, 3).expand(4, 2, 3) * 1.0, 0),
        "of one example": (torch.randn(1, 2, 3), 0),
        "doubles": (torch.randn(4, 2, 3, dtype=torch.float64), 0),
    }  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_that_of_a_loop(name: str) -> None:
    """First calls and later ones, over layouts that look alike to the code at the level."""
    torch.manual_seed(0)
    f = CALLS[name]
    for again in range(2):
        for place, (x, dim) in batches().items():
            if x.dtype is torch.float64 and name in ("linear", "a matrix for all"):
                continue
            expected = torch.stack([f(one) for one in x.unbind(dim)])
            said = f"{place}, {again}: ".__add__
            torch.testing.assert_close(vmap(f, in_dims=dim)(x), expected, msg=said)


@pytest.mark.parametrize("name", CALLS)
def test_under_and_over_other_transforms(name: str) -> None:
    torch.manual_seed(0)
    f = CALLS[name]
    x, v = torch.randn(4, 5, 2, 3), torch.randn(4, 2, 3)
    for _ in range(2):
        expected = torch.stack([torch.stack([f(one) for one in row]) for row in x])
        torch.testing.assert_close(vmap(vmap(f))(x), expected)
        torch.testing.assert_close(vmap(vmap(f, in_dims=1), in_dims=2)(x.movedim(0, 2).movedim(0, 1)), expected)
        by_loop = torch.stack([grad(lambda one: f(one).sin().sum())(one) for one in v])
        torch.testing.assert_close(vmap(grad(lambda one: f(one).sin().sum()))(v), by_loop)
        torch.testing.assert_close(grad(lambda rows: vmap(f)(rows).sin().sum())(v), by_loop)
        tangents = jvp(vmap(f), (v,), (v,))[1]
        torch.testing.assert_close(tangents, torch.stack([jvp(f, (one,), (one,))[1] for one in v]))


@pytest.mark.parametrize("name", CALLS)
def test_what_code_sees_of_the_layout_does_not_change(name: str) -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        out = CALLS[name](x)
        seen.append((out.shape, out.stride(), out.dtype, out.is_contiguous()))
        return out

    for _ in range(3):
        vmap(look)(torch.randn(4, 2, 3))
    assert seen[0] == seen[1] == seen[2]
    alone = CALLS[name](torch.randn(2, 3))
    assert (seen[0][0], seen[0][3]) == (alone.shape, alone.is_contiguous())


def test_a_view_that_was_seen_before_is_a_view() -> None:
    """Writes to what a call like an earlier one returned arrive where they should."""

    def f(x: Tensor) -> Tensor:
        x = x.clone()
        x[0].mul_(2)
        x.transpose(0, 1)[1].add_(1)
        x.unsqueeze(0).sub_(x.sum())
        return x

    for _ in range(3):
        x = torch.randn(4, 2, 3)
        torch.testing.assert_close(vmap(f)(x), for_each(f)(x))


def test_numbers_that_are_equal_and_of_different_types() -> None:
    """1, 1.0 and True are one key of a dictionary."""
    x = torch.arange(4)
    for exponent, dtype in ((1, torch.int64), (1.0, torch.float32), (1, torch.int64), (1.0, torch.float32)):
        out = vmap(lambda one: aten.clamp_min.default(one, exponent))(x)  # noqa: B023
        assert out.dtype == dtype


def test_a_rule_that_changes_is_used_at_once() -> None:
    x = torch.randn(4, 2, 3)
    f = vmap(lambda one: one.flip(0))
    assert torch.equal(f(x), f(x))
    with extend.overriding(BATCHING_RULES, aten.flip.default):
        extend.batching_rule(aten.flip.default)(lambda info, in_dims, x, dims: (x * 0, in_dims[0]))
        assert torch.equal(f(x), 0 * x)
    assert torch.equal(f(x), x.flip(1))


def test_what_is_kept_is_bounded() -> None:
    for least in range(seen_calls.MOST + 10):
        out = vmap(lambda one: aten.clamp_min.default(one, least))(torch.arange(6).view(2, 3))  # noqa: B023
        assert torch.equal(out, torch.arange(6).view(2, 3).clamp(min=least))
    kept = aten.clamp_min.default._functrans.specialized[Specialized].seen
    assert 0 < len(kept) <= seen_calls.MOST


def test_an_index_is_refused_as_without_vmap() -> None:
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"index {index} is out of bounds for dimension 0 with size 2"):
            vmap(lambda one: one[index])(torch.zeros(4, 2))  # noqa: B023
    with pytest.raises(IndexError):
        vmap(lambda one: one[0])(torch.zeros(4))


@pytest.mark.parametrize("swapped", [False, True])
def test_one_tensor_twice_and_two_tensors(swapped: bool) -> None:
    """Both calls look alike; what became of the one must not be taken for the other."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 3)
    pairs = [(a, a), (a, b), (b, b), (b, a)]
    for name, f in {
        "matmul": torch.matmul, "mm": torch.mm, "linear": F.linear, "sub": aten.sub.Tensor, "add": aten.add.Tensor,
        "of one and the same": lambda x, y: aten.sub.Tensor(x, x) + aten.sub.Tensor(x, y),
    }.items():  # fmt: skip
        for x, y in pairs if not swapped else pairs[::-1]:
            if name != "mm":
                out = vmap(lambda v, y=y: f(y, v))(x)  # noqa: B023
                torch.testing.assert_close(out, torch.stack([f(y, v) for v in x]), msg=f"{name}, {x is y}".__add__)
                out = vmap(lambda v, y=y: f(v, y))(x)  # noqa: B023
                torch.testing.assert_close(out, torch.stack([f(v, y) for v in x]), msg=f"{name}, {x is y}".__add__)
            x, y = torch.stack([x, x + 1]), y if x is not y else x
            out = vmap(f, in_dims=(0, None))(x, y)
            torch.testing.assert_close(out, torch.stack([f(v, y) for v in x]), msg=f"{name}, matrices".__add__)


def test_zeros_of_different_sign() -> None:
    """0.0 and -0.0 are one key of a dictionary, too."""
    x = torch.zeros(4, 2)
    for zero in (0.0, -0.0, 0.0):
        out = vmap(lambda one: aten.constant_pad_nd.default(one, [1, 1], zero))(x)  # noqa: B023
        assert torch.equal(out[:, 0].signbit(), torch.full((4,), zero).signbit())
        out = vmap(lambda one: one.clamp_min(zero))(x - 1)  # noqa: B023
        assert torch.equal(out.signbit(), torch.full((4, 2), zero).signbit())


def test_layouts_that_look_alike_to_an_example() -> None:
    """The batch dimension lies elsewhere, or is none: what code at the level sees is one shape and one stride."""
    torch.manual_seed(0)
    weight = torch.randn(3, 3)
    base = torch.randn(2, 4, 3)
    for _ in range(2):
        for x in (base.movedim(1, 0), base.movedim(1, 0).contiguous(), base[:, :1].movedim(1, 0).expand(4, 2, 3)):
            for f in (lambda v: F.linear(v, weight), lambda v: v @ weight, lambda v: v.mT @ v, lambda v: v.sum(0)):
                torch.testing.assert_close(vmap(f)(x), torch.stack([f(v) for v in x]))
                flat = vmap(lambda v, f=f: f(v * 2).contiguous().view(-1))(x)
                torch.testing.assert_close(flat, torch.stack([f(v * 2).reshape(-1) for v in x]))
