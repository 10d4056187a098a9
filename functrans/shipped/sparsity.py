"""Which elements of the outputs depend on which of the inputs, and Jacobians and Hessians by as many products as that
leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import (
    Argnums,
    check_argnums,
    check_arguments,
    check_outputs,
    check_scalar,
    pick,
    refuse_complex,
)
from functrans.api.checks import call_function, check_chunk_size, check_flag
from functrans.api.compiled import UNTRACED, named_after
from functrans.api.rows_and_columns import check_output_numbers
from functrans.api.structures import path_of
from functrans.api.transforms import differentiating, grad, jvp_with_argnums, vjp_with_argnums
from functrans.api.vmap import vmap
from functrans.core.stack import run_transformed
from functrans.errors import Call, CallError
from functrans.errors.wording import what
from functrans.pytorch.thread_state import lowered, running_at
from functrans.shipped import sparsity_rules  # noqa: F401 - importing it adds the rules
from functrans.shipped.coloring import Pattern, alone, colors_of_columns, star_colors
from functrans.shipped.sparsity_level import SparsityLevel
from functrans.tensors.pytrees import tree_flatten, tree_map, tree_unflatten

#: Why torch.compile runs these outside of its graph.
BY_NUMBERS = "The pattern is found by numbers; it decides how many products there are, and the shape of the result."


def sparsity(func: Callable[..., Any], argnums: Argnums = 0) -> Callable[..., Any]:
    """Where the Jacobian of ``func`` may differ from zero.

    The pattern has every entry that is not zero, and may have more: an operator of which nothing is known depends on
    all elements of its arguments. It holds for all values of the arguments that ``argnums`` names, as long as the
    function takes the same branches: both sides of ``torch.where``, ``relu`` or ``max`` are in it, of a Python ``if``
    on numbers that the function reads only the side that was taken. Other arguments, and captured tensors, are
    constants: an index or a zero in a constant matrix counts.

    Args:
        func: returns a pytree of tensors. It is run once.
        argnums: position, or tuple of positions, of the arguments that are varied.

    Returns:
        A function of the same arguments. It returns, for every output tensor, the structure of the arguments that
        ``argnums`` names, whose tensors are sparse COO tensors of truth values, of shape
        ``[output.numel(), argument.numel()]``.

    Raises:
        CallError: an argument that ``argnums`` names has no derivative, or an output is no tensor.

    Example:
        >>> import torch
        >>> from functrans import sparsity
        >>> sparsity(lambda x: x[1:] * x[:-1])(torch.randn(4)).to_dense().int()
        tensor([[1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    call = differentiating("sparsity", func, argnums, False)

    @named_after(func)
    def pattern(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return UNTRACED("sparsity", BY_NUMBERS, sparsity(func, argnums), args, kwargs)
        found = Dependence(call, func, argnums, args, kwargs, rehearsal=False)
        with running_at(None):
            rows = found.pattern.rows
            return found.blocks(found.pattern, lambda where, o, a: torch.ones(len(rows[where]), dtype=torch.bool))

    return pattern


def sparse_jacobian(
    func: Callable[..., Any], argnums: Argnums = 0, *, chunk_size: int | None = None, cache: bool = False
) -> Callable[..., Any]:
    """The Jacobian as a sparse matrix, by few products.

    Columns that have no entry in the same row are computed by one tangent, or rows without a common column by one
    cotangent, whichever are fewer: three for a tridiagonal matrix of any size.

    Args:
        func: returns a pytree of real floating-point tensors.
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        chunk_size: how many products to compute at a time; None: all.
        cache: keep the pattern for further calls with arguments of the same structure, shapes and dtypes. It is then
            one for all values of all arguments. What else the function depends on (captured tensors, the mode of a
            module) is promised to stay as it is. Where the function reads numbers of its arguments, nothing is kept.

    Returns:
        A function of the same arguments, with results of the structure of ``sparsity``: coalesced sparse COO tensors,
        whose values can be differentiated. They hold every place of the pattern, zero or not.

    Raises:
        CallError: an argument or output is of another kind.

    Example:
        >>> import torch
        >>> from functrans import sparse_jacobian
        >>> sparse_jacobian(lambda x: x[1:] * x[:-1])(torch.tensor([1.0, 2.0, 3.0])).to_dense()
        tensor([[2., 1., 0.],
                [0., 3., 2.]])
    """
    call = differentiating("sparse_jacobian", func, argnums, False)
    check_chunk_size(call, chunk_size)
    plans = Plans(call, func, argnums, cache, plan_of_jacobian)

    @named_after(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return UNTRACED("sparse_jacobian", BY_NUMBERS, sparse_jacobian(func, argnums), args, kwargs)
        found, plan = plans.find(args, kwargs)
        values = plan.values(products(call, func, argnums, chunk_size, found, plan, args, kwargs))
        return found.blocks(plan.pattern, values)

    return jacobian


def sparse_hessian(
    func: Callable[..., Any], argnums: Argnums = 0, *, chunk_size: int | None = None, cache: bool = False
) -> Callable[..., Any]:
    """The Hessian as a sparse matrix, by few products.

    Since it is symmetric, an entry may be read from its own row or from its mirror image's, so that it takes fewer
    products than a Jacobian of this pattern: two for an arrow, whose first row, first column and diagonal are full.

    Args:
        func: returns a real scalar tensor.
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        chunk_size: as in ``sparse_jacobian``.
        cache: as in ``sparse_jacobian``.

    Returns:
        A function of the same arguments. It returns for arguments x and y that ``argnums`` names, in the structure of
        ``hessian``, a coalesced sparse COO tensor of shape ``[x.numel(), y.numel()]``, whose values can be
        differentiated.

    Raises:
        CallError: an argument is of another kind, or the output is no real scalar.

    Example:
        >>> import torch
        >>> from functrans import sparse_hessian
        >>> sparse_hessian(lambda x: (x[1:] * x[:-1] ** 2).sum())(torch.tensor([1.0, 2.0, 3.0])).to_dense()
        tensor([[4., 2., 0.],
                [2., 6., 4.],
                [0., 4., 0.]])
    """
    call = differentiating("sparse_hessian", func, argnums, False)
    check_chunk_size(call, chunk_size)

    def checked(*args: Any, **kwargs: Any) -> Any:
        out = call_function(call, func, args, kwargs)
        check_scalar(call, out)
        return out

    gradient = grad(named_after(func)(checked), argnums)
    plans = Plans(call, gradient, argnums, cache, plan_of_hessian)

    @named_after(func)
    def hessian(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return UNTRACED("sparse_hessian", BY_NUMBERS, sparse_hessian(func, argnums), args, kwargs)
        found, plan = plans.find(args, kwargs)
        values = plan.values(products(call, gradient, argnums, chunk_size, found, plan, args, kwargs))
        return found.blocks(plan.pattern, values)

    return hessian


class Dependence:
    """What a function's outputs depend on, for one call.

    Args:
        constant: whether the arguments that ``argnums`` does not name are constants.
        rehearsal: whether the function runs another time, for its values.
    """

    def __init__(
        self,
        call: Call,
        func: Any,
        argnums: Argnums,
        args: Any,
        kwargs: Any,
        constant: bool = True,
        rehearsal: bool = True,
    ) -> None:
        check_arguments(call, args, argnums)
        moving = pick(call, args, argnums)
        self.inputs, self.in_spec = tree_flatten(moving)
        if not self.inputs:
            raise CallError(call, f"{what(moving)} to differentiate for", "at least one tensor")
        refuse_sparse(call, "args", moving)
        level = SparsityLevel(func)
        level.rehearsal = rehearsal

        def other(leaf: Any) -> Any:
            return leaf if not isinstance(leaf, Tensor) else level.constant(leaf) if constant else level.variable(leaf)

        def body() -> list[Tensor]:
            positions = check_argnums(call, argnums, len(args))
            with lowered(level):
                entered = [tree_map(other, a) if i not in positions else None for i, a in enumerate(args)]
                for i in positions:
                    entered[i] = tree_map(level.input, args[i])
                by_keyword = tree_map(other, kwargs)
            out = call_function(call, func, tuple(entered), by_keyword)
            leaves, self.out_spec = tree_flatten(out)
            check_outputs(call, out, leaves)
            refuse_sparse(call, "output", out)
            with lowered(level):
                owned = [level.own(leaf) for leaf in leaves]
            self.outputs = [w.shape.numel() for w in owned]
            with running_at(None):
                return [torch.zeros(w.shape, dtype=torch.int64) if w.numbers is None else w.numbers for w in owned]

        numbers = run_transformed(level, body)
        #: whether other numbers may have another pattern
        self.local = level.local
        with running_at(None):
            rows, columns = level.sets.places(torch.cat([n.flatten() for n in numbers]))
        self.pattern = Pattern(rows, columns, (sum(self.outputs), level.count))

    def blocks(self, pattern: Pattern, values: Callable[[Any, int, int], Tensor]) -> Any:
        """For each output the structure of the inputs, of sparse matrices: ``values(where, output, input)`` are those
        of some of the entries, which lie in this block."""
        row = np.cumsum([0, *self.outputs])
        column = np.cumsum([0, *(x.numel() for x in self.inputs)])
        begin = np.searchsorted(pattern.rows, row)
        found = []
        for o in range(len(self.outputs)):
            here = slice(begin[o], begin[o + 1])
            line = []
            for a, x in enumerate(self.inputs):
                where: Any = here
                if len(self.inputs) > 1:
                    columns = pattern.columns[here]
                    where = begin[o] + np.flatnonzero((columns >= column[a]) & (columns < column[a + 1]))
                places = np.stack([pattern.rows[where] - row[o], pattern.columns[where] - column[a]])
                size, entries = (int(row[o + 1] - row[o]), x.numel()), values(where, o, a)
                indices = torch.from_numpy(places).to(entries.device)
                line.append(torch.sparse_coo_tensor(indices, entries, size, is_coalesced=True, check_invariants=False))
            found.append(tree_unflatten(self.in_spec, line))
        return tree_unflatten(self.out_spec, found)


def refuse_sparse(call: Call, root: str, tree: Any) -> None:
    for place, x in enumerate(tree_flatten(tree)[0]):
        if x.layout is not torch.strided:
            got = f"a tensor of layout {x.layout} as {path_of(root, tree, place)}"
            raise CallError(call, got, "torch.strided", "Use its to_dense().")


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
        """Where the entries stand among the products ``found``, [count, *shape] for each output (``by_rows``: input).
        """
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
