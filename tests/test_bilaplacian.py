"""The bilaplacian against fourth derivatives by PyTorch, closed forms and nested Laplacians."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import bilaplacian, grad, jvp, laplacian, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fourth(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All fourth derivatives of a number, by PyTorch alone."""
    derivative = torch.autograd.functional.jacobian
    first = lambda x: derivative(f, x, create_graph=True)
    second = lambda x: derivative(first, x, create_graph=True)
    third = lambda x: derivative(second, x, create_graph=True)
    return derivative(third, x)


W = some(4, 3)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "polynomial": lambda x: (x**4).prod() + x.square().sum() ** 2 + x[0] ** 3 * x[1],
    "network": lambda x: (W @ x).tanh().square().sum(),
    "softmax": lambda x: (x.softmax(0) * x).sum().exp(),
    "solve": lambda x: torch.linalg.solve(torch.eye(3, dtype=x.dtype) * 4 + torch.outer(x, x), x.sin()).sum(),
    "chosen": lambda x: torch.where(x > 0, x**5, x.cos()).sum() * x.prod(),
    "written": lambda x: x.clone().mul_(x).index_add_(0, torch.tensor([0]), x[1:2] ** 4).exp().sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fourth_derivatives(name: str) -> None:
    f, x, v = FUNCTIONS[name], some(3, seed=1), some(2, 3, seed=2)
    expected = fourth(f, x)
    torch.testing.assert_close(bilaplacian(f)(x), torch.einsum("iijj->", expected))
    along = torch.einsum("ijkl,di,dj,ek,el->", expected, v, v, v, v)
    torch.testing.assert_close(bilaplacian(f, directions=v)(x), along)


def test_closed_forms() -> None:
    x = some(4)
    zero = torch.zeros((), dtype=x.dtype)
    torch.testing.assert_close(bilaplacian(lambda x: x.square().sum().log() * x.square().sum())(x[:2]), zero)
    torch.testing.assert_close(bilaplacian(lambda x: x.norm())(x[:3]), zero)  # both are biharmonic
    k = some(4, seed=1)
    wave = lambda x: (k @ x).sin()
    torch.testing.assert_close(bilaplacian(wave)(x), k.square().sum() ** 2 * wave(x))
    torch.testing.assert_close(bilaplacian(lambda x: x.square().sum() ** 2)(x), zero + 8 * 4 * 6)
    torch.testing.assert_close(bilaplacian(lambda x: x**4)(zero + 3), zero + 24)


def test_around_and_inside_of_other_transforms() -> None:
    f, x, v = FUNCTIONS["network"], some(3), some(3, seed=1)
    rows = some(4, 3, seed=2)
    twice = lambda x: laplacian(laplacian(f))(x)
    torch.testing.assert_close(vmap(bilaplacian(f))(rows), torch.stack([twice(row) for row in rows]))
    torch.testing.assert_close(grad(bilaplacian(f))(x), grad(twice)(x))
    torch.testing.assert_close(vmap(grad(bilaplacian(f)))(rows), torch.stack([grad(twice)(row) for row in rows]))
    torch.testing.assert_close(jvp(bilaplacian(f), (x,), (v,)), jvp(twice, (x,), (v,)))
    slope = lambda x: grad(f)(x)
    torch.testing.assert_close(bilaplacian(slope)(x), grad(twice)(x))
    torch.testing.assert_close(bilaplacian(lambda x: vmap(f)(torch.stack([x, 2 * x])))(x)[1], 16 * twice(2 * x))
    torch.testing.assert_close(laplacian(bilaplacian(f))(x), bilaplacian(laplacian(f))(x))


@pytest.mark.parametrize("options", [{}, {"directions": some(2, 3)}, {"samples": 3}], ids=str)
def test_trees_and_other_arguments(options: dict[str, Any]) -> None:
    def f(x: Tensor, y: Tensor, *, scale: float) -> Any:
        return {"a": (scale * x * y).sin(), "b": [x.square().sum() ** 2, y, x.argmax(), 3.0, None]}

    x, y = some(3), some(3, seed=1)
    found = bilaplacian(f, **options)(x, y, scale=0.5)
    assert found["a"].shape == (3,) and found["b"][0].shape == ()
    assert not found["b"][1].any() and not found["b"][2] and found["b"][3:] == [None, None]
    if not options:
        torch.testing.assert_close(found["a"], (0.5 * y) ** 4 * (0.5 * x * y).sin())


def test_samples() -> None:
    f, x = FUNCTIONS["polynomial"], some(3, seed=1)
    torch.manual_seed(0)
    estimates = torch.stack([bilaplacian(f, samples=200)(x) for _ in range(60)])
    expected = bilaplacian(f)(x)
    assert (estimates.mean() - expected).abs() < 5 * estimates.std() / 60**0.5
    assert estimates.std() < expected.abs()
    one = bilaplacian(lambda x: x**4, samples=4000)(torch.tensor(1.0, dtype=x.dtype))
    assert (one - 24).abs() < 5
    rows = torch.stack([x, x])
    first, second = vmap(bilaplacian(f, samples=2), randomness="different")(rows)
    assert first != second
    with pytest.raises(RuntimeError, match="random"):
        vmap(bilaplacian(f, samples=2))(rows)
    moved = lambda s: grad(lambda s: bilaplacian(lambda x: f(s * x), samples=300)(x))(s)
    torch.manual_seed(0)
    slope, step = moved(torch.tensor(1.0, dtype=x.dtype)), 1e-5
    torch.manual_seed(0)
    above = bilaplacian(lambda x: f((1 + step) * x), samples=300)(x)
    torch.manual_seed(0)
    below = bilaplacian(lambda x: f((1 - step) * x), samples=300)(x)
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-5)


def test_bad_input() -> None:
    x = some(3)
    with pytest.raises(CallTypeError, match="expected a function as the first argument"):
        bilaplacian(x)  # type: ignore[arg-type]
    for options, wrong in (({}, x.long()), ({"samples": 2}, torch.ones(3, dtype=torch.complex64)), ({}, 1.0)):
        with pytest.raises(CallTypeError, match=r"bilaplacian\(.*expected a real floating-point tensor"):
            bilaplacian(torch.sin, **options)(wrong)  # type: ignore[arg-type]
    for options, text in (
        ({"samples": 0}, "samples=0"),
        ({"samples": 1.5}, "samples=1.5"),
        ({"samples": 2, "directions": x[None]}, "samples=2 with directions"),
        ({"directions": x}, "directions"),
        ({"directions": x[None].float()}, "directions"),
    ):
        with pytest.raises(CallValueError, match=rf"bilaplacian\(.*{text}"):
            bilaplacian(torch.sin, **options)(x)  # type: ignore[arg-type]
    assert interpreter_stack() == []
