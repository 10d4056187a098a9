"""A batching rule against a loop over examples that all differ.

``recorded_calls`` collects the operators that PyTorch's own samples run, as they reach an interpreter;
``check_rule`` batches the arguments of one such call in several ways and compares the rule with the loop.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import recorder
import torch
from recorder import Recorder, before_autograd, copies, run_samples
from torch import Tensor
from torch._ops import OpOverload
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo

Call = tuple[tuple[Any, ...], dict[str, Any]]


class WrongRule(AssertionError):
    """A rule disagrees with the loop over the examples."""


# ---------------------------------------------------------------------------------------------------------------
# Recording


def signature(call: recorder.Call) -> str:
    """Calls that differ only in the values of their tensors are the same call."""
    return repr(tree_map_only(Tensor, lambda x: (x.dtype, tuple(x.shape)), (call.args, call.kwargs)))


#: calls of each operator in the recording of all
KEPT = 16


def recorded_calls(
    wanted: Iterable[OpOverload],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    names: Callable[[str], bool] | None = None,
    per_op: int = 8,
    samples: int = 8,
    backward: bool = False,
) -> dict[OpOverload, list[Call]]:
    """Calls of the ``wanted`` operators in the OpInfo samples, per operator: at most ``per_op``, of all dtypes in turn.

    ``names`` chooses among the OpInfos by name, ``samples`` limits the samples per OpInfo and dtype;
    ``backward`` also runs autograd and records what its formulas call (there, composites are in pieces).
    """
    assert per_op <= KEPT
    chosen = dict.fromkeys(wanted)
    recordings = [
        record(chosen.__contains__, dtype, names, per_op, samples, backward)
        if names
        else record_once(dtype, samples, backward)
        for dtype in dtypes
    ]
    found = {}
    for op in chosen:
        in_turn = itertools.chain(*itertools.zip_longest(*(calls.get(op, {}).values() for calls in recordings)))
        if calls := [call for call in in_turn if call is not None][:per_op]:
            found[op] = calls
    return found


@cache
def record_once(dtype: torch.dtype, samples: int, backward: bool) -> dict[OpOverload, dict[str, Call]]:
    """All that has a rule: the recording from which several test modules take their operators."""
    return record(BATCHING_RULES.__contains__, dtype, lambda name: True, KEPT, samples, backward)


def record(
    wanted: Callable[[OpOverload], bool],
    dtype: torch.dtype,
    names: Callable[[str], bool],
    per_op: int,
    samples: int,
    backward: bool,
) -> dict[OpOverload, dict[str, Call]]:
    """The first calls by operator and signature; what is wanted besides an operator does not change its calls."""
    found: dict[OpOverload, dict[str, Call]] = defaultdict(dict)

    def keep(call: recorder.Call) -> None:
        calls = found[call.op]
        if len(calls) < per_op and (key := signature(call)) not in calls:
            calls[key] = copies(call.args, call.kwargs)

    mode = Recorder(wanted, keep, wanted_in_pieces=True)
    for info in op_db:
        if dtype in info.dtypes and names(info.name):
            differentiable = backward and dtype.is_floating_point and info.supports_autograd
            run_samples(info, dtype, mode, samples, backward=differentiable)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Distinct examples


def rolled_and_scaled(x: Tensor, i: int) -> Tensor:
    """Example ``i``: other values at every place, from the same range."""
    moved = x.flatten().roll(i).reshape(x.shape) if x.numel() else x.clone()
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return moved * (1 - 0.07 * i)
    if x.dtype is torch.bool and x.numel() == 1:
        return moved ^ bool(i % 2)
    return moved + i if x.numel() == 1 else moved


def scaled(x: Tensor, i: int) -> Tensor:
    """Keeps the structure of a matrix; for indices, keeps their range."""
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return x * (1 - 0.07 * i)
    return x.flatten().roll(i).reshape(x.shape) if x.numel() else x.clone()


def shifted(x: Tensor, i: int) -> Tensor:
    """Floating-point values move, integers stay: for sizes, offsets and sorted positions."""
    return x * (1 + 0.05 * i) if x.dtype.is_floating_point or x.dtype.is_complex else x.clone()


PERTURBATIONS = (rolled_and_scaled, scaled, shifted)


class Refused(Exception):
    """PyTorch itself refuses every set of distinct examples."""


def distinct_examples(
    op: Callable[..., Any], leaves: list[Any], spec: Any, chosen: Sequence[int], size: int
) -> tuple[dict[int, list[Tensor]], list[list[Any]]]:
    """For each chosen leaf ``size`` different examples, and the flat outputs of the loop over them."""
    failure: Exception | None = None
    for perturb in PERTURBATIONS:
        rows = {leaf: [perturb(leaves[leaf], i) for i in range(max(size, 1))] for leaf in chosen}
        try:
            outputs = []
            for i in range(max(size, 1)):
                example = [rows[k][i] if k in rows else x for k, x in enumerate(leaves)]
                args, kwargs = tree_unflatten(example, spec)
                outputs.append(tree_flatten(op(*args, **kwargs))[0])
            return rows, outputs
        except Exception as error:  # noqa: BLE001 (the next kind of example may be legal)
            failure = error
    raise Refused(str(failure))


# ---------------------------------------------------------------------------------------------------------------
# Checking


class Pure(TorchDispatchMode):
    """Rules may neither write nor read data."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op._schema.is_mutable:
            raise WrongRule(f"the rule calls {op}, which writes to its arguments")
        if torch.Tag.data_dependent_output in op.tags:
            raise WrongRule(f"the rule calls {op}, which reads data")
        return op(*args, **(kwargs or {}))


def subsets(places: Sequence[int], limit: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Which tensors are batched: each alone, all, then others at random, at most ``limit``."""
    everything = [c for n in range(1, len(places) + 1) for c in itertools.combinations(places, n)] if places else []
    if len(everything) <= limit:
        return everything
    first = [(place,) for place in places][: limit - 1] + [tuple(places)]
    rest = [c for c in everything if c not in first]
    return first + rng.sample(rest, max(0, min(limit - len(first), len(rest))))


def placements(ranks: Sequence[int], everywhere: bool, rng: random.Random) -> Iterable[tuple[int, ...]]:
    """Batch dimensions for tensors of these ranks: some at random, or all combinations of those at the ends."""
    if everywhere:
        return itertools.product(*(sorted({0, min(1, rank), rank}) for rank in ranks))
    return [tuple(rng.choice((0, rng.randint(0, rank))) for rank in ranks)]


def check_rule(
    op: OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    batch_sizes: Sequence[int] = (3,),
    max_subsets: int = 4,
    seed: int = 0,
    randomness: str = "error",
    rule: Callable[..., tuple[Any, Any]] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    values: bool = True,
    everywhere: bool = False,
) -> int:
    """Compare the rule of ``op`` with the loop, for several choices of batched tensors and batch dimensions.

    ``everywhere`` tries the first, the second and the last batch dimension of each tensor with those of all others.
    Returns the number of comparisons: 0 if PyTorch refuses the examples or the rule always declines.
    ``values=False`` compares shapes and dtypes only (uninitialized memory).
    """
    rule = rule or BATCHING_RULES.get(op)
    assert rule is not None, f"{op} has no batching rule"
    rng = random.Random(seed)
    leaves, spec = tree_flatten((tuple(args), dict(kwargs or {})))
    positional = len(tree_flatten(tuple(args))[0])
    places = [k for k, x in enumerate(leaves[:positional]) if isinstance(x, Tensor)]
    compared = 0
    for chosen in subsets(places, max_subsets, rng):
        for size in batch_sizes:
            try:
                rows, outputs = distinct_examples(op, leaves, spec, chosen, size)
            except Refused:
                continue
            for placed in placements([leaves[k].dim() for k in chosen], everywhere, rng):
                physical, dims = list(leaves), [None] * len(leaves)
                for k, dims[k] in zip(chosen, placed):  # type: ignore[call-overload]
                    physical[k] = torch.stack(rows[k], dim=dims[k])
                    if size == 0:
                        physical[k] = physical[k].narrow(dims[k], 0, 0)
                what = describe(op, physical, dims, spec, size)
                p_args, p_kwargs = tree_unflatten(physical, spec)
                in_dims, _ = tree_unflatten(dims, spec)
                try:
                    with before_autograd(), Pure():
                        result, out_dims = rule(BatchInfo(size, randomness), in_dims, *p_args, **p_kwargs)
                except RuleDeclined:
                    continue
                except WrongRule as error:
                    raise WrongRule(f"{what}: {error}") from error
                except Exception as error:
                    raised = f"{type(error).__name__}: {error}"
                    raise WrongRule(f"{what}: the loop works, the rule raises {raised}") from error
                compare(what, result, out_dims, outputs, size, rtol, atol, values)
                compared += 1
    return compared


def describe(op: OpOverload, physical: list[Any], dims: list[Any], spec: Any, size: int) -> str:
    """The call, for the message."""
    shown = [
        f"{str(x.dtype)[6:]}{list(x.shape)}" + ("" if d is None else f"@{d}") if isinstance(x, Tensor) else x
        for x, d in zip(physical, dims)
    ]
    args, kwargs = tree_unflatten(shown, spec)
    return f"{op}{args}{kwargs or ''} batch of {size}"


def compare(
    what: str,
    result: Any,
    out_dims: Any,
    outputs: list[list[Any]],
    size: int,
    rtol: float | None,
    atol: float | None,
    values: bool,
) -> None:
    """The physical result against the stacked outputs of the loop: shape and dtype exactly, values closely."""
    flat, _ = tree_flatten(result)
    flat_dims = tree_flatten(out_dims)[0] if isinstance(out_dims, (tuple, list)) else [out_dims]
    if isinstance(result, (tuple, list)) and len(flat_dims) != len(flat):
        raise WrongRule(f"{what}: {len(flat)} outputs, out_dims {out_dims}")
    if len(flat) != len(outputs[0]):
        raise WrongRule(f"{what}: {len(flat)} outputs, the loop has {len(outputs[0])}")
    for k, (got, bdim) in enumerate(zip(flat, flat_dims)):
        rows = [output[k] for output in outputs]
        if not isinstance(rows[0], Tensor):
            if got != rows[0]:
                raise WrongRule(f"{what}: output {k} is {got}, the loop has {rows[0]}")
            continue
        expected = torch.stack(rows)
        if size == 0:
            expected = expected[:0]
        logical = got.expand(size, *got.shape) if bdim is None else got.movedim(bdim, 0)
        if logical.shape != expected.shape:
            raise WrongRule(f"{what}: output {k} has shape {list(logical.shape)}, the loop {list(expected.shape)}")
        if logical.dtype != expected.dtype:
            raise WrongRule(f"{what}: output {k} is {logical.dtype}, the loop has {expected.dtype}")
        if not values:
            continue
        try:
            torch.testing.assert_close(
                logical, expected, rtol=rtol, atol=atol, equal_nan=True, check_stride=False, check_layout=False
            )
        except AssertionError as error:
            raise WrongRule(f"{what}: output {k} differs from the loop: {error}") from error
