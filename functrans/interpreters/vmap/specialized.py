"""What becomes of an operator under vmap by the rules that hold: found once, and kept with the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from functrans.decompositions.pieces import Definition
from functrans.decompositions.table import DEFINED_LATE, decomposition, definition_of, is_ours
from functrans.interpreters.vmap.checks import CHECKS
from functrans.interpreters.vmap.seen_calls import SeenCall
from functrans.interpreters.vmap.table import BATCHING_RULES
from functrans.operators.defaults import completed
from functrans.operators.info import OpInfo, specialized_here
from functrans.pytorch.torch_private import DECOMPOSITION_TABLE, OpOverload, vmap_rule_of_library

aten = torch.ops.aten

#: Operators whose result cannot be the same kind of thing for every example.
DATA_DEPENDENT = {
    getattr(getattr(aten, name), overload): cure
    for names, cure in (
        (("item", "_local_scalar_dense", "is_nonzero"),
         "use torch.where(condition, a, b) instead of branching on a value; keep numbers as tensors"),
        (("nonzero", "argwhere", "nonzero_numpy", "masked_select"),
         "use torch.where(mask, x, 0) or a fixed-size result such as torch.nonzero_static"),
        (("unique_dim", "_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive"),
         "call it outside of vmap"),
    )
    for name in names if hasattr(aten, name)
    for overload in getattr(aten, name).overloads() if "out" not in overload
}  # fmt: skip
#: Composites that are asked for a number, which is one for all examples at times.
READING = frozenset((*DATA_DEPENDENT, *CHECKS))

#: What PyTorch takes apart into something else: the second output would be the weights, not the logarithms of their
#: sums.
NOT_DECOMPOSED = frozenset((aten._scaled_dot_product_flash_attention_for_cpu.default,))


class Specialized(NamedTuple):
    """What becomes of an operator by the rules that hold in a context."""

    rule: Any  # None: there is none
    #: what the rule is as one operator; see ``families.one_operator``
    rewrite: Callable[..., Any] | None
    #: the kinds of arguments that the operator is known to take; None: it is not asked
    accepted: set[Any] | None
    #: what became of calls by how they look; None: it is not kept
    seen: dict[Any, SeenCall] | None
    #: what it is by other operators, if that is all that is known of it
    definition: Definition | None
    #: what it is by other operators where nothing else serves
    decomposed: Definition | None


def rule_here(op: OpOverload, known: OpInfo) -> Specialized:
    """What becomes of ``op`` by the rules of this context."""
    specialized = specialized_here(known)
    found = specialized.get(Specialized)
    if found is None:
        ours = BATCHING_RULES.get(op)
        rule = ours or (None if op._schema.name in DEFINED_LATE else vmap_rule_of_library(op))
        accepted: set[Any] | None = set() if is_checked(op, known, rule) else None
        rewrite = getattr(rule, "rewrite", None)
        kept = rule is not None and not known.random
        definition = None
        if rule is None and known.composite and known.settled and not known.random and op not in READING:
            definition = definition_of(op, known)
        rule = rule and completed(rule, op, 2, listed=True)
        decomposed = None if known.composite else decomposed_by(op, known)
        found = Specialized(rule, rewrite, accepted, {} if kept else None, definition, decomposed)
        if known.settled or ours is not None:  # a rule may yet be registered with PyTorch
            specialized[Specialized] = found
    return found


def is_checked(op: OpOverload, known: OpInfo, rule: Callable[..., Any] | None) -> bool:
    """Whether one example must show that ``op`` takes it: a rule, or a decomposition that may be more liberal, stands
    in for ``op``."""
    if op.namespace != "aten" or op in DATA_DEPENDENT or hasattr(rule, "any_rank"):
        return False
    return rule is not None or (not known.composite and op in DECOMPOSITION_TABLE)


def decomposed_by(op: OpOverload, known: OpInfo) -> Definition | None:
    """PyTorch's decomposition of ``op``, or ours."""
    found = None if op in NOT_DECOMPOSED else DECOMPOSITION_TABLE.get(op)
    if found is not None:
        return Definition(op, found, known.settled)
    if op in NOT_DECOMPOSED or op.namespace == "prims":  # a prim's leads back to what PyTorch makes of prims
        return None
    ours = decomposition(op)
    return None if ours is None else Definition(op, completed(ours, op), known.settled and is_ours(ours))
