"""Derivatives of RMS normalization: ``input * rstd * weight``, with rstd the root of the mean square's inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import cast
from functrans.derivatives.matmul import sum_of
from functrans.derivatives.named import with_names
from functrans.derivatives.table import derivative

aten = torch.ops.aten
Values = dict[str, Any]


def rms_parts(v: Values) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The normalized input and the mean over the normalized dimensions."""
    dims = list(range(-len(v["normalized_shape"]), 0))
    return v["input"] * v["results"][1], lambda x: x.mean(dims, keepdim=True)


def rms_input(v: Values) -> Tensor:
    of_out, of_rstd = v["grads"]
    rstd = v["results"][1]
    normal, mean = rms_parts(v)
    total = None
    if of_out is not None:
        given = of_out if v["weight"] is None else of_out * v["weight"]
        total = rstd * (given - normal * mean(given * normal))
    if of_rstd is not None:
        total = sum_of([total, of_rstd * rstd * rstd * normal * (-rstd.numel() / max(normal.numel(), 1))])
    return cast(total, v["input"].dtype)  # type: ignore[arg-type]


def rms_weight(v: Values) -> Tensor | None:
    of_out = v["grads"][0]
    if of_out is None:
        return None
    total = of_out * rms_parts(v)[0]
    lead = list(range(total.dim() - v["weight"].dim()))
    return cast(total.sum(lead) if lead else total, v["weight"].dtype)


def rms_tangent(v: Values) -> tuple[Tensor | None, Tensor | None]:
    out, rstd = v["results"]
    normal, mean = rms_parts(v)
    input_t, weight_t, weight = v["input_t"], v["weight_t"], v["weight"]
    terms, rstd_t = [], None
    if input_t is not None:
        along = mean(input_t * normal)
        rstd_t = cast(-rstd * rstd * along, rstd.dtype)
        normal_t = rstd * (input_t - normal * along)
        terms.append(normal_t if weight is None else normal_t * weight)
    if weight_t is not None:
        terms.append(normal * weight_t)
    total = sum_of(terms)
    return None if total is None else cast(total, out.dtype), rstd_t


_RMS = ("results", "input", "weight", "normalized_shape")
derivative(
    aten._fused_rms_norm.default,
    tangent=with_names((*_RMS, "input_t", "weight_t"), rms_tangent),
    input=with_names(("grads", *_RMS), rms_input),
    weight=with_names(("grads", *_RMS), rms_weight),
)
