"""Which operators depend smoothly on a float input, and what functrans says their derivative is: a number, an error, or
a zero.

Operators are called with what the OpInfo samples give them, and, where these do not reach, with arguments made up from
their schemas (or by hand, where such arguments do not fit each other). Each is then differenced in float64 along a
random direction, one input at a time. Where the output moves smoothly, a derivative of zero is a lie, whatever
PyTorch's own table says.

    python tests/checkers/dependence.py                    # every aten operator: what is silently zero, wrong, refused
    python tests/checkers/dependence.py linspace unique    # those whose names begin so
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from recorder import Call, Recorder, copies, run_samples
from sampling import reseed

import functrans

STEP = 1e-5
#: what torch.func and PyTorch's forward mode are made of: it means nothing elsewhere
INTERNAL = {
    "_add_batch_dim", "_remove_batch_dim", "_unwrap_for_grad", "_wrap_tensor_impl",
    "_fw_primal", "_make_dual", "_unpack_dual",
}  # fmt: skip


@dataclass
class Verdict:
    """What came of one input of one call."""

    op: str
    input: int
    outcome: str  # right | zero | wrong | refused | crash | still: the output does not move, or not smoothly
    detail: str = ""


# ---------------------------------------------------------------------------------------------- one call


def floats(values: Any) -> list[Tensor]:
    """The tensors of floats among the results, and those that a nested one is made of."""
    leaves = tree_flatten(values)[0]
    return [
        o
        for leaf in leaves
        for o in (leaf.unbind() if isinstance(leaf, Tensor) and leaf.is_nested else (leaf,))
        if isinstance(o, Tensor) and o.dtype in (torch.float64, torch.float32) and o.layout is torch.strided
    ]


#: operators that take a matrix for Hermitian and read one triangle of it: of its Hermitian part
HERMITIAN = {"cholesky", "linalg_cholesky", "linalg_cholesky_ex", "_linalg_eigh", "linalg_eigh", "linalg_eigvalsh"}


def probe(call: Call) -> Iterator[Verdict]:
    """One verdict for each float64 tensor among the arguments."""
    hermitian = getattr(call.op, "_opname", "") in HERMITIAN
    flat, spec = tree_flatten((call.args, call.kwargs))
    places = [i for i, a in enumerate(flat) if isinstance(a, Tensor) and a.dtype == torch.float64 and a.numel()]

    def function(place: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def f(x: Tensor) -> tuple[Tensor, ...]:
            values = [a.clone() if isinstance(a, Tensor) else a for a in flat]
            values[place] = (x + x.mH) / 2 if hermitian else x
            args, kwargs = tree_unflatten(values, spec)
            reseed(0)
            return tuple(floats(call.op(*args, **kwargs)))

        return f

    for place in places:
        yield verdict(call.name or str(call.op), place, function(place), flat[place])


def verdict(name: str, place: int, f: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> Verdict:
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
    try:
        value = f(x)
        slopes = [differences(f, x, v, step) for step in (STEP, STEP / 4)]
    except Exception as error:  # noqa: BLE001 - the operator itself refuses such arguments
        return Verdict(name, place, "still", f"{type(error).__name__}")
    moving = []
    for i, (a, b, y) in enumerate(zip(*slopes, value, strict=True)):
        if (
            y.dtype != torch.float64
            or not a.numel()
            or a.shape != y.shape
            or not bool((a.isfinite() & b.isfinite()).all())
        ):
            continue
        # a jump gives a slope four times as large with a quarter of the step
        if a.abs().max() > 1e-6 and bool((a - b).abs().max() < 1e-3 * a.abs().max()):
            moving.append(i)
    if not moving:
        return Verdict(name, place, "still")
    results = [of_mode(mode, name, place, f, x, v, slopes[1], moving) for mode in (by_jvp, by_vjp)]
    return max(results, key=lambda r: ("right", "refused", "crash", "wrong", "zero").index(r.outcome))


def differences(f: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, v: Tensor, step: float) -> list[Tensor]:
    return [(a - b) / (2 * step) for a, b in zip(f(x + step * v), f(x - step * v), strict=True)]


def by_jvp(f: Any, x: Tensor, v: Tensor, truth: list[Tensor], moving: list[int]) -> list[tuple[float, float]]:
    found = functrans.jvp(f, (x,), (v,))[1]
    return [weighted(found[i], truth[i]) for i in moving]


def by_vjp(f: Any, x: Tensor, v: Tensor, truth: list[Tensor], moving: list[int]) -> list[tuple[float, float]]:
    out, pull = functrans.vjp(f, x)
    found = []
    for i in moving:
        u = direction(out[i])
        (back,) = pull(tuple(u if k == i else torch.zeros_like(o) for k, o in enumerate(out)))
        found.append((float((back * v).sum()), float((u * truth[i]).sum())))
    return found


def direction(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(11))


def weighted(found: Tensor, truth: Tensor) -> tuple[float, float]:
    u = direction(truth)
    return float((u * found).sum()), float((u * truth).sum())


def of_mode(
    mode: Any, name: str, place: int, f: Any, x: Tensor, v: Tensor, truth: list[Tensor], moving: list[int]
) -> Verdict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pairs = mode(f, x, v, truth, moving)
    except functrans.errors.FunctransError as error:
        return Verdict(name, place, "refused", f"{mode.__name__}: {type(error).__name__}: {str(error)[:160]}")
    except Exception as error:  # noqa: BLE001 - reported
        return Verdict(name, place, "crash", f"{mode.__name__}: {type(error).__name__}: {str(error)[:160]}")
    for i, (got, expected) in zip(moving, pairs, strict=True):
        if abs(got - expected) > 1e-4 * max(1.0, abs(expected)):
            outcome = "zero" if got == 0 else "wrong"
            return Verdict(
                name, place, outcome, f"{mode.__name__}: output {i}: {got:.6g}, by differences {expected:.6g}"
            )
    return Verdict(name, place, "right")


# ---------------------------------------------------------------------------------------------- calls


def pure_operators(prefixes: tuple[str, ...] = (), namespace: str = "aten") -> list[OpOverload]:
    """Every overload of a namespace of PyTorch's that takes a tensor, returns one, and writes to nothing."""
    found = []
    for name in sorted(
        {
            n.removeprefix(f"{namespace}::").split(".")[0]
            for n in torch._C._dispatch_get_all_op_names()
            if n.startswith(f"{namespace}::")
        }
    ):
        if name in INTERNAL or (prefixes and not name.startswith(prefixes)):
            continue
        packet = getattr(getattr(torch.ops, namespace), name, None)
        for overload in packet.overloads() if packet is not None else ():
            op = getattr(packet, overload)
            schema = op._schema
            if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
                continue
            if any("Tensor" in str(a.type) for a in schema.arguments) and any(
                "Tensor" in str(r.type) for r in schema.returns
            ):
                found.append(op)
    return found


def opinfo_calls(wanted: set[OpOverload], per_op: int, samples: int) -> dict[OpOverload, list[Call]]:
    found: dict[OpOverload, dict[str, Call]] = defaultdict(dict)

    def keep(call: Call) -> None:
        calls = found[call.op]
        if len(calls) < per_op and str(call) not in calls:
            calls[str(call)] = Call(call.op, *copies(call.args, call.kwargs))

    recorder = Recorder(lambda op: op in wanted and (len(found[op]) < per_op or not op._can_decompose()), keep)
    for info in op_db:
        if torch.float64 in info.supported_dtypes("cpu"):
            run_samples(info, torch.float64, recorder, samples)
    return {op: list(calls.values()) for op, calls in found.items()}


def made_up_calls(op: OpOverload, limit: int = 6) -> list[Call]:
    """Simple arguments that the operator accepts: at most ``limit`` calls."""
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator) * 0.8 + 0.1

    indices = torch.tensor([0, 1, 1, 2])
    shapes = [(4,), (4, 4), (1, 2, 4, 4), (1, 2, 4, 4, 4), (2, 4, 4), ()]
    found = []
    for shape, number, whole in itertools.product(shapes, (0.5,), (1, 0, 2)):
        second = list(itertools.product((False, True), repeat=2))
        for integral, optional in second:
            args: list[Any] = []
            kwargs: dict[str, Any] = {}
            first = True
            for a in op._schema.arguments:
                kind = str(a.type)
                value: Any
                if a.has_default_value() and not (optional and "Tensor" in kind):
                    continue
                if "List[" in kind and "Tensor" in kind:
                    value = [tensor(*shape), tensor(*shape)]
                elif "Tensor" in kind:
                    value = tensor(*shape) if first or not integral else indices
                    first = False
                elif "int[" in kind or "List[int]" in kind or "SymInt[]" in kind or "List[SymInt]" in kind:
                    value = [whole] * max(1, len(shape) - 2)
                elif "List[bool]" in kind:
                    value = [True, True, True]
                elif "List[float]" in kind:
                    value = [number]
                elif "bool" in kind:
                    value = True
                elif "float" in kind or "number" in kind or "Scalar" in kind:
                    value = number
                elif "int" in kind or "Int" in kind:
                    value = whole
                elif "str" in kind:
                    value = "mean"
                else:
                    value = None
                if a.kwarg_only:
                    kwargs[a.name] = value
                else:
                    if a.has_default_value():
                        kwargs[a.name] = value
                    else:
                        args.append(value)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    out = op(*copies(args)[0], **copies(kwargs)[0])
            except Exception:  # noqa: BLE001, S112 - not with these
                continue
            if floats(out):
                found.append(Call(op, tuple(args), kwargs))
                if len(found) == limit:
                    return found
    return found


def calls_by_hand() -> dict[str, list[Call]]:
    """Calls of operators for which made-up arguments do not fit each other, which they do not look at themselves.

    What the forward operator has saved is computed of the same input: the derivative is that of both together.
    """
    generator = torch.Generator().manual_seed(5)

    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator) * 0.8 + 0.1

    def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.mean(0), (x.var(0, correction=0) + eps).rsqrt()

    def saved(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation of the columns."""
        return x.mean(0), (x.var(0, correction=0) + eps).rsqrt()

    def grouped(x: Tensor) -> Iterator[Tensor]:
        return (t.view(2, 2) for t in saved(x.view(4, 6).T))

    aten, prims, eps, mask = torch.ops.aten, torch.ops.prims, 1e-3, [True, True, True]
    columns, groups = (tensor(5, 3), tensor(5, 3), tensor(3)), (tensor(2, 4, 3), tensor(2, 4, 3), tensor(4))
    places, pixels, reserve = torch.tensor([0, 2, 2, 1]), tensor(2, 4), torch.empty(0, dtype=torch.uint8)
    #: operator, function of the operator and of tensors, these tensors
    rows: list[tuple[OpOverload, Callable[..., Any], tuple[Tensor, ...]]] = [
        (
            aten.native_batch_norm_backward.default,
            lambda op, g, x, w: op(g, x, w, None, None, *saved(x), True, eps, mask),
            columns,
        ),
        (
            aten._batch_norm_impl_index_backward.default,
            lambda op, g, x, w: op(0, x, g, w, None, None, *saved(x), True, eps, mask, reserve),
            columns,
        ),
        (
            aten.batch_norm_backward.default,
            lambda op, g, x, w: op(g, x, w, None, None, *saved(x), True, eps, mask, reserve),
            columns,
        ),
        (
            aten._native_batch_norm_legit.no_stats,
            lambda op, x, w, b: op(x, w, b, True, 0.1, eps),
            (tensor(5, 3), tensor(3), tensor(3)),
        ),
        (
            aten.native_group_norm_backward.default,
            lambda op, g, x, w: op(g, x, *grouped(x), w, 2, 4, 3, 2, mask),
            groups,
        ),
        (
            aten._cdist_backward.default,
            lambda op, g, x, y: op(g, x, y, 3.0, torch.cdist(x, y, 3.0)),
            (tensor(4, 3), tensor(4, 2), tensor(3, 2)),
        ),
        (aten._pdist_backward.default, lambda op, g, x: op(g, x, 3.0, torch.pdist(x, 3.0)), (tensor(6), tensor(4, 3))),
        (aten.cumprod_backward.default, lambda op, g, x: op(g, x, 1, x.cumprod(1)), (tensor(2, 4), tensor(2, 4))),
        (aten._reshape_alias.default, lambda op, x: op(x, [2, 4], [4, 1]), (tensor(8),)),
        (aten._reshape_alias_copy.default, lambda op, x: op(x, [2, 4], [4, 1]), (tensor(8),)),
        (aten.embedding_dense_backward.default, lambda op, g: op(g, places, 4, 2, True), (tensor(4, 3),)),
        (aten.reflection_pad1d_backward.default, lambda op, g: op(g, pixels, [1, 2]), (tensor(2, 7),)),
        (aten.replication_pad1d_backward.default, lambda op, g: op(g, pixels, [1, 2]), (tensor(2, 7),)),
        (
            aten.slow_conv3d.default,
            lambda op, x, w, b: op(x, w, [2, 2, 2], b),
            (tensor(1, 2, 4, 4, 4), tensor(3, 2, 2, 2, 2), tensor(3)),
        ),
        (
            aten._weight_norm_interface_backward.default,
            lambda op, u, v, g: op(u, v, g, torch.linalg.vector_norm(v, 2, 1, keepdim=True), 0),
            (tensor(4, 3), tensor(4, 3), tensor(4, 1)),
        ),
        (
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            lambda op, u, q, k, v: op(
                u, q, k, v, *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v), 0.0, False
            ),
            tuple(tensor(1, 1, 4, 3) for _ in range(4)),
        ),
        (prims.as_strided_scatter.default, lambda op, x, y: op(x, y, [2], [3], 1), (tensor(6), tensor(2))),
        (prims.broadcast_in_dim.default, lambda op, x: op(x, [2, 4], [1]), (tensor(4),)),
        (prims.convert_element_type.default, lambda op, x: op(x, torch.float64), (tensor(4),)),
        (prims.fft_r2c.default, lambda op, x: op(x, dim=[0], onesided=True).abs(), (tensor(4),)),
        (prims.squeeze.default, lambda op, x: op(x, [0]), (tensor(1, 4),)),
        (prims.var.default, lambda op, x: op(x, [0], 1.0), (tensor(4),)),
        (prims.where.default, lambda op, x, y: op(x > 0.4, x, y), (tensor(4), tensor(4))),
    ]
    for reduction, shape in enumerate(((4,), (), ())):
        arguments = (tensor(*shape), tensor(4), tensor(4))
        rows += [
            (aten.huber_loss_backward.default, lambda op, g, x, y, r=reduction: op(g, x, y, r, 0.5), arguments),
            (aten.soft_margin_loss_backward.default, lambda op, g, x, y, r=reduction: op(g, x, y, r), arguments),
        ]
    found: dict[str, list[Call]] = defaultdict(list)
    for op, function, tensors in rows:
        found[str(op)].append(Call(partial(function, op), tensors, name=str(op)))
    return found


# ---------------------------------------------------------------------------------------------- many


def apart(work: Callable[[], list[Verdict]], op: OpOverload, seconds: int = 60) -> list[Verdict]:
    """``work()`` in a process of its own: an internal operator with made-up arguments may bring it down."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(seconds)
            os.close(reading)
            try:
                result: Any = work()
            except Exception:  # noqa: BLE001 - the parent is told
                result = traceback.format_exc()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(result, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    result = pickle.loads(data) if data else [Verdict(str(op), -1, "still", "the process ended")]
    if isinstance(result, str):
        raise RuntimeError(f"{op}: {result}")  # noqa: TRY004
    return result


def sweep(prefixes: tuple[str, ...] = (), *, per_op: int = 4, samples: int = 8) -> list[Verdict]:
    torch.set_num_threads(1)
    wanted = pure_operators(prefixes)
    calls = opinfo_calls(set(wanted), per_op, samples)
    found: list[Verdict] = []
    for op in wanted:
        found += apart(partial(probe_all, op, calls.get(op, [])), op)
    return found


def probe_all(op: OpOverload, calls: list[Call]) -> list[Verdict]:
    return [v for call in [*calls, *calls_by_hand().get(str(op), ())] or made_up_calls(op) for v in probe(call)]


def main(prefixes: tuple[str, ...]) -> None:
    found = sweep(prefixes)
    rows = {(v.outcome, v.op, v.input): v.detail for v in found if v.outcome not in ("right", "still")}
    for (outcome, op, place), detail in sorted(rows.items()):
        print(f"{outcome:8} {op:60} input {place}: {' '.join(detail.split())}")
    operators: dict[str, set[str]] = defaultdict(set)
    for v in found:
        operators[v.outcome].add(v.op)
    print({outcome: len(ops) for outcome, ops in operators.items()}, "operators of", len(pure_operators(prefixes)))


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
