"""The file that grows along the lessons of docs/learn/ is a small functrans."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import lessons
import mini
import pytest
import torch

import functrans


def test_the_file_is_what_the_lessons_make_of_it():
    assert Path(mini.__file__).read_text(encoding="utf-8") == lessons.complete_file(), "run docs/learn/lessons.py"
    assert lessons.complete_file().count("\n") < 250


random = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
matrix, rows, pairs, point, direction = random(3, 3), random(4, 3), random(2, 4, 3), random(3), random(3)


def f(x: Any) -> Any:
    return (torch.tanh((matrix * x).sum(1)) * x.sin()).sum() - (x * x - x).cos().sum() * 0.5


def slope(library: Any) -> Any:
    return lambda f: lambda x: library.jvp(f, (x,), (torch.ones_like(x),))[1]


def confusion(derivative: Any) -> Any:
    return derivative(lambda x: x * derivative(lambda y: x + y)(torch.tensor(1.0)))(torch.tensor(1.0))


def issue_32576(derivative: Any) -> Any:
    return derivative(lambda x: derivative(lambda y: y * (x - y))(x))(torch.tensor(1.0))


COMPOSITIONS = {
    "vmap(grad)": lambda T: T.vmap(T.grad(f))(rows),
    "grad(vmap)": lambda T: T.grad(lambda rows: T.vmap(f)(rows).sum())(rows),
    "vmap(vmap(grad))": lambda T: T.vmap(T.vmap(T.grad(f)))(pairs),
    "vmap(grad(grad))": lambda T: T.vmap(T.grad(lambda x: (T.grad(f)(x) * direction).sum()))(rows),
    "vmap(jvp(grad))": lambda T: T.vmap(lambda x: T.jvp(T.grad(f), (x,), (direction,))[1])(rows),
    "grad(jvp)": lambda T: T.grad(lambda x: T.jvp(f, (x,), (direction,))[1])(point),
    "jvp(jvp)": lambda T: T.jvp(lambda x: T.jvp(f, (x,), (direction,))[1], (point,), (point,))[1],
    "grad(vmap(grad))": lambda T: T.grad(lambda rows: T.vmap(T.grad(f))(rows).tanh().sum())(rows),
    "a Hessian": lambda T: T.vmap(lambda row: T.jvp(T.grad(f), (point,), (row,))[1])(torch.eye(3).double()),
    "confusion of grad": lambda T: confusion(T.grad),
    "confusion of jvp": lambda T: confusion(slope(T)),
    "confusion of jvp in grad": lambda T: T.grad(lambda x: x * slope(T)(lambda y: x + y)(x))(torch.tensor(1.0)),
    "pytorch#32576 by grad": lambda T: issue_32576(T.grad),
    "pytorch#32576 by jvp": lambda T: issue_32576(slope(T)),
    "pytorch#32576 of a batch": lambda T: T.vmap(lambda x: T.grad(lambda x: T.grad(lambda y: y * (x - y))(x))(x))(
        point
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_file_does_what_functrans_does(name):
    torch.testing.assert_close(COMPOSITIONS[name](mini), COMPOSITIONS[name](functrans))
    assert mini.TOP is None


#: Each makes a function of a vector, with a number as its result, of another such function.
KINDS = {
    "grad": lambda T, f: lambda x: (T.grad(f)(x) * direction).sum(),
    "jvp": lambda T, f: lambda x: T.jvp(f, (x,), (direction,))[1],
    "vmap": lambda T, f: lambda x: T.vmap(lambda row: f(x * row) * x.sum())(rows).sum(),
}


@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, repeat=3)), ids=" of ".join)
def test_the_file_does_what_functrans_does_at_three_levels(kinds):
    def composed(library: Any) -> Any:
        function = f
        for kind in reversed(kinds):
            function = KINDS[kind](library, function)
        return function(point)

    torch.testing.assert_close(composed(mini), composed(functrans))


def test_derivatives_are_not_confused():
    for derivative in (mini.grad, slope(mini), functrans.grad):
        assert confusion(derivative) == 1 and issue_32576(derivative) == -1


def test_random_numbers_of_the_file_differ_between_examples():
    assert len(set(mini.vmap(lambda x: x * 0 + torch.rand(()))(torch.ones(4)).tolist())) == 4


def test_the_file_refuses_what_it_cannot_do_and_leaves_its_stack_as_it_was():
    with pytest.raises(NotImplementedError, match="PyTorch's own autograd"):
        mini.grad(torch.sin)(torch.tensor(1.0, requires_grad=True))
    with pytest.raises(ValueError, match="expected a number"):
        mini.grad(torch.sin)(rows)
    with pytest.raises(KeyError):
        mini.vmap(mini.grad(torch.lgamma))(point)
    assert mini.TOP is None
