"""Every operator of PyTorch's OpInfo database under the compositions of ``compositions.py``, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compositions import COMPOSITIONS, RECORDED
from opinfo import TORCH_FUNC_IS_WRONG, Result, operators, run_operator, worst
from opinfo_expected_failures import EXPECTED_FAILURES, EXPECTED_FAILURES_OF_ALL_SAMPLES
from torch.utils._pytree import tree_map

import functrans

OPERATORS = operators()


def check(name: str, results: list[Result], expected: dict[tuple[str, str], str]) -> None:
    pairs = worst(results)
    wrong = [f"{c} (sample {r.sample}): {r.detail}" for (_, c), r in pairs.items() if r.outcome == "wrong"]
    assert not wrong, "\n".join([f"{name}: wrong numbers", *wrong])
    failed = {key: r for key, r in pairs.items() if r.outcome == "error"}
    unlisted = [f"{c} (sample {r.sample}): {r.detail}" for (n, c), r in failed.items() if (n, c) not in expected]
    assert not unlisted, "\n".join([f"{name}: errors where torch.func has none", *unlisted])
    stale = [key for key in expected if key[0] == name and key not in failed]
    assert not stale, f"{stale} pass now: delete them from opinfo_expected_failures.py"


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    check(name, run_operator(OPERATORS[name], functrans), EXPECTED_FAILURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_all_samples(name: str) -> None:
    results = run_operator(OPERATORS[name], functrans, cap=None)
    check(name, results, EXPECTED_FAILURES | EXPECTED_FAILURES_OF_ALL_SAMPLES)


def test_expected_failures_name_what_exists() -> None:
    for name, composition in EXPECTED_FAILURES | EXPECTED_FAILURES_OF_ALL_SAMPLES:
        assert name in OPERATORS
        assert composition in COMPOSITIONS + RECORDED


@pytest.mark.parametrize("name", [name for name in TORCH_FUNC_IS_WRONG if name in OPERATORS])
def test_what_torch_func_is_wrong_about_it_is_still_wrong_about(name: str) -> None:
    known = "PyTorch is known to be wrong"
    found = {r.composition for r in run_operator(OPERATORS[name], functrans) if r.detail == known}
    assert found == set(TORCH_FUNC_IS_WRONG[name])


def mixes_rows(f: Any, in_dims: Any = 0, **options: Any) -> Any:
    def mapped(*args: Any) -> Any:
        return tree_map(lambda t: t.roll(1, 0), torch.func.vmap(f, in_dims, **options)(*args))

    return mapped


def forgets_last_cotangent(f: Any, *primals: Any) -> Any:
    out, pullback = torch.func.vjp(f, *primals)
    return out, lambda c: pullback((*c[:-1], torch.zeros_like(c[-1])))


def refuses(*_: Any) -> Any:
    raise NotImplementedError("no")


def wrong_dtype(f: Any, primals: Any, tangents: Any) -> Any:
    out, tangents_out = torch.func.jvp(f, primals, tangents)
    return out, tree_map(lambda t: t.float(), tangents_out)


@pytest.mark.parametrize(
    ("planted", "outcome"),
    [
        ({}, "match"),
        ({"vmap": mixes_rows}, "wrong"),
        ({"vjp": forgets_last_cotangent}, "wrong"),
        ({"jvp": wrong_dtype}, "wrong"),
        ({"jvp": refuses}, "error"),
    ],
)
@pytest.mark.parametrize("name", ["sin", "matmul", "nn.functional.layer_norm", "gather", "cumsum"])
def test_planted_bugs_are_found(name: str, planted: dict[str, Any], outcome: str) -> None:
    backend = SimpleNamespace(**({"vjp": torch.func.vjp, "jvp": torch.func.jvp, "vmap": torch.func.vmap} | planted))
    pairs = worst(run_operator(OPERATORS[name], backend, cap=2))
    hit = [c for c in COMPOSITIONS if any(transform in c for transform in planted)]
    assert {c: pairs[name, c].outcome for c in hit} == dict.fromkeys(hit, outcome)
    assert {pairs[name, c].outcome for c in COMPOSITIONS if c not in hit} <= {"match"}
