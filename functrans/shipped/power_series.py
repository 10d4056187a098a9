"""The Taylor coefficients of pointwise code, written down as a program.

A ``Node`` stands for a function of t: an operand of the code, or an operator of nodes. Its coefficients are found one
after the other, each from lower ones. Arithmetic has its recurrences. For every other operator the derivative table has
y' as a formula of the operands, their derivatives and y, which is traced once and is a node, too; (k + 1)·yₖ₊₁ is its
k-th coefficient, which asks for no more of y than y₀ to yₖ. (Griewank and Walther, Evaluating Derivatives, 2008,
chapter 13; with coefficients that are computed when they are asked for, as in McIlroy, Power series, power serious,
Journal of Functional Programming 9, 1999.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from functrans.operators.info import op_info
from functrans.programs.deriving import formula_of
from functrans.programs.program import Instruction, Value
from functrans.programs.torch_functions import OPERATORS
from functrans.programs.tracing import Builder, Untraceable, tracing
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.scaled_values import Arithmetic, Scaled, scaled

aten = torch.ops.aten


class Node:
    """A function of t. Its identity counts: what is one operator of the same operands is one node."""

    __slots__ = ("coefficients", "moves", "op", "operands", "slope")

    def __init__(self, op: Any, operands: tuple[Any, ...], moves: bool) -> None:
        #: an operator overload, DERIVATIVE, or None: its coefficients are given
        self.op = op
        #: nodes and numbers
        self.operands = operands
        #: whether more than the first coefficient may differ from zero
        self.moves = moves
        self.coefficients: list[Scaled | None] = []
        #: its derivative by t, once it was asked for
        self.slope: Node | None = None


#: in the place of an operator: the derivative of a node by t
DERIVATIVE = object()


class PowerSeries(Arithmetic):
    """Nodes, and the builder that what they compute is written to."""

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.known: dict[Any, Node] = {}

    # --- nodes -------------------------------------------------------------------------------------------------------

    def given(self, *coefficients: Scaled | None, of: tuple[Node, ...] = ()) -> Node:
        """A node with these coefficients; the others are zero. ``of``: what a number is the derivative of."""
        node = Node(None, of, any(c is not None for c in coefficients[1:]))
        node.coefficients = list(coefficients)
        return node

    def node(self, op: Any, operands: Sequence[Any]) -> Node:
        """The node of an operator, or of what it is defined as."""
        definition = DEFINITIONS.get(op)
        if definition is not None:
            found = self.traced(definition, operands)
            if found is not None:
                return found
        key = (op, *((type(a), a) for a in operands))  # 1 is not 1.0
        if key not in self.known:
            self.known[key] = Node(op, tuple(operands), any(type(a) is Node and a.moves for a in operands))
        return self.known[key]

    def nodes_of(self, instructions: Sequence[Instruction], operands: Sequence[Any]) -> list[Any]:
        """``operands``, and a node for each instruction of code that begins with them."""
        nodes = list(operands)
        for op, inner in instructions:
            nodes.append(self.node(op, [nodes[a] if type(a) is Value else a for a in inner]))
        return nodes

    def traced(self, function: Callable[..., Any], operands: Sequence[Any]) -> Node | None:
        """What plain ``torch`` code makes of ``operands``, as a node; None if it returns None."""
        builder = Builder(len(operands))
        with tracing():
            found = function(*[builder.tracer(Value(i)) if type(a) is Node else a for i, a in enumerate(operands)])
        if found is None:
            return None
        if not hasattr(found, "builder"):
            raise Untraceable(function)
        return self.nodes_of(builder.instructions, operands)[found.value]

    def derivative(self, node: Node, grads: Sequence[Node | None]) -> Node | None:
        """The derivative of an operator's node, by those of its operands; None: zero."""
        parts = [self.by_operand(node, i, grad) for i, grad in enumerate(grads) if grad is not None]
        total: Node | None = None
        for part in parts:
            if part is not None:
                total = part if total is None else self.node(aten.add.Tensor, (total, part))
        return total

    def by_operand(self, node: Node, i: int, grad: Node) -> Node | None:
        """The formula for the ``i``-th operand of a node."""
        formula = FORMULAS.get(node.op)
        if formula is not None:
            return self.traced(formula, (grad, *node.operands, node))
        if node.op not in TRACEABLE:
            raise Untraceable(node.op)
        found = formula_of(node.op, i)
        if found is None:
            return None
        entry, name = found
        known = op_info(node.op)

        def bound(need: str) -> Any:
            if need in ("grad", "result"):
                return grad if need == "grad" else node
            place = known.arguments.index(need)
            return node.operands[place] if place < len(node.operands) else known.defaults[place]

        try:
            return self.traced(entry.formulas[name], [bound(need) for need in entry.needs[name]])
        except (TypeError, AttributeError, ValueError) as error:
            raise Untraceable(node.op) from error

    # --- coefficients ------------------------------------------------------------------------------------------------

    def coefficient(self, node: Any, k: int) -> Scaled | None:
        """The k-th Taylor coefficient of a node, or of a number."""
        if type(node) is not Node:
            return scaled(node) if k == 0 else None
        if node.op is None:
            return node.coefficients[k] if k < len(node.coefficients) else None
        if k and not node.moves:
            return None
        while len(node.coefficients) <= k:
            found = self.compute(node, len(node.coefficients))
            if found is not None and found.value is not None and not 1 / 16 < abs(found.factor) < 16:
                # lest values leave the range of numbers with factors that would bring them back
                found = scaled(1, self.plain(found))
            node.coefficients.append(found)
        return node.coefficients[k]

    def compute(self, node: Node, k: int) -> Scaled | None:
        recurrence = RECURRENCES.get(node.op)
        if recurrence is not None:
            return recurrence(self, k, *node.operands)
        if k == 0:
            plain = [self.plain(self.coefficient(a, 0)) if type(a) is Node else a for a in node.operands]
            if not any(map(self.is_tensor, plain)):
                raise Untraceable(node.op)
            return scaled(1, self.builder.emit(node.op, plain))
        if node.slope is None:
            slopes = [self.node(DERIVATIVE, (a,)) if type(a) is Node and a.moves else None for a in node.operands]
            node.slope = self.derivative(node, slopes) or self.given(None)
        return self.times(self.coefficient(node.slope, k - 1), scaled(Fraction(1, k)))


# --- recurrences: recurrence(series, k, *operands) is the k-th coefficient of the result ------------------------------

MINUS = scaled(-1)


def derivative(series: PowerSeries, k: int, x: Node) -> Scaled | None:
    return series.times(scaled(k + 1), series.coefficient(x, k + 1))


def convolution(series: PowerSeries, k: int, a: Any, b: Any, first: int = 0) -> list[Scaled | None]:
    """The parts of the k-th coefficient of a·b, without those of the ``first`` coefficients of a."""
    if a is b and not first:
        half = [series.times(series.coefficient(a, j), series.coefficient(a, k - j)) for j in range((k + 1) // 2)]
        middle = [] if k % 2 else [series.times(series.coefficient(a, k // 2), series.coefficient(a, k // 2))]
        return [*(series.times(scaled(2), part) for part in half), *middle]
    found = []
    for j in range(first, k + 1):
        x = series.coefficient(a, j)
        found.append(None if x is None else series.times(x, series.coefficient(b, k - j)))
    return found


def product(series: PowerSeries, k: int, a: Any, b: Any) -> Scaled | None:
    # the largest factor is k + 1 where one is a derivative, and goes away with the division by that
    return series.total(*convolution(series, k, a, b), largest=True)


def quotient(series: PowerSeries, k: int, a: Any, b: Any) -> Scaled | None:
    """z·b = a."""
    numerator = series.coefficient(a, k)
    if k and type(b) is Node and b.moves:
        z = series.node(aten.div.Tensor, (a, b))
        known = [series.times(MINUS, part) for part in convolution(series, k, b, z, first=1)]
        numerator = series.total(numerator, *known)
    return series.over(numerator, series.coefficient(b, 0))


def inverse(series: PowerSeries, k: int, x: Node) -> Scaled | None:
    """z·x = 1."""
    if k == 0:
        return series.over(scaled(1), series.coefficient(x, 0))
    z = series.node(aten.reciprocal.default, (x,))
    rest = series.total(*convolution(series, k, x, z, first=1))
    return series.times(MINUS, series.times(rest, series.coefficient(z, 0)))


def sum_of(series: PowerSeries, k: int, a: Any, b: Any, factor: Any = 1) -> Scaled | None:
    return series.total(series.coefficient(a, k), series.times(scaled(factor), series.coefficient(b, k)))


def choice(series: PowerSeries, k: int, condition: Node, a: Any, b: Any) -> Scaled | None:
    """Of each coefficient the one or the other. A factor that both have, or the only one has, is taken out."""
    given = series.coefficient(a, k), series.coefficient(b, k)
    factors = {c.factor for c in given if c is not None}
    if not factors:
        return None
    factor = factors.pop() if len(factors) == 1 else 1
    chosen = [series.plain(c if c is None or factor == 1 else scaled(1, c.value)) for c in given]
    kinds = [series.is_tensor(x) for x in chosen]
    if not any(kinds):
        chosen[1], kinds[1] = number_like(series, (a, b, *condition.operands), chosen[1]), True
    op = aten.where.self if all(kinds) else aten.where.ScalarOther if kinds[0] else aten.where.ScalarSelf
    return scaled(factor, series.builder.emit(op, (series.plain(series.coefficient(condition, 0)), *chosen)))


def number_like(series: PowerSeries, nodes: Sequence[Any], number: Any) -> Value:
    """A number as a tensor, like what the nodes that it was computed by begin with."""
    for node in nodes:
        if type(node) is Node and series.is_tensor(like := series.plain(series.coefficient(node, 0))):
            zeros = series.builder.emit(aten.zeros_like.default, (like,))
            return zeros if number == 0 else series.builder.emit(aten.add.Tensor, (zeros, number))
    within = [a for node in nodes if type(node) is Node for a in node.operands]
    if not within:
        raise Untraceable(aten.where.self)
    return number_like(series, within, number)


def by_kernel(
    op: OpOverload, factor: Callable[[Any], Any], series: PowerSeries, k: int, grad: Any, y: Any
) -> Scaled | None:
    """``grad * factor(y)``, whose kernel is less than what the first coefficient of the factor is made of."""
    h = series.traced(factor, (y,)) if type(y) is Node else None
    last, y_0 = series.coefficient(grad, k), series.plain(series.coefficient(y, 0))
    if h is None or last is None or not series.is_tensor(last.value) or not series.is_tensor(y_0):
        return product(series, k, grad, factor(y) if h is None else h)
    parts = convolution(series, k, h, grad, first=1)
    return series.total(scaled(last.factor, series.builder.emit(op, (last.value, y_0))), *parts, largest=True)


RECURRENCES: dict[Any, Callable[..., Scaled | None]] = {
    DERIVATIVE: derivative,
    aten.mul.Tensor: product,
    aten.div.Tensor: quotient,
    aten.reciprocal.default: inverse,
    aten.add.Tensor: sum_of,
    aten.sub.Tensor: lambda series, k, a, b: sum_of(series, k, a, b, -1),
    aten.rsub.Tensor: lambda series, k, a, b, alpha=1: sum_of(series, k, b, a, -alpha),
    aten.rsub.Scalar: lambda series, k, a, b, alpha=1: sum_of(series, k, b, a, -alpha),
    aten.neg.default: lambda series, k, x: series.times(MINUS, series.coefficient(x, k)),
    aten.where.self: choice,
    aten.where.ScalarOther: choice,
    aten.where.ScalarSelf: choice,
    aten.zeros_like.default: lambda series, k, x: None,
    aten.tanh_backward.default: partial(by_kernel, aten.tanh_backward.default, lambda y: 1 - y * y),
    aten.sigmoid_backward.default: partial(by_kernel, aten.sigmoid_backward.default, lambda y: y - y * y),
}

#: What an operator is made of, as a function of its operands; None: of no others, with these.
DEFINITIONS: dict[Any, Callable[..., Any]] = {}
#: Formulas that take the place of the table's where these would take more: functions of the derivative of the one
#: operand that is a tensor, of all operands, and of the result.
FORMULAS: dict[Any, Callable[..., Any]] = {}
#: The operators whose formulas in the table are traced: those of which the door makes programs, and some like them.
TRACEABLE = frozenset(op for kinds in OPERATORS.values() for op in kinds.values()) | {
    aten.tanh_backward.default, aten.sigmoid_backward.default, aten.silu.default,
    aten.erfinv.default, aten.asinh.default, aten.acosh.default, aten.atanh.default,
}  # fmt: skip
