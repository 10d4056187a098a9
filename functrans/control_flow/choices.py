"""Truth values that choose a branch: one for all, or one for each example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.core.dispatch import scan
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.errors import CallError, CallTypeError, MissingRuleError, UndecidedError
from functrans.interpreters.branch import BranchInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.control_flow import TRACING_MODES, FakeTensor
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import mode_of_kind, torch_pytree
from functrans.tensors.described import shown


class Sides(NamedTuple):
    """What is compared, for messages: the function called, where the one comes from, what the other is."""

    call: str
    given: str
    expected: str


class Split:
    """A truth value that differs between examples, or that nobody can read since what happens is traced.

    Args:
        mask: the truth value, at the level where it chooses.
        known: whether it can be read.
    """

    def __init__(self, mask: Tensor, base: Tensor, owners: Sequence[Interpreter], known: bool) -> None:
        self.mask = mask
        self.known = known
        #: it at the base, and for each of its dimensions there the vmap whose batch that is
        self.base = base
        self.owners = owners

    def run(self, function: Callable[..., Any], args: Sequence[Any], taken: bool = True) -> Any:
        """``function`` for those examples that take it: where the truth value is ``taken``. The results for the
        others mean nothing."""
        takes = self.mask if taken else ~self.mask
        branch = BranchInterpreter(inspect.unwrap(function), takes, self.example(taken))

        def body() -> Any:
            entered = [torch_pytree.tree_map(branch.enter, a) for a in args]
            return torch_pytree.tree_map(branch.leave, function(*entered))

        return run_transformed(branch, body)

    def example(self, taken: bool) -> dict[Interpreter, Tensor]:
        """The first example whose truth value is ``taken``, as its place in each batch (a tensor of one index)."""
        places: dict[Interpreter, Tensor] = {}
        if not self.owners:
            return places
        with running_at(None), torch.no_grad():
            rest = (self.base == taken).reshape(-1).int().argmax().reshape(1)
            for owner, size in zip(reversed(self.owners), reversed(self.base.shape), strict=True):
                places[owner], rest = rest % size, rest.div(size, rounding_mode="floor")
        return places

    def choose(self, sides: Sides, yes: Any, no: Any) -> Any:
        """``yes`` for the examples where the truth value holds, ``no`` for the others: trees alike."""
        (leaves, spec), (others, other_spec) = torch_pytree.tree_flatten(yes), torch_pytree.tree_flatten(no)
        check_alike(sides, leaves, others, spec == other_spec)
        chosen = [torch.where(self.mask, a, b) if isinstance(a, Tensor) else a for a, b in zip(leaves, others)]
        return torch_pytree.tree_unflatten(chosen, spec)


def check_alike(sides: Sides, given: Sequence[Any], expected: Sequence[Any], same: bool = True) -> None:
    """Refuse results that are not as expected: in number, in structure (``same``), in shape and dtype.

    Other values than tensors have to be equal, where one will stand for the other.
    """
    function, source, like = sides
    if not same or len(given) != len(expected):
        number = f"{len(given)} results of {source}"
        cure = "Return the same number of tensors in the same containers."
        raise CallError(function, number, f"the structure of {like}, of {len(expected)}", cure)
    for i, (a, b) in enumerate(zip(given, expected, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            alike = a.shape == b.shape and a.dtype is b.dtype
        else:
            alike = not isinstance(a, Tensor) and not isinstance(b, Tensor) and type(a) is type(b) and a == b
        if not alike:
            cure = "Return tensors of one shape and dtype each time, and as tensors the numbers that differ."
            raise CallError(function, f"{shown(a)} as result {i} of {source}", f"{shown(b)}, like {like}", cure)


def decide(op: Any, truth: Any) -> bool | Split:
    """What ``truth``, a number or a tensor with one element, says: one thing for all, or another for each example.

    Raises:
        UndecidedError: it belongs to a new transform that has no rule for ``op``.
    """
    if isinstance(truth, bool | int | float | torch.SymBool):
        return bool(truth)
    if not isinstance(truth, Tensor) or truth.numel() != 1:
        expected = "a bool, or a tensor with one element"
        raise CallTypeError(f"torch.ops.higher_order.{op}", f"{shown(truth)} as predicate", expected)
    mask = truth.reshape(()) if truth.shape else truth
    mask = mask if mask.dtype is torch.bool else mask != 0
    base, owners, unknown = at_base(mask)
    readable = not isinstance(base, FakeTensor) and all(mode_of_kind(kind) is None for kind in TRACING_MODES)
    if readable and not owners:
        try:
            return bool(mask)
        except MissingRuleError as error:
            if unknown is None:
                raise
            raise UndecidedError(op, unknown) from error
    if unknown is not None:
        raise UndecidedError(op, unknown)
    if readable:
        with running_at(None):
            if bool(base.all()):
                return True
            if not bool(base.any()):
                return False
    return Split(mask, base, owners, readable)


def at_base(mask: Tensor) -> tuple[Tensor, list[Interpreter], Interpreter | None]:
    """A truth value without dimensions at the base, and the vmap of each dimension that it has there; and a transform
    in between that has a meaning of its own for it, or None."""
    scan((mask,))
    owners: list[Interpreter] = []
    unknown = None
    x: Any = mask
    while type(x) is WrapperTensor:
        i = x.interpreter
        if isinstance(i, VmapInterpreter):
            if x.bdim is not None:
                owners.insert(x.bdim, i)
        elif not (i.differentiates or i.is_constant(x)):
            unknown = i
        x = x.value
    return x, owners, unknown
