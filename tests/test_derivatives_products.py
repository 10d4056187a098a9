"""Every entry for products, indexing, softmax, losses, convolution and pooling, against PyTorch's own derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from derivative_checker import check_entry, recorded_calls
from recorder import Call, Recorder, before_autograd
from torch import Tensor

from functrans.derivatives import convolution, indexing, losses, matmul, pooling, softmax
from functrans.derivatives.table import DERIVATIVES

aten = torch.ops.aten
FAMILIES = (convolution, indexing, losses, matmul, pooling, softmax)
FILES = {m.__file__ for m in FAMILIES}
ENTRIES = [op for op in DERIVATIVES if DERIVATIVES.place(op).rsplit(":", 1)[0] in FILES]
OPINFOS = ["__getitem__", "__rmatmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "dot", "gather",
    "index_add", "index_copy", "index_fill", "index_put", "index_select", "log_softmax", "masked_scatter",
    "masked_select", "matmul", "max_pool2d_with_indices_backward", "mm", "mv", "outer", "put", "scatter", "scatter_add",
    "softmax", "take", "take_along_dim", "vdot", "nn.functional.adaptive_avg_pool2d",
    "nn.functional.adaptive_avg_pool3d", "nn.functional.adaptive_max_pool2d", "nn.functional.adaptive_max_pool3d",
    "nn.functional.avg_pool1d", "nn.functional.avg_pool2d", "nn.functional.avg_pool3d", "nn.functional.bilinear",
    "nn.functional.binary_cross_entropy", "nn.functional.binary_cross_entropy_with_logits", "nn.functional.conv1d",
    "nn.functional.conv2d", "nn.functional.conv3d", "nn.functional.conv_transpose1d", "nn.functional.conv_transpose2d",
    "nn.functional.conv_transpose3d", "nn.functional.cross_entropy", "nn.functional.embedding",
    "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d", "nn.functional.huber_loss",
    "nn.functional.interpolate", "nn.functional.linear", "nn.functional.max_pool1d", "nn.functional.max_pool2d",
    "nn.functional.max_pool3d", "nn.functional.max_unpool2d", "nn.functional.max_unpool3d", "nn.functional.mse_loss",
    "nn.functional.nll_loss", "nn.functional.pad", "nn.functional.pixel_shuffle", "nn.functional.pixel_unshuffle",
    "nn.functional.scaled_dot_product_attention", "nn.functional.smooth_l1_loss", "nn.functional.soft_margin_loss",
    "nn.functional.unfold", "nn.functional.upsample_bilinear", "_upsample_bilinear2d_aa"]


# A linear operator's tangent is the operator itself, and this one reads its mask, which the checker forbids.
ONLY_REVERSE = dataclasses.replace(DERIVATIVES.get(aten.masked_select.default), tangent=None)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def more_calls() -> Iterator[Call]:
    """Calls that no OpInfo sample makes."""
    for dtype in (torch.float64, torch.complex128):
        yield Call(aten.ger.default, (randn(3, dtype=dtype), randn(4, dtype=dtype)))
        yield Call(aten.linear.default, (randn(2, 3, 4, dtype=dtype), randn(5, 4, dtype=dtype), randn(5, dtype=dtype)))
        yield Call(aten.linear.default, (randn(4, dtype=dtype), randn(5, 4, dtype=dtype), None))
        yield Call(aten.linear.default, (randn(2, 4, dtype=dtype), randn(4, dtype=dtype), randn(dtype=dtype)))
        for left, right in (((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2))):
            yield Call(aten.matmul.default, (randn(*left, dtype=dtype), randn(*right, dtype=dtype)))
    i = torch.tensor
    yield Call(aten.col2im.default, (randn(2, 12, 4), [3, 3], [2, 2], [1, 1], [0, 0], [1, 1]))
    yield Call(aten._unsafe_index_put.default, (randn(4, 3), [i([0, 2]), None], randn(2, 3), True))
    yield Call(aten._unsafe_index_put.default, (randn(4, 3), [None, i([0, 2])], randn(2), False))
    yield Call(aten.index_put.default, (randn(4, 3), [i([True, False, True, True])], randn(3), False))
    yield Call(aten.index.Tensor, (randn(4, 3, 2), [None, i([0, 0, 2]), i([1, 1, 0])]))
    yield Call(aten._unsafe_index.Tensor, (randn(4, 3), [i([0, 2, 2]), None]))
    yield Call(aten.index_fill.int_Tensor, (randn(3, 4), 1, i([2, 0, 2]), randn()))
    yield Call(aten.embedding.default, (randn(5, 3), i([[0, 4], [4, 1]]), 4, False))
    x = randn(3, 5)
    for half_to_float in (False,):
        yield Call(aten._softmax.default, (x, 1, half_to_float))
        yield Call(aten._log_softmax.default, (x, -1, half_to_float))
    for f in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d"):
        dims = int(f[-2])
        align = [[True], [False]] if "linear" in f or "cubic" in f else [[]]
        names = [f"upsample_{f}"] + [f"_upsample_nearest_exact{dims}d"] * ("nearest" in f)
        names += [f"_upsample_{f}_aa"] * (f in ("bilinear2d", "bicubic2d"))
        for name in names:
            for options in align:
                x = randn(2, 2, *(3, 4, 2)[:dims])
                yield Call(getattr(aten, name).default, (x, [5, 3, 3][:dims], *options))
                yield Call(getattr(aten, name).default, (x, [4, 6, 3][:dims], *options, *[1.5] * dims))
                if "aa" not in name:
                    yield Call(getattr(aten, name).vec, (x, None, *options, [1.5, 1.25, 2.0][:dims]))
                yield Call(getattr(aten, name).vec, (x, [5, 3, 3][:dims], *options, None))


def arguments_of(call: Call) -> dict[str, Any]:
    schema = call.op._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    return values | dict(zip((a.name for a in schema), call.args, strict=False)) | call.kwargs


def first_order_of(call: Call) -> list[Call]:
    """The calls of operators in the table that the reverse formulas of ``call`` make: the backward operators."""
    entry, values = DERIVATIVES.get(call.op), arguments_of(call)
    found: list[Call] = []
    outputs = call.op(*call.args, **call.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = tuple(torch.randn_like(o) if o.is_floating_point() or o.is_complex() else None for o in outputs)
    values |= {"result": outputs[0], "results": outputs, "grad": grads[0], "grads": grads}
    with torch.no_grad(), before_autograd(), Recorder(lambda op: op in DERIVATIVES, found.append):
        for name, formula in entry.formulas.items():
            if isinstance(values[name], Tensor):
                formula(*[values[n] for n in entry.needs[name]])
    return [c for c in found if "backward" in str(c.op)]


def usable(call: Call) -> bool:
    # sparse=True gives PyTorch a gradient of another layout; for scale_grad_by_freq see the test below
    return call.op is not aten.embedding.default or True not in call.args[3:]


@pytest.fixture(scope="module")
def calls() -> dict[Any, list[Call]]:
    torch.manual_seed(0)
    found = {
        op: list(cs) for op, cs in recorded_calls(ENTRIES, opinfos=OPINFOS, samples_per_opinfo=12, per_op=6).items()
    }
    for call in more_calls():
        found.setdefault(call.op, []).append(call)
    for op in list(found):
        found[op] = [c for c in found[op] if usable(c)]
        if "backward" not in str(op):
            for call in found[op][:5]:
                try:
                    backward = first_order_of(call)
                except (RuntimeError, IndexError):  # a sample that is meant to fail
                    continue
                for c in backward:
                    found.setdefault(c.op, []).append(c)
    return found


UNPOOLING = (aten.max_unpool2d.default, aten.max_unpool3d.default)


def unpooled(op: Any) -> Any:
    """``op``, for whose backward PyTorch gives the cotangent of a place to all that wrote there,
    as a reading of those that stayed.
    """

    def read(x: Tensor, indices: Tensor, *sizes: Any) -> Tensor:
        numbers = torch.arange(1.0, x.numel() + 1, dtype=torch.float64).reshape(x.shape)
        writers = op(numbers, indices, *sizes).long()
        return torch.cat([x.new_zeros(1), x.flatten()])[writers]

    return read


@pytest.mark.parametrize("op", ENTRIES, ids=str)
def test_entry_agrees_with_pytorch(op, calls):
    assert calls.get(op), f"no call of {op} to check its entry on"
    entry = DERIVATIVES.get(op)
    native = unpooled(op) if op in UNPOOLING else None
    if op is aten.masked_select.default:
        assert entry.tangent == "linear"
        entry = ONLY_REVERSE
    for call in calls[op]:
        # PyTorch's forward mode of embedding moves the padding, which its gradient does not
        check_entry(call, entry, native=native, trust_forward=op is not aten.embedding.default)


def test_embedding_gradient_scaled_by_frequency():
    """PyTorch forgets the scale in the second derivative, so the oracle here is that a transpose has the same pairing.

    (That of the tangent is in test_derivatives_missing.py.)
    """
    torch.manual_seed(0)
    indices, options = torch.tensor([[0, 4, 4], [1, 4, 2]]), (5, 2, True)
    reverse = dataclasses.replace(DERIVATIVES.get(aten.embedding.default), tangent=None)
    check_entry(Call(aten.embedding.default, (randn(5, 3), indices, 2, True)), reverse, order=1)
    forward = DERIVATIVES.get(aten.embedding_dense_backward.default)
    given, pulled = randn(2, 3, 3), randn(5, 3)
    there = (aten.embedding_dense_backward(given, indices, *options) * pulled).sum()
    back = (forward.formulas["grad_output"](pulled, indices, *options) * given).sum()
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize("op", [aten.scatter_add.default, aten.scatter.src], ids=str)
def test_scatter_source_larger_than_its_index(op):
    """PyTorch has no derivative for this; the rest of the source is not used."""
    torch.manual_seed(0)
    index = torch.tensor([[0, 2], [3, 1]])
    call = Call(op, (randn(3, 4), 1, index, randn(3, 4)))
    check_entry(call, native=lambda self, dim, index, src: op(self, dim, index, src[:2, :2]))


@pytest.mark.parametrize("op", [aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default], ids=str)
def test_softmax_that_changes_the_type(op):
    torch.manual_seed(0)
    for dtype, to in ((torch.float32, torch.float64), (torch.float64, torch.float64), (torch.float64, None)):
        check_entry(Call(op, (randn(3, 4).to(dtype), 1, to)), rtol=1e-5, atol=1e-6)


def quadratic_then_linear(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, x * x / 2, x.abs() - 0.5)


def reduced(loss: Tensor, reduction: int) -> Tensor:
    return (loss, loss.mean(), loss.sum())[reduction]


@pytest.mark.parametrize(
    ("op", "of_difference"),
    [
        (aten.mse_loss.default, lambda x: x * x),
        (aten.smooth_l1_loss.default, quadratic_then_linear),
        (aten.huber_loss.default, quadratic_then_linear),
    ],
    ids=["mse", "smooth_l1", "huber"],
)
def test_losses_broadcast_and_promote(op, of_difference):
    """PyTorch divides by the number of elements of the input, not of the loss; the oracle is the definition."""
    torch.manual_seed(0)
    for reduction in (0, 1, 2):
        for shapes in (((), (3,)), ((2, 1), (3,)), ((3,), (1,)), ((), ())):
            x, y = randn(*shapes[0]), randn(*shapes[1])
            for self, tolerances in ((x, {}), (x.float(), {"rtol": 1e-5, "atol": 1e-6})):
                call = Call(op, (self, y, reduction))
                check_entry(call, native=lambda x, y, r, *_: reduced(of_difference(x - y), r), **tolerances)


def test_weights_of_binary_cross_entropy():
    """PyTorch raises for weights that need a gradient; the oracle is the definition."""
    torch.manual_seed(0)
    x, y, w, p = (torch.rand(4, 3, dtype=torch.float64) for _ in range(4))

    def plain(x, y, w, reduction):
        return reduced(-w * (y * x.log() + (1 - y) * (1 - x).log()), reduction)

    def plain_logits(x, y, w, p, reduction):
        positive, negative = p * y * torch.nn.functional.logsigmoid(x), (1 - y) * torch.nn.functional.logsigmoid(-x)
        return reduced(-w * (positive + negative), reduction)

    for reduction in (0, 1, 2):
        for weight in (w, w[:1]):
            check_entry(Call(aten.binary_cross_entropy.default, (x, y, weight, reduction)), native=plain)
            args = (x, y, weight, p[0], reduction)
            check_entry(Call(aten.binary_cross_entropy_with_logits.default, args), native=plain_logits)


def test_values_broadcast_to_one_place_written_often():
    i = torch.tensor([0, 0, 0])
    check_entry(Call(aten.index_put.default, (randn(1), [i], randn(1), True)))
    check_entry(
        Call(aten.masked_select.default, (randn(3), torch.tensor([[True, False, True], [True, False, False]]))),
        ONLY_REVERSE,
    )
