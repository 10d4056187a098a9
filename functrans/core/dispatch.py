"""How an operator gets from the door to an interpreter, and down the stack to plain PyTorch.

    y = torch.sin(x)              x: a wrapper of level 2 around a wrapper of level 1 around plain data
      └ door                      makes it pure; the top level among the arguments is 2      (door/, functionalization/)
        └ level 2 .process        its rule lowers:                          (interpreters/, each with an interpreter.py)
          └ lower, dispatch       a Python call; the top level among the arguments is 1
            └ level 1 .process
              └ lower, base       plain PyTorch
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import PendingWrapper, WrapperTensor, tensor_of
from functrans.errors import DeadWrapperError
from functrans.errors.misuse import refuse_same_level
from functrans.operators.info import Operator, OpInfo, op_info
from functrans.operators.scopes import SCOPES, scope_here
from functrans.pytorch.thread_state import pack_as_outside, same_hooks
from functrans.pytorch.torch_private import (
    AUTOGRAD,
    VIEWS_AND_VERSIONS,
    ZERO_TENSOR,
    function_mode_enabled,
    is_forward_enabled,
    is_key_excluded,
    pop_packing,
    set_forward_enabled,
    set_grad_enabled,
    set_key_excluded,
    top_packing,
)
from functrans.tensors.subclasses import KeptClassMet, keeps_class


def dispatch(op: Operator, args: Any, kwargs: dict[str, Any], watcher: Interpreter | None = None) -> Any:
    """Send a pure ``op``, which may be a program, to the interpreter that has to interpret it.

    ``watcher``: one that is asked about every operator; what would pass below it goes to it instead.

    The order of look-up: a wrapper of a transform that ended is an error; without wrappers the base runs ``op``; else
    the interpreter of the top level among the arguments' wrappers processes it, by (1) its rule for ``op``, (2) the
    decomposition of a composite ``op``, whose pieces come through the same level again, (3) its declared policy for
    operators without a rule: grad and jvp borrow PyTorch's derivative (interpreters/autograd_fallback.py), vmap
    decomposes by ``torch._decomp`` and then loops over the examples with a warning, any other transform raises
    MissingRuleError. Nothing passes through in silence.
    """
    try:
        known: OpInfo = op._functrans
    except AttributeError:
        known = op_info(op)
    owner: Interpreter | None = None
    for a in args:  # what ``scan`` finds, without the call where there is nothing but tensors and numbers
        kind = type(a)
        if kind is WrapperTensor or kind is PendingWrapper:
            if a.view_link is not None:
                a.view_link.refresh(a)
            i = a.interpreter
            if i is not owner:
                if not i.alive:
                    raise DeadWrapperError(a)
                owner = i if owner is None else upper(owner, i)
        elif (
            kind is not Tensor
            and kind not in WITHOUT_TENSORS
            and (known.tensor_lists or not isinstance(a, list | tuple))
        ):
            owner = scan(args, kwargs)[0]
            break
    else:
        if kwargs and any(type(a) not in WITHOUT_TENSORS for a in kwargs.values()):
            owner = scan(args, kwargs)[0]
    if watcher is not None and (owner is None or owner.level < watcher.level):
        owner = watcher
    if owner is None:
        return base(op, args, kwargs)
    if known.program and (not owner.whole or (SCOPES and op.scope is not scope_here())):
        # it has rules for operators alone, or not those that the program stands for
        return op.decompose(*args, send=sending(watcher))
    return owner.process(op, args, kwargs)


def sending(watcher: Interpreter | None) -> Callable[..., Any]:
    """``dispatch`` for the pieces of an operator, each of which ``watcher`` is asked about as about the whole."""
    return dispatch if watcher is None else partial(dispatch, watcher=watcher)


#: Types of arguments that are no tensors and hold none.
WITHOUT_TENSORS = frozenset(
    (int, float, bool, complex, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format)
)

SEQUENCES = (list, tuple)
NO_KWARGS: dict[str, Any] = {}  # where an operator has none


def scan(args: Iterable[Any], kwargs: dict[str, Any] = NO_KWARGS) -> tuple[Interpreter | None, bool]:
    """The interpreter of the top level among the wrappers in ``args``, and whether PyTorch's autograd follows one of
    the other tensors.

    Brings views up to date on the way, and refuses what a transform that has ended left behind, and tensors whose class
    the door has to take off.
    """
    owner: Interpreter | None = None
    recorded = False
    for a in (*args, *kwargs.values()) if kwargs else args:
        kind = type(a)
        if kind is Tensor:
            if a.requires_grad:
                recorded = True
        elif kind is WrapperTensor or kind is PendingWrapper:
            if a.view_link is not None:
                a.view_link.refresh(a)
            i = a.interpreter
            if i is not owner:
                if not i.alive:
                    raise DeadWrapperError(a)
                owner = i if owner is None else upper(owner, i)
        elif kind in WITHOUT_TENSORS:
            pass
        elif kind is Parameter:
            if a.requires_grad:
                recorded = True
        elif kind is list or kind is tuple or kind is dict:
            if kind is not dict and a and type(a[0]) is int:
                continue  # a size or the like
            i, inside = scan(a.values() if kind is dict else a)
            recorded = recorded or inside
            if i is not None:
                owner = i if owner is None else upper(owner, i)
        elif isinstance(a, Tensor):
            if keeps_class(kind):
                raise KeptClassMet
            if a.requires_grad:
                recorded = True
    return owner, recorded


def upper(one: Interpreter, other: Interpreter) -> Interpreter:
    """The one of the higher level."""
    if one.level == other.level and one is not other:
        refuse_same_level(one, other)
    return one if one.level > other.level else other


def base(op: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` as plain PyTorch. Autograd's key comes back only where autograd has something to record."""
    ordinary = True
    for a in args:
        kind = type(a)
        if kind is Tensor:
            if a.requires_grad:
                return base_recorded(op, args, kwargs)
        elif isinstance(a, Tensor):
            if a.requires_grad:
                return base_recorded(op, args, kwargs)
            ordinary = False  # a subclass would be asked by a torch function
        elif kind not in WITHOUT_TENSORS and not (kind in SEQUENCES and a and type(a[0]) is int) and scan((a,))[1]:
            return base_recorded(op, args, kwargs)
    if forward_ad._current_level >= 0 or (kwargs and scan(kwargs.values())[1]):
        return base_recorded(op, args, kwargs)
    if kwargs or not ordinary or function_mode_enabled():
        return op._op(*args, **kwargs)
    try:
        direct = op._functrans.direct
    except AttributeError:
        direct = op_info(op).direct
    return op._op(*args) if direct is None else direct(*args)


def base_recorded(op: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` as plain PyTorch with all that PyTorch itself records."""
    excluded, views_excluded = is_key_excluded(AUTOGRAD), is_key_excluded(VIEWS_AND_VERSIONS)
    hooks = top_packing(True)
    try:
        set_key_excluded(AUTOGRAD, False)
        set_key_excluded(VIEWS_AND_VERSIONS, False)
        set_key_excluded(ZERO_TENSOR, False)
        if hooks is not None:
            pack_as_outside()
        return op(*args, **kwargs)
    finally:
        set_key_excluded(AUTOGRAD, excluded)
        set_key_excluded(VIEWS_AND_VERSIONS, views_excluded)
        while hooks is not None and not same_hooks(top_packing(True), hooks):
            pop_packing()


def unwrap(
    interpreter: Interpreter, op: Operator, args: Any, kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any], dict[int, Any]]:
    """The arguments one level below ``interpreter``, and what it keeps on them, by their position in the schema.

    On a list of tensors that is a list, with None where there is nothing.
    """
    values: list[Any] = []
    carried: dict[int, Any] = {}
    for a in args:
        kind = type(a)
        if kind is WrapperTensor:
            # What it did not wrap is a constant to it, whatever it carries: this prevents perturbation confusion.
            if a.interpreter is interpreter:
                kept = a._carried
                if kept is not None:
                    carried[len(values)] = kept if type(kept) is not PendingWrapper else tensor_of(kept)
                value = a._value
                a = value if type(value) is not PendingWrapper else a.value  # which keeps the tensor
        elif (kind is list or kind is tuple) and a and type(a[0]) is not int:
            a, kept = unwrap_list(interpreter, a)
            if kept is not None:
                carried[len(values)] = kept
        values.append(a)
    if kwargs:
        below, _, found = unwrap(interpreter, op, kwargs.values(), NO_KWARGS)
        names, given = op_info(op).arguments, list(kwargs)
        carried.update((names.index(given[i]), kept) for i, kept in found.items())
        kwargs = dict(zip(kwargs, below, strict=True))
    return values, kwargs, carried


def unwrap_list(interpreter: Interpreter, items: Any) -> tuple[Any, list[Any] | None]:
    """The values of a list argument, and what ``interpreter`` keeps on each, if it keeps something on one."""
    values: list[Any] = []
    carried: list[Any] = []
    for a in items:
        kept = None
        if type(a) is WrapperTensor and a.interpreter is interpreter:
            kept = a._carried
            if type(kept) is PendingWrapper:
                kept = tensor_of(kept)
            a = a.value
        values.append(a)
        carried.append(kept)
    return values, carried if any(kept is not None for kept in carried) else None


def lower(interpreter: Interpreter, op: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` one level below ``interpreter``, on values of that level: a Python call, no trip through PyTorch."""
    if interpreter.on_base:
        return base(op, args, kwargs)
    below = interpreter.below
    if not interpreter.lowers_plainly:
        grad, forward = interpreter.outer_grad_mode, interpreter.outer_forward_mode
        if (torch.is_grad_enabled() and not grad) or (is_forward_enabled() and not forward):
            return lower_in_outer_modes(interpreter, op, args, kwargs)
        args, kwargs = entered(below, args, kwargs)
    if below is not None and op_info(op).random:
        return below.process(op, args, kwargs)  # every level decides whether its examples draw for themselves
    return dispatch(op, args, kwargs, None if below is None else below.watcher)


def entered(level: Interpreter | None, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments as code at ``level`` sees them: see NOTE [Branches] in interpreters/branch.py."""
    within = None if level is None else level.within
    if within is None:
        return args, kwargs
    return tuple([within.enter(a) for a in args]), {name: within.enter(a) for name, a in kwargs.items()}


def lower_in_outer_modes(interpreter: Interpreter, op: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
    """``lower`` with what was off when ``interpreter`` was entered off; see NOTE [Grad mode per level]."""
    grad, forward = torch.is_grad_enabled(), is_forward_enabled()
    try:
        set_grad_enabled(grad and interpreter.outer_grad_mode)
        set_forward_enabled(forward and interpreter.outer_forward_mode)
        return lower(interpreter, op, args, kwargs)
    finally:
        set_grad_enabled(grad)
        set_forward_enabled(forward)


def map_tensors(function: Any, out: Any) -> Any:
    """``function`` applied to every tensor of an operator's output; other values stay."""
    if isinstance(out, Tensor) or type(out) is PendingWrapper:
        return function(out)
    if isinstance(out, tuple | list):
        mapped = [map_tensors(function, o) for o in out]
        return mapped if type(out) is list else tuple(mapped)
    return out
