"""What is switched in a thread while a transform runs, and the ways to switch it and to put it back.

What is switched for every operator is written out where that is (core, boundary/calls.py, functionalization, the door,
the walk back along a tape), since a context costs time. All else goes by the contexts below.

NOTE [Three states of a thread]
At the base nothing is switched: no mode of ours, autograd's key in place. While code runs at a level, the door is on
PyTorch's mode stack and autograd's key is excluded, so that operators reach the door whole and unrecorded. While the
door handles an operator, PyTorch has taken the mode off its stack; a rule that is plain ``torch`` code needs the state
of the level it works at. ``running_at`` establishes a state from any other and puts back exactly what it found.

NOTE [Put back]
An exception can come at any line, and a KeyboardInterrupt does. So a ``Snapshot`` is taken before anything is switched,
all switching is done inside of a ``try``, and ``Snapshot.restore`` compares with what is there instead of undoing
steps: it may be interrupted and run again. What an exception in the first line of a context's exit leaves is put right
where the transform ends, by ``run_transformed``.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.autograd import forward_ad

from functrans.pytorch.torch_private import (
    AUTOGRAD,
    FUNCTION_ENABLED,
    VIEWS_AND_VERSIONS,
    ZERO_TENSOR,
    function_enabled,
    function_state,
    is_forward_enabled,
    is_key_excluded,
    mode_at,
    mode_stack_size,
    pop_mode,
    pop_packing,
    push_mode,
    push_packing,
    set_forward_enabled,
    set_function_state,
    set_grad_enabled,
    set_key_excluded,
    top_packing,
)


class _State(threading.local):
    #: the innermost interpreter; its class is further up (functrans/core/interpreter.py)
    top: Any = None
    #: size of PyTorch's mode stack while the door is on it; while the door handles an operator it is one less
    door_depth: int = 0
    #: the saved-tensor hooks around the outermost transform
    packing: Any = None
    #: what NOTE [Numbers that are read] keeps
    number_read: Any = None
    #: how many of torch.func's transforms run; see functrans/door/torch_func_inside.py
    foreign: int = 0
    #: whether a borrowed tangent opened forward AD's level
    level_open: bool = False
    #: what is told of interpreters entered here while a run is explained; see functrans/explanation/recording.py
    observer: Any = None


STATE = _State()
#: The observers of all threads, so that it costs the look at an empty list where there is none.
OBSERVERS: list[Any] = []

#: The door, pushed on PyTorch's mode stack; ``functrans.door.torch_dispatch`` hands it over.
DOOR: Any = None


def modes_on() -> list[Any]:
    """PyTorch's mode stack, innermost last."""
    size = mode_stack_size()
    return [] if not size else [mode_at(0)] if size == 1 else [mode_at(i) for i in range(size)]


def is_recorded() -> bool:
    """Whether a tracer records what runs, for other numbers than those of now; any mode but ours may be one."""
    return torch.jit.is_tracing() or any(mode is not DOOR and mode is not STATE.observer for mode in modes_on())


def set_modes(wanted: list[Any]) -> None:
    """Let PyTorch's mode stack be ``wanted``, by as few steps as it takes."""
    present = modes_on()
    if present == wanted:
        return
    same = 0
    while same < len(wanted) and same < len(present) and wanted[same] is present[same]:
        same += 1
    for _ in present[same:]:
        pop_mode(None)
    for mode in wanted[same:]:
        push_mode(mode)


class Snapshot:
    """What is switched in this thread now."""

    __slots__ = ("autograd", "door_depth", "forward", "function", "grad", "hooks", "modes", "packing", "top", "views")

    def __init__(self) -> None:
        state = STATE
        self.top = state.top
        self.door_depth = state.door_depth
        self.packing = state.packing
        self.modes = modes_on() if mode_stack_size() else []
        self.autograd = is_key_excluded(AUTOGRAD)
        self.views = is_key_excluded(VIEWS_AND_VERSIONS)
        self.grad = torch.is_grad_enabled()
        self.forward = is_forward_enabled()
        self.function = None if function_enabled() else function_state()
        self.hooks = top_packing(True)

    def restore(self) -> None:
        """Switch everything to what it was; see NOTE [Put back]."""
        modes = self.modes
        size = mode_stack_size()
        while size > len(modes):  # what was entered since
            pop_mode(None)
            size -= 1
        if modes and (size < len(modes) or mode_at(size - 1) is not modes[-1]):
            set_modes(modes)
        STATE.top = self.top
        if self.top is None:  # of these the outermost transform disposes
            STATE.door_depth = self.door_depth
            STATE.packing = self.packing
            if STATE.level_open and not self.door_depth:
                close_level()
        set_key_excluded(AUTOGRAD, self.autograd)
        set_key_excluded(VIEWS_AND_VERSIONS, self.views)
        if torch.is_grad_enabled() is not self.grad:
            set_grad_enabled(self.grad)
        if is_forward_enabled() is not self.forward:
            set_forward_enabled(self.forward)
        if self.function is not None or not function_enabled():
            set_function_state(FUNCTION_ENABLED if self.function is None else self.function)
        hooks = top_packing(True)
        while hooks is not None and not same_hooks(hooks, self.hooks):
            pop_packing()
            hooks = top_packing(True)


class running_at:
    """Context: plain ``torch`` code runs at ``level`` (None: the base), whatever state the thread is in.

    See NOTE [Three states of a thread].
    """

    __slots__ = ("before", "level")

    def __init__(self, level: Any) -> None:
        self.level = level

    def switch(self) -> None:
        level = STATE.top = self.level
        inside = level is not None
        set_key_excluded(AUTOGRAD, inside)
        set_key_excluded(VIEWS_AND_VERSIONS, inside)
        modes = self.before.modes
        if inside:
            if DOOR not in modes:
                push_mode(DOOR)
        else:
            set_key_excluded(ZERO_TENSOR, False)
            pack_as_outside()
            if DOOR in modes:  # it may be under modes that the user entered after it
                set_modes([m for m in modes if m is not DOOR])

    def __enter__(self) -> None:
        self.before = Snapshot()
        try:
            self.switch()
        except BaseException:
            self.before.restore()
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            self.before.restore()
        except BaseException:
            self.before.restore()
            raise


class lowered(running_at):
    """Context: code of ``interpreter``'s rules runs one level down, with that level's grad mode."""

    __slots__ = ("interpreter",)

    def __init__(self, interpreter: Any) -> None:
        self.interpreter = interpreter
        self.level = interpreter.below

    def switch(self) -> None:
        super().switch()
        if not self.interpreter.outer_grad_mode:
            set_grad_enabled(False)
        if not self.interpreter.outer_forward_mode:
            set_forward_enabled(False)


class behind_autograd(running_at):
    """Context, outside of transforms: for a call that the door answers, which autograd would take for a view."""

    __slots__ = ()

    def __init__(self) -> None:
        self.level = None

    def switch(self) -> None:
        set_key_excluded(AUTOGRAD, True)
        set_key_excluded(VIEWS_AND_VERSIONS, True)


class in_modes:
    """Context: grad mode and forward mode are as given."""

    __slots__ = ("before", "forward", "grad")

    def __init__(self, grad: bool, forward: bool) -> None:
        self.grad, self.forward = grad, forward

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled(), is_forward_enabled()
        set_grad_enabled(self.grad)
        set_forward_enabled(self.forward)

    def __exit__(self, *exc: object) -> None:
        grad, forward = self.before
        set_grad_enabled(grad)
        set_forward_enabled(forward)


class door_closed:
    """Context: operators that interpreters send down by Python calls end at the base, wherever the calls start.

    While the door handles an operator it is off PyTorch's mode stack, and this does nothing.
    """

    __slots__ = ("modes",)

    def __enter__(self) -> None:
        self.modes: list[Any] = []
        modes = modes_on() if mode_stack_size() else self.modes
        if modes and modes[-1] is DOOR:
            self.modes = modes
            pop_mode(None)
        elif DOOR in modes:  # under modes that the user entered after it
            self.modes = modes
            try:
                set_modes([m for m in modes if m is not DOOR])
            except BaseException:
                set_modes(modes)
                raise

    def __exit__(self, *exc: object) -> None:
        if self.modes:
            set_modes(self.modes)


#: Forward AD has one level for all threads: those in which a borrowed tangent has it open.
HOLDERS: set[int] = set()
HOLDING = threading.RLock()


class forward_level:
    """Context: forward AD has its one level; ours, unless the user has one open. The last thread closes it."""

    __slots__ = ("ours",)

    def __enter__(self) -> None:
        with HOLDING:
            self.ours = not STATE.level_open and (bool(HOLDERS) or forward_ad._current_level < 0)
            if self.ours:
                STATE.level_open = True
                HOLDERS.add(threading.get_ident())
                if forward_ad._current_level < 0:
                    forward_ad.enter_dual_level()

    def __exit__(self, *exc: object) -> None:
        if self.ours:
            close_level()


def close_level() -> None:
    with HOLDING:
        HOLDERS.discard(threading.get_ident())
        if not HOLDERS and forward_ad._current_level >= 0:
            forward_ad.exit_dual_level()
        STATE.level_open = False


def is_forward_level_open() -> bool:
    """Whether forward AD has a level open that is no matter of other threads alone."""
    return forward_ad._current_level >= 0 and (STATE.level_open or not HOLDERS)


def unchanged(x: Any) -> Any:
    return x


def same_hooks(a: Any, b: Any) -> bool:
    return a is b or (a is not None and b is not None and a[0] is b[0])


def pack_as_outside() -> None:
    """Have autograd pack what the base saves by the hooks around the outermost transform, until a snapshot is restored.

    Hooks from inside (checkpoint's, say) would recompute with wrappers whose transform has ended when the base is
    differentiated.
    """
    inside, outside = top_packing(True), STATE.packing
    if inside is None or STATE.door_depth == 0 or same_hooks(inside, outside):
        return
    push_packing(*(outside if outside is not None else (unchanged, unchanged)))
