"""A function of one element applied to all, where an operator is defined so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrans.core.dispatch import scan
from functrans.core.stack import run_transformed
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.interpreters.vmap.table import materialize
from functrans.pytorch.torch_private import torch_pytree


def mapped(function: Callable[..., Any], xs: Sequence[Tensor]) -> Any:
    """``function`` of the elements along the first dimension of all ``xs``; the tensors of its results along it."""
    interpreter = VmapInterpreter(xs[0].shape[0], "error", function)

    def leave(out: Any) -> Any:
        """One level down: the physical tensor, and where its batch is."""
        if not interpreter.owns(out):
            return out, None
        scan((out,))
        return out.value, out.bdim

    def body() -> Any:
        leaves, spec = torch_pytree.tree_flatten(function(*[interpreter.batched(x, 0) for x in xs]))
        return [leave(x) for x in leaves], spec

    left, spec = run_transformed(interpreter, body)
    leaves = [materialize(x, bdim, len(xs[0])) if isinstance(x, Tensor) else x for x, bdim in left]
    return torch_pytree.tree_unflatten(leaves, spec)
