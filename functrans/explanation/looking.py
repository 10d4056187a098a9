"""Looking at tensors of any level without touching them: no operator, no wrapper made, nothing that a mode sees."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from functrans.core.errors.described import is_wrapper, shown
from functrans.core.torch_private import DisableTorchFunction, OpOverload, no_dispatch
from functrans.explanation.events import Look
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.programs.program import names as letters

#: Of a larger tensor so many elements are kept, evenly spaced.
MOST = 1 << 16


@contextmanager
def unseen() -> Iterator[None]:
    """Context: what runs is plain PyTorch that no transform, mode or subclass sees."""
    with torch.no_grad(), no_dispatch(), DisableTorchFunction():
        yield


def tensors_of(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors among the arguments of an operator, by the names of these."""
    names = [a.name for a in op._schema.arguments] if isinstance(op, OpOverload) else []
    if hasattr(op, "instructions"):  # a program, whose Python has these
        names = [*itertools.islice(letters(), len(args))]
    for i, a in enumerate(args):
        yield from named(names[i] if i < len(names) else str(i), a)
    for name, a in kwargs.items():
        yield from named(name, a)


def named(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    """``x``, or the tensors in it, with names."""
    if isinstance(x, Tensor) or is_wrapper(x):
        yield name, x
    elif isinstance(x, list | tuple):
        for i, v in enumerate(x):
            yield from named(f"{name}[{i}]", v)
    elif isinstance(x, dict):
        for key, v in x.items():
            yield from named(str(key), v)


def looks(tensors: Iterable[tuple[str, Any]], example: int) -> list[Look]:
    """How tensors look, with the numbers of one example."""
    return [
        Look(name, shown(x), tuple(layers(x)), {part: kept(v) for part, v in numbers(x, example).items()})
        for name, x in tensors
    ]


def layers(x: Any) -> Iterator[str]:
    """What each transform keeps on ``x``, and the tensor at the base."""
    while is_wrapper(x):
        i = x.interpreter
        about = i.describe(x) or ", ".join(f"{name} {shown(part)}" for name, part in i.parts(x).items())
        yield f"level {i.level} {i.kind}{', ' if about else ''}{about}"
        x = x._value
    yield shown(x)


def numbers(x: Any, example: int) -> dict[str, Tensor]:
    """The numbers of one example under ``x``: of its value, and of what transforms carry beside it."""
    if not is_wrapper(x):
        return {"value": x} if is_plain(x) and not x.is_quantized and x.device.type != "meta" else {}
    interpreter = x.interpreter
    found = numbers(x._value, example)
    for name, part in interpreter.parts(x).items():
        if isinstance(part, Tensor) or is_wrapper(part):
            found.update({f"{name} at level {interpreter.level}": v for v in numbers(part, example).values()})
    if isinstance(interpreter, VmapInterpreter) and x.bdim is not None:
        size = interpreter.batch_size
        fitting = {name: v for name, v in found.items() if v.dim() > x.bdim and v.shape[x.bdim] == size > 0}
        found = {name: v.select(x.bdim, min(example, size - 1)) for name, v in fitting.items()}
    return found


def kept(x: Tensor) -> Tensor:
    """A copy that later writes do not reach, of a selection where ``x`` is large."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.numel() > MOST:
        x = x.reshape(-1)[:: -(-x.numel() // MOST)]
    return x.clone()


def number_text(x: Tensor) -> str:
    """A few numbers of a tensor, as text."""
    with unseen():
        return nested_text(x, edge=3 if x.dim() < 2 else 2 if x.dim() == 2 else 1)


def nested_text(x: Tensor, edge: int) -> str:
    if x.dim() == 0:
        value = x.item()
        return f"{value:.4g}" if isinstance(value, float | complex) else str(value)
    n = x.shape[0]
    places: list[int | None] = list(range(n)) if n <= 2 * edge else [*range(edge), None, *range(n - edge, n)]
    return f"[{', '.join('...' if i is None else nested_text(x[i], edge) for i in places)}]"


def bytes_made(out: Any, given: Any) -> int:
    """The bytes of the tensors in ``out`` that do not share memory with those that were given."""
    taken = {place for _, x in named("", given) if (place := memory_of(x)) is not None}
    made = {memory_of(x): x.untyped_storage().nbytes() for _, x in named("", out) if memory_of(x) is not None}
    return sum(size for place, size in made.items() if place not in taken)


def memory_of(x: Any) -> int | None:
    return x.untyped_storage()._cdata if is_plain(x) else None


def is_plain(x: Any) -> bool:
    """Whether ``x`` is a strided tensor and nothing else."""
    return type(x) in (Tensor, Parameter) and x.layout is torch.strided and not x.is_nested
