"""Private names of PyTorch around modules and their hooks."""

from __future__ import annotations

import sys
from typing import Any

from functrans.pytorch.torch_private import private

BatchNormModule: Any = private("torch.nn.modules.batchnorm._BatchNorm", "to find batch norms among modules")
_parametrize: Any = private("torch.nn.utils.parametrize", "to know parametrize.cached()")
ModuleHook = private("torch.nn.modules._functions.BackwardHookFunction", "to have backward hooks of modules run")
_FOR_HOOKS = "to have hooks on several gradients, and what follows modules by them, run inside of transforms"
MultiHandle: Any = private("torch.autograd.graph._MultiHandle", _FOR_HOOKS)
graph_task: Any = private("torch._C._current_graph_task_id", _FOR_HOOKS)
private("torch.utils.module_tracker.ModuleTracker._maybe_set_engine_callback", _FOR_HOOKS)
ENGINE_CALLBACK = "_maybe_set_engine_callback"


def trackers() -> list[type[Any]]:
    """The classes of trackers of modules that are imported by now."""
    names = ("torch.utils.module_tracker", "ModuleTracker"), ("torch.distributed._tools.mod_tracker", "ModTracker")
    return [getattr(sys.modules[module], name) for module, name in names if module in sys.modules]


def forward_class(node: Any) -> Any:
    """The autograd.Function that ``node``, a ``grad_fn``, is of; None for another."""
    return getattr(node, "_forward_cls", None)


_FOR_CACHED = "to keep parametrize.cached() to parameters that are still those it saw"
private("torch.nn.utils.parametrize._cache", _FOR_CACHED)
private("torch.nn.utils.parametrize._cache_enabled", _FOR_CACHED)


def kept_parametrizations() -> dict[Any, Any] | None:
    """Where ``parametrize.cached()`` keeps what it computes; None outside of it."""
    return _parametrize._cache if _parametrize._cache_enabled else None


def keep_parametrizations(kept: dict[Any, Any]) -> None:
    """Let ``parametrize.cached()`` keep what it computes in ``kept``."""
    _parametrize._cache = kept
