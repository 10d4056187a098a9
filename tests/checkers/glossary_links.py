"""Words of the glossary: on each page, the first use of a word in prose is a link to where it is explained.

python tests/checkers/glossary_links.py PAGE ...          says which words are used before they are linked
python tests/checkers/glossary_links.py --fix PAGE ...    makes them links
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
ROW = re.compile(r"^\| ([^|]+?) \| ")
#: What is no prose: fenced blocks, the words of links, code, headings, HTML, the first row of a table.
NO_PROSE = re.compile(
    r"^```[\s\S]*?^```$|!?\[[^\]]*\]\([^)]*\)|`[^`\n]*`|^#+ .*$|<[^>\n]+>|^\|.*\|\n(?=\|[-|]+\|$)|^    .*$",
    re.MULTILINE,
)


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")


def words() -> dict[str, str]:
    """The words of the glossary, each with the anchor of its section."""
    found, section = {}, ""
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = slug(line[3:])
        row = ROW.match(line)
        if row and row[1] not in ("functrans", "---"):
            found[row[1]] = section
    return found


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
    prose = NO_PROSE.sub(lambda match: re.sub(r"[^\n]", "\0", match[0]), text)
    longest_first = sorted(known, key=len, reverse=True)
    either = re.compile(
        rf"(?<![\w-])(?:{'|'.join(f'({pattern(word)})' for word in longest_first)})(?![\w-])", re.IGNORECASE
    )
    found: dict[str, Use] = {}
    for match in either.finditer(prose):
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


def with_links(page: Path, text: str, known: dict[str, str]) -> str:
    """The text of a page with its first uses made links."""
    target = os.path.relpath(GLOSSARY, page.parent)
    for use in reversed(unlinked(text, known)):
        link = f"[{use.text}]({target}#{known[use.word]})"
        text = text[: use.start] + link + text[use.start + len(use.text) :]
    return text


def main(arguments: list[str]) -> int:
    known, fix = words(), "--fix" in arguments
    wrong = 0
    for page in (Path(name).resolve() for name in arguments if name != "--fix"):
        text = page.read_text(encoding="utf-8")
        for use in unlinked(text, known):
            wrong += 1
            context = " ".join(text[max(0, use.start - 30) : use.start + 40].split())
            print(f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, use.start) + 1}: {use.word}: … {context} …")
        if fix:
            page.write_text(with_links(page, text, known), encoding="utf-8")
    return int(wrong > 0 and not fix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
