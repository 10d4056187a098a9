"""``python -m functrans.explain FILE:FUNCTION``, or ``demo``: what ``functrans explain`` does.

``functrans.explain`` is a function, and to who imports it as a module it is the same function. What it is made of is
the package ``functrans.explanation``.
"""

import sys

import functrans

if __name__ == "__main__":
    from functrans.cli import main

    raise SystemExit(main(["explain", *sys.argv[1:]]))
sys.modules[__name__] = functrans.explain  # type: ignore[assignment]
