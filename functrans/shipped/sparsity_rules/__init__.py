"""What the outputs of operators depend on, by family. What is in none is pointwise by the derivative table, or depends
on everything (``without_rule`` in sparsity_level.py)."""

from functrans.shipped.sparsity_rules import (  # noqa: F401 - importing them adds the rules
    moves,
    normalization,
    pointwise,
    products,
    reductions,
    windows,
)
