"""rearrange: dimensions permuted, split and joined, as a pattern says."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.errors import CallTypeError, CallValueError
from functrans.errors.wording import shown, what

ELLIPSIS = "..."
TOKEN = re.compile(r"\.\.\.|[()]|\w+|\S")
#: A dimension: the names of the axes that it is made of, none for a dimension of size 1.
Group = list[str]


def rearrange(tensor: Tensor | Sequence[Tensor], pattern: str, **axes_lengths: int) -> Tensor:
    """``tensor`` with its dimensions permuted, split and joined, as in einops.

    Args:
        tensor: a tensor of any dtype; a list or tuple of tensors of one shape is stacked first, along a new first
            dimension.
        pattern: ``"left -> right"``; each side names the dimensions in their order. ``(a b)`` is one dimension made of
            two axes, of which ``b`` is the inner one; ``1`` or ``()`` is a dimension of size 1; ``...`` stands for any
            dimensions. Both sides have the same names.
        **axes_lengths: the sizes of axes that are not known otherwise; in a dimension that is split one may be left
            out.

    Returns:
        A tensor of the same elements; a view where that is possible.

    Raises:
        CallValueError: the pattern is not one, or does not fit the tensor's shape.

    Example:
        >>> import torch
        >>> from functrans import rearrange
        >>> images = torch.zeros(32, 30, 40, 3)
        >>> rearrange(images, "b h w c -> b c h w").shape
        torch.Size([32, 3, 30, 40])
        >>> rearrange(images, "b (h1 h) (w1 w) c -> (b h1 w1) h w c", h1=2, w1=2).shape
        torch.Size([128, 15, 20, 3])
    """
    call = "rearrange(...)"
    if not is_dynamo_compiling():  # which does not trace all of this
        lengths = [f"{name}={shown(length)}" for name, length in axes_lengths.items()]
        call = f"rearrange(tensor, {', '.join([shown(pattern), *lengths])})"
    if not isinstance(pattern, str):
        raise CallTypeError(call, f"{what(pattern)} as pattern", "a string such as 'b h w c -> b c h w'")
    for name, length in axes_lengths.items():
        if type(length) is not int:
            raise CallTypeError(call, f"{what(length)} as size of {name!r}", "an int")
        if length < 0:
            raise CallValueError(call, f"{name}={length}", "a size that is not negative")
    parts: list[Any] = list(tensor) if isinstance(tensor, list | tuple) else [tensor]
    if not parts or not all(isinstance(t, Tensor) for t in parts):
        raise CallTypeError(call, f"{what(tensor)} as tensor", "a tensor, or a list of tensors")
    if any(t.is_nested or t.layout is not torch.strided for t in parts):
        cure = "Call to_dense() on it first."
        raise CallValueError(call, "a nested or sparse tensor as tensor", "a dense one", cure)
    x: Tensor = parts[0]
    if x is not tensor:
        shapes = sorted({tuple(t.shape) for t in parts})
        if len(shapes) > 1:
            raise CallValueError(call, f"tensors of shapes {', '.join(map(str, shapes))}", "tensors of one shape")
        x = torch.stack(parts)
    left, right = named(call, *sides(call, pattern, axes_lengths), x)
    if len(left) != x.dim():
        got = f"{len(left)} dimensions in the pattern for a tensor of shape {tuple(x.shape)}"
        raise CallValueError(call, got, f"{x.dim()}", "'...' stands for dimensions that are not named.")
    sizes: dict[str, int] = dict(axes_lengths)
    for size, group in zip(x.shape, left, strict=True):
        find_sizes(call, group, size, sizes)
    axes = [name for group in left for name in group]
    order = [axes.index(name) for group in right for name in group]
    split = x.reshape([sizes[name] for name in axes])
    return split.permute(order).reshape([math.prod([sizes[name] for name in group]) for group in right])


def sides(call: str, pattern: str, axes_lengths: dict[str, int]) -> tuple[list[Group | None], list[Group | None]]:
    """Both sides of a pattern, checked against each other."""
    parts = pattern.split("->")
    if len(parts) != 2:
        raise CallValueError(call, f"a pattern with {len(parts) - 1} '->'", "one, between both sides")
    left, right = (groups(call, part) for part in parts)
    here, there = (
        {name for group in side for name in ([ELLIPSIS] if group is None else group)} for side in (left, right)
    )
    alone = sorted(here ^ there)
    if alone:
        names = ", ".join(map(repr, alone))
        raise CallValueError(call, f"{names} on one side of the pattern", "the same names on both sides")
    unknown = sorted(axes_lengths.keys() - here)
    if unknown:
        raise CallValueError(call, f"a size for {', '.join(map(repr, unknown))}", "names of the pattern")
    if any(ELLIPSIS in (group or ()) for group in left):
        raise CallValueError(call, "'...' in parentheses on the left side", "it outside of parentheses there")
    return left, right


def groups(call: str, side: str) -> list[Group | None]:
    """The dimensions that one side of a pattern names; None for those that '...' stands for."""
    found: list[Group | None] = []
    inside = False
    for token in TOKEN.findall(side):
        if token in "()":
            if inside is (token == "("):
                raise CallValueError(
                    call, f"parentheses that do not match in {side.strip()!r}", "pairs that are not nested"
                )
            inside = not inside
            if inside:
                found.append([])
        elif token == "1":
            found += [] if inside else [[]]
        elif token != ELLIPSIS and (not token.isidentifier() or token.startswith("_") or token.endswith("_")):
            cure = "Give the size by name: (h h2), h2=2." if token.isdecimal() else ""
            expected = "names, '1', '...' and parentheses; a name neither begins nor ends with an underscore"
            raise CallValueError(call, f"{token!r} in the pattern", expected, cure)
        elif any(token in ([ELLIPSIS] if group is None else group) for group in found):
            raise CallValueError(call, f"{token!r} twice in {side.strip()!r}", "every name once on each side")
        elif inside:
            found[-1].append(token)  # type: ignore[union-attr]
        else:
            found.append(None if token == ELLIPSIS else [token])
    if inside:
        raise CallValueError(call, f"parentheses that do not match in {side.strip()!r}", "pairs that are not nested")
    return found


def named(call: str, left: list[Group | None], right: list[Group | None], tensor: Tensor) -> list[list[Group]]:
    """Both sides with names in the place of '...', which no user can write."""
    count = tensor.dim() - (len(left) - 1)
    if None in left and count < 0:
        got = f"{len(left) - 1} dimensions beside '...' for a tensor of shape {tuple(tensor.shape)}"
        raise CallValueError(call, got, f"at most {tensor.dim()}")
    names = [f"...{i}" for i in range(count)]
    found: list[list[Group]] = []
    for side in (left, right):
        found.append([])
        for group in side:
            if group is None:
                found[-1] += [[name] for name in names]
            else:
                found[-1].append([n for name in group for n in (names if name == ELLIPSIS else [name])])
    return found


def find_sizes(call: str, group: Group, size: int, sizes: dict[str, int]) -> None:
    """Add the sizes of the axes that a dimension of ``size`` is made of."""
    missing = [name for name in group if name not in sizes]
    known = math.prod([sizes[name] for name in group if name in sizes])
    dimension = group[0] if len(group) == 1 else f"({' '.join(group)})"
    if len(missing) > 1:
        names = " and ".join(map(repr, missing))
        raise CallValueError(call, f"no sizes for {names} in {dimension}", "all but one", f"Pass {missing[0]}=... .")
    if missing and known and size % known == 0:
        sizes[missing[0]] = size // known
    elif missing or known != size:
        wanted = f"a multiple of {known}" if missing and known else f"size {known}" if not missing else "sizes above 0"
        raise CallValueError(call, f"size {size} for the dimension {dimension if group else '1'}", wanted)
