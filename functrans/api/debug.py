"""What is under a wrapper, for a look from a debugger: debug_unwrap."""

from __future__ import annotations

from torch import Tensor

from functrans.api.checks import check_kind
from functrans.core.tensor import WrapperTensor


def debug_unwrap(tensor: Tensor, *, recurse: bool = True) -> Tensor:
    """The tensor under a wrapper, for printing it while a transform runs.

    What a function computes of the result is not followed by the transform: its derivative is lost, and a batch is
    seen as one tensor.

    Args:
        tensor: any tensor; one that is no wrapper is returned as it is.
        recurse: go down to the plain tensor; else one level.

    Returns:
        The value one level down, or at the base: for vmap the whole batch.

    Example:
        >>> import torch
        >>> from functrans import debug_unwrap, vmap
        >>> def f(x):
        ...     print(x.shape, debug_unwrap(x))
        ...     return x
        >>> _ = vmap(f)(torch.tensor([1.0, 2.0]))
        torch.Size([]) tensor([1., 2.])
    """
    check_kind("debug_unwrap(tensor)", "tensor", tensor, Tensor, "a tensor")
    while type(tensor) is WrapperTensor:
        if tensor.view_link is not None and tensor.interpreter.alive:
            tensor.view_link.refresh(tensor)
        tensor = tensor.value
        if not recurse:
            break
    return tensor
