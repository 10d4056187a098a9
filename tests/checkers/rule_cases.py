"""What the tests of batching rules share: the rules of a module, the calls to try, and the comparison."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from batching_checker import Call, check_rule, recorded_calls
from torch import Tensor
from torch._ops import OpOverload

from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo

ByHand = dict[OpOverload, list[tuple[Any, ...]]]


def rules_of(*modules: ModuleType) -> list[OpOverload]:
    """The operators whose rule one of ``modules`` registers."""
    files = {str(Path(str(module.__file__))) for module in modules}
    return [op for op in BATCHING_RULES if BATCHING_RULES.place(op).rpartition(":")[0] in files]


def quiet_thread() -> Iterator[None]:
    """The body of a fixture: no warnings of deprecated operators among the samples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def record(ops: Sequence[OpOverload]) -> dict[OpOverload, list[Call]]:
    """What PyTorch's samples call, forward in two dtypes and backward."""
    calls: dict[OpOverload, list[Call]] = {}
    for options in (
        {"dtypes": [torch.float64], "per_op": 16},
        {"dtypes": [torch.float64], "per_op": 6, "samples": 4, "backward": True},
        {"dtypes": [torch.complex128, torch.int64], "per_op": 6, "samples": 4},
    ):
        for op, found in recorded_calls(ops, **options).items():  # type: ignore[arg-type]
            calls.setdefault(op, []).extend(found)
    return calls


def by_hand(cases: ByHand, op: OpOverload) -> list[Call]:
    """Calls written as ``(arg, ...)``, or as ``(arg, ..., {"keyword": value})``."""
    return [(case[:-1], case[-1]) if case and isinstance(case[-1], dict) else (case, {}) for case in cases.get(op, ())]


def compare_all(op: OpOverload, calls: Sequence[Call], written: Sequence[Call] = ()) -> int:
    """Check every call, those written by hand with more placements of the batch dimension; how many were compared."""
    compared = 0
    for k, (args, kwargs) in enumerate(calls):
        compared += check_rule(op, args, kwargs, batch_sizes=(3, 1, 0) if k < 4 else (3,), seed=k)
    for args, kwargs in written:
        found = sum(check_rule(op, args, kwargs, batch_sizes=(3, 1, 0), max_subsets=8, seed=seed) for seed in range(3))
        assert found, f"nothing was compared for {op}{args}{kwargs}"
        compared += found
    return compared


def declines(op: OpOverload, in_dims: tuple[Any, ...], *args: Any, size: int = 3, **kwargs: Any) -> bool:
    """Whether the rule leaves this call to decomposition or the loop."""
    rule = BATCHING_RULES.get(op)
    assert rule is not None
    try:
        rule(BatchInfo(size, "error"), in_dims, *args, **kwargs)
    except RuleDeclined:
        return True
    return False


def values(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Numbers that all differ."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


def positions(*shape: int, below: int, seed: int = 0) -> Tensor:
    """Indices from 0 to ``below``."""
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed + below))
