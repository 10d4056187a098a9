"""All operators that a transform by a table lacks a rule for, found in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrans.api.checks import call_function, check_callable
from functrans.core.dispatch import lower, map_tensors
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor, wrap
from functrans.decompositions.table import decompose
from functrans.derivatives.constants import READS_NO_VALUES
from functrans.errors import CallTypeError
from functrans.errors.wording import what
from functrans.extension.carried import is_carried
from functrans.extension.missing_rule import rule_to_paste
from functrans.extension.table_interpreter import TableInterpreter
from functrans.extension.without_rule import refused
from functrans.operators.info import op_info
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tree_flatten, tree_map, tree_unflatten


def missing_rules(
    cls: type[TableInterpreter], func: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[OpOverload, str]:
    """What is missing in a transform's table for a function, all of it at once.

    The function runs once, on values, as if every tensor among its arguments carried a payload and every rule passed
    one on.

    Args:
        cls: the transform, a subclass of ``TableInterpreter``.
        func: the function, with the arguments that it is to be transformed on.

    Returns:
        The operators that have no rule, in the order in which they came, each with the lines of a rule to fill in.
        Empty if nothing is missing, or if the table's ``default`` is not an error.

    Example:
        >>> import torch
        >>> from functrans.extend import RuleTable, TableInterpreter, missing_rules
        >>> class Interval(TableInterpreter):
        ...     kind, payload, rules = "interval", ("upper",), RuleTable("intervals")
        >>> _ = Interval.rules.register(torch.ops.aten.exp.default)(lambda interval, x: ...)
        >>> missing = missing_rules(Interval, lambda x: x.exp().sin().flatten(), torch.zeros(2, 2))
        >>> print(*missing.values(), sep=chr(10))
        @Interval.rules.register(torch.ops.aten.sin.default)
        def sin(interpreter, self):
            return interpreter.carry(..., upper=...)
        @Interval.rules.register(torch.ops.aten.view.default)
        def view(interpreter, self, size):
            return interpreter.carry(..., upper=...)
    """
    call = "missing_rules(cls, func, *args)"
    if not (isinstance(cls, type) and issubclass(cls, TableInterpreter)):
        raise CallTypeError(call, f"{what(cls)} as cls", "a subclass of TableInterpreter")
    check_callable("missing_rules", func)
    finder = Finder(cls, func)

    def body() -> None:
        leaves, spec = tree_flatten((args, kwargs), is_carried)
        values = [leaf.value if is_carried(leaf) else leaf for leaf in leaves]
        given = tree_unflatten(spec, [finder.marked(x) if isinstance(x, Tensor) else x for x in values])
        call_function(call, func, *given)

    if cls.without_rule is refused:
        run_transformed(finder, body)
    return {op: rule_to_paste(cls, op) for op in finder.missing}


class Finder(Interpreter):
    """Values that carry something or not."""

    kind = "missing rules"
    payload = ("carries",)

    def __init__(self, cls: type[TableInterpreter], func: Callable[..., Any]) -> None:
        super().__init__(func)
        self.missing: dict[OpOverload, None] = {}
        self.probe = object.__new__(cls)  # to be asked for rules; it never runs

    def marked(self, value: Tensor) -> WrapperTensor:
        wrapper = wrap(self, value)
        wrapper.carries = True
        return wrapper

    def process(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        carrying = False

        def value(a: Any) -> Any:
            nonlocal carrying
            if not self.owns(a):
                return a
            carrying = carrying or not self.is_constant(a)
            return a.value

        values, below_kwargs = tree_map(value, list(args)), tree_map(value, kwargs)
        has_rule = self.probe.rule_for(op) is not None
        if not carrying or (not has_rule and op in READS_NO_VALUES):
            return map_tensors(self.constant, lower(self, op, values, below_kwargs))
        if not has_rule and op_info(op).composite:
            return decompose(self, op, args, kwargs)
        if not has_rule:
            self.missing[op] = None
        return map_tensors(self.marked, lower(self, op, values, below_kwargs))
