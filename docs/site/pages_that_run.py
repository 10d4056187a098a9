"""Pages that are programs: lessons and the gallery run while the site is built, and show what they print and draw.

They run one after another in the process that builds the site, each in a namespace of its own, as tests/test_docs.py
runs pages. (A Jupyter kernel for each would import PyTorch anew, which takes longer than most pages do.) Nothing is
kept from one build to the next, and an exception ends the build with the line of the page.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

#: The folders whose pages run.
FOLDERS = ("learn", "gallery")

FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"\]\(([^):#]*\.py)\)")
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)


class Cell(NamedTuple):
    """A piece of a page: Markdown, or Python (``runs``), and the line on which it begins, from 0."""

    runs: bool
    text: str
    line: int


def cells_of_markdown(page: str) -> Iterator[Cell]:
    """The blocks of a page that begin with ```python, and what is between them."""
    done = 0
    for block in FENCE.finditer(page):
        yield Cell(False, page[done : block.start()], page.count("\n", 0, done))
        yield Cell(True, block[1], page.count("\n", 0, block.start(1)))
        done = block.end()
    yield Cell(False, page[done:], page.count("\n", 0, done))


def cells_of_program(page: str) -> Iterator[Cell]:
    """The cells of a program, which begin with ``# %%``, or ``# %% [markdown]`` if they are comments to be read."""
    heads = list(CELL.finditer(page))
    ends = [head.start() for head in heads[1:]] + [len(page)]
    for head, end in zip(heads, ends, strict=True):
        text, line = page[head.end() : end], page.count("\n", 0, head.end())
        if "[markdown]" in head[1]:
            yield Cell(False, re.sub(r"^# ?", "", text, flags=re.MULTILINE), line)
        else:
            yield Cell(True, text, line)


class Running:
    """One page that runs."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.namespace: dict[str, Any] = {"__name__": name}

    def outputs(self, cell: Cell) -> list[Any]:
        """Run a cell and return what a notebook shows under it."""
        printed, value = io.StringIO(), None
        try:
            tree = ast.parse("\n" * cell.line + cell.text, str(self.path))
            *_, last = tree.body or [None]
            if isinstance(last, ast.Expr):
                tree.body.pop()
            with contextlib.redirect_stdout(printed):
                exec(compile(tree, str(self.path), "exec"), self.namespace)  # noqa: S102 - our own pages
                if isinstance(last, ast.Expr):
                    value = eval(compile(ast.Expression(last.value), str(self.path), "eval"), self.namespace)
        except (Exception, SystemExit) as error:
            raise ExtensionError(f"{place(self.path, error)}: {type(error).__name__}: {error}", error) from error
        stream = [nbformat.v4.new_output("stream", text=printed.getvalue())] if printed.getvalue() else []
        shown = [nbformat.v4.new_output("execute_result", data=display(value))] if value is not None else []
        return [*stream, *shown, *figures()]


def place(path: Path, error: BaseException) -> str:
    """The innermost line of the page in an exception's traceback."""
    lines, at = [], error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == str(path):
            lines.append(at.tb_lineno)
        at = at.tb_next
    return f"{path}:{lines[-1] if lines else error.lineno if isinstance(error, SyntaxError) else '?'}"


def display(value: Any) -> dict[str, str]:
    """What a notebook gets of a value: its repr, and HTML or SVG where it has that."""
    ways = {"text/html": "_repr_html_", "image/svg+xml": "_repr_svg_"}
    rich = {kind: getattr(value, way)() for kind, way in ways.items() if hasattr(type(value), way)}
    return {"text/plain": repr(value)} | {kind: text for kind, text in rich.items() if text is not None}


def figures() -> list[Any]:
    """The open figures of Matplotlib, as SVG; they are closed."""
    plt = sys.modules.get("matplotlib.pyplot")
    if plt is None:
        return []
    shown = []
    for number in plt.get_fignums():
        file = io.StringIO()
        plt.figure(number).savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
        shown.append(nbformat.v4.new_output("display_data", data={"image/svg+xml": file.getvalue()}))
    plt.close("all")
    return shown


@contextlib.contextmanager
def left_as_found(folder: Path) -> Iterator[None]:
    """Settings that pages may change are put back, so that none depends on which ran before it."""
    dtype, threads, path = torch.get_default_dtype(), torch.get_num_threads(), list(sys.path)
    sys.path.insert(0, str(folder))  # as when Python runs the program
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(0)
            torch.set_num_threads(1)  # the operations are so small that threads would only wait for each other
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        sys.path[:] = path


def linked(path: Path, text: str) -> str:
    """Links to programs as links to files, but for those of the gallery, which are pages."""

    def link(found: re.Match[str]) -> str:
        is_page = (path.parent / found[1]).resolve().parent == path.parent.resolve() and path.parent.name == "gallery"
        return found[0] if is_page else f"](path:{found[1]})"

    return PROGRAM.sub(link, text)


def notebook(path: Path, page: str) -> Any:
    """The page as a notebook; if it is in one of the folders, with its outputs."""
    if path.parent.name not in FOLDERS:
        cells = [Cell(False, page, 0)]
    else:
        cells = list(cells_of_program(page) if path.suffix == ".py" else cells_of_markdown(page))
    made = nbformat.v4.new_notebook(
        metadata={"source_map": [cell.line for cell in cells], "language_info": {"name": "python"}}
    )
    running, counter = Running(path, "__main__" if path.suffix == ".py" else path.stem), itertools.count(1)
    with left_as_found(path.parent):
        for cell in cells:
            if cell.runs:
                code = nbformat.v4.new_code_cell(cell.text.strip("\n"), outputs=running.outputs(cell))
                code.execution_count = next(counter)
                made.cells.append(code)
            else:
                made.cells.append(nbformat.v4.new_markdown_cell(linked(path, cell.text)))
    return made


APP: Sphinx


def read(page: str) -> Any:
    """The reader that conf.py names (``nb_custom_formats``); Sphinx knows which page it is."""
    return notebook(Path(APP.env.doc2path(APP.env.docname)), page)


def outdated(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """What ran in an earlier build may do something else by now, although the page is the same."""
    return [name for name in env.found_docs if name.startswith(tuple(f"{folder}/" for folder in FOLDERS))]


def show_plots(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """The page of the gallery shows a plot of each program that it lists."""
    if docname != "gallery/index":
        return
    for item in list(doctree.findall(nodes.list_item)):
        (reference,) = item.findall(nodes.reference)
        program = "gallery/" + reference["refuri"].removesuffix(".html")
        *_, plot = app.env.get_doctree(program).findall(nodes.image)
        shown = nodes.reference("", "", plot.deepcopy(), refuri=reference["refuri"], internal=True)
        item.insert(0, nodes.paragraph("", "", shown))
        item["classes"].append("plot")


def setup(app: Sphinx) -> dict[str, bool]:
    global APP
    APP = app
    app.setup_extension("myst_nb")
    app.connect("env-get-outdated", outdated)
    app.connect("doctree-resolved", show_plots)
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["svg.hashsalt"] = "functrans"  # the same ids in every build
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
