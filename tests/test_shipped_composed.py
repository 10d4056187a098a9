"""The transforms that ship, by twos, with each other, themselves and the transforms of the core in all places.

First every ordered pair of all that there is, beside torch.func and what is said by hand; each has a value, or an error
that says why not. Then those that leave values as they are by threes, with the transforms of the core. The functions
compute with small whole numbers, which bfloat16 holds exactly, so that each leaves values as they are.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from functrans import (
    all_gather,
    bounds,
    condition,
    count,
    custom_jvp,
    custom_vjp,
    custom_vmap,
    functionalize,
    grad,
    hessian,
    hvp,
    jacrev,
    jet,
    jvp,
    laplacian,
    linearize,
    log_density,
    lowp,
    observe,
    plant,
    psum,
    reap,
    sample,
    sanitize,
    seed,
    sow,
    sparse_hessian,
    sparse_jacobian,
    sparsity,
    vjp,
    vmap,
)
from functrans.core.stack import interpreter_stack
from functrans.errors import CallError, CallValueError, MissingRuleError
from functrans.interpreters.vmap.rules.random import RandomnessError

X, V = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, -1.0, 2.0])
W = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])


def f(x: Tensor) -> Tensor:
    return (sow(W @ x, "product") * x).sum() + x[0] ** 2


def matrix(x: Tensor) -> Tensor:
    """The gradient of f, by hand."""
    return (W + W.T) @ x + torch.stack([2 * x[0], 0 * x[0], 0 * x[0]])


SECOND = W + W.T + torch.diag(torch.tensor([2.0, 0.0, 0.0]))

SHIPPED: dict[str, Callable[..., Any]] = {
    "reap": lambda f: lambda x: reap(f)(x)[0],
    "plant": lambda f: plant(f, {}),
    "plant a function": lambda f: plant(f, {"product": lambda y: y}),
    "count": lambda f: lambda x: count(f)(x)[0],
    "sanitize": sanitize,
    "lowp": lambda f: lowp(f, torch.bfloat16),
    "condition": lambda f: condition(f, {}),
    "seed": lambda f: seed(f, 0),
}
CORE: dict[str, tuple[Callable[..., Any], Any]] = {
    "grad": (grad, matrix(X)),
    "jvp": (lambda f: lambda x: jvp(f, (x,), (V,))[1], matrix(X) @ V),
    "vmap": (lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x])), torch.stack([f(X), f(2 * X)])),
    "vmap of grad": (lambda f: lambda x: vmap(grad(f))(torch.stack([x, -x])), torch.stack([matrix(X), matrix(-X)])),
    "grad of vmap": (lambda f: grad(lambda x: vmap(f)(torch.stack([x, 2 * x])).sum()), 5 * matrix(X)),
    "hessian": (hessian, SECOND),
    "hvp": (lambda f: lambda x: hvp(f, (x,), (V,))[1][0], SECOND @ V),
}


@pytest.mark.parametrize("core", CORE)
@pytest.mark.parametrize(("one", "other"), list(itertools.product(SHIPPED, SHIPPED)))
def test_by_twos_and_a_third(one: str, other: str, core: str) -> None:
    transform, expected = CORE[core]
    a, b = SHIPPED[one], SHIPPED[other]
    if one == other == "plant a function":
        return
    for program in (a(b(transform(f))), a(transform(b(f))), transform(a(b(f)))):
        torch.testing.assert_close(program(X), expected, rtol=0, atol=0)
        assert interpreter_stack() == []


# ------------------------------------------------------------------------------------------- all ordered pairs

DOUBLE = torch.float64
X2, V2, W2 = X.double(), V.double(), W.double()


def pair_of_cubics(x: Tensor) -> Tensor:
    return torch.stack([(W2 @ x * x).sum() + x[0] ** 2 * x[1], x[0] * x[1] * x[2]])


def sowing(x: Tensor) -> Tensor:
    return torch.stack([(sow(W2 @ x, "product") * x).sum() + x[0] ** 2 * x[1], x[0] * x[1] * x[2]])


def dense(found: Tensor) -> Tensor:
    return torch.zeros(found.shape, dtype=DOUBLE).index_put(tuple(found.indices()), found.values())


def total(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).sum()


def by_vjp(f: Any) -> Any:
    def function(x: Tensor) -> Tensor:
        out, pull = vjp(f, x)
        return pull(torch.ones_like(out))[0]

    return function


def with_vjp(f: Any) -> Any:
    function = custom_vjp(f)
    function.defvjp(lambda x: (f(x), x), lambda x, cotangent: vjp(f, x)[1](cotangent))
    return function


def with_jvp(f: Any) -> Any:
    function = custom_jvp(f)
    function.defjvp(lambda primals, tangents: jvp(f, primals, tangents))
    return function


def with_vmap(f: Any) -> Any:
    function = custom_vmap(f)
    function.def_vmap(lambda size, batched, x: (vmap(f)(x), True))
    return function


def standard(f: Any, name: str) -> Any:
    return lambda x: f(x) * sample(Normal(torch.zeros((), dtype=DOUBLE), 1.0), name)


def density(f: Any) -> Any:
    def model(x: Tensor) -> None:
        sample(Normal(f(x).sum(), 1.0), "y")

    return lambda x: log_density(model)({"y": torch.tensor(3.0, dtype=DOUBLE)}, x)


ROOT = torch.log(torch.tensor(2 * torch.pi, dtype=DOUBLE)) / 2
func = torch.func
same = lambda f: f

#: by name the transform, and what it does by torch.func and by hand
PAIRED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "grad": (lambda f: grad(total(f)), lambda f: func.grad(total(f))),
    "vmap": (
        lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x])), lambda f: lambda x: torch.stack([f(x), f(2 * x)])
    ),
    "jvp": (lambda f: lambda x: jvp(f, (x,), (V2,))[1], lambda f: lambda x: func.jvp(f, (x,), (V2,))[1]),
    "vjp": (by_vjp, lambda f: func.grad(total(f))),
    "hessian": (hessian, func.hessian),
    "linearize": (lambda f: lambda x: linearize(f, x)[1](V2), lambda f: lambda x: func.jvp(f, (x,), (V2,))[1]),
    "jet": (
        lambda f: lambda x: jet(f, (x,), ([V2, torch.zeros_like(V2)],))[1][1],
        lambda f: lambda x: func.jvp(lambda x: func.jvp(f, (x,), (V2,))[1], (x,), (V2,))[1],
    ),
    "laplacian": (laplacian, lambda f: lambda x: func.hessian(f)(x).diagonal(dim1=-2, dim2=-1).sum(-1)),
    "sparsity": (
        lambda f: lambda x: sparsity(f)(x).to_dense().to(DOUBLE),
        lambda f: lambda x: (func.jacrev(f)(x).reshape(-1, 3) != 0).to(DOUBLE),
    ),
    "sparse_jacobian": (
        lambda f: lambda x: sparse_jacobian(f)(x).to_dense(), lambda f: lambda x: func.jacrev(f)(x).reshape(-1, 3)
    ),
    "sparse_hessian": (lambda f: lambda x: sparse_hessian(total(f))(x).to_dense(), lambda f: func.hessian(total(f))),
    "values of sparse_jacobian": (
        lambda f: lambda x: dense(sparse_jacobian(f)(x)), lambda f: lambda x: func.jacrev(f)(x).reshape(-1, 3)
    ),
    "bounds": (lambda f: lambda x: bounds(f)(x, x)[0], same),
    "linear bounds": (lambda f: lambda x: bounds(f, method="linear")(x, x)[1], same),
    "lowp": (lambda f: lowp(f, torch.bfloat16), same),
    "count": (lambda f: lambda x: count(f)(x)[0], same),
    "sanitize": (sanitize, same),
    "reap": (lambda f: lambda x: reap(f)(x)[0], same),
    "plant": (lambda f: plant(f, {}), same),
    "seed": (
        lambda f: seed(lambda x: f(x) + 0 * sample(Normal(torch.zeros((), dtype=DOUBLE), 1.0), "z"), 0), same
    ),
    "condition": (
        lambda f: condition(standard(f, "factor"), {"factor": torch.tensor(2.0, dtype=DOUBLE)}),
        lambda f: lambda x: 2 * f(x),
    ),
    "log_density": (density, lambda f: lambda x: -((3 - f(x).sum()) ** 2) / 2 - ROOT),
    "functionalize": (functionalize, same),
    "custom_vjp": (with_vjp, same),
    "custom_jvp": (with_jvp, same),
    "custom_vmap": (with_vmap, same),
    "psum": (
        lambda f: lambda x: vmap(lambda x: psum(f(x), "i"), axis_name="i")(torch.stack([x, 2 * x])),
        lambda f: lambda x: (f(x) + f(2 * x)).expand(2, *f(x).shape),
    ),
}  # fmt: skip

#: pairs without a value: of which kind the error is, and what it says; the first is applied to the second
REFUSED: dict[tuple[str, str], tuple[type[Exception], str]] = {
    # a rule for reverse mode does not say what forward mode is
    **{
        (outer, "custom_vjp"): (CallError, "got forward mode (jvp, jacfwd, ...); expected reverse mode")
        for outer in ("jvp", "linearize", "jet", "laplacian")
    },
    # whether the examples share a draw has to be said; a Hessian is a vmap over directions
    **{
        (outer, "seed"): (RandomnessError, "ran in vmap(..., randomness='error')")
        for outer in ("vmap", "hessian", "sparse_hessian", "psum")
    },
    # a density needs all values; a draw has none
    ("log_density", "seed"): (CallValueError, "got no value for 'z'"),
}


def compare(outer: str, inner: str) -> None:
    (a, by_hand), (b, also_by_hand) = PAIRED[outer], PAIRED[inner]
    expected = by_hand(also_by_hand(pair_of_cubics))(X2)
    if (outer, inner) == ("log_density", "condition"):
        expected = expected - (2**2 / 2 + ROOT)  # the value that is given is one of the model's, too
    found = a(b(sowing))(X2)
    if outer == "sparsity":  # a pattern is sound, and knows nothing of what cancels
        assert found.shape == expected.shape and bool((found >= expected).all())
    elif "lowp" in (outer, inner) and "log_density" in (outer, inner):  # the logarithm of 2 pi is no whole number
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    else:
        torch.testing.assert_close(found, expected)


#: bounds of bounds run all arithmetic of the inner ones on intervals
LONG = {
    ("linear bounds", "linear bounds"), ("linear bounds", "bounds"), ("sparse_hessian", "linear bounds"),
}  # fmt: skip
PAIRS = [
    pytest.param(*pair, marks=pytest.mark.slow if pair in LONG else ()) for pair in itertools.product(PAIRED, PAIRED)
]


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_every_ordered_pair(outer: str, inner: str) -> None:
    if (outer, inner) in REFUSED:
        kind, text = REFUSED[outer, inner]
        with pytest.raises(kind) as caught:
            compare(outer, inner)
        assert text in str(caught.value)
    else:
        compare(outer, inner)
    assert interpreter_stack() == []


@pytest.mark.parametrize("outer", ["grad", "jvp", "linearize", "sparse_jacobian"])
@pytest.mark.parametrize("inner", [name for name in PAIRED if name != "linear bounds"])
def test_the_modes_of_the_caller_change_no_derivative(outer: str, inner: str) -> None:
    """``no_grad`` around a transform is not one in it; one in it makes constants."""
    if (outer, inner) in REFUSED:
        return
    transform = PAIRED[outer][0]
    program = transform(PAIRED[inner][0](sowing))
    expected = program(X2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(program(X2), expected)

    def constant(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = PAIRED[inner][0](sowing)(x)
        return y * x.sum()

    value = PAIRED[inner][0](sowing)(X2)
    if outer == "grad":
        torch.testing.assert_close(transform(constant)(X2), value.sum().expand(3))
        with torch.no_grad():
            torch.testing.assert_close(transform(constant)(X2), value.sum().expand(3))


#: what cannot look across the examples of a vmap, being of one of them
OF_ONE_EXAMPLE = ("laplacian", "sparsity", "sparse_jacobian", "sparse_hessian", "values of sparse_jacobian")
ACROSS = sorted(PAIRED.keys() - {"seed", "psum", "vmap", "log_density", "custom_vmap", "condition", *OF_ONE_EXAMPLE})


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("name", ACROSS)
def test_between_a_batch_and_its_collectives(name: str, gather: bool) -> None:
    """All examples move together: what a transform makes of one is what it makes of the sum of all.

    Reverse mode is the gradient of the sum of what all examples return, which is each as often as there are examples.
    """
    transform, by_hand = PAIRED[name]
    across = (lambda y: all_gather(y, "i").sum(0)) if gather else lambda y: psum(y, "i")
    xs = torch.stack([X2, 2 * X2, -X2])
    f = lambda x: across(sowing(x))
    found = vmap(transform(f), axis_name="i")(xs)
    each = torch.stack([by_hand(pair_of_cubics)(x) for x in xs])
    if name in ("grad", "vjp", "hessian"):  # a Hessian's rows are by reverse mode
        expected = 3 * each
    else:
        expected = each.sum(0).expand_as(found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OF_ONE_EXAMPLE)
def test_what_is_of_one_example_does_not_look_across(name: str) -> None:
    xs = torch.stack([X2, 2 * X2])
    with pytest.raises(MissingRuleError, match="looks at all of them. Take it around the vmap of that name"):
        vmap(PAIRED[name][0](lambda x: psum(sowing(x), "i")), axis_name="i")(xs)
    assert interpreter_stack() == []


def test_named_values_between_transforms() -> None:
    product, low, high = W2 @ X2, X2 - 0.25, X2 + 0.25
    for name in ("jet", "laplacian", "sparsity", "sparse_jacobian", "sparse_hessian", "hessian", "lowp", "sanitize"):
        _, named = reap(PAIRED[name][0](sowing))(X2)
        torch.testing.assert_close(named["product"], product)
        inside = PAIRED[name][0](lambda x: reap(sowing)(x)[1]["product"])(X2)
        assert inside.isfinite().all()
    for method in ("intervals", "linear"):
        _, named = reap(bounds(sowing, method=method))(low, high)
        torch.testing.assert_close(named["product"], (product - W2.abs().sum(1) / 4, product + W2.abs().sum(1) / 4))
    planted = plant(laplacian(sowing), {"product": torch.zeros(3, dtype=DOUBLE)})(X2)
    torch.testing.assert_close(planted, torch.stack([2 * X2[1], 0 * X2[1]]))
    with pytest.raises(CallValueError, match="not sown"):
        plant(jet, {"other": X2})(sowing, (X2,), ([V2],))


def test_densities_inside() -> None:
    def drawing(x: Tensor) -> Tensor:
        y = sample(Normal(x.sum(), 1.0), "y")
        return y * x.square()

    values = {"y": torch.tensor(3.0, dtype=DOUBLE)}
    expected = -((3 - X2.sum()) ** 2) / 2 - ROOT
    for transform in (laplacian, PAIRED["jet"][0], jacrev, sparsity):
        torch.testing.assert_close(log_density(lambda x: transform(drawing)(x))(values, X2), expected)  # noqa: B023
    with pytest.raises(MissingRuleError, match="take the bounds of the density"):
        log_density(bounds(drawing))(values, X2 - 1, X2 + 1)
    low, high = bounds(lambda x: log_density(drawing)(values, x))(X2 - 0.1, X2 + 0.1)
    assert low < expected < high


def model(x: Tensor) -> Tensor:
    y = sample(Normal(W @ x, 1.0), "y")
    observe(Normal(y, 2.0), x)
    return y


@pytest.mark.parametrize("name", sorted(SHIPPED.keys() - {"plant a function"}))  # of a name that the model does not sow
def test_densities(name: str) -> None:
    a, values = SHIPPED[name], {"y": torch.tensor([2.0, 0.0, 1.0])}
    expected = -((values["y"] - W @ X) ** 2).sum() / 2 - ((X - values["y"]) ** 2).sum() / 8
    plain = lambda x: log_density(model)(values, x)
    constant = plain(X) - expected
    slope = W.T @ (values["y"] - W @ X) - (X - values["y"]) / 4
    tolerance = {"rtol": 0.02, "atol": 0.02} if name == "lowp" else {}
    for density in (a(plain), lambda x: log_density(a(model))(values, x)):
        torch.testing.assert_close(density(X) - constant, expected, **tolerance)
        torch.testing.assert_close(grad(density)(X), slope, **tolerance)
        torch.testing.assert_close(vmap(grad(density))(X.expand(2, 3)), slope.expand(2, 3), **tolerance)
    torch.testing.assert_close(a(grad(plain))(X), slope, **tolerance)
