"""A rule of one transform that runs another one in its own place, on a function that closes over the rule's level."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import grad, jvp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import OtherThreadError, SameLevelError
from functrans.extend import lowered

ONES = torch.ones(3)
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: grad(lambda x: f(x).sum())(ONES),
    "jvp": lambda f: jvp(f, (ONES,), (ONES,)),
    "vmap": lambda f: vmap(f)(torch.ones(2, 3)),
}
#: operators that come in by every way there is
OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointwise": torch.mul,
    "reflected": lambda a, b: a.__rsub__(b),
    "a product": lambda a, b: torch.outer(a, b).sum(0),
    "a list": lambda a, b: torch.stack([a, b]).sum(0),
    "by name": lambda a, b: torch.add(input=a, other=b, alpha=2),
    "a composite": torch.nn.functional.mse_loss,
    "three": lambda a, b: torch.where(a > 0, a, b),
    "a write": lambda a, b: a.clone().mul_(b),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("order", (0, 1))
def test_two_transforms_of_one_level_do_not_meet(operator: str, order: int) -> None:
    op = OPERATORS[operator]
    for outer, inner in itertools.product(TRANSFORMS, TRANSFORMS):

        def body(x: Tensor, inner: str = inner) -> Tensor:
            with lowered(x.interpreter):  # as a rule of that transform runs
                with pytest.raises(SameLevelError, match="both at level 1"):
                    TRANSFORMS[inner](lambda y: op(x, y) if order else op(y, x))
                assert not interpreter_stack()
            return x * 2

        TRANSFORMS[outer](body)


def test_as_an_argument_it_is_right() -> None:
    def body(x: Tensor) -> Tensor:
        with lowered(x.interpreter):
            value = x.value
            assert torch.equal(grad(lambda y: (value * y).sum())(value), value)
        return x * 2

    for transform in TRANSFORMS.values():
        transform(body)


def test_wrappers_of_two_threads_are_told_by_the_thread() -> None:
    def outside(x: Tensor) -> Tensor:
        found: list[BaseException] = []

        def work() -> None:
            for order in (0, 1):
                try:
                    grad(lambda y, order=order: (x * y if order else torch.stack([y, x])).sum())(ONES)
                except OtherThreadError as error:
                    found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(found) == 2
        return x * 2

    jvp(outside, (ONES,), (ONES,))
