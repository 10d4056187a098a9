"""The gradients of single examples in parts: reverse mode whose rules keep what is less than a gradient.

See NOTE [Gradients in factors] in ``gradient_parts``. What has no rule here is pulled back as always, which gives each
example's gradient as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.named import named
from functrans.interpreters.grad.pullback_rules import PullbackInterpreter, PullbackTable, Step
from functrans.operators.views import CONJUGATED, PERMUTATIONS, SWAPS, order_of
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.gradient_parts import Factors, Geometry, Gradient, Patches

aten = torch.ops.aten


class ExampleInterpreter(PullbackInterpreter, whole=True):
    """Reverse mode for one example inside of vmap, which leaves gradients in parts where these are less."""

    pullbacks = PullbackTable("gradients of examples")

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        #: by the index of what is another matrix but for dimensions of 1: the index of that, and whether it is turned
        self.sources: dict[int, tuple[int, bool]] = {}
        #: the indices of the arguments that are differentiated for, with their ranks
        self.leaves: dict[int, int] = {}

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        out = super().process(op, args, kwargs)
        if op in VIEWS and self.records(out):
            turned = turns(op, args[0], args[1:], out)
            if turned is not None:
                self.sources[out.tape_index] = args[0].tape_index, turned
        return out

    def argument_behind(self, index: Any) -> tuple[int, bool] | None:
        """The argument that a matrix is, and whether turned; None if it is computed, or not tracked."""
        turned = False
        while index in self.sources:
            index, again = self.sources[index]
            turned ^= again
        return (index, turned) if index in self.leaves else None

    def takes(self, step: Step, name: str, parameter: Tensor, make: Callable[[], Factors | Patches]) -> bool:
        """Note the gradient of ``parameter`` as a part, if it can be and that is less.

        It has to be an argument that all examples share, whose cotangent no hook waits for.
        """
        source = self.argument_behind(step.index(name))
        if source is None or self.hooks is not None or own_to_example(self, parameter):
            return False
        index, turned = source
        part = make()
        numbers = [x for x in part[:2] if x.is_floating_point() or x.is_complex()]
        if parameter.is_complex() or any(x.dtype is not parameter.dtype for x in numbers):
            return False
        if isinstance(part, Factors) and self.leaves[index] != 2:
            return False
        noted = self.lane.setdefault(index, [])
        if sum(p.size() for p in (*noted, part)) >= parameter.numel() * part.worth:
            return False
        noted.append(part.turned() if turned and isinstance(part, Factors) else part)
        return True

    def gradient(self, cotangents: dict[int, Tensor], index: int | None) -> Gradient:
        """That of an argument, by the cotangents that a walk returned and what it noted."""
        return Gradient(None, [], []) if index is None else Gradient.of(cotangents.get(index), self.lane.get(index, []))


#: Operators that change the order of dimensions.
ORDERED = {*SWAPS, *PERMUTATIONS} - CONJUGATED
#: Operators whose result may be their argument but for dimensions of 1.
VIEWS = {
    *ORDERED, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view.default,
    aten.reshape.default, aten._unsafe_view.default,
}  # fmt: skip


def turns(op: OpOverload, x: Tensor, args: Sequence[Any], out: Tensor) -> bool | None:
    """Whether ``out = op(x, *args)`` is the matrix ``x`` turned, but for dimensions of 1; None if it is neither."""
    if [n != 1 for n in x.shape].count(True) != 2:
        return None
    if op in ORDERED:
        first, second = (d for d in order_of(op, x.dim(), *args) if x.shape[d] != 1)
        return first > second
    return False if [n for n in x.shape if n != 1] == [n for n in out.shape if n != 1] else None


def own_to_example(level: ExampleInterpreter, x: Any) -> bool:
    """Whether a value differs between the examples."""
    vmap = level.below
    return vmap is not None and vmap.owns(x) and not vmap.is_constant(x)


def rows(x: Tensor) -> Tensor:
    """``x`` as a matrix of its rows; a vector is one, and stays as it is."""
    return x if x.dim() < 3 else x.reshape(-1, x.shape[-1])


def one_row(x: Tensor) -> Tensor:
    return x if x.dim() == 1 else x.reshape(-1)


def columns(x: Tensor) -> Tensor:
    return rows(x if x.dim() < 2 else x.mT)


@ExampleInterpreter.pullbacks.register(aten.linear.default)
def linear(step: Step, grad: Tensor, input: Tensor, weight: Tensor) -> Any:
    level: Any = step.interpreter
    if not level.takes(step, "weight", weight, lambda: Factors(rows(grad), rows(input))):
        return None
    # of one row the sum is the row itself, which is kept anyway
    return {"weight": None, **({"bias": one_row(grad)} if grad.shape[:-1].numel() == 1 else {})}


def product(op: OpOverload, x: str, y: str) -> None:
    """Add the rule of an operator that multiplies ``x`` by ``y``, and may add something."""

    def rule(step: Step, grad: Tensor, left: Tensor, right: Tensor, alpha: Any = 1) -> Any:
        level: Any = step.interpreter
        if op is aten.bmm.default:
            if len(grad) != 1:
                return None
            grad, left, right = grad[0], left[0], right[0]
        grad = grad if alpha == 1 else grad * alpha
        kept: dict[str, None] = {}
        if left.dim() == 2 and level.takes(step, x, left, lambda: Factors(columns(grad), columns(right))):
            kept[x] = None
        if right.dim() == 2 and level.takes(step, y, right, lambda: Factors(rows(left), rows(grad))):
            kept[y] = None
        return kept

    scale = ["alpha"] if any(a.name == "alpha" for a in op._schema.arguments) else []
    ExampleInterpreter.pullbacks.add(op, named(["step", "grad", x, y, *scale], rule))


product(aten.matmul.default, "self", "other")
product(aten.mm.default, "self", "mat2")
product(aten.bmm.default, "self", "mat2")
product(aten.mv.default, "self", "vec")
product(aten.addmm.default, "mat1", "mat2")
product(aten.addmv.default, "mat", "vec")


@ExampleInterpreter.pullbacks.register(aten.embedding.default)
def embedding(
    step: Step, grad: Tensor, weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> Any:
    level: Any = step.interpreter

    def factors() -> Factors:
        where, right = indices.reshape(-1).long(), rows(grad)
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> Any:
    level: Any = step.interpreter
    kernel = tuple(weight.shape[2:])
    numbers = [tuple(n) if len(n) > 1 else tuple(n) * len(kernel) for n in (stride, padding, dilation)]
    geometry = Geometry(kernel, numbers[0], numbers[1], numbers[2], groups)
    if transposed:
        return None
    if level.takes(step, "weight", weight, lambda: Patches(grad, input, geometry)):
        return {"weight": None}
    few = weight[0].numel() <= len(weight) // groups and not own_to_example(level, weight)
    if "weight" not in step.names or not few or weight.is_complex() or not grad.dtype is input.dtype is weight.dtype:
        return None
    # of few channels the patches are few: one product for each example takes less than PyTorch's convolutions in groups
    return {"weight": Patches(grad.unsqueeze(0), input.unsqueeze(0), geometry).whole().squeeze(0)}
