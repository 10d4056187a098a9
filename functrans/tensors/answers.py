"""What a wrapper tensor answers: metadata; and what it is asked for and does not have, data and autograd state: how
messages call it, what to write instead."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import ref

import torch
from torch import Tensor

from functrans.errors import DataDependentError, InsideTransformError, NoDataError
from functrans.pytorch.torch_private import PYTHON, is_key_excluded
from functrans.tensors.described import describe, treescope_repr

#: The methods that no wrapper has an answer to; None where NoDataError knows the cure.
REFUSED = {
    **{name: (f"Tensor.{name}()", "operators of torch, which compute with all elements at once")
       for name in ("apply_", "map_", "map2_")},
    "backward": ("Tensor.backward()", "functrans.grad or functrans.vjp"),
    "data_ptr": ("data_ptr()", None),
    "const_data_ptr": ("const_data_ptr()", None),
    "share_memory_": ("Tensor.share_memory_()", "a tensor that was shared outside"),
    "is_set_to": ("Tensor.is_set_to()", "`is`, or clone() what is to have memory of its own"),
    "register_post_accumulate_grad_hook": (
        "Tensor.register_post_accumulate_grad_hook() of what is no leaf made inside", "Tensor.register_hook()"
    ),
}  # fmt: skip
#: Those that a wrapper answers as its value does, where that says all of it.
OF_VALUES = {
    "numpy": ("numpy()", None),
    "storage": ("storage()", None),
    "__dlpack__": ("DLPack", None),
    "__reduce_ex__": ("pickling", None),
}

_KEEP = (
    "keep it a tensor, which arithmetic takes as it takes a number; "
    "what is the same for every example can be passed as a number, or as a tensor with in_dims=None"
)
_LOGIC = "`&`, `|` and `~` take the place of `and`, `or` and `not`"
_AFTER = "return the tensor from the function, and convert the result outside of vmap"
#: What asks for a tensor's number, which under vmap is another one for each example.
NUMBERS = {
    "bool": (
        "bool(tensor), which `if`, `while`, `assert`, `and`, `or` and `not` call,",
        "torch.where(condition, a, b) computes both and chooses for each example; " + _LOGIC,
    ),
    "index": (
        "a tensor as a Python integer, which range(n), list[i] and sizes ask for,",
        "index a tensor with it, x[i]; a length or size has to be the same for every example: pass it as an int",
    ),
    "item": ("tensor.item()", _KEEP),
    "tolist": ("tensor.tolist()", _AFTER),
    "format": (
        "format(tensor, spec), as in an f-string with a format,",
        f"leave the format out, f'{{x}}', to see all examples; or {_AFTER}",
    ),
    **{name: (f"{name}(tensor)", _KEEP) for name in ("int", "float", "complex")},
}


def refuse(x: Any, what: str, cure: str | None) -> NoReturn:
    """Say that ``what`` cannot be asked of the wrapper ``x``."""
    raise NoDataError(what, x) if cure is None else InsideTransformError(what, x.interpreter.name, cure)


def refused(what: str, cure: str | None) -> Callable[..., NoReturn]:
    """A method of wrappers that is refused, whatever it is called with."""
    return lambda self, *args, **kwargs: refuse(self, what, cure)


class Refusing(torch.Tensor):
    """A tensor that stands for values of a running transform: it answers what those answer for certain."""

    if TYPE_CHECKING:
        interpreter: Any
        value: Tensor
        view_link: Any

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return describe(self)

    __treescope_repr__ = treescope_repr

    def __format__(self, spec: str) -> str:
        if self.dim() == 0 and spec:
            return format(self._asked("format"), spec)
        return describe(self)

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.interpreter.records(self) or self.value.requires_grad

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        x: Tensor = self
        while isinstance(x, Refusing):
            if x.interpreter.records(x) and x.interpreter.computed(x):
                return False
            x = x.value
        return x.is_leaf

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        return self.interpreter.add_hook(self, hook)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return self.interpreter.grad_fn(self)

    def untyped_storage(self) -> Any:
        value = concrete(self)
        if value is not None:
            return value.untyped_storage()
        storage, asked = super().untyped_storage(), ref(self)
        storage.data_ptr = lambda: refuse(asked(), "untyped_storage().data_ptr()", None)  # type: ignore[method-assign]
        return storage

    def tolist(self) -> Any:
        if self.dim() == 0:
            return self._asked("tolist")
        return [row.tolist() for row in self.unbind(0)]

    def __array__(self, dtype: Any = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    # Each conversion says in its error what the user wrote, instead of the operator that reads the number.

    def item(self) -> Any:  # type: ignore[override]
        return self._asked("item")

    def _asked(self, how: str) -> Any:
        try:
            return super().item()
        except DataDependentError as error:
            what, cure = NUMBERS[how]
            raise DataDependentError(what, error.interpreter, cure) from None

    def _number(self, to: Callable[[Any], Any]) -> Any:
        if is_key_excluded(PYTHON):
            # Only constructors of tensors do so with dispatch off; the result would have no derivative, or no batch.
            refuse(self, "making a tensor of other tensors' numbers, as torch.tensor([x]) does,", "torch.stack([x])")
        return to(self._asked(to.__name__))


class Answering(Refusing):
    """Metadata from the wrapper's slots, without the way through PyTorch's parser."""

    if TYPE_CHECKING:
        shape: torch.Size  # type: ignore[assignment]
        dtype: torch.dtype
        shown_offset: int | None

    def dim(self) -> int:
        return len(self.shape)

    ndim = property(dim)  # type: ignore[assignment]

    def size(self, dim: int | None = None) -> Any:  # type: ignore[override]
        if dim is None:
            return self.shape
        return self.shape[dim] if type(dim) is int and -len(self.shape) <= dim < len(self.shape) else super().size(dim)

    def numel(self) -> int:
        return math.prod(self.shape)  # shape.numel() would fix symbolic sizes

    def __len__(self) -> int:
        return self.shape[0] if self.shape else super().__len__()

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_conj(self) -> bool:
        return self.value.is_conj()

    def is_neg(self) -> bool:
        return self.value.is_neg()

    def storage_offset(self) -> int:
        return int(self.value.storage_offset()) if self.shown_offset is None else self.shown_offset

    # A copy is a function of what is copied, and has its derivative. PyTorch's own copies are leaves of a graph.

    def __copy__(self) -> Tensor:
        return self.view_as(self)

    def __deepcopy__(self, memo: Any) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        return memo[id(self)]


def base_of_view(x: Refusing) -> Tensor | None:
    """What ``x`` is a view of, or None."""
    link = x.view_link
    if link is None:
        return None
    if link.doubtful:
        cure = "that operator on a .clone(memory_format=torch.contiguous_format), which it views"
        refuse(x, f"asking whether {link.doubtful_step().op} has viewed or copied, which the batch hides,", cure)
    return link.base  # type: ignore[no-any-return]


def of_value(name: str, what: str, cure: str | None) -> Callable[..., Any]:
    def method(self: Refusing, *args: Any, **kwargs: Any) -> Any:
        value = concrete(self)
        return refuse(self, what, cure) if value is None else getattr(value, name)(*args, **kwargs)

    return method


def conversion(to: Callable[[Any], Any]) -> Callable[[Refusing], Any]:
    return lambda self: self._number(to)  # not functools.partialmethod, whose frame would hide the one that asks


for method, refusal in REFUSED.items():
    setattr(Refusing, method, refused(*refusal))
for method, refusal in OF_VALUES.items():
    setattr(Refusing, method, of_value(method, *refusal))
for name, answer in {"_base": property(base_of_view), "_is_view": lambda x: base_of_view(x) is not None}.items():
    setattr(Refusing, name, answer)
for to in (bool, int, float, complex, operator.index):
    setattr(Refusing, f"__{to.__name__}__", conversion(to))


def concrete(x: Tensor) -> Tensor | None:
    """The plain tensor under constants of any number of levels, or None if some level depends on ``x``."""
    while isinstance(x, Refusing):
        if not x.interpreter.is_constant(x):
            return None
        x = x.value
    return x
