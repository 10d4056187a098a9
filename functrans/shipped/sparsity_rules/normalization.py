"""Normalizations, and functions of whole matrices."""

from __future__ import annotations

from typing import Any

import torch

from functrans.shipped.sparsity_level import OperatorCall, everything, pattern_of

aten = torch.ops.aten


@pattern_of(aten.native_layer_norm.default)
def layer_norm(call: OperatorCall) -> Any:
    numbers = call.numbers(call["input"])
    rank = len(call["normalized_shape"])
    line = call.sets.union_along(numbers, range(numbers.dim() - rank, numbers.dim())) if rank else numbers
    whole = call.union(line.expand(numbers.shape), *(call.numbers(x) for x in call.tensors("weight", "bias")))
    return [whole, *(line.expand(o.shape) for o in call.outs[1:])]


@pattern_of(aten.native_group_norm.default)
def group_norm(call: OperatorCall) -> Any:
    numbers = call.numbers(call["input"])
    if numbers.numel() == 0:
        return everything(call)
    groups = call.sets.union_last(numbers.reshape(call["N"], call["group"], -1))
    found = groups.repeat_interleave(call["C"] // call["group"], 1)
    for per_channel in call.tensors("weight", "bias"):
        found = call.union(found, call.numbers(per_channel))
    return [found.reshape((*found.shape, *[1] * (numbers.dim() - 2))), *(groups.expand(o.shape) for o in call.outs[1:])]


@pattern_of(aten._native_batch_norm_legit_no_training.default)
def batch_norm_of_statistics(call: OperatorCall) -> Any:
    numbers = call.numbers(call["input"])
    found = numbers
    for per_channel in call.tensors("weight", "bias", "running_mean", "running_var"):
        found = call.union(found, call.numbers(per_channel).view(-1, *[1] * (numbers.dim() - 2)))
    return [found, *everything(call)[1:]]


@pattern_of(
    aten.linalg_inv_ex.default, aten.linalg_cholesky_ex.default, aten._linalg_eigh.default, aten._linalg_det.default,
    aten._linalg_slogdet.default, aten.linalg_eig.default, aten._linalg_svd.default, aten.linalg_qr.default,
    aten.cholesky_inverse.default, aten.linalg_matrix_exp.default, aten.linalg_lu.default,
)  # fmt: skip
def matrix_by_matrix(call: OperatorCall) -> Any:
    (x,) = call.tensors()
    numbers = call.numbers(x)
    batch = call.sets.union_last(numbers.flatten(-2))
    return [batch.reshape((*batch.shape, *[1] * (o.dim() - batch.dim()))).expand(o.shape) for o in call.outs]


@pattern_of(aten._linalg_solve_ex.default)
def solve(call: OperatorCall) -> Any:
    a, b = call["A"], call["B"]
    if a.dim() != b.dim() or not call["left"]:
        return everything(call)
    of_a = call.sets.union_along(call.numbers(a), [-2, -1])
    columns = call.sets.union_along(call.numbers(b), [-2])
    found = [call.union(of_a, columns).expand(call.outs[0].shape)]
    return [*found, *everything(call)[1:]]
