"""What ``jet`` makes of pointwise code: a program that computes the Taylor coefficients of its results from those of
its arguments."""

from __future__ import annotations

from functrans.operators.rules import RuleCache
from functrans.operators.scopes import SCOPES
from functrans.programs.deriving import Derived, derived
from functrans.programs.program import Program, Value
from functrans.programs.tracing import Builder, Untraceable
from functrans.shipped.power_series import Node, PowerSeries
from functrans.shipped.scaled_values import scaled

#: What is known of each argument: it is a number, or a fixed tensor, or it has terms: for each, whether it is not zero.
NUMBER, FIXED = None, ()
Patterns = tuple[tuple[bool, ...] | None, ...]

COEFFICIENTS = RuleCache()


def coefficients(program: Program, patterns: Patterns, order: int) -> Derived | None:
    """The outputs with their coefficients, as functions of all inputs and of those of their terms that are not zero.

    None: they cannot be written as a program.
    """
    key = program, patterns, order
    if not SCOPES and (found := COEFFICIENTS.entries.get(key)) is not None:
        return found
    return COEFFICIENTS.find(key, written, program, patterns, order)


def written(program: Program, patterns: Patterns, order: int) -> Derived | None:
    try:
        return coefficients_of(program, patterns, order)
    except Untraceable:
        return None


def coefficients_of(program: Program, patterns: Patterns, order: int) -> Derived:
    values = [Value(i) for i in range(program.inputs)]
    builder = Builder(len(values) + sum(map(sum, filter(None, patterns))))
    inputs = [Value(i) for i in range(builder.inputs)]
    series = PowerSeries(builder)
    series.numbers.update(value for value, pattern in zip(values, patterns, strict=True) if pattern is NUMBER)
    rest = iter(inputs[len(values) :])
    leaves = [
        series.given(scaled(1, value), *(scaled(1, next(rest)) if moves else None for moves in pattern or ()))
        for value, pattern in zip(values, patterns, strict=True)
    ]
    nodes: list[Node] = series.nodes_of(program.instructions, leaves)
    for (op, operands), node in zip(program.instructions, nodes[len(leaves) :], strict=True):
        values.append(builder.emit(op, [values[a] if type(a) is Value else a for a in operands]))
        if not node.coefficients:
            node.coefficients.append(scaled(1, values[-1]))
    results: list[Value | None] = []
    for output in program.outputs:
        node = nodes[output]
        results.append(values[output])
        for k in range(1, order + 1):
            found = series.plain_tensor(series.coefficient(node, k))
            if found is not None:
                node.coefficients[k] = scaled(1, found)  # it is there, factor and all
            results.append(found)
    return derived(builder, inputs, results, [i for i in inputs if i not in series.numbers])
