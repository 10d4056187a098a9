"""The names and paths that the pages write as code are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from test_docs import FENCE, PAGES, ROOT, SOURCES
from torch.distributions import Distribution

SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)+/?")
#: ``file.py``: ``name``, ``Class.method``
STANDS_IN = re.compile(r"`(functrans/[\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)")
#: Pages that set the words of other libraries beside ours.
COMPARING = {"glossary.md", "map.md"}
#: Names of others, and of the environment, that pages mention.
ELSEWHERE = {
    "CondOp", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "TransformType", "Vmap", "py_impl",
}  # fmt: skip
OTHERS_FOLDERS = ("torch/", "aten/", "jax/")
NAMESPACES = (
    torch, torch.Tensor, torch.autograd, torch.autograd.Function, torch.fft, torch.func, torch.linalg, torch.nn,
    torch.nn.Module, torch.nn.functional, torch.ops.aten, torch.sparse, torch.special,
    torch._functorch.eager_transforms, Distribution,
)  # fmt: skip
FILES = sorted(
    p for folder in ("functrans", "tests", "benchmarks", "docs", ".ci") for p in (ROOT / folder).rglob("*")
)


@cache
def words_of_sources() -> frozenset[str]:
    paths = {*SOURCES, ROOT / "pyproject.toml"} - {Path(__file__).resolve()}
    texts = [f"{path.stem} {path.read_text(encoding='utf-8')}" for path in paths]
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


def is_there(path: str) -> bool:
    """Whether a file or folder of the repository ends in ``path``; ``.py`` may be left out."""
    wanted = "/" + path.rstrip("/")
    return any(f"/{p.relative_to(ROOT)}".endswith((wanted, f"{wanted}.py")) for p in FILES)


def strange(text: str) -> list[str]:
    """What ``text``, a page, writes as code and nobody knows: paths, and names of four characters or more."""
    known = words_of_sources() | {w for m in FENCE.finditer(text) for w in re.findall(r"\w+", m[2])} | ELSEWHERE
    found = []
    for span in SPAN.findall(FENCE.sub("", text)):
        if PATH.fullmatch(span) and not span[0].isdigit():
            found += [] if span.startswith(OTHERS_FOLDERS) or is_there(span) else [span]
        else:
            words = re.findall(r"[A-Za-z_]\w{3,}", span)
            found += [w for w in words if w not in known and not any(hasattr(place, w) for place in NAMESPACES)]
    return found


def defined(path: Path) -> set[str]:
    """The names that a module defines, those of members with their class."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name not in COMPARING:
        assert strange(text) == []
    for file, names in STANDS_IN.findall(text):
        assert (ROOT / file).is_file(), file
        assert set(SPAN.findall(names)) <= defined(ROOT / file), file


@pytest.mark.parametrize(
    "text", ["see `core/lowering.py`", "the `functrans.core.tensor.strip_all` of it", "`no_such/room/`"]
)
def test_the_check_of_names_notices(text: str) -> None:
    assert strange(f"{text}, and `core/dispatch.py`, `torch.sin`, `vmap(grad(f))`") != []
