"""Derivatives have the precision of their arguments, whatever ``torch.get_default_dtype`` is.

A formula that divides counts, multiplies a mask by a Python number or chooses between two numbers makes a tensor of the
default dtype, and with it rounds a derivative in double precision to single precision. So every operator is
differentiated under two defaults, at equal elements, where derivatives are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from opinfo_problem import Problem
from oracles import operators
from sampling import reseed, sampling
from torch import Tensor

from functrans import jvp, vjp, vmap
from functrans.extend import DERIVATIVES, derivative, overriding

aten = torch.ops.aten
OPERATORS = {name: op for name, op in operators().items() if torch.float64 in op.supported_dtypes("cpu")}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def problem(op: Any) -> Problem | None:
    """The first small sample that has a derivative, with all elements of each argument equal if the operator runs."""
    reseed(0)
    with sampling():
        for index, sample in zip(range(8), op.sample_inputs("cpu", torch.float64, requires_grad=True, set_seed=False)):
            found = Problem(op, sample, index)
            if found.diff and found.float_outputs and 1 < found.leaves[found.diff[0]].numel() < 500:
                break
        else:
            return None
    if any(leaf.layout != torch.strided for leaf in (*found.leaves, *found.out)):
        return None
    equal = [x.flatten()[:1].expand(x.numel()).reshape(x.shape) if j in found.diff else x
             for j, x in enumerate(found.leaves)]  # fmt: skip
    try:
        found.out = found.eager(equal)
        found.leaves = equal
    except RuntimeError:
        found.out = found.eager(found.leaves)
    return found


def derivatives(found: Problem, value: Callable[..., Any] | None = None) -> list[list[Tensor]]:
    """The value, both first derivatives, and the value of two examples."""
    primals, f = found.split(found.leaves)

    def seeded(*xs: Tensor) -> Any:
        reseed(1)
        return f(*xs)

    generator = torch.Generator().manual_seed(3)
    u, v = (
        tuple(torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.dtype) for t in ts)
        for ts in ([found.out[i] for i in found.float_outputs], primals)
    )
    pairs = tuple(torch.stack([x, x]) for x in primals)
    runs: list[Callable[[], Any]] = [
        lambda: seeded(*primals),
        lambda: vjp(seeded, *primals)[1](u),
        lambda: jvp(seeded, primals, v)[1],
        lambda: vmap(seeded, randomness="same")(*pairs),
    ]
    results = []
    for run in runs:
        try:
            results.append(list(run()))
        except Exception:  # noqa: BLE001 - other tests are about that
            results.append([])
    return results


def differs(name: str) -> bool:
    """Whether some derivative depends on the default dtype, though the operator itself does not."""
    found = problem(OPERATORS[name])
    if found is None:
        return False
    results = []
    for dtype in (torch.float32, torch.float64):
        with default_dtype(dtype):
            results.append(derivatives(found))
    same = [
        len(a) == len(b) and all(x.dtype == y.dtype and torch.allclose(x, y, 1e-12, 1e-12, True) for x, y in zip(a, b))
        for a, b in zip(*results, strict=True)
    ]
    return same[0] and not all(same)


@pytest.mark.parametrize("part", range(8))
def test_no_derivative_depends_on_the_default(part: int) -> None:
    assert [name for name in sorted(OPERATORS)[part::8] if differs(name)] == []


def test_one_that_does_would_be_found() -> None:
    def shared(self: Tensor, result: Tensor) -> Tensor:
        chosen = self == result
        return chosen / chosen.sum()

    op = aten.max.default
    assert not differs("max.reduction_no_dim")
    with overriding(DERIVATIVES, op):
        derivative(
            op,
            tangent=lambda self, self_t, result: (self_t * shared(self, result)).sum(),
            self=lambda grad, self, result: grad * shared(self, result),
        )
        assert differs("max.reduction_no_dim")
