"""Private names of PyTorch stand in functrans/pytorch/, and one that has moved is named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import functrans
from functrans.pytorch.torch_private import ATTRIBUTES, private

PACKAGE = Path(functrans.__file__).parent
HOME = PACKAGE / "pytorch"
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def dotted(node: ast.expr) -> list[str]:
    """``a.b.c`` as its parts; the first is empty where it is no name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id if isinstance(node, ast.Name) else "", *reversed(parts)]


def own_names() -> set[str]:
    """Names with an underscore that the package itself defines."""
    found = {slot for tree in TREES.values() for slot in strings_in_slots(tree)}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def strings_in_slots(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__slots__":
            yield from (c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant))


OWN = own_names()


def private_names(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of every private name of PyTorch in ``tree``."""
    of_torch: set[str] = set()  # what the file knows PyTorch's modules and objects as
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    of_torch.add(alias.asname or "torch")
                    if any(map(is_private, alias.name.split("."))):
                        yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                of_torch.add(alias.asname or alias.name)
                if any(map(is_private, [*str(node.module).split("."), alias.name])):
                    yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            parts = dotted(node)
            operator = parts[0] == "aten" or parts[:3] == ["torch", "ops", "aten"]
            known = node.attr in ATTRIBUTES or (node.attr in own and parts[0] not in of_torch)
            if not operator and not known and parts[0] != "sys":
                yield node.lineno, ast.unparse(node)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr")
            and len(node.args) > 1
        ):
            of, name = dotted(node.args[0]), node.args[1]
            if (
                isinstance(name, ast.Constant)
                and is_private(str(name.value))
                and "aten" not in of
                and name.value not in own
            ):
                yield node.lineno, ast.unparse(node)


def test_private_names_have_one_home() -> None:
    assert [
        f"{path.name}:{line}: {text}"
        for path in TREES
        if path.parent != HOME
        for line, text in private_names(TREES[path], OWN)
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "import torch.utils._pytree as trees",
        "from torch import _C",
        "from torch._decomp import decomposition_table",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch\ntorch._C._set_grad_enabled(True)",
        "import torch\ntorch.rand(2)._conj_copy()",
        "from torch.autograd import forward_ad as fw\nfw._set_fwd_grad_enabled(True)",
        "from torch.autograd.function import Function\nFunction._is_legacy",
        "import torch\ngetattr(torch, '_foreach_add')",
        "def f(x):\n    return x._base",
    ],
)
def test_the_search_finds_what_it_should(line: str) -> None:
    assert {number for number, _ in private_names(ast.parse(line), OWN)} == {line.count("\n") + 1}


def test_home_has_only_resolved_names() -> None:
    """In the one room that may have them, private names are strings, which ``private`` looks up."""
    found = {path.stem: [text for _, text in private_names(TREES[path], OWN)] for path in sorted(HOME.glob("*.py"))}
    assert {module: names for module, names in found.items() if names} == {
        "modules": ["_parametrize._cache_enabled"],
        "torch_private": [
            "torch._ops.HigherOrderOperator", "torch._ops.OpOverload",
            "torch.utils._python_dispatch.TorchDispatchMode", "getattr(op, '_opoverload', None)",
            "definition._vmap_fn",
        ],
    }  # fmt: skip


def test_a_name_that_moved_is_named() -> None:
    with pytest.raises(functrans.pytorch.versions.TorchMovedError) as caught:
        private("torch._C._set_grad_enabled_by_hand", "to set the grad mode")
    assert isinstance(caught.value, ImportError) and isinstance(caught.value.__cause__, AttributeError)
    assert str(caught.value) == (
        f"PyTorch {torch.__version__} has no torch._C._set_grad_enabled_by_hand, which functrans needs "
        "to set the grad mode. "
        "functrans supports PyTorch 2.11 to 2.15: install one of these, or a functrans that supports "
        f"{torch.__version__}. "
        "(functrans/pytorch/ is the place to mend.)"
    )


def test_a_module_that_moved_is_named() -> None:
    with pytest.raises(functrans.pytorch.versions.TorchMovedError, match=r"has no torch\._no_such_module\.name, which"):
        private("torch._no_such_module.name", "to test")


def test_attributes_that_are_listed_are_used() -> None:
    elsewhere = [tree for path, tree in TREES.items() if path.parent != HOME]
    assert set(ATTRIBUTES) <= {
        node.attr for tree in elsewhere for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }
