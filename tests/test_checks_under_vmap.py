"""The truth of all() and any(), and of allclose and equal, under vmap: NOTE [Checks under vmap].

The truth is a loop: where every example goes the same way, its results; where the loop raises, an error of the same
kind; and where examples go different ways that both return, a DataDependentError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import for_each
from torch import Tensor

from functrans import grad, jacrev, jvp, vmap
from functrans.core.stack import interpreter_stack, run_transformed
from functrans.errors import DataDependentError
from functrans.interpreters.vmap.interpreter import VmapInterpreter

aten = torch.ops.aten

#: Questions to an example, and the truth for which a check is taken to have failed.
QUESTIONS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "all": (lambda x: (x > 0).all(), False),
    "any": (lambda x: (x <= 0).any(), True),
    "torch.all": (lambda x: torch.all(x > 0), False),
    "of numbers": (lambda x: x.relu().all(), False),
    "item of all": (lambda x: (x > 0).all().item(), False),
    "is_nonzero": (lambda x: torch.is_nonzero((x > 0).all()), False),
    "_is_all_true": (lambda x: torch._is_all_true(x > 0), False),
    "_is_any_true": (lambda x: torch._is_any_true(x <= 0), True),
    "equal": (lambda x: torch.equal(x.relu(), x) and torch.equal(x, x), False),
    "allclose": (lambda x: torch.allclose(x.relu(), x), False),
    "method allclose": (lambda x: x.relu().allclose(x, rtol=1e-3, atol=1e-3), False),
    "all of all": (lambda x: (x > 0).all().all(), False),
}
POSITIVE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
NEGATIVE = -POSITIVE
MIXED = POSITIVE * torch.tensor([[1.0], [-1.0], [1.0]])


def both_ways(ask: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * 2 if ask(x) else x * 3


def checking(ask: Callable[[Tensor], Any], failing: bool) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        if bool(ask(x)) is failing:
            raise ZeroDivisionError("the check failed")
        return x * 2

    return f


#: Ways to run a function of an example on a batch, beside the loop's.
RUNS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda f: vmap(f),
    "vmap, batch last": lambda f: lambda b: vmap(f, in_dims=1)(b.T.contiguous()),
    "vmap of vmap": lambda f: lambda b: vmap(vmap(f))(b[None])[0],
    "vmap of vmap, the other way": lambda f: lambda b: vmap(vmap(f))(b[:, None])[:, 0],
    "vmap of grad": lambda f: lambda b: vmap(grad(lambda x: (f(x) * x.detach()).sum()))(b),
    "vmap of jvp": lambda f: lambda b: vmap(lambda x: jvp(f, (x,), (x,))[1])(b),
    "grad of vmap": lambda f: grad(lambda b: (vmap(f)(b) * b.detach()).sum()),
    "jvp of vmap": lambda f: lambda b: jvp(vmap(f), (b,), (b,))[1],
    "randomness": lambda f: vmap(lambda x: f(x + 0 * torch.rand(())), randomness="different"),
    "chunks": lambda f: vmap(f, chunk_size=2),
    "by hand": lambda f: by_hand(f),
}


def by_hand(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(batch: Tensor) -> Tensor:
        interpreter = VmapInterpreter(len(batch), "error")
        out = run_transformed(interpreter, lambda: f(interpreter.batched(batch, 0)))
        return out.value.movedim(out.bdim, 0)

    return run


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("run", RUNS)
def test_questions(run: str, question: str) -> None:
    ask, failing = QUESTIONS[question]
    transformed, f, g = RUNS[run], both_ways(ask), checking(ask, failing)
    for batch in (POSITIVE, NEGATIVE, MIXED[1:2]):
        torch.testing.assert_close(transformed(f)(batch), for_each(f)(batch))
    torch.testing.assert_close(transformed(g)(POSITIVE), for_each(g)(POSITIVE))
    for batch in (NEGATIVE, MIXED):
        for way in (for_each, transformed):
            with pytest.raises(ZeroDivisionError):
                way(g)(batch)
    assert interpreter_stack() == []
    mixed = MIXED[[0, 1]] if run == "chunks" else MIXED  # examples of one chunk
    with pytest.raises(DataDependentError, match=r"At .*test_checks_under_vmap.py"):
        transformed(f)(mixed)
    assert interpreter_stack() == []


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_failed_check_that_is_passed_over_is_an_error(question: str) -> None:
    """Also where the function catches what it raised itself: the examples would go different ways."""
    ask, failing = QUESTIONS[question]
    g = checking(ask, failing)

    def caught(x: Tensor) -> Tensor:
        try:
            return g(x)
        except ZeroDivisionError:
            return x * 3

    torch.testing.assert_close(vmap(caught)(NEGATIVE), for_each(caught)(NEGATIVE))
    with pytest.raises(DataDependentError):
        vmap(caught)(MIXED)

    def caught_outside(row: Tensor) -> Tensor:  # of an inner vmap, whose examples agree: those of the outer do not
        try:
            return vmap(g)(row[None])[0]
        except ZeroDivisionError:
            return row * 3

    torch.testing.assert_close(vmap(caught_outside)(NEGATIVE), for_each(caught_outside)(NEGATIVE))
    with pytest.raises(DataDependentError, match="inside vmap.caught_outside. at level 1"):
        vmap(caught_outside)(MIXED)


def test_loops_that_all_examples_leave_at_once() -> None:
    def halve(x: Tensor) -> Tensor:
        while not (x < 1).all():
            x = x / 2
        return x

    together = torch.tensor([[4.0, 5.0], [7.0, 1.0]])
    torch.testing.assert_close(vmap(halve)(together), for_each(halve)(together))
    with pytest.raises(DataDependentError):
        vmap(halve)(torch.tensor([[4.0], [1.0]]))


OTHER_TRUTHS: dict[str, Callable[[Tensor], Any]] = {
    "comparison": lambda x: x.sum() > 0,
    "negated": lambda x: ~(x > 0).all(),
    "joined": lambda x: (x > 0).all() & (x > 0).all(),
    "along a dimension": lambda x: (x > 0).all(0),
    "copied": lambda x: (x > 0).all().clone(),
    "written": lambda x: (x > 0).all().logical_not_(),
    "a number": lambda x: x.sum(),
}


@pytest.mark.parametrize("truth", OTHER_TRUTHS)
def test_other_truths_are_refused_also_where_all_examples_agree(truth: str) -> None:
    """Which way a failing example goes is not known of them, and a program would work by chance."""
    for run in (vmap, lambda f: vmap(vmap(f)), lambda f: vmap(grad(lambda x: f(x).sum()))):
        with pytest.raises(DataDependentError):
            run(both_ways(OTHER_TRUTHS[truth]))(POSITIVE[:, None] if run is not vmap else POSITIVE)


def test_questions_of_what_the_examples_share() -> None:
    shared = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(vmap(lambda x: x * 2 if (shared > 0).all() else x)(POSITIVE), POSITIVE)
    torch.testing.assert_close(vmap(lambda x: x * 2 if torch.equal(shared, shared) else x)(POSITIVE), 2 * POSITIVE)


def test_an_outer_example_that_is_not_batched_inside() -> None:
    """The question is put to the outer level's examples by code of the inner level."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        return vmap(lambda z: z * 2 if (x > 0).all() else z * 3)(y)

    y = torch.ones(2)
    for batch in (POSITIVE, NEGATIVE):
        torch.testing.assert_close(vmap(f, (0, None))(batch, y), torch.stack([f(x, y) for x in batch]))
    with pytest.raises(DataDependentError, match="at level 1"):
        vmap(f, (0, None))(MIXED, y)


def test_no_examples() -> None:
    """Nothing fails."""
    for name, (ask, failing) in QUESTIONS.items():
        assert vmap(checking(ask, failing))(torch.ones(0, 2)).shape == (0, 2), name


def test_equal_and_allclose_of_other_shapes_and_dtypes() -> None:
    for f in (
        lambda x: torch.equal(x, torch.ones(3)),
        lambda x: torch.equal(x, x.double()),
        lambda x: torch.allclose(x, x * (1 + 1e-7)),
        lambda x: torch.allclose(x * torch.nan, x * torch.nan),
        lambda x: torch.allclose(x * torch.nan, x * torch.nan, equal_nan=True),
    ):
        assert {vmap(f)(POSITIVE)} == {f(x) for x in POSITIVE}
    for wrong in (lambda x: torch.allclose(x, x.double()), lambda x: torch.allclose(x, torch.ones(3))):
        for way in (vmap, for_each):
            with pytest.raises(RuntimeError) as info:
                way(wrong)(POSITIVE)
            assert not isinstance(info.value, DataDependentError)


@pytest.mark.parametrize("run", ["vmap", "vmap, batch last", "vmap of vmap", "vmap of grad", "grad of vmap"])
def test_assert_async(run: str) -> None:
    def f(x: Tensor) -> Tensor:
        torch._assert_async((x > 0).all())
        torch._assert_async(x.min() > 0, "not positive")
        torch._assert_async(x.relu().min().reshape(1))
        return x * 2

    torch.testing.assert_close(RUNS[run](f)(POSITIVE), for_each(f)(POSITIVE))
    for way in (for_each, RUNS[run]):
        with pytest.raises(RuntimeError, match="Expected Tensor"):
            way(f)(MIXED)
        with pytest.raises(RuntimeError, match="not positive"):
            way(lambda x: torch._assert_async(x.min() > 0, "not positive") or x)(MIXED)


def test_functional_assert_async() -> None:
    def f(x: Tensor, token: Tensor) -> Tensor:
        return x * aten._functional_assert_async.msg((x > 0).all(), "not positive", token)

    torch.testing.assert_close(vmap(f, (0, None))(POSITIVE, torch.ones(())), POSITIVE)
    torch.testing.assert_close(vmap(f)(POSITIVE, torch.ones(3)), POSITIVE)
    with pytest.raises(RuntimeError, match="not positive"):
        vmap(f, (0, None))(MIXED, torch.ones(()))


def test_the_answers_are_those_of_each_example() -> None:
    for ask in (torch._is_all_true, torch._is_any_true, torch.all, torch.any):
        batch = torch.tensor([[True, True], [True, False], [False, False]])
        assert torch.equal(vmap(ask)(batch), for_each(ask)(batch))


def test_jacobians_of_functions_that_check() -> None:
    f = checking(*QUESTIONS["all"])
    torch.testing.assert_close(vmap(jacrev(f))(POSITIVE), 2 * torch.eye(2).expand(3, 2, 2))
    with pytest.raises(ZeroDivisionError):
        vmap(jacrev(f))(MIXED)
