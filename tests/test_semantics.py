"""What must be exact: perturbation confusion, escaped wrappers, grad mode per level, writes, exceptions, threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plain import difference

from functrans import FunctransError, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, value_and_grad, vjp, vmap
from functrans.errors import DataDependentError, DeadWrapperError

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
B = torch.arange(6.0, dtype=torch.float64).view(2, 3) / 5 - 0.4


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def assert_clean() -> None:
    """Nothing of a transform is left in this thread."""
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.is_grad_enabled()
    assert torch._C._is_fwd_grad_enabled()
    x = torch.ones(2, requires_grad=True)
    assert (x * 2).grad_fn is not None


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    assert_clean()
    yield
    assert_clean()


def along(f: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    return jvp(f, (x,), (torch.ones_like(x),))[1]


# ---- perturbation confusion: the derivatives of two levels must not be taken for each other


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product([grad, None], repeat=2)))
def test_derivative_of_x_times_derivative_of_x_plus_y(outer: Any, inner: Any) -> None:
    d_outer, d_inner = (d or (lambda f: lambda x: along(f, x)) for d in (outer, inner))
    # d/dx x * (d/dy (x + y)) = 1; a confused one says 2
    assert d_outer(lambda x: x * d_inner(lambda y: x + y)(scalar(1.0)))(scalar(1.0)) == 1.0
    # d/dx (x * d/dy (x * y)) = 2x
    assert d_outer(lambda x: x * d_inner(lambda y: x * y)(scalar(5.0)))(scalar(3.0)) == 6.0


def test_confusion_under_vmap() -> None:
    xs = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    result = vmap(grad(lambda x: x * grad(lambda y: x + y)(scalar(1.0))))(xs)
    assert torch.equal(result, torch.ones_like(xs))
    result = vmap(lambda x: vmap(grad(lambda y: x * y * y))(xs))(xs)
    torch.testing.assert_close(result, 2 * torch.outer(xs, xs))
    result = grad(lambda x: vmap(lambda y: x * grad(lambda z: x * y + z)(y))(xs).sum())(scalar(2.0))
    assert result == 3.0


def test_confusion_of_captured_closures() -> None:
    def outer(x: torch.Tensor) -> torch.Tensor:
        def inner(y: torch.Tensor) -> torch.Tensor:
            return x * y + captured * y

        captured = x.sin()
        return grad(inner)(x.detach()) * x

    x = scalar(0.4)
    torch.testing.assert_close(grad(outer)(x), 2 * x + x.sin() + x * x.cos())


def test_jvp_in_grad_and_grad_in_jvp() -> None:
    x = scalar(0.6)
    torch.testing.assert_close(grad(lambda x: x * along(lambda y: x * y**2, x))(x), 6 * x**2)
    torch.testing.assert_close(along(lambda x: x * grad(lambda y: x * y**2)(x), x), 6 * x**2)
    torch.testing.assert_close(
        along(lambda x: along(lambda y: along(lambda z: z * y * x, x), x), x), torch.ones_like(x)
    )


def test_constant_inner_function_gives_zero() -> None:
    x = scalar(2.0)
    assert grad(lambda x: grad(lambda y: x)(x))(x) == 0.0
    assert grad(lambda x: along(lambda y: x, x))(x) == 0.0
    assert along(lambda x: grad(lambda y: x)(x), x) == 0.0


# ---- wrappers that escape


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: grad(lambda x: f(x).sum())(X),
        lambda f: vmap(f)(X),
        lambda f: jvp(f, (X,), (X,)),
        lambda f: vjp(f, X),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda t: t + 1,
        lambda t: torch.ones(3, dtype=torch.float64) * t,
        lambda t: vmap(lambda x: x * t)(X),
        lambda t: grad(lambda x: (x * t).sum())(X),
        lambda t: jvp(lambda x: x * t, (X,), (X,)),
        lambda t: t.tolist(),
        lambda t: t.add_(1),
    ],
)
def test_escaped_wrapper_is_refused(transformed: Callable[..., Any], use: Callable[..., Any]) -> None:
    escaped = []

    def leak(x: torch.Tensor) -> torch.Tensor:
        escaped.append(x * 2)
        return x * 3

    transformed(leak)
    value, written = escaped[0].value.clone(), use.__code__.co_names == ("add_",)
    if written or escaped[0].interpreter.kind == "vmap":
        with pytest.raises(DeadWrapperError) as info:
            use(escaped[0])
        text = str(info.value)
    else:  # of one value, which is read as the constant that it is
        with pytest.warns(UserWarning, match="was used after that transform had ended") as caught:
            found = use(escaped[0])
        torch.testing.assert_close(found, use(value), rtol=0, atol=0)
        text = str(caught[0].message)
    torch.testing.assert_close(escaped[0].value, value, rtol=0, atol=0)
    # the message names the transform and where the value was made
    assert "leak" in text or "lambda" in text
    assert_clean()


def test_wrapper_of_an_earlier_transform_of_the_same_level_is_not_taken_for_ours() -> None:
    escaped = []
    vmap(lambda x: (escaped.append(x), x)[1])(X)
    with pytest.raises(DeadWrapperError):
        vmap(lambda y: y + escaped[0])(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(DeadWrapperError):
        grad(lambda y: (y * escaped[0]).sum())(X)


def test_repr_of_an_escaped_wrapper_works() -> None:
    escaped = []
    grad(lambda x: (escaped.append(x), x.sum())[1])(X)
    assert "grad" in repr(escaped[0])


def test_repr_shows_every_layer() -> None:
    shown = []

    def f(x: torch.Tensor) -> torch.Tensor:
        shown.append(repr(x))
        return x.sum()

    vmap(grad(lambda x: along(f, x)))(B)
    for word in ("vmap", "grad", "jvp"):
        assert word in shown[0]


# ---- grad mode, per level


def test_no_grad_is_remembered_at_the_level_where_it_was_entered() -> None:
    def g(x: torch.Tensor) -> torch.Tensor:
        return grad(lambda z: z**3)(x)

    def under_no_grad(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            inner = g(x)
        return x * inner

    assert grad(under_no_grad)(scalar(2.0)) == 12.0
    assert grad(lambda x: x * g(x))(scalar(2.0)) == 36.0


MODES = [torch.no_grad, torch.enable_grad, None]


def nested(F: Any, transforms: tuple[str, ...], modes: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
    """One transform inside another, each called under a grad mode, with a contribution under a mode at every level."""
    if not transforms:
        return x.sin() * x
    kind, mode = transforms[0], modes[0]

    def f(y: torch.Tensor) -> torch.Tensor:
        if mode is None:
            return nested(F, transforms[1:], modes[1:], y) * y + x * y
        with mode():
            part = nested(F, transforms[1:], modes[1:], y)
        return part * y + x * y

    if kind == "grad":
        return F.grad(lambda y: f(y).sum())(x)
    if kind == "jvp":
        return F.jvp(f, (x,), (x.cos(),))[1]
    if kind == "vjp":
        out, pullback = F.vjp(f, x)
        return pullback(out)[0]
    return F.vmap(f)(torch.stack([x, 2 * x])).sum(0)


@pytest.mark.parametrize("transforms", list(itertools.product(["grad", "jvp", "vjp", "vmap"], repeat=2)))
def test_nested_grad_modes_agree_with_torch_func(transforms: tuple[str, ...]) -> None:
    import functrans

    for modes in itertools.product(MODES, repeat=2):
        assert not difference(nested(functrans, transforms, modes, X), nested(torch.func, transforms, modes, X)), modes


@pytest.mark.parametrize("transforms", [("grad", "vmap", "grad"), ("grad", "jvp", "grad"), ("jvp", "grad", "vjp")])
def test_grad_modes_three_deep_agree_with_torch_func(transforms: tuple[str, ...]) -> None:
    import functrans

    for modes in itertools.product(MODES, repeat=3):
        assert not difference(nested(functrans, transforms, modes, X), nested(torch.func, transforms, modes, X)), modes


def test_is_grad_enabled_inside() -> None:
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        with torch.no_grad():
            seen.append(torch.is_grad_enabled())
            vmap(lambda y: (seen.append(torch.is_grad_enabled()), y)[1])(x)
            grad(lambda y: (seen.append(torch.is_grad_enabled()), y.sum())[1])(x)
            seen.append(torch.is_grad_enabled())
        return x.sum()

    with torch.no_grad():
        grad(f)(X)
        assert not torch.is_grad_enabled()
    assert seen == [True, False, False, True, False]


def test_forward_mode_ignores_no_grad_but_not_its_own_switch() -> None:
    with torch.no_grad():
        torch.testing.assert_close(jvp(torch.sin, (X,), (torch.ones_like(X),))[1], X.cos())

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x**2

    torch.testing.assert_close(jvp(f, (X,), (torch.ones_like(X),))[1], 2 * X)

    def switched_off(x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            return x**2

    expected = torch.func.jvp(switched_off, (X,), (X,))
    assert not difference(jvp(switched_off, (X,), (X,)), expected)


def test_detach_stops_every_level_above_it() -> None:
    assert grad(lambda x: x.detach() * x)(scalar(3.0)) == 3.0
    assert grad(lambda x: grad(lambda y: y.detach() * x * y)(x))(scalar(3.0)) == torch.func.grad(
        lambda x: torch.func.grad(lambda y: y.detach() * x * y)(x)
    )(scalar(3.0))
    assert along(lambda x: x.detach() * x, scalar(3.0)) == 3.0


# ---- exceptions, interrupts, generators, threads


class StrangeError(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StrangeError, GeneratorExit])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_exception_inside(error: type[BaseException], depth: int) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            raise error("here")

    def wrap(f: Callable[..., Any], kind: str) -> Callable[..., Any]:
        return {
            "grad": lambda: grad(lambda x: f(x).sum()),
            "vmap": lambda: lambda x: vmap(f)(torch.stack([x, x])),
            "jvp": lambda: lambda x: jvp(f, (x,), (x,))[1],
            "vjp": lambda: lambda x: vjp(f, x)[0],
        }[kind]()

    for kinds in itertools.product(["grad", "vmap", "jvp", "vjp"], repeat=depth):
        f: Callable[..., Any] = fail
        for kind in kinds:
            f = wrap(f, kind)
        with pytest.raises(error, match="here"):
            f(X)
        assert_clean()


def test_exception_caught_inside_a_transform() -> None:
    def fail(y: torch.Tensor) -> torch.Tensor:
        raise ValueError

    def f(x: torch.Tensor) -> torch.Tensor:
        for transformed in (grad(fail), vmap(fail), lambda v: jvp(fail, (v,), (v,))):
            with pytest.raises(ValueError):
                transformed(x)
        return (x**2).sum()

    torch.testing.assert_close(grad(f)(X), 2 * X)
    torch.testing.assert_close(vmap(grad(f))(B), 2 * B)


@pytest.mark.parametrize("op", [lambda x: x @ x.new_ones(7), lambda x: x.view(5), lambda x: x[9], lambda x: x.foo])
def test_errors_of_operators(op: Callable[..., Any]) -> None:
    for transformed in (grad(op), vmap(op, in_dims=0), lambda x: jvp(op, (x,), (x,)), vmap(grad(op))):
        with pytest.raises((RuntimeError, IndexError, AttributeError)):
            transformed(B)
        assert_clean()


def test_generator_that_is_suspended_inside_no_grad() -> None:
    def numbers(x: torch.Tensor) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            yield x * 2
            yield x * 3

    def f(x: torch.Tensor) -> torch.Tensor:
        generator = numbers(x)
        first = next(generator)
        generator.close()
        return (first * x).sum()

    torch.testing.assert_close(grad(f)(X), torch.func.grad(f)(X))


def test_generator_holds_a_transform_open_over_a_yield() -> None:
    def steps() -> Iterator[torch.Tensor]:
        yield grad(torch.sin)(scalar(0.1))
        yield grad(torch.cos)(scalar(0.1))

    total = sum(grad(lambda x, s=s: x * s)(scalar(1.0)) for s in steps())
    torch.testing.assert_close(total, scalar(0.1).cos() - scalar(0.1).sin())


def test_two_threads_do_not_see_each_other() -> None:
    barrier, failures = threading.Barrier(2), []

    def work(factor: float) -> None:
        def f(x: torch.Tensor) -> torch.Tensor:
            barrier.wait(timeout=30)
            y = (x * factor).sin()
            barrier.wait(timeout=30)
            return y.sum()

        try:
            for _ in range(5):
                torch.testing.assert_close(vmap(grad(f))(B), factor * (B * factor).cos())
                torch.testing.assert_close(grad(f)(X), factor * (X * factor).cos())
            assert_clean()
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(k,)) for k in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_thread_started_inside_a_transform_is_outside_of_it() -> None:
    results = []

    def f(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: results.append(grad(torch.sin)(scalar(0.2))))
        thread.start()
        thread.join()
        return (x**2).sum()

    torch.testing.assert_close(grad(f)(X), 2 * X)
    torch.testing.assert_close(results[0], scalar(0.2).cos())


# ---- what depends on the numbers


def test_numbers_can_be_read_under_grad_and_jvp() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x * 2
        chosen = x[x > 0]
        return (chosen**2).sum() * float(x[0].item() > 0) + x[torch.nonzero(x)[:, 0]].sum()

    assert not difference(grad(f)(X), torch.func.grad(f)(X))
    assert not difference(jvp(f, (X,), (X,)), torch.func.jvp(f, (X,), (X,)))
    assert not difference(
        grad(grad(lambda x: f(X * x)))(scalar(1.0)), torch.func.grad(torch.func.grad(lambda x: f(X * x)))(scalar(1.0))
    )


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * x.sum().item(), lambda x: x if x.sum() > 0 else -x, torch.nonzero, lambda x: x[x > 0],
        torch.unique,
        lambda x: x * float(x[0]), lambda x: x[: int(x[0])], lambda x: torch.tensor([x[0], 1.0]),
        lambda x: x.tolist()[0] * x,
        lambda x: torch.masked_select(x, x > 0), lambda x: x.numpy(), lambda x: x[0].__index__(),
    ],
)  # fmt: skip
def test_numbers_of_one_example_cannot_be_read_under_vmap(f: Callable[..., Any]) -> None:
    with pytest.raises((FunctransError, TypeError)):
        vmap(f)(B)
    with pytest.raises((FunctransError, TypeError)):
        grad(lambda b: vmap(f)(b).sum())(B)


def test_data_dependence_names_the_op_and_the_cure() -> None:
    with pytest.raises(DataDependentError, match="Cure|cure|torch.where"):
        vmap(torch.nonzero)(B)


def test_numbers_that_are_not_batched_can_be_read_under_vmap() -> None:
    expected = B * X[0].item()
    assert torch.equal(vmap(lambda x: x * X[0].item() if X.sum() > 0 else x)(B), expected)
    assert torch.equal(vmap(lambda x: x * torch.tensor([2.0, 3.0, 4.0]).sum().item())(B), B * 9)


# ---- composition and the rest of the public functions


def test_value_and_grad_is_grad_and_value_in_the_other_order() -> None:
    f = lambda x, y: ((x * y).sum(), {"y": y})
    (value, aux), gradient = value_and_grad(f, argnums=1, has_aux=True)(X, X + 1)
    gradient2, (value2, aux2) = grad_and_value(f, argnums=1, has_aux=True)(X, X + 1)
    assert not difference((value, aux, gradient), (value2, aux2, gradient2))


def test_jacobians_of_jacobians() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * x.sum()

    for outer, inner in itertools.product((jacrev, jacfwd), repeat=2):
        assert not difference(outer(inner(f))(X), torch.func.hessian(f)(X))
    assert not difference(vmap(hessian(f))(B), torch.func.vmap(torch.func.hessian(f))(B))


def test_aux_may_be_anything() -> None:
    thing = object()
    _, aux = grad(lambda x: (x.sum(), {"thing": thing, "text": "t", "x": x}), has_aux=True)(X)
    assert aux["thing"] is thing and aux["text"] == "t" and type(aux["x"]) is torch.Tensor


def test_base_autograd_records_through_every_transform() -> None:
    for f in (
        lambda x: grad(lambda y: (y * x).sin().sum())(x),
        lambda x: vmap(lambda y: y * x)(x),
        lambda x: jvp(torch.sin, (x,), (x,))[1],
        lambda x: vjp(torch.sin, x)[1](x)[0],
        lambda x: vmap(grad(lambda y: (y**3).sum()))(torch.stack([x, x])),
    ):
        x = X.clone().requires_grad_()
        out = f(x)
        assert out.grad_fn is not None
        out.sum().backward()
        numeric = [(f(X + 1e-6 * e).sum() - f(X - 1e-6 * e).sum()) / 2e-6 for e in torch.eye(3, dtype=torch.float64)]
        torch.testing.assert_close(x.grad, torch.stack(numeric), rtol=1e-6, atol=1e-6)


def test_factories_inside_are_not_affected() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (
            x * torch.ones(3, dtype=x.dtype) + torch.arange(3) + torch.full((3,), 2.0) + torch.eye(3, dtype=x.dtype)[0]
        )

    torch.testing.assert_close(vmap(f)(B), f(B))
    torch.testing.assert_close(grad(lambda x: f(x).sum())(X), torch.ones_like(X))
