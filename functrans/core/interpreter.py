"""The interpreter: what a running transform is, and what it may decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor, wrap
from functrans.errors import InsideTransformError, LayoutError
from functrans.errors.misuse import check_payload
from functrans.errors.wording import callable_name
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import HigherOrderOperator, OpOverload, is_forward_enabled


class Interpreter:
    """One running transform: it gives every operator on its wrappers a meaning.

    A transform subclasses it with ``process``. ``lower`` sends an operator to the level below.
    """

    #: The word used in messages and reprs.
    kind: ClassVar[str] = "interpreter"
    #: Names of the wrapper attributes that carry this transform's data, beside ``value``.
    payload: ClassVar[tuple[str, ...]] = ()
    #: Whether it differentiates: a value of its wrappers has a derivative that leaving the level would lose.
    differentiates: ClassVar[bool] = False
    #: Whether one run of the function stands for many, so that a write to a captured tensor would be repeated.
    repeats_writes: ClassVar[bool] = False
    #: Whether its wrappers carry PyTorch's own autograd state, for a derivative that is borrowed.
    carries_autograd: ClassVar[bool] = False
    #: Whether it is asked about every operator that code above it runs, on captured tensors too.
    sees_everything: ClassVar[bool] = False
    #: Whether lowering an operator is running it at the base, in the grad mode that is on. (Found once: asked often.)
    on_base: bool = False
    #: Whether lowering is otherwise a mere call: no mode to switch, no branch below. (Found once, too.)
    lowers_plainly: bool = True
    #: The branch that code at this level is in, or None; see NOTE [Branches] in interpreters/branch.py.
    within: Any = None
    #: Whether ``process`` takes programs as they are; for others they are taken apart. See functrans.programs.
    whole: ClassVar[bool] = False
    #: the next interpreter, from this one down, that sees everything
    watcher: Interpreter | None = None
    #: Whether the value of a wrapper says all there is to say of it once the transform has ended.
    values_remain: ClassVar[bool] = False
    #: What its wrappers stand for while code runs in its place; see NOTE [Leftovers].
    stands_for: Any = None
    #: The thread in which it runs; None: it does not run yet, or in any.
    thread: int | None = None

    def __init_subclass__(cls, *, whole: bool = False) -> None:
        """``whole``: as the attribute. Not inherited: a subclass may mean something else by an operator."""
        check_payload(cls)
        cls.whole = whole

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        self.below: Interpreter | None = STATE.top
        self.level: int = 1 if self.below is None else self.below.level + 1
        self.alive = True
        self.unused = [True]  # empty once it has run: see errors/misuse.py
        self.func = func
        self.watcher = self if self.sees_everything else None if self.below is None else self.below.watcher
        self.outer_grad_mode: bool = torch.is_grad_enabled()
        self.outer_forward_mode: bool = is_forward_enabled()
        self.within = None if self.below is None else self.below.within
        outer_modes_on = self.outer_grad_mode and self.outer_forward_mode
        self.lowers_plainly = outer_modes_on and self.within is None
        self.on_base = outer_modes_on and getattr(self.below, "passed_by", self.below is None)

    def process(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``op`` at this level: one of its arguments is a wrapper of it, or ``op`` is random, or it watches."""
        raise NotImplementedError

    def owns(self, x: Any) -> TypeGuard[WrapperTensor]:
        """Whether ``x`` is a wrapper of this interpreter."""
        return type(x) is WrapperTensor and x.interpreter is self

    def value_of(self, a: Any) -> Any:
        """An argument, or a list of them, one level down; what is no wrapper of this interpreter stays as it is."""
        if type(a) is WrapperTensor:
            return a.value if a.interpreter is self else a
        return [self.value_of(v) for v in a] if type(a) in (list, tuple) else a

    def process_higher_order(self, op: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that takes functions, such as ``cond``, which was called at this level.

        NotImplemented: do as its definition in operators does (functrans.control_flow), which come to ``process``.
        """
        return NotImplemented

    def returned(self) -> None:
        """The transformed function has returned: raise what makes its results wrong."""

    def constant(self, value: Tensor) -> WrapperTensor:
        """A wrapper of this level for a value of the level below that does not depend on what is transformed.

        What no wrapper can hold (nested and compressed tensors) stays as it is: a tensor of the base, as if captured.
        """
        try:
            wrapper = wrap(self, value)
        except LayoutError:
            return value  # type: ignore[return-value]
        for name in self.payload:
            setattr(wrapper, name, None)
        return wrapper

    def rewrap(self, source: WrapperTensor, value: Tensor) -> WrapperTensor:
        """A new wrapper around ``value`` with the data that this transform keeps on ``source``."""
        wrapper = self.constant(value)
        for name in self.payload:
            setattr(wrapper, name, getattr(source, name))
        return wrapper

    def is_constant(self, wrapper: WrapperTensor) -> bool:
        """Whether ``wrapper`` could as well be its value: not batched, not tracked, without tangent."""
        return all(getattr(wrapper, name) is None for name in self.payload)

    def records(self, wrapper: WrapperTensor) -> bool:
        """What ``wrapper.requires_grad`` says: whether what is computed with it is recorded to be pulled back."""
        return False

    def grad_fn(self, wrapper: WrapperTensor) -> Any:
        """What ``grad_fn`` of ``wrapper`` is: what knows how it was made, and takes hooks; None if nothing does."""
        return wrapper.value.grad_fn

    def add_hook(self, wrapper: WrapperTensor, hook: Callable[[Tensor], Any]) -> Any:
        """Run ``hook`` on the gradient of ``wrapper``, for which a level that records it is asked."""
        cure = "an autograd.Function whose backward does what the hook does"
        raise InsideTransformError("Tensor.register_hook()", self.name, cure)

    def computed(self, wrapper: WrapperTensor) -> bool:
        """Whether ``wrapper``, which is recorded, is a result, and no argument."""
        return False

    def hides_layout(self, wrapper: WrapperTensor) -> bool:
        """Whether ``wrapper`` shows gaps in memory that are there for the transform's sake."""
        return False

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        """Whether a write at this moment leaves this level's derivative of what is written as it was.

        ``recording``: the level's grad mode; ``everywhere``: the write goes through ``detach()``.
        """
        return everywhere

    def aligned(self, old: WrapperTensor, new: WrapperTensor) -> tuple[Tensor, WrapperTensor]:
        """``old``'s value and ``new``, brought to one layout one level down."""
        return old.value, new

    def merge_payload(self, merged: WrapperTensor, old: WrapperTensor, merge: Callable[..., Tensor]) -> None:
        """Let tensors that are kept on ``merged`` have the history that ``merge`` gives them of ``old``'s."""

    def before_write(self, target: Tensor) -> None:
        """``target``, of a lower level or the base, is about to be written: take care of what was saved of it."""

    def describe(self, wrapper: WrapperTensor) -> str:
        """What a repr of ``wrapper`` says of this transform's data on it, in a few words."""
        return ""

    def parts(self, wrapper: WrapperTensor) -> dict[str, Any]:
        """What a repr of ``wrapper`` shows below its value, by name."""
        return {}

    def __repr__(self) -> str:
        about = "".join(f", {detail}" for detail in self.details())
        return f"<{type(self).__name__} {self.name}, level {self.level}{about}{'' if self.alive else ', ended'}>"

    def details(self) -> list[str]:
        """What the interpreter's own repr says beside its name and level."""
        return []

    def rule_place(self, op: Any) -> str | None:
        """``file:line`` of what this transform does with ``op``, for messages; None: not known."""
        return None

    @property
    def name(self) -> str:
        return f"{self.kind}({callable_name(self.func)})"
