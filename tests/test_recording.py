"""What the checkers of rules are fed with: PyTorch's samples, and the calls of operators recorded from them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from batching_checker import record, recorded_calls
from sampling import reseed, sampling
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten


def samples(name: str) -> list[Any]:
    info = next(info for info in op_db if info.name == name)
    return [tree_flatten((s.input, s.args, s.kwargs))[0] for s in info.sample_inputs("cpu", torch.float64)]


@pytest.mark.parametrize("name", ["sin", "gather", "nn.functional.dropout"])
def test_the_same_samples_without_a_walk_of_the_stack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    expected = samples(name)
    reseed(3)
    walks: list[None] = []
    monkeypatch.setattr(inspect, "stack", lambda *_: walks.append(None) or [])
    with sampling():
        found = samples(name)
    assert not walks
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    samples(name)
    assert walks, "PyTorch walks no stack any more: sampling() has nothing left to do"


def test_a_seed_is_that_of_pytorch() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    reseed(5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("backward", [False, True])
def test_the_calls_of_an_operator_do_not_depend_on_what_else_is_wanted(backward: bool) -> None:
    def names(name: str) -> bool:
        return name in ("nn.functional.layer_norm", "matmul")

    everything = record(lambda op: True, torch.float64, names, 16, 4, backward)
    assert (aten.native_layer_norm_backward if backward else aten.matmul).default in everything
    for op in everything:
        alone = record({op}.__contains__, torch.float64, names, 16, 4, backward)
        assert list(alone[op]) == list(everything[op])


def test_dtypes_take_turns() -> None:
    dtypes = (torch.complex128, torch.int64)
    calls = recorded_calls([aten.mul.Tensor], dtypes=dtypes, names=lambda name: name == "mul", per_op=4, samples=4)
    assert [args[0].dtype for args, _ in calls[aten.mul.Tensor]] == [*dtypes, *dtypes]
