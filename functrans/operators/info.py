"""What the door needs to know of an operator, computed once and kept on the overload (an attribute read: 0.01 µs)."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import torch

from functrans.operators.rules import FORGET, RuleTable
from functrans.operators.schemas import Form, direct_call, schema_default
from functrans.operators.scopes import SCOPES, covering, scope_here
from functrans.pytorch.torch_private import OpOverload

#: What goes down the stack: an OpOverload, or a program (see functrans.programs), which has what is asked of one.
Operator: TypeAlias = Any

#: Dtypes whose numbers have derivatives.
DIFFERENTIABLE = frozenset(
    d for d in vars(torch).values() if isinstance(d, torch.dtype) and (d.is_floating_point or d.is_complex)
)


#: Pure at the door: its outputs are new tensors.
PURE = 0
#: Some output may share memory with the first argument.
VIEW = 1
#: Writes to an argument.
WRITE = 2
#: Handled by a function of functionalization/hidden_effects.py (operators whose schema hides what they write).
SPECIAL = 3


#: In-place operators whose result does not depend on the old contents.
REPLACING = frozenset(f"aten::{n}" for n in (
    "copy_", "fill_", "zero_", "detach_", "uniform_", "normal_", "bernoulli_", "random_", "cauchy_", "exponential_",
    "geometric_", "log_normal_",
))  # fmt: skip

#: Operators that copy where they cannot view.
MAY_COPY = frozenset(f"aten::{n}" for n in (
    "reshape", "contiguous", "to", "flatten", "ravel", "reshape_as", "view_as_real", "resolve_conj", "resolve_neg",
    "type_as", "_reshape_alias", "_conj", "_to_cpu", "unflatten", "real", "positive", "expand_as", "data", "float",
))  # fmt: skip
VIEWS_OF_CONTIGUOUS = frozenset(f"aten::{n}" for n in (
    "reshape.", "flatten.using_ints", "ravel.", "reshape_as.", "unflatten.int", "expand_as.",
))  # fmt: skip

#: Functions that stand in for operators whose schema hides what they do: (known, args, kwargs) -> output. See
#: functrans.functionalization.hidden_effects.
STAND_INS: RuleTable[Any] = RuleTable("stand-ins", cached=True, writing=True)

#: The namespaces whose operators are PyTorch's own. Of all others PyTorch may be told more at any time, and tells
#: nobody.
PYTORCH_NAMESPACES = frozenset(("aten", "prims", "prim"))


class OpInfo:
    """What is known of one operator overload."""

    #: whether it is an operator that the library wrote itself: see functrans.programs
    program: ClassVar[bool] = False

    __slots__ = (
        "arguments", "defaults", "defined_by_others", "direct", "forms", "kind", "kind_by_schema", "makes",
        "may_copy", "metadata_write", "op", "random", "reads_target", "returns_written", "settled",
        "single", "specialized", "tensor_lists", "views_by_another", "views_contiguous", "written",
    )  # fmt: skip

    def __init__(self, op: OpOverload) -> None:
        schema = op._schema
        self.op = op
        self.arguments: tuple[str, ...] = tuple(a.name for a in schema.arguments)
        self.defaults: tuple[Any, ...] = tuple(
            schema_default(a) if a.has_default_value() else None for a in schema.arguments
        )
        #: whether all that PyTorch says of it is known for good
        self.settled = op.namespace in PYTORCH_NAMESPACES
        self.defined_by_others: bool = op._can_decompose()
        self.random = torch.Tag.nondeterministic_seeded in op.tags
        #: whether it is a factory, which PyTorch's functions take requires_grad for
        self.makes = "pin_memory" in self.arguments
        self.tensor_lists = any("List[" in str(a.type) and "Tensor" in str(a.type) for a in schema.arguments)
        self.single = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
        #: positions (in schema order) of the arguments that are written
        self.written = tuple(
            i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        )
        self.returns_written = any(r.alias_info is not None and r.alias_info.is_write for r in schema.returns)
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        #: of those whose result is a view: whether they copy where they cannot view, which depends on the strides; and
        #: whether they view whatever is contiguous (``flatten`` of one dimension returns it)
        self.may_copy = aliases and schema.name in MAY_COPY
        self.views_contiguous = aliases and f"{schema.name}.{schema.overload_name}" in VIEWS_OF_CONTIGUOUS
        #: whether another tensor says how it views, if it does, such as ``view_as``
        self.views_by_another = sum(str(a.type) == "Tensor" for a in schema.arguments) > 1
        self.metadata_write = torch.Tag.inplace_view in op.tags
        self.kind_by_schema = WRITE if self.written else VIEW if aliases else PURE
        #: what it is outside of scopes of rules; see ``kind_here``
        self.kind = SPECIAL if STAND_INS.rule_outside(op) is not None else self.kind_by_schema
        #: a function that does the same as ``op`` on plain tensors in less time, or None
        self.direct: Any = direct_call(op)
        #: by the types of arguments; None: PyTorch's parser has to see them
        self.forms: dict[tuple[type, ...], Form | None] = {}
        #: what each interpreter class makes of its rules, and the pure form, outside of scopes (``specialized_here``)
        self.specialized: dict[type, Any] = {}
        #: whether the new contents of what is written depend on the old ones
        self.reads_target = not (
            schema.name in REPLACING or any(schema.arguments[i].kwarg_only for i in self.written)
        )

    def __repr__(self) -> str:
        return f"<OpInfo of {self.op}>"

    @property
    def composite(self) -> bool:
        """Whether the operator is defined by others."""
        return self.defined_by_others if self.settled else self.op._can_decompose()


def specialized_here(known: OpInfo) -> dict[type, Any]:
    """Where what is made of the rules that hold in this context is kept."""
    scope = scope_here() if SCOPES else None
    if scope is None or not any(known.op in s.entries for s in scope.chain() if s.table.cached):
        return known.specialized
    return scope.kept.setdefault(known.op, {})


def kind_here(known: OpInfo) -> int:
    """The operator's kind by the stand-ins that hold in this context."""
    if covering(STAND_INS, known.op) is None:
        return known.kind
    return SPECIAL if known.op in STAND_INS else known.kind_by_schema


def forget_info(table: RuleTable[Any], op: OpOverload) -> None:
    known = op_info(op)
    known.specialized = {}
    known.kind = SPECIAL if STAND_INS.rule_outside(op) is not None else known.kind_by_schema


FORGET.append(forget_info)


def op_info(op: OpOverload) -> OpInfo:
    """What is known of ``op``: whether it is random or ``composite`` (defined by others), its arguments' names."""
    try:
        return op._functrans  # type: ignore[attr-defined]
    except AttributeError:
        op._functrans = found = OpInfo(op)  # type: ignore[attr-defined]
        return found
