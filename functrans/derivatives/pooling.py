"""Derivatives of pooling, resampling and padding: linear operators, each with its transpose among PyTorch's own.

The transpose of ``avg_pool2d`` is ``avg_pool2d_backward``, whose transpose is ``avg_pool2d`` again. The two take the
same options under the same names, so a pair of entries follows from the two schemas. Max pooling is linear too, once
the places of the maxima are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.derivatives.indexing import gathered
from functrans.derivatives.named import named, no_cotangent, with_names
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def names_of(op: OpOverload) -> list[str]:
    return [a.name for a in op._schema.arguments]


def shape_only(backward: OpOverload) -> dict[str, Any]:
    return {"self": no_cotangent} if "self" in names_of(backward) else {}


def linear_pair(forward: OpOverload, backward: OpOverload) -> None:
    """Entries for ``forward(self, ...)`` and its transpose ``backward(grad_output, ...)``."""
    forward_names, backward_names = names_of(forward), names_of(backward)
    adaptive = "output_size" in forward_names and "output_size" not in backward_names
    dimensions = 3 if "3d" in forward.__name__ else 2
    pulls = [{"grad_output": "grad", "input_size": "self"}.get(n, n) for n in backward_names]
    pushes = [{"self": "grad", "output_size": "grad_output" if adaptive else n}.get(n, n) for n in forward_names]

    def pull(*args: Any) -> Tensor:
        if "input_size" not in backward_names:
            return run(backward, *args)
        return run(backward, *(list(a.shape) if n == "self" else a for n, a in zip(pulls, args, strict=True)))

    def push(*args: Any) -> Tensor:
        if not adaptive:
            return run(forward, *args)
        size = (list(a.shape[-dimensions:]) if n == "grad_output" else a for n, a in zip(pushes, args, strict=True))
        return run(forward, *size)

    derivative(forward, tangent="linear", self=named(pulls, pull))
    derivative(backward, tangent="linear", grad_output=named(pushes, push), **shape_only(backward))


for _name in ("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"):
    linear_pair(getattr(aten, _name).default, getattr(aten, f"{_name}_backward").default)
for _kind in ("reflection", "replication"):
    for _d in (1, 2, 3):
        _name = f"{_kind}_pad{_d}d"
        linear_pair(getattr(aten, _name).default, getattr(aten, f"{_name}_backward").default)


def unwrapped(grad: Tensor, dim: int, n: int, left: int, right: int) -> Tensor:
    """The transpose of wrapping one dimension of size ``n``: what was repeated at an end comes from the other.

    A negative number crops, before anything is repeated.
    """
    crop = [max(-left, 0), max(-right, 0)]
    left, right, n = max(left, 0), max(right, 0), n - sum(crop)
    inner = grad.narrow(dim, left, n)
    if left:
        inner = torch.cat(
            [inner.narrow(dim, 0, n - left), inner.narrow(dim, n - left, left) + grad.narrow(dim, 0, left)], dim
        )
    if right:
        end = grad.narrow(dim, grad.shape[dim] - right, right)
        inner = torch.cat([inner.narrow(dim, 0, right) + end, inner.narrow(dim, right, n - right)], dim)
    return run(aten.constant_pad_nd.default, inner, [0, 0] * (grad.dim() - 1 - dim) + crop) if any(crop) else inner


def pad_circular_self(grad: Tensor, self: Tensor, pad: list[int]) -> Tensor:
    # Corners are wrapped once for each of their dimensions, in any order.
    for k in range(len(pad) // 2):
        dim = grad.dim() - 1 - k
        grad = unwrapped(grad, dim, self.shape[dim], pad[2 * k], pad[2 * k + 1])
    return grad


derivative(aten._pad_circular.default, tangent="linear", self=pad_circular_self)


# ---------------------------------------------------------------------------------------------- resampling

RESAMPLING = (
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)


def vec_form(vec: OpOverload, backward: OpOverload) -> None:
    """An entry for the form with lists of sizes or factors, in which ``interpolate`` arrives whole."""
    names = names_of(backward)

    def pull(v: dict[str, Any]) -> Tensor:
        shape, factors = v["input"].shape, v["scale_factors"]
        factors = [None] * (len(shape) - 2) if factors is None else factors
        options = [v["align_corners"]] if "align_corners" in names else []
        return run(backward, v["grad"], list(v["grad"].shape[2:]), list(shape), *options, *factors)

    options = ["align_corners"] if "align_corners" in names else []
    derivative(vec, tangent="linear", input=with_names(("grad", "input", "scale_factors", *options), pull))


for _name in RESAMPLING:
    _backward = getattr(aten, f"{_name}_backward").default
    linear_pair(getattr(aten, _name).default, _backward)
    vec_form(getattr(aten, _name).vec, _backward)


# ---------------------------------------------------------------------------------------------- rearranging pixels

derivative(
    aten.pixel_shuffle.default,
    tangent="linear",
    self=lambda grad, upscale_factor: run(aten.pixel_unshuffle.default, grad, upscale_factor),
)
derivative(
    aten.pixel_unshuffle.default,
    tangent="linear",
    self=lambda grad, downscale_factor: run(aten.pixel_shuffle.default, grad, downscale_factor),
)
derivative(
    aten.im2col.default,
    tangent="linear",
    self=lambda grad, self, kernel_size, dilation, padding, stride: run(
        aten.col2im.default, grad, list(self.shape[-2:]), kernel_size, dilation, padding, stride
    ),
)
derivative(
    aten.col2im.default,
    tangent="linear",
    self=lambda grad, kernel_size, dilation, padding, stride: run(
        aten.im2col.default, grad, kernel_size, dilation, padding, stride
    ),
)


# ---------------------------------------------------------------------------------------------- max pooling


def read_maxima(x: Tensor, indices: Tensor, dimensions: int) -> Tensor:
    """The elements of ``x`` at the flat places that max pooling found."""
    return x.flatten(-dimensions).gather(-1, indices.flatten(-dimensions)).reshape(indices.shape)


def max_unpool_self(dimensions: int) -> Callable[..., Any]:
    def pull(grad: Tensor, indices: Tensor) -> Tensor:
        planes, places = grad.flatten(-dimensions), indices.flatten(-dimensions)
        return gathered(planes, planes.dim() - 1, places, places).reshape(indices.shape)

    return pull


def max_pool(forward: OpOverload, backward: OpOverload, dimensions: int) -> None:
    """Entries for ``forward(self, ...) -> (output, indices)`` and its transpose."""
    names = names_of(backward)
    options = [n for n in names if n not in ("grad_output", "indices")]

    def pull(v: dict[str, Any]) -> Tensor:
        v["grad_output"], v["indices"] = v["grads"][0], v["results"][1]
        return run(backward, *(v[n] for n in names))

    derivative(
        forward,
        tangent=lambda results, self_t: (read_maxima(self_t, results[1], dimensions), None),
        self=with_names(("grads", "results", *options), pull),
    )
    derivative(
        backward,
        tangent="linear",
        grad_output=lambda grad, indices: read_maxima(grad, indices, dimensions),
        **shape_only(backward),
    )


for _d in (2, 3):
    for _name in (f"max_pool{_d}d_with_indices", f"adaptive_max_pool{_d}d", f"fractional_max_pool{_d}d"):
        max_pool(getattr(aten, _name).default, getattr(aten, f"{_name}_backward").default, _d)
    derivative(
        getattr(aten, f"max_unpool{_d}d").default,
        tangent="linear",
        self=max_unpool_self(_d),
    )
