"""The batching rule of ``einsum``, against a loop over distinct examples."""

from __future__ import annotations

import itertools
import string

import pytest
import torch
from loop import examples, for_each
from rule_cases import declines, values

import functrans

aten = torch.ops.aten

EQUATIONS = {
    "ij,jk->ik": ((3, 4), (4, 5)),
    "ij , jk -> ki": ((3, 4), (4, 5)),
    "ij,jk": ((3, 4), (4, 5)),
    "Ba,ab": ((3, 4), (4, 5)),
    "ii->i": ((3, 3),),
    "ii": ((3, 3),),
    "ij->": ((3, 4),),
    "i,ij,j->": ((3,), (3, 4), (4,)),
    "...ij,...jk->...ik": ((2, 3, 4), (2, 4, 5)),
    "...ij,jk": ((2, 3, 4), (4, 5)),
    "i...,i...": ((3, 2), (3, 2)),
    "qhd,khd->hqk": ((3, 2, 4), (5, 2, 4)),
    ",ij->ji": ((), (3, 4)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_rule_equals_the_loop(equation: str) -> None:
    shapes = EQUATIONS[equation]

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, *tensors)

    def total(*tensors: torch.Tensor) -> torch.Tensor:
        return f(*tensors).sin().sum()

    choices = [(None, 0, len(shape)) for shape in shapes]
    for in_dims in itertools.product(*choices):
        if all(d is None for d in in_dims):
            continue
        args = [
            values(*shape[: d or 0], *(() if d is None else (6,)), *shape[d or 0 :])
            for shape, d in zip(shapes, in_dims)
        ]
        torch.testing.assert_close(functrans.vmap(f, in_dims=in_dims)(*args), for_each(f, in_dims)(*args))
        places = tuple(range(len(shapes)))
        inside = functrans.vmap(functrans.grad(total, argnums=places), in_dims=in_dims)(*args)
        for i, row in enumerate(examples(args, in_dims)):
            leaves = [x.clone().requires_grad_() for x in row]
            for got, expected in zip(inside, torch.autograd.grad(total(*leaves), leaves)):
                torch.testing.assert_close(got[i], expected)
        leaves = [x.clone().requires_grad_() for x in args]
        loop = for_each(total, in_dims)(*leaves).sum()
        batched = functrans.vmap(total, in_dims=in_dims)
        outside = functrans.grad(lambda *a: batched(*a).sum(), argnums=places)(*args)  # noqa: B023
        for got, expected in zip(outside, torch.autograd.grad(loop, leaves)):
            torch.testing.assert_close(got, expected)


def test_operands_batched_at_different_levels() -> None:
    x, w, y = values(3, 4), values(4, 5), values(2, 5)
    got = functrans.vmap(lambda x: functrans.vmap(lambda y: torch.einsum("i,ij,j->", x, w, y))(y))(x)
    torch.testing.assert_close(got, x @ w @ y.T)


def test_no_letter_is_left() -> None:
    assert declines(aten.einsum.default, (None, (0,)), string.ascii_letters, [values(3)])
