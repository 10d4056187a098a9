"""Helpers for modules: what torch.func has, with nothing of a transform in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from functrans.errors import CallError

__all__ = ["functional_call", "replace_all_batch_norm_modules_", "stack_module_state"]


def stack_module_state(models: Sequence[nn.Module]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and buffers of several models of one architecture, stacked, for an ensemble under vmap.

    Args:
        models: modules of the same class, all in training or all in evaluation mode.

    Returns:
        ``(params, buffers)``: dicts from names to tensors of shape ``(len(models), ...)``. Outside of transforms, the
        parameters are leaves that require grad where the models' do.

    Raises:
        CallError: there is no model, or they differ in class, mode, or in which parameters require grad.

    Example:
        >>> import torch
        >>> from functrans import functional_call, stack_module_state, vmap
        >>> models = [torch.nn.Linear(2, 3) for _ in range(4)]
        >>> params, buffers = stack_module_state(models)
        >>> out = vmap(lambda p, x: functional_call(models[0], p, (x,)), in_dims=(0, None))(params, torch.ones(2))
        >>> out.shape
        torch.Size([4, 3])
    """
    call = "stack_module_state(models)"
    if len(models) == 0:
        raise CallError(call, "no models", "at least one")
    kinds = {type(m).__name__ for m in models}
    if len({type(m) for m in models}) > 1:
        raise CallError(call, f"models of classes {sorted(kinds)}", "one class")
    if any(m.training != models[0].training for m in models):
        raise CallError(call, "models in training and in evaluation mode", "one mode", "Call .train() or .eval() on all of them.")
    names = [{name for named in (m.named_parameters(), m.named_buffers()) for name, _ in named} for m in models]
    for own in names[1:]:
        if own != names[0]:
            raise CallError(call, f"models of which some have {sorted(own ^ names[0])} and some do not", "the same parameters and buffers in all models")
    for name, p in models[0].named_parameters():
        if any(dict(m.named_parameters())[name].requires_grad != p.requires_grad for m in models):
            raise CallError(call, f"models of which some freeze {name} and some do not", "the same requires_grad in all models")
    params = {
        name: _stack([dict(m.named_parameters())[name] for m in models]) for name, _ in models[0].named_parameters()
    }
    buffers = {name: _stack([dict(m.named_buffers())[name] for m in models], buffer=True) for name, _ in models[0].named_buffers()}
    return params, buffers


def _stack(tensors: list[Tensor], buffer: bool = False) -> Tensor:
    stacked = torch.stack(tensors)
    if type(stacked) is not Tensor or buffer:  # inside a transform the stack is a value like any other
        return stacked
    return stacked.detach().requires_grad_(tensors[0].requires_grad)


def replace_all_batch_norm_modules_(root: nn.Module) -> nn.Module:
    """Let every batch norm in ``root`` use the statistics of its batch only, and keep no running ones; in place.

    Batch norm in training mode writes its running statistics, which under vmap would hold another value for each
    example (see NOTE [What may be written]).

    Args:
        root: a module.

    Returns:
        ``root``.

    Example:
        >>> import torch
        >>> from functrans import replace_all_batch_norm_modules_
        >>> net = replace_all_batch_norm_modules_(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
        >>> net[0].running_mean is None
        True
    """
    for module in root.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.running_mean = None
            module.running_var = None
            module.num_batches_tracked = None
            module.track_running_stats = False
    return root
