"""Links to a word of the glossary: what ``<a id="tape-index"></a>`` marks in a page is a place that others can link to.

MyST knows of the headings of a page alone. (In the Markdown itself, as a repository's page shows it, such links work.)
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

ANCHOR = re.compile(r'<a id="([\w-]+)">')


def note_anchors(app: Sphinx, doctree: nodes.document) -> None:
    """Add the anchors of the page that was read to what MyST knows of it: line, id and text by anchor."""
    found = [(node, name) for node in doctree.findall(nodes.raw) for name in ANCHOR.findall(node.astext())]
    known = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    known.update({name: (node.line or 0, name, name) for node, name in found})


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", note_anchors)
    return {"parallel_read_safe": True}
