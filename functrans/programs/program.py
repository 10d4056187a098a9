"""What a program is, and how it is written as Python."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

from functrans.core.tensor import tensor_of
from functrans.errors.call_sites import PROGRAM_FILE
from functrans.operators.info import PURE, OpInfo
from functrans.operators.schemas import direct_call
from functrans.operators.scopes import SCOPES, scope_here
from functrans.pytorch.torch_private import OpOverload


class Value(int):
    """A value in a program: its inputs come first, then one per instruction. (A plain int among operands is a
    number.)"""

    __slots__ = ()


class Instruction(NamedTuple):
    op: OpOverload
    operands: tuple[Any, ...]


def key_of(op: OpOverload, operands: Sequence[Any]) -> Any:
    return op, tuple((type(o), o) for o in operands)


def call(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    return op(*args, **kwargs)


class Program:
    """Straight-line code of pointwise operators on ``inputs`` values: an operator that the library wrote itself.

    It has what the stack asks of an operator: an op info, and a way to be taken apart.
    """

    __slots__ = (
        "_functrans", "_sources", "inner", "inputs", "instructions", "outputs", "pending", "placements", "pullbacks",
        "records", "scope", "single", "source", "tangents",
    )  # fmt: skip

    def __init__(self, inputs: int, instructions: Sequence[Instruction], outputs: Sequence[Value]) -> None:
        self.inputs = inputs
        self.instructions = tuple(instructions)
        self.outputs = tuple(outputs)
        self.single = len(outputs) == 1
        #: the scope of rules that the programs derived from it are made by; only there it may be interpreted as a
        #: program
        self.scope = scope_here() if SCOPES else None
        #: derived programs, by the positions of the inputs that move or are tracked
        self.tangents: dict[tuple[int, ...], Any] = {}
        self.pullbacks: dict[tuple[int, ...], Any] = {}
        self.records: dict[tuple[int, ...], Any] = {}
        #: how batches are brought to one rank, by how they lie (interpreters/vmap/programs.py)
        self.placements: dict[Any, Any] = {}
        self._sources: tuple[tuple[int, ...], ...] | None = None
        self.source, direct = write_python(self)
        self._functrans = ProgramInfo(self, direct)
        #: whether its results may be pending wrappers (see core/tensor.py), since nothing but programs sees them
        self.pending = False
        #: the same program for one level down, where that is so
        self.inner: Program = copy(self)
        self.inner.pending, self.inner.inner = True, self.inner

    def __repr__(self) -> str:
        return self.source

    def decompose(self, *args: Any, send: Callable[[OpOverload, Any, dict[str, Any]], Any] = call) -> Any:
        """Run the operators one after the other, by ``send(op, args, kwargs)``."""
        values = [tensor_of(a) for a in args]
        for op, operands in self.instructions:
            values.append(send(op, tuple(values[o] if type(o) is Value else o for o in operands), {}))
        return values[self.outputs[0]] if self.single else tuple(values[o] for o in self.outputs)

    __call__ = _op = decompose

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """For each output the inputs that it depends on."""
        if self._sources is None:
            found = [frozenset((i,)) for i in range(self.inputs)]
            for _, operands in self.instructions:
                found.append(frozenset().union(*(found[o] for o in operands if type(o) is Value)))
            self._sources = tuple(tuple(sorted(found[o])) for o in self.outputs)
        return self._sources


class ProgramInfo(OpInfo):
    """What the stack asks of a program, as of any operator; ``direct`` is the code as a function of plain tensors."""

    __slots__ = ()
    program = True
    composite = True  # type: ignore[assignment]
    random = tensor_lists = False
    kind = PURE

    def __init__(self, program: Program, direct: Callable[..., Any]) -> None:
        self.op = program  # type: ignore[assignment]
        self.direct = direct


def names() -> Iterator[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return itertools.chain(letters, (f"{c}{i}" for i in itertools.count(1) for c in letters))


def write_python(program: Program) -> tuple[str, Callable[..., Any]]:
    """The program as Python source, and compiled."""
    n = program.inputs
    uses = Counter(o for _, operands in program.instructions for o in operands if type(o) is Value)
    uses.update(program.outputs)
    scope: dict[str, Any] = {"inf": math.inf, "nan": math.nan}
    letters = names()
    texts = list(itertools.islice(letters, n))
    lines = [f"def program({', '.join(texts)}):"]
    for k, (op, operands) in enumerate(program.instructions):
        function = op._schema.name.removeprefix("aten::")
        call = direct_call(op) or op._op
        while scope.setdefault(function, call) is not call:  # two overloads of one name
            function += "_"
        text = f"{function}({', '.join(texts[o] if type(o) is Value else repr(o) for o in operands)})"
        if uses[Value(n + k)] > 1:
            variable = next(letters)
            lines.append(f"    {variable} = {text}")
            text = variable
        texts.append(text)  # what is used once is written where it is used, so that its memory is free at once
    lines.append(f"    return {', '.join(texts[o] for o in program.outputs)}")
    source = "\n".join(lines)
    if len(program.instructions) == 1 and key_of(*program.instructions[0])[1] == tuple((Value, i) for i in range(n)):
        return source, call  # the function itself
    exec(compile(source, PROGRAM_FILE, "exec"), scope)  # noqa: S102 - the source was written a few lines above
    return source, scope["program"]
