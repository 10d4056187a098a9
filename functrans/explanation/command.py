"""``functrans explain`` and ``python -m functrans.explain``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from functrans.errors import CallTypeError
from functrans.explanation.comparing import Diff, diff
from functrans.explanation.demo import demo
from functrans.explanation.explaining import explain
from functrans.explanation.explanation import Explanation

DESCRIPTION = (
    "Run a function once and print what happened: every operator, the levels that it went through, what each of them "
    "did, what ran at the base, and the walk back."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="FILE:FUNCTION",
        help="a Python file and a function in it, or an expression, such as 'model.py:vmap(grad(loss))' (torch and the "
        "names of functrans are known); or 'demo'",
    )
    parser.add_argument("--args", default="", metavar="EXPRESSIONS", help="the arguments, such as 'torch.ones(3), 2'")
    parser.add_argument("--against", metavar="FUNCTION", help="compare with another function of the file, side by side")
    parser.add_argument(
        "--example", type=int, default=0, help="the example whose numbers are kept (default: %(default)s)"
    )
    parser.add_argument("--numbers", action="store_true", help="print a few numbers of that example")
    parser.add_argument("--costs", action="store_true", help="print the time and the memory of every event")
    parser.add_argument(
        "--save", metavar="PATH", help="write a page (.html) or text (.txt) instead; of one function also JSON (.json)"
    )


def run(options: argparse.Namespace, parser: argparse.ArgumentParser, public: Mapping[str, Any]) -> int:
    """Carry out what the options say; ``public``: names that expressions know, whatever the file imports.

    Returns the exit code, which is 1 if a comparison found a difference.
    """
    if options.target == "demo":
        scope: dict[str, Any] = {"demo": demo}
        function = "demo"
    else:
        file, colon, function = options.target.partition(":")
        if not colon or not Path(file).is_file():
            parser.error(f"got {options.target!r}; expected FILE:FUNCTION with a file that is there, or 'demo'")
        scope = load(file)
    names = {**public, "torch": torch, **scope}
    func = evaluated(function, names, parser)
    args = evaluated(f"({options.args},)" if options.args.strip() else "()", names, parser)
    if options.against is not None:
        found = diff(func, evaluated(options.against, names, parser), *args, example=options.example)
        if options.save is not None:
            saved(found, options.save, parser)
            print(f"{len(found.rows)} steps, written to {options.save}")
        else:
            print(found)
        return 0 if found.same else 1
    explanation = explain(func, *args, example=options.example)
    if options.save is not None:
        saved(explanation, options.save, parser)
        print(f"{len(explanation)} events, written to {options.save}")
    else:
        print(explanation.text(costs=options.costs, numbers=options.numbers))
        print(f"\n{explanation.summary()}")
    return 0


def saved(found: Explanation | Diff, path: str, parser: argparse.ArgumentParser) -> None:
    try:
        found.save(path)
    except (CallTypeError, OSError) as error:
        parser.error(f"--save {path}: {error}")


def load(file: str) -> dict[str, Any]:
    """What a Python file defines; it is run as if it was imported, under a name that no other module has."""
    path = Path(file).resolve()
    name = f"explained.{path.stem}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return vars(module)


def evaluated(expression: str, names: dict[str, Any], parser: argparse.ArgumentParser) -> Any:
    try:
        return eval(expression, names)
    except (NameError, SyntaxError) as error:
        return parser.error(f"{expression!r}: {error}")
