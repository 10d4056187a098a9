"""The Laplacian in one forward pass.

A wrapper carries the derivatives of its value along all directions, stacked, and the sum of its second derivatives
along them. That sum is pushed forward as one tensor: where a function bends, the squares of the first derivatives are
summed before anything is multiplied by its second derivative. (Li et al., A computational framework for neural
network-based variational Monte Carlo with Forward Laplacian, Nature Machine Intelligence, 2024; Dangel et al.,
Collapsing Taylor Mode Automatic Differentiation, arXiv:2505.13644.)

    y = f(x):   y_d = f'(x)·x_d      Σ y_dd = f'(x)·Σ x_dd + Σ f''(x)[x_d, x_d]
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from functrans.api.checks import call_function, check_callable, check_dense, check_flag
from functrans.api.transforms import jvp
from functrans.api.vmap import vmap
from functrans.core.dispatch import map_tensors
from functrans.core.errors import Call, CallValueError
from functrans.core.errors.wording import shown, what
from functrans.core.operators import DIFFERENTIABLE, op_info
from functrans.core.pytrees import tree_flatten, tree_map, tree_unflatten
from functrans.core.rules import RuleTable
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import door_closed, lowered
from functrans.derivatives.table import NO_TANGENT
from functrans.extension.without_rule import as_function, passed
from functrans.shipped.by_derivatives import DerivativeInterpreter, DerivativeRule, value_of

aten = torch.ops.aten


def laplacian(
    f: Callable[..., Any],
    *,
    with_value: bool = False,
    directions: Tensor | None = None,
    samples: int | None = None,
) -> Callable[..., Any]:
    """The Laplacian of ``f``: the trace of its Hessian by the first argument, in one forward pass.

    Args:
        f: takes a real floating-point tensor, and maybe further arguments, and returns a tensor or a pytree of tensors.
        with_value: return ``(value, gradient, laplacian)``, all of the same pass.
        directions: a tensor ``[D, *x.shape]``: the sum of the second derivatives along these D directions v, that is
            Σ vᵀHv, in the place of that along the axes. With √w·axis as directions it is a weighted Laplacian. The
            gradient then has the D derivatives along them.
        samples: estimate the Laplacian by this many random directions of independent signs (Hutchinson's estimator,
            exact for quadratic functions of separate coordinates). Inside of vmap, it asks for its ``randomness``.

    Returns:
        A function of the same arguments. For each tensor of shape S that ``f`` returns, the Laplacian has shape S, and
        the gradient ``[*S, *x.shape]`` (``[*S, D]`` with directions or samples).

    Raises:
        CallTypeError: the first argument is no real floating-point tensor.
        CallValueError: ``directions`` do not fit the argument, or ``samples`` is no positive number.

    Example:
        >>> import torch
        >>> from functrans import laplacian
        >>> f = lambda x: (x**3).sum()
        >>> laplacian(f)(torch.tensor([1.0, 2.0]))
        tensor(18.)
        >>> laplacian(f, with_value=True)(torch.tensor([1.0, 2.0]))
        (tensor(9.), tensor([ 3., 12.]), tensor(18.))
        >>> laplacian(laplacian(lambda x: (x**4).sum()))(torch.tensor([1.0, 2.0]))
        tensor(48.)
    """
    check_callable("laplacian", f)
    call = Call("laplacian", f, {})
    check_flag("laplacian(f)", "with_value", with_value)
    if samples is not None and (type(samples) is not int or not 0 < samples < 2**31 or directions is not None):
        got = f"samples={shown(samples)}" + (" with directions" if directions is not None else "")
        raise CallValueError(call, got, "a positive number of samples, or directions")

    @functools.wraps(f, updated=())
    def function(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        check_dense(call, "first argument", x, "a real floating-point tensor", kinds="f")
        along = directions
        if along is None and samples is not None:
            signs = torch.randint(0, 2, (samples, *x.shape), device=x.device).to(x.dtype) * 2 - 1
            along = signs * samples**-0.5
        elif along is None:
            along = torch.eye(x.numel(), dtype=x.dtype, device=x.device).view(x.numel(), *x.shape)
        else:
            expected = f"a tensor of dtype {x.dtype} and shape [D, {', '.join(map(str, x.shape))}]"
            check_dense(call, "directions", along, expected)
            if along.dim() == 0 or along.shape[1:] != x.shape or along.dtype != x.dtype:
                raise CallValueError(call, f"{what(along)} as directions", expected)
        interpreter = LaplacianInterpreter(len(along), f)

        def body() -> list[Any]:
            leaves, spec = tree_flatten(
                call_function(call, f, (interpreter.carry(x, slopes=along, bend=None), *args), kwargs)
            )
            with lowered(interpreter):
                found = [interpreter.parts_of(leaf) for leaf in leaves]
            return [tree_unflatten(spec, [part[i] for part in found]) for i in range(3)]

        value, slopes, bend = run_transformed(interpreter, body)
        if not with_value:
            return bend
        leaves, spec = tree_flatten(slopes)
        axes = x.shape if directions is None and samples is None else along.shape[:1]
        placed = [s.movedim(0, -1).reshape(*s.shape[1:], *axes) if isinstance(s, Tensor) else s for s in leaves]
        return value, tree_unflatten(spec, placed), bend

    return function


class LaplacianInterpreter(DerivativeInterpreter):
    """Values with their derivatives along D directions, and the sum of the second derivatives along these."""

    kind = "laplacian"
    #: ``slopes`` is [D, *shape]; ``bend`` the sum of the second derivatives, None where that is zero
    payload = ("slopes", "bend")
    rules: ClassVar[Any] = RuleTable("laplacian rules", default=lambda interpreter, *call: derived(interpreter, *call))

    def __init__(self, count: int, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.count = count

    def details(self) -> list[str]:
        return [f"directions={self.count}"]

    def moving(self, value: Any, slopes: Any, bend: Any) -> WrapperTensor:
        """A wrapper for an operator's output, a constant if it does not move."""
        if not isinstance(value, Tensor) or value.dtype not in DIFFERENTIABLE or slopes is None:
            return self.constant(value)
        return self.carry(value, slopes=slopes, bend=bend)

    def parts_of(self, leaf: Any) -> tuple[Any, Any, Any]:
        """Value, slopes and bend of a leaf of the result."""
        if not isinstance(leaf, Tensor):
            return leaf, leaf, leaf
        wrapper: Any = self.own(leaf)
        value, slopes, bend = wrapper.value, wrapper.slopes, wrapper.bend
        if slopes is None:
            slopes = torch.zeros(self.count, *value.shape, dtype=value.dtype, device=value.device)
        return value, slopes, torch.zeros_like(value) if bend is None else bend


class ByTable(DerivativeRule):
    """The rule of an operator that the derivative table has."""

    def __call__(self, level: LaplacianInterpreter, *args: Any, **kwargs: Any) -> Any:
        names = op_info(self.op).arguments
        places = [*range(len(args)), *(names.index(name) for name in kwargs)]
        moving = [i for i, a in zip(places, (*args, *kwargs.values()), strict=True) if moves(a)]
        constant = self.entry.tangent == NO_TANGENT
        if not constant and (not self.method.answered.issuperset(moving) or any(i >= len(args) for i in moving)):
            return derived(level, self.op, args, kwargs)
        values, given = [value_of(a) for a in args], {name: value_of(a) for name, a in kwargs.items()}
        if constant:
            return map_tensors(level.constant, self.op(*values, **given))
        if self.entry.tangent == "linear":
            return self.linear(level, args, values, given, moving)
        if self.entry.tangent == "multilinear":
            return self.multilinear(level, args, values, given, moving)
        x = values[moving[0]]
        if self.entry.tangent == "elementwise" and len(moving) == 1 and not x.is_complex():
            return self.elementwise(level, args[moving[0]], values, given, moving[0])
        return derived(level, self.op, args, kwargs)

    def linear(self, level: LaplacianInterpreter, args: Any, values: Any, kwargs: Any, moving: list[int]) -> Any:
        out = self.op(*values, **kwargs)

        def push(tangents: dict[int, Any]) -> Any:
            with door_closed():  # it sends operators down as a handler does
                return self.method.linear(level, values, kwargs, tangents)  # type: ignore[arg-type]

        given = {i: part_of(args[i], "slopes") for i in moving}
        slopes = vmap(push, in_dims=(tree_map(lambda s: None if s is None else 0, given),))(given)
        bends = {i: part_of(args[i], "bend") for i in moving}
        bends = {i: b for i, b in bends.items() if b is not None}
        bend = push(bends) if bends else None
        if isinstance(out, Tensor):
            return level.moving(out, slopes, bend)
        each = zip(out, slopes, bend if bend is not None else [None] * len(out), strict=True)
        parts = [level.moving(*parts) for parts in each]
        return parts if type(out) is list else tuple(parts)

    def multilinear(self, level: LaplacianInterpreter, args: Any, values: Any, kwargs: Any, moving: list[int]) -> Any:
        def run(parts: dict[int, Any]) -> Any:
            return self.op(*[parts.get(i, v) for i, v in enumerate(values)], **kwargs)

        out = run({})
        slopes = bend = None
        for i in moving:
            slopes = plus(slopes, vmap(lambda s, i=i: run({i: s}))(args[i].slopes))  # type: ignore[misc]
            if args[i].bend is not None:
                bend = plus(bend, run({i: args[i].bend}))
        for i, j in itertools.combinations(moving, 2):
            pairs = vmap(lambda s, t, i=i, j=j: run({i: s, j: t}))(args[i].slopes, args[j].slopes)  # type: ignore[misc]
            bend = plus(bend, 2 * pairs.sum(0))
        return level.moving(out, slopes, bend)

    def elementwise(self, level: LaplacianInterpreter, x: Any, values: Any, kwargs: Any, place: int) -> Any:
        out = self.op(*values, **kwargs)
        if out.dtype not in DIFFERENTIABLE:
            return level.constant(out)
        value = x.value

        def slope(value: Tensor, out: Tensor) -> Tensor:
            found = self.method.tangent(
                [*values[:place], value, *values[place + 1 :]], kwargs, {place: torch.ones_like(value)}, out
            )
            return torch.zeros_like(out) if found is None else found

        ones = torch.ones_like(value)
        first = slope(value, out)
        _, second = jvp(slope, (value, out), (ones, first.expand_as(out)))
        return bent(level, x, out, first, second)


def bent(level: LaplacianInterpreter, x: Any, out: Tensor, first: Tensor, second: Tensor) -> WrapperTensor:
    """The result of a function with these derivatives, element by element."""
    bend = second * (x.slopes * x.slopes).sum(0)
    if x.bend is not None:
        bend = bend + first * x.bend
    return level.moving(out, first * broadcast(x.slopes, out.dim()), bend)


def broadcast(slopes: Tensor, rank: int) -> Tensor:
    """Slopes of a tensor that is broadcast to ``rank`` dimensions."""
    missing = rank - (slopes.dim() - 1)
    return slopes if missing <= 0 else slopes.reshape(len(slopes), *[1] * missing, *slopes.shape[1:])


def moves(a: Any) -> bool:
    if isinstance(a, WrapperTensor):
        return a.slopes is not None
    return type(a) in (list, tuple) and any(moves(v) for v in a)


def part_of(a: Any, name: str) -> Any:
    """Slopes or bend of an argument; of a list a list, if one of it has some."""
    if not isinstance(a, list | tuple):
        return getattr(a, name)
    found = [getattr(v, name) if isinstance(v, WrapperTensor) else None for v in a]
    return found if any(p is not None for p in found) else None


def plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def derived(level: LaplacianInterpreter, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operator of which the table does not say enough: its derivatives by nested ``jvp``."""
    f, carrying, values, rebuild = as_function(level, op, args, kwargs)
    if not values:
        return passed(level, op, args, kwargs)
    with lowered(level):
        outs = f(*values)
        if not outs:
            return rebuild([])

        def along(*directions: Tensor) -> tuple[Any, Any]:
            first = lambda *xs: jvp(f, xs, directions)[1]
            return jvp(first, values, directions)

        slopes, seconds = vmap(along)(*(x.slopes for x in carrying))
        bends = [second.sum(0) for second in seconds]
        if any(x.bend is not None for x in carrying):
            pushed = [torch.zeros_like(v) if x.bend is None else x.bend for x, v in zip(carrying, values, strict=True)]
            bends = [b + t for b, t in zip(bends, jvp(f, values, tuple(pushed))[1], strict=True)]
    return rebuild([level.moving(*parts) for parts in zip(outs, slopes, bends, strict=True)])


@LaplacianInterpreter.rules.register(aten.detach.default, aten.detach_copy.default)
def detach(level: LaplacianInterpreter, x: WrapperTensor) -> WrapperTensor:
    return level.constant(x.value.detach())


LaplacianInterpreter.rule_kind = ByTable
