"""Recurrent layers in small operators, for any number of leading dimensions.

PyTorch's own decomposition of these composites forgets the dropout between layers, and calls a fused kernel without a
usable derivative where the input is constant and the weights are not (torch 2.13).

Shapes: ``x [..., S, I]``, the rows of all steps one after the other, ``sizes`` (a list) of them per step, and never
more than at the step before; hidden states ``[..., layers * directions, N, H]``; parameters ``[..., out, in]`` and
``[..., out]``. Leading dimensions broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import base, scan
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.functionalization.hidden_effects import stands_in_for
from functrans.operators.info import OpInfo
from functrans.pytorch.thread_state import STATE, running_at

aten = torch.ops.aten

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def lstm_step(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Gates in the order input, forget, cell, output."""
    i, f, g, o = (from_input + from_hidden).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Gates in the order reset, update, new; the reset gate acts behind the hidden product."""
    input_r, input_z, input_n = from_input.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = from_hidden.chunk(3, -1)
    r = (input_r + hidden_r).sigmoid()
    z = (input_z + hidden_z).sigmoid()
    n = (input_n + r * hidden_n).tanh()
    return (n + z * (state[0] - n),)


def tanh_step(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Elman's."""
    return ((from_input + from_hidden).tanh(),)


def relu_step(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Elman's, with relu."""
    return ((from_input + from_hidden).relu(),)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., n, in]`` times a weight that may have leading dimensions too."""
    y = x @ weight.transpose(-1, -2)
    if bias is None:
        return y
    return y + (bias if bias.dtype is y.dtype else bias.to(y.dtype)).unsqueeze(-2)  # autocast chose another for y


def run_layer(
    step: Cell, x: Tensor, initial: State, params: Sequence[Tensor], has_biases: bool, sizes: list[int], reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: the rows of all steps, and the state of every sequence after its last step."""
    w_input, w_hidden = params[:2]
    b_input, b_hidden = params[2:4] if has_biases else (None, None)
    projection = params[-1] if len(params) == (5 if has_biases else 3) else None
    projected = linear(x, w_input, b_input).split(sizes, -2)
    times = range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes))
    running = sizes[-1] if reverse else sizes[0]
    state = tuple(one.narrow(-2, 0, running) for one in initial)
    rows: list[Any] = [None] * len(sizes)
    finished: list[State] = []
    for t in times:
        if sizes[t] < running:
            finished.append(tuple(one.narrow(-2, sizes[t], running - sizes[t]) for one in state))
            state = tuple(one.narrow(-2, 0, sizes[t]) for one in state)
        elif sizes[t] > running:
            starting = (one.narrow(-2, running, sizes[t] - running) for one in initial)
            state = tuple(torch.cat(pair, -2) for pair in zip(state, starting))
        running = sizes[t]
        state = step(projected[t], linear(state[0], w_hidden, b_hidden), state)
        if projection is not None:
            state = (state[0] @ projection.transpose(-1, -2), *state[1:])
        rows[t] = state[0]
    if finished:
        state = tuple(torch.cat(parts, -2) for parts in zip(state, *reversed(finished)))
    return torch.cat(rows, -2), state


def run_layers(
    step: Cell,
    x: Tensor,
    hidden: State,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    sizes: list[int],
    dropout: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, State]:
    """All layers; ``dropout`` acts between them."""
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    finals = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            initial = tuple(one.select(-3, k) for one in hidden)
            output, final = run_layer(
                step, x, initial, params[k * each : (k + 1) * each], has_biases, sizes, direction == 1
            )
            outputs.append(output)
            finals.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout is not None and layer < num_layers - 1:
            x = dropout(x)
    return x, tuple(torch.stack(parts, -3) for parts in zip(*finals))


STEPS: dict[Any, Cell] = {
    aten.lstm.input: lstm_step,
    aten.gru.input: gru_step,
    aten.rnn_tanh.input: tanh_step,
    aten.rnn_relu.input: relu_step,
    aten.lstm.data: lstm_step,
    aten.gru.data: gru_step,
    aten.rnn_tanh.data: tanh_step,
    aten.rnn_relu.data: relu_step,
}


def run_padded(
    step: Cell,
    x: Tensor,
    hidden: State,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, State]:
    """``x [..., T, N, I]``, or ``[..., N, T, I]`` if ``batch_first``."""
    if batch_first:
        x = x.transpose(-2, -3)
    steps, rows = x.shape[-3], x.shape[-2]
    x = x.reshape(*x.shape[:-3], steps * rows, x.shape[-1])
    x, final = run_layers(step, x, hidden, params, has_biases, num_layers, bidirectional, [rows] * steps, dropout)
    x = x.reshape(*x.shape[:-2], steps, rows, x.shape[-1])
    return (x.transpose(-2, -3) if batch_first else x), final


def decomposed_padded(op: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The decomposition of one ``.input`` operator."""

    def padded(
        x: Tensor,
        hidden: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        state = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        drop = (lambda y: torch.dropout(y, dropout, True)) if train and dropout else None
        output, final = run_padded(
            STEPS[op], x, state, params, has_biases, num_layers, bidirectional, batch_first, drop
        )
        return (output, *final)

    return padded


def decomposed_packed(op: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The decomposition of one ``.data`` operator."""

    def packed(
        x: Tensor,
        batch_sizes: Tensor,
        hidden: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> tuple[Tensor, ...]:
        state = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        drop = (lambda y: torch.dropout(y, dropout, True)) if train and dropout else None
        sizes = batch_sizes.tolist()
        output, final = run_layers(STEPS[op], x, state, params, has_biases, num_layers, bidirectional, sizes, drop)
        return (output, *final)

    return packed


for op in STEPS:
    DECOMPOSITIONS.add(op, decomposed_padded(op) if op._overloadname == "input" else decomposed_packed(op))


def pad_packed(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """``_pad_packed_sequence``, whose own definition reads the sizes from memory: the sequences, and their lengths."""
    sizes = batch_sizes.tolist()
    steps, count = max(len(sizes), total_length), sizes[0]
    places = [t * count + n for t, size in enumerate(sizes) for n in range(size)]
    padded = data.new_full((steps * count, *data.shape[1:]), padding_value)
    padded = padded.index_copy(0, torch.tensor(places, device=data.device), data).unflatten(0, (steps, count))
    lengths = torch.tensor([sum(size > n for size in sizes) for n in range(count)])
    return padded.transpose(0, 1) if batch_first else padded, lengths


def pack_padded(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """``_pack_padded_sequence``: the rows of all steps, and how many there are of each."""
    ends = lengths.tolist()
    if min(ends) <= 0:
        raise RuntimeError(f"pack_padded_sequence: lengths {ends}, expected numbers greater than 0")
    if sorted(ends, reverse=True) != ends:
        raise RuntimeError(
            f"pack_padded_sequence: lengths {ends}, expected decreasing ones. Pass enforce_sorted=False."
        )
    if batch_first:
        x = x.transpose(0, 1)
    if len(ends) != x.shape[1] or ends[0] > x.shape[0]:
        raise RuntimeError(f"pack_padded_sequence: lengths {ends} for {x.shape[1]} sequences of {x.shape[0]} steps")
    sizes = [sum(end > t for end in ends) for t in range(ends[0])]
    places = [t * x.shape[1] + n for t, size in enumerate(sizes) for n in range(size)]
    return x.flatten(0, 1).index_select(0, torch.tensor(places, device=x.device)), torch.tensor(sizes)


@stands_in_for(aten._pack_padded_sequence.default)
def packed_at_the_door(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Its derivative reads the sizes from memory, and there is none in forward mode."""
    if scan(args, kwargs)[0] is None:
        return base(known.op, args, kwargs)
    with running_at(STATE.top):
        return pack_padded(*args)


DECOMPOSITIONS.add(aten._pad_packed_sequence.default, pad_packed)
