"""How Jacobians are computed: compositions of vjp, jvp and vmap, a row or a column for each example of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import Argnums, check_argnums, check_arguments, check_complex, pick, refuse_complex
from functrans.api.checks import check_chunk_size, check_interpreter, check_randomness
from functrans.api.compiled import TRACED, named_after
from functrans.api.forward import jvp_with_argnums
from functrans.api.pullbacks import Pullback, conjugated
from functrans.api.reverse import differentiating, vjp_with_argnums
from functrans.api.vmap import vmap
from functrans.boundary.factories import identity_for, model_of, ones_for
from functrans.errors import Call, CallError
from functrans.errors.wording import callable_name, what
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.tensors.broadcasting import same_shape
from functrans.tensors.pytrees import tree_flatten, tree_map, tree_unflatten


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


class Asked(NamedTuple):
    """A Jacobian as it was asked for."""

    call: Call
    argnums: Argnums
    has_aux: bool
    chunk_size: int | None
    holomorphic: bool
    interpreter: Any
    with_value: bool
    randomness: str = "error"


def asked_for(
    transform: Callable[..., Any], func: Callable[..., Any], base: Any, with_value: bool, options: dict[str, Any]
) -> Asked:
    """``transform(func, **options)``, checked as far as it can be without the arguments; ``base``: its interpreter."""
    asked = Asked(
        differentiating(transform.__name__, func, options["argnums"], options["has_aux"], options["holomorphic"]),
        **{"interpreter": base, "with_value": with_value, **options},
    )
    check_chunk_size(asked.call, asked.chunk_size)
    check_randomness(asked.call, asked.randomness)
    if asked.interpreter is not base:
        check_interpreter(asked.call, asked.interpreter, base)
    return asked


def by_rows(
    transform: Callable[..., Any],
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    chunk_size: int | None,
    holomorphic: bool,
    interpreter: type[GradInterpreter],
    *,
    with_value: bool = False,
) -> Callable[..., Any]:
    """What ``transform``, one of the above, returns."""
    options = {
        "argnums": argnums, "has_aux": has_aux, "chunk_size": chunk_size, "holomorphic": holomorphic,
        "interpreter": interpreter,
    }  # fmt: skip
    asked = asked_for(transform, func, GradInterpreter, with_value, options)
    return traceable(transform, func, options, jacobian(asked, func, rows))


def by_columns(
    transform: Callable[..., Any],
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    randomness: str,
    chunk_size: int | None,
    holomorphic: bool,
    interpreter: type[JvpInterpreter] = JvpInterpreter,
    *,
    with_value: bool = False,
    of_rows: bool = False,
) -> Callable[..., Any]:
    """What ``transform``, one of the above or ``hessian``, returns; ``of_rows``: the Jacobian of ``jacrev(func)``."""
    options: dict[str, Any] = {
        "argnums": argnums, "has_aux": has_aux, "randomness": randomness, "chunk_size": chunk_size,
        "holomorphic": holomorphic,
    }  # fmt: skip
    if not of_rows:
        options["interpreter"] = interpreter
    asked = asked_for(transform, func, JvpInterpreter, with_value, options)
    inner = func
    if of_rows:
        call, *_ = asked
        of_gradients = Asked(call, argnums, has_aux, None, holomorphic, GradInterpreter, with_value)
        inner = jacobian(of_gradients, func, rows)
    return traceable(transform, func, options, jacobian(asked, inner, columns))


def jacobian(asked: Asked, func: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """The function from arguments to the Jacobian that ``compute``, ``rows`` or ``columns``, returns for them."""

    @named_after(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        check_numbers(asked.call, asked.holomorphic, args, asked.argnums)
        result, value, aux = compute(asked, func, args, kwargs)
        if asked.with_value:
            return result, (value, aux) if asked.has_aux else value
        return (result, aux) if asked.has_aux else result

    return jacobian


def rows(asked: Asked, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The Jacobian by one pullback for each element of the output, the value, aux."""
    call, argnums, has_aux, chunk_size, holomorphic, cls, *_ = asked
    out, pullback, aux = vjp_with_argnums(call, func, args, argnums, has_aux, kwargs, cls)
    check_output_numbers(call, holomorphic, out)
    result = rows_of(out, pullback, chunk_size)
    if holomorphic:  # a pullback holds the conjugates
        result = tree_map(conjugated, result)
    return result, out, aux


def rows_of(out: Any, pullback: Pullback, chunk_size: int | None) -> Any:
    """What ``pullback`` makes of every row of the identity, in the shape of a Jacobian."""
    leaves, spec = tree_flatten(out)
    numels = [o.numel() for o in leaves]

    def pull(basis: list[Tensor]) -> Any:
        return pullback(tree_unflatten(spec, [shaped(b, o.shape) for b, o in zip(basis, leaves, strict=True)]))

    if len(leaves) == 1 and leaves[0].dim() == 0:  # one row: no batch, and no basis
        return tree_unflatten(spec, [pullback(tree_unflatten(spec, [ones_for(leaves[0])]))])
    behind = pullback.rows() if chunk_size != 1 else None
    if behind is not None:
        pulled = vmap(behind[1], chunk_size=chunk_size)(behind[0])
    elif chunk_size == 1 and sum(numels):
        basis = standard_basis(leaves, numels)
        pulled = tree_stack([pull([b[i] for b in basis]) for i in range(sum(numels))])
    else:
        pulled = vmap(pull, chunk_size=chunk_size)(standard_basis(leaves, numels))
    row_leaves, row_spec = tree_flatten(pulled)
    found = []
    for i, o in enumerate(leaves):
        start = sum(numels[:i])
        own = row_leaves if len(leaves) == 1 else [r.narrow(0, start, numels[i]) for r in row_leaves]
        block = [shaped(r, (*o.shape, *r.shape[1:])) for r in own]
        found.append(tree_unflatten(row_spec, block))
    return tree_unflatten(spec, found)


def columns(
    asked: Asked, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """The Jacobian by one tangent for each element of the arguments, the value, aux."""
    call, argnums, has_aux, chunk_size, holomorphic, cls, with_value, randomness = asked
    moving = pick(call, args, argnums)
    leaves, spec = tree_flatten(moving)
    check_arguments(call, args, argnums)
    if not leaves:
        raise CallError(call, f"{what(moving)} to differentiate for", "at least one tensor")
    numels = [x.numel() for x in leaves]

    def push(basis: list[Tensor]) -> Any:
        tangents = tree_unflatten(spec, [shaped(b, x.shape) for b, x in zip(basis, leaves, strict=True)])
        out, tangent, aux = jvp_with_argnums(call, func, args, tangents, argnums, False, has_aux, kwargs, cls)
        check_output_numbers(call, holomorphic, out)
        return tangent, (out if with_value else None), aux

    push.__name__ = f"jvp({callable_name(func)})"
    push.of_basis = True  # type: ignore[attr-defined]  # of what has a name, see shipped/sow.py

    push_all = vmap(push, out_dims=(0, None, None), randomness=randomness, chunk_size=chunk_size)
    pushed, out, aux = push_all(standard_basis(leaves, numels))
    column_leaves, out_spec = tree_flatten(pushed)
    found = []
    for c in column_leaves:
        block, start = [], 0
        for x, n in zip(leaves, numels, strict=True):
            own = c if len(leaves) == 1 else c.narrow(0, start, n)
            block.append(shaped(own.movedim(0, -1) if c.dim() > 1 else own, (*c.shape[1:], *x.shape)))
            start += n
        found.append(tree_unflatten(spec, block))
    return tree_unflatten(out_spec, found), out, aux


def check_numbers(call: Call, holomorphic: bool, args: tuple[Any, ...], argnums: Argnums) -> None:
    """The arguments to differentiate for are real, and complex where the function is ``holomorphic``."""
    check = check_complex if holomorphic else refuse_complex
    check(call, "args", args, check_argnums(call, argnums, len(args)))


def check_output_numbers(call: Call, holomorphic: bool, out: Any) -> None:
    check = check_complex if holomorphic else refuse_complex
    check(call, "output", out)


def shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x if same_shape(x.shape, shape) else x.reshape(shape)


def tree_stack(trees: list[Any]) -> Any:
    """Trees of one structure as one tree, each leaf stacked."""
    flat = [tree_flatten(tree) for tree in trees]
    return tree_unflatten(flat[0][1], [torch.stack(leaves) for leaves in zip(*(f[0] for f in flat), strict=True)])


def standard_basis(leaves: list[Tensor], numels: list[int]) -> list[Tensor]:
    """Per leaf of ``n`` elements, the rows of the identity over all leaves that fall into it: shape (total, n)."""
    total = sum(numels)
    if len(leaves) == 1:
        return [identity_for(leaves[0], total)]
    found, start = [], 0
    for x, n in zip(leaves, numels, strict=True):
        if model_of(x) is None:
            zeros = torch.zeros(total, n, dtype=x.dtype, device=x.device)
            found.append(torch.diagonal_scatter(zeros, torch.ones(n, dtype=x.dtype, device=x.device), offset=-start))
        else:
            found.append(identity_for(x, total).narrow(1, start, n))
        start += n
    return found
