"""Checks of what an author adds: a derivative, a batching rule, a transform, against oracles that know none of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from functrans.api.checks import call_function, check_callable, check_dense
from functrans.api.transforms import grad, jvp, vjp
from functrans.api.vmap import vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, FunctransError
from functrans.errors.wording import callable_name
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.described import given as described_call
from functrans.tensors.described import shown
from functrans.tensors.pytrees import tree_flatten

#: The step of central differences of doubles, and how exact they are with it.
STEP, EXACT = 1e-5, 1e-5


class CheckFailedError(FunctransError, AssertionError, takes="name what got expected"):
    """A check of something that an author added failed."""

    sentence = "{name}: {what}: got {got}; expected {expected}."


def name_of(func: Callable[..., Any]) -> str:
    """What messages call it: of an operator the name that it is registered by."""
    return str(func) if isinstance(func, OpOverload) else callable_name(func)


@contextmanager
def checking(name: str) -> Iterator[None]:
    """Context: random numbers of its own; afterwards the generator and the interpreter stack are as they were."""
    before = interpreter_stack()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    if interpreter_stack() != before:
        raise CheckFailedError(name, "the interpreter stack afterwards", str(interpreter_stack()), str(before))


def check_derivative(func: Callable[..., Any], *args: Any, order: int = 2, **kwargs: Any) -> None:
    """Compare an operator's derivatives, by every mode and up to an order, with central differences.

    For every choice of arguments that are tracked while the others are constants: forward mode against differences,
    reverse mode against forward mode (they are adjoint), each again inside of vmap, and the same of the derivative, up
    to ``order``. Directions are random; the state of PyTorch's generators is left alone.

    Args:
        func: an operator (``torch.ops.mylib.cube``) or a function, smooth where it is called. It returns a tensor or a
            tuple of tensors.
        *args: its arguments. The floating-point tensors among them are doubles, since differences ask for it.
        order: 1 for first derivatives only.
        **kwargs: fixed arguments.

    Raises:
        CheckFailedError: they disagree; it says for which arguments and which derivative, and what was found.
        CallTypeError: there is no floating-point tensor to differentiate by, or one that is no double.

    Example:
        >>> import torch
        >>> from functrans.extend import check_derivative
        >>> check_derivative(torch.cumsum, torch.arange(3.0).double(), 0)
    """
    check_callable("check_derivative", func)
    call = "check_derivative(func, *args)"
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype.is_floating_point]
    for i in places:
        check_dense(call, f"argument {i}", args[i], "a tensor of dtype float64", kinds="f")
        if args[i].dtype is not torch.float64 or args[i].device.type == "meta":
            raise CallTypeError(call, f"{shown(args[i])} as argument {i}", "a tensor of dtype float64, with data")
    if not places:
        raise CallTypeError(call, "no floating-point tensor", "at least one")
    call_function(call, func, args, kwargs)
    with checking(name_of(func)):
        for count in range(1, len(places) + 1):
            for chosen in itertools.combinations(places, count):

                def f(*tracked: Tensor, chosen: Any = chosen) -> tuple[Tensor, ...]:
                    full = list(args)
                    for i, x in zip(chosen, tracked, strict=True):
                        full[i] = x
                    return smooth(func(*full, **kwargs))

                name = f"{name_of(func)}({described_call(args, kwargs)}), argument{'s' * (count > 1)} "
                check_orders(name + ", ".join(map(str, chosen)), f, [args[i] for i in chosen], order)


def smooth(out: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in tree_flatten(out)[0] if isinstance(x, Tensor) and x.dtype.is_floating_point)


def check_orders(name: str, f: Callable[..., tuple[Tensor, ...]], primals: list[Tensor], order: int) -> None:
    """Derivatives of ``f``, then those of its tangent along a direction that stays."""
    which = "the derivative"
    for n in range(order):
        direction = tuple(torch.randn_like(x) for x in primals)
        expected = differences(f, primals, direction)
        outs, tangents = jvp(f, tuple(primals), direction)
        same(name, f"{which} by jvp", tangents, expected)
        cotangents = tuple(torch.randn_like(y) for y in outs)
        pulled = vjp(f, *primals)[1](cotangents)
        same(name, f"{which} by vjp, paired with the direction", pair(pulled, direction), pair(cotangents, expected))
        rows = [torch.stack([x, x]) for x in primals]
        lanes = [torch.stack([v, -v]) for v in direction]
        of_rows = vmap(lambda x, v, f=f: jvp(f, tuple(x), tuple(v))[1])(rows, lanes)
        same(name, f"{which} by vmap of jvp", tuple(t[1] for t in of_rows), tuple(-e for e in expected))
        back = vmap(lambda x, c, f=f: vjp(f, *x)[1](tuple(c)))(rows, [torch.stack([c, 2 * c]) for c in cotangents])
        same(name, f"{which} by vmap of vjp", tuple(t[1] for t in back), tuple(2 * p for p in pulled))
        weighted = lambda *x, f=f, c=cotangents: sum((w * y).sum() for w, y in zip(c, f(*x), strict=True))
        slope = grad(weighted, argnums=tuple(range(len(primals))))
        if n + 1 < order:
            turned = jvp(slope, tuple(primals), direction)[1]
            same(name, f"a second derivative, jvp of grad, where {which} is differentiated", turned,
                 differences(slope, primals, direction))  # fmt: skip
        f = lambda *x, f=f, v=direction: jvp(f, x, v)[1]
        which = f"derivative {n + 2}"


def differences(
    f: Callable[..., Sequence[Tensor]], primals: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    after = f(*[x + STEP * v for x, v in zip(primals, direction, strict=True)])
    before = f(*[x - STEP * v for x, v in zip(primals, direction, strict=True)])
    return tuple((a - b) / (2 * STEP) for a, b in zip(after, before, strict=True))


def pair(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor]:
    return (torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum(),)


def same(name: str, what: str, found: Sequence[Any], expected: Sequence[Any], exact: float = EXACT) -> None:
    if len(found) != len(expected):
        raise CheckFailedError(name, what, f"{len(found)} outputs", str(len(expected)))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        where = what if len(found) == 1 else f"{what}, output {i}"
        if not isinstance(b, Tensor):
            if a != b:
                raise CheckFailedError(name, where, repr(a), repr(b))
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            raise CheckFailedError(name, where, shown(a), shown(b))
        wide = torch.complex128 if b.is_complex() else torch.float64
        scale = b.to(wide).abs().nan_to_num().amax().item() if b.numel() else 0.0
        if not torch.allclose(a.to(wide), b.to(wide), rtol=exact, atol=exact * (1 + scale), equal_nan=True):
            raise CheckFailedError(name, where, brief(a), brief(b))


def brief(x: Tensor) -> str:
    values = ", ".join(f"{v:.6g}" for v in x.flatten()[:6].tolist())
    return f"{shown(x)} of {values}{', ...' if x.numel() > 6 else ''}"


def check_batching_rule(
    func: Callable[..., Any], *args: Any, examples: Sequence[tuple[Any, ...]] | None = None, **kwargs: Any
) -> None:
    """Compare an operator under vmap with a loop over examples that all differ.

    For every choice of tensor arguments that are batched while the others are not, for every place of their batch
    dimensions, and for vmap of vmap.

    Args:
        func: an operator or a function.
        *args: the arguments of one example.
        examples: the arguments of three examples or more, where others than made-up ones are wanted. Otherwise they are
            made of ``args``: floating-point and complex tensors get noise, the elements of others are permuted.
        **kwargs: fixed arguments.

    Raises:
        CheckFailedError: they disagree; it says for which in_dims.
        CallTypeError: no argument is a tensor.

    Example:
        >>> import torch
        >>> from functrans.extend import check_batching_rule
        >>> check_batching_rule(torch.outer, torch.ones(2), torch.ones(3))
    """
    check_callable("check_batching_rule", func)
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    if not places or any(args[i].device.type == "meta" for i in places):
        got = "a tensor without data" if places else "no tensor among the arguments"
        raise CallTypeError("check_batching_rule(func, *args)", got, "tensors with data, at least one")
    call = "check_batching_rule(func, *args)"
    for i in places:
        check_dense(call, f"argument {i}", args[i])
    for out in tree_flatten(call_function(call, func, args, kwargs))[0]:
        check_dense(call, "result of the function", out, "tensors")
        if out.device.type == "meta":
            raise CallTypeError(call, f"{shown(out)} as result of the function", "a tensor with data")
    name = name_of(func)
    with checking(name):
        rows = [args, *(varied(args) for _ in range(3))] if examples is None else list(examples)
        for count in range(1, len(places) + 1):
            for chosen in itertools.combinations(places, count):
                check_lanes(name, func, rows, chosen, kwargs)


def varied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Another example."""

    def other(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dtype.is_floating_point or x.dtype.is_complex:
            return x + 0.1 * torch.randn_like(x)
        return x.flatten()[torch.randperm(x.numel())].view(x.shape)

    return tuple(other(a) for a in args)


def check_lanes(
    name: str, func: Callable[..., Any], rows: Sequence[tuple[Any, ...]], chosen: Sequence[int], kwargs: dict[str, Any]
) -> None:
    first = rows[0]
    calls = [tuple(row[i] if i in chosen else first[i] for i in range(len(first))) for row in rows]
    outs = [tree_flatten(func(*call, **kwargs)) for call in calls]
    expected = [torch.stack(list(leaves)) for leaves in zip(*(leaves for leaves, _ in outs), strict=True)]
    for dims in itertools.product(*(range(first[i].dim() + 1) for i in chosen)):
        by_place = dict(zip(chosen, dims, strict=True))
        in_dims = tuple(by_place.get(i) for i in range(len(first)))
        batch = [
            torch.stack([call[i] for call in calls], by_place[i]) if i in by_place else first[i]
            for i in range(len(first))
        ]
        found = vmap(lambda *xs: func(*xs, **kwargs), in_dims=in_dims)(*batch)
        same(name, f"vmap with in_dims {in_dims}", tree_flatten(found)[0], expected, 1e-4)
        half = len(calls) // 2
        pairs = [
            torch.stack([b.narrow(by_place[i], 0, half), b.narrow(by_place[i], half, half)]) if i in by_place else b
            for i, b in enumerate(batch)
        ]
        outer = tuple(None if d is None else 0 for d in in_dims)
        twice = vmap(vmap(lambda *xs: func(*xs, **kwargs), in_dims=in_dims), in_dims=outer)(*pairs)
        whole = [x.flatten(0, 1) for x in tree_flatten(twice)[0]]
        same(name, f"vmap of vmap with in_dims {in_dims}", whole, [e[: 2 * half] for e in expected], 1e-4)


def check_transform(
    transformed: Callable[..., Any], oracle: Callable[..., Any], *args: Any, differentiable: bool = True
) -> None:
    """Compare a transformed function with an oracle, alone and under the other transforms.

    Args:
        transformed: a function of tensors that a transform made, such as ``laplacian(f)``.
        oracle: a function of the same arguments that returns the same without that transform.
        *args: the arguments. The floating-point tensors among them are doubles.
        differentiable: whether grad and jvp over it make sense.

    It compares values; vmap with a loop over examples that differ; where ``differentiable``, grad, jvp, vmap of grad
    and grad of vmap with differences of the oracle; and that the stack is as it was.

    Raises:
        CheckFailedError: they disagree; it says where.

    Example:
        >>> import torch
        >>> from functrans import hessian, laplacian
        >>> from functrans.extend import check_transform
        >>> f = lambda x: (x.sin() ** 2).sum()
        >>> check_transform(laplacian(f), lambda x: hessian(f)(x).trace(), torch.randn(3, dtype=torch.float64))
    """
    check_callable("check_transform", transformed)
    check_callable("check_transform", oracle)
    name = callable_name(transformed)
    for i, a in enumerate(args):
        if isinstance(a, Tensor):
            check_dense("check_transform(transformed, oracle, *args)", f"argument {i}", a)
    if differentiable and not any(isinstance(a, Tensor) and a.dtype is torch.float64 for a in args):
        cure = "Or give differentiable=False."
        raise CallTypeError("check_transform(...)", "no double to differentiate by", "one at least", cure)
    with checking(name):
        same(name, "its value", tree_flatten(transformed(*args))[0], tree_flatten(oracle(*args))[0])
        rows = [args, varied(args), varied(args)]
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        in_dims = tuple(0 if i in tensors else None for i in range(len(args)))
        batch = [torch.stack([row[i] for row in rows]) if i in tensors else a for i, a in enumerate(args)]
        by_loop = [tree_flatten(oracle(*row)) for row in rows]
        stacked = [torch.stack(list(leaves)) for leaves in zip(*(leaves for leaves, _ in by_loop), strict=True)]
        same(name, "vmap of it", tree_flatten(vmap(transformed, in_dims=in_dims)(*batch))[0], stacked)
        if differentiable:
            check_derivatives_of(name, transformed, oracle, args, batch, in_dims)


def check_derivatives_of(
    name: str, transformed: Callable[..., Any], oracle: Callable[..., Any], args: Any, batch: Any, in_dims: Any
) -> None:
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype is torch.float64]

    def total(f: Callable[..., Any]) -> Callable[..., Tensor]:
        def value(*tracked: Tensor) -> Tensor:
            full = list(args)
            for i, x in zip(places, tracked, strict=True):
                full[i] = x
            return torch.stack([y.sin().sum() for y in smooth(f(*full))]).sum()

        return value

    primals = [args[i] for i in places]
    direction = tuple(torch.randn_like(x) for x in primals)
    expected = differences(lambda *x: (total(oracle)(*x),), primals, direction)
    found = jvp(total(transformed), tuple(primals), direction)[1]
    same(name, "jvp of it", (found,), expected)
    slopes = grad(total(transformed), argnums=tuple(range(len(places))))(*primals)
    same(name, "grad of it, along a direction", pair(slopes, direction), expected)
    again = vmap(lambda *x: grad(total(transformed), argnums=tuple(range(len(places))))(*x))(
        *[torch.stack([x, x]) for x in primals]
    )
    same(name, "vmap of grad of it", [t[1] for t in again], slopes)
    over = grad(lambda *x: vmap(total(transformed))(*x).sum(), argnums=tuple(range(len(places))))(
        *[torch.stack([x, x]) for x in primals]
    )
    same(name, "grad of vmap of it", [t[1] for t in over], slopes)
