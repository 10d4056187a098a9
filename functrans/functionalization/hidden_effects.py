"""Operators that the door replaces, because their schema does not say what they do."""

from __future__ import annotations

import math
from typing import Any

import torch

from functrans.boundary.calls import lift
from functrans.core.dispatch import base, scan
from functrans.core.tensor import WrapperTensor
from functrans.errors import InsideTransformError
from functrans.functionalization.layouts import check_places, dense_strides, memory_order, set_content, set_metadata
from functrans.functionalization.views import hides_layout, run_view
from functrans.functionalization.writes import write
from functrans.operators.info import STAND_INS, OpInfo, op_info
from functrans.operators.schemas import taken_apart
from functrans.pytorch import thread_state
from functrans.pytorch.control_flow import TRACING_MODES, FakeTensor
from functrans.pytorch.thread_state import STATE, running_at
from functrans.pytorch.torch_private import (
    VIEWS_AND_VERSIONS,
    OpOverload,
    mode_kinds,
    mode_of_kind,
    set_key_excluded,
)
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten


#: Decorator: at the door the function below runs in place of the operators, with (known, args, kwargs).
stands_in_for = STAND_INS.register


def enter(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` from the door's beginning."""
    return thread_state.DOOR.enter(op, args, kwargs)


@stands_in_for(aten._embedding_bag_forward_only.default)
def embedding_bag(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """PyTorch takes the form without a derivative wherever autograd sees none to record."""
    return enter(aten._embedding_bag.default, *args, **kwargs)


@stands_in_for(aten._efficientzerotensor.default)
def real_zeros(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """PyTorch's stand-in for undefined tangents has no data, and most operators do not know it."""
    return enter(aten.zeros.default, *args, **kwargs)


@stands_in_for(aten.lift_fresh.default, aten.lift.default)
def made_inside(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.tensor(...)`` brings in a tensor that nothing else refers to: it belongs to the innermost transform."""
    within: Any = None if STATE.top is None else STATE.top.within
    made = args[0] if within is None else within.made_inside(args[0])
    owner = scan((made,), kwargs)[0]
    if owner is None and mode_of_kind(mode_kinds.FAKE) is not None:  # which takes no others than its own
        made = base(aten.lift_fresh_copy.default, (made,), {})
    return lift(made, owner, STATE.top)


def as_usual(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the door does with an operator that nothing stands in for."""
    top = STATE.top
    owner = top if known.random else scan(args, kwargs)[0]
    out = base(known.op, args, kwargs) if owner is None else owner.process(known.op, args, kwargs)
    return out if owner is top else lift(out, owner, top)


@stands_in_for(
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default
)
def dropout(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where nothing is dropped PyTorch returns its argument itself, and a write to the one is a write to the other."""
    x, p, train = args
    if not 0 <= p <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
    return x if not train or p == 0 or x.numel() == 0 else as_usual(known, args, kwargs)


def check_numbers(op: OpOverload, x: Any, low: float, high: float) -> None:
    """Refuse numbers of ``x`` that are not between ``low`` and ``high``, where ``op`` would on the CPU.

    PyTorch looks at those of plain tensors only, and not at a subclass's.
    """
    while type(x) is WrapperTensor:
        x = x.value
    traced = isinstance(x, FakeTensor) or any(map(mode_of_kind, TRACING_MODES))
    if isinstance(x, torch.Tensor) and x.device.type == "cpu" and not traced:
        with running_at(None), torch.no_grad():
            if not ((x >= low) & (x <= high)).all():
                got = f"numbers from {x.min().item()} to {x.max().item()}"
                raise RuntimeError(f"{op}: got {got}, expected numbers in the range [{low}, {high}].")


@stands_in_for(aten.quantile.default, aten.nanquantile.default)
def quantile(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Its ``q`` are numbers between 0 and 1."""
    check_numbers(known.op, args[1], 0, 1)
    return as_usual(known, args, kwargs)


@stands_in_for(aten.one_hot.default)
def one_hot(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of classes that there are (torch 2.11 and 2.12 leave others out)."""
    if len(args) > 1 and args[1] > 0:
        check_numbers(known.op, args[0], 0, args[1] - 1)
    return as_usual(known, args, kwargs)


@stands_in_for(aten.to_dense.default)
def to_dense(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is dense is returned as it is."""
    x, dtype = args[0], args[1] if len(args) > 1 else None
    return x if x.layout is torch.strided and dtype in (None, x.dtype) else as_usual(known, args, kwargs)


@stands_in_for(aten.conj_physical.default)
def conj_physical(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is real is returned as it is."""
    return as_usual(known, args, kwargs) if args[0].is_complex() else args[0]


@stands_in_for(aten.sum_to_size.default)
def sum_to_size(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where there is nothing to sum it returns its argument itself."""
    x, size = args
    if not size:
        return enter(aten.sum.default, x)  # which counts booleans
    return x if list(x.shape) == list(size) else as_usual(known, args, kwargs)


@stands_in_for(
    *(
        getattr(getattr(aten, name), o)
        for name in ("atleast_1d", "atleast_2d", "atleast_3d")
        for o in ("default", "Sequence")
    ),
    aten.meshgrid.default, aten.meshgrid.indexing, aten.type_as.default, aten.cartesian_prod.default,
)  # fmt: skip
def by_its_views(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Composite operators that return views without their schema saying so: the door sees the views one by one."""
    with running_at(STATE.top):
        return taken_apart(known.op, *args, **kwargs)


@stands_in_for(aten.einsum.default)
def einsum(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As above, of one tensor, whose dimensions it may but order."""
    if len(args[1]) == 1:
        return by_its_views(known, args, kwargs)
    set_key_excluded(VIEWS_AND_VERSIONS, True)  # as for all else that makes no views
    return as_usual(known, args, kwargs)


@stands_in_for(aten.broadcast_tensors.default)
def broadcast_tensors(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As above; the definition is in Python, and imports sympy."""
    (tensors,) = args
    shape = broadcast_shapes(*(x.shape for x in tensors))
    return [x if x.shape == shape else enter(aten.expand.default, x, shape) for x in tensors]


@stands_in_for(aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default)
def as_strided(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """These name places in memory, which must be where the tensor shows them; see NOTE [Strides of what is written]."""
    x = args[0]
    check_places(x)
    if type(x) is WrapperTensor and hides_layout(x):
        raise InsideTransformError(
            "as_strided of a tensor that was computed while examples lay between each other in memory",
            x.interpreter.name,
            "as_strided on its .contiguous()",
        )
    return run_view(known, args, kwargs) if known.op is aten.as_strided.default else as_usual(known, args, kwargs)


@stands_in_for(aten.batch_norm.default)
def batch_norm(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Training mode writes the running statistics, which the schema does not say."""
    x, weight, bias, mean, var, training, momentum, eps, *_ = args
    owner = scan(args, kwargs)[0]
    if owner is None:
        return base(known.op, args, kwargs)
    if not training or mean is None or var is None or x.numel() == 0:
        return owner.process(known.op, args, kwargs)
    return updating_norm(known.op, x, weight, bias, mean, var, momentum, eps)[0]


@stands_in_for(aten._native_batch_norm_legit.default, aten.native_batch_norm.default)
def native_batch_norm(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As ``batch_norm``, with the statistics of the batch among the outputs."""
    x, weight, bias, mean, var, training, momentum, eps = args
    owner = scan(args, kwargs)[0]
    if owner is None:
        return base(known.op, args, kwargs)
    if not training or mean is None or var is None:
        return owner.process(op_info(aten.native_batch_norm.default).op, args, kwargs)
    return updating_norm(known.op, x, weight, bias, mean, var, momentum, eps)[:3]


@stands_in_for(aten._batch_norm_with_update.default)
def batch_norm_with_update(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As ``native_batch_norm`` in training mode; the fourth output is a backend's own memory, not used here."""
    x, weight, bias, mean, var, momentum, eps = args
    if scan(args, kwargs)[0] is None:
        return base(known.op, args, kwargs)
    out = updating_norm(known.op, x, weight, bias, mean, var, momentum, eps)
    return (*out[:3], enter(aten.new_empty.default, x, [0], dtype=torch.uint8))


@stands_in_for(aten._batch_norm_with_update_functional.default)
def batch_norm_updated(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The pure form of it, of which PyTorch's derivative knows the first output alone."""
    x, *rest, momentum, eps = args
    if scan(args, kwargs)[0] is None:
        return base(known.op, args, kwargs)
    out = enter(aten._native_batch_norm_legit_functional.default, x, *rest, True, momentum, eps)
    return (*out[:3], enter(aten.new_empty.default, x, [0], dtype=torch.uint8), *out[3:])


def updating_norm(
    op: OpOverload, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    """Batch norm by the batch's statistics, and the running ones updated; these carry no derivative."""
    old_mean, old_var = (enter(aten.clone.default, enter(aten.detach.default, t)) for t in (mean, var))
    out = enter(
        aten._native_batch_norm_legit_functional.default, x, weight, bias, old_mean, old_var, True, momentum, eps
    )
    for target, new in ((mean, out[3]), (var, out[4])):
        # A loop over the examples would start each update from the last one: reads=True has vmap refuse it.
        write(target, enter(aten.detach.default, new), op)
    return out


@stands_in_for(aten.rrelu_with_noise.default)
def rrelu(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """PyTorch's derivative of the pure form reads the slopes from the argument that is not written."""
    x, noise, lower, upper, training, generator = (*args, *known.defaults[len(args) :])
    if scan(args, kwargs)[0] is None:
        return base(known.op, args, kwargs)
    if not training:
        return enter(aten.leaky_relu.default, x, (lower + upper) / 2)
    detached = enter(aten.detach.default, x)
    slopes = enter(aten.rrelu_with_noise_functional.default, detached, noise, lower, upper, training, generator)[1]
    write(noise, slopes, known.op, reads=False)
    return enter(aten.mul.Tensor, x, slopes)


@stands_in_for(aten.resize_.default)
def resize(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first elements stay, in their order in memory."""
    target, size = args[0], list(args[1])
    if type(target) is not WrapperTensor:
        return base(known.op, args, kwargs)
    if kwargs.get("memory_format") not in (None, torch.contiguous_format):
        raise InsideTransformError(
            "resize_ to a memory format", target.interpreter.name, "a new tensor of the wanted size"
        )
    if size == list(target.shape):
        return target
    if target.view_link is not None or target.alias_group is not None:
        raise InsideTransformError(
            "resize_ of a tensor that is viewed", target.interpreter.name, "a new tensor of the wanted size"
        )
    count = math.prod(size)
    if count > target.numel():
        raise InsideTransformError(
            "resize_ to more elements", target.interpreter.name, "torch.cat or a new tensor of the wanted size"
        )
    if target.strides is None:
        in_memory = target
    else:
        if dense_strides(target.shape, target.strides) != target.strides:
            raise InsideTransformError(
                "resize_ of a tensor with gaps in memory", target.interpreter.name, "a new tensor of the wanted size"
            )
        in_memory = enter(aten.permute.default, target, memory_order(target.shape, target.strides))
    flat = enter(aten.reshape.default, in_memory, [-1])
    new = enter(aten.reshape.default, enter(aten.slice.Tensor, flat, 0, 0, count), size)
    target.alias_group = None
    set_metadata(target, new)
    set_content(target, new)
    return target


@stands_in_for(aten.resize_as_.default)
def resize_as(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``resize_`` to another tensor's shape."""
    return enter(aten.resize_.default, args[0], list(args[1].shape), **kwargs)


@stands_in_for(aten._has_compatible_shallow_copy_type.default)
def refuse_data_assignment(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """PyTorch asks this when ``x.data = y`` is executed for a captured ``x``, which would put one tensor's insides into
    another; and modules, before they convert their parameters, of which those made inside may be assigned."""
    owner = scan(args, kwargs)[0]
    if owner is None:
        return base(known.op, args, kwargs)
    if type(args[0]) is WrapperTensor:
        return True
    cure = "functrans.functional_call, or a module that was made or copied inside"
    raise InsideTransformError("assigning Tensor.data of a captured tensor", owner.name, cure)


@stands_in_for(aten._make_dual.default, aten._unpack_dual.default)
def refuse_dual(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward AD of PyTorch itself has no meaning for wrappers; only borrowed derivatives use it, on shadows."""
    owner = scan(args, kwargs)[0]
    if owner is None:
        return base(known.op, args, kwargs)
    if owner.carries_autograd:
        return owner.process(known.op, args, kwargs)
    raise InsideTransformError("torch.autograd.forward_ad", owner.name, "functrans.jvp")


@stands_in_for(*(getattr(aten.set_, o) for o in aten.set_.overloads()))
def refuse_set(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sharing another tensor's storage has no pure counterpart."""
    if scan(args, kwargs)[0] is None:
        return base(known.op, args, kwargs)
    owner = scan(args, kwargs)[0]
    assert owner is not None
    raise InsideTransformError("Tensor.set_()", owner.name, "copy_() or a new tensor")


@stands_in_for(aten.to_mkldnn.default)
def refuse_mkldnn(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tensors of this layout hide their numbers: wrappers of them would lose derivatives in silence."""
    owner = scan(args, kwargs)[0]
    if owner is None:
        return base(known.op, args, kwargs)
    raise InsideTransformError("Tensor.to_mkldnn()", owner.name, "the dense tensor as it is")


@stands_in_for(aten.requires_grad_.default, aten.retain_grad.default)
def leave_autograd_alone(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Autograd's own switches concern the base only."""
    return base(known.op, args, kwargs)
