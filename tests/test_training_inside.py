"""Training loops inside of vmap as programs write them: what they do with ``.grad``, ``.data`` and parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler

from functrans import vmap
from functrans.errors import DataDependentError

DOUBLE = torch.float64
ROWS = torch.randn(4, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=DOUBLE)


def cost(weights: Tensor, x: Tensor) -> Tensor:
    return -(weights - x).cos().sum() * (1 + x[0] ** 2)


Training = Callable[[Tensor], Tensor]


def trained(start: Callable[[Tensor], Tensor], optimizer: Callable[..., torch.optim.Optimizer]) -> Training:
    def train(x: Tensor) -> Tensor:
        weights = start(x)
        stepper = optimizer([weights])
        for _ in range(3):
            stepper.zero_grad()
            cost(weights, x).backward()
            stepper.step()
        return weights.detach()

    return train


def clipped_and_scheduled(x: Tensor) -> Tensor:
    a, b = zeros(2, 3).requires_grad_(), x.flip(0)[::1].requires_grad_()
    stepper = SGD([a, b], 0.1, momentum=0.9)
    schedule = lr_scheduler.ExponentialLR(stepper, 0.5)
    for k in range(3):
        stepper.zero_grad(set_to_none=k == 1)
        cost(a.view(6) * b, x).backward()
        norm = clip_grad_norm_([a, b], 0.3)
        clip_grad_value_([a, b], 0.2)
        stepper.step()
        schedule.step()
    return torch.cat([a.detach().view(6), b.detach(), norm.view(1)])


def gradients_that_are_kept(x: Tensor) -> Tensor:
    weights = x.clone().requires_grad_()
    weights.grad = torch.zeros_like(weights)
    kept = weights.grad
    for _ in range(3):
        kept.zero_()
        cost(weights, x * 2).backward()
        assert weights.grad is kept
        with torch.no_grad():
            weights -= 0.01 * kept
    return torch.stack([weights.detach(), kept])


def gradients_that_are_written(x: Tensor) -> Tensor:
    weights, given = zeros(6).requires_grad_(), x * 2
    weights.grad = given
    given.mul_(5)
    cost(weights, x).backward()
    weights.grad += 1
    SGD([weights], 0.1).step()
    weights.grad.mul_(3)
    return torch.stack([weights.detach(), weights.grad, given])


def frozen_and_thawed(x: Tensor) -> Tensor:
    layers = nn.Linear(6, 3, dtype=DOUBLE), nn.Tanh(), nn.Linear(3, 1, dtype=DOUBLE)
    made = nn.Sequential(*layers).requires_grad_()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=DOUBLE).view_as(p))
    stepper = SGD(made.parameters(), 0.1)
    for k in range(4):
        made[0].requires_grad_(k % 2 == 0)
        stepper.zero_grad()
        (made(x) - 1).square().sum().backward()
        assert (made[0].weight.grad is None) == (k % 2 == 1)
        stepper.step()
    return torch.cat([p.detach().flatten() for p in made.parameters()])


def by_data(x: Tensor) -> Tensor:
    weights = zeros(3, 2).T.requires_grad_()
    for _ in range(2):
        cost(weights.reshape(6), x).backward()
        weights.data -= 0.1 * weights.grad.data  # type: ignore[union-attr]
        weights.data.copy_(weights.data * 2)
        weights.grad.data.zero_()  # type: ignore[union-attr]
    return weights.detach()


def its_own_argument(x: Tensor) -> Tensor:
    x.requires_grad_()
    for _ in range(2):
        x.grad = None
        cost(x, x.detach() * 2).backward()
        with torch.no_grad():
            x.add_(x.grad, alpha=-0.01)  # type: ignore[arg-type]
    return x.detach() * 1


def averaged(x: Tensor) -> Tensor:
    weights, average = zeros(6).requires_grad_(), zeros(6)
    rows = weights.view(2, 3)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(cost(weights, x), weights)
        with torch.no_grad():
            weights.sub_(gradient, alpha=0.1)
            average.lerp_(weights, 0.5)
    return torch.cat([average, rows.detach().flatten()])


CAPTURED = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 1)).double()


def module(x: Tensor, made: nn.Module | None = None) -> Tensor:
    """``made``, or a copy of what is captured."""
    made = made or copy.deepcopy(CAPTURED)
    made.requires_grad_()
    stepper = Adam(made.parameters(), 0.1)
    for _ in range(2):
        stepper.zero_grad()
        (made(x) - 1).square().sum().backward()
        stepper.step()
    return torch.cat([p.detach().flatten() for p in made.parameters()])


def module_made_inside(x: Tensor) -> Tensor:
    made = nn.Linear(6, 1, dtype=DOUBLE)
    for k, p in enumerate(made.parameters()):
        nn.init.constant_(p, 0.1 * k)
    return module(x, made)


PROGRAMS = {
    "SGD": trained(lambda x: zeros(6).requires_grad_(), lambda p: SGD(p, 0.01, momentum=0.9, nesterov=True)),
    "Adam": trained(lambda x: torch.zeros_like(x).requires_grad_(), lambda p: Adam(p, 0.1)),
    "AdamW": trained(lambda x: nn.Parameter(x * 2), lambda p: AdamW(p, 0.1, amsgrad=True)),
    "RMSprop": trained(lambda x: x.clone().requires_grad_(), lambda p: RMSprop(p, 0.1, centered=True)),
    "clipped and scheduled": clipped_and_scheduled,
    "gradients that are kept": gradients_that_are_kept,
    "gradients that are written": gradients_that_are_written,
    "by .data": by_data,
    "its own argument": its_own_argument,
    "averaged": averaged,
    "frozen and thawed": frozen_and_thawed,
    "a copied module": module,
    "a module that is made inside": module_made_inside,
}


def twice(f: Training) -> Training:
    return vmap(vmap(f, randomness="different"), randomness="different")


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_example_is_trained_on_its_own(name: str) -> None:
    train, rows = PROGRAMS[name], ROWS.clone()
    expected = torch.stack([train(row) for row in rows])
    for in_dim in (0, 1):
        written = ROWS.clone().movedim(0, in_dim).contiguous()
        torch.testing.assert_close(vmap(train, in_dim, randomness="same")(written), expected)
        torch.testing.assert_close(written, rows.movedim(0, in_dim))
        assert not written.requires_grad
    torch.testing.assert_close(twice(train)(ROWS.clone().view(2, 2, 6)).flatten(0, 1), expected)
    assert all(p.grad is None for p in CAPTURED.parameters())


def test_a_leaf_is_written_without_its_derivative_as_in_pytorch() -> None:
    write = lambda x: x.clone().requires_grad_().mul_(2)
    for run in (write, vmap(write)):
        with pytest.raises(RuntimeError, match="a leaf .* requires grad is .*used in an in-place operation"):
            run(ROWS)


#: Every optimizer of torch.optim in its forms. Those that read numbers are refused under vmap, with the user's line.
OPTIMIZERS = sorted(
    name for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)  # fmt: skip
READING = {"LBFGS", "Adafactor"}
FORMS: dict[str, list[dict[str, bool]]] = {"LBFGS": [{}], "Muon": [{}], "SparseAdam": [{}]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str) -> None:
    for form in FORMS.get(name, [{"foreach": False}, {"foreach": True}]):

        def train(x: Tensor, form: dict[str, bool] = form) -> Tensor:
            weights = torch.stack([x, x.flip(0)]).requires_grad_()
            stepper = getattr(torch.optim, name)([weights], **form)

            def closure() -> Tensor:
                stepper.zero_grad()
                loss = cost(weights, x)
                loss.backward()
                if name == "SparseAdam":
                    assert weights.grad is not None
                    weights.grad = weights.grad.to_sparse()
                return loss

            for _ in range(3):
                stepper.step(closure)
            return weights.detach()

        if name in READING:
            found = rf"test_training_inside.py:\d+, in train: `stepper.step.* at torch/optim/_?{name.lower()}.py:\d+"
            with pytest.raises(DataDependentError, match=found):
                vmap(train)(ROWS)
        else:
            torch.testing.assert_close(vmap(train)(ROWS), torch.stack([train(row) for row in ROWS]))
