"""The pure form of an operator that writes: the same operator, returning what it would have written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functrans.functionalization.layouts import copied_like
from functrans.operators.info import OpInfo, specialized_here
from functrans.operators.rules import RuleTable
from functrans.operators.scopes import SCOPES
from functrans.pytorch import thread_state
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


class Functional:
    """The pure form of a writing operator: called with the writing operator's arguments."""

    def __init__(self, op: OpOverload, known: OpInfo) -> None:
        self.op = op
        written = known.op._schema.arguments
        self.out_names = {written[i].name for i in known.written if written[i].kwarg_only}
        self.drops_out = bool(self.out_names)
        # PyTorch leaves out arguments that have the writing operator's default; the pure one may have none
        # (bernoulli_'s p)
        positional = [a for a in op._schema.arguments if not a.kwarg_only]
        self.names = tuple(a.name for a in positional)
        self.required = max((i + 1 for i, a in enumerate(positional) if not a.has_default_value()), default=0)
        self.defaults = {a.name: a.default_value for a in written if a.has_default_value()}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.drops_out:
            kwargs = {k: v for k, v in kwargs.items() if k not in self.out_names}
        if len(args) < self.required and self.defaults:
            args = (*args, *[self.defaults[n] for n in self.names[len(args) : self.required] if n not in kwargs])
        return thread_state.DOOR.enter(self.op, args, kwargs)


class FunctionalFactory(Functional):
    """Of an operator that makes a tensor, such as ``zeros.out``: it makes one as ``out`` is."""

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (name,) = self.out_names
        return super().__call__(args, {**kwargs, "dtype": kwargs[name].dtype, "device": kwargs[name].device})


def pure_copy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``copy_``: the source, in the dtype, device, shape and strides of what it is written to."""
    target, source, enter = args[0], args[1], thread_state.DOOR.enter
    if not isinstance(source, torch.Tensor):
        if not isinstance(source, complex) or target.dtype.is_complex:
            return enter(aten.full_like.default, (target, source), {})
        source = enter(aten.scalar_tensor.default, (source,), {"dtype": torch.complex128})  # its real part is taken
    if source.dtype is not target.dtype or source.device != target.device:
        source = enter(aten._to_copy.default, (source,), {"dtype": target.dtype, "device": target.device})
    if source.shape != target.shape:
        source = enter(aten.expand.default, (source, list(target.shape)), {})
    return copied_like(target, source)


def pure_copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return [pure_copy(pair, {}) for pair in zip(args[0], args[1], strict=True)]


def pure_zeros(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return [pure_zero((x,), {}) for x in args[0]]


def pure_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return thread_state.DOOR.enter(aten.zeros_like.default, args, kwargs)


def pure_polygamma(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return thread_state.DOOR.enter(aten.polygamma.default, (args[1], args[0]), kwargs)


#: Pure forms that are not an operator of the same name: those exist without a derivative at the base.
PURE_FORMS: RuleTable[Callable[..., Any]] = RuleTable("pure forms", cached=True, writing=True)
PURE_FORMS.add(aten.copy_.default, pure_copy)
PURE_FORMS.add(aten.zero_.default, pure_zero)
PURE_FORMS.add(aten._foreach_copy_.default, pure_copies)
PURE_FORMS.add(aten._foreach_zero_.default, pure_zeros)
PURE_FORMS.add(aten.polygamma_.default, pure_polygamma)


#: What a factory can be told of the tensor that it makes, and its form with ``out`` reads off that.
OPTIONS = ("dtype", "layout", "device", "pin_memory")
#: Factories that write no element: what ``out`` holds stays there.
UNWRITTEN = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")


def pure_form(known: OpInfo) -> Any:
    """The pure form of a writing operator; NotImplemented if there is none."""
    specialized = known.specialized if not SCOPES else specialized_here(known)
    try:
        return specialized[Functional]
    except KeyError:
        found = PURE_FORMS.get(known.op) or by_name(known)
        if known.settled or found is not NotImplemented:  # one may be defined yet
            specialized[Functional] = found
        return found


def by_name(known: OpInfo) -> Any:
    """The operator that does the same without writing, by its name and schema; NotImplemented if there is none."""
    op = known.op
    schema = op._schema
    namespace, name = schema.name.split("::")
    library = getattr(torch.ops, namespace)
    out_form = any(schema.arguments[i].kwarg_only for i in known.written)
    wanted = [(a.name, str(a.type)) for i, a in enumerate(schema.arguments) if not (out_form and i in known.written)]
    names = [name] if out_form else []
    if name.endswith("_") and not name.endswith("__"):
        names += [name[:-1], name[:-1] + "_functional"]
    elif name.startswith("__i") and name.endswith("__"):
        names += ["__" + name[3:], name[3:-2]]
    names += [name + "_functional", name]
    for candidate in names:
        packet = getattr(library, candidate, None)
        if packet is None:
            continue
        overloads = [getattr(packet, o) for o in packet.overloads()]
        overloads.sort(key=lambda o: o._overloadname != op._overloadname)
        for other in overloads:
            other_schema = other._schema
            if any(a.alias_info is not None and a.alias_info.is_write for a in other_schema.arguments):
                continue
            taken = [(a.name, str(a.type)) for a in other_schema.arguments]
            if taken == wanted and other_schema.returns:
                return Functional(other, known)
            chosen = [a for a in taken if a[0] in OPTIONS]
            if out_form and len(chosen) == len(OPTIONS) and [a for a in taken if a not in chosen] == wanted:
                return FunctionalFactory(other, known) if name not in UNWRITTEN else NotImplemented
    return NotImplemented
