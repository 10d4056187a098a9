"""The public transforms of reverse and forward mode: grad, grad_and_value, value_and_grad, vjp, jvp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.arguments import (
    Argnums,
    Inputs,
    check_outputs,
    kinds,
    pick,
    slot_of,
    split_aux,
    unwrap,
)
from functrans.errors import Call, CallError, CallValueError
from functrans.interpreters.grad.interpreter import GradInterpreter, check_versions
from functrans.interpreters.grad.recording import DIFFERENTIABLE
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.made_at import note_results
from functrans.pytrees import tree_flatten, tree_map, tree_unflatten
from functrans.stack import STATE, door_closed, run_transformed
from functrans.tensor import WrapperTensor


def grad(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """The gradient of a scalar function.

    Args:
        func: takes tensors (or pytrees of them) and returns one tensor without dimensions, floating-point and real, or
            ``(output, aux)`` with ``has_aux``.
        argnums: position, or tuple of positions, of the arguments to differentiate for. Negative ones count from the end.
        has_aux: ``func`` returns a second value of any kind, passed on beside the gradient.

    Returns:
        A function of the same arguments. It returns the gradient, of the structure, shapes and dtypes of the argument that
        ``argnums`` names (a tuple of them if ``argnums`` is one), or ``(gradient, aux)``.

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

    @functools.wraps(func, updated=())
    def gradient(*args: Any, **kwargs: Any) -> Any:
        grads, value = _grad_and_value("grad", func, argnums, has_aux, args, kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradient


def grad_and_value(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Like ``grad``, and the function's value: returns ``(gradient, value)``, or ``(gradient, (value, aux))``.

    Example:
        >>> import torch
        >>> from functrans import grad_and_value
        >>> grad_and_value(lambda x: x**2)(torch.tensor(3.0))
        (tensor(6.), tensor(9.))
    """

    @functools.wraps(func, updated=())
    def gradient_and_value(*args: Any, **kwargs: Any) -> Any:
        return _grad_and_value("grad_and_value", func, argnums, has_aux, args, kwargs)

    return gradient_and_value


def value_and_grad(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Like ``grad_and_value``, in JAX's order: returns ``(value, gradient)``, or ``((value, aux), gradient)``.

    Example:
        >>> import torch
        >>> from functrans import value_and_grad
        >>> value_and_grad(lambda x: x**2)(torch.tensor(3.0))
        (tensor(9.), tensor(6.))
    """

    @functools.wraps(func, updated=())
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        grads, value = _grad_and_value("value_and_grad", func, argnums, has_aux, args, kwargs)
        return value, grads

    return value_and_gradient


def _grad_and_value(
    transform: str, func: Callable[..., Any], argnums: Argnums, has_aux: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    call = Call(transform, func, {"argnums": argnums})
    interpreter = GradInterpreter(func)
    inputs = Inputs(interpreter, call, argnums, args, kwargs)

    def body() -> tuple[Any, Any, Any]:
        out = func(*inputs.args, **inputs.kwargs)
        aux = None
        if has_aux:
            out, aux = split_aux(call, out)
            aux = tree_map(functools.partial(unwrap, interpreter), aux)
        if not isinstance(out, Tensor):
            raise CallError(
                call,
                f"an output of type {type(out).__name__}",
                "a tensor",
                "Return (output, aux) and pass has_aux=True for more than one value.",
            )
        if out.dim() != 0:
            raise CallError(
                call,
                f"an output of shape {tuple(out.shape)}",
                "a scalar tensor, of shape ()",
                "Reduce it with .sum() or .mean(), or use functrans.vjp or functrans.jacrev.",
            )
        if out.dtype not in DIFFERENTIABLE or out.dtype.is_complex:
            raise CallError(
                call, f"an output of dtype {out.dtype}", "a real floating-point output", "Other outputs have no gradient."
            )
        return unwrap(interpreter, out), slot_of(interpreter, out), aux

    value, slot, aux = run_transformed(interpreter, body, enable_grad=True)
    cotangents = {} if slot is None else interpreter.pull({slot: unit(value)}, consume=True)
    grads = inputs.collect(cotangents)
    inputs.write_back()
    if STATE.top is not None:
        note_results(2, grads, value, aux)
    return grads, (value, aux) if has_aux else value


def unit(value: Tensor) -> Tensor:
    """The cotangent that a scalar's gradient starts from: a plain 1, whatever levels and batches ``value`` belongs to."""
    with door_closed():
        return torch.ones((), dtype=value.dtype, device=value.device)


def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """The value of ``func`` and its pullback: the vector-Jacobian product, as a function of the cotangent.

    Args:
        func: takes ``*primals``, returns a pytree of floating-point or complex tensors (with ``has_aux``, a pair of that and
            anything).
        *primals: pytrees of floating-point or complex tensors.
        has_aux: ``func`` returns ``(output, aux)``.

    Returns:
        ``(output, pullback)``, with ``has_aux`` ``(output, pullback, aux)``. ``pullback(cotangents)`` takes cotangents of the structure and
        shapes of ``output`` and returns a tuple with one cotangent per primal; it may be called repeatedly.

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
    out, pullback, aux = vjp_with_argnums("vjp", func, primals, None, has_aux)
    return (out, pullback, aux) if has_aux else (out, pullback)


def vjp_with_argnums(
    transform: str, func: Callable[..., Any], primals: tuple[Any, ...], argnums: Argnums | None, has_aux: bool, kwargs: Any = None
) -> tuple[Any, Callable[..., Any], Any]:
    """vjp with respect to some of the primals (None: all, the pullback then returns a tuple)."""
    call = Call(transform, func, "...")
    interpreter = GradInterpreter(func)
    inputs = Inputs(interpreter, call, tuple(range(len(primals))) if argnums is None else argnums, primals, kwargs or {})

    def body() -> tuple[Any, Any, Any, Any]:
        out = func(*inputs.args, **inputs.kwargs)
        aux = None
        if has_aux:
            out, aux = split_aux(call, out)
            aux = tree_map(functools.partial(unwrap, interpreter), aux)
        leaves, spec = tree_flatten(out)
        check_outputs(call, leaves)
        for leaf in leaves:
            if leaf.dtype not in DIFFERENTIABLE:
                raise CallError(
                    call, f"an output of dtype {leaf.dtype}", "floating-point or complex outputs", "Return others as aux, with has_aux=True."
                )
        return [unwrap(interpreter, o) for o in leaves], [slot_of(interpreter, o) for o in leaves], spec, aux

    values, slots, spec, aux = run_transformed(interpreter, body, enable_grad=True)
    inputs.write_back()
    if STATE.top is not None:
        note_results(2, values, aux)
    versions = interpreter.saved_versions()
    shapes = [(v.shape, v.dtype) for v in values]

    def pullback(cotangents: Any, retain_graph: bool = True, create_graph: bool | None = None) -> Any:
        """Cotangents of the primals, given cotangents of the output. (The other arguments are torch.func's and have no effect.)"""
        leaves, given = tree_flatten(cotangents)
        if given != spec:
            raise CallError(f"pullback of {call}", f"cotangents of structure {given}", f"the output's structure {spec}")
        seeds: dict[int, Tensor] = {}
        for slot, c, (shape, dtype) in zip(slots, leaves, shapes, strict=True):
            if not isinstance(c, Tensor):
                raise CallError(f"pullback of {call}", f"a cotangent of type {type(c).__name__}", "a tensor")
            if c.shape != shape:
                raise CallError(f"pullback of {call}", f"a cotangent of shape {tuple(c.shape)}", f"the output's shape {tuple(shape)}")
            if slot is not None:
                c = c if c.dtype is dtype else c.to(dtype)
                seeds[slot] = seeds[slot] + c if slot in seeds else c
        check_versions(versions)
        found = inputs.collect(interpreter.pull(seeds, consume=False))
        if STATE.top is not None:
            note_results(1, found)
        return found

    def rows() -> tuple[Tensor, Callable[[Tensor], Any]] | None:
        """For one output that is a vector: rows of cotangents behind its last steps, and the pullback of the rest for one of them."""
        if len(values) != 1 or slots[0] is None or values[0].dim() != 1 or values[0].dtype.is_complex:
            return None
        check_versions(versions)
        behind = interpreter.rows_behind(slots[0], values[0].shape[0], values[0])
        if behind is None:
            return None
        cotangents, slot, end = behind
        return cotangents, lambda row: inputs.collect(interpreter.pull({slot: row}, consume=False, end=end))

    pullback.rows = rows  # type: ignore[attr-defined]
    return tree_unflatten(spec, values), pullback, aux


def jvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> Any:
    """The value of ``func`` and its directional derivative: the Jacobian-vector product.

    Args:
        func: takes ``*primals``, returns a pytree of tensors (with ``has_aux``, a pair of that and anything).
        primals: a tuple of pytrees of tensors.
        tangents: of the structure, shapes and dtypes of ``primals``.
        strict: refuse outputs that do not depend on the primals, instead of giving them a zero tangent.
        has_aux: ``func`` returns ``(output, aux)``.

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
    out, tangent, aux = jvp_with_argnums("jvp", func, primals, tangents, None, strict, has_aux)
    return (out, tangent, aux) if has_aux else (out, tangent)


def jvp_with_argnums(
    transform: str,
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: Any,
    argnums: Argnums | None,
    strict: bool,
    has_aux: bool,
    kwargs: Any = None,
) -> tuple[Any, Any, Any]:
    """jvp with respect to some of the primals; ``tangents`` belongs to these."""
    call = Call(transform, func, "primals, tangents")
    if not isinstance(primals, tuple):
        raise CallError(call, f"primals of type {type(primals).__name__}", "a tuple, so that f(*primals) is a valid call", "Write (x,) for one primal.")
    moving = primals if argnums is None else pick(call, primals, argnums)
    leaves, spec = tree_flatten(moving)
    tangent_leaves, tangent_spec = tree_flatten(tangents)
    if spec != tangent_spec:
        raise CallError(call, f"tangents of structure {tangent_spec}", f"the primals' structure {spec}")
    if not leaves or not all(isinstance(p, Tensor) for p in leaves):
        raise CallError(call, f"primals {kinds(leaves)}", "at least one tensor, and only tensors")
    if not all(isinstance(t, Tensor) for t in tangent_leaves):
        raise CallError(call, f"tangents {kinds(tangent_leaves)}", "only tensors")
    for p, t in zip(leaves, tangent_leaves, strict=True):
        if p.shape != t.shape:
            raise CallError(call, f"a tangent of shape {tuple(t.shape)}", f"the primal's shape {tuple(p.shape)}")
        if p.dtype not in DIFFERENTIABLE:
            raise CallValueError(call, f"a primal of dtype {p.dtype}", "a floating-point or complex dtype", "Convert it, e.g. with .float().")
        if p.dtype != t.dtype:
            raise CallError(call, f"a tangent of dtype {t.dtype}", f"the primal's dtype {p.dtype}", "Convert it with .to(primal.dtype).")
    interpreter = JvpInterpreter(func)
    pairs = iter(tangent_leaves)
    inputs = Inputs(interpreter, call, tuple(range(len(primals))) if argnums is None else argnums, primals, kwargs or {}, lambda v: interpreter.dual(v, next(pairs)))

    def body() -> tuple[Any, Any, Any, Any]:
        torch._C._set_fwd_grad_enabled(True)
        out = func(*inputs.args, **inputs.kwargs)
        aux = None
        if has_aux:
            out, aux = split_aux(call, out)
            aux = tree_map(functools.partial(unwrap, interpreter), aux)
        out_leaves, out_spec = tree_flatten(out)
        check_outputs(call, out_leaves)
        values = [unwrap(interpreter, o) for o in out_leaves]
        found = [o.tangent if type(o) is WrapperTensor and o.interpreter is interpreter else None for o in out_leaves]
        if strict and any(t is None for t in found):
            i = next(i for i, t in enumerate(found) if t is None)
            raise CallError(call, f"output {i}, which does not depend on the primals", "dependent outputs, as strict=True", "Pass strict=False for zero tangents.")
        return values, found, out_spec, aux

    values, found, out_spec, aux = run_transformed(interpreter, body)
    inputs.write_back()
    out_tangents = [torch.zeros_like(v) if t is None else t for v, t in zip(values, found, strict=True)]
    if STATE.top is not None:
        note_results(2, values, out_tangents, aux)
    return tree_unflatten(out_spec, values), tree_unflatten(out_spec, out_tangents), aux
