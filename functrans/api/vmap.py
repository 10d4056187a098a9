"""The public transforms of batching: vmap, chunk_vmap."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import (
    call_function,
    check_callable,
    check_chunk_size,
    check_interpreter,
    check_randomness,
)
from functrans.api.compiled import TRACED, named_after
from functrans.api.containers import Level, is_container, part, whole
from functrans.api.containers import entered as batched_container
from functrans.api.in_dims import check_in_dims, check_inputs
from functrans.api.out_dims import check_out_dims, leave
from functrans.api.private_names import answer_for_good, current
from functrans.api.structures import difference, path_of
from functrans.core.errors import Call, CallValueError
from functrans.core.errors.made_at import note_results
from functrans.core.errors.wording import shown
from functrans.core.facades import are_plain, bare, shown_like
from functrans.core.leftovers import as_here
from functrans.core.pytrees import leaves_like, tree_flatten, tree_unflatten
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor, strides_of
from functrans.core.thread_state import STATE
from functrans.functionalization.views import ViewLink, contents_of
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
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    interpreter: type[VmapInterpreter] = VmapInterpreter,
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
        axis_name: a name for the batch, by which ``psum``, ``pmean``, ``all_gather``, ... combine the examples.
        axis_size: the number of examples. It has to be given where no argument is batched, and agree where one is.
        interpreter: a subclass of ``functrans.extend.VmapInterpreter`` that takes its place at this level.

    Returns:
        A function of batched arguments, returning batched outputs.

    Raises:
        CallValueError: ``in_dims`` or ``out_dims`` do not fit, batch sizes differ, or a batch with an ``axis_name`` is
            to be cut into chunks.
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
    if axis_name is not None or axis_size is not None:
        check_axis(call, axis_name, axis_size)
    if interpreter is not VmapInterpreter:
        check_interpreter(call, interpreter, VmapInterpreter)

    @named_after(func)
    def batched(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            options = {"in_dims": in_dims, "out_dims": out_dims, "randomness": randomness, "chunk_size": chunk_size,
                       "axis_name": axis_name, "axis_size": axis_size, "interpreter": interpreter}  # fmt: skip
            return TRACED(vmap, func, options, args, kwargs, None)
        leaves, dims, spec, size = check_inputs(call, in_dims, args, axis_size)
        if chunk_size is None or chunk_size >= size:
            return run_batched(
                call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, axis_name, interpreter
            )
        if axis_name is not None:
            got = f"chunk_size={chunk_size} for {size} examples with axis_name={axis_name!r}"
            raise CallValueError(call, got, "a batch in one piece, whose examples see each other", "Leave one out.")
        return run_chunks(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, chunk_size, interpreter)

    return batched


def check_axis(call: Call, axis_name: Any, axis_size: Any) -> None:
    if isinstance(axis_name, tuple) or not isinstance(axis_name, Hashable):
        raise CallValueError(call, f"axis_name={shown(axis_name)}", "one name: a string, or another hashable value")
    if axis_size is not None and (type(axis_size) is not int or axis_size < 0):
        raise CallValueError(call, f"axis_size={shown(axis_size)}", "a number of examples, or None")


def chunk_vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = ERROR,
    chunks: int = 2,
    *,
    interpreter: type[VmapInterpreter] = VmapInterpreter,
) -> Callable[..., Any]:
    """``vmap`` in a given number of chunks, one after the other, to save memory.

    ``vmap(..., chunk_size=n)`` does the same by the number of examples in a chunk.

    Args:
        func: as in ``vmap``, and so are ``in_dims``, ``out_dims`` and ``randomness``.
        chunks: how many chunks to cut the batch into, of one size but for the last, as ``torch.chunk`` does.
        interpreter: as in ``vmap``; each chunk has one of its own.

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
    if interpreter is not VmapInterpreter:
        check_interpreter(call, interpreter, VmapInterpreter)

    @named_after(func)
    def batched(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            options = {"in_dims": in_dims, "out_dims": out_dims, "randomness": randomness, "chunks": chunks,
                       "interpreter": interpreter}  # fmt: skip
            return TRACED(chunk_vmap, func, options, args, kwargs, None)
        leaves, dims, spec, size = check_inputs(call, in_dims, args)
        chunk_size = max(-(-size // chunks), 1)
        if chunk_size >= size:
            return run_batched(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, None, interpreter)
        return run_chunks(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, chunk_size, interpreter)

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
    axis_name: Hashable | None = None,
    cls: type[VmapInterpreter] = VmapInterpreter,
) -> Any:
    interpreter = cls(size, randomness, func)
    if axis_name is not None:
        interpreter.axis_name = axis_name
    given = leaves
    if not are_plain(leaves):
        leaves = [bare(x) for x in leaves]
    level: Level | None = None  # which containers ask for
    entered: list[Any] = []
    for x, d in zip(leaves, dims, strict=True):
        if isinstance(x, Tensor):
            if type(x) is WrapperTensor:
                x = as_here(x)
            x = interpreter.batched(x, d)
            if type(x) is WrapperTensor and x.interpreter is interpreter:
                if x.strides is not None:
                    x.given = True
                if d is None:
                    x.shared = True
        elif is_container(x):
            answer_for_good()
            level = level or Level(interpreter)
            x = batched_container(x, d, level)
        entered.append(x)
    args = tree_unflatten(spec, entered if given is leaves else list(map(shown_like, entered, given)))

    def body() -> tuple[list[Any], Any, Any]:
        out = call_function(call, func, args, kwargs)
        out_leaves, out_spec = tree_flatten(out, whole())
        for x in out_leaves if are_plain(out_leaves) else map(bare, out_leaves):
            if type(x) is WrapperTensor:
                if x.view_link is not None:
                    current(x)
            elif is_container(x):
                answer_for_good()
                for tensor in x.values(True, True):
                    if type(tensor) is WrapperTensor:
                        current(tensor)
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
    for wrapper, origin, bdim in level.entered if level is not None else ():
        if wrapper.version:
            write_back(call, interpreter, wrapper, origin, bdim, "a container's tensor")
    if not written:
        return tree_unflatten(out_spec, results)
    # What an in-place function returns is the caller's tensor, as without vmap, or a view of it.
    for i, (x, place) in enumerate(zip(out_leaves, places, strict=True)):
        x = bare(x)
        link = getattr(x, "view_link", None)
        found = written.get(id(x if link is None else link.owner))
        if found is None or found[1] is None or place is None:
            continue
        origin, dim = found[0], found[1]
        if link is None:
            results[i] = origin if place % origin.dim() == dim else origin.movedim(dim, place)
        elif not link.doubtful and link.group.content is None and type(origin) is not WrapperTensor:
            results[i] = view_of_origin(interpreter, link, origin, dim, place)
    return tree_unflatten(out_spec, results)


def view_of_origin(interpreter: VmapInterpreter, link: ViewLink, origin: Tensor, dim: int, place: int) -> Tensor:
    """The view that ``link`` is of an argument, of the batch that the caller has."""
    again = VmapInterpreter(interpreter.batch_size, interpreter.randomness, interpreter.func)
    view = run_transformed(again, lambda: link.replay(again.batched(as_here(origin), dim)))
    return view.value.movedim(view.bdim, place)  # type: ignore[attr-defined, no-any-return]


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
    cls: type[VmapInterpreter] = VmapInterpreter,
) -> Any:
    """Run the batch in chunks."""
    outs: list[Any] = []
    for_chunks(outs.append, call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, chunk_size, cls)
    return joined(call, outs, out_dims)


def for_chunks(
    take: Callable[[Any], Any],
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
    cls: type[VmapInterpreter] = VmapInterpreter,
) -> None:
    """Run the batch in chunks, and hand the result of each over to ``take``.

    With randomness "same" every chunk starts from the same generator state.
    """
    if chunk_size >= size:
        take(run_batched(call, func, leaves, dims, spec, size, out_dims, randomness, kwargs, None, cls))
        return
    state = torch.get_rng_state() if randomness == "same" else None
    for x, d in zip(leaves, dims, strict=True):
        if d is not None and isinstance(x, Tensor):
            strides_of(x)  # refuses layouts that cannot be batched, before they are cut
    for start in range(0, size, chunk_size):
        length = min(chunk_size, size - start)
        chunk = [x if d is None else part(x, d, start, length) for x, d in zip(leaves, dims, strict=True)]
        if state is not None:
            torch.set_rng_state(state)
        take(run_batched(call, func, chunk, dims, spec, length, out_dims, randomness, kwargs, None, cls))


def joined(call: Call, outs: list[Any], out_dims: Any) -> Any:
    """The results of all chunks as one."""
    out_spec = tree_flatten(outs[0], whole())[1]
    flat = [leaves_like(o, out_spec, whole()) for o in outs]
    for out, (_, own) in zip(outs, flat, strict=True):
        if own != out_spec:
            raise CallValueError(call, *difference("output", out, "the first chunk's", outs[0]))
    places = check_out_dims(call, out_dims, outs[0], flat[0][0], out_spec)
    whole_leaves = []
    for i, place in enumerate(places):
        parts = [leaves_[i] for leaves_, _ in flat]
        joins = place is not None and (isinstance(parts[0], Tensor) or is_container(parts[0]))
        whole_leaves.append(torch.cat(parts, dim=place) if joins else parts[0])  # type: ignore[arg-type]
    return tree_unflatten(out_spec, whole_leaves)
