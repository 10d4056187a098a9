"""The public transforms of reverse and forward mode: grad, grad_and_value, value_and_grad, vjp, jvp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import (
    ALL,
    Argnums,
    Inputs,
    argument_cure,
    check_argnums_kind,
    check_complex,
    check_graph,
    check_outputs,
    check_scalar,
    gradients_by,
    is_smooth,
    pick,
    split_aux,
)
from functrans.api.checks import call_function, check_callable, check_flag, check_interpreter
from functrans.api.compiled import TRACED, named_after
from functrans.api.linear_functions import like
from functrans.api.mismatches import refuse_tangent
from functrans.api.pullbacks import Pullback, conjugated
from functrans.api.structures import difference, path_of
from functrans.boundary.facades import bare
from functrans.boundary.factories import ones_for
from functrans.boundary.leftovers import as_here
from functrans.boundary.made_at import note_results
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.errors import Call, CallError, CallTypeError, CallValueError
from functrans.errors.wording import shown, what
from functrans.interpreters.constants import as_own
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.operators.info import DIFFERENTIABLE
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import set_forward_enabled
from functrans.tensors.pytrees import TreeSpec, leaves_like, tree_flatten, tree_map, tree_unflatten


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
    call = differentiating("grad", func, argnums, has_aux, holomorphic)
    if interpreter is not GradInterpreter:
        check_interpreter(call, interpreter, GradInterpreter)
    options = {"argnums": argnums, "has_aux": has_aux, "holomorphic": holomorphic, "interpreter": interpreter}

    @named_after(func)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(grad, func, options, args, kwargs, None)
        grads, value = grad_and_value_of(call, func, argnums, has_aux, holomorphic, args, kwargs, interpreter)
        return (grads, value[1]) if has_aux else grads

    return gradient


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
    call = differentiating("grad_and_value", func, argnums, has_aux, holomorphic)
    if interpreter is not GradInterpreter:
        check_interpreter(call, interpreter, GradInterpreter)
    options = {"argnums": argnums, "has_aux": has_aux, "holomorphic": holomorphic, "interpreter": interpreter}

    @named_after(func)
    def gradient_and_value(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(grad_and_value, func, options, args, kwargs, None)
        return grad_and_value_of(call, func, argnums, has_aux, holomorphic, args, kwargs, interpreter)

    return gradient_and_value


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
    call = differentiating("value_and_grad", func, argnums, has_aux, holomorphic)
    if interpreter is not GradInterpreter:
        check_interpreter(call, interpreter, GradInterpreter)
    options = {"argnums": argnums, "has_aux": has_aux, "holomorphic": holomorphic, "interpreter": interpreter}

    @named_after(func)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(value_and_grad, func, options, args, kwargs, None)
        grads, value = grad_and_value_of(call, func, argnums, has_aux, holomorphic, args, kwargs, interpreter)
        return value, grads

    return value_and_gradient


def differentiating(transform: str, func: Any, argnums: Any, has_aux: Any, holomorphic: Any = False) -> Call:
    """The call ``transform(func, argnums)``, checked as far as it can be without the arguments."""
    if not (is_dynamo_compiling() or callable(func)):  # Dynamo does not know what is callable
        check_callable(transform, func)
    call = Call(transform, func, {"argnums": argnums} if has_aux is False else {"argnums": argnums, "has_aux": has_aux})
    if holomorphic is not False:
        call.arguments["holomorphic"] = holomorphic
        check_flag(call, "holomorphic", holomorphic)
    if type(argnums) is not int:
        check_argnums_kind(call, argnums)
    if has_aux is not False:
        check_flag(call, "has_aux", has_aux)
    return call


def grad_and_value_of(
    call: Call,
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    holomorphic: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cls: type[GradInterpreter] = GradInterpreter,
) -> tuple[Any, Any]:
    interpreter = cls(func)
    inputs, value, index, aux = run_scalar(interpreter, call, func, argnums, has_aux, args, kwargs, holomorphic)
    cotangents = {} if index is None else interpreter.pull({index: unit(bare(value))}, consume=True)
    grads = inputs.collect(cotangents)
    if holomorphic:
        grads = tree_map(conjugated, grads)
    inputs.write_back()
    if STATE.top is not None:
        note_results(2, grads, value, aux)
    return grads, (value, aux) if has_aux else value


def run_scalar(
    interpreter: GradInterpreter,
    call: Call,
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    holomorphic: bool = False,
) -> tuple[Inputs, Any, int | None, Any]:
    """Run ``func``, which returns a scalar, at the level of ``interpreter``: the arguments, which are not written back
    yet, the value, its index, aux."""
    inputs = Inputs(interpreter, call, argnums, args, kwargs)
    if holomorphic:
        check_complex(call, "args", args, inputs.order)

    def body() -> tuple[Any, Any, Any]:
        out = call_function(call, func, inputs.args, inputs.kwargs)
        aux = None
        if has_aux:
            out, aux = split_aux(call, out)
            aux = tree_map(inputs.leave, aux)
        check_scalar(call, out, bool(holomorphic))
        value, index = inputs.leave(out), interpreter.index_of(bare(out))  # in this order: it may be a view to refresh
        if index is None:
            check_graph(interpreter)
        return value, index, aux

    return (inputs, *run_transformed(interpreter, body, enable_grad=True))


def unit(value: Tensor) -> Tensor:
    """The cotangent that a scalar's gradient starts from: a plain 1, whatever levels and batches ``value`` is of."""
    return ones_for(value)


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


def vjp_with_argnums(
    call: Call,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    argnums: Argnums,
    has_aux: bool,
    kwargs: Any = None,
    cls: type[GradInterpreter] = GradInterpreter,
) -> tuple[Any, Pullback, Any]:
    """vjp with respect to some of the primals (for ALL the pullback returns a tuple)."""
    interpreter = cls(func)
    values, spec, pullback, aux = run_recorded(interpreter, call, func, primals, argnums, has_aux, kwargs)
    if STATE.top is not None:
        note_results(2, values, aux)
    return tree_unflatten(spec, values), pullback, aux


def run_recorded(
    interpreter: GradInterpreter,
    call: Call,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    argnums: Argnums,
    has_aux: bool,
    kwargs: Any = None,
    *,
    conjugate: bool = False,
) -> tuple[list[Tensor], TreeSpec, Pullback, Any]:
    """Run ``func`` at the level of ``interpreter``: the outputs, their structure, the pullback, aux."""
    if not primals and argnums is ALL:
        cure = f"The primals follow the function: {call.transform}(f, x, y)."
        raise CallTypeError(call, "no primals", "at least one", cure)
    inputs = Inputs(interpreter, call, argnums, primals, kwargs or {})

    def body() -> tuple[Any, Any, Any, Any]:
        out = call_function(call, func, inputs.args, inputs.kwargs)
        aux = None
        if has_aux:
            out, aux = split_aux(call, out)
            aux = tree_map(inputs.leave, aux)
        leaves, spec = tree_flatten(out)
        check_outputs(call, out, leaves, differentiable=True)
        values = [inputs.leave(o) for o in leaves]
        indices = [interpreter.index_of(bare(o)) for o in leaves]
        if not any(indices):
            check_graph(interpreter)
        return values, indices, spec, aux

    values, indices, spec, aux = run_transformed(interpreter, body, enable_grad=True)
    inputs.write_back()
    pullback = Pullback(call, interpreter, inputs, [like(bare(v)) for v in values], indices, spec, conjugate=conjugate)
    return values, spec, pullback, aux


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
        func: takes ``*primals``, returns a pytree of tensors (with ``has_aux``, a pair of that and anything).
        primals: a tuple of pytrees of tensors. What has no derivative (integers, truth values, other objects) may be
            among them, with None for a tangent, and does not move.
        tangents: of the structure, shapes and dtypes of ``primals``.
        strict: refuse outputs that do not depend on the primals, instead of giving them a zero tangent.
        has_aux: ``func`` returns ``(output, aux)``.
        interpreter: a subclass of ``functrans.extend.JvpInterpreter`` that takes its place at this level.

    Returns:
        ``(output, tangent)``, with ``has_aux`` ``(output, tangent, aux)``.

    Raises:
        CallError: primals and tangents do not match, or an output is not a tensor.

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
    out, tangent, aux = jvp_with_argnums(call, func, primals, tangents, ALL, strict, has_aux, None, interpreter)
    return (out, tangent, aux) if has_aux else (out, tangent)


def jvp_with_argnums(
    call: Call,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: Any,
    argnums: Argnums,
    strict: bool,
    has_aux: bool,
    kwargs: Any = None,
    cls: type[JvpInterpreter] = JvpInterpreter,
) -> tuple[Any, Any, Any]:
    """jvp with respect to some of the primals; ``tangents`` belongs to these."""
    if not isinstance(primals, tuple):
        cure = "Write tuple(primals)." if isinstance(primals, list) else "Write (x,) for one primal."
        raise CallError(call, f"{what(primals)} as primals", "a tuple, so that f(*primals) is a valid call", cure)
    moving = primals if argnums is ALL else pick(call, primals, argnums)
    leaves, spec = tree_flatten(moving)
    tangent_leaves, tangent_spec = leaves_like(tangents, spec)
    if spec != tangent_spec:
        raise CallError(call, *difference("tangents", tangents, "primals", moving))
    if not leaves:
        raise CallError(call, f"{what(primals)} as primals", "at least one tensor")
    for place, (p, t) in enumerate(zip(leaves, tangent_leaves, strict=True)):
        if t is None and argnums is ALL and not is_smooth(p):
            continue
        if not isinstance(p, Tensor):
            cure = argument_cure(p)
            raise CallError(call, f"{what(p)} as {path_of('primals', moving, place)}", "a tensor", cure)
        if p.dtype not in DIFFERENTIABLE:
            got = f"a tensor of dtype {p.dtype} as {path_of('primals', moving, place)}"
            cure = "Convert it, e.g. with .float(); where it is not to move, its tangent is None."
            raise CallValueError(call, got, "a floating-point or complex dtype", cure)
        if not isinstance(t, Tensor) or p.shape != t.shape or p.dtype != t.dtype or p.device != t.device:
            refuse_tangent(call, p, t, place, moving)
    along = [t for t in tangent_leaves if t is not None]
    if not along:
        raise CallError(call, f"{what(tangents)} as tangents", "at least one that is a tensor")
    values, found, out_spec, aux, inputs = run_forward(
        call, func, primals, along, argnums, strict, has_aux, kwargs, cls
    )
    inputs.write_back()
    out_tangents = [torch.zeros_like(bare(v)) if t is None else t for v, t in zip(values, found, strict=True)]
    out_tangents = gradients_by(values, out_tangents)
    if STATE.top is not None:
        note_results(2, values, out_tangents, aux)
    return tree_unflatten(out_spec, values), tree_unflatten(out_spec, out_tangents), aux


def run_forward(
    call: Call,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: list[Tensor],
    argnums: Argnums,
    strict: bool,
    has_aux: bool,
    kwargs: Any = None,
    cls: type[JvpInterpreter] = JvpInterpreter,
) -> tuple[list[Tensor], list[Tensor | None], TreeSpec, Any, Inputs]:
    """Run ``func`` on primals with tangents: the outputs, their tangents (None: zero), their structure, aux, and the
    arguments, which are not written back yet."""
    interpreter = cls(func)
    interpreter.seeds = tangents
    pairs = map(bare, tangents)
    dual = lambda v: interpreter.dual(v, as_here(next(pairs)))
    inputs = Inputs(interpreter, call, argnums, primals, kwargs or {}, dual)

    def body() -> tuple[Any, Any, Any, Any]:
        set_forward_enabled(True)
        out = call_function(call, func, inputs.args, inputs.kwargs)
        aux = None
        if has_aux:
            out, aux = split_aux(call, out)
            aux = tree_map(inputs.leave, aux)
        out_leaves, out_spec = tree_flatten(out)
        check_outputs(call, out, out_leaves)
        values = [inputs.leave(o) for o in out_leaves]
        below = map(bare, out_leaves)
        found = [
            as_own(interpreter.below, o.tangent) if type(o) is WrapperTensor and o.interpreter is interpreter else None
            for o in below
        ]
        if strict and any(t is None for t in found):
            independent = path_of("output", out, next(i for i, t in enumerate(found) if t is None))
            raise CallError(
                call,
                f"{independent}, which does not depend on the primals",
                "outputs that do, since strict=True",
                "Pass strict=False for zero tangents.",
            )
        return values, found, out_spec, aux

    return (*run_transformed(interpreter, body), inputs)
