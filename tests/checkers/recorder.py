"""What operators are called with: a mode that hands over calls, and PyTorch's own samples run under it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from sampling import sampling
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: of the operator that a function in its place calls
    name: str = ""

    def __str__(self) -> str:
        def show(x: Any) -> str:
            if isinstance(x, Tensor):
                return f"{str(x.dtype)[6:]}{list(x.shape)}"
            return f"[{', '.join(map(show, x))}]" if isinstance(x, (list, tuple)) else str(x)

        parts = [show(a) for a in self.args] + [f"{k}={show(v)}" for k, v in self.kwargs.items()]
        return f"{self.op}({', '.join(parts)})"


def copies(*values: Any) -> Any:
    """``values`` with tensors that no later write reaches."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), values)


@contextmanager
def before_autograd() -> Iterator[None]:
    """Let a dispatch mode stand in front of autograd, where composite operators are whole, as inside a transform."""
    was = torch._C._dispatch_tls_is_dispatch_key_excluded(AUTOGRAD)
    torch._C._dispatch_tls_set_dispatch_key_excluded(AUTOGRAD, True)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(AUTOGRAD, was)


class Recorder(TorchDispatchMode):
    """Hands the calls of wanted operators to ``keep``; other composite ones it takes apart, to see their pieces.

    ``wanted_in_pieces``: the wanted composite ones are taken apart as well.
    """

    def __init__(
        self, wanted: Callable[[OpOverload], bool], keep: Callable[[Call], None], *, wanted_in_pieces: bool = False
    ) -> None:
        super().__init__()
        self.wanted = wanted
        self.keep = keep
        self.wanted_in_pieces = wanted_in_pieces

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = self.wanted(op)
        if wanted:
            self.keep(Call(op, tuple(args), kwargs))
        if (not wanted or self.wanted_in_pieces) and op._can_decompose():
            with self:
                result = op.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return op(*args, **kwargs)


class Listing(TorchDispatchMode):
    """Notes which operators it is asked about, and changes nothing: composite ones stay whole."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    @property
    def names(self) -> list[str]:
        return list(map(str, self.ops))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


@contextmanager
def noted(wanted: Callable[[OpOverload], bool] = lambda op: True) -> Iterator[list[Call]]:
    """The calls of wanted operators that reach this place: a list that grows."""
    calls: list[Call] = []
    with Recorder(wanted, calls.append):
        yield calls


def run_samples(
    info: Any, dtype: torch.dtype, recorder: Recorder, limit: int | None = None, *, backward: bool = False
) -> None:
    """Run the samples of an OpInfo, at most ``limit``, evenly chosen; what PyTorch itself refuses is passed over.

    ``backward`` runs autograd, too, so that the recorder sees what its formulas call, composite operators in pieces.
    """
    with warnings.catch_warnings(), sampling():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            samples = list(info.sample_inputs("cpu", dtype, requires_grad=backward))
        except Exception:  # noqa: BLE001 - a generator that needs what this build lacks has nothing to record
            return
        if limit is not None and len(samples) > limit:
            samples = samples[:: -(-len(samples) // limit)]
        for sample in samples:
            with suppress(Exception):  # what was recorded before a failure counts
                if backward:
                    with recorder:
                        run_backward(info, sample)
                else:
                    with before_autograd(), recorder:
                        info(sample.input, *sample.args, **sample.kwargs)


def run_backward(info: Any, sample: Any) -> None:
    outputs = info(sample.input, *sample.args, **sample.kwargs)
    leaves, roots = (
        [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.requires_grad]
        for tree in ((sample.input, sample.args, sample.kwargs), outputs)
    )
    if roots:
        torch.autograd.grad(roots, leaves, [torch.rand_like(x) for x in roots], allow_unused=True)
