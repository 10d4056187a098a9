"""Write torch.inv: where PyTorch's documentation has the names that our docstrings and signatures refer to.

    python docs/site/inventories.py

PyTorch's own inventory is one of many thousand names that changes with each of its releases, and the site is built
without network. So the names are looked up in what is installed, and the pages follow from how PyTorch's documentation
is laid out: a page for each function and class, with few exceptions. It is version 1 of Sphinx's format, which is text.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch

import functrans
import functrans.extend

FILE = Path(__file__).parent / "torch.inv"
NAME = re.compile(r"``(torch(?:\.\w+)+)``")

#: Names of signatures.
SIGNATURES = ("torch.Size", "torch.Tensor", "torch.dtype", "torch.nn.Module")
#: What has no page of its own.
PAGES = {
    "torch.Size": "size.html",
    "torch.Tensor": "tensors.html",
    "torch.dtype": "tensor_attributes.html",
    "torch.distributions": "distributions.html",
    "torch.autograd.set_detect_anomaly": "autograd.html",
    "torch.library": "library.html",
}


def docstrings() -> list[str]:
    """Those of the public names, and of their methods."""
    things = [getattr(module, name) for module in (functrans, functrans.extend) for name in module.__all__]
    methods = [member for thing in things if inspect.isclass(thing) for member in vars(thing).values()]
    return [thing.__doc__ or "" for thing in (*things, *methods, functrans, functrans.extend)]


def found(name: str) -> Any:
    """What ``name`` is in the installed PyTorch."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(name)


def line(name: str) -> str | None:
    """The line of the inventory for ``name``; None for what has no entry there, such as an operator."""
    if name.startswith("torch.ops."):
        return None
    thing = found(name)
    if not (inspect.isroutine(thing) or inspect.isclass(thing) or name in PAGES):
        return None
    kind = "mod" if inspect.ismodule(thing) else "class" if inspect.isclass(thing) else "function"
    page = PAGES.get(name) or PAGES.get(name.rpartition(".")[0]) or f"generated/{name}.html"
    return f"{name} {kind} {page}"


def inventory() -> str:
    names = {name for text in docstrings() for name in NAME.findall(text)} | set(SIGNATURES)
    lines = filter(None, map(line, sorted(names)))
    version = ".".join(torch.__version__.split(".")[:1])
    head = ["# Sphinx inventory version 1", "# Project: torch", f"# Version: {version}"]
    return "\n".join([*head, *lines]) + "\n"


if __name__ == "__main__":
    FILE.write_text(inventory())
