"""Words of the glossary are links where a page uses them first, and lead to the word."""

from __future__ import annotations

import re

import glossary_links
import pytest
from glossary_links import DOCS, PLAIN

PAGES = glossary_links.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_words_of_the_glossary_are_links_where_a_page_uses_them_first(page):
    unlinked = glossary_links.unlinked(glossary_links.prose(page), glossary_links.words_for(page))
    assert [use.word for use in unlinked] == [], f"tests/checkers/glossary_links.py --fix {page}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_link_leads_to_its_word(page):
    anchors = {anchor: word for word, anchor in glossary_links.words().items()}
    for text, anchor in re.findall(r"\[([^\]]+)\]\([^)]*glossary\.md#([\w-]*)\)", page.read_text(encoding="utf-8")):
        form = re.sub(r"\s+", " ", text.replace("\n# ", "\n")).strip("*")
        assert re.fullmatch(glossary_links.pattern(anchors[anchor]), form, re.IGNORECASE), (text, anchor)


def test_words_that_a_page_uses_in_another_sense_are_used_there():
    words = glossary_links.words()
    for name, plain in PLAIN.items():
        used = {use.word for use in glossary_links.first_uses(glossary_links.prose(DOCS / name), words)}
        assert plain.keys() <= used, f"{name} in PLAIN of tests/checkers/glossary_links.py"


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
    assert found("<!-- figures: cpu -->\nlevel\n<!-- end of figures: cpu -->\nA tape.\n") == ["tape"]
    text = "Two levels, one tape.\n"
    fixed = glossary_links.with_links(tmp_path / "page.md", text, glossary_links.unlinked(text, known), known)
    assert found(fixed) == [] and "glossary.md#there" in fixed


def test_of_a_program_the_text_is_checked(tmp_path):
    page = tmp_path / "page.py"
    cells = "# # A level\n#\n# A [tape](x).\n", "# a rule\nlevel = 1\n", "# A value.\n"
    text = "# %% [markdown]\n{}\n# %%\n{}\n# %% [markdown]\n{}".format(*cells)
    page.write_text(text)
    prose = glossary_links.prose(page)
    known = dict.fromkeys(("level", "tape", "rule", "value"), "here")
    (use,) = glossary_links.unlinked(prose, known)
    assert (use.word, text[use.start :][:5], len(prose)) == ("value", "value", len(text))
