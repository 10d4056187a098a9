"""Where PyTorch has no derivative: a formula, an error of ours, or a zero that is right; never a zero in silence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dependence import calls_by_hand, differences, made_up_calls, probe, pure_operators, sweep, verdict
from derivative_checker import Call
from torch import Tensor
from torch.autograd import forward_ad

from functrans import errors, grad, hessian, jvp, vjp, vmap
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.constants import CONSTANT
from functrans.derivatives.table import DERIVATIVES, NO_TANGENT
from functrans.extend import derivative, overriding
from functrans.interpreters.jvp.interpreter import JVP_RULES

aten = torch.ops.aten


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- formulas of ours

START, END = torch.tensor(0.3, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
WEIGHTS, X = floats(0.3, -1.2, 2.0, 0.7), floats(0.3, -1.2, 0.3001, 0.7)
POSITIVE = floats(0.3, 0.7, 1.2)
BINS = torch.tensor([0, 2, 2, 5])
ROWS = torch.tensor([[2.0, 1.0], [0.5, 3.0], [1.0, 1.5]], dtype=torch.float64)
MIX = torch.tensor([0.7, -1.1, 0.4, 2.0, -0.3, 1.3], dtype=torch.float64)

#: functions of one tensor, and where
FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "linspace, start": (lambda a: torch.linspace(a, END, 5, dtype=torch.float64), START),
    "linspace, end": (lambda a: torch.linspace(START, a, 5, dtype=torch.float64), END),
    "linspace, start of a number": (lambda a: torch.linspace(a, 2.0, 5, dtype=torch.float64), START),
    "linspace, end of a number": (lambda a: torch.linspace(0.3, a, 5, dtype=torch.float64), END),
    "linspace, both": (lambda a: torch.linspace(a, a * a, 5, dtype=torch.float64), START),
    "linspace, one step": (lambda a: torch.linspace(a, END, 1, dtype=torch.float64), START),
    "linspace, no step": (lambda a: torch.linspace(a, END, 0, dtype=torch.float64), START),
    "logspace, both": (lambda a: torch.logspace(a, a * a, 5, 3.0, dtype=torch.float64), START),
    "logspace, start": (lambda a: torch.logspace(a, 2.0, 4, dtype=torch.float64), START),
    "bincount": (lambda w: torch.bincount(BINS, w * w, 6), WEIGHTS),
    "heaviside": (lambda v: torch.heaviside(floats(-1.0, 0.0, 0.0, 3.0), v * v), WEIGHTS),
    "unique": (lambda x: torch.unique(x * x), X),
    "unique, with more": (lambda x: torch.unique(x * x, return_inverse=True, return_counts=True)[0], X),
    "unique, rows": (lambda x: torch.unique(x * x, dim=0), ROWS),
    "unique, columns": (lambda x: torch.unique(x * x, dim=1, return_inverse=True)[0], ROWS),
    "unique_consecutive": (lambda x: torch.unique_consecutive(x * x), X),
    "lstsq, singular values": (lambda x: torch.linalg.lstsq(x * x, ROWS, driver="gelsd").singular_values, ROWS + 0.1),
    "lstsq, its sum with the others": (
        lambda x: sum(torch.linalg.lstsq(x * x, ROWS[:, 0], driver="gelss")[i].sum() for i in (0, 1, 3)), ROWS + 0.1,
    ),
    "unique_consecutive, rows": (lambda x: torch.unique_consecutive(x * x, dim=0), ROWS),
    "igamma, shape": (lambda a: torch.igamma(a * a, POSITIVE), POSITIVE + 0.5),
    "igamma, both": (lambda a: torch.special.gammainc(a * a, a.flip(0)), POSITIVE),
    "igammac, both": (lambda a: torch.special.gammaincc(30 * a, 40 * a.flip(0)), POSITIVE),
    "igamma, a large shape": (lambda a: torch.igamma(500 * a, 500 * a * a), POSITIVE.sqrt()),
    "zeta, both": (lambda s: torch.special.zeta(s * s + 1.5, s.flip(0)), POSITIVE),
    "zeta of a number": (lambda s: torch.special.zeta(s + 2, 0.7), POSITIVE),
    "histogram, weights": (lambda w: torch.histogram(X, 3, weight=w * w)[0], WEIGHTS),
    "histogram, densities": (
        lambda w: torch.histogram(X, 2, range=(-1.0, 1.0), weight=w * w, density=True)[0], WEIGHTS,
    ),
    "histogram, edges": (lambda x: torch.histogram(x * x, 3)[1], X),
    "histogram, between edges": (
        lambda w: torch.histogram(X, floats(-2.0, 0.0, 0.3, 0.5), weight=w * w, density=True)[0], WEIGHTS,
    ),
    "scatter, add": (lambda x: (x * x).scatter(0, torch.tensor([1, 1, 3]), x[:3], reduce="add"), X),
    "scatter, multiply": (lambda x: (x * x).scatter(0, torch.tensor([1, 1, 3]), x[:3], reduce="multiply"), X),
    "scatter of a number": (lambda x: (x * x).scatter(0, torch.tensor([1, 1, 3]), 2.0, reduce="multiply"), X),
}


@pytest.mark.parametrize("by", ["shape", "draw"])
def test_the_slope_of_the_slope_of_a_draw(by: str) -> None:
    """By differences of PyTorch's slope, which has four digits; the order after that by differences of ours."""
    other = floats(0.2, 1.0, 3.0)
    f = lambda x: torch._standard_gamma_grad(*((x, other) if by == "shape" else (other, x)))
    along = lambda g: lambda x: jvp(g, (x,), (torch.ones_like(x),))[1]
    for lower, step, tolerance in ((f, 0.05, 0.05), (along(f), 1e-4, 1e-6)):
        (slope,) = differences(lambda x, g=lower: (g(x),), POSITIVE, torch.ones_like(POSITIVE), step)
        torch.testing.assert_close(along(lower)(POSITIVE), slope, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad(lambda x: f(x).sum())(POSITIVE), along(f)(POSITIVE))


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_of_ours(name: str) -> None:
    """First order by differences of the function, second and third by differences of the order before."""
    f, x = FORMULAS[name]
    total = lambda x: (f(x).flatten() * MIX[: f(x).numel()]).sum()
    v = torch.linspace(-1, 1.5, x.numel(), dtype=torch.float64).reshape(x.shape)
    along = lambda g: lambda x: jvp(g, (x,), (v,))[1]
    first, second, third = along(total), along(along(total)), along(along(along(total)))
    for order, (lower, upper) in enumerate(((total, first), (first, second), (second, third)), 1):
        (slope,) = differences(lambda x, g=lower: (g(x),), x, v, 1e-5)
        torch.testing.assert_close(
            upper(x), slope, rtol=1e-6, atol=1e-6, msg=lambda m, order=order: f"order {order}: {m}"
        )
    torch.testing.assert_close((grad(total)(x) * v).sum(), first(x))
    torch.testing.assert_close((grad(first)(x) * v).sum(), second(x))
    torch.testing.assert_close((hessian(total)(x) * v).sum(), (grad(lambda x: grad(total)(x).sum())(x) * v).sum())
    assert (along(grad(total))(x) * v).sum().allclose(second(x))


def test_equal_values_of_unique_give_to_the_first() -> None:
    x = floats(3.0, 1.0, 3.0, 1.0)
    assert grad(lambda x: (torch.unique(x) * floats(2.0, 5.0)).sum())(x).tolist() == [5.0, 2.0, 0.0, 0.0]

    def with_places(x: Tensor) -> tuple[Tensor, Tensor]:
        values, inverse = torch.unique(x, return_inverse=True)
        return values.sum(), inverse

    assert grad(with_places, has_aux=True)(x)[1].tolist() == [1, 0, 1, 0]


def test_batches() -> None:
    starts = floats(0.1, 0.5, 2.0)
    f = lambda a: (torch.linspace(a, 2.0, 4, dtype=torch.float64) ** 2).sum()
    torch.testing.assert_close(vmap(grad(f))(starts), torch.stack([grad(f)(a) for a in starts]))
    weights = torch.stack([WEIGHTS, 2 * WEIGHTS, WEIGHTS.flip(0)])
    g = lambda w: (torch.bincount(BINS, w) ** 2).sum()
    torch.testing.assert_close(vmap(grad(g))(weights), torch.stack([grad(g)(w) for w in weights]))


# ------------------------------------------------------------------------------------------- errors of ours

#: functions of which nobody has a derivative by their argument
REFUSED: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "geqrf": (lambda a: torch.geqrf(torch.diag(a))[0], POSITIVE),
    "ldl_factor": (lambda a: torch.linalg.ldl_factor(torch.diag(a) + 1)[0], POSITIVE),
    "histogramdd": (lambda a: torch.histogramdd(POSITIVE.view(3, 1), [2], weight=a)[0], POSITIVE),
    "_add_relu": (lambda a: torch._add_relu(a, POSITIVE), POSITIVE),
    "quantised with a scale": (
        lambda a: torch.fake_quantize_per_channel_affine(
            torch.diag(POSITIVE), a, torch.zeros(3, dtype=torch.int32), 0, 0, 9
        ),
        POSITIVE.float(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_nobody_has_it(name: str) -> None:
    f, x = REFUSED[name]
    for run in (lambda: grad(lambda x: f(x).sum())(x), lambda: jvp(f, (x,), (torch.ones_like(x),))):
        with pytest.raises(errors.NoFormulaError, match="(?s)functrans.extend.derivative.*detach") as caught:
            run()
        assert isinstance(caught.value, NotImplementedError)


def test_the_second_argument_is_not_lost_beside_the_first() -> None:
    below = lambda g, noise: aten.rrelu_with_noise_backward(g, -POSITIVE, noise, 0.1, 0.3, True, False).sum()
    with pytest.raises(errors.NoFormulaError):
        grad(below, argnums=(0, 1))(POSITIVE, POSITIVE)
    assert grad(below)(POSITIVE, POSITIVE).equal(POSITIVE)
    assert grad(lambda x: below(x, x.detach()))(POSITIVE).equal(POSITIVE)


def test_the_cure_of_the_message() -> None:
    op = aten._add_relu.Tensor
    entry_before = DERIVATIVES.get(op)
    slope = lambda grad, result: torch.where(result > 0, grad, 0)
    with overriding(DERIVATIVES, op):
        derivative(op, tangent="elementwise", self=slope, other=slope)
        assert grad(lambda a: torch._add_relu(a, X[1:]).sum())(POSITIVE).tolist() == [0, 1, 1]
        assert grad(lambda a: torch._add_relu(a, X[:3]).sum())(POSITIVE).tolist() == [1, 0, 1]
    assert DERIVATIVES.get(op) is entry_before


Y = floats(0.2, 0.5, 0.9)
#: functions that PyTorch's parser gives the number of a tensor
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "full": lambda a: torch.full((3,), a),
    "new_full": lambda a: Y.new_full((3,), a),
    "full_like": lambda a: torch.full_like(Y, a),
    "arange": lambda a: torch.arange(a, 3.0),
    "alpha": lambda a: torch.add(Y, Y, alpha=a),
    "alpha, with a wrapper beside it": lambda a: torch.add(a * Y, Y, alpha=a),
    "value": lambda a: torch.addcmul(Y, Y, Y, value=a),
    "elu": lambda a: F.elu(-Y, a),
    "huber": lambda a: F.huber_loss(Y, Y + 1, delta=a),
    "norm": lambda a: Y.norm(a),
    "trapezoid": lambda a: torch.trapezoid(Y, dx=a),
    "spacing": lambda a: torch.gradient(Y, spacing=a)[0],
    "cdist": lambda a: torch.cdist(Y[None], Y[None] + 1, p=a),
    "dropout, with a wrapper beside it": lambda a: F.dropout(a * Y, a),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_tensor_in_the_place_of_a_number_is_refused(name: str) -> None:
    f, x = NUMBERS[name], torch.tensor(0.5, dtype=torch.float64)
    for run in (
        lambda: grad(lambda x: f(x).sum())(x),
        lambda: jvp(f, (x,), (x,)),
        lambda: vmap(grad(lambda y: f(x * y).sum()))(Y),
    ):
        with pytest.raises(errors.FunctransError) as caught:
            run()
        assert isinstance(caught.value, (errors.NumberArgumentError, errors.DataDependentError))
    # without a derivative it is the number that it is
    torch.manual_seed(0)
    expected = f(x)
    torch.manual_seed(0)
    assert grad(lambda y: (y, f(x))[0])(x) == 1
    assert torch.equal(grad(lambda y: (y, f(y.detach())), has_aux=True)(x)[1], expected) or "dropout" in name


def test_asking_for_the_number_is_allowed() -> None:
    x = torch.tensor(0.5, dtype=torch.float64)
    read = (
        float,
        lambda x: x.item(),
        lambda x: math.sqrt(x) ** 2,
        lambda x: x.tolist(),
        lambda x: float(f"{x:.1f}"),
        complex,
        aten.item.default,
    )
    for ask in read:
        f = lambda x, ask=ask: (x * ask(x)).real if isinstance(ask(x), complex) else x * ask(x)
        torch.testing.assert_close(grad(f)(x), x)
        torch.testing.assert_close(jvp(f, (x,), (torch.ones_like(x),))[1], x)
    assert grad(lambda x: x if x > 0 else -x)(x) == 1


# ------------------------------------------------------------------------------------------- zeros that are right

CONSTANTS = sorted((str(op), op) for op in DERIVATIVES if DERIVATIVES.get(op).tangent == NO_TANGENT)
#: zeros by convention; see functrans.derivatives.constants
CONVENTIONS = {"aten.normal.Tensor_float", "aten.normal.float_Tensor", "aten.normal.Tensor_Tensor"}
#: their numbers are those that the memory had before, another time others
UNINITIALIZED = {"aten.empty_like.default", "aten.new_empty.default", "aten.new_empty_strided.default"}


def test_the_constants_are_those_that_give_a_reason() -> None:
    listed = {name for names in CONSTANT.values() for name in names}
    assert {op._schema.name.removeprefix("aten::") for _, op in CONSTANTS} <= listed
    assert len(listed) == sum(map(len, CONSTANT.values()))


def test_constants_do_not_move() -> None:
    """By differences, of arguments made up from the schema."""
    moving = {v.op for _, op in CONSTANTS for call in made_up_calls(op, 3) for v in probe(call) if v.outcome != "still"}
    assert moving - UNINITIALIZED == CONVENTIONS


def test_a_lie_would_be_found() -> None:
    sin = aten.sin.default
    with overriding(DERIVATIVES, sin):
        derivative(sin, tangent="elementwise", self=lambda grad: torch.zeros_like(grad))
        assert {v.outcome for v in probe(Call(sin, (Y,)))} == {"zero"}
    assert {v.outcome for v in probe(Call(sin, (Y,)))} == {"right"}
    assert verdict("sign", 0, lambda x: (x.sign(),), Y).outcome == "still"
    assert verdict("step", 0, lambda x: ((x - Y).sign(),), Y).outcome == "still"


# ------------------------------------------------------------------------------------------- every aten operator

DETACHED = "that is what it is for"
#: operators that the sweep of dependence.py finds to be zero although they move, each with the reason
ZEROS = {
    **dict.fromkeys(CONVENTIONS, "the parameters of a draw, as in PyTorch: estimators by its log_prob count on it"),
    "aten.data.default": DETACHED,
    "aten.detach.default": DETACHED,
    "aten.detach_copy.default": DETACHED,
}


#: operators whose derivative is another than that of their values, each with the reason
OTHERS = {
    "aten.embedding.default": "options that change the gradient: the padding is not moved, frequent rows less",
    "aten.linalg_svd.default": "vectors beyond the singular values are any basis; what does not depend on it is right",
    "aten._standard_gamma.default": "at a fixed quantile, as that of rsample in torch.distributions; the sampler jumps",
    "aten._standard_gamma_grad.default": "PyTorch's values have four digits, so that their differences have none",
    "aten._test_autograd_multiple_dispatch.fullcoverage": "made for PyTorch's own tests, and another on purpose",
}


def test_no_operator_is_silently_zero_that_moves_among_those_listed() -> None:
    """The list has no stale entry that made-up arguments reach, and every name in it exists."""
    names = {str(op): op for op in pure_operators()}
    assert set(ZEROS) | set(OTHERS) <= set(names)
    for name in ("aten.data.default", "aten.detach.default", "aten.detach_copy.default"):
        assert "zero" in {v.outcome for call in made_up_calls(names[name]) for v in probe(call)}


def test_what_decompositions_end_in() -> None:
    """PyTorch's prims have no derivative there, which its forward mode takes for a zero."""
    ops = pure_operators(namespace="prims")
    outcomes = {op: {v.outcome for call in made_up_calls(op, 2) for v in probe(call)} for op in ops}
    assert {op for op, found in outcomes.items() if not found <= {"right", "still"}} == set()
    assert sum("right" in found for found in outcomes.values()) >= 60


def test_a_kernel_that_knows_no_forward_mode_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the prims would be if they were not taken apart."""
    sin = torch.ops.prims.sinh.default
    monkeypatch.delattr(sin, "impl_aten")
    with overriding(JVP_RULES, sin), pytest.raises(RuntimeError, match="no autograd formula"):
        jvp(sin, (Y,), (Y,))


@pytest.mark.slow
def test_no_operator_is_silently_zero_or_wrong() -> None:
    """Nor does one fail in another way than to say that there is no derivative."""
    verdicts = sweep()
    found = {outcome: {v.op for v in verdicts if v.outcome == outcome} for outcome in ("zero", "wrong", "crash")}
    assert found == {"zero": set(ZEROS), "wrong": set(OTHERS), "crash": set()}


BY_HAND = calls_by_hand()


@pytest.mark.parametrize("name", BY_HAND)
def test_operators_whose_arguments_have_to_fit(name: str) -> None:
    found = [v for call in BY_HAND[name] for v in probe(call)]
    assert {v.outcome for v in found} <= {"right", "refused"}, found
    assert "right" in {v.outcome for v in found}


# ------------------------------------------------------------------------------------------- found by the sweep


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("unitriangular", [False, True])
@pytest.mark.parametrize("upper", [False, True])
def test_triangular_solve_reads_one_triangle(upper: bool, transpose: bool, unitriangular: bool) -> None:
    matrix = torch.rand(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + torch.eye(
        3, dtype=torch.float64
    )
    b = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    f = lambda a, b: torch.triangular_solve(b, a, upper, transpose, unitriangular)[0]
    for found in (verdict("A", 0, lambda a: (f(a, b),), matrix), verdict("b", 1, lambda b: (f(matrix, b),), b)):
        assert found.outcome == "right", found
    assert torch.equal(torch.triangular_solve(b, matrix)[1], vmap(lambda a: torch.triangular_solve(b, a)[1])(matrix))


@pytest.mark.parametrize("padding", [{}, {"padding_idx": 1}, {"padding_idx": 4}], ids=str)
@pytest.mark.parametrize("scale", [{}, {"scale_grad_by_freq": True}], ids=str)
def test_options_of_embedding_change_both_modes(scale: dict[str, Any], padding: dict[str, Any]) -> None:
    options = scale | padding
    weight, indices = torch.arange(15.0).reshape(5, 3).double().sin(), torch.tensor([[0, 1, 1], [4, 3, 4]])
    f = lambda w: F.embedding(indices, w, **options)
    v, u = weight.cos(), f(weight).tan()
    tangent, cotangent = jvp(f, (weight,), (v,))[1], vjp(f, weight)[1](u)[0]
    torch.testing.assert_close((tangent * u).sum(), (cotangent * v).sum())
    factors = torch.tensor([1.0, 0.5, 1, 1, 0.5]) if "scale_grad_by_freq" in options else torch.ones(5)
    factors[options.get("padding_idx", 2)] *= "padding_idx" not in options
    torch.testing.assert_close(tangent, (v * factors[:, None])[indices])


def test_results_in_lists_without_a_formula() -> None:
    step = lambda p: aten._fused_sgd.default(
        [p], [p], [p], weight_decay=0.1, momentum=0.1, lr=0.1, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=False,
    )[0][0].sum()  # fmt: skip
    for run in (lambda: grad(step)(Y), lambda: jvp(step, (Y,), (Y,))):
        run()  # by a definition of ours, without which there is PyTorch's refusal
        refusal = pytest.raises(errors.NoFormulaError, match="_fused_sgd")
        with overriding(DECOMPOSITIONS, aten._fused_sgd.default), refusal:
            run()


@pytest.mark.parametrize("call", [lambda x: forward_ad.make_dual(x, x), forward_ad.unpack_dual], ids=["make", "unpack"])
def test_forward_mode_of_pytorch_is_refused_inside(call: Callable[[Tensor], Any]) -> None:
    with forward_ad.dual_level():
        slope = grad(lambda x: (call(x)[0], x.sum())[1])
        for run in (lambda: vmap(call)(Y), lambda: slope(Y), lambda: jvp(call, (Y,), (Y,))):
            with pytest.raises(errors.InsideTransformError, match="forward_ad"):
                run()


FOREACH: dict[str, Callable[..., Any]] = {
    "maximum": lambda x, s: torch._foreach_maximum([x, x * s], 0.5),
    "minimum": lambda x, s: torch._foreach_minimum([x, x * s], 0.5),
    "clamp_min": lambda x, s: torch._foreach_clamp_min([x, x * s], 0.5),
    "clamp_max": lambda x, s: torch._foreach_clamp_max([x, x * s], 0.5),
    "norm": lambda x, s: torch._foreach_norm([x, x * s], 3),
    "add": lambda x, s: torch._foreach_add([x, x * s], s, alpha=2),
    "mul": lambda x, s: torch._foreach_mul([x, x * s], s),
    "div": lambda x, s: torch._foreach_div([x, x * s], s),
    "exp": lambda x, s: torch._foreach_exp([x, x * s]),
    "lerp": lambda x, s: torch._foreach_lerp([x, x * s], [x * s, x * x], 0.3),
}


@pytest.mark.parametrize("name", FOREACH)
def test_foreach(name: str) -> None:
    f, x, s = FOREACH[name], floats(0.3, 0.7, 0.9), torch.tensor(1.3, dtype=torch.float64)
    assert verdict(name, 0, lambda x: tuple(f(x, s)), x).outcome == "right"
    assert verdict(name, 1, lambda s: tuple(f(x, s)), s).outcome == "right"
