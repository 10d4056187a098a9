"""The pieces of what is defined by other operators: found once for all calls that look alike.

PyTorch's definition of a composite, or ours, runs through the dispatcher, and what it calls comes in by the door again,
which takes several times as long as ``dispatch``. So the pieces are written down (operators/scripts.py) the second time
a call of a look comes, and sent on by Python calls from then on.

NOTE [Pieces that follow from the look]
The look has all that a definition may ask: shapes, dtypes, strides, devices and numbers, which arguments are one
tensor, grad mode, the default dtype. A definition is left as it is where its pieces follow from more than that (one
returns a number, or as many elements as numbers say), where one is random or a stand-in, where one writes to what the
definition did not make, where it switches grad mode, and where the result shares memory with an argument. How results
of pieces lie in memory is not in the look: a ``view`` of one is written as the ``reshape`` that it is wherever it is
possible.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from functrans.boundary.calls import lift
from functrans.core.dispatch import NO_KWARGS, WITHOUT_TENSORS, map_tensors, sending
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.functionalization.out_of_place import Functional, pure_form
from functrans.operators.info import PURE, VIEW, WRITE, OpInfo, op_info
from functrans.operators.rules import FORGET
from functrans.operators.schemas import normalized
from functrans.operators.scopes import SCOPES
from functrans.operators.scripts import CONSTANTS, Script, Unwritable
from functrans.pytorch.thread_state import STATE, running_at
from functrans.pytorch.torch_private import (
    Mode,
    OpOverload,
    autocast_enabled,
    function_mode_enabled,
    is_forward_enabled,
)
from functrans.tensors.pytrees import tensors_in

aten = torch.ops.aten

#: How many looks of one operator are kept, and how many pieces of one call.
MOST, LONGEST = 256, 64
#: Tags of what has as many elements, or numbers for a result, as numbers say.
BY_NUMBERS = frozenset((torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))
#: Operators for which it depends on strides whether they can be.
BY_STRIDES = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
#: What asks for a dtype.
DTYPES = frozenset(("aten::result_type", "aten::can_cast", "aten::promote_types"))
LISTS = (list, tuple, torch.Size)


def look_of(args: Iterable[Any], seen: list[int]) -> tuple[Any, ...] | None:
    """All that the pieces of a call depend on; None: they depend on more. ``seen`` gets the ids of its tensors."""
    look: list[Any] = []
    for a in args:
        kind = type(a)
        if kind is WrapperTensor:
            if a.layout is not torch.strided or a.moved:
                return None
            look += a.shape, a.dtype, a.strides, a.device
            seen.append(id(a))
        elif kind in WITHOUT_TENSORS:
            look += kind, a if a != 0 or kind is int else str(a)  # 0.0 and -0.0 are equal
        elif kind is Tensor or kind is Parameter:
            shape = a.shape
            if not shape or a.layout is not torch.strided or a.is_neg():  # without dimensions it may be a number
                return None
            look += shape, a.dtype, None if a.is_contiguous() else a.stride(), a.device, a.requires_grad
            seen.append(id(a))
        elif kind in LISTS:
            if a and type(a[0]) is int:
                look += kind, tuple(a)
                continue
            found = look_of(a, seen)
            if found is None:
                return None
            look += kind, found
        else:
            return None
    return tuple(look)


class Definition:
    """What an operator is by others: plain ``torch`` code with the operator's arguments."""

    __slots__ = ("around", "define", "op", "scripts")

    def __init__(self, op: OpOverload, define: Callable[..., Any], lasting: bool, around: Any = None) -> None:
        self.op = op
        self.define = define
        #: the context that ``define`` enters for its pieces, if any
        self.around = around
        #: the pieces by look: None if it came once, False if they do not follow from it; or nothing is written down,
        #: for the code is not ``lasting``: it may say something else next time
        self.scripts: dict[Any, Any] | None = {} if lasting else None

    def run(self, interpreter: Interpreter, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What it returns at the level of ``interpreter``."""
        look, scripts = None, self.scripts
        if scripts is not None and not (kwargs or SCOPES or autocast_enabled() or function_mode_enabled()):
            seen: list[int] = []
            look = look_of(args, seen)
        if look is None or scripts is None or interpreter.within is not None or STATE.number_read is not None:
            return self.anew(interpreter, args, kwargs)
        which = None if len(seen) < 2 or len(set(seen)) == len(seen) else tuple(map(seen.index, seen))
        takes = interpreter.kind if interpreter.whole else type(interpreter)  # composites, and leaves others
        look = len(changes), takes, torch.is_grad_enabled(), torch.get_default_dtype(), which, look
        try:
            script = scripts[look]
        except KeyError:
            if len(scripts) >= MOST:
                scripts.clear()
            scripts[look] = None
            return self.anew(interpreter, args, kwargs)
        except TypeError:  # a symbolic size
            return self.anew(interpreter, args, kwargs)
        recording = RECORDING.pieces
        if script is None and recording is None:
            return self.recorded(interpreter, args, scripts, look)
        if not script or (recording is not None and recording.is_piece(self, interpreter)):
            return self.anew(interpreter, args, kwargs)
        if self.around is None:
            out = script(sending(interpreter.watcher), *args)
        else:
            with self.around():
                out = script(sending(interpreter.watcher), *args)
        if type(out) is WrapperTensor and out.interpreter is interpreter:
            return out
        return map_tensors(lambda x: lift(x, getattr(x, "interpreter", None), interpreter), out)

    def anew(self, interpreter: Interpreter, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What it returns, by its code."""
        pieces = RECORDING.pieces
        with running_at(interpreter):
            if pieces is None or not pieces.is_piece(self, interpreter):
                return self.define(*args, **kwargs)
            with pieces:  # its pieces are those of the whole
                out = self.define(*args, **kwargs)
            pieces.was_taken_apart = True
            return out

    def recorded(self, interpreter: Interpreter, args: Sequence[Any], scripts: dict[Any, Any], look: Any) -> Any:
        """What it returns, by its code, whose pieces are written down."""
        RECORDING.pieces = pieces = Pieces(interpreter, args)
        try:
            with running_at(interpreter), pieces:
                out = self.define(*args)
        finally:
            RECORDING.pieces = None
        scripts[look] = pieces.compiled(out)
        return out


class Recording(threading.local):
    #: what writes pieces down in this thread
    pieces: Pieces | None = None


RECORDING = Recording()


class Pieces(Mode):
    """Sees the operators that a definition comes to at the level of ``interpreter``."""

    def __init__(self, interpreter: Interpreter, args: Sequence[Any]) -> None:
        super().__init__()
        self.interpreter = interpreter
        self.script = PiecesScript(args, "send")
        #: of complex ones it is not in the look whether they are conjugates that nobody computed yet
        self.refused = any(x.dtype.is_complex for x in tensors_in(args))
        self.modes = torch.is_grad_enabled(), is_forward_enabled()
        #: the piece that is running, and whether that has pieces in its place
        self.running: Any = None
        self.was_taken_apart = False

    def is_piece(self, definition: Definition, interpreter: Interpreter) -> bool:
        """Whether what ``interpreter`` is taking apart by ``definition`` is the piece that is running.

        Its pieces may stand in its place if they need no context, and of the library's own interpreters: nothing tells
        when another would take it apart.
        """
        here = definition.op is self.running and interpreter is self.interpreter
        return here and definition.around is None and interpreter.whole

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before, self.running = self.running, op
        self.was_taken_apart = False
        out = op(*args, **kwargs)
        self.running = before
        if self.modes != (torch.is_grad_enabled(), is_forward_enabled()):
            self.refused = True  # the definition switches them
        if not (self.refused or self.was_taken_apart):
            try:
                self.script.piece(op, *normalized(op, args, kwargs), out)
            except Unwritable:
                self.refused = True
        return out

    def compiled(self, result: Any) -> Any:
        """The function that sends the pieces on; False if there is none."""
        try:
            return result is not NotImplemented and not self.refused and self.script.compiled(result)
        except Unwritable:
            return False


class PiecesScript(Script):
    """Pieces as they are sent on by ``send(op, args, kwargs)``."""

    constants = (*CONSTANTS, torch.device)

    def __init__(self, values: Sequence[Any], *parameters: str) -> None:
        super().__init__(values, *parameters)
        self.arguments = set(map(id, tensors_in(values)))
        #: tensors that share memory with others, and with an argument, by id
        self.viewed: set[int] = set()
        self.given = set(self.arguments)

    def piece(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(op, OpOverload) and op._schema.name in DTYPES:
            return  # which are in the look
        if not isinstance(op, OpOverload) or len(self.lines) >= LONGEST or BY_NUMBERS.intersection(op.tags):
            raise Unwritable
        known = op_info(op)
        if known.random:
            raise Unwritable
        if known.kind == WRITE:
            self.write_out_of_place(known, args, kwargs, out)
            return
        if known.kind_by_schema != WRITE and id(out) in self.names:
            return  # an argument itself
        if known.kind == VIEW:
            self.view(args[0], out)
        elif known.kind != PURE:
            raise Unwritable
        used: list[str] = []
        self.write(self.call(BY_STRIDES.get(op, op), args, kwargs, used), used, out)

    def view(self, x: Any, out: Any) -> None:
        shared = {id(x), *(id(o) for o in tensors_in([out]))}
        self.viewed |= shared
        if id(x) in self.given:
            self.given |= shared

    def write_out_of_place(self, known: OpInfo, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Write to what the definition made itself, of which it holds no view: it is something else from then on."""
        target, form = args[0], pure_form(known)
        if out is not target or id(out) not in self.names or id(out) in self.given | self.viewed:
            raise Unwritable
        if type(form) is not Functional or form.drops_out or known.written != (0,):
            raise Unwritable
        if not target.dtype.is_floating_point or any(x.dtype is not target.dtype for x in tensors_in(args)):
            raise Unwritable  # the target keeps its dtype
        if any(type(x) is complex for x in args):
            raise Unwritable
        used: list[str] = []
        call = self.call(form.op, args, kwargs, used)
        del self.names[id(out)]
        self.write(call, used, out)
        if op_info(form.op).kind == VIEW:
            self.viewed.add(id(out))

    def call(self, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], used: list[str]) -> str:
        given = "".join(f"{self.text(a, used)}, " for a in args)
        by_name = "".join(f"{name!r}: {self.text(a, used)}, " for name, a in kwargs.items())
        return f"send({self.constant(op)}, ({given}), {f'{{{by_name}}}' if by_name else self.constant(NO_KWARGS)})"

    def text(self, x: Any, used: list[str]) -> str:
        if type(x) is Tensor and not x.dim() and id(x) not in self.names:
            return self.constant(x)  # a number of the definition's
        return super().text(x, used)

    def compiled(self, result: Any) -> Callable[..., Any]:
        if any(id(x) in self.given - self.arguments for x in tensors_in([result])):
            raise Unwritable
        return super().compiled(result)


#: Rules that were registered: what is written down holds for those that there were.
changes: list[OpOverload] = []
FORGET.append(lambda table, op: changes.append(op))
