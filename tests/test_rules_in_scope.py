"""Rules of a scope hold in one thread or task, nest, and leave nothing behind: no rule,
and nothing derived again for anybody else.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import derivative, grad, jet, jvp, laplacian, vjp, vmap
from functrans.derivatives.table import Derivative
from functrans.errors import CallError, DuplicateRuleError, NotAnOverloadError, RegistrationError
from functrans.extend import BATCHING_RULES, DERIVATIVES, RuleTable, batching_rule, overriding, rules_in_scope
from functrans.functionalization.out_of_place import PURE_FORMS
from functrans.operators.info import STAND_INS, op_info
from functrans.operators.scopes import SCOPES
from functrans.programs import deriving
from functrans.programs.operators import PROGRAMS, operator_program

aten = torch.ops.aten
sin, cos, round_, cumsum = aten.sin.default, aten.cos.default, aten.round.default, aten.cumsum.default
X = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)


def slope(f: Callable[[Tensor], Tensor] = torch.sin) -> Tensor:
    return grad(lambda x: f(x).sum())(X)


def constant_slope(op: Any, value: float) -> Derivative:
    """``self`` has the cotangent ``value * grad``."""
    arguments = tuple(a.name for a in op._schema.arguments)
    return Derivative(op, {"self": lambda grad: value * grad}, "elementwise", arguments, 1, {"self": ("grad",)})


def elsewhere(run: Callable[[], Any]) -> Any:
    """What ``run`` returns in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def test_other_threads_do_not_see_it() -> None:
    with rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, 7)}):
        assert slope().tolist() == [7.0] * 3
        assert torch.equal(elsewhere(slope), X.cos())
        assert elsewhere(lambda: DERIVATIVES.get(sin)) is not DERIVATIVES.get(sin)
        carried = contextvars.copy_context()  # unless the context is taken along
        assert elsewhere(lambda: carried.run(slope)).tolist() == [7.0] * 3
    assert torch.equal(slope(), X.cos())
    assert torch.equal(carried.run(slope), X.cos())  # it has ended there, too


def test_other_tasks_do_not_see_it() -> None:
    async def overridden(value: float, inside: asyncio.Event, done: asyncio.Event) -> list[list[float]]:
        with rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, value)}):
            before = slope().tolist()
            child = asyncio.ensure_future(later(done))
            inside.set()
            await done.wait()
            return [before, slope().tolist(), await child]

    async def later(done: asyncio.Event) -> list[float]:
        await done.wait()
        return slope().tolist()

    async def main() -> None:
        events = [asyncio.Event() for _ in range(3)]
        first = asyncio.ensure_future(overridden(7, events[0], events[2]))
        second = asyncio.ensure_future(overridden(8, events[1], events[2]))
        await events[0].wait()
        await events[1].wait()
        assert torch.equal(slope(), X.cos())  # between the two
        events[2].set()
        assert await first == [[7.0] * 3] * 3  # the task that was started inside belongs to it
        assert await second == [[8.0] * 3] * 3
        assert torch.equal(slope(), X.cos())

    asyncio.run(main())


def test_a_task_outlives_the_scope_that_it_was_started_in() -> None:
    async def child(ended: asyncio.Event) -> tuple[Tensor, list[float]]:
        with rules_in_scope(DERIVATIVES, {cos: constant_slope(cos, 5)}):
            assert slope().tolist() == [7.0] * 3
            await ended.wait()
            return slope(), slope(torch.cos).tolist()

    async def main() -> None:
        ended = asyncio.Event()
        with rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, 7)}):
            task = asyncio.ensure_future(child(ended))
            await asyncio.sleep(0)
        ended.set()
        of_sin, of_cos = await task
        torch.testing.assert_close(of_sin, X.cos())
        assert of_cos == [5.0] * 3

    asyncio.run(main())
    assert SCOPES == []


def test_scopes_nest() -> None:
    with rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, 7), cos: constant_slope(cos, 5)}):
        with rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, 8)}):
            assert slope().tolist() == [8.0] * 3 and slope(torch.cos).tolist() == [5.0] * 3
            with overriding(DERIVATIVES, sin):
                assert sin not in DERIVATIVES and sin not in list(DERIVATIVES)
                torch.testing.assert_close(slope(), X.cos())
            with overriding(BATCHING_RULES, cumsum):
                assert slope().tolist() == [8.0] * 3
        assert slope().tolist() == [7.0] * 3
    torch.testing.assert_close(slope(), X.cos())


def test_rules_registered_inside_end_with_it_or_stay() -> None:
    some: RuleTable[Any] = RuleTable("some rules")
    with overriding(some, sin):
        some.add(sin, len)
        some.add(cos, len)  # not taken out by the scope: for good
        with pytest.raises(DuplicateRuleError, match="test_rules_in_scope.py"):
            some.add(sin, abs)
        assert list(some) == [cos, sin] and len(some) == 2
        some.remove(sin)
        assert sin not in some
    assert list(some) == [cos] and len(some) == 1


def test_it_ends_with_an_exception() -> None:
    entry, place = DERIVATIVES.get(sin), DERIVATIVES.place(sin)
    with pytest.raises(ZeroDivisionError), overriding(DERIVATIVES, sin, cos), overriding(BATCHING_RULES, sin):
        derivative(sin, self=lambda grad: 7 * grad, tangent="elementwise")
        assert DERIVATIVES.place(sin) != place
        grad(lambda x: x.sin() / (1 / 0))(X)
    assert DERIVATIVES.get(sin) is entry and DERIVATIVES.place(sin) == place and SCOPES == []


def test_it_decorates_a_function() -> None:
    run = rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, 7)})(slope)
    assert run().tolist() == run().tolist() == [7.0] * 3
    torch.testing.assert_close(slope(), X.cos())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: overriding(DERIVATIVES, aten.sin), NotAnOverloadError,
            "torch.ops.aten.sin.default, torch.ops.aten.sin.out"),
        (lambda: overriding(DERIVATIVES), RegistrationError, "for no operator"),
        (lambda: overriding(sin), CallError, "expected a RuleTable"),
        (lambda: rules_in_scope(DERIVATIVES, {}), RegistrationError, "for no operator"),
        (lambda: rules_in_scope(DERIVATIVES, {sin: torch.sin}), RegistrationError, "what derivative"),
        (lambda: rules_in_scope(BATCHING_RULES, {sin: 3}), RegistrationError,
            "got 3 as the rule of aten.sin.default; expected a function"),
        (lambda: rules_in_scope(BATCHING_RULES, {aten.sin_.default: len}), RegistrationError,
            "writes to its arguments"),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
    assert SCOPES == []


# ---- nothing is derived again


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is derived or chosen from now on."""
    made: list[Any] = []
    for name in ("tangent_of", "pullback_of"):
        original = getattr(deriving, name)
        monkeypatch.setattr(
            deriving, name, lambda program, at, original=original: (made.append(program), original(program, at))[1]
        )
    return made


def everything() -> None:
    slope()
    slope(lambda x: x.cumsum(0) * 2 + 2 / x)
    jvp(grad(lambda x: (x.sin() ** 2).sum()), (X,), (X,))
    vmap(lambda x: x.exp())(X)


def test_nothing_is_derived_again_for_others_or_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    everything()
    program, plans, programs = operator_program(sin), op_info(cumsum).specialized, PROGRAMS.entries
    made = counted(monkeypatch)
    with rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, 7), cumsum: None}):
        assert operator_program(sin) is not program
        everything()
        inside = len(made)
        assert inside
        everything()
        assert len(made) == inside  # nor twice inside
        elsewhere(everything)
        assert len(made) == inside
        assert elsewhere(lambda: operator_program(sin)) is program
    everything()
    assert len(made) == inside
    assert operator_program(sin) is program and op_info(cumsum).specialized is plans and PROGRAMS.entries is programs


def test_a_pullback_from_outside_learns_nothing_inside() -> None:
    # what was recorded outside is pulled back inside, by transforms that use the rules that hold there: and only there
    _, pullback = vjp(lambda x: x.sin().exp(), X)
    second = lambda: jvp(lambda x: vjp(lambda x: x.sin(), x)[1](X)[0], (X,), (torch.ones_like(X),))[1]
    expected = second()
    inner = grad(lambda c: pullback(c)[0].sum())(X)
    with rules_in_scope(DERIVATIVES, {cos: constant_slope(cos, 7), aten.mul.Tensor: None}):
        torch.testing.assert_close(grad(lambda c: pullback(c)[0].sum())(X), inner)
        torch.testing.assert_close(second(), 7 * X)
    torch.testing.assert_close(second(), expected)
    torch.testing.assert_close(grad(lambda c: pullback(c)[0].sum())(X), inner)


def test_a_level_of_a_pullback_from_outside_follows_the_rules_inside() -> None:
    seen = {}

    def f(x: Tensor) -> Tensor:
        _, pullback = vjp(
            torch.sin, x
        )  # c -> c * cos(x), a program that knows its own derivatives by the rules outside
        jvp(lambda c: pullback(c)[0], (X,), (X,))
        with rules_in_scope(DERIVATIVES, {cos: constant_slope(cos, 7)}):
            seen["inside"] = jvp(lambda y: vjp(torch.sin, y)[1](torch.ones_like(X))[0], (X,), (torch.ones_like(X),))[
                1
            ].tolist()
            out = pullback(torch.ones_like(X))[0]
        return out.sum()

    assert grad(f)(X).tolist() == [7.0] * 3  # of cos(x), which ran inside
    assert seen["inside"] == [7.0] * 3
    torch.testing.assert_close(grad(lambda x: vjp(torch.sin, x)[1](torch.ones_like(X))[0].sum())(X), -X.sin())


def test_a_pullback_from_inside_is_that_of_its_rules() -> None:
    with rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, 7)}):
        _, pullback = vjp(lambda x: x.sin() + x.exp(), X)
    torch.testing.assert_close(pullback(torch.ones_like(X))[0], 7 + X.exp())
    torch.testing.assert_close(grad(lambda c: pullback(c * c)[0].sum())(X), 2 * X * (7 + X.exp()))


@pytest.mark.parametrize("table", [DERIVATIVES, BATCHING_RULES, STAND_INS, PURE_FORMS], ids=lambda table: table.title)
def test_an_operator_that_is_first_used_inside(table: RuleTable[Any]) -> None:
    name = f"first_{table.title.replace(' ', '_').replace('-', '_')}"
    lib = torch.library.Library("first_use", "FRAGMENT")
    lib.define(f"{name}(Tensor self) -> Tensor")
    lib.define(f"{name}_(Tensor(a!) self) -> Tensor(a!)")
    lib.impl(name, lambda x: x.sin(), "CompositeImplicitAutograd")
    lib.impl(f"{name}_", lambda x: x.sin_(), "CPU")
    packet = getattr(torch.ops.first_use, name)
    op, writing = packet.default, getattr(torch.ops.first_use, f"{name}_").default
    rules: dict[Any, Any] = {
        DERIVATIVES: {op: constant_slope(op, 7)},
        BATCHING_RULES: {op: lambda info, in_dims, x: (torch.full_like(x, 7), in_dims[0])},
        STAND_INS: {op: lambda known, args, kwargs: aten.full_like.default(args[0], 7)},
        PURE_FORMS: {writing: lambda args, kwargs: aten.full_like.default(args[0], 7)},
    }
    use = {
        DERIVATIVES: lambda: slope(op),
        BATCHING_RULES: lambda: vmap(op)(X),
        STAND_INS: lambda: vmap(op)(X),
        PURE_FORMS: lambda: vmap(lambda x: writing(x.clone()))(X),
    }[table]
    with rules_in_scope(table, rules[table]):
        assert use().tolist() == [7.0] * 3
    torch.testing.assert_close(use(), X.cos() if table is DERIVATIVES else X.sin())


def test_a_scope_inside_a_transform() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        with rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, 7)}):
            y = y + x.sin()
        return (y + x.sin()).sum()

    for _ in range(2):
        torch.testing.assert_close(grad(f)(X), 2 * X.cos() + 7)
        torch.testing.assert_close(jvp(f, (X,), (torch.ones_like(X),))[1], (2 * X.cos() + 7).sum())
        torch.testing.assert_close(vmap(grad(f))(torch.stack([X, 2 * X])), 2 * torch.stack([X, 2 * X]).cos() + 7)


# ---- threads


def rounds_of(number: int, rounds: int, start: threading.Barrier, failures: list[str]) -> None:
    """Scopes one after the other, nested, of several tables; and between them, what holds outside."""
    pick = random.Random(number)
    mark = float(number + 2)
    start.wait()
    for i in range(rounds):
        op, f = pick.choice([(sin, torch.sin), (round_, torch.round), (cumsum, lambda x: x.cumsum(0))])
        outside = {sin: X.cos(), round_: 0 * X, cumsum: torch.tensor([3.0, 2.0, 1.0], dtype=X.dtype)}[op]
        case = pick.randrange(4)
        if case == 0:
            with overriding(DERIVATIVES, op):
                derivative(op, self=lambda grad: mark * grad, tangent="elementwise")
                found, expected = slope(f), torch.full_like(X, mark)
        elif case == 1:
            with (
                rules_in_scope(DERIVATIVES, {op: constant_slope(op, mark)}),
                rules_in_scope(DERIVATIVES, {sin: constant_slope(sin, mark + 1)}),
            ):
                found, expected = slope(f), torch.full_like(X, mark + (op is sin))
        elif case == 2:
            with overriding(BATCHING_RULES, op):
                batching_rule(op)(lambda info, in_dims, x, *rest: (torch.full_like(x, mark), in_dims[0]))
                found, expected = vmap(f)(X[:, None])[:, 0], torch.full_like(X, mark)
        else:
            with rules_in_scope(STAND_INS, {op: lambda known, args, kwargs: aten.full_like.default(args[0], mark)}):
                found, expected = vmap(f)(X[:, None])[:, 0], torch.full_like(X, mark)
        if not torch.equal(found, expected):
            failures.append(f"thread {number}, round {i}, {op}, case {case}: {found}, expected {expected}")
        after = slope(f)
        if not torch.allclose(after, outside):
            failures.append(f"thread {number}, round {i}, {op}, after case {case}: {after}, expected {outside}")


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns after a few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


#: operators that jet or laplacian have rules by hand for, each with a function of a vector, and another derivative
CHANGED: dict[str, tuple[Any, Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "tanh": (aten.tanh.default, torch.tanh, {"self": lambda grad, self: grad * self.sin(), "tangent": "elementwise"}),
    "softmax": (
        aten.softmax.int, lambda x: x.softmax(0),
        {"self": lambda grad, self: grad * self.sin(), "tangent": lambda self, self_t: self_t * self.sin()},
    ),
    "linear": (
        aten.linear.default, lambda x: torch.nn.functional.linear(x, MATRIX),
        {"input": lambda grad, input: grad * input.sin(), "tangent": lambda input, input_t: input_t * input.sin()},
    ),
    "division": (
        aten.div.Tensor, lambda x: x / 3, {"self": lambda grad, self: grad * self.sin(), "tangent": "elementwise"}
    ),
    "view": (
        aten.unsqueeze.default, lambda x: x.unsqueeze(0),
        {"self": lambda grad, self: grad[0] * self.sin(), "tangent": lambda self, self_t: (self_t * self.sin())[None]},
    ),
    "solve": (
        aten._linalg_solve_ex.default, lambda x: torch.linalg.solve(MATRIX, x),
        {"B": lambda grads, B: grads[0] * B.sin(), "tangent": lambda B, B_t: (B_t * B.sin(), None, None, None)},
    ),
    "norm": (
        aten.linalg_vector_norm.default, torch.linalg.vector_norm,
        {"self": lambda grad, self: grad * self.sin(), "tangent": lambda self, self_t: (self_t * self.sin()).sum()},
    ),
    "the exponential in a softmax": (
        aten.exp.default, lambda x: x.softmax(0) * x.exp(),
        {"self": lambda grad, self: grad * self.sin(), "tangent": "elementwise"},
    ),
}  # fmt: skip
MATRIX = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.1], [0.4, 0.1, 1.3]], dtype=X.dtype)


@pytest.mark.parametrize("name", CHANGED)
def test_jet_and_laplacian_ask_for_them(name: str) -> None:
    op, f, entry = CHANGED[name]

    def along(f: Callable[[Tensor], Tensor], v: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: jvp(f, (x,), (v,))[1]

    def found() -> tuple[list[Tensor], Tensor]:
        return jet(f, (X,), ([X, None, None],))[1], laplacian(f)(X)

    before = found()
    with overriding(DERIVATIVES, op):
        derivative(op, **entry)
        first = along(f, X)
        expected = [first(X), along(first, X)(X), along(along(first, X), X)(X)]
        axes = torch.eye(3, dtype=X.dtype)
        of_axes = [along(along(f, v), v)(X) for v in axes]
        series, total = found()
        torch.testing.assert_close(series, expected)
        torch.testing.assert_close(total, torch.stack(of_axes).sum(0))
        assert not torch.allclose(series[0], before[0][0])
    after = found()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.usefixtures("hasty")
def test_sixteen_threads_with_scopes_at_once() -> None:
    before = {op: (DERIVATIVES.get(op), DERIVATIVES.place(op)) for op in (sin, round_, cumsum)}
    sizes = [len(t) for t in (DERIVATIVES, BATCHING_RULES, STAND_INS)]
    failures: list[str] = []
    start = threading.Barrier(16)
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(rounds_of, n, 100, start, failures) for n in range(16)]:
            done.result()
    assert failures == []
    assert {op: (DERIVATIVES.get(op), DERIVATIVES.place(op)) for op in before} == before
    assert [len(t) for t in (DERIVATIVES, BATCHING_RULES, STAND_INS)] == sizes and SCOPES == []
    torch.testing.assert_close(slope(), X.cos())


@pytest.mark.usefixtures("hasty")
def test_rules_that_change_for_good_while_others_run() -> None:
    """No thread keeps a plan or program by a rule that is gone."""
    stop, failures = threading.Event(), []

    def use() -> None:
        while not stop.is_set():
            for found in (slope(), slope(lambda x: x.cumsum(0))):
                if not torch.isfinite(found).all():
                    failures.append(found)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for i in range(40):
            for op, f in ((sin, torch.sin), (cumsum, lambda x: x.cumsum(0))):
                entry, place = DERIVATIVES.get(op), DERIVATIVES.place(op)
                DERIVATIVES.remove(op)
                try:
                    DERIVATIVES.add(op, constant_slope(op, i))
                    assert slope(f).tolist() == [float(i)] * 3
                finally:
                    DERIVATIVES.remove(op)
                    DERIVATIVES.add(op, entry, place=place)  # type: ignore[arg-type]
                torch.testing.assert_close(
                    slope(f), X.cos() if op is sin else torch.tensor([3.0, 2.0, 1.0], dtype=X.dtype)
                )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
