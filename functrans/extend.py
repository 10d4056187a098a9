"""The extension points: what a new derivative, batching rule or transform is made of.

A derivative is an entry in a table (``derivative``), a batching rule a function (``batching_rule``). A new transform is
a subclass of ``TableInterpreter`` with a table of rules, or of ``Interpreter`` where its meaning for an operator is no
table. See docs/extending.md, docs/new_transforms.md and docs/interpreters.md. An operator that takes functions is
defined by plain torch code for all transforms (``DEFINITIONS``); see docs/control_flow.md.
"""

from __future__ import annotations

from functrans.control_flow.table import DEFINITIONS
from functrans.core.interpreter import Interpreter
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.derivatives.table import DERIVATIVES, derivative, no_derivative
from functrans.door.autograd_function import FUNCTION_RULES
from functrans.errors import (
    CarriedValueError,
    CustomFunctionError,
    DerivativeEntryError,
    DuplicateRuleError,
    FunctransError,
    MissingRuleError,
    RuleError,
    RuleResultError,
)
from functrans.extension.calls import (
    decompose,
    lower,
    lowered,
    map_tensors,
    op_info,
    run_transformed,
    running_at,
    wrap,
)
from functrans.extension.carried import Carried
from functrans.extension.checkers import CheckFailedError, check_batching_rule, check_derivative, check_transform
from functrans.extension.levels import Handler, PassThrough
from functrans.extension.linearity import is_affine
from functrans.extension.missing_rules import missing_rules
from functrans.extension.primitives import Primitive
from functrans.extension.provenance import Caller, Origin, caller, origin, user_line
from functrans.extension.rule_scopes import overriding, rules_in_scope
from functrans.extension.table_interpreter import TableInterpreter, missing_rule
from functrans.extension.transforming import transform
from functrans.extension.without_rule import as_function
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import BackwardNode
from functrans.interpreters.grad.noted_tape import noting_lines
from functrans.interpreters.grad.pullback_rules import PullbackInterpreter, PullbackTable, Step
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo, batching_rule
from functrans.operators.rules import RuleTable

__all__ = [
    "BATCHING_RULES",
    "DEFINITIONS",
    "DERIVATIVES",
    "FUNCTION_RULES",
    "BackwardNode",
    "BatchInfo",
    "Caller",
    "Carried",
    "CarriedValueError",
    "CheckFailedError",
    "CustomFunctionError",
    "DerivativeEntryError",
    "DuplicateRuleError",
    "FunctransError",
    "GradInterpreter",
    "Handler",
    "Interpreter",
    "JvpInterpreter",
    "MissingRuleError",
    "Origin",
    "PassThrough",
    "Primitive",
    "PullbackInterpreter",
    "PullbackTable",
    "RuleError",
    "RuleResultError",
    "RuleTable",
    "Step",
    "TableInterpreter",
    "VmapInterpreter",
    "WrapperTensor",
    "as_function",
    "batching_rule",
    "caller",
    "check_batching_rule",
    "check_derivative",
    "check_transform",
    "decompose",
    "derivative",
    "interpreter_stack",
    "is_affine",
    "lower",
    "lowered",
    "map_tensors",
    "missing_rule",
    "missing_rules",
    "no_derivative",
    "noting_lines",
    "op_info",
    "origin",
    "overriding",
    "rules_in_scope",
    "run_transformed",
    "running_at",
    "transform",
    "user_line",
    "wrap",
]
