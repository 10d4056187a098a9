"""Modules of ``fully_shard`` (FSDP2) inside transforms.

NOTE [Sharded modules]
Each process has a part of each parameter. Outside of transforms, a hook in front of the module's forward gathers them
into memory that a hook behind it frees; hooks of PyTorch's autograd gather them again for the backward pass, and reduce
the gradients. The tape of a transform lives on after the forward, and the engine does not walk it. So inside, a call
gathers the parameters by a function that has derivatives, ``Gather``, puts what it gives in their place while the
forward runs, and leaves the module's own state alone. What a tape holds is freed with the tape.

Which derivative: FSDP's. Each process has a loss of its own, what is differentiated is their mean, and the gradient
for a parameter is sharded as the parameter is. So the transpose of gathering is a reduction, and the transpose of the
reduction is to gather.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function

from functrans.boundary.factories import model_of
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.door.dtensor import FromLocal, in_batch, module
from functrans.errors import InsideTransformError
from functrans.pytorch.distributed import (
    FSDP_BEFORE,
    FSDP_STATES,
    forget_call,
    parameter_at,
    places_of,
    replace_in_fsdp,
    swap_tensor,
    why_not_gathered,
)
from functrans.pytorch.imports import when_imported
from functrans.pytorch.thread_state import STATE

WHOLE = "functional_call of the module as it was, with full_tensor() of each parameter"


class Gather(Function):
    """The whole of a parameter, on every process."""

    @staticmethod
    def forward(x: Any, placements: Any, divisor: float) -> Any:
        mesh = x.device_mesh
        return x.redistribute(mesh, [module().Replicate()] * mesh.ndim).to_local()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, *ctx.how = inputs
        ctx.mesh, ctx.shape = x.device_mesh, x.shape

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return Reduce.apply(grad, ctx.mesh, ctx.shape, *ctx.how), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *rest: Any) -> Any:
        return Gather.apply(tangent, *ctx.how)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, placements: Any, divisor: Any) -> Any:
        return Gather.apply(x, in_batch(placements, in_dims[0]), divisor), in_dims[0]


class Reduce(Function):
    """The sum over processes, divided: a DTensor of ``shape``, placed as a parameter is."""

    @staticmethod
    def forward(x: Any, mesh: Any, shape: Any, placements: Any, divisor: float) -> Any:
        parts = [torch.distributed.tensor.Partial()] * mesh.ndim
        return FromLocal.apply(x / divisor, mesh, parts, shape).redistribute(mesh, placements)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return Gather.apply(grad, *ctx.how[2:]), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *rest: Any) -> Any:
        return Reduce.apply(tangent, *ctx.how)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, mesh: Any, shape: Any, placements: Any, divisor: Any) -> Any:
        x = x.movedim(in_dims[0], 0)
        return Reduce.apply(x, mesh, (info.batch_size, *shape), in_batch(placements, 0), divisor), 0


class Lent:
    """What a module has in place of its parameters during a call; and a hook behind the call, also if that fails."""

    def __init__(self) -> None:
        self.groups: list[Any] = []
        self.kept: list[tuple[nn.Module, str, Tensor]] = []

    def lend(self, top: Interpreter, module: nn.Module, group: Any) -> None:
        """Put the parameters of ``group``, whole, where ``module`` has them."""
        if group in self.groups:  # of a call that failed, of a method that is no forward
            self(module)
        self.groups.append(group)
        inside = set(module.modules())
        whole: dict[int, Tensor] = {}
        for parameter in group.fsdp_params:
            for owner, name in places_of(parameter):
                x = parameter_at(parameter, owner, name)
                if owner in inside and is_sharded(x):
                    if id(x) not in whole:  # one that has two names is one
                        whole[id(x)] = gathered(top, group, parameter, x)
                    self.kept.append((owner, name, swap_tensor(owner, name, whole[id(x)])))

    def __call__(self, module: nn.Module, *of_hook: Any) -> None:
        while self.kept:
            swap_tensor(*self.kept.pop())
        if self.groups:
            self.groups.clear()
            forget_call(module)


_lent: WeakKeyDictionary[nn.Module, Lent] = WeakKeyDictionary()


def is_sharded(x: Tensor) -> bool:
    return isinstance(x if type(x) is not WrapperTensor else model_of(x), module().DTensor)


def gathered(top: Interpreter, group: Any, parameter: Any, x: Tensor) -> Tensor:
    """The whole of ``x``, which is in the place of ``parameter``."""
    why = why_not_gathered(parameter)
    if why is not None:
        raise InsideTransformError(f"calling a module of fully_shard {why}", top.name, WHOLE)
    own = parameter.sharded_param
    whole = Gather.apply(x, own.placements, group.gradient_divide_factor or own.device_mesh.size())
    dtype = (parameter if hasattr(parameter, "mp_policy") else group).mp_policy.param_dtype  # from PyTorch 2.15 on each
    return whole if dtype is None or not whole.is_floating_point() else whole.to(dtype)


def lending(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def pre_forward(group: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if STATE.top is None:
            return original(group, module, args, kwargs)
        lent = _lent.get(module)
        if lent is None:
            lent = _lent[module] = Lent()
            module.register_forward_hook(lent, always_call=True)
        lent.lend(STATE.top, module, group)
        return args, kwargs

    return pre_forward


def putting_back(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def post_forward(group: Any, module: nn.Module | None, args: Any, output: Any) -> Any:
        if STATE.top is None:
            return original(group, module, args, output)
        if module is not None and module in _lent:
            _lent[module](module)
        return output

    return post_forward


def outside(original: Callable[..., Any], inside: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` outside of transforms; inside, what ``inside`` says."""
    return functools.wraps(original)(
        lambda *args, **kwargs: (original if STATE.top is None else inside)(*args, **kwargs)
    )


def refuse_flat(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    cure = "fully_shard, whose modules can be called, or functional_call of the module as it was"
    top: Any = STATE.top
    raise InsideTransformError("calling a FullyShardedDataParallel module", top.name, cure)


def connect_flat() -> None:
    """Tell the older FSDP, whose parameters are views of a flat one that is freed behind every forward."""
    kind = sys.modules[FSDP_BEFORE].FullyShardedDataParallel
    kind.forward = outside(kind.forward, refuse_flat)


def connect() -> None:
    """Tell FSDP2, which has been imported, of transforms."""
    replace_in_fsdp(
        before_forward=lending,
        behind_forward=putting_back,
        before_root=lambda original: outside(original, lambda state, module, args, kwargs: (args, kwargs)),
        before_backward=lambda original: outside(original, lambda state, output: output),
        ahead_of_time=lambda original: outside(original, lambda *args: None),
    )


when_imported(FSDP_STATES, connect)
when_imported(FSDP_BEFORE, connect_flat)
