"""Lines around functions of one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.api.transforms import jvp
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.interval_rules.level import Ends, ends, image
from functrans.shipped.relaxations.level import RELAXATIONS, Affine, OperatorCall, Relaxation
from functrans.shipped.relaxations.lines import (
    Line,
    Lines,
    concave,
    convex,
    finite,
    kinked,
    mean_value,
    negated,
    s_shaped,
)  # fmt: skip

aten = torch.ops.aten

Between = Callable[[Tensor, Tensor], Lines]
#: where a number that is to be square-rooted is taken from, so that the root has a derivative
TINY = 1e-30


def shaped(op: OpOverload, lines: Callable[..., Between], start: float = -math.inf, end: float = math.inf) -> None:
    """``op`` has lines of its argument's interval, inside ``start`` and ``end``; ``lines`` is given the others."""

    def relaxation(call: OperatorCall, out: Ends) -> Relaxation | None:
        if call.positions != {0}:
            return None
        x, *rest = call.args
        low, high = (t if math.isinf(start) and math.isinf(end) else t.clamp(start, end) for t in ends(x))
        return finite(lines(*rest, **call.kwargs), low, high, out)

    RELAXATIONS.add(op, relaxation)


def unit(x: Tensor) -> Tensor:
    """``x`` between 0 and 1, without the two: of the logarithms and roots of which a derivative would be infinite."""
    return x.clamp(TINY, 1 - torch.finfo(x.dtype).eps)


def always(lines: Between) -> Callable[..., Between]:
    return lambda *args, **kwargs: lines


# ------------------------------------------------------------------------------------------- bent one way

ROOT_OF_PI = math.sqrt(math.pi)
_f: Callable[[Tensor], Tensor]
for _op, _f, _slope in (
    (aten.exp.default, torch.exp, torch.exp),
    (aten.exp2.default, torch.exp2, lambda x: math.log(2) * x.exp2()),
    (aten.expm1.default, torch.expm1, torch.exp),
    (aten.cosh.default, torch.cosh, torch.sinh),
    (aten.square.default, torch.square, lambda x: 2 * x),
):
    shaped(_op, always(convex(_f, _slope)))
for _op, _f, _slope, _start in (
    (aten.sqrt.default, torch.sqrt, lambda x: x.rsqrt() / 2, 0.0),
    (aten.log.default, torch.log, torch.reciprocal, 0.0),
    (aten.log2.default, torch.log2, lambda x: 1 / (math.log(2) * x), 0.0),
    (aten.log10.default, torch.log10, lambda x: 1 / (math.log(10) * x), 0.0),
    (aten.log1p.default, torch.log1p, lambda x: 1 / (1 + x), -1.0),
    (aten.acosh.default, torch.acosh, lambda x: (x * x - 1).rsqrt(), 1.0),
    (aten.log_sigmoid.default, torch.nn.functional.logsigmoid, lambda x: (-x).sigmoid(), -math.inf),
):
    shaped(_op, always(concave(_f, _slope)), _start)
shaped(aten.rsqrt.default, always(convex(torch.rsqrt, lambda x: -(x.rsqrt() ** 3) / 2)), 0.0)


def around_softplus(beta: float = 1.0, threshold: float = 20.0) -> Between:
    """It is the identity from ``threshold / beta`` on, and a little more before.

    With a negative ``beta`` it is that of the positive one, turned about 0.
    """
    if beta < 0:
        positive = around_softplus(-beta, threshold)

        def about_zero(low: Tensor, high: Tensor) -> Lines:
            below, above = positive(-high, -low)
            return Line(above.slope, -above.offset), Line(below.slope, -below.offset)

        return about_zero

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x, beta, threshold)

    def lines(low: Tensor, high: Tensor) -> Lines:
        found = convex(f, lambda x: (beta * x).sigmoid())(low, high)
        one = torch.ones_like(low)
        straight = Line(one, torch.zeros_like(low)), Line(one, f(low) - low)
        reached = high * beta > threshold
        return tuple(  # type: ignore[return-value]
            Line(*(torch.where(reached, a, b) for a, b in zip(s, t, strict=True)))
            for s, t in zip(straight, found, strict=True)
        )

    return lines


shaped(aten.softplus.default, around_softplus)

# ------------------------------------------------------------------------------------------- bent one way and the other


def shifted(lines: Between, by: float) -> Between:
    """Of ``f + by``, from those of ``f``."""

    def moved(low: Tensor, high: Tensor) -> Lines:
        below, above = lines(low, high)
        return Line(below.slope, below.offset + by), Line(above.slope, above.offset + by)

    return moved


def turned(lines: Between) -> Between:
    """Of ``-f``, from those of ``f``."""
    return lambda low, high: negated(*lines(low, high))


around_tanh = s_shaped(torch.tanh, lambda x: 1 - x.tanh() ** 2, lambda s: unit(1 - s).sqrt().atanh())
around_sigmoid = s_shaped(
    lambda x: x.sigmoid() - 0.5,
    lambda x: x.sigmoid() * (-x).sigmoid(),
    lambda s: 2 * unit(1 - 4 * s).sqrt().atanh(),
)
around_erf = s_shaped(
    torch.erf, lambda x: 2 / ROOT_OF_PI * (-x * x).exp(), lambda s: (-unit(s * ROOT_OF_PI / 2).log()).sqrt()
)
shaped(aten.tanh.default, always(around_tanh))
shaped(aten.sigmoid.default, always(shifted(around_sigmoid, 0.5)))
shaped(aten.erf.default, always(around_erf))
shaped(aten.erfc.default, always(shifted(turned(around_erf), 1.0)))
shaped(aten.atan.default, always(s_shaped(torch.atan, lambda x: 1 / (1 + x * x), lambda s: (1 / unit(s) - 1).sqrt())))
shaped(
    aten.asinh.default,
    always(s_shaped(torch.asinh, lambda x: (1 + x * x).rsqrt(), lambda s: (unit(s) ** -2 - 1).sqrt())),
)
# those that are flattest at 0, turned over
shaped(
    aten.sinh.default,
    always(turned(s_shaped(lambda x: -x.sinh(), lambda x: -x.cosh(), lambda s: more_than_one(-s).acosh()))),
)
shaped(
    aten.asin.default,
    always(
        turned(
            s_shaped(
                lambda x: -x.asin(), lambda x: -(1 - x * x).rsqrt(), lambda s: (1 - more_than_one(-s) ** -2).sqrt()
            )
        )
    ),
    -1.0, 1.0,
)  # fmt: skip
shaped(
    aten.atanh.default,
    always(
        turned(
            s_shaped(lambda x: -x.atanh(), lambda x: -1 / (1 - x * x), lambda s: (1 - 1 / more_than_one(-s)).sqrt())
        )
    ),
    -1.0, 1.0,
)  # fmt: skip


def more_than_one(x: Tensor) -> Tensor:
    return x.clamp(min=1 + torch.finfo(x.dtype).eps)


def around_power(exponent: Any) -> Between:
    """Of x to a power; where that is not defined there is nothing to bound."""
    f: Callable[[Tensor], Tensor] = lambda x: x**exponent
    slope: Callable[[Tensor], Tensor] = lambda x: exponent * x ** (exponent - 1)
    if exponent == 0:
        return lambda low, high: (Line(0 * low, torch.ones_like(low)), Line(0 * low, torch.ones_like(low)))
    if exponent == 1:
        return lambda low, high: (Line(torch.ones_like(low), 0 * low), Line(torch.ones_like(low), 0 * low))
    whole = exponent == int(exponent)
    if exponent < 0:
        return on_one_side(convex(f, slope), odd=whole and exponent % 2 == 1) if whole else clamped(convex(f, slope))
    if not whole:
        return clamped((concave if exponent < 1 else convex)(f, slope))
    if exponent % 2 == 0:
        return convex(f, slope)
    root = 1 / (exponent - 1)
    return turned(
        s_shaped(lambda x: -(x**exponent), lambda x: -slope(x), lambda s: (-s / exponent).clamp(min=TINY) ** root)
    )


def clamped(lines: Between) -> Between:
    return lambda low, high: lines(low.clamp(min=0), high.clamp(min=0))


def on_one_side(lines: Between, odd: bool) -> Between:
    """From the lines right of 0, those left of it; none where 0 is inside."""

    def both_sides(low: Tensor, high: Tensor) -> Lines:
        left = high < 0
        none = (low <= 0) & (high >= 0)
        near, far = torch.where(none, 1.0, torch.where(left, -high, low)), torch.where(left, -low, high)
        below, above = lines(near, torch.where(none, 1.0, far))
        mirrored = [Line(-line.slope, line.offset) for line in (below, above)]
        of_left = negated(*mirrored) if odd else mirrored
        return tuple(  # type: ignore[return-value]
            Line(
                torch.where(none, math.nan, torch.where(left, a.slope, b.slope)), torch.where(left, a.offset, b.offset)
            )
            for a, b in zip(of_left, (below, above), strict=True)
        )

    return both_sides


shaped(aten.pow.Tensor_Scalar, around_power)
shaped(aten.reciprocal.default, always(around_power(-1)))

# ------------------------------------------------------------------------------------------- kinks

shaped(aten.relu.default, always(kinked(0.0, 0.0, 1.0)))
shaped(aten.abs.default, always(kinked(0.0, -1.0, 1.0)))
shaped(aten.leaky_relu.default, lambda slope=0.01: kinked(0.0, slope, 1.0))
shaped(aten.clamp_min.default, lambda least: kinked(least, 0.0, 1.0, least))
shaped(aten.clamp_max.default, lambda most: kinked(most, 1.0, 0.0, most))

# ------------------------------------------------------------------------------------------- by the bounds of slopes


def smooth(*ops: OpOverload) -> None:
    """Lines by the mean value theorem, from the interval of the derivative."""
    for op in ops:

        def relaxation(call: OperatorCall, out: Ends, op: OpOverload = op) -> Relaxation | None:
            (_, *rest), kwargs = call.args, call.kwargs

            def f(x: Tensor) -> Tensor:
                return op(x, *rest, **kwargs)

            def slope(x: Tensor) -> Tensor:
                return jvp(f, (x,), (torch.ones_like(x),))[1]

            low, high = ends(call.args[0])
            def lines(low: Tensor, high: Tensor) -> Lines:
                return mean_value(f, low, high, image(slope, low, high), out)

            return finite(lines, low, high, out)

        RELAXATIONS.add(op, relaxation)


smooth(
    aten.sin.default, aten.cos.default, aten.silu.default, aten.mish.default, aten.gelu.default, aten.hardswish.default
)


@RELAXATIONS.register(aten.threshold_backward.default)
def let_through(call: OperatorCall, out: Ends) -> Relaxation | None:
    """A number, or 0: between its chords with 0, where it is not known which."""
    if call.positions != {0, 1}:
        return None
    grad, x, threshold = call.args
    (low, high), (least, most) = ends(grad), ends(x)
    lines = kinked(0.0, 1.0, 0.0)(low, high)[0], kinked(0.0, 0.0, 1.0)(low, high)[1]
    passes, closed = least > threshold, most <= threshold

    def known(line: Line) -> Affine:
        slope = torch.where(passes, 1.0, torch.where(closed, 0.0, line.slope))
        offset = torch.where(passes | closed, 0.0, line.offset)
        return Affine(lambda grad, x: slope * grad + offset, pointwise=True)

    return known(lines[0]), known(lines[1])
