"""The fused steps of optimizers under transforms: beside PyTorch's kernels, a loop, and central differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import grad, jacfwd, jacrev, vmap

DOUBLE = torch.float64
aten = torch.ops.aten


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) + 0.5


ADAM = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1, "eps": 1e-3, "maximize": False}
SGD = {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.2, "nesterov": False, "maximize": False}
ADAGRAD = {"lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3, "maximize": False}
#: By name: the operator, how many lists of state it has, whether the last of these are counts of steps, its options.
STEPS: dict[str, tuple[Any, int, bool, dict[str, Any]]] = {
    "adam": (aten._fused_adam, 4, True, {**ADAM, "amsgrad": False}),
    "amsgrad": (aten._fused_adam, 4, True, {**ADAM, "amsgrad": True, "maximize": True}),
    "adamw": (aten._fused_adamw, 4, True, {**ADAM, "amsgrad": True}),
    "sgd": (aten._fused_sgd, 1, False, {**SGD, "is_first_step": False}),
    "nesterov": (
        aten._fused_sgd,
        1,
        False,
        {**SGD, "nesterov": True, "dampening": 0.0, "maximize": True, "is_first_step": False},
    ),
    "first step": (aten._fused_sgd, 1, False, {**SGD, "is_first_step": True}),
    "adagrad": (aten._fused_adagrad, 2, True, ADAGRAD),
}


def stepping(name: str, **more: Any) -> Callable[..., Tensor]:
    """A function of a vector and the learning rate, which goes through all that the step of two tensors takes."""
    packet, lists, counted, options = STEPS[name]

    def step(v: Tensor, lr: Any = 0.1) -> Tensor:
        parameters = [v[:3] * 2, v[3]]
        grads, *state = ([v[:3].roll(k) * k, v[3] + k] for k in range(1, lists + 2))
        if counted:
            state[-1] = [torch.tensor(3.0), torch.tensor(5.0)]
        if options.get("amsgrad") is False:
            state[2] = []
        op = packet.tensor_lr if isinstance(lr, Tensor) else packet.default
        out = op(parameters, grads, *state, lr=lr, **{**options, **more})
        return torch.cat([x.reshape(-1) for each in out for x in each if x.dtype is DOUBLE])

    return step


def differences(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    h = 1e-6
    return torch.stack([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in torch.eye(len(x), dtype=DOUBLE)], 1)


@pytest.mark.parametrize(
    "more", [{}, {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}], ids=["", "scaled"]
)
@pytest.mark.parametrize("name", STEPS)
def test_beside_the_kernels(name: str, more: dict[str, Any]) -> None:
    step, rows = stepping(name, **more), some(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as the one of a loop over the examples
        batched = vmap(step)(rows)
    torch.testing.assert_close(batched, torch.stack([step(row) for row in rows]))
    expected = torch.stack([differences(step, row) for row in rows])
    torch.testing.assert_close(vmap(jacrev(step))(rows), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(vmap(jacfwd(step))(rows), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", STEPS)
def test_by_the_learning_rate(name: str) -> None:
    step, v, rate = stepping(name), some(4), torch.tensor([0.1, 0.3], dtype=DOUBLE)
    slopes = vmap(grad(lambda lr: (step(v, lr) ** 2).sum()))(rate)
    h = 1e-6
    around = [[(step(v, r + s) ** 2).sum() for s in (h, -h)] for r in rate]
    torch.testing.assert_close(
        slopes, torch.stack([(up - down) / (2 * h) for up, down in around]), rtol=1e-6, atol=1e-7
    )


def test_what_overflowed_changes_nothing() -> None:
    """Where ``found_inf`` is 1, of each example its own."""
    step, v, found = stepping("amsgrad", found_inf=torch.tensor(1.0)), some(4), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(vmap(step)(v.expand(2, 4).clone()), step(v).expand(2, -1))
    both = vmap(lambda f: stepping("amsgrad", found_inf=f)(v))(found)
    torch.testing.assert_close(both, torch.stack([stepping("amsgrad", found_inf=f)(v) for f in found]))


@pytest.mark.parametrize("parameters", [1, 2])  # in one list, as many as lists or fewer
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_optimizers_inside(optimizer: str, parameters: int) -> None:
    def trained(x: Tensor) -> Tensor:
        w, b = torch.zeros(3, dtype=DOUBLE, requires_grad=True), torch.zeros((), dtype=DOUBLE, requires_grad=True)
        steps = getattr(torch.optim, optimizer)([w, b][:parameters], lr=0.1, fused=True)
        for _ in range(3):
            steps.zero_grad()
            ((w * x + b - 1) ** 2).sum().backward()
            steps.step()
        return torch.cat([w.detach(), b.detach()[None]])

    rows = some(3, 3)
    torch.testing.assert_close(vmap(trained)(rows), torch.stack([trained(row) for row in rows]))
