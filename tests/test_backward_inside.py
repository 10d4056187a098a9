"""``torch.autograd.backward`` inside of transforms, and what hangs on ``.grad``: beside a loop over the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import functionalize, grad, jvp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import InsideTransformError

DOUBLE = torch.float64
ROWS = torch.randn(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
W = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE, requires_grad=True)
close = torch.testing.assert_close
back = torch.autograd.backward


def leaf() -> Tensor:
    return torch.ones(3, dtype=DOUBLE, requires_grad=True)


def of_one(x: Tensor) -> Any:
    w = leaf()
    back((w**2 * x).sum())
    return w.grad


def of_several(x: Tensor) -> Any:
    w, v = leaf(), leaf()
    back([(w * x).sum(), w * v * x.sin()], [None, x])
    return w.grad + 2 * v.grad  # type: ignore[operator]


def by_name(x: Tensor) -> Any:
    w = leaf()
    back(tensors=(w**3 * 2,), grad_tensors=(x,), retain_graph=True)
    back(tensors=w * x, grad_tensors=x)
    return w.grad


def to_some(x: Tensor) -> Any:
    w, v = leaf(), leaf()
    back([(w * x).sum(), w * v * x.sin()], [None, x], inputs=[w])
    assert v.grad is None
    return w.grad


def to_a_result(x: Tensor) -> Any:
    w = leaf()
    y = w * 2
    back([(y**2 * x).sum()], inputs=[y], retain_graph=True)
    assert w.grad is None
    ((y * x).sum()).backward(inputs=[y, w])
    return y.grad + w.grad  # type: ignore[operator]


def twice(x: Tensor) -> Any:
    w = leaf()
    back((w**3 * x).sum(), create_graph=True)
    first, w.grad = w.grad, None
    back((first**2).sum())  # type: ignore[operator]
    return w.grad


def retained(x: Tensor) -> Any:
    w = leaf()
    y = w * 3
    y.retain_grad()
    z = y * x
    z.retain_grad()
    assert y.retains_grad and not w.retains_grad
    (z**2).sum().backward()
    return y.grad + z.grad  # type: ignore[operator]


def after_adding(x: Tensor) -> Any:
    w, seen = leaf(), []
    handle = w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad * 2))
    (w * x).sum().backward()
    handle.remove()
    (w * x).sum().backward()
    return seen[0] + w.grad if len(seen) == 1 else None


def descending_in_backward(x: Tensor) -> Any:
    w = leaf()

    def step(p: Tensor) -> None:
        with torch.no_grad():
            p -= 0.1 * p.grad  # type: ignore[operator]
        p.grad = None

    w.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        ((w * x).sin() ** 2).sum().backward()
    return w * 1


def kept_by_a_hook(x: Tensor) -> Any:
    w, seen = leaf(), []
    y = w * 3
    y.register_hook(lambda g: seen.append(g) or g * 2)
    (y**2 * x).sum().backward()
    return seen[0] + w.grad


def hooked(x: Tensor) -> Any:
    w = leaf()
    w.register_hook(lambda g: g.clamp(-0.5, 0.5))
    (w**2 * x).sum().backward()
    return w.grad


def taken_away(x: Tensor) -> Any:
    w = leaf()
    (w * x).sum().backward()
    del w.grad
    (w * x * 2).sum().backward()
    return w.grad


def viewed_cotangents(x: Tensor) -> Any:
    """Views, written since they were taken, as what is differentiated, and as cotangents."""
    w, cotangent = leaf(), torch.zeros(3, dtype=DOUBLE)
    seen = cotangent[:]
    cotangent.add_(2)
    y = w * 2
    view = y.view(3)
    y.mul_(x)
    (found,) = torch.autograd.grad(view, w, seen, retain_graph=True)
    view.backward(seen)
    return found + w.grad


FUNCTIONS: list[Callable[[Tensor], Any]] = [
    of_one, of_several, by_name, to_some, to_a_result, twice, retained, after_adding, descending_in_backward,
    kept_by_a_hook, hooked, taken_away, viewed_cotangents,
]  # fmt: skip
WITH_HOOKS = (kept_by_a_hook, hooked)


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_beside_a_loop(f: Callable[[Tensor], Any]) -> None:
    expected = torch.stack([f(x).detach() for x in ROWS])
    close(vmap(f)(ROWS).detach(), expected)
    close(vmap(f, 1, 1)(ROWS.T.contiguous()).detach().T, expected)
    close(vmap(vmap(f))(ROWS.view(2, 2, 3)).detach().view(4, 3), expected)
    close(functionalize(f)(ROWS[0]).detach(), expected[0])
    as_aux = lambda x: (x.sum(), f(x))
    close(grad(as_aux, has_aux=True)(ROWS[0])[1].detach(), expected[0])
    close(vmap(grad(as_aux, has_aux=True))(ROWS)[1].detach(), expected)
    if f in WITH_HOOKS:
        with pytest.raises(InsideTransformError, match="register_hook"):
            jvp(f, (ROWS[0],), (ROWS[1],))
    else:
        step = 1e-6 * ROWS[1]
        difference = (f(ROWS[0] + step) - f(ROWS[0] - step)).detach() / 2e-6
        close(jvp(f, (ROWS[0],), (ROWS[1],))[1].detach(), difference, rtol=1e-5, atol=1e-6)
    assert interpreter_stack() == []


def test_captured_leaves() -> None:
    def f(x: Tensor) -> Tensor:
        back([(W * x).sum(), (W**2).sum() * x[0]], inputs=W)
        return x

    W.grad = None
    for row in ROWS:
        f(row)
    expected, W.grad = W.grad, None
    vmap(f)(ROWS)
    close(W.grad, expected)


LOSS = (W**2).sum()
CALLS: list[Callable[[], None]] = [
    lambda: LOSS.backward(retain_graph=True),  # type: ignore[no-untyped-call]
    lambda: back([LOSS], retain_graph=True),
]


@pytest.mark.parametrize("call", CALLS, ids=["method", "function"])
def test_a_loss_from_outside_is_added_once_for_each(call: Callable[[], None]) -> None:
    f = lambda x: (call(), x.sum())[1]  # type: ignore[func-returns-value]
    for transform in (lambda: grad(f)(ROWS[0]), lambda: vmap(f)(ROWS[:1])):
        W.grad = None
        transform()
        close(W.grad, 2 * W.detach())
    W.grad = None
    with pytest.raises(InsideTransformError, match=r"Tensor.backward\(\) inside vmap"):
        vmap(f)(ROWS)
    assert W.grad is None


def of_no_input(x: Tensor) -> None:
    back((leaf() * x).sum(), inputs=[])


def of_another_count(x: Tensor) -> None:
    back([(leaf() * x).sum()], [None, None])


def of_another_shape(x: Tensor) -> None:
    leaf().grad = x[:2]


def of_no_tensor(x: Tensor) -> None:
    leaf().grad = 3.0  # type: ignore[assignment]


def of_a_written_leaf(x: Tensor) -> None:
    w = leaf()
    y = w**2 * x
    w.data.mul_(2)
    torch.autograd.grad(y.sum(), w, allow_unused=True)


def of_what_depends_on_nothing(x: Tensor) -> None:
    back([x.detach().sum()])


def of_a_hook_that_depends_on_the_arguments(x: Tensor) -> None:
    w = leaf()
    w.register_hook(lambda g: g * x)
    (w**2).sum().backward(create_graph=True)


REFUSED: dict[Callable[[Tensor], None], tuple[type[Exception], str]] = {
    of_no_input: (RuntimeError, "cannot be empty"),
    of_another_count: (RuntimeError, "1 tensors and 2 gradients"),
    of_another_shape: (RuntimeError, r"assigned grad is float64 of size \[2\], and the tensor float64 of size \[3\]"),
    of_no_tensor: (TypeError, "assigned grad expected to be a Tensor"),
    of_a_written_leaf: (RuntimeError, "modified by an inplace operation"),
    of_what_depends_on_nothing: (InsideTransformError, r"Tensor.backward\(\)"),
}


@pytest.mark.parametrize("f", REFUSED, ids=lambda f: f.__name__)
def test_refused(f: Callable[[Tensor], None]) -> None:
    error, why = REFUSED[f]
    inside = lambda x: (f(x), x.sum())[1]  # type: ignore[func-returns-value]
    one = ROWS[0]
    for transform in (lambda: vmap(inside)(ROWS), lambda: grad(inside)(one), lambda: functionalize(inside)(one)):
        with pytest.raises(error, match=why):
            transform()
        assert interpreter_stack() == []


def test_a_hook_on_what_grad_records_is_not_passed_by() -> None:
    """The gradient by the leaf does not go along the tape, which has the hook."""

    def f(x: Tensor, removed: bool) -> Tensor:
        w = leaf()
        y = w * x
        handle = y.register_hook(lambda g: g * 2)
        if removed:
            handle.remove()
        (y**2).sum().backward()
        return x.sum() * w.grad.sum()  # type: ignore[union-attr]

    with pytest.raises(InsideTransformError, match="past a hook inside grad"):
        grad(f)(ROWS[0], False)
    close(grad(f)(ROWS[0], True), torch.full((3,), 2 * float((ROWS[0] ** 2).sum()), dtype=DOUBLE))


def test_a_hook_whose_gradient_depends_on_the_arguments_is_refused() -> None:
    f = lambda x: (of_a_hook_that_depends_on_the_arguments(x), x.sum())[1]  # type: ignore[func-returns-value]
    with pytest.raises(InsideTransformError, match="whose gradient depends on the arguments"):
        grad(f)(ROWS[0])
