"""Functions of a vector of three doubles, by the kind of operator that they show."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

W = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.1], [0.4, 0.1, 1.3]], dtype=torch.float64)
B = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)


def flat(found: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in found])


def positive(x: Tensor) -> Tensor:
    m = W + x.outer(x)
    return m @ m.T + torch.eye(3, dtype=x.dtype)


def view_write(x: Tensor) -> Tensor:
    y = x * 1.0
    y[1:].mul_(x[:2])
    return y


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    # pointwise, with and without their result in the formula
    "sin": torch.sin,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "x * x * x": lambda x: x * x * x,
    "division": lambda x: 1 / (1 + x * x),
    "power": lambda x: (x.abs() + 1) ** 2.5,
    "atan2": lambda x: torch.atan2(x, x * x + 1),
    "erf": torch.erf,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "relu": lambda x: (x * x.sin()).relu(),
    "clamp": lambda x: x.clamp(-0.5, 0.5) ** 2,
    "where": lambda x: torch.where(x > 0, x**3, -x),
    "sinc": torch.sinc,
    "lgamma": lambda x: (x.abs() + 1).lgamma(),
    "digamma": lambda x: (x.abs() + 1).digamma(),
    "polygamma": lambda x: torch.polygamma(1, x.abs() + 1),
    "i0": torch.special.i0,
    "complex": lambda x: torch.complex(x, x * x).exp().abs(),
    # linear and multilinear
    "linear": lambda x: F.linear(x, W, B).tanh(),
    "mm": lambda x: (x.outer(x) @ W).sum(0),
    "addmm": lambda x: torch.addmm(x.outer(x), W * x, x.outer(x)),
    "bilinear": lambda x: F.bilinear(x[None], x[None], torch.ones(2, 3, 3, dtype=x.dtype)),
    "einsum": lambda x: torch.einsum("i,ij,j->i", x, W, x),
    "conv": lambda x: F.conv1d(x.view(1, 1, 3) * x[0], x[:2].view(1, 1, 2)),
    "cat": lambda x: torch.cat([x, x * x, W[0]]),
    "stack": lambda x: torch.stack([x, x.sin()]),
    "index": lambda x: x[torch.tensor([2, 0])] * x[0],
    "fft": lambda x: torch.fft.fft(x).abs(),
    # reductions and what is made of them
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "layer_norm": lambda x: F.layer_norm(x, (3,), B, W[0]),
    "logsumexp": lambda x: x.logsumexp(0),
    "norm": torch.norm,
    "var_mean": torch.var_mean,
    "prod": torch.prod,
    "cumprod": lambda x: x.cumprod(0),
    "max": lambda x: x.max(0).values,
    "amax": lambda x: (x * x).amax(),
    "sort": lambda x: (x * x).sort().values,
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor(1)),
    "attention": lambda x: F.scaled_dot_product_attention((x.outer(x) + W)[None], (W * x)[None], (W + x)[None]),
    # matrices
    "inv": lambda x: torch.linalg.inv(W + torch.diag(x)),
    "solve": lambda x: torch.linalg.solve(W + torch.diag(x), x),
    "det": lambda x: torch.linalg.det(W + x.outer(x)),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(W + W.T + torch.diag(x)),
    "svdvals": lambda x: torch.linalg.svdvals(W + torch.diag(x)),
    "matrix_exp": lambda x: torch.matrix_exp(W * x),
    "solve from the right": lambda x: torch.linalg.solve(W + torch.diag(x), W * x, left=False),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(W + x.outer(x), W * x, upper=True),
    "unitriangular from the right": lambda x: torch.linalg.solve_triangular(
        W + x.outer(x), W * x, upper=False, left=False, unitriangular=True
    ),
    "cholesky": lambda x: torch.linalg.cholesky(positive(x)),
    "cholesky, upper": lambda x: torch.linalg.cholesky(positive(x), upper=True),
    "lu": lambda x: flat(torch.linalg.lu((W + x.outer(x))[:, :2])[1:]),
    "lu of a wide matrix": lambda x: flat(torch.linalg.lu((W + x.outer(x))[:2])[1:]),
    "lu_factor": lambda x: torch.linalg.lu_factor(W + x.outer(x)).LU,
    "lu_solve": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(W + x.outer(x)), W * x),
    "lu_solve, turned": lambda x: torch.linalg.lu_solve(
        *torch.linalg.lu_factor(W + x.outer(x)), W * x, left=False, adjoint=True
    ),
    "qr": lambda x: flat(torch.linalg.qr(W + x.outer(x))),
    "qr of a tall matrix": lambda x: flat(torch.linalg.qr((W + x.outer(x))[:, :2])),
    "svd": lambda x: flat(torch.linalg.svd((W + x.outer(x))[:, :2], full_matrices=False)),
    "svd of a wide matrix": lambda x: flat(torch.linalg.svd((W + x.outer(x))[:2], full_matrices=False)),
    "eigh": lambda x: flat(torch.linalg.eigh(W + x.outer(x))),
    "slogdet": lambda x: torch.linalg.slogdet(W + torch.diag(x)).logabsdet,
    # spreads, norms, and what is chosen
    "std": lambda x: x.std() * x,
    "std_mean": lambda x: flat(torch.std_mean(x.outer(x), 1)),
    "norm of complex numbers": lambda x: torch.linalg.vector_norm(torch.complex(x, x * x)),
    "norm 3": lambda x: torch.linalg.vector_norm(x.outer(x), 3, 1, keepdim=True),
    "norm 4": lambda x: x.norm(4),
    "norm 1": lambda x: (x * x.sin()).norm(1),
    "norm of nothing": lambda x: torch.linalg.vector_norm((x - x) * x) + x[0],
    "dist": lambda x: torch.dist(x * x, W),
    "polar": lambda x: torch.view_as_real(torch.polar(x * x, x)),
    "cross": lambda x: torch.linalg.cross(x, x.flip(0) * x),
    "block_diag": lambda x: torch.block_diag(x.outer(x), x, W),
    "max_pool2d": lambda x: F.max_pool2d(x.outer(x)[None], 2, 1),
    "kthvalue": lambda x: (x * x).kthvalue(2).values,
    "embedding_bag": lambda x: F.embedding_bag(
        torch.tensor([[0, 2]]), x.outer(x), mode="sum", per_sample_weights=x[None, :2]
    ),
    "group_norm": lambda x: F.group_norm((x.outer(x) + W)[None, :2], 2, x[:2], x[1:]),
    "rms_norm": lambda x: F.rms_norm(x * x, (3,), B),
    "prod along a dimension": lambda x: (W * x).prod(1, keepdim=True),
    # writes
    "in place": lambda x: x.clone().mul_(x).add_(1).sin_(),
    "through a view": view_write,
}
