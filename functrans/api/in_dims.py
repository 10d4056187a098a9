"""The batched arguments of vmap: which dimension of each counts the examples, and what is wrong if they do not fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functrans.api.containers import is_container, whole
from functrans.api.structures import difference, path_of, paths
from functrans.core.tensor import WrapperTensor, check_layout
from functrans.errors import Call, CallValueError
from functrans.errors.wording import what
from functrans.tensors.pytrees import broadcast_prefix, tree_flatten

SHARED = "Give it in_dim None if it is the same for every example."


def check_in_dims(call: Call, in_dims: Any) -> None:
    """``in_dims`` is an int or a tuple, whatever the arguments."""
    if not isinstance(in_dims, int | tuple) or isinstance(in_dims, bool):
        cure = "Write a tuple in place of the list." if isinstance(in_dims, list) else ""
        if isinstance(in_dims, Tensor):
            cure = "Write vmap(f)(x): the arguments of the function come in a call of their own."
        raise CallValueError(
            call, f"{what(in_dims)} as in_dims", "an int or a tuple with one entry per positional argument", cure
        )


def check_inputs(
    call: Call, in_dims: int | tuple[Any, ...], args: tuple[Any, ...], axis_size: int | None = None
) -> tuple[list[Any], list[int | None], Any, int]:
    """Flattened arguments with the dimension of each, non-negative; and the batch size, which is ``axis_size`` where
    that is given."""
    if not args and axis_size is None:
        raise CallValueError(call, "no positional arguments", "at least one", "Keyword arguments are never batched.")
    is_leaf = whole()
    leaves, spec = tree_flatten(args, is_leaf)
    dims = [in_dims] * len(leaves) if isinstance(in_dims, int) else broadcast_prefix(in_dims, args, is_leaf)
    if dims is None:
        as_many = isinstance(in_dims, int) or len(in_dims) == len(args)
        cure = "" if as_many else "in_dims has one entry per positional argument."
        raise CallValueError(call, *difference("in_dims", in_dims, "args", args, prefix=True), cure)
    found: list[int | None] = []
    size: int | None = None
    differ = False
    for place, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is None:
            found.append(None)
            continue
        if type(dim) is not int or not (isinstance(leaf, Tensor) or is_container(leaf)):
            refuse_leaf(call, leaf, dim, path_of("args", args, place, is_leaf))
        if type(leaf) is not WrapperTensor:
            check_layout(leaf)
        rank = leaf.dim()
        if not -rank <= dim < rank:
            refuse_in_dim(call, dim, rank, path_of("args", args, place, is_leaf))
        dim %= rank
        found.append(dim)
        if size is None:
            size = leaf.shape[dim]
        elif size != leaf.shape[dim]:
            differ = True
    if differ:
        refuse_sizes(call, list(zip(paths("args", args, is_leaf), leaves, found, strict=True)))
    if size is None and axis_size is None:
        other_way = ", or an axis_size" if call.transform == "vmap" else ""  # the others have none
        raise CallValueError(call, "no argument with a batch", f"an int for at least one in in_dims{other_way}")
    if None not in (size, axis_size) and size != axis_size:
        raise CallValueError(call, f"batches of size {size} with axis_size={axis_size}", f"axis_size={size}, or none")
    return leaves, found, spec, axis_size if size is None else size  # type: ignore[return-value]


def refuse_leaf(call: Call, leaf: Any, dim: Any, path: str) -> None:
    if type(dim) is not int:
        raise CallValueError(call, f"{what(dim)} as in_dim of {path}", "an int or None")
    cure = "Pass torch.as_tensor(...) of it." if hasattr(leaf, "__array__") else SHARED
    raise CallValueError(call, f"in_dim {dim} for {what(leaf)}, {path}", "a tensor", cure)


def refuse_in_dim(call: Call, dim: int, rank: int, path: str) -> None:
    got = f"in_dim {dim} for {path}, which has {rank} dimension{'s' * (rank != 1)}"
    if rank == 0:
        raise CallValueError(call, got, "a tensor with a dimension that counts the examples", SHARED)
    raise CallValueError(call, got, f"{-rank} <= in_dim < {rank}")


def refuse_sizes(call: Call, arguments: list[tuple[str, Any, int | None]]) -> None:
    """Say which arguments have which batch size, and which is likely the odd one."""
    sizes: dict[int, list[tuple[str, Tensor, int]]] = {}
    for name, x, dim in arguments:
        if dim is not None:
            sizes.setdefault(x.shape[dim], []).append((name, x, dim))
    groups = sorted(sizes.items(), key=lambda group: -len(group[1]))
    texts = []
    for size, members in groups:
        listed = ", ".join(f"{name} of shape {tuple(x.shape)} with in_dim {dim}" for name, x, dim in members[:3])
        texts.append(f"size {size} ({listed}{f' and {len(members) - 3} more' if len(members) > 3 else ''})")
    most, majority = groups[0]
    if len(majority) > len(groups[1][1]):  # what is not of the size that most have is likely the mistake
        odd = [(name, x) for _, members in groups[1:] for name, x, _ in members]
        cure = (
            f"Likely {name_list([name for name, _ in odd])} should have in_dim None, "
            "which says that all examples share it"
        )
        fitting = [
            f"{name} in_dim {i}, where it has size {most}"
            for name, x in odd
            for i, n in enumerate(x.shape)
            if n == most
        ]
        cure = ", or ".join([cure, *fitting[:1]])
    else:
        everywhere = [
            (name, i, n) for _, members in groups for name, x, dim in members for i, n in enumerate(x.shape) if i != dim
        ]
        hints = [f"{name} has size {n} along dimension {i}" for name, i, n in everywhere if n in sizes]
        cure = "; ".join(["Give in_dim None to what all examples share", *hints[:2]])
    raise CallValueError(call, "batches of " + name_list(texts), "one size along every batched dimension", cure + ".")


def name_list(names: list[str]) -> str:
    names = names if len(names) < 5 else [*names[:3], f"{len(names) - 3} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
