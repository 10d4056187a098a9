"""``python -m functrans.explain FILE:FUNCTION``, or ``demo``."""

from functrans.explain.command import main

raise SystemExit(main())
