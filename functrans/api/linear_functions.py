"""Linear functions that a transform recorded and hands out: what they remember, and how they are shown and taken apart.

NOTE [Recorded functions are pytrees]
Their leaves are the tensors that they saved, so that such a function can leave the vmap in which it was recorded, or be
moved to another device, and be called there. Its shapes stay those of one example: the batch that left a vmap is called
by a vmap over the function itself. What PyTorch keeps of a borrowed derivative, or the context of an autograd.Function,
is no leaf: a function with such a record is used where it was recorded, and elsewhere is refused as any tensor that
outlived its transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from functrans.boundary.factories import model_of, ones_for
from functrans.boundary.leftovers import as_here
from functrans.core.tensor import PendingWrapper, WrapperTensor, tensor_of
from functrans.errors import CallError
from functrans.pytorch.thread_state import door_closed
from functrans.pytorch.torch_private import register_tree_node
from functrans.tensors.pytrees import TreeSpec, tree_unflatten

Kind = TypeVar("Kind", bound="LinearFunction")


class Like(NamedTuple):
    """What is remembered of a tensor whose numbers are not needed."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device, layout=self.layout)

    def ones(self) -> Tensor:
        with door_closed():
            return torch.ones(self.shape, dtype=self.dtype, device=self.device)

    def dim(self) -> int:
        return len(self.shape)


class OfAClass(Like):
    """The same of a tensor whose class answers operators itself."""

    model: Tensor

    def zeros(self) -> Tensor:
        return self.model.new_zeros(self.shape, dtype=self.dtype)

    def ones(self) -> Tensor:
        return ones_for(self.model, *self.shape)


def like(x: Tensor) -> Like:
    model = model_of(x)
    if model is None:
        return Like(x.shape, x.dtype, x.device, x.layout)
    found = OfAClass(x.shape, x.dtype, x.device, x.layout)
    found.model = model
    return found


def stand_ins(spec: TreeSpec, likes: list[Like]) -> Any:
    """A tree of tensors without numbers, for messages."""
    return tree_unflatten(spec, [torch.empty(each.shape, dtype=each.dtype, device="meta") for each in likes])


class Hole(NamedTuple):
    """Where tensor number ``place`` of what was saved stands."""

    place: int


Found = dict[int, tuple[Hole, Tensor]]


def without_tensors(saved: Any, found: Found) -> Any:
    """``saved``, nested lists and tuples, with holes for its tensors, which are added to ``found``, each once."""
    if type(saved) is PendingWrapper:
        saved = tensor_of(saved)
    if isinstance(saved, Tensor):
        return found.setdefault(id(saved), (Hole(len(found)), saved))[0]
    if type(saved) is list or type(saved) is tuple:
        return type(saved)(without_tensors(s, found) for s in saved)
    return saved


def with_tensors(holes: Any, tensors: list[Any]) -> Any:
    if type(holes) is Hole:
        return tensors[holes.place]
    return type(holes)(with_tensors(h, tensors) for h in holes) if type(holes) in (list, tuple) else holes


class LinearFunction:
    """A linear function that was recorded; it may be called repeatedly.

    See NOTE [Recorded functions are pytrees].
    """

    #: what saved tensors are for, each with the tensor and how often that had been written
    versions: list[tuple[Any, Tensor, int]]
    #: once it was taken apart: the shapes that its leaves were recorded with, and the first that has another one now
    shapes: list[torch.Size] | None = None
    misfit: tuple[torch.Size, torch.Size] | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        raise NotImplementedError

    def saved(self) -> list[Any]:
        """What it saved for each of its steps, in lists and tuples."""
        raise NotImplementedError

    def leaves(self) -> list[Any]:
        """All that it holds tensors in, in lists and tuples."""
        return self.saved()

    def with_leaves(self, leaves: list[Any]) -> LinearFunction:
        """The same function with other tensors."""
        raise NotImplementedError

    def same_as(self, other: Any) -> bool:
        """Whether it is the same function but for what both saved."""
        raise NotImplementedError

    def check_leaves(self) -> None:
        """Refuse to compute with leaves that are batches, as those are that left a vmap."""
        if self.misfit is not None:
            got, expected = map(tuple, self.misfit)
            cure = "What left a vmap is called inside of one, which batches it: vmap(lambda f, x: f(x))(function, x)."
            wanted = f"the shape {expected} that it was recorded with"
            raise CallError(self.name, f"a leaf of shape {got}", wanted, cure)

    def __repr__(self) -> str:
        found: Found = {}
        without_tensors([self.leaves(), [x for _, x, _ in self.versions]], found)
        tensors = [x for _, x in found.values()]
        kept = f"{counted(len(tensors), 'tensor')} saved, {in_words(nbytes(tensors))}"
        return f"<{self.name}: {counted(len(self.saved()), 'record')}, {kept}>"


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


class Skeleton:
    """A recorded function without its tensors: what a pytree keeps of it beside the leaves."""

    def __init__(self, function: LinearFunction, holes: Any, shapes: list[torch.Size]) -> None:
        self.function = function
        self.holes = holes
        self.shapes = shapes

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Skeleton)
            and self.holes == other.holes
            and self.shapes == other.shapes
            and self.function.same_as(other.function)
        )

    def __hash__(self) -> int:
        return hash(type(self.function))


def flatten(function: LinearFunction) -> tuple[list[Tensor], Skeleton]:
    found: Found = {}
    holes = without_tensors(function.leaves(), found)
    leaves = [x for _, x in found.values()]
    return leaves, Skeleton(function, holes, [x.shape for x in leaves] if function.shapes is None else function.shapes)


def unflatten(leaves: Any, skeleton: Skeleton) -> LinearFunction:
    leaves = list(leaves)
    function = skeleton.function.with_leaves(with_tensors(skeleton.holes, leaves))
    function.shapes = skeleton.shapes
    pairs = zip(leaves, skeleton.shapes, strict=True)
    function.misfit = next(((x.shape, s) for x, s in pairs if isinstance(x, Tensor) and x.shape != s), None)
    return function


def as_here_leaves(function: Kind) -> Kind:
    """``function``, recorded inside of a transform that has ended, with what its leaves stand for by now.

    See NOTE [Leftovers].
    """
    leaves, skeleton = flatten(function)
    return unflatten([as_here(x) for x in leaves], skeleton)  # type: ignore[return-value]


def is_tree_node(cls: type[Kind]) -> type[Kind]:
    """Decorator: functions of this class are pytrees."""
    register: Callable[..., Any] = register_tree_node
    register(cls, flatten, unflatten)
    return cls


def nbytes(tensors: list[Tensor]) -> int:
    """The memory that tensors take: of wrappers, what is stored under them; what is shared counts once."""
    stores: dict[Any, int] = {}
    for x in tensors:
        for part in stored(x):
            store = part.untyped_storage()
            stores[store._cdata] = store.nbytes()
    return sum(stores.values())


def stored(x: Tensor) -> list[Tensor]:
    """The dense tensors in which the numbers of ``x`` are."""
    while type(x) is WrapperTensor:
        x = x.value
    if x.layout is torch.strided:
        return [x]
    x = x.detach().coalesce()
    return [x.indices(), x.values()]


def in_words(size: int) -> str:
    if size < 1000:
        return counted(size, "byte")
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"
