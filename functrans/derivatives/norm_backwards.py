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


backward_entry(LAYER, aten.native_layer_norm_backward.default)
backward_entry(GROUP, aten.native_group_norm_backward.default)
backward_entry(BATCH, aten.native_batch_norm_backward.default)
