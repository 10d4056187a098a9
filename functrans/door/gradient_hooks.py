"""``torch.autograd.graph.register_multi_grad_hook`` on tensors of levels, and what is made of it: trackers of modules.

PyTorch's own counts by the run of its engine that calls a hook. The hooks of a level are called by the walk back along
its tape, of which no engine knows: here they count by that. A ``ModuleTracker`` (which FlopCounterMode has) asks the
engine to tell it when the walk is over, and is told by the level.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import graph

from functrans.core.tensor import WrapperTensor
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.pytorch.modules import ENGINE_CALLBACK, MultiHandle, graph_task, trackers

_original = graph.register_multi_grad_hook


class _Walking(threading.local):
    #: the level whose walk back has called the hook that runs
    interpreter: GradInterpreter | None = None


WALKING = _Walking()


def recording(x: Any) -> GradInterpreter | None:
    """The innermost level of grad that records ``x``; None if that is PyTorch's autograd."""
    while type(x) is WrapperTensor:
        if isinstance(x.interpreter, GradInterpreter) and x.interpreter.records(x):
            return x.interpreter
        x = x.value
    return None


class MultiHook:
    """A hook that waits for the gradients of several tensors, or for the first of them."""

    def __init__(self, hook: Callable[[Any], Any], count: int, mode: str, interpreter: GradInterpreter | None) -> None:
        self.hook = hook
        self.mode = mode
        self.interpreter = interpreter
        self.grads: list[Tensor | None] = [None] * count
        self.arrived = 0

    def arrive(self, place: int, grad: Tensor) -> None:
        self.grads[place] = grad
        self.arrived += 1
        if self.mode == "any" and self.arrived == 1:
            self.call(grad)
        if self.arrived == len(self.grads):
            self.end()

    def end(self) -> None:
        """All have arrived that will."""
        grads, arrived = self.grads, self.arrived
        self.grads, self.arrived = [None] * len(grads), 0
        if arrived and self.mode == "all":
            self.call(grads)

    def call(self, given: Any) -> None:
        before, WALKING.interpreter = WALKING.interpreter, self.interpreter
        try:
            self.hook(given)
        finally:
            WALKING.interpreter = before


@functools.wraps(_original)
def register_multi_grad_hook(tensors: Sequence[Tensor], fn: Callable[[Any], Any], *, mode: str = "all") -> Any:
    if mode not in ("all", "any") or not any(type(x) is WrapperTensor for x in tensors):
        return _original(tensors, fn, mode=mode)  # type: ignore[arg-type]
    for tracker in trackers():
        told_by_levels(tracker)
    followed = [x for x in tensors if x.requires_grad or mode == "all"]
    interpreter = next((i for i in map(recording, followed) if i is not None), None)
    hook = MultiHook(fn, len(followed), mode, interpreter)
    if interpreter is not None:
        interpreter.at_end(hook.end)
    return MultiHandle(tuple(x.register_hook(functools.partial(hook.arrive, i)) for i, x in enumerate(followed)))


for _module in [m for name, m in sys.modules.items() if name.startswith("torch.")]:
    if vars(_module).get("register_multi_grad_hook") is _original:
        _module.register_multi_grad_hook = register_multi_grad_hook  # type: ignore[attr-defined]


def told_by_levels(tracker: type[Any]) -> None:
    """Have a class of trackers be told by the level when a walk back is over."""
    original: Any = getattr(tracker, ENGINE_CALLBACK)
    if getattr(original, "by_levels", False):
        return

    @functools.wraps(original)
    def set_callback(self: Any) -> None:
        interpreter = WALKING.interpreter
        if graph_task() != -1:
            original(self)
        elif interpreter is not None:
            interpreter.at_end(lambda: setattr(self, "parents", {"Global"}), once=True)

    set_callback.by_levels = True  # type: ignore[attr-defined]
    setattr(tracker, ENGINE_CALLBACK, set_callback)
