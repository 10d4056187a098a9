"""Derivatives of layer, group and batch normalization.

All compute, over some dimensions of ``x`` seen in a suitable shape::

    normal = (x - mean) * rstd        mean, rstd: of x over these dimensions (batch norm in eval mode: given)
    out = normal * weight + bias

First order goes through PyTorch's fused backward operators. These have entries of their own in plain operators
(norm_backwards.py), with the statistics taken as the functions of ``x`` that they are, so that every order is right:
PyTorch's double backward takes them as constants when it is differentiated again, and is wrong from the third order on
(pytorch/pytorch#186256).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.derivatives.helpers import cast, recorded_at_base
from functrans.derivatives.matmul import sum_of
from functrans.derivatives.named import with_names
from functrans.derivatives.normalization import BATCH, BATCH_EVAL, GROUP, LAYER, Norm, State, Values, shaped
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


#: ``(values, cotangent of the output, which of the three are wanted) -> (of input, of weight, of bias)``
Backward = Callable[[Values, Tensor, list[bool]], Any]


class Forward:
    """Formulas of an operator ``(input, ..., weight, bias, ...) -> (out, mean, rstd, ...)``.

    Further outputs, the new running statistics, count as constants, as in PyTorch.
    """

    def __init__(self, norm: Norm, op: OpOverload, backward: Backward) -> None:
        self.norm = norm
        self.op = op
        self.backward = backward
        self.alone = {"input": self.input, "weight": self.weight, "bias": self.bias}
        self.names = [a.name for a in op._schema.arguments]
        if "running_mean" in self.names:
            self.alone |= {"running_mean": self.running_mean, "running_var": self.running_var}

    def add_entry(self) -> None:
        options = (*self.norm.options, "running_mean", "running_var", "training")
        saved = ("grads", "results", "input", "weight", *(n for n in options if n in self.names))
        of_bias = ("grads", "bias", *(n for n in self.norm.options if n in self.names))
        each: Any = {n: with_names(of_bias if n == "bias" else saved, f) for n, f in self.alone.items()}
        derivative(
            self.op,
            tangent=with_names((*saved[1:], *(f"{n}_t" for n in self.alone)), self.tangent),
            joint=with_names((*saved, "bias", "wanted"), self.joint),
            **each,
        )

    def input(self, v: Values) -> Tensor | None:
        of_out, of_mean, of_rstd = v["grads"][:3]
        total = None if of_out is None else self.backward(v, of_out, [True, False, False])[0]
        if self.norm.learned(v) and (of_mean is not None or of_rstd is not None):
            s = State(self.norm, v)
            count = s.normal.numel() // max(s.rstd.numel(), 1)
            terms = [
                None if of_mean is None else shaped(of_mean, s.layout.statistics).expand(s.normal.shape) / count,
                None if of_rstd is None else shaped(of_rstd, s.layout.statistics) * s.rstd * s.rstd * s.normal / -count,
            ]
            more = cast(sum_of(terms).reshape(v["input"].shape), v["input"].dtype)  # type: ignore[union-attr]
            total = more if total is None else total + more
        return total

    def weight(self, v: Values) -> Tensor | None:
        of_out = v["grads"][0]
        return None if of_out is None else self.backward(v, of_out, [False, True, False])[1]

    def bias(self, v: Values) -> Tensor | None:
        of_out = v["grads"][0]
        if of_out is None:
            return None
        layout = self.norm.layout(v, of_out)
        return layout.to_affine(layout.x(of_out), v["bias"])

    def joint(self, v: Values) -> dict[str, Tensor | None]:
        """Cotangents of input and weight by one operator, where only the output has one."""
        of_out, of_mean, of_rstd = v["grads"][:3]
        wanted = v["wanted"]
        found: dict[str, Tensor | None] = {}
        if of_out is not None and of_mean is None and of_rstd is None and "input" in wanted and "weight" in wanted:
            found["input"], found["weight"], _ = self.backward(v, of_out, [True, True, False])
        return found | {n: self.alone[n](v) for n in wanted if n not in found}

    # The running statistics are what x is normalized with in eval mode, and do not matter in training mode.

    def running_mean(self, v: Values) -> Tensor | None:
        of_out = v["grads"][0]
        if self.norm.learned(v) or of_out is None:
            return None
        s = State(self.norm, v)
        return s.layout.to_affine(-s.weighted(s.layout.x(of_out)) * s.rstd, v["running_mean"])

    def running_var(self, v: Values) -> Tensor | None:
        of_out = v["grads"][0]
        if self.norm.learned(v) or of_out is None:
            return None
        s = State(self.norm, v)
        slope = s.weighted(s.layout.x(of_out)) * s.normal * s.rstd * s.rstd / -2
        return s.layout.to_affine(slope, v["running_var"])

    def tangent(self, v: Values) -> tuple[Tensor | None, ...]:
        s, out = State(self.norm, v), v["results"][0]
        moved: list[Tensor | None] = [None] * len(self.op._schema.returns)
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


for _norm, _op, _backward in (
    (LAYER, aten.native_layer_norm.default, layer_backward),
    (GROUP, aten.native_group_norm.default, group_backward),
    (BATCH, aten.native_batch_norm.default, batch_backward),
    (BATCH, aten._native_batch_norm_legit.no_stats, batch_backward),
    (BATCH, aten._native_batch_norm_legit_functional.default, batch_backward),
    (BATCH_EVAL, aten._native_batch_norm_legit_no_training.default, batch_backward),
):
    Forward(_norm, _op, _backward).add_entry()
