"""All benchmarks in one command: prints the tables, and writes them to docs/performance.md.

    python benchmarks/run.py [--quick] [--compile] [--device cuda] [--output PATH | --print-only]

The page's text is written by people; what stands between the two markers of the device is replaced by this command.
The extra ``bench`` (``pip install -e ".[bench]"``) adds the column for JAX, ``--compile`` those for torch.compile.
"""

from __future__ import annotations

from pathlib import Path

import anatomy
import growth
import operators
import per_op
import shipped
import workloads
from report import parse, progress, tell_failures, text_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def markers(device: str) -> tuple[str, str]:
    """Before and after the figures of a device."""
    return f"<!-- figures: {device} -->\n", f"<!-- end of figures: {device} -->\n"


def with_figures(page: str, device: str, figures: str) -> str:
    """The page with these figures between the markers of the device, which are added at the end where they are missing.
    """
    begin, end = markers(device)
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}{end}"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{figures}\n{end}{after}"


def main() -> int:
    settings, options = parse(
        "All benchmarks.",
        output={"type": Path, "default": PAGE, "metavar": "PATH", "help": "the page to write (default: %(default)s)"},
        **{"print-only": {"action": "store_true", "help": "write no page"}},
    )
    if settings.cases and not options.print_only:
        print("With --case there are not all of the figures, so that no page is written.")
        options.print_only = True
    # growth comes first: one of its curves must begin while little else has been transformed
    grown = growth.run(settings)
    progress("growth")
    operations = per_op.run(settings)
    everyday = operators.run(settings)
    progress("operations")
    whole = workloads.run(settings)
    beyond = shipped.run(settings)
    progress("transforms that ship")
    parts = [whole, operations, everyday, beyond, grown, anatomy.run(settings)]
    figures = text_of(parts, settings)
    print(figures)
    if not options.print_only:
        page = options.output.read_text(encoding="utf-8") if options.output.exists() else ""
        options.output.write_text(with_figures(page, settings.device, figures), encoding="utf-8")
    return tell_failures(parts)


if __name__ == "__main__":
    raise SystemExit(main())
