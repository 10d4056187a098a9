"""Recurrent layers: folded into N if the parameters are shared, otherwise in small operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.recurrent import STEPS, run_layers, run_padded
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.rules.random import random_rule
from functrans.interpreters.vmap.table import (
    BATCHING_RULES,
    BatchInfo,
    batching_rule,
    logical_rank,
    materialize,
    to_front,
)
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def padded_rule(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """The rule of one ``.input`` operator."""

    def padded(
        info: BatchInfo,
        in_dims: Sequence[Any],
        x: Tensor,
        hidden: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Any, Any]:
        if logical_rank(x, in_dims[0]) != 3:
            raise RuleDeclined(f"{op} refuses an input that is not 3-d")
        drops = train and dropout > 0 and num_layers > 1
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        states, state_dims = listed(hidden, in_dims[1])
        if not drops and all(bdim is None for bdim in (in_dims[0], *state_dims, *in_dims[2])):
            outputs = op(x, hidden, params, *options)
            return outputs, (None,) * len(outputs)
        size = info.batch_size
        x = materialize(x, in_dims[0], size)
        states = [materialize(state, bdim, size) for state, bdim in zip(states, state_dims)]
        if drops or size == 0 or any(bdim is not None for bdim in in_dims[2]):
            params = [to_front(param, bdim) for param, bdim in zip(params, in_dims[2])]
            output, final = run_padded(
                STEPS[op],
                x,
                tuple(states),
                params,
                has_biases,
                num_layers,
                bidirectional,
                batch_first,
                drawn_dropout(info, dropout) if drops else None,
            )
            return (output, *final), (0,) * (1 + len(final))
        n_dim = 0 if batch_first else 1
        rows = x.shape[1 + n_dim]
        folded = [fold_rows(state, 1) for state in states]
        output, *final = op(fold_rows(x, n_dim), folded if len(folded) > 1 else folded[0], params, *options)
        dims = (n_dim, *[1] * len(final))
        outputs = tuple(one.unflatten(dim, (size, rows)) for one, dim in zip((output, *final), dims))
        return outputs, dims

    return padded


def packed_rule(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """The rule of one ``.data`` operator; the sizes of the steps are shared."""

    def packed(
        info: BatchInfo,
        in_dims: Sequence[Any],
        x: Tensor,
        batch_sizes: Tensor,
        hidden: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> tuple[Any, Any]:
        if in_dims[1] is not None:
            raise RuleDeclined(f"{op} with other lengths in every example")
        size = info.batch_size
        states, state_dims = listed(hidden, in_dims[2])
        states = [materialize(state, bdim, size) for state, bdim in zip(states, state_dims)]
        output, final = run_layers(
            STEPS[op],
            materialize(x, in_dims[0], size),
            tuple(states),
            [to_front(param, bdim) for param, bdim in zip(params, in_dims[3])],
            has_biases,
            num_layers,
            bidirectional,
            batch_sizes.tolist(),
            drawn_dropout(info, dropout) if train and dropout > 0 else None,
        )
        return (output, *final), (0,) * (1 + len(final))

    return packed


@batching_rule(aten._pack_padded_sequence.default)
def pack_padded_rule(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, lengths: Tensor, batch_first: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """``[T, N, ...]`` with shared lengths: the batch is one more feature, and the sizes of the steps stay shared."""
    if in_dims[1] is not None:
        raise RuleDeclined("sequences of other lengths in every example")
    packed, batch_sizes = aten._pack_padded_sequence.default(x.movedim(in_dims[0], -1), lengths, batch_first)
    return (packed, batch_sizes), (packed.dim() - 1, None)


@batching_rule(aten._pack_padded_sequence_backward.default)
def pack_padded_backward_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    grad: Tensor,
    input_size: Sequence[int],
    batch_sizes: Tensor,
    batch_first: bool,
) -> tuple[Tensor, int]:
    """The batch is one more feature."""
    if in_dims[2] is not None:
        raise RuleDeclined("sequences of other lengths in every example")
    size = [*input_size, info.batch_size]
    padded = aten._pack_padded_sequence_backward.default(grad.movedim(in_dims[0], -1), size, batch_sizes, batch_first)
    return padded, padded.dim() - 1


@batching_rule(aten._pad_packed_sequence.default)
def pad_packed_rule(
    info: BatchInfo, in_dims: Sequence[Any], data: Tensor, batch_sizes: Tensor, *rest: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    """The batch is one more feature."""
    if in_dims[1] is not None:
        raise RuleDeclined("sequences of other lengths in every example")
    padded, lengths = aten._pad_packed_sequence.default(data.movedim(in_dims[0], -1), batch_sizes, *rest)
    return (padded, lengths), (padded.dim() - 1, None)


def listed(hidden: Any, in_dims: Any) -> tuple[list[Tensor], list[int | None]]:
    """One state or several, as lists."""
    return ([hidden], [in_dims]) if isinstance(hidden, Tensor) else (list(hidden), list(in_dims))


def fold_rows(x: Tensor, dim: int) -> Tensor:
    """Batch dimension 0 joins the logical dimension ``dim``."""
    return x.movedim(0, dim).flatten(dim, dim + 1)


def drawn_dropout(info: BatchInfo, p: float) -> Callable[[Tensor], Tensor]:
    """Dropout on a batch, as the randomness of the vmap says."""

    def drop(x: Tensor) -> Tensor:
        output, bdim = random_rule(info, aten.dropout.default, (0, None, None), (x, p, True), {})
        return to_front(output, bdim)

    return drop


for layers in STEPS:
    make_rule = padded_rule if layers._overloadname == "input" else packed_rule
    BATCHING_RULES.add(layers, make_rule(layers), place=f"{__file__}:{make_rule.__code__.co_firstlineno}")
