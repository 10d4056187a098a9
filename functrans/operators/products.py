"""Products of two tensors: each is said once, by its index signature, and every transform's rule is made of that.

``"ik,kj->ij"`` means, as in einsum, that ``out[i, j]`` is the sum over ``k`` of ``x[i, k] * y[k, j]``: an index that
the result leaves out is summed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten
Multiply = Callable[[Tensor, Tensor], Tensor]


class Product(NamedTuple):
    """What ``op(x, y)`` returns, or ``op(self, x, y, beta, alpha)``: then ``beta * self + alpha * product(x, y)``."""

    op: OpOverload
    #: the indices of the factors and of the result
    x: str
    y: str
    out: str
    #: those that are summed over; with none it is a multiplication, which promotes
    summed: str
    #: whether x is conjugated
    conjugates: bool
    #: whether it is added to something, and what the operator calls the factors
    adds: bool
    names: tuple[str, str]
    #: the product of x and y alone; of the cotangent and y, for that of x; of x and the cotangent, for that of y
    multiply: Multiply
    to_x: Multiply
    to_y: Multiply


def turned(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


#: What multiplies tensors with the indices of a signature.
KERNELS: dict[str, Multiply] = {
    "ik,kj->ij": torch.mm,
    "ij,kj->ik": lambda x, y: x.mm(turned(y)),
    "ik,ij->kj": lambda x, y: turned(x).mm(y),
    "bik,bkj->bij": torch.bmm,
    "bij,bkj->bik": lambda x, y: x.bmm(turned(y)),
    "bik,bij->bkj": lambda x, y: turned(x).bmm(y),
    "bik,bkj->ij": lambda x, y: x.bmm(y).sum(0),
    "ij,bkj->bik": lambda x, y: x.expand(y.shape[0], *x.shape).bmm(turned(y)),
    "bik,ij->bkj": lambda x, y: turned(x).bmm(y.expand(x.shape[0], *y.shape)),
    "ij,j->i": torch.mv,
    "ij,i->j": lambda x, y: turned(x).mv(y),
    "i,ij->j": lambda x, y: y.t().mv(x),
    "i,j->ij": lambda x, y: x.unsqueeze(-1) * y,
    "i,i->": torch.dot,
    ",i->i": torch.mul,
    "i,->i": torch.mul,
}

PRODUCTS: dict[OpOverload, Product] = {}


def product(op: OpOverload, signature: str, *, conjugates: bool = False) -> None:
    """Say what ``op`` multiplies. There has to be a kernel for it, and for the cotangents of both factors."""
    x, y, out = signature.replace("->", ",").split(",")
    summed = "".join(i for i in x if i not in out)
    names = [a.name for a in op._schema.arguments]
    adds = "alpha" in names
    kernels = (KERNELS[key] for key in (signature, f"{out},{y}->{x}", f"{x},{out}->{y}"))
    PRODUCTS[op] = Product(op, x, y, out, summed, conjugates, adds, (names[adds], names[adds + 1]), *kernels)


product(aten.mm.default, "ik,kj->ij")
product(aten.bmm.default, "bik,bkj->bij")
product(aten.mv.default, "ij,j->i")
product(aten.dot.default, "i,i->")
product(aten.vdot.default, "i,i->", conjugates=True)
product(aten.outer.default, "i,j->ij")
product(aten.ger.default, "i,j->ij")
product(aten.addmm.default, "ik,kj->ij")
product(aten.baddbmm.default, "bik,bkj->bij")
product(aten.addbmm.default, "bik,bkj->ij")
product(aten.addmv.default, "ij,j->i")
product(aten.addr.default, "i,j->ij")
