"""Derivatives of layer, group and batch normalization.

All compute, over some dimensions of ``x`` seen in a suitable shape::

    normal = (x - mean) * rstd        mean, rstd: of x over these dimensions (batch norm in eval mode: given)
    out = normal * weight + bias

First order goes through PyTorch's fused backward operators. These have entries of their own in plain operators, with
the statistics taken as the functions of ``x`` that they are, so that every order is right: PyTorch's double backward
takes them as constants when it is differentiated again, and is wrong from the third order on (pytorch/pytorch#186256).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.derivatives.helpers import cast, recorded_at_base
from functrans.derivatives.matmul import sum_of
from functrans.derivatives.named import no_cotangent, with_names
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten
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


# ---------------------------------------------------------------------------------------------- the forward operators


def forward_entry(norm: Norm, op: OpOverload, backward: Callable[[Values, Tensor, list[bool]], Any]) -> None:
    """Add the entry of ``op(input, ..., weight, bias, ...) -> (out, mean, rstd, ...)``.

    Further outputs, the new running statistics, count as constants, as in PyTorch.
    """
    names = [a.name for a in op._schema.arguments]
    options = [n for n in (*norm.options, "running_mean", "running_var", "training") if n in names]
    outputs = len(op._schema.returns)

    def input_cotangent(v: Values) -> Tensor | None:
        of_out, of_mean, of_rstd = v["grads"][:3]
        total = None if of_out is None else backward(v, of_out, [True, False, False])[0]
        if norm.learned(v) and (of_mean is not None or of_rstd is not None):
            s = State(norm, v)
            count = s.normal.numel() // max(s.rstd.numel(), 1)
            terms = [
                None if of_mean is None else shaped(of_mean, s.layout.statistics).expand(s.normal.shape) / count,
                None if of_rstd is None else shaped(of_rstd, s.layout.statistics) * s.rstd * s.rstd * s.normal / -count,
            ]
            more = cast(sum_of(terms).reshape(v["input"].shape), v["input"].dtype)  # type: ignore[union-attr]
            total = more if total is None else total + more
        return total

    def weight_cotangent(v: Values) -> Tensor | None:
        of_out = v["grads"][0]
        return None if of_out is None else backward(v, of_out, [False, True, False])[1]

    def cotangents(v: Values) -> dict[str, Tensor | None]:
        """Of input and weight by one operator, where only the output has a cotangent."""
        of_out, of_mean, of_rstd = v["grads"][:3]
        wanted = v["wanted"]
        alone = {"input": input_cotangent, "weight": weight_cotangent, "bias": bias_cotangent, **given_alone}
        found: dict[str, Tensor | None] = {}
        if of_out is not None and of_mean is None and of_rstd is None and "input" in wanted and "weight" in wanted:
            found["input"], found["weight"], _ = backward(v, of_out, [True, True, False])
        return found | {n: alone[n](v) for n in wanted if n not in found}

    def bias_cotangent(v: Values) -> Tensor | None:
        of_out = v["grads"][0]
        if of_out is None:
            return None
        layout = norm.layout(v, of_out)
        return layout.to_affine(layout.x(of_out), v["bias"])

    # The running statistics are what x is normalized with in eval mode, and do not matter in training mode.

    def of_running_mean(v: Values) -> Tensor | None:
        of_out = v["grads"][0]
        if norm.learned(v) or of_out is None:
            return None
        s = State(norm, v)
        return s.layout.to_affine(-s.weighted(s.layout.x(of_out)) * s.rstd, v["running_mean"])

    def of_running_var(v: Values) -> Tensor | None:
        of_out = v["grads"][0]
        if norm.learned(v) or of_out is None:
            return None
        s = State(norm, v)
        slope = s.weighted(s.layout.x(of_out)) * s.normal * s.rstd * s.rstd / -2
        return s.layout.to_affine(slope, v["running_var"])

    def tangent(v: Values) -> tuple[Tensor | None, ...]:
        s, out = State(norm, v), v["results"][0]
        moved: list[Tensor | None] = [None] * outputs
        terms = []
        if v["input_t"] is not None:
            x_t = s.layout.x(v["input_t"])
            terms.append(s.weighted(s.rstd * s.project(x_t)))
            if s.learned:
                mean, rstd = v["results"][1:3]
                moved[1] = cast(s.layout.mean(x_t).reshape(mean.shape), mean.dtype)
                moved[2] = cast((-s.rstd * s.rstd * s.layout.mean(x_t * s.normal)).reshape(rstd.shape), rstd.dtype)
        if not s.learned and v.get("running_mean_t") is not None:
            terms.append(s.weighted(-s.rstd * shaped(v["running_mean_t"], s.layout.statistics)))
        if not s.learned and v.get("running_var_t") is not None:
            var_t = shaped(v["running_var_t"], s.layout.statistics)
            terms.append(s.weighted(s.normal * (s.rstd * s.rstd * var_t / -2)))
        if v["weight_t"] is not None:
            terms.append(s.normal * shaped(v["weight_t"], s.layout.affine))
        if v["bias_t"] is not None:
            terms.append(shaped(v["bias_t"], s.layout.affine))
        total = sum_of(terms)  # type: ignore[arg-type]
        if total is not None:
            moved[0] = cast(total.expand(s.layout.shape).reshape(out.shape), out.dtype)
        return tuple(moved)

    saved = ("grads", "results", "input", "weight", *options)
    given, given_alone = {}, {}
    if "running_mean" in names:
        given_alone = {"running_mean": of_running_mean, "running_var": of_running_var}
        given = {"running_mean": with_names(saved, of_running_mean), "running_var": with_names(saved, of_running_var)}
    derivative(
        op,
        tangent=with_names((*saved[1:], "input_t", "weight_t", "bias_t", *(f"{n}_t" for n in given)), tangent),
        input=with_names(saved, input_cotangent),
        weight=with_names(saved, weight_cotangent),
        bias=with_names(("grads", "bias", *(n for n in norm.options if n in names)), bias_cotangent),
        joint=with_names((*saved, "bias", "wanted"), cotangents),
        **given,  # type: ignore[arg-type]
    )


# ---------------------------------------------------------------------------------------------- the backward operators


def backward_entry(norm: Norm, op: OpOverload) -> None:
    """Add the entry of ``op(grad_out, input, ...) -> (of input, of weight, of bias)``.

    ``rstd * project(grad_out * weight)``, ``sum(grad_out * normal)`` and ``sum(grad_out)``, as functions of grad_out,
    input and weight; mean and rstd stand for functions of input and have no derivative of their own.
    """
    names = [a.name for a in op._schema.arguments]
    options = [n for n in names if n not in ("grad_out", "input", "weight", "bias", "output_mask")]

    def pulled(v: Values, s: State) -> Tensor | None:
        """The cotangent of ``grad_out * weight``."""
        of_input = v["grads"][0]
        return None if of_input is None else s.project(s.rstd * s.layout.x(of_input))

    def grad_out_cotangent(v: Values) -> Tensor | None:
        s = State(norm, v)
        of_weight, of_bias = v["grads"][1:]
        product = pulled(v, s)
        total = sum_of(
            [
                None if product is None else s.weighted(product),
                None if of_weight is None else shaped(of_weight, s.layout.affine) * s.normal,
                None if of_bias is None else shaped(of_bias, s.layout.affine),
            ]
        )
        grad_out = v["grad_out"]
        return None if total is None else cast(total.expand(s.layout.shape).reshape(grad_out.shape), grad_out.dtype)

    def weight_cotangent(v: Values) -> Tensor | None:
        s = State(norm, v)
        product = pulled(v, s)
        return None if product is None else s.layout.to_affine(product * s.layout.x(v["grad_out"]), v["weight"])

    def input_cotangent(v: Values) -> Tensor | None:
        s = State(norm, v)
        of_input, of_weight = v["grads"][:2]
        grad_out, mean = s.layout.x(v["grad_out"]), s.layout.mean
        of_normal = None if of_weight is None else shaped(of_weight, s.layout.affine) * grad_out
        direct = None
        if of_input is not None and s.learned:
            of_input = s.layout.x(of_input)
            given = s.weighted(grad_out)
            # normal occurs twice in project, and rstd stands in front of it
            twice = -s.rstd * (of_input * mean(given * s.normal) + given * mean(of_input * s.normal))
            of_normal = twice if of_normal is None else of_normal + twice
            direct = -s.rstd * s.rstd * s.normal * mean(of_input * s.project(given))
        total = sum_of([direct, None if of_normal is None else s.rstd * s.project(of_normal)])
        return None if total is None else cast(total.reshape(v["input"].shape), v["input"].dtype)

    def tangent(v: Values) -> tuple[Tensor | None, ...]:
        s = State(norm, v)
        grad_out, mean = s.layout.x(v["grad_out"]), s.layout.mean
        grad_t, input_t, weight_t = v["grad_out_t"], v["input_t"], v["weight_t"]
        grad_t = None if grad_t is None else s.layout.x(grad_t)
        normal_t = None if input_t is None else s.rstd * s.project(s.layout.x(input_t))
        moved: list[Tensor | None] = [None, None, None]
        if v["output_mask"][0]:
            given_t = sum_of(
                [
                    None if grad_t is None else s.weighted(grad_t),
                    None if weight_t is None else grad_out * shaped(weight_t, s.layout.affine),
                ]
            )
            total = None if given_t is None else s.rstd * s.project(given_t)
            if normal_t is not None and s.learned:
                given = s.weighted(grad_out)
                inner = normal_t * mean(given * s.normal) + s.normal * mean(given * normal_t)
                rstd_t = -s.rstd * s.rstd * mean(s.layout.x(input_t) * s.normal)
                total = sum_of([total, rstd_t * s.project(given) - s.rstd * inner])
            if total is not None:
                moved[0] = cast(total.reshape(v["input"].shape), v["input"].dtype)
        if v["output_mask"][1]:
            total = sum_of(
                [
                    None if grad_t is None else grad_t * s.normal,
                    None if normal_t is None else grad_out * normal_t,
                ]
            )
            moved[1] = None if total is None else s.layout.to_affine(total, v["results"][1])
        if v["output_mask"][2] and grad_t is not None:
            moved[2] = s.layout.to_affine(grad_t, v["results"][2])
        return tuple(moved)

    saved = ("grads", "grad_out", "input", "weight", *options)
    derivative(
        op,
        tangent=with_names((*saved[1:], "results", "output_mask", "grad_out_t", "input_t", "weight_t"), tangent),
        grad_out=with_names(saved, grad_out_cotangent),
        input=with_names(saved, input_cotangent),
        weight=with_names(saved, weight_cotangent),
        **{norm.mean: no_cotangent, norm.rstd: no_cotangent},  # type: ignore[arg-type]
    )


# ---------------------------------------------------------------------------------------------- layer, group, batch

LAYER = Norm(layer_layout, ("normalized_shape",), "mean", "rstd")
GROUP = Norm(group_layout, ("N", "C", "HxW", "group"), "mean", "rstd")
BATCH = Norm(batch_layout, ("eps",), "save_mean", "save_invstd")
BATCH_EVAL = Norm(batch_layout, ("eps",), "save_mean", "save_invstd", trainable=False)


def plain_backward(norm: Norm, v: Values, grad: Tensor, mask: list[bool]) -> Any:
    """What the fused operator computes, in operators that PyTorch's own autograd differentiates right."""
    s = State(norm, v)
    given = s.layout.x(grad)
    of_input = cast((s.rstd * s.project(s.weighted(given))).reshape(grad.shape), v["input"].dtype) if mask[0] else None
    return of_input, s.layout.to_affine(given * s.normal, v["weight"]) if mask[1] else None, None


def layer_backward(v: Values, grad: Tensor, mask: list[bool]) -> Any:
    if recorded_at_base(grad, v["input"], v["weight"]):
        return plain_backward(LAYER, v, grad, mask)
    mean, rstd = v["results"][1:3]
    given = v["input"], v["normalized_shape"], mean, rstd, v["weight"], None
    return run(aten.native_layer_norm_backward.default, grad, *given, mask)


def group_backward(v: Values, grad: Tensor, mask: list[bool]) -> Any:
    if recorded_at_base(grad, v["input"], v["weight"]):
        return plain_backward(GROUP, v, grad, mask)
    mean, rstd = v["results"][1:3]
    given = grad.contiguous(), v["input"].contiguous(), mean, rstd, v["weight"]
    return run(aten.native_group_norm_backward.default, *given, *(v[n] for n in GROUP.options), mask)


def batch_backward(v: Values, grad: Tensor, mask: list[bool]) -> Any:
    if v.get("training"):
        if recorded_at_base(grad, v["input"], v["weight"]):
            return plain_backward(BATCH, v, grad, mask)
        mean, rstd = v["results"][1:3]
        given = grad, v["input"], v["weight"], None, None, mean, rstd, True, v["eps"]
        return run(aten.native_batch_norm_backward.default, *given, mask)
    # plain, because the fused operator has no derivative by the running statistics
    s = State(BATCH_EVAL, v)
    of_input = cast(s.weighted(grad) * s.rstd, grad.dtype) if mask[0] else None
    return of_input, s.layout.to_affine(grad * s.normal, v["weight"]) if mask[1] else None, None


forward_entry(LAYER, aten.native_layer_norm.default, layer_backward)
forward_entry(GROUP, aten.native_group_norm.default, group_backward)
for _op in (
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
):
    forward_entry(BATCH, _op, batch_backward)
forward_entry(BATCH_EVAL, aten._native_batch_norm_legit_no_training.default, batch_backward)
backward_entry(LAYER, aten.native_layer_norm_backward.default)
backward_entry(GROUP, aten.native_group_norm_backward.default)
backward_entry(BATCH, aten.native_batch_norm_backward.default)
