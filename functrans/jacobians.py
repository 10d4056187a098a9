"""Jacobians and Hessians: compositions of vjp, jvp and vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.arguments import Argnums, pick
from functrans.batching import vmap
from functrans.errors import Call, CallError, CallValueError
from functrans.pytrees import tree_flatten, tree_unflatten
from functrans.transforms import jvp_with_argnums, unit, vjp_with_argnums


def jacrev(
    func: Callable[..., Any], argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: int | None = None, _preallocate_and_copy: bool = False
) -> Callable[..., Any]:
    """The Jacobian by reverse mode: one pullback per element of the output, all at once.

    Args:
        func: returns a pytree of real floating-point tensors (with ``has_aux``, a pair of that and anything).
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        has_aux: ``func`` returns ``(output, aux)``.
        chunk_size: how many pullbacks to run at a time; None: all. 1 runs them one after the other without vmap, so that ``func`` may
            have derivatives that vmap cannot batch.

    Returns:
        A function of the same arguments. It returns, for every output tensor, the structure of the arguments that ``argnums`` names,
        whose tensors have shape ``output.shape + argument.shape``; with ``has_aux`` a pair of that and aux.

    Example:
        >>> import torch
        >>> from functrans import jacrev
        >>> jacrev(torch.square)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    call = Call("jacrev", func, {"argnums": argnums})
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise CallValueError(call, f"chunk_size={chunk_size!r}", "a positive int or None")

    @functools.wraps(func, updated=())
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        refuse_complex(call, args, "an argument")
        out, pullback, aux = vjp_with_argnums("jacrev", func, args, argnums, has_aux, kwargs)
        leaves, spec = tree_flatten(out)
        refuse_complex(call, leaves, "an output")
        numels = [o.numel() for o in leaves]

        def pull(basis: list[Tensor]) -> Any:
            return pullback(tree_unflatten(spec, [shaped(b, o.shape) for b, o in zip(basis, leaves, strict=True)]))

        if len(leaves) == 1 and leaves[0].dim() == 0:  # one row: no batch, and no basis
            found = pullback(tree_unflatten(spec, [unit(leaves[0])]))
            return (tree_unflatten(spec, [found]), aux) if has_aux else tree_unflatten(spec, [found])
        behind = pullback.rows() if chunk_size != 1 else None  # type: ignore[attr-defined]
        if behind is not None:
            rows = vmap(behind[1], chunk_size=chunk_size)(behind[0])
        elif chunk_size == 1 and sum(numels):
            basis = standard_basis(leaves, numels)
            rows = tree_stack([pull([b[i] for b in basis]) for i in range(sum(numels))])
        else:
            rows = vmap(pull, chunk_size=chunk_size)(standard_basis(leaves, numels))
        row_leaves, row_spec = tree_flatten(rows)
        found = []
        for i, o in enumerate(leaves):
            start = sum(numels[:i])
            own = row_leaves if len(leaves) == 1 else [r.narrow(0, start, numels[i]) for r in row_leaves]
            block = [shaped(r, (*o.shape, *r.shape[1:])) for r in own]
            found.append(tree_unflatten(row_spec, block))
        result = tree_unflatten(spec, found)
        return (result, aux) if has_aux else result

    return jacobian


def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The Jacobian by forward mode: one tangent per element of the arguments, all at once.

    Args:
        func: returns a pytree of tensors (with ``has_aux``, a pair of that and anything).
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        has_aux: ``func`` returns ``(output, aux)``.
        randomness: as in ``vmap``, for random operators in ``func``.
        chunk_size: how many tangents to run at a time; None: all.

    Returns:
        A function of the same arguments, with results as those of ``jacrev``.

    Example:
        >>> import torch
        >>> from functrans import jacfwd
        >>> jacfwd(torch.square)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    call = Call("jacfwd", func, {"argnums": argnums})

    @functools.wraps(func, updated=())
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        refuse_complex(call, args, "an argument")
        moving = pick(call, args, argnums)
        leaves, spec = tree_flatten(moving)
        if not leaves or not all(isinstance(x, Tensor) for x in leaves):
            raise CallError(call, "arguments to differentiate for that are not tensors", "tensors")
        numels = [x.numel() for x in leaves]

        def push(basis: list[Tensor]) -> Any:
            tangents = tree_unflatten(spec, [shaped(b, x.shape) for b, x in zip(basis, leaves, strict=True)])
            out, tangent, aux = jvp_with_argnums("jacfwd", func, args, tangents, argnums, False, has_aux, kwargs)
            refuse_complex(call, tree_flatten(out)[0], "an output")
            return tangent, aux

        columns, aux = vmap(push, out_dims=(0, None), randomness=randomness, chunk_size=chunk_size)(standard_basis(leaves, numels))
        column_leaves, out_spec = tree_flatten(columns)
        found = []
        for c in column_leaves:
            block, start = [], 0
            for x, n in zip(leaves, numels, strict=True):
                own = c if len(leaves) == 1 else c.narrow(0, start, n)
                block.append(shaped(own.movedim(0, -1) if c.dim() > 1 else own, (*c.shape[1:], *x.shape)))
                start += n
            found.append(tree_unflatten(spec, block))
        result = tree_unflatten(out_spec, found)
        return (result, aux) if has_aux else result

    return jacobian


def hessian(
    func: Callable[..., Any], argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., Any]:
    """The Hessian, forward over reverse: ``jacfwd(jacrev(func))``.

    Args:
        func: returns a pytree of real floating-point tensors, usually one scalar.
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        has_aux: ``func`` returns ``(output, aux)``.
        chunk_size: how many columns to compute at a time; None: all.

    Returns:
        A function of the same arguments; for arguments x and y of ``argnums`` its result holds a tensor of shape
        ``output.shape + x.shape + y.shape``.

    Example:
        >>> import torch
        >>> from functrans import hessian
        >>> hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    return jacfwd(jacrev(func, argnums, has_aux=has_aux), argnums, has_aux=has_aux, chunk_size=chunk_size)


def refuse_complex(call: Call | str, values: Any, what: str) -> None:
    for x in tree_flatten(values)[0]:
        if isinstance(x, Tensor) and x.is_complex():
            raise CallError(
                call, f"{what} of dtype {x.dtype}", "real tensors", "Differentiate for torch.view_as_real(x), and view outputs as real."
            )


def shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x if x.shape == shape else x.reshape(shape)


def tree_stack(trees: list[Any]) -> Any:
    """Trees of one structure as one tree, each leaf stacked."""
    flat = [tree_flatten(tree) for tree in trees]
    return tree_unflatten(flat[0][1], [torch.stack(leaves) for leaves in zip(*(f[0] for f in flat), strict=True)])


def standard_basis(leaves: list[Tensor], numels: list[int]) -> list[Tensor]:
    """For each leaf, of ``n`` elements, the rows of the identity over all leaves that fall into it: shape (total, n)."""
    total = sum(numels)
    if len(leaves) == 1:
        return [torch.eye(total, dtype=leaves[0].dtype, device=leaves[0].device)]
    found, start = [], 0
    for x, n in zip(leaves, numels, strict=True):
        zeros = torch.zeros(total, n, dtype=x.dtype, device=x.device)
        found.append(torch.diagonal_scatter(zeros, torch.ones(n, dtype=x.dtype, device=x.device), offset=-start))
        start += n
    return found
