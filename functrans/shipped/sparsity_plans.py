"""In which products the entries of a sparse matrix are found, and the products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrans.api.arguments import Argnums, check_argnums, pick, refuse_complex
from functrans.api.checks import check_flag
from functrans.api.forward import jvp_with_argnums
from functrans.api.reverse import vjp_with_argnums
from functrans.api.rows_and_columns import check_output_numbers
from functrans.api.vmap import vmap
from functrans.errors import Call, CallError
from functrans.shipped.coloring import Pattern, alone, colors_of_columns, star_colors
from functrans.shipped.dependence import Dependence
from functrans.tensors.pytrees import tree_flatten, tree_unflatten


class Plan:
    """In which products the entries of a matrix are found.

    Args:
        pattern: where its entries are.
        colors: of the columns, or of the rows if ``by_rows``.
        count: how many colors there are.
        mirrored: the matrix is symmetric, and an entry that shares its row with others of its colour is read from its
            mirror image's.
    """

    def __init__(self, pattern: Pattern, colors: np.ndarray, count: int, by_rows: bool = False, mirrored: bool = False):
        self.pattern = pattern
        self.colors = torch.from_numpy(colors)
        self.count = count
        self.by_rows = by_rows
        lines, columns = (pattern.columns, pattern.rows) if by_rows else (pattern.rows, pattern.columns)
        if mirrored and len(lines):
            own = alone(pattern, colors, count)
            lines, columns = np.where(own, lines, columns), np.where(own, columns, lines)
        self.lines, self.product_of = lines, colors[columns]

    def seeds(self, like: list[Tensor]) -> list[Tensor]:
        """Per tensor, what is multiplied: a sum of unit vectors for each colour, [count, *shape]."""
        found, start = [], 0
        for x in like:
            colors = self.colors[start : start + x.numel()].to(x.device)
            start += x.numel()
            of_color = torch.arange(self.count, device=x.device).unsqueeze(1) == colors
            found.append(of_color.to(x.dtype).reshape(self.count, *x.shape))
        return found

    def values(self, found: list[Tensor]) -> Callable[[Any, int, int], Tensor]:
        """Where the entries stand among the products: ``found`` [count, *shape] of each output, ``by_rows`` input."""
        starts = np.cumsum([0, *(f.shape[1:].numel() for f in found)])
        tables = [f.flatten(1) if f.dim() > 1 else f.unsqueeze(1) for f in found]

        def values(where: Any, o: int, a: int) -> Tensor:
            lines, product_of = self.lines[where], self.product_of[where]
            which = np.searchsorted(starts, lines, side="right") - 1
            parts = np.unique(which)
            if len(parts) <= 1:  # always, but where mirror images lie in another block
                part = int(parts[0]) if len(parts) else (a if self.by_rows else o)
                return gathered(tables[part], product_of, lines - starts[part])
            pieces = [gathered(tables[p], product_of[which == p], lines[which == p] - starts[p]) for p in parts]
            back = np.argsort(np.concatenate([np.flatnonzero(which == p) for p in parts]))
            return torch.cat(pieces).index_select(0, torch.from_numpy(back).to(pieces[0].device))

        return values


def gathered(table: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    places = torch.from_numpy(rows * table.shape[1] + columns).to(table.device)
    return table.flatten().index_select(0, places)


def plan_of_jacobian(found: Dependence) -> Plan:
    pattern = found.pattern
    colors, count = colors_of_columns(pattern)
    fullest_column = np.bincount(pattern.columns, minlength=1).max(initial=0)
    if fullest_column < count:
        transposed = pattern.transposed()
        if np.array_equal(transposed.rows, pattern.rows) and np.array_equal(transposed.columns, pattern.columns):
            return Plan(pattern, colors, count)  # rows are coloured as columns are
        of_rows, fewer = colors_of_columns(transposed)
        if fewer < count:
            return Plan(pattern, of_rows, fewer, by_rows=True)
    return Plan(pattern, colors, count)


def plan_of_hessian(found: Dependence) -> Plan:
    pattern = found.pattern.symmetric()
    colors, count = colors_of_columns(pattern)
    of_star, fewer = star_colors(pattern)
    if fewer < count:
        return Plan(pattern, of_star, fewer, mirrored=True)
    return Plan(pattern, colors, count)


class Plans:
    """The plans of a function's calls; kept by shapes if ``cache``."""

    def __init__(self, call: Call, func: Any, argnums: Argnums, cache: bool, make: Callable[[Dependence], Plan]):
        check_flag(call, "cache", cache)
        self.call, self.func, self.argnums, self.make = call, func, argnums, make
        self.kept: dict[Any, tuple[Dependence, Plan]] | None = {} if cache else None

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Dependence, Plan]:
        refuse_complex(self.call, "args", args, check_argnums(self.call, self.argnums, len(args)))
        if self.kept is None:
            found = Dependence(self.call, self.func, self.argnums, args, kwargs)
            return found, self.make(found)
        leaves, spec = tree_flatten((args, kwargs))
        key = spec, tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
        try:
            kept = self.kept.get(key)
        except TypeError as error:
            cure = "Leave cache out, or bind it before: lambda x: f(x, value)."
            raise CallError(self.call, f"an argument without a hash ({error})", "hashable arguments", cure) from None
        if kept is None:
            found = Dependence(self.call, self.func, self.argnums, args, kwargs, constant=False)
            kept = found, self.make(found)
            if not found.local:
                found.inputs = [torch.empty_like(x, device="meta") for x in found.inputs]
                self.kept[key] = kept
        return kept


def products(
    call: Call,
    func: Any,
    argnums: Argnums,
    chunk_size: int | None,
    found: Dependence,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """The products of ``func``'s Jacobian with the seeds of ``plan``."""
    moving = tree_flatten(pick(call, args, argnums))[0]
    if plan.by_rows:
        out, pullback, _ = vjp_with_argnums(call, func, args, argnums, False, kwargs)
        check_output_numbers(call, False, out)
        outs, spec = tree_flatten(out)
        pull = vmap(lambda *seeds: pullback(tree_unflatten(spec, list(seeds))), chunk_size=chunk_size)
        return tree_flatten(pull(*plan.seeds(outs)))[0]

    def push(*seeds: Tensor) -> Any:
        tangents = tree_unflatten(found.in_spec, list(seeds))
        out, pushed, _ = jvp_with_argnums(call, func, args, tangents, argnums, False, False, kwargs)
        check_output_numbers(call, False, out)
        return pushed

    push.of_basis = True  # type: ignore[attr-defined]
    if plan.count == 0:
        none = [torch.zeros_like(x) for x in moving]
        return [t.unsqueeze(0)[:0] for t in tree_flatten(push(*none))[0]]
    return tree_flatten(vmap(push, chunk_size=chunk_size)(*plan.seeds(moving)))[0]
