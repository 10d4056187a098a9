"""What PyTorch's private names, which ask its own wrappers, answer for ours.

Libraries ask them: whether a tensor is batched, what is inside, and for a batch dimension to be put away and brought
back. In their place stand functions that answer for our wrappers and levels, and hand on what is about PyTorch's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrans.api.containers import Level
from functrans.api.exchange import put_in, take_out
from functrans.api.out_dims import leave
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.errors import Call, CallTypeError
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_func import functorch_core, functorch_vmap
from functrans.pytorch.torch_private import is_torch_func_active

Answer = Callable[..., Any]


def shown(x: Any) -> Any:
    """What ``x`` is, as torch.func has it: a constant is no wrapper there, but the value."""
    while type(x) is WrapperTensor and x.interpreter.is_constant(x):
        x = current(x).value
    return x


def current(x: WrapperTensor) -> WrapperTensor:
    """``x``, brought up to date with what was written to what it shares memory with."""
    if x.view_link is not None and x.interpreter.alive:
        x.view_link.refresh(x)
    return x


def is_wrapper(x: Any) -> bool:
    return type(shown(x)) is WrapperTensor


def is_batched(x: Any) -> bool:
    x = shown(x)
    return type(x) is WrapperTensor and isinstance(x.interpreter, VmapInterpreter)


def is_tracked(x: Any) -> bool:
    x = shown(x)
    return type(x) is WrapperTensor and x.interpreter.differentiates


def is_dead(x: Any) -> bool:
    return not x.interpreter.alive


def level_of(x: Any) -> int:
    x = shown(x)
    return Level(x.interpreter) if type(x) is WrapperTensor else -1


def bdim_of(x: Any) -> int:
    x = shown(x)
    return x.bdim if is_batched(x) else -1


def value_of(x: Any) -> Any:
    x = shown(x)
    # a constant of the base has nothing inside, as PyTorch's own says
    return current(x).value if type(x) is WrapperTensor else ORIGINALS["get_unwrapped"](x)


def vmap_of(level: Any, name: str) -> VmapInterpreter | None:
    """The vmap that ``level`` is of, if it is one of ours: PyTorch's levels are numbers, too."""
    interpreter = getattr(level, "interpreter", None)
    if interpreter is None:
        if is_torch_func_active():  # torch.func inside of ours: its levels are above
            return None
        interpreter = next((i for i in interpreter_stack() if i.level == level), None)
        if interpreter is None:
            return None
    if not isinstance(interpreter, VmapInterpreter):
        got = f"level {int(level)}, which is {interpreter.name}"
        raise CallTypeError(f"{name}(...)", got, "the level of a vmap that is running")
    return interpreter


def taken_down(x: Any, interpreter: VmapInterpreter, name: str, to: int) -> Any:
    """What ``x`` is at level ``to``: what was made further up is a constant there, if it has anything to do here."""
    while type(x) is WrapperTensor and x.interpreter.level > to and x.interpreter.alive:
        if not x.interpreter.is_constant(x):
            got = f"a tensor of {x.interpreter.name} at level {x.interpreter.level}"
            where = "outside of" if to < interpreter.level else "inside of no more than"
            expected = f"one from {where} {interpreter.name} at level {interpreter.level}"
            raise CallTypeError(f"{name}(...)", got, expected)
        x = current(x).value
    return x


def adding(original: Answer) -> Answer:
    def asked(tensor: Tensor, batch_dim: int, level: int) -> Tensor:
        interpreter = vmap_of(level, "_add_batch_dim")
        if interpreter is None:
            return original(tensor, batch_dim, level)
        if not interpreter.alive:
            got = f"a level of {interpreter.name}, which has ended"
            raise CallTypeError("_add_batch_dim(...)", got, "the level of a vmap that is running")
        value = taken_down(tensor, interpreter, "_add_batch_dim", interpreter.level - 1)
        wrapper = interpreter.batched(value, batch_dim % value.dim())
        if isinstance(level, Level) and value is tensor:
            level.entered.append((wrapper, value, wrapper.bdim))
        return wrapper

    return asked


def removing(original: Answer) -> Answer:
    def asked(tensor: Tensor, level: int, batch_size: int, out_dim: int) -> Tensor:
        interpreter = vmap_of(level, "_remove_batch_dim")
        if interpreter is None:
            return original(tensor, level, batch_size, out_dim)
        call = Call("_remove_batch_dim", interpreter.func, {"out_dim": out_dim})
        return out_of(interpreter, tensor, out_dim, "_remove_batch_dim", call)

    return asked


def removing_maybe(original: Answer) -> Answer:
    def asked(name: str, batched_output: Any, vmap_level: int, batch_size: int, out_dim: int | None) -> Any:
        interpreter = vmap_of(vmap_level, "_maybe_remove_batch_dim")
        if interpreter is None:
            return original(name, batched_output, vmap_level, batch_size, out_dim)
        call = Call("vmap", interpreter.func, {"out_dims": out_dim})
        return out_of(interpreter, batched_output, out_dim, "_maybe_remove_batch_dim", call)

    return asked


def out_of(interpreter: VmapInterpreter, x: Any, out_dim: int | None, name: str, call: Call) -> Any:
    """``x`` one level below ``interpreter``'s, its batch at ``out_dim``."""
    x = taken_down(x, interpreter, name, interpreter.level)
    return leave(call, interpreter, current(x) if type(x) is WrapperTensor else x, out_dim, x, 0)


def about_tensor(answer: Answer) -> Callable[[Answer], Answer]:
    """What answers a question about one tensor; PyTorch's own does where that is none of our wrappers."""

    def instead(original: Answer) -> Answer:
        def asked(tensor: Any) -> Any:
            return answer(tensor) if type(tensor) is WrapperTensor else original(tensor)

        return asked

    return instead


def about_level(original: Answer) -> Answer:
    def asked() -> Any:
        return original() if STATE.top is None or is_torch_func_active() else Level(STATE.top)

    return asked


#: What stands in the place of each private name, as a function of the original.
ANSWERS: dict[str, Callable[[Answer], Answer]] = {
    "_add_batch_dim": adding,
    "_remove_batch_dim": removing,
    "_maybe_remove_batch_dim": removing_maybe,
    "current_level": about_level,
    "maybe_current_level": about_level,
    "get_unwrapped": about_tensor(value_of),
    "is_batchedtensor": about_tensor(is_batched),
    "is_dead_tensor_wrapper": about_tensor(is_dead),
    "is_functorch_wrapped_tensor": about_tensor(is_wrapper),
    "is_gradtrackingtensor": about_tensor(is_tracked),
    "maybe_get_bdim": about_tensor(bdim_of),
    "maybe_get_level": about_tensor(level_of),
}
#: The originals, as they were when functrans was imported.
ORIGINALS: dict[str, Any] = {name: getattr(functorch_core, name) for name in ANSWERS if hasattr(functorch_core, name)}


def pairs() -> list[tuple[Answer, Answer]]:
    """Every function that is replaced, and the one that answers in its place."""
    found: dict[int, tuple[Answer, Answer]] = {}
    for module in (functorch_core, functorch_vmap):
        for name, instead in ANSWERS.items():
            original = getattr(module, name, None)
            if original is None or id(original) in found:
                continue
            answer = instead(original)
            answer.__name__ = answer.__qualname__ = name
            answer.__module__ = module.__name__  # where others look for it
            answer.__doc__ = f"{name} of PyTorch, which answers for functrans' wrappers, too."
            found[id(original)] = original, answer
    return list(found.values())


PAIRS = pairs()
_lock = threading.RLock()
_wanted = 0


def answer() -> None:
    """Let PyTorch's private names answer for our wrappers, until ``answer_no_more`` has been called as often."""
    global _wanted
    with _lock:
        _wanted += 1
        put_in(PAIRS)


def answer_no_more() -> None:
    global _wanted
    with _lock:
        _wanted -= 1
        if _wanted == 0:
            take_out(PAIRS)


@functools.cache
def answer_for_good() -> None:
    """As ``answer``, once and with no end: for containers, which ask these names themselves."""
    answer()
