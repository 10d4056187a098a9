"""Jacobians, Hessians and products with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import ALL, Argnums
from functrans.api.checks import check_callable, check_flag
from functrans.api.compiled import manner
from functrans.api.forward import jvp_with_argnums
from functrans.api.reverse import grad_and_value_of
from functrans.api.rows_and_columns import by_columns, by_rows
from functrans.api.transforms import grad_and_value, jvp
from functrans.errors import Call
from functrans.errors.wording import callable_name, shown
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter


@manner(records=True, once=True)
def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    holomorphic: bool = False,
    interpreter: type[GradInterpreter] = GradInterpreter,
    _preallocate_and_copy: bool = False,
) -> Callable[..., Any]:
    """The Jacobian by reverse mode: one pullback per element of the output, all at once.

    Args:
        func: returns a pytree of real floating-point tensors (with ``has_aux``, a pair of that and anything).
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        has_aux: ``func`` returns ``(output, aux)``.
        chunk_size: how many pullbacks to run at a time; None: all. 1 runs them one after the other without vmap, so
            that ``func`` may have derivatives that vmap cannot batch.
        holomorphic: ``func`` is promised to be holomorphic in the arguments that ``argnums`` names: they and the
            outputs are complex, and the Jacobian holds complex derivatives.
        interpreter: as in ``grad``.

    Returns:
        A function of the same arguments, which may have keyword arguments. It returns, for every output tensor, the
        structure of the arguments that ``argnums`` names, whose tensors have shape ``output.shape + argument.shape``;
        with ``has_aux`` a pair of that and aux.

    Raises:
        CallError: an argument or output is of another kind; without ``holomorphic`` that is a complex one.

    Example:
        >>> import torch
        >>> from functrans import jacrev
        >>> jacrev(torch.square)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    return by_rows(jacrev, func, argnums, has_aux, chunk_size, holomorphic, interpreter)


@manner(records=True, once=True)
def jacrev_and_value(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    holomorphic: bool = False,
    interpreter: type[GradInterpreter] = GradInterpreter,
) -> Callable[..., Any]:
    """Like ``jacrev``, and the function's value, in one evaluation: ``(jacobian, value)``, or
    ``(jacobian, (value, aux))``.

    Example:
        >>> import torch
        >>> from functrans import jacrev_and_value
        >>> jacobian, value = jacrev_and_value(torch.square)(torch.tensor([1.0, 2.0]))
        >>> value
        tensor([1., 4.])
    """
    return by_rows(jacrev_and_value, func, argnums, has_aux, chunk_size, holomorphic, interpreter, with_value=True)


@manner(once=True)
def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
    holomorphic: bool = False,
    interpreter: type[JvpInterpreter] = JvpInterpreter,
) -> Callable[..., Any]:
    """The Jacobian by forward mode: one tangent per element of the arguments, all at once.

    Args:
        func: returns a pytree of tensors (with ``has_aux``, a pair of that and anything).
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        has_aux: ``func`` returns ``(output, aux)``.
        randomness: as in ``vmap``, for random operators in ``func``.
        chunk_size: how many tangents to run at a time; None: all.
        holomorphic: as in ``jacrev``.
        interpreter: as in ``jvp``.

    Returns:
        A function of the same arguments, with results as those of ``jacrev``.

    Raises:
        CallError: as ``jacrev``.

    Example:
        >>> import torch
        >>> from functrans import jacfwd
        >>> jacfwd(torch.square)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
        >>> jacfwd(torch.square, holomorphic=True)(torch.tensor([1j]))
        tensor([[0.+2.j]])
    """
    return by_columns(jacfwd, func, argnums, has_aux, randomness, chunk_size, holomorphic, interpreter)


@manner(once=True)
def jacfwd_and_value(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
    holomorphic: bool = False,
    interpreter: type[JvpInterpreter] = JvpInterpreter,
) -> Callable[..., Any]:
    """Like ``jacfwd``, and the function's value, in one evaluation: ``(jacobian, value)``, or
    ``(jacobian, (value, aux))``.

    Example:
        >>> import torch
        >>> from functrans import jacfwd_and_value
        >>> jacobian, value = jacfwd_and_value(torch.square)(torch.tensor([1.0, 2.0]))
        >>> value
        tensor([1., 4.])
    """
    return by_columns(
        jacfwd_and_value, func, argnums, has_aux, randomness, chunk_size, holomorphic, interpreter, with_value=True
    )


@manner(records=True, once=True)
def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
    holomorphic: bool = False,
) -> Callable[..., Any]:
    """The Hessian, forward over reverse: ``jacfwd(jacrev(func))``.

    Args:
        func: returns a pytree of real floating-point tensors, usually one scalar.
        argnums: position, or tuple of positions, of the arguments to differentiate for.
        has_aux: ``func`` returns ``(output, aux)``.
        chunk_size: how many columns to compute at a time; None: all.
        randomness: as in ``vmap``, for random operators in ``func``, which are run for every column.
        holomorphic: as in ``jacrev``.

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
    return by_columns(hessian, func, argnums, has_aux, randomness, chunk_size, holomorphic, of_rows=True)


def hvp(
    func: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], *, has_aux: bool = False
) -> Any:
    """The value of a scalar function, and the product of its Hessian and a vector, without the Hessian.

    Forward over reverse, ``jvp(grad(func))``: it costs a few evaluations of ``func``, whatever the size of the primals.

    Args:
        func: takes ``*primals``, returns a real scalar tensor (with ``has_aux``, a pair of that and anything).
        primals: a tuple of pytrees of floating-point tensors.
        tangents: the vector, of the structure, shapes and dtypes of ``primals``.
        has_aux: ``func`` returns ``(output, aux)``.

    Returns:
        ``(value, product)``, as ``torch.autograd.functional.hvp``; with ``has_aux`` ``(value, product, aux)``. The
        product is a tuple of the structure, shapes and dtypes of ``primals``.

    Raises:
        CallError: primals and tangents do not match, or the output is no scalar.

    Example:
        >>> import torch
        >>> from functrans import hvp
        >>> hvp(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),), (torch.tensor([1.0, 1.0]),))
        (tensor(9.), (tensor([ 6., 12.]),))
    """
    if is_dynamo_compiling():
        gradient_and_value = grad_and_value(func, tuple(range(len(primals))), has_aux)
        _, product, value = jvp(gradient_and_value, primals, tangents, has_aux=True)
        return (value[0], product, value[1]) if has_aux else (value, product)
    check_callable("hvp", func)
    arguments = "primals, tangents" if has_aux is False else f"primals, tangents, has_aux={shown(has_aux)}"
    call = Call("hvp", func, arguments)
    check_flag(call, "has_aux", has_aux)

    def gradient(*args: Any) -> Any:
        return grad_and_value_of(call, func, tuple(range(len(args))), has_aux, False, args, {})

    gradient.__name__ = f"grad({callable_name(func)})"
    _, product, value = jvp_with_argnums(call, gradient, primals, tangents, ALL, False, True)
    return (value[0], product, value[1]) if has_aux else (value, product)
