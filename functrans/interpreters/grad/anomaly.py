"""``torch.autograd.set_detect_anomaly``: a derivative that is not a number is reported where it comes up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, tensor_of
from functrans.errors import AnomalyError
from functrans.errors.call_sites import at_site
from functrans.interpreters.grad.noted_tape import site_of
from functrans.pytorch.thread_state import running_at


def checks_numbers() -> bool:
    """Whether anomaly detection is on, with its check of numbers."""
    return torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()


def check_numbers(interpreter: Interpreter, tape: list[Any], i: int, op: Any, found: Sequence[Any]) -> None:
    """Raise if what record ``i``, of ``op``, pulled back is not a number somewhere."""
    for position, cotangent in enumerate(found):
        parts = cotangent if isinstance(cotangent, list | tuple) else (cotangent,)
        if any(c is not None and has_nan(tensor_of(c)) for c in parts):
            raise AnomalyError(op, interpreter.name, interpreter.level, position, at_site(site_of(tape, i)))


def has_nan(x: Any) -> bool:
    """Whether ``x``, of any level, is not a number for some example."""
    while type(x) is WrapperTensor:
        x = x.value
    with running_at(None):
        x = x.detach()
        return bool((x.coalesce().values() if x.layout is torch.sparse_coo else x).isnan().any())
