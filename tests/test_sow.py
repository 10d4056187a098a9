"""sow, reap, plant: against the intermediates written out by hand, and loops over the examples."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import (
    grad,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jvp,
    linear_transpose,
    linearize,
    plant,
    reap,
    sow,
    vjp,
    vmap,
)
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError, DeadWrapperError, MissingRuleError
from functrans.extend import Carried, RuleTable, TableInterpreter, transform

F64 = torch.float64
W = torch.tensor([[0.5, -1.0, 0.3], [0.2, 0.7, -0.4], [1.0, 0.1, 0.6]], dtype=F64)
X = torch.tensor([0.3, -0.8, 1.1], dtype=F64)
V = torch.tensor([1.0, 0.5, -2.0], dtype=F64)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    assert interpreter_stack() == []


def f(x: Tensor) -> Tensor:
    first = sow(W @ x, "first")
    second = sow(first.tanh(), "second")
    return (second * x).sum()


def plain(x: Tensor) -> Tensor:
    return ((W @ x).tanh() * x).sum()


def by_hand(x: Tensor) -> dict[str, Tensor]:
    return {"first": W @ x, "second": (W @ x).tanh()}


#: By name: a function of a scalar function, and of what batch it is, if it is of one, the result.
AROUND: dict[str, Callable[..., Any]] = {
    "nothing": lambda f: f,
    "grad": grad,
    "grad twice": lambda f: grad(lambda x: (grad(f)(x) * V).sum()),
    "jvp": lambda f: lambda x: jvp(f, (x,), (V,)),
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.tensor(2.0, dtype=F64)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacfwd twice": lambda f: jacfwd(jacfwd(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "hvp": lambda f: lambda x: hvp(f, (x,), (V,)),
    "linearize": lambda f: lambda x: linearize(f, x)[1](V),
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (V,)),
}
around = pytest.mark.parametrize("name", AROUND)


@around
def test_values_are_those_without_the_transform(name: str) -> None:
    out, named = reap(AROUND[name](f))(X)
    torch.testing.assert_close(out, AROUND[name](plain)(X))
    torch.testing.assert_close(named, by_hand(X))


@around
def test_inside_and_outside_of_vmap(name: str) -> None:
    rows = torch.stack([X, 2 * X, X - 1])
    expected = {k: torch.stack([by_hand(x)[k] for x in rows]) for k in ("first", "second")}
    outs = torch.utils._pytree.tree_map(lambda *xs: torch.stack(xs), *[AROUND[name](plain)(x) for x in rows])
    for out, named in (reap(vmap(AROUND[name](f)))(rows), vmap(reap(AROUND[name](f)))(rows)):
        torch.testing.assert_close(out, outs)
        torch.testing.assert_close(named, expected)


@around
def test_planted_values_are_constants(name: str) -> None:
    """Against the function written with the value in its place."""
    second = torch.tensor([0.1, 0.2, -0.3], dtype=F64)
    outs = plant(AROUND[name](f), {"second": second})(X)
    torch.testing.assert_close(outs, AROUND[name](lambda x: (second * x).sum() + 0 * x.sin().sum())(X))
    first = torch.tensor([2.0, 0.2, -0.3], dtype=F64)
    outs = plant(AROUND[name](f), {"first": first})(X)
    torch.testing.assert_close(outs, AROUND[name](lambda x: (first.tanh() * x).sum() + 0 * x.sin().sum())(X))


@around
def test_planted_functions_are_differentiated(name: str) -> None:
    outs, named = reap(plant(AROUND[name](f), {"first": lambda first: first**2 + V}))(X)
    torch.testing.assert_close(outs, AROUND[name](lambda x: (((W @ x) ** 2 + V).tanh() * x).sum())(X))
    torch.testing.assert_close(named["first"], (W @ X) ** 2 + V)


def test_cotangents_by_name() -> None:
    """Of all names at once, against backward hooks of PyTorch's autograd."""
    zeros = {name: torch.zeros(3, dtype=F64) for name in ("first", "second")}

    def moved(added: dict[str, Tensor], x: Tensor) -> Tensor:
        return plant(f, {name: lambda v, name=name: v + added[name] for name in added})(x)

    x = X.clone().requires_grad_()
    first = W @ x
    second = first.tanh()
    first.retain_grad(), second.retain_grad()
    (second * x).sum().backward()
    expected = {"first": first.grad, "second": second.grad}
    torch.testing.assert_close(grad(moved)(zeros, X), expected)
    found = vmap(grad(moved), in_dims=(None, 0))(zeros, torch.stack([X, X]))
    torch.testing.assert_close(found, {k: torch.stack([g, g]) for k, g in expected.items()})
    # of one name: the gradient by what is planted
    torch.testing.assert_close(grad(lambda v: plant(f, {"first": v})(X))(W @ X), first.grad)


def test_tangents_by_name() -> None:
    (_, named), (_, tangents) = jvp(reap(f), (X,), (V,))
    torch.testing.assert_close(named, by_hand(X))
    slope = W @ V
    torch.testing.assert_close(tangents, {"first": slope, "second": slope / (W @ X).cosh() ** 2})
    jacobian = jacrev(lambda x: reap(f)(x)[1])(X)
    torch.testing.assert_close(jacobian["first"], W)
    # a penalty on an intermediate, differentiated twice
    penalty = lambda x: reap(grad(f))(x)[1]["second"].square().sum()
    torch.testing.assert_close(
        hessian(penalty)(X), torch.autograd.functional.hessian(lambda x: (W @ x).tanh().square().sum(), X)
    )


def test_nested_vmaps_and_constants() -> None:
    x = torch.arange(6, dtype=F64).view(2, 3)
    one = lambda x: sow(x * 2, "double") + sow(torch.ones(2), "same").sum()
    _, named = reap(vmap(vmap(one, in_dims=0), in_dims=1))(x)
    assert torch.equal(named["double"], 2 * x.T) and torch.equal(named["same"], torch.ones(3, 2, 2))
    new = {"double": torch.rand(3, 2, dtype=F64), "same": torch.rand(3, 2, 2)}
    out, used = reap(plant(vmap(vmap(one), in_dims=1), new))(x)
    torch.testing.assert_close(out, new["double"] + new["same"].sum(-1))
    torch.testing.assert_close(used, new)


def test_what_is_reaped_can_be_planted() -> None:
    rows = torch.stack([X, 2 * X, X + 1])
    for transformed, x in ((f, X), (hessian(f), X), (vmap(grad(f)), rows), (vmap(hessian(f), in_dims=1), rows)):
        _, named = reap(transformed)(x)
        _, same = reap(plant(transformed, named))(x)
        assert named["first"].shape == x.shape
        torch.testing.assert_close(same, named)
    torch.testing.assert_close(plant(f, reap(f)(2 * X)[1])(X), (by_hand(2 * X)["second"] * X).sum())


def test_trees() -> None:
    def g(x: Tensor) -> Tensor:
        pair = sow({"b": (x, x + 1), "a": x.sum()}, "pair")
        return pair["b"][1] * pair["a"]

    out, named = reap(vmap(g))(torch.ones(2, 3))
    assert torch.equal(named["pair"]["b"][1], torch.full((2, 3), 2.0)) and named["pair"]["a"].tolist() == [3.0, 3.0]
    new = {"pair": {"a": torch.tensor([1.0, 2.0]), "b": (torch.zeros(2, 3), torch.ones(2, 3))}}
    assert torch.equal(plant(vmap(g), new)(torch.ones(2, 3)), torch.tensor([[1.0], [2.0]]).expand(2, 3))
    assert torch.equal(reap(vmap(g))(torch.ones(2, 3))[0], out)


def test_the_innermost_plant_and_every_reap() -> None:
    a, b = torch.tensor(2.0), torch.tensor(5.0)
    g = lambda x: sow(x, "x") * 10
    out, outer = reap(plant(lambda x: reap(plant(g, {"x": a}))(x), {"x": b}))(torch.tensor(1.0))
    assert out == (20.0, {"x": 2.0}) and outer == {"x": 2.0}
    out, outer = reap(plant(reap(g), {"x": b}))(torch.tensor(1.0))
    assert out == (50.0, {"x": 5.0}) and outer == {"x": 5.0}


def test_writes_do_not_show() -> None:
    """What is sown may be written, and so may what was planted, and a view of something that was written."""

    def g(x: Tensor) -> Tensor:
        y = x * 1
        view = y[0]
        y.mul_(3)
        first = sow(view, "view")
        second = sow(y, "y")
        second.add_(1)
        return first + second.sum()

    x = torch.tensor([1.0, 2.0])
    for transformed in (g, lambda x: grad(g)(x), lambda x: jvp(g, (x,), (x,))):
        _, named = reap(transformed)(x)
        assert named["view"] == 3 and named["y"].tolist() == [3.0, 6.0]
    assert reap(vmap(g))(x.expand(2, 2))[1]["y"].tolist() == [[3.0, 6.0]] * 2
    new = torch.zeros(2)
    assert plant(g, {"y": new})(x) == 3 + 2 and not new.any()


def test_without_a_reap_nothing_happens() -> None:
    assert sow(X, "x") is X
    seen = []
    vmap(grad(lambda x: (seen.append((x, sow(x, "x"))), x)[1]))(X)
    assert seen[0][0] is seen[0][1]


def test_autograd_of_pytorch_goes_on() -> None:
    x = X.clone().requires_grad_()
    out, named = reap(f)(x)
    (out + named["first"].sum()).backward()
    expected = torch.autograd.functional.jacobian(lambda x: plain(x) + (W @ x).sum(), X)
    torch.testing.assert_close(x.grad, expected)


def test_keyword_arguments_and_modules() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return sow(x * scale, "scaled") + 1

    out, named = reap(Net())(X, scale=2.0)
    assert torch.equal(out, 2 * X + 1) and torch.equal(named["scaled"], 2 * X)


class Bounds(TableInterpreter):
    kind, payload, rules = "bounds", ("upper",), RuleTable("bounds of test_sow", default="pass")


def test_what_carries_something_else() -> None:
    """By a table it is reaped as it leaves the transform."""
    out, named = reap(transform(Bounds, lambda x: sow(x, "x")))(Carried(X, upper=X + 1))
    assert torch.equal(named["x"].value, X) and torch.equal(named["x"].upper, X + 1) and torch.equal(out.value, X)
    assert torch.equal(reap(transform(Bounds, lambda x: sow(x, "x")))(X)[1]["x"], X)  # a constant
    with pytest.raises(MissingRuleError, match="no rule for sow. A linear function is transposed without values"):
        reap(lambda x: linear_transpose(lambda x: sow(2 * x, "x"), x)(x))(X)


def test_bad_input() -> None:
    twice = lambda x: sow(sow(x, "x") + 1, "x")
    with pytest.raises(CallValueError, match=r"sow\(value, 'x'\): got a name that was sown before"):
        reap(twice)(X)
    plant(twice, {"x": X})(X)  # both of them
    with pytest.raises(CallValueError, match="Number the names"):
        reap(vmap(lambda x: sow(x, "x"), chunk_size=2))(X)
    with pytest.raises(CallTypeError, match=r"sow\(value, name\): got the int 3 as name; expected a string"):
        sow(X, 3)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match="got the float 1.0 in the value of 'x'; expected tensors. Write torch.as_"):
        sow(1.0, "x")
    with pytest.raises(CallTypeError, match="expected a function as the first argument"):
        reap(X)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match="expected a dict from names to values"):
        plant(f, X)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match="the int 3 as a name"):
        plant(f, {3: X})  # type: ignore[dict-item]
    with pytest.raises(CallValueError, match=r"got 'frist', which is not sown; .*\['first', 'second'\]"):
        plant(f, {"frist": X})(X)
    for wrong in (X[:2], X.float(), 1.0):
        with pytest.raises(CallValueError, match=r"for 'first'; expected a tensor of shape \(3,\) and"):
            plant(f, {"first": wrong})(X)
    with pytest.raises(CallValueError, match="a tuple of 1 for 'first'; expected a value of the structure"):
        plant(f, {"first": (X,)})(X)
    with pytest.raises(CallValueError, match=r"with the 2 examples of vmap\(f\) in front"):
        plant(vmap(f), {"first": X})(torch.stack([X, X]))
    with pytest.raises(CallTypeError, match="what f"):
        reap(f)(X, X)
    leaked: list[Any] = []
    vmap(lambda x: (leaked.append(x), x)[1])(X)
    with pytest.raises(DeadWrapperError):
        reap(lambda x: sow(leaked[0], "x"))(X)
