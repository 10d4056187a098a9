"""Private names of PyTorch around operators that take functions; NOTE [Control flow] says what they come to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from functrans.pytorch.torch_private import mode_kinds, private

TRACING_MODES = (mode_kinds.PROXY, mode_kinds.FAKE, mode_kinds.FUNCTIONAL)
FakeTensor: Any = private("torch._subclasses.fake_tensor.FakeTensor", "to know whether a truth value can be read")
associative_module: Any = private("torch._higher_order_ops.associative_scan", "to scan by a function of one pair")
private("torch._higher_order_ops.associative_scan.generic_associative_scan", "to scan by a function of one pair")
FLEX_ATTENTION = "torch.nn.attention.flex_attention"


def replace_in_flex_attention(make: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Let ``make`` of it stand for the check of devices in front of flex_attention, which has been imported."""
    check = private(FLEX_ATTENTION + "._validate_device", "to have derivatives of flex_attention on the CPU")
    private(FLEX_ATTENTION, "to have derivatives of flex_attention on the CPU")._validate_device = make(check)


def kept_by(function: Callable[..., Any], name: str) -> Any:
    """What ``while_loop`` or ``associative_scan`` keeps in the function that it calls its operator with, by the name
    that it has there: a tree structure, the user's function. None: the function is somebody else's."""
    if isinstance(function, functools.partial):
        return function.keywords.get(name)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None  # type: ignore[index]
