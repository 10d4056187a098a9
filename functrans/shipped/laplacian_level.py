"""The level at which the function of a ``laplacian`` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from functrans.core.dispatch import lower, map_tensors
from functrans.core.tensor import PendingWrapper, WrapperTensor, tensor_of, wrap, wrap_like
from functrans.operators.info import DIFFERENTIABLE
from functrans.operators.rules import RuleTable
from functrans.programs.program import Program
from functrans.shipped.by_derivatives import DerivativeInterpreter
from functrans.shipped.laplacian_programs import bending

aten = torch.ops.aten


class LaplacianInterpreter(DerivativeInterpreter, whole=True):
    """Values with their derivatives along D directions, and the sum of the second derivatives along these."""

    kind = "laplacian"
    #: ``slopes`` is [D, *shape]; ``bend`` the sum of the second derivatives, None where that is zero
    payload = ("slopes", "bend")
    rules: ClassVar[Any] = RuleTable("laplacian rules", default=lambda interpreter, *call: interpreter.derived(*call))
    #: what is done with an operator of which the derivative table does not say enough; see laplacian_by_table.py
    derived: ClassVar[Callable[..., Any]]

    def __init__(self, count: int, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        self.count = count

    def details(self) -> list[str]:
        return [f"directions={self.count}"]

    def is_constant(self, wrapper: WrapperTensor) -> bool:
        return wrapper.slopes is None

    def moving(self, value: Any, slopes: Any, bend: Any) -> WrapperTensor:
        """A wrapper for an operator's output, a constant if it does not move."""
        if not isinstance(value, Tensor) or value.dtype not in DIFFERENTIABLE or slopes is None:
            return self.constant(value)
        wrapper = wrap(self, value)
        wrapper.slopes, wrapper.bend = slopes, bend
        return wrapper

    def parts_of(self, leaf: Any) -> tuple[Any, Any, Any]:
        """Value, slopes and bend of a leaf of the result; a Python value has no derivatives."""
        if not isinstance(leaf, Tensor):
            return leaf, None, None
        wrapper: Any = self.own(leaf)
        value, slopes, bend = wrapper.value, wrapper.slopes, wrapper.bend
        if slopes is None:
            slopes = torch.zeros(self.count, *value.shape, dtype=value.dtype, device=value.device)
        return value, slopes, torch.zeros_like(value) if bend is None else bend

    def run_program(self, program: Program, args: Sequence[Any], whole: bool = True) -> Any:
        values: list[Any] = []
        moving: list[Any] = []
        places: tuple[int, ...] = ()
        bent: tuple[int, ...] = ()
        numbers: tuple[int, ...] = ()
        rank = 0
        for i, a in enumerate(args):
            kind = type(a)
            tensor = kind is WrapperTensor or kind is PendingWrapper or isinstance(a, Tensor)
            if not tensor:
                numbers += (i,)
            elif len(a.shape) > rank:
                rank = len(a.shape)
            if kind is WrapperTensor and a.interpreter is self:
                values.append(a._value)
                if a.slopes is not None:
                    places += (i,)
                    moving.append(a)
                    if a.bend is not None:
                        bent += (i,)
            else:
                values.append(a)
        send = self.sender(whole)
        if not moving:
            return map_tensors(self.constant, send(program, values, {}))
        found = bending(program, places, bent, numbers) if len(moving) < 4 else None
        if found is None:
            return NotImplemented
        slopes = [x.slopes if len(x.shape) == rank else self.as_ranked(x.slopes, rank) for x in moving]
        given = [*values, *(x.bend for x in moving if x.bend is not None)]
        for i, j in found.products:
            product = lower(self, aten.mul.Tensor, (slopes[i], slopes[j]), {})
            product = lower(self, aten.sum.dim_IntList, (product, [0]), {})
            given.append(product)
        outs = [tensor_of(out) for out in found.values.of(given, send)]
        count, like = len(program.outputs), self.model(args) if whole else None
        pushed = [tensor_of(s) for s in found.slopes.of([*outs[2 * count :], *slopes], send)]
        results = [self.result(outs[k], pushed[k], outs[count + k], like) for k in range(count)]
        return results[0] if program.single else results

    def as_ranked(self, slopes: Tensor, rank: int) -> Tensor:
        """Slopes of a tensor that is broadcast to ``rank`` dimensions."""
        shape = [self.count, *[1] * (rank + 1 - len(slopes.shape)), *slopes.shape[1:]]
        return lower(self, aten.reshape.default, (slopes, shape), {})

    def result(self, out: Tensor, slopes: Tensor | None, bend: Tensor | None, like: Any) -> WrapperTensor:
        """A program's output with what belongs to it, which is broadcast and promoted as it is."""
        if slopes is None:
            return self.constant(out)
        if like is not None:
            wrapper = wrap_like(self, out, like)
            wrapper.slopes, wrapper.bend = slopes, bend
            return wrapper
        bend = None if bend is None else self.as_wide(bend, out)
        return self.moving(out, self.as_wide(slopes, out, 1), bend)
