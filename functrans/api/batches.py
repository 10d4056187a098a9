"""A batch on its way through vmap: whole, or in chunks; and what was written to it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.api.checks import call_function
from functrans.api.containers import Level, is_container, part, whole
from functrans.api.containers import entered as batched_container
from functrans.api.out_dims import check_out_dims, leave
from functrans.api.private_names import answer_for_good, current
from functrans.api.structures import difference, path_of
from functrans.boundary.facades import are_plain, bare, shown_like
from functrans.boundary.leftovers import as_here
from functrans.boundary.made_at import note_results
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor, strides_of
from functrans.errors import Call, CallValueError
from functrans.functionalization.views import ViewLink, contents_of
from functrans.functionalization.writes import write_for_caller
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import STATE
from functrans.tensors.pytrees import leaves_like, tree_flatten, tree_unflatten


class Asked(NamedTuple):
    """A vmap as it was asked for, but for what its arguments are checked by."""

    call: Call
    func: Callable[..., Any]
    out_dims: Any
    randomness: str
    interpreter: type[VmapInterpreter] = VmapInterpreter
    axis_name: Hashable | None = None
    generators: dict[torch.Generator, Tensor] | None = None


class Batch(NamedTuple):
    """The arguments of one call.

    Attributes:
        leaves: the tensors and the like of the positional arguments.
        dims: of each leaf the dimension that counts the examples.
        spec: what the leaves make up.
        size: how many examples there are.
        kwargs: the arguments by keyword, which all examples share.
    """

    leaves: list[Any]
    dims: list[int | None]
    spec: Any
    size: int
    kwargs: dict[str, Any]


def run_batched(asked: Asked, batch: Batch) -> Any:
    """Run the whole batch."""
    call, func, out_dims, randomness, cls, axis_name, generators = asked
    leaves, dims, spec, size, kwargs = batch
    interpreter = cls(size, randomness, func)
    interpreter.generators = generators
    if axis_name is not None:
        interpreter.axis_name = axis_name
    given = leaves
    if not are_plain(leaves):
        leaves = [bare(x) for x in leaves]
    wrapped, level = entered(interpreter, leaves, dims)
    args = tree_unflatten(spec, wrapped if given is leaves else list(map(shown_like, wrapped, given)))

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
    for i, wrapper in enumerate(wrapped):
        if type(wrapper) is WrapperTensor and wrapper.version and wrapper.interpreter is interpreter:
            if wrapper.reassigned is not None:
                wrapper = wrapper.reassigned
                if not wrapper.version:
                    continue
            write_back(call, interpreter, wrapper, leaves[i], dims[i], path_of("args", args, i))
            written[id(wrapper)] = leaves[i], dims[i]
    for wrapper, origin, bdim in level.entered if level is not None else ():
        if wrapper.version:
            write_back(call, interpreter, wrapper, origin, bdim, "a container's tensor")
    if written:
        for i, (x, place) in enumerate(zip(out_leaves, places, strict=True)):
            if place is not None:
                results[i] = callers_own(interpreter, bare(x), written, place, results[i])
    return tree_unflatten(out_spec, results)


def entered(
    interpreter: VmapInterpreter, leaves: list[Any], dims: list[int | None]
) -> tuple[list[Any], Level | None]:
    """The arguments as the function sees them; and, if some are containers, what keeps track of their tensors."""
    level: Level | None = None
    wrapped: list[Any] = []
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
        wrapped.append(x)
    return wrapped, level


def callers_own(
    interpreter: VmapInterpreter, x: Any, written: dict[int, tuple[Tensor, int | None]], place: int, result: Any
) -> Any:
    """What an in-place function returns is the caller's tensor, as without vmap, or a view of it; else ``result``."""
    link = getattr(x, "view_link", None)
    origin, dim = written.get(id(x if link is None else link.owner), (None, None))
    if origin is None or dim is None:
        return result
    if link is None:
        return origin if place % origin.dim() == dim else origin.movedim(dim, place)
    if not link.doubtful and link.group.content is None and type(origin) is not WrapperTensor:
        return view_of_origin(interpreter, link, origin, dim, place)
    return result


def view_of_origin(interpreter: VmapInterpreter, link: ViewLink, origin: Tensor, dim: int, place: int) -> Tensor:
    """The view that ``link`` is of an argument, of the batch that the caller has."""
    again = type(interpreter)(interpreter.batch_size, interpreter.randomness, interpreter.func)
    again.axis_name = interpreter.axis_name
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


def run_chunks(asked: Asked, batch: Batch, chunk_size: int) -> Any:
    """Run so many examples at a time, and join what they return."""
    outs: list[Any] = []
    for_chunks(outs.append, asked, batch, chunk_size)
    return joined(asked.call, outs, asked.out_dims)


def for_chunks(take: Callable[[Any], Any], asked: Asked, batch: Batch, chunk_size: int) -> None:
    """Run the batch in chunks, and hand the result of each over to ``take``.

    With randomness "same" every chunk starts from the same states of all generators, those among them that the function
    itself passes.
    """
    leaves, dims, _, size, _ = batch
    if chunk_size >= size:
        take(run_batched(asked, batch))
        return
    states: dict[torch.Generator, Tensor] = {}
    if asked.randomness == "same":
        gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        states.update((generator, generator.get_state()) for generator in (torch.default_generator, *gpus))
        asked = Asked(*asked[:-1], states)
    for x, d in zip(leaves, dims, strict=True):
        if d is not None and isinstance(x, Tensor):
            strides_of(x)  # refuses layouts that cannot be batched, before they are cut
    for start in range(0, size, chunk_size):
        length = min(chunk_size, size - start)
        chunk = [x if d is None else part(x, d, start, length) for x, d in zip(leaves, dims, strict=True)]
        for generator, state in states.items():
            generator.set_state(state)
        take(run_batched(asked, Batch(chunk, dims, batch.spec, length, batch.kwargs)))


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
