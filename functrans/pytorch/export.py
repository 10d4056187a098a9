"""Where torch.export's tracer stands while a transform runs."""

from __future__ import annotations

from functrans.pytorch.torch_private import PRE_DISPATCH, mode_kinds, private, push_mode

_FOR_EXPORT = "to have torch.export trace behind autograd"
set_key_included = private("torch._C._dispatch_tls_set_dispatch_key_included", _FOR_EXPORT)
tracers_before_autograd = private("torch._ops.mode_stack_state_for_pre_dispatch", _FOR_EXPORT)
unset_mode = private("torch._C._unset_dispatch_mode", _FOR_EXPORT)
KEY_OF_MODE = "_dispatch_key"  # of the tracer while it is in front of autograd


class traced_behind_autograd:
    """Context: torch.export, which traces in front of autograd and would see wrappers there, traces what ends at the
    base.
    """

    def __enter__(self) -> None:
        self.tracers = tracers_before_autograd()
        self.tracer = self.tracers.get(0)
        self.tracers.set(0, None)
        set_key_included(PRE_DISPATCH, False)
        if self.tracer is not None:
            self.key = self.tracer.__dict__.pop(KEY_OF_MODE, None)  # PyTorch goes by it where it puts modes back
            push_mode(self.tracer)

    def __exit__(self, *exc: object) -> None:
        if self.tracer is not None:
            unset_mode(mode_kinds.PROXY)
            setattr(self.tracer, KEY_OF_MODE, self.key)
        self.tracers.set(0, self.tracer)
        set_key_included(PRE_DISPATCH, True)
