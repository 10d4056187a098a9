"""Derivatives of Fourier transforms, which are linear; between real and complex each is nearly the other's transpose.

A real signal of length n has a spectrum of n // 2 + 1 numbers, of which all but the first, and for even n the last,
stand for two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def weighted(spectrum: Tensor, dim: int, n: int, inner: float) -> Tensor:
    """A half of the spectrum of ``n`` real numbers, times ``inner`` where it stands for two of the whole."""
    twice = (n - 1) // 2
    if not twice:
        return spectrum
    weights = spectrum.new_full([twice], inner, dtype=spectrum.dtype.to_real())
    weights = run(aten.constant_pad_nd.default, weights, [1, spectrum.shape[dim] - 1 - twice], 1.0)
    return spectrum * weights.reshape([-1 if k == dim % spectrum.dim() else 1 for k in range(spectrum.dim())])


def real_to_complex_self(grad: Tensor, self: Tensor, dim: Sequence[int], normalization: int, onesided: bool) -> Tensor:
    if not onesided:
        return torch.real(run(aten._fft_c2c.default, grad, dim, normalization, False))
    n = self.shape[dim[-1]]
    return run(aten._fft_c2r.default, weighted(grad, dim[-1], n, 0.5), dim, normalization, n)


def complex_to_real_self(grad: Tensor, dim: Sequence[int], normalization: int, last_dim_size: int) -> Tensor:
    return weighted(run(aten._fft_r2c.default, grad, dim, normalization, True), dim[-1], last_dim_size, 2.0)


derivative(
    aten._fft_c2c.default,
    tangent="linear",
    self=lambda grad, dim, normalization, forward: run(aten._fft_c2c.default, grad, dim, normalization, not forward),
)
derivative(aten._fft_r2c.default, tangent="linear", self=real_to_complex_self)
derivative(aten._fft_c2r.default, tangent="linear", self=complex_to_real_self)
