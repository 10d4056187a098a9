"""Words of the glossary: on each page, the first use of a word in prose is a link to where it is explained.

python tests/checkers/glossary_links.py [PAGE ...]          says which words are used before they are linked
python tests/checkers/glossary_links.py --fix [PAGE ...]    makes them links

Without pages it is all of them. Words that a page uses in another sense are in PLAIN.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GLOSSARY = DOCS / "glossary.md"
ROW = re.compile(r'^\| <a id="([\w-]+)"></a>([^|]+?) \| ')
#: What is no prose: figures that a command writes, fenced blocks, the words of links, code, headings, HTML, the first
#: row of a table.
NO_PROSE = re.compile(
    r"^<!-- (figures: \w+) -->$[\s\S]*?^<!-- end of \1 -->$"
    r"|^```[\s\S]*?^```$|!?\[[^\]]*\]\([^)]*\)|`[^`\n]*`|^\0*#+ .*$|<[^>\n]+>|^\|.*\|\n(?=\|[-|]+\|$)|^    .*$",
    re.MULTILINE,
)
#: Of a program of the gallery, what is no page: cells of code, and what comments begin with.
NO_PAGE = re.compile(r"^# %%(?! \[markdown\]).*(?:\n(?!# %% \[markdown\]).*)*|^# ", re.MULTILINE)
#: By page, words that mean there what they mean everywhere, and what that is.
PROGRAM, VALUE, TRACE = "something that runs", "what a function or a variable is", "of a matrix"
PLAIN = {
    "bounds.md": {"value": VALUE, "tangent": "a line that touches a curve"},
    "compat.md": {"program": PROGRAM},
    "compile.md": {"program": PROGRAM, "trace": "what Dynamo does"},
    "correctness.md": {
        "program": PROGRAM, "value": VALUE, "constant": "what PyTorch holds for one", "wrapper": "OpInfo's",
    },
    "differences.md": {
        "value": VALUE, "constant": "what PyTorch holds for one", "caller": "who calls a function", "branch": "a verb",
    },
    "gallery/index.md": {"program": PROGRAM},
    "gallery/ntk.py": {"tangent": "part of the kernel's name"},
    "gallery/pde.py": {"value": VALUE},
    "index.md": {"program": PROGRAM},
    "performance.md": {"program": PROGRAM, "process": "the operating system's", "lower": "further down"},
    "recipes.md": {"program": PROGRAM, "trace": TRACE, "lower": "make less"},
    "shipped_effects.md": {"value": VALUE},
    "sparsity.md": {"value": VALUE, "constant": "what does not change", "branch": "of a program in Python"},
    "subclasses.md": {"program": PROGRAM},
    "taylor.md": {"value": VALUE, "trace": TRACE},
    "torch_func.md": {"program": PROGRAM, "value": VALUE},
    "versions.md": {"interpreter": "Python's", "value": VALUE},
}  # fmt: skip


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")


def words() -> dict[str, str]:
    """The words of the glossary, each with its anchor."""
    rows = map(ROW.match, GLOSSARY.read_text(encoding="utf-8").splitlines())
    return {row[2]: row[1] for row in rows if row}


def words_for(page: Path) -> dict[str, str]:
    """Those that a page is held to."""
    plain = PLAIN.get(page.relative_to(DOCS).as_posix(), {})
    return {word: anchor for word, anchor in words().items() if word not in plain}


def pages() -> list[Path]:
    """The pages that have links to the glossary."""
    found = [*DOCS.rglob("*.md"), *(DOCS / "gallery").glob("*.py")]
    return sorted(page for page in found if page != GLOSSARY)


def hidden(match: re.Match[str]) -> str:
    """As much of nothing as there was."""
    return re.sub(r"[^\n]", "\0", match[0])


def prose(page: Path) -> str:
    """The text of a page; of a program its cells of text, each letter in its place."""
    text = page.read_text(encoding="utf-8")
    return text if page.suffix == ".md" else NO_PAGE.sub(hidden, text)


class Use(NamedTuple):
    """A word of the glossary in the prose of a page: where, as it is written, and the word."""

    start: int
    text: str
    word: str


def pattern(word: str) -> str:
    """A word as it is written in a sentence."""
    spaced = re.escape(word).replace(r"\ ", r"\s+")
    return rf"{spaced}(?:s|es|ed)?"


def first_uses(text: str, known: dict[str, str]) -> list[Use]:
    """Where each word is used for the first time, outside of links; a longer word is not a use of a shorter."""
    text = NO_PROSE.sub(hidden, text)
    longest_first = sorted(known, key=len, reverse=True)
    either = re.compile(
        rf"(?<![\w-])(?:{'|'.join(f'({pattern(word)})' for word in longest_first)})(?![\w-])", re.IGNORECASE
    )
    found: dict[str, Use] = {}
    for match in either.finditer(text):
        word = longest_first[(match.lastindex or 0) - 1]
        found.setdefault(word, Use(match.start(), match[0], word))
    return sorted(found.values())


def links(text: str) -> dict[str, int]:
    """Where each word is linked to the glossary first, by the word as it is written in small letters."""
    found: dict[str, int] = {}
    outside = re.sub(r"^```.*?^```$", lambda match: "\0" * len(match[0]), text, flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"\[([^\]]+)\]\([^)]*glossary\.md(#[\w-]*)?\)", outside):
        found.setdefault(re.sub(r"\s+", " ", match[1]).strip("*").lower(), match.start())
    return found


def unlinked(text: str, known: dict[str, str]) -> list[Use]:
    """The words that are used before they are linked."""
    linked = links(text)

    def place(word: str) -> float:
        forms = [at for form, at in linked.items() if re.fullmatch(pattern(word), form, re.IGNORECASE)]
        return min(forms, default=float("inf"))

    return [use for use in first_uses(text, known) if use.start < place(use.word)]


def with_links(page: Path, text: str, uses: list[Use], known: dict[str, str]) -> str:
    """The text of a page with some uses made links."""
    target = os.path.relpath(GLOSSARY, page.parent)
    for use in reversed(uses):
        link = f"[{use.text}]({target}#{known[use.word]})"
        text = text[: use.start] + link + text[use.start + len(use.text) :]
    return text


def main(arguments: list[str]) -> int:
    fix = "--fix" in arguments
    wrong = 0
    for page in [Path(name).resolve() for name in arguments if name != "--fix"] or pages():
        known, text = words_for(page), page.read_text(encoding="utf-8")
        uses = unlinked(prose(page), known)
        wrong += len(uses)
        for use in uses:
            context = " ".join(text[max(0, use.start - 30) : use.start + 40].split())
            print(f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, use.start) + 1}: {use.word}: … {context} …")
        if fix and uses:
            page.write_text(with_links(page, text, uses, known), encoding="utf-8")
    return int(wrong > 0 and not fix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
