"""Leaves that are made inside of transforms: ``requires_grad_``, ``torch.nn.Parameter``, ``requires_grad=True``.

NOTE [Leaves made inside]
What is made a leaf inside of a transform is one of PyTorch's own graph, at the base: the wrapper then holds a leaf,
all that is computed with it is recorded there, and gradients by it are those of NOTE [Gradients inside]. A leaf that is
made under vmap is one of each example, so it has a batch from then on, also if its numbers are the same for all; an
argument that they share (in_dim None) stays one leaf. A write under ``no_grad``, such as an optimizer's, leaves a leaf
again (``WrapperTensor.leaf``), which the graph of before does not know.

``requires_grad=True`` of a function that makes a tensor does not reach the door: PyTorch sets it on the result, which
is a wrapper by then. So what is made inside has ``FRESH`` in the place of a view link, which looks at its first use.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn

from functrans.boundary.fresh import FRESH
from functrans.core.tensor import WrapperTensor
from functrans.errors import RequiresGradError
from functrans.functionalization.layouts import set_content
from functrans.functionalization.views import MadeInside
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.interpreters.vmap.table import materialize
from functrans.pytorch.thread_state import STATE, lowered, running_at
from functrans.tensors.answers import Refusing


def requires_grad_(self: WrapperTensor, requires_grad: bool = True) -> Tensor:
    """``Tensor.requires_grad_``: it makes a leaf of what no level records; see NOTE [Leaves made inside]."""
    if self.view_link is not None:
        self.view_link.refresh(self)
    if self.leaf is not None and not requires_grad:
        self.leaf = None
        set_content(self, self.detach())
    if not requires_grad or self.requires_grad:
        return self
    if not can_be_leaf(self):
        raise RequiresGradError(self.interpreter.name)
    version = self.version
    set_content(self, leaf_of(self, self.shared))
    self.version = version
    if not self.shared:
        self.leaf = partial(leaf_again, ref(self))
        base_of(self).leaf_inside = ref(self)
    return self


def can_be_leaf(x: Any) -> bool:
    """Whether ``x`` is a plain tensor, which levels see as examples, as constants or with tangents."""
    while type(x) is WrapperTensor:
        if not (isinstance(x.interpreter, VmapInterpreter | JvpInterpreter) or x.interpreter.is_constant(x)):
            return False
        x = x.value
    return True


def leaf_of(x: Any, shared: bool = False) -> Any:
    """``x`` around a new leaf at the base; ``shared``: of one tensor of all examples."""
    if type(x) is not WrapperTensor:
        with running_at(None):
            return x.detach().requires_grad_()
    level = x.interpreter
    if isinstance(level, VmapInterpreter) and x.bdim is None and not shared:
        with lowered(level):
            batch = materialize(x.value, None, level.batch_size)
        return level.batched(leaf_of(batch), 0)
    return level.rewrap(x, leaf_of(x.value, x.shared))


def leaf_again(holder: Any, new: Tensor) -> WrapperTensor:
    """The leaf that the written ``holder()`` is, with the contents ``new``."""
    level = holder().interpreter
    made = leaf_of(new if level.owns(new) else level.constant(new))
    base_of(made).leaf_inside = holder
    return made


def deepcopy(self: WrapperTensor, memo: Any) -> Tensor:
    """``copy.deepcopy``, which makes a leaf of a leaf, and a parameter of one."""
    if self.leaf is None or id(self) in memo:
        return original_deepcopy(self, memo)
    copied = memo[id(self)] = self.detach().clone().requires_grad_()
    if isinstance(self, nn.Parameter):
        copied._is_param = True
    return copied


original_deepcopy = WrapperTensor.__deepcopy__


def base_of(x: Any) -> Any:
    while type(x) is WrapperTensor:
        x = x.value
    return x


def leaves_of(x: Any) -> list[Tensor]:
    """The leaves of PyTorch's own graph on which ``x`` depends, or one of its tangents."""
    found: dict[int, Tensor] = {}
    nodes: list[Any] = []
    for value in parts_of(x):
        if value.requires_grad and value.is_leaf:
            found[id(value)] = value
        nodes.append(value.grad_fn)
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes.extend(before for before, _ in node.next_functions)
    return list(found.values())


def parts_of(x: Any) -> Iterator[Tensor]:
    """The plain tensors that ``x`` is made of: its value at the base, and those of its tangents."""
    if type(x) is not WrapperTensor:
        yield x
        return
    yield from parts_of(x.value)
    if isinstance(x.interpreter, JvpInterpreter) and x.tangent is not None:
        yield from parts_of(x.tangent)


def made_inside(leaves: list[list[Tensor]]) -> list[WrapperTensor]:
    """Those of ``leaves`` that were made inside, as the program holds them."""
    found: dict[int, WrapperTensor] = {}
    for leaf in (leaf for each in leaves for leaf in each):
        wrapper = leaf.leaf_inside() if hasattr(leaf, "leaf_inside") else None
        if wrapper is None:
            continue
        if base_of(wrapper) is not leaf:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "a leaf was written between what is differentiated and its gradient"
            )
        found[id(wrapper)] = wrapper
    return list(found.values())


original_new = nn.Parameter.__new__


@functools.wraps(original_new)
def new_parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
    """A parameter, which never has a history: that of ``data`` has to be cut by who has it made, if there is one."""
    if type(data) is WrapperTensor and requires_grad and carries_derivative(data):
        raise RequiresGradError(data.interpreter.name)
    parameter = original_new(cls, data, requires_grad)
    if STATE.top is not None and type(parameter) is not WrapperTensor:
        parameter.made_inside = MadeInside(STATE.top)
    return parameter


def carries_derivative(x: Any) -> bool:
    while type(x) is WrapperTensor:
        if x.interpreter.differentiates and not x.interpreter.is_constant(x):
            return True
        x = x.value
    return False


def looked_at(name: str) -> property:
    """An attribute of a wrapper that may just have been made, with ``requires_grad=True``."""
    attribute: Any = getattr(Refusing, name)

    def read(self: WrapperTensor) -> Any:
        if self.view_link is FRESH:
            FRESH.refresh(self)
        return attribute.fget(self)

    return property(read, attribute.fset)


WrapperTensor.requires_grad_ = requires_grad_  # type: ignore[assignment, method-assign]
WrapperTensor.__deepcopy__ = deepcopy  # type: ignore[method-assign, assignment]
for name in ("requires_grad", "is_leaf"):
    setattr(WrapperTensor, name, looked_at(name))
nn.Parameter.__new__ = staticmethod(new_parameter)  # type: ignore[assignment, method-assign]
