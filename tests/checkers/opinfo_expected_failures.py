"""Operators and compositions on which functrans raises where torch.func does not, one by one, each with its reason.

Only errors may stand here. A wrong number fails the test whatever this file says, and so does an entry whose
composition has come to work: delete it.
"""


_COUNT = "the number of rows depends on each example's numbers; torch.func answers as long as all have the same count"

_STATISTICS = (
    "running statistics with in_dim None beside batched ones: a loop would update them once per example, one batched "
    "run cannot; torch.func updates them once"
)

EXPECTED_FAILURES: dict[tuple[str, str], str] = {
    ("argwhere", "vmap"): _COUNT,
    ("argwhere", "vmap(vmap)"): _COUNT,
}

# The same for what only shows with all samples of an operator (``-m slow``).
EXPECTED_FAILURES_OF_ALL_SAMPLES: dict[tuple[str, str], str] = {
    (name, composition): _STATISTICS
    for name, compositions in (
        ("_native_batch_norm_legit", ("vmap(vjp)", "vmap(jvp)")),
        ("native_batch_norm", ("vmap(vjp)", "vmap(jvp)")),
        ("nn.functional.batch_norm", ("vmap(vjp)", "vmap(jvp)", "backward(vmap)")),
        ("nn.functional.instance_norm", ("vmap", "vmap(vjp)", "vmap(jvp)", "vmap(vmap)", "backward(vmap)")),
    )
    for composition in compositions
}
