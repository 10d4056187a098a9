"""Attention in terms of simpler operators, and dropout."""

from __future__ import annotations

import math

import pytest
import torch
from derivative_checker import Call, check_entry
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from functrans import grad, vmap
from functrans.derivatives.attention import attention
from functrans.derivatives.table import DERIVATIVES

aten = torch.ops.aten


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def options():
    yield {}
    yield {"is_causal": True}
    yield {"scale": 0.3}
    yield {"attn_mask": randn(4, 5)}
    yield {"attn_mask": randn(2, 1, 4, 5), "scale": 0.5}
    mask = torch.rand(4, 5) < 0.6
    mask[1] = False  # all keys masked
    mask[2] = True
    yield {"attn_mask": mask}


@pytest.mark.parametrize("choice", range(6))
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_agrees_with_pytorch(choice, heads):
    torch.manual_seed(0)
    given = list(options())[choice]
    leaves = [randn(2, 2 * heads, 4, 3), randn(2, 2, 5, 3), randn(2, 2, 5, 6)]
    if given.get("attn_mask") is not None and given["attn_mask"].is_floating_point():
        leaves.append(given.pop("attn_mask"))
    given["enable_gqa"] = heads > 1
    leaves = [x.requires_grad_() for x in leaves]
    with sdpa_kernel(SDPBackend.MATH):
        ours, expected = attention(*leaves, **given), scaled_dot_product_attention(*leaves, **given)
    torch.testing.assert_close(ours, expected)
    ours, expected = (torch.autograd.grad(y.sin().sum(), leaves, create_graph=True) for y in (ours, expected))
    torch.testing.assert_close(ours, expected)
    ours, expected = (torch.autograd.grad(sum(g.cos().sum() for g in gs), leaves) for gs in (ours, expected))
    torch.testing.assert_close(ours, expected)


def test_attention_in_half_precision_is_as_good_as_pytorch():
    torch.manual_seed(0)
    exact = [randn(2, 2, 6, 8) for _ in range(3)]
    for dtype in (torch.bfloat16, torch.float16):
        half = [x.to(dtype) for x in exact]
        ours = attention(*half, is_causal=True)
        assert ours.dtype == dtype
        best = attention(*(x.double() for x in half), is_causal=True)
        torch.testing.assert_close(ours, best.to(dtype))


def test_attention_refuses_a_mask_beside_is_causal():
    x = randn(1, 4, 3)
    with pytest.raises(RuntimeError, match="attn_mask and is_causal=True exclude each other; give one"):
        attention(x, x, x, randn(4, 4), is_causal=True)


def test_attention_drops_out_weights():
    torch.manual_seed(0)
    x, value = randn(200, 3), torch.eye(200, dtype=torch.float64)
    weights = attention(x, x, value, dropout_p=0.25)
    full = attention(x, x, value)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], full[kept] / 0.75)
    assert math.isclose(kept.double().mean(), 0.75, abs_tol=0.02)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("train", [True, False, None])
def test_dropout_follows_the_mask_it_drew(p, train):
    entry = DERIVATIVES.get(aten.native_dropout.default)
    torch.manual_seed(0)
    x, x_t = randn(50), randn(50)
    results = aten.native_dropout(x, p, train)
    slope = results[0] / x
    pulled = entry.formulas["input"](grads=(x_t, None), results=results, p=p, train=train)
    torch.testing.assert_close(pulled, slope * x_t)
    torch.testing.assert_close(entry.tangent(results=results, p=p, train=train, input_t=x_t), (slope * x_t, None))


def test_dropout_backward():
    torch.manual_seed(0)
    mask = torch.rand(4, 3) < 0.5
    check_entry(Call(aten.native_dropout_backward.default, (randn(4, 3), mask, 2.0)))


def test_attention_has_a_forward_mode():
    torch.manual_seed(0)
    points, directions = ([randn(2, 4, 3) for _ in range(3)] for _ in range(2))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(points, directions, strict=True)]
        moved = forward_ad.unpack_dual(attention(*duals, is_causal=True)).tangent
    step = 1e-6
    there, back = (
        attention(*(x + h * t for x, t in zip(points, directions, strict=True)), is_causal=True) for h in (step, -step)
    )
    torch.testing.assert_close(moved, (there - back) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("given", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": True}])
def test_the_kernel_for_cpus_and_both_of_its_outputs(given):
    """PyTorch's derivative takes the logarithm of the sum for a constant; the truth is by differences."""
    torch.manual_seed(0)
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    given = {**given, "attn_mask": randn(4, 5)} if "attn_mask" in given else given
    inputs = [randn(2, 2, 4, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)]
    weights = [randn(2, 2, 4, 8), randn(2, 2, 4)]

    def f(*inputs):
        return sum((w * out.sin()).sum() for w, out in zip(weights, op(*inputs, **given), strict=True))

    directions = [torch.randn_like(x) for x in inputs]
    along = [lambda t, x=x, d=d: x + t * d for x, d in zip(inputs, directions, strict=True)]
    line, step = (lambda t: f(*(a(t) for a in along))), 1e-4
    first = (line(step) - line(-step)) / (2 * step)
    slope = grad(line)(torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(slope, first, rtol=1e-6, atol=1e-6)
    second = (grad(line)(torch.tensor(step).double()) - grad(line)(torch.tensor(-step).double())) / (2 * step)
    torch.testing.assert_close(grad(grad(line))(torch.tensor(0.0, dtype=torch.float64)), second, rtol=1e-5, atol=1e-5)
    rows = torch.stack([inputs[0], inputs[0] * 0.5, -inputs[0]])
    torch.testing.assert_close(
        vmap(lambda q: grad(f)(q, *inputs[1:]))(rows), torch.stack([grad(f)(q, *inputs[1:]) for q in rows])
    )


def test_what_autograd_follows_at_the_base_may_be_an_argument_by_keyword():
    """PyTorch refuses this one, and does so under vmap, too, where its derivative would be lost."""
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    q, k, v = randn(3, 1, 2, 4, 8), randn(1, 2, 5, 8), randn(1, 2, 5, 8)
    mask = randn(4, 5).requires_grad_()
    for run in (lambda: op(q[0], k, v, attn_mask=mask), lambda: vmap(lambda q: op(q, k, v, attn_mask=mask)[0])(q)):
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'attn_mask'"):
            run()
