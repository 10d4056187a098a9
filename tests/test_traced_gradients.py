"""Gradients that PyTorch traced, differentiated again: the graph holds PyTorch's backward operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from functrans import grad, jvp, vmap

D = torch.float64
X = torch.sin(torch.arange(12, dtype=D) * 1.7).view(4, 3)
W = torch.tensor([0.7, 1.3, 0.9], dtype=D)
TARGET = torch.tensor([0, 2, 1, 1])

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll": lambda x, w: F.nll_loss(x.log_softmax(1), TARGET, w),
    "logsigmoid": lambda x, w: (F.logsigmoid(x) * w).sum(),
    "layer_norm": lambda x, w: (F.layer_norm(x * w, (3,)) ** 3).sum(),
    "batch_norm": lambda x, w: (F.batch_norm(x * w, None, None, training=True) ** 3).sum(),
    "rms_norm": lambda x, w: (F.rms_norm(x * w, (3,)) ** 3).sum(),
    "attention": lambda x, w: F.scaled_dot_product_attention(*(y[None, None] for y in (x * w, x + w, x - w))).sum(),
    "attention with a mask": lambda x, w: F.scaled_dot_product_attention(
        *(y[None, None] for y in (x * w, x + w, x - w)), is_causal=True
    ).sum(),
    "weight_norm": lambda x, w: torch._weight_norm(x * w, x[:, :1] * w[0], 0).pow(3).sum(),
    "logit": lambda x, w: torch.logit((x * w).sigmoid() * 0.9, eps=1e-3).pow(2).sum(),
    "logit without bounds": lambda x, w: torch.logit((x * w).sigmoid() * 0.9).pow(2).sum(),
    "hardsigmoid": lambda x, w: F.hardsigmoid(4 * x * w).pow(2).sum(),
    "binary_cross_entropy": lambda x, w: F.binary_cross_entropy((x * w).sigmoid(), X.sigmoid(), w.expand(4, 3)),
    "soft_margin": lambda x, w: F.soft_margin_loss(x, w.expand(4, 3), reduction="sum"),
    "soft_margin, mean": lambda x, w: F.soft_margin_loss(x * w, X.sign()),
    "cdist": lambda x, w: torch.cdist(x * w, x + w, p=3.0).sum(),
    "huber": lambda x, w: F.huber_loss(x * w, x + w),
}


def traced(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A number made of the gradient of a loss by its first argument, as a function of the second."""

    def gradient(x: Tensor, w: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x, w), x)[0]

    module = make_fx(gradient)(X, W)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.detach.default:  # which autograd puts around what it saves
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return lambda w: (module(X, w) * X.cos()).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_a_traced_gradient_is_differentiated(name: str) -> None:
    f, step = traced(LOSSES[name]), 1e-5
    truth = torch.stack([(f(W + step * e) - f(W - step * e)) / (2 * step) for e in torch.eye(3, dtype=D)])
    close = lambda found: torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)
    close(grad(f)(W))
    close(torch.stack([jvp(f, (W,), (e,))[1] for e in torch.eye(3, dtype=D)]))
    close(vmap(grad(f))(torch.stack([2 * W, W]))[1])
    v = torch.tensor([1.0, -0.5, 2.0], dtype=D)
    second = jvp(grad(f), (W,), (v,))[1]
    torch.testing.assert_close(second, grad(lambda w: grad(f)(w) @ v)(W))
    slope = (grad(f)(W + step * v) - grad(f)(W - step * v)) / (2 * step)
    torch.testing.assert_close(second, slope, rtol=1e-5, atol=1e-6)
