"""Batching rules of the operators that copy what a view operator views: the view's rule, and a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from functrans.core.dispatch import map_tensors
from functrans.functionalization.copies import COPIES
from functrans.interpreters.vmap.rules import view_writes, views  # noqa: F401 - whose rules are taken over
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo


def copied(rule: Callable[..., Any], info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    out, dims = rule(info, in_dims, *args, **kwargs)
    return map_tensors(torch.clone, out), dims


for view, copy in COPIES.items():
    rule = BATCHING_RULES.get(view)
    if rule is not None and copy not in BATCHING_RULES:
        BATCHING_RULES.add(copy, partial(copied, rule))
