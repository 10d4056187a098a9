"""Random operators that scale or drop what they are given: dropout and ``rrelu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined, same_dims, with_defaults
from functrans.interpreters.vmap.rules.random import example_like, random_family, shared
from functrans.interpreters.vmap.table import BatchInfo, logical_rank, materialize
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


@random_family(aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default)
def dropout(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """A factor for each element (each channel), which is what dropout makes of ones."""
    x, p, train = with_defaults(op, args)
    features = op is aten.feature_dropout.default
    if features and logical_rank(x, in_dims[0]) < 2:
        raise RuleDeclined(f"{op}: the example's rank is left to the operator itself")
    if info.randomness == "different":
        x = materialize(x, in_dims[0], info.batch_size)
        if features:
            return op(x.flatten(0, 1), p, train).unflatten(0, x.shape[:2]), 0
        output = op(x, p, train)
        if op is aten.native_dropout.default and info.batch_size == 0:
            output = output[0], output[1].bool()  # for no elements the mask is a copy of the input
        return output, same_dims(output, 0)
    if in_dims[0] is None:
        output = op(x, p, train)
        return output, same_dims(output, None)
    factor = op(torch.ones_like(example_like(x, in_dims[0])), p, train)
    x = materialize(x, in_dims[0], info.batch_size)
    if isinstance(factor, Tensor):
        return x * factor, 0
    return (x * factor[0], shared(factor[1], info.batch_size)), (0, 0)


@random_family(aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
def alpha_dropout(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """What is dropped takes a value that keeps mean and variance, so a shared draw is told from a run on zeros."""
    x, p, train = args
    features = op is aten.feature_alpha_dropout.default
    if features and logical_rank(x, in_dims[0]) < 2:
        raise RuleDeclined(f"{op}: the example's rank is left to the operator itself")
    if info.randomness == "different":
        x = materialize(x, in_dims[0], info.batch_size)
        if features:
            return op(x.flatten(0, 1), p, train).unflatten(0, x.shape[:2]), 0
        return op(x, p, train), 0
    if in_dims[0] is None:
        return op(x, p, train), None
    if p == 1:
        return x * 0, in_dims[0]
    # Klambauer et al., Self-Normalizing Neural Networks: dropped values become -alpha', then x -> a x + b.
    alpha = 1.7580993408473766
    a = ((alpha * alpha * p + 1) * (1 - p)) ** -0.5
    x = materialize(x, in_dims[0], info.batch_size)
    shape = list(x.shape[1:3]) + [1] * (x.dim() - 3) if features else list(x.shape[1:])
    kept = aten.bernoulli.p(torch.empty(shape, dtype=x.dtype, device=x.device), 1 - p)
    return x * (kept * a) + ((kept - 1) * (alpha * a) + alpha * a * p), 0


@random_family(aten.rrelu_with_noise_functional.default)
def rrelu(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """A random slope for what is not positive; slopes that all examples share are drawn for a negative tensor."""
    x, noise, lower, upper, training, generator = with_defaults(op, args)
    if info.randomness == "different":
        x = materialize(x, in_dims[0], info.batch_size)
        noise = materialize(noise, in_dims[1], info.batch_size)
        return op(x, noise, lower, upper, training, generator), (0, 0)
    if in_dims[0] is None:
        example = example_like(noise, in_dims[1])
        return op(x, example, lower, upper, training, generator), (None, None)
    negative = torch.full_like(example_like(x, in_dims[0]), -1)
    slope = op(negative, torch.empty_like(negative), lower, upper, training, generator)[1]
    x = materialize(x, in_dims[0], info.batch_size)
    slope = torch.where(x <= 0, slope, torch.ones_like(x))
    return (x * slope, slope), (0, 0)
