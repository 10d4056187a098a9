"""The gradients of single examples in factors: what a norm and a weighted sum of them need, and no more.

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

What has no rule here is pulled back as always, which gives each example's gradient as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.core.torch_private import OpOverload
from functrans.derivatives.named import named
from functrans.interpreters.grad.pullback_rules import PullbackInterpreter, PullbackTable, Step

aten = torch.ops.aten


class Factors(NamedTuple):
    """A gradient that is ``left.T @ right``, for one example or with the examples in front.

    Each side is a matrix with a row for each position, or has an integer for each: where in that row the only 1 is.
    """

    left: Tensor
    right: Tensor

    def turned(self) -> Factors:
        return Factors(self.right, self.left)

    def kind(self) -> tuple[bool, bool]:
        return self.left.is_floating_point(), self.right.is_floating_point()

    def size(self) -> int:
        """How many numbers they are for one example, with the smaller of the matrices that the norm takes."""
        rows = self.left.shape[0]
        return self.left.numel() + self.right.numel() + (0 if all(self.kind()) else rows * rows)

    def weighted_sum(self, weights: Tensor, like: Tensor) -> Tensor:
        """Of all examples, each times its weight."""
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


class Patches(NamedTuple):
    """The gradient for the weight of a convolution: a product, for each group, of cotangents and patches of the input.

    For one example or with the examples in front.
    """

    grad: Tensor
    input: Tensor
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def size(self) -> int:
        return self.grad.numel() + self.input.numel()

    def positions(self, x: Tensor) -> Tensor:
        """Channels in groups against positions: ``[examples, groups, channels, positions]``, of ``[examples, n, channels, ...]``."""
        return x.movedim(2, 1).flatten(2).unflatten(1, (self.groups, -1)).flatten(3)

    def taps(self) -> Iterator[Tensor]:
        """For each place in the kernel what stands there, at all positions."""
        spatial = self.grad.shape[3:]
        padded = torch.nn.functional.pad(self.input, [p for p in reversed(self.padding) for _ in range(2)])
        for place in itertools.product(*map(range, self.kernel)):
            x = padded
            for i, at in enumerate(place):
                first, step = at * self.dilation[i], self.stride[i]
                x = x.narrow(3 + i, first, step * (spatial[i] - 1) + 1)
                x = x if step == 1 else x[(..., slice(None, None, step), *[slice(None)] * (len(place) - 1 - i))]
            yield self.positions(x)

    def squared_norms(self) -> Tensor:
        grad = self.positions(precise(self.grad))
        grams = [precise(x).mT @ precise(x) for x in self.taps()]
        return (sum(grams[1:], grams[0]) * (grad.mT @ grad)).sum((1, 2, 3))

    def whole(self) -> Tensor:
        """The gradient of each example."""
        grad = self.positions(self.grad)
        found = torch.stack([(grad @ x.mT).flatten(1, 2) for x in self.taps()], -1)
        return found.unflatten(-1, self.kernel)

    def weighted_sum(self, weights: Tensor, like: Tensor) -> Tensor:
        grad = self.grad * weights.to(like.dtype).view(-1, *[1] * (self.grad.dim() - 1))
        options = self.stride, self.padding, self.dilation, False, [0] * len(self.kernel), self.groups
        input = self.input.flatten(0, 1)
        return aten.convolution_backward(grad.flatten(0, 1), input, like, None, *options, [False, True, False])[1]


class Gradient(NamedTuple):
    """The gradient for one argument as a sum: of a tensor, if there is one, and of products."""

    whole: Tensor | None
    factors: list[Factors]
    patches: list[Patches]

    def squared_norms(self) -> Tensor | None:
        """Of each of the examples, which are in front; None: there is nothing in the sum."""
        if len(self.patches) == 1 and self.whole is None:
            return self.patches[0].squared_norms()
        terms = []
        wholes = [x for x in (self.whole, *(p.whole() for p in self.patches)) if x is not None]
        if wholes:
            whole = precise(sum(wholes[1:], wholes[0]))
            flat = whole.flatten(1)
            terms += [dot(part, part) for part in ((flat.real, flat.imag) if flat.is_complex() else (flat,))]
            terms += [2 * inner_with(whole, f) for f in self.factors]
        for i, f in enumerate(self.factors):
            terms += [inner(f, f), *(2 * inner(f, g) for g in self.factors[:i])]
        return sum(terms[1:], terms[0]) if terms else None

    def weighted_sum(self, weights: Tensor, like: Tensor) -> Tensor:
        """Of all examples, each times its weight."""
        terms = [part.weighted_sum(weights, like) for part in (*self.factors, *self.patches)]
        if self.whole is not None:
            terms.append(torch.tensordot(weights.to(self.whole.dtype), self.whole, 1))
        return sum(terms[1:], terms[0]) if terms else torch.zeros_like(like)


def joined(factors: list[Factors]) -> list[Factors]:
    """As few as can be: the rows of one kind are all rows of one product."""
    kinds = dict.fromkeys(f.kind() for f in factors)
    alike = [[f for f in factors if f.kind() == kind] for kind in kinds]
    return [fs[0] if len(fs) == 1 else Factors(*map(torch.cat, zip(*fs, strict=True))) for fs in alike]


def precise(x: Tensor) -> Tensor:
    """``x`` in a dtype that is good enough for sums of squares."""
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner products of the rows of two matrices."""
    return (x.unsqueeze(1) @ y.unsqueeze(2)).flatten()


def inner(f: Factors, g: Factors) -> Tensor:
    """The inner products of two products."""
    x, y = gram(f.left, g.left), gram(f.right, g.right)
    if x.shape[1:].numel() == 1:
        return (x * y).flatten()
    return (x * y).sum((1, 2))


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


class ExampleInterpreter(PullbackInterpreter, whole=True):
    """Reverse mode for one example inside of vmap, which leaves gradients in factors where these are less."""

    pullbacks = PullbackTable("gradients of examples")

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        #: by the index of a matrix that is another one turned, the index of that
        self.sources: dict[int, int] = {}
        #: the indices of the arguments that are differentiated for
        self.leaves: set[int] = set()

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        out = super().process(op, args, kwargs)
        if op in TURNS and out.dim() == 2 and out.shape == args[0].shape[::-1] and self.records(out):
            if TURNS[op](*args[1:]):
                self.sources[out.tape_index] = args[0].tape_index
        return out

    def matrix_behind(self, index: Any) -> tuple[int, bool] | None:
        """The argument that a matrix is, and whether turned; None if it is computed, or not tracked."""
        turned = False
        while index in self.sources:
            index, turned = self.sources[index], not turned
        return (index, turned) if index in self.leaves else None

    def takes(self, step: Step, name: str, parameter: Tensor, make: Callable[[], Factors | Patches]) -> bool:
        """Note the gradient of ``parameter`` in factors, if it can be and they are less."""
        source = self.matrix_behind(step.index(name))
        if source is None or self.hooks is not None or not parameter.is_floating_point():
            return False
        if self.below is not None and self.below.owns(parameter) and not self.below.is_constant(parameter):
            return False  # each example has its own
        part = make()
        leaf, turned = source
        noted = self.lane.setdefault(leaf, [])
        numbers = [x for x in part[:2] if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
        if any(x.dtype is not parameter.dtype for x in numbers):
            return False
        if sum(p.size() for p in [*noted, part]) >= parameter.numel():
            return False
        noted.append(part.turned() if turned and isinstance(part, Factors) else part)
        return True

    def gradient(self, index: int | None, cotangent: Tensor | None) -> Gradient:
        """By what a walk noted, and the cotangent that it returned, the gradient of an argument."""
        noted = [] if index is None else self.lane.get(index, [])
        factors = [p for p in noted if isinstance(p, Factors)]
        return Gradient(cotangent, joined(factors), [p for p in noted if isinstance(p, Patches)])


#: Operators that turn a matrix, and whether they do with these arguments.
TURNS: dict[OpOverload, Callable[..., bool]] = {
    aten.t.default: lambda: True,
    aten.transpose.int: lambda a, b: (a - b) % 2 == 1,
    aten.permute.default: lambda dims: dims[0] % 2 == 1,
}


def rows(x: Tensor) -> Tensor:
    """``x`` as a matrix of its rows; a vector is one."""
    return x.reshape(-1, x.shape[-1])


def columns(x: Tensor) -> Tensor:
    return rows(x if x.dim() < 2 else x.mT)


@ExampleInterpreter.pullbacks.register(aten.linear.default)
def linear(step: Step, grad: Tensor, input: Tensor, weight: Tensor) -> Any:
    level: Any = step.interpreter
    if not level.takes(step, "weight", weight, lambda: Factors(rows(grad), rows(input))):
        return None
    # of one row the sum is the row itself, which is kept anyway
    return {"weight": None, **({"bias": grad.reshape(-1)} if grad.shape[:-1].numel() == 1 else {})}


@ExampleInterpreter.pullbacks.register(aten.embedding.default)
def embedding(
    step: Step, grad: Tensor, weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> Any:
    level: Any = step.interpreter

    def factors() -> Factors:
        where = indices.reshape(-1)
        right = rows(grad)
        if padding_idx >= 0:
            right = right.masked_fill((where == padding_idx).unsqueeze(1), 0)
        return Factors(where, right)

    return {"weight": None} if not scale_grad_by_freq and level.takes(step, "weight", weight, factors) else None


@ExampleInterpreter.pullbacks.register(aten.convolution.default)
def convolution(
    step: Step,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    groups: int,
) -> Any:
    level: Any = step.interpreter
    kernel = list(weight.shape[2:])
    geometry = [list(n) if len(n) > 1 else list(n) * len(kernel) for n in (stride, padding, dilation)]
    taken = not transposed and level.takes(step, "weight", weight, lambda: Patches(grad, input, kernel, *geometry, groups))
    return {"weight": None} if taken else None


def product(op: OpOverload, x: str, y: str) -> None:
    """The rule of an operator that multiplies ``x`` by ``y``, and may add something."""

    def rule(step: Step, grad: Tensor, left: Tensor, right: Tensor, alpha: Any = 1) -> Any:
        level: Any = step.interpreter
        grad = grad if alpha == 1 else grad * alpha
        factored = {}
        if left.dim() == 2 and level.takes(step, x, left, lambda: Factors(columns(grad), columns(right))):
            factored[x] = None
        if right.dim() == 2 and level.takes(step, y, right, lambda: Factors(rows(left), rows(grad))):
            factored[y] = None
        return factored

    scaled = ["alpha"] if "alpha" in op._schema.arguments[-1].name else []
    ExampleInterpreter.pullbacks.add(op, named(["step", "grad", x, y, *scaled], rule))


product(aten.matmul.default, "self", "other")
product(aten.mm.default, "self", "mat2")
product(aten.mv.default, "self", "vec")
product(aten.addmm.default, "mat1", "mat2")
product(aten.addmv.default, "mat", "vec")
