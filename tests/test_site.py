"""The site: it builds without network, asks no other host for anything, and has an entry for every public name."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import functrans
import functrans.extend

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PUBLIC = {f"{module.__name__}.{name}" for module in (functrans, functrans.extend) for name in module.__all__}
GALLERY = sorted((DOCS / "gallery").glob("*.py"))

#: Runs Sphinx in a process that may not open a connection.
WITHOUT_NETWORK = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise PermissionError(f"the site is built without network: {event} {args}")

sys.addaudithook(refuse)
"""
BUILD = WITHOUT_NETWORK + "from sphinx.cmd.build import main\nsys.exit(main(sys.argv[1:]))\n"


def needs_sphinx():
    for package in ("sphinx", "furo", "myst_nb", "matplotlib", "sklearn"):
        pytest.importorskip(package, reason=f"the site needs {package}: pip install -e '.[docs]'")


# What is written: the entries of the API pages


def entries(page: str) -> list[str]:
    """The public names that an API page has an entry for."""
    module = re.search(r"^\.\. (?:currentmodule|automodule):: (\S+)", page, re.MULTILINE)[1]
    found = re.findall(r"^\.\. (?:auto(?:function|class|exception)|py:data):: (\w+)$", page, re.MULTILINE)
    return [f"{module}.{name}" for name in found]


def test_every_public_name_has_an_entry():
    found = [name for page in ("functrans", "extend") for name in entries((DOCS / "api" / f"{page}.rst").read_text())]
    assert sorted(found) == sorted(PUBLIC)


def test_an_entry_is_found():
    page = ".. currentmodule:: m\n\n.. autofunction:: f\n.. autoclass:: C\n   :members:\n.. py:data:: D\n"
    assert entries(page) == ["m.f", "m.C", "m.D"]


def test_the_inventory_is_up_to_date():
    inventories = runpy.run_path(str(DOCS / "site" / "inventories.py"))
    cure = "run python docs/site/inventories.py, and see whether PyTorch's documentation has the pages that are new"
    assert (DOCS / "site" / "torch.inv").read_text() == inventories["inventory"](), cure


# What is built


class Loaded(HTMLParser):
    """What a browser loads for a page, without a click."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        names = ("src", "srcset", "data") if tag in ("a", "link") else ("src", "srcset", "data", "href")
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "search", "index"):
            names += ("href",)
        self.addresses += [given[name] or "" for name in names if name in given]
        self.addresses += styles(given.get("style") or "")


def styles(text: str) -> list[str]:
    """What a style sheet loads."""
    return re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""", text)


def from_other_hosts(name: str, text: str) -> list[str]:
    """The addresses of other hosts from which a file of the site would have something loaded."""
    if name.endswith(".css"):
        loaded = styles(text)
    else:
        page = Loaded()
        page.feed(text)
        inside = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
        loaded = page.addresses + [address for sheet in inside for address in styles(sheet)]
    return [address for address in loaded if re.match(r"(\w+:)?//", address)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://cdn.example/a.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/a.css">'),
        ("a.html", '<p><img src="http://example/a.png"></p>'),
        ("a.html", "<style>@import 'https://example/a.css';</style>"),
        ("a.html", '<p style="background: url(https://example/a.png)"></p>'),
        ("a.css", "@font-face { src: url('https://fonts.example/a.woff2') }"),
    ],
)
def test_the_look_for_other_hosts_notices(name, text):
    assert len(from_other_hosts(name, text)) == 1
    assert from_other_hosts(name, re.sub(r"(https?:)?//[\w.]+/", "", text)) == []
    assert from_other_hosts("a.html", '<a href="https://example">a link is no load</a>') == []


def test_a_build_may_not_open_a_connection():
    code = WITHOUT_NETWORK + "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "PermissionError: the site is built without network" in run.stderr


def test_the_site_builds(tmp_path):
    """All in one test, since what takes time is to build it: with warnings as errors, without network, from nothing."""
    needs_sphinx()
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-c", BUILD, "-W", "--keep-going", "-q", "-E", str(DOCS), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr

    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    sheets = {path.name: path.read_text() for path in tmp_path.rglob("*.css")}
    assert len(pages) > 30 and sheets
    wrong = {name: found for name, text in (pages | sheets).items() if (found := from_other_hosts(name, text))}
    assert wrong == {}

    inventory = InventoryFile.loads((tmp_path / "objects.inv").read_bytes(), uri="").data
    known = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    # two names are in both modules' pages, and have their entry in one
    assert {name for name in PUBLIC if name not in known and name.replace(".extend", "") not in known} == set()

    grad = pages["api/functrans.html"]
    assert 'href="#functrans.grad"' in grad, "a name in a docstring leads to its entry"
    assert "https://docs.pytorch.org/docs/stable/tensors.html#torch.Tensor" in pages["api/extend.html"]

    assert "~collections" not in grad and "&lt;class" not in grad, "a signature that Sphinx could not read"
    file_names = re.compile(r"<a [^>]*reference internal[^>]*>(?:<[^>]*>)*([\w/]+\.md)<")
    linked = {name: found for name, text in pages.items() if (found := file_names.findall(text))}
    assert linked == {}, "a link that says a file's name"
    assert pages["index.html"].count("<img alt=") == 1 and 'alt="../' not in pages["gallery/hessians.html"]

    words = {word for text in pages.values() for word in re.findall(r'href="[^"]*glossary\.html#([\w-]+)"', text)}
    assert len(words) > 50 and [word for word in words if f'id="{word}"' not in pages["glossary.html"]] == []

    for program in GALLERY:
        page = pages[f"gallery/{program.stem}.html"]
        assert re.search(r'<img[^>]* src="\.\./_images/\w+\.svg"', page), f"{program.name} shows no plot"
    assert len(set(re.findall(r'src="(\.\./_images/\w+\.svg)"', pages["gallery/index.html"]))) == len(GALLERY)
    for lesson in (DOCS / "learn").glob("[0-9]*.md"):
        assert "cell_input" in pages[f"learn/{lesson.stem}.html"]


# Pages that run


@pytest.fixture
def pages_that_run():
    needs_sphinx()
    sys.path.insert(0, str(DOCS / "site"))
    import pages_that_run

    sys.path.remove(str(DOCS / "site"))
    return pages_that_run


LESSON = """# A lesson

```python
import torch
x = torch.ones(2)
print("two", x.dtype)
x + 1
```

```text
not run
```

```python
assert x.sum() == 2
```
"""


def test_the_blocks_of_a_lesson_run_and_show_their_outputs(pages_that_run, tmp_path):
    (tmp_path / "learn").mkdir()
    made = pages_that_run.notebook(tmp_path / "learn" / "lesson.md", LESSON)
    assert [cell.cell_type for cell in made.cells] == ["markdown", "code", "markdown", "code", "markdown"]
    printed, value = made.cells[1].outputs
    assert printed.text == "two torch.float32\n" and value.data == {"text/plain": "tensor([2., 2.])"}
    assert made.cells[3].outputs == [] and "not run" in made.cells[2].source
    assert made.metadata.source_map[1] == 3  # lines of the page, from 0


def test_a_page_elsewhere_does_not_run(pages_that_run, tmp_path):
    (cell,) = pages_that_run.notebook(tmp_path / "page.md", LESSON).cells
    assert cell.cell_type == "markdown" and cell.source == LESSON


@pytest.mark.parametrize(
    ("folder", "target", "expected"),
    [
        ("docs", "../tests/test_site.py", "path:../tests/test_site.py"),
        ("learn", "mini.py", "path:mini.py"),
        ("gallery", "ntk.py", "ntk.py"),
        ("gallery", "../learn/mini.py", "path:../learn/mini.py"),
        ("docs", "glossary.md", "glossary.md"),
        ("docs", "https://example/a.py", "https://example/a.py"),
    ],
)
def test_a_link_to_a_program_is_one_to_a_page_in_the_gallery_alone(pages_that_run, tmp_path, folder, target, expected):
    (cell,) = pages_that_run.notebook(tmp_path / folder / "page.md", f"See [this]({target}).").cells
    assert cell.source == f"See [this]({expected})."


@pytest.mark.parametrize(
    ("code", "line", "what"),
    [
        ("assert x.sum() == 3", 15, "AssertionError"),
        ("def f():\n    return 1 / 0\n\nf()", 16, "ZeroDivisionError"),
        ("x = = 1", 15, "SyntaxError"),
    ],
)
def test_an_exception_ends_the_build_with_the_line_of_the_page(pages_that_run, tmp_path, code, line, what):
    from sphinx.errors import ExtensionError

    page = LESSON.replace("assert x.sum() == 2", code)
    path = tmp_path / "learn" / "lesson.md"
    with pytest.raises(ExtensionError, match=re.escape(f"{path}:{line}: {what}")):
        pages_that_run.notebook(path, page)


def test_a_program_is_cells_and_shows_its_plots(pages_that_run, tmp_path):
    text = "# %% [markdown]\n# # A title\n#\n# Text.\n\n"
    program = text + "# %%\nimport matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()\n"
    made = pages_that_run.notebook(tmp_path / "gallery" / "program.py", program)
    assert made.cells[0].source.startswith("# A title\n\nText.")
    (plot,) = made.cells[1].outputs
    assert "<svg" in plot.data["image/svg+xml"]
    again = pages_that_run.notebook(tmp_path / "gallery" / "program.py", program)
    assert len(again.cells[1].outputs) == 1


def test_pages_leave_no_settings_behind(pages_that_run, tmp_path):
    import torch

    state, path = torch.random.get_rng_state(), list(sys.path)
    page = "```python\nimport torch\ntorch.set_default_dtype(torch.float64)\ntorch.rand(3).dtype\n```\n"
    made = pages_that_run.notebook(tmp_path / "learn" / "lesson.md", page)
    assert made.cells[1].outputs[0].data["text/plain"] == "torch.float64"
    assert torch.get_default_dtype() is torch.float32 and sys.path == path
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("program", GALLERY, ids=lambda path: path.stem)
def test_a_program_of_the_gallery_runs_by_itself(program):
    needs_sphinx()
    env = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:__main__", str(program)], check=True, env=env)
