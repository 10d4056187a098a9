"""Operators on intervals, by family. An operator without a rule is taken apart by PyTorch's decomposition, if it has
one; else it is an error."""

from functrans.shipped.interval_rules import (  # noqa: F401 - importing them adds the rules
    arithmetic,
    comparisons,
    functions,
    maxima,
    normalization,
    pointwise,
    products,
)
from functrans.shipped.interval_rules.level import IntervalLevel

__all__ = ["IntervalLevel"]
