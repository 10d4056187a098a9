"""Arguments and outputs of the transforms: checked, wrapped on the way in, unwrapped on the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.errors import Call, CallError, CallValueError
from functrans.interpreters.grad.recording import DIFFERENTIABLE
from functrans.mutation import invalidate_saved
from functrans.pytrees import tree_flatten, tree_unflatten
from functrans.stack import Interpreter
from functrans.tensor import WrapperTensor

Argnums = int | tuple[int, ...]


class Inputs:
    """A call's arguments as wrappers of ``interpreter``.

    Every tensor is wrapped, so that it can be written inside; those that ``argnums`` names are tracked (or given a tangent).
    """

    def __init__(
        self,
        interpreter: Interpreter,
        call: Call | str,
        argnums: Argnums,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        enter: Callable[[Tensor], WrapperTensor] | None = None,
    ) -> None:
        self.interpreter = interpreter
        self.call = call
        self.wrapped: list[tuple[WrapperTensor, Tensor]] = []
        self.single = isinstance(argnums, int)
        positions = check_argnums(call, argnums, len(args))
        track = enter if enter is not None else interpreter.track  # type: ignore[attr-defined]
        self.tracked: dict[int, tuple[list[Any], list[Any], Any]] = {}
        self.order = positions
        entered = list(args)
        for i in positions:
            leaves, spec = tree_flatten(args[i])
            wrappers = [self._enter(leaf, track) for leaf in leaves]
            self.tracked[i] = (leaves, wrappers, spec)
            entered[i] = tree_unflatten(spec, wrappers)
        for i, a in enumerate(args):
            if i not in self.tracked:
                entered[i] = self._constants(a)
        self.args = tuple(entered)
        self.kwargs = {k: self._constants(v) for k, v in kwargs.items()}
        self.leaf_slots = {i: [getattr(w, "slot", None) for w in ws] for i, (_, ws, _) in self.tracked.items()}

    def _enter(self, leaf: Any, track: Callable[[Tensor], WrapperTensor]) -> Any:
        if not isinstance(leaf, Tensor):
            raise CallValueError(
                self.call, f"an argument of type {type(leaf).__name__} to differentiate for", "tensors", "Name only tensor arguments in argnums."
            )
        if self.interpreter.kind == "grad" and leaf.dtype not in DIFFERENTIABLE:
            raise CallError(
                self.call, f"an argument of dtype {leaf.dtype} to differentiate for", "a floating-point or complex dtype", "Convert it, e.g. with .float()."
            )
        wrapper = track(leaf)
        self.wrapped.append((wrapper, leaf))
        return wrapper

    def _constants(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._constant(tree)
        if tree is None or isinstance(tree, int | float | str | bool):
            return tree
        leaves, spec = tree_flatten(tree)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return tree
        return tree_unflatten(spec, [self._constant(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    def _constant(self, leaf: Tensor) -> WrapperTensor:
        wrapper = self.interpreter.constant(leaf)
        self.wrapped.append((wrapper, leaf))
        return wrapper

    def collect(self, cotangents: dict[int, Tensor]) -> Any:
        """The cotangents of the tracked arguments, zeros where none arrived, in the arguments' structure."""
        found = []
        for i in self.order:
            leaves, _, spec = self.tracked[i]
            grads = [None if slot is None else cotangents.get(slot) for slot in self.leaf_slots[i]]
            found.append(tree_unflatten(spec, [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]))
        return found[0] if self.single else tuple(found)

    def write_back(self) -> None:
        """Write the arguments that were written inside for the caller, as a call without the transform would have."""
        for wrapper, origin in self.wrapped:
            if wrapper.version:
                contents = wrapper if wrapper.root is None or wrapper.root.content is None else wrapper.root.content
                self.interpreter.before_write(origin)
                invalidate_saved(origin)
                origin.copy_(contents.value)


def check_argnums(call: Call | str, argnums: Any, count: int) -> tuple[int, ...]:
    """``argnums`` as non-negative positions."""
    if isinstance(argnums, int):
        numbers: tuple[Any, ...] = (argnums,)
    elif isinstance(argnums, tuple):
        numbers = argnums
    else:
        raise CallError(call, f"argnums of type {type(argnums).__name__}", "an int or a tuple of ints")
    if not numbers:
        raise CallError(call, "argnums=()", "at least one position")
    for n in numbers:
        if not isinstance(n, int):
            raise CallError(call, f"argnums with an element of type {type(n).__name__}", "an int or a tuple of ints")
        if not -count <= n < count:
            raise CallError(call, f"argnum {n} for {count} positional argument(s)", f"-{count} <= argnum < {count}", "Keyword arguments are not differentiated for.")
    positions = tuple(n % count for n in numbers)
    if len(set(positions)) != len(positions):
        raise CallError(call, f"argnums={argnums}", "distinct positions")
    return positions


def pick(call: Call | str, args: tuple[Any, ...], argnums: Argnums) -> Any:
    positions = check_argnums(call, argnums, len(args))
    return args[positions[0]] if isinstance(argnums, int) else tuple(args[i] for i in positions)


def split_aux(call: Call | str, out: Any) -> tuple[Any, Any]:
    if not (isinstance(out, tuple) and len(out) == 2):
        raise CallError(call, f"an output of type {type(out).__name__}", "a tuple (output, aux), as has_aux=True")
    return out


def check_outputs(call: Call | str, leaves: list[Any]) -> None:
    if not leaves:
        raise CallError(call, "a function without outputs", "at least one tensor")
    if not all(isinstance(o, Tensor) for o in leaves):
        raise CallError(call, f"outputs {kinds(leaves)}", "only tensors", "Return other values as aux, with has_aux=True.")


def kinds(leaves: list[Any]) -> str:
    return "of types (" + ", ".join(type(x).__name__ for x in leaves) + ")"


def unwrap(interpreter: Interpreter, x: Any) -> Any:
    """The value one level down of ``x`` if it belongs to ``interpreter``, else ``x``."""
    if type(x) is WrapperTensor:
        if x.view_link is not None and x.interpreter.alive:
            x.view_link.refresh(x)
        if x.interpreter is interpreter:
            return x.value
    return x


def slot_of(interpreter: Interpreter, x: Any) -> int | None:
    return x.slot if type(x) is WrapperTensor and x.interpreter is interpreter else None
