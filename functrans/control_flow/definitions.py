"""The operators that take functions, as plain torch code; see NOTE [Control flow].

What PyTorch puts in front of them (``torch.cond``, ``scan``, ...) flattens trees and checks arguments, and takes back
what the function's results are the structure of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.control_flow.choices import Sides, Split, check_alike, decide
from functrans.control_flow.mapped import mapped
from functrans.control_flow.table import DEFINITIONS
from functrans.errors import CallError, CallTypeError
from functrans.pytorch.control_flow import kept_by
from functrans.pytorch.torch_private import torch_pytree
from functrans.tensors.described import shown

higher_order: Any = torch.ops.higher_order

BRANCHES = Sides("torch.cond", "true_fn", "the result of false_fn")
BODY = Sides("while_loop", "body_fn", "what was carried so far")
EACH = Sides("map", "f", "that of the first step")
PAIR = Sides("associative_scan", "combine_fn", "an element")
STEP = Sides("scan", "combine_fn", "the carry so far")
OUTPUT = Sides("scan", "combine_fn", "that of the first step")


@DEFINITIONS.register(higher_order.cond)
def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any]) -> Any:
    choice = decide("cond", pred)
    if not isinstance(choice, Split):
        return (true_fn if choice else false_fn)(*operands)
    yes, no = choice.run(true_fn, operands), choice.run(false_fn, operands, taken=False)
    return choice.choose(BRANCHES, yes, no)


@DEFINITIONS.register(higher_order.while_loop)
def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    carried_inputs: Sequence[Any],
    additional_inputs: Sequence[Any],
    **graph: Any,
) -> Any:
    """Runs until the last example is done. Those that are keep their values: what is carried is the same for them, and
    the body does not see it."""
    carried = list(carried_inputs)
    running: Tensor | None = None  # which examples are
    while True:
        go = cond_fn(*carried, *additional_inputs)
        if not isinstance(go, bool) and not (isinstance(go, Tensor) and go.dtype is torch.bool and not go.shape):
            expected = "a bool, or a tensor of them without dimensions"
            raise CallTypeError("while_loop", f"{shown(go)} from cond_fn", expected)
        if running is not None:
            go = running & go
        choice = decide("while_loop", go)
        if choice is False:
            break
        if isinstance(choice, Split):
            if not choice.known:
                got = f"{shown(go)} from cond_fn while a graph is traced, whose value is not known"
                cure = "Carry an int that counts the steps, or use scan."
                raise CallError("while_loop", got, "a number of steps that does not depend on tensors", cure)
            running = go
            carried = without_numbers(carried)  # they will be others for each example
            out = without_numbers(torch_pytree.tree_leaves(choice.run(body_fn, (*carried, *additional_inputs))))
            carried = choice.choose(BODY, out, carried)
        else:
            out = torch_pytree.tree_leaves(body_fn(*carried, *additional_inputs))
            new, old = ([None if is_number(x) else x for x in values] for values in (out, carried))
            check_alike(BODY, new, old)
            carried = out
    leaves = [x.clone() if isinstance(x, Tensor) else x for x in carried]  # PyTorch's are no aliases of what went in
    spec = kept_by(cond_fn, "in_spec")  # of what is carried, and of nothing
    return tuple(leaves) if spec is None else torch_pytree.tree_unflatten(leaves, spec)[0]


def is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float)


def without_numbers(values: Sequence[Any]) -> list[Any]:
    return [torch.tensor(x) if is_number(x) else x for x in values]


@DEFINITIONS.register(higher_order.scan)
def scan(
    combine_fn: Callable[..., Any],
    init: Sequence[Tensor],
    xs: Sequence[Tensor],
    additional_inputs: Sequence[Any],
    **graph: Any,
) -> Any:
    carried, collected, spec = list(init), [], None
    for slices in zip(*[x.unbind(0) for x in xs], strict=True):
        leaves, spec = torch_pytree.tree_flatten(combine_fn(*carried, *slices, *additional_inputs))
        new, out = leaves[: len(carried)], leaves[len(carried) :]
        check_alike(STEP, new, carried)
        carried = new
        collected.append(out)
    return like_results([*carried, *stacked(OUTPUT, collected)], spec)


@DEFINITIONS.register(higher_order.map_impl)
def map_impl(f: Callable[..., Any], xs: Sequence[Tensor], pos_args: Sequence[Any], **graph: Any) -> Any:
    collected, spec = [], None
    for slices in zip(*[x.unbind(0) for x in xs], strict=True):
        leaves, spec = torch_pytree.tree_flatten(f(*slices, *pos_args))
        collected.append(leaves)
    return like_results(stacked(EACH, collected), spec)


@DEFINITIONS.register(higher_order.associative_scan)
def associative_scan(combine_fn: Callable[..., Any], xs: Sequence[Tensor], additional_inputs: Sequence[Any]) -> Any:
    """Of a pointwise function, which takes many pairs for one."""
    combined = by_pairs(lambda *pairs: combine_fn(*pairs, *additional_inputs), xs)
    return like_results(combined, kept_by(combine_fn, "spec"))


def for_each_pair(combine_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one pair as one that takes many."""
    return lambda *pairs: mapped(combine_fn, pairs)


def by_pairs(combine: Callable[..., Any], xs: Sequence[Tensor]) -> list[Tensor]:
    """All the running results of an associative function along the first dimension, in steps that are logarithmic in
    its length: neighbours are combined, the results scanned, and combined with the elements between."""
    length = xs[0].shape[0]
    if length < 2:
        return list(xs)

    def along(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
        new = torch_pytree.tree_leaves(combine(*left, *right))
        check_alike(PAIR, new, right)
        return new

    even, odd = [x[::2] for x in xs], [x[1::2] for x in xs]
    odds = by_pairs(combine, along([x[: length // 2] for x in even], odd))
    if length == 2:
        return [torch.cat([x[:1], y]) for x, y in zip(xs, odds, strict=True)]
    evens = along([x[: (length - 1) // 2] for x in odds], [x[1:] for x in even])
    evens = [torch.cat([x[:1], y]) for x, y in zip(xs, evens, strict=True)]
    return [interleaved(x, y) for x, y in zip(evens, odds, strict=True)]


def interleaved(even: Tensor, odd: Tensor) -> Tensor:
    pairs = torch.stack([even[: len(odd)], odd], 1).flatten(0, 1)
    return pairs if len(even) == len(odd) else torch.cat([pairs, even[-1:]])


def stacked(sides: Sides, collected: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of all steps as one; what is no tensor has to be the same in each."""
    for results in collected[1:]:
        check_alike(sides, results, collected[0])
    return [torch.stack(group) if isinstance(group[0], Tensor) else group[0] for group in zip(*collected, strict=True)]


def like_results(leaves: Sequence[Any], spec: Any) -> Any:
    """``leaves`` in the structure of what the function returned for one step; in a graph that is flat."""
    out = tuple(leaves) if spec is None else torch_pytree.tree_unflatten(leaves, spec)
    return tuple(out) if isinstance(out, list) else out


@DEFINITIONS.register(higher_order.flex_attention)
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: Any,
    score_mod_other_buffers: Sequence[Any] = (),
    mask_mod_other_buffers: Sequence[Any] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention, the logarithm to the base 2 of the sum of what it is normalized by, and the greatest score."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).expand(query.shape[0], -1, -1, -1) for x in (key, value))
    precision = torch.float64 if query.dtype is torch.float64 else torch.float32
    scores = query.to(precision) @ key.to(precision).transpose(-2, -1) * scale
    kept = of_each_score(block_mask[-1], [], scores, mask_mod_other_buffers)
    scores = of_each_score(score_mod, [scores], scores, score_mod_other_buffers).to(precision)
    scores = scores.masked_fill(~kept, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    safe = scores.masked_fill(empty, 0)
    weights = safe.softmax(-1).masked_fill(empty, 0)
    statistics = [x.masked_fill(empty, -torch.inf) for x in (safe.logsumexp(-1, True), safe.amax(-1, True))]
    sums, greatest = (x.squeeze(-1) / math.log(2) for x in statistics)
    return weights.to(query.dtype) @ value.to(query.dtype), sums, greatest


def of_each_score(function: Callable[..., Any], xs: Sequence[Tensor], scores: Tensor, buffers: Sequence[Any]) -> Tensor:
    """``function(*xs, batch, head, query, key, *buffers)`` for each score, of the elements of ``xs`` there."""
    return _at_each(function, scores, buffers, (), *xs)


def _at_each(
    function: Callable[..., Any], scores: Tensor, buffers: Sequence[Any], places: tuple[Tensor, ...], *xs: Tensor
) -> Any:
    if len(places) == scores.dim():
        return function(*xs, *places, *buffers)
    positions = torch.arange(scores.shape[len(places)], device=scores.device)
    return mapped(lambda place, *xs: _at_each(function, scores, buffers, (*places, place), *xs), [positions, *xs])
