"""The Laplacian in one pass against the trace of PyTorch's Hessian."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from smooth_functions import FUNCTIONS
from torch import Tensor, nn

from functrans import grad, hessian, jacrev, jvp, laplacian, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_hessian(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The trace of the Jacobian of the Jacobian."""

    def function(x: Tensor) -> Tensor:
        second = jacrev(jacrev(f))(x).flatten(-x.dim())
        second = second.reshape(*second.shape[: second.dim() - 1 - x.dim()], x.numel(), x.numel())
        return second.diagonal(dim1=-2, dim2=-1).sum(-1)

    return function


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def single(name: str) -> Callable[[Tensor], Tensor]:
    f = FUNCTIONS[name]
    return (lambda x: f(x)[0]) if name == "var_mean" else f


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kind_of_operator(name: str) -> None:
    torch.manual_seed(0)
    f, x = single(name), some(3)
    value, gradient, found = laplacian(f, with_value=True)(x)
    close(value, f(x))
    close(gradient, jacrev(f)(x))
    close(found, by_hessian(f)(x))


SOME = "tanh", "x * x * x", "softmax", "linear", "solve", "prod", "atan2", "cat", "layer_norm", "qr", "svd", "slogdet"


@pytest.mark.parametrize("name", SOME)
def test_under_and_over_other_transforms(name: str) -> None:
    torch.manual_seed(0)
    f, x, v = single(name), some(3), some(3)
    rows = some(4, 3)
    close(vmap(laplacian(f))(rows), torch.stack([by_hessian(f)(row) for row in rows]))
    close(grad(lambda x: laplacian(f)(x).sum())(x), grad(lambda x: by_hessian(f)(x).sum())(x))
    close(jvp(laplacian(f), (x,), (v,))[1], jvp(by_hessian(f), (x,), (v,))[1])
    slope = lambda x: grad(lambda x: f(x).sin().sum())(x)
    close(laplacian(slope)(x), by_hessian(slope)(x))
    close(laplacian(lambda x: vmap(lambda s: f(x * s))(x))(x), by_hessian(lambda x: vmap(lambda s: f(x * s))(x))(x))


def test_the_bilaplacian() -> None:
    f = lambda x: (x**4).prod().sin()
    x = some(2)
    close(laplacian(laplacian(f))(x), by_hessian(by_hessian(f))(x))
    # of |x|⁴ in d dimensions: Δ|x|⁴ = (4d + 8)|x|², and Δ|x|² = 2d
    close(laplacian(laplacian(lambda x: x.square().sum() ** 2))(some(5)), torch.tensor(28.0 * 10, dtype=torch.float64))


OF_A_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold": lambda s: s.unfold(0, 1, 1),
    "sum": lambda s: s.sum(0, keepdim=True),
    "cumsum": lambda s: s.cumsum(-1),
    "flip": lambda s: s.flip(()),
    "roll": lambda s: s.roll(1),
    "sort": lambda s: s.sort(0)[0],
    "index_select": lambda s: s.index_select(0, torch.tensor([0])),
    "gather": lambda s: s.gather(0, torch.tensor(0)),
    "scatter": lambda s: s.scatter_add(0, torch.tensor(0), s),
    "softmax": lambda s: s.softmax(0) * s,
    "transposed": lambda s: s.t() * s.squeeze(0),
    "repeated": lambda s: s.repeat(2) * s.expand(2),
}


@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_dimensions_of_a_number(name: str) -> None:
    f, x = (lambda x: OF_A_NUMBER[name](x[0].exp() * x[1])), some(3)
    close(laplacian(f)(x), by_hessian(f)(x))


def test_closed_forms() -> None:
    x = some(3)
    r = x.norm()
    close(laplacian(lambda x: 1 / x.norm())(x), torch.tensor(0.0, dtype=torch.float64))  # harmonic in three dimensions
    close(laplacian(lambda x: (-x.norm()).exp())(x), (1 - 2 / r) * (-r).exp())  # the hydrogen atom's ground state
    a = some(3, 3)
    close(laplacian(lambda x: x @ a @ x)(x), 2 * a.trace())


def test_directions_and_samples() -> None:
    f = lambda x: (x**3).prod() + x.sin().sum()
    x = some(3)
    h = hessian(f)(x)
    v = some(5, 3)
    _, slopes, found = laplacian(f, with_value=True, directions=v)(x)
    close(found, torch.einsum("di,ij,dj->", v, h, v))
    close(slopes, v @ grad(f)(x))
    weights = torch.rand(3, dtype=torch.float64)
    close(laplacian(f, directions=weights.sqrt().diag())(x), (weights * h.diagonal()).sum())
    apart = lambda x: (x**4).sum()
    close(laplacian(apart, samples=1)(x), (12 * x**2).sum())
    torch.manual_seed(0)
    estimates = torch.stack([laplacian(f, samples=50)(x) for _ in range(40)])
    error = estimates.std() / 40**0.5
    assert (estimates.mean() - h.trace()).abs() < 5 * error
    rows = some(2, 3)
    vmap(laplacian(f, samples=2), randomness="different")(rows)
    with pytest.raises(RuntimeError, match="random"):
        vmap(laplacian(f, samples=2))(rows)


def test_shapes_trees_and_other_arguments() -> None:
    def f(x: Tensor, scale: Tensor, *, power: int) -> dict[str, Any]:
        return {"matrix": scale * x**power, "fixed": scale * 2, "index": x.argmax(), "n": 3}

    x, scale = some(2, 3), some(2, 1)
    value, gradient, found = laplacian(f, with_value=True)(x, scale, power=3)
    close(found["matrix"], 6 * scale * x)
    close(gradient["matrix"], jacrev(lambda x: scale * x**3)(x))
    assert not found["fixed"].any() and not gradient["fixed"].any() and gradient["fixed"].shape == (2, 1, 2, 3)
    assert value["n"] == 3 and found["n"] is None and gradient["n"] is None
    single = torch.tensor(3.0, dtype=torch.float64)
    close(laplacian(torch.sin, with_value=True)(single), (single.sin(), single.cos(), -single.sin()))
    cube = laplacian(lambda x: x**3, with_value=True)(single[None])
    close(cube, (single[None] ** 3, 3 * single[None, None] ** 2, 6 * single[None]))
    assert laplacian(lambda x: scale)(x).shape == (2, 1)
    close(laplacian(lambda x: x.detach() * x)(x), torch.zeros(2, 3, dtype=torch.float64))
    close(laplacian(torch.square)(torch.tensor(3.0)), torch.tensor(2.0))


def test_a_network() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)
    net = nn.Sequential(*layers).double().requires_grad_(False)
    points = some(6, 4)
    expected = torch.stack([by_hessian(net)(p) for p in points])
    close(vmap(laplacian(net))(points), expected)


def test_an_autograd_function() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * tangent

    x = some(3)
    close(laplacian(lambda x: Cube.apply(x * 2).sum())(x), (4 * 6 * 2 * x).sum())


def test_bad_input() -> None:
    x = torch.zeros(3)
    for wrong in (3.0, x.long(), x.to(torch.complex64)):
        with pytest.raises(CallTypeError, match="as first argument"):
            laplacian(torch.sum)(wrong)  # type: ignore[arg-type]
    for directions in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3).double(), torch.tensor(1.0), [x]):
        with pytest.raises((CallValueError, CallTypeError), match="as directions"):
            laplacian(torch.sum, directions=directions)(x)  # type: ignore[arg-type]
    for samples in (0, -1, 2.0):
        with pytest.raises(CallValueError, match="a positive number of samples"):
            laplacian(torch.sum, samples=samples)  # type: ignore[arg-type]
    with pytest.raises(CallValueError, match="with directions"):
        laplacian(torch.sum, samples=2, directions=torch.eye(3))
    with pytest.raises(CallTypeError):
        laplacian(3)  # type: ignore[arg-type]
    assert interpreter_stack() == []
