"""What the door needs to know of an operator, computed once and kept on the overload itself (an attribute read: 0.01 µs)."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from functrans.torch_private import COMPOSITE

#: Pure at the door: its outputs are new tensors.
PURE = 0
#: Some output may share memory with the first argument.
VIEW = 1
#: Writes to an argument.
WRITE = 2
#: Handled by a function of the mutation layer (operators whose schema hides what they write).
SPECIAL = 3


#: In-place operators whose result does not depend on the old contents.
REPLACING = frozenset(f"aten::{n}" for n in ("copy_", "fill_", "zero_", "detach_", "uniform_", "normal_", "bernoulli_"))

#: Functions that stand in for operators whose schema hides what they do; see functrans.special.
SPECIAL_OPERATORS: dict[OpOverload, Any] = {}


class Facts:
    """Facts about one operator overload."""

    __slots__ = (
        "arguments", "composite", "defaults", "functional", "kind", "metadata_write", "op", "plans", "quick", "random",
        "reads_target", "returns_written", "single", "special", "tensor_lists", "written",
    )  # fmt: skip

    def __init__(self, op: OpOverload) -> None:
        schema = op._schema
        self.op = op
        self.arguments: tuple[str, ...] = tuple(a.name for a in schema.arguments)
        self.defaults: tuple[Any, ...] = tuple(a.default_value if a.has_default_value() else None for a in schema.arguments)
        self.composite: bool = op._can_decompose()
        self.random = torch.Tag.nondeterministic_seeded in op.tags
        self.tensor_lists = any("List[" in str(a.type) and "Tensor" in str(a.type) for a in schema.arguments)
        self.single = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
        #: positions (in schema order) of the arguments that are written
        self.written = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
        self.returns_written = any(r.alias_info is not None and r.alias_info.is_write for r in schema.returns)
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        self.metadata_write = torch.Tag.inplace_view in op.tags
        #: function that stands in for the operator at the door: (facts, args, kwargs) -> output
        self.special: Any = SPECIAL_OPERATORS.get(op)
        self.kind = SPECIAL if self.special else WRITE if self.written else VIEW if aliases else PURE
        #: a function that does the same as ``op`` on plain tensors in less time, or None
        self.quick: Any = quick_call(op)
        #: rule of each interpreter class, resolved at first use
        self.plans: dict[type, Any] = {}
        #: pure counterpart of a writing operator; resolved by functrans.mutation
        self.functional: Any = None
        #: whether the new contents of what is written depend on the old ones
        self.reads_target = not (
            schema.name in REPLACING or any(schema.arguments[i].kwarg_only for i in self.written)
        )

    def __repr__(self) -> str:
        return f"<Facts of {self.op}>"


def facts(op: OpOverload) -> Facts:
    """The facts of ``op``."""
    try:
        return op._functrans  # type: ignore[attr-defined]
    except AttributeError:
        op._functrans = found = Facts(op)  # type: ignore[attr-defined]
        return found


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
        full.append(rest.pop(a.name) if a.name in rest else a.default_value)
    return tuple(full), rest


def has_composite_kernel(op: OpOverload) -> bool:
    """Whether ``op`` is defined by other operators (CompositeImplicitAutograd)."""
    return bool(op.has_kernel_for_dispatch_key(COMPOSITE))


#: Names in ``torch`` whose argument parser is quicker than an overload object's (1.1 against 1.7 µs for sin), for the overloads
#: that take the same arguments.
QUICK = {
    "default": "sin cos tan tanh sinh cosh exp expm1 log log1p sqrt rsqrt neg abs relu sigmoid reciprocal square sign mm bmm "
    "addmm mv dot t sum mean clone zeros_like ones_like permute unsqueeze maximum minimum erf atan asin acos addcmul relu abs",
    "Tensor": "add sub mul div eq ne lt le gt ge",
    "Scalar": "eq ne lt le gt ge",
    "Tensor_Scalar": "pow",
    "int": "transpose select",
    "dim": "mean squeeze",
    "dim_IntList": "sum",
    "self": "where",
}
_QUICK = {(name, overload): getattr(torch, name) for overload, names in QUICK.items() for name in names.split()}


def quick_call(op: OpOverload) -> Any:
    return _QUICK.get((op._schema.name[6:], op._overloadname)) if op.namespace == "aten" else None
