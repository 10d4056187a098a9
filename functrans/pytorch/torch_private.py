"""The private names of PyTorch that all of functrans uses, each with what it is for.

Those of one part of PyTorch stand beside this module: ``control_flow``, ``distributed``, ``dynamo``, ``export``,
``modules``, ``torch_func``. Another PyTorch may have moved one: ``private`` then says which, at import. Nothing outside
of this room names one (tests/test_torch_private.py), except for the attributes below that are read off objects where
they are used.
"""

from __future__ import annotations

import pkgutil
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from functrans.pytorch.versions import TorchMovedError


def private(name: str, purpose: str) -> Any:
    """What stands in PyTorch under the dotted ``name``.

    Args:
        name: such as ``"torch._C._set_grad_enabled"``.
        purpose: what functrans needs it for, as it would end the sentence "functrans needs it ...".

    Raises:
        TorchMovedError: the installed PyTorch has no such name.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise TorchMovedError(name, purpose) from error


# Types, and the modules that are imported for what they do.
if TYPE_CHECKING:
    from torch._ops import HigherOrderOperator, OpOverload
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    HigherOrderOperator = private("torch._ops.HigherOrderOperator", "to know operators that take functions")
    OpOverload = private("torch._ops.OpOverload", "to know operators, which are the keys of all rules")
    TorchDispatchMode = private(
        "torch.utils._python_dispatch.TorchDispatchMode", "to see operators that have no wrapper among their arguments"
    )
private("torch.utils._cxx_pytree", "to have PyTorch's node types known to optree")

is_key_excluded = private(
    "torch._C._dispatch_tls_is_dispatch_key_excluded",
    "to find whether a thread skips a dispatch key, which may be put back",
)
set_key_excluded = private(
    "torch._C._dispatch_tls_set_dispatch_key_excluded", "to stand in front of autograd, whose dispatch key it excludes"
)
_KEY = "torch._C.DispatchKey."
AUTOGRAD = private(_KEY + "AutogradFunctionality", "to switch autograd off and on as a whole")
VIEWS_AND_VERSIONS = private(
    _KEY + "ADInplaceOrView", "to switch view tracking and version counters together with autograd"
)
CONJUGATE = private(_KEY + "Conjugate", "to have a lazy conj() of base tensors computed while a handler runs")
NEGATIVE = private(_KEY + "Negative", "to have a lazy .imag of base tensors computed while a handler runs")
ZERO_TENSOR = private(_KEY + "ZeroTensor", "to have forward AD of base tensors in order")
PYTHON = private(_KEY + "Python", "to see that PyTorch is reading the elements of torch.tensor([...])")
COMPOSITE = private(_KEY + "CompositeImplicitAutograd", "to know which operators are made of others")
# NOTE [Scalar indices] says how.
INDEX_BATCHED = private("torch._C._dispatch_key_parse", "to make a dispatch key of its name")("BatchedNestedTensor")
INDEX_BATCHED_KEYS = private("torch._C.DispatchKeySet", "to tell PyTorch's indexing not to read a number")(
    INDEX_BATCHED
)
PRE_DISPATCH = private(_KEY + "PreDispatch", "to know whether torch.export is tracing in front of autograd")
is_key_included = private(
    "torch._C._dispatch_tls_is_dispatch_key_included", "to know whether torch.export is tracing in front of autograd"
)

# Entering a TorchDispatchMode through its context manager costs several microseconds.
mode_stack_size = private("torch._C._len_torch_dispatch_stack", "to know whether a mode was entered after its own")
mode_at = private("torch._C._get_dispatch_stack_at", "to put the modes back as they were")
push_mode = private("torch._C._push_on_torch_dispatch_stack", "to enter its mode")
pop_mode = private("torch._C._pop_torch_dispatch_stack", "to leave its mode")
mode_of_kind = private("torch._C._get_dispatch_mode", "to know whether what happens at the base is traced")
mode_kinds = private("torch._C._TorchDispatchModeKey", "to know the modes that trace")
set_eval_frame: Any = private("torch._C._dynamo.eval_frame.set_eval_frame", "to run transforms untraced")

set_grad_enabled = private("torch._C._set_grad_enabled", "to set the grad mode without the cost of a context manager")
is_forward_enabled = private("torch._C._is_fwd_grad_enabled", "to let forward mode follow forward AD's own switch")
set_forward_enabled = private("torch._C._set_fwd_grad_enabled", "to give every level a forward-mode switch of its own")

# Formulas are traced by objects with a __torch_function__, whatever the caller's state.
EnableTorchFunction = private(
    "torch._C._EnableTorchFunction", "to trace formulas where the caller has switched __torch_function__ off"
)
function_mode_stack_size = private(
    "torch._C._len_torch_function_stack", "to take function modes off while it traces formulas"
)
push_function_mode = private(
    "torch._C._push_on_torch_function_stack", "to put function modes back after it traced formulas"
)
pop_function_mode = private("torch._C._pop_torch_function_stack", "to take function modes off while it traces formulas")
DisableTorchFunction = private(
    "torch._C.DisableTorchFunction", "to hide wrappers' __torch_function__ and function modes from its own code"
)
base_of = private("torch.Tensor._base.__get__", "to show what a write to a view has written")
function_state = private("torch._C._get_torch_function_state", "to know how far __torch_function__ is switched off")
has_kernel = private("torch._C._dispatch_has_kernel", "to tell operators from forms that TorchScript alone knows")
function_enabled = private("torch._C._is_torch_function_enabled", "to know whether it is on, in less time")
FUNCTION_ENABLED = private("torch._C._TorchFunctionState.ENABLED", "to switch it on")
set_function_state = private(
    "torch._C._set_torch_function_state", "to switch __torch_function__ back on where an exception came in between"
)
function_mode_enabled = private(
    "torch._C._is_torch_function_mode_enabled", "to leave a call to the user's function modes"
)
autocast_enabled = private(
    "torch._C._is_any_autocast_enabled", "to leave a call to autocast, which stands in front of it"
)
AUTOCAST_KEYS = [
    private(_KEY + name, "to have the pieces of composite operators autocast")
    for name in dir(private("torch._C.DispatchKey", "to switch dispatch keys"))
    if name.startswith("Autocast")
]
RestorePythonTLSSnapshot = private(
    "torch._C._RestorePythonTLSSnapshot", "to know in a handler which of autocast's keys its caller had excluded"
)
_DisableAutocast = private("torch._C._DisableAutocast", "to have gradients computed in the dtypes of the forward pass")


def autocast_off() -> Any:
    """Context: what was computed under autocast or not goes on in the dtypes that it has."""
    return _DisableAutocast() if autocast_enabled() else nullcontext()


without_torch_function = private(
    "torch._C._disabled_torch_function_impl", "to hand a call to PyTorch's own argument parser"
)
tensor_as_subclass: Any = private("torch._C.TensorBase.as_subclass", "to give a tensor a class and to take it off")
nowrap_functions = private(
    "torch.overrides.get_default_nowrap_functions", "to know the functions that do not keep a tensor's class"
)
tensor_torch_function = private(
    "torch.Tensor.__torch_function__.__func__", "to tell tensor subclasses that have one of their own"
)

_HOOKS = "torch._C._autograd."
top_packing = private(
    _HOOKS + "_top_saved_tensors_default_hooks",
    "to find the hooks that pack what autograd saves (checkpoint, save_on_cpu)",
)
push_packing = private(
    _HOOKS + "_push_saved_tensors_default_hooks", "to set aside the hooks that pack what autograd saves"
)
pop_packing = private(
    _HOOKS + "_pop_saved_tensors_default_hooks", "to put back the hooks that pack what autograd saves"
)

is_torch_func_active = private(
    "torch._C._are_functorch_transforms_active", "to refuse to run inside a transform of torch.func"
)
storage_count = private("torch._C._storage_Use_Count", "to know whether anything else holds a tensor's memory")
make_wrapper = private("torch.Tensor._make_wrapper_subclass", "to make tensors that have metadata and no data")
torch_utils: Any = private("torch._utils", "to have tensors loaded inside of transforms")
private("torch._utils._rebuild_tensor", "to have tensors loaded inside of transforms")
TENSOR_MODULE: Any = private("torch._tensor", "to tell the code of Tensor's methods, which hands calls on")
no_dispatch = private("torch.utils._mode_utils.no_dispatch", "to make tensors past all modes")
DECOMPOSITION_TABLE: dict[Any, Any] = private(
    "torch._decomp.decomposition_table", "to batch an operator that has no rule by its pieces"
)
TREE_NODES: dict[type, Any] = private(
    "torch.utils._pytree.SUPPORTED_NODES", "to know containers registered with PyTorch's pytrees"
)
torch_pytree: Any = private("torch.utils._pytree", "to take arguments apart as Dynamo does")
register_tree_node: Any = private(
    "torch.utils._pytree.register_pytree_node", "to let the pullbacks that it returns be pytrees"
)
no_setup_context = private(
    "torch.autograd.function._SingleLevelFunction.setup_context", "to tell the two styles of autograd.Function"
)
_FOR_RULES = "to find the vmap rules of torch.library.custom_op"
_custom_operators: dict[str, Any] = private("torch._library.custom_ops.OPDEFS", _FOR_RULES)


def debug_mode() -> Any:
    """PyTorch's DebugMode; None in a version that has none."""
    try:
        return pkgutil.resolve_name("torch.utils._debug_mode.DebugMode")
    except (ImportError, AttributeError):
        return None


def vmap_rule_of_library(op: OpOverload) -> Any:
    """The rule that a ``torch.library.custom_op`` was given by ``register_vmap``, with our signature, or None."""
    definition = None if op.namespace == "aten" else _custom_operators.get(op._schema.name)
    try:
        return None if definition is None else definition._vmap_fn
    except AttributeError as error:
        raise TorchMovedError("torch._library.custom_ops.CustomOpDef._vmap_fn", _FOR_RULES) from error


def overload_of_library(op: Any) -> Any:
    """The operator overload that a ``torch.library.custom_op`` stands for, or None."""
    return getattr(op, "_opoverload", None) if isinstance(op, torch.library.CustomOpDef) else None


class Mode(TorchDispatchMode):
    """A dispatch mode that Dynamo's protection does not wrap, which would cost more than the rest of the door."""

    # Whenever a mode is pushed PyTorch asks for this, and ours has none: that an empty slot says so takes a third less.
    __slots__ = ("_mode_key",)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


#: Attributes that are read off objects where they are used, many for every operator: where each is found, and its use.
ATTRIBUTES: dict[str, tuple[str, str]] = {
    "_schema": ("torch.ops.aten.sin.default", "to know the arguments and results of an operator"),
    "_overloadname": ("torch.ops.aten.sin.default", "to know the overload's name of an operator"),
    "_op": ("torch.ops.aten.sin.default", "to call an operator without what an overload object adds"),
    "_can_decompose": ("torch.ops.aten.sin.default", "to know whether an operator is made of others"),
    "_is_view": ("torch.Tensor", "to know whether an operator viewed or copied"),
    "_values": ("torch.Tensor", "to reach what a jagged nested tensor is made of"),
    "_version": ("torch.Tensor", "to notice that a tensor that was saved has been written"),
    "_use_count": ("torch.Tensor", "to know whether anything else holds a tensor"),
    "_cdata": ("torch.UntypedStorage", "to know whether two tensors share memory"),
    "_current_level": ("torch.autograd.forward_ad", "to know whether forward AD of PyTorch itself is on"),
}
for _name, (_holder, _purpose) in ATTRIBUTES.items():
    private(f"{_holder}.{_name}", _purpose)
