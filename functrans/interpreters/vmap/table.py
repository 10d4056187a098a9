"""The table of batching rules, and what a rule is given.

A batching rule has the signature that ``torch.library.register_vmap`` and ``autograd.Function.vmap`` use::

    rule(info, in_dims, *args, **kwargs) -> (output, out_dims)

``args`` are the operator's arguments one level down: a batched tensor is its physical value, whose batch dimension is
given by the same place of ``in_dims`` (None: not batched, or not a tensor; a list of tensors has a list there).
``kwargs`` are the keyword-only arguments, none of which is batched. At least one argument is batched.
The rule returns the physical output and its batch dimension (for several outputs, a tuple of each; None: not batched).
Rules are pure and may be written in plain ``torch`` or with aten overloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.operators.rules import RuleTable

#: Where each argument has its batch.
Dims = Sequence[Any]
#: The physical output, and where it has its batch.
Output = tuple[Any, Any]
BatchingRule = Callable[..., Output]


class BatchInfo(NamedTuple):
    """What a rule knows of the vmap that runs it."""

    #: how many examples there are
    batch_size: int
    #: "different" or "same": whether each example draws random numbers for itself
    randomness: str
    #: the vmap itself; None where a rule is tried without one
    interpreter: Any = None

    @property
    def level(self) -> int | None:
        """The level of the vmap."""
        return None if self.interpreter is None else self.interpreter.level

    @property
    def axis_name(self) -> Any:
        """The name of the batch, None if it has none."""
        return None if self.interpreter is None else self.interpreter.axis_name


BATCHING_RULES: RuleTable[BatchingRule] = RuleTable("vmap batching rules", cached=True, takes_functions=True)
batching_rule = BATCHING_RULES.register


def to_front(x: Tensor, bdim: int | None) -> Tensor:
    """The physical tensor with its batch dimension first; unbatched tensors pass through."""
    return x if bdim is None or bdim == 0 else torch.movedim(x, bdim, 0)


def logical_rank(x: Tensor, bdim: int | None) -> int:
    """Number of dimensions that the user sees."""
    return x.dim() if bdim is None else x.dim() - 1


def logical_shape(x: Tensor, bdim: int | None) -> list[Any]:
    """The shape that the user sees."""
    shape = list(x.shape)
    if bdim is not None:
        del shape[bdim]
    return shape


def materialize(x: Tensor, bdim: int | None, batch_size: int) -> Tensor:
    """The tensor with a batch dimension in front, expanded (a view) where it had none."""
    return x.unsqueeze(0).expand(batch_size, *x.shape) if bdim is None else to_front(x, bdim)
