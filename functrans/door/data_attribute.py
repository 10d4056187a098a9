"""``Tensor.data`` of wrappers: to assign it gives a tensor another one's contents and memory, and leaves its history.

After ``x.data = y`` ``x`` is a view of ``y`` by ``detach()``, and still the leaf that it was. What was a view of ``x``
before stays one of what ``x`` held.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import swap_tensors

from functrans.boundary.fresh import FRESH
from functrans.core.dispatch import dispatch
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.door.autograd_inside import up_to_date
from functrans.door.leaves import base_of, carries_derivative
from functrans.errors import InsideTransformError
from functrans.errors.misuse import RESERVED
from functrans.functionalization.layouts import set_content, set_metadata
from functrans.functionalization.views import contents_of, link_view
from functrans.functionalization.writes import at_the_door, hold, invalidate_saved
from functrans.pytorch.torch_private import without_torch_function
from functrans.tensors.answers import refuse

aten = torch.ops.aten
original: Any = Tensor.data
CURE = "functrans.functional_call, or a module that was made or copied inside"


def data(self: WrapperTensor) -> Tensor:
    out: Any = without_torch_function(original.__get__, (), (self,), {})
    if type(out) is WrapperTensor and carries_derivative(self):
        out.lost_derivative = True
    return out  # type: ignore[no-any-return]


def set_data(self: WrapperTensor, given: Any) -> None:
    """``x.data = given``."""
    if not isinstance(given, Tensor):
        raise TypeError(f"Variable data has to be a tensor, but got {type(given).__name__}")
    new: Any = given
    up_to_date((self, new))
    if views_all(new, self):  # ``x.data -= y`` has written it, and executes ``x.data = x.data``
        return
    level = self.interpreter
    if self.shared:
        refuse(self, "assigning Tensor.data of an argument with in_dim None", "a clone() of it, which each example has")
    if carries_derivative(self) or (self.leaf is None and base_of(self).requires_grad):
        refuse(self, "assigning Tensor.data of what has a derivative", "x.data.copy_(y)")
    if getattr(new, "lost_derivative", False):  # as nn.utils.vector_to_parameters does
        cure = "functrans.functional_call, or detach() if that is meant"
        refuse(self, "assigning to Tensor.data what lost its derivative by .data,", cure)
    outside = type(new) is not WrapperTensor or new.interpreter is not level
    if outside and (self.leaf is None or (type(new) is WrapperTensor and new.interpreter.level > level.level)):
        refuse(self, "assigning to Tensor.data what was made elsewhere", "x.data.copy_(y)")
    invalidate_saved(self)
    with at_the_door():
        if self.reassigned is None:
            self.reassigned = hold(self)
        elif self.view_link is None:
            hold(self)
        detached = dispatch(aten.detach.default, (level.constant(new) if outside else new,), {})
        set_metadata(self, new)
        set_content(self, detached if self.leaf is None else self.leaf(detached))
        self.view_link = None
        if outside:
            self.leaf = partial(refuse_write, level)
        else:
            link_view(self, new, aten.detach.default, (new,), {}, None)


def views_all(new: Tensor, x: WrapperTensor) -> bool:
    """Whether ``new`` is ``x``, or its ``detach()``."""
    link = getattr(new, "view_link", None)
    if link is None or link is FRESH or link.op is not aten.detach.default:
        return new is x
    return (link.parent or link.base_content()) is (x.view_link or x)


def refuse_write(level: Interpreter, new: Tensor) -> NoReturn:
    """In the place of what makes a leaf of new contents: those of this one belong to code outside."""
    what = "writing a leaf whose Tensor.data was assigned a tensor from outside"
    raise InsideTransformError(what, level.name, "x.data = y.clone()")


def swap(a: Tensor, b: Tensor) -> None:
    """``torch.utils.swap_tensors``, but not of a captured tensor and one of a transform, which does not outlive that,
    nor of leaves made inside, to which a graph refers."""
    wrappers = [x for x in (a, b) if type(x) is WrapperTensor]
    up_to_date(wrappers)
    if len(wrappers) == 1:
        refuse(wrappers[0], "torch.utils.swap_tensors with a captured tensor", CURE)
    if any(x.leaf is not None for x in wrappers):
        refuse(wrappers[0], "torch.utils.swap_tensors of a leaf made inside", "x.data = y")
    swap_tensors(a, b)


def version(self: WrapperTensor) -> int:
    """``Tensor._version``: how often the tensor was written, or another one of the same memory."""
    return contents_of(self).version


torch.utils.swap_tensors = functools.wraps(swap_tensors)(swap)
#: of a tensor whose data was assigned: what holds the contents of before
WrapperTensor.reassigned = None  # type: ignore[attr-defined]
RESERVED.update(("reassigned", "lost_derivative"))
for _name, _property in (("data", property(data, set_data)), ("_version", property(version))):
    setattr(WrapperTensor, _name, _property)
