"""Oracles of the user programs: a loop over the examples, and ``torch.autograd`` on copies of the arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plain import difference
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def agree(got: Any, expected: Any, **tolerance: float) -> None:
    """Assert equality in structure, type, dtype, shape and value."""
    if tolerance:
        torch.testing.assert_close(got, expected, **tolerance)
        return
    message = difference(got, expected)
    assert not message, message


def for_each(f: Callable[..., Any], in_dims: Any = 0, out_dims: int = 0) -> Callable[..., Any]:
    """``vmap`` by a loop; ``in_dims`` has an int or None for each argument."""

    def looped(*args: Any) -> Any:
        dims = (in_dims,) * len(args) if isinstance(in_dims, int) else in_dims
        size = next(tree_flatten(a)[0][0].shape[d] for a, d in zip(args, dims) if d is not None)
        rows = [
            f(*[a if d is None else tree_map(lambda x, d=d, i=i: x.select(d, i), a) for a, d in zip(args, dims)])
            for i in range(size)
        ]
        columns = zip(*(tree_flatten(r)[0] for r in rows))
        return tree_unflatten([torch.stack(c, out_dims) for c in columns], tree_flatten(rows[0])[1])

    return looped


def gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """``grad`` for the first argument by ``torch.autograd``; differentiable itself."""

    def differentiated(x: Any, *rest: Any) -> Any:
        with torch.enable_grad():
            leaves, spec = tree_flatten(x)
            leaves = [t if t.requires_grad else t.detach().clone().requires_grad_() for t in leaves]
            out = f(tree_unflatten(leaves, spec), *rest)
            found = torch.autograd.grad(out, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        return tree_unflatten(list(found), spec)

    return differentiated


def jacobian(f: Callable[..., Any], x: Tensor) -> Tensor:
    """The Jacobian for one tensor by ``torch.autograd``."""
    return torch.autograd.functional.jacobian(f, x, create_graph=False)


def no_history(tree: Any) -> Any:
    """The tensors of ``tree`` without their autograd history."""
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tree)
