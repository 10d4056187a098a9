"""What layer, group and batch normalization have in common, of which their derivatives are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import cast

Values = dict[str, Any]


def shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x if x.shape == shape else x.reshape(shape)


@dataclass(frozen=True)
class Layout:
    """How a normalization sees its arguments."""

    #: shape of x
    shape: tuple[int, ...]
    #: dimensions that the statistics are taken over
    dims: tuple[int, ...]
    #: shape of mean and rstd
    statistics: tuple[int, ...]
    #: shape of weight and bias
    affine: tuple[int, ...]

    def x(self, x: Tensor) -> Tensor:
        return shaped(x, self.shape)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=True)

    def to_affine(self, x: Tensor, like: Tensor) -> Tensor:
        """Sum ``x`` to the shape of weight or bias, given as ``like``."""
        affine = (1,) * (x.dim() - len(self.affine)) + self.affine
        dims = [i for i, n in enumerate(affine) if n == 1 or i < x.dim() - len(self.affine)]
        return cast(shaped(x.sum(dims) if dims else x, like.shape), like.dtype)


def layer_layout(v: Values, x: Tensor) -> Layout:
    k = len(v["normalized_shape"])
    return Layout(x.shape, tuple(range(-k, 0)), (*x.shape[: x.dim() - k], *(1,) * k), tuple(x.shape[x.dim() - k :]))


def batch_layout(v: Values, x: Tensor) -> Layout:
    per_channel = (1, x.shape[1], *(1,) * (x.dim() - 2))
    return Layout(x.shape, (0, *range(2, x.dim())), per_channel, per_channel)


def group_layout(v: Values, x: Tensor) -> Layout:
    n, channels, group = v["N"], v["C"], v["group"]
    inside = channels // group
    return Layout((n, group, inside, v["HxW"]), (2, 3), (n, group, 1, 1), (1, group, inside, 1))


@dataclass(frozen=True)
class Norm:
    """A family of normalizations: its options and where its statistics come from."""

    layout: Callable[[Values, Tensor], Layout]
    options: tuple[str, ...]
    #: names of the statistics in the backward operator
    mean: str
    rstd: str
    trainable: bool = True

    def learned(self, v: Values) -> bool:
        """Whether the statistics are those of x."""
        return self.trainable and bool(v.get("training", v.get("train", True)))

    def statistics(self, v: Values, layout: Layout) -> tuple[Tensor, Tensor]:
        if self.learned(v):
            mean, rstd = (v["results"][1], v["results"][2]) if self.mean not in v else (v[self.mean], v[self.rstd])
        else:
            mean, rstd = v["running_mean"], (v["running_var"] + v["eps"]).rsqrt()
        return shaped(mean, layout.statistics), shaped(rstd, layout.statistics)


class State:
    """A normalization at one point: what all derivatives are made of."""

    def __init__(self, norm: Norm, v: Values) -> None:
        self.layout = norm.layout(v, v["input"])
        self.learned = norm.learned(v)
        self.input = v["input"]
        self.mean, self.rstd = norm.statistics(v, self.layout)
        if self.learned and torch.is_grad_enabled() and self.input.requires_grad:
            # PyTorch's own autograd, which records at the base, takes the statistics that its operators return for
            # constants
            x, rstd = self.layout.x(self.input), self.rstd.detach()
            self.mean = self.layout.mean(x)
            var = self.layout.mean((x - self.mean).square())
            self.rstd = cast((var - var.detach() + rstd.square().reciprocal()).rsqrt(), rstd.dtype)
        weight = v["weight"]
        self.weight = None if weight is None else shaped(weight, self.layout.affine)

    @cached_property
    def normal(self) -> Tensor:
        return (self.layout.x(self.input) - self.mean) * self.rstd

    def weighted(self, x: Tensor) -> Tensor:
        return x if self.weight is None else x * self.weight

    def project(self, x: Tensor) -> Tensor:
        """The symmetric map behind both modes: ``rstd * project`` is the derivative of ``normal`` by x."""
        if not self.learned:
            return x
        mean = self.layout.mean
        return x - mean(x) - self.normal * mean(x * self.normal)


LAYER = Norm(layer_layout, ("normalized_shape",), "mean", "rstd")
GROUP = Norm(group_layout, ("N", "C", "HxW", "group"), "mean", "rstd")
BATCH = Norm(batch_layout, ("eps",), "save_mean", "save_invstd")
BATCH_EVAL = Norm(batch_layout, ("eps",), "save_mean", "save_invstd", trainable=False)
