"""The level of linear relaxations: beside its interval every value has two affine functions, one below and one above.

NOTE [Bounds on the way back]
Intervals forget where a number came from, so that ``x - x`` may be anything from ``low - high`` on. Here every operator
is kept as a ``Node``: its value lies between two affine functions of the values that it was computed from. The bound of
a sum ``rows · y`` then goes back from ``y`` to the inputs, as a cotangent does: where a row is positive it takes the
function below, where it is negative the one above, and at an input the worst end. What meets on the way cancels.

An affine operator is its own function, and going back through it is its pullback, whatever it is. The functions of a
nonlinear one depend on the interval of its argument; that is made as tight as it gets, by going back from there, before
they are chosen. An operator without such functions is a fresh interval: the way back ends there.

(Zhang et al., Efficient Neural Network Robustness Certification with General Activation Functions, arXiv:1811.00866;
Xu et al., Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond, arXiv:2002.12920.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.api.transforms import vjp
from functrans.api.vmap import vmap
from functrans.core.tensor import WrapperTensor
from functrans.extension.linearity import is_affine
from functrans.operators.defaults import completed
from functrans.operators.rules import RuleTable
from functrans.operators.views import RESHAPES
from functrans.programs.fusible import by_our_rules
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.interval_rules.level import Ends, IntervalLevel, is_interval
from functrans.shipped.relaxations.lines import Line, against
from functrans.shipped.sparsity_rules.moves import MOVES
from functrans.tensors.pytrees import tree_flatten, tree_unflatten

#: operators that move elements, of which the way back says nothing new
MOVED = frozenset((*RESHAPES, *MOVES))


class Affine:
    """An affine function, which is run backwards by its pullback.

    ``pointwise``: it stands for a function of one number, whose interval is as good as that of its argument.
    """

    def __init__(self, f: Callable[..., Tensor], pointwise: bool = False) -> None:
        self.f = f
        self.pointwise = pointwise

    def back(self, sources: Sequence[Node], rows: Tensor, one_sign: bool) -> tuple[Sequence[Tensor], Tensor]:
        offset, pull = vjp(self.f, *(torch.zeros_like(source.low) for source in sources))
        return vmap(pull)(rows), against(rows, offset, one_sign)


#: a function below and one above; the same twice, if that is exact
Relaxation = tuple[Affine | Line, Affine | Line]


class Node:
    """A value between ``low`` and ``high``, and between two affine functions of the values of ``sources``."""

    def __init__(
        self, place: int, ends: Ends, sources: Sequence[Node] = (), relaxation: Any = None, tight: bool = True
    ) -> None:
        #: later ones are made of earlier ones
        self.place = place
        self.low, self.high = ends
        self.sources = sources
        self.relaxation: Relaxation | None = relaxation
        #: whether the way back has nothing to add to ``low`` and ``high``
        self.tight = tight

    def back(self, rows: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """A lower bound of the sums ``rows · y``, [n, *shape], as rows for each of the sources, and what is added."""
        if self.relaxation is not None and self.relaxation[0] is self.relaxation[1]:
            return self.relaxation[0].back(self.sources, rows, False)
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        if self.relaxation is None:
            return (), against(positive, self.low, True) + against(negative, self.high, True)
        below, above = self.relaxation
        of_below, least = below.back(self.sources, positive, True)
        of_above, more = above.back(self.sources, negative, True)
        return [a + b for a, b in zip(of_below, of_above, strict=True)], least + more

    def ends(self) -> Ends:
        """``low`` and ``high`` by the better of the interval and the way back, for each element."""
        n = self.low.numel()
        if not self.tight and n:
            each = torch.eye(n, dtype=self.low.dtype, device=self.low.device).reshape(n, *self.low.shape)
            found = lowest(self, torch.cat([each, -each])).to(self.low.dtype)
            found = torch.where(found.isfinite(), found, math.nan)  # too large a number is no bound
            self.meet(found[:n].reshape(self.low.shape), -found[n:].reshape(self.low.shape))
            self.tight = True
        return self.low, self.high

    def meet(self, low: Tensor, high: Tensor) -> None:
        """Take over bounds from elsewhere, where they are better. (Where they are NaN they say nothing.)

        Rounding may put them outside of what is known, or the wrong way round.
        """
        low, high = torch.fmax(low, self.low), torch.fmin(high, self.high)
        low, high = torch.where(low > self.high, self.high, low), torch.where(high < self.low, self.low, high)
        crossed = low > high
        self.low, self.high = torch.where(crossed, high, low), torch.where(crossed, low, high)


def lowest(node: Node, rows: Tensor) -> Tensor:
    """Lower bounds of the sums ``rows · y``, [n, *shape], over all inputs."""
    found: Any = 0
    waiting = {node.place: (node, rows)}
    while waiting:
        node, rows = waiting.pop(max(waiting))
        parts, more = node.back(rows)
        found = found + more
        for source, part in zip(node.sources, parts, strict=True):
            known = waiting.get(source.place)
            waiting[source.place] = source, part if known is None else known[1] + part
    return found


class RelaxationLevel(IntervalLevel):
    """Intervals whose wrappers carry, beside ``upper``, the ``node`` that says how they depend on others."""

    payload = ("upper", "node")

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.count = 0

    def node(self, *made_of: Any) -> Node:
        self.count += 1
        return Node(self.count, *made_of)

    def input(self, low: Tensor, high: Tensor) -> WrapperTensor:
        return self.carry(low, upper=high, node=self.node((low, high)))

    def output(self, x: Tensor) -> Ends:
        wrapper: Any = self.own(x)
        return self.ends(wrapper if wrapper.node is None else self.tightened(wrapper))

    def tightened(self, x: Any) -> WrapperTensor:
        low, high = x.node.ends()
        return self.carry(low, upper=high, node=x.node)

    def parts(self, wrapper: WrapperTensor) -> dict[str, Any]:
        return {name: part for name, part in super().parts(wrapper).items() if name != "node"}

    def rule_for(self, op: Any) -> Callable[..., Any] | None:
        rule = self.rules.get(op)
        return None if rule is None else relaxing(op, rule)


class OperatorCall:
    """What a relaxation is given: an operator's call, as a function of the intervals among its arguments.

    A wrapper that is passed twice counts twice, so that a product of it with itself is a product of two.
    """

    def __init__(self, level: RelaxationLevel, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.level, self.op = level, op
        self.leaves, self.spec = tree_flatten((list(args), kwargs))
        #: their values now: the way back comes later, when a constant may have been written
        self.values = [level.value_of(a) for a in self.leaves]
        self.places = [i for i, a in enumerate(self.leaves) if is_interval(a)]
        #: their positions among the arguments
        self.positions = {i for i, a in enumerate(args) if any(map(is_interval, tree_flatten(a)[0]))}
        for x in self.intervals:
            if x.node is None and x.dtype.is_floating_point:  # made by hand
                x.node = level.node(level.ends(x))

    @property
    def intervals(self) -> list[Any]:
        return [self.leaves[i] for i in self.places]

    @property
    def args(self) -> list[Any]:
        return tree_unflatten(self.spec, self.leaves)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        return tree_unflatten(self.spec, self.leaves)[1]

    def tighten(self) -> None:
        """Make the intervals as tight as they get."""
        found: dict[int, Any] = {}
        for i in self.places:
            x = self.leaves[i]
            if x.node is not None:
                self.leaves[i] = found[id(x)] if id(x) in found else found.setdefault(id(x), self.level.tightened(x))

    def f(self, output: int, *values: Tensor) -> Any:
        """An output of the operator for these values of the intervals."""
        given = list(self.values)
        for i, value in zip(self.places, values, strict=True):
            given[i] = value
        args, kwargs = tree_unflatten(self.spec, given)
        return tree_flatten(self.op(*args, **kwargs))[0][output]


#: By operator: the relaxation of its first output, of which the interval is known; None where it has none.
RELAXATIONS: RuleTable[Callable[[OperatorCall, Ends], Relaxation | None]] = RuleTable("linear relaxations")
#: By operator: the same in other operators, ``(level, *args, **kwargs)``, which have relaxations.
PARTS: RuleTable[Callable[..., Any]] = RuleTable("operators in parts")


def goes_back(call: OperatorCall) -> bool:
    """Whether a call is affine in its intervals, by the library's own derivative, by which Affine goes back."""
    if not by_our_rules(call.op) or any(x.layout is not torch.strided for x in call.intervals):
        return False
    return is_affine(call.level, call.op, call.args, call.kwargs)


@functools.lru_cache(maxsize=4096)
def relaxing(op: OpOverload, rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for intervals, with a node for each of its results."""
    on_intervals = completed(rule, op, 1)
    parts, relaxation = PARTS.get(op), RELAXATIONS.get(op)
    in_parts = None if parts is None else completed(parts, op, 1)

    def relaxed(level: RelaxationLevel, *args: Any, **kwargs: Any) -> Any:
        call = OperatorCall(level, op, args, kwargs)
        of_numbers = all(x.dtype.is_floating_point for x in call.intervals)
        affine = of_numbers and goes_back(call)
        if not affine:
            call.tighten()
        out = on_intervals(level, *call.args, **call.kwargs)
        results, spec = tree_flatten(out)
        if affine:
            exact = [Affine(functools.partial(call.f, i)) for i in range(len(results))]
            for result, function in zip(results, exact, strict=True):
                attach(call, result, (function, function))
        elif in_parts is not None:
            results[0] = met(level, results[0], in_parts(level, *call.args, **call.kwargs))
        elif of_numbers and relaxation is not None:
            attach(call, results[0], relaxation(call, level.ends(results[0])))
        for result in results:
            attach(call, result, None)
        return tree_unflatten(spec, results)

    return relaxed


def met(level: RelaxationLevel, by_rule: Any, by_parts: Any) -> Any:
    """The better of two results for the same operator; the second one knows what it is made of."""
    if by_rule.upper is None or by_parts.node is None:
        return by_rule
    node = by_parts.node
    of_parts = node.low, node.high
    node.low, node.high = level.ends(by_rule)
    node.meet(*of_parts)
    return level.carry(node.low, upper=node.high, node=node)


def attach(call: OperatorCall, result: Any, relaxation: Relaxation | None) -> None:
    """Give ``result`` its node, if it has none yet."""
    if not is_interval(result) or result.node is not None or not result.dtype.is_floating_point:
        return
    if result.layout is not torch.strided:
        relaxation = None
    sources = () if relaxation is None else [x.node for x in call.intervals]
    moved = call.op in MOVED and all(source.tight for source in sources)
    tight = moved or relaxation is None or relaxation[0].pointwise
    result.node = call.level.node(IntervalLevel.ends(result), sources, relaxation, tight)
