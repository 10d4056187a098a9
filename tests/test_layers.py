"""Imports point down only: a room of the package uses what stands below it, and no module is part of a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import functrans
from functrans.errors.call_sites import CALLED_BY_USERS

HOME = Path(functrans.__file__).parent
#: The rooms, the lowest first; those of one line do not use each other.
FLOORS = [
    {"errors"},
    {"pytorch"},
    {"operators", "tensors"},
    {"core"},
    {"boundary"},
    {"functionalization", "pictures"},
    {"decompositions"},
    {"derivatives"},
    {"programs"},
    {"interpreters"},
    {"control_flow"},
    {"door", "api"},
    {"extension"},
    {"extend", "shipped", "explanation"},
    {"__init__"},
    {"compat", "tour"},
    {"cli"},
    {"explain"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(HOME.rglob("*.py")):
        name = ".".join(path.relative_to(HOME).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


MODULES = modules()


def room(module: str) -> str:
    return "cli" if module.endswith("__main__") else module.split(".")[0]  # what is run as a command stands on top


def imported(node: ast.ImportFrom) -> Iterator[str]:
    """The modules of the package that an import statement names."""
    if node.module is None or node.module.split(".")[0] != "functrans":
        return
    base = node.module.split(".")[1:]
    for alias in node.names:
        full = ".".join([*base, alias.name])
        yield full if full in MODULES else ".".join(base) or "__init__"


def imports(tree: ast.AST) -> set[str]:
    """All modules of the package that are imported anywhere in ``tree``, for types too."""
    return {name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in imported(node)}


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]


def at_import(tree: ast.Module) -> set[str]:
    """The modules that have to be imported before this one is: not those for types,
    nor those imported inside of functions.
    """
    nodes: list[ast.AST] = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    return {name for node in nodes if isinstance(node, ast.ImportFrom) for name in imported(node)}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            found = walk(other, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := walk(module, []))), [])


def test_every_room_has_a_floor() -> None:
    assert {room(m) for m in MODULES} == set(FLOOR)


def test_no_arrow_points_up() -> None:
    assert arrows_up({m: imports(tree) - {m} for m, tree in MODULES.items()}) == []


def test_no_modules_import_each_other() -> None:
    assert circle({m: at_import(tree) - {m} for m, tree in MODULES.items()}) == []


def test_every_room_is_a_package() -> None:
    folders = {path.parent for path in HOME.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_modules_whose_code_users_call_are_there() -> None:
    """Those that errors/call_sites.py names."""
    assert [name for name in CALLED_BY_USERS if name.replace("/", ".") not in MODULES] == []


def test_the_core_is_read_in_one_sitting() -> None:
    files = list(HOME.joinpath("core").rglob("*.py"))
    assert len(files) == 5 and sum(len(path.read_text().splitlines()) for path in files) < 800


def described_rooms() -> dict[str, set[str]]:
    """By room, the names that docs/architecture.md has in its part of the list."""
    _, _, section = (HOME.parent / "docs" / "architecture.md").read_text().partition("## The rooms")
    found: dict[str, set[str]] = {}
    for item in section.partition("\n## ")[0].split("\n- ")[1:]:
        rooms = re.findall(r"\*\*`([\w./]+)`\*\*", item)
        words = set(re.findall(r"(?<!\*)`(\w+)/?`", item))
        found.update({name.removesuffix(".py").rstrip("/"): words for name in rooms})
    return found


def undescribed(words: set[str], paths: list[list[str]]) -> list[str]:
    """The modules of which neither the name nor a folder that is listed as one is among ``words``."""
    return [".".join(p) for p in paths if p[-1] not in words and not words & set(p[:-1]) - {"grad", "jvp", "vmap"}]


def test_the_page_has_every_module_in_its_room() -> None:
    described = described_rooms()
    assert set(described) == set(FLOOR) - {"__init__"}
    for name, words in described.items():
        paths = [module.split(".")[1:] for module in MODULES if module.startswith(f"{name}.")]
        if name == "extend":  # which shares its line with what is made of it
            continue
        if name not in ("derivatives", "tour"):  # of which a module is one family of operators, or one station
            assert undescribed(words, paths) == [], name
        assert words - {part for path in paths for part in path} == set(), name


def test_a_module_that_the_page_forgot_is_found() -> None:
    words = {"table", "rules", "vmap"}
    paths = [["vmap", "table"], ["vmap", "rules", "products"], ["vmap", "hooks"]]
    assert undescribed(words, paths) == ["vmap.hooks"]


@pytest.mark.parametrize(
    ("module", "other"), [("core.stack", "interpreters.grad.interpreter"), ("api.vmap", "door.torch_dispatch")]
)
def test_an_arrow_up_is_found(module: str, other: str) -> None:
    graph = {m: imports(tree) - {m} for m, tree in MODULES.items()}
    graph[module] = graph[module] | {other}
    assert arrows_up(graph) == [f"{module} imports {other}"]


def test_a_circle_is_found() -> None:
    graph = {m: at_import(tree) - {m} for m, tree in MODULES.items()}
    assert "core.dispatch" in graph["functionalization.views"]
    graph["core.dispatch"] = graph["core.dispatch"] | {"functionalization.views"}
    assert {"core.dispatch", "functionalization.views"} <= set(circle(graph))
