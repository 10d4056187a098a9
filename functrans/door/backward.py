"""``Tensor.backward`` and ``Tensor.grad`` of wrappers.

``backward`` adds to ``.grad`` of leaves that were made inside, of each example its own: the gradients that
``torch.autograd.grad`` gives inside (door/gradients_inside.py). To captured leaves, which are one for all, it adds as a
loop over the examples of a vmap does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.factories import ones_for
from functrans.core.dispatch import lift, scan
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.door.gradients_inside import How, gradients, of_batch, recording, values_at
from functrans.door.leaves import base_of, can_be_leaf
from functrans.interpreters.grad.again import CURE
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import STATE, lowered, running_at
from functrans.tensors.answers import REFUSED, Refusing, refuse


def grad_of(self: WrapperTensor) -> Tensor | None:
    """``Tensor.grad``: of a leaf made inside, of a captured leaf, or what ``retain_grad`` asked for."""
    kept = self.__dict__.get("cotangent")
    if kept is not None or self.leaf is not None:
        return kept
    x: Any = self
    while type(x) is WrapperTensor:
        if x.interpreter.records(x) and getattr(x.interpreter, "passed_by", False):
            refuse(self, "Tensor.grad of what a transform records, after backward(),", "torch.autograd.grad(loss, x)")
        x = x.value
    if not can_be_leaf(self) or not x.is_leaf:
        return None
    with running_at(None):
        found = x.grad
    return None if found is None else like(self, found)


def like(x: Any, value: Tensor) -> Tensor:
    """``value`` as examples, as ``x`` is of its base."""
    return x.interpreter.rewrap(x, like(x.value, value)) if type(x) is WrapperTensor else value


def backward(
    self: WrapperTensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """``Tensor.backward``."""
    wanted = None if inputs is None else [inputs] if isinstance(inputs, Tensor) else list(inputs)
    made: list[WrapperTensor] = []
    captured: list[Tensor] = []
    for leaf in leaves_of(self):
        if wanted is not None and not any(base_of(x) is leaf for x in wanted):
            continue
        if not hasattr(leaf, "leaf_inside"):
            captured.append(leaf)
        elif (wrapper := leaf.leaf_inside()) is not None:
            if base_of(wrapper) is not leaf:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    "a leaf was written between what is differentiated and backward()"
                )
            made.append(wrapper)
    if not made and not captured:
        refuse(self, *REFUSED["backward"])
    if gradient is None:
        if self.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        gradient = ones_for(self, *self.shape)
    found = gradients([self], made, [gradient], How(create_graph)) if made else []
    if captured:
        to_captured(self, gradient, captured, retain_graph=retain_graph, create_graph=create_graph)
    for x, g in zip(made, found, strict=True):
        if g is not None:
            add_to_grad(x, lift(g, scan([g])[0], STATE.top), create_graph)
    for level in recording(self):
        level.passed_by = True
        level.detached |= not create_graph


def leaves_of(x: Any) -> list[Tensor]:
    """The leaves of PyTorch's own graph on which ``x`` depends, or one of its tangents."""
    found: dict[int, Tensor] = {}
    nodes: list[Any] = []
    for value in parts_of(x):
        if value.requires_grad and value.is_leaf:
            found[id(value)] = value
        nodes.append(value.grad_fn)
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes.extend(before for before, _ in node.next_functions)
    return list(found.values())


def parts_of(x: Any) -> Iterator[Tensor]:
    """The plain tensors that ``x`` is made of: its value at the base, and those of its tangents."""
    if type(x) is not WrapperTensor:
        yield x
        return
    yield from parts_of(x.value)
    if isinstance(x.interpreter, JvpInterpreter) and x.tangent is not None:
        yield from parts_of(x.tangent)


def add_to_grad(x: WrapperTensor, g: Any, create_graph: bool) -> None:
    """``x.grad += g`` at the level of ``x``, where ``g`` is of the level that runs."""
    while type(g) is WrapperTensor and g.interpreter.level > x.interpreter.level:
        if not g.interpreter.is_constant(g):
            refuse(g, "Tensor.backward() to a leaf that was made outside of it", CURE)
        g = g.value
    kept = x.__dict__.get("cotangent")
    with running_at(x.interpreter), torch.set_grad_enabled(create_graph):
        if type(kept) is WrapperTensor and not create_graph:
            kept.add_(g)  # in place, as PyTorch does: the program may hold it
        else:
            x.cotangent = g if kept is None else kept + g


def to_captured(self: WrapperTensor, gradient: Any, leaves: list[Tensor], **options: Any) -> None:
    """``backward`` to leaves from outside, each of which is one tensor for all examples."""
    levels, moves = [], False
    x: Any = self
    while type(x) is WrapperTensor:
        if isinstance(x.interpreter, VmapInterpreter) and x.bdim is not None:
            levels.append(x.interpreter)
        moves |= isinstance(x.interpreter, JvpInterpreter) and x.tangent is not None
        x = x.value
    once = all(i in levels or getattr(i, "batch_size", None) == 1 for i in interpreter_stack() if i.repeats_writes)
    if not once or moves or not x.requires_grad:  # a loop would add more often, or .grad would lose a tangent
        refuse(self, *REFUSED["backward"])
    for leaf in leaves:
        made_in = leaf.made_inside.level() if hasattr(leaf, "made_inside") else None
        if made_in is not None and made_in.alive and any(i.level <= made_in.level for i in levels):
            what = "Tensor.backward() to a leaf that shares the memory of a captured tensor"
            refuse(self, what, "a clone() of that, which each example has for itself")
    x = self
    while type(x) is WrapperTensor:
        level: Any = x.interpreter
        with lowered(level):
            gradient = of_batch(level, gradient, x) if level in levels else values_at(level, [gradient])[0]
        x = x.value
    with running_at(None):
        x.backward(gradient, inputs=leaves, **options)


WrapperTensor.backward = backward  # type: ignore[assignment, method-assign]
WrapperTensor.grad = property(grad_of, Refusing.grad.fset)  # type: ignore[assignment, attr-defined]
