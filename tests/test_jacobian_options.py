"""Options of the Jacobians: values beside them, complex derivatives, randomness, keyword arguments; and hvp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_calls import thread_state

import functrans
from functrans import (
    grad,
    grad_and_value,
    hessian,
    hvp,
    jacfwd,
    jacfwd_and_value,
    jacrev,
    jacrev_and_value,
    jvp,
    value_and_grad,
    vmap,
)
from functrans.errors import CallError

torch.manual_seed(0)
X, Y, V = torch.randn(3, 3, dtype=torch.float64)
M = torch.randn(2, 3, dtype=torch.float64)
Z, C = torch.complex(X, Y), torch.complex(M, M.flip(1))


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def quotients(f: Callable[[Tensor], Tensor], x: Tensor, step: Any = 1e-6) -> Tensor:
    """The Jacobian by central differences; a complex ``step`` is one in another direction of the plane."""
    return torch.stack([(f(x + step * e) - f(x - step * e)) / (2 * step) for e in torch.eye(3, dtype=x.dtype)], -1)


@pytest.fixture(autouse=True)
def the_thread_is_as_before() -> Any:
    before = thread_state()
    yield
    assert thread_state() == before


# ---- values

WITH_VALUE = {"jacrev": (jacrev, jacrev_and_value), "jacfwd": (jacfwd, jacfwd_and_value)}


@pytest.mark.parametrize("chunk_size", (None, 1, 2))
@pytest.mark.parametrize("name", WITH_VALUE)
def test_the_jacobian_and_the_value_in_one_evaluation(name: str, chunk_size: int | None) -> None:
    _, both = WITH_VALUE[name]
    runs = []

    def f(x: Tensor, d: Any, *, factor: float) -> Any:
        runs.append(1)
        return {"out": torch.tanh(M @ x) * factor * d["y"].sum(), "total": x.sum()}

    jacobian, value = both(f, argnums=(0, 1), chunk_size=chunk_size)(X, {"y": Y}, factor=2.0)
    assert len(runs) == (1 if name == "jacrev" or chunk_size is None else -(-6 // chunk_size))
    close(value, f(X, {"y": Y}, factor=2.0))
    close(jacobian["out"][0], quotients(lambda x: f(x, {"y": Y}, factor=2.0)["out"], X))
    close(jacobian["out"][1]["y"], quotients(lambda y: f(X, {"y": y}, factor=2.0)["out"], Y))
    close(jacobian["total"][0], torch.ones(3, dtype=X.dtype))


@pytest.mark.parametrize("name", WITH_VALUE)
def test_value_and_aux(name: str) -> None:
    plain, both = WITH_VALUE[name]
    f = lambda x: (x**2, ("text", x))
    jacobian, (value, aux) = both(f, has_aux=True)(X)
    close(jacobian, torch.diag(2 * X))
    close(value, X**2)
    assert aux[0] == "text" and torch.equal(aux[1], X)
    close(plain(f, has_aux=True)(X)[0], jacobian)


@pytest.mark.parametrize("name", WITH_VALUE)
def test_value_under_other_transforms(name: str) -> None:
    _, both = WITH_VALUE[name]
    f = lambda x: x**3
    xs = torch.stack([X, Y])
    jacobians, values = vmap(both(f))(xs)
    close(values, xs**3)
    close(jacobians, torch.diag_embed(3 * xs**2))
    close(grad(lambda x: both(f)(x)[0].sum())(X), 6 * X)
    close(grad(lambda x: both(f)(x)[1].sum())(X), 3 * X**2)
    close(jvp(lambda x: both(f)(x)[0].sum(), (X,), (V,))[1], (6 * X * V).sum())
    close(both(lambda x: x.prod())(X), (X.prod() / X, X.prod()))


# ---- complex derivatives


def entire(z: Tensor) -> Tensor:
    return torch.tanh(C @ z) * z.exp().sum()


def test_the_function_is_holomorphic() -> None:
    close(quotients(entire, Z), quotients(entire, Z, 1e-6j))


@pytest.mark.parametrize("chunk_size", (None, 1, 2))
@pytest.mark.parametrize("transform", (jacrev, jacfwd))
def test_complex_jacobians(transform: Any, chunk_size: int | None) -> None:
    close(transform(entire, holomorphic=True, chunk_size=chunk_size)(Z), quotients(entire, Z))
    close(transform(lambda z: z * Z, holomorphic=True)(Z), torch.diag(Z))
    tree = transform(lambda d, x: {"out": d["z"] * x}, holomorphic=True)({"z": Z}, X)  # the other argument is real
    close(tree["out"]["z"], torch.diag(X).to(Z.dtype))


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_the_arguments_that_are_not_differentiated_for_may_be_complex(transform: Any) -> None:
    f = lambda x, z: (x * z).abs().square().sum()
    expected = torch.diag(2 * Z.abs() ** 2) if transform is hessian else 2 * X * Z.abs() ** 2
    close(transform(f)(X, Z), expected)
    close(transform(lambda z, x: f(x, z["z"]), argnums=1)({"z": Z}, X), expected)
    for wrong in ((1,), (0, 1)):
        with pytest.raises(CallError, match=r"complex128 as args\[1\]; expected real tensors"):
            transform(f, argnums=wrong)(X, Z)


def test_complex_gradients() -> None:
    f = lambda z: entire(z).sum()
    expected = quotients(f, Z)
    close(grad(f, holomorphic=True)(Z), expected)
    close(grad(torch.square, holomorphic=True)(Z[0]), 2 * Z[0])
    for got, value in (grad_and_value(f, holomorphic=True)(Z), value_and_grad(f, holomorphic=True)(Z)[::-1]):
        close(got, expected)
        close(value, f(Z))
    close(grad(grad(lambda z: z**3, holomorphic=True), holomorphic=True)(Z[0]), 6 * Z[0])
    both = grad(lambda a, b: (a * b.exp()).sum(), argnums=(0, 1), holomorphic=True)(Z, Z)
    close(both, (Z.exp(), Z * Z.exp()))
    close(vmap(grad(torch.square, holomorphic=True))(Z), 2 * Z)


def test_complex_hessians() -> None:
    f = lambda z: entire(z).sum()
    gradient = grad(f, holomorphic=True)
    close(hessian(f, holomorphic=True)(Z), quotients(gradient, Z))
    close(jacrev_and_value(entire, holomorphic=True)(Z), (quotients(entire, Z), entire(Z)))
    close(jacfwd_and_value(entire, holomorphic=True)(Z), (quotients(entire, Z), entire(Z)))


def test_without_holomorphic_a_complex_gradient_is_the_direction_of_ascent() -> None:
    f = lambda z: (z.abs() ** 2).sum()
    close(grad(f)(Z), 2 * Z)


# ---- randomness, keyword arguments


def test_hessian_with_randomness() -> None:
    def f(x: Tensor) -> Tensor:
        return (torch.rand(()).to(x) * x**2).sum()

    torch.manual_seed(3)
    same = hessian(f, randomness="same")(X)
    torch.manual_seed(3)
    close(same, 2 * torch.rand(()).to(X) * torch.eye(3, dtype=X.dtype))
    different = hessian(f, randomness="different")(X).diagonal()
    assert len(set(different.tolist())) == 3
    for transform in (hessian, jacfwd):
        with pytest.raises(functrans.FunctransError, match="randomness"):
            transform(f)(X)


def test_keyword_arguments() -> None:
    f = lambda x, *, scale, power: (scale["s"] * x**power).sum()
    given = {"scale": {"s": Y}, "power": 3}
    close(hessian(f)(X, **given), torch.diag(6 * Y * X))
    close(jacrev(f)(X, **given), 3 * Y * X**2)
    close(jacfwd(f)(X, **given), 3 * Y * X**2)
    close(grad_and_value(f)(X, **given)[0], 3 * Y * X**2)


# ---- hvp


def loss(x: Tensor, d: dict[str, Tensor]) -> Tensor:
    return (x.sin() * d["w"]).sum() ** 2 + (M @ x).tanh().sum()


def test_hvp_by_differences_of_the_gradient() -> None:
    value, (hx, hd) = hvp(loss, (X, {"w": Y}), (V, {"w": X}))
    close(value, loss(X, {"w": Y}))
    step = 1e-6
    gradient = grad(loss, argnums=(0, 1))
    ahead, behind = gradient(X + step * V, {"w": Y + step * X}), gradient(X - step * V, {"w": Y - step * X})
    close(hx, (ahead[0] - behind[0]) / (2 * step))
    close(hd["w"], (ahead[1]["w"] - behind[1]["w"]) / (2 * step))


def test_hvp_of_the_hessian_and_of_pytorch() -> None:
    f = lambda x: loss(x, {"w": Y})
    value, (product,) = hvp(f, (X,), (V,))
    close(product, hessian(f)(X) @ V)
    theirs_value, theirs = torch.autograd.functional.hvp(f, X, V)
    close((value, product), (theirs_value, theirs))


def test_hvp_with_aux_and_under_transforms() -> None:
    runs = []

    def f(x: Tensor) -> Any:
        runs.append(1)
        return (x**3).sum(), ("text", 2 * x)

    value, (product,), aux = hvp(f, (X,), (V,), has_aux=True)
    close(product, 6 * X * V)
    close(value, (X**3).sum())
    assert aux[0] == "text" and torch.equal(aux[1], 2 * X) and len(runs) == 1
    cube = lambda x: (x**3).sum()
    xs = torch.stack([X, Y])
    close(vmap(lambda x: hvp(cube, (x,), (V,))[1][0])(xs), 6 * xs * V)
    rows = vmap(lambda v: hvp(cube, (X,), (v,))[1][0])(torch.eye(3, dtype=X.dtype))
    close(rows, torch.diag(6 * X))
    close(grad(lambda x: hvp(cube, (x,), (V,))[1][0].sum())(X), 6 * V)
    close(jvp(lambda x: hvp(cube, (x,), (V,))[1][0], (X,), (Y,))[1], 6 * Y * V)
    x = X.clone().requires_grad_()
    hvp(cube, (x,), (V,))[1][0].sum().backward()
    close(x.grad, 6 * V)


def test_errors_leave_the_thread_as_it_was() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    for transform in (jacrev_and_value, jacfwd_and_value, hessian):
        with pytest.raises(ZeroDivisionError):
            transform(fails)(X)
    with pytest.raises(ZeroDivisionError):
        hvp(fails, (X,), (X,))
