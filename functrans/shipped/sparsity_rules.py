"""What the outputs of operators depend on, by family. What is in none is pointwise by the derivative table, or depends
on everything (``without_rule`` in sparsity_level.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import map_tensors
from functrans.functionalization.write_back import RESHAPES
from functrans.shipped.sparsity_level import OperatorCall, everything, nothing, pattern_of, pointwise

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------- no dependence, or by place

pattern_of(
    aten.detach.default, aten.ceil.default, aten.floor.default, aten.round.default, aten.round.decimals,
    aten.trunc.default, aten.sign.default,
)(nothing)  # fmt: skip
pattern_of(
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.to.dtype,
    aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten.conj.default, aten._conj.default,
    aten.conj_physical.default, aten._conj_physical.default, aten.resolve_conj.default, aten.resolve_neg.default,
    aten._neg_view.default, aten.real.default, aten.imag.default, aten.sigmoid_backward.default,
    aten.native_dropout.default, aten.native_dropout_backward.default, aten.lift_fresh_copy.default,
)(pointwise)  # fmt: skip


@pattern_of(
    aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default, aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default,
)  # fmt: skip
def loss(call: OperatorCall) -> Any:
    return pointwise(call) if call["reduction"] == 0 else everything(call)


@pattern_of(aten.where.self)
def where(call: OperatorCall) -> Any:
    """One branch where the condition is the same for all inputs, else both."""
    condition = call.known(call["condition"])
    if condition is None:
        return pointwise(call)
    return torch.where(condition, call.numbers(call["self"]), call.numbers(call["other"]))


@pattern_of(aten.masked_fill.Scalar)
def masked_fill(call: OperatorCall) -> Any:
    mask = call.known(call["mask"])
    return pointwise(call) if mask is None else torch.where(mask, 0, call.numbers(call["self"]))


@pattern_of(aten.copy.default)
def copy(call: OperatorCall) -> Any:
    return call.numbers(call["src"])


@pattern_of(aten.fill.Tensor)
def fill(call: OperatorCall) -> Any:
    return call.numbers(call["value"])


# ------------------------------------------------------------------------------------------- elements moved

#: of the arguments, those whose elements move; the other tensors say where to
MOVED = ("self", "tensors", "src", "grad_output", "weight")


@pattern_of(aten.expand_as.default)
def expand_as(call: OperatorCall) -> Any:
    return call.numbers(call["self"]).expand(call.outs[0].shape)


@pattern_of(*RESHAPES, aten.view_copy.default, aten._reshape_alias_copy.default)
def reshape(call: OperatorCall) -> Any:
    return call.numbers(call["self"]).reshape(call.outs[0].shape)


#: operators that move elements, and nothing else
MOVES = (
    aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int,
    aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, aten.t.default, aten.numpy_T.default,
    aten.mT.default, aten.mH.default, aten.adjoint.default, aten.matrix_H.default, aten.expand.default,
    aten.broadcast_to.default, aten.repeat.default, aten.select.int, aten.slice.Tensor,
    aten.narrow.default, aten.diagonal.default, aten.unfold.default, aten.select_backward.default,
    aten.slice_backward.default, aten.diagonal_backward.default, aten.diag_embed.default, aten.tril.default,
    aten.triu.default, aten.select_scatter.default, aten.slice_scatter.default, aten.diagonal_scatter.default,
    aten.flip.default, aten.roll.default, aten.rot90.default, aten.cat.default, aten.stack.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
    aten.chunk.default, aten.unbind.int, aten.index.Tensor, aten._unsafe_index.Tensor, aten.gather.default,
    aten.index_select.default, aten.take.default, aten.masked_select.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.diagonal_copy.default, aten.expand_copy.default, aten.permute_copy.default,
    aten.select_copy.int, aten.slice_copy.Tensor, aten.split_copy.Tensor, aten.split_with_sizes_copy.default,
    aten.squeeze_copy.default, aten.squeeze_copy.dim, aten.squeeze_copy.dims, aten.t_copy.default,
    aten.transpose_copy.int, aten.unbind_copy.int, aten.unfold_copy.default, aten.unsqueeze_copy.default,
)  # fmt: skip


@pattern_of(*MOVES)
def moved(call: OperatorCall) -> Any:
    """The operator itself, on the numbers."""
    return by_moving(call, {})


@pattern_of(aten.constant_pad_nd.default)
def padded(call: OperatorCall) -> Any:
    return by_moving(call, {"value": 0})


@pattern_of(aten.scatter.value, aten.index_fill.int_Scalar)
def overwritten(call: OperatorCall) -> Any:
    return by_moving(call, {"value": 0})


@pattern_of(aten.embedding.default)
def embedding(call: OperatorCall) -> Any:
    indices = call.known(call["indices"])
    return everything(call) if indices is None else call.numbers(call["weight"])[indices]


@pattern_of(aten.view_as_real.default)
def view_as_real(call: OperatorCall) -> Any:
    return call.numbers(call["self"]).unsqueeze(-1)


@pattern_of(aten.view_as_complex.default)
def view_as_complex(call: OperatorCall) -> Any:
    return call.sets.union_last(call.numbers(call["self"]))


def by_moving(call: OperatorCall, instead: dict[str, Any]) -> Any:
    unknown = False

    def given(name: str, a: Tensor) -> Any:
        nonlocal unknown
        if name in MOVED:
            return call.numbers(a)
        known = call.known(a)
        unknown = unknown or known is None
        return known

    named = {name: instead.get(name, map_tensors(partial(given, name), a)) for name, a in call.named.items()}
    if unknown:
        return everything(call)
    found = call.op(**named)
    return found if isinstance(found, list | tuple) else [found]


def added(call: OperatorCall, source: str, places: Tensor, keeps: bool = True) -> Tensor:
    """``source`` added to ``self`` at ``places``, positions in ``self`` for each of its elements.

    ``keeps``: what was there stays there. If not, it goes where one element comes; of several that come to one place
    any may win.
    """
    numbers = call.numbers(call["self"])
    out = numbers.flatten().clone()
    coming = call.numbers(call[source])
    if coming.shape != places.shape:  # a source may be larger than the index of scatter, or broadcast
        larger = coming.dim() == places.dim() and all(a >= b for a, b in zip(coming.shape, places.shape, strict=True))
        coming = coming[tuple(slice(n) for n in places.shape)] if larger else coming.expand(places.shape)
    places, coming = places.flatten(), coming.flatten()
    if not keeps and len(torch.unique(places)) == len(places):
        out[places] = coming
        return out.reshape(numbers.shape)
    order = torch.argsort(places, stable=True)
    for_place: dict[int, list[int]] = {}
    for place, n in zip(places[order].tolist(), coming[order].tolist(), strict=True):
        for_place.setdefault(place, []).append(n)
    for place, several in for_place.items():
        out[place] = call.sets.union_of([*several, int(out[place])] if keeps else several)
    return out.reshape(numbers.shape)


def positions(call: OperatorCall) -> Tensor:
    shape = call["self"].shape
    return torch.arange(math.prod(shape)).reshape(shape)


@pattern_of(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(call: OperatorCall) -> Any:
    indices = [i if i is None else call.known(i) for i in call["indices"]]
    if any(i is None and given is not None for i, given in zip(indices, call["indices"], strict=True)):
        return everything(call)
    return added(call, "values", aten.index.Tensor(positions(call), indices), call["accumulate"])


@pattern_of(aten.scatter.src, aten.scatter_add.default)
def scatter(call: OperatorCall) -> Any:
    index = call.known(call["index"])
    if index is None or call["self"].dim() == 0:
        return everything(call)
    places = positions(call)
    room = [slice(n) for n in index.shape]
    room[call["dim"]] = slice(None)
    return added(call, "src", places[tuple(room)].gather(call["dim"], index), call.op is aten.scatter_add.default)


@pattern_of(aten.index_add.default, aten.index_copy.default)
def index_add(call: OperatorCall) -> Any:
    index = call.known(call["index"])
    if index is None or call["self"].dim() == 0:
        return everything(call)
    places = positions(call).index_select(call["dim"], index)
    return added(call, "source", places, call.op is aten.index_add.default)


# ------------------------------------------------------------------------------------------- along dimensions


def dims_of(call: OperatorCall) -> Sequence[int] | None:
    dim = call.named.get("dim")
    return [dim] if isinstance(dim, int) else dim


def carried_by(call: OperatorCall) -> list[Tensor]:
    """The numbers of all arguments that carry some."""
    return [n for x in call.tensors() if (n := call.carried(x)) is not None]


@pattern_of(
    aten.sum.default, aten.sum.dim_IntList, aten.nansum.default, aten.mean.default, aten.mean.dim, aten.prod.default,
    aten.prod.dim_int, aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.max.dim,
    aten.min.dim, aten.aminmax.default, aten.median.default, aten.median.dim, aten.nanmedian.default,
    aten.nanmedian.dim, aten.kthvalue.default, aten.mode.default, aten.logsumexp.default, aten.var.correction,
    aten.std.correction, aten.var_mean.correction, aten.std_mean.correction, aten.linalg_vector_norm.default,
    aten.norm.Scalar, aten.norm.ScalarOpt_dim,
)  # fmt: skip
def reduced(call: OperatorCall) -> Any:
    found = call.sets.union_along(call.numbers(call["self"]), dims_of(call))
    return [found.reshape(o.shape) for o in call.outs]


@pattern_of(
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int,
    aten._log_softmax.default, aten._softmax_backward_data.default, aten._log_softmax_backward_data.default,
    aten.sort.default, aten.sort.stable, aten.topk.default, aten._fft_c2c.default, aten._fft_r2c.default,
    aten._fft_c2r.default,
)  # fmt: skip
def mixed(call: OperatorCall) -> Any:
    """Each line along the dimensions depends on all of itself."""
    dims = dims_of(call)
    if dims == []:
        return pointwise(call)
    found = call.union(*(call.sets.union_along(n, dims) for n in carried_by(call)))
    return [found.expand(o.shape) for o in call.outs]


@pattern_of(
    aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default
)
def scanned(call: OperatorCall) -> Any:
    numbers, dim = call.numbers(call["self"]), call["dim"]
    if numbers.numel() == 0 or numbers.dim() == 0:
        return numbers
    so_far, found = None, []
    for here in numbers.unbind(dim):
        so_far = here if so_far is None else call.sets.union(so_far, here)
        found.append(so_far)
    return torch.stack(found, dim)


# ------------------------------------------------------------------------------------------- products of matrices


@pattern_of(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.vdot.default)
def product(call: OperatorCall) -> Any:
    left, right = [x for x in call.tensors()][:2]
    return multiplied(call, left, right).reshape(call.outs[0].shape)


@pattern_of(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def product_and_sum(call: OperatorCall) -> Any:
    more, left, right = list(call.tensors())
    return call.union(multiplied(call, left, right).reshape(call.outs[0].shape), call.numbers(more))


@pattern_of(aten.addr.default)
def outer_and_sum(call: OperatorCall) -> Any:
    more, left, right = (call.numbers(x) for x in call.tensors())
    return call.union(left.unsqueeze(1), right, more)


def multiplied(call: OperatorCall, left: Tensor, right: Tensor) -> Tensor:
    """[batch, n, m] of the product of ``left``, [(batch,) n, k] or [k], and ``right``, [(batch,) k, m] or [k]."""

    def as_left(t: Tensor) -> Tensor:
        return t if t.dim() == 3 else t.unsqueeze(0) if t.dim() == 2 else t[None, None]

    def as_right(t: Tensor) -> Tensor:
        return t if t.dim() == 3 else t.unsqueeze(0) if t.dim() == 2 else t[None, :, None]

    return call.union(
        half(call, as_left(call.numbers(left)), call.carried(left), right, as_right),
        half(call, as_right(call.numbers(right)).mT, call.carried(right), left, lambda t: as_left(t).mT).mT,
    )


def half(call: OperatorCall, numbers: Tensor, carried: Tensor | None, other: Tensor, shaped: Any) -> Tensor:
    """What the product depends on by one factor: a sum along the last dimension of ``numbers``, [batch, n, k], without
    what a known matrix ``other``, [batch, k, m], multiplies by zero."""
    batch, n, _ = numbers.shape
    m = shaped(torch.empty(other.shape, device="meta")).shape[-1]
    if carried is None or not carried.any():
        return torch.zeros(batch, n, m, dtype=torch.int64)
    known = call.known(other) if call.carried(other) is None else None
    if known is None or bool((known != 0).all()):
        return call.sets.union_last(numbers).unsqueeze(-1).expand(batch, n, m)
    kept = shaped(known != 0)
    columns = [
        call.sets.union_last(numbers[b][:, kept[b, :, j]]) for b in range(batch) for j in range(m)
    ]  # fmt: skip
    return torch.stack(columns).reshape(batch, m, n).mT if columns else torch.zeros(batch, n, m, dtype=torch.int64)


# ------------------------------------------------------------------------------------------- windows


def windows(numbers: Tensor, sizes: Any, stride: Any, padding: Any, dilation: Any, out: Sequence[int]) -> Tensor:
    """[..., *out, window] of [..., *spatial]: what lies under a window at each of its places."""
    first = numbers.dim() - len(sizes)
    for i, (size, s, p, d) in enumerate(zip(sizes, stride, padding, dilation, strict=True)):
        dim = first + i
        needed = (out[i] - 1) * s + (size - 1) * d + 1
        behind = max(needed - numbers.shape[dim] - p, 0)
        pad = [0, 0] * (numbers.dim() - 1 - dim) + [p, behind]
        numbers = aten.constant_pad_nd.default(numbers, pad, 0)
        starts = torch.arange(out[i]) * s
        reached = starts.unsqueeze(1) + torch.arange(size) * d
        numbers = numbers.index_select(dim, reached.flatten()).unflatten(dim, reached.shape).movedim(dim + 1, -1)
    return numbers.flatten(numbers.dim() - len(sizes))


def spread(values: Any, rank: int) -> list[int]:
    values = list(values) if isinstance(values, list | tuple) else [values]
    return values * rank if len(values) == 1 else values


def pooled(call: OperatorCall, rank: int) -> Any:
    size = spread(call["kernel_size"], rank)
    stride = spread(call["stride"], rank) if call["stride"] else size
    padding, dilation = spread(call["padding"], rank), spread(call.named.get("dilation", 1), rank)
    numbers = call.numbers(call["self"])
    return call.sets.union_last(windows(numbers, size, stride, padding, dilation, call.outs[0].shape[-rank:]))


@pattern_of(aten.avg_pool2d.default, aten.max_pool2d_with_indices.default)
def pooled_2d(call: OperatorCall) -> Any:
    return pooled(call, 2)


@pattern_of(aten.avg_pool3d.default, aten.max_pool3d_with_indices.default)
def pooled_3d(call: OperatorCall) -> Any:
    return pooled(call, 3)


def spread_by_stride(call: OperatorCall, numbers: Tensor, weight: Tensor, out: Sequence[int]) -> Tensor:
    """[..., *out, window] of a transposed convolution's input: what may come to each place of the output."""
    rank = len(out)
    stride, padding, dilation = (spread(call[name], rank) for name in ("stride", "padding", "dilation"))
    sizes = weight.shape[2:]
    for i, s in enumerate(stride):
        dim = numbers.dim() - rank + i
        wide = torch.zeros(
            *numbers.shape[:dim], max((numbers.shape[dim] - 1) * s + 1, 0), *numbers.shape[dim + 1 :],
            dtype=torch.int64,
        )  # fmt: skip
        numbers = wide.index_copy(dim, torch.arange(numbers.shape[dim]) * s, numbers)
    ahead = [d * (k - 1) - p for d, k, p in zip(dilation, sizes, padding, strict=True)]
    for i, p in enumerate(ahead):
        if p < 0:
            dim = numbers.dim() - rank + i
            numbers = numbers.narrow(dim, -p, numbers.shape[dim] + p)
    return windows(numbers, sizes, [1] * rank, [max(p, 0) for p in ahead], dilation, out)


@pattern_of(aten.convolution.default)
def convolution(call: OperatorCall) -> Any:
    weight, groups, out = call["weight"], call["groups"], call.outs[0]
    if out.numel() == 0 or out.dim() != weight.dim():
        return everything(call)
    rank = out.dim() - 2
    numbers = call.numbers(call["input"]).unflatten(1, (groups, -1))
    numbers = call.sets.union_along(numbers, [2]).squeeze(2)
    if call["transposed"]:
        reached = spread_by_stride(call, numbers, weight, out.shape[2:])
        filters = call.sets.union_along(call.numbers(weight).unflatten(0, (groups, -1)), [1, *range(3, 3 + rank)])
        filters = filters.flatten()
    else:
        stride, padding, dilation = (spread(call[name], rank) for name in ("stride", "padding", "dilation"))
        reached = windows(numbers, weight.shape[2:], stride, padding, dilation, out.shape[2:])
        filters = call.sets.union_along(call.numbers(weight), range(1, 2 + rank)).flatten()
    found = call.sets.union_last(reached).repeat_interleave(out.shape[1] // groups, 1)
    for per_channel in (filters, *(call.numbers(b) for b in call.tensors("bias"))):
        found = call.union(found, per_channel.view(-1, *[1] * rank))
    return found


# ------------------------------------------------------------------------------------------- normalization and matrices


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


