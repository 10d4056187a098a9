"""Jacobians and Hessians: compositions of vjp, jvp and vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import Argnums, check_arguments, pick
from functrans.api.checks import check_chunk_size, check_randomness
from functrans.api.compiled import TRACED, named_after
from functrans.api.structures import path_of
from functrans.api.transforms import differentiating, jvp_with_argnums, unit, vjp_with_argnums
from functrans.api.vmap import vmap
from functrans.core.errors import Call, CallError
from functrans.core.errors.wording import callable_name, what
from functrans.core.pytrees import tree_flatten, tree_unflatten


def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    _preallocate_and_copy: bool = False,
) -> Callable[..., Any]:
    """The Jacobian by reverse mode: one pullback per element of the output, all at once.

    Args:
        func: returns a pytree of real floating-point tensors (with ``has_aux``, a pair of that and anything).
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        has_aux: ``func`` returns ``(output, aux)``.
        chunk_size: how many pullbacks to run at a time; None: all. 1 runs them one after the other without vmap, so
            that ``func`` may have derivatives that vmap cannot batch.

    Returns:
        A function of the same arguments. It returns, for every output tensor, the structure of the arguments that
        ``argnums`` names, whose tensors have shape ``output.shape + argument.shape``; with ``has_aux`` a pair of that
        and aux.

    Example:
        >>> import torch
        >>> from functrans import jacrev
        >>> jacrev(torch.square)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    call = differentiating("jacrev", func, argnums, has_aux)
    check_chunk_size(call, chunk_size)
    options = {"argnums": argnums, "has_aux": has_aux, "chunk_size": chunk_size}
    return traceable(jacrev, func, options, jacobian_by_rows(call, func, argnums, has_aux, chunk_size))


def traceable(
    transform: Callable[..., Any], func: Callable[..., Any], options: dict[str, Any], jacobian: Callable[..., Any]
) -> Callable[..., Any]:
    """``jacobian``, which is ``transform(func, **options)``, known to Dynamo; see NOTE [Compiled transforms]."""

    @named_after(func)
    def jacobian_or_traced(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(transform, func, options, args, kwargs, None)
        return jacobian(*args, **kwargs)

    return jacobian_or_traced


def jacobian_by_rows(
    call: Call, func: Callable[..., Any], argnums: Argnums, has_aux: bool, chunk_size: int | None
) -> Callable[..., Any]:
    @named_after(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        refuse_complex(call, "args", args)
        out, pullback, aux = vjp_with_argnums(call, func, args, argnums, has_aux, kwargs)
        leaves, spec = tree_flatten(out)
        refuse_complex(call, "output", out)
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
    call = differentiating("jacfwd", func, argnums, has_aux)
    check_chunk_size(call, chunk_size)
    check_randomness(call, randomness)
    options = {"argnums": argnums, "has_aux": has_aux, "randomness": randomness, "chunk_size": chunk_size}
    return traceable(jacfwd, func, options, jacobian_by_columns(call, func, argnums, has_aux, randomness, chunk_size))


def jacobian_by_columns(
    call: Call, func: Callable[..., Any], argnums: Argnums, has_aux: bool, randomness: str, chunk_size: int | None
) -> Callable[..., Any]:
    @named_after(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        refuse_complex(call, "args", args)
        moving = pick(call, args, argnums)
        leaves, spec = tree_flatten(moving)
        check_arguments(call, args, argnums)
        if not leaves:
            raise CallError(call, f"{what(moving)} to differentiate for", "at least one tensor")
        numels = [x.numel() for x in leaves]

        def push(basis: list[Tensor]) -> Any:
            tangents = tree_unflatten(spec, [shaped(b, x.shape) for b, x in zip(basis, leaves, strict=True)])
            out, tangent, aux = jvp_with_argnums(call, func, args, tangents, argnums, False, has_aux, kwargs)
            refuse_complex(call, "output", out)
            return tangent, aux

        push.__name__ = f"jvp({callable_name(func)})"

        push_all = vmap(push, out_dims=(0, None), randomness=randomness, chunk_size=chunk_size)
        columns, aux = push_all(standard_basis(leaves, numels))
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
    call = differentiating("hessian", func, argnums, has_aux)
    check_chunk_size(call, chunk_size)
    rows = jacobian_by_rows(call, func, argnums, has_aux, None)
    options = {"argnums": argnums, "has_aux": has_aux, "chunk_size": chunk_size}
    columns = jacobian_by_columns(call, rows, argnums, has_aux, "error", chunk_size)
    return traceable(hessian, func, options, columns)


def refuse_complex(call: Call, root: str, values: Any) -> None:
    for place, x in enumerate(tree_flatten(values)[0]):
        if isinstance(x, Tensor) and x.is_complex():
            cure = (
                "Differentiate for torch.view_as_real(x)." if root == "args" else "Return torch.view_as_real(output)."
            )
            got = f"a tensor of dtype {x.dtype} as {path_of(root, values, place)}"
            raise CallError(call, got, "real tensors", cure)


def shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x if x.shape == shape else x.reshape(shape)


def tree_stack(trees: list[Any]) -> Any:
    """Trees of one structure as one tree, each leaf stacked."""
    flat = [tree_flatten(tree) for tree in trees]
    return tree_unflatten(flat[0][1], [torch.stack(leaves) for leaves in zip(*(f[0] for f in flat), strict=True)])


def standard_basis(leaves: list[Tensor], numels: list[int]) -> list[Tensor]:
    """Per leaf of ``n`` elements, the rows of the identity over all leaves that fall into it: shape (total, n)."""
    total = sum(numels)
    if len(leaves) == 1:
        return [torch.eye(total, dtype=leaves[0].dtype, device=leaves[0].device)]
    found, start = [], 0
    for x, n in zip(leaves, numels, strict=True):
        zeros = torch.zeros(total, n, dtype=x.dtype, device=x.device)
        found.append(torch.diagonal_scatter(zeros, torch.ones(n, dtype=x.dtype, device=x.device), offset=-start))
        start += n
    return found
