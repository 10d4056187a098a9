"""A gradient inside of ``grad``, by ``torch.autograd.grad(..., create_graph=True)``: the level differentiates it again.

NOTE [Gradients of gradients on one tape]
What a record saved are values one level down, since that is where pulling back runs. A gradient that the level has to
follow is pulled at the level itself instead, with what was saved as it was: tracked, where it was an argument or a
result with a tape index. The operators of the formulas are then recorded behind those that they come from.

That is for gradients by what the level tracks. By others, tensors further down that a graph of PyTorch's own follows
(positions, in a gradient for parameters), the gradient ``g`` of ``y`` is computed there, and is a record of its own:
its cotangent ``c`` reaches the level's inputs ``t`` as ``d(g c)/dt = d(dy/dt)/dp c``. The cotangents ``dy/dt`` are what
the tape gives for ``y``, with a graph to ``p``; their derivative along ``c`` is the transpose of the transpose of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from functrans.core.tensor import tensor_of, wrap
from functrans.errors import InsideTransformError
from functrans.interpreters.grad.interpreter import GradInterpreter, total
from functrans.interpreters.grad.nodes import BackwardNode, CheckedNode, ProgramNode, TableNode
from functrans.pytorch.thread_state import lowered, running_at
from functrans.pytorch.torch_private import autocast_off
from functrans.tensors.pytrees import tensors_in

#: From outputs, inputs and cotangents: the gradients for the inputs, one level down.
Gradients = Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor | None]]
CURE = "functrans.grad or functrans.vjp"


def tracked_again(level: GradInterpreter, value: Any, index: Any) -> Any:
    """A value that was saved, or a list of them, as it was at the level."""
    if type(index) in (list, tuple):
        return [tracked_again(level, v, i) for v, i in zip(value, index, strict=True)]
    value = tensor_of(value)
    if index is None or not isinstance(value, Tensor):
        return value
    wrapper = wrap(level, value)
    wrapper.tape_index = index
    return wrapper


def saved_again(level: GradInterpreter, node: Any, outs: Any, ins: Any, saved: Any) -> list[Any]:
    """What a record saved, as it was at the level."""
    table = node.node if type(node) is CheckedNode else node
    if type(table) is TableNode:
        again = list(saved)
        places = dict(zip(table.names, ins, strict=True))
        if table.saves_result:
            places["result"] = outs
        for name, index in places.items():
            if name in table.place:
                again[table.place[name]] = tracked_again(level, saved[table.place[name]], index)
        return again
    if type(node) is ProgramNode:
        indices = dict(zip((-1 - p for p in node.places), ins, strict=True))
        indices.update(enumerate(outs if isinstance(outs, list) else [outs]))
        complete = all(source < len(indices) - len(ins) for source in node.saves)
        if complete or record_rest(level, node, indices, ins, saved):
            sources = [*node.saves, *[0] * (len(saved) - len(node.saves))]  # the rest: no tensors
            return [tracked_again(level, v, indices.get(i)) for v, i in zip(saved, sources, strict=True)]
    what = f"torch.autograd.grad with create_graph=True through {node.operator(saved)}"
    raise InsideTransformError(what, level.name, CURE)


def record_rest(
    level: GradInterpreter, node: ProgramNode, indices: dict[int, Any], ins: list[int], saved: list[Any]
) -> bool:
    """Give what a program computed on the way, and saved, an index of its own, by a record; whether that was possible.

    ``indices``: those of its inputs (-1, -2, ...) and outputs, to which the new ones are added.
    """
    whole = ProgramNode(node.forward, node.places)
    known = dict(zip(node.saves, saved, strict=False))
    if any(source not in known for source in whole.saves):
        return False
    first = len([i for i in indices if i >= 0])
    made: list[int | None] = [None] * len(node.forward.outputs)
    for source in node.saves:
        if source >= first:
            level.last_index += 1
            made[source] = indices[source] = level.last_index
    level.record(whole, made, ins, [*(known[i] for i in whole.saves), *saved[len(node.saves) :]])
    return True


def behind(level: GradInterpreter, indices: set[Any]) -> list[Any]:
    """The records that compute something of ``indices``: no other is needed on the way back to them."""
    reached, records = set(indices), []
    for record in level.tape:
        _, outs, ins, _ = record
        if not reached.isdisjoint(each_index(ins)):
            reached.update(each_index(outs))
            records.append(record)
    return records


def each_index(indices: Any) -> Iterator[Any]:
    """The tape indices of a record's inputs, or outputs, lists among them."""
    for index in indices if type(indices) in (list, tuple) else (indices,):
        if type(index) in (list, tuple):
            yield from index
        elif index is not None:
            yield index


def pull_again(level: GradInterpreter, cotangents: dict[int, Tensor], wanted: list[Any]) -> list[Tensor | None]:
    """The cotangents of ``wanted``, tracked; ``cotangents``: of outputs, by index."""
    if level.hooks:
        raise InsideTransformError("torch.autograd.grad with create_graph=True of what has hooks", level.name, CURE)
    indices = {x.tape_index for x in wanted}
    found: dict[int, Any] = {}
    with running_at(level), torch.enable_grad(), autocast_off():
        for node, outs, ins, saved in reversed(behind(level, indices)):
            made = outs if isinstance(outs, list) else [outs]
            if not any(o in cotangents for o in made):
                continue
            found.update((o, cotangents[o]) for o in made if o in cotangents and o in indices)
            grads = [None if o is None else cotangents.pop(o, None) for o in made]
            if type(node) is not ProgramNode:
                grads = [tensor_of(g) for g in grads]
            again = saved_again(level, node, outs, ins, saved)
            pulled = node.pull(again, grads if isinstance(outs, list) else grads[0])
            for index, cotangent in zip(ins, pulled, strict=True):
                pairs = [(index, cotangent)] if type(index) is int else zip(index, cotangent or (), strict=False)
                for i, c in pairs:
                    if i is not None and c is not None:
                        cotangents[i] = total(cotangents[i], c) if i in cotangents else c
        found.update(cotangents)
        return [tensor_of(found.get(x.tape_index)) for x in wanted]


def pull_to(level: GradInterpreter, cotangents: dict[int, Tensor], wanted: list[Any]) -> list[Tensor | None]:
    """The cotangents of ``wanted``, one level down, where this runs; ``cotangents``: of outputs, by index."""
    before = level.hooks
    found: dict[int, Tensor] = {}
    level.hooks = {i: OrderedDict(hooks) for i, hooks in (before or {}).items()}
    try:
        for index in {x.tape_index for x in wanted}:  # after the hooks of the user's, which may replace it
            level.hooks.setdefault(index, OrderedDict())[-1] = partial(found.__setitem__, index)
        level.pull(dict(cotangents), consume=False)
    finally:
        level.hooks = before
    return [found.get(x.tape_index) for x in wanted]


class GradientNode(BackwardNode):
    """The gradient of a level's outputs by tensors further down; see NOTE [Gradients of gradients on one tape]."""

    op = "torch.autograd.grad"

    def __init__(self, level: GradInterpreter, gradients: Gradients, inputs: list[Tensor], outputs: list[Any]) -> None:
        self.level, self.end = ref(level), len(level.tape)
        self.gradients, self.inputs, self.outputs = gradients, inputs, outputs

    def pull(self, saved: list[Any], grad: list[Any]) -> list[Any]:
        """``saved``: the outputs' cotangents, the level's inputs, and of cotangents with an index the outputs."""
        level = self.level()
        assert level is not None  # whose tape this is pulled on
        cotangents, roots, values = saved
        inputs, along = zip(*((p, c) for p, c in zip(self.inputs, grad, strict=True) if c is not None), strict=True)
        with torch.enable_grad():
            by_index: dict[int, Any] = {}
            for index, c in zip(self.outputs, cotangents, strict=True):
                if index is not None:
                    by_index[index] = total(by_index[index], c) if index in by_index else c
            first = level.pull(by_index, consume=False, end=self.end)
            moving = [i for i in roots if i in first]
            found = self.directional([*(first[i] for i in moving), *values], list(inputs), list(along))
        by_root = dict(zip(moving, found, strict=False))
        return [*(by_root.get(i) for i in roots), *found[len(moving) :]]

    def directional(self, values: list[Tensor], inputs: list[Tensor], along: list[Tensor]) -> list[Tensor | None]:
        """The derivatives of ``values``, which have a graph to ``inputs``: the transpose of a transpose."""
        dummies = [v.detach().clone().requires_grad_() for v in values]
        pulled = self.gradients(values, inputs, dummies)
        reached = [(p, c) for p, c in zip(pulled, along, strict=True) if p is not None]
        return self.gradients([p for p, _ in reached], dummies, [c for _, c in reached])

    def saved_tensors(self, saved: list[Any]) -> list[Tensor]:
        return tensors_in([saved[0], saved[2]])

    def protect(self, saved: list[Any], target: Tensor) -> list[Any]:
        return [super().protect(saved[0], target), saved[1], saved[2]]


def record_gradients(
    level: GradInterpreter, gradients: Gradients, outs: list[Any], inputs: list[Tensor], cotangents: list[Any]
) -> list[Tensor | None]:
    """The gradients of ``outs`` for ``inputs``, which are not tracked: a record of the tape."""
    values, below = [level.value_of(x) for x in outs], [level.value_of(c) for c in cotangents]
    node = GradientNode(level, gradients, inputs, [level.index_of(x) for x in outs])
    made = {o for _, indices, _, _ in level.tape for o in (indices if isinstance(indices, list) else [indices])}
    roots = [i for i in range(1, level.last_index + 1) if i not in made]
    moving = [(v, c.tape_index) for v, c in zip(values, cotangents, strict=True) if level.index_of(c) is not None]
    with lowered(level), torch.enable_grad():
        found = gradients(values, inputs, below)
    results = [None if g is None else level.track(g) for g in found]
    indices = [None if g is None else g.tape_index for g in results]
    level.record(node, indices, [*roots, *(i for _, i in moving)], [below, roots, [v for v, _ in moving]])
    return results  # type: ignore[return-value]
