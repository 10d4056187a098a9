"""Derivatives of ``linspace`` and ``logspace`` by their ends, where these are tensors.

PyTorch has no formulas for them.
"""

from __future__ import annotations

import cmath
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import add, cast, conj
from functrans.derivatives.named import with_names
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def shares(result: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of the start and of the end in each point; the end has none in a single one."""
    n = result.shape[0]
    right = torch.arange(n, dtype=torch.empty(0, dtype=result.dtype).real.dtype, device=result.device) / max(n - 1, 1)
    return 1 - right, right


def slope(result: Tensor, base: Any) -> Any:
    """Of ``base ** y`` by ``y``; 1 without a base."""
    if base is None:
        return 1
    if base > 0:
        return math.log(base) * result
    return result * (cmath.log(base) if result.dtype.is_complex else math.nan)


def pull(which: int, end: str, v: dict[str, Any]) -> Tensor:
    found = (v["grad"] * conj(slope(v["result"], v.get("base"))) * shares(v["result"])[which]).sum()
    return cast(found, v[end].dtype)


def push(v: dict[str, Any]) -> Tensor:
    moved: Any = None
    for tangent, share in zip((v.get("start_t"), v.get("end_t")), shares(v["result"]), strict=True):
        moved = add(moved, None if tangent is None else tangent * share)
    return cast(moved * slope(v["result"], v.get("base")), v["result"].dtype)


def register(op: OpOverload, base: list[str]) -> None:
    ends = [a.name for a in op._schema.arguments[:2] if "Tensor" in str(a.type)]
    formulas: dict[str, Any] = {}
    for which, end in enumerate(("start", "end")):
        if end in ends:
            step = partial(pull, which, end)
            step.__name__ = f"by_{end}"  # type: ignore[attr-defined]
            formulas[end] = with_names(["grad", "result", end, *base], step)
    derivative(op, tangent=with_names(["result", *(f"{e}_t" for e in ends), *base], push), **formulas)


for _overload in ("Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor"):
    register(getattr(aten.linspace, _overload), [])
    register(getattr(aten.logspace, _overload), ["base"])
