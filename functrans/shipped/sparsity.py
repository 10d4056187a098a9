"""Which elements of the outputs depend on which of the inputs, and Jacobians and Hessians by as many products as that
leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import Argnums, check_scalar
from functrans.api.checks import call_function, check_chunk_size
from functrans.api.compiled import UNTRACED, named_after
from functrans.api.reverse import differentiating
from functrans.api.transforms import grad
from functrans.errors import Call
from functrans.pytorch.thread_state import running_at
from functrans.shipped.dependence import Dependence
from functrans.shipped.sparsity_plans import Plans, plan_of_hessian, plan_of_jacobian, products

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
    return as_sparse(sparse_jacobian, call, func, func, argnums, chunk_size, cache, plan_of_jacobian)


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
    return as_sparse(sparse_hessian, call, func, gradient, argnums, chunk_size, cache, plan_of_hessian)


def as_sparse(
    transform: Callable[..., Any],
    call: Call,
    func: Callable[..., Any],
    differentiated: Callable[..., Any],
    argnums: Argnums,
    chunk_size: int | None,
    cache: bool,
    plan_of: Callable[..., Any],
) -> Callable[..., Any]:
    """What ``transform`` returns for ``func``: the Jacobian of ``differentiated``, by the products of a plan."""
    plans = Plans(call, differentiated, argnums, cache, plan_of)

    @named_after(func)
    def matrix(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            remade = transform(func, argnums, chunk_size=chunk_size)
            return UNTRACED(transform.__name__, BY_NUMBERS, remade, args, kwargs)
        found, plan = plans.find(args, kwargs)
        values = plan.values(products(call, differentiated, argnums, chunk_size, found, plan, args, kwargs))
        return found.blocks(plan.pattern, values)

    return matrix
