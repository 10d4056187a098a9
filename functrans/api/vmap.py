"""The public transforms of batching: vmap, chunk_vmap."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch.compiler import is_dynamo_compiling

from functrans.api.batches import Asked, Batch, run_batched, run_chunks
from functrans.api.checks import (
    check_callable,
    check_chunk_size,
    check_interpreter,
    check_randomness,
)
from functrans.api.compiled import TRACED, manner, named_after
from functrans.api.in_dims import check_in_dims, check_inputs
from functrans.errors import Call, CallValueError
from functrans.errors.wording import shown
from functrans.interpreters.vmap.interpreter import VmapInterpreter

#: how ``randomness`` is left out
ERROR = "error"


@manner(once=True)
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

    asked = Asked(call, func, out_dims, randomness, interpreter, axis_name)

    @named_after(func)
    def batched(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            options = {"in_dims": in_dims, "out_dims": out_dims, "randomness": randomness, "chunk_size": chunk_size,
                       "axis_name": axis_name, "axis_size": axis_size, "interpreter": interpreter}  # fmt: skip
            return TRACED(vmap, func, options, args, kwargs, None)
        leaves, dims, spec, size = check_inputs(call, in_dims, args, axis_size)
        batch = Batch(leaves, dims, spec, size, kwargs)
        if chunk_size is None or chunk_size >= size:
            return run_batched(asked, batch)
        if axis_name is not None:
            got = f"chunk_size={chunk_size} for {size} examples with axis_name={axis_name!r}"
            raise CallValueError(call, got, "a batch in one piece, whose examples see each other", "Leave one out.")
        return run_chunks(asked, batch, chunk_size)

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

    asked = Asked(call, func, out_dims, randomness, interpreter)

    @named_after(func)
    def batched(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            options = {"in_dims": in_dims, "out_dims": out_dims, "randomness": randomness, "chunks": chunks,
                       "interpreter": interpreter}  # fmt: skip
            return TRACED(chunk_vmap, func, options, args, kwargs, None)
        batch = Batch(*check_inputs(call, in_dims, args), kwargs)
        chunk_size = max(-(-batch.size // chunks), 1)
        return run_batched(asked, batch) if chunk_size >= batch.size else run_chunks(asked, batch, chunk_size)

    return batched
