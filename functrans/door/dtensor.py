"""What a wrapper of a DTensor has of a DTensor: its placements, and the methods that change them or leave DTensors.

The methods are linear functions, and no operators: each is an autograd.Function here, which goes down the stack to the
DTensor. A wrapper's placements are those of the tensor that its level sees, without the batch dimensions of vmaps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from functrans.boundary.factories import model_of
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.errors import InsideTransformError
from functrans.errors.misuse import RESERVED
from functrans.interpreters.vmap.interpreter import VmapInterpreter


def module() -> Any:
    """``torch.distributed.tensor``, if it is in use."""
    return sys.modules.get("torch.distributed.tensor")


def in_batch(placements: Sequence[Any], bdim: int | None) -> list[Any]:
    """The placements of one example as those of the batch."""
    return [type(p)(p.dim + (p.dim >= bdim)) if bdim is not None and p.is_shard() else p for p in placements]


def of_example(placements: Sequence[Any], bdim: int | None, interpreter: Interpreter) -> tuple[Any, ...]:
    """The placements of one example, of a batch along ``bdim``."""
    if bdim is None:
        return tuple(placements)
    if any(p.is_shard(bdim) for p in placements):
        what = f"the placements of one example of a batch that is sharded along its dimension {bdim}, the batch's,"
        raise InsideTransformError(what, interpreter.name, "a batch that is replicated, or sharded along others")
    return tuple(type(p)(p.dim - (p.dim > bdim)) if p.is_shard() else p for p in placements)


def placements_of(x: Any) -> tuple[Any, ...]:
    if type(x) is not WrapperTensor:
        return x.placements
    interpreter = x.interpreter
    return of_example(placements_of(x.value), x.bdim if isinstance(interpreter, VmapInterpreter) else None, interpreter)


def pulled(placements: Sequence[Any]) -> list[Any]:
    """Where the cotangent of a tensor is: as the tensor, but for partial sums, each of which it is the whole of."""
    return [module().Replicate() if p.is_partial() else p for p in placements]


class Redistribute(Function):
    @staticmethod
    def forward(x: Any, mesh: Any, placements: Any) -> Any:
        return x.redistribute(mesh, placements)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, *ctx.target = inputs
        try:
            ctx.source = x.device_mesh, pulled(x.placements)
        except InsideTransformError:  # the examples are on different ranks: their cotangents stay where they are
            ctx.source = None

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad if ctx.source is None else grad.redistribute(*ctx.source), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *rest: Any) -> Any:
        return tangent.redistribute(*ctx.target)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, mesh: Any, placements: Any) -> Any:
        return x.redistribute(mesh, in_batch(placements, in_dims[0])), in_dims[0]


class ToLocal(Function):
    @staticmethod
    def forward(x: Any, grad_placements: Any) -> Any:
        return x.to_local()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, grad_placements = inputs
        ctx.mesh, ctx.placements, ctx.shape = x.device_mesh, x.placements, x.shape
        ctx.pulled = pulled(x.placements) if grad_placements is None else grad_placements

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return FromLocal.apply(grad, ctx.mesh, ctx.pulled, ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *rest: Any) -> Any:
        return tangent.redistribute(ctx.mesh, ctx.placements).to_local()

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, grad_placements: Any) -> Any:
        bdim = in_dims[0]
        return x.to_local(grad_placements=grad_placements and in_batch(grad_placements, bdim)), bdim


class FromLocal(Function):
    @staticmethod
    def forward(x: Any, mesh: Any, placements: Any, shape: Any) -> Any:
        if type(x) is WrapperTensor:
            return FromLocal.apply(x, mesh, placements, shape)
        layout = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        return module().DTensor.from_local(x.contiguous(), mesh, placements, run_check=False, **layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *ctx.target = inputs

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        mesh, placements, _ = ctx.target
        return grad.redistribute(mesh, pulled(placements)).to_local(), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *rest: Any) -> Any:
        return FromLocal.apply(tangent, *ctx.target)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, mesh: Any, placements: Any, shape: Any) -> Any:
        x = x.movedim(in_dims[0], 0)
        return FromLocal.apply(x, mesh, in_batch(placements, 0), (info.batch_size, *shape)), 0


def redistribute(x: Any) -> Callable[..., Tensor]:
    def redistribute(device_mesh: Any = None, placements: Any = None, *, async_op: bool = False) -> Any:
        mesh = x.device_mesh if device_mesh is None else device_mesh
        placements = x.placements if placements is None else placements
        rank = x.dim()
        normal = [type(p)(p.dim % rank) if p.is_shard() else p for p in placements]
        return Redistribute.apply(x, mesh, normal)

    return redistribute


def to_local(x: Any) -> Callable[..., Tensor]:
    def to_local(*, grad_placements: Any = None) -> Any:
        placements_of(x)  # refuses a batch of which each rank has some examples only
        return ToLocal.apply(x, grad_placements)

    return to_local


def full_tensor(x: Any) -> Callable[..., Tensor]:
    def full_tensor(*, grad_placements: Any = None) -> Any:
        whole = x.redistribute(placements=[module().Replicate()] * x.device_mesh.ndim)
        return whole.to_local(grad_placements=grad_placements)

    return full_tensor


#: What a wrapper of a DTensor has of it: by name, from the wrapper.
FOUND: dict[str, Callable[[Any], Any]] = {
    "device_mesh": lambda x: model_of(x).device_mesh,  # type: ignore[union-attr]
    "placements": placements_of,
    "redistribute": redistribute,
    "to_local": to_local,
    "full_tensor": full_tensor,
}


def attribute(name: str, found: Callable[[Any], Any]) -> property:
    """The attribute ``name`` of wrappers, which only those of DTensors have."""

    def get(self: WrapperTensor) -> Any:
        if module() is None or not isinstance(model_of(self), module().DTensor):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return found(self)

    return property(get)


for _name, _found in FOUND.items():
    setattr(WrapperTensor, _name, attribute(_name, _found))
RESERVED.update(FOUND)
