"""custom_vjp, custom_jvp, custom_vmap: the rule that was given is used in every nesting, and differentiated there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from functrans import custom_jvp, custom_vjp, custom_vmap, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallError, CallTypeError, CallValueError


@custom_vjp
def twice(x: Tensor) -> Tensor:
    """The sine, with twice its derivative, so that the rule is told from PyTorch's."""
    return x.sin()


twice.defvjp(lambda x: (x.sin(), x.cos()), lambda cos, grad: (2 * cos * grad,))


@custom_jvp
def thrice(x: Tensor) -> Tensor:
    """The sine, with three times its derivative."""
    return x.sin()


@thrice.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return thrice(*primals), 3 * primals[0].cos() * tangents[0]


#: By name: the function, by how much its rule scales the derivative, and that of the second derivative. The tangent
#: of thrice is a formula of cosines; that of twice's pullback as well.
BOTH = pytest.mark.parametrize(("f", "scale"), [(twice, 2), (thrice, 3)], ids=["custom_vjp", "custom_jvp"])


@BOTH
def test_every_nesting_of_reverse_mode(f: Callable[..., Any], scale: int) -> None:
    x, v = torch.randn(2, 5, dtype=torch.float64)
    first, second, third = scale * x.cos(), -scale * x.sin(), -scale * x.cos()
    close = torch.testing.assert_close
    close(f(x), x.sin())
    close(vmap(f)(x), x.sin())
    total = lambda x: f(x).sum()
    close(grad(total)(x), first)
    close(vmap(grad(f))(x), first)
    close(grad(lambda x: vmap(f)(x).sum())(x), first)
    close(vmap(vmap(grad(f)))(x.expand(2, 5)), first.expand(2, 5))
    close(grad(lambda x: vmap(vmap(f))(x).sum())(x.expand(2, 5) * 1), first.expand(2, 5))
    close(vmap(grad(grad(f)))(x), second)
    close(vmap(grad(grad(grad(f))))(x), third)
    close(grad(lambda x: grad(total)(x).sum())(x), second)
    close(vmap(grad(lambda x: vmap(grad(f))(x.expand(2)).sum() / 2))(x), second)
    close(jacrev(f)(x), first.diag())
    close(hessian(total)(x), second.diag())
    close(jvp(grad(total), (x,), (v,))[1], second * v)
    close(vmap(lambda x, v: jvp(grad(f), (x,), (v,))[1])(x, v), second * v)
    close(vjp(f, x)[1](v)[0], first * v)
    close(vjp(grad(total), x)[1](v)[0], second * v)


def test_forward_mode() -> None:
    x, v = torch.randn(2, 5, dtype=torch.float64)
    close = torch.testing.assert_close
    close(jvp(thrice, (x,), (v,)), (x.sin(), 3 * x.cos() * v))
    close(jacfwd(thrice)(x), (3 * x.cos()).diag())
    close(jvp(lambda x: jvp(thrice, (x,), (v,))[1], (x,), (v,))[1], -3 * x.sin() * v * v)
    close(vmap(lambda x, v: jvp(thrice, (x,), (v,))[1])(x, v), 3 * x.cos() * v)
    close(jvp(vmap(thrice), (x,), (v,))[1], 3 * x.cos() * v)
    close(grad(lambda x: jvp(thrice, (x,), (v,))[1].sum())(x), -3 * x.sin() * v)
    for transformed in (lambda: jvp(twice, (x,), (v,)), lambda: jvp(vmap(twice), (x,), (v,)), lambda: jacfwd(twice)(x)):
        with pytest.raises(CallError, match=r"got forward mode .*; expected reverse mode"):
            transformed()
    assert interpreter_stack() == []


@BOTH
def test_at_the_base(f: Callable[..., Any], scale: int) -> None:
    """PyTorch's own autograd uses the rule, and differentiates it."""
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    torch.testing.assert_close(first, scale * x.cos())
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, -scale * x.sin())
    f(x).sum().backward()
    torch.testing.assert_close(x.grad, scale * x.detach().cos())
    (mixed,) = torch.autograd.grad(grad(lambda x: f(x).sum())(x).sum(), x)
    torch.testing.assert_close(mixed, -scale * x.sin())
    (of_rows,) = torch.autograd.grad(vmap(f)(x).sum(), x)
    torch.testing.assert_close(of_rows, scale * x.cos())


def test_forward_mode_at_the_base() -> None:
    x = torch.randn(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(3))
        torch.testing.assert_close(forward_ad.unpack_dual(thrice(dual)).tangent, 3 * x.cos())
        with pytest.raises(CallError, match="forward mode"):
            twice(dual)
        torch.testing.assert_close(twice(x), x.sin())


def test_residuals_carry_their_derivative() -> None:
    """A residual that is neither input nor output is a function of the inputs, at every level."""

    @custom_vjp
    def cube(x: Tensor) -> Tensor:
        return x**3

    cube.defvjp(lambda x: (x**3, {"square": x * x, "name": "three"}), lambda kept, g: (3 * kept["square"] * g,))
    x = torch.tensor(2.0, dtype=torch.float64)
    assert [grad(cube)(x), grad(grad(cube))(x), grad(grad(grad(cube)))(x)] == [12.0, 12.0, 6.0]
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cube(y), y, create_graph=True)
    (second,) = torch.autograd.grad(first, y, create_graph=True)
    (third,) = torch.autograd.grad(second, y)
    assert [first, second, third] == [12.0, 12.0, 6.0]


def test_trees_numbers_and_arguments_that_are_fixed() -> None:
    @custom_vjp
    def f(params: dict[str, Tensor], n: int, x: Tensor) -> dict[str, Any]:
        return {"out": (params["w"] * x).sum() * n, "n": n, "index": x.argmax()}

    def fwd(params: Any, n: int, x: Tensor) -> Any:
        return f.func(params, n, x), (params, n, x)

    def bwd(residuals: Any, cotangent: Any) -> Any:
        params, n, x = residuals
        g = cotangent["out"] * n
        return {"b": None, "w": 10 * g * x}, None, 100 * g * params["w"]

    f.defvjp(fwd, bwd)
    w, x = torch.randn(2, 3)
    out = f({"w": w, "b": torch.ones(2)}, 2, x=x)
    assert out["n"] == 2 and out["index"] == x.argmax()
    params, slope = grad(lambda p, x: f(p, 2, x)["out"], argnums=(0, 1))({"w": w, "b": torch.ones(2)}, x)
    torch.testing.assert_close(params["w"], 20 * x)
    assert params["b"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(slope, 200 * w)
    rows = torch.randn(4, 3)
    found = vmap(grad(lambda x, p: f(p, 2, x)["out"]), in_dims=(0, None))(rows, {"w": w, "b": torch.ones(2)})
    torch.testing.assert_close(found, (200 * w).expand(4, 3))
    found = grad(lambda w: vmap(lambda x: f({"w": w, "b": w}, 2, x)["out"])(rows).sum())(w)
    torch.testing.assert_close(found, 20 * rows.sum(0))


def test_nondiff_argnums() -> None:
    def applied(function: Callable[..., Any], x: Tensor) -> Tensor:
        return function(x)

    by_vjp = custom_vjp(applied, nondiff_argnums=(0,))
    by_vjp.defvjp(lambda function, x: (function(x), x), lambda function, x, g: (g * function(x) * 5,))
    by_jvp = custom_jvp(applied, nondiff_argnums=(0,))
    by_jvp.defjvp(lambda function, primals, tangents: (function(*primals), function(primals[0]) * 5 * tangents[0]))
    x = torch.randn(3)
    for f in (by_vjp, by_jvp):
        torch.testing.assert_close(vmap(grad(lambda x: f(torch.exp, x)))(x), 5 * x.exp())  # noqa: B023
        torch.testing.assert_close(vmap(grad(grad(lambda x: f(torch.exp, x))))(x), 5 * x.exp())  # noqa: B023


def test_a_tensor_that_is_captured_is_a_constant_of_the_rule() -> None:
    w = torch.tensor(3.0)

    @custom_jvp
    def f(x: Tensor) -> Tensor:
        return x * w

    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * w))
    assert grad(lambda x: f(x))(torch.tensor(2.0)) == 3.0


def test_of_several_arguments_and_outputs() -> None:
    @custom_jvp
    def polar(r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return r * t.cos(), r * t.sin()

    @polar.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (r, t), (dr, dt) = primals, tangents
        return polar(r, t), (dr * t.cos() - r * t.sin() * dt, dr * t.sin() + r * t.cos() * dt)

    r, t = torch.rand(2, dtype=torch.float64) + 0.5
    plain = lambda r, t: (r * t.cos(), r * t.sin())
    for transformed in (jacrev, jacfwd, lambda f, argnums: jacfwd(jacrev(f, argnums=argnums), argnums=argnums)):
        found, expected = transformed(polar, argnums=(0, 1))(r, t), transformed(plain, argnums=(0, 1))(r, t)
        torch.testing.assert_close(found, expected)


def batches() -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    @custom_vmap
    def f(x: Tensor, y: Tensor) -> Tensor:
        return x * y.sum()

    @f.def_vmap
    def rule(axis_size: int, in_batched: list[bool], x: Tensor, y: Tensor) -> Any:
        seen.append((axis_size, in_batched, tuple(x.shape), tuple(y.shape)))
        y = y.sum(-1) if in_batched[1] else y.sum()
        y = y.view(-1, *[1] * (x.dim() - in_batched[0])) if in_batched[1] else y
        return (x if in_batched[0] else x.unsqueeze(0)) * y, True

    return f, seen


def test_custom_vmap() -> None:
    f, seen = batches()
    x, y = torch.randn(4, 2), torch.randn(4, 3)
    by_loop = torch.stack([a * b.sum() for a, b in zip(x, y)])
    torch.testing.assert_close(vmap(f)(x, y), by_loop)
    assert seen == [(4, [True, True], (4, 2), (4, 3))]
    torch.testing.assert_close(vmap(f, in_dims=(1, 1))(x.T, y.T), by_loop)
    assert seen[1:] == [(4, [True, True], (4, 2), (4, 3))]
    torch.testing.assert_close(vmap(f, in_dims=(0, None))(x, y[0]), torch.stack([a * y[0].sum() for a in x]))
    assert seen[2:] == [(4, [True, False], (4, 2), (3,))]
    torch.testing.assert_close(f(x[0], y[0]), by_loop[0])
    assert len(seen) == 3


def test_custom_vmap_with_derivatives() -> None:
    f, seen = batches()
    x, y = torch.randn(4, 2), torch.randn(4, 3)
    expected = torch.stack([2 * a * b.sum() ** 2 for a, b in zip(x, y)])
    torch.testing.assert_close(vmap(grad(lambda a, b: f(a, b).pow(2).sum()))(x, y), expected)
    torch.testing.assert_close(grad(lambda x: vmap(f)(x, y).pow(2).sum())(x), expected)
    assert seen
    tangent = torch.stack([2 * a * b.sum() for a, b in zip(x, y)])
    torch.testing.assert_close(jvp(lambda x: vmap(f)(x, y), (x,), (2 * x,))[1], tangent)
    torch.testing.assert_close(vmap(lambda a, b: jvp(lambda a: f(a, b), (a,), (2 * a,))[1])(x, y), tangent)


def test_custom_vmap_that_returns_a_tree() -> None:
    @custom_vmap
    def f(x: Tensor) -> Any:
        return {"same": torch.ones(2), "other": x + 1}

    @f.def_vmap
    def _(axis_size: int, in_batched: Any, x: Tensor) -> Any:
        return {"same": torch.ones(2), "other": x + 1}, {"other": True, "same": False}

    out = vmap(f)(torch.zeros(3))
    assert out["same"].shape == (3, 2) and out["other"].tolist() == [1.0] * 3


def test_without_a_rule() -> None:
    for kind, cure in ((custom_vjp, "defvjp"), (custom_jvp, "defjvp"), (custom_vmap, "def_vmap")):
        with pytest.raises(CallError, match=rf"{kind.__name__}\(sin.*expected its rule first: func.{cure}"):
            kind(torch.sin)(torch.zeros(2))
        with pytest.raises(CallTypeError):
            kind("no function")  # type: ignore[arg-type]


def test_rules_that_do_not_fit() -> None:
    x = torch.randn(3)
    for fwd, bwd, said in (
        (lambda x: x, None, "from fwd; expected a pair"),
        (None, lambda r, g: g, "from bwd; expected a tuple of 1"),
        (None, lambda r, g: (g, g), "2 cotangents from bwd; expected a tuple of 1"),
        (None, lambda r, g: ((g, g),), "expected a cotangent of its structure"),
        (None, lambda r, g: (g.sum(),), r"from bwd; expected a tensor of shape \[3\]"),
        (None, lambda r, g: (1.0,), r"from bwd; expected a tensor of shape \[3\]"),
    ):
        f = custom_vjp(lambda x: x * 2)
        f.defvjp(fwd or (lambda x: (x * 2, None)), bwd or (lambda r, g: (g,)))
        with pytest.raises(CallValueError, match=said):
            grad(lambda x: f(x).sum())(x)  # noqa: B023
    for rule, said in (
        (lambda p, t: p[0], "from its rule; expected a pair"),
        (lambda p, t: (p[0], (t[0], t[0])), "as tangent from its rule; expected one of the output's structure"),
        (lambda p, t: (p[0], t[0].sum()), r"as tangent from its rule; expected a tensor of shape \[3\]"),
    ):
        g = custom_jvp(lambda x: x * 2)
        g.defjvp(rule)
        for run in (lambda: jvp(g, (x,), (x,)), lambda: grad(lambda x: g(x).sum())(x)):  # noqa: B023
            with pytest.raises(CallValueError, match=said):
                run()
    for rule, said in ((lambda n, b, x: x, "a pair"), (lambda n, b, x: (x, [True]), "in the output's structure")):
        h = custom_vmap(lambda x: x * 2)
        h.def_vmap(rule)
        with pytest.raises(CallValueError, match=said):
            vmap(h)(x)
    keyword = custom_vjp(lambda x, *, n: x)
    keyword.defvjp(lambda x: (x, None), lambda r, g: (g,))
    with pytest.raises(CallTypeError, match="keyword-only arguments"):
        keyword(x, n=1)
    assert interpreter_stack() == []
