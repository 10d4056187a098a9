"""Where the PyTorch versions that are supported differ, beyond the private names of pytorch/torch_private.py."""

from __future__ import annotations

from typing import Any

import torch

#: The first and the last minor version that the tests were run on; docs/versions.md has the table.
SUPPORTED = ((2, 11), (2, 14))

#: The installed minor version. A development build counts as the version that it precedes.
INSTALLED: tuple[int, ...] = tuple(int(part) for part in torch.__version__.split(".")[:2])

#: Whether ``clamp``, ``fmax`` and ``fmin`` share their derivative among operands that are equal; see
#: derivatives/ties.py.
SPLITS_TIES = INSTALLED >= (2, 14)

#: Operators that a version took out: the first minor version without them.
GONE = {"cholesky": (2, 14)}


def present(*names: str) -> list[Any]:
    """The ``default`` overloads of these aten operators, without those that the installed version no longer has."""
    return [getattr(torch.ops.aten, name).default for name in names if INSTALLED < GONE[name]]
