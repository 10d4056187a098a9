"""One sample of one operator as functions of tensors, and variants of it as the distinct rows of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from plain import difference
from sampling import reseed
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

ROWS = 3

# Their values are whatever lay in memory: only shape and dtype can be compared.
UNINITIALIZED = {
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_", "resize_as_",
}  # fmt: skip


#: Outputs that PyTorch takes for constants and that are none: of their derivatives it can be no judge, and
#: test_derivatives_missing.py is.
CONSTANT_IN_PYTORCH = {"linalg.lstsq": (3,)}


class Problem:
    """One sample of one operator, as functions of tensors."""

    def __init__(self, op: Any, sample: Any, index: int) -> None:
        self.op, self.sample, self.index = op, sample, index
        flat, self.spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        self.flat = flat
        self.places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        self.diff = [j for j, i in enumerate(self.places) if flat[i].requires_grad]
        self.leaves = [flat[i].detach().clone() for i in self.places]
        self.random = False
        self.structure: Any = None
        self.generator = torch.Generator()
        self.seed = 1234
        self.out = self.eager(self.leaves)
        self.eager_structure = self.structure
        self.seed = 4321
        again = self.eager(self.leaves)
        self.seed = 1234
        self.random = op.name not in UNINITIALIZED and bool(difference(again, self.out))
        left_out = CONSTANT_IN_PYTORCH.get(op.name, ())
        self.float_outputs = [
            i for i, o in enumerate(self.out) if (o.is_floating_point() or o.is_complex()) and i not in left_out
        ]

    def eager(self, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        reseed(self.seed)
        return self.call(*(leaf.clone() for leaf in leaves))

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        return self.op(*args, **kwargs)

    def call(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        flat = list(self.flat)
        for place, leaf in zip(self.places, leaves):
            flat[place] = leaf
        first, args, kwargs = tree_unflatten(flat, self.spec)
        out = self.sample.output_process_fn_grad(self.apply(first, *args, **kwargs))
        leaves_out, self.structure = tree_flatten(out)
        return tuple(leaf for leaf in leaves_out if isinstance(leaf, Tensor))

    def split(self, leaves: list[Tensor]) -> tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]:
        """The differentiable leaves, and the operator as a function of them with floating outputs only."""

        def f(*primals: Tensor) -> tuple[Tensor, ...]:
            merged = list(leaves)
            for j, primal in zip(self.diff, primals):
                merged[j] = primal
            out = self.call(*merged)
            return tuple(out[i] for i in self.float_outputs)

        return tuple(leaves[j] for j in self.diff), f

    def random_like(self, tensors: Any) -> tuple[Tensor, ...]:
        return tuple(torch.randn(t.shape, dtype=t.dtype, generator=self.generator) for t in tensors)

    def rows(self) -> list[list[Tensor]]:
        """``ROWS`` variants of the leaves for which the operator runs, as different as it allows."""
        rows = [self.leaves]
        for k in range(1, ROWS):
            for recipe in RECIPES[k % 2 :] + RECIPES[: k % 2]:
                with contextlib.suppress(Exception):
                    candidate = [recipe(leaf, self.generator) for leaf in self.leaves]
                    out = self.eager(candidate)
                    if all(a.shape == b.shape for a, b in zip(out, self.out)) and all_finite_alike(out, self.out):
                        rows.append(candidate)
                        break
            else:
                rows.append([leaf.clone() for leaf in self.leaves])
        return rows


def scaled(leaf: Tensor, generator: torch.Generator) -> Tensor:
    if not leaf.is_floating_point() and not leaf.is_complex():
        return leaf.clone()
    return leaf * (1 + 0.04 * (torch.rand(leaf.shape, dtype=torch.float64, generator=generator) - 0.5))


def shuffled(leaf: Tensor, generator: torch.Generator) -> Tensor:
    # Reversal in every dimension keeps value ranges, symmetry and positive definiteness.
    return scaled(leaf.flip(tuple(range(leaf.dim()))), generator)


def floats_shuffled(leaf: Tensor, generator: torch.Generator) -> Tensor:
    return shuffled(leaf, generator) if leaf.is_floating_point() else leaf.clone()


def scaled_uniformly(leaf: Tensor, generator: torch.Generator) -> Tensor:
    if not leaf.is_floating_point() and not leaf.is_complex():
        return leaf.clone()
    return leaf * (1 + 0.04 * (torch.rand((), dtype=torch.float64, generator=generator) - 0.5))


RECIPES = [shuffled, scaled, floats_shuffled, scaled_uniformly]


def all_finite_alike(got: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> bool:
    """A variant that left the operator's domain (nan where the sample had none) tests little."""
    return all(
        bool(g.isfinite().all()) or not bool(x.isfinite().all())
        for g, x in zip(got, like)
        if g.is_floating_point() or g.is_complex()
    )
