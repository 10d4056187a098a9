"""The fused steps of optimizers, ``torch._fused_adam_`` and its like, as plain ``torch``, parameter by parameter.

So vmap has no loop over the examples, and a step has derivatives, by the gradients, the state and the learning rate.
The formulas are those on the pages of torch.optim. As in PyTorch's kernels, ``grad_scale`` is what gradients were
multiplied by, and where ``found_inf`` is 1 nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS

aten = torch.ops.aten
Tensors = Sequence[Tensor]


def step_of(update: Callable[..., tuple[Any, ...]], outputs: int, **fixed: bool) -> Callable[..., list[list[Tensor]]]:
    """The step for lists of tensors, which returns as many of its lists anew as there are ``outputs``.

    ``update(parameter, gradient, *state, **options)`` is the step for one parameter: it returns that and new values for
    the first of the state. What the state lacks, as momenta that are not used, is None.
    """

    def run(
        self: Tensors,
        grads: Tensors,
        *state: Tensors,
        maximize: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        **options: Any,
    ) -> list[list[Tensor]]:
        lists: list[list[Tensor]] = [[] for _ in range(outputs)]
        for place, (x, grad) in enumerate(zip(self, grads, strict=True)):
            before: tuple[Any, ...] = x, grad, *(each[place] if each else None for each in state)
            grad = grad if grad_scale is None else grad / grad_scale.reshape(())
            x, *rest = update(x, -grad if maximize else grad, *before[2:], **options, **fixed)
            after = x, grad, *rest, *before[2 + len(rest) :]
            for made, old, new in zip(lists, before, after):
                if new is not None:
                    made.append(new if found_inf is None else torch.where(found_inf.reshape(()) == 1, old, new))
        return lists

    return run


def adam(
    x: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    peak: Any,
    count: Tensor,
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    decoupled: bool,
) -> tuple[Any, ...]:
    if decoupled:
        x = x - lr * weight_decay * x
    elif weight_decay:
        grad = grad + weight_decay * x
    mean = mean + (1 - beta1) * (grad - mean)
    square = beta2 * square + (1 - beta2) * grad * grad
    peak = torch.maximum(peak, square) if amsgrad else peak
    count = count.double()
    spread = (peak if amsgrad else square).sqrt() / (1 - beta2**count).sqrt().to(x.dtype) + eps
    return x - (lr / (1 - beta1**count)).to(x.dtype) * (mean / spread), mean, square, peak


def sgd(
    x: Tensor,
    grad: Tensor,
    velocity: Any,
    *,
    lr: Any,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    is_first_step: bool,
) -> tuple[Any, ...]:
    if weight_decay:
        grad = grad + weight_decay * x
    if momentum:
        velocity = grad.clone() if is_first_step else momentum * velocity + (1 - dampening) * grad
        grad = grad + momentum * velocity if nesterov else velocity
    return x - lr * grad, velocity


def adagrad(
    x: Tensor, grad: Tensor, square: Tensor, count: Tensor, *, lr: Any, lr_decay: float, weight_decay: float, eps: float
) -> tuple[Any, ...]:
    if weight_decay:
        grad = grad + weight_decay * x
    square = square + grad * grad
    rate = lr / (1 + (count.double() - 1) * lr_decay)
    return x - rate.to(x.dtype) * (grad / (square.sqrt() + eps)), square


for _packet, _update, _fixed in (
    (aten._fused_adam, adam, {"decoupled": False}),
    (aten._fused_adamw, adam, {"decoupled": True}),
    (aten._fused_sgd, sgd, {}),
    (aten._fused_adagrad, adagrad, {}),
):
    for _op in (_packet.default, _packet.tensor_lr):
        DECOMPOSITIONS.add(_op, step_of(_update, len(_op._schema.returns), **_fixed))
