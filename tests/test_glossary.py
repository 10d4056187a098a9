"""Words of the glossary are links where a page uses them first."""

from __future__ import annotations

from pathlib import Path

import glossary_links
import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
#: What newcomers read first, and what else holds to it.
PAGES = [
    *sorted((DOCS / "learn").glob("*.md")),
    *(
        DOCS / f"{page}.md"
        for page in (
            "architecture",
            "control_flow",
            "explain",
            "extending",
            "named_axes",
            "one_sitting",
            "profile",
            "way_back",
        )
    ),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_words_of_the_glossary_are_links_where_a_page_uses_them_first(page):
    unlinked = glossary_links.unlinked(page.read_text(encoding="utf-8"), glossary_links.words())
    assert [use.word for use in unlinked] == [], f"tests/checkers/glossary_links.py --fix {page}"


def test_the_glossary_has_the_words_of_the_lessons():
    words = {"perturbation confusion", "composite", "backward node", "tracked", "borrow", "operator", "tape index"}
    assert words <= set(glossary_links.words())


def test_the_check_of_words_notices(tmp_path):
    known = {"level": "here", "top level": "here", "tape": "there"}

    def found(text: str) -> list[str]:
        return [use.word for use in glossary_links.unlinked(text, known)]

    assert found("Each level has a tape.\n") == ["level", "tape"]
    assert found("Each [level](../glossary.md#here) has `a tape`, and levels.\n") == []
    assert found("# A level\n\n```python\nlevel\n```\n\nA leveller.\n") == []
    assert found("The top level, and later a [level](../glossary.md#here).\n") == ["top level"]
    assert found("Levels first, then a [level](../glossary.md).\n") == ["level"]
    fixed = glossary_links.with_links(tmp_path / "page.md", "Two levels, one tape.\n", known)
    assert found(fixed) == [] and "glossary.md#there" in fixed
