"""Views: how each was made, so that it can be replayed when its base is written, and written itself.

A view wrapper links to the view it was taken from, down to the base. A write anywhere in the family bumps the version
that the family shares (``AliasGroup``); a view whose ``synced_version`` is older is replayed from the base at its next
use.

NOTE [Layouts that a batch hides]
Whether ``reshape`` and its like view or copy depends on strides. What is computed under vmap lies in memory as the
batch does; where the batch is not outermost there, the examples show gaps that those of a loop do not have. Where the
answer depends on these gaps it is not known, and the view is *doubtful*. Nothing comes of it unless a tensor on one
side of it is written and one on the other side used afterwards, which is an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.core import thread_state
from functrans.core.dispatch import base, dispatch, lift, scan
from functrans.core.errors import InsideTransformError
from functrans.core.errors.described import given
from functrans.core.operators import OpInfo
from functrans.core.tensor import WrapperTensor, set_content
from functrans.core.thread_state import STATE, running_at
from functrans.core.torch_private import OpOverload, no_dispatch, set_grad_enabled
from functrans.functionalize.history import with_history_of
from functrans.functionalize.layouts import as_shown, check_places, dense_strides
from functrans.functionalize.memory import places, positions, storage_offset_of

aten = torch.ops.aten


class AliasGroup:
    """What a family of views shares: how often their common base was written.

    ``content`` is the base's wrapper once that is no longer the wrapper the first view was taken from.
    """

    __slots__ = ("content", "parted", "version")

    def __init__(self) -> None:
        self.version = 0
        self.content: WrapperTensor | None = None
        #: whether a tensor beyond a doubtful view was written; see NOTE [Layouts that a batch hides]
        self.parted = False


class ViewLink:
    """One step of a view chain: the operator that made the view, and the step before it (None: taken from the base)."""

    __slots__ = ("args", "doubtful", "grad_mode", "group", "index", "kwargs", "op", "owner", "parent", "start")

    def __init__(
        self,
        owner: WrapperTensor,
        parent: ViewLink | None,
        group: AliasGroup,
        op: OpOverload,
        args: Any,
        kwargs: Any,
        index: Any,
    ) -> None:
        self.owner = owner
        self.parent = parent
        self.group = group
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.index = index
        self.grad_mode = torch.is_grad_enabled()
        #: whether this step or one before may be a copy; see NOTE [Layouts that a batch hides]
        self.doubtful: bool = parent is not None and parent.doubtful
        #: of a view by places in memory: where that from which it was taken began
        self.start: int | None = None

    def __repr__(self) -> str:
        before = "" if self.parent is None else f" after {self.parent!r}"
        return f"<ViewLink {self.op}({given(('...', *self.args), self.kwargs)}){before}>".replace("'...'", "...")

    def doubtful_step(self) -> ViewLink:
        step = self
        while step.parent is not None and step.parent.doubtful:
            step = step.parent
        return step

    def base_content(self) -> WrapperTensor:
        return self.owner if self.group.content is None else self.group.content

    def apply(self, x: Tensor) -> Tensor:
        """This step's view of ``x``, recorded as the view was when it was made."""
        args = self.args
        if self.start is not None:
            check_places(x)
            size, stride, offset = (*args, None)[:3]
            args = size, stride, None if offset is None else offset + storage_offset_of(x) - self.start
        enabled = torch.is_grad_enabled()
        try:
            set_grad_enabled(self.grad_mode)
            out = dispatch(self.op, (x, *args), self.kwargs)
        finally:
            set_grad_enabled(enabled)
        return out if self.index is None else out[self.index]

    def replay(self) -> Tensor:
        """The view's contents, from the base's present ones."""
        return self.apply(self.base_content() if self.parent is None else self.parent.replay())

    def refresh(self, view: WrapperTensor) -> None:
        """Bring ``view`` up to date with writes to its base or to other views of it."""
        if view.synced_version != self.group.version:
            if self.doubtful or self.group.parted:
                raise InsideTransformError(
                    "using a tensor after another one was written that may share its memory (one is made of the other "
                    f"by {self.doubtful_step().op}, which views or copies as strides say, and the batch hides these),",
                    view.interpreter.name,
                    "that operator on a .clone(memory_format=torch.contiguous_format)",
                )
            with thread_state.door_closed():
                set_content(view, self.replay())
            view.synced_version = self.group.version


def contents_of(wrapper: WrapperTensor) -> WrapperTensor:
    """The wrapper that holds what was written to the argument ``wrapper``, by now a view of itself maybe (``t_``)."""
    if wrapper.view_link is not None:
        return wrapper.view_link.base_content()
    group = wrapper.alias_group
    return wrapper if group is None or group.content is None else group.content


def run_view(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a view operator and link what it returns to what it was taken from."""
    op = known.op
    owner = scan(args, kwargs)[0]
    if owner is None:
        out = base(op, args, kwargs)
        if STATE.top is not None and not _shares_memory(out, args[0]):
            out = lift(out, None, STATE.top)
        return out
    viewed = args[0]
    out = owner.process(op, args, kwargs)
    if type(viewed) is not WrapperTensor:  # a captured tensor seen through an inner level's index: no such view op
        return out
    if out is viewed:
        return out
    doubtful = False
    if op in MAYBE_VIEWS:
        viewing = is_view(viewed, op, args, kwargs)
        if viewed.strides is not None and viewed.layout is torch.strided and hides_layout(viewed):
            doubtful = viewing is not is_view(viewed, op, args, kwargs, dense_strides(viewed.shape, viewed.strides))
        if not viewing and not doubtful:
            return out
    if type(out) is WrapperTensor:
        if viewed.moved:
            out = as_shown(out, viewed, op, args, kwargs, None)
        link_view(out, viewed, op, args, kwargs, None)
        out.view_link.doubtful |= doubtful
    elif type(out) in (list, tuple):
        if viewed.moved:
            out = type(out)([as_shown(part, viewed, op, args, kwargs, index) for index, part in enumerate(out)])
        for index, part in enumerate(out):
            link_view(part, viewed, op, args, kwargs, index)
    return out


def _shares_memory(out: Any, viewed: Any) -> bool:
    first = out[0] if isinstance(out, list | tuple) and out else out
    if not isinstance(first, Tensor) or first is viewed or first._is_view():
        return isinstance(first, Tensor)
    if not isinstance(viewed, Tensor):
        return False  # a number of which a tensor was made
    if first.layout is not torch.strided or viewed.layout is not torch.strided:
        return True  # the parts of a sparse tensor
    return first.untyped_storage()._cdata == viewed.untyped_storage()._cdata


def link_view(
    view: WrapperTensor, viewed: WrapperTensor, op: OpOverload, args: Any, kwargs: Any, index: int | None
) -> None:
    parent = viewed.view_link
    if parent is not None:
        owner, group = parent.owner, parent.group
    else:
        owner, group = viewed, viewed.alias_group
        if group is None:
            group = viewed.alias_group = AliasGroup()
    view.view_link = ViewLink(owner, parent, group, op, args[1:], kwargs, index)
    if op is aten.as_strided.default:
        view.view_link.start = storage_offset_of(viewed)
    view.synced_version = group.version


#: Operators that copy where they cannot view; which of the two it is depends on the strides.
MAYBE_VIEWS = {
    op
    for name in ("reshape", "contiguous", "to", "flatten", "ravel", "reshape_as", "view_as_real", "resolve_conj",
                 "resolve_neg", "type_as", "_reshape_alias", "_conj", "_to_cpu", "unflatten", "real", "positive",
                 "expand_as", "data", "float")
    for op in (
        getattr(getattr(aten, name), o) for o in (getattr(aten, name).overloads() if hasattr(aten, name) else ())
    )
}  # fmt: skip


#: Those of them that view whatever is contiguous.
VIEWS_OF_CONTIGUOUS = frozenset((
    aten.reshape.default, aten.flatten.using_ints, aten.ravel.default, aten.reshape_as.default, aten.unflatten.int,
    aten.expand_as.default,
))  # fmt: skip


def hides_layout(x: WrapperTensor) -> bool:
    """Whether ``x`` shows gaps in memory that a loop over some vmap's examples would not; see NOTE [Layouts that a
    batch hides]."""
    start = x if x.view_link is None else x.view_link.owner
    if start.given and type(start.value) is not WrapperTensor:
        return False  # the caller's own memory
    layer: Any = x
    while type(layer) is WrapperTensor:
        if layer.interpreter.hides_layout(layer):
            return True
        layer = layer.value
    return False


def part(view: WrapperTensor) -> None:
    """Let ``view``, which is doubtful and about to be written, be a tensor of its own.

    Whatever else is of its family cannot be used any more.
    """
    link = view.view_link
    link.group.parted = True
    link.group.version += 1
    owner = link.owner
    if owner.view_link is None:
        owner.view_link = ViewLink(owner, None, link.group, link.doubtful_step().op, (), {}, None)
        owner.synced_version = -1
    view.view_link = view.alias_group = None


def is_view(viewed: WrapperTensor, op: OpOverload, args: Any, kwargs: dict[str, Any], strides: Any = None) -> bool:
    """Whether ``op``, of ``MAYBE_VIEWS``, views ``viewed``, or a tensor of other ``strides``, and does not copy it."""
    if viewed.layout is not torch.strided or (viewed.strides is None and op in VIEWS_OF_CONTIGUOUS):
        return True
    if strides is None:
        strides = tuple(viewed.stride())
    rest = (_described(args[1:]), _described(sorted(kwargs.items())))
    return _decided(op, viewed.shape, strides, viewed.dtype, viewed.device, *rest)


class _Like(NamedTuple):
    """All that a view operator asks of another tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _described(a: Any) -> Any:
    if isinstance(a, Tensor):
        return _Like(a.shape, a.dtype, a.device)
    return tuple(_described(v) for v in a) if isinstance(a, list | tuple) else a


@functools.lru_cache(maxsize=4096)
def _decided(
    op: OpOverload, shape: Any, strides: Any, dtype: torch.dtype, device: torch.device, args: Any, kwargs: Any
) -> bool:
    """Run ``op`` on data of the same layout that takes no memory, and look."""
    given = [*args, *(value for _, value in kwargs)]
    devices = [a.device if isinstance(a, _Like) else a for a in given if isinstance(a, _Like | torch.device)]
    if any(other != device for other in devices):
        return False

    def on_meta(a: Any) -> Any:
        if isinstance(a, _Like):
            return torch.empty(a.shape, dtype=a.dtype, device="meta")
        return torch.device("meta") if isinstance(a, torch.device) else a

    with running_at(None), no_dispatch(), torch.no_grad():
        probe = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        try:
            out = op(probe, *map(on_meta, args), **{name: on_meta(value) for name, value in kwargs})
        except RuntimeError:
            return True
        return out is probe or out._is_view()


# --- writing back through one step ----------------------------------------------------------------------------------


def write_back(steps: list[ViewLink], content: Tensor, new: Tensor, filled: bool) -> Tensor:
    """What ``content`` becomes when its view by ``steps`` becomes ``new``; ``filled``: with one value everywhere."""
    # From a step without a way back of its own on, the elements of several steps may share a place: they are looked at
    # as one.
    first = next((i for i, step in enumerate(steps) if step.op not in WRITE_BACK), len(steps))
    if not MOVES.issuperset(step.op for step in steps[first:] if step.op in WRITE_BACK):
        first = len(steps)
    stages: list[Tensor] = [content]
    for step in steps[:first] if first < len(steps) else steps[:-1]:
        stages.append(step.apply(stages[-1]))
    if first < len(steps):
        new = write_back_by_index(steps[first:], stages.pop(), new, filled)
    for step, before in zip(reversed(steps[:first]), reversed(stages), strict=True):
        rule = WRITE_BACK.get(step.op)
        new = rule(step, before, new) if rule is not None else write_back_by_index([step], before, new, False)
    return new


def write_back_by_index(steps: list[ViewLink], before: Tensor, new: Tensor, filled: bool) -> Tensor:
    """Views that move elements without changing them: their own positions say where each one came from."""
    for step in steps:
        if step.op not in MOVES and step.op not in BY_INDEX:
            raise InsideTransformError(f"a write through a view that {step.op} made", "a transform", "a copy of it")
    seen = torch.arange(math.prod(before.shape), device=before.device).reshape(before.shape)
    with running_at(None):
        for step in steps:
            seen = step.op(seen, *step.args, **step.kwargs)
            seen = seen if step.index is None else seen[step.index]
    return put(seen, before, new, filled)


def put(seen: Tensor, before: Tensor, new: Tensor, filled: bool) -> Tensor:
    """``before`` with the elements of ``new`` where ``synced_version`` has their positions."""
    flat_positions = dispatch(aten.reshape.default, (seen, [-1]), {})
    flat = dispatch(aten.reshape.default, (before, [-1]), {})
    values = dispatch(aten.reshape.default, (new, [-1]), {})
    if not filled and len(torch.unique(seen)) != math.prod(seen.shape):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    flat = dispatch(aten.index_put.default, (flat, [flat_positions], values), {})
    return dispatch(aten.reshape.default, (flat, list(before.shape)), {})


def _send(op: OpOverload, *args: Any) -> Any:
    return dispatch(op, args, {})


def _back_as_strided(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    size, stride, offset = (*step.args, None)[:3]
    start = storage_offset_of(before)
    offset = start if offset is None else offset
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    own_last = start + sum((n - 1) * s for n, s in zip(before.shape, before.stride(), strict=True))
    if start <= offset <= last <= own_last and own_last - start + 1 == math.prod(before.shape):
        return _send(aten.as_strided_scatter.default, before, changed, *step.args)
    seen = positions(places(size, stride, offset), places(before.shape, before.stride(), start))
    if seen is None:
        raise InsideTransformError(
            "a write through as_strided beyond the tensor that it was called on", "a transform", "indices"
        )
    return put(seen, before, changed, False)


#: Views of all elements, in their order, in another shape.
RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.reshape.default,
    aten.reshape_as.default, aten.view_as.default, aten.flatten.using_ints, aten.unflatten.int, aten.ravel.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip


def _back_permute(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    inverse = [0] * before.dim()
    for i, d in enumerate(step.args[0]):
        inverse[d % before.dim()] = i
    return _send(aten.permute.default, changed, inverse)


def _back_shape(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return _send(aten.reshape.default, changed, list(before.shape))


def _back_conjugated(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    """Computed, since a base is not conjugated lazily, which view_as_real asks."""
    if step.op in (aten.mH.default, aten.adjoint.default, aten.matrix_H.default):
        changed = _send(aten.mT.default, changed)
    return _send(aten.conj_physical.default, changed)


def _back_dtype(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    """The same bits in another dtype have no derivative, and leave that of what was there, as ``detach`` does."""
    new = _send(aten.view.dtype, _send(aten.contiguous.default, changed), before.dtype)
    return with_history_of(before, new, everywhere=True)


def _back_again(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    """Steps that are their own inverse."""
    return _send(step.op, changed, *step.args)


#: For a view's operator: (step, before, changed) -> the new contents of what it was taken from.
WRITE_BACK: dict[OpOverload, Callable[[ViewLink, Tensor, Tensor], Tensor]] = {
    aten.as_strided.default: _back_as_strided,
    aten.select.int: lambda step, before, changed: _send(aten.select_scatter.default, before, changed, *step.args),
    aten.slice.Tensor: lambda step, before, changed: _send(aten.slice_scatter.default, before, changed, *step.args),
    aten.diagonal.default: lambda step, before, changed: _send(
        aten.diagonal_scatter.default, before, changed, *step.args
    ),
    aten.unbind.int: lambda step, before, changed: _send(
        aten.select_scatter.default, before, changed, step.args[0] if step.args else 0, step.index
    ),
    aten.permute.default: _back_permute,
    aten.detach.default: lambda step, before, changed: with_history_of(before, changed, everywhere=True),
    aten.real.default: lambda step, before, changed: (
        torch.complex(changed, before.imag) if before.is_complex() else changed
    ),
    aten.imag.default: lambda step, before, changed: torch.complex(before.real, changed),
    aten.view_as_real.default: lambda step, before, changed: torch.view_as_complex(changed.contiguous()),
    aten.view_as_complex.default: lambda step, before, changed: torch.view_as_real(changed),
    **dict.fromkeys(
        (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.t.default, aten.numpy_T.default,
         aten.mT.default),
        _back_again,
    ),
    **dict.fromkeys(
        (aten._conj.default, aten.conj.default, aten.mH.default, aten.adjoint.default, aten.matrix_H.default),
        _back_conjugated,
    ),
    aten.view.dtype: _back_dtype,
    aten._neg_view.default: lambda step, before, changed: _send(aten.neg.default, changed),
    **dict.fromkeys(RESHAPES, _back_shape),
    # conversions that had nothing to convert: where they copied, the link was cut
    **dict.fromkeys(
        (aten.alias.default, aten.contiguous.default, aten.positive.default, aten.resolve_conj.default,
         aten.resolve_neg.default, aten.type_as.default, *(getattr(aten.to, o) for o in aten.to.overloads())),
        lambda step, before, changed: changed,
    ),
}  # fmt: skip

#: Those of them that move elements, and neither look into them nor ask for derivatives.
MOVES = frozenset(
    op for op, rule in WRITE_BACK.items()
    if rule in (_back_permute, _back_shape)
    or op in (aten.select.int, aten.slice.Tensor, aten.diagonal.default, aten.unbind.int, aten.alias.default)
    or rule is _back_again
)  # fmt: skip

#: Views without a way back of their own that do no more than that, either.
BY_INDEX = frozenset(
    getattr(getattr(aten, name), overload)
    for name in (
        "broadcast_to", "chunk", "dsplit", "expand", "expand_as", "hsplit", "linalg_diagonal", "moveaxis", "movedim",
        "narrow", "split", "split_with_sizes", "tensor_split", "unfold", "vsplit",
    )
    for overload in getattr(aten, name).overloads()
)  # fmt: skip
