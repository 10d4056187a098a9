"""``debug_print``: a line for each example."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from functrans.api.checks import check_kind
from functrans.core.tensor import WrapperTensor
from functrans.errors import CallValueError
from functrans.explanation.looking import unseen
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import running_at


def debug_print(template: str = "", /, *values: Any, **named: Any) -> None:
    """Print values from inside transforms: under vmap a line for each example.

    A line says which example it is of, by the name of the batch (``axis_name``) or the function of each vmap that the
    values differ under, outermost first. Under grad and jvp the value itself is printed. What is printed has no
    derivative, and printing changes none.

    Args:
        template: a format string, such as ``"x is {} and y is {y:.3f}"``; tensors without dimensions take format
            specifications as numbers do. Empty: the values are printed by name.
        *values: what ``{}`` stands for; tensors are those of one example.
        **named: what ``{name}`` stands for.

    Raises:
        CallValueError: the values do not fit the template.

    Example:
        >>> import torch
        >>> from functrans import debug_print, grad, vmap
        >>> def loss(w, x):
        ...     y = w * x
        ...     debug_print("w {w:.1f}, y {y:.1f}", w=w, y=y)
        ...     debug_print(x=x)
        ...     return y.sin()
        >>> _ = vmap(grad(loss), in_dims=(None, 0))(torch.tensor(2.0), torch.tensor([1.0, 3.0]))
        vmap(loss)[0]: w 2.0, y 2.0
        vmap(loss)[1]: w 2.0, y 6.0
        vmap(loss)[0]: x=1.0
        vmap(loss)[1]: x=3.0
    """
    check_kind("debug_print(template, ...)", "template", template, str, "a format string")
    text = template or ", ".join([*["{}"] * len(values), *(f"{name}={{{name}}}" for name in named)])
    batches: dict[VmapInterpreter, None] = {}
    for x in (*values, *named.values()):
        batches.update(dict.fromkeys(batches_of(x)))
    levels = sorted(batches, key=lambda i: i.level)
    for example in itertools.product(*[range(level.batch_size) for level in levels]):
        at = dict(zip(levels, example, strict=True))
        where = " ".join(f"{name_of(level)}[{i}]" for level, i in at.items())
        print(f"{where}: " * bool(where) + formatted(text, values, named, at))


def batches_of(x: Any) -> list[VmapInterpreter]:
    """The vmaps that ``x`` is batched under."""
    found = []
    while type(x) is WrapperTensor:
        if x.view_link is not None and x.interpreter.alive:
            x.view_link.refresh(x)
        if isinstance(x.interpreter, VmapInterpreter) and x.bdim is not None:
            found.append(x.interpreter)
        x = x.value
    return found


def of_example(x: Any, at: dict[Any, int]) -> Any:
    """What ``x`` is for one example, as a plain tensor."""
    if type(x) is not WrapperTensor:
        return x.detach() if isinstance(x, Tensor) else x
    below = of_example(x.value, at)
    bdim = x.bdim if x.interpreter in at else None
    return below if bdim is None else below.select(bdim, at[x.interpreter])


def name_of(level: VmapInterpreter) -> str:
    return level.name if level.axis_name is None else str(level.axis_name)


def formatted(template: str, values: tuple[Any, ...], named: dict[str, Any], at: dict[Any, int]) -> str:
    """The template with the values of one example."""
    plain = all(is_plain(x) for x in (*values, *named.values()))
    with running_at(None), unseen() if plain else torch.no_grad():  # other classes print themselves by operators
        given = [of_example(x, at) for x in values], {name: of_example(x, at) for name, x in named.items()}
        try:
            return template.format(*given[0], **given[1])
        except (IndexError, KeyError, ValueError, TypeError) as error:
            got = f"the template {template!r} with {len(values)} values and the names {list(named)}"
            raise CallValueError("debug_print(template, ...)", got, f"values that fit ({error})") from None


def is_plain(x: Any) -> bool:
    """Whether ``x`` is no tensor, or one that PyTorch itself can print."""
    while type(x) is WrapperTensor:
        x = x.value
    return not isinstance(x, Tensor) or type(x) in (Tensor, Parameter)
