"""``torch.autograd.backward``, and ``Tensor.backward`` of wrappers.

``backward`` adds to ``.grad`` of leaves that were made inside, of each example its own: the gradients that
``torch.autograd.grad`` gives inside (door/gradients_inside.py). To captured leaves, which are one for all, it adds as a
loop over the examples of a vmap does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from functrans.boundary.calls import lift
from functrans.boundary.facades import Facade
from functrans.core.dispatch import scan
from functrans.core.interpreter import Interpreter
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.door.at_base import at_base
from functrans.door.autograd_inside import checked, up_to_date
from functrans.door.grad_attribute import add_to_grad, keeping
from functrans.door.gradients_inside import How, gradients, of_batch, recording, values_at
from functrans.door.leaves import base_of, leaves_of, made_inside
from functrans.door.torch_function import ENTRANCES, OF_ANY_TYPES
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import STATE, lowered, running_at
from functrans.pytorch.torch_private import without_torch_function
from functrans.tensors.answers import REFUSED, refuse

original = torch.autograd.backward
by_pytorch = at_base(original)


@functools.wraps(original)
def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """``torch.autograd.backward``, which ``Tensor.backward`` calls."""
    if grad_variables is not None:
        grad_tensors = grad_variables
    outs, given, wanted = (sequence(x) for x in (tensors, grad_tensors, inputs))
    given = given or [None] * len(outs)
    wrappers = [x for x in (*outs, *given, *wanted) if type(x) is WrapperTensor]
    if not wrappers and not any(i.repeats_writes for i in interpreter_stack()):
        return by_pytorch(tensors, grad_tensors, retain_graph, create_graph, None, inputs)
    if any(x.interpreter.carries_autograd for x in wrappers):  # a derivative that is borrowed from PyTorch
        options = (grad_tensors, retain_graph, create_graph, None, inputs)
        return without_torch_function(original, (), (tensors, *options), {})
    if inputs is not None and not wanted:
        raise RuntimeError("`inputs` argument to `backward()` cannot be empty.")
    if len(given) != len(outs):
        raise RuntimeError(f"got {len(outs)} tensors and {len(given)} gradients")
    up_to_date(wrappers)
    top = STATE.top or wrappers[0].interpreter
    outs = [x if type(x) is WrapperTensor else top.constant(x) for x in outs]
    given = checked(outs, given, False)
    leaves = [[x for x in leaves_of(out) if inputs is None or any(base_of(w) is x for w in wanted)] for out in outs]
    targets = made_inside(leaves)
    targets += [x for x in results_wanted(wanted, outs) if not any(x is t for t in targets)]
    captured = [[leaf for leaf in found if not hasattr(leaf, "leaf_inside")] for found in leaves]
    if not targets and not any(captured):
        refuse(outs[0], *REFUSED["backward"])
    found = gradients(outs, targets, given, How(create_graph)) if targets else []
    remaining = sum(map(bool, captured))
    for out, cotangent, places in zip(outs, given, captured, strict=True):
        if places:
            remaining -= 1
            retained = retain_graph or remaining > 0 or None  # the others may need what this one goes through
            to_captured(out, cotangent, places, retain_graph=retained, create_graph=create_graph)
    for x, g in zip(targets, found, strict=True):
        added = not create_graph and any(x is y for y in getattr(x.interpreter, "retaining", ()))  # by the walk
        if g is not None and not added:
            add_to_grad(x, lift(g, scan([g])[0], STATE.top), create_graph)
    for level in (level for out in outs for level in recording(out)):
        level.passed_by = True
        level.detached |= not create_graph


def sequence(x: Any) -> list[Any]:
    """One tensor, several, named or not, or none; wrappers without a class of the user's."""
    if x is None or isinstance(x, Tensor | GradientEdge):
        x = [] if x is None else [x]
    return [t.wrapper if isinstance(t, Facade) else t for t in (x.values() if isinstance(x, dict) else x)]


def backward_method(
    self: WrapperTensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """``Tensor.backward``."""
    backward(self, gradient, retain_graph, create_graph, inputs=inputs)


def results_wanted(wanted: list[Any], outs: list[Any]) -> list[WrapperTensor]:
    """What is no leaf and gets a gradient all the same: what was asked for, and what keeps its own."""
    levels = {id(level): level for x in outs for level in levels_of(x)}.values()
    kept = [x for level in levels for x in keeping(level)]
    asked = [x for x in wanted if type(x) is WrapperTensor and not base_of(x).is_leaf]
    return list({id(x): x for x in (*asked, *kept)}.values())


def levels_of(x: Any) -> Iterator[Interpreter]:
    while type(x) is WrapperTensor:
        yield x.interpreter
        x = x.value


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
        mark = getattr(leaf, "made_inside", None)
        made_in = mark.level() if mark else None
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


torch.autograd.backward = backward
ENTRANCES[original] = backward
OF_ANY_TYPES.add(original)
WrapperTensor.backward = backward_method  # type: ignore[assignment, method-assign]
