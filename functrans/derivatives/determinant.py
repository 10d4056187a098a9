"""The derivative of the determinant, of every order, at every matrix.

The determinant is a polynomial, and so are its derivatives: they exist where there is no inverse. PyTorch's formulas
(torch 2.13) divide by the factors of a decomposition, so that at singular matrices, and at repeated singular values,
its second derivatives are NaN or wrong; and its tangent takes the LU factors for constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functrans.boundary.factories import identity_for, range_for
from functrans.core.tensor import WrapperTensor
from functrans.derivatives.helpers import add
from functrans.derivatives.lu_factors import determinant_factors_pull, determinant_factors_tangent
from functrans.derivatives.matmul import adjoint
from functrans.derivatives.scans import product_of_others
from functrans.derivatives.table import derivative
from functrans.pytorch.thread_state import door_closed, is_recorded
from functrans.pytorch.torch_private import is_torch_func_active

aten = torch.ops.aten

#: Singular values, and pivots, below this part of the largest are not divided by.
SMALL = 1e-2
#: How many of them, at most, count with every order of derivative; beyond, derivatives of a higher order than this are
#: taken to be 0.
MOST = 16


def may_be_differentiated(x: Tensor) -> bool:
    """Whether a level below, or PyTorch's own autograd, follows ``x``."""
    while type(x) is WrapperTensor:
        if not x.interpreter.is_constant(x) and not x.interpreter.repeats_writes:
            return True
        x = x.value
    return x.requires_grad or forward_ad._current_level >= 0 or is_torch_func_active()


def is_regular(LU: Tensor, limit: float) -> bool:
    """Whether no pivot, in all of the batch, is below this part of the largest. False where the numbers cannot be
    looked at, or where what is computed is recorded, for other numbers.

    Both answers lead to the same derivative: what is asked is whether the faster way is exact enough.
    """
    while type(LU) is WrapperTensor:
        LU = LU.value
    if is_recorded() or type(LU) is not Tensor or LU.device.type == "meta" or is_torch_func_active():
        return False
    with door_closed(), torch.no_grad():
        pivots = LU.diagonal(0, -2, -1).abs()
        return bool((pivots.amin(-1) > limit * pivots.amax(-1)).all())


def adjugate(A: Tensor, results: Any) -> Tensor:
    """The adjugate of a matrix, which is ``det(A) * inv(A)`` where there is an inverse."""
    if A.numel() == 0:
        return torch.zeros_like(A)
    again = may_be_differentiated(A)
    if is_regular(results[1], SMALL if again else torch.finfo(A.dtype).eps ** 0.5):
        return results[0][..., None, None] * torch.linalg.inv(A)
    # U and V turn A at this place into the diagonal matrix s. They are constants: for any of them det(A) = det(B) /
    # det(U^H V), so nothing is to be differentiated in them.
    U, s, Vh = torch.linalg.svd(A.detach())
    turn = (torch.linalg.det(U) * torch.linalg.det(Vh))[..., None, None]
    if again:
        inner = adjugate_near_diagonal(adjoint(U) @ A @ adjoint(Vh), s)
    else:
        inner = torch.diag_embed(product_of_others(s, -1)).to(A.dtype)
    return turn * (adjoint(Vh) @ inner @ adjoint(U))


def adjugate_near_diagonal(B: Tensor, s: Tensor) -> Tensor:
    """The adjugate of ``B``, whose numbers are those of ``diag(s)``, ``s`` descending, as a smooth function of ``B``.

    Where ``s`` is small stands a block of ``B``, the null block; ``inner`` is the inverse of the other block with zeros
    around it. The determinant is that of the other block times that of the Schur complement ``S`` of the null block.
    ``S`` is of size k, small, and maybe singular: its determinant is the k-th elementary symmetric function of its
    eigenvalues, a polynomial.
    """
    n = s.shape[-1]
    most = min(n, MOST)
    largest = s[..., :1]
    last = range_for(s, n) >= n - most
    null = (s <= largest * (n * torch.finfo(s.dtype).eps)) | ((s <= largest * SMALL) & last)
    size = null.sum(-1)[..., None, None]
    other = (~null).to(B.dtype)
    on_null, on_other = torch.diag_embed(1 - other), other[..., :, None] * other[..., None, :]
    block = B * on_other + on_null
    inner = torch.linalg.inv(block) * on_other
    left, right = on_null - on_null @ B @ inner, on_null - inner @ B @ on_null
    S = on_null @ (B @ right)
    polynomial, slope = symmetric_function(S, size, most)
    return torch.linalg.det(block)[..., None, None] * (polynomial * inner + right @ slope @ left)


def symmetric_function(S: Tensor, k: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The k-th elementary symmetric function of the eigenvalues of ``S`` and (transposed) its gradient.

    By Faddeev and LeVerrier, with ``T[0] = I``: ``e[j] = tr(S T[j-1]) / j`` and ``T[j] = e[j] I - S T[j-1]``,
    and the gradient of ``e[j]`` is ``T[j-1]``.
    """
    identity = identity_for(S, S.shape[-1])
    polynomial, slope = (k == 0).to(S.dtype), torch.zeros_like(S)
    T = identity.expand_as(S)
    for j in range(1, most + 1):
        chosen = (k == j).to(S.dtype)
        product = S @ T
        e = product.diagonal(0, -2, -1).sum(-1)[..., None, None] / j
        polynomial, slope = polynomial + chosen * e, slope + chosen * T
        T = e * identity - product
    return polynomial, slope


def det_self(grads: Any, A: Tensor, results: Any) -> Tensor | None:
    found = None if grads[0] is None else grads[0][..., None, None] * adjoint(adjugate(A, results))
    return add(found, determinant_factors_pull(grads[1], A))


def det_tangent(A: Tensor, A_t: Tensor, results: Any) -> tuple[Tensor, Tensor | None, None]:
    return (adjugate(A, results).mT * A_t).sum((-2, -1)), determinant_factors_tangent(A, A_t), None


derivative(aten._linalg_det.default, tangent=det_tangent, A=det_self)
