"""The public transforms of reverse and forward mode: grad, grad_and_value, value_and_grad, vjp, jvp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import ALL, Argnums
from functrans.api.checks import check_callable, check_flag, check_interpreter
from functrans.api.compiled import TRACED, manner, named_after
from functrans.api.forward import jvp_with_argnums
from functrans.api.reverse import differentiating, grad_and_value_of, vjp_with_argnums
from functrans.errors import Call
from functrans.errors.wording import shown
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter


@manner(records=True, once=True)
def grad(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
    interpreter: type[GradInterpreter] = GradInterpreter,
) -> Callable[..., Any]:
    """The gradient of a scalar function.

    Args:
        func: takes tensors (or pytrees of them) and returns one tensor without dimensions, floating-point and real, or
            ``(output, aux)`` with ``has_aux``.
        argnums: position, or tuple of positions, of the arguments to differentiate for. Negative ones count from the
            end.
        has_aux: ``func`` returns a second value of any kind, passed on beside the gradient.
        holomorphic: ``func`` is promised to be holomorphic in the arguments that ``argnums`` names: they and the output
            are complex, and the result is the complex derivative df/dz. Without it the output is real, and the gradient
            for a complex argument is the direction of steepest ascent, PyTorch's convention: the conjugate of JAX's.
        interpreter: a subclass of ``functrans.extend.GradInterpreter`` that takes its place at this level.

    Returns:
        A function of the same arguments. It returns the gradient, of the structure, shapes and dtypes of the argument
        that ``argnums`` names (a tuple of them if ``argnums`` is one), or ``(gradient, aux)``.

    Raises:
        CallError: the output is not a scalar tensor, ``argnums`` does not fit the arguments, or an argument to
            differentiate for is not floating-point or complex.

    Example:
        >>> import torch
        >>> from functrans import grad
        >>> x = torch.tensor(0.5)
        >>> torch.allclose(grad(torch.sin)(x), x.cos())
        True
        >>> torch.allclose(grad(grad(torch.sin))(x), -x.sin())
        True
    """
    return gradients(grad, func, argnums, has_aux, holomorphic, interpreter, gradient_alone)


@manner(records=True, once=True)
def grad_and_value(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
    interpreter: type[GradInterpreter] = GradInterpreter,
) -> Callable[..., Any]:
    """Like ``grad``, and the function's value: returns ``(gradient, value)``, or ``(gradient, (value, aux))``.

    Example:
        >>> import torch
        >>> from functrans import grad_and_value
        >>> grad_and_value(lambda x: x**2)(torch.tensor(3.0))
        (tensor(6.), tensor(9.))
    """
    return gradients(grad_and_value, func, argnums, has_aux, holomorphic, interpreter, gradient_first)


@manner(records=True, once=True)
def value_and_grad(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
    interpreter: type[GradInterpreter] = GradInterpreter,
) -> Callable[..., Any]:
    """Like ``grad_and_value``, in JAX's order: returns ``(value, gradient)``, or ``((value, aux), gradient)``.

    Example:
        >>> import torch
        >>> from functrans import value_and_grad
        >>> value_and_grad(lambda x: x**2)(torch.tensor(3.0))
        (tensor(9.), tensor(6.))
    """
    return gradients(value_and_grad, func, argnums, has_aux, holomorphic, interpreter, value_first)


def gradients(
    transform: Callable[..., Any],
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    holomorphic: bool,
    interpreter: type[GradInterpreter],
    arranged: Callable[..., Any],
) -> Callable[..., Any]:
    """What ``transform``, one of those above, returns; ``arranged``: its results, of the gradient and the value, which
    is ``(value, aux)`` with aux."""
    call = differentiating(transform.__name__, func, argnums, has_aux, holomorphic)
    if interpreter is not GradInterpreter:
        check_interpreter(call, interpreter, GradInterpreter)
    options = {"argnums": argnums, "has_aux": has_aux, "holomorphic": holomorphic, "interpreter": interpreter}

    @named_after(func)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(transform, func, options, args, kwargs, None)
        grads, value = grad_and_value_of(call, func, argnums, has_aux, holomorphic, args, kwargs, interpreter)
        return arranged(grads, value, has_aux)

    return gradient


def gradient_alone(grads: Any, value: Any, has_aux: bool) -> Any:
    return (grads, value[1]) if has_aux else grads


def gradient_first(grads: Any, value: Any, has_aux: bool) -> Any:
    return grads, value


def value_first(grads: Any, value: Any, has_aux: bool) -> Any:
    return value, grads


@manner(at_once=True, returns_function=True, records=True, once=True)
def vjp(
    func: Callable[..., Any],
    *primals: Any,
    has_aux: bool = False,
    interpreter: type[GradInterpreter] = GradInterpreter,
) -> Any:
    """The value of ``func`` and its pullback: the vector-Jacobian product, as a function of the cotangent.

    Args:
        func: takes ``*primals``, returns a pytree of floating-point or complex tensors (with ``has_aux``, a pair of
            that and anything).
        *primals: pytrees of floating-point or complex tensors.
        has_aux: ``func`` returns ``(output, aux)``.
        interpreter: as in ``grad``.

    Returns:
        ``(output, pullback)``, with ``has_aux`` ``(output, pullback, aux)``. ``pullback(cotangents)`` takes cotangents
        of the structure and shapes of ``output`` and returns a tuple with one cotangent per primal; it may be called
        repeatedly.

    Raises:
        CallError: an output or a cotangent is not what is described above.
        ModifiedError: a value that the pullback needs was modified in place before it was called.

    Example:
        >>> import torch
        >>> from functrans import vjp
        >>> out, pullback = vjp(torch.exp, torch.zeros(2))
        >>> pullback(torch.tensor([1.0, 2.0]))
        (tensor([1., 2.]),)
    """
    if is_dynamo_compiling():
        return TRACED(vjp, func, {"has_aux": has_aux, "interpreter": interpreter}, primals, {}, None)
    check_callable("vjp", func)
    call = Call("vjp", func, "..." if has_aux is False else f"..., has_aux={shown(has_aux)}")
    check_flag(call, "has_aux", has_aux)
    if interpreter is not GradInterpreter:
        check_interpreter(call, interpreter, GradInterpreter)
    out, pullback, aux = vjp_with_argnums(call, func, primals, ALL, has_aux, None, interpreter)
    return (out, pullback, aux) if has_aux else (out, pullback)


@manner(at_once=True, once=True)
def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    strict: bool = False,
    has_aux: bool = False,
    interpreter: type[JvpInterpreter] = JvpInterpreter,
) -> Any:
    """The value of ``func`` and its directional derivative: the Jacobian-vector product.

    Args:
        func: takes ``*primals``, returns a pytree of tensors (with ``has_aux``, a pair of that and anything). Other
            things may be among these, such as None, an int or a name, but no floating-point or complex numbers, which
            have left their derivative behind.
        primals: a tuple of pytrees of tensors. What has no derivative (integers, truth values, other objects) may be
            among them, with None for a tangent, and does not move.
        tangents: of the structure, shapes and dtypes of ``primals``.
        strict: refuse outputs that do not depend on the primals, instead of giving them a zero tangent.
        has_aux: ``func`` returns ``(output, aux)``.
        interpreter: a subclass of ``functrans.extend.JvpInterpreter`` that takes its place at this level.

    Returns:
        ``(output, tangent)``, with ``has_aux`` ``(output, tangent, aux)``. Of an output without derivative the tangent
        is zero, of what is no tensor None.

    Raises:
        CallError: primals and tangents do not match, or no output is a tensor.

    Example:
        >>> import torch
        >>> from functrans import jvp
        >>> jvp(torch.exp, (torch.zeros(2),), (torch.tensor([1.0, 2.0]),))
        (tensor([1., 1.]), tensor([1., 2.]))
    """
    if is_dynamo_compiling():
        options = {"strict": strict, "has_aux": has_aux, "interpreter": interpreter}
        return TRACED(jvp, func, options, primals, {}, tangents)
    check_callable("jvp", func)
    call = Call(
        "jvp", func, "primals, tangents" if has_aux is False else f"primals, tangents, has_aux={shown(has_aux)}"
    )
    if strict is not False or has_aux is not False:
        check_flag(call, "strict", strict)
        check_flag(call, "has_aux", has_aux)
    if interpreter is not JvpInterpreter:
        check_interpreter(call, interpreter, JvpInterpreter)
    out, tangent, aux = jvp_with_argnums(call, func, primals, tangents, ALL, strict, has_aux, None, interpreter, True)
    return (out, tangent, aux) if has_aux else (out, tangent)
