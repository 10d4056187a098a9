"""What one small operation costs under each transform, and what one call of a transform costs, beside its peers.

    python benchmarks/per_op.py [--quick] [--case TEXT ...] [--device cuda]

The cost per operation is the slope between a short and a long chain of small operations, so that it is free of what
a call costs by itself; the cost of a call is the time of a chain of a single operation. On a CUDA device, launches are
asynchronous and the operations tiny: what shows is the host's cost.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.func
from by_hand import chain_by_hand
from in_jax import Compiled, jax, to_jax, usable
from report import Makers, Part, Settings, Table, Target, main, progress
from timing import Call, interleave, ratio
from torch import Tensor
from torch.autograd import forward_ad

import functrans

Chain = Callable[[Any], Any]
Function = Callable[..., Any]
APIS: dict[str, Any] = {"functrans": functrans, "torch.func": torch.func}
COLUMNS = (*APIS, "autograd", "by hand", "jax.jit")


class Case(NamedTuple):
    """``transform(api, chain)`` is called with tensors of the shapes given.

    ``plain(chain)`` is what a user of autograd alone has, if there is such a thing. ``by_hand`` takes the formula of
    the derivatives of this order along a direction: the chain's value, the first and the second derivative.
    """

    transform: Callable[[Any, Chain], Function]
    shapes: tuple[tuple[int, ...], ...]
    plain: Callable[[Chain], Function] | None
    by_hand: Callable[[Chain], Function]
    order: int
    operands: str = "inputs"


def _jvp(api: Any, function: Function) -> Function:
    return lambda x, t: api.jvp(function, (x,), (t,))


def _tangent(api: Any, function: Function, t: Any) -> Function:
    return lambda x: api.jvp(function, (x,), (t,))[1]


def _total(y: Tensor) -> Tensor:
    """The examples of a batch do not depend on each other, so the gradient of the sum has that of each."""
    return y.sum() if y.dim() else y


def _plain_grad(chain: Chain) -> Function:
    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(_total(chain(x)), x)[0]

    return gradient


def _plain_grad_grad(chain: Chain) -> Function:
    def second(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(chain(x), x, create_graph=True)
        return torch.autograd.grad(slope, x)[0]

    return second


def _plain_jvp(chain: Chain) -> Function:
    def pushed(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            result = forward_ad.unpack_dual(chain(forward_ad.make_dual(x, t)))
            return result.primal, result.tangent

    return pushed


def _plain_jvp_grad(chain: Chain) -> Function:
    def product(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach().requires_grad_(), t)
            result = forward_ad.unpack_dual(torch.autograd.grad(_total(chain(dual)), dual)[0])
            return result.primal, result.tangent

    return product


def _plain_grad_jvp(chain: Chain) -> Function:
    def slope(x: Tensor, t: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(chain(forward_ad.make_dual(x, t))).tangent
            return torch.autograd.grad(tangent, x)[0]

    return slope


def _hand_value(formula: Chain) -> Function:
    return lambda x: formula(x)[0]


def _hand_derivative(order: int) -> Callable[[Chain], Function]:
    return lambda formula: lambda x: formula(x, torch.ones_like(x))[order]


def _hand_jvp(formula: Chain) -> Function:
    return lambda x, t: tuple(formula(x, t)[:2])


def _hand_jvp_jvp(formula: Chain) -> Function:
    return lambda x, t: tuple(formula(x, t)[1:])


def _hand_jvp_grad(formula: Chain) -> Function:
    def product(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        _, first, second = formula(x, torch.ones_like(x))
        return first, second * t

    return product


def _hand_grad_jvp(formula: Chain) -> Function:
    return lambda x, t: formula(x, torch.ones_like(x))[2] * t


ONE, BATCH = (), (8,)
_hand_grad = _hand_derivative(1)
CASES = {
    "grad": Case(lambda api, f: api.grad(f), (ONE,), _plain_grad, _hand_grad, 1),
    "grad grad": Case(lambda api, f: api.grad(api.grad(f)), (ONE,), _plain_grad_grad, _hand_derivative(2), 2),
    "vmap": Case(lambda api, f: api.vmap(f), (BATCH,), None, _hand_value, 0),
    "vmap vmap": Case(lambda api, f: api.vmap(api.vmap(f)), ((4, 8),), None, _hand_value, 0),
    "vmap grad": Case(lambda api, f: api.vmap(api.grad(f)), (BATCH,), _plain_grad, _hand_grad, 1),
    "grad vmap": Case(lambda api, f: api.grad(lambda x: api.vmap(f)(x).sum()), (BATCH,), _plain_grad, _hand_grad, 1),
    "jvp": Case(_jvp, (ONE, ONE), _plain_jvp, _hand_jvp, 1),
    "jvp jvp": Case(
        lambda api, f: lambda x, t: api.jvp(_tangent(api, f, t), (x,), (t,)), (ONE, ONE), None, _hand_jvp_jvp, 2
    ),
    "jvp grad": Case(lambda api, f: _jvp(api, api.grad(f)), (ONE, ONE), _plain_jvp_grad, _hand_jvp_grad, 2),
    "grad jvp": Case(
        lambda api, f: lambda x, t: api.grad(_tangent(api, f, t))(x), (ONE, ONE), _plain_grad_jvp, _hand_grad_jvp, 2
    ),
    "vmap jvp": Case(lambda api, f: api.vmap(_jvp(api, f)), (BATCH, BATCH), _plain_jvp, _hand_jvp, 1),
    "jvp vmap": Case(lambda api, f: _jvp(api, api.vmap(f)), (BATCH, BATCH), _plain_jvp, _hand_jvp, 1),
    "vmap jvp grad": Case(
        lambda api, f: api.vmap(_jvp(api, api.grad(f))), (BATCH, BATCH), _plain_jvp_grad, _hand_jvp_grad, 2
    ),
    "grad, constants": Case(lambda api, f: api.grad(f), (ONE,), _plain_grad, _hand_grad, 1, "constants"),
    "jvp, constants": Case(_jvp, (ONE, ONE), _plain_jvp, _hand_jvp, 1, "constants"),
    "grad, numbers": Case(lambda api, f: api.grad(f), (ONE,), _plain_grad, _hand_grad, 1, "numbers"),
    "jvp, numbers": Case(_jvp, (ONE, ONE), _plain_jvp, _hand_jvp, 1, "numbers"),
}
#: functrans / torch.func.
PER_OP_TARGETS = {
    "grad": 1.0,
    "grad grad": 0.7,
    "jvp": 1.0,
    "jvp grad": 0.7,
    "vmap": 2.0,
    "vmap grad": 1.2,
    "vmap jvp grad": 0.8,
    "jvp, numbers": 0.15,
}
PER_CALL_TARGETS = {"grad": 0.5, "vmap": 0.5, "jvp": 0.5, "jvp grad": 0.5}


def make_chain(length: int, operands: str, scale: Any, shift: Any, library: Any = torch) -> Chain:
    """A function of ``length`` small pointwise operations, half of them with a second operand.

    That is the function's input, as much transformed as the first; or a constant, captured from outside; or a Python
    number.
    """

    def chain(start: Any) -> Any:
        times, plus = {"inputs": (start, start), "constants": (scale, shift), "numbers": (1.25, 0.5)}[operands]
        x = start
        for i in range(length):
            kind = i % 4
            if kind == 0:
                x = library.sin(x)
            elif kind == 1:
                x = x * times
            elif kind == 2:
                x = library.tanh(x)
            else:
                x = x + plus
        return x

    return chain


def makers(case: Case, length: int, device: str, dtype: torch.dtype) -> Makers:
    """What computes the case, by the name of its column, on the same values. The formula is first:
    the others must agree.
    """
    generator = torch.Generator().manual_seed(length)
    values = [torch.rand(shape, generator=generator, dtype=dtype).to(device) for shape in case.shapes]
    scale, shift = (torch.tensor(number, dtype=dtype, device=device) for number in (1.25, 0.5))
    chain = make_chain(length, case.operands, scale, shift)
    formula = case.by_hand(chain_by_hand(length, case.operands, scale, shift, case.order))

    def transformed(api: Any) -> Call:
        # the transform is applied in the call: that is a part of what a call costs
        return lambda: case.transform(api, chain)(*values)

    def jitted() -> Call:
        constants = (1.25, 0.5) if case.operands == "numbers" else (to_jax(scale), to_jax(shift))
        return Compiled(case.transform(jax, make_chain(length, case.operands, *constants, jax.numpy)), values)

    found: dict[str, Callable[[], Call]] = {"by hand": lambda: lambda: formula(*values)}
    found |= {name: functools.partial(transformed, api) for name, api in APIS.items()}
    if case.plain is not None:
        plain = case.plain(chain)
        found["autograd"] = lambda: lambda: plain(*values)
    if usable(device):
        found["jax.jit"] = jitted
    return found


def _cell(microseconds: list[float]) -> str:
    """What a compiler has fused costs less per operation than two chains' times can tell apart."""
    median = statistics.median(microseconds)
    return f"{median:.2f}" if median >= 0.1 else "< 0.1"


def run(settings: Settings) -> Part:
    part = Part()
    short, long = (8, 32) if settings.quick else (16, 96)
    lengths = (1, short, long)
    rows: dict[str, list[list[str]]] = {"op": [], "call": []}
    targets: dict[str, list[Target]] = {"op": [], "call": []}
    for name in settings.chosen(list(CASES)):
        case, agree = CASES[name], list(COLUMNS)
        for length in lengths:
            found = part.agreeing(f"{name}, {length} operations", makers(case, length, settings.device, torch.float64))
            agree = [column for column in agree if column in found]
        times: dict[tuple[str, int], list[float]] = {}
        with part.attempt(name):
            calls = {}
            for length in lengths:
                single = makers(case, length, settings.device, torch.float32)
                calls |= {(column, length): single[column]() for column in agree}
            times = interleave(calls, settings.rounds)
        if times:
            microseconds = {
                "op": {
                    c: [1e6 * (b - a) / (long - short) for a, b in zip(times[c, short], times[c, long])] for c in agree
                },
                "call": {c: [1e6 * seconds for seconds in times[c, 1]] for c in agree},
            }
            for kind, limits in (("op", PER_OP_TARGETS), ("call", PER_CALL_TARGETS)):
                of = microseconds[kind]
                cells = [_cell(of[c]) if c in of else "" for c in COLUMNS]
                if APIS.keys() <= of.keys():
                    spread = ratio(of["functrans"], of["torch.func"])
                    cells.append(f"{spread:.2f}")
                    if name in limits:
                        targets[kind].append(Target(f"per {kind}, {name}", spread.median, limits[name]))
                else:
                    cells.append("")
                rows[kind].append([name, *cells])
        progress(name)
    for kind, title, text in (
        ("op", "Cost of an operation", f"The slope between chains of {short} and {long} operations."),
        ("call", "Cost of a call", "One call of the transform with a function of one operation."),
    ):
        if rows[kind]:
            text = (
                f"Microseconds, medians of the rounds. {text} The ratio is functrans / torch.func, with its quartiles."
            )
            part.tables.append(Table(title, text, ["transform", *COLUMNS, "ratio"], rows[kind]))
            part.targets += targets[kind]
    return part


if __name__ == "__main__":
    raise SystemExit(main(run, "Cost per operation and per call, functrans against its peers."))
