"""The public transforms of batching: vmap, chunk_vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable, check_chunk_size, check_randomness
from functrans.api.compiled import TRACED, named_after
from functrans.api.in_dims import check_in_dims, check_inputs
from functrans.api.structures import difference, path_of
from functrans.core.errors import Call, CallIndexError, CallValueError, DeadWrapperError
from functrans.core.errors.made_at import note_results
from functrans.core.errors.wording import shown, what
from functrans.core.pytrees import broadcast_prefix, leaves_like, tree_flatten, tree_unflatten
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor, strides_of
from functrans.core.thread_state import STATE
from functrans.functionalization.views import contents_of
from functrans.functionalization.writes import write_for_caller
from functrans.interpreters.vmap.interpreter import VmapInterpreter

#: how ``randomness`` is left out
ERROR = "error"


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = ERROR,
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """``func`` on every example of a batch at once.

    Args:
        func: takes and returns pytrees of tensors, written for one example.
        in_dims: for each positional argument, which dimension of its tensors counts the examples: an int for all, or a
            tuple with an entry per argument, each an int, None (the argument is the same for every example) or a pytree
            of these. Keyword arguments are the same for every example.
        out_dims: where the batch dimension goes in the outputs: an int, None (the output does not depend on the
            example), or a pytree of these.
        randomness: what random operators do: ``"error"``, ``"different"`` draws for each example, or the ``"same"`` for
            all.
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
    if not (is_dynamo_compiling() or callable(func)):
        check_callable("vmap", func)
    call = Call("vmap", func, {"in_dims": in_dims, "out_dims": out_dims})
    if type(in_dims) is not int:
        check_in_dims(call, in_dims)
    if randomness is not ERROR:
        check_randomness(call, randomness)
    if chunk_size is not None:
        check_chunk_size(call, chunk_size)

    @named_after(func)
    def batched(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            options = {"in_dims": in_dims, "out_dims": out_dims, "randomness": randomness, "chunk_size": chunk_size}
            return TRACED(vmap, func, options, args, kwargs, None)
        leaves, dims, spec, size = check_inputs(call, in_dims, args)
        if chunk_size is None or chunk_size >= size:
            return run_batched(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs)
        return run_chunks(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, chunk_size)

    return batched


def chunk_vmap(
    func: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, randomness: str = ERROR, chunks: int = 2
) -> Callable[..., Any]:
    """``vmap`` in a given number of chunks, one after the other, to save memory.

    ``vmap(..., chunk_size=n)`` does the same by the number of examples in a chunk.

    Args:
        func: as in ``vmap``, and so are ``in_dims``, ``out_dims`` and ``randomness``.
        chunks: how many chunks to cut the batch into, of one size but for the last, as ``torch.chunk`` does.

    Returns:
        A function of batched arguments, returning batched outputs.

    Raises:
        CallValueError: ``chunks`` is no positive int, and whatever ``vmap`` raises.

    Example:
        >>> import torch
        >>> from functrans import chunk_vmap
        >>> chunk_vmap(torch.sum, chunks=2)(torch.ones(3, 2))
        tensor([2., 2., 2.])
    """
    if not (is_dynamo_compiling() or callable(func)):
        check_callable("chunk_vmap", func)
    call = Call("chunk_vmap", func, {"in_dims": in_dims, "out_dims": out_dims, "chunks": chunks})
    check_in_dims(call, in_dims)
    check_randomness(call, randomness)
    if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1:
        raise CallValueError(call, f"chunks={shown(chunks)}", "a positive int")

    @named_after(func)
    def batched(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            options = {"in_dims": in_dims, "out_dims": out_dims, "randomness": randomness, "chunks": chunks}
            return TRACED(chunk_vmap, func, options, args, kwargs, None)
        leaves, dims, spec, size = check_inputs(call, in_dims, args)
        chunk_size = max(-(-size // chunks), 1)
        if chunk_size >= size:
            return run_batched(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs)
        return run_chunks(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, chunk_size)

    return batched


def run_batched(
    call: Call,
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
    for x, dim in zip(entered, dims, strict=True):
        if type(x) is WrapperTensor and x.interpreter is interpreter:
            if x.strides is not None:
                x.given = True
            if dim is None:
                x.shared = True
    args = tree_unflatten(spec, entered)

    def body() -> tuple[list[Any], Any, Any]:
        out = call_function(call, func, args, kwargs)
        out_leaves, out_spec = tree_flatten(out)
        for x in out_leaves:
            if type(x) is WrapperTensor and x.view_link is not None and x.interpreter.alive:
                x.view_link.refresh(x)
        return out_leaves, out_spec, out

    out_leaves, out_spec, out = run_transformed(interpreter, body)
    places = check_out_dims(call, out_dims, out, out_leaves, out_spec)
    results = [leave(call, interpreter, x, d, out, i) for i, (x, d) in enumerate(zip(out_leaves, places, strict=True))]
    if STATE.top is not None:
        note_results(2, results)
    written: dict[int, tuple[Tensor, int | None]] = {}
    for i, wrapper in enumerate(entered):
        if type(wrapper) is WrapperTensor and wrapper.version and wrapper.interpreter is interpreter:
            write_back(call, interpreter, wrapper, leaves[i], dims[i], path_of("args", args, i))
            written[id(wrapper)] = leaves[i], dims[i]
    if not written:
        return tree_unflatten(out_spec, results)
    # What an in-place function returns is the caller's tensor, as without vmap, unless it became a view (unsqueeze_).
    for i, (x, place) in enumerate(zip(out_leaves, places, strict=True)):
        if id(x) in written and x.view_link is None:
            origin, dim = written[id(x)]
            if dim is not None and place is not None:
                results[i] = origin if place % origin.dim() == dim else origin.movedim(dim, place)
    return tree_unflatten(out_spec, results)


def write_back(
    call: Call, interpreter: VmapInterpreter, wrapper: WrapperTensor, origin: Tensor, dim: int | None, path: str
) -> None:
    """Write an argument that was written inside for the caller."""
    contents = contents_of(wrapper)
    value, bdim = contents.value, contents.bdim
    if dim is None and bdim is not None:
        raise CallValueError(
            call,
            f"a write to {path}, which has in_dim None, with values that differ between examples",
            "an argument that can hold the batch",
            "Give it an in_dim, or clone() it inside the function.",
        )
    if dim is not None:
        value = value.unsqueeze(dim).expand(origin.shape) if bdim is None else value.movedim(bdim, dim)
    write_for_caller(origin, wrapper, value)


def check_out_dims(call: Call, out_dims: Any, out: Any, leaves: list[Any], spec: Any) -> list[int | None]:
    if type(out_dims) is int or out_dims is None:
        return [out_dims] * len(leaves)
    if isinstance(out, Tensor) and isinstance(out_dims, tuple) and len(out_dims) == 1:
        places: list[Any] | None = list(out_dims)
    else:
        places = broadcast_prefix(out_dims, out)
    if places is None:
        raise CallValueError(call, *difference("out_dims", out_dims, "output", out, prefix=True))
    for i, d in enumerate(places):
        if d is not None and type(d) is not int:
            raise CallValueError(call, f"{what(d)} as out_dim of {path_of('output', out, i)}", "an int or None")
    return places


def leave(call: Call, interpreter: VmapInterpreter, x: Any, place: int | None, out: Any, index: int) -> Any:
    """Leaf ``index`` of ``out`` with its batch dimension at ``place``; what is no tensor stays as it is."""
    bdim = None
    if type(x) is WrapperTensor:
        if x.interpreter is interpreter:
            x, bdim = x.value, x.bdim
            if bdim == place:
                return x
        elif not x.interpreter.alive:
            raise DeadWrapperError(x)
    elif not isinstance(x, Tensor):
        return x
    if place is None:
        if bdim is not None:
            got = f"{path_of('output', out, index)}, which differs between examples, with out_dim None"
            raise CallValueError(
                call, got, "an output that is the same for every example", "Give it an out_dim, such as 0."
            )
        return x
    rank = x.dim() + (bdim is None)
    if not -rank <= place < rank:
        got = (
            f"out_dim {place} for {path_of('output', out, index)}, "
            f"which has {rank} dimension{'s' * (rank != 1)} with the batch"
        )
        raise CallIndexError(call, got, f"{-rank} <= out_dim < {rank}")
    place %= rank
    if bdim is None:
        if x.layout is not torch.strided:
            return torch.stack([x] * interpreter.batch_size, place)
        shape = list(x.shape)
        shape.insert(place, interpreter.batch_size)
        return x.unsqueeze(place).expand(shape)
    return x if bdim == place else x.movedim(bdim, place)


def run_chunks(
    call: Call,
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
    for x, d in zip(leaves, dims, strict=True):
        if d is not None:
            strides_of(x)  # refuses layouts that cannot be batched, before they are cut
    for start in range(0, size, chunk_size):
        length = min(chunk_size, size - start)
        part = [x if d is None else x.narrow(d, start, length) for x, d in zip(leaves, dims, strict=True)]
        if state is not None:
            torch.set_rng_state(state)
        outs.append(run_batched(call, func, part, dims, spec, length, out_dims, randomness, kwargs))
    out_spec = tree_flatten(outs[0])[1]
    flat = [leaves_like(o, out_spec) for o in outs]
    for out, (_, own) in zip(outs, flat, strict=True):
        if own != out_spec:
            raise CallValueError(call, *difference("output", out, "the first chunk's", outs[0]))
    places = check_out_dims(call, out_dims, outs[0], flat[0][0], out_spec)
    joined = []
    for i, place in enumerate(places):
        parts = [leaves_[i] for leaves_, _ in flat]
        joined.append(parts[0] if place is None or not isinstance(parts[0], Tensor) else torch.cat(parts, dim=place))
    return tree_unflatten(out_spec, joined)
