"""Programs derived from programs: tangents and pullbacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from functrans.derivatives.table import DERIVATIVES, NO_TANGENT, Derivative
from functrans.operators.info import op_info
from functrans.programs.program import Instruction, Program, Value
from functrans.programs.tracing import Builder, Tracer, Untraceable, tracing
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

#: What is computed again for a pullback rather than kept.
CHEAP = frozenset(
    (
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.rsub.Scalar,
        aten.rsub.Tensor,
        aten.mul.Tensor,
        aten.neg.default,
        aten.zeros_like.default,
    )
)


class Derived(NamedTuple):
    """Results as functions of values: what ``program`` computes of those that it ``uses``, or a value itself, or
    nothing."""

    program: Program
    #: positions of the values that the program takes; None: all of them
    uses: tuple[int, ...] | None
    #: for each result an output of the program (0, 1, ...), a value (-1, -2, ...) or None
    results: tuple[int | None, ...]
    #: whether the results are the program's outputs, all of them in order
    plain: bool

    def of(self, values: list[Any], send: Callable[[Any, list[Any], dict[str, Any]], Any]) -> Sequence[Any]:
        """The results; ``send(program, args, kwargs)`` runs the program."""
        program = self.program
        outs: Any = ()
        if program.outputs:
            outs = send(program, values if self.uses is None else [values[i] for i in self.uses], {})
            if program.single:
                outs = (outs,)
        return (
            outs if self.plain else [None if r is None else outs[r] if r >= 0 else values[-1 - r] for r in self.results]
        )


def tangent(program: Program, moving: tuple[int, ...]) -> Derived:
    """The program of the inputs and one tangent per input in ``moving`` that computes the outputs and their
    tangents."""
    found = program.tangents.get(moving)
    if found is None:
        with tracing():
            found = program.tangents[moving] = tangent_of(program, moving)
    return found


def pullback(program: Program, tracked: tuple[int, ...]) -> Pullback:
    """The program with what it takes to pull cotangents of its outputs back to the inputs in ``tracked``."""
    found = program.pullbacks.get(tracked)
    if found is None:
        with tracing():
            found = program.pullbacks[tracked] = pullback_of(program, tracked)
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
        stack.extend(
            o for o in builder.instructions[v - builder.inputs].operands if type(o) is Value and o not in places
        )
    instructions = []
    for v in sorted(wanted):
        op, operands = builder.instructions[v - builder.inputs]
        instructions.append(Instruction(op, tuple(places[o] if type(o) is Value else o for o in operands)))
        places[v] = Value(len(inputs) + len(instructions) - 1)
    return Program(len(inputs), instructions, [places[v] for v in outputs])


def derived(
    builder: Builder, inputs: Sequence[Value], results: Sequence[Value | None], tensors: Iterable[int]
) -> Derived:
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
    program = fused(program, tensors).inner
    return Derived(program, uses, places, places == tuple(range(len(computed))))


def fused(program: Program, tensors: Iterable[int]) -> Program:
    """``program`` with each ``x + a * b`` as one operator, where the product is used nowhere else; ``tensors``: inputs
    that are no numbers."""
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
                if (
                    type(product) is Value
                    and product >= n
                    and counts[product] == 1
                    and type(x) is Value
                    and is_tensor[x]
                ):
                    inner, factors = program.instructions[product - n]
                    if inner is aten.mul.Tensor and all(type(f) is Value and is_tensor[f] for f in factors):
                        op, operands = aten.addcmul.default, (x, *factors)
                        break
        places.append(builder.emit(op, tuple(places[o] if type(o) is Value else o for o in operands)))
    return slice_out(builder, [Value(i) for i in range(n)], [places[o] for o in program.outputs])


def formula_of(op: OpOverload, i: int) -> tuple[Derivative, str] | None:
    """The table's entry and the name of its ``i``-th argument; None if the operator's outputs have no derivative."""
    entry = DERIVATIVES.get(op)
    if entry is not None and entry.tangent == NO_TANGENT:
        return None
    name = op_info(op).arguments[i]
    if entry is None or name not in entry.formulas:  # None: another thread has taken it out meanwhile
        raise Untraceable(op)
    return entry, name


def trace(
    builder: Builder, entry: Derivative, name: str, operands: Sequence[Any], result: Value, grad: Value
) -> Value | None:
    """Write down the formula for argument ``name``; ``grad`` is the cotangent, or the tangent of that argument."""
    known = op_info(entry.op)

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
    return derived(
        builder, [Value(i) for i in range(n + len(moving))], [*outs, *(tangents.get(o) for o in program.outputs)], known
    )


class Pullback(NamedTuple):
    """A program with what its pullback needs.

    ``forward`` computes the outputs and after them the values to keep; ``saves`` says what is saved: inputs (-1, -2,
    ...) and outputs of ``forward`` (0, 1, ...). ``pull`` gives, for the outputs that have a cotangent, the program of
    these cotangents and of what was saved that computes the cotangents of the tracked inputs.
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
        # The cotangents are inputs of their own, numbered in front, so that the program's values move up by their
        # number.
        shift = len(given)
        builder = Builder(
            shift + n, [Instruction(op, shifted(operands, shift)) for op, operands in program.instructions]
        )
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
                    part = (
                        None
                        if found is None
                        else trace(builder, *found, shifted(operands, shift), Value(shift + n + k), grad)
                    )
                    if part is not None:
                        accumulate(builder, cotangents, o + shift, part)
        return builder, [Value(c) for c in range(shift)], [cotangents.get(p + shift) for p in tracked]

    everything = tuple(range(len(program.outputs)))
    builder, seeds, results = sweep(everything)
    shift = len(seeds)
    needed = kept_values(builder, program, shift, [r for r in results if r is not None])
    extras = [v - shift for v in needed if v >= shift + n and v - shift not in program.outputs]
    forward = (
        Program(n, program.instructions, [*program.outputs, *map(Value, extras)]).inner if extras else program.inner
    )
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
    """The program's values that computing ``wanted`` starts from: inputs, outputs, and what is not cheap to compute
    again."""
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
