"""In-place collectives (``torch.distributed.all_reduce``): the functional one, and a write of what it returns.

Their derivative is that of the functional one. PyTorch's own autograd takes them for the identity, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functrans.core.dispatch import base, scan
from functrans.errors import InsideTransformError
from functrans.functionalization.hidden_effects import stands_in_for
from functrans.functionalization.writes import write
from functrans.operators.info import OpInfo
from functrans.pytorch.distributed import FUNCTIONAL_COLLECTIVES, IN_PLACE_COLLECTIVES, finished_work
from functrans.pytorch.thread_state import STATE, running_at


def all_reduce(collectives: Any, tensors: Any, group: Any, reduce_op: Any, *rest: Any) -> list[Any]:
    name = torch.distributed.ReduceOp.RedOpType(reduce_op.op()).name.lower()
    return [collectives.all_reduce.default(x, name, group) for x in tensors]


def broadcast(collectives: Any, tensors: Any, group: Any, root_rank: int, *rest: Any) -> list[Any]:
    return [collectives.broadcast.default(x, root_rank, group) for x in tensors]


def written_by(functional: Callable[..., list[Any]]) -> Callable[..., Any]:
    """What stands in for the in-place collective that ``functional`` is the functional form of."""

    def stand_in(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, group, *rest = args
        if scan(args, kwargs)[0] is None:
            return base(known.op, args, kwargs)
        with running_at(STATE.top):
            collectives = FUNCTIONAL_COLLECTIVES[0]
            name = torch.distributed.ProcessGroup.unbox(group).group_name
            news = map(collectives.wait_tensor.default, functional(collectives, tensors, name, *rest))
        for target, new in zip(tensors, news, strict=True):
            write(target, new, known.op)
        return tensors, finished_work()

    return stand_in


def refused(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owner = scan(args, kwargs)[0]
    if owner is None:
        return base(known.op, args, kwargs)
    cure = "a functional collective, of torch.distributed._functional_collectives"
    raise InsideTransformError(f"{known.op}, which writes what other processes send,", owner.name, cure)


FORMS = {"allreduce_": written_by(all_reduce), "broadcast_": written_by(broadcast)}
for _op in IN_PLACE_COLLECTIVES:
    stands_in_for(_op)(FORMS.get(_op._schema.name.split("::")[1], refused))
