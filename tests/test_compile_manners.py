"""What torch.compile is told of each transform is what the transform does."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import functrans as ft
from functrans.api.compiled import Manner, manner_of

x = torch.tensor([0.3, 1.0, 2.0])
rows = torch.stack([x, 2 * x])

#: A call of each transform, and, where that returns a function first, one of that function.
CALLS: dict[Callable[..., Any], tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    **dict.fromkeys((ft.vjp, ft.linearize, ft.linear_transpose), (lambda T, f: T(f, x), None)),
    ft.jvp: (lambda T, f: T(f, (x,), (x,)), None),
    ft.jet: (lambda T, f: T(f, (x,), ([x],)), None),
    **dict.fromkeys(
        (ft.grad, ft.grad_and_value, ft.value_and_grad, ft.jacrev, ft.jacrev_and_value, ft.jacfwd, ft.jacfwd_and_value,
         ft.hessian, ft.laplacian, ft.bilaplacian, ft.functionalize, ft.count, ft.reap),
        (lambda T, f: T(f), lambda made: made(x)),
    ),
    **dict.fromkeys((ft.vmap, ft.per_example_norms), (lambda T, f: T(f, in_dims=0), lambda made: made(rows))),
    ft.chunk_vmap: (lambda T, f: T(f, chunks=2), lambda made: made(rows)),
    ft.clipped_grad: (lambda T, f: T(f, bound=1.0, in_dims=(None, 0)), lambda made: made(x, rows)),
    ft.lowp: (lambda T, f: T(f, torch.bfloat16), lambda made: made(x)),
    ft.bounds: (lambda T, f: T(f), lambda made: made(x, x + 1)),
    ft.plant: (lambda T, f: T(f, {}), lambda made: made(x)),
    ft.condition: (lambda T, f: T(f, {}), lambda made: made(x)),
    ft.log_density: (lambda T, f: T(f), lambda made: made({}, x)),
}  # fmt: skip


def test_every_transform_that_is_traced_is_here() -> None:
    functions = filter(inspect.isfunction, (getattr(ft, name) for name in ft.__all__))
    traced = {f for f in functions if re.search(r"\bTRACED\(|by_(rows|columns)\(|gradients\(", inspect.getsource(f))}
    assert traced == set(CALLS)


@pytest.mark.parametrize("transform", CALLS, ids=lambda transform: transform.__name__)
def test_the_manner_of_a_transform(transform: Callable[..., Any]) -> None:
    call, call_what_it_made = CALLS[transform]
    recorded: list[bool] = []

    def func(x: Any, *rest: Any) -> Any:
        recorded.append(torch.is_grad_enabled())
        return x.sum() * 3

    with torch.no_grad():
        out = call(transform, func)
        at_once = bool(recorded)
        if call_what_it_made is not None:
            out = call_what_it_made(out)
    returned = out if isinstance(out, tuple) else (out,)
    told = manner_of(transform)
    assert told == Manner(at_once, any(map(callable, returned)), all(recorded), told.once)
    assert len(recorded) == 1 or not told.once
