"""What PyTorch's schemas say of an operator's arguments, and which functions call it in less time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.nn import functional

from functrans.operators.factors import DROPPING, FactorsDropped
from functrans.pytorch.torch_private import COMPOSITE, DisableTorchFunction, OpOverload


def schema_default(argument: Any) -> Any:
    """The default value of an operator's argument, as Python code would pass it."""
    default = argument.default_value
    if type(default) is not int or argument.real_type is argument.type:
        return default
    kind = str(argument.real_type)
    return next(
        (values[default] for name, values in NUMBERED.items() if name in kind and default < len(values)), default
    )


#: What schemas write as numbers, in the order of c10/core/ScalarType.h and c10/core/MemoryFormat.h.
NUMBERED = {
    "ScalarType": (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
        torch.complex32, torch.complex64, torch.complex128, torch.bool,
    ),
    "MemoryFormat": (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d),
}  # fmt: skip


def normalized(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments given by keyword moved to their position, where the schema has one, so that rules see one form."""
    schema_args = op._schema.arguments
    positional = [a for a in schema_args if not a.kwarg_only]
    if not any(a.name in kwargs for a in positional):
        return args, kwargs
    full = list(args)
    last = max(i for i, a in enumerate(positional) if a.name in kwargs)
    rest = dict(kwargs)
    for a in positional[len(args) : last + 1]:
        full.append(rest.pop(a.name) if a.name in rest else schema_default(a))
    return tuple(full), rest


def arguments_by_position(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of ``op``, those that were left out too, in the order of its schema."""
    rest = op._schema.arguments[len(args) :]
    return (*args, *[kwargs[a.name] if a.name in kwargs else schema_default(a) for a in rest])


#: By what a schema declares: the types that PyTorch's parser takes for it and leaves as they are.
AS_IT_IS: dict[str, tuple[type, ...]] = {
    "int": (int,), "bool": (bool,), "float": (float,), "number": (int, float, bool), "str": (str,),
    "ScalarType": (torch.dtype,), "List[bool]": (list,),
}  # fmt: skip

#: What PyTorch's parser would make of arguments that may be given otherwise: the place of each list of ints, and how
#: often a single int is repeated for it (0: it is a list, a tuple or a size).
Form = tuple[tuple[int, int], ...]


def form_of(op: OpOverload, kinds: tuple[type, ...], tensors: Collection[type]) -> Form | None:
    """The form of arguments of the types ``kinds``, the first of which is a tensor; None if PyTorch's parser has to
    see them. ``tensors``: the types of tensors."""
    schema = op._schema.arguments
    places = [a for a in schema if not a.kwarg_only]
    needed = sum(not a.has_default_value() for a in schema)
    if not needed <= len(kinds) <= len(places) or not kinds or kinds[0] not in tensors:
        return None
    lists = []
    for place, (argument, kind) in enumerate(zip(places, kinds, strict=False)):
        declared = str(argument.real_type)
        if declared.startswith("Optional["):
            declared = declared[len("Optional[") : -1]
            if kind is type(None):
                continue
        if declared == "List[int]" and kind in (list, tuple, torch.Size):
            lists.append((place, 0))
        elif declared == "List[int]" and kind is int and argument.N:  # type: ignore[attr-defined]
            lists.append((place, argument.N))  # type: ignore[attr-defined]
        elif kind not in (tensors if declared == "Tensor" else AS_IT_IS.get(declared, ())):
            return None
    return tuple(lists)


INTS = {int}


def formed(form: Form, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments with lists of ints where ``form`` has them; None if one holds anything else."""
    made = list(args)
    for place, repeated in form:
        made[place] = listed = [args[place]] * repeated if repeated else list(args[place])
        if listed and set(map(type, listed)) != INTS:
            return None
    return tuple(made)


def taken_apart(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run the operators that PyTorch makes of a composite ``op``; what they come to is as it was for ``op``."""
    with DisableTorchFunction():  # or wrappers among the arguments would take it for a call of ``op``
        if op._schema.name not in DROPPING:
            return op.decompose(*args, **kwargs)
        with FactorsDropped():
            return op.decompose(*args, **kwargs)


def has_composite_kernel(op: OpOverload) -> bool:
    """Whether ``op`` is defined by other operators (CompositeImplicitAutograd)."""
    return bool(op.has_kernel_for_dispatch_key(COMPOSITE))


#: Functions and methods whose argument parser is quicker than an overload object's (1.1 against 1.7 µs for sin), for
#: the overloads that take the same arguments.
DIRECT = {
    "default": "sin cos tan tanh sinh cosh exp expm1 log log1p sqrt rsqrt neg abs relu sigmoid reciprocal square sign "
    "mm addmm matmul linear dot t sum mean clone zeros_like ones_like permute unsqueeze maximum minimum erf atan asin "
    "acos addcmul amax amin bmm cumsum cumprod diagonal expand flip logsumexp mv reshape baddbmm convolution "
    "avg_pool2d cat stack embedding gather index_select native_layer_norm native_group_norm view "
    "_log_softmax_backward_data _softmax_backward_data scatter_add narrow",
    "Tensor": "add sub mul div eq ne lt le gt ge",
    "Scalar": "eq ne lt le gt ge",
    "Tensor_Scalar": "pow",
    "int": "transpose select softmax log_softmax",
    "dim": "mean squeeze",
    "dim_IntList": "sum",
    "self": "where",
}
_DIRECT = {
    (name, overload): next(getattr(place, name) for place in (torch, torch.Tensor, functional) if hasattr(place, name))
    for overload, names in DIRECT.items()
    for name in names.split()
}


def direct_call(op: OpOverload) -> Any:
    """The function in ``torch`` that does the same as ``op``, or None."""
    return _DIRECT.get((op._schema.name[6:], op._overloadname)) if op.namespace == "aten" else None
