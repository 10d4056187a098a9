"""``linalg.lstsq``, some of whose drivers return singular values, which PyTorch does not differentiate."""

from __future__ import annotations

from typing import Any

import torch

from functrans.functionalization.hidden_effects import as_usual, enter, stands_in_for
from functrans.functionalization.numbers_read import carries_derivative
from functrans.operators.info import OpInfo

aten = torch.ops.aten


@stands_in_for(aten.linalg_lstsq.default)
def lstsq(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """They are those of the matrix, whatever the right-hand side."""
    solution, residuals, rank, singular_values = as_usual(known, args, kwargs)
    if singular_values.numel() and carries_derivative(args[0]):
        singular_values = enter(aten.linalg_svdvals.default, args[0])
    return solution, residuals, rank, singular_values
