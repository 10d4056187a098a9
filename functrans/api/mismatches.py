"""Tangents and cotangents that are not like what they belong to: which call, what came, and how to convert it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from functrans.api.arguments import argument_cure
from functrans.api.linear_functions import Like
from functrans.api.structures import path_of
from functrans.errors import Call, CallError, CallTypeError
from functrans.errors.wording import what


def refuse_tangent(call: Call | str, p: Tensor | Like, t: Any, place: int, primals: Any) -> None:
    path, primal = path_of("tangents", primals, place), path_of("primals", primals, place)
    if not isinstance(t, Tensor):
        cure = argument_cure(t)
        if t is None or isinstance(t, int | float) and t == 0:
            cure = f"Pass torch.zeros_like({primal})."
        elif isinstance(t, int | float):
            cure = f"Pass torch.full_like({primal}, {t})."
        raise CallError(call, f"{what(t)} as {path}", "a tensor", cure)
    if p.shape != t.shape:
        raise CallError(call, f"{what(t)} as {path}", f"the shape {tuple(p.shape)} of {primal}")
    refuse_device(call, t, path, p, f"the device of {primal}, {p.device}")
    refuse_dtype(call, t, path, f"the dtype {p.dtype} of {primal}", f"Convert it with .to({p.dtype}).")


def refuse_cotangent(call: str, c: Any, path: str, output: Like) -> None:
    if not isinstance(c, Tensor):
        cure = "Pass zeros where there is none." if c is None else argument_cure(c) if output.dim() == 0 else ""
        raise CallTypeError(call, f"{what(c)} as {path}", f"a tensor of the output's shape {tuple(output.shape)}", cure)
    if c.shape != output.shape:
        raise CallError(call, f"{what(c)} as {path}", f"the output's shape {tuple(output.shape)}")
    refuse_device(call, c, path, output, f"the output's device, {output.device}")
    cure = "Pass its .real: a real output has a real cotangent." if c.is_complex() else ""
    refuse_dtype(call, c, path, f"the output's dtype {output.dtype}", cure)


def refuse_device(call: Call | str, x: Tensor, path: str, like: Tensor | Like, expected: str) -> None:
    if x.device != like.device:
        cure = f"Move it with .to({str(like.device)!r})."
        raise CallError(call, f"a tensor on {x.device} as {path}", expected, cure)


def refuse_dtype(call: Call | str, x: Tensor, path: str, expected: str, cure: str) -> NoReturn:
    raise CallError(call, f"a tensor of dtype {x.dtype} as {path}", expected, cure)


def convertible(c: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cotangent can stand for one of the output's ``dtype``: all but a complex one for a real output."""
    return not c.is_quantized and (dtype.is_complex or not c.is_complex())
