"""The ``functrans`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's arguments by default) and return its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2

    if options.command == "explain":
        import functrans
        from functrans.explanation import command

        return command.run(options, parser, {name: getattr(functrans, name) for name in functrans.__all__})

    from functrans.tour import Settings, run

    try:
        settings = Settings(steps=options.steps, seed=options.seed)
    except ValueError as error:
        parser.error(str(error))
    return run(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="functrans", description="Composable function transforms for PyTorch.")
    parser.add_argument("--version", action="version", version=f"functrans {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    tour = commands.add_parser(
        "tour",
        help="train a small network privately on real data and check the transforms against plain PyTorch",
        description="Differentially private training on handwritten digits, a Hessian-vector product, Hessians and an "
        "ensemble: each by function transforms, each compared with loops over plain PyTorch on the spot. "
        "The exit code is 1 if a comparison fails.",
    )
    tour.add_argument("--steps", type=int, default=200, help="steps of private training (default: %(default)s)")
    tour.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: %(default)s)")
    from functrans.explanation import command

    explained = commands.add_parser("explain", help="show what a function does", description=command.DESCRIPTION)
    command.add_arguments(explained)
    return parser


def _version() -> str:
    try:
        return version("functrans")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    raise SystemExit(main())
