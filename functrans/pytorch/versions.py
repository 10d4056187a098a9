"""Where the PyTorch versions that are supported differ, beyond the private names in the modules beside this one."""

from __future__ import annotations

from typing import Any

import torch

from functrans.errors import FunctransError

#: The first and the last minor version that the tests were run on; docs/versions.md has the table.
SUPPORTED = ((2, 11), (2, 15))

#: The installed minor version. A development build counts as the version that it precedes.
INSTALLED: tuple[int, ...] = tuple(int(part) for part in torch.__version__.split(".")[:2])

#: Whether ``clamp``, ``fmax`` and ``fmin`` share their derivative among operands that are equal; see
#: derivatives/ties.py.
SPLITS_TIES = INSTALLED >= (2, 14)
#: Whether ``fmax`` and ``fmin`` keep their derivative from the NaN that they pass by.
PASSES_NAN_BY = INSTALLED >= (2, 15)

#: Operators that a version took out: the first minor version without them.
GONE = {"cholesky": (2, 14)}


def present(*names: str) -> list[Any]:
    """The ``default`` overloads of these aten operators, without those that the installed version no longer has."""
    return [getattr(torch.ops.aten, name).default for name in names if INSTALLED < GONE[name]]


class TorchMovedError(FunctransError, ImportError):
    sentence = """PyTorch {torch} has no {name}, which functrans needs {purpose}. functrans supports PyTorch {first} to
        {last}: install one of these, or a functrans that supports {torch}. (functrans/pytorch/ is the place to
        mend.)"""

    def __init__(self, name: str, purpose: str) -> None:
        first, last = (".".join(map(str, version)) for version in SUPPORTED)
        super().__init__(torch=torch.__version__, name=name, purpose=purpose, first=first, last=last)
