"""``autograd.Function``s that are the identity, with the methods that a test gives them; and one that doubles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class Twice(Identity):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def identity(**methods: Callable[..., Any]) -> Any:
    """A Function with these methods: ``backward``, ``jvp``, ``vmap``, or one in place of ``forward``."""
    return type("Identity", (Identity,), {name: staticmethod(method) for name, method in methods.items()})
