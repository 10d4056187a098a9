"""Reverse mode with rules for the walk back along the tape.

NOTE [Pullback rules]
A table of them belongs to a subclass of ``PullbackInterpreter``; ``grad`` itself knows nothing of them, and pays
nothing. An operator that has a rule is run as without one, on a tape of its own, with a fresh wrapper for each argument
that is tracked: so the rule can tell the arguments apart, a composite operator is one step, and the ordinary pullback
is there for the rule to ask for. The tape of the level gets one record for all of it, whose node calls the rule.

What a rule says is plain torch code of the level below, as formulas of the derivative table are. So it is batched,
differentiated and recorded by the transforms around.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from functrans.core.dispatch import unwrap
from functrans.core.tensor import WrapperTensor
from functrans.decompositions.table import decompose
from functrans.derivatives.table import DERIVATIVES, NO_TANGENT
from functrans.errors import CallValueError, MissingRuleError, RegistrationError, RuleResultError
from functrans.errors.wording import FUNCTIONS_TAKEN, shown
from functrans.interpreters.fitting import described, fitted, spec
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import BackwardNode, TableNode
from functrans.interpreters.grad.recording import GRAD_RULES
from functrans.operators.info import OpInfo, op_info
from functrans.operators.rules import RuleTable
from functrans.pytorch.torch_private import HigherOrderOperator, OpOverload
from functrans.tensors.pytrees import tensors_in


class PullbackTable(RuleTable[Callable[..., Any]]):
    """The rules of a ``PullbackInterpreter``: what happens to operators on the way back.

    A rule is called as ``rule(step, ...)``, with a ``Step`` and what its further parameters name: ``grad`` (the
    cotangent of the output; ``grads``, a list with None where there is none, for operators with several outputs),
    ``result`` (the output; ``results``), or an argument of the operator by the name that its schema gives it. Tensors
    are of the level below. Only what is named is saved.

    It returns None, and the ordinary cotangents go on; or a dict of cotangents by the names of arguments, which take
    the place of the ordinary ones. None in the dict is no cotangent; arguments that it does not name get the ordinary
    one.

    Args:
        title: what messages call it.
        default: what happens to a differentiable operator without a rule: ``"derivative"``, the ordinary pullback;
            ``"error"``, a MissingRuleError; or a rule ``(step, ...)`` for all of them, which may name ``grads`` and
            ``results`` (lists for all operators) and ``inputs``, a dict of the tracked arguments by name. In the latter
            two cases composite operators are taken apart first.

    Example:
        >>> from functrans.extend import PullbackTable
        >>> import torch
        >>> table = PullbackTable("guided backpropagation")
        >>> @table.register(torch.ops.aten.relu.default)
        ... def relu(step, grad):
        ...     return step.pull(grad.clamp(min=0))
    """

    def __init__(self, title: str, *, default: str | Callable[..., Any] = "derivative") -> None:
        super().__init__(title, default=default)
        if callable(default):
            self.check_names("the default rule", default, {"grads", "results", "inputs"})
        elif not isinstance(default, str) or default not in ("derivative", "error"):
            named = title if isinstance(title, str) else shown(title)
            expected = "'derivative', 'error' or a rule (step, ...)"
            raise RegistrationError(f"{named}: got default={shown(default)}; expected {expected}.")

    def check(self, op: Any) -> None:
        if isinstance(op, HigherOrderOperator):
            got = f"got torch.ops.higher_order.{op}, which takes functions; expected an operator of tensors."
            raise RegistrationError(f"{self.title}: {got} {FUNCTIONS_TAKEN}")
        super().check(op)

    def check_rule(self, op: OpOverload, rule: Any) -> None:
        super().check_rule(op, rule)
        info = op_info(op)
        known = {*info.arguments, *(("grad", "result") if info.single else ("grads", "results"))}
        self.check_names(f"a rule for {op}", rule, known)

    def check_names(self, what: str, rule: Callable[..., Any], known: set[str]) -> None:
        expected = f"rule(step, ...), where further parameters are among {sorted(known)}"
        try:
            names = parameters(rule)
        except (TypeError, ValueError):  # a builtin
            raise RegistrationError(
                f"{self.title}: got {what} that does not say what it asks for, {shown(rule)}; expected {expected}."
            ) from None
        unknown = [n for n in names[1:] if n not in known]
        if not names or unknown:
            got = f"{what} that asks for {unknown}" if names else f"{what} without parameters"
            raise RegistrationError(f"{self.title}: got {got}; expected {expected}.")


def parameters(rule: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a rule's parameters that have no default; rules get them by position."""
    names = NAMES.get(rule)
    if names is None:
        given = inspect.signature(rule).parameters.values()
        names = NAMES[rule] = tuple(p.name for p in given if p.default is p.empty)
    return names


#: the names of rules' parameters, as far as they were asked for
NAMES: WeakKeyDictionary[Callable[..., Any], tuple[str, ...]] = WeakKeyDictionary()
#: the level whose tape is walked
WALKING: ContextVar[PullbackInterpreter] = ContextVar("functrans.interpreters.grad.pullback_rules")


class PullbackInterpreter(GradInterpreter):
    """Reverse mode with rules for the way back: a subclass has a table of them as ``pullbacks``.

    A rule may change the cotangents that go on, and it may note something about an argument without changing them: in a
    second lane, which ``noted`` reads. See NOTE [Pullback rules].

    Example:
        >>> import torch
        >>> from functrans.extend import PullbackInterpreter, PullbackTable, run_transformed
        >>> class Largest(PullbackInterpreter):
        ...     pullbacks = PullbackTable("largest cotangents")
        >>> @Largest.pullbacks.register(torch.ops.aten.mul.Tensor)
        ... def mul(step, grad):
        ...     step.note("self", grad.abs().max())
        >>> level = Largest()
        >>> x = level.track(torch.tensor([1.0, 2.0]))
        >>> y = run_transformed(level, lambda: ((x * 3) ** 2).sum(), enable_grad=True)
        >>> level.pull({y.tape_index: torch.tensor(1.0)}, consume=True)[x.tape_index]
        tensor([18., 36.])
        >>> level.noted(x)
        [tensor(12.)]
    """

    pullbacks: ClassVar[PullbackTable]

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        super().__init__(func)
        if not isinstance(getattr(self, "pullbacks", None), PullbackTable):
            cls = type(self).__name__
            raise RegistrationError(
                f"class {cls} has no pullback rules; expected pullbacks = PullbackTable(title) in it."
            )
        #: the second lane: by tape index, what rules noted on the last walk, in its order
        self.lane: dict[int, list[Any]] = {}

    def pull(self, cotangents: dict[int, Tensor], *, consume: bool, end: int | None = None) -> dict[int, Tensor]:
        self.lane = {}
        token = WALKING.set(self)
        try:
            return super().pull(cotangents, consume=consume, end=end)
        finally:
            WALKING.reset(token)

    def noted(self, wrapper: WrapperTensor) -> list[Any]:
        """What rules noted about a tracked ``wrapper`` on the last walk: an entry for each use, the last use first."""
        index = self.index_of(wrapper)
        return [] if index is None else self.lane.get(index, [])

    def rule_place(self, op: Any) -> str | None:
        return self.pullbacks.place(op) if op in self.pullbacks else super().rule_place(op)

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known = op_info(op)
        rule = None if known.program else self.pullbacks.get(op)
        if rule is None and (known.program or self.pullbacks.default == "derivative"):
            return super().process(op, args, kwargs)
        return self.by_rule(rule, known, args, kwargs)

    def by_rule(self, rule: Any, known: OpInfo, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator that has a rule, or (None) gets the default."""
        op = known.op
        values, below, indices = unwrap(self, op, args, kwargs)
        if not indices or not torch.is_grad_enabled():
            return super().process(op, args, kwargs)
        if rule is None:
            entry = DERIVATIVES.get(op)
            if op in GRAD_RULES or (entry is not None and entry.tangent == NO_TANGENT):
                return super().process(op, args, kwargs)
            if known.composite:
                return decompose(self, op, args, kwargs)
            if self.pullbacks.default == "error":
                why = f"Register one: @{type(self).__name__}.pullbacks.register(torch.ops.{op})."
                raise MissingRuleError(op, self, why)
            rule = self.pullbacks.default
        fresh = [self.fresh(a, indices.get(i)) for i, a in enumerate(args)]
        named = {name: self.fresh(a, indices.get(known.arguments.index(name))) for name, a in kwargs.items()}
        tape, self.tape = self.tape, type(self.tape)()
        try:
            out = super().process(op, fresh, named)
        finally:
            records, self.tape = self.tape, tape
        outs = self.indices_in(out)
        if outs is None or (isinstance(outs, list) and all(index is None for index in outs)):
            return out  # nothing is pulled back: a comparison, a position, what is detached
        given = {**dict(zip(known.arguments, fresh, strict=False)), **named}
        inside = {known.arguments[i]: self.indices_in(given[known.arguments[i]]) for i in indices}
        arguments = dict(zip(known.arguments, known.defaults, strict=True))
        arguments.update(zip(known.arguments, values, strict=False))
        arguments.update(below)
        result = self.value_of(out)
        rest = {"result": result, "results": result if isinstance(result, list) else [result]}
        rest["inputs"] = [arguments[name] for name in inside]
        ins = list(indices.values())
        node = RuledNode(op, rule, [record[:3] for record in records], ins, inside, outs)
        node.specs = {name: spec(arguments[name]) for name in inside}
        kept = [rest[name] if name in rest else arguments[name] for name in node.saves]
        self.record(node, outs, ins, [kept, [record[3] for record in records]])
        return out

    def fresh(self, a: Any, index: Any) -> Any:
        """An argument with an index of its own, if it is tracked."""
        if index is None:
            return a
        if isinstance(index, list):
            return [x if i is None else self.track(x.value) for x, i in zip(a, index, strict=True)]
        return self.track(a.value)

    def indices_in(self, tree: Any) -> Any:
        return [self.index_of(x) for x in tree] if isinstance(tree, list | tuple) else self.index_of(tree)

    def value_of(self, out: Any) -> Any:
        if isinstance(out, list | tuple):
            return [self.value_of(o) for o in out]
        return out.value if self.owns(out) else out


class Step:
    """One operator on the way back, as a rule sees it.

    Attributes:
        interpreter: the level whose tape is walked.
        op: the operator.
        names: the arguments that are tracked. Cotangents of others are not asked for.
    """

    def __init__(self, interpreter: PullbackInterpreter, node: RuledNode, grad: Any, saved: list[Any]) -> None:
        self.interpreter = interpreter
        self.op = node.op
        self.names = tuple(node.inside)
        self._node = node
        self._grad = grad
        self._saved = saved

    def __repr__(self) -> str:
        return f"<Step of {self.op} for {', '.join(self.names)}, {self.interpreter.name}>"

    def index(self, name: str) -> Any:
        """The tape index of an argument (of a list of tensors: a list), None if it is not tracked."""
        self._check(name)
        return self._node.ins.get(name)

    def _check(self, *names: Any) -> None:
        known = op_info(self.op).arguments
        for name in names:
            if name not in known:
                raise CallValueError(f"a rule of {self.op}", f"{shown(name)} as argument", f"one of {known}")

    def pull(self, grad: Any = None, *names: str) -> dict[str, Any]:
        """The ordinary cotangents by argument, of ``grad`` in the place of the one that came (None: of that).

        ``names``: of which arguments; none: of all that are tracked.
        """
        self._check(*names)
        if grad is None:
            grad = self._grad
        elif spec(grad) != spec(self._grad):
            raise CallValueError(f"pull in a rule of {self.op}", described(grad), described(self._grad))
        wanted = [n for n in names or self.names if n in self.names]
        return self._node.ordinary(self.interpreter, self._saved, grad, wanted)

    def note(self, name: str, entry: Any) -> None:
        """Note ``entry`` in the second lane of an argument (of a list of tensors: an entry for each); one that is not
        tracked has none."""
        index = self.index(name)
        pairs = zip(index, entry, strict=True) if isinstance(index, list) else [(index, entry)]
        for i, e in pairs:
            if i is not None:
                self.interpreter.lane.setdefault(i, []).append(e)


class RuledNode(BackwardNode):
    """What pulls back through one operator by a rule.

    Saved is what the rule names, and what the operator's own records saved.
    """

    #: shape and dtype of the tracked arguments
    specs: dict[str, Any]

    def __init__(
        self,
        op: OpOverload,
        rule: Callable[..., Any],
        records: list[tuple[Any, Any, Any]],
        ins: list[Any],
        inside: dict[str, Any],
        outs: Any,
    ) -> None:
        self.op = op
        self.rule = rule
        #: what the operator wrote on a tape of its own, without what was saved
        self.records = records
        #: the indices of the tracked arguments by name: on the level's tape, and on the operator's own
        self.ins, self.inside = dict(zip(inside, ins, strict=True)), inside
        self.outs = outs
        #: what the rule asks for
        self.needs = parameters(rule)[1:]
        self.saves = [n for n in self.needs if n not in ("grad", "grads")]

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        step = Step(WALKING.get(), self, grad, saved[1])
        kept = dict(zip(self.saves, saved[0], strict=True))
        kept["grad"], kept["grads"] = grad, grad if isinstance(grad, list) else [grad]
        if "inputs" in kept:
            kept["inputs"] = dict(zip(self.inside, kept["inputs"], strict=True))
        found = self.rule(step, *[kept[n] for n in self.needs])
        if found is None:
            found = {}
        elif not isinstance(found, dict) or not all(n in op_info(self.op).arguments for n in found):
            got = f"a dict with {list(found)}" if isinstance(found, dict) else described(found)
            raise self.unfit(step.interpreter, got, f"a dict by names of {op_info(self.op).arguments}, or None")
        missing = [n for n in self.inside if n not in found]
        if missing:
            found = {**found, **step.pull(None, *missing)}
        return [self.fit(step.interpreter, n, found[n], self.specs[n]) for n in self.inside]

    def ordinary(
        self, interpreter: PullbackInterpreter, saved: list[Any], grad: Any, names: list[str]
    ) -> dict[str, Any]:
        """The cotangents of these arguments as without a rule; ``saved``: by the operator's own records."""
        if not names:
            return {}
        only = self.records[0][0] if len(self.records) == 1 else None  # of a composite, it may be of another operator
        if type(only) is TableNode and only.op is self.op and not isinstance(self.outs, list):
            return dict(zip(names, only.pull_some(saved[0], grad, names), strict=True))
        part = copy.copy(interpreter)  # the walk along the operator's own tape; hooks have seen the cotangents
        part.tape = [(*record, kept) for record, kept in zip(self.records, saved, strict=True)]
        part.hooks = None
        grads = zip(self.outs, grad, strict=True) if isinstance(self.outs, list) else [(self.outs, grad)]
        seeds = {o: g for o, g in grads if o is not None and g is not None}
        cotangents = GradInterpreter.pull(part, seeds, consume=False)
        return {
            n: [cotangents.get(i) for i in self.inside[n]] if isinstance(self.inside[n], list)
            else cotangents.get(self.inside[n])
            for n in names
        }  # fmt: skip

    def fit(self, interpreter: PullbackInterpreter, name: str, cotangent: Any, given: Any) -> Any:
        if cotangent is None:
            return [None] * len(given) if isinstance(given, list) else None
        if isinstance(given, list):
            if not isinstance(cotangent, list | tuple) or len(cotangent) != len(given):
                raise self.unfit(interpreter, described(cotangent), f"a list of {len(given)} for {name!r}")
            pairs = zip(cotangent, given, strict=True)
            return [None if c is None else self.fit(interpreter, name, c, g) for c, g in pairs]
        return fitted(cotangent, given, lambda got, expected: self.unfit(interpreter, f"{got} for {name!r}", expected))

    def unfit(self, interpreter: PullbackInterpreter, got: str, expected: str) -> RuleResultError:
        cure = "Return cotangents by the names of arguments, or None for the ordinary ones."
        return RuleResultError(self.op, interpreter, interpreter.rule_place(self.op), got, expected, cure)

    def protect(self, saved: list[Any], target: Tensor) -> list[Any]:
        kept, inner = saved
        inner = [node.protect(k, target) for (node, _, _), k in zip(self.records, inner, strict=True)]
        return [super().protect(kept, target), inner]

    def saved_tensors(self, saved: list[Any]) -> list[Tensor]:
        kept, inner = saved
        records = zip(self.records, inner, strict=True)
        return [*tensors_in(kept), *(x for (node, _, _), k in records for x in node.saved_tensors(k))]
