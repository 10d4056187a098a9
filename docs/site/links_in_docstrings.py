"""Names in docstrings lead to their entries: ``vjp`` to functrans.vjp, ``torch.Tensor`` to PyTorch's documentation.

Docstrings are written to be read in an editor, where a name is a literal and not a role. Here a literal that is exactly
a public name becomes a reference. With ``nitpicky`` on, a reference that leads nowhere fails the build, unless it is to
what nobody documents: a private name of PyTorch's, or an internal one that a signature shows.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.intersphinx import resolve_reference_any_inventory
from sphinx.util.rst import escape

import functrans
import functrans.extend

LITERAL = re.compile(r"(?<![`:])``([\w.]+)``(?!`)")

PAGE = re.compile(r"(?<!`)\bdocs/(\w+)\.md\b")

#: By public name its entry; functrans comes first, where a name is in both.
ENTRIES = {name: f"{m.__name__}.{name}" for m in (functrans.extend, functrans) for name in m.__all__}

#: What signatures call otherwise than the documentation.
DOCUMENTED_AS = {"Tensor": "torch.Tensor", "torch.nn.modules.module.Module": "torch.nn.Module"}

#: What signatures name and no documentation has.
NOWHERE = re.compile(r"torch\._.*|torch\.utils\.hooks\.RemovableHandle|OpOverload|OperatorFunction|functrans\..*")


def link_names(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the literals of a docstring that are public names into references."""
    if what == "exception" and obj.__doc__ == obj.sentence:
        lines[:] = [escape(line) for line in lines]  # the sentence of an error, which is plain text
    own = {name.rpartition(".")[2], *parameters(obj)}

    def link(literal: re.Match[str]) -> str:
        target = literal[1]
        if target in own:
            return literal[0]
        if target in ENTRIES:
            return f":py:obj:`{target} <{ENTRIES[target]}>`"
        if ("py:function", target) in TORCH or ("py:class", target) in TORCH:
            return f":py:obj:`{target}`"
        return literal[0]

    lines[:] = [PAGE.sub(r":doc:`/\1`", line) for line in lines]
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else LITERAL.sub(link, line) for line in lines]


#: By name the docstring of an attribute, while napoleon is at it.
ATTRIBUTES: dict[str, list[str]] = {}


def keep_attribute(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "property"):
        ATTRIBUTES[name] = list(lines)


def put_attribute_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Ours are sentences; napoleon takes what stands before a colon for the attribute's type."""
    if name in ATTRIBUTES:
        lines[:] = ATTRIBUTES.pop(name)


def parameters(obj: Any) -> list[str]:
    try:
        return list(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return []


def sign(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """Errors show no signature: nobody calls them."""
    return ("", None) if what == "exception" else None


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement) -> Any:
    """A reference that Sphinx found no entry for: one by the last part of the name, or none that is missed."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    last = target.rpartition(".")[2]
    domain = env.domains.python_domain
    found = {name for name in domain.objects if name.rpartition(".")[2] == last and name.startswith("functrans")}
    if target.startswith("functrans.") or "." not in target:
        for name in sorted(found, key=lambda name: (name != ENTRIES.get(last), len(name)))[:1]:
            entry = domain.objects[name]
            uri = app.builder.get_relative_uri(node["refdoc"], entry.docname) + "#" + entry.node_id
            return nodes.reference("", "", contnode, internal=True, refuri=uri, reftitle=name)
    if target in DOCUMENTED_AS:
        node["reftarget"] = DOCUMENTED_AS[target]
        return resolve_reference_any_inventory(env, False, node, contnode)
    return contnode if NOWHERE.fullmatch(target) else None


TORCH: set[tuple[str, str]] = set()


def note_inventory(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    TORCH.update((kind, name) for kind, names in env.intersphinx_named_inventory["torch"].items() for name in names)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", keep_attribute, priority=400)
    app.connect("autodoc-process-docstring", put_attribute_back, priority=600)  # napoleon has 500
    app.connect("autodoc-process-docstring", link_names, priority=700)
    app.connect("autodoc-process-signature", sign)
    app.connect("missing-reference", resolve, priority=900)
    app.connect("env-before-read-docs", note_inventory)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
