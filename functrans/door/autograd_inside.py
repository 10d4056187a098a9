"""``torch.autograd.grad`` inside of transforms: the call, and what is wrong with it. See NOTE [Gradients inside]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import lift
from functrans.boundary.factories import ones_for
from functrans.core.dispatch import scan
from functrans.core.tensor import WrapperTensor
from functrans.door.gradients_inside import How, gradients
from functrans.door.leaves import leaves_of, made_inside
from functrans.door.torch_function import ENTRANCES, OF_ANY_TYPES
from functrans.errors import InsideTransformError
from functrans.interpreters.grad.again import CURE
from functrans.pytorch.thread_state import STATE, running_at
from functrans.pytorch.torch_private import without_torch_function
from functrans.tensors.answers import concrete, refuse


def up_to_date(xs: Iterable[Any]) -> None:
    """Bring views among ``xs`` up to date with writes, as an operator does with its arguments."""
    for x in xs:
        if type(x) is WrapperTensor and x.view_link is not None:
            x.view_link.refresh(x)


def plain_if_constant(x: Any) -> Any:
    value = concrete(x) if type(x) is WrapperTensor else None
    return x if value is None else value


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """``torch.autograd.grad`` with a wrapper among its arguments."""
    options: dict[str, Any] = {
        "retain_graph": retain_graph,
        "create_graph": create_graph,
        "allow_unused": allow_unused,
        "is_grads_batched": is_grads_batched,
        "materialize_grads": materialize_grads,
    }
    if isinstance(inputs, dict):
        found = grad(outputs, tuple(inputs.values()), grad_outputs, **options)
        return dict(zip(inputs, found, strict=True))
    outs, ins = (list(x) if isinstance(x, list | tuple) else [x] for x in (outputs, inputs))
    if any(type(x) is WrapperTensor and x.interpreter.carries_autograd for x in (*outs, *ins)):
        # a derivative that is borrowed from PyTorch
        return without_torch_function(torch.autograd.grad, (), (outputs, inputs, grad_outputs), options)
    given = list(grad_outputs) if isinstance(grad_outputs, list | tuple) else [grad_outputs] * len(outs)
    up_to_date((*outs, *ins, *given))
    plain_outs, plain_ins, plain_given = ([plain_if_constant(x) for x in xs] for xs in (outs, ins, given))
    top = STATE.top
    below = not any(type(x) is WrapperTensor for x in (*plain_outs, *plain_ins))
    wrapped = any(type(x) is WrapperTensor for x in plain_given)
    below = below and not (wrapped and is_grads_batched)
    if below and (top is None or any(not isinstance(x, Tensor) or x.requires_grad for x in plain_outs)):
        cotangents = None if grad_outputs is None else plain_given
        if wrapped:
            # of the transforms, into which the formulas that the engine calls go, too
            return without_torch_function(torch.autograd.grad, (), (plain_outs, plain_ins, cotangents), options)
        refuse_written(outs, ins)
        with running_at(None):
            found = torch.autograd.grad(plain_outs, plain_ins, cotangents, **options)
        return tuple(g if g is None else lift(g, None, top) for g in found)
    if top is None:  # of a transform that has ended
        ended = next(x for x in (*plain_outs, *plain_ins, *plain_given) if type(x) is WrapperTensor)
        refuse(ended, "torch.autograd.grad", CURE)
    given = checked(outs, given, is_grads_batched)
    refuse_written(outs, ins)
    results = gradients(outs, ins, given, How(create_graph, is_grads_batched))
    if all(g is None for g in results) and not materialize_grads:
        raise InsideTransformError("torch.autograd.grad of what has not been recorded", top.name, CURE)
    if materialize_grads:
        rows = given[0].shape[:1] if is_grads_batched else ()
        zeros = lambda x: x.new_zeros(*rows, *x.shape)
        results = [zeros(x) if g is None else g for x, g in zip(ins, results, strict=True)]
    elif not allow_unused and any(g is None for g in results):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. "
            "Set allow_unused=True if this is the desired behavior."
        )
    return tuple(g if g is None else lift(g, scan([g])[0], top) for g in results)


def refuse_written(outs: list[Any], ins: list[Any]) -> None:
    """Refuse a leaf among ``ins`` that was made inside, is one of ``outs``' and was written since."""
    written = [x for x in ins if type(x) is WrapperTensor and x.leaf is not None and x.version]
    if written:
        reached = [leaf for out in outs for leaf in leaves_of(out) if hasattr(leaf, "leaf_inside")]
        made_inside([[leaf for leaf in reached if any(leaf.leaf_inside() is x for x in written)]])


def checked(outs: list[Any], cotangents: list[Any], rows: bool) -> list[Any]:
    """The cotangents, with a 1 for that of a number that is not given."""
    sizes: set[tuple[int, ...]] = {c.shape[:1] for c in cotangents if c is not None} if rows else {()}
    if len(sizes) != 1 or (rows and any(c is None or c.dim() == 0 for c in cotangents)):
        shapes = [None if c is None else tuple(c.shape) for c in cotangents]
        raise RuntimeError(f"is_grads_batched=True with cotangents of shapes {shapes}: expected one batch of each")
    (size,) = sizes
    for out, c in zip(outs, cotangents, strict=True):
        if c is None and out.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        if c is not None and c.shape != (*size, *out.shape):
            got = f"a cotangent of shape {tuple(c.shape)}" + (f", a batch of {size[0]}," if rows else "")
            raise RuntimeError(f"{got} for an output of shape {tuple(out.shape)}")
    return [ones_for(out, *out.shape) if c is None else c for out, c in zip(outs, cotangents, strict=True)]


ENTRANCES[torch.autograd.grad] = grad
OF_ANY_TYPES.add(torch.autograd.grad)
