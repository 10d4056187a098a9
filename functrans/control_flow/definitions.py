"""The operators that take functions, as plain torch code; see NOTE [Control flow].

What PyTorch puts in front of them (``torch.cond``, ``scan``, ...) flattens trees and checks arguments, and takes back
what the function's results are the structure of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.control_flow.choices import Split, check_alike, decide
from functrans.control_flow.table import DEFINITIONS
from functrans.core.errors import CallTypeError
from functrans.core.errors.wording import shown
from functrans.core.torch_private import math_attention, pairwise_scan, structure_kept, torch_pytree

higher_order = torch.ops.higher_order


@DEFINITIONS.register(higher_order.cond)
def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any]) -> Any:
    choice = decide("cond", pred)
    if not isinstance(choice, Split):
        return (true_fn if choice else false_fn)(*operands)
    yes, no = choice.run(true_fn, operands), choice.run(false_fn, operands, taken=False)
    return choice.choose("cond", true_fn, yes, no)


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
            raise CallTypeError("torch.ops.higher_order.while_loop", f"{shown(go)} from cond_fn", expected)
        if running is not None:
            go = running & go
        choice = decide("while_loop", go)
        if choice is False:
            break
        if isinstance(choice, Split):
            running = go
            # a number will be another for each example
            carried = [torch.tensor(x) if isinstance(x, bool | int | float) else x for x in carried]
            out = torch_pytree.tree_leaves(choice.run(body_fn, (*carried, *additional_inputs)))
            out = [torch.tensor(x) if isinstance(x, bool | int | float) else x for x in out]
            carried = choice.choose("while_loop", body_fn, out, carried)
        else:
            out = torch_pytree.tree_leaves(body_fn(*carried, *additional_inputs))
            check_carried("while_loop", body_fn, out, carried)
            carried = out
    leaves = [x.clone() if isinstance(x, Tensor) else x for x in carried]  # PyTorch's are no aliases of what went in
    spec = structure_kept(cond_fn, "in_spec")  # of what is carried, and of nothing
    return tuple(leaves) if spec is None else torch_pytree.tree_unflatten(leaves, spec)[0]


def check_carried(op: str, function: Callable[..., Any], new: Sequence[Any], old: Sequence[Any]) -> None:
    """What is carried on has to be like what was carried so far; a number may be another."""
    numbers = [not isinstance(a, Tensor) and not isinstance(b, Tensor) for a, b in zip(new, old)]
    like = [a if number else b for a, b, number in zip(new, old, numbers)]
    check_alike(op, function, new, like, len(new) == len(old))


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
        check_alike("scan", combine_fn, new, carried, same=True)
        carried = new
        collected.append(out)
    return like_results([*carried, *stacked(collected)], spec)


@DEFINITIONS.register(higher_order.map_impl)
def map_impl(f: Callable[..., Any], xs: Sequence[Tensor], pos_args: Sequence[Any], **graph: Any) -> Any:
    collected, spec = [], None
    for slices in zip(*[x.unbind(0) for x in xs], strict=True):
        leaves, spec = torch_pytree.tree_flatten(f(*slices, *pos_args))
        collected.append(leaves)
    return like_results(stacked(collected), spec)


@DEFINITIONS.register(higher_order.associative_scan)
def associative_scan(combine_fn: Callable[..., Any], xs: Sequence[Tensor], additional_inputs: Sequence[Any]) -> Any:
    """Of pointwise functions, which take the whole dimension for one element."""
    spec = structure_kept(combine_fn, "spec")

    def combine(*args: Any) -> list[Tensor]:
        return torch_pytree.tree_leaves(combine_fn(*args))

    return like_results(pairwise_scan(combine, list(xs), additional_inputs=tuple(additional_inputs)), spec)


def stacked(collected: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of all steps as one; what is no tensor has to be the same in each."""
    return [torch.stack(group) if isinstance(group[0], Tensor) else group[0] for group in zip(*collected, strict=True)]


def like_results(leaves: Sequence[Any], spec: Any) -> Any:
    """``leaves`` in the structure of what the function returned for one step; in a graph that is flat."""
    out = tuple(leaves) if spec is None else torch_pytree.tree_unflatten(leaves, spec)
    return tuple(out) if isinstance(out, list) else out


@DEFINITIONS.register(higher_order.flex_attention)
def flex_attention(*args: Any, **kwargs: Any) -> Any:
    return math_attention(*args, **kwargs)
