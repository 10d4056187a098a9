"""What importing functrans replaces in PyTorch is what docs/architecture.md says."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import functrans

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
HOME = functrans.__path__[0]


def is_ours(x: Any) -> bool:
    x = x.__func__ if type(x) in (staticmethod, classmethod, types.MethodType) else x
    return type(x) is types.FunctionType and x.__code__.co_filename.startswith(HOME)


def replaced() -> dict[int, str]:
    """By identity, the functions of functrans that stand in PyTorch's modules and classes, with one of their places."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "torch" or not isinstance(module, types.ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if is_ours(value):
                found[id(value)] = f"{name}.{attribute}"
            elif issubclass(type(value), type) and value.__module__.split(".")[0] == "torch":
                for inner, method in list(vars(value).items()):
                    if is_ours(method):
                        function = getattr(method, "__func__", method)
                        found[id(function)] = f"{value.__module__}.{value.__qualname__}.{inner}"
    return found


def listed() -> list[str]:
    """The names in the first column of the page's table."""
    _, _, section = PAGE.read_text().partition("## What importing functrans replaces in PyTorch")
    rows = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    return [name for row in rows for name in re.findall(r"`(torch\.[\w.]+)`", row.split(" | ")[0])]


def check() -> None:
    """Compare the two, in a process in which nothing but this has happened."""
    found = replaced()
    for name in listed():
        value = pkgutil.resolve_name(name)
        assert is_ours(value), f"{name} is listed, and PyTorch's own"
        found.pop(id(getattr(value, "__func__", value)), None)
    assert found == {}, "not listed"


def test_what_is_replaced_is_listed() -> None:
    later = "torch.distributed.fsdp, torch.nn.attention.flex_attention, torch._dynamo"
    code = f"import sys; sys.path.append('tests'); import functrans, {later}, test_replaced; test_replaced.check()"
    root = PAGE.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_search_finds_what_it_should() -> None:
    assert len(listed()) > 15 and "torch.autograd.Function.apply" in listed()
    assert is_ours(pkgutil.resolve_name("torch.autograd.Function.apply"))
    assert not is_ours(pkgutil.resolve_name("torch.autograd.grad"))
    assert "torch.autograd.function.Function.apply" in replaced().values()
