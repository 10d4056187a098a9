"""What a link says: in the Markdown ``[architecture.md](architecture.md)``, on the site the title of that page.

A plot without a description gets the title of its page as one.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

FILE = re.compile(r"(?:[\w-]+/)*([\w-]+)\.md")


def use_titles(app: Sphinx, doctree: nodes.document, page: str) -> None:
    titles = {name.rpartition("/")[2]: title.astext() for name, title in app.env.titles.items()}
    for link in doctree.findall(nodes.reference):
        file = FILE.fullmatch(link.astext())
        if file and file[1] in titles and link.get("internal"):
            link[:] = [nodes.inline("", titles[file[1]])]
    for image in doctree.findall(nodes.image):
        image.setdefault("alt", app.env.titles[page].astext())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-resolved", use_titles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
