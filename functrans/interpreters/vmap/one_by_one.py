"""What vmap has neither a rule nor a decomposition for: the operator runs once per example."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functrans.core.tensor import check_layout, strides_of
from functrans.errors import DataDependentError
from functrans.errors.call_sites import frames_to_user
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import OpOverload

if TYPE_CHECKING:
    from functrans.interpreters.vmap.interpreter import VmapInterpreter


def run_one_by_one(interpreter: VmapInterpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` once per example, and stack what it returned; warns once per operator."""
    warn_slow(op)
    with lowered(interpreter):
        outs = [
            op(*example(interpreter, args, i), **{k: example(interpreter, v, i) for k, v in kwargs.items()})
            for i in range(interpreter.batch_size)
        ]
        if not outs:
            raise DataDependentError(
                op, interpreter, "it has no batching rule, and a batch of size 0 has no example to take its shape from"
            )
        return stacked(interpreter, op, outs)


def example(interpreter: VmapInterpreter, a: Any, i: int) -> Any:
    """An argument as example ``i`` has it, one level down."""
    if interpreter.owns(a):
        if a.bdim is None:
            return a.value
        # A copy: some operators look at the storage, which is the example's own.
        one = a.value.select(a.bdim, i).clone()
        # of a sparse matrix PyTorch has forgotten that it is coalesced
        return one.coalesce() if a.layout is torch.sparse_coo and a.value.is_coalesced() else one
    if type(a) in (list, tuple):
        return type(a)(example(interpreter, v, i) for v in a)
    return a


def stacked(interpreter: VmapInterpreter, op: OpOverload, outs: list[Any]) -> Any:
    """The outputs of all examples as one."""
    first = outs[0]
    if isinstance(first, Tensor):
        check_layout(first)
        if any(o.shape != first.shape for o in outs):
            cure = "let its result have one shape for all examples: torch.where(mask, x, 0) in the place of x[mask]"
            raise DataDependentError(op, interpreter, cure)
        strides_of(first)  # refuses layouts that cannot be batched
        return interpreter.batched(torch.stack(outs), 0)
    if isinstance(first, tuple | list):
        groups = [stacked(interpreter, op, list(group)) for group in zip(*outs, strict=True)]
        return groups if type(first) is list else tuple(groups)
    if any(o != first for o in outs):
        raise DataDependentError(op, interpreter, "its result is a Python number that differs between examples")
    return first


WARNED: set[OpOverload] = set()


def warn_slow(op: OpOverload) -> None:
    if op not in WARNED:
        WARNED.add(op)
        warnings.warn(
            f"vmap has no batching rule for {op} and runs it once per example, which is slow. "
            "Register a rule with functrans.batching_rule to speed it up.",
            stacklevel=frames_to_user(),
        )
