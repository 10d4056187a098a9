"""Errors as sentences: every class fills its own, its callers give what it takes, and a copy says the same."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import functrans
from functrans import errors
from functrans.errors import FunctransError
from functrans.tensors.answers import OF_VALUES, REFUSED

HOME = Path(functrans.__file__).parent
KINDS = {k: v for k, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, FunctransError)}
#: Those whose callers have no signature to go by but ``takes``.
PLAIN = {k: v for k, v in KINDS.items() if v.sentence and v.__init__ is FunctransError.__init__}

OP = torch.ops.aten.sin.default
INTERPRETER = SimpleNamespace(
    name="vmap({f})", level=3, batch_size=5, func=len, repeats_writes=True, is_constant=lambda x: False
)
WRAPPER = SimpleNamespace(interpreter=INTERPRETER)
CALL = SimpleNamespace(what="the {rule}", interpreter=INTERPRETER, given="{x}", registered="rules.py:1")
GIVEN: dict[str, tuple[Any, ...]] = {
    "FunctransError": ("as {it} stands",),
    "RegistrationError": ("as {it} stands",),
    "TorchMovedError": ("torch.{name}", "to run"),
    "NotAnOverloadError": ("a table", "aten::sin"),
    "DeadWrapperError": (WRAPPER,),
    "SameLevelError": (INTERPRETER, INTERPRETER),
    "RuleError": (CALL, ValueError("of {the rule}\n"), "rules.py:2", "user.py:3"),
    "NoDataError": ("numpy()", WRAPPER),
    "CapturedWriteError": (OP, torch.ones(2), INTERPRETER, 0),
    "BranchWriteError": (INTERPRETER, torch.ones(2)),
    "HookError": (len, "{got}", "{expected}"),
    "DataDependentError": (OP, INTERPRETER, "{cure}"),
    "LayoutError": (torch.ones(2),),
    **dict.fromkeys(("MissingRuleError", "NoFormulaError"), (OP, INTERPRETER, "{why}")),
    **dict.fromkeys(
        ("CallError", "CallValueError", "CallTypeError", "CallIndexError"), ("f({x})", "{got}", "{expected}")
    ),
}
STAND_INS = {"op": OP, "interpreter": INTERPRETER, "cls": torch.nn.Linear}


def example(kind: type[FunctransError]) -> FunctransError:
    if kind.__name__ in GIVEN:
        return kind(*GIVEN[kind.__name__])
    return kind(*(STAND_INS.get(name, f"{{{name}}}") for name in kind.takes))


def fields(sentence: str) -> set[str]:
    return {name.split(".")[0] for _, name, _, _ in string.Formatter().parse(sentence) if name}


@pytest.mark.parametrize("kind", PLAIN.values(), ids=PLAIN)
def test_a_sentence_has_a_field_for_all_that_its_class_takes(kind: type[FunctransError]) -> None:
    assert len(set(kind.takes)) == len(kind.takes)
    assert fields(kind.sentence) == set(kind.takes)
    for count in (len(kind.takes) - 1, len(kind.takes) + 1):
        with pytest.raises(ValueError, match="zip"):
            kind(*[OP] * count)


def callers() -> list[tuple[str, ast.Call]]:
    """The calls in the package of classes that only say what they ``take``, with where they stand."""
    found = []
    for path in sorted(HOME.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PLAIN:
                found.append((f"{path.relative_to(HOME)}:{node.lineno}", node))
    return found


def test_callers_give_what_a_class_takes() -> None:
    """No type checker sees this."""
    found = callers()
    assert {node.func.id for _, node in found if isinstance(node.func, ast.Name)} == set(PLAIN)
    wrong = [
        f"{place}: {ast.unparse(node)}"
        for place, node in found
        if len(node.args) != len(PLAIN[node.func.id].takes)  # type: ignore[attr-defined]
        or node.keywords
        or any(isinstance(a, ast.Starred) for a in node.args)
    ]
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_sentence_is_filled_once_and_is_one_line(kind: type[FunctransError]) -> None:
    """Braces in what it is given stand in the message as they came."""
    error = example(kind)
    text = str(error)
    assert text == text.strip() and "  " not in text.replace("\n  ", " ") and error.args == (text,)
    assert ("\n" in text) == (kind is errors.RuleError)
    for given in GIVEN.get(kind.__name__, kind.takes):
        if isinstance(given, str) and given not in STAND_INS and kind is not errors.NotAnOverloadError:
            assert (given if kind.__name__ in GIVEN else f"{{{given}}}") in text


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_copy_says_the_same(kind: type[FunctransError], again: Callable[[Any], Any]) -> None:
    """Errors are pickled on their way from one process to another."""
    error = example(kind)
    error.__notes__ = ["a note"]
    copied = again(error)
    assert type(copied) is kind
    assert str(copied) == str(error) and copied.args == error.args
    assert copied.__notes__ == ["a note"]


def test_every_class_has_a_docstring() -> None:
    for kind in KINDS.values():
        assert kind.__doc__, kind
        assert "\n    " not in kind.sentence


TRANSFORMS: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "grad": lambda f, x: functrans.grad(f)(x),
    "vmap": lambda f, x: functrans.vmap(f)(x[None]),
    "jvp": lambda f, x: functrans.jvp(f, (x,), (x,)),
}
ASKED: dict[str, Callable[[torch.Tensor], Any]] = {
    "backward": lambda x: x.backward(x, retain_graph=True),
    "data_ptr": lambda x: x.data_ptr(),
    "const_data_ptr": lambda x: x.const_data_ptr(),
    "storage": lambda x: x.storage(),
    "share_memory_": lambda x: x.share_memory_(),
    "apply_": lambda x: x.apply_(lambda number: number),
    "map_": lambda x: torch.ones(2).map_(x, lambda a, b: a),
    "map2_": lambda x: torch.ones(2).map2_(x, torch.ones(2), lambda a, b, c: a),
    "is_set_to": lambda x: x.is_set_to(x),
    "numpy": lambda x: x.numpy(),
    "__dlpack__ by from_dlpack": torch.from_dlpack,
    "register_post_accumulate_grad_hook": lambda x: x.register_post_accumulate_grad_hook(print),
    "__reduce_ex__ by pickle": pickle.dumps,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("how", ASKED)
def test_what_a_wrapper_refuses_names_the_call_and_the_cure(how: str, transform: str) -> None:
    cures = "Return the tensor" if transform == "vmap" else "Call .detach()"
    what, cure = {**REFUSED, **OF_VALUES}[how.split()[0]]

    def f(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(FunctransError) as caught:
            ASKED[how](x)
        assert str(caught.value).startswith(what) and f" inside {transform}(" in str(caught.value)
        assert (cure or cures) in str(caught.value)
        return x.sum()

    TRANSFORMS[transform](f, torch.ones(2))


def test_every_refusal_is_asked_for() -> None:
    assert {how.split()[0] for how in ASKED} == {*REFUSED, *OF_VALUES}
