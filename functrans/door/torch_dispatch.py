"""The general way in: all of PyTorch comes through ``__torch_dispatch__``, which gets operators, parsed and whole."""

from __future__ import annotations

import sys
from threading import get_ident
from typing import Any

from functrans.core import thread_state
from functrans.core.dispatch import base, lift, scan
from functrans.core.errors import OtherThreadError
from functrans.core.errors.call_sites import USER_FILES
from functrans.core.errors.made_at import note_site, several
from functrans.core.interpreter import Interpreter
from functrans.core.operators import PURE, OpInfo, kind_here, op_info
from functrans.core.rules import SCOPES
from functrans.core.schemas import normalized
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import STATE
from functrans.core.torch_private import CONJUGATE, NEGATIVE, Mode, OpOverload, set_key_excluded
from functrans.functionalization import writes
from functrans.functionalization.numbers_read import check_number_read
from functrans.interpreters.failures import explain


class Door(Mode):
    """Brings in the operators that have no wrapper among their arguments: factories, random ones, captured tensors."""

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operator that code runs inside a transform enters here, once, but for those that take the short way
        (torch_function.py).

        Writes and views become pure operators (functionalization/writes.py); what was made inside belongs to the
        innermost transform.
        """
        # While a handler runs, PyTorch excludes every key above it: among them those that make conj() and .imag of base
        # tensors what they are. (Autograd's comes back in dispatch.base.)
        set_key_excluded(CONJUGATE, False)
        set_key_excluded(NEGATIVE, False)
        try:
            known: OpInfo = op._functrans  # type: ignore[attr-defined]
        except AttributeError:
            if op.namespace == "prim":  # PyTorch asks a tensor of another subclass for its device: no operator
                return op(*args)
            known = op_info(op)
        if kwargs:
            args, kwargs = normalized(op, args, kwargs)
        try:
            if STATE.number_read is not None:
                check_number_read(op, args, kwargs)
            out = handle(op, known, args, kwargs or {})
        except Exception as error:
            explain(error)
            raise
        if not types:  # what has a wrapper among its arguments came through ``otherwise``, which notes the place
            kind = type(out)
            if kind is WrapperTensor:
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
    if (known.kind if not SCOPES else kind_here(known)) != PURE:
        return writes.run(known, args, kwargs)
    top = STATE.top
    owner = top if known.random else scan(args, kwargs)[0]
    if owner is top or owner is None:
        out = base(op, args, kwargs) if owner is None else owner.process(op, args, kwargs)
    else:
        check_thread(owner)
        out = owner.process(op, args, kwargs)
    return out if owner is top else lift(out, owner, top)


def check_thread(owner: Interpreter) -> None:
    """Refuse a wrapper of another thread's transform.

    (What the autograd engine calls on shadows comes from threads of its own.)
    """
    if owner.thread is not None and owner.thread != get_ident():
        raise OtherThreadError(owner)
