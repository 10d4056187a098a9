"""What a user's formula returned against what it is the derivative of.

The two are compared as PyTorch's engine does (``validate_outputs``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import sum_to_shape
from functrans.tensors.broadcasting import same_shape

#: shape and dtype
Spec = tuple[torch.Size, torch.dtype]


def spec(value: Any) -> Any:
    """Shape and dtype of a tensor, and of each in a list."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return [spec(v) for v in value] if type(value) in (list, tuple) else None


def described(x: Any) -> str:
    return f"a {x.dtype} tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def fitted(cotangent: Any, given: Spec, refusal: Callable[[str, str], Exception]) -> Tensor:
    """What a user's formula returned, as PyTorch's engine takes it: summed to a broadcast argument's shape, and cast.

    Anything else is refused by ``refusal(got, expected)``.
    """
    shape, dtype = given
    if not isinstance(cotangent, Tensor) or (cotangent.shape != shape and not broadcasts_to(shape, cotangent.shape)):
        raise refusal(
            described(cotangent), f"a tensor of the argument's shape {tuple(shape)}, or one that this broadcasts to"
        )
    return reduce_to(cotangent, shape, dtype)


def broadcasts_to(shape: Sequence[int], wider: Sequence[int]) -> bool:
    extra = len(wider) - len(shape)
    return extra >= 0 and all(n in (1, w) for n, w in zip(shape, wider[extra:], strict=True))


def expect_tangent(tangent: Any, given: Spec | None, refusal: Callable[[str, str], Exception]) -> None:
    """Refuse a user's tangent that has not the shape and dtype of its output; None is a tangent of zeros."""
    if tangent is not None and given is not None and (not isinstance(tangent, Tensor) or spec(tangent) != given):
        raise refusal(described(tangent), f"a {given[1]} tensor of shape {tuple(given[0])}, like the output, or None")


def reduce_to(cotangent: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Undo broadcasting and type promotion of a pointwise operator's argument."""
    if not same_shape(cotangent.shape, shape):
        cotangent = sum_to_shape(cotangent, shape)
    if cotangent.dtype is not dtype:
        if cotangent.dtype.is_complex and not dtype.is_complex:
            cotangent = torch.real(cotangent)
        cotangent = cotangent.to(dtype)
    return cotangent
