"""Rules of Taylor mode by hand: for operators whose own derivatives would take more than what they are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import call_below
from functrans.core.tensor import WrapperTensor
from functrans.operators.products import PRODUCTS
from functrans.pytorch.torch_private import DECOMPOSITION_TABLE, OpOverload
from functrans.shipped import jet_by_table  # noqa: F401 - it says what is done without a rule
from functrans.shipped.by_derivatives import code_at_level
from functrans.shipped.jet_level import JetInterpreter
from functrans.shipped.simpler import exponentials, keeps_dtype

aten = torch.ops.aten


@JetInterpreter.rules.register(aten.detach.default, aten.detach_copy.default)
def detach(jet: JetInterpreter, x: WrapperTensor) -> WrapperTensor:
    return jet.constant(x.value.detach())


in_code = functools.partial(code_at_level, JetInterpreter)


@in_code(
    aten.tanh_backward.default, aten.sigmoid_backward.default, aten.softplus_backward.default,
    aten.elu_backward.default, aten.gelu_backward.default,
    aten._softmax_backward_data.default, aten._log_softmax_backward_data.default,
    aten.native_layer_norm_backward.default,
)  # fmt: skip
def written_out(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """As PyTorch defines them in simpler ones (``torch._decomp``). Their own derivatives double from order to order."""
    return DECOMPOSITION_TABLE[op](*args, **kwargs)


@in_code(aten.softmax.int, aten._softmax.default)
def softmax(op: OpOverload, x: Tensor, dim: int, *rest: Any) -> Any:
    if not keeps_dtype(x, rest):
        return NotImplemented
    z = (x - x.detach().amax(dim, keepdim=True)).exp()
    return z / z.sum(dim, keepdim=True)


@in_code(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(op: OpOverload, x: Tensor, dim: int, *rest: Any) -> Any:
    if not keeps_dtype(x, rest):
        return NotImplemented
    z = x - x.detach().amax(dim, keepdim=True)
    return z - z.exp().sum(dim, keepdim=True).log()


@in_code(*(product.op for product in PRODUCTS.values() if product.adds))
def added_product(op: OpOverload, c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = PRODUCTS[op].multiply(a, b)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (c if beta == 1 else c * beta)


@in_code(aten.layer_norm.default)
def layer_norm(
    op: OpOverload, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Any:
    dims = [*range(-len(shape), 0)]
    centered = x - x.mean(dims, keepdim=True)
    out = centered * ((centered * centered).mean(dims, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@in_code(aten.logsumexp.default)
def logsumexp(op: OpOverload, x: Tensor, dim: Any, keepdim: bool = False) -> Any:
    """Of nothing but -inf it is -inf, and does not move."""
    if x.is_complex() or not x.dim():
        return NotImplemented
    most = x.detach().amax(dim, keepdim=True)
    most = torch.where(most.isinf(), 0, most)
    total = (x - most).exp().sum(dim, keepdim)
    most = most if keepdim else most.reshape(total.shape)
    none = total == 0
    return torch.where(none, -math.inf, torch.where(none, 1, total).log() + most)


def matrix_exp(jet: JetInterpreter, args: Any, kwargs: dict[str, Any]) -> Any:
    value, *terms = call_below(jet, exponentials, (args[0].value, *args[0].terms), {})
    return jet.with_terms(value, terms)


JetInterpreter.direct[aten.linalg_matrix_exp.default] = matrix_exp


# --- functions of one number, of which every derivative is known ------------------------------------------------------


def along_curve(taylor: Sequence[Tensor], terms: Sequence[Tensor | None]) -> list[Any]:
    """The coefficients of f(x(t)), by those of f around x(0) and those of x(t): Horner's rule in power series."""
    order = len(terms)
    found: list[Any] = [taylor[order]]
    for k in range(order - 1, -1, -1):
        products: list[Any] = []
        for m in range(1, order - k + 1):
            pairs = [(terms[j - 1], found[m - j]) for j in range(1, m + 1) if m - j < len(found)]
            parts = [u * r for u, r in pairs if u is not None and r is not None]
            products.append(sum(parts[1:], parts[0]) if parts else None)
        found = [taylor[k], *products]
    return found


def power_around(order: int, x: Tensor, exponent: Tensor) -> list[Tensor]:
    """C(p, k) xᵖ⁻ᵏ; where a binomial coefficient is 0, so is the term."""
    value = x.pow(exponent)
    exponent = exponent.to(value.dtype)
    found, factor = [value], torch.ones_like(exponent)
    for k in range(1, order + 1):
        factor = factor * (exponent - (k - 1)) / k
        found.append(torch.where(factor == 0, 0, factor * x.pow(exponent - k)))
    return found


def exponential_around(order: int, base: Tensor, x: Tensor) -> list[Tensor]:
    """bˣ log(b)ᵏ / k!, and 0 where b is 0, unless x is negative."""
    value, log = base.pow(x), base.log()
    flat = (base == 0) if x.is_complex() else (base == 0) & (x >= 0)
    return [value, *(torch.where(flat, 0, value * log**k / math.factorial(k)) for k in range(1, order + 1))]


def polygamma_around(order: int, n: int, x: Tensor) -> list[Tensor]:
    return [torch.special.polygamma(n + k, x) / math.factorial(k) for k in range(order + 1)]


def lgamma_around(order: int, x: Tensor) -> list[Tensor]:
    return [x.lgamma(), *(slope / k for k, slope in enumerate(polygamma_around(order - 1, 0, x), 1))]


#: By operator, and the position of the argument that moves: what returns f and its derivatives there, the k-th divided
#: by k!, from the operator's arguments.
AROUND: dict[OpOverload, dict[int, Callable[..., list[Tensor]]]] = {
    aten.pow.Tensor_Tensor: {0: power_around, 1: exponential_around},
    aten.polygamma.default: {1: polygamma_around},
    aten.digamma.default: {0: lambda order, x: polygamma_around(order, 0, x)},
    aten.lgamma.default: {0: lgamma_around},
}


def composed(op: OpOverload, jet: JetInterpreter, args: Any, kwargs: dict[str, Any]) -> Any:
    moving = [i for i, a in enumerate(args) if jet.carries(a)]
    around = AROUND[op].get(moving[0]) if len(moving) == 1 and not kwargs else None
    if around is None:
        rule: Any = jet.rule_for(op)
        return rule(jet, args, kwargs)

    def code(terms: Any, *values: Any) -> list[Any]:
        return along_curve(around(jet.order, *values), terms)

    value, *terms = call_below(jet, code, (args[moving[0]].terms, *map(jet.value_of, args)), {})
    return jet.with_terms(value, terms)


for _op in AROUND:
    JetInterpreter.direct[_op] = functools.partial(composed, _op)
