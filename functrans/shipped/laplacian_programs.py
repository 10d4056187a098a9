"""What ``laplacian`` makes of pointwise code: programs of its first and second derivatives.

    y = f(a, b, ...):   y_d = Σᵢ fᵢ·i_d      Σ y_dd = Σᵢ fᵢ·Σ i_dd + Σᵢⱼ fᵢⱼ·Σ i_d·j_d

The derivatives fᵢ and fᵢⱼ do not depend on the direction d. For all directions there is nothing but a product for each
fᵢ, and the sums of products, which the program of fᵢ and fᵢⱼ takes as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from functrans.operators.rules import RuleCache
from functrans.operators.scopes import SCOPES
from functrans.programs.deriving import Derived, derived
from functrans.programs.program import Program, Value
from functrans.programs.tracing import Builder, Untraceable
from functrans.shipped.power_series import Node, PowerSeries
from functrans.shipped.scaled_values import Arithmetic, Scaled, scaled


class Bending(NamedTuple):
    """Programs for one pattern of arguments; those that move are counted in their order."""

    #: the pairs of moving arguments whose products are summed over the directions
    products: tuple[tuple[int, int], ...]
    #: of all arguments, the bends that are not zero, and the sums of products; computes the outputs, their bends, and
    #: for each output its derivatives by the moving arguments (None for a number that is known)
    values: Derived
    #: of these derivatives and the slopes of the moving arguments; computes the slopes of the outputs
    slopes: Derived


BENDINGS = RuleCache()


def bending(
    program: Program, moving: tuple[int, ...], bent: tuple[int, ...], numbers: tuple[int, ...]
) -> Bending | None:
    """The programs for arguments of which those at ``moving`` have slopes, those at ``bent`` a bend, too, and those at
    ``numbers`` are numbers; None if they cannot be written."""
    key = program, moving, bent, numbers
    if not SCOPES and (found := BENDINGS.entries.get(key)) is not None:
        return found
    return BENDINGS.find(key, written, *key)


def written(program: Program, *pattern: Any) -> Bending | None:
    try:
        return bending_of(program, *pattern)
    except Untraceable:
        return None


class Partials(PowerSeries):
    """Derivatives by several arguments, as nodes. The first coefficients are all that is asked for."""

    def __init__(self, builder: Builder, count: int) -> None:
        super().__init__(builder)
        self.leaves = [self.given(scaled(1, Value(i))) for i in range(count)]
        self.found: dict[tuple[Node, int], Node | None] = {}

    def by(self, node: Any, i: int) -> Node | None:
        """The derivative of ``node`` by the ``i``-th argument; None: zero."""
        if type(node) is not Node:
            return None
        if node.op is None:
            return self.given(scaled(1), of=(node,)) if node is self.leaves[i] else None
        if (node, i) not in self.found:
            grads = [self.by(a, i) for a in node.operands]
            self.found[node, i] = self.derivative(node, grads)
        return self.found[node, i]

    def value(self, node: Node | None) -> Scaled | None:
        return None if node is None else self.coefficient(node, 0)


def bending_of(program: Program, moving: tuple[int, ...], bent: tuple[int, ...], numbers: tuple[int, ...]) -> Bending:
    n = program.inputs
    pairs = list(itertools.combinations_with_replacement(range(len(moving)), 2))
    builder = Builder(n + len(bent) + len(pairs))
    inputs = [Value(i) for i in range(builder.inputs)]
    bends = {moving.index(i): scaled(1, inputs[n + k]) for k, i in enumerate(bent)}
    sums = {pair: inputs[n + len(bent) + k] for k, pair in enumerate(pairs)}
    partials = Partials(builder, n)
    partials.numbers.update(map(Value, numbers))
    values = inputs[:n]
    nodes: list[Node] = partials.nodes_of(program.instructions, partials.leaves)
    for (op, operands), node in zip(program.instructions, nodes[n:], strict=True):
        values.append(builder.emit(op, [values[a] if type(a) is Value else a for a in operands]))
        if not node.coefficients:
            node.coefficients.append(scaled(1, values[-1]))
    used: set[tuple[int, int]] = set()
    of_bends: list[Value | None] = []
    of_firsts: list[list[Scaled | None]] = []
    for output in program.outputs:
        firsts = [partials.by(nodes[output], i) for i in moving]
        parts = [partials.times(partials.value(f), bends.get(i)) for i, f in enumerate(firsts)]
        for i, j in pairs:
            second = partials.value(partials.by(firsts[i], moving[j]))
            if second is not None:
                used.add((i, j))
                ways = scaled(1 if i == j else 2, sums[i, j])
                parts.append(partials.times(second, ways))
        of_bends.append(partials.plain_tensor(partials.total(*parts)))
        of_firsts.append([partials.value(f) for f in firsts])
    given = [
        None if f is None or f.value is None else f.value if f.value in partials.numbers else partials.plain(f)
        for firsts in of_firsts
        for f in firsts
    ]
    taken = [*inputs[: n + len(bent)], *(sums[pair] for pair in pairs if pair in used)]
    return Bending(
        tuple(pair for pair in pairs if pair in used),
        derived(
            builder,
            taken,
            [*(values[output] for output in program.outputs), *of_bends, *given],
            [i for i in range(len(taken)) if i not in numbers],
        ),
        slopes_of(of_firsts, partials.numbers),
    )


def slopes_of(of_firsts: Sequence[Sequence[Scaled | None]], numbers: set[Value]) -> Derived:
    """The products of derivatives, for each output those by the moving arguments, and the slopes of these, added up.

    ``numbers``: the values that are numbers when it runs.
    """
    count = len(of_firsts[0])
    builder = Builder(len(of_firsts) * count + count)
    inputs = [Value(i) for i in range(builder.inputs)]
    series = Arithmetic(builder)
    slopes = [scaled(1, value) for value in inputs[-count:]]
    rest = iter(inputs)
    results = []
    for firsts in of_firsts:
        known: list[Scaled | None] = []
        for f in firsts:
            place = next(rest)
            if f is None or f.value is None:
                known.append(f)
            elif f.value in numbers:
                series.numbers.add(place)
                known.append(scaled(f.factor, place))
            else:
                known.append(scaled(1, place))
        total = series.total(*(series.times(f, slope) for f, slope in zip(known, slopes, strict=True)))
        results.append(series.plain_tensor(total))
    return derived(builder, inputs, results, [i for i in inputs if i not in series.numbers])
