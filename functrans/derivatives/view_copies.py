"""Derivatives of the operators that copy what a view operator views: those of the view operator."""

from typing import Any

import torch

from functrans.derivatives import splits, views  # noqa: F401 - whose entries are taken over
from functrans.derivatives.table import DERIVATIVES, derivative
from functrans.functionalization.copies import COPIES

aten = torch.ops.aten

for view, copy in COPIES.items():
    entry = DERIVATIVES.get(view)
    if entry is not None and copy not in DERIVATIVES:
        formulas: dict[str, Any] = entry.formulas
        derivative(copy, tangent=entry.tangent, **formulas)
derivative(aten.lift_fresh_copy.default, tangent="linear", self=lambda grad: grad)
