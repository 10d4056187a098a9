"""A rule that is registered, replaced or taken out counts from then on, however often its operator was used before:
every table, every way in.
"""

from __future__ import annotations

import importlib
import itertools
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import functrans
from functrans import grad, jvp, vmap
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.table import Derivative
from functrans.door.autograd_function import FUNCTION_RULES
from functrans.errors import DataDependentError
from functrans.extend import BATCHING_RULES, DEFINITIONS, DERIVATIVES, RuleTable, rules_in_scope
from functrans.functionalization.hidden_effects import stands_in_for
from functrans.functionalization.out_of_place import PURE_FORMS
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.recording import GRAD_RULES
from functrans.interpreters.jvp.interpreter import JVP_RULES
from functrans.interpreters.vmap.rules.random import RANDOM_RULES
from functrans.operators.info import STAND_INS

aten = torch.ops.aten
X = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
Y = torch.tensor([2.0, -0.5, 1.5], dtype=torch.float64)
MARK = 7.0

Change = Callable[..., Any]


@contextmanager
def for_good(table: RuleTable[Any], op: Any, rule: Any) -> Iterator[None]:
    """The table has ``rule`` for ``op`` (None: no rule), for everybody; afterwards what it had."""
    before, place = table.get(op), table.place(op) if op in table else None
    table.remove(op)
    if rule is not None:
        table.add(op, rule)
    try:
        yield
    finally:
        table.remove(op)
        if before is not None:
            table.add(op, before, place=place)


def in_scope(table: RuleTable[Any], op: Any, rule: Any) -> Any:
    return rules_in_scope(table, {op: rule})


CHANGES = pytest.mark.parametrize("changed", (for_good, in_scope), ids=("for good", "in a scope"))


def entry(op: Any) -> Derivative:
    """An entry by which every derivative of ``op`` is MARK."""
    arguments = tuple(a.name for a in op._schema.arguments)
    tensors = [a.name for a in op._schema.arguments if "Tensor" in str(a.type)]
    formulas = {name: lambda grad: MARK * grad for name in tensors}
    return Derivative(op, formulas, "elementwise", arguments, 1, dict.fromkeys(tensors, ("grad",)), True)


def batching(info: Any, in_dims: Any, *args: Any) -> Any:
    return next((torch.full_like(a, MARK), d) for a, d in zip(args, in_dims, strict=True) if d is not None)


# ---- pointwise operators: programs, and all the short ways in

WAYS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "torch.sin(x)": (aten.sin.default, torch.sin),
    "x.sin()": (aten.sin.default, lambda x: x.sin()),
    "aten.sin(x)": (aten.sin.default, aten.sin.default),
    "relu": (aten.relu.default, torch.nn.ReLU()),
    "x * y": (aten.mul.Tensor, lambda x: x * Y.clone()[0]),
    "y * x": (aten.mul.Tensor, lambda x: Y.clone()[0] * x),
    "x * 2": (aten.mul.Tensor, lambda x: x * 2.0),
    "torch.mul(x, y)": (aten.mul.Tensor, lambda x: torch.mul(x, Y[0])),
    "2 / x": (aten.reciprocal.default, lambda x: 1.0 / x),
    "x / y": (aten.div.Tensor, lambda x: x / Y[0]),
    "x - y": (aten.sub.Tensor, lambda x: x - Y[0]),
    "2 - x": (aten.rsub.Scalar, lambda x: 2 - x),
    "x ** 2": (aten.pow.Tensor_Scalar, lambda x: x**2),
    "softmax": (aten.sigmoid.default, torch.sigmoid),
    "x.sin_()": (aten.sin.default, lambda x: x.clone().sin_()),
}

USES: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "jvp": lambda f: jvp(f, (X,), (torch.ones_like(X),))[1],
    "vmap(grad)": lambda f: vmap(grad(f))(X),
    "grad(vmap)": lambda f: grad(lambda x: vmap(f)(x).sum())(X),
    "jvp(vmap(grad(vmap)))": lambda f: jvp(lambda s: vmap(grad(lambda x: vmap(f)(x).sum()))(s * torch.stack([X])),
        (X[0] * 0 + 1,), (X[0] * 0 + 1,))[0][0],
    "grad(jvp)": lambda f: grad(lambda t: jvp(f, (X,), (t,))[1].sum())(torch.ones_like(X)),
    "inside grad": lambda f: grad(lambda x: f(x.cos() + 0).sum())(X) / -X.sin(),
}  # fmt: skip


THOROUGH = ("torch.sin(x)", "x * 2")


@CHANGES
@pytest.mark.parametrize(
    ("way", "use"), [(way, use) for way in WAYS for use in USES if way in THOROUGH or use in ("grad", "jvp")]
)
def test_derivative_of_a_pointwise_operator(way: str, use: str, changed: Change) -> None:
    op, f = WAYS[way]
    run = USES[use]
    before = run(f)
    assert not torch.allclose(before, torch.full_like(before, MARK))
    with changed(DERIVATIVES, op, entry(op)):
        torch.testing.assert_close(run(f), torch.full_like(X, MARK))
    if way != "x * 2":  # PyTorch cannot run its own forward formula of a product with a number on tensors without data
        with changed(DERIVATIVES, op, None):
            torch.testing.assert_close(run(f), before)
    torch.testing.assert_close(run(f), before, rtol=0, atol=0)


@CHANGES
@pytest.mark.parametrize("way", WAYS)
def test_batching_rule_of_a_pointwise_operator(way: str, changed: Change) -> None:
    op, f = WAYS[way]
    uses = (
        lambda: vmap(f)(X),
        lambda: vmap(lambda x: f(x.clone()))(X),
        lambda: grad(lambda x: (x * vmap(f)(X)).sum())(X),
    )
    before = [use() for use in uses]
    with changed(BATCHING_RULES, op, batching):
        for use in uses:
            assert use().tolist() == [MARK] * 3
    for use, was in zip(uses, before, strict=True):
        assert torch.equal(use(), was)


@CHANGES
@pytest.mark.parametrize("way", WAYS)
def test_stand_in_for_a_pointwise_operator(way: str, changed: Change) -> None:
    op, f = WAYS[way]
    stand_in = lambda known, args, kwargs: aten.full_like.default(args[0], MARK)
    before = vmap(f)(X)
    with changed(STAND_INS, op, stand_in):
        assert vmap(f)(X).tolist() == [MARK] * 3
        assert not grad(lambda x: f(x).sum())(X).any()
    assert torch.equal(vmap(f)(X), before)


# ---- every table

LIB = torch.library.Library("forgotten", "DEF")
LIB.define("twice(Tensor x) -> Tensor")
LIB.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
LIB.define("draw(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
LIB.impl("draw", lambda x: torch.rand_like(x) + x, "CompositeExplicitAutograd")
twice, draw = torch.ops.forgotten.twice.default, torch.ops.forgotten.draw.default


class Case(NamedTuple):
    table: RuleTable[Any]
    op: Any
    use: Callable[[], Tensor]
    rule: Any


def quietly(use: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return use()


def seven(x: Tensor) -> Tensor:
    return torch.full_like(x, MARK)


CASES = {
    "derivative": Case(DERIVATIVES, aten.cumsum.default, lambda: grad(lambda x: x.cumsum(0).sum())(X),
        entry(aten.cumsum.default)),
    "tangent": Case(DERIVATIVES, aten.cumsum.default, lambda: jvp(lambda x: x.cumsum(0), (X,), (X * 0 + 1,))[1],
        entry(aten.cumsum.default)),
    "batching": Case(BATCHING_RULES, aten.cumsum.default, lambda: vmap(lambda x: x.cumsum(0))(X[:, None]), batching),
    "batching of an operator without a rule": Case(BATCHING_RULES, twice, lambda: vmap(twice)(X), batching),
    "batching of a random operator": Case(BATCHING_RULES, draw, lambda: vmap(draw, randomness="different")(X),
        batching),
    "batching of one of PyTorch's": Case(
        BATCHING_RULES, aten.bernoulli.p, lambda: vmap(lambda x: aten.bernoulli.p(x, 0.5), randomness="different")(X),
        lambda info, in_dims, x, p, generator: (seven(x), in_dims[0]),
    ),
    "decomposition": Case(DECOMPOSITIONS, aten.trapezoid.dx,
        lambda: grad(lambda x: torch.trapezoid(x, dx=1.0).sum())(X), lambda y, dx, dim: MARK * y),
    "grad rule": Case(
        GRAD_RULES, aten.cumsum.default, lambda: grad(lambda x: (x + x.cumsum(0)).sum() * MARK)(X),
        lambda interpreter, op, values, kwargs: interpreter.constant(values[0]),
    ),
    "grad rule of a program": Case(
        GRAD_RULES, aten.sin.default, lambda: grad(lambda x: (x + x.sin()).sum() * MARK)(X),
        lambda interpreter, op, values, kwargs: interpreter.constant(values[0]),
    ),
    "jvp rule": Case(
        JVP_RULES, aten.cumsum.default, lambda: jvp(lambda x: x.cumsum(0), (X,), (X,))[1],
        lambda interpreter, op, values, kwargs, tangents: interpreter.dual(values[0], values[0] * 0 + MARK),
    ),
    "jvp rule of a program": Case(
        JVP_RULES, aten.sin.default, lambda: jvp(torch.sin, (X,), (X,))[1],
        lambda interpreter, op, values, kwargs, tangents: interpreter.dual(values[0], values[0] * 0 + MARK),
    ),
    "stand-in": Case(STAND_INS, aten.cumsum.default, lambda: vmap(lambda x: x.cumsum(0))(X[:, None]),
        lambda known, args, kwargs: seven(args[0])),
    "stand-in of what has one": Case(
        STAND_INS, aten.dropout.default, lambda: vmap(lambda x: torch.dropout(x, 0.0, True))(X),
        lambda known, args, kwargs: seven(args[0])
    ),
    "stand-in of a view": Case(STAND_INS, aten.t.default, lambda: vmap(lambda x: x.t())(torch.ones(3, 2, 2)),
        lambda known, args, kwargs: seven(args[0])),
    "stand-in of a write": Case(
        STAND_INS, aten.sin_.default, lambda: vmap(lambda x: x.clone().sin_())(X),
        lambda known, args, kwargs: args[0].fill_(MARK)
    ),
    "definition": Case(
        DEFINITIONS, torch.ops.higher_order.cond,
        lambda: vmap(lambda x: torch.cond(x > 1, torch.sin, torch.cos, (x,)))(X),
        lambda pred, true_fn, false_fn, operands: seven(operands[0]),
    ),
    "random rule": Case(
        RANDOM_RULES, aten.rand_like.default, lambda: vmap(torch.rand_like, randomness="different")(X),
        lambda info, op, in_dims, args, kwargs: (seven(args[0]), 0),
    ),
    "pure form": Case(PURE_FORMS, aten.zero_.default, lambda: vmap(lambda x: x.clone().zero_())(X),
        lambda args, kwargs: seven(args[0])),
    "pure form of what has one by name": Case(
        PURE_FORMS, aten.sin_.default, lambda: vmap(lambda x: x.clone().sin_())(X), lambda args, kwargs: seven(args[0])
    ),
}  # fmt: skip


@CHANGES
@pytest.mark.parametrize("name", CASES)
def test_a_rule_of_every_table(name: str, changed: Change) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    before = quietly(case.use)
    assert not torch.equal(before, seven(before))
    for _ in range(2):
        with changed(case.table, case.op, case.rule):
            after = quietly(case.use)
            assert torch.equal(after, seven(after)), after
        torch.manual_seed(0)
        assert torch.equal(quietly(case.use), before)


def test_there_is_no_other_table() -> None:
    values = [
        v for name, module in list(sys.modules.items()) if name.startswith("functrans.") for v in vars(module).values()
    ]
    own = [v for v in values if type(v) is RuleTable]
    tried = {case.table.title for case in CASES.values()}
    assert {t.title for t in own if t.cached} <= tried <= {t.title for t in own}


def test_nothing_is_given_up_by_a_table_of_which_nothing_is_kept() -> None:
    from functrans.programs.operators import PROGRAMS

    grad(lambda x: x.sin().sum())(X)
    before = PROGRAMS.entries
    table: RuleTable[Any] = RuleTable("of somebody")
    table.add(aten.sin.default, len)
    with rules_in_scope(table, {aten.sin.default: abs}):
        grad(lambda x: x.sin().sum())(X)
    assert PROGRAMS.entries is before and before


# ---- what is asked anew each time

def test_dictionaries_that_are_read_each_time() -> None:
    rule = lambda info, in_dims, x: (x.new_full((info.batch_size, 1, 1), 7).long(), 0)
    use = lambda: vmap(lambda x: torch.nonzero(x))(X)
    for _ in range(2):
        with pytest.raises(DataDependentError):
            use()
        with for_good(BATCHING_RULES, aten.nonzero.default, rule):
            assert use().flatten().tolist() == [7, 7, 7]


def test_the_rule_for_functions_of_the_nearest_class() -> None:
    class Mine(GradInterpreter):
        pass

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

    def run() -> Any:
        interpreter = Mine(Double.apply)
        return functrans.core.stack.run_transformed(interpreter, lambda: Double.apply(interpreter.track(X)))

    assert run().value.tolist() == (2 * X).tolist()
    FUNCTION_RULES[Mine] = lambda interpreter, cls, args: "asked"
    try:
        assert run() == "asked"
    finally:
        del FUNCTION_RULES[Mine]


# ---- PyTorch's own registrations

counter = itertools.count()


def custom(**options: Any) -> Any:
    @torch.library.custom_op(f"forgotten::custom{next(counter)}", mutates_args=(), **options)
    def op(x: Tensor, k: float = 2.0) -> Tensor:
        return k * x.sin()

    return op


def test_register_vmap_after_a_first_use() -> None:
    op = custom()
    assert torch.equal(quietly(lambda: vmap(op)(X)), 2 * X.sin())
    op.register_vmap(lambda info, in_dims, x, k: (seven(x) * k, in_dims[0]))
    assert vmap(op)(X).tolist() == [14.0] * 3
    op.register_vmap(lambda info, in_dims, x, k: (seven(x), in_dims[0]))  # again
    assert vmap(op)(X).tolist() == [7.0] * 3
    with for_good(BATCHING_RULES, op._opoverload, lambda info, in_dims, x, k: (x, in_dims[0])):  # ours comes first
        assert torch.equal(vmap(op)(X), X)
    assert vmap(op)(X).tolist() == [7.0] * 3


def test_register_autograd_after_a_first_use() -> None:
    op = custom()
    use = lambda: grad(lambda x: op(x).sum())(X)
    forward = lambda: jvp(op, (X,), (torch.ones_like(X),))[1]
    for run in (use, forward):
        with pytest.raises(RuntimeError, match="register_autograd"):
            run()
    op.register_autograd(lambda ctx, g: (MARK * g, None))
    assert use().tolist() == forward().tolist() == [MARK] * 3
    with for_good(DERIVATIVES, op._opoverload, entry_of_custom(op)):
        assert use().tolist() == forward().tolist() == [1.0] * 3
    assert use().tolist() == forward().tolist() == [MARK] * 3


def entry_of_custom(op: Any) -> Derivative:
    return Derivative(op._opoverload, {"x": lambda grad: grad}, "elementwise", ("x", "k"), 1, {"x": ("grad",)})


def test_a_definition_by_other_operators_after_a_first_use() -> None:
    lib = torch.library.Library("forgotten", "FRAGMENT")
    lib.define("later(Tensor x) -> Tensor")
    later = torch.ops.forgotten.later.default
    lib.impl("later", lambda x: x.sin(), "CPU")
    with pytest.raises(NotImplementedError):
        grad(lambda x: later(x).sum())(X)
    with pytest.warns(UserWarning, match="no batching rule for forgotten.later"):
        vmap(later)(X)
    lib.impl("later", lambda x: x.sin() * 3, "CompositeImplicitAutograd")
    torch.testing.assert_close(grad(lambda x: later(x).sum())(X), 3 * X.cos())
    torch.testing.assert_close(jvp(later, (X,), (X,))[1], 3 * X * X.cos())
    torch.testing.assert_close(vmap(later)(X), 3 * X.sin())


def test_an_overload_that_is_the_pure_form_after_a_first_use() -> None:
    lib = torch.library.Library("forgotten", "FRAGMENT")
    lib.define("halve_(Tensor(a!) x) -> Tensor(a!)")
    lib.impl("halve_", lambda x: x.mul_(0.5), "CPU")
    use = lambda: grad(lambda x: torch.ops.forgotten.halve_(x.clone()).sum())(X)
    with pytest.raises(RuntimeError, match="no autograd formula"):  # by copies, until there is a better one
        use()
    lib.define("halve(Tensor x) -> Tensor")
    lib.impl("halve", lambda x: x * 0.5, "CompositeImplicitAutograd")
    assert use().tolist() == [0.5] * 3


def test_a_module_of_the_package_is_what_its_name_imports() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("functrans."):
            assert operator.attrgetter(name.removeprefix("functrans."))(functrans) is module, name
    explain = functrans.explain
    assert importlib.import_module("functrans.explain") is explain is functrans.explain  # a module for python -m


def test_the_decorator_of_stand_ins_is_that_of_the_table() -> None:
    with pytest.raises(functrans.errors.DuplicateRuleError, match="functionalization/hidden_effects.py"):
        stands_in_for(aten.dropout.default)(len)


def test_a_cell_that_runs_again_replaces_its_rule() -> None:
    """Registration from one place is the author's change of mind; from two it is a mistake."""
    op = torch.ops.aten.erfinv.default

    def cell(factor: float) -> None:
        functrans.derivative(op, self=lambda grad, result: factor * grad, tangent="elementwise")

    x = torch.tensor(0.5)
    with functrans.extend.overriding(DERIVATIVES, op):
        for factor in (2.0, 3.0):
            cell(factor)
            assert functrans.grad(torch.erfinv)(x) == factor
            assert functrans.vmap(functrans.grad(torch.erfinv))(x.expand(2)).tolist() == [factor] * 2
        with pytest.raises(functrans.errors.DuplicateRuleError, match="test_rules_forgotten.py"):
            functrans.derivative(op, self=lambda grad: grad, tangent="elementwise")
