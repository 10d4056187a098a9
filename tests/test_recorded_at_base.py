"""PyTorch's own autograd through derivatives of functrans, once and twice: as right as functrans' own.

PyTorch takes the statistics that its fused operators return for constants when it differentiates their gradients
twice, or has no derivative of these.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from functrans import grad, jvp, vmap

D = torch.float64
X = torch.sin(torch.arange(36, dtype=D) * 1.3).view(3, 3, 4) + 0.1
A = torch.tensor([0.9, -1.2, 0.7, 1.4], dtype=D)
MIX = torch.cos(torch.arange(12, dtype=D)).view(3, 4)

#: of an example of shape (3, 4) and a shared vector
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer_norm": lambda x, a: F.layer_norm(x * a, (4,)),
    "layer_norm, a weight of the example": lambda x, a: F.layer_norm(x * a, (4,), x[0] * a, x[1]),
    "layer_norm, a shared weight": lambda x, a: F.layer_norm(x * a, (4,), a),
    "group_norm": lambda x, a: F.group_norm((x * a)[None], 3, x[:, 0], a[:3])[0],
    "batch_norm": lambda x, a: F.batch_norm(x * a, None, None, x[0] * a, a, training=True),
    "instance_norm": lambda x, a: F.instance_norm((x * a)[None], weight=a[:3])[0],
    "rms_norm": lambda x, a: F.rms_norm(x * a, (4,), x[0] * a),
    "cdist": lambda x, a: torch.cdist(x * a, x + 2 * a, p=3.0),
    "cdist, euclidean": lambda x, a: torch.cdist(x * a, x + 2 * a),
    "pdist": lambda x, a: torch.pdist(x * a, 3.0),
}


def loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def number(x: Tensor, a: Tensor) -> Tensor:
        out = FUNCTIONS[name](x, a)
        return (out.pow(2) * MIX.flatten()[: out.numel()].view(out.shape)).sum()

    return number


def compositions(f: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Numbers made of derivatives by the example, as functions of the shared vector."""
    slope = lambda x, a: jvp(lambda x: f(x, a), (x,), (MIX,))[1]
    return {
        "grad": lambda a: (grad(f)(X[0], a) * MIX).sum(),
        "vmap of grad": lambda a: (vmap(grad(f), in_dims=(0, None))(X, a) * MIX).sum(),
        "grad of vmap": lambda a: (grad(lambda X: vmap(f, in_dims=(0, None))(X, a).sum())(X) * MIX).sum(),
        "vmap of jvp": lambda a: vmap(slope, in_dims=(0, None))(X, a).sum(),
        "vmap of jvp of grad": lambda a: (vmap(lambda x: jvp(lambda x: grad(f)(x, a), (x,), (MIX,))[1])(X) * MIX).sum(),
    }


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("composition", compositions(loss("cdist")))
def test_once_and_twice(name: str, composition: str) -> None:
    g = compositions(loss(name))[composition]
    leaf = A.clone().requires_grad_()
    (once,) = torch.autograd.grad(g(leaf), leaf, create_graph=True)
    torch.testing.assert_close(once, grad(g)(A), rtol=1e-9, atol=1e-9)
    if "dist" in name:  # of the distances themselves PyTorch has one derivative and no second
        return
    (twice,) = torch.autograd.grad(once @ A.cos(), leaf)
    torch.testing.assert_close(twice, jvp(grad(g), (A,), (A.cos(),))[1], rtol=1e-8, atol=1e-8)


def test_bounds_of_which_one_is_shared() -> None:
    """PyTorch's derivative of ``clamp`` refuses one of two bounds that is broadcast."""
    x, high = A.clone().requires_grad_(), X[0].clone().requires_grad_()
    for low in (lambda x: x - 0.2, lambda x: A - 0.2):
        clamped = vmap(lambda x, h, low=low: x.clamp(low(x), h), in_dims=(None, 0))(x, high)
        by_loop = torch.stack([torch.maximum(torch.minimum(x, h), torch.minimum(low(x), h)) for h in high])
        torch.testing.assert_close(clamped, by_loop)
        for found, wanted in zip(*(torch.autograd.grad((y * MIX).sum(), (x, high)) for y in (clamped, by_loop))):
            torch.testing.assert_close(found, wanted)


def test_products_of_nothing() -> None:
    x = torch.zeros(2, 3, 0, dtype=D)
    assert grad(lambda v: vmap(torch.mv, in_dims=(0, None))(x, v).sum())(torch.zeros(0, dtype=D)).shape == (0,)
