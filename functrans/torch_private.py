"""Every private PyTorch name that functrans uses, each with its reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import _C
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.utils._mode_utils import no_dispatch

__all__ = [
    "AUTOGRAD",
    "COMPOSITE",
    "CONJUGATE",
    "INDEX_BATCHED",
    "INDEX_BATCHED_KEYS",
    "NEGATIVE",
    "PYTHON",
    "VIEWS_AND_VERSIONS",
    "ZERO_TENSOR",
    "DisableTorchFunction",
    "EnableTorchFunction",
    "OpOverload",
    "autocast_enabled",
    "custom_operator",
    "function_mode_enabled",
    "function_mode_stack_size",
    "is_forward_enabled",
    "is_key_excluded",
    "is_torch_func_active",
    "make_wrapper",
    "mode_at",
    "mode_stack_size",
    "no_dispatch",
    "pop_function_mode",
    "pop_mode",
    "pop_packing",
    "push_function_mode",
    "push_mode",
    "push_packing",
    "set_forward_enabled",
    "set_grad_enabled",
    "set_key_excluded",
    "top_packing",
    "without_torch_function",
]  # fmt: skip

# Whether dispatch skips a key, per thread: the door stands in front of autograd by excluding its key.
is_key_excluded = _C._dispatch_tls_is_dispatch_key_excluded
set_key_excluded = _C._dispatch_tls_set_dispatch_key_excluded
AUTOGRAD = _C.DispatchKey.AutogradFunctionality
# View tracking and version counters of base tensors: off and on together with autograd.
VIEWS_AND_VERSIONS = _C.DispatchKey.ADInplaceOrView
# What makes conj() and .imag of base tensors lazy; PyTorch excludes them while a handler runs.
CONJUGATE = _C.DispatchKey.Conjugate
ZERO_TENSOR = _C.DispatchKey.ZeroTensor  # forward AD of base tensors
NEGATIVE = _C.DispatchKey.Negative
# Excluded while PyTorch reads the elements of torch.tensor([...]).
PYTHON = _C.DispatchKey.Python
COMPOSITE = _C.DispatchKey.CompositeImplicitAutograd

# Tells PyTorch's indexing not to read a number; see NOTE [Scalar indices].
INDEX_BATCHED = _C._dispatch_key_parse("BatchedNestedTensor")
INDEX_BATCHED_KEYS = _C.DispatchKeySet(INDEX_BATCHED)

# The mode stack itself: entering a TorchDispatchMode through its context manager costs several microseconds.
mode_stack_size = _C._len_torch_dispatch_stack
mode_at = _C._get_dispatch_stack_at
push_mode = _C._push_on_torch_dispatch_stack
pop_mode = _C._pop_torch_dispatch_stack

# The grad mode without the context manager's cost, and forward AD's own switch, which forward mode follows.
set_grad_enabled = _C._set_grad_enabled
is_forward_enabled = _C._is_fwd_grad_enabled
set_forward_enabled = _C._set_fwd_grad_enabled

# Formulas are traced by objects with a __torch_function__, whatever the caller's state: it is switched on, and function modes are taken off.
EnableTorchFunction = _C._EnableTorchFunction
function_mode_stack_size = _C._len_torch_function_stack
push_function_mode, pop_function_mode = _C._push_on_torch_function_stack, _C._pop_torch_function_stack

# Hides tensors' __torch_function__ and function modes from what runs inside.
DisableTorchFunction = _C.DisableTorchFunction

# A quick call enters PyTorch where function modes listen; the door's operators have passed them already.
function_mode_enabled = _C._is_torch_function_mode_enabled

# Autocast stands in front of the door: what it has a say in must pass by it.
autocast_enabled = _C._is_any_autocast_enabled

# Runs a torch function with its arguments' ``__torch_function__`` switched off, which takes it to PyTorch's own parser.
without_torch_function = _C._disabled_torch_function_impl

# The hooks that pack what autograd saves (checkpoint, save_on_cpu), the innermost ones.
_hooks: Any = _C._autograd
top_packing, push_packing = _hooks._top_saved_tensors_default_hooks, _hooks._push_saved_tensors_default_hooks
pop_packing = _hooks._pop_saved_tensors_default_hooks

# Whether code runs inside a transform of torch.func; only asked, to refuse it.
is_torch_func_active = _C._are_functorch_transforms_active

# Creates a tensor that has metadata but no data; the only way to a wrapper whose class sees every operator.
make_wrapper = torch.Tensor._make_wrapper_subclass


def custom_operator(op: OpOverload) -> Any:
    """The definition of a ``torch.library.custom_op``, which holds its vmap rule, or None."""
    return None if op.namespace == "aten" else OPDEFS.get(op._schema.name)
