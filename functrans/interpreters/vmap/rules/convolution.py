"""Convolution and its backward: the batch becomes part of N, of the channels within each group, or of the groups.

Names: input ``[N, I, ...]``, output ``[N, O, ...]``; I = groups * i and O = groups * o. A weight is
``[O, i, ...]``, or ``[I, o, ...]`` if transposed: its first dimension counts the channels of one side over all
groups, its second those of the other side within one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.functionalization.without_data import run_on_zeros
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.rules.folding import (
    fold_c,
    fold_channel_vector,
    fold_n,
    placeholder,
    side_of_n,
    unfold_c,
    unfold_n,
)
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, logical_shape, materialize, to_front

aten = torch.ops.aten
constant_pad = torch.ops.aten.constant_pad_nd.default


def split_channels(x: Tensor, batch_size: int, groups: int, dim: int) -> Tensor:
    """``groups * B * c`` channels at ``dim`` (group, example, channel) become batch dimension 0 and ``groups * c``."""
    shape = x.shape
    each = shape[dim] // (groups * batch_size)
    x = x.reshape(*shape[:dim], groups, batch_size, each, *shape[dim + 1 :]).movedim(dim + 1, 0)
    return x.reshape(batch_size, *shape[:dim], groups * each, *shape[dim + 1 :])


def join_channels(x: Tensor, groups: int, dim: int) -> Tensor:
    """The inverse: batch dimension 0 goes between the groups and the channels of a group at logical ``dim``."""
    batch_size, *shape = x.shape
    each = shape[dim] // groups
    x = x.reshape(batch_size, *shape[:dim], groups, each, *shape[dim + 1 :]).movedim(0, dim + 1)
    return x.reshape(*shape[:dim], groups * batch_size * each, *shape[dim + 1 :])


@batching_rule(aten.convolution.default)
def convolution_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> tuple[Tensor, int]:
    size = info.batch_size
    x_dim, weight_dim, bias_dim = in_dims[:3]
    if bias is not None:
        check_bias(logical_shape(weight, weight_dim), logical_shape(bias, bias_dim), transposed, groups)
        if bias.dtype is not x.dtype:
            every_option = (stride, padding, dilation, transposed, output_padding, groups)
            return with_bias_of_another_dtype(info, in_dims, x, weight, bias, every_option)
    if size == 0:
        # No channels and no groups can be made of no examples, but no images can.
        x, x_dim = materialize(x, x_dim, size), 0
        weight, weight_dim = placeholder(weight, logical_shape(weight, weight_dim)), None
        bias, bias_dim = None, None
    elif weight_dim is not None and not weight.numel():
        raise RuleDeclined("what has no channels cannot be folded")
    options = (stride, padding, dilation, transposed, output_padding)

    if weight_dim is None:
        if x_dim is None:
            output = aten.convolution.default(x, weight, None, *options, groups)
            return output + per_channel(bias, bias_dim, output.dim()), 0
        n, side = x.shape[0 if x_dim != 0 else 1], side_of_n((x, x_dim))
        inner = bias if bias_dim is None else None
        output = aten.convolution.default(fold_n(x, x_dim, size, side), weight, inner, *options, groups)
        output = unfold_n(output, size, n, side)
        if bias_dim is not None:
            bias = per_channel(bias, bias_dim, output.dim() - 1)
            output = output + (bias.squeeze(1) if side else bias)
        return output, side

    weight = to_front(weight, weight_dim)
    channels = weight.shape[2] * groups if transposed else weight.shape[1]
    if x_dim is None:
        # The input is shared: each group gets the output channels of all examples.
        weight = join_channels(weight, 1, 1) if transposed else join_channels(weight, groups, 0)
        if bias is not None:
            bias = join_channels(materialize(bias, bias_dim, size), groups, 0)
        output = aten.convolution.default(x, weight, bias, *options, groups)
        if groups == 1:
            return unfold_c(output, size, channels), 1
        return split_channels(output, size, groups, 1), 0

    weight = weight.reshape(size * weight.shape[1], *weight.shape[2:])
    if bias is not None:
        bias = fold_channel_vector(bias, bias_dim, size)
    output = aten.convolution.default(fold_c(x, x_dim, size), weight, bias, *options, size * groups)
    return unfold_c(output, size, channels), 1


def check_bias(weight: list[Any], shape: list[Any], transposed: bool, groups: int) -> None:
    """What PyTorch asks of a bias, which a sum or a fold would not: shapes are those of one example."""
    channels = weight[1] * groups if transposed else weight[0]
    if shape != [channels]:
        raise RuntimeError(f"expected bias to be 1-dimensional with {channels} elements, but got bias of size {shape}")


def with_bias_of_another_dtype(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, weight: Tensor, bias: Tensor, options: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """Some kernels of the CPU add it, and all others raise: the one that an example goes to is asked."""
    if x.device.type != "cpu":
        raise RuntimeError(f"Input type ({x.dtype}) and bias type ({bias.dtype}) should be the same")
    example = [placeholder(v, logical_shape(v, d)) for v, d in zip((x, weight, bias), in_dims)]
    run_on_zeros(aten.convolution.default, (*example, *options), {})
    x_dim, weight_dim, bias_dim = in_dims[:3]
    if x_dim is None and weight_dim is None:
        output = aten.convolution.default(x, weight, None, *options).unsqueeze(0)
    else:
        output = to_front(*convolution_rule(info, (x_dim, weight_dim, None), x, weight, None, *options))
    bias = bias.unsqueeze(0) if bias_dim is None else bias
    return (output + per_channel(bias, bias_dim or 0, output.dim() - 1)).to(output.dtype), 0


def per_channel(bias: Any, bdim: int | None, rank: int) -> Tensor:
    """A bias to be added to ``[B, N, O, ...]``, whose examples have rank ``rank``."""
    bias = to_front(bias, bdim)
    return bias.reshape(bias.shape[0], 1, bias.shape[1], *[1] * (rank - 2))


@batching_rule(aten.convolution_backward.default)
def convolution_backward_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Each gradient is a convolution of its own, of the two other tensors: which of those are batched decides.

    Where all three are, one call of the kernel gives both gradients.
    """
    size = info.batch_size
    if size and in_dims[2] is not None and not weight.numel():
        raise RuleDeclined("what has no channels cannot be folded")
    options = (stride, padding, dilation, transposed, output_padding)
    grad_dim, x_dim, weight_dim = in_dims[:3]
    grads: list[Any] = [None, None, None]
    dims: list[int | None] = [None, None, None]
    if size and all(output_mask[:2]) and None not in in_dims[:3]:
        first, second, *kernel = logical_shape(weight, weight_dim)
        slid = images_and_filters(grad_output, grad_dim, x, x_dim, transposed)
        if not windows_pay(*slid, second, kernel, options[:3]):
            folded = fold_c(grad_output, grad_dim, size), fold_c(x, x_dim, size), fold_n(weight, weight_dim, size)
            mask, channels = [True, True, False], logical_shape(x, x_dim)[1]
            of_x, of_weight, _ = aten.convolution_backward.default(*folded, None, *options, size * groups, mask)
            grads[0], dims[0] = unfold_c(of_x, size, channels), 1
            grads[1], dims[1] = unfold_n(of_weight, size, first), 0
            output_mask = [False, False, output_mask[2]]
    if output_mask[0]:
        shape = logical_shape(x, x_dim)
        grads[0], dims[0] = input_gradient(size, grad_output, grad_dim, weight, weight_dim, shape, options, groups)
    if output_mask[1]:
        shape = logical_shape(weight, weight_dim)
        grads[1], dims[1] = weight_gradient(size, grad_output, grad_dim, x, x_dim, shape, options, groups)
    if output_mask[2]:
        if grad_dim is not None:
            grad_output, dims[2] = to_front(grad_output, grad_dim), 0
        first = 0 if grad_dim is None else 1
        grads[2] = grad_output.sum([first, *range(first + 2, grad_output.dim())])
    return tuple(grads), tuple(dims)


def native_input_gradient(
    grad_output: Tensor, weight: Tensor, shape: Sequence[Any], options: tuple[Any, ...], groups: int
) -> Tensor:
    """The gradient for an input of ``shape``."""
    x = placeholder(grad_output, shape)
    mask = [True, False, False]
    return aten.convolution_backward.default(grad_output, x, weight, None, *options, groups, mask)[0]


def native_weight_gradient(
    grad_output: Tensor, x: Tensor, shape: Sequence[Any], options: tuple[Any, ...], groups: int
) -> Tensor:
    """The gradient for a weight of ``shape``."""
    weight = placeholder(grad_output, shape)
    mask = [False, True, False]
    return aten.convolution_backward.default(grad_output, x, weight, None, *options, groups, mask)[1]


def input_gradient(
    size: int,
    grad_output: Tensor,
    grad_dim: int | None,
    weight: Tensor,
    weight_dim: int | None,
    shape: Sequence[Any],
    options: tuple[Any, ...],
    groups: int,
) -> tuple[Tensor, int | None]:
    """From the cotangent and the weight; ``shape`` is that of one example's input."""
    n, channels, *spatial = shape
    transposed = options[3]
    if grad_dim is None and weight_dim is None:
        return native_input_gradient(grad_output, weight, shape, options, groups), None
    if size == 0:
        return grad_output.new_zeros([0, *shape]), 0
    if weight_dim is None:
        side = side_of_n((grad_output, grad_dim))
        folded = fold_n(grad_output, grad_dim, size, side)
        grad = native_input_gradient(folded, weight, [size * n, channels, *spatial], options, groups)
        return unfold_n(grad, size, n, side), side
    weight = to_front(weight, weight_dim)
    wide = [n, size * channels, *spatial]
    if grad_dim is None:
        weight = join_channels(weight, groups, 0) if transposed else join_channels(weight, 1, 1)
        return split_channels(native_input_gradient(grad_output, weight, wide, options, groups), size, groups, 1), 0
    weight = weight.reshape(size * weight.shape[1], *weight.shape[2:])
    folded = fold_c(grad_output, grad_dim, size)
    return unfold_c(native_input_gradient(folded, weight, wide, options, size * groups), size, channels), 1


def weight_gradient(
    size: int,
    grad_output: Tensor,
    grad_dim: int | None,
    x: Tensor,
    x_dim: int | None,
    shape: Sequence[Any],
    options: tuple[Any, ...],
    groups: int,
) -> tuple[Tensor, int | None]:
    """From the cotangent and the input; ``shape`` is that of one example's weight."""
    first, second, *kernel = shape
    transposed = options[3]
    if grad_dim is None and x_dim is None:
        return native_weight_gradient(grad_output, x, shape, options, groups), None
    if size == 0:
        return grad_output.new_zeros([0, *shape]), 0
    if grad_dim is not None and x_dim is not None:
        # Per-example gradients of a shared weight.
        images, filters = images_and_filters(grad_output, grad_dim, x, x_dim, transposed)
        if windows_pay(images, filters, second, kernel, options[:3]):
            return windows_product(images, filters, shape, options[:3], groups), 0
        # Every example is a set of groups of its own.
        wide = [size * first, second, *kernel]
        folded = fold_c(grad_output, grad_dim, size), fold_c(x, x_dim, size)
        grad = native_weight_gradient(*folded, wide, options, size * groups)
        return grad.reshape(size, first, second, *kernel), 0
    if grad_dim is not None:
        grad_output = join_channels(to_front(grad_output, grad_dim), groups, 1)
    else:
        x = join_channels(to_front(x, x_dim), groups, 1)
    # The channels of the batched side are over all groups in the weight's first dimension, or of one in its second.
    if (grad_dim is None) == transposed:
        grad = native_weight_gradient(grad_output, x, [size * first, second, *kernel], options, groups)
        return split_channels(grad, size, groups, 0), 0
    grad = native_weight_gradient(grad_output, x, [first, size * second, *kernel], options, groups)
    return grad.reshape(first, size, second, *kernel), 1


# Convolution kernels work on channels in blocks; groups narrower than one leave the most of it idle.
BLOCK = 8
# How many times the size of what is there already the windows may take.
WINDOWS = 4


def images_and_filters(
    grad_output: Tensor, grad_dim: int, x: Tensor, x_dim: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """``[B, N, ...]``: what the weight slides over, and what it is multiplied with there."""
    cotangent, x = to_front(grad_output, grad_dim), to_front(x, x_dim)
    return (cotangent, x) if transposed else (x, cotangent)


def windows_pay(
    images: Tensor, filters: Tensor, channels: int, kernel: Sequence[int], options: tuple[Any, ...]
) -> bool:
    """Whether ``windows_product`` does less than a convolution with ``B * groups`` groups of ``channels`` channels."""
    if images.dtype is not filters.dtype or not images.is_floating_point() or len(kernel) != images.dim() - 3:
        return False
    taps = math.prod(kernel)
    if taps == 1:
        return all(s == 1 for s in options[0]) and not any(options[1])  # the windows are the images
    positions = math.prod(filters.shape[3:])
    sizes = images.numel() + filters.numel()
    return channels < BLOCK and math.prod(images.shape[:3]) * taps * positions <= WINDOWS * sizes


def windows_product(
    images: Tensor, filters: Tensor, shape: Sequence[Any], options: tuple[Any, ...], groups: int
) -> Tensor:
    """Per-example weight gradients as one batched product: each image's windows times what was multiplied with them.

    ``images [B, N, groups * c, ...]`` is the side that the weight ``[groups * f, c, *kernel]`` slides over.
    """
    first, second, *kernel = shape
    stride, padding, dilation = ((*o,) * (len(kernel) if len(o) == 1 else 1) for o in options)
    size, n, _, *positions = filters.shape
    if any(padding):
        images = constant_pad(images, [p for side in reversed(padding) for p in (side, side)])
    for k, (taps, step, apart, count) in enumerate(zip(kernel, stride, dilation, positions)):
        images = images.unfold(3 + k, (taps - 1) * apart + 1, step).narrow(3 + k, 0, count)
        if apart > 1:
            images = images[..., ::apart]
    # [B, N, groups * c, *positions, *kernel] to [B * groups, c * kernel, N * positions]
    d = len(kernel)
    split = images.unflatten(2, (groups, second))
    split = split.permute(0, 2, 3, *range(4 + d, 4 + 2 * d), 1, *range(4, 4 + d))
    place = math.prod(positions)
    windows = split.reshape(size * groups, second * math.prod(kernel), n * place)
    rows = filters.unflatten(2, (groups, first // groups)).transpose(1, 2).transpose(2, 3)
    rows = rows.reshape(size * groups, first // groups, n * place)
    return torch.bmm(rows, windows.mT).reshape(size, *shape)
