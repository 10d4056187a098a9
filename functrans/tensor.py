"""The wrapper tensor and the door: how an operator gets from user code to an interpreter, and down the stack.

    y = torch.sin(x)                   x: a wrapper of level 2 around a wrapper of level 1 around plain data
      └ door                           make it pure                    (door.py, mutation.py)
        └ dispatch                     highest level among the arguments: 2
          └ level 2 .process           its rule lowers: dispatch again, a Python call
            └ level 1 .process
              └ base                   plain PyTorch
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functrans import stack
from functrans.errors import (
    DeadWrapperError,
    InsideTransformError,
    LayoutError,
    NoDataError,
    RequiresGradError,
)
from functrans.operators import Facts, facts
from functrans.pytrees import TENSORS
from functrans.stack import STATE, Interpreter
from functrans.torch_private import (
    AUTOGRAD,
    INDEX_BATCHED_KEYS,
    PYTHON,
    VIEWS_AND_VERSIONS,
    ZERO_TENSOR,
    OpOverload,
    function_mode_enabled,
    is_forward_enabled,
    is_key_excluded,
    make_wrapper,
    pop_mode,
    pop_packing,
    push_mode,
    set_forward_enabled,
    set_grad_enabled,
    set_key_excluded,
    top_packing,
)


class WrapperTensor(torch.Tensor):
    """A value of one level, as the level's code sees it.

    Attributes:
        interpreter: the running transform it belongs to.
        value: the tensor one level down.
        slot, bdim, tangent: what grad, vmap and jvp keep; other transforms set their own.
        view_link: how it was made from what it is a view of, or None (see views.py).
        version: counts the writes it has seen.
    """

    # Slots, because these are read and written for every operator; what is rare is an ordinary attribute. Metadata stands in slots
    # beside where PyTorch keeps it, because PyTorch's own getters ask __torch_function__ first.
    __slots__ = (
        "_tangent", "_value", "bdim", "device", "dtype", "interpreter", "layout", "made_at", "shape", "slot", "strides", "view_link",
    )  # fmt: skip

    interpreter: Interpreter
    slot: int | None
    bdim: int | None
    # The value and the tangent, which may be pending.
    _value: Tensor | PendingWrapper
    _tangent: Tensor | PendingWrapper | None
    view_link: Any  # a views.ViewLink or None
    made_at: tuple[Any, int]
    shape: torch.Size  # type: ignore[assignment]
    strides: tuple[int, ...] | None  # None: contiguous

    root: Any = None  # a views.Root, once a view was taken
    seen: int = 0
    version: int = 0

    @property
    def value(self) -> Tensor:
        value = self._value
        if type(value) is PendingWrapper:
            value = self._value = tensor_of(value)
        return value  # type: ignore[return-value]

    @value.setter
    def value(self, value: Tensor) -> None:
        self._value = value

    @property
    def tangent(self) -> Tensor | None:
        tangent = self._tangent
        if type(tangent) is PendingWrapper:
            tangent = self._tangent = tensor_of(tangent)
        return tangent  # type: ignore[return-value]

    @tangent.setter
    def tangent(self, tangent: Tensor | None) -> None:
        self._tangent = tangent

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return stack.DOOR.enter(func, args, kwargs)

    # __torch_function__, the short way in, is set by door.py.

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return describe(self)

    def __format__(self, spec: str) -> str:
        if self.dim() == 0 and spec:
            return format(self.item(), spec)
        return describe(self)

    # Metadata, without the way through PyTorch's parser.

    def dim(self) -> int:
        return len(self.shape)

    ndim = property(dim)  # type: ignore[assignment]

    def size(self, dim: int | None = None) -> Any:  # type: ignore[override]
        if dim is None:
            return self.shape
        return super().size(dim) if type(dim) is not int or not -len(self.shape) <= dim < len(self.shape) else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0] if self.shape else super().__len__()

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    # What follows would read autograd state or data that a wrapper does not have.

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return not self.interpreter.is_constant(self) and self.interpreter.kind == "grad" or self.value.requires_grad

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        # torch.nn.Parameter(w) detaches first: what it was taken from counts. On a constant it means nothing, and module
        # constructors do it.
        origin = self if self.view_link is None else self.view_link.base_content()
        if requires_grad and (concrete(self) is None or concrete(origin) is None):
            raise RequiresGradError(self.interpreter.name)
        return self

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        if self.interpreter.is_constant(self) or not hasattr(self.interpreter, "add_hook"):
            raise InsideTransformError(
                "Tensor.register_hook()", self.interpreter.name, "an autograd.Function whose backward does what the hook does"
            )
        return self.interpreter.add_hook(self.slot, hook)

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        raise InsideTransformError("Tensor.register_post_accumulate_grad_hook()", self.interpreter.name, "Tensor.register_hook()")

    def data_ptr(self) -> int:
        raise NoDataError("data_ptr()", self.interpreter.name)

    def storage_offset(self) -> int:
        return int(self.value.storage_offset())

    def backward(self, *args: Any, **kwargs: Any) -> None:
        raise InsideTransformError("Tensor.backward()", self.interpreter.name, "functrans.grad or functrans.vjp")

    def tolist(self) -> Any:
        if self.dim() == 0:
            return self.item()
        return [row.tolist() for row in self.unbind(0)]

    def numpy(self, *, force: bool = False) -> Any:
        value = concrete(self)
        if value is None:
            raise NoDataError("numpy()", self.interpreter.name)
        return value.numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def _number(self) -> Any:
        if is_key_excluded(PYTHON):
            # Only the constructors of tensors read numbers with dispatch off; the result would have no derivative, or no batch.
            raise InsideTransformError("making a tensor of other tensors' numbers, as torch.tensor([x]) does,", self.interpreter.name, "torch.stack([x])")
        return self.item()

    def __bool__(self) -> bool:
        return bool(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __complex__(self) -> complex:
        return complex(self._number())

    def __index__(self) -> int:
        return operator.index(self._number())  # type: ignore[arg-type]

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied = self.clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InsideTransformError("pickling a tensor", self.interpreter.name, "the transform's outputs, after it returned")


TENSORS.add(WrapperTensor)


class PendingWrapper:
    """A wrapper that PyTorch does not know yet.

    Results of programs at levels below the top are seen by nothing but other programs, mostly, and making a tensor takes longer than all
    else about a wrapper. ``tensor_of`` makes it when something asks for it, which reading ``WrapperTensor.value`` does. Its
    contents never change: a write changes the tensor that was made of it.
    """

    __slots__ = ("_tangent", "_value", "bdim", "device", "dtype", "interpreter", "layout", "made", "shape", "slot", "strides")

    view_link = None


def pend(interpreter: Interpreter, value: Any, like: Any) -> PendingWrapper:
    """What ``wrap_like`` makes, pending."""
    wrapper = PendingWrapper()
    wrapper.interpreter = interpreter
    wrapper._value = value
    wrapper.made = None
    wrapper.shape = like.shape
    wrapper.strides = like.strides
    wrapper.dtype = like.dtype
    wrapper.layout = like.layout
    wrapper.device = like.device
    return wrapper


def tensor_of(x: Any) -> Any:
    """``x``, or the tensor that a pending wrapper is."""
    if type(x) is not PendingWrapper:
        return x
    if x.made is None:
        x.made = wrap_like(x.interpreter, x._value, x)
        for name in x.interpreter.payload:
            name = "_tangent" if name == "tangent" else name
            setattr(x.made, name, getattr(x, name))
    return x.made


def concrete(x: Tensor) -> Tensor | None:
    """The plain tensor under constants of any number of levels, or None if some level depends on ``x``."""
    while type(x) is WrapperTensor:
        if not x.interpreter.is_constant(x):
            return None
        x = x.value
    return x


def wrap(interpreter: Interpreter, value: Tensor) -> WrapperTensor:
    """A wrapper of ``interpreter`` with the shape, strides, dtype and device of ``value``; what the transform keeps on it is not set."""
    return wrap_as(interpreter, value, value.shape, strides_of(value))


def wrap_as(
    interpreter: Interpreter, value: Tensor, shape: torch.Size, strides: tuple[int, ...] | None, requires_grad: bool = False
) -> WrapperTensor:
    """A wrapper around ``value`` that shows a shape of its own; ``strides`` None: contiguous."""
    dtype, layout, device = value.dtype, value.layout, value.device
    if shape or dtype not in SCALAR_INDICES:
        wrapper = make_wrapper(WrapperTensor, shape, strides, None, None, dtype, layout, device, False, requires_grad)
    else:
        wrapper = scalar_index(value)
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


#: The dtypes of which a tensor without dimensions selects one row when it is an index.
SCALAR_INDICES = frozenset((torch.int64, torch.int32, torch.int16, torch.int8))


def scalar_index(value: Tensor) -> WrapperTensor:
    """A wrapper of an integer for each example; see NOTE [Scalar indices]."""
    return make_wrapper(
        WrapperTensor, (), (), None, None, value.dtype, value.layout, value.device, False, False, None, False, False, INDEX_BATCHED_KEYS
    )


WRAPPERS = (WrapperTensor, PendingWrapper)


def strides_of(value: Tensor) -> tuple[int, ...] | None:
    """The strides of ``value``; None if it is contiguous, or sparse."""
    if type(value) in WRAPPERS:
        return value.strides  # type: ignore[attr-defined]
    try:
        return None if value.is_contiguous() else value.stride()
    except RuntimeError:
        if value.layout is not torch.sparse_coo:
            raise LayoutError(value) from None  # making a wrapper of it would end the process
        return None


def set_content(wrapper: WrapperTensor, new: Tensor) -> None:
    """Let ``wrapper`` hold what ``new``, of the same level or below, holds."""
    interpreter = wrapper.interpreter
    if type(new) is not WrapperTensor or new.interpreter is not interpreter:
        new = interpreter.constant(new)
    wrapper.value = new.value
    for name in interpreter.payload:
        setattr(wrapper, name, getattr(new, name))
    wrapper.version += 1


def dispatch(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Send a pure ``op`` to the interpreter that has to interpret it.

    The order of look-up: a wrapper of a transform that ended is an error; without wrappers the base runs ``op``; else the
    highest-level interpreter among the arguments' wrappers processes it, by (1) its rule for ``op``, (2) the decomposition
    of a composite ``op``, whose pieces come through the same level again, (3) its declared policy for operators without
    a rule: grad and jvp borrow PyTorch's derivative (native.py), vmap decomposes by ``torch._decomp`` and then loops
    over the examples with a warning, any other transform raises MissingRuleError. Nothing passes through in silence.
    """
    known: Facts = op._functrans if hasattr(op, "_functrans") else facts(op)
    owner: Interpreter | None = None
    recorded = False
    for a in args:
        kind = type(a)
        if kind is Tensor:
            recorded = recorded or a.requires_grad
        elif kind is WrapperTensor:
            if a.view_link is not None:
                a.view_link.refresh(a)
            i = a.interpreter
            if i is not owner:
                if not i.alive:
                    raise DeadWrapperError(a)
                if owner is None or i.level > owner.level:
                    owner = i
        elif kind not in WITHOUT_TENSORS and (known.tensor_lists or not isinstance(a, list | tuple)):
            return _dispatch_slowly(op, args, kwargs)
    if kwargs and any(type(a) not in WITHOUT_TENSORS for a in kwargs.values()):
        return _dispatch_slowly(op, args, kwargs)
    if owner is not None:
        return owner.process(op, args, kwargs)
    if recorded or forward_ad._current_level >= 0:
        return base_recorded(op, args, kwargs)
    if known.quick is not None and type(args[0]) is Tensor and not function_mode_enabled():
        return known.quick(*args, **kwargs)
    return op._op(*args, **kwargs)


#: Types of arguments that are no tensors and hold none.
WITHOUT_TENSORS = frozenset((int, float, bool, complex, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format))


def _dispatch_slowly(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    owner = highest(args, kwargs, True)
    return base(op, args, kwargs) if owner is None else owner.process(op, args, kwargs)


def highest(args: Any, kwargs: dict[str, Any], lists: bool) -> Interpreter | None:
    """The interpreter of highest level among the wrappers in ``args``; brings views up to date on the way."""
    found: Interpreter | None = None
    for a in args:
        if type(a) is WrapperTensor:
            if a.view_link is not None:
                a.view_link.refresh(a)
            owner = a.interpreter
            if owner is not found:
                if not owner.alive:
                    raise DeadWrapperError(a)
                if found is None or owner.level > found.level:
                    found = owner
        elif lists and type(a) in (list, tuple):
            owner_in_list = highest(a, NO_KWARGS, False)
            if owner_in_list is not None and (found is None or owner_in_list.level > found.level):
                found = owner_in_list
    if kwargs:
        owner_in_list = highest(kwargs.values(), NO_KWARGS, True)
        if owner_in_list is not None and (found is None or owner_in_list.level > found.level):
            found = owner_in_list
    return found


NO_KWARGS: dict[str, Any] = {}


def base(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` as plain PyTorch. Autograd's key comes back only where autograd has something to record."""
    for a in args:
        kind = type(a)
        if kind is Tensor:
            if a.requires_grad:
                return base_recorded(op, args, kwargs)
        elif kind not in WITHOUT_TENSORS and any_requires_grad((a,)):
            return base_recorded(op, args, kwargs)
    if forward_ad._current_level >= 0 or (kwargs and any_requires_grad(kwargs.values())):
        return base_recorded(op, args, kwargs)
    try:
        quick = op._functrans.quick  # type: ignore[attr-defined]
    except AttributeError:
        quick = facts(op).quick
    if quick is not None and type(args[0]) is Tensor and not function_mode_enabled():
        return quick(*args, **kwargs)
    return op._op(*args, **kwargs)


def base_recorded(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` as plain PyTorch with all that PyTorch itself records."""
    excluded, views_excluded = is_key_excluded(AUTOGRAD), is_key_excluded(VIEWS_AND_VERSIONS)
    try:
        set_key_excluded(AUTOGRAD, False)
        set_key_excluded(VIEWS_AND_VERSIONS, False)
        set_key_excluded(ZERO_TENSOR, False)
        if top_packing(True) is None or not stack.pack_as_outside():
            return op(*args, **kwargs)
        try:
            return op(*args, **kwargs)
        finally:
            pop_packing()
    finally:
        set_key_excluded(AUTOGRAD, excluded)
        set_key_excluded(VIEWS_AND_VERSIONS, views_excluded)


def any_requires_grad(args: Any) -> bool:
    for a in args:
        kind = type(a)
        if kind in WITHOUT_TENSORS:
            continue
        if kind is Tensor or isinstance(a, Tensor):
            if a.requires_grad:
                return True
        elif kind is list or kind is tuple:
            if any_requires_grad(a):
                return True
        elif kind is dict and any_requires_grad(a.values()):
            return True
    return False


def lower(interpreter: Interpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` one level below ``interpreter``, on values of that level: a Python call, no trip through PyTorch."""
    if interpreter.on_base:
        return base(op, args, kwargs)
    if not interpreter.outer_modes_on and modes_differ(interpreter):
        return in_outer_modes(interpreter, lower, op, args, kwargs)
    try:
        random = op._functrans.random  # type: ignore[attr-defined]
    except AttributeError:
        random = facts(op).random
    below = interpreter.below
    if below is None:
        return base(op, args, kwargs)
    if random:  # every level decides whether its examples draw for themselves
        return below.process(op, args, kwargs)
    return dispatch(op, args, kwargs)


def modes_differ(interpreter: Interpreter) -> bool:
    """Whether a mode is on that was off when ``interpreter`` was entered; see NOTE [Grad mode per level]."""
    return (torch.is_grad_enabled() and not interpreter.outer_grad_mode) or (is_forward_enabled() and not interpreter.outer_forward_mode)


def in_outer_modes(interpreter: Interpreter, lowering: Callable[..., Any], *args: Any) -> Any:
    """``lowering(interpreter, *args)`` with what was off when ``interpreter`` was entered switched off."""
    grad, forward = torch.is_grad_enabled(), is_forward_enabled()
    try:
        set_grad_enabled(grad and interpreter.outer_grad_mode)
        set_forward_enabled(forward and interpreter.outer_forward_mode)
        return lowering(interpreter, *args)
    finally:
        set_grad_enabled(grad)
        set_forward_enabled(forward)


def call_below(interpreter: Interpreter, function: Any, args: Any, kwargs: dict[str, Any], inputs: Any = None) -> Any:
    """Call ``function``, plain ``torch`` code, one level down, from a handler.

    What ``stack.lowered`` does, without what the state of a handler makes superfluous: autograd's key is excluded already, and
    at the base it has to come back only where something among ``inputs`` (None: ``args``) requires grad.
    """
    if not interpreter.outer_grad_mode or not interpreter.outer_forward_mode or forward_ad._current_level >= 0:
        with stack.lowered(interpreter):
            return function(*args, **kwargs)
    top = STATE.top
    if interpreter.below is not None:
        views_excluded = is_key_excluded(VIEWS_AND_VERSIONS)
        try:
            STATE.top = interpreter.below
            set_key_excluded(VIEWS_AND_VERSIONS, True)
            push_mode(stack.DOOR)
            return function(*args, **kwargs)
        finally:
            pop_mode(None)
            set_key_excluded(VIEWS_AND_VERSIONS, views_excluded)
            STATE.top = top
    if any_requires_grad(args if inputs is None else inputs):
        with stack.lowered(interpreter):
            return function(*args, **kwargs)
    try:
        STATE.top = None
        return function(*args, **kwargs)
    finally:
        STATE.top = top


def map_tensors(function: Any, out: Any) -> Any:
    """``function`` applied to every tensor of an operator's output; other values stay."""
    if isinstance(out, Tensor):
        return function(out)
    if isinstance(out, tuple | list):
        mapped = [map_tensors(function, o) for o in out]
        return mapped if type(out) is list else tuple(mapped)
    return out


def lift(out: Any, owner: Interpreter | None, top: Interpreter | None) -> Any:
    """Values made at ``owner``'s level (None: the base), as constants of every level up to ``top``."""
    if top is None or (owner is not None and owner.level >= top.level):
        return out
    between = []
    interpreter: Interpreter | None = top
    while interpreter is not None and interpreter is not owner:
        between.append(interpreter)
        interpreter = interpreter.below
    for interpreter in reversed(between):
        out = map_tensors(interpreter.constant, out)
    return out


def describe(x: Tensor, indent: int = 1) -> str:
    """The layers of a wrapper, outermost first: kind, level, what the transform keeps on it, inner value."""
    if type(x) is not WrapperTensor:
        with torch._C._DisableTorchDispatch():
            return repr(x)
    i = x.interpreter
    ended = "" if i.alive else ", ended"
    if x.view_link is not None and i.alive:
        x.view_link.refresh(x)
    pad = "  " * indent
    fields = i.describe(x).split("\n")
    head = ", ".join([f"{i.kind} level {i.level}{ended}", *[f for f in fields if f]])
    return f"WrapperTensor({head}\n{pad}value={describe(x.value, indent + 1)})"

