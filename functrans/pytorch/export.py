"""Where torch.export's tracer stands while a transform runs."""

from __future__ import annotations

from functrans.pytorch.torch_private import (
    KEY_OF_MODE,
    PRE_DISPATCH,
    TRACER_MODE,
    push_mode,
    set_key_included,
    tracers_before_autograd,
    unset_mode,
)


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
            unset_mode(TRACER_MODE)
            setattr(self.tracer, KEY_OF_MODE, self.key)
        self.tracers.set(0, self.tracer)
        set_key_included(PRE_DISPATCH, True)
