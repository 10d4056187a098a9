"""What programs are run on, and oracles beside the loop: ``torch.autograd`` on copies of the arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plain import difference
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def some(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Numbers that are the same in every run, whatever was drawn before."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def agree(got: Any, expected: Any, **tolerance: float) -> None:
    """Assert equality in structure, type, dtype, shape and value."""
    if tolerance:
        torch.testing.assert_close(got, expected, **tolerance)
        return
    message = difference(got, expected)
    assert not message, message


def close(got: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Assert that numbers differ by no more than the rounding of doubles."""
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


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
