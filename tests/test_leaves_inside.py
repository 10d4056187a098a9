"""Leaves that are made inside of transforms, ``backward`` to them, and optimizers: beside a loop over the examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import for_each
from slow_ways import some
from torch import Tensor, nn, optim

from functrans import functionalize, grad, jvp, vjp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CapturedOnceError, InsideTransformError, RequiresGradError

DOUBLE = torch.float64
close = torch.testing.assert_close
gradient = torch.autograd.grad


ROWS, TARGETS, M = some(4, 6), some(4, 6, seed=1), some(6, 6, seed=2)


def differences(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor, step: float = 1e-6) -> Tensor:
    return ((f(x + step * t) - f(x - step * t)) / (2 * step)).detach()


# How a leaf is made


def set_as_an_attribute(x: Tensor) -> Tensor:
    made = torch.ones(6, dtype=DOUBLE)
    made.requires_grad = True
    return made


def filled(x: Tensor) -> Tensor:
    return torch.empty(6, dtype=DOUBLE, requires_grad=True).detach().fill_(3).requires_grad_()


OPTIONS: Any = {"dtype": DOUBLE, "requires_grad": True}
#: Each takes an example, whose numbers it does not need to use, to a new leaf.
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": lambda x: torch.ones(6, **OPTIONS),
    "full": lambda x: torch.full((6,), 2.0, **OPTIONS),
    "arange": lambda x: torch.arange(6, **OPTIONS),
    "tensor": lambda x: torch.tensor([1.0, 2, 3, 4, 5, 6], **OPTIONS),
    "ones_like": lambda x: torch.ones_like(x, requires_grad=True),
    "new_ones": lambda x: x.new_ones(6, requires_grad=True),
    "new_tensor": lambda x: x.new_tensor([1.0, 2, 3, 4, 5, 6], requires_grad=True),
    "requires_grad_": lambda x: torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_(),
    "attribute": set_as_an_attribute,
    "filled": filled,
    "Parameter": lambda x: nn.Parameter(torch.ones(6, dtype=DOUBLE)),
    "of a captured tensor": lambda x: nn.Parameter(M[0].clone()),
    "of the example": lambda x: (x.detach() * 2).requires_grad_(),
    "Parameter of the example": lambda x: nn.Parameter(x.detach()),
}


@pytest.mark.parametrize("name", MADE)
def test_a_leaf_is_one_of_each_example(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        place = MADE[name](x)
        assert place.requires_grad and place.is_leaf and place.grad is None
        (slope,) = gradient((place**2 * x.sin()).sum() * x[0], place, create_graph=True)
        (place * x.cos() * x[0]).sum().backward()
        return torch.stack([slope, place.grad])  # type: ignore[list-item]

    expected = for_each(f)(ROWS).detach()
    close(vmap(f)(ROWS).detach(), expected)
    close(vmap(f, 1, 1)(ROWS.T.contiguous()).detach().movedim(1, 0), expected)
    close(vmap(vmap(f))(ROWS.view(2, 2, 6)).detach().view(4, 2, 6), expected)
    leaf = ROWS[0].clone().requires_grad_()
    (by_hand,) = gradient((f(leaf) ** 2).sum(), leaf)
    close(grad(lambda x: (f(x) ** 2).sum())(ROWS[0]).detach(), by_hand)
    close(vmap(grad(lambda x: (f(x) ** 2).sum()))(ROWS)[0].detach(), by_hand)
    if "example" not in name:  # whose tangent detach() cuts
        close(jvp(f, (ROWS[0],), (ROWS[1],))[1].detach(), differences(f, ROWS[0], ROWS[1]), rtol=1e-6, atol=1e-6)
    assert interpreter_stack() == []


# Optimizers

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD, foreach": lambda p: optim.SGD(p, lr=0.1, foreach=True),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW, foreach": lambda p: optim.AdamW(p, lr=0.1, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "Rprop": lambda p: optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_inside(name: str) -> None:
    def trained(x: Tensor, y: Tensor) -> Tensor:
        w, b = torch.ones(6, **OPTIONS), nn.Parameter(torch.zeros(6, dtype=DOUBLE))
        optimizer = OPTIMIZERS[name]([w, b])
        for i in range(3):
            optimizer.zero_grad(set_to_none=i == 1)
            ((torch.tanh(w * x + b) @ M - y) ** 2).mean().backward()
            optimizer.step()
        assert w.is_leaf and b.requires_grad
        return torch.cat([w, b])

    expected = for_each(trained)(ROWS, TARGETS).detach()
    close(vmap(trained)(ROWS, TARGETS).detach(), expected)
    close(vmap(vmap(trained))(ROWS.view(2, 2, 6), TARGETS.view(2, 2, 6)).detach().view(4, 12), expected)
    after = lambda x, y: (trained(x, y)[:6] * x).sum()  # what came of training is a constant to a gradient
    close(vmap(grad(after))(ROWS, TARGETS).detach(), expected[:, :6])
    if name != "momentum":  # of which PyTorch detaches the first one
        f = lambda x: trained(x, TARGETS[0])
        close(jvp(f, (ROWS[0],), (ROWS[1],))[1].detach(), differences(f, ROWS[0], ROWS[1]), rtol=1e-4, atol=1e-6)


def test_adapting_a_copied_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6)).double()

    def adapted(x: Tensor, y: Tensor) -> Tensor:
        fast = copy.deepcopy(model)
        optimizer = optim.Adam(fast.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            ((fast(x) - y) ** 2).sum().backward()
            nn.utils.clip_grad_norm_(fast.parameters(), 1.0)
            optimizer.step()
        again = copy.deepcopy(fast)
        assert all(p.is_leaf and p.requires_grad and isinstance(p, nn.Parameter) for p in again.parameters())
        with torch.no_grad():
            again[0].weight.zero_()
        return fast(x)

    close(vmap(adapted)(ROWS, TARGETS).detach(), for_each(adapted)(ROWS, TARGETS).detach())
    assert all(p.grad is None for p in model.parameters())
    f = lambda x: adapted(x, TARGETS[0])
    leaf = ROWS[0].clone().requires_grad_()
    close(grad(lambda x: f(x).sum())(ROWS[0]).detach(), gradient(f(leaf).sum(), leaf)[0])
    close(jvp(f, (ROWS[0],), (ROWS[1],))[1].detach(), differences(f, ROWS[0], ROWS[1]), rtol=1e-5, atol=1e-6)


def test_a_module_that_is_made_inside() -> None:
    def trained(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(6, 2)
        optimizer = optim.SGD(layer.parameters(), lr=0.1)
        layer(x).square().sum().backward()
        optimizer.step()
        layer.bias.requires_grad_(False)
        assert not layer.bias.requires_grad
        return layer(x)

    rows = ROWS.float()
    close(vmap(trained, randomness="same")(rows).detach(), for_each(trained)(rows).detach())
    with torch.no_grad():
        assert not vmap(nn.Linear(6, 2))(rows).requires_grad


def by_hand(x: Tensor) -> Tensor:
    """Gradient descent as it is written by hand, in every way."""
    w, b = torch.zeros(6, 6, **OPTIONS), torch.zeros(6, **OPTIONS)
    loss = lambda: ((w @ x + b - 1) ** 2).sum()
    loss().backward()
    with torch.no_grad():
        for p in (w, b):
            p -= 0.1 * p.grad  # type: ignore[operator]
            p.grad = None
    loss().backward()
    (b * x).sum().backward()  # which adds
    w.data.sub_(0.1 * w.grad)  # type: ignore[operator]
    b.data.add_(b.grad, alpha=-0.1)  # type: ignore[arg-type]
    b.grad.zero_()  # type: ignore[union-attr]
    loss().backward(inputs=[b])
    with torch.no_grad():
        b[:3] += b.grad[:3]  # type: ignore[index]
        w[0].copy_(w[1])
    (again,) = gradient(loss(), w)
    return torch.cat([w, b[None], again])


def test_descent_by_hand() -> None:
    close(vmap(by_hand)(ROWS).detach(), for_each(by_hand)(ROWS).detach())


@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_under_functionalize(remove: str) -> None:
    close(functionalize(by_hand, remove=remove)(ROWS[0]).detach(), by_hand(ROWS[0]).detach())
    close(vmap(functionalize(by_hand, remove=remove))(ROWS).detach(), for_each(by_hand)(ROWS).detach())


def test_gradients_of_gradients_in_grad() -> None:
    def f(x: Tensor) -> Tensor:
        w = torch.ones(6, **OPTIONS)
        (w**3 * x**2).sum().backward(create_graph=True)
        return gradient((w.grad**2 * x).sum(), w, create_graph=True)[0]  # type: ignore[operator]

    expected = 36 * ROWS**5  # d(9 w⁴ x⁵)/dw
    close(vmap(f)(ROWS).detach(), expected)
    close(vmap(grad(lambda x: f(x).sum()))(ROWS).detach(), 180 * ROWS**4)


# What is refused


def grad_of_an_argument(x: Tensor) -> Tensor:
    w = torch.ones(6, **OPTIONS)
    (w * x).sum().backward()
    return x.grad * x  # type: ignore[operator]


def written_before_backward(x: Tensor) -> Tensor:
    w = torch.ones(6, **OPTIONS)
    loss = (w**2 * x).sum()
    with torch.no_grad():
        w.add_(1)
    loss.backward()
    return w.grad  # type: ignore[return-value]


def written(x: Tensor) -> Tensor:
    return torch.ones(6, **OPTIONS).mul_(x)


def view_written(x: Tensor) -> Tensor:
    w = torch.ones(6, **OPTIONS)
    w[0] = x[0]
    return w


def of_an_inner_vmap(x: Tensor) -> Tensor:
    w = torch.ones(6, **OPTIONS)
    vmap(lambda y: ((w * y).sum().backward(), y)[1])(torch.stack([x, x]))
    return w.grad  # type: ignore[return-value]


def parameter_of_captured(x: Tensor) -> Tensor:
    w = nn.Parameter(M[0])
    (w * x).sum().backward()
    return w.grad  # type: ignore[return-value]


def view_of_captured(x: Tensor) -> Tensor:
    w = M[0].requires_grad_()
    (w * x).sum().backward()
    return w.grad  # type: ignore[return-value]


def not_a_number(x: Tensor) -> Tensor:
    w = torch.ones(6, **OPTIONS)
    (w * x).backward()
    return w


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "a leaf written before": (written_before_backward, RuntimeError, "modified by an inplace operation"),
    "a leaf written": (written, RuntimeError, "a leaf .* in-place operation"),
    "a view of a leaf written": (view_written, RuntimeError, "a leaf .* in-place operation"),
    "a leaf of an outer vmap": (of_an_inner_vmap, InsideTransformError, "a leaf that was made outside of it"),
    "a captured tensor's memory": (parameter_of_captured, InsideTransformError, r"captured tensor .* a clone\(\)"),
    "a captured tensor's view": (view_of_captured, InsideTransformError, r"captured tensor .* a clone\(\)"),
    "not a number": (not_a_number, RuntimeError, "only for scalar outputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    f, error, why = REFUSED[name]
    with pytest.raises(error, match=why):
        vmap(f)(ROWS)
    assert interpreter_stack() == []


def test_parameters_of_what_has_a_derivative_are_refused() -> None:
    """A parameter has no history; so what is computed with it would have no derivative, in silence."""
    for f in (nn.Parameter, lambda x: nn.Parameter(x * 2), lambda x: nn.Parameter(x[0])):
        for transform in (lambda f: grad(lambda x: f(x).sum())(ROWS), lambda f: jvp(f, (ROWS,), (ROWS,))):
            with pytest.raises(RequiresGradError):
                transform(f)
    with pytest.raises(InsideTransformError, match=r"Tensor.grad of what a transform records.*torch.autograd.grad"):
        grad(lambda x: grad_of_an_argument(x).sum())(ROWS[0])
    with pytest.raises(InsideTransformError, match=r"Tensor.backward\(\) inside grad"):
        grad(lambda x: (x.sum().backward(), x.sum())[1])(ROWS[0])


def test_captured_leaves_of_a_gradient() -> None:
    layer = nn.Linear(6, 2, dtype=DOUBLE)
    f = lambda x: (layer(x).square().sum().backward(), x.square().sum())[1]
    f(ROWS[0])
    expected = layer.weight.grad.clone()  # type: ignore[union-attr]
    layer.zero_grad()
    close(grad(f)(ROWS[0]), 2 * ROWS[0])
    close(layer.weight.grad, expected)
    with pytest.raises(InsideTransformError, match=r"Tensor.backward\(\) inside jvp"):
        jvp(f, (ROWS[0],), (ROWS[1],))
    shared = torch.zeros(6, dtype=DOUBLE)
    with pytest.raises(CapturedOnceError), torch.no_grad():
        vmap(lambda x, w: (w.requires_grad_().add_(1), x)[1], (0, None))(ROWS, shared)
    assert vjp(lambda x: x + torch.ones(6, **OPTIONS), ROWS[0])[0].requires_grad
