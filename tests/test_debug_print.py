"""debug_print: a line for each example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functrans
from functrans import debug_print, explain, grad, jvp, vmap

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def printed(capsys: Any) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_line_for_each_example(capsys: Any) -> None:
    def row(x: Tensor) -> Tensor:
        debug_print("{} and {total:.2f}", x, total=x.sum())
        return x.sin()

    assert torch.equal(vmap(row)(X), X.sin())
    assert printed(capsys) == [
        "vmap(row)[0]: tensor([1., 2.]) and 3.00",
        "vmap(row)[1]: tensor([3., 4.]) and 7.00",
    ]
    vmap(row, in_dims=1, axis_name="columns")(X)
    assert printed(capsys) == ["columns[0]: tensor([1., 3.]) and 4.00", "columns[1]: tensor([2., 4.]) and 6.00"]


def test_nested_batches_outermost_first(capsys: Any) -> None:
    def outer(x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            debug_print("y {:.0f}", y)
            debug_print("x {}", x)
            debug_print("both {:.0f}", x[0] * 10 + y)
            return y

        return vmap(inner)(x)

    vmap(outer)(X)
    assert printed(capsys) == [
        *(f"vmap(outer)[{i}] vmap(inner)[{j}]: y {X[i, j]:.0f}" for i in range(2) for j in range(2)),
        *(f"vmap(outer)[{i}]: x {X[i]}" for i in range(2)),
        *(f"vmap(outer)[{i}] vmap(inner)[{j}]: both {X[i, 0] * 10 + X[i, j]:.0f}" for i in range(2) for j in range(2)),
    ]


def test_under_derivatives_and_outside_of_transforms(capsys: Any) -> None:
    def f(x: Tensor) -> Tensor:
        y = x * x
        debug_print(x=x, y=y)
        return y.sum()

    assert torch.equal(grad(f)(X[0]), 2 * X[0])
    assert torch.equal(jvp(grad(f), (X[0],), (X[0],))[1], 2 * X[0])
    assert torch.equal(vmap(grad(f))(X), 2 * X)
    f(X[0])
    plain = "x=tensor([1., 2.]), y=tensor([1., 4.])"
    assert printed(capsys) == [
        plain, plain, f"vmap(f)[0]: {plain}", "vmap(f)[1]: x=tensor([3., 4.]), y=tensor([ 9., 16.])", plain,
    ]  # fmt: skip


def test_views_that_were_written(capsys: Any) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        first = y[0]
        y.mul_(10)
        debug_print("{}", first)
        return y

    vmap(f)(X)
    assert printed(capsys) == ["vmap(f)[0]: 10.0", "vmap(f)[1]: 30.0"]


def test_what_is_no_tensor_and_an_empty_line(capsys: Any) -> None:
    vmap(lambda x: (debug_print("here"), x)[1])(X)
    debug_print("{a} {b!r}", a=3, b="text")
    debug_print(a=[1, 2], b=torch.tensor(True))
    assert printed(capsys) == ["here", "3 'text'", "a=[1, 2], b=True"]


def test_a_template_that_does_not_fit() -> None:
    for call in (
        lambda: debug_print("{} {}", X),
        lambda: debug_print("{missing}", X),
        lambda: debug_print("{:.2f}", X),
        lambda: debug_print("{", X),
        lambda: debug_print(X),  # type: ignore[arg-type]
    ):
        with pytest.raises(functrans.FunctransError, match="debug_print"):
            call()


def test_printing_is_no_operator() -> None:
    def f(x: Tensor) -> Tensor:
        debug_print("{}", x)
        return x.sin()

    assert explain(vmap(f), X).base_operators() == ["aten.sin.default"]
