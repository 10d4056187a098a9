"""Subclasses that have only ``__torch_function__`` (a tensor with units, pypose's LieTensor) inside transforms.

NOTE [Facades]
A tensor of such a class enters a transform as a *facade*: an instance of a class made of the user's and ``Facade``,
which stands in front of a wrapper. The user's code sees its own class: ``isinstance`` holds, its methods run, its
attributes were copied. What it does to the facade comes to the user's ``__torch_function__``, and from there, by
``super()``, to that of ``Facade``, which calls the function on the wrapper: no interpreter, rule or formula meets a
facade. The result is of the class by the user's rule, for ``as_subclass`` of a wrapper makes a facade, too. On the way
out of the transform the tensor below gets the class and the attributes.

A cotangent or tangent of such a tensor is what PyTorch makes of a gradient: of the class where that has
``Tensor.__torch_function__``, which keeps it for every function, else a plain tensor (what is differentiated by metres
is not in metres).
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.pytorch import thread_state
from functrans.pytorch.thread_state import STATE, running_at
from functrans.pytorch.torch_private import make_wrapper, nowrap_functions, tensor_as_subclass, tensor_torch_function
from functrans.tensors.answers import Refusing
from functrans.tensors.pytrees import TENSORS
from functrans.tensors.subclasses import keeps_class


class Facade(Tensor):
    """What stands in front of ``wrapper`` for a class of the user's; see NOTE [Facades]."""

    #: the user's class
    shown: type[Tensor]
    wrapper: WrapperTensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = answered_by_wrappers().get(func, func)(*bare(args), **bare(kwargs or {}))
        if func in nowrap_functions():
            return out
        known = {id(a.wrapper): a for a in args if isinstance(a, Facade)}
        return shown_as(out, cls.shown, known)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return thread_state.DOOR.__torch_dispatch__(func, (), bare(args), bare(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.shown.__name__}, {self.wrapper!r}"

    def __format__(self, spec: str) -> str:
        return format(self.wrapper, spec) if spec else repr(self)

    def __copy__(self) -> Tensor:
        return shown_like(copy.copy(self.wrapper), self)

    def __deepcopy__(self, memo: Any) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = shown_like(copy.deepcopy(self.wrapper, memo), self)
        return memo[id(self)]


def of_wrapper(name: str) -> Any:
    """The attribute ``name`` of facades: the wrapper's."""
    if isinstance(vars(Refusing)[name], property):

        def get(self: Facade) -> Any:
            found = getattr(self.wrapper, name)
            return shown_like(found, self) if isinstance(found, Tensor) else found

        return property(get, lambda self, x: setattr(self.wrapper, name, x))
    return lambda self, *args, **kwargs: getattr(self.wrapper, name)(*args, **kwargs)


for _name, _found in vars(Refusing).items():
    if (callable(_found) or isinstance(_found, property)) and _name not in vars(Facade):
        setattr(Facade, _name, of_wrapper(_name))


@functools.cache
def answered_by_wrappers() -> dict[Any, Any]:
    """Wrappers' own methods and attributes, by those of tensors that they take the place of."""
    found: dict[Any, Any] = {}
    for name in {name for cls in WrapperTensor.__mro__ if cls not in Tensor.__mro__ for name in vars(cls)}:
        own, theirs = getattr(WrapperTensor, name), getattr(Tensor, name, None)
        if name.startswith("__") or theirs is None:
            continue
        if isinstance(own, property):
            found[theirs.__get__], found[theirs.__set__] = own.fget, own.fset or theirs.__set__
        elif inspect.isfunction(own):
            found[theirs] = own
    return found


def class_to_keep(x: Any) -> Any:
    """The user's class of ``x``, if it is one with ``__torch_function__`` alone; of a facade what it shows."""
    kind = type(x)
    return None if kind in TENSORS else getattr(kind, "shown", None) or (kind if keeps_class(kind) else None)


def are_plain(leaves: list[Any]) -> bool:
    """Whether no class of the user's is among ``leaves``, as a rule."""
    return TENSORS.issuperset(map(type, leaves))


def class_of_gradients(x: Any) -> type | None:
    """The class, if any, that a gradient by ``x`` has; see NOTE [Facades]."""
    kind = class_to_keep(x)
    by_default = kind is not None and getattr(kind.__torch_function__, "__func__", None) is tensor_torch_function
    return kind if by_default else None


_classes: dict[type, type[Facade]] = {}


def facade_class(kind: Any) -> type[Facade]:
    """The class of facades for the user's ``kind``, made once."""
    found = _classes.get(kind)
    if found is None:
        names = {"shown": kind, "__module__": kind.__module__, "__torch_dispatch__": vars(Facade)["__torch_dispatch__"]}
        found = _classes[kind] = type(kind)(kind.__name__, (kind, Facade), names)
    return found


def facade(wrapper: WrapperTensor, kind: type) -> Facade:
    cls = facade_class(kind)
    w = wrapper
    made: Any = make_wrapper(cls, w.shape, w.strides, None, None, w.dtype, w.layout, w.device)
    made.wrapper = wrapper
    return made


def bare(x: Any) -> Any:
    """``x`` without classes of the user's: wrappers in place of facades, plain tensors in place of captured ones."""
    kind = type(x)
    if kind in TENSORS:
        return x
    if isinstance(x, Facade):
        return x.wrapper
    if kind is tuple or kind is list:
        return kind([bare(v) for v in x])
    if kind is dict:
        return {k: bare(v) for k, v in x.items()}
    return reclassed(x, Tensor) if keeps_class(kind) else x


def reclassed(x: Tensor, kind: type) -> Tensor:
    """A tensor of the base as one of another class; autograd outside sees it."""
    if STATE.top is None:
        return tensor_as_subclass(x, kind)
    with running_at(None):
        return tensor_as_subclass(x, kind)


def of_class(x: Tensor, kind: type) -> Tensor:
    """``x``, which is bare, as one of the user's class ``kind``."""
    return facade(x, kind) if type(x) is WrapperTensor else reclassed(x, kind)


def shown_as(x: Any, kind: type, known: dict[int, Any]) -> Any:
    """The results of a function as tensors of ``kind``; what was written is the facade that it was."""
    if type(x) in TENSORS:
        return known[id(x)] if id(x) in known else of_class(x, kind)
    return type(x)([shown_as(v, kind, known) for v in x]) if isinstance(x, tuple | list) else x


def shown_like(x: Any, source: Any) -> Any:
    """``x``, which the bare ``source`` became, with the class and the attributes of ``source``."""
    kind = class_to_keep(source)
    if kind is None:
        return x
    made = of_class(x, kind)
    vars(made).update((name, value) for name, value in vars(source).items() if name != "wrapper")
    return made


def as_subclass(self: Tensor, cls: type[Tensor]) -> Tensor:
    """``Tensor.as_subclass``, which makes a facade of a wrapper."""
    cls = getattr(cls, "shown", cls)
    if type(self) is not WrapperTensor and not isinstance(self, Facade):
        return reclassed(self, cls)
    return facade(bare(self), cls) if keeps_class(cls) else bare(self)
