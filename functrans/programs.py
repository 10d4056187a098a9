"""Programs: pointwise operators and the formulas of their derivatives as straight-line code that goes down the stack in one piece.

``torch.sin`` is a program of one instruction. Its tangent is one of three, ``(x, t) -> (sin(x), t * cos(x))``, made from the
derivative table by tracing the formula once; so is the pullback, and the tangent of the pullback. An interpreter gets a whole program
where it would get one operator, and gives every derivative level and every batch one Python call and one wrapper per result:

    vmap    runs a program as it is on the physical tensors, since code that is pointwise is pointwise in the batch, too
    jvp     runs its tangent one level down
    grad    runs it one level down, and its pullback when the tape is walked

>>> from functrans.programs import operator_program
>>> print(operator_program(torch.ops.aten.sin.default).tangent((0,)).program)
def program(a, b):
    return sin(a), mul(b, cos(a))

NOTE [What programs cover]
Real floating-point tensors of one dtype and Python numbers: there is no promotion to undo, and no conjugate. Whatever is outside
of that, or an operator one of whose rules was replaced, goes down the stack operator by operator (tensor.dispatch), as does a program
at an interpreter that does not know programs. Both ways use the same table.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functrans.derivatives.table import DERIVATIVES, NO_TANGENT, Derivative
from functrans.errors import DeadWrapperError
from functrans.operators import facts, quick_call
from functrans.rules import RuleTable
from functrans.spellings import OPERATORS, operator_of, spellings
from functrans.stack import STATE, Interpreter, door_closed
from functrans.tensor import PendingWrapper, WrapperTensor, base, dispatch, in_outer_modes, modes_differ, tensor_of
from functrans.torch_private import (
    DisableTorchFunction,
    EnableTorchFunction,
    OpOverload,
    function_mode_enabled,
    function_mode_stack_size,
    mode_stack_size,
    pop_function_mode,
    pop_mode,
    push_function_mode,
    push_mode,
)

aten = torch.ops.aten

#: The dtypes whose programs know no promotion and no conjugate.
REAL = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))

#: Pointwise operators whose tangent the table gives as a function: for real numbers the formulas of reverse mode are those of forward
#: mode, since the Jacobian of a pointwise operator is diagonal.
POINTWISE = frozenset(
    (aten.abs.default, aten.sgn.default, aten.div.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
     aten.tanh_backward.default, aten.sigmoid_backward.default)
)  # fmt: skip

#: What is computed again for a pullback rather than kept.
CHEAP = frozenset(
    (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor, aten.mul.Tensor, aten.neg.default, aten.zeros_like.default)
)


class Value(int):
    """A value in a program: its inputs come first, then one per instruction. (A plain int among operands is a number.)"""

    __slots__ = ()


class Instruction(NamedTuple):
    op: OpOverload
    operands: tuple[Any, ...]


class Untraceable(Exception):
    """A formula does something that a program cannot: look at a number, a shape, a dtype."""


class Builder:
    """Instructions being written down, no two of which are the same."""

    def __init__(self, inputs: int, instructions: Iterable[Instruction] = ()) -> None:
        self.inputs = inputs
        self.instructions = list(instructions)
        self.known = {key_of(*code): Value(inputs + i) for i, code in enumerate(self.instructions)}

    def emit(self, op: OpOverload, operands: Sequence[Any]) -> Value:
        if not admitted(op):
            raise Untraceable(op)
        plain = tuple(o.value if type(o) is Tracer else o for o in operands)
        key = key_of(op, plain)
        if key not in self.known:
            self.instructions.append(Instruction(op, plain))
            self.known[key] = Value(self.inputs + len(self.instructions) - 1)
        return self.known[key]

    def tracer(self, value: Value) -> Tracer:
        return Tracer(self, value)


def key_of(op: OpOverload, operands: Sequence[Any]) -> Any:
    return op, tuple((type(o), o) for o in operands)


class RealDtype:
    """The dtype of a traced value: all that a formula may ask it."""

    is_complex = False
    is_floating_point = True


class Tracer:
    """Stands for a tensor while a formula is traced; knows nothing but that it is real."""

    __slots__ = ("builder", "value")
    dtype = RealDtype()
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, builder: Builder, value: Value) -> None:
        self.builder = builder
        self.value = value

    @property
    def __class__(self) -> Any:
        return Tensor  # formulas ask isinstance(x, Tensor) to tell tensors from numbers

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tracer:
        builder = next(a.builder for a in args if type(a) is Tracer)
        if kwargs:
            raise Untraceable(func)
        op = func if isinstance(func, OpOverload) else None
        if op is None and SPELLINGS.get(func) in OPERATORS:
            op = operator_of(SPELLINGS[func], args, lambda a: type(a) is Tracer)
        if op is None:
            raise Untraceable(func)
        return builder.tracer(builder.emit(op, args))

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name, None)
        if SPELLINGS.get(method) not in OPERATORS:
            raise Untraceable(name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def is_complex(self) -> bool:
        return False

    def __bool__(self) -> bool:
        raise Untraceable("bool")

    def __rtruediv__(self, other: Any) -> Any:
        return self.reciprocal() * other


def _dunder(name: str) -> Any:
    function = getattr(Tensor, name)
    return lambda self, *args: self.__torch_function__(function, (), (self, *args), None)


for _name in ("neg", "abs", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "pow", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tracer, f"__{_name}__", _dunder(f"__{_name}__"))

SPELLINGS = spellings()


@contextmanager
def tracing() -> Iterator[None]:
    """Context: torch functions see tracers, and nobody else sees the torch functions."""
    modes = [pop_function_mode() for _ in range(function_mode_stack_size())]
    try:
        with EnableTorchFunction():
            yield
    finally:
        for mode in reversed(modes):
            push_function_mode(mode)


class Derived(NamedTuple):
    """Results as functions of values: what ``program`` computes of those that it ``uses``, or a value itself, or nothing."""

    program: Program
    #: positions of the values that the program takes; None: all of them
    uses: tuple[int, ...] | None
    #: for each result an output of the program (0, 1, ...), a value (-1, -2, ...) or None
    results: tuple[int | None, ...]
    #: whether the results are the program's outputs, all of them in order
    plain: bool

    def of(self, values: list[Any], send: Callable[[Program, list[Any]], Any]) -> Sequence[Any]:
        """The results; ``send`` runs the program."""
        program = self.program
        outs: Any = ()
        if program.outputs:
            outs = send(program, values if self.uses is None else [values[i] for i in self.uses])
            if program.single:
                outs = (outs,)
        return outs if self.plain else [None if r is None else outs[r] if r >= 0 else values[-1 - r] for r in self.results]


class Program:
    """Straight-line code of pointwise operators on ``inputs`` values.

    ``run`` is the code as a Python function of plain tensors; with several outputs it returns a tuple.
    """

    __slots__ = ("_sources", "inputs", "instructions", "outputs", "pullbacks", "records", "run", "single", "source", "tangents")

    def __init__(self, inputs: int, instructions: Sequence[Instruction], outputs: Sequence[Value]) -> None:
        self.inputs = inputs
        self.instructions = tuple(instructions)
        self.outputs = tuple(outputs)
        self.single = len(outputs) == 1
        #: derived programs, by the positions of the inputs that move or are tracked
        self.tangents: dict[tuple[int, ...], Derived] = {}
        self.pullbacks: dict[tuple[int, ...], Pullback] = {}
        self.records: dict[tuple[int, ...], Any] = {}
        self._sources: tuple[tuple[int, ...], ...] | None = None
        self.source, self.run = write_python(self)

    def __repr__(self) -> str:
        return self.source

    def step_by_step(self, args: Sequence[Any], send: Callable[[OpOverload, Any, dict[str, Any]], Any]) -> Any:
        """Run the instructions one after the other by ``send(op, args, kwargs)``."""
        values = [tensor_of(a) for a in args]
        for op, operands in self.instructions:
            values.append(send(op, tuple(values[o] if type(o) is Value else o for o in operands), {}))
        return values[self.outputs[0]] if self.single else tuple(values[o] for o in self.outputs)

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """For each output the inputs that it depends on."""
        if self._sources is None:
            found = [frozenset((i,)) for i in range(self.inputs)]
            for _, operands in self.instructions:
                found.append(frozenset().union(*(found[o] for o in operands if type(o) is Value)))
            self._sources = tuple(tuple(sorted(found[o])) for o in self.outputs)
        return self._sources

    def tangent(self, moving: tuple[int, ...]) -> Derived:
        """The program of the inputs and one tangent per input in ``moving`` that computes the outputs and their tangents."""
        found = self.tangents.get(moving)
        if found is None:
            with tracing():
                found = self.tangents[moving] = tangent_of(self, moving)
        return found

    def pullback(self, tracked: tuple[int, ...]) -> Pullback:
        """The program with what it takes to pull cotangents of its outputs back to the inputs in ``tracked``."""
        found = self.pullbacks.get(tracked)
        if found is None:
            with tracing():
                found = self.pullbacks[tracked] = pullback_of(self, tracked)
        return found


def slice_out(builder: Builder, inputs: Sequence[Value], outputs: Sequence[Value]) -> Program:
    """The program that computes ``outputs`` from ``inputs``, any of the builder's values."""
    places = {v: Value(i) for i, v in enumerate(inputs)}
    wanted, stack = set(), [v for v in outputs if v not in places]
    while stack:
        v = stack.pop()
        if v in wanted:
            continue
        wanted.add(v)
        stack.extend(o for o in builder.instructions[v - builder.inputs].operands if type(o) is Value and o not in places)
    instructions = []
    for v in sorted(wanted):
        op, operands = builder.instructions[v - builder.inputs]
        instructions.append(Instruction(op, tuple(places[o] if type(o) is Value else o for o in operands)))
        places[v] = Value(len(inputs) + len(instructions) - 1)
    return Program(len(inputs), instructions, [places[v] for v in outputs])


def derived(builder: Builder, inputs: Sequence[Value], results: Sequence[Value | None], tensors: Iterable[int]) -> Derived:
    """``results`` as functions of ``inputs``; those that are inputs, or nothing, are not computed.

    ``tensors``: the positions of inputs that are known to be tensors.
    """
    inputs = list(inputs)
    computed = list(dict.fromkeys(r for r in results if r is not None and r not in inputs))
    places = tuple(None if r is None else computed.index(r) if r in computed else -1 - inputs.index(r) for r in results)
    program = slice_out(builder, inputs, computed)
    used = {o for _, operands in program.instructions for o in operands if type(o) is Value and o < len(inputs)}
    uses = None if len(used) == len(inputs) else tuple(sorted(used))
    if uses is not None:
        program = slice_out(builder, [inputs[i] for i in uses], computed)
        tensors = [k for k, i in enumerate(uses) if i in tensors]
    program = fused(program, tensors)
    return Derived(program, uses, places, places == tuple(range(len(computed))))


def fused(program: Program, tensors: Iterable[int]) -> Program:
    """``program`` with each ``x + a * b`` as one operator, where the product is used nowhere else; ``tensors``: inputs that are no numbers."""
    n = program.inputs
    counts = Counter(o for _, operands in program.instructions for o in operands if type(o) is Value)
    counts.update(program.outputs)
    is_tensor = [i in tensors for i in range(n)]
    builder = Builder(n)
    places: list[Any] = [Value(i) for i in range(n)]
    for op, operands in program.instructions:
        is_tensor.append(True)
        if op is aten.add.Tensor:
            for x, product in (operands, operands[::-1]):
                if type(product) is Value and product >= n and counts[product] == 1 and type(x) is Value and is_tensor[x]:
                    inner, factors = program.instructions[product - n]
                    if inner is aten.mul.Tensor and all(type(f) is Value and is_tensor[f] for f in factors):
                        op, operands = aten.addcmul.default, (x, *factors)
                        break
        places.append(builder.emit(op, tuple(places[o] if type(o) is Value else o for o in operands)))
    return slice_out(builder, [Value(i) for i in range(n)], [places[o] for o in program.outputs])


def formula_of(op: OpOverload, i: int) -> tuple[Derivative, str] | None:
    """The table's entry and the name of its ``i``-th argument; None if the operator's outputs have no derivative."""
    entry = DERIVATIVES.get(op)
    assert entry is not None
    if entry.tangent == NO_TANGENT:
        return None
    name = facts(op).arguments[i]
    if name not in entry.formulas:
        raise Untraceable(op)
    return entry, name


def trace(builder: Builder, entry: Derivative, name: str, operands: Sequence[Any], result: Value, grad: Value) -> Value | None:
    """Write down the formula for argument ``name``; ``grad`` is the cotangent, or the tangent of that argument."""
    known = facts(entry.op)

    def bound(need: str) -> Any:
        if need == "grad":
            return builder.tracer(grad)
        if need == "result":
            return builder.tracer(result)
        i = known.arguments.index(need)
        a = operands[i] if i < len(operands) else known.defaults[i]
        return builder.tracer(a) if type(a) is Value else a

    try:
        found = entry.formulas[name](*[bound(need) for need in entry.needs[name]])
    except (TypeError, AttributeError, ValueError) as error:
        raise Untraceable(entry.op) from error
    if found is None:
        return None
    if type(found) is not Tracer:
        raise Untraceable(entry.op)
    return found.value


def tangent_of(program: Program, moving: tuple[int, ...]) -> Derived:
    n = program.inputs
    builder = Builder(n + len(moving))
    values: list[Any] = [Value(i) for i in range(n)]
    tangents: dict[int, Value] = {p: Value(n + i) for i, p in enumerate(moving)}
    for k, (op, operands) in enumerate(program.instructions):
        placed = tuple(values[o] if type(o) is Value else o for o in operands)
        result = builder.emit(op, placed)
        values.append(result)
        total: Value | None = None
        for i, o in enumerate(operands):
            if type(o) is Value and o in tangents:
                found = formula_of(op, i)
                part = None if found is None else trace(builder, *found, placed, result, tangents[o])
                if part is not None:
                    total = part if total is None else builder.emit(aten.add.Tensor, (total, part))
        if total is not None:
            tangents[n + k] = total
    outs = [values[o] for o in program.outputs]
    known = {*moving, *range(n, n + len(moving))}
    return derived(builder, [Value(i) for i in range(n + len(moving))], [*outs, *(tangents.get(o) for o in program.outputs)], known)


class Pullback(NamedTuple):
    """A program with what its pullback needs.

    ``forward`` computes the outputs and after them the values to keep; ``saves`` says what is saved: inputs (-1, -2, ...) and
    outputs of ``forward`` (0, 1, ...). ``pull`` gives, for the outputs that have a cotangent, the program of these cotangents and of
    what was saved that computes the cotangents of the tracked inputs.
    """

    forward: Program
    saves: tuple[int, ...]
    pull: Callable[[tuple[int, ...]], Derived]


def pullback_of(program: Program, tracked: tuple[int, ...]) -> Pullback:
    n, m = program.inputs, len(program.instructions)
    depends = [i in tracked for i in range(n)]
    for _, operands in program.instructions:
        depends.append(any(type(o) is Value and depends[o] for o in operands))

    def sweep(given: tuple[int, ...]) -> tuple[Builder, list[Value], list[Value | None]]:
        """The cotangents of the tracked inputs, written down behind the program's own instructions."""
        # The cotangents are inputs of their own, numbered in front, so that the program's values move up by their number.
        shift = len(given)
        builder = Builder(shift + n, [Instruction(op, shifted(operands, shift)) for op, operands in program.instructions])
        cotangents: dict[int, Value] = {}
        for c, position in enumerate(given):
            accumulate(builder, cotangents, program.outputs[position] + shift, Value(c))
        for k in range(m - 1, -1, -1):
            op, operands = program.instructions[k]
            grad = cotangents.get(shift + n + k)
            if grad is None:
                continue
            for i, o in enumerate(operands):
                if type(o) is Value and depends[o]:
                    found = formula_of(op, i)
                    part = None if found is None else trace(builder, *found, shifted(operands, shift), Value(shift + n + k), grad)
                    if part is not None:
                        accumulate(builder, cotangents, o + shift, part)
        return builder, [Value(c) for c in range(shift)], [cotangents.get(p + shift) for p in tracked]

    everything = tuple(range(len(program.outputs)))
    builder, seeds, results = sweep(everything)
    shift = len(seeds)
    needed = kept_values(builder, program, shift, [r for r in results if r is not None])
    extras = [v - shift for v in needed if v >= shift + n and v - shift not in program.outputs]
    forward = Program(n, program.instructions, [*program.outputs, *map(Value, extras)]) if extras else program
    saves = tuple(-1 - (v - shift) if v < shift + n else forward.outputs.index(v - shift) for v in needed)
    cache: dict[tuple[int, ...], Derived] = {}

    def pull(given: tuple[int, ...]) -> Derived:
        if given not in cache:
            with tracing():
                builder, seeds, results = sweep(given)
            at = [*seeds, *(Value(v - shift + len(seeds)) for v in needed)]
            known = {*range(len(seeds)), *(len(seeds) + i for i, s in enumerate(saves) if s >= 0 or -1 - s in tracked)}
            cache[given] = derived(builder, at, results, known)
        return cache[given]

    return Pullback(forward, saves, pull)


def shifted(operands: Sequence[Any], shift: int) -> tuple[Any, ...]:
    return tuple(Value(o + shift) if type(o) is Value else o for o in operands)


def accumulate(builder: Builder, cotangents: dict[int, Value], at: int, part: Value) -> None:
    cotangents[at] = builder.emit(aten.add.Tensor, (cotangents[at], part)) if at in cotangents else part


def kept_values(builder: Builder, program: Program, shift: int, wanted: Sequence[Value]) -> list[Value]:
    """The program's values that computing ``wanted`` starts from: inputs, outputs, and what is not cheap to compute again."""
    first, last = shift + program.inputs, shift + program.inputs + len(program.instructions)
    kept, seen, stack = set(), set(), list(wanted)
    while stack:
        v = stack.pop()
        if v in seen or v < shift:
            continue
        seen.add(v)
        if v < first:
            kept.add(v)
            continue
        op, operands = builder.instructions[v - builder.inputs]
        if v < last and (op not in CHEAP or v - shift in program.outputs):
            kept.add(v)
        else:
            stack.extend(o for o in operands if type(o) is Value)
    return sorted(kept)


def names() -> Iterable[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return itertools.chain(letters, (f"{c}{i}" for i in itertools.count(1) for c in letters))


def write_python(program: Program) -> tuple[str, Callable[..., Any]]:
    """The program as Python source, and compiled."""
    n = program.inputs
    uses = Counter(o for _, operands in program.instructions for o in operands if type(o) is Value)
    uses.update(program.outputs)
    scope: dict[str, Any] = {}
    letters = names()
    texts = list(itertools.islice(letters, n))
    lines = [f"def program({', '.join(texts)}):"]
    for k, (op, operands) in enumerate(program.instructions):
        function = op._schema.name.removeprefix("aten::")
        call = quick_call(op) or op._op
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
    exec(source, scope)  # noqa: S102 - the source was written a few lines above
    return source, scope["program"]


# --------------------------------------------------------------------------------------------- operators as programs

_programs: dict[Any, Program | None] = {}
#: the tables whose rules programs stand for, with the rules that the library itself registered
_tables: list[tuple[RuleTable[Any], dict[OpOverload, Any]]] = []
_replaced: set[OpOverload] = set()
#: called when the programs of operators are no longer valid
FORGET: list[Callable[[], None]] = []


def watch(*tables: RuleTable[Any]) -> None:
    """Take the rules that are now in ``tables`` for those that programs stand for; an operator one of whose rules changes has no program."""
    for table in tables:
        _tables.append((table, {op: table.get(op) for op in table}))
        table.on_change(rules_changed)


def rules_changed(op: OpOverload) -> None:
    if any(table.get(op) is not rules.get(op) for table, rules in _tables):
        _replaced.add(op)
    else:
        _replaced.discard(op)
    _programs.clear()
    for forget in FORGET:
        forget()


def admitted(op: OpOverload) -> bool:
    """Whether ``op`` may be an instruction: pointwise, with one output, and by the rules that programs stand for."""
    entry = DERIVATIVES.get(op)
    if entry is None or op in _replaced or entry.outputs != 1 or facts(op).random:
        return False
    return entry.tangent in ("elementwise", NO_TANGENT) or op in POINTWISE


def operator_program(op: OpOverload, *numbers: Any) -> Program | None:
    """The program of one operator whose last operands are ``numbers``; None if its derivatives cannot be written as programs."""
    key = (op, numbers)
    try:
        return _programs[key]
    except KeyError:
        program: Program | None = None
        try:
            program = probe(op, numbers)
        except Untraceable:
            pass
        _programs[key] = program
        return program


def traced(function: Callable[..., Any], inputs: int) -> Program:
    """A pointwise function of real tensors as a program."""
    builder = Builder(inputs)
    values = [Value(i) for i in range(inputs)]
    with tracing():
        result = function(*map(builder.tracer, values))
    return slice_out(builder, values, [result.value])


def probe(op: OpOverload, numbers: tuple[Any, ...]) -> Program:
    """The program of ``op``, after its first and second derivatives have been derived for a test."""
    arguments = [a for a in op._schema.arguments if not a.kwarg_only and (not a.has_default_value() or "Tensor" in str(a.type))]
    inputs = len(arguments) - len(numbers)
    builder = Builder(inputs)
    value = builder.emit(op, (*(Value(i) for i in range(inputs)), *numbers))
    program = slice_out(builder, [Value(i) for i in range(inputs)], [value])
    tensors = [i for i, a in enumerate(arguments[:inputs]) if "Tensor" in str(a.type)]
    for count in range(1, len(tensors) + 1):
        for moving in itertools.combinations(tensors, count):
            program.tangent(moving)
            back = program.pullback(moving).pull((0,)).program
            if back.outputs:
                back.tangent(tuple(range(back.inputs)))
    return program


# ------------------------------------------------------------------------------------------- programs on the stack


def run(program: Program, args: Sequence[Any]) -> Any:
    """Send ``program`` to the highest level among ``args``, or run it at the base; what tensor.dispatch does with an operator."""
    owner: Interpreter | None = None
    plain = True
    for a in args:
        kind = type(a)
        if kind is WrapperTensor or kind is PendingWrapper:
            if a.view_link is not None:
                a.view_link.refresh(a)
            i = a.interpreter
            if i is not owner:
                if not i.alive:
                    raise DeadWrapperError(a)
                if owner is None or i.level > owner.level:
                    owner = i
        elif kind is Tensor:
            if a.requires_grad:
                plain = False
        elif kind is not float and kind is not int:
            plain = False
    if owner is not None:
        if owner.process_program is None:
            return program.step_by_step(args, dispatch)
        return owner.process_program(program, args, True)
    if not plain or forward_ad._current_level >= 0:
        return program.step_by_step(args, base)
    return program.run(*args)


def constants(interpreter: Interpreter, program: Program, outs: Any) -> Any:
    """A program's outputs from one level down as constants of ``interpreter``."""
    if program.single:
        return interpreter.constant(tensor_of(outs))
    return [interpreter.constant(tensor_of(o)) for o in outs]


def start(program: Program, args: Sequence[Any]) -> Any:
    """Run ``program`` from code that runs at a level, where the door is open."""
    depth = STATE.door_depth
    if function_mode_enabled():
        with DisableTorchFunction():
            return start(program, args)
    modes = mode_stack_size()
    if modes < depth or depth == 0:
        return run(program, args)
    if modes > depth:
        with door_closed():
            return run(program, args)
    door = pop_mode(None)
    try:
        return run(program, args)
    finally:
        push_mode(door)


def lower_program(interpreter: Interpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run ``program`` one level below ``interpreter``; what tensor.lower does with an operator."""
    if interpreter.on_base:
        for a in args:
            kind = type(a)
            if kind is Tensor:
                if a.requires_grad:
                    break
            elif kind is not float and kind is not int:
                break
        else:
            if forward_ad._current_level < 0:
                return program.run(*args)
        return program.step_by_step(args, base)
    if not interpreter.outer_modes_on and modes_differ(interpreter):
        return in_outer_modes(interpreter, lower_program, program, args)
    return run(program, args)
