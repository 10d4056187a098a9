"""The public transform of batching: vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.errors import Call, CallValueError
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.made_at import note_results
from functrans.pytrees import broadcast_prefix, tree_flatten, tree_unflatten
from functrans.stack import STATE, run_transformed
from functrans.tensor import WrapperTensor


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """``func`` on every example of a batch at once.

    Args:
        func: takes and returns pytrees of tensors, written for one example.
        in_dims: for each positional argument, which dimension of its tensors counts the examples: an int for all, or a tuple with an
            entry per argument, each an int, None (the argument is the same for every example) or a pytree of these.
            Keyword arguments are the same for every example.
        out_dims: where the batch dimension goes in the outputs: an int, None (the output does not depend on the example), or a
            pytree of these.
        randomness: what random operators do: ``"error"``, ``"different"`` draws for each example, or the ``"same"`` for all.
        chunk_size: run at most this many examples at a time, to save memory; None: all.

    Returns:
        A function of batched arguments, returning batched outputs.

    Raises:
        CallValueError: ``in_dims`` or ``out_dims`` do not fit, or batch sizes differ.
        DataDependentError: ``func`` does something whose result depends on an example's numbers.
        RandomnessError: a random operator ran with ``randomness="error"``.

    Example:
        >>> import torch
        >>> from functrans import vmap
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0])
        >>> vmap(torch.dot, in_dims=(0, None))(x, y)
        tensor([21., 43.])
    """
    call = Call("vmap", func, {"in_dims": in_dims, "out_dims": out_dims})
    if randomness not in ("error", "different", "same"):
        raise CallValueError(call, f"randomness={randomness!r}", "'error', 'different' or 'same'")
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise CallValueError(call, f"chunk_size={chunk_size!r}", "a positive int or None")

    @functools.wraps(func, updated=())
    def batched(*args: Any, **kwargs: Any) -> Any:
        leaves, dims, spec, size = check_inputs(call, in_dims, args)
        if chunk_size is None or chunk_size >= size:
            return run_batched(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs)
        return run_chunks(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, chunk_size)

    return batched


def check_inputs(call: Call | str, in_dims: Any, args: tuple[Any, ...]) -> tuple[list[Any], list[int | None], Any, int]:
    """Flattened arguments with the dimension of each, non-negative; and the batch size."""
    if not isinstance(in_dims, int | tuple) or isinstance(in_dims, bool):
        raise CallValueError(call, f"in_dims of type {type(in_dims).__name__}", "an int or a tuple with one entry per argument")
    if not args:
        raise CallValueError(call, "no positional arguments", "at least one", "Keyword arguments are never batched.")
    leaves, spec = tree_flatten(args)
    dims = [in_dims] * len(leaves) if isinstance(in_dims, int) else broadcast_prefix(in_dims, args)
    if dims is None:
        raise CallValueError(call, f"arguments of structure {spec}", f"a structure that in_dims {in_dims} is a prefix of")
    found: list[int | None] = []
    size: int | None = None
    for leaf, dim in zip(leaves, dims, strict=True):
        if dim is None:
            found.append(None)
            continue
        if not isinstance(dim, int):
            raise CallValueError(call, f"an in_dim {dim!r}", "an int or None")
        if not isinstance(leaf, Tensor):
            raise CallValueError(call, f"in_dim {dim} for an argument of type {type(leaf).__name__}", "None for what is not a tensor")
        rank = leaf.dim()
        if not -rank <= dim < rank:
            raise CallValueError(call, f"in_dim {dim} for a tensor of {rank} dimensions", f"-{rank} <= in_dim < {rank}")
        dim %= rank
        found.append(dim)
        if size is None:
            size = leaf.shape[dim]
        elif size != leaf.shape[dim]:
            sizes = [x.shape[d] for x, d in zip(leaves, found, strict=False) if d is not None]
            raise CallValueError(call, f"batch sizes {sizes}", "the same size along every batched dimension")
    if size is None:
        raise CallValueError(call, "in_dims without any int", "at least one batched argument")
    return leaves, found, spec, size


def run_batched(
    call: Call | str,
    func: Callable[..., Any],
    leaves: list[Any],
    dims: list[int | None],
    spec: Any,
    size: int,
    out_dims: Any,
    randomness: str,
    kwargs: dict[str, Any],
) -> Any:
    interpreter = VmapInterpreter(size, randomness, func)
    entered = [interpreter.batched(x, d) if isinstance(x, Tensor) else x for x, d in zip(leaves, dims, strict=True)]
    args = tree_unflatten(spec, entered)

    def body() -> tuple[list[Any], Any, Any]:
        out = func(*args, **kwargs)
        out_leaves, out_spec = tree_flatten(out)
        for x in out_leaves:
            if type(x) is WrapperTensor and x.view_link is not None and x.interpreter.alive:
                x.view_link.refresh(x)
        return out_leaves, out_spec, out

    out_leaves, out_spec, out = run_transformed(interpreter, body)
    places = check_out_dims(call, out_dims, out, out_leaves, out_spec)
    results = [leave(call, interpreter, x, d) for x, d in zip(out_leaves, places, strict=True)]
    if STATE.top is not None:
        note_results(2, results)
    written: dict[int, tuple[Tensor, int | None]] = {}
    for i, wrapper in enumerate(entered):
        if type(wrapper) is WrapperTensor and wrapper.version and wrapper.interpreter is interpreter:
            write_back(call, interpreter, wrapper, leaves[i], dims[i])
            written[id(wrapper)] = leaves[i], dims[i]
    if not written:
        return tree_unflatten(out_spec, results)
    # What an in-place function returns is the caller's tensor, as without vmap.
    for i, (x, place) in enumerate(zip(out_leaves, places, strict=True)):
        if id(x) in written:
            origin, dim = written[id(x)]
            if dim is not None and place is not None:
                results[i] = origin if place % origin.dim() == dim else origin.movedim(dim, place)
    return tree_unflatten(out_spec, results)


def write_back(call: Call | str, interpreter: VmapInterpreter, wrapper: WrapperTensor, origin: Tensor, dim: int | None) -> None:
    """Write an argument that was written inside for the caller."""
    if wrapper.root is not None and wrapper.root.content is not None:
        wrapper = wrapper.root.content
    value, bdim = wrapper.value, wrapper.bdim
    if dim is None and bdim is not None:
        raise CallValueError(
            call, "an argument with in_dim None, written with values that differ between examples", "an argument that the batch can be written to",
            "Give the argument an in_dim, or clone() it inside the function.",
        )  # fmt: skip
    if dim is not None:
        value = value.unsqueeze(dim).expand(origin.shape) if bdim is None else value.movedim(bdim, dim)
    origin.copy_(value)


def check_out_dims(call: Call | str, out_dims: Any, out: Any, leaves: list[Any], spec: Any) -> list[int | None]:
    if type(out_dims) is int or out_dims is None:
        return [out_dims] * len(leaves)
    if isinstance(out, Tensor) and isinstance(out_dims, tuple) and len(out_dims) == 1:
        places: list[Any] | None = list(out_dims)
    else:
        places = broadcast_prefix(out_dims, out)
    if places is None:
        raise CallValueError(call, f"outputs of structure {spec}", f"a structure that out_dims {out_dims} is a prefix of")
    for d in places:
        if d is not None and not isinstance(d, int):
            raise CallValueError(call, f"an out_dim {d!r}", "an int or None")
    return places


def leave(call: Call | str, interpreter: VmapInterpreter, x: Any, place: int | None) -> Any:
    """An output with its batch dimension at ``place``; what is no tensor is the same for every example and stays."""
    bdim = None
    if type(x) is WrapperTensor:
        if x.interpreter is interpreter:
            x, bdim = x.value, x.bdim
            if bdim == place:
                return x
    elif not isinstance(x, Tensor):
        return x
    if place is None:
        if bdim is not None:
            raise CallValueError(call, "a batched output where out_dims is None", "an output that is the same for every example", "Give it an out_dim.")
        return x
    rank = x.dim() + (bdim is None)
    if not -rank <= place < rank:
        raise CallValueError(call, f"out_dim {place} for an output that has {rank} dimensions with the batch", f"-{rank} <= out_dim < {rank}")
    place %= rank
    if bdim is None:
        shape = list(x.shape)
        shape.insert(place, interpreter.batch_size)
        return x.unsqueeze(place).expand(shape)
    return x if bdim == place else x.movedim(bdim, place)


def run_chunks(
    call: Call | str,
    func: Callable[..., Any],
    leaves: list[Any],
    dims: list[int | None],
    spec: Any,
    size: int,
    out_dims: Any,
    randomness: str,
    kwargs: dict[str, Any],
    chunk_size: int,
) -> Any:
    """Run the batch in chunks; with randomness "same" every chunk starts from the same generator state."""
    state = torch.get_rng_state() if randomness == "same" else None
    outs = []
    for start in range(0, size, chunk_size):
        length = min(chunk_size, size - start)
        part = [x if d is None else x.narrow(d, start, length) for x, d in zip(leaves, dims, strict=True)]
        if state is not None:
            torch.set_rng_state(state)
        outs.append(run_batched(call, func, part, dims, spec, length, out_dims, randomness, kwargs))
    flat = [tree_flatten(o) for o in outs]
    out_spec = flat[0][1]
    places = check_out_dims(call, out_dims, outs[0], flat[0][0], out_spec)
    joined = []
    for i, place in enumerate(places):
        parts = [leaves_[i] for leaves_, _ in flat]
        joined.append(parts[0] if place is None or not isinstance(parts[0], Tensor) else torch.cat(parts, dim=place))
    return tree_unflatten(out_spec, joined)
