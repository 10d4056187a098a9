"""Batch normalization: the batch is folded into the channels, which never mix.

The forms that update running statistics in place do not come here, except ``native_batch_norm`` and ``batch_norm``,
whose schemas do not tell: those decline where they would write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.rules.folding import (
    empty_batch,
    fold_c,
    fold_channel_vector,
    fold_n,
    side_of_n,
    unfold_c,
    unfold_n,
)
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, logical_rank, logical_shape
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def normalize(
    op: OpOverload,
    info: BatchInfo,
    in_dims: Sequence[Any],
    training: bool,
    x: Tensor,
    vectors: list[Any],
    rest: list[Any],
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """``op(x, *vectors, *rest)``, where ``vectors`` are ``[C]`` or None; the outputs after the first are ``[C]``."""
    size = info.batch_size
    if size == 0:
        return empty_batch(op, in_dims, x, *vectors, *rest)
    x_dim, *vector_dims = in_dims[: 1 + len(vectors)]
    if logical_rank(x, x_dim) < 2:
        # Only an input without elements may be without channels; PyTorch's decompositions refuse it.
        examples = [
            [
                value if bdim is None else value.select(bdim, i)
                for value, bdim in zip((x, *vectors), (x_dim, *vector_dims))
            ]
            for i in range(size)
        ]
        rows = [as_tuple(op(*example, *rest)) for example in examples]
        return tuple(torch.stack(column) for column in zip(*rows)), (0,) * len(rows[0])
    shape = logical_shape(x, x_dim)
    if not training and x_dim is not None and all(bdim is None for bdim in vector_dims):
        # With given statistics the rows do not mix either, and N needs no rearrangement.
        side = side_of_n((x, x_dim))
        output, *others = as_tuple(op(fold_n(x, x_dim, size, side), *vectors, *rest))
        return (unfold_n(output, size, shape[0], side), *others), (side, *[None] * len(others))
    folded = [
        None if vector is None else fold_channel_vector(vector, bdim, size)
        for vector, bdim in zip(vectors, vector_dims)
    ]
    output, *others = as_tuple(op(fold_c(x, x_dim, size), *folded, *rest))
    outputs, dims = [unfold_c(output, size, shape[1])], [1]
    for other in others:
        # Without training there are no statistics to save and the operator returns an empty tensor.
        saved = training or other.shape[0] != 0
        outputs.append(other.reshape(size, shape[1]) if saved else other)
        dims.append(0 if saved else None)  # type: ignore[arg-type]
    return tuple(outputs), tuple(dims)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    """One output or several."""
    return output if isinstance(output, tuple) else (output,)


@batching_rule(aten.batch_norm.default)
def batch_norm_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *rest: Any,
) -> tuple[Tensor, int]:
    """Whole, as long as it does not write."""
    if training and running_mean is not None:
        raise RuleDeclined("batch_norm in training updates its running statistics")
    vectors = [weight, bias, running_mean, running_var]
    outputs, dims = normalize(aten.batch_norm.default, info, in_dims, training, x, vectors, [training, *rest])
    return outputs[0], dims[0]


@batching_rule(aten.native_batch_norm.default)
def native_batch_norm_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *rest: Any,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """As long as it does not write."""
    if training and running_mean is not None:
        raise RuleDeclined("native_batch_norm in training updates its running statistics")
    vectors = [weight, bias, running_mean, running_var]
    return normalize(aten.native_batch_norm.default, info, in_dims, training, x, vectors, [training, *rest])


@batching_rule(aten._native_batch_norm_legit.no_stats)
def native_batch_norm_no_stats_rule(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Without given statistics those of the input are taken, in training or not."""
    return normalize(aten._native_batch_norm_legit.no_stats, info, in_dims, True, x, [weight, bias], list(rest))


@batching_rule(aten._native_batch_norm_legit_functional.default)
def native_batch_norm_functional_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    *rest: Any,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The new running statistics are outputs."""
    vectors = [weight, bias, running_mean, running_var]
    op = aten._native_batch_norm_legit_functional.default
    return normalize(op, info, in_dims, training, x, vectors, [training, *rest])


@batching_rule(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm_no_training_rule(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *arguments: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Evaluation."""
    vectors, rest = list(arguments[:4]), list(arguments[4:])
    return normalize(aten._native_batch_norm_legit_no_training.default, info, in_dims, False, x, vectors, rest)


@batching_rule(aten.native_batch_norm_backward.default)
def native_batch_norm_backward_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    train: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The three gradients have channels too."""
    size = info.batch_size
    vectors = (weight, running_mean, running_var, save_mean, save_invstd)
    if size == 0:
        arguments = (grad_output, x, *vectors, train, eps, output_mask)
        return empty_batch(aten.native_batch_norm_backward.default, in_dims, *arguments)
    channels = logical_shape(x, in_dims[1])[1]
    if not train:
        vectors = (*vectors[:3], None, None)  # the saved ones are empty then, and not read
    folded = [
        None if vector is None else fold_channel_vector(vector, bdim, size)
        for vector, bdim in zip(vectors, in_dims[2:7])
    ]
    grads = aten.native_batch_norm_backward.default(
        fold_c(grad_output, in_dims[0], size), fold_c(x, in_dims[1], size), *folded, train, eps, output_mask
    )
    grad_input = None if grads[0] is None else unfold_c(grads[0], size, channels)
    parameters = [None if grad is None else grad.reshape(size, channels) for grad in grads[1:]]
    dims = (None if grad_input is None else 1, *(None if grad is None else 0 for grad in parameters))
    return (grad_input, *parameters), dims
