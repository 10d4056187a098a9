"""``python -m functrans.explain FILE:FUNCTION``, or ``demo``: what ``functrans explain`` does."""

import sys

from functrans.cli import main

raise SystemExit(main(["explain", *sys.argv[1:]]))
