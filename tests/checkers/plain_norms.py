"""Normalizations written out in plain operators: the oracle for their derivatives of every order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def statistics(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    return mean, ((x - mean) ** 2).mean(dims, keepdim=True).add(eps).rsqrt()


def scaled_and_shifted(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    mean, rstd = statistics(x, list(range(-len(shape), 0)), eps)
    return scaled_and_shifted((x - mean) * rstd, weight, bias), mean, rstd


def group_norm(x: Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, group: int, eps: float) -> Any:
    mean, rstd = statistics(x.reshape(n, group, -1), [2], eps)
    normal = ((x.reshape(n, group, -1) - mean) * rstd).reshape(n, c, hw)
    out = scaled_and_shifted(normal, *(p if p is None else p.reshape(c, 1) for p in (weight, bias)))
    return out.reshape(x.shape), mean.reshape(n, group), rstd.reshape(n, group)


def batch_norm(x: Tensor, weight: Any, bias: Any, eps: float, given: Any = None) -> tuple[Tensor, ...]:
    shape = (1, -1, *[1] * (x.dim() - 2))
    if given is None:
        mean, rstd = statistics(x, [0, *range(2, x.dim())], eps)
    else:
        mean, rstd = given[0].reshape(shape), given[1].reshape(shape).add(eps).rsqrt()
    weight, bias = (p if p is None else p.reshape(shape) for p in (weight, bias))
    out = scaled_and_shifted((x - mean) * rstd, weight, bias)
    if given is not None:
        return out, x.new_empty(0), x.new_empty(0)
    return out, mean.flatten(), rstd.flatten()


def native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    return batch_norm(x, weight, bias, eps, None if training else (running_mean, running_var))


def batch_norm_functional(x, weight, bias, running_mean, running_var, training, momentum, eps):
    out = native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return *out, running_mean.detach(), running_var.detach()


def batch_norm_no_stats(x, weight, bias, training, momentum, eps):
    return batch_norm(x, weight, bias, eps)


def batch_norm_no_training(x, weight, bias, running_mean, running_var, momentum, eps):
    return batch_norm(x, weight, bias, eps, (running_mean, running_var))


def rms_norm(x: Tensor, shape: Any, weight: Any, eps: float | None) -> tuple[Tensor, Tensor]:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = (x * x).mean(list(range(-len(shape), 0)), keepdim=True).add(eps).rsqrt()
    return scaled_and_shifted(x * rstd, weight, None), rstd


def pulled_back(
    norm: Callable[[Tensor, Tensor, Tensor], Tensor], grad: Tensor, x: Tensor, weight: Any, mask: Any
) -> Any:
    """The backward operator that belongs to ``norm(x, weight, bias)``, by autograd."""

    def recorded(t: Tensor) -> Tensor:
        return t if t.requires_grad else t.clone().requires_grad_()

    x = recorded(x)
    if weight is None:
        (found,) = torch.autograd.grad(norm(x, None, None), x, grad, create_graph=True)
        return found if mask[0] else None, None, None
    weight, bias = recorded(weight), torch.zeros_like(weight).requires_grad_()
    found = torch.autograd.grad(norm(x, weight, bias), (x, weight, bias), grad, create_graph=True)
    return tuple(g if keep else None for g, keep in zip(found, mask, strict=True))


def layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, mask):
    return pulled_back(lambda x, w, b: layer_norm(x, shape, w, b, EPS)[0], grad, x, weight, mask)


def group_norm_backward(grad, x, mean, rstd, weight, n, c, hw, group, mask):
    return pulled_back(lambda x, w, b: group_norm(x, w, b, n, c, hw, group, EPS)[0], grad, x, weight, mask)


def batch_norm_backward(grad, x, weight, running_mean, running_var, mean, rstd, train, eps, mask):
    given = None if train else (running_mean, running_var)
    return pulled_back(lambda x, w, b: batch_norm(x, w, b, eps, given)[0], grad, x, weight, mask)


#: the eps that belongs to the mean and rstd which the layer and group norm backward operators are given
EPS = 1e-3

PLAIN = {
    aten.native_layer_norm.default: layer_norm,
    aten.native_group_norm.default: group_norm,
    aten.native_batch_norm.default: native_batch_norm,
    aten._native_batch_norm_legit.no_stats: batch_norm_no_stats,
    aten._native_batch_norm_legit_functional.default: batch_norm_functional,
    aten._native_batch_norm_legit_no_training.default: batch_norm_no_training,
    aten._fused_rms_norm.default: rms_norm,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.native_group_norm_backward.default: group_norm_backward,
    aten.native_batch_norm_backward.default: batch_norm_backward,
}
