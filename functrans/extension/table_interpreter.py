"""A transform that is a table of rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from functrans.api.checks import check_kind
from functrans.boundary.facades import bare
from functrans.core.dispatch import lower, map_tensors
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import PendingWrapper, WrapperTensor, tensor_of, wrap
from functrans.decompositions.table import decompose
from functrans.derivatives.constants import READS_NO_VALUES
from functrans.errors import CallTypeError, CarriedValueError, MissingRuleError, RegistrationError
from functrans.errors.call_sites import definition
from functrans.errors.wording import shown
from functrans.extension.calls import check_operator
from functrans.extension.carried import Carried
from functrans.extension.case_by_case import check_has_cases
from functrans.extension.missing_rule import missing_rule_error
from functrans.extension.own_metadata import (
    check_no_history,
    check_places,
    without_numbers,
    wrap_by_payload,
)
from functrans.extension.rule_results import check_below, check_carried, checked_result, checked_tree
from functrans.extension.without_rule import policy_of, refused
from functrans.operators.defaults import completed
from functrans.operators.info import op_info
from functrans.operators.rules import RuleTable, place_in
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import HigherOrderOperator, OpOverload, torch_pytree


class TableInterpreter(Interpreter):
    """A transform that is a table of rules.

    A subclass sets ``kind``, ``payload`` (the names of what a wrapper carries beside ``value``) and ``rules``. An
    operator none of whose arguments carries a payload runs one level down, and its result is a constant. For the others
    the order is: a rule, the decomposition of a composite operator, and then what the table's ``default`` says, which
    is MissingRuleError if nothing else is asked for. Nothing passes through in silence. (``ones_like`` and its kind
    read no values of their arguments; without a rule their result is a constant too.)

    A rule is called as ``rule(interpreter, *args, **kwargs)`` with the operator's arguments, in which every tensor is a
    wrapper of this interpreter: ``x.value`` is the value one level down, and ``x.<payload name>`` what it carries, None
    on a constant. It runs one level down, in plain ``torch``, and returns what ``interpreter.carry(value, name=...)``
    makes, for each output of the operator and of its shape, or NotImplemented: this call is as if it had no rule.
    Anything else is a RuleResultError. The functions among the
    arguments of an operator such as ``torch.ops.higher_order.cond`` are code of this level: a rule calls them inside
    ``with running_at(interpreter):``.
    """

    #: The transform's rules; one table per transform.
    rules: ClassVar[RuleTable[Callable[..., Any]]]
    taken_up: ClassVar[RuleTable[Callable[..., Any]] | None] = None
    #: What is done with an operator without a rule: ``rules.default`` as a function.
    without_rule: ClassVar[Callable[..., Any]] = staticmethod(refused)
    #: Whether that is made of the operator's derivative; or of its results case by case. Any function has these.
    derives: ClassVar[bool] = False
    loops: ClassVar[bool] = False
    #: Whether ``shows`` says something of its own.
    shows_own: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.shows_own = cls.shows is not TableInterpreter.shows
        if hasattr(cls, "rules"):
            cls.take_up(cls.rules)

    @classmethod
    def take_up(cls, rules: Any) -> None:
        """Go by the default of the table ``rules``."""
        if not isinstance(rules, RuleTable):
            got, expected = "no rules" if rules is None else f"rules = {shown(rules)}", "rules = RuleTable(title) in it"
            raise RegistrationError(f"class {cls.__name__}: got {got}; expected {expected}.")
        cls.without_rule = staticmethod(policy_of(rules.title, rules.default))
        cls.derives, cls.loops = rules.default == "jvp", rules.default == "loop"
        if cls.loops:
            check_has_cases(cls, TableInterpreter)
        cls.taken_up = rules

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        rules = getattr(self, "rules", None)
        if rules is not self.taken_up or rules is None:  # set after the class was made
            self.take_up(rules)
        #: operators that the policy "decompose" is taking apart, one inside of the other
        self.taking_apart: list[OpOverload] = []

    def enter(self, leaf: Any) -> Any:
        """What the transformed function gets for a leaf of its arguments; runs one level down.

        A ``Carried`` becomes a wrapper of this level. Everything else stays as it is: a tensor is a constant.
        """
        return self.carry(leaf.value, **leaf.payload) if isinstance(leaf, Carried) else leaf

    def leave(self, leaf: Any) -> Any:
        """What the caller gets for a leaf of the transformed function's result; runs one level down.

        A wrapper that carries something becomes a ``Carried``, a constant its value; what is no tensor stays as it is.
        """
        if not isinstance(leaf, Tensor):
            return leaf
        wrapper = self.own(leaf)
        if self.is_constant(wrapper):
            return wrapper.value
        return Carried(wrapper.value, **{name: getattr(wrapper, name) for name in self.payload})

    def carry(self, value: Tensor, **payload: Any) -> WrapperTensor:
        """A wrapper of this level around ``value``, with its payload; names left out are None.

        The value is a tensor of a level below, and so is every tensor in the payload, which may be any Python value.

        Raises:
            CarriedValueError: one of them belongs to this level, or to one further in.
        """
        if type(value) is PendingWrapper:  # what an operator that has nothing to do with the level below returned
            value = tensor_of(value)
        if not isinstance(value, Tensor):
            raise CarriedValueError(
                self, "value", f"a {type(value).__name__}", "a tensor", "Numbers and the like are payload."
            )
        check_below(self, "value", value)
        for name, carried in payload.items():
            check_carried(self, name, carried)
        wrapper = wrap_by_payload(self, bare(value), payload) if self.shows_own else wrap(self, bare(value))
        for name in self.payload:
            setattr(wrapper, name, payload.pop(name, None))
        if payload:
            raise CallTypeError(
                f"carry of {self.name}", f"a payload {sorted(payload)}", f"names of its payload, {self.payload}"
            )
        return wrapper

    def shows(self, value: Tensor, **payload: Any) -> tuple[Sequence[int], torch.dtype]:
        """The shape and dtype of what a wrapper with this payload stands for; those of ``value`` unless overridden.

        A subclass whose payload says how to read the value (a scale, the other factor of a product) overrides it. It is
        called with all names of the payload, at least one of which is not None; a constant shows its value's.
        """
        return value.shape, value.dtype

    def cases(self, wrapper: WrapperTensor) -> Sequence[Tensor]:
        """For ``default="loop"``: the values that ``wrapper``, which carries a payload, stands for.

        They are values of the levels below, as many for each wrapper, of the shape and dtype that it shows.
        """
        raise NotImplementedError

    def of_cases(self, values: Sequence[Tensor]) -> WrapperTensor:
        """For ``default="loop"``: a wrapper, made by ``carry``, that stands for these values."""
        raise NotImplementedError

    def own(self, x: Tensor) -> WrapperTensor:
        """``x`` as a wrapper of this level: itself, or the constant that it is here."""
        if type(x) is WrapperTensor:
            if x.view_link is not None and x.interpreter.alive:
                x.view_link.refresh(x)
            if x.interpreter is self:
                return x
        return self.constant(x)

    def constant(self, value: Tensor) -> WrapperTensor:
        return self.carry(value)

    def rewrap(self, source: WrapperTensor, value: Tensor) -> WrapperTensor:
        if self.shows_own:
            return self.carry(value, **{name: getattr(source, name) for name in self.payload})
        return super().rewrap(source, value)

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        return everywhere and not self.shows_own  # a payload by which the value is read goes with the value

    def aligned(self, old: WrapperTensor, new: WrapperTensor) -> tuple[Tensor, WrapperTensor]:
        if not self.shows_own:
            return super().aligned(old, new)
        check_no_history(self, old)
        return new.value, new

    def describe(self, wrapper: WrapperTensor) -> str:
        return "constant" if self.is_constant(wrapper) else ""

    def parts(self, wrapper: WrapperTensor) -> dict[str, Any]:
        return {} if self.is_constant(wrapper) else {name: getattr(wrapper, name) for name in self.payload}

    def rule_place(self, op: Any) -> str | None:
        found = place_in(op, self.rules)
        return definition(self.without_rule) if found is None and callable(self.rules.default) else found

    def rule_for(self, op: Any) -> Callable[..., Any] | None:
        """The rule of ``op``, or None; a subclass may know more than its table."""
        return self.rules.get(op)

    def process(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        carrying, owned = False, True

        def value(a: Any) -> Any:
            nonlocal carrying, owned
            if type(a) is WrapperTensor and a.interpreter is self:
                carrying = carrying or not self.is_constant(a)
                owned = owned and a.view_link is None
                return a.value
            owned = False
            return a

        values, kwarg_values = map_tensors(value, args), {k: map_tensors(value, a) for k, a in kwargs.items()}
        rule = self.rule_for(op)
        if self.shows_own and carrying:
            check_places(self, op)
            if rule is None and op in READS_NO_VALUES:
                values = map_tensors(lambda a: without_numbers(self, a), args)
        if not (carrying or self.sees_everything) or (rule is None and op in READS_NO_VALUES):
            return map_tensors(self.constant, lower(self, op, values, kwarg_values))
        composite = op_info(op).composite
        if rule is None and composite:
            return decompose(self, op, args, kwargs)

        entered, entered_kwargs = args, kwargs
        if not owned:
            entered = map_tensors(self.own, args)
            entered_kwargs = {k: map_tensors(self.own, a) for k, a in kwargs.items()}
        if rule is not None:
            out = self.run_rule(rule, op, entered, entered_kwargs)
            if out is not NotImplemented:
                return out
            if composite:
                return decompose(self, op, args, kwargs)
        if not carrying:
            return map_tensors(self.constant, lower(self, op, values, kwarg_values))
        return self.without_rule(self, op, entered, entered_kwargs)

    def run_rule(self, rule: Callable[..., Any], op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What ``rule`` makes of ``op``, or NotImplemented; the tensors in its arguments are wrappers of this level."""
        with lowered(self):
            out = completed(rule, op, 1)(self, *args, **kwargs)
        return out if out is NotImplemented else checked_result(self, op, out, args, kwargs)

    def process_higher_order(self, op: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = self.rule_for(op)
        if rule is None:
            return NotImplemented

        def mine(a: Any) -> Any:
            return self.own(a) if isinstance(a, Tensor) else a

        entered, entered_kwargs = torch_pytree.tree_map(mine, (args, kwargs))
        with lowered(self):
            out = rule(self, *entered, **entered_kwargs)
        return out if out is NotImplemented else checked_tree(self, op, out)


def missing_rule(interpreter: TableInterpreter, op: OpOverload) -> MissingRuleError:
    """The error for an operator without a rule: names operator, transform, levels and file, with the lines to paste."""
    call = "missing_rule(interpreter, op)"
    check_kind(call, "interpreter", interpreter, TableInterpreter, "a TableInterpreter")
    check_operator(call, op)
    return missing_rule_error(interpreter, op)
