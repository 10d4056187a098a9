"""vmap with a name: psum, pmean, pmax, pmin, all_gather, axis_index against what they mean on the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import (
    all_gather,
    axis_index,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    pmax,
    pmean,
    pmin,
    psum,
    vjp,
    vmap,
)
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError


def each(x: Tensor, of_all: Tensor) -> Tensor:
    return of_all.expand(x.shape)


#: By name: a function of one example, and the same on the whole batch [B, n].
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "psum": (lambda x: x * psum(x.sin(), "i"), lambda x: x * x.sin().sum(0)),
    "psum of a constant": (lambda x: x * psum(2.0, "i"), lambda x: x * 2 * len(x)),
    "psum twice": (lambda x: psum(x * psum(x, "i"), "i").cos(), lambda x: each(x, (x * x.sum(0)).sum(0).cos())),
    "pmean": (lambda x: (x - pmean(x, "i")) ** 2, lambda x: (x - x.mean(0)) ** 2),
    "batch norm": (
        lambda x: (x - pmean(x, "i")) / (pmean((x - pmean(x, "i")) ** 2, "i") + 0.1).sqrt(),
        lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 0.1).sqrt(),
    ),
    "pmax": (lambda x: (x - pmax(x, "i")).exp() * x, lambda x: (x - x.amax(0)).exp() * x),
    "pmin": (lambda x: x * pmin(x * x, "i"), lambda x: x * (x * x).amin(0)),
    "softmax over examples": (
        lambda x: (x - pmax(x, "i")).exp() / psum((x - pmax(x, "i")).exp(), "i"), lambda x: x.softmax(0)
    ),
    "all_gather": (
        lambda x: (all_gather(x, "i") * x).sum(0) ** 2, lambda x: ((x.unsqueeze(0) * x.unsqueeze(1)).sum(1)) ** 2
    ),
    "all_gather behind": (
        lambda x: (all_gather(x, "i", axis=-1) * x.unsqueeze(-1)).sum(-1), lambda x: x * x.sum(0)
    ),
    "axis_index": (lambda x: x**2 * axis_index("i"), lambda x: x**2 * torch.arange(len(x)).unsqueeze(1)),
}  # fmt: skip
named = pytest.mark.parametrize("name", FUNCTIONS)


@named
@pytest.mark.parametrize("in_dim", [0, 1])
def test_values(name: str, in_dim: int) -> None:
    one, whole = FUNCTIONS[name]
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(one, in_dims=in_dim, axis_name="i")(x.movedim(0, in_dim)), whole(x))


@named
def test_the_gradient_inside_is_that_of_the_sum_of_all_examples(name: str) -> None:
    one, whole = FUNCTIONS[name]
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda x: whole(x).sum(), x)
    torch.testing.assert_close(vmap(grad(lambda x: one(x).sum()), axis_name="i")(x), expected)


@named
def test_differentiated_from_outside(name: str) -> None:
    one, whole = FUNCTIONS[name]
    x, v = torch.randn(2, 4, 3, dtype=torch.float64)
    f = vmap(one, axis_name="i")
    expected = torch.autograd.functional.jacobian(whole, x)
    torch.testing.assert_close(jacrev(f)(x), expected)
    torch.testing.assert_close(jacfwd(f)(x), expected)
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], torch.einsum("ijkl,kl->ij", expected, v))
    torch.testing.assert_close(vjp(f, x)[1](v)[0], torch.einsum("ij,ijkl->kl", v, expected))
    second = torch.autograd.functional.hessian(lambda x: whole(x).sin().sum(), x)
    torch.testing.assert_close(hessian(lambda x: f(x).sin().sum())(x), second)


@named
def test_forward_mode_inside(name: str) -> None:
    """The tangents of all examples together, as one tangent of the batch."""
    one, whole = FUNCTIONS[name]
    x, v = torch.randn(2, 4, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(whole, x)
    tangents = vmap(lambda x, v: jvp(one, (x,), (v,))[1], axis_name="i")(x, v)
    torch.testing.assert_close(tangents, torch.einsum("ijkl,kl->ij", jacobian, v))


@named
def test_second_derivatives_inside(name: str) -> None:
    """Both walks are of the sum of all examples."""
    one, whole = FUNCTIONS[name]
    x = torch.randn(4, 3, dtype=torch.float64)
    inner = lambda x: torch.autograd.grad(whole(x).sin().sum(), x, create_graph=True)[0]
    expected = torch.autograd.functional.jacobian(lambda x: (inner(x) ** 2).sum(), x)
    first = grad(lambda x: one(x).sin().sum())
    torch.testing.assert_close(vmap(grad(lambda x: (first(x) ** 2).sum()), axis_name="i")(x), expected)


@named
def test_other_vmaps_around_and_inside(name: str) -> None:
    one, whole = FUNCTIONS[name]
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = torch.stack([whole(rows) for rows in x])
    torch.testing.assert_close(vmap(vmap(one, axis_name="i"))(x), expected)
    torch.testing.assert_close(vmap(vmap(one, axis_name="i"), axis_name="j")(x), expected)
    # the named one outside: the examples of the inner one go along
    torch.testing.assert_close(vmap(vmap(one), axis_name="i")(x.movedim(0, 1)), expected.movedim(0, 1))
    torch.testing.assert_close(
        vmap(vmap(one, in_dims=1, out_dims=1), axis_name="i")(x.movedim(0, 2)), expected.movedim(0, 2)
    )
    inside = torch.stack([torch.autograd.functional.jacobian(lambda r: whole(r).sum(), rows) for rows in x])
    found = vmap(grad(lambda x: vmap(one, in_dims=1)(x).sum()), axis_name="i")(x.movedim(0, 2))
    torch.testing.assert_close(found, inside.movedim(0, 2))


def test_several_names() -> None:
    x = torch.randn(2, 4, 3)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (
            psum(x, ("i", "j")),
            pmax(x, ("j", "i")),
            pmean(x, "i") - pmean(x, "j"),
            axis_index("i") * 10 + axis_index("j"),
        )

    total, greatest, difference, index = vmap(vmap(f, axis_name="j"), axis_name="i")(x)
    torch.testing.assert_close(total, x.sum((0, 1)).expand(x.shape))
    torch.testing.assert_close(greatest, x.amax((0, 1)).expand(x.shape))
    torch.testing.assert_close(difference, x.mean(0, keepdim=True) - x.mean(1, keepdim=True))
    assert index.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_the_innermost_vmap_of_a_name_is_meant() -> None:
    x = torch.randn(2, 4)
    found = vmap(vmap(lambda x: psum(x, "i"), axis_name="i"), axis_name="i")(x)
    torch.testing.assert_close(found, x.sum(1, keepdim=True).expand(2, 4))


def test_trees_and_dtypes() -> None:
    def f(x: Tensor) -> Any:
        return psum({"a": x, "b": (1, x > 0)}, "i")

    x = torch.tensor([1.0, -2.0, 3.0])
    out = vmap(f, axis_name="i")(x)
    assert out["a"].tolist() == [2.0] * 3 and out["b"][0].tolist() == [3] * 3 and out["b"][1].tolist() == [2] * 3
    assert out["b"][0].dtype == torch.int64


def test_a_result_belongs_to_the_function_that_asked() -> None:
    """It may be written, as what code inside makes."""

    def f(x: Tensor) -> Tensor:
        total = psum(x, "i")
        total.add_(x)
        return total

    x = torch.randn(4)
    torch.testing.assert_close(vmap(f, axis_name="i")(x), x.sum() + x)
    torch.testing.assert_close(vmap(grad(f), axis_name="i")(x), torch.full((4,), 5.0))


def test_linearize() -> None:
    x, v = torch.randn(2, 4, 3, dtype=torch.float64)
    f = vmap(FUNCTIONS["batch norm"][0], axis_name="i")
    torch.testing.assert_close(linearize(f, x)[1](v), jvp(f, (x,), (v,))[1])


def test_axis_size() -> None:
    assert vmap(lambda: axis_index("i"), axis_name="i", axis_size=3)().tolist() == [0, 1, 2]
    f = vmap(lambda x: x * axis_index("i"), in_dims=(None,), axis_name="i", axis_size=2)
    assert f(torch.tensor(5)).tolist() == [0, 5]
    assert vmap(lambda x: x + 1, axis_size=2)(torch.zeros(2)).tolist() == [1.0, 1.0]
    with pytest.raises(CallValueError, match="batches of size 3 with axis_size=2"):
        vmap(lambda x: x, axis_size=2)(torch.zeros(3))
    for wrong in (-1, 2.0, True):
        with pytest.raises(CallValueError, match="axis_size="):
            vmap(lambda x: x, axis_size=wrong)  # type: ignore[arg-type]


def test_chunks_have_no_name() -> None:
    with pytest.raises(CallValueError, match="a batch in one piece"):
        vmap(lambda x: psum(x, "i"), axis_name="i", chunk_size=2)(torch.zeros(4))
    assert vmap(lambda x: psum(x, "i"), axis_name="i", chunk_size=4)(torch.ones(4)).tolist() == [4.0] * 4


def test_a_name_that_nobody_has() -> None:
    for f in (lambda x: psum(x, "j"), lambda x: axis_index("j") * x, lambda x: all_gather(x, "j")):
        with pytest.raises(CallValueError, match="those that run are 'i'"):
            vmap(f, axis_name="i")(torch.zeros(2))
        with pytest.raises(CallValueError, match="none of a name is running"):
            f(torch.zeros(2))
    assert interpreter_stack() == []
    with pytest.raises(CallValueError, match="a name twice"):
        vmap(lambda x: psum(x, ("i", "i")), axis_name="i")(torch.zeros(2))
    with pytest.raises(CallTypeError, match="tensors and numbers"):
        vmap(lambda x: psum("text", "i"), axis_name="i")(torch.zeros(2))
    with pytest.raises(CallValueError, match="axis=3"):
        vmap(lambda x: all_gather(x, "i", axis=3), axis_name="i")(torch.zeros(2))
    with pytest.raises(CallValueError, match="one name"):
        vmap(lambda x: x, axis_name=("i", "j"))
