"""Operators of our own, for derivatives that PyTorch has no function for.

Each has an entry in the table, so that every order follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.pytorch.torch_private import OpOverload

LIBRARY = torch.library.Library("functrans", "FRAGMENT")


def own_operator(schema: str, *slopes: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], OpOverload]:
    """Decorator: a function of plain tensors as a pointwise operator ``functrans::...``.

    ``slopes``, called with the operator's arguments, are its derivatives by the first of them where no transform is
    involved; of others it does not depend smoothly.
    """

    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = ctx.saved_tensors
        found = [
            (grad * slope(*tensors, *ctx.numbers)).sum_to_size(x.shape) if needed else None
            for slope, x, needed in zip(slopes, tensors, ctx.needs_input_grad)
        ]
        return *found, *[None] * (len(tensors) + len(ctx.numbers) - len(found))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*[a for a in inputs if isinstance(a, Tensor)])  # the tensors come first
        ctx.numbers = [a for a in inputs if not isinstance(a, Tensor)]

    def fake(*args: Any) -> Tensor:
        tensors = [a for a in args if isinstance(a, Tensor)]
        dtype = torch.result_type(*tensors) if len(tensors) == 2 else tensors[0].dtype
        return tensors[0].new_empty(torch.broadcast_shapes(*[t.shape for t in tensors]), dtype=dtype)

    return lambda function: defined(schema, function, fake, backward, setup)


def own_matrix_operator(
    schema: str, pull: Callable[..., Any], fake: Callable[..., Tensor]
) -> Callable[[Callable[..., Tensor]], OpOverload]:
    """Decorator: a function of plain matrices as an operator ``functrans::...``.

    ``pull(grad, *arguments, result)`` gives the cotangents of the arguments where no transform is involved;
    ``fake(*arguments)`` a result without numbers.
    """

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output)

    return lambda function: defined(schema, function, fake, lambda ctx, grad: pull(grad, *ctx.saved_tensors), setup)


def defined(
    schema: str,
    function: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    backward: Callable[..., Any],
    setup: Callable[..., None],
) -> OpOverload:
    """The operator, known to PyTorch."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"functrans::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"functrans::{name}", backward, setup_context=setup, lib=LIBRARY)
    return getattr(torch.ops.functrans, name).default  # type: ignore[no-any-return]
