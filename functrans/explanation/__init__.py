"""Seeing a stack of transforms at work: ``explain``, ``diff``, ``make_trace`` and ``debug_print``.

The modules, in the order to read them: ``events`` (what an explanation is made of), ``watching``, ``recording`` and
``during`` (how one comes by it), ``looks`` with ``looking``, ``sites`` and ``verdicts`` (what is said of a tensor, of
the user's line, and of what took an operator), ``explaining`` and ``explanation`` (the function, and what it returns),
``text``, ``records``, ``drawings`` and ``page`` (how that is shown). Beside these stand ``comparing``, ``aligning``,
``differences``, ``side_by_side`` and ``diff_page`` (``diff``), ``trace``, ``printing``, ``demo`` and ``command``.
"""

from functrans.explanation.comparing import Diff, diff
from functrans.explanation.events import Event, Level, Site
from functrans.explanation.explaining import explain
from functrans.explanation.explanation import Explanation
from functrans.explanation.looks import Look
from functrans.explanation.printing import debug_print
from functrans.explanation.trace import Trace, make_trace

__all__ = [
    "Diff", "Event", "Explanation", "Level", "Look", "Site", "Trace", "debug_print", "diff", "explain", "make_trace",
]  # fmt: skip
