"""The outputs of vmap: where the batch dimension of each goes, and what is wrong if it cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.api.containers import Level, brought_back, is_container, whole
from functrans.api.structures import difference, path_of
from functrans.boundary.facades import Facade, shown_like
from functrans.boundary.leftovers import as_here
from functrans.core.tensor import WrapperTensor, check_layout, strides_of
from functrans.errors import Call, CallIndexError, CallValueError
from functrans.errors.wording import callable_name, what
from functrans.interpreters.constants import as_own
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.tensors.pytrees import broadcast_prefix


def check_out_dims(call: Call, out_dims: Any, out: Any, leaves: list[Any], spec: Any) -> list[int | None]:
    if type(out_dims) is int or out_dims is None:
        return [out_dims] * len(leaves)
    if (isinstance(out, Tensor) or is_container(out)) and isinstance(out_dims, tuple) and len(out_dims) == 1:
        places: list[Any] | None = list(out_dims)
    else:
        places = broadcast_prefix(out_dims, out, whole())
    if places is None:
        raise CallValueError(call, *difference("out_dims", out_dims, "output", out, prefix=True))
    for i, d in enumerate(places):
        if d is not None and type(d) is not int:
            path = path_of("output", out, i, whole())
            raise CallValueError(call, f"{what(d)} as out_dim of {path}", "an int or None")
    return places


def leave(call: Call, interpreter: VmapInterpreter, x: Any, place: int | None, out: Any, index: int) -> Any:
    """Leaf ``index`` of ``out`` with its batch dimension at ``place``; what is no tensor stays as it is."""
    bdim = None
    within = False
    if type(x) is WrapperTensor:
        if x.interpreter is interpreter:
            bdim = x.bdim
            x = x.value if interpreter.below is None else as_own(interpreter.below, x.value)
            if bdim == place:
                return x
        else:
            x = as_here(x)
    elif isinstance(x, Facade):
        return shown_like(leave(call, interpreter, x.wrapper, place, out, index), x)
    elif not isinstance(x, Tensor):
        if not is_container(x):
            return x
        if place is None:
            return x.apply(lambda leaf: leave(call, interpreter, leaf, None, out, index))
        within = True
    if place is None:
        if bdim is not None:
            got = f"{path_of('output', out, index, whole())}, which differs between examples, with out_dim None"
            raise CallValueError(
                call, got, "an output that is the same for every example", "Give it an out_dim, such as 0."
            )
        return x
    if bdim is None and not within:
        check_layout(x)
        strides_of(x)  # refuses layouts that cannot be batched
    rank = x.dim() + (bdim is None)  # of a container: with the batch that is put into it
    if not -rank <= place < rank:
        got = (
            f"out_dim {place} for {path_of('output', out, index, whole())}, "
            f"which has {rank} dimension{'s' * (rank != 1)} with the batch"
        )
        raise CallIndexError(call, got, f"{-rank} <= out_dim < {rank}")
    place %= rank
    if within:
        return brought_back(x, place, Level(interpreter), interpreter.batch_size, callable_name(call.func))
    if bdim is None:
        if x.layout is not torch.strided:
            return torch.stack([x] * interpreter.batch_size, place)
        shape = list(x.shape)
        shape.insert(place, interpreter.batch_size)
        return x.unsqueeze(place).expand(shape)
    return x if bdim == place else x.movedim(bdim, place)
