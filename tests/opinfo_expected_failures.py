"""Operators and compositions on which functrans raises where torch.func does not, one by one, each with its reason.

Only errors may stand here. A wrong number fails the test whatever this file says, and so does an entry whose
composition has come to work: delete it.
"""

_COUNT = "the number of rows depends on each example's numbers; torch.func answers as long as all have the same count"

EXPECTED_FAILURES: dict[tuple[str, str], str] = {
    ("argwhere", "vmap"): _COUNT,
    ("argwhere", "vmap(vmap)"): _COUNT,
}

# The same for what only shows with all samples of an operator (``-m slow``).
EXPECTED_FAILURES_OF_ALL_SAMPLES: dict[tuple[str, str], str] = {}
