"""docs/torch_func.md has every name of torch.func and of JAX's transforms, and what it says of each is so."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
import torch_func_table as table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import functrans

ROOT = Path(__file__).resolve().parent.parent
ROWS = [("torch.func", r) for r in table.TORCH_FUNC] + [("jax", r) for r in table.JAX]


def equal(a, b):
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.allclose(a, b)
    return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))


def refused(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except functrans.FunctransError:
        return True
    return False


def parameters(f):
    return set(inspect.signature(f).parameters)


def words():
    torch.manual_seed(0)
    own = {name: getattr(functrans, name) for name in functrans.__all__}
    values = {
        "x": torch.tensor([1.0, 2.0, 3.0]),
        "y": torch.tensor([4.0, 5.0, 6.0]),
        "m": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "z": torch.tensor(1.0 + 2.0j),
    }
    tools = {"torch": torch, "nn": nn, "Tensor": Tensor, "checkpoint": checkpoint, "functrans": functrans}
    return own | values | tools | {"equal": equal, "refused": refused, "parameters": parameters}


def is_test(shown):
    """Whether there is a test of this id."""
    path, _, name = shown.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("of", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_row(of, row):
    assert row.answer in ("yes", "no", "differs")
    assert row.reason or row.answer == "yes", "why?"
    if row.shown.startswith("tests/"):
        assert is_test(row.shown)
    else:
        assert eval(row.shown, words()) is True
    function, _, options = row.name.partition("(")
    if row.answer == "yes" and of == "torch.func":
        own = inspect.signature(getattr(functrans, function)).parameters
        theirs = inspect.signature(getattr(torch.func, function)).parameters if hasattr(torch.func, function) else {}
        for option in filter(None, options.rstrip(")").split(", ")):
            assert option in own
            if theirs:
                assert (own[option].default, own[option].kind) == (theirs[option].default, theirs[option].kind)


def test_every_name_of_torch_func_has_a_row():
    assert set(table.names_of_torch_func()) - table.named(table.TORCH_FUNC) == set()


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_every_name_of_jax_has_a_row():
    assert set(table.names_of_jax()) - table.named(table.JAX) == set()


def test_no_row_is_there_twice():
    for rows in (table.TORCH_FUNC, table.JAX):
        names = [r.name for r in rows]
        assert sorted(set(names)) == sorted(names)


def test_the_page_is_what_the_script_writes():
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "run python tests/checkers/torch_func_table.py"


def test_the_test_of_rows_notices():
    assert not is_test("tests/test_spec.py::test_no_such_thing")
    with pytest.raises(AssertionError):
        test_row("jax", table.row("grad", "yes", "equal(grad(torch.sum)(x), 2 * x)"))
    with pytest.raises(AssertionError):
        test_row("jax", table.row("grad", "no", "True"))
