"""The compositions that every operator is put through, each a function of a backend.

A backend has ``vjp``, ``jvp`` and ``vmap``: functrans, torch.func, or ``plain.Plain``. ``make_case`` gives a function
of the backend, so that the same composition of the same operator on the same values can be run by each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plain import Plain
from torch import Tensor

COMPOSITIONS = ("vjp", "jvp", "vmap", "vmap(vjp)", "jvp(vjp)", "vjp(vjp)", "vmap(jvp)", "vmap(vmap)")


def in_dims_of(count: int, mixed: bool, index: int) -> tuple[int | None, ...]:
    if not mixed:
        return (0,) * count
    if count == 1:
        return (-1,)
    return tuple(-1 if (i + index) % 2 == 0 else None for i in range(count))


def batch(rows: list[list[Tensor]], dims: tuple[int | None, ...]) -> list[Tensor]:
    return [torch.stack(leaf, d) if d is not None else leaf[0].clone() for leaf, d in zip(zip(*rows), dims)]


def make_case(problem: Any, composition: str, mixed: bool) -> Callable[[Any], tuple[Any, list[Tensor]]] | None:
    """``case(backend)`` gives the composition's result, and the leaves as the operator left them."""
    p = problem
    count = len(p.leaves)
    if composition not in ("vmap", "vmap(vmap)") and not (p.diff and p.float_outputs):
        return None
    if count == 0 or not p.out:
        return None
    randomness = "same" if p.random else "error"
    float_out = [p.out[i] for i in p.float_outputs]

    def pulled(backend: Any, leaves: list[Tensor], cotangents: tuple[Tensor, ...]) -> Any:
        primals, f = p.split(leaves)
        out, pullback = backend.vjp(f, *primals)
        return tuple(out), tuple(pullback(cotangents))

    if composition == "vjp":
        cotangents = p.random_like(float_out)

        def run(backend: Any, leaves: list[Tensor]) -> Any:
            return pulled(backend, leaves, cotangents)

        return lambda backend: _run(p, backend, run, p.leaves)
    if composition == "jvp":
        tangents = p.random_like(p.leaves[j] for j in p.diff)

        def run_jvp(backend: Any, leaves: list[Tensor]) -> Any:
            primals, f = p.split(leaves)
            return backend.jvp(f, primals, tangents)

        return lambda backend: _run(p, backend, run_jvp, p.leaves)
    if composition in ("jvp(vjp)", "vjp(vjp)"):
        cotangents = p.random_like(float_out)
        size = len(cotangents)

        def gradient(backend: Any, leaves: list[Tensor], *args: Tensor) -> tuple[Tensor, ...]:
            _, f = p.split(leaves)
            return tuple(backend.vjp(f, *args[size:])[1](args[:size]))

        tangents = p.random_like((*cotangents, *(p.leaves[j] for j in p.diff)))
        second = p.random_like(p.leaves[j] for j in p.diff)

        def run_second(backend: Any, leaves: list[Tensor]) -> Any:
            args = (*cotangents, *(leaves[j] for j in p.diff))
            if composition == "jvp(vjp)":
                return backend.jvp(lambda *a: gradient(backend, leaves, *a), args, tangents)
            out, pullback = backend.vjp(lambda *a: gradient(backend, leaves, *a), *args)
            return tuple(out), tuple(pullback(second))

        return lambda backend: _run(p, backend, run_second, p.leaves)

    if any(leaf.layout != torch.strided for leaf in p.leaves):
        return None  # there is no batch of sparse tensors
    rows = p.rows()
    dims = in_dims_of(count, mixed, p.index)
    if composition == "vmap":
        return lambda backend: _run(
            p, backend, lambda b, leaves: b.vmap(p.call, in_dims=dims, randomness=randomness)(*leaves), batch(rows, dims)
        )
    if composition == "vmap(vmap)":
        outer = (0,) * count if not mixed else tuple(None if d is None else 0 for d in dims)
        grid = [batch(order, dims) for order in (rows[:2], rows[:0:-1])]

        def run_grid(backend: Any, leaves: list[Tensor]) -> Any:
            inner = backend.vmap(p.call, in_dims=dims, randomness=randomness)
            return backend.vmap(inner, in_dims=outer, randomness=randomness)(*leaves)

        return lambda backend: _run(p, backend, run_grid, batch(grid, outer))
    # vmap(vjp) and vmap(jvp): the cotangents or tangents are batched as well
    directions = float_out if composition == "vmap(vjp)" else [p.leaves[j] for j in p.diff]
    extra = [torch.stack(v) for v in zip(*(p.random_like(directions) for _ in rows))]

    def run_rows(backend: Any, leaves: list[Tensor]) -> Any:
        def one(*args: Tensor) -> Any:
            inner, direction = list(args[:count]), tuple(args[count:])
            if composition == "vmap(vjp)":
                return pulled(backend, inner, direction)
            primals, f = p.split(inner)
            return backend.jvp(f, primals, direction)

        all_dims = dims + (0,) * len(extra)
        return backend.vmap(one, in_dims=all_dims, randomness=randomness)(*leaves, *extra)

    return lambda backend: _run(p, backend, run_rows, batch(rows, dims))


def _run(problem: Any, backend: Any, run: Callable[..., Any], leaves: list[Tensor]) -> tuple[Any, list[Tensor]]:
    mine = [leaf.clone() for leaf in leaves]
    torch.manual_seed(problem.seed)
    out = run(backend, mine)
    if backend is not Plain and problem.structure != problem.eager_structure:
        raise AssertionError(f"output structure {problem.structure}, eager has {problem.eager_structure}")
    return out, mine
