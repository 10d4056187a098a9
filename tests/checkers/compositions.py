"""The compositions that every operator is put through, each a function of a backend.

A backend has ``vjp``, ``jvp`` and ``vmap``: functrans, torch.func, or ``plain.Plain``. ``make_case`` gives a function
of the backend, so that the same composition of the same operator on the same values can be run by each.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from plain import Numeric, Plain
from sampling import reseed
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

COMPOSITIONS = ("vjp", "jvp", "vmap", "vmap(vjp)", "jvp(vjp)", "vjp(vjp)", "vmap(jvp)", "vmap(vmap)")
# The same with inputs that require grad, and PyTorch's own backward through the result.
RECORDED = ("backward(vjp)", "backward(jvp)", "backward(vmap)")


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
    p.generator.manual_seed(zlib.crc32(f"{p.op.full_name} {p.index} {composition} {mixed}".encode()))
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

    recorded = composition in RECORDED
    if composition in ("vjp", "backward(vjp)"):

        def run(backend: Any, leaves: list[Tensor]) -> Any:
            return pulled(backend, leaves[:count], tuple(leaves[count:]))

        cotangents = p.random_like(float_out)
        return lambda backend: _run(p, backend, run, [*p.leaves, *cotangents], recorded)
    if composition in ("jvp", "backward(jvp)"):
        tangents = p.random_like(p.leaves[j] for j in p.diff)

        def run_jvp(backend: Any, leaves: list[Tensor]) -> Any:
            primals, f = p.split(leaves[:count])
            return backend.jvp(f, primals, tuple(leaves[count:]))

        return lambda backend: _run(p, backend, run_jvp, [*p.leaves, *tangents], recorded)
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
    if composition in ("vmap", "backward(vmap)"):

        def run_vmap(backend: Any, leaves: list[Tensor]) -> Any:
            return backend.vmap(p.call, in_dims=dims, randomness=randomness)(*leaves)

        return lambda backend: _run(p, backend, run_vmap, batch(rows, dims), recorded)
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


def _run(
    problem: Any, backend: Any, run: Callable[..., Any], leaves: list[Tensor], recorded: bool = False
) -> tuple[Any, list[Tensor]]:
    mine = [leaf.clone() for leaf in leaves]
    tracked = [mine[j] for j in [*problem.diff, *range(len(problem.leaves), len(mine))]] if recorded else []
    for leaf in tracked:
        leaf.requires_grad_()
    reseed(problem.seed)
    if recorded and isinstance(backend, Numeric):
        return differenced(problem, lambda: tree_map(torch.detach, run(backend.inner, mine)), tracked), mine
    out = run(backend, mine)
    if backend is not Plain and problem.structure != problem.eager_structure:
        raise AssertionError(f"output structure {problem.structure}, eager has {problem.eager_structure}")
    if recorded:
        out = (tree_map(torch.detach, out), base_gradients(problem, tree_flatten(out)[0], tracked))
    return out, [leaf.detach() for leaf in mine]


def base_gradients(problem: Any, outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """What PyTorch's own backward gives for the inputs; zeros where nothing was recorded."""
    pairs = [(o, w) for o, w in zip(outputs, weights_of(problem, outputs)) if w is not None and o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(i) for i in inputs)
    outs, ws = zip(*pairs)
    return torch.autograd.grad(outs, inputs, ws, allow_unused=True, materialize_grads=True)


def weights_of(problem: Any, outputs: list[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(problem.seed)
    return [
        torch.randn(o.shape, dtype=o.dtype, generator=generator) if o.is_floating_point() or o.is_complex() else None
        for o in outputs
    ]


def differenced(problem: Any, run: Callable[[], Any], inputs: list[Tensor]) -> Any:
    """The same as ``base_gradients``, by central differences in every element of ``inputs``."""
    out = run()
    weights = weights_of(problem, tree_flatten(out)[0])

    def weighted() -> float:
        pairs = zip(tree_flatten(run())[0], weights)
        return float(sum((o * w.conj()).real.sum() for o, w in pairs if w is not None))

    gradients = []
    for leaf in inputs:
        gradient = torch.zeros(leaf.numel(), dtype=leaf.dtype)
        for i in range(leaf.numel()):
            kept = leaf.detach().clone()
            sums = []
            for step in (Numeric.STEP, -Numeric.STEP):
                moved = kept.clone(memory_format=torch.contiguous_format)
                moved.view(-1)[i] += step
                leaf.data.copy_(moved)
                sums.append(weighted())
            leaf.data.copy_(kept)
            gradient[i] = (sums[0] - sums[1]) / (2 * Numeric.STEP)
        gradients.append(gradient.view(leaf.shape))
    return out, tuple(gradients)
