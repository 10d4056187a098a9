"""Where a rule was called from: what it may ask, and what an exception that it raises says; for every kind of rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from identity_functions import identity
from torch import Tensor, nn
from wrong_calls import thread_state

import functrans as ft
from functrans.errors import CallError
from functrans.errors.call_sites import is_users
from functrans.extend import (
    BATCHING_RULES,
    DERIVATIVES,
    BackwardNode,
    Carried,
    GradInterpreter,
    Handler,
    JvpInterpreter,
    PassThrough,
    Primitive,
    RuleError,
    RuleTable,
    TableInterpreter,
    VmapInterpreter,
    batching_rule,
    caller,
    derivative,
    lower,
    noting_lines,
    origin,
    overriding,
    running_at,
    transform,
    user_line,
)
from functrans.shipped.interval_rules import IntervalLevel
from functrans.shipped.jet import JetInterpreter
from functrans.shipped.sparsity_level import SparsityLevel

aten = torch.ops.aten
HOPS = torch.ops.higher_order
X = torch.tensor([0.3, -0.7, 1.1])
ROWS = torch.stack([X, 2 * X])


class Own(Exception):
    """An exception of the user's."""


# --- what exceptions say ------------------------------------------------------------------------------------------

#: What the rules below raise.
RAISED: list[Exception] = []


def failing(*args: Any, **kwargs: Any) -> Any:
    raise RAISED[0]


class Table(TableInterpreter):
    kind, payload, rules = "table", ("mark",), RuleTable("a table that fails")


Table.rules.add(aten.sin.default, failing)
Table.rules.add(HOPS.cond, failing)


class Policy(TableInterpreter):
    kind, payload, rules = "policy", ("mark",), RuleTable("a policy that fails", default=failing)


class Looks(PassThrough):
    kind = "looks"

    def before(self, op: Any, args: Any, kwargs: Any) -> None:
        raise RAISED[0]


class Sees(PassThrough):
    kind = "sees"

    def after(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        raise RAISED[0]


class Gives(PassThrough):
    kind = "gives"

    def given(self, op: Any, value: Tensor, own: bool) -> Tensor:
        raise RAISED[0]


def own(base: Any) -> Any:
    class Failing(base):  # type: ignore[misc]
        kind = "own"

        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            raise RAISED[0]

    return Failing


class FailingNode(BackwardNode):
    op = "a node"

    def pull(self, saved: Any, grad: Any) -> Any:
        raise RAISED[0]


class OwnNode(GradInterpreter):
    def process(self, op: Any, args: Any, kwargs: Any) -> Any:
        if op is not aten.sin.default:
            return super().process(op, args, kwargs)
        out = self.track(lower(self, op, (args[0].value,), kwargs))
        self.record(FailingNode(), out.tape_index, [args[0].tape_index], [])
        return out


@torch.library.custom_op("provenance::plain", mutates_args=())
def plain(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("provenance::vmapped", mutates_args=())
def vmapped(x: Tensor) -> Tensor:
    return x.clone()


torch.library.register_vmap(vmapped, failing)


@torch.library.custom_op("provenance::recorded", mutates_args=())
def recorded(x: Tensor) -> Tensor:
    return x.clone()


recorded.register_autograd(failing)


def rescoped(table: Any, op: Any, register: Callable[[], Any], call: Callable[[], Any]) -> Any:
    with overriding(table, op):
        register()
        return call()


def function(**methods: Any) -> Any:
    return identity(**{"backward": lambda ctx, grad: grad, "jvp": lambda ctx, tangent: tangent, **methods})


def primitive(**rules: Any) -> Primitive:
    p = Primitive("failing_primitive", lambda x: x)
    if "cls" in rules:
        p.rule(rules["cls"])(failing)
    else:
        p.derivative(**rules)
    return p


def custom(name: str, method: str, *rules: Any) -> Any:
    f = getattr(ft, name)(lambda x: x.sum())
    getattr(f, method)(*rules)
    return f


def tangent(tangents: Any, result: Any, *args: Any) -> Any:
    raise RAISED[0]


sin, of_sin = aten.sin.default, lambda x: x.sin()
total = lambda f: lambda x: f(x).sum()

#: By kind: what the exception names of operator and level, whether one of Python's stays as it is, and a call of
#: the rule.
KINDS: dict[str, tuple[str, str, bool, Callable[[], Any]]] = {
    "a rule of a table": ("aten.sin.default", "table(<lambda>) at level 1", False,
        lambda: transform(Table, of_sin)(Carried(X, mark=1))),
    "a policy": ("aten.sin.default", "policy(<lambda>) at level 2", False,
        lambda: ft.vmap(lambda x: transform(Policy, of_sin)(Carried(x, mark=1)))(ROWS)),
    "a rule for an operator that takes functions": ("cond", "table(<lambda>) at level 1", True,
        lambda: transform(Table, lambda x: torch.cond(torch.tensor(True), of_sin, of_sin, (x,)))(Carried(X, mark=1))),
    **{
        f"a rule of {name}": ("aten.sin.default", f"{name}(sin) at level 1", False,
            lambda table=table, call=call: rescoped(table, sin, lambda: table.add(sin, failing), call))
        for name, table, call in (
            ("jet", JetInterpreter.rules, lambda: ft.jet(torch.sin, (X,), ([X, X],))),
            ("bounds", IntervalLevel.rules, lambda: ft.bounds(torch.sin)(X, X + 1)),
            ("sparsity", SparsityLevel.rules, lambda: ft.sparsity(torch.sin)(X)),
        )
    },
    "before of a PassThrough": ("aten.sin.default", "looks(<lambda>) at level 1", False,
        lambda: transform(Looks, of_sin)(X)),
    "after of a PassThrough": ("aten.sin.default", "sees(<lambda>) at level 1", False,
        lambda: transform(Sees, of_sin)(X)),
    "given of a PassThrough": ("aten.sin.default", "gives(<lambda>) at level 1", False,
        lambda: transform(Gives, of_sin)(X)),
    "process of a grad": ("aten.sin.default", "own(<lambda>) at level 1", False,
        lambda: ft.grad(total(of_sin), interpreter=own(GradInterpreter))(X)),
    "process of a vmap": ("aten.sin.default", "own(<lambda>) at level 1", False,
        lambda: ft.vmap(ft.grad(of_sin), interpreter=own(VmapInterpreter))(X)),
    "process of a jvp": ("aten.sin.default", "own(<lambda>) at level 1", False,
        lambda: ft.jvp(of_sin, (X,), (X,), interpreter=own(JvpInterpreter))),
    "a node": ("a node", "grad(<lambda>) at level 1", False,
        lambda: ft.grad(total(of_sin), interpreter=OwnNode)(X)),
    "a batching rule": ("aten.sin.default", "vmap(<lambda>) at level 1", False,
        lambda: rescoped(BATCHING_RULES, sin, lambda: batching_rule(sin)(failing), lambda: ft.vmap(of_sin)(ROWS))),
    "a batching rule below grad": ("aten.sin.default", "vmap(<lambda>) at level 1", False,
        lambda: rescoped(BATCHING_RULES, sin, lambda: batching_rule(sin)(failing),
            lambda: ft.vmap(ft.grad(total(of_sin)))(ROWS))),
    "register_vmap": ("provenance.vmapped.default", "vmap(<lambda>) at level 1", False,
        lambda: ft.vmap(lambda x: vmapped(x))(ROWS)),
    "a formula": ("aten.sin.default", "grad(<lambda>) at level 1", False,
        lambda: rescoped(DERIVATIVES, sin,
            lambda: derivative(sin, self=lambda grad: failing(), tangent="elementwise"),
            lambda: ft.grad(total(of_sin))(X))),
    "a formula in forward mode": ("aten.sin.default", "jvp(<lambda>) at level 1", False,
        lambda: rescoped(DERIVATIVES, sin,
            lambda: derivative(sin, self=lambda grad: failing(), tangent="elementwise"),
            lambda: ft.jvp(of_sin, (X,), (X,)))),
    "a tangent": ("provenance.plain.default", "jvp(<lambda>) at level 2", False,
        lambda: rescoped(DERIVATIVES, torch.ops.provenance.plain.default,
            lambda: derivative(torch.ops.provenance.plain.default, x=lambda grad: grad,
                               tangent=lambda x_t: failing()),
            lambda: ft.vmap(lambda x: ft.jvp(lambda x: plain(x), (x,), (x,)))(ROWS))),
    "register_autograd": ("provenance.recorded.default", "grad(<lambda>) at level 1", True,
        lambda: ft.grad(total(lambda x: recorded(x)))(X)),
    "forward of a Function": ("Identity.apply", "grad(<lambda>) at level 1", True,
        lambda: ft.grad(total(lambda x: function(forward=failing).apply(x)))(X)),
    "backward of a Function": ("Identity.apply", "grad(<lambda>) at level 1", True,
        lambda: ft.grad(total(lambda x: function(backward=failing).apply(x)))(X)),
    "jvp of a Function": ("Identity.apply", "jvp(<lambda>) at level 1", True,
        lambda: ft.jvp(lambda x: function(jvp=failing).apply(x), (X,), (X,))),
    "vmap of a Function": ("Identity.apply", "vmap(<lambda>) at level 1", True,
        lambda: ft.vmap(lambda x: function(vmap=failing).apply(x))(ROWS)),
    "a rule of a primitive": ("failing_primitive", "handler(failing_primitive) at level 2", True,
        lambda: ft.vmap(transform(Handler, primitive(cls=Handler)))(ROWS)),
    "the pullback of a primitive": ("failing_primitive", "grad(<lambda>) at level 1", False,
        lambda: ft.grad(total(primitive(pullback=failing)))(X)),
    "the tangent of a primitive": ("failing_primitive", "jvp(failing_primitive) at level 1", True,
        lambda: ft.jvp(primitive(tangent=tangent), (X,), (X,))),
    "bwd of a custom_vjp": ("<lambda>", "grad(<lambda>) at level 1", False,
        lambda: ft.grad(lambda x: custom("custom_vjp", "defvjp", lambda x: (x.sum(), x), failing)(x))(X)),
    "the rule of a custom_jvp": ("<lambda>", "jvp(<lambda>) at level 1", True,
        lambda: ft.jvp(lambda x: custom("custom_jvp", "defjvp", failing)(x), (X,), (X,))),
    "the rule of a custom_vmap": ("<lambda>", "vmap(<lambda>) at level 1", True,
        lambda: ft.vmap(lambda x: custom("custom_vmap", "def_vmap", failing)(x))(ROWS)),
}  # fmt: skip


def told(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("kind", [Own, TypeError, ValueError, KeyError, ZeroDivisionError, UserWarning, CallError])
@pytest.mark.parametrize("name", KINDS)
def test_an_exception_in_a_rule_names_operator_level_and_place(name: str, kind: type[Exception]) -> None:
    op, level, stays, call = KINDS[name]
    error = kind("f", "that", "this") if kind is CallError else kind("mine")
    RAISED[:] = [error]
    before = thread_state()
    with pytest.raises(Exception) as caught:
        call()
    assert thread_state() == before
    if stays or kind in (Own, UserWarning, CallError):
        assert caught.value is error
    else:
        assert type(caught.value) is RuleError and caught.value.__cause__ is error
    text = told(caught.value)
    assert op in text and level in text, text
    assert any(is_users(path) for path in re.findall(r"(/\S+\.py):\d+", text)), text


def test_a_deliberate_error_of_a_builtin_rule_says_no_more_than_before() -> None:
    with pytest.raises(ft.FunctransError) as caught:
        ft.vmap(lambda x: x.item())(X)
    assert not hasattr(caught.value, "__notes__")


def test_an_exception_of_the_function_itself_gets_no_notes() -> None:
    error = Own("mine")
    RAISED[:] = [error]
    with pytest.raises(Own) as caught:
        ft.vmap(ft.grad(failing))(ROWS)
    assert caught.value is error and not hasattr(error, "__notes__")


# --- what a rule may ask ------------------------------------------------------------------------------------------


class Asking(PassThrough):
    """Asks for every operator who lowered it, and what is pulled back."""

    kind = "asking"

    def before(self, op: Any, args: Any, kwargs: Any) -> None:
        above, pulled = caller(), origin()
        SEEN.append((
            str(op),
            None if above is None else (above.level, above.interpreter.kind, said(above.op), above.on_way_back),
            None if pulled is None else (pulled.interpreter.level, said(pulled.op), pulled.place),
        ))  # fmt: skip


SEEN: list[Any] = []


def said(op: Any) -> Any:
    if isinstance(op, tuple):
        return tuple(map(str, op))
    return str(op) if isinstance(op, torch._ops.OpOverload | str) else op.__name__


def asked(f: Callable[..., Any], *args: Any) -> list[Any]:
    SEEN.clear()
    transform(Asking, f)(*args)
    return list(SEEN)


SIN, COS, MUL = "aten.sin.default", "aten.cos.default", "aten.mul.Tensor"


def test_code_at_the_level_has_no_caller() -> None:
    assert asked(of_sin, X) == [(SIN, None, None)]


def test_on_the_way_down_and_back() -> None:
    assert asked(ft.grad(of_sin), X[0]) == [
        (SIN, (2, "grad", SIN, False), None),
        (COS, (2, "grad", SIN, True), (2, SIN, None)),
        (MUL, (2, "grad", SIN, True), (2, SIN, None)),
    ]
    primal, *pushed = asked(lambda x: ft.jvp(of_sin, (x,), (x,)), X[0])
    assert [op for op, _, _ in (primal, *pushed)] == [SIN, COS, MUL]
    assert {(above, pulled) for _, above, pulled in (primal, *pushed)} == {((2, "jvp", SIN, False), None)}


def test_the_level_next_above_is_meant() -> None:
    """A vmap between: it called the operator, for the grad above it, whose record is the origin."""
    down, *back = asked(ft.vmap(ft.grad(total(lambda x: torch.logsumexp(x, 0)))), ROWS)
    assert down == ("aten.logsumexp.default", (2, "vmap", "aten.logsumexp.default", False), None)
    back = [(above, pulled) for _, above, pulled in back if pulled is not None]  # what is left made the first cotangent
    assert len(back) > 2 and all(above[:2] == (2, "vmap") and not above[3] for above, _ in back)
    assert {pulled[:2] for _, pulled in back} == {(3, "aten.logsumexp.default")}


def test_pieces_have_the_caller_of_the_whole() -> None:
    class Pieces(Asking):
        pieces = True

    SEEN.clear()
    transform(Pieces, ft.vmap(lambda x: torch.nn.functional.linear(x, torch.eye(3))))(ROWS)
    assert [above for op, above, _ in SEEN if op in ("aten.mm.default", "aten.addmm.default")] == [
        (2, "vmap", "aten.linear.default", False)
    ]


def test_several_operators_in_one_program() -> None:
    found = asked(ft.grad(lambda x: 2.0 / x), X[0])
    both = "aten.reciprocal.default", MUL
    assert found[:2] == [(op, (2, "grad", both, False), None) for op in both]
    assert {(above, pulled) for _, above, pulled in found[2:]} == {((2, "grad", both, True), (2, both, None))}


def test_what_a_function_or_a_primitive_runs() -> None:
    f = function()
    assert asked(lambda x: ft.grad(total(lambda x: f.apply(x)))(x), X)[0][:2] == (
        "aten.clone.default", (2, "grad", "Identity", False),
    )  # fmt: skip

    scaled = Primitive("scaled", lambda x: x)

    @scaled.rule(Handler)
    def twice(level: Any, x: Tensor) -> Any:
        return 2 * scaled.below(level, x)

    found = asked(lambda x: transform(Handler, scaled)(x), X)
    assert found == [(MUL, (2, "handler", "scaled", False), None)]


def test_the_origin_is_what_was_called() -> None:
    """A Function, a Primitive, an operator by PyTorch's derivative."""
    seen: list[Any] = []

    def noted(grad: Any, *_: Any) -> Any:
        seen.append(origin())
        return grad

    f = identity(backward=lambda ctx, grad: noted(grad))
    p = Primitive("p", lambda x: x)
    p.derivative(pullback=noted)
    for called, name in ((f.apply, f), (p, p)):
        ft.grad(total(called))(X)
        assert seen.pop().op is name and not seen
    ft.grad(lambda x: (x.register_hook(noted), x.sin().sum())[1])(X)
    assert seen == [None], "an argument was made by no operator"
    seen.clear()
    recorded_here.noted = noted
    ft.grad(total(recorded_here))(X)
    assert seen.pop().op is torch.ops.provenance.recorded_here.default


@torch.library.custom_op("provenance::recorded_here", mutates_args=())
def recorded_here(x: Tensor) -> Tensor:
    return x.clone()


recorded_here.register_autograd(lambda ctx, grad: recorded_here.noted(grad))


def test_in_rules_of_every_kind() -> None:
    answers: list[Any] = []

    def noted(x: Any) -> Any:
        above = caller()
        answers.append(None if above is None else (above.level, above.interpreter.kind, str(above.op)))
        return x

    with overriding(BATCHING_RULES, sin):

        @batching_rule(sin)
        def rule(info: Any, in_dims: Any, x: Tensor) -> Any:
            assert (info.level, info.interpreter.kind, info.axis_name) == (1, "vmap", "rows")
            return noted(x).sin(), in_dims[0]

        ft.vmap(of_sin, axis_name="rows")(ROWS)
        ft.vmap(ft.grad(total(of_sin)), axis_name="rows")(ROWS)
        ft.vmap(lambda x: ft.jvp(of_sin, (x,), (x,)), axis_name="rows")(ROWS)
    assert answers == [None, (2, "grad", SIN), (2, "jvp", SIN)]

    answers.clear()
    with overriding(Table.rules, sin):
        Table.rules.add(sin, lambda level, x: level.carry(noted(x.value).sin(), mark=1))
        transform(Table, ft.vmap(of_sin))(Carried(ROWS, mark=1))
        ft.vmap(lambda x: transform(Table, of_sin)(Carried(x, mark=1)).value)(ROWS)
    assert answers == [(2, "vmap", SIN), None]

    answers.clear()
    with overriding(DERIVATIVES, sin):
        derivative(sin, self=lambda grad, self: noted(grad * self.cos()), tangent="elementwise")
        ft.grad(total(of_sin))(X)  # nothing stands above a record any more
        ft.jvp(ft.grad(total(of_sin)), (X,), (X,))
        assert answers[0] is None and (2, "grad", SIN) in answers


def test_a_transform_that_a_rule_calls_is_not_its_caller() -> None:
    class Inner(PassThrough):
        def before(self, op: Any, args: Any, kwargs: Any) -> None:
            answers.append(caller())

    answers: list[Any] = []
    with overriding(Table.rules, sin):
        Table.rules.add(sin, lambda level, x: level.carry(transform(Inner, torch.cos)(x.value), mark=1))
        transform(Table, of_sin)(Carried(X, mark=1))
    assert answers == [None]


def test_lines_are_noted_where_they_are_asked_for() -> None:
    places: list[Any] = []

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda grad: places.append(origin()))
        return y.exp()

    line = f.__code__.co_firstlineno + 1
    with noting_lines():
        ft.grad(f)(X[0])
        pullback = ft.vjp(f, X)[1]
    pullback(X)  # the tape knows them
    assert [(o.op, o.interpreter.kind) for o in places] == [(sin, "grad")] * 2
    assert [o.place for o in places] == [f"{__file__}:{line}, in f"] * 2
    places.clear()
    ft.grad(f)(X[0])
    assert [(o.op, o.place) for o in places] == [(sin, None)]

    def at(x: Tensor) -> Tensor:
        return x.sin()

    place = f"{__file__}:{at.__code__.co_firstlineno + 1}, in at"
    with noting_lines():
        found = asked(ft.vmap(ft.grad(at)), X)
    assert [pulled for _, _, pulled in found if pulled is not None] == [(3, SIN, place)] * 2


def test_origin_in_a_jacobian_and_a_second_derivative() -> None:
    found = asked(ft.jacrev(of_sin), X)
    assert {pulled[1] for _, _, pulled in found if pulled is not None} == {SIN}
    found = asked(ft.grad(ft.grad(of_sin)), X[0])
    origins = [pulled[:2] for _, _, pulled in found if pulled is not None]
    assert set(origins) == {(3, SIN), (2, (COS, MUL))}  # of the outer grad's tape, which has the pullback as a program


def test_outside_of_rules() -> None:
    assert origin() is None
    with pytest.raises(CallError) as caught:
        caller()
    assert str(caught.value) == (
        "caller(): got no operator that is being interpreted; expected a rule that runs. "
        "Call it in a rule: what an interpreter does with an operator."
    )
    with running_at(None):
        assert origin() is None


class Lines(PassThrough):
    kind = "lines"

    def before(self, op: Any, args: Any, kwargs: Any) -> None:
        self.own_helper(op)

    def own_helper(self, op: Any) -> None:
        SEEN.append((str(op), (user_line() or "").rpartition(", in ")[2]))


def lines(f: Callable[..., Any], *args: Any) -> list[Any]:
    SEEN.clear()
    transform(Lines, f)(*args)
    return list(SEEN)


def test_the_users_line() -> None:
    def inner(x: Tensor) -> Tensor:
        return x.sin()

    def outer(x: Tensor) -> Tensor:
        return inner(x) + 1

    assert lines(outer, X) == [(SIN, "inner"), ("aten.add.Tensor", "outer")]
    assert lines(ft.vmap(outer), ROWS) == lines(outer, X)
    assert lines(lambda x: nn.functional.softplus(x), X) == [("aten.softplus.default", "<lambda>")]
    assert ("aten.cos.default", "lines") in lines(ft.grad(total(outer)), X)  # who asked for the walk
    with noting_lines():
        assert ("aten.cos.default", "inner") in lines(ft.grad(total(outer)), X)
    with pytest.raises(CallError, match="no operator that is being interpreted"):
        user_line()
