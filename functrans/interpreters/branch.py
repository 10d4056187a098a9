"""A branch that some examples take and others do not: a level that keeps the two apart.

NOTE [Branches]
Where the examples of a vmap differ in a truth value, each branch is run for all of them, and the results are chosen
from. What comes of the examples that do not take a branch must not show. It could: as an error (the inverse of a
singular matrix), as a loop that never ends, and as a derivative, since the pullback of the choice sends zeros into a
branch that was not taken, and zero times infinity is not zero.

So a branch runs at a level of its own, and every tensor from outside that it uses, argument or captured, comes in
through ``enter``, as ``where(takes, x, x of an example that takes it)``. The example that stands in is a constant: no
cotangent goes back through it, and the one of ``x`` itself is zero for the examples that do not take the branch.

To see all tensors, ``enter`` is asked wherever arguments pass: at the door, and where a level above the branch lowers
to one at or above it (``core.dispatch.entered``). ``Interpreter.within`` is the innermost branch at or below a level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import lower, map_tensors, scan
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WRAPPERS, WrapperTensor, tensor_of, wrap
from functrans.errors import BranchWriteError
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import in_modes, running_at
from functrans.pytorch.torch_private import OpOverload


class BranchInterpreter(Interpreter, whole=True):
    """Sends every operator down as it comes, on tensors of which those from outside came in by ``enter``.

    Args:
        func: the branch.
        takes: which examples take it, a truth value of the level below.
        example: one of these, as its place in the batch of each vmap whose examples differ.
    """

    kind = "branch"

    def __init__(self, func: Callable[..., Any], takes: Tensor, example: Mapping[Interpreter, Tensor]) -> None:
        super().__init__(func)
        self.within = self
        self.takes = takes
        self.example = example
        #: by identity what has come in, and as what
        self.outside: dict[int, tuple[Tensor, WrapperTensor]] = {}

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        values = [self.value_inside(a) for a in args]
        below_kwargs = {name: self.value_inside(a) for name, a in kwargs.items()}
        return map_tensors(self.constant, lower(self, op, values, below_kwargs))

    def value_inside(self, a: Any) -> Any:
        """An argument one level down."""
        a = self.enter(a)
        if isinstance(a, WrapperTensor):
            return a.value
        return [self.value_inside(v) for v in a] if type(a) in (list, tuple) else a

    def enter(self, a: Any) -> Any:
        """An argument as code in the branch sees it; see NOTE [Branches]."""
        if not isinstance(a, Tensor):
            if type(a) in WRAPPERS:  # pending
                return a if a.interpreter.level >= self.level else self.enter(tensor_of(a))
            if type(a) is dict:
                return {name: self.enter(v) for name, v in a.items()}
            return type(a)([self.enter(v) for v in a]) if type(a) in (list, tuple) else a
        if type(a) is WrapperTensor and a.interpreter.level >= self.level:
            return a
        known = self.outside.get(id(a))
        if known is None:
            known = self.outside[id(a)] = a, wrap(self, self.guarded(a))
        return known[1]

    def made_inside(self, x: Any) -> Any:
        """What came in as ``x``. If it was the last, it was made for this branch, and may be written to."""
        if not self.outside or next(reversed(self.outside.values()))[1] is not x:
            return x
        return self.outside.popitem()[1][0]

    def splits(self, level: Interpreter) -> bool:
        """Whether examples of the vmap ``level`` may differ in taking the branch."""
        x: Any = self.takes
        while type(x) is WrapperTensor:
            if x.interpreter is level:
                return not level.is_constant(x)
            x = x.value
        return False

    def leave(self, out: Any) -> Any:
        """What the branch returns, one level down."""
        if self.owns(out):
            scan((out,))
            return out.value
        return out

    def guarded(self, x: Tensor) -> Tensor:
        scan((x,))
        if not self.differs(x):
            return x
        # whatever modes hold where it is used first
        with running_at(self.below), in_modes(self.outer_grad_mode, self.outer_forward_mode):
            return torch.where(self.takes, x, self.standing_in(x))

    def differs(self, x: Any) -> bool:
        """Whether ``x``, or its derivative, may be another for examples that do not take the branch."""
        while type(x) is WrapperTensor:
            i = x.interpreter
            batched = isinstance(i, VmapInterpreter) and x.bdim is not None
            if i in self.example if batched else not i.is_constant(x):
                return True
            x = x.value
        return x.requires_grad

    def standing_in(self, x: Any) -> Tensor:
        """``x`` as ``self.example`` has it, without derivatives."""
        if type(x) is not WrapperTensor:
            with running_at(None):
                return x.detach()
        i, value = x.interpreter, self.standing_in(x.value)
        if isinstance(i, VmapInterpreter) and x.bdim is not None and i in self.example:
            with running_at(i.below):
                return value.index_select(x.bdim, self.example[i]).squeeze(x.bdim)
        if i.differentiates:
            return i.constant(value)
        copy = i.rewrap(x, value)
        for name in i.payload:
            if isinstance(getattr(x, name), Tensor):
                setattr(copy, name, self.standing_in(getattr(x, name)))
        return copy

    def returned(self) -> None:
        for x, wrapper in self.outside.values():
            if wrapper.version or (wrapper.alias_group is not None and wrapper.alias_group.version):
                raise BranchWriteError(self, x)
