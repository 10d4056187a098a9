"""The door: the one place where operators enter, from user code to the interpreter stack."""

from __future__ import annotations

import sys
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from functrans import mutation, stack
from functrans.operators import PURE, Facts, facts, normalized
from functrans.stack import STATE
from functrans.tensor import WrapperTensor, base, highest, lift
from functrans.torch_private import CONJUGATE, NEGATIVE, OpOverload, set_key_excluded


class Door(TorchDispatchMode):
    """Brings in the operators that have no wrapper among their arguments: factories, random ones, captured tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default wraps the handler against Dynamo, which costs more than the rest of the door.
        return False

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operator that code runs inside a transform enters here, once.

        Writes and views become pure operators (mutation.py); what was made inside belongs to the innermost transform.
        """
        # While a handler runs, PyTorch excludes every key above it: among them those that make conj() and .imag of base
        # tensors what they are. (Autograd's comes back in tensor.base.)
        set_key_excluded(CONJUGATE, False)
        set_key_excluded(NEGATIVE, False)
        try:
            known: Facts = op._functrans  # type: ignore[attr-defined]
        except AttributeError:
            known = facts(op)
        if kwargs:
            args, kwargs = normalized(op, args, kwargs)
        else:
            kwargs = {}
        if known.kind != PURE:
            return mutation.run(known, args, kwargs)
        top = STATE.top
        owner = top if known.random else highest(args, kwargs, known.tensor_lists)
        out = base(op, args, kwargs) if owner is None else owner.process(op, args, kwargs)
        if owner is not top:
            out = lift(out, owner, top)
        if type(out) is WrapperTensor:
            frame = sys._getframe(1)
            out.made_at = (frame.f_code, frame.f_lasti)
        return out

    def enter(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """The door for operators that functrans itself starts."""
        return self.__torch_dispatch__(op, (), args, kwargs)


stack.DOOR = Door()
