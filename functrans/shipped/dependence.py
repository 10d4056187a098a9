"""What a function's outputs depend on: one run of it at a level that follows elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrans.api.arguments import Argnums, check_argnums, check_arguments, check_outputs, pick
from functrans.api.checks import call_function
from functrans.api.structures import path_of
from functrans.core.stack import run_transformed
from functrans.errors import Call, CallError
from functrans.errors.wording import what
from functrans.pytorch.thread_state import lowered, running_at
from functrans.shipped import sparsity_rules  # noqa: F401 - importing it adds the rules
from functrans.shipped.coloring import Pattern
from functrans.shipped.sparsity_level import SparsityLevel
from functrans.tensors.pytrees import tree_flatten, tree_map, tree_unflatten


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
