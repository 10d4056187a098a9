"""Batching rules of operators that take functions, such as ``torch.ops.higher_order.cond``.

Such a rule is called as any: ``rule(info, in_dims, *args, **kwargs) -> (output, out_dims)``, and may return
NotImplemented. Arguments that are trees have trees of the same structure in ``in_dims``. The functions among them take
physical values: ``f(*values, in_dims=0)`` returns what the user's function does, of every tensor the examples in front.
``in_dims`` is that of all values, or has one for each. What a function captures is not among the arguments, so a rule
is asked also where none of them is batched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functrans.boundary.leftovers import as_here, suspended
from functrans.core.stack import run_transformed
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import HigherOrderOperator, torch_pytree

if TYPE_CHECKING:
    from functrans.interpreters.vmap.interpreter import VmapInterpreter

Body = Callable[["VmapInterpreter"], Any]


def run_rule(
    interpreter: VmapInterpreter, op: HigherOrderOperator, rule: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """What ``rule`` makes of a call of ``op``, at ``interpreter``'s level; or NotImplemented."""

    def below(a: Any) -> Any:
        if isinstance(a, Tensor):
            return interpreter.value_of(a)
        return on_physical(interpreter, a) if callable(a) else a

    if any(interpreter.owns(a) and a.bdim is not None for a in torch_pytree.tree_leaves(kwargs)):
        return NotImplemented  # in_dims are those of the other arguments
    in_dims = [torch_pytree.tree_map(lambda a: a.bdim if interpreter.owns(a) else None, a) for a in args]
    values, options = torch_pytree.tree_map(below, (list(args), kwargs))
    with lowered(interpreter):
        result = rule(interpreter.info, in_dims, *values, **options)
    return result if result is NotImplemented else interpreter.leave(op, result)


def on_physical(outer: VmapInterpreter, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which is code of ``outer``'s level, on values one level down."""

    def of_values(*values: Any, in_dims: int | None | Sequence[Any] = 0) -> Any:
        dims = in_dims if isinstance(in_dims, list | tuple) else [in_dims] * len(values)

        def body(interpreter: VmapInterpreter) -> Any:
            def entered(value: Any, dim: Any) -> Any:
                return torch_pytree.tree_map(
                    lambda v: interpreter.batched(v, dim) if isinstance(v, Tensor) else v, value
                )

            out = function(*[entered(v, d) for v, d in zip(values, dims, strict=True)])
            return torch_pytree.tree_map(lambda x: to_dim(outer.batch_size, *physical(interpreter, x), 0), out)

        return in_its_place(outer, function, body)

    return of_values


def in_its_place(outer: VmapInterpreter, function: Any, body: Body) -> Any:
    """Run ``body``, which calls ``function`` one level down, with another vmap in the place of ``outer``."""
    interpreter = type(outer)(outer.batch_size, outer.randomness, function)
    interpreter.axis_name = outer.axis_name
    with suspended(outer, lambda x: interpreter.rewrap(x, as_here(x.value, expected=True))):
        return run_transformed(interpreter, lambda: body(interpreter))


def physical(interpreter: VmapInterpreter, x: Any) -> tuple[Any, int | None]:
    """What code at the level returned, one level down, and where it has its batch."""
    return (x.value, x.bdim) if interpreter.owns(x) else (x, None)


def to_dim(size: int, x: Any, bdim: int | None, dim: int) -> Any:
    """``x`` with its batch, of ``size``, at ``dim``."""
    if not isinstance(x, Tensor):
        return x
    if bdim is None:
        return x.unsqueeze(dim).expand(*x.shape[:dim], size, *x.shape[dim:])
    return x.movedim(bdim, dim)
