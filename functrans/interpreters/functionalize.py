"""functionalize: a level that adds nothing to what the door does, so that what is below it sees that alone.

The door makes writes pure for every level. At this one, composite operators are taken apart, so that the writes and
views inside of them come through the door as well; and views become copies where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.core.dispatch import lower, map_tensors
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, strides_of, wrap_as
from functrans.decompositions.conjugates import OF_BITS
from functrans.decompositions.table import decompose
from functrans.errors import InsideTransformError
from functrans.functionalization.copies import COPIES
from functrans.functionalization.views import contents_of
from functrans.interpreters.function_context import unwrapped, without
from functrans.interpreters.hooks_below import hook_below
from functrans.operators.info import PURE, VIEW, OpInfo, op_info
from functrans.operators.schemas import taken_apart
from functrans.pytorch.thread_state import in_modes, lowered, running_at
from functrans.pytorch.torch_private import (
    OpOverload,
    no_dispatch,
)

aten = torch.ops.aten


class FunctionalizeInterpreter(Interpreter):
    """Sends every operator down as it comes from the door; ``copies``: with copies in place of views."""

    kind = "functionalize"

    def __init__(self, func: Callable[..., Any] | None = None, copies: bool = False) -> None:
        super().__init__(func)
        self.copies = copies

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known: OpInfo = op_info(op)
        if known.composite:
            if self.copies and known.kind_by_schema == PURE:
                return self.take_apart(op, args, kwargs)
            if op in OF_BITS:
                return decompose(self, op, args, kwargs)
            with running_at(self):
                return taken_apart(op, *args, **kwargs)
        values, below_kwargs = [self.value_of(a) for a in args], {k: self.value_of(a) for k, a in kwargs.items()}
        if not self.copies or known.kind_by_schema != VIEW:
            return map_tensors(self.constant, lower(self, op, values, below_kwargs))
        if op not in COPIES:
            raise InsideTransformError(str(op), f"{self.name} with remove='mutations_and_views'", "remove='mutations'")
        if op is aten.detach.default:  # PyTorch differentiates detach_copy
            with in_modes(False, False):
                out = lower(self, COPIES[op], values, below_kwargs)
        else:
            out = lower(self, COPIES[op], values, below_kwargs)
        if type(args[0]) is not WrapperTensor or args[0].layout is not torch.strided:
            return map_tensors(self.constant, out)
        return self.shown_as_views(out, args[0], op, args, kwargs)

    def add_hook(self, wrapper: WrapperTensor, hook: Callable[[Tensor], Any]) -> Any:
        return hook_below(self, wrapper, hook)

    def take_apart(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """A composite operator in pieces, which take captured tensors for this level's, or would view them below."""
        entered: list[tuple[WrapperTensor, Tensor]] = []

        def enter(a: Tensor) -> Tensor:
            if type(a) is WrapperTensor:
                return a
            entered.append((self.constant(a), a))
            return entered[-1][0]

        with running_at(self):
            entering = {name: map_tensors(enter, a) for name, a in kwargs.items()}
            out = taken_apart(op, *map_tensors(enter, args), **entering)
            for wrapper, captured in entered:
                if wrapper.version:  # running statistics, which no schema shows
                    captured.copy_(contents_of(wrapper))
        return out

    def shown_as_views(self, out: Any, viewed: WrapperTensor, op: OpOverload, args: Any, kwargs: Any) -> Any:
        """Copies, with the strides and offsets that the views would have: what comes next depends on them."""
        with running_at(None), no_dispatch():
            probe = aten.empty_strided.default(viewed.shape, viewed.stride(), dtype=viewed.dtype, device="meta")
            views = op(probe, *args[1:], **kwargs)
        pairs = iter([views] if isinstance(views, Tensor) else views)

        def show(value: Tensor) -> WrapperTensor:
            view = next(pairs)
            wrapper = wrap_as(self, value, value.shape, strides_of(view))
            offset = int(viewed.storage_offset() + view.storage_offset())
            if offset != value.storage_offset():
                wrapper.shown_offset = offset
            wrapper.moved = wrapper.shown_offset is not None or wrapper.strides != strides_of(value)
            return wrapper

        return map_tensors(show, out)


def apply_below(interpreter: FunctionalizeInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    """An ``autograd.Function`` goes on as one operator: a derivative around it has to find its backward."""
    _, values = unwrapped(interpreter, args)
    with without(interpreter, cls), lowered(interpreter):
        out = cls.apply(*values)
    return map_tensors(interpreter.constant, out)
