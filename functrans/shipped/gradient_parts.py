"""What single examples' gradients are made of, and the norms and weighted sums of them.

NOTE [Gradients in factors]
The gradient that one example has for the matrix of a linear layer is a product ``left.T @ right`` of what is on the way
anyway: cotangents and inputs, a row for each position (a token, a time step). Over all examples the factors are mostly
smaller than the products, and the inner product of two products is

    <A.T @ B, C.T @ D> = sum(A @ C.T * (B @ D.T)).

So squared norms come from the factors, those of a parameter that is used several times included, where the cross terms
count; and the sum over the examples, each times a weight of its own, is one product of all rows. (Goodfellow, Efficient
per-example gradient computations, arXiv:1510.01799; for sequences Li et al., arXiv:2110.05679; the choice between
factors and products by their size Bu et al., arXiv:2205.10683, and the sum without a second walk the same,
arXiv:2210.00038.) The gradient for a table of embeddings is such a product, too: its left factor has one 1 in each row.
So is that for a convolution's weight: its right factor has the patches of the input for rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
#: how many numbers are computed with at a time where examples can be taken a few at a time
MOST = 1 << 19


class Factors(NamedTuple):
    """A gradient that is ``left.T @ right``, of one example or with the examples in front.

    Each side is a matrix with a row for each position, or has an integer for each: where in that row the only 1 is. As
    long as the walk is not over, the vector of a single position is not made a matrix.
    """

    left: Tensor
    right: Tensor

    @property
    def worth(self) -> int:
        """How much larger than the gradient they may be: at the walk's peak they are there anyway."""
        return 1

    def turned(self) -> Factors:
        return Factors(self.right, self.left)

    def kind(self) -> tuple[bool, bool]:
        """Whether the sides are matrices."""
        return self.left.is_floating_point(), self.right.is_floating_point()

    def size(self) -> int:
        """How many numbers they are for one example, with the matrix of positions that the norm takes of indices."""
        positions = [x.numel() for x in self if not x.is_floating_point()]
        return self.left.numel() + self.right.numel() + (positions[0] ** 2 if positions else 0)

    def with_rows(self, dim: int) -> Factors:
        """With matrices for vectors; ``dim``: how many dimensions are in front."""
        return Factors(*(x.unsqueeze(dim) if x.dim() == dim + 1 and x.is_floating_point() else x for x in self))

    def weighted_sum(self, weights: Tensor, like: Tensor) -> Tensor:
        """Over the examples, each times its weight."""
        scale = weights.to(like.dtype).view(-1, 1, 1)
        of_left, of_right = self.kind()
        if not (of_left and of_right):
            f = self if of_right else self.turned()
            rows = (f.right * scale).flatten(0, 1)
            found = rows.new_zeros(like.shape if of_right else like.mT.shape).index_add(0, f.left.flatten(), rows)
            return found if of_right else found.mT
        left, right = self
        if left.shape[2] < right.shape[2]:
            left = left * scale
        else:
            right = right * scale
        return left.flatten(0, 1).mT @ right.flatten(0, 1)


class Geometry(NamedTuple):
    """The options of a convolution, a number for each of its dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Patches(NamedTuple):
    """The gradient for the weight of a convolution, by the cotangent and the input.

    Both are ``[n, channels, *positions]``, of one example or with the examples in front.
    """

    grad: Tensor
    input: Tensor
    geometry: Geometry

    @property
    def worth(self) -> int:
        return 2

    def size(self) -> int:
        return self.grad.numel() + self.input.numel()

    def columns(self, x: Tensor) -> Tensor:
        """``[examples, groups, channels of one, positions]``."""
        return x.movedim(2, 1).flatten(2).unflatten(1, (self.geometry.groups, -1)).flatten(3)

    def windows(self) -> Tensor:
        """For each place in the kernel what it meets at the positions of the output, as views of the padded input:
        ``[examples, n, channels, *kernel, *positions]``."""
        kernel, stride, padding, dilation, _ = self.geometry
        x = torch.nn.functional.pad(self.input, [p for p in reversed(padding) for _ in range(2)])
        for i, n in enumerate(self.grad.shape[3:]):
            x = x.unfold(3 + i, stride[i] * (n - 1) + 1, dilation[i]).narrow(3 + i, 0, kernel[i])
        for i in range(len(kernel)):
            x = aten.slice(x, 3 + len(kernel) + i, 0, None, stride[i])
        return x

    def patches(self, windows: Tensor) -> Tensor:
        """``[examples, groups, channels of one times places, positions]``."""
        x = windows.movedim(1, 2 + len(self.geometry.kernel))
        x = x.unflatten(1, (self.geometry.groups, -1))
        return x.flatten(3 + len(self.geometry.kernel)).flatten(2, -2)

    def patch_size(self) -> int:
        """How many numbers the patches of one example are."""
        return math.prod((*self.input.shape[1:3], *self.geometry.kernel, *self.grad.shape[3:]))

    def a_few(self, numbers: int) -> list[Patches]:
        """The same for a few examples each; ``numbers``: how many are computed with for one."""
        count = max(1, MOST // max(1, numbers))
        pairs = zip(self.grad.split(count), self.input.split(count), strict=True)
        return [Patches(grad, input, self.geometry) for grad, input in pairs]

    def squared_norms(self) -> Tensor:
        positions = self.grad.shape[1] * math.prod(self.grad.shape[3:])
        return torch.cat([few.norms_at_once() for few in self.a_few(positions**2)])

    def norms_at_once(self) -> Tensor:
        grad = self.columns(precise(self.grad))
        windows = self.windows()
        total = grad.mT @ grad
        grams = []
        for i in range(windows.shape[3]):  # one line of the kernel after the other, to save memory
            line = precise(self.patches(windows.narrow(3, i, 1)))
            grams.append(line.mT @ line)
        return (sum(grams[1:], grams[0]) * total).sum((1, 2, 3))

    def whole(self) -> Tensor:
        """Each example's gradient."""
        grad, patches = self.columns(self.grad), self.patches(self.windows())
        # PyTorch is faster at a product with more columns than rows
        found = (patches @ grad.mT).mT if patches.shape[2] < grad.shape[2] else grad @ patches.mT
        return found.flatten(1, 2).unflatten(-1, (-1, *self.geometry.kernel))

    def weighted_sum(self, weights: Tensor, like: Tensor) -> Tensor:
        """Over the examples, each times its weight."""
        kernel, stride, padding, dilation, groups = self.geometry
        grad = (self.grad * weights.to(like.dtype).view(-1, *[1] * (self.grad.dim() - 1))).flatten(0, 1)
        options = stride, padding, dilation, False, [0] * len(kernel), groups, [False, True, False]
        return aten.convolution_backward.default(grad, self.input.flatten(0, 1), like, None, *options)[1]


class Gradient(NamedTuple):
    """The gradient for one argument, the sum of all this."""

    whole: Tensor | None
    factors: list[Factors]
    patches: list[Patches]

    @classmethod
    def of(cls, whole: Tensor | None, parts: list[Factors | Patches]) -> Gradient:
        factors = [p for p in parts if isinstance(p, Factors)]
        if whole is not None and whole.layout is not torch.strided:  # of a sparse example; the parameter is dense
            whole = whole.to_dense()
        return cls(whole, joined(factors), [p for p in parts if isinstance(p, Patches)])

    def squared_norms(self) -> Tensor | None:
        """Of the examples, which are in front; None: there is nothing in the sum."""
        if len(self.patches) == 1 and self.whole is None:
            return self.patches[0].squared_norms()
        terms = []
        wholes = [x for x in (self.whole, *(p.whole() for p in self.patches)) if x is not None]
        if wholes:
            whole = precise(sum(wholes[1:], wholes[0]))
            flat = whole.unsqueeze(-1).flatten(1)
            terms += [squares(part) for part in ((flat.real, flat.imag) if flat.is_complex() else (flat,))]
            terms += [2 * inner_with(whole, f) for f in self.factors]
        for i, f in enumerate(self.factors):
            terms += [inner(f, f), *(2 * inner(f, g) for g in self.factors[:i])]
        return sum(terms[1:], terms[0]) if terms else None

    def settled(self, like: Tensor) -> Gradient:
        """With those gradients as they are that are no larger than their patches, now that the walk is over."""
        factors = [f.with_rows(1) for f in self.factors]
        small = [p for p in self.patches if p.size() >= len(p.grad) * like.numel()]
        if not small:
            return Gradient(self.whole, factors, self.patches)
        wholes = [torch.cat([few.whole() for few in p.a_few(p.patch_size())]) for p in small]
        whole = sum(wholes, start=self.whole) if self.whole is not None else sum(wholes[1:], wholes[0])
        return Gradient(whole, factors, [p for p in self.patches if all(p is not s for s in small)])

    def weighted_sum(self, weights: Tensor, like: Tensor) -> Tensor:
        """Over the examples, each times its weight."""
        terms = [f.weighted_sum(weights, like) for f in self.factors]
        terms += [p.weighted_sum(weights, like) for p in self.patches]
        if self.whole is not None:
            rows = self.whole.unsqueeze(-1).flatten(1)
            terms.append((weights.to(rows.dtype) @ rows).reshape(like.shape))
        return sum(terms[1:], terms[0]) if terms else torch.zeros_like(like)


def joined(factors: list[Factors]) -> list[Factors]:
    """As few as can be: the rows of one kind are all rows of one product."""
    kinds = dict.fromkeys(f.kind() for f in factors)
    alike = [[f for f in factors if f.kind() == kind] for kind in kinds]
    return [fs[0] if len(fs) == 1 else together(fs) for fs in alike]


def together(factors: list[Factors]) -> Factors:
    return Factors(*map(torch.cat, zip(*(f.with_rows(0) for f in factors), strict=True)))


def precise(x: Tensor) -> Tensor:
    """``x`` in a dtype that is good enough for sums of squares."""
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def squares(x: Tensor) -> Tensor:
    """The sums of the squares of the rows of a matrix, a few rows at a time, to save memory."""
    rows = max(1, MOST // 4 // max(1, x.shape[1]))
    return x.square().sum(1) if len(x) <= rows else torch.cat([few.square().sum(1) for few in x.split(rows)])


def inner(f: Factors, g: Factors) -> Tensor:
    """The inner products of two products."""
    return (gram(f.left, g.left) * gram(f.right, g.right)).sum((1, 2))


def gram(x: Tensor, y: Tensor) -> Tensor:
    """The inner products of the rows of two sides."""
    if not x.is_floating_point():
        return gram(y, x).mT if y.is_floating_point() else x.unsqueeze(2) == y.unsqueeze(1)
    x = precise(x)
    return x @ precise(y).mT if y.is_floating_point() else torch.take_along_dim(x, y.unsqueeze(1), 2)


def inner_with(whole: Tensor, f: Factors) -> Tensor:
    """The inner products of matrices and products."""
    if not f.right.is_floating_point():
        whole, f = whole.mT, f.turned()
    if f.left.is_floating_point():
        rows = precise(f.left) @ whole
    else:
        rows = torch.take_along_dim(whole, f.left.unsqueeze(2), 1)
    return (rows * precise(f.right)).sum((1, 2))
