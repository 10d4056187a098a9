"""What batching rules are called with, and what is said of one that returns what it should not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from functrans.core.dispatch import map_tensors
from functrans.errors import BatchingRuleError
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo, materialize


def in_dims(values: Sequence[Any], bdims: dict[int, Any]) -> list[Any]:
    """The batch dimensions as rules get them: for each argument one, or a list for a list."""
    return [
        bdims.get(i) or [None] * len(a) if type(a) is list or type(a) is tuple else bdims.get(i)
        for i, a in enumerate(values)
    ]


def for_each(info: BatchInfo, dims: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """``(dims, *values)`` with a batch, where no argument had one: each example draws for itself all the same."""
    if any(d is not None for group in dims for d in (group if isinstance(group, list) else [group])):
        return dims, *values

    batched = map_tensors(lambda x: materialize(x, None, info.batch_size), list(values))
    return [in_front(x) for x in values], *batched


def in_front(x: Any) -> Any:
    """The batch dimension of an argument whose tensors have it first, as rules get it."""
    return [in_front(v) for v in x] if isinstance(x, list | tuple) else 0 if isinstance(x, Tensor) else None


def refusal_of(of: Any, shape: Sequence[int], bdim: int, batch_size: int) -> BatchingRuleError:
    expected = f"the dimension of size {batch_size}, the batch's"
    return BatchingRuleError(rule_of(of), f"out_dim {bdim} for an output of shape {tuple(shape)}", expected)


def rule_of(of: Any) -> str:
    """An operator's or autograd.Function's batching rule, and where it stands, for a message; text stays as it is."""
    if isinstance(of, str):
        return of
    if isinstance(of, type):
        code = getattr(of.vmap, "__code__", None)  # type: ignore[attr-defined]
        return f"{of.__name__}.vmap" + (f", at {code.co_filename}:{code.co_firstlineno}," if code else "")
    if of in BATCHING_RULES:
        return f"The batching rule of {of}, registered at {BATCHING_RULES.place(of)},"
    return f"The batching rule that {of} was given by register_vmap"


def described(x: Any) -> str:
    """A value, for a message: its type, and a tensor's shape."""
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
