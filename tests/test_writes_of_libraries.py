"""Operators of other libraries that write to their arguments: beside eager PyTorch, and a loop over the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from functrans import functionalize, grad, jvp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CapturedOnceError, InsideTransformError, NoPureFormError

DOUBLE = torch.float64
ROWS = torch.randn(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:vmap has no batching rule for writing")


@torch.library.custom_op("writing::add_to", mutates_args={"y"})
def add_to(x: Tensor, y: Tensor, alpha: float = 1.0) -> None:
    y.add_(x * alpha)


@torch.library.custom_op("writing::count_and_sum", mutates_args={"counts"})
def count_and_sum(x: Tensor, counts: Tensor) -> Tensor:
    counts.add_((x > 0).to(counts.dtype))
    return x.cumsum(0)


@torch.library.custom_op("writing::swap", mutates_args={"a", "b"})
def swap(a: Tensor, b: Tensor) -> None:
    held = a.clone()
    a.copy_(b)
    b.copy_(held)


@torch.library.custom_op("writing::running_sums", mutates_args={"sums", "count"})
def running_sums(xs: Sequence[Tensor], sums: Sequence[Tensor], count: Tensor) -> list[Tensor]:
    for i, (x, into) in enumerate(zip(xs, sums, strict=True)):
        into.add_((i + 1) * x)
    count.add_(len(xs))
    return [2 * x for x in xs]


LIBRARY = torch.library.Library("writing", "FRAGMENT")
LIBRARY.define("clip_(Tensor(a!) x, float most) -> Tensor(a!)")
LIBRARY.impl("clip_", lambda x, most: x.clamp_(max=most), "CPU")
LIBRARY.define("cubes(Tensor[] xs, str how='a, =b', int[2] n=[1, 3], *, Tensor(a!)[] out) -> ()")


@torch.library.impl(LIBRARY, "doubled", "CPU")
def doubled(x: Tensor, total: Tensor | None = None) -> Tensor:
    if total is not None:
        total.add_(x.sum())
    return 2 * x


@torch.library.impl(LIBRARY, "cubes", "CPU")
def cubes(xs: list[Tensor], how: str = "a, =b", n: Sequence[int] = (1, 3), *, out: list[Tensor]) -> None:
    for x, into in zip(xs, out, strict=True):
        into.copy_(x ** n[1])


LIBRARY.define("doubled(Tensor x, Tensor(a!)? total=None) -> Tensor")
LIBRARY.define("numbers(Tensor(a!) x) -> int")


def by_name(x: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=DOUBLE)
    add_to(x.detach(), y, alpha=2.0)
    add_to(x=x.detach(), y=y)
    return y * x


def into_a_view(x: Tensor) -> Tensor:
    y = torch.ones(5, dtype=DOUBLE)
    add_to(x.detach(), y[1:4])
    return y[:3] * x


def with_an_output(x: Tensor) -> Tensor:
    counts = torch.zeros(3, dtype=torch.int64)
    sums = count_and_sum(x.detach(), counts)
    return (counts + sums) * x


def two(x: Tensor) -> Tensor:
    a, b = x.detach() * 1, torch.ones(3, dtype=DOUBLE)
    swap(a, b)
    return (a + 2 * b) * x


def returned(x: Tensor) -> Tensor:
    y = x.detach() * 2
    assert torch.ops.writing.clip_(y, 1.0) is y
    return y * x


def lists(x: Tensor) -> Tensor:
    sums, count = [torch.ones(3, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)[1:4]], torch.zeros((), dtype=DOUBLE)
    twice = running_sums([x.detach(), torch.ones(3, dtype=DOUBLE)], sums, count)
    running_sums((x.detach(),), sums[:1], count)
    return (sums[0] + sums[1] + twice[0] * twice[1] + count) * x


def a_list_by_name(x: Tensor) -> Tensor:
    out = [torch.empty(3, dtype=DOUBLE) for _ in range(2)]
    torch.ops.writing.cubes([x.detach(), 2 * x.detach()], out=out)
    return (out[0] + out[1]) * x


def parts_of_one(x: Tensor) -> Tensor:
    parts = torch.zeros(2, 3, dtype=DOUBLE).unbind()
    for i, part in enumerate(parts):
        running_sums([x.detach() + i], [part], torch.zeros(()))
    return (parts[0] * parts[1]) * x


def if_given(x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=DOUBLE)
    torch.ops.writing.doubled(x.detach(), total)
    return torch.ops.writing.doubled(x.detach()) * x * total


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    by_name,
    into_a_view,
    with_an_output,
    two,
    returned,
    lists,
    a_list_by_name,
    parts_of_one,
    if_given,
]


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_beside_a_loop(f: Callable[[Tensor], Tensor]) -> None:
    def slope(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x).sum(), x)[0]

    expected, slopes = torch.stack([f(x) for x in ROWS]), torch.stack([slope(x) for x in ROWS])
    close(vmap(f)(ROWS), expected)
    close(vmap(f, 1, 1)(ROWS.T.contiguous()).T, expected)
    close(vmap(vmap(f))(ROWS.view(2, 2, 3)).view(4, 3), expected)
    close(functionalize(f)(ROWS[0]), expected[0])
    close(grad(lambda x: f(x).sum())(ROWS[0]), slopes[0])
    close(vmap(grad(lambda x: f(x).sum()))(ROWS), slopes)
    close(jvp(f, (ROWS[0],), (ROWS[1],))[1], slopes[0] * ROWS[1])
    close(make_fx(functionalize(f))(ROWS[0])(ROWS[1]), expected[1])


def test_the_callers_tensor() -> None:
    given = ROWS.clone()
    vmap(lambda x: (add_to(ROWS[0], x), x)[1])(given)
    close(given, ROWS + ROWS[0])
    captured = torch.zeros(3, dtype=DOUBLE)
    grad(lambda x: (add_to(torch.ones(3, dtype=DOUBLE), captured), x.sum())[1])(ROWS[0])
    close(captured, torch.ones(3, dtype=DOUBLE))
    first, second = torch.zeros(3, dtype=DOUBLE), ROWS.clone()
    vmap(lambda x, into: running_sums([x, x], [into, torch.zeros(3, dtype=DOUBLE)], torch.zeros(())))(ROWS, second)
    grad(lambda x: running_sums([ROWS[0], ROWS[1]], [first, x.detach() * 1], torch.zeros(()))[0].sum() + x.sum())(
        ROWS[2]
    )
    close(second, 2 * ROWS)
    close(first, ROWS[0])
    with pytest.raises(CapturedOnceError):
        vmap(lambda x: (add_to(torch.ones(3, dtype=DOUBLE), captured), x)[1])(ROWS)


def of_what_has_a_derivative(x: Tensor) -> Any:
    y = torch.zeros(3, dtype=DOUBLE)
    add_to(x, y)
    return y.sum()


def test_no_derivative_is_no_zero() -> None:
    f, x, t = of_what_has_a_derivative, ROWS[0], ROWS[1]
    for call in (lambda: grad(f)(x), lambda: jvp(f, (x,), (t,))):
        with pytest.raises(RuntimeError, match="no autograd formula"):
            call()
        assert interpreter_stack() == []


def test_what_shares_memory_is_refused() -> None:
    """A write to one is seen through the other, which copies would not show."""

    def twice(x: Tensor) -> Tensor:
        running_sums([ROWS[0], ROWS[1]], [x, x], torch.zeros(()))
        return x

    def seen_meanwhile(x: Tensor) -> Tensor:
        add_to(x[:2], x[1:])
        return x

    def in_two_arguments(x: Tensor) -> Tensor:
        swap(x.view_as(x), x)
        return x

    for f in (twice, seen_meanwhile, in_two_arguments):
        for transform in (vmap, functionalize):
            with pytest.raises(InsideTransformError, match="of tensors that share memory inside"):
                transform(f)(ROWS.clone())
            assert interpreter_stack() == []


def test_what_is_written_beside_a_number_is_refused() -> None:
    with pytest.raises(NoPureFormError, match="writing.numbers"):
        vmap(lambda x: (torch.ops.writing.numbers(x * 1), x)[1])(ROWS)
    assert interpreter_stack() == []
