"""Operands that are given by their names, to functions that have a short way in: beside a loop with the same calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functrans import grad, jvp, vmap
from functrans.core.stack import interpreter_stack
from functrans.programs.torch_functions import BINARY, DIRECT, JOINING, UNARY

DOUBLE = torch.float64
A, B = (torch.rand(4, 2, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(i)) * 0.5 + 0.2 for i in (0, 1))
close = partial(torch.testing.assert_close, equal_nan=True)
#: By name of a parameter: what is given for it, of two tensors.
GIVEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "input": lambda a, b: a, "other": lambda a, b: b, "exponent": lambda a, b: 2, "dim": lambda a, b: 0,
    "tensors": lambda a, b: [a, b], "keepdim": lambda a, b: True, "mat2": lambda a, b: b.T, "dim0": lambda a, b: 0,
    "dim1": lambda a, b: 1, "index": lambda a, b: 1, "size": lambda a, b: (2, 3), "shape": lambda a, b: (6,),
    "dims": lambda a, b: (1, 0), "start": lambda a, b: 0, "length": lambda a, b: 1, "min": lambda a, b: 0.3,
}  # fmt: skip


def calls() -> Iterator[Any]:
    """Every function and method with a short way in, with none, some and all of its operands by name."""
    for name in sorted({*UNARY, *BINARY, *DIRECT, *JOINING, "pow"} - {n for n in DIRECT if n.endswith("_")}):
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            arguments = getattr(packet, overload)._schema.arguments
            needed = [a for a in arguments if not a.has_default_value() or a.name in ("dim", "keepdim")]
            names = ["input" if a.name == "self" else a.name for a in needed]
            if any(a.is_out for a in arguments) or not all(n in GIVEN for n in names):
                continue
            for owner in (torch, Tensor):
                for count in range(owner is Tensor, len(names)):
                    if hasattr(owner, name):
                        label = f"{owner.__name__}.{name}.{overload}, {count} by place"
                        yield pytest.param(getattr(owner, name), names, count, id=label)


@pytest.mark.parametrize(("function", "names", "count"), list(calls()))
def test_operands_by_name(function: Callable[..., Any], names: list[str], count: int) -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        values = [GIVEN[name](a, b) for name in names]
        named = dict(zip(names[count:], values[count:], strict=True))
        return function(*values[:count], **named)  # type: ignore[no-any-return]

    try:
        expected = [f(a, b) for a, b in zip(A, B, strict=True)]
    except (TypeError, RuntimeError, IndexError):  # names that PyTorch does not take together
        with pytest.raises((TypeError, RuntimeError, IndexError)):
            vmap(f)(A, B)
        assert interpreter_stack() == []
        return
    if not isinstance(expected[0], Tensor):
        pytest.skip("several outputs")
    close(vmap(f)(A, B), torch.stack(expected))
    close(vmap(lambda b: f(A[0], b))(B), torch.stack([f(A[0], b) for b in B]))
    close(vmap(lambda a: f(a, B[0]))(A), torch.stack([f(a, B[0]) for a in A]))
    if expected[0].is_floating_point():
        close(jvp(f, (A[0], B[0]), (B[0], A[0]))[0], expected[0])


def test_derivatives_of_operands_by_name() -> None:
    def f(x: Tensor) -> Tensor:
        y = torch.add(input=x, other=2.0).mul(other=x)
        return torch.pow(input=torch.sigmoid(input=y), exponent=2).sub(other=x).sum()

    leaf = A[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    close(grad(f)(A[0]), expected)
    close(vmap(grad(f))(A)[0], expected)
    close(vmap(lambda x: nn.functional.relu(input=x - 0.4))(A), (A - 0.4).clamp_min(0))


def test_what_is_left_out_is_pytorchs_error() -> None:
    wrong: list[Any] = [torch.add, lambda x: x.pow(), lambda x: torch.sub(other=x), lambda x: torch.sigmoid()]
    for call in wrong:
        with pytest.raises(TypeError):
            vmap(call)(A)
        assert interpreter_stack() == []
