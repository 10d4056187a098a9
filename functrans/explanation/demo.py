"""What ``python -m functrans.explain demo`` explains: gradients of a loss, one for each example."""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.api.transforms import grad
from functrans.api.vmap import vmap


def loss(weights: Tensor, example: Tensor, target: Tensor) -> Tensor:
    prediction = torch.tanh(example @ weights)
    return (prediction - target) ** 2


def demo() -> Tensor:
    weights = torch.tensor([0.5, -1.0, 2.0])
    examples = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    targets = torch.tensor([1.0, -1.0])
    return vmap(grad(loss), in_dims=(None, 0, 0))(weights, examples, targets)
