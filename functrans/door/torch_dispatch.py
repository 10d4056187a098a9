"""The general way in: all of PyTorch comes through ``__torch_dispatch__``, which gets operators, parsed and whole."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import lift
from functrans.boundary.facades import bare
from functrans.boundary.fresh import FRESH
from functrans.boundary.leftovers import arguments_as_here, check_thread
from functrans.boundary.made_at import note_site, several
from functrans.control_flow import definitions  # noqa: F401
from functrans.control_flow.table import run_higher_order
from functrans.core.dispatch import base, entered, scan
from functrans.core.tensor import WrapperTensor
from functrans.door.autocast import pieces_at_door
from functrans.errors import DeadWrapperError
from functrans.errors.call_sites import USER_FILES
from functrans.functionalization import writes
from functrans.functionalization.numbers_read import check_number_read
from functrans.interpreters.failures import explain
from functrans.operators.info import PURE, OpInfo, kind_here, op_info
from functrans.operators.schemas import normalized, taken_apart
from functrans.operators.scopes import SCOPES
from functrans.pytorch import thread_state
from functrans.pytorch.thread_state import STATE, running_at
from functrans.pytorch.torch_private import (
    CONJUGATE,
    NEGATIVE,
    HigherOrderOperator,
    Mode,
    OpOverload,
    debug_mode,
    pop_mode,
    push_mode,
    set_key_excluded,
)
from functrans.tensors.subclasses import KeptClassMet


class Door(Mode):
    """Brings in the operators that have no wrapper among their arguments: factories, random ones, captured tensors."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operator that code runs inside a transform enters here, once, but for those that take the short way
        (torch_function.py).

        Writes and views become pure operators (functionalization/writes.py); what was made inside belongs to the
        innermost transform.
        """
        if types and types is not OURS and (len(types) > 1 or types[0] is not WrapperTensor):
            args, kwargs = bare(args), bare(kwargs or {})
            nested = nested_class((*args, *kwargs.values()))
            if nested is not None:
                return run_apart(nested, op, types, args, kwargs)
        # While a handler runs, PyTorch excludes every key above it: among them those that make conj() and .imag of base
        # tensors what they are. (Autograd's comes back in dispatch.base.)
        set_key_excluded(CONJUGATE, False)
        set_key_excluded(NEGATIVE, False)
        try:
            known: OpInfo = op._functrans  # type: ignore[attr-defined]
        except AttributeError:
            if isinstance(op, HigherOrderOperator):
                return run_higher_order(op, args, kwargs or {})
            if op.namespace == "prim":  # PyTorch asks a tensor of another subclass for its device: no operator
                return op(*args)
            known = op_info(op)
        if not types and known.composite and known.kind_by_schema == PURE:
            pieces = pieces_at_door(op)
            if pieces is not None:
                push_mode(self)
                try:
                    return pieces.__torch_dispatch__(op, types, args, kwargs)
                finally:
                    pop_mode(None)
        if kwargs:
            args, kwargs = normalized(op, args, kwargs)
        try:
            if STATE.number_read is not None:
                check_number_read(op, args, kwargs)
            out = handle(op, known, args, kwargs or {})
        except DeadWrapperError:
            given = arguments_as_here(known, args, kwargs or {})
            if given is None:
                raise
            try:
                return self.__torch_dispatch__(op, types, *given)
            except Exception as error:
                raise error from error.__cause__  # and not from what was seen to
        except KeptClassMet:
            return self.__torch_dispatch__(op, types, bare(args), bare(kwargs or {}))
        except Exception as error:
            explain(error)
            raise
        if not types:  # what has a wrapper among its arguments came through ``otherwise``, which notes the place
            kind = type(out)
            if kind is WrapperTensor:
                if known.makes and out.view_link is None:
                    out.view_link = FRESH
                frame = sys._getframe(1)
                code = frame.f_code
                if code.co_filename in USER_FILES:
                    out.made_at = (code, frame.f_lasti)
                else:
                    note_site((out,), frame, 1)
            elif several(out):
                note_site(out, sys._getframe(1), 1)
        return out

    def enter(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """The door for operators that functrans itself starts; what they make gets its place elsewhere."""
        return self.__torch_dispatch__(op, OURS, args, kwargs)


#: in place of the types among an operator's arguments: functrans started it
OURS = (WrapperTensor,)
thread_state.DOOR = DOOR = Door()


def handle(op: OpOverload, known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``op``, whose arguments stand where its schema has them."""
    top = STATE.top
    if top is not None and top.within is not None:
        args, kwargs = entered(top, args, kwargs)
    if (known.kind if not SCOPES else kind_here(known)) != PURE:
        return writes.run(known, args, kwargs)
    owner = top if known.random else scan(args, kwargs)[0]
    if owner is not top and top is not None and top.watcher is not None:
        owner = top.watcher if owner is None or owner.level < top.watcher.level else owner
    if owner is top or owner is None:
        out = base(op, args, kwargs) if owner is None else owner.process(op, args, kwargs)
    else:
        check_thread(owner)
        out = owner.process(op, args, kwargs)
    return out if owner is top else lift(out, owner, top)


def nested_class(args: Any) -> Any:
    """The class of a nested tensor among ``args`` that is made of others, which may be wrappers: a jagged one."""
    for a in args:
        if isinstance(a, list | tuple):
            found = nested_class(a)
            if found is not None:
                return found
        elif isinstance(a, Tensor) and type(a) not in (Tensor, WrapperTensor) and a.is_nested:
            return type(a)
    return None


VALUES = (torch.ops.aten.values.default, torch.ops.aten._nested_get_values.default)


def run_apart(nested: Any, op: OpOverload, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` as a nested tensor's class says, by operators of the level on the tensors it is made of.

    No wrapper can be around it; so wrappers are in it.
    """
    if op in VALUES:  # which detach, since autograd is thought to be in front of it
        return args[0]._values
    with running_at(STATE.top):
        try:
            return nested.__torch_dispatch__(op, types, args, kwargs)
        except NotImplementedError:
            if not op_info(op).composite:
                raise
            return taken_apart(op, *args, **kwargs)


def shown_in(mode: Any) -> None:
    """Have PyTorch's DebugMode inside of a transform write down operators on wrappers, as it does with plain tensors.

    It leaves tensors of other classes to them: of each it expects the operators that it is made of.
    """
    original = mode.__torch_dispatch__

    @functools.wraps(original)
    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return original(self, func, tuple(t for t in types if t is not WrapperTensor), args, kwargs)

    mode.__torch_dispatch__ = dispatch


if debug_mode() is not None:
    shown_in(debug_mode())
