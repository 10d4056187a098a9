"""Whatever a public function is given: it works, or says what is wrong; and the thread is as before.

``wrong_calls.py`` makes the calls: each argument of each function replaced by values and functions of every kind.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import wrong_calls
from wrong_calls import CASES, Case, is_deliberate, meant, outcome, thread_state, using

import functrans
from functrans import extend
from functrans.errors import CallError

#: Public names that are no functions to be called wrongly here.
NO_CALLS = {
    "BATCHING_RULES", "DEFINITIONS", "DERIVATIVES", "BackwardNode", "BatchInfo", "Caller",
    "CarriedValueError", "CheckFailedError",
    "CustomFunctionError", "DerivativeEntryError", "DuplicateRuleError", "FUNCTION_RULES", "FunctransError",
    "GradInterpreter",
    "Handler", "Interpreter",
    "JvpInterpreter", "MissingRuleError", "Origin", "PassThrough", "PullbackInterpreter", "RuleError", "Step",
    "RuleResultError", "RuleTable", "TableInterpreter", "VmapInterpreter", "WrapperTensor",
    "caller", "noting_lines", "origin", "user_line",
}  # fmt: skip


def calls_of(case: Case, pairs: int) -> list[tuple[dict[str, str], dict[str, Any]]]:
    return [(chosen, arguments) for _, chosen, arguments in wrong_calls.wrong_calls([case], pairs)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_wrong_calls(case: Case) -> None:
    before, wrong = thread_state(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for chosen, arguments in calls_of(case, pairs=20):
            error = outcome(case, arguments)
            if error is not None and not is_deliberate(error, case, arguments):
                wrong.append(f"{chosen}: {type(error).__name__}: {error}")
            if isinstance(error, CallError):
                wrong += [
                    f"{chosen}: {error}"
                    for text in ("PyTreeSpec", "WrapperTensor", " object at 0x")
                    if text in str(error)
                ]
            assert thread_state() == before, chosen
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", [case for case in CASES if hasattr(torch.func, case.name)], ids=lambda case: case.name)
def test_errors_are_of_the_kind_that_torch_func_raises(case: Case) -> None:
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (chosen, arguments), (_, again) in zip(calls_of(case, 0), calls_of(case, 0), strict=True):
            ours = outcome(case, arguments)
            if ours is None or not isinstance(ours, functrans.FunctransError):
                continue
            with using(torch.func):
                theirs = outcome(case, again)
            kinds = [kind for kind in (ValueError, TypeError, IndexError) if meant(theirs) and isinstance(theirs, kind)]
            wrong += [
                f"{chosen}: {ours!r} is no {kind.__name__}: {theirs}" for kind in kinds if not isinstance(ours, kind)
            ]
    assert not wrong, "\n".join(wrong)


def test_wrong_calls_inside_transforms() -> None:
    """As the body of an outer transform, each leaves it as it was: what follows in it is right."""
    x = torch.tensor([1.0, 2.0, 3.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case, _, arguments in list(wrong_calls.wrong_calls())[::37]:
            if case.extends:
                continue

            def body(y: Any, case: Case = case, arguments: Any = arguments) -> Any:
                inside = thread_state()
                outcome(case, arguments)
                assert thread_state() == inside
                return (y * y).sum()

            assert torch.equal(functrans.grad(body)(x), 2 * x)
            assert torch.equal(functrans.vmap(body)(x), x * x)


def test_every_public_function_is_called() -> None:
    named = {case.name for case in CASES}
    public = {*functrans.__all__, *extend.__all__} - NO_CALLS
    assert public - named == set()
    for name in public & set(functrans.__all__):
        parameters = inspect.signature(getattr(functrans, name)).parameters.values()
        given = {p for case in CASES if case.name == name for p in case.arguments}
        assert {
            p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name[0] != "_"
        } <= given, name


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, x: functrans.grad(f)(x),
    "grad_and_value": lambda f, x: functrans.grad_and_value(f)(x),
    "value_and_grad": lambda f, x: functrans.value_and_grad(f)(x),
    "vjp": functrans.vjp,
    "jvp": lambda f, x: functrans.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: functrans.vmap(f)(x),
    "vmap in chunks": lambda f, x: functrans.vmap(f, chunk_size=1)(x),
    "jacrev": lambda f, x: functrans.jacrev(f)(x),
    "jacfwd": lambda f, x: functrans.jacfwd(f)(x),
    "hessian": lambda f, x: functrans.hessian(f)(x),
    "reap": lambda f, x: functrans.reap(f)(x),
    "plant": lambda f, x: functrans.plant(f, {})(x),
    "count": lambda f, x: functrans.count(f)(x),
    "sanitize": lambda f, x: functrans.sanitize(f)(x),
    "lowp": lambda f, x: functrans.lowp(f, torch.bfloat16)(x),
    "condition": lambda f, x: functrans.condition(f, {})(x),
    "seed": lambda f, x: functrans.seed(f, 0)(x),
    "log_density": lambda f, x: functrans.log_density(f)({}, x),
    "clipped_grad": lambda f, x: functrans.clipped_grad(lambda w, x: f(x), 1.0)(x, x),
    "per_example_norms": lambda f, x: functrans.per_example_norms(lambda w, x: f(x))(x, x),
    "run_transformed": lambda f, x: extend.run_transformed(wrong_calls.Counting(f), lambda: f(x)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("kind", [ValueError, TypeError, AttributeError, KeyError, StopIteration, KeyboardInterrupt])
def test_an_error_of_the_function_passes_as_it_is(kind: type[BaseException], transform: Any) -> None:
    before, own = thread_state(), kind("own")

    def f(x: Any) -> Any:
        raise own

    with pytest.raises(kind) as caught:
        transform(f, torch.ones(2))
    assert caught.value is own and thread_state() == before


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_wrong_call_within_the_function_is_its_own(transform: Any) -> None:
    def inner(a: Any, b: Any) -> Any:
        return a

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'") as caught:
        transform(lambda x: inner(x), torch.ones(2))  # type: ignore[call-arg]
    assert not isinstance(caught.value, functrans.FunctransError)
