"""What one small operation costs under each transform, and what one call of a transform costs, against torch.func.

    python benchmarks/per_op.py [--quick] [--case NAME ...] [--device cuda]

The cost per operation is the slope between a short and a long chain of small operations, so that it is free of what
a call costs by itself; the cost of a call is the time of a chain of a single operation. On a CUDA device, launches are
asynchronous and the operations tiny: what shows is the host's cost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.func
from timing import Spread, assert_same_results, interleave, machine, ratio, table
from torch import Tensor

import functrans

Chain = Callable[[Tensor], Tensor]
APIS: dict[str, Any] = {"functrans": functrans, "torch.func": torch.func}


class Case(NamedTuple):
    """``transform(api, chain)`` is called with tensors of the shapes given."""

    transform: Callable[[Any, Chain], Callable[..., Any]]
    shapes: tuple[tuple[int, ...], ...]
    operands: str = "inputs"


def _jvp(api: Any, function: Callable[..., Any]) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, t: api.jvp(function, (x,), (t,))


def _tangent(api: Any, function: Callable[..., Any], t: Tensor) -> Callable[[Tensor], Any]:
    return lambda x: api.jvp(function, (x,), (t,))[1]


CASES = {
    "grad": Case(lambda api, f: api.grad(f), ((),)),
    "grad grad": Case(lambda api, f: api.grad(api.grad(f)), ((),)),
    "vmap": Case(lambda api, f: api.vmap(f), ((8,),)),
    "vmap vmap": Case(lambda api, f: api.vmap(api.vmap(f)), ((4, 8),)),
    "vmap grad": Case(lambda api, f: api.vmap(api.grad(f)), ((8,),)),
    "grad vmap": Case(lambda api, f: api.grad(lambda x: api.vmap(f)(x).sum()), ((8,),)),
    "jvp": Case(_jvp, ((), ())),
    "jvp jvp": Case(lambda api, f: lambda x, t: api.jvp(_tangent(api, f, t), (x,), (t,)), ((), ())),
    "jvp grad": Case(lambda api, f: _jvp(api, api.grad(f)), ((), ())),
    "grad jvp": Case(lambda api, f: lambda x, t: api.grad(_tangent(api, f, t))(x), ((), ())),
    "vmap jvp": Case(lambda api, f: api.vmap(_jvp(api, f)), ((8,), (8,))),
    "jvp vmap": Case(lambda api, f: _jvp(api, api.vmap(f)), ((8,), (8,))),
    "vmap jvp grad": Case(lambda api, f: api.vmap(_jvp(api, api.grad(f))), ((8,), (8,))),
    "grad, constants": Case(lambda api, f: api.grad(f), ((),), "constants"),
    "jvp, constants": Case(_jvp, ((), ()), "constants"),
    "grad, numbers": Case(lambda api, f: api.grad(f), ((),), "numbers"),
    "jvp, numbers": Case(_jvp, ((), ()), "numbers"),
}


def make_chain(length: int, operands: str, scale: Tensor, shift: Tensor) -> Chain:
    """A function of ``length`` small pointwise operations, half of them with a second operand.

    That is the function's input, as much transformed as the first; or a constant, captured from outside; or a Python number.
    """

    def chain(start: Tensor) -> Tensor:
        times, plus = {"inputs": (start, start), "constants": (scale, shift), "numbers": (1.25, 0.5)}[operands]
        x = start
        for i in range(length):
            kind = i % 4
            if kind == 0:
                x = torch.sin(x)
            elif kind == 1:
                x = x * times
            elif kind == 2:
                x = torch.tanh(x)
            else:
                x = x + plus
        return x

    return chain


def calls(case: Case, length: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The case for every API, on the same values."""
    generator = torch.Generator().manual_seed(length)
    values = [torch.rand(shape, generator=generator, dtype=dtype).to(device) for shape in case.shapes]
    scale, shift = (torch.tensor(number, dtype=dtype, device=device) for number in (1.25, 0.5))
    chain = make_chain(length, case.operands, scale, shift)

    def call(api: Any) -> Callable[[], Any]:
        return lambda: case.transform(api, chain)(*values)

    return {name: call(api) for name, api in APIS.items()}


class Result(NamedTuple):
    """Microseconds per operation and per call by API, with the ratios functrans / torch.func."""

    per_op: dict[str, float]
    per_op_ratio: Spread
    per_call: dict[str, float]
    per_call_ratio: Spread


def measure(case: Case, short: int, long: int, rounds: int, device: str) -> Result:
    """Compare the results, then time."""
    for length in (1, short, long):
        double = calls(case, length, device, torch.float64)
        assert_same_results({name: call() for name, call in double.items()})
    candidates = {
        (name, length): call
        for length in (1, short, long)
        for name, call in calls(case, length, device, torch.float32).items()
    }
    times = interleave(candidates, rounds)
    slopes = {
        name: [1e6 * (b - a) / (long - short) for a, b in zip(times[name, short], times[name, long])] for name in APIS
    }
    single = {name: [1e6 * seconds for seconds in times[name, 1]] for name in APIS}
    return Result(
        {name: statistics.median(values) for name, values in slopes.items()},
        ratio(slopes["functrans"], slopes["torch.func"]),
        {name: statistics.median(values) for name, values in single.items()},
        ratio(single["functrans"], single["torch.func"]),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost per operation and per call, functrans against torch.func.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shorter chains")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help=f"one of: {', '.join(CASES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    short, long, rounds = (8, 32, 5) if options.quick else (16, 96, 15)

    rows, failed = [], []
    for name in options.case or CASES:
        try:
            result = measure(CASES[name], short, long, rounds, options.device)
        except Exception as error:  # noqa: BLE001 - one case that fails must not hide the others
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        rows.append(
            [
                name,
                *(f"{result.per_op[api]:.1f}" for api in APIS),
                f"{result.per_op_ratio:.2f}",
                *(f"{result.per_call[api]:.0f}" for api in APIS),
                f"{result.per_call_ratio:.2f}",
            ]
        )
        print(f"  {name}: done", file=sys.stderr, flush=True)
    print(f"{machine(options.device)}; chains of {short} and {long} operations, {rounds} rounds.")
    print("Microseconds; ratios are functrans / torch.func: median of the rounds (quartiles).\n")
    header = ["transform", *(f"{api}, per op" for api in APIS), "ratio", *(f"{api}, per call" for api in APIS), "ratio"]
    print(table(header, rows))
    for failure in failed:
        print(f"\nFAILED {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
