"""Derivatives of the fused backward operators of layer, group and batch normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.derivatives.helpers import cast
from functrans.derivatives.matmul import sum_of
from functrans.derivatives.named import no_cotangent, with_names
from functrans.derivatives.normalization import BATCH, GROUP, LAYER, Norm, State, Values, shaped
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


class Backward:
    """Formulas of an operator ``(grad_out, input, ...) -> (of input, of weight, of bias)``.

    ``rstd * project(grad_out * weight)``, ``sum(grad_out * normal)`` and ``sum(grad_out)``, as functions of grad_out,
    input and weight; mean and rstd stand for functions of input and have no derivative of their own.
    """

    def __init__(self, norm: Norm, op: OpOverload) -> None:
        self.norm = norm
        self.op = op

    def add_entry(self) -> None:
        names = [a.name for a in self.op._schema.arguments]
        options = [n for n in names if n not in ("grad_out", "input", "weight", "bias", "output_mask")]
        saved = ("grads", "grad_out", "input", "weight", *options)
        moving = ("results", "output_mask", "grad_out_t", "input_t", "weight_t")
        derivative(
            self.op,
            tangent=with_names((*saved[1:], *moving), self.tangent),
            grad_out=with_names(saved, self.grad_out),
            input=with_names(saved, self.input),
            weight=with_names(saved, self.weight),
            **{self.norm.mean: no_cotangent, self.norm.rstd: no_cotangent},  # type: ignore[arg-type]
        )

    @staticmethod
    def pulled(v: Values, s: State) -> Tensor | None:
        """The cotangent of ``grad_out * weight``."""
        of_input = v["grads"][0]
        return None if of_input is None else s.project(s.rstd * s.layout.x(of_input))

    def grad_out(self, v: Values) -> Tensor | None:
        s = State(self.norm, v)
        of_weight, of_bias = v["grads"][1:]
        product = self.pulled(v, s)
        total = sum_of(
            [
                None if product is None else s.weighted(product),
                None if of_weight is None else shaped(of_weight, s.layout.affine) * s.normal,
                None if of_bias is None else shaped(of_bias, s.layout.affine),
            ]
        )
        grad_out = v["grad_out"]
        return None if total is None else cast(total.expand(s.layout.shape).reshape(grad_out.shape), grad_out.dtype)

    def weight(self, v: Values) -> Tensor | None:
        s = State(self.norm, v)
        product = self.pulled(v, s)
        return None if product is None else s.layout.to_affine(product * s.layout.x(v["grad_out"]), v["weight"])

    def input(self, v: Values) -> Tensor | None:
        s = State(self.norm, v)
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

    def tangent(self, v: Values) -> tuple[Tensor | None, ...]:
        s = State(self.norm, v)
        grad_t, input_t = (None if v[n] is None else s.layout.x(v[n]) for n in ("grad_out_t", "input_t"))
        normal_t = None if input_t is None else s.rstd * s.project(input_t)
        of_input, of_weight, of_bias = v["output_mask"]
        return (
            self.tangent_of_input(v, s, grad_t, input_t, normal_t) if of_input else None,
            self.tangent_of_weight(v, s, grad_t, normal_t) if of_weight else None,
            s.layout.to_affine(grad_t, v["results"][2]) if of_bias and grad_t is not None else None,
        )

    @staticmethod
    def tangent_of_input(
        v: Values, s: State, grad_t: Tensor | None, input_t: Tensor | None, normal_t: Tensor | None
    ) -> Tensor | None:
        grad_out, mean, weight_t = s.layout.x(v["grad_out"]), s.layout.mean, v["weight_t"]
        given_t = sum_of(
            [
                None if grad_t is None else s.weighted(grad_t),
                None if weight_t is None else grad_out * shaped(weight_t, s.layout.affine),
            ]
        )
        total = None if given_t is None else s.rstd * s.project(given_t)
        if input_t is not None and normal_t is not None and s.learned:
            given = s.weighted(grad_out)
            inner = normal_t * mean(given * s.normal) + s.normal * mean(given * normal_t)
            rstd_t = -s.rstd * s.rstd * mean(input_t * s.normal)
            total = sum_of([total, rstd_t * s.project(given) - s.rstd * inner])
        return None if total is None else cast(total.reshape(v["input"].shape), v["input"].dtype)

    @staticmethod
    def tangent_of_weight(v: Values, s: State, grad_t: Tensor | None, normal_t: Tensor | None) -> Tensor | None:
        total = sum_of(
            [
                None if grad_t is None else grad_t * s.normal,
                None if normal_t is None else s.layout.x(v["grad_out"]) * normal_t,
            ]
        )
        return None if total is None else s.layout.to_affine(total, v["results"][1])


Backward(LAYER, aten.native_layer_norm_backward.default).add_entry()
Backward(GROUP, aten.native_group_norm_backward.default).add_entry()
Backward(BATCH, aten.native_batch_norm_backward.default).add_entry()
