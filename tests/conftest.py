"""What holds for every test."""

from collections.abc import Iterator

import pytest
import torch
from torch.distributions import Distribution

# The tensors are so small that the threads of one operator would only wait for each other, and the more so
# when several processes run tests.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def validated() -> Iterator[None]:
    """Distributions check their arguments again: whatever is compiled first, PyTorch switches that off for good."""
    before = Distribution._validate_args
    yield
    Distribution.set_default_validate_args(before)
