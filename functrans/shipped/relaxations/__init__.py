"""Linear relaxations of operators, by family, and the way back through them; see NOTE [Bounds on the way back]."""

from functrans.shipped.relaxations import (  # noqa: F401 - importing them adds the relaxations
    maxima,
    parts,
    pointwise,
    products,
)
from functrans.shipped.relaxations.level import RelaxationLevel

__all__ = ["RelaxationLevel"]
