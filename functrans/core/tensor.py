"""The wrapper tensor: a value of one level, as that level's code and PyTorch see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functrans.errors import CallTypeError, LayoutError
from functrans.errors.misuse import RESERVED
from functrans.pytorch import thread_state
from functrans.pytorch.torch_private import INDEX_BATCHED_KEYS, make_wrapper
from functrans.tensors.answers import Answering
from functrans.tensors.described import describe, treescope_repr
from functrans.tensors.pytrees import TENSORS

if TYPE_CHECKING:
    from functrans.core.interpreter import Interpreter

Strides = tuple[int, ...] | None  # None: contiguous


class WrapperTensor(Answering):
    """A value of one level, as the level's code sees it.

    Attributes:
        interpreter: the running transform it belongs to.
        value: the tensor one level down.
        what its transform keeps on it, under the names in ``interpreter.payload`` (see ``carried_as``).
        view_link: how it was made from what it is a view of, or None (see functionalization/views.py).
        version: counts the writes it has seen.
    """

    # Slots, because these are read and written for every operator; what is rare is an ordinary attribute. Metadata has
    # slots beside where PyTorch keeps it, because PyTorch's own getters ask __torch_function__ first.
    __slots__ = (
        "_carried", "_value", "device", "dtype", "interpreter", "layout", "made_at", "shape", "strides", "view_link",
    )  # fmt: skip

    interpreter: Interpreter
    _value: Tensor | PendingWrapper
    _carried: Any
    view_link: Any  # a views.ViewLink or None
    made_at: tuple[Any, int]
    shape: torch.Size  # type: ignore[assignment]
    strides: Strides

    alias_group: Any = None  # a views.AliasGroup, once a view was taken
    synced_version: int = 0
    version: int = 0
    moved: bool = False  # a write left the contents elsewhere in memory than shown; see functionalization/layouts.py
    shown_offset: int | None = None  # where the contents began before that
    given: bool = False  # an argument whose strides are the caller's
    shared: bool = False  # an argument that is one for all the runs that this one stands for
    updated: bool = False  # whether a write made its contents of what they were
    recorded: bool = False  # whether it was written with grad mode on, by its own name
    leaf: Any = None  # of a leaf that was made inside: makes of new contents a leaf again; see door/leaves.py

    def __new__(cls, *args: Any, **kwargs: Any) -> WrapperTensor:  # noqa: PYI034 - it returns nothing
        expected = "wrap(interpreter, value), or interpreter.carry(value, ...)"
        raise CallTypeError("WrapperTensor(...)", "a call of the class", expected)

    @property
    def value(self) -> Tensor:
        value = self._value
        if type(value) is PendingWrapper:
            value = self._value = tensor_of(value)
        return value  # type: ignore[return-value]

    @value.setter
    def value(self, value: Tensor) -> None:
        self._value = value

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return thread_state.DOOR.__torch_dispatch__(func, (), args, kwargs)

    # __torch_function__, the short way in, is set by door/torch_function.py.


TENSORS.add(WrapperTensor)
RESERVED.update(dir(WrapperTensor))


class PendingWrapper:
    """A wrapper that PyTorch does not know yet.

    Results of programs at levels below the top are seen by nothing but other programs, mostly, and making a tensor
    takes longer than all else about a wrapper. ``tensor_of`` makes it when something asks for it, which reading
    ``WrapperTensor.value`` does. Its contents never change: a write changes the tensor that was made of it.
    """

    __slots__ = ("_carried", "_value", "device", "dtype", "interpreter", "layout", "made", "shape", "strides")

    interpreter: Interpreter
    _value: Any
    _carried: Any
    made: WrapperTensor | None
    shape: torch.Size
    strides: Strides
    dtype: torch.dtype
    layout: torch.layout
    device: torch.device

    view_link = None

    def __repr__(self) -> str:
        return describe(self, "PendingWrapper")

    __treescope_repr__ = treescope_repr


def tensor_of(x: Any) -> Any:
    """``x``, or the tensor that a pending wrapper is."""
    if type(x) is not PendingWrapper:
        return x
    if x.made is None:
        x.made = wrap_like(x.interpreter, x._value, x)
        x.made._carried = x._carried
    return x.made


def carried_as(name: str, *, pending: bool = False) -> None:
    """Let wrappers show what a transform of this package keeps on them as ``name``: in a slot, which is read quickly.

    ``pending``: it may be a pending wrapper; then ``name`` is the tensor, and ``_name`` what there is.
    """
    raw = f"_{name}" if pending else name
    for cls in WRAPPERS:
        setattr(cls, raw, vars(cls)["_carried"])
    if pending:
        setattr(WrapperTensor, name, property(carried_tensor, vars(WrapperTensor)["_carried"].__set__))
    RESERVED.update((raw, name))


def carried_tensor(x: WrapperTensor) -> Tensor | None:
    carried = x._carried
    if type(carried) is PendingWrapper:
        carried = x._carried = tensor_of(carried)
    return carried


def wrap(interpreter: Interpreter, value: Tensor) -> WrapperTensor:
    """A wrapper of ``interpreter`` that shows the metadata of ``value``; what the transform keeps on it is not set."""
    if type(value) not in TENSORS:
        check_layout(value)
    try:
        shape = value.shape
    except RuntimeError:  # a nested tensor has none
        raise LayoutError(value) from None
    return wrap_as(interpreter, value, shape, strides_of(value))


def check_layout(x: Any) -> None:
    """Refuse a nested tensor, which has no shape that code at a level could see."""
    if type(x) is not WrapperTensor and isinstance(x, Tensor) and x.is_nested:
        raise LayoutError(x)


def wrap_as(
    interpreter: Interpreter, value: Tensor, shape: torch.Size, strides: Strides, requires_grad: bool = False
) -> WrapperTensor:
    """A wrapper around ``value`` that shows a shape of its own."""
    dtype, layout, device = value.dtype, value.layout, value.device
    if shape or dtype not in NOT_READ or thread_state.STATE.foreign:
        wrapper = make_wrapper(WrapperTensor, shape, strides, None, None, dtype, layout, device, False, requires_grad)
    else:  # an integer or a truth value for each example; see NOTE [Scalar indices]
        options = dtype, layout, device, False, False, None, False, False, INDEX_BATCHED_KEYS
        wrapper = make_wrapper(WrapperTensor, (), (), None, None, *options)
    wrapper.interpreter = interpreter
    wrapper._value = value
    wrapper.view_link = None
    wrapper.shape = shape
    wrapper.strides = strides
    wrapper.dtype = dtype
    wrapper.layout = layout
    wrapper.device = device
    return wrapper


def wrap_like(interpreter: Interpreter, value: Any, like: Any) -> WrapperTensor:
    """A wrapper around ``value`` that shows the metadata that ``like`` shows."""
    shape, strides, dtype, layout, device = like.shape, like.strides, like.dtype, like.layout, like.device
    wrapper = make_wrapper(WrapperTensor, shape, strides, None, None, dtype, layout, device)
    wrapper.interpreter = interpreter
    wrapper._value = value
    wrapper.view_link = None
    wrapper.shape = shape
    wrapper.strides = strides
    wrapper.dtype = dtype
    wrapper.layout = layout
    wrapper.device = device
    return wrapper


#: The dtypes of which indexing must not read a tensor without dimensions; see NOTE [Scalar indices].
NOT_READ = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.bool))
WRAPPERS = (WrapperTensor, PendingWrapper)


def strides_of(value: Tensor) -> Strides:
    """The strides of ``value``; None if it is contiguous, or sparse."""
    if type(value) in WRAPPERS:
        return value.strides  # type: ignore[attr-defined]
    try:
        return None if value.is_contiguous() else value.stride()
    except RuntimeError:  # strided: its sizes depend on numbers
        if value.layout not in (torch.strided, torch.sparse_coo):
            raise LayoutError(value) from None  # making a wrapper of it would end the process
        return value.stride() if value.layout is torch.strided else None
