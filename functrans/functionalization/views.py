"""Views: how each was made, so that it can be replayed when its base is written, and written itself.

A view wrapper links to the view it was taken from, down to the base. A write anywhere in the family bumps the version
that the family shares (``AliasGroup``); a view whose ``synced_version`` is older is replayed from the base at its next
use.

NOTE [Layouts that a batch hides]
Whether ``reshape`` and its like view or copy depends on strides. What is computed under vmap lies in memory as the
batch does; where the batch is not outermost there, the examples show gaps that those of a loop do not have. Where the
answer depends on these gaps it is not known, and the view is *doubtful*. Nothing comes of it unless a tensor on one
side of it is written and one on the other side used afterwards, which is an error. Where ``contiguous`` and its like
may have returned the tensor itself (``maybe_same``), neither of the two can get another shape in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from functrans.boundary.calls import lift
from functrans.boundary.fresh import FRESH
from functrans.boundary.leftovers import check_thread
from functrans.core.dispatch import base, dispatch, scan
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.errors import InsideTransformError
from functrans.errors.misuse import RESERVED
from functrans.functionalization.history import with_history_of
from functrans.functionalization.layouts import as_shown, check_places, dense_strides, set_content
from functrans.functionalization.memory import storage_offset_of
from functrans.operators.info import OpInfo
from functrans.pytorch import thread_state
from functrans.pytorch.thread_state import STATE, running_at
from functrans.pytorch.torch_private import OpOverload, no_dispatch, set_grad_enabled
from functrans.tensors.described import given

aten = torch.ops.aten
DETACH = aten.detach.default


WrapperTensor.maybe_same = False  # type: ignore[attr-defined]
RESERVED.add("maybe_same")


class MadeInside:
    """On a captured tensor's view, and on a parameter that shares its memory: the level where it was made."""

    __slots__ = ("level",)

    def __init__(self, level: Interpreter) -> None:
        self.level = ref(level)

    def __reduce__(self) -> Any:
        return set, ()  # to others it says nothing, and torch.load takes that from anyone


class AliasGroup:
    """What a family of views shares: how often their common base was written.

    ``content`` is the base's wrapper once that is no longer the wrapper the first view was taken from.
    """

    __slots__ = ("content", "parted", "version", "views")

    def __init__(self) -> None:
        self.version = 0
        self.content: WrapperTensor | None = None
        #: whether a tensor beyond a doubtful view was written; see NOTE [Layouts that a batch hides]
        self.parted = False
        #: the views made since the first write, by their id; see NOTE [Buffers] in functionalization/in_place.py
        self.views: dict[int, Any] = {}

    def note(self, view: WrapperTensor) -> None:
        self.views[id(view)] = ref(view)
        if len(self.views) % 64 == 0:
            self.others(view)

    def others(self, view: WrapperTensor) -> list[WrapperTensor]:
        """The noted views that are still there, but ``view``."""
        there = [(key, x, x()) for key, x in self.views.items()]
        self.views = {key: x for key, x, wrapper in there if wrapper is not None}
        return [wrapper for _, _, wrapper in there if wrapper is not None and wrapper is not view]


class ViewLink:
    """One step of a view chain: the operator that made the view, and the step before it (None: taken from the base)."""

    __slots__ = (
        "args", "base", "doubtful", "grad_mode", "group", "history", "index", "kwargs", "op", "owner", "parent",
        "start",
    )  # fmt: skip

    def __init__(
        self,
        owner: WrapperTensor,
        parent: ViewLink | None,
        group: AliasGroup,
        base: WrapperTensor | None,
        op: OpOverload,
        args: Any,
        kwargs: Any,
        index: Any,
    ) -> None:
        self.owner = owner
        #: what PyTorch calls the view's ``_base``; None: it would not call it a view
        self.base = base
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
        #: of ``detach``: what has the derivative of what was written to it; see NOTE [Writes and grad mode]
        self.history: Tensor | None = None

    def __repr__(self) -> str:
        before = "" if self.parent is None else f" after {self.parent!r}"
        return f"<ViewLink {self.op}({given(('...', *self.args), self.kwargs)}){before}>".replace("'...'", "...")

    def doubtful_step(self) -> ViewLink:
        step = self
        while step.parent is not None and step.parent.doubtful:
            step = step.parent
        return step

    def chain(self) -> list[ViewLink]:
        """The steps from the base to this one."""
        steps = [self]
        while steps[-1].parent is not None:
            steps.append(steps[-1].parent)
        return steps[::-1]

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
        if self.history is not None:
            return with_history_of(self.history, out, everywhere=True)
        return out if self.index is None else out[self.index]

    def replay(self, base: Tensor | None = None) -> Tensor:
        """The view's contents, from the base's present ones; or the view of another ``base``."""
        if self.parent is not None:
            return self.apply(self.parent.replay(base))
        return self.apply(self.base_content() if base is None else base)

    def refresh(self, view: WrapperTensor) -> None:
        """Bring ``view`` up to date with writes to its base or to other views of it."""
        if view.synced_version != self.group.version:
            if not view.interpreter.alive:
                return  # what it stands for is seen to where it is read: NOTE [Leftovers]
            if self.doubtful or self.group.parted:
                raise InsideTransformError(
                    "using a tensor after another one was written that may share its memory (one is made of the other "
                    f"by {self.doubtful_step().op}, which views or copies as strides say, and the batch hides these),",
                    view.interpreter.name,
                    "that operator on a .clone(memory_format=torch.contiguous_format)",
                )
            check_recorded(view, self.base_content())
            with thread_state.door_closed():
                new = self.replay()
                set_content(view, new if view.leaf is None else view.leaf(new))
            view.synced_version = self.group.version
            self.group.note(view)


def made_silently(link: ViewLink | None) -> bool:
    """Whether a step of a view's was made under no_grad, since the last ``detach``."""
    while link is not None and link.op is not DETACH:
        if not link.grad_mode:
            return True
        link = link.parent
    return False


def check_recorded(view: WrapperTensor, content: Tensor | None, new: Tensor | None = None) -> None:
    """Refuse what PyTorch refuses as ambiguous: that a view made under no_grad is written, or used after a write, where
    derivatives are recorded: it cannot have that of its base, and its base would lose its own."""
    if not torch.is_grad_enabled() or not made_silently(view.view_link):
        return
    detached = view.view_link
    while detached is not None and detached.op is not DETACH:
        detached = detached.parent
    contents = (content if detached is None else detached.history, new)
    if any(x is not None and x.requires_grad for x in contents):
        what = "writing a view that was made under no_grad, or using it after a write to what it views,"
        raise InsideTransformError(what, view.interpreter.name, "a view that is made where it is written or used")


def contents_of(wrapper: WrapperTensor) -> WrapperTensor:
    """The wrapper that holds what was written to the argument ``wrapper``, by now a view of itself maybe (``t_``)."""
    if wrapper.view_link is not None and wrapper.view_link is not FRESH:
        return wrapper.view_link.base_content()
    group = wrapper.alias_group
    return wrapper if group is None or group.content is None else group.content


def run_view(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a view operator and link what it returns to what it was taken from."""
    op = known.op
    owner = scan(args, kwargs)[0]
    if owner is None:
        out = base(op, args, kwargs)
        if STATE.top is not None:
            if not _shares_memory(out, args[0]):
                return lift(out, None, STATE.top)
            if type(out) is Tensor:
                out.made_inside = MadeInside(STATE.top)  # type: ignore[attr-defined]
        return out
    if owner is not STATE.top:
        check_thread(owner)
    viewed = args[0]
    out = owner.process(op, args, kwargs)
    if type(viewed) is not WrapperTensor:  # a captured tensor seen through an inner level's index: no such view op
        return out
    if out is viewed:
        return out
    doubtful = False
    if known.views_contiguous and viewed.strides is None:
        if op is aten.flatten.using_ints and out.dim() == viewed.dim():
            return viewed
    elif known.may_copy:
        returned = what_returns(viewed, op, args, kwargs)
        if viewed.strides is not None and viewed.layout is torch.strided and hides_layout(viewed):
            in_a_loop = {what_returns(viewed, op, args, kwargs, strides) for strides in possible_strides(viewed)}
            doubtful = len({one is COPIED for one in (*in_a_loop, returned)}) > 1
            if doubtful and ITSELF in in_a_loop:
                if not torch.is_grad_enabled() and viewed.requires_grad and not made_silently(viewed.view_link):
                    what = "of what it may return, with its derivative, or copy (as strides say that the batch hides)"
                    cure = "a .clone(memory_format=torch.contiguous_format)"
                    raise InsideTransformError(f"{op} under no_grad {what}", viewed.interpreter.name, cure)
                viewed.maybe_same = out.maybe_same = True
            returned = returned if in_a_loop == {returned} else VIEWED
        if returned is ITSELF:
            return viewed
        if returned is COPIED and not doubtful:
            return out
    if known.views_by_another:
        op, args = settled(op, args)
    if type(out) is WrapperTensor:
        if viewed.moved:
            out = shown_or_moved(out, viewed, op, args, kwargs, None)
        link_view(out, viewed, op, args, kwargs, None)
        out.view_link.doubtful |= doubtful
    elif type(out) in (list, tuple):
        if viewed.moved:
            out = type(out)([shown_or_moved(part, viewed, op, args, kwargs, k) for k, part in enumerate(out)])
        for index, part in enumerate(out):
            link_view(part, viewed, op, args, kwargs, index)
    return out


def settled(op: OpOverload, args: Any) -> tuple[OpOverload, Any]:
    """The operator that makes the view whatever becomes of the other tensors among ``args``."""
    if op in LIKE_ANOTHER:
        return LIKE_ANOTHER[op], (args[0], list(args[1].shape))
    if op is aten.narrow.Tensor:
        return op, (*args[:2], dispatch(aten.clone.default, (args[2],), {}), *args[3:])
    return (aten.alias.default, args[:1]) if op in CONVERSIONS_LIKE_ANOTHER else (op, args)


LIKE_ANOTHER = {
    aten.view_as.default: aten.view.default,
    aten.expand_as.default: aten.expand.default,
    aten.reshape_as.default: aten.reshape.default,
}
CONVERSIONS_LIKE_ANOTHER = (aten.type_as.default, aten.to.other)


def _shares_memory(out: Any, viewed: Any) -> bool:
    first = out[0] if isinstance(out, list | tuple) and out else out
    if not isinstance(first, Tensor) or first is viewed or (type(first) is not Tensor and first._is_view()):
        return isinstance(first, Tensor)
    if not isinstance(viewed, Tensor):
        return False  # a number of which a tensor was made
    if first.layout is not torch.strided or viewed.layout is not torch.strided:
        return True  # the parts of a sparse tensor
    return same_storage(first, viewed)


def same_storage(x: Tensor, other: Tensor) -> bool:
    """Whether two share memory. (``_is_view()`` says less: what ``ravel`` returns is a view, of a copy maybe.)"""
    return x.untyped_storage()._cdata == other.untyped_storage()._cdata


def link_view(
    view: WrapperTensor, viewed: WrapperTensor, op: OpOverload, args: Any, kwargs: Any, index: int | None
) -> None:
    parent = viewed.view_link
    source = viewed
    if parent is not None:
        owner, group = parent.owner, parent.group
        if parent.base is not None:
            source = parent.base
    else:
        owner, group = viewed, viewed.alias_group
        if group is None:
            group = viewed.alias_group = AliasGroup()
    view.view_link = ViewLink(owner, parent, group, None if op is DETACH else source, op, args[1:], kwargs, index)
    if op is aten.as_strided.default:
        view.view_link.start = storage_offset_of(viewed)
    view.synced_version = group.version
    if group.version:
        group.note(view)


def shown_or_moved(view: WrapperTensor, viewed: WrapperTensor, op: OpOverload, *args: Any) -> WrapperTensor:
    """``as_shown``; where there is no such view of the strides that ``viewed`` shows, but of those in a loop, the view
    by its contents."""
    try:
        return as_shown(view, viewed, op, *args)
    except RuntimeError:
        if not hides_layout(viewed):
            raise
        view.moved = True
        return view


def hides_layout(x: WrapperTensor) -> bool:
    """Whether ``x`` shows gaps in memory that a loop over some vmap's examples would not; see NOTE [Layouts that a
    batch hides]."""
    start = x if x.view_link is None else x.view_link.owner
    if start.given and type(start.value) is not WrapperTensor:
        return False  # the caller's own memory
    if start.moved and start.strides is not None and not start.given:
        return start.strides != dense_strides(start.shape, start.strides)  # which it shows of its first contents
    layer: Any = x
    while type(layer) is WrapperTensor:
        if layer.interpreter.hides_layout(layer):
            return True
        layer = layer.value
    return False


def possible_strides(x: WrapperTensor) -> Iterator[Any]:
    """What ``x``, which hides its layout, may have in a loop: no gaps, and its dimensions in this order in memory or in
    another, as operands of other layouts say."""
    assert x.strides is not None
    rank = len(x.shape)
    yield dense_strides(x.shape, x.strides)
    yield dense_strides(x.shape, range(rank, 0, -1))
    yield dense_strides(x.shape, range(rank))


def part(view: WrapperTensor) -> None:
    """Let ``view``, which is doubtful and about to be written, be a tensor of its own.

    Whatever else is of its family cannot be used any more.
    """
    link = view.view_link
    link.group.parted = True
    link.group.version += 1
    owner = link.owner
    if owner.view_link is None:
        owner.view_link = ViewLink(owner, None, link.group, None, link.doubtful_step().op, (), {}, None)
        owner.synced_version = -1
    view.view_link = view.alias_group = None


#: Those that copy where a conjugation or a negation is lazy, and what says that it is.
RESOLVING = {aten.resolve_conj.default: "is_conj", aten.resolve_neg.default: "is_neg"}

#: What an operator that may copy returns: its argument itself, a view of it, a copy.
ITSELF, VIEWED, COPIED = "itself", "viewed", "copied"


def what_returns(viewed: WrapperTensor, op: OpOverload, args: Any, kwargs: dict[str, Any], strides: Any = None) -> str:
    """What ``op``, which may copy, returns of ``viewed``, or of a tensor of other ``strides``."""
    if viewed.layout is not torch.strided:
        return VIEWED
    if op in RESOLVING and getattr(viewed, RESOLVING[op])():
        return COPIED
    if strides is None:
        strides = viewed.strides or tuple(viewed.stride())
    rest = (_described(args[1:]), _described(sorted(kwargs.items())))
    given = (op, viewed.shape, strides, viewed.dtype, viewed.device, *rest)
    try:
        return _decided(*given)
    except TypeError:  # a symbolic size is no key
        return _decided.__wrapped__(*given)


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
) -> str:
    """Run ``op`` on data of the same layout that takes no memory, and look."""
    given = [*args, *(value for _, value in kwargs)]
    devices = [a.device if isinstance(a, _Like) else a for a in given if isinstance(a, _Like | torch.device)]
    if any(other != device for other in devices):
        return COPIED

    def on_meta(a: Any) -> Any:
        if isinstance(a, _Like):
            return torch.empty(a.shape, dtype=a.dtype, device="meta")
        return torch.device("meta") if isinstance(a, torch.device) else a

    with running_at(None), no_dispatch(), torch.no_grad():
        probe = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        try:
            out = op(probe, *map(on_meta, args), **{name: on_meta(value) for name, value in kwargs})
        except RuntimeError:
            return VIEWED
        if out is probe:
            return ITSELF
        return VIEWED if _shares_memory(out, probe) else COPIED  # (ravel's is a view, but of a copy)
