"""Which of the derivatives that functrans has formulas for did another PyTorch change?

    python tests/checkers/derivatives_yaml.py                        # the installed PyTorch, against the list
    python tests/checkers/derivatives_yaml.py torch-2.16.0-....whl   # a wheel, or a derivatives.yaml
    python tests/checkers/derivatives_yaml.py NEW --old OLD          # with the texts of both, beside each other
    python tests/checkers/derivatives_yaml.py NEW --accept 2.16.0    # put the changes into the list; verdicts are yours

PyTorch's formulas stand in ``derivatives.yaml``, which every wheel carries. The list, derivatives_yaml.txt, has a line
for each entry that our derivative table answers for: its name, a hash of its text with the first version that had it,
and, where it has changed, what that means for functrans. What has no entry of ours is borrowed from the installed
PyTorch. What a formula calls is not in the yaml: tests/test_ties.py compares the numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import torchgen

LIST = Path(__file__).with_suffix(".txt")
PACKED = "torchgen/packaged/autograd/derivatives.yaml"
NONE = "none"

#: name: [(first version, hash)], verdict
Known = dict[str, tuple[list[tuple[str, str]], str]]


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def read(source: Path) -> str:
    if source.suffix != ".whl":
        return source.read_text()
    with zipfile.ZipFile(source) as wheel:
        return wheel.read(PACKED).decode()


def installed() -> Path:
    return Path(torchgen.__file__).parent.parent / PACKED


def entries(text: str) -> dict[str, str]:
    """The entries of a derivatives.yaml by their operator's name, without comments."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    blocks = "\n".join(["", *lines]).split("\n- name: ")[1:]
    return {block.split("(", 1)[0]: block for block in blocks}


def digest(block: str | None) -> str:
    return NONE if block is None else hashlib.sha256(" ".join(block.split()).encode()).hexdigest()[:10]


def answered_for() -> set[str]:
    """Names, as the yaml has them, of the operators that our tables have entries for."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from functrans.decompositions.table import DECOMPOSITIONS
    from functrans.derivatives.table import DERIVATIVES

    ops: list[Any] = [op for table in (DERIVATIVES, DECOMPOSITIONS) for op in table if op.namespace == "aten"]
    return {op._schema.name[6:] + (f".{op._overloadname}" if op._overloadname != "default" else "") for op in ops}


def load() -> Known:
    known: Known = {}
    for line in LIST.read_text().splitlines():
        if line and not line.startswith("#"):
            facts, _, verdict = line.partition(" # ")
            name, *versions = facts.split()
            known[name] = [(v, h) for v, _, h in (item.partition(":") for item in versions)], verdict
    return known


def save(known: Known) -> None:
    text = "# name, first version:hash of its entry in derivatives.yaml, ..., # what a change means for functrans\n"
    for name, (versions, verdict) in sorted(known.items()):
        text += " ".join([name, *(f"{v}:{h}" for v, h in versions)]) + (f" # {verdict}" if verdict else "") + "\n"
    LIST.write_text(text)


def changed(found: dict[str, str], known: Known, version: str) -> list[str]:
    """Names of entries of ours that are not those that the list has for ``version``."""
    names = []
    for name in sorted(answered_for()):
        listed = [h for v, h in known.get(name, ([], ""))[0] if number(v) <= number(version)]
        if digest(found.get(name)) != (listed[-1] if listed else NONE):
            names.append(name)
    return names


def report(names: list[str], new: dict[str, str], old: dict[str, str] | None) -> str:
    lines = []
    for name in names:
        lines.append(f"\n{name}")
        for title, found in (("old", old), ("new", new)):
            if found is not None:
                lines.append(f"  {title}: " + found.get(name, "(no entry)").replace("\n", "\n       "))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="derivatives of another PyTorch against the list")
    parser.add_argument(
        "source", nargs="?", type=Path, help="a wheel of torch or a derivatives.yaml; default: the installed one"
    )
    parser.add_argument("--old", type=Path, help="a wheel or yaml whose texts are shown beside the new ones")
    parser.add_argument("--version", default=None, help="the version that source is of, if its name does not say so")
    parser.add_argument("--accept", metavar="VERSION", help="write the changes into the list as of this version")
    options = parser.parse_args()
    source = options.source or installed()
    in_name = re.search(r"\d+\.\d+\.\d+", source.name)
    version = options.accept or options.version or (in_name[0] if in_name else torch.__version__)
    new, known = entries(read(source)), load() if LIST.exists() else {}
    names = changed(new, known, version)
    print(f"{len(names)} of {len(answered_for())} entries are not those listed for {version}.")
    print(report(names, new, entries(read(options.old)) if options.old else None))
    if options.accept:
        for name in names:
            versions, verdict = known.get(name, ([], ""))
            known[name] = [*versions, (options.accept, digest(new.get(name)))], verdict
        save(known)
        return 0
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
