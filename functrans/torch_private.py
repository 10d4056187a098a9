"""Every private PyTorch name that functrans uses, each with its reason."""

from __future__ import annotations

from typing import Any

import torch
from torch._C import (
    # Whether dispatch skips a key, per thread: the door stands in front of autograd by excluding its key.
    _dispatch_tls_is_dispatch_key_excluded as is_key_excluded,
    _dispatch_tls_set_dispatch_key_excluded as set_key_excluded,
    # A quick call enters PyTorch where function modes listen; the door's operators have passed them already.
    _is_torch_function_mode_enabled as function_mode_enabled,
    # Forward AD's own switch, which forward mode follows.
    _is_fwd_grad_enabled as is_forward_enabled,
    # The mode stack itself: entering a TorchDispatchMode through its context manager costs several microseconds.
    _len_torch_dispatch_stack as mode_stack_size,
    _pop_torch_dispatch_stack as pop_mode,
    _push_on_torch_dispatch_stack as push_mode,
    _set_fwd_grad_enabled as set_forward_enabled,
    # The grad mode without the context manager's cost.
    _set_grad_enabled as set_grad_enabled,
)
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload as OpOverload
from torch.utils._mode_utils import no_dispatch as no_dispatch

AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
VIEWS_AND_VERSIONS = torch._C.DispatchKey.ADInplaceOrView
CONJUGATE = torch._C.DispatchKey.Conjugate
NEGATIVE = torch._C.DispatchKey.Negative
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

#: Creates a tensor that has metadata but no data; the only way to a wrapper whose class sees every operator.
make_wrapper = torch.Tensor._make_wrapper_subclass


def custom_operator(op: OpOverload) -> Any:
    """The definition of a ``torch.library.custom_op``, which holds its vmap rule, or None."""
    return None if op.namespace == "aten" else OPDEFS.get(op._schema.name)
