"""PyTorch's generators of samples, and its seed, without the stack traces that they take.

``torch.manual_seed`` queues a seed for every kind of device, with a stack trace each, and the generators of samples
walk the stack in search of a unittest. Both cost the more the deeper the stack: in pytest ten times the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


def reseed(number: int) -> None:
    """Seed the generator of the CPU, on which all samples are."""
    torch.default_generator.manual_seed(number)


@contextmanager
def sampling() -> Iterator[None]:
    """Where samples are drawn: the same samples, sooner."""
    with (
        patch("torch.manual_seed", torch.default_generator.manual_seed),
        patch("torch.testing._internal.common_utils.extract_test_fn", lambda: None),
        patch("torch.testing._internal.opinfo.core.extract_test_fn", lambda: None),
    ):
        yield
