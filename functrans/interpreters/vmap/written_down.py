"""Batching rules that were run once, written down as straight-line Python.

A rule is ordinary code: it looks at shapes, folds the batch in here and takes it out there, and calls PyTorch. All that
it may look at is in the look of a call (seen_calls.py), so that calls of one look make the same calls of PyTorch. One
such call is run under a mode that sees them, and what it saw is compiled; later calls run that.

NOTE [What is written down]
The library's own rules, where they run at the base. A rule is left as it is if it reads anything that the look does not
say (a number, a device, an address, how memory lies that a kernel laid out), if it uses a tensor that the call does not
hand over, or if two arguments of the call are one tensor, since it does not show which of them was meant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functrans.interpreters.vmap.seen_calls import SeenCall
from functrans.operators.schemas import direct_call
from functrans.operators.scripts import Script, Unwritable
from functrans.pytorch.torch_private import EnableTorchFunction, OpOverload, function_mode_enabled

#: What a rule may ask of every tensor, and what of the call's own alone.
METADATA = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "layout", "ndim", "is_sparse")
) | {
    Tensor.dim, Tensor.ndimension, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex,
}  # fmt: skip
OF_ARGUMENTS = frozenset((Tensor.stride, Tensor.is_contiguous))


class Writer(TorchFunctionMode):
    """Sees the calls of PyTorch that a rule makes on the values of a call, and writes them down."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()
        self.script = Script(values)
        self.refused = self.script.ambiguous

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in METADATA or (func in OF_ARGUMENTS and self.script.is_given(args[0])):
            return out
        if not self.refused:
            try:
                self.write(func, args, kwargs or {}, out)
            except Unwritable:
                self.refused = True
        return out

    def write(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        script = self.script
        used: list[str] = []
        texts = [script.text(a, used) for a in args]
        texts += [f"{name}={script.text(a, used)}" for name, a in kwargs.items()]
        function = (direct_call(func) if isinstance(func, OpOverload) and not kwargs else None) or func
        script.write(f"{script.constant(getattr(function, '_op', function))}({', '.join(texts)})", used, out)

    def compiled(self, result: Any) -> Callable[..., Any] | bool:
        """The function of the call's values that does what was seen, and returns what the rule returned; or False."""
        try:
            return not self.refused and self.script.compiled(result)
        except Unwritable:
            return False


def run_and_write(
    seen: dict[Any, SeenCall], look: Any, rule: Callable[..., Any], info: Any, dims: list[Any], *values: Any
) -> Any:
    """What ``rule`` returns for a seen call; the later ones of that look run what is written down."""
    if function_mode_enabled():
        return rule(info, dims, *values)
    given = tuple(dims)  # the rule may write to the list
    script: Any = False
    if not getattr(rule, "__module__", "").startswith("functrans."):
        result = rule(info, dims, *values)
    else:
        with EnableTorchFunction(), Writer(values) as writer:  # PyTorch's way here may have switched it off
            result = rule(info, dims, *values)
        script = writer.compiled(result)
    seen[look] = SeenCall(given, script=script)
    return result
