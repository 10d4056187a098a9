"""What a transform returns inside of another is a tensor like any that code there makes: it may be written in place.

Also where it does not depend on what is transformed, and is a value of a lower level underneath.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import functrans
from functrans import grad, jvp, vmap
from functrans.errors import CapturedWriteError

DOUBLE = torch.float64
POINT = torch.tensor([0.3, -0.7, 1.1], dtype=DOUBLE)
WEIGHT = torch.arange(9, dtype=DOUBLE).view(3, 3) / 7 - 0.5

#: Functions of a vector: by a program, by one operator, as views, written inside.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": lambda x: x.sin() * 2,
    "product": lambda x: F.linear(x, WEIGHT),
    "view": lambda x: (x * x).view(3, 1).squeeze(-1),
    "written": lambda x: x.clone().mul_(x),
    "reduction": lambda x: x.cumsum(0) + x.sum(),
}

#: What a transform returns of a function at a captured point.
RESULTS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "jvp": lambda f: functrans.jvp(f, (POINT,), (POINT + 1,)),
    "vjp": lambda f: functrans.vjp(f, POINT)[0],
    "pullback": lambda f: functrans.vjp(f, POINT)[1](POINT * 2),
    "aux": lambda f: functrans.grad(lambda x: (f(x).sum(), f(x) * 3), has_aux=True)(POINT),
    "grad_and_value": lambda f: functrans.grad_and_value(lambda x: f(x).sum())(POINT),
    "jacrev": lambda f: functrans.jacrev(f)(POINT),
    "jacfwd": lambda f: functrans.jacfwd(f)(POINT),
    "hessian": lambda f: functrans.hessian(lambda x: f(x).sin().sum())(POINT),
    "linearize": lambda f: (functrans.linearize(f, POINT)[0], functrans.linearize(f, POINT)[1](POINT)),
    "hvp": lambda f: functrans.hvp(lambda x: f(x).square().sum(), (POINT,), (POINT,)),
    "vmap": lambda f: functrans.vmap(f)(torch.stack([POINT, 2 * POINT])),
    "vmap of what is the same": lambda f: functrans.vmap(lambda x: f(POINT), out_dims=None)(torch.ones(2)),
    "nested": lambda f: functrans.vmap(lambda x: functrans.jacrev(f)(x) * x)(torch.stack([POINT, 2 * POINT])),
    "pullback without effect": lambda f: functrans.vjp(lambda x, y: f(x), POINT, POINT)[1](POINT),
}  # fmt: skip


def leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in leaves(part)]


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_may_be_written(name: str, function: str) -> None:
    values = [x.clone() for x in leaves(RESULTS[name](FUNCTIONS[function]))]
    point = POINT.clone()

    def written(w: Tensor) -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for x in leaves(RESULTS[name](FUNCTIONS[function])):
            x.mul_(w)
            x.add_(w * w)
            total = total + x.sin().sum()
        return total

    def expected(w: Tensor) -> Tensor:
        return sum((x * w + w * w).sin().sum() for x in values)  # type: ignore[return-value]

    w = torch.tensor(1.3, dtype=DOUBLE)
    by_hand = w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(expected(by_hand), by_hand)
    torch.testing.assert_close(grad(written)(w), slope)
    torch.testing.assert_close(jvp(written, (w,), (torch.ones_like(w),)), (expected(w), slope))
    batch = torch.stack([w, 2 * w])
    torch.testing.assert_close(vmap(written)(batch), torch.stack([expected(b) for b in batch]))
    by_hand = batch.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(sum(expected(b) for b in by_hand), by_hand)
    torch.testing.assert_close(vmap(grad(written))(batch), slopes)
    assert torch.equal(POINT, point)


def test_what_was_captured_stays_captured() -> None:
    """An argument that comes out as it went in, and a captured tensor that is handed over as aux, are the caller's."""
    captured = torch.ones(3)
    for hand_over in (
        lambda: functrans.vjp(lambda x: x, captured)[0],
        lambda: functrans.jvp(lambda x: x, (captured,), (captured,))[0],
        lambda: functrans.grad(lambda x: (x.sum(), captured), has_aux=True)(captured)[1],
    ):
        with pytest.raises(CapturedWriteError, match="captured"):
            grad(lambda w: hand_over().mul_(w).sum())(torch.tensor(2.0))  # noqa: B023
        grad(lambda w: hand_over().add_(1).sum() * w)(torch.tensor(2.0))  # noqa: B023
    assert torch.equal(captured, torch.full((3,), 4.0))
