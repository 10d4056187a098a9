"""The interpreter stack: what is on it, how it is entered, and how code runs one level down.

The stack is a linked list: ``STATE.top`` is the innermost interpreter, ``interpreter.below`` the next one, None the base
(plain PyTorch). It is thread-local, and so is all that is switched with it.

NOTE [Three states of a thread]
At the base nothing is switched: no mode of ours, autograd's key in place. While code runs at a level, the door is on PyTorch's
mode stack and autograd's key is excluded, so that operators reach the door whole and unrecorded. While the door
handles an operator, PyTorch has taken the mode off its stack; a rule that is plain ``torch`` code needs the state
of the level it works at. ``running_at`` establishes a state from any other and puts back exactly what it found.

NOTE [Grad mode per level]
PyTorch has one grad-mode flag per thread. A level's flag is that flag while the level is on top; entering the next
level stores it there (``outer_grad_mode``), and lowering applies it. An operator is thus recorded at a level
when the flags of that level and of every level above it are on. Forward mode has a switch of its own, treated alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from functrans.errors import MixedTransformsError
from functrans.torch_private import (
    AUTOGRAD,
    INDEX_BATCHED,
    VIEWS_AND_VERSIONS,
    ZERO_TENSOR,
    OpOverload,
    is_forward_enabled,
    is_key_excluded,
    is_torch_func_active,
    mode_stack_size,
    pop_mode,
    pop_packing,
    push_mode,
    push_packing,
    set_forward_enabled,
    set_grad_enabled,
    set_key_excluded,
    top_packing,
)

if TYPE_CHECKING:
    from functrans.tensor import WrapperTensor


class _State(threading.local):
    top: Interpreter | None = None
    #: size of PyTorch's mode stack while the door is on it; while the door handles an operator it is one less
    door_depth: int = 0
    #: the saved-tensor hooks around the outermost transform
    packing: Any = None
    #: whether INDEX_BATCHED is excluded in this thread
    prepared: bool = False


STATE = _State()

#: The door, pushed on PyTorch's mode stack; set by ``functrans.tensor``.
DOOR: Any = None


class Interpreter:
    """One running transform: it gives every operator on its wrappers a meaning.

    A transform subclasses it with ``process``. ``lower`` sends an operator to the level below.
    """

    #: The word used in messages and reprs.
    kind: ClassVar[str] = "interpreter"
    #: Names of the wrapper attributes that carry this transform's data, beside ``value``.
    payload: ClassVar[tuple[str, ...]] = ()
    #: Whether one run of the function stands for many, so that a write to a captured tensor would be repeated.
    repeats_writes: ClassVar[bool] = False
    #: Whether lowering an operator is running it at the base, in the grad mode that is on.
    on_base: bool = False
    #: ``process`` for a whole program (see functrans.programs): (program, args, pending) -> outputs, which may be pending wrappers
    #: if ``pending``. None: its operators come one by one.
    process_program: Callable[..., Any] | None = None
    #: The thread in which it runs; None: it does not run yet, or in any.
    thread: int | None = None

    def __init_subclass__(cls) -> None:
        if "process" in vars(cls) and "process_program" not in vars(cls):
            cls.process_program = None  # a new meaning for operators is one for programs, too

    def __init__(self, func: Callable[..., Any] | None = None) -> None:
        self.below: Interpreter | None = STATE.top
        self.level: int = 1 if self.below is None else self.below.level + 1
        self.alive = True
        self.func = func
        self.outer_grad_mode: bool = torch.is_grad_enabled()
        self.outer_forward_mode: bool = is_forward_enabled()
        self.outer_modes_on: bool = self.outer_grad_mode and self.outer_forward_mode
        self.on_base = self.below is None and self.outer_modes_on

    def process(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``op`` at this level. At least one argument is a wrapper of this interpreter, or ``op`` is random."""
        raise NotImplementedError

    def constant(self, value: Tensor) -> WrapperTensor:
        """A wrapper of this level for a value of the level below that does not depend on what is transformed."""
        raise NotImplementedError

    def rewrap(self, source: WrapperTensor, value: Tensor) -> WrapperTensor:
        """A new wrapper around ``value`` with the data that this transform keeps on ``source``."""
        wrapper = self.constant(value)
        for name in self.payload:
            setattr(wrapper, name, getattr(source, name))
        return wrapper

    def is_constant(self, wrapper: WrapperTensor) -> bool:
        """Whether ``wrapper`` could as well be its value: not batched, not tracked, without tangent."""
        raise NotImplementedError

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        """Whether a write at this moment leaves this level's derivative of what is written as it was.

        ``recording``: the level's grad mode; ``everywhere``: the write goes through ``detach()``.
        """
        return everywhere

    def aligned(self, old: WrapperTensor, new: WrapperTensor) -> tuple[Tensor, WrapperTensor]:
        """``old``'s value and ``new``, brought to one layout one level down."""
        return old.value, new

    def merge_payload(self, merged: WrapperTensor, old: WrapperTensor, merge: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Let tensors that the transform keeps on ``merged`` have the history that ``merge`` gives them of ``old``'s."""

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
        func = getattr(self.func, "__name__", None) or type(self.func).__name__
        return f"{self.kind}({func})"


def interpreter_stack() -> list[Interpreter]:
    """The interpreters of this thread, innermost first.

    Example:
        >>> import torch, functrans
        >>> from functrans.stack import interpreter_stack
        >>> def f(x):
        ...     print([(i.level, i.kind) for i in interpreter_stack()])
        ...     return x.sin()
        >>> _ = functrans.vmap(functrans.grad(f))(torch.zeros(2))
        [(2, 'grad'), (1, 'vmap')]
    """
    found, interpreter = [], STATE.top
    while interpreter is not None:
        found.append(interpreter)
        interpreter = interpreter.below
    return found


def run_transformed(interpreter: Interpreter, body: Callable[[], Any], *, enable_grad: bool = False) -> Any:
    """Run ``body`` with ``interpreter`` on top of the stack; whatever happens, leave the thread as it was.

    ``enable_grad`` switches the new level's grad mode on.
    """
    if is_torch_func_active():
        raise MixedTransformsError(interpreter.name)
    interpreter.thread = get_ident()
    top, depth, modes = STATE.top, STATE.door_depth, mode_stack_size()
    outermost = top is None
    if outermost:
        excluded, views_excluded = is_key_excluded(AUTOGRAD), is_key_excluded(VIEWS_AND_VERSIONS)
    try:
        if outermost:
            set_key_excluded(AUTOGRAD, True)
            set_key_excluded(VIEWS_AND_VERSIONS, True)
            if not STATE.prepared:
                set_key_excluded(INDEX_BATCHED, True)  # for good: a wrapper may outlive its transform
                STATE.prepared = True
            push_mode(DOOR)
            STATE.door_depth = modes + 1
            STATE.packing = top_packing(True)
        STATE.top = interpreter
        if enable_grad and not interpreter.outer_grad_mode:
            set_grad_enabled(True)
        return body()
    finally:
        # Autocast caches its casts of captured weights; those made here belong to this transform.
        torch.clear_autocast_cache()
        interpreter.alive = False
        STATE.top = top
        while mode_stack_size() > modes:
            pop_mode(None)
        if outermost:
            STATE.door_depth = depth
            set_key_excluded(AUTOGRAD, excluded)
            set_key_excluded(VIEWS_AND_VERSIONS, views_excluded)
        if torch.is_grad_enabled() is not interpreter.outer_grad_mode:
            set_grad_enabled(interpreter.outer_grad_mode)
        if is_forward_enabled() is not interpreter.outer_forward_mode:
            set_forward_enabled(interpreter.outer_forward_mode)


class running_at:
    """Context: plain ``torch`` code runs at ``level`` (None: the base), whatever state the thread is in.

    See NOTE [Three states of a thread].
    """

    __slots__ = ("excluded", "level", "packing", "removed", "top", "views_excluded")

    def __init__(self, level: Interpreter | None) -> None:
        self.level = level
        self.top = STATE.top
        self.removed: list[Any] | None = None
        self.packing = False
        self.excluded = is_key_excluded(AUTOGRAD)
        self.views_excluded = is_key_excluded(VIEWS_AND_VERSIONS)

    def __enter__(self) -> None:
        level = STATE.top = self.level
        set_key_excluded(AUTOGRAD, level is not None)
        set_key_excluded(VIEWS_AND_VERSIONS, level is not None)
        if level is None:
            set_key_excluded(ZERO_TENSOR, False)
            self.packing = pack_as_outside()
        door_is_open = mode_stack_size() >= STATE.door_depth > 0
        if level is not None and not door_is_open:
            self.removed = []
            push_mode(DOOR)
        elif level is None and door_is_open:
            self.removed = take_off_door()

    def __exit__(self, *exc: object) -> None:
        STATE.top = self.top
        if self.packing:
            pop_packing()
        if self.removed is not None:
            if self.removed:
                put_back(self.removed)
            else:
                pop_mode(None)
        set_key_excluded(AUTOGRAD, self.excluded)
        set_key_excluded(VIEWS_AND_VERSIONS, self.views_excluded)


def pack_as_outside() -> bool:
    """Have autograd pack what the base saves by the hooks around the outermost transform; whether ``pop_packing`` must undo it.

    Hooks from inside (checkpoint's, say) would recompute with wrappers whose transform has ended when the base is differentiated.
    """
    inside, outside = top_packing(True), STATE.packing
    if inside is None or STATE.door_depth == 0 or (outside is not None and inside[0] is outside[0]):
        return False
    push_packing(*(outside if outside is not None else (unchanged, unchanged)))
    return True


def unchanged(x: Any) -> Any:
    return x


def take_off_door() -> list[Any]:
    """Take the door off PyTorch's mode stack, from under modes that user code entered after it; returns what was taken."""
    taken = []
    while mode_stack_size() >= STATE.door_depth:
        taken.append(pop_mode(None))
    for mode in reversed(taken[:-1]):
        push_mode(mode)
    return taken


def put_back(taken: list[Any]) -> None:
    """Undo ``take_off_door``."""
    for _ in taken[:-1]:
        pop_mode(None)
    for mode in reversed(taken):
        push_mode(mode)


class lowered:
    """Context: code of ``interpreter``'s rules runs one level down, with that level's grad mode."""

    __slots__ = ("at", "forward", "grad", "interpreter")

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.at = running_at(interpreter.below)
        self.grad = torch.is_grad_enabled()
        self.forward = is_forward_enabled()

    def __enter__(self) -> None:
        self.at.__enter__()
        if not self.interpreter.outer_grad_mode:
            set_grad_enabled(False)
        if not self.interpreter.outer_forward_mode:
            set_forward_enabled(False)

    def __exit__(self, *exc: object) -> None:
        self.at.__exit__()
        set_grad_enabled(self.grad)
        set_forward_enabled(self.forward)


class door_closed:
    """Context: operators that interpreters send down by Python calls end at the base, wherever the calls start.

    While the door handles an operator it is off PyTorch's mode stack, and this does nothing.
    """

    __slots__ = ("removed",)

    def __enter__(self) -> None:
        self.removed = take_off_door() if mode_stack_size() >= STATE.door_depth > 0 else None

    def __exit__(self, *exc: object) -> None:
        if self.removed is not None:
            put_back(self.removed)
