"""Derivatives against each other and against differences, over OpInfo: a slice of it, all of it (slow),
and the tester itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle_conventions import CONVENTIONS, LOOSE
from oracles import DTYPES, check_operator, operators
from torch import Tensor

import functrans
from functrans.extend import DERIVATIVES, derivative, overriding
from functrans.pytorch.versions import INSTALLED

aten = torch.ops.aten
OPERATORS = operators()


# Wrong for now, each with its reason; one that comes out right is an error.
WRONG: dict[str, str] = {
}


def judged(name: str, findings: Any) -> None:
    wrong = "\n".join(str(f) for f in findings if f.outcome == "wrong")
    assert name in WRONG or not wrong, wrong
    assert name not in WRONG or wrong, f"{name} is right now: delete it from WRONG"


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    """One sample of each, float64 or, every third time, complex128."""
    op = OPERATORS[name]
    complex_too = torch.complex128 in op.supported_dtypes("cpu") and len(name) % 3 == 0
    findings, _ = check_operator(
        op, functrans, ["complex128" if complex_too else "float64"], cap=1, thorough=False, variants=False
    )
    judged(name, findings)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_all_samples(name: str, dtype: str) -> None:
    findings, _ = check_operator(OPERATORS[name], functrans, [dtype])
    judged(name, findings)


def test_conventions_name_what_exists() -> None:
    assert set(CONVENTIONS) | set(LOOSE) | set(WRONG) <= set(OPERATORS)


# ---- the tester, tested


def test_every_operator_that_has_samples_is_judged() -> None:
    for name in ("sin", "matmul", "gather"):
        findings, tally = check_operator(OPERATORS[name], functrans, ["float64"], cap=1, thorough=False)
        assert not findings
        assert tally.samples > 1 and tally.checks > 40


def checks_that_fail(name: str, backend: Any = functrans, **options: Any) -> set[str]:
    findings, _ = check_operator(
        OPERATORS[name], backend, ["float64"], cap=1, thorough=False, variants=False, **options
    )
    return {f.check for f in findings if f.outcome == "wrong"}


def test_a_wrong_second_derivative_is_found() -> None:
    """The first is right: as layer_norm's in PyTorch, and weight_norm's."""

    class Cosine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return grad * x.cos()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            (x,) = ctx.saved_tensors
            return grad * x.cos(), grad * x.sin()  # the sign, and the incoming cotangent

        generate_vmap_rule = True

    with overriding(DERIVATIVES, aten.sin.default):
        derivative(
            aten.sin.default,
            self=lambda grad, self: Cosine.apply(grad, self),
            tangent=lambda self, self_t: self_t * self.cos(),
        )
        failed = checks_that_fail("sin")
    assert "grad of grad against differences" in failed
    assert not any(check.startswith(("jvp against", "grad against", "adjointness")) for check in failed)


def test_a_dropped_tangent_is_found() -> None:
    with overriding(DERIVATIVES, aten.mul.Tensor):
        derivative(
            aten.mul.Tensor, broadcasts=True, self=lambda grad, other: grad * other,
            other=lambda grad, self: grad * self,
            tangent=lambda other, self_t, other_t: None if self_t is None else torch.mul(self_t, other),
        )  # fmt: skip
        assert "adjointness: jvp against vjp" in checks_that_fail("mul")


@pytest.mark.parametrize("broken", ["reverse", "tangent", "both"])
def test_a_zero_is_found(broken: str) -> None:
    with overriding(DERIVATIVES, aten.cumsum.default):
        derivative(
            aten.cumsum.default,
            self=lambda grad, self, dim: (
                torch.zeros_like(self) if broken != "tangent" else grad.flip(dim).cumsum(dim).flip(dim)
            ),
            tangent=lambda self_t, dim, result: torch.zeros_like(result) if broken != "reverse" else self_t.cumsum(dim),
        )
        failed = checks_that_fail("cumsum")
    assert ("adjointness: jvp against vjp" in failed) == (broken != "both")
    assert ("grad against differences" in failed) == (broken != "tangent")
    assert ("jvp against differences" in failed) == (broken != "reverse")


def test_a_rule_that_mixes_rows_is_found() -> None:
    def vmap(f: Any, **options: Any) -> Any:
        return lambda *args: functrans.vmap(f, **options)(*args).roll(1, 0)

    backend = SimpleNamespace(grad=functrans.grad, jvp=functrans.jvp, vjp=functrans.vjp, vmap=vmap)
    assert "vmap of grad against a loop, row 0" in checks_that_fail("exp", backend)


def test_an_error_is_a_refusal() -> None:
    def jvp(*_: Any) -> Any:
        raise NotImplementedError("no")

    backend = SimpleNamespace(grad=functrans.grad, jvp=jvp, vjp=functrans.vjp, vmap=functrans.vmap)
    findings, _ = check_operator(OPERATORS["exp"], backend, ["float64"], cap=1, thorough=False)
    assert findings and {f.outcome for f in findings} == {"refused"}


@pytest.mark.parametrize("name", ["nn.functional.layer_norm", *["linalg.solve"] * (INSTALLED < (2, 15))])
def test_what_is_known_of_torch_func_is_found(name: str) -> None:
    """Its second derivative of these is wrong; see docs/correctness.md."""
    assert any("differences" in check for check in checks_that_fail(name, torch.func))
