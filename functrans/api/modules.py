"""Helpers for modules: what torch.func has, with nothing of a transform in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call as call_with

from functrans.api.checks import check_flag, check_kind
from functrans.errors import CallError, CallTypeError, CallValueError
from functrans.errors.wording import shown, what
from functrans.pytorch.modules import BatchNormModule, keep_parametrizations, kept_parametrizations

__all__ = ["functional_call", "replace_all_batch_norm_modules_", "stack_module_state"]

Tensors = dict[str, Tensor]


def functional_call(
    module: nn.Module,
    parameter_and_buffer_dicts: Tensors | Sequence[Tensors],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call ``module`` with other parameters and buffers than its own: that of torch.func, with checks of what is given.

    Args:
        module: the module to call; afterwards it is as it was.
        parameter_and_buffer_dicts: tensors by name, as in ``named_parameters()``; or several such dicts, with distinct
            names.
        args: the positional arguments, a tuple (or the only one).
        kwargs: the keyword arguments.
        tie_weights: parameters that are one tensor in ``module`` stay one; different values for them are an error.
        strict: the names are exactly the module's; else its own tensors stand in for missing ones, and names it lacks
            are ignored.

    Raises:
        CallError: something given is not what is described above.

    Example:
        >>> import torch
        >>> from functrans import functional_call, grad
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> grad(lambda w: functional_call(layer, {"weight": w}, torch.tensor([3.0, 4.0])).sum())(torch.zeros(1, 2))
        tensor([[3., 4.]])
    """
    if type(tie_weights) is not bool or type(strict) is not bool:
        check_flag("functional_call(...)", "tie_weights", tie_weights)
        check_flag("functional_call(...)", "strict", strict)
    own = tensors_of_shared(module) if isinstance(module, nn.Module) else []
    if own and not tie_weights:
        check_one_value_each(module, parameter_and_buffer_dicts)
    computed = kept_parametrizations()  # of the module's own parameters
    try:
        if computed is not None:
            keep_parametrizations({})
        return call_with(
            module, parameter_and_buffer_dicts, args, kwargs, tie_weights=tie_weights, strict=strict
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        check_functional_call(module, parameter_and_buffer_dicts, kwargs, strict)
        raise
    finally:
        if computed is not None:
            keep_parametrizations(computed)
        given = {id(x) for d in dicts_in(parameter_and_buffer_dicts) for x in d.values()} if own else ()
        for part, name, tensor in own:
            if id(getattr(part, name)) in given:
                setattr(part, name, tensor)


def check_one_value_each(module: nn.Module, dicts: Any) -> None:
    """Refuse two values for what is one place of the module under two names: the last would win."""
    values: dict[tuple[int, str], Any] = {}
    for name, value in (item for d in dicts_in(dicts) for item in d.items()):
        path, _, last = name.rpartition(".")
        try:
            place = id(module.get_submodule(path)), last
        except AttributeError:
            continue  # no name of this module's
        if values.setdefault(place, value) is not value:
            call = f"functional_call({type(module).__name__}, ...)"
            raise CallValueError(call, f"another tensor for {shown(name)} than for the same module's other name", "one")


def dicts_in(given: Any) -> Sequence[Any]:
    return [given] if isinstance(given, dict) else given


def tensors_of_shared(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Parameters and buffers of the modules that are in ``module`` under several names.

    PyTorch exchanges these once for each name, and takes what came first for the module's own afterwards.
    """
    parts = [part for _, part in module.named_modules(remove_duplicate=False)]
    if len(parts) == len(set(parts)):
        return []
    return [
        (part, name, tensor)
        for part in {part for part in parts if parts.count(part) > 1}
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    ]


def check_functional_call(module: Any, dicts: Any, kwargs: Any, strict: Any) -> None:
    """Find what is wrong with a call that failed: nothing, if the module's own code raised the error."""
    call = f"functional_call({shown(module)}, ...)"
    check_kind(call, "module", module, nn.Module, "a torch.nn.Module", "A function needs no functional_call.")
    call = f"functional_call({type(module).__name__}, ...)"
    expected = "a dict of tensors by name, or several such dicts"
    if not isinstance(dicts, dict):
        if not isinstance(dicts, Sequence) or isinstance(dicts, str | bytes):
            raise CallValueError(call, f"{what(dicts)} as parameter_and_buffer_dicts", expected)
        for i, d in enumerate(dicts):
            if not isinstance(d, dict):
                raise CallValueError(call, f"{what(d)} as parameter_and_buffer_dicts[{i}]", expected)
    tensors: dict[Any, Any] = {}
    for d in dicts_in(dicts):
        for name, value in d.items():
            if name in tensors:
                raise CallValueError(call, f"{shown(name)} in more than one dict", "distinct names")
            check_replacement(call, module, name, value)
            tensors[name] = value
    if kwargs is not None:
        cure = ""
        if isinstance(kwargs, Tensor):
            cure = "Put several positional arguments in a tuple: functional_call(module, tensors, (x, y))."
        check_kind(call, "kwargs", kwargs, Mapping, "a dict of keyword arguments, or None", cure)
        for name in kwargs:
            check_kind(call, "key of kwargs", name, str, "the name of an argument")
    own = {
        name
        for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, _ in named
    }
    if strict and (missing := own - tensors.keys() or tensors.keys() - own):
        which = "no tensor" if own - tensors.keys() else "a tensor"
        raise CallError(
            call,
            f"{which} for {', '.join(map(shown, sorted(missing)[:5]))}",
            "the module's parameters and buffers, since strict=True",
        )


def check_replacement(call: str, module: nn.Module, name: Any, value: Any) -> None:
    check_kind(call, "name of a parameter or buffer", name, str, "a string, as in named_parameters()")
    if value is not None:
        check_kind(call, shown(name), value, Tensor, "a tensor")
    *path, last = name.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part, None)
    if not isinstance(owner, nn.Module) or not last or not isinstance(getattr(owner, last, None), Tensor | None):
        raise CallTypeError(
            call, f"the name {shown(name)}, which is no parameter or buffer", "a name as in named_parameters()"
        )


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
    if not isinstance(models, Sequence) or isinstance(models, str | bytes):
        cure = "Write [model] for a single one." if isinstance(models, nn.Module) else ""
        check_kind(call, "models", models, nn.ModuleList | nn.Sequential, "a list of modules", cure)
    if len(models) == 0:
        raise CallError(call, "no models", "at least one")
    for i, m in enumerate(models):
        check_kind(call, f"models[{i}]", m, nn.Module, "a torch.nn.Module")
    first = tensors_of(models[0])
    for i, m in enumerate(models):
        if type(m) is not type(models[0]):
            raise CallError(call, f"{what(m)} as models[{i}]", f"{what(models[0])}, as models[0] is")
        if m.training != models[0].training:
            raise CallError(
                call,
                f"models[{i}] in {mode(m)} mode",
                f"{mode(models[0])} mode, as models[0]",
                "Call .train() or .eval() on all of them.",
            )
        own = tensors_of(m)
        for name in [*first, *own]:
            if name not in own or name not in first:
                has, lacks = (0, i) if name in first else (i, 0)
                raise CallError(
                    call,
                    f"models[{lacks}] without {name!r}, which models[{has}] has",
                    "the same parameters and buffers in all models",
                )
            check_alike(call, f"models[{i}].{name}", own[name], f"models[0].{name}", first[name])
    params = {
        name: _stack([dict(m.named_parameters())[name] for m in models]) for name, _ in models[0].named_parameters()
    }
    buffers = {
        name: _stack([dict(m.named_buffers())[name] for m in models], buffer=True)
        for name, _ in models[0].named_buffers()
    }
    return params, buffers


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def mode(module: nn.Module) -> str:
    return "training" if module.training else "evaluation"


def check_alike(call: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """A tensor of one model can be stacked with its counterpart of the first."""
    for attribute in ("shape", "device", "requires_grad"):
        ours, theirs = getattr(x, attribute), getattr(first, attribute)
        if ours != theirs:
            ours, theirs = (tuple(ours), tuple(theirs)) if attribute == "shape" else (ours, theirs)
            raise CallError(call, f"{attribute} {ours} of {name}", f"{theirs}, as of {first_name}")


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
    check_kind("replace_all_batch_norm_modules_(root)", "root", root, nn.Module, "a torch.nn.Module")
    for module in root.modules():
        if isinstance(module, BatchNormModule) and module.track_running_stats:
            module.running_mean = None
            module.running_var = None
            module.num_batches_tracked = None
            module.track_running_stats = False
    return root
