"""Derivatives of normalizations, up to the third order, against their definition in plain operators."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from derivative_checker import Call, check_entry
from plain_norms import EPS, PLAIN, batch_norm, group_norm, layer_norm, rms_norm
from torch import Tensor

import functrans
from functrans.derivatives import norm_backwards, norms
from functrans.derivatives import rms_norm as rms_norms
from functrans.derivatives.table import DERIVATIVES

aten = torch.ops.aten


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def affine(*shape: int) -> Iterator[tuple[Any, Any]]:
    yield randn(*shape), randn(*shape)
    yield randn(*shape), None
    yield None, None


MASKS = [[True, True, True], [True, False, False], [False, True, False], [True, False, True]]


def layer_calls() -> Iterator[Call]:
    for shape, k in (((3, 4), 1), ((2, 3, 4), 2), ((5,), 1), ((2, 3, 1), 1)):
        inner = shape[-k:]
        for weight, bias in affine(*inner):
            x = randn(*shape)
            yield Call(aten.native_layer_norm.default, (x, list(inner), weight, bias, EPS))
            _, mean, rstd = aten.native_layer_norm(x, list(inner), weight, bias, EPS)
            for mask in MASKS if weight is not None else [[True, False, False]]:
                args = (randn(*shape), x, list(inner), mean, rstd, weight, bias, mask)
                yield Call(aten.native_layer_norm_backward.default, args)
            yield Call(aten._fused_rms_norm.default, (x, list(inner), weight, None if bias is None else EPS))


def group_calls() -> Iterator[Call]:
    for shape, group in (((2, 4, 3), 2), ((2, 3, 2, 2), 1), ((3, 4), 2), ((2, 2, 3), 2)):
        sizes = (shape[0], shape[1], torch.Size(shape[2:]).numel())
        for weight, bias in affine(shape[1]):
            x = randn(*shape)
            yield Call(aten.native_group_norm.default, (x, weight, bias, *sizes, group, EPS))
            _, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, group, EPS)
            for mask in MASKS if weight is not None else [[True, False, False]]:
                args = (randn(*shape), x, mean, rstd, weight, *sizes, group, mask)
                yield Call(aten.native_group_norm_backward.default, args)


def batch_calls() -> Iterator[Call]:
    for shape in ((4, 3), (3, 2, 4), (2, 3, 2, 2)):
        c = shape[1]
        for weight, bias in affine(c):
            x, running = randn(*shape), (randn(c), randn(c).abs())
            yield Call(aten._native_batch_norm_legit.no_stats, (x, weight, bias, True, 0.1, EPS))
            yield Call(aten._native_batch_norm_legit_no_training.default, (x, weight, bias, *running, 0.1, EPS))
            for training in (True, False):
                stats = (None, None) if training else running
                yield Call(aten.native_batch_norm.default, (x, weight, bias, *stats, training, 0.1, EPS))
                args = (x, weight, bias, *running, training, 0.1, EPS)
                yield Call(aten._native_batch_norm_legit_functional.default, args)
                _, mean, rstd = aten.native_batch_norm(x, weight, bias, *stats, training, 0.1, EPS)
                for mask in MASKS if weight is not None else [[True, False, False]]:
                    args = (randn(*shape), x, weight, *stats, mean, rstd, training, EPS, mask)
                    yield Call(aten.native_batch_norm_backward.default, args)


def all_calls() -> list[Call]:
    torch.manual_seed(0)
    return [*layer_calls(), *group_calls(), *batch_calls()]


CALLS = all_calls()


@pytest.mark.parametrize("op", PLAIN, ids=str)
def test_norm_entry_agrees_with_plain_operators(op):
    calls = [call for call in CALLS if call.op is op]
    assert calls
    for call in calls:
        # the first order of a backward operator's entry is the second order of its norm
        check_entry(call, order=1, native=PLAIN[op])


def test_every_norm_entry_is_checked():
    files = {norms.__file__, norm_backwards.__file__, rms_norms.__file__}
    here = {op for op in DERIVATIVES if DERIVATIVES.place(op).rsplit(":", 1)[0] in files}
    assert here == set(PLAIN)


# ---------------------------------------------------------------------------------------------- higher orders


class Table:
    """``torch.ops.aten`` with the derivatives of some operators replaced by those of the table."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(aten, name)
        entry = DERIVATIVES.get(op.default) if "default" in op.overloads() else None
        return op if entry is None or op.default not in PLAIN else SimpleNamespace(default=differentiable_by(entry))


def differentiable_by(entry):
    def run(*args):
        return ByEntry.apply(entry, *args)

    return run


class ByEntry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entry, *args):
        results = entry.op(*args)
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        ctx.rest = [None if isinstance(a, Tensor) else a for a in args]
        ctx.places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        ctx.outputs = [i for i, r in enumerate(results) if isinstance(r, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.places), *(results[i] for i in ctx.outputs))
        ctx.count = len(results)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        entry, args, results = ctx.entry, list(ctx.rest), [None] * ctx.count
        for i, t in zip(ctx.places, ctx.saved_tensors, strict=False):
            args[i] = t
        for i, t in zip(ctx.outputs, ctx.saved_tensors[len(ctx.places) :], strict=True):
            results[i] = t
        known = dict(zip(entry.arguments, args, strict=True), grads=grads, results=tuple(results))
        answers = []
        for name, needed in zip(entry.arguments, ctx.needs_input_grad[1:], strict=True):
            wanted = needed and name in entry.formulas
            answers.append(entry.formulas[name](**{n: known[n] for n in entry.needs[name]}) if wanted else None)
        return None, *answers


HIGHER = {
    "layer_norm": (
        lambda t, x, w, b: t.native_layer_norm.default(x, [3], w, b, EPS)[0],
        lambda x, w, b: layer_norm(x, [3], w, b, EPS)[0],
        (4, 3),
    ),
    "group_norm": (
        lambda t, x, w, b: t.native_group_norm.default(x, w, b, 2, 3, 4, 1, EPS)[0],
        lambda x, w, b: group_norm(x, w, b, 2, 3, 4, 1, EPS)[0],
        (2, 3, 4),
    ),
    "batch_norm, training": (
        lambda t, x, w, b: t._native_batch_norm_legit_functional.default(
            x, w, b, torch.zeros_like(w), torch.ones_like(w), True, 0.1, EPS
        )[0],
        lambda x, w, b: batch_norm(x, w, b, EPS)[0],
        (4, 3, 2),
    ),
    "batch_norm, evaluation": (
        lambda t, x, w, b: t._native_batch_norm_legit_functional.default(x, w, b, b, w * w, False, 0.1, EPS)[0],
        lambda x, w, b: batch_norm(x, w, b, EPS, (b, w * w))[0],
        (4, 3, 2),
    ),
    "rms_norm": (
        lambda t, x, w, b: t._fused_rms_norm.default(x, [3], w, EPS)[0] + b,
        lambda x, w, b: rms_norm(x, [3], w, EPS)[0] + b,
        (4, 3),
    ),
}


@pytest.mark.parametrize("name", HIGHER)
def test_fourth_order_with_every_operator_differentiated_by_the_table(name, monkeypatch):
    """PyTorch's own answer for batch norm is wrong from the third order on (pytorch/pytorch#186256)."""
    monkeypatch.setattr(norms, "aten", Table())
    monkeypatch.setattr(rms_norms, "aten", Table())
    by_table, plain, shape = HIGHER[name]
    torch.manual_seed(0)
    leaves = [randn(*shape).requires_grad_(), randn(3).requires_grad_(), randn(3).requires_grad_()]
    ours, expected = by_table(norms.aten, *leaves).sin().sum(), plain(*leaves).sin().sum()
    torch.testing.assert_close(ours, expected)
    for _ in range(4):
        directions = [torch.randn_like(x) for x in leaves]
        ours, expected = (along(f, leaves, directions) for f in (ours, expected))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    for a, b in itertools.zip_longest(*(torch.autograd.grad(f, leaves) for f in (ours, expected))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def along(f: Tensor, leaves: list[Tensor], directions: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(f, leaves, create_graph=True)
    return sum((g * d).sum() for g, d in zip(grads, directions, strict=True)) * 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_float32_under_half_precision(dtype):
    """The cotangents have the arguments' types, though the statistics, weight and bias may be float32."""
    torch.manual_seed(0)
    x, w, b = randn(4, 6).to(dtype), torch.randn(6), torch.randn(6)
    grad = randn(4, 6).to(dtype)
    for op, args in (
        (aten.native_layer_norm.default, (x, [6], w, b, EPS)),
        (aten.native_layer_norm.default, (x, [6], w.to(dtype), b.to(dtype), EPS)),
        (aten._native_batch_norm_legit.no_stats, (x, w, b, True, 0.1, EPS)),
        (aten._fused_rms_norm.default, (x, [6], w.to(dtype), EPS)),
    ):
        entry, leaves = DERIVATIVES.get(op), {}
        values = dict(zip(entry.arguments, args, strict=True))
        outs = op(*args)
        values |= {"results": outs, "grads": (grad.to(outs[0].dtype),) + tuple(map(torch.randn_like, outs[1:]))}
        for name, formula in entry.formulas.items():
            leaves[name] = values[name]
            got = formula(**{n: values[n] for n in entry.needs[name]})
            assert (got.dtype, got.shape) == (values[name].dtype, values[name].shape), (op, name)
            values[f"{name}_t"] = torch.randn_like(values[name])
        moved = entry.tangent(**{n: values[n] for n in entry.needs["tangent"]})
        assert [m.dtype for m in moved] == [o.dtype for o in outs], op


def test_channels_last_group_norm():
    torch.manual_seed(0)
    x = randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    grad = randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    args = (x, randn(4), randn(4), 2, 4, 9, 2, EPS)
    results = aten.native_group_norm(*args)
    values = {"input": x, "weight": args[1], "N": 2, "C": 4, "HxW": 9, "group": 2, "results": results}
    got = DERIVATIVES.get(aten.native_group_norm.default).formulas["input"](**values, grads=(grad, None, None))
    leaf = x.contiguous().requires_grad_()
    expected = torch.autograd.grad(group_norm(leaf, *args[1:])[0], leaf, grad)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("order", ["jvp", "vjp", "jvp of vjp", "vjp of jvp"])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "group_norm", "instance_norm"])
def test_autograd_through_transforms_of_a_normalization(name: str, order: str) -> None:
    """Plain autograd records what a transform computes,
    and takes the statistics that the operators return for constants.
    """
    weight = torch.tensor([0.7, -1.3, 0.4, 1.1], dtype=torch.float64)
    f = {
        "batch_norm": lambda x: torch.nn.functional.batch_norm(x, None, None, weight, None, True),
        "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (5,)),
        "group_norm": lambda x: torch.nn.functional.group_norm(x, 2, weight),
        "instance_norm": torch.nn.functional.instance_norm,
    }[name]
    generator = torch.Generator().manual_seed(3)
    x, t, u, s, d = (torch.randn(3, 4, 5, dtype=torch.float64, generator=generator) for _ in range(5))

    def pushed(x: torch.Tensor) -> torch.Tensor:
        return (functrans.jvp(f, (x,), (t,))[1] * u).sum()

    def pulled(x: torch.Tensor) -> torch.Tensor:
        return (functrans.vjp(f, x)[1](u)[0] * t).sum()

    total = {
        "jvp": pushed,
        "vjp": pulled,
        "jvp of vjp": lambda x: functrans.jvp(pulled, (x,), (s,))[1],
        "vjp of jvp": lambda x: (functrans.grad(pushed)(x) * s).sum(),
    }[order]
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(total(leaf), leaf)
    step = 1e-5 * d
    torch.testing.assert_close((got * d).sum(), (total(x + step) - total(x - step)) / 2e-5, rtol=1e-5, atol=1e-6)
