"""The batching rule of ``einsum``: the batch is one more letter."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, to_front

aten = torch.ops.aten


def implicit_output(terms: str) -> str:
    """What an equation without an arrow stands for: the letters that occur once, in order, behind the ellipsis."""
    letters = [c for c in terms if c.isalpha()]
    return ("..." if "..." in terms else "") + "".join(sorted(c for c in letters if letters.count(c) == 1))


@batching_rule(aten.einsum.default)
def einsum(
    info: BatchInfo,
    in_dims: Sequence[Any],
    equation: str,
    tensors: Sequence[Tensor],
    *,
    path: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """The letter goes in front of the batched operands' and of the output's."""
    equation = equation.replace(" ", "")
    terms, arrow, output = equation.partition("->")
    free = [c for c in string.ascii_letters if c not in equation]
    operands = terms.split(",")
    if not free or len(operands) != len(tensors):
        raise RuleDeclined("no letter is free, or PyTorch refuses the equation")
    output = output if arrow else implicit_output(terms)
    batched = [term if d is None else free[0] + term for term, d in zip(operands, in_dims[1])]
    fronted = [to_front(x, d) for x, d in zip(tensors, in_dims[1])]
    return aten.einsum.default(f"{','.join(batched)}->{free[0]}{output}", fronted, path=path), 0
