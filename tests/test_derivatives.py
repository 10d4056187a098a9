"""The derivative table against PyTorch's own autograd, entry by entry, on recorded and on hand-made calls."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.func
import torch.nn.functional as F
from derivative_checker import Call, check_entry, recorded_calls
from slow_ways import some

import functrans
from functrans.derivatives import activations, binary, pointwise, reductions, scans, selections, splits, ties, views
from functrans.derivatives.table import DERIVATIVES, Derivative
from functrans.errors import NoFormulaError
from functrans.pytorch.versions import INSTALLED

aten = torch.ops.aten
FAMILIES = {
    Path(m.__file__) for m in (activations, binary, pointwise, reductions, scans, selections, splits, ties, views)
}
ENTRIES = [op for op in DERIVATIVES if Path(DERIVATIVES.place(op).rsplit(":", 1)[0]) in FAMILIES]

#: Where PyTorch's first derivative is NaN, or its forward formula loses digits,
#: although the answer is finite and known.
BETTER_THAN_PYTORCH = {
    aten.fmax.default,  # forward and reverse mode disagree at ties
    aten.clamp.Tensor,
    aten._prelu_kernel.default,
    aten.atan2.default,  # forward mode is NaN at the origin, reverse mode 0
    aten.prod.default,  # a NaN factor is multiplied into its own derivative
    aten.prod.dim_int,
    aten.cumprod.default,
    aten.logsumexp.default,  # where all are -inf PyTorch has 0 for real numbers, NaN for complex ones
    aten.logcumsumexp.default,  # forward mode subtracts the maximum over all, not over what came before
}


def options(op: torch._ops.OpOverload) -> dict[str, bool]:
    return {"trust_nan": False, "trust_forward": False} if op in BETTER_THAN_PYTORCH else {}


# ------------------------------------------------------------------------------------------- hand-made calls


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs."""
    x, y = torch.meshgrid(a, b, indexing="ij")
    return x.reshape(-1).clone(), y.reshape(-1).clone()


X = numbers(-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 3.0)
Z = some(5, dtype=torch.complex128)
M = some(3, 4)
BOOL = torch.tensor([True, False, True, False])
KINKS = numbers(-21.0, -3.0, -2.0, -1.0, -0.5, -0.0, 0.0, 0.3, 0.5, 1.0, 3.0, 6.0, 20.0, 25.0)
TIES = torch.tensor([[2.0, 1.0, 2.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -2.0]], dtype=torch.float64)
WITH_ZEROS = torch.tensor([[2.0, 0.0, 3.0, 0.5], [0.0, 4.0, 0.0, 1.0], [1.5, 2.0, -1.0, 3.0]], dtype=torch.float64)

#: operators of one tensor at their kinks: arguments after the tensor
AT_KINKS: dict[torch._ops.OpOverload, list[tuple]] = {
    aten.abs.default: [()],
    aten.sgn.default: [()],
    aten.sign.default: [()],
    aten.angle.default: [()],
    aten.round.default: [()],
    aten.relu.default: [()],
    aten.threshold.default: [(0.5, 7.0), (0, 0)],
    aten.leaky_relu.default: [(), (0.2,)],
    aten.hardtanh.default: [(), (-0.5, 3.0)],
    aten.hardsigmoid.default: [()],
    aten.hardswish.default: [()],
    aten.softshrink.default: [(), (1.0,)],
    aten.hardshrink.default: [(), (1.0,)],
    aten.elu.default: [(), (0.7, 1.3, 0.5)],
    aten.celu.default: [(), (0.7,)],
    aten.softplus.default: [(), (2.0, 1.0)],
    aten.log_sigmoid.default: [()],
    aten.log_sigmoid_forward.default: [()],
    aten.silu.default: [()],
    aten.mish.default: [()],
    aten.gelu.default: [()],
    aten.sigmoid.default: [()],
    aten.tanh.default: [()],
    aten.clamp.default: [(-1, 1), (None, 0.5), (-0.5, None), (1, -1)],
    aten.clamp_min.default: [(0.5,)],
    aten.clamp_max.default: [(0.5,)],
    aten.pow.Tensor_Scalar: [(0,), (1,), (2,), (3.0,), (0.5,), (-1.0,)],
    aten.copysign.Scalar: [(-1.0,)],
    aten.xlogy.Scalar_Other: [(0.0,), (2.0,), (-1.0,)],
    aten.special_xlog1py.other_scalar: [(-1.0,), (2.0,), (-2.0,)],
    aten.special_entr.default: [()],
    aten.logit.default: [(), (0.3,)],
    aten.sqrt.default: [()],
    aten.log.default: [()],
    aten.reciprocal.default: [()],
    aten.square.default: [()],
    aten.linalg_vector_norm.default: [(2,), (1,), (math.inf,), (-math.inf,), (0.5,), (3,), (0,)],
}

#: operators of two tensors on all pairs of special values: arguments after the two
AT_TIES: dict[torch._ops.OpOverload, list[tuple]] = {
    aten.maximum.default: [()],
    aten.minimum.default: [()],
    aten.fmax.default: [()],
    aten.fmin.default: [()],
    aten.clamp_min.Tensor: [()],
    aten.clamp_max.Tensor: [()],
    aten.clamp.Tensor: [(), (numbers(0.0),)],
    aten.atan2.default: [()],
    aten.hypot.default: [()],
    aten.fmod.Tensor: [()],
    aten.remainder.Tensor: [()],
    aten.xlogy.Tensor: [()],
    aten.special_xlog1py.default: [()],
    aten.copysign.Tensor: [()],
    aten.logaddexp.default: [()],
    aten.logaddexp2.default: [()],
    aten.div.Tensor: [()],
}

BACKWARD_KERNELS = [
    Call(aten.tanh_backward.default, (X, KINKS[4:12].clone())),
    Call(aten.tanh_backward.default, (Z, Z * 0.3)),
    Call(aten.sigmoid_backward.default, (X, KINKS[4:12].clone())),
    Call(aten.sigmoid_backward.default, (Z, Z * 0.3)),
    *(
        Call(op, (some(14), KINKS, *rest))
        for op, *rest in [
            (aten.threshold_backward.default, 0.5),
            (aten.leaky_relu_backward.default, 0.1, False),
            (aten.hardtanh_backward.default, -1.0, 1.0),
            (aten.hardswish_backward.default,),
            (aten.softshrink_backward.default, 0.5),
            (aten.hardshrink_backward.default, 0.5),
            (aten.softplus_backward.default, 2.0, 6.0),
        ]
    ),
    Call(aten.elu_backward.default, (some(14), 0.7, 1.3, 0.5, False, KINKS)),
    Call(aten.elu_backward.default, (some(14), 0.7, 1.3, 0.5, True, KINKS.clamp(min=-0.5))),
    *(Call(aten.gelu_backward.default, (some(14), KINKS), {"approximate": a}) for a in ("none", "tanh")),
    Call(aten.gelu.default, (KINKS,), {"approximate": "tanh"}),
]

RARE = [
    Call(aten.split.sizes, (some(2, 5), [2, 0, 3], 1)),
    Call(aten.div.Scalar_mode, (X, 0.7), {"rounding_mode": "floor"}),
    Call(aten.div.Scalar_mode, (X, 0.7), {"rounding_mode": None}),
    Call(aten.div.Tensor_mode, (X, X + 0.3), {"rounding_mode": None}),
    Call(aten.add.Scalar, (X, 2.0)),
    Call(aten.sub.Scalar, (X, 2.0)),
    Call(aten.mul.Tensor, (X, 2.0j)),
    Call(aten.mul.Tensor, (X, 2)),
    Call(aten.add.Tensor, (X, 2), {"alpha": 3}),
    Call(aten.sub.Tensor, (Z, X[:5].clone()), {"alpha": 1.5 + 1j}),
    Call(aten.fmod.Scalar, (X, 0.7)),
    Call(aten.remainder.Scalar, (X, 0.7)),
    *(Call(aten.pow.Scalar, (base, e)) for base in (2.5, 0.0, -1.5) for e in (X, Z)),
    # PyTorch's mixed derivative at base 0 and exponent 1 depends on the order: a test below has its value
    Call(aten.pow.Tensor_Tensor, grid(X, X[(X != 0) & (X != 1)])),
    Call(aten.pow.Tensor_Tensor, grid(X[X != 0], numbers(1.0))),
    Call(aten._prelu_kernel.default, grid(X[X != 0], X)),
    Call(aten.pow.Tensor_Scalar, (Z, 2)),
    Call(aten.pow.Tensor_Scalar, (Z, 1.5 + 1j)),
    Call(aten.xlogy.Scalar_Self, (1.5, X.abs() + 0.1)),
    Call(aten.special_xlog1py.self_scalar, (1.5, X.abs() + 0.1)),
    Call(aten.special_zeta.self_scalar, (2.5, X.abs() + 0.1)),
    Call(aten.where.self, (BOOL, M, some(3, 1).float())),
    Call(aten.where.ScalarOther, (BOOL, M, 2.0)),
    Call(aten.where.ScalarSelf, (BOOL, 2.0, M)),
    Call(aten.fill.Tensor, (M, numbers(2.0)[0].clone())),
    Call(aten.fill.Scalar, (M, 2.0)),
    Call(aten.masked_fill.Tensor, (some(1, 4), torch.eye(3, 4, dtype=torch.bool), numbers(2.0)[0].clone())),
    Call(aten.complex.default, (M, some(4))),
    Call(aten.lerp.Scalar, (Z, Z * 2, 0.3 + 1j)),
    Call(aten.norm.Scalar, (M, 3)),
    Call(aten.norm.Scalar, (Z, 2)),
    Call(aten.norm.ScalarOpt_dim, (M, None, [1], True)),
    Call(aten.linalg_vector_norm.default, (Z, 3.0)),
    Call(aten.linalg_vector_norm.default, (Z * 0, 2)),
    Call(aten.sum.dim_IntList, (M.float(), [0]), {"dtype": torch.float64}),
    Call(aten.mean.dim, (some(0, 3), [0])),
    Call(aten.var.correction, (M, [1]), {"correction": 1.5}),
    Call(aten.std.correction, (TIES, [1]), {"correction": 0}),
    Call(aten.var.correction, (Z,), {"correction": 1}),
    *(Call(op, (TIES,)) for op in (aten.max.default, aten.min.default, aten.median.default, aten.nanmedian.default)),
    *(Call(op, (TIES, [1])) for op in (aten.amax.default, aten.amin.default)),
    *(Call(op, (TIES,)) for op in (aten.amax.default, aten.amin.default)),
    # before 2.12 PyTorch has no derivative of aminmax to compare with
    *(Call(aten.aminmax.default, (TIES,), {"dim": d}) for d in ((0, None) if INSTALLED >= (2, 12) else ())),
    *(
        Call(op, (TIES, 1))
        for op in (aten.max.dim, aten.min.dim, aten.median.dim, aten.cummax.default, aten.mode.default)
    ),
    Call(aten.sort.default, (TIES, 1)),
    Call(aten.logsumexp.default, (TIES, [0, 1], True)),
    *(Call(op, (WITH_ZEROS, d)) for op in (aten.cumprod.default, aten.prod.dim_int) for d in (0, 1, -1)),
    Call(aten.prod.default, (WITH_ZEROS[2].clone(),)),
    Call(aten.prod.default, (WITH_ZEROS[0].clone(),)),
    Call(aten.prod.default, (WITH_ZEROS[1].clone(),)),
    Call(aten.cumprod.default, (some(2, 7, dtype=torch.complex128), 1)),
    Call(aten.logcumsumexp.default, (some(2, 7), 1)),
    Call(aten.trace.default, (M,)),
    Call(aten._reshape_alias.default, (M, [12], [1])),
    Call(aten.swapaxes.default, (M, 0, 1)),
    Call(aten.swapdims.default, (M, 0, -1)),
    Call(aten.moveaxis.int, (some(2, 3, 4), 0, -1)),
    Call(aten.moveaxis.intlist, (some(2, 3, 4), [0, 1], [2, 0])),
    Call(aten.adjoint.default, (some(2, 3, 4, dtype=torch.complex128),)),
    Call(aten.select_backward.default, (some(4), [3, 4], 0, -1)),
    Call(aten.slice_backward.default, (some(2, 4), [5, 4], 0, 1, 4, 2)),
    Call(aten.slice.Tensor, (M, 1, -3, None, 2)),
    Call(aten.slice.Tensor, (M, 1, None, -1)),
    Call(aten.narrow.default, (M, -1, -3, 2)),
    Call(aten.diagonal_backward.default, (some(3), [3, 4], 1, 0, 1)),
    Call(aten.conj.default, (Z,)),
    Call(aten._conj_physical.default, (Z,)),
    Call(aten._neg_view.default, (X,)),
    Call(aten._to_copy.default, (M,), {"dtype": torch.float32}),
    Call(aten._to_copy.default, (M,), {"dtype": torch.complex128}),
    Call(aten.to.dtype, (Z, torch.float64)),
    Call(aten.to.other, (M, M.float())),
    Call(aten.unsafe_split_with_sizes.default, (M, [1, 3], 1)),
    Call(aten.split.Tensor, (M, 3, -1)),
    Call(aten.chunk.default, (M, 3, 1)),
    Call(aten.cat.default, ([M.float(), some(0), M], 1)),
    Call(aten.stack.default, ([M.float(), M], -1)),
    Call(aten.repeat.default, (M, [2, 1, 3])),
    Call(aten.repeat.default, (M, [2, 0])),
]

#: forward mode of PyTorch gives the tangent the input's dtype, and so loses an imaginary part or digits
PROMOTED = [
    *(
        Call(op, (X, 2.0j))
        for op in (aten.add.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.sub.Scalar, aten.rsub.Scalar)
    ),
    Call(aten.pow.Tensor_Scalar, (X, 2j)),
    Call(aten.pow.Scalar, (2j, X)),
    Call(aten.pow.Scalar, (2j, Z)),
    Call(aten.linalg_vector_norm.default, (M.float(), 2, [0]), {"dtype": torch.float64}),
]

#: operators that PyTorch cannot differentiate, with others that say the same
SUBSTITUTES = [
    (Call(aten.copy.default, (M, some(4).float())), lambda self, src, non_blocking: self * 0 + src),
    (
        Call(aten.remainder.Scalar_Tensor, (5.3, X + 0.2)),
        lambda self, other: torch.remainder(torch.full_like(other, self), other),
    ),
    (
        Call(aten.heaviside.default, (torch.tensor([-1.0, 0.0, 0.0, 2.0]).double(), X[:4])),
        lambda self, values: torch.where(self == 0, values, self.gt(0).double()) + 0 * self,
    ),
    (
        Call(aten.nextafter.default, (X, X + 1)),
        lambda self, other: torch.nextafter(self.detach(), other.detach()) + (self - self.detach()) + 0 * other,
    ),
    (Call(aten.aminmax.default, (TIES,), {"dim": 0}), lambda self, *, dim, **_: (self.amin(dim), self.amax(dim))),
]

HAND_MADE = [
    *(Call(op, (KINKS, *rest)) for op, tails in AT_KINKS.items() for rest in tails),
    *(Call(op, (*grid(X, X), *rest)) for op, tails in AT_TIES.items() for rest in tails),
    *BACKWARD_KERNELS,
    *RARE,
]


# ------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def recorded() -> dict:
    torch.set_num_threads(1)
    return recorded_calls(ENTRIES, per_op=6, samples_per_opinfo=6)


@pytest.mark.parametrize("op", ENTRIES, ids=str)
def test_recorded_calls(op, recorded):
    for call in recorded.get(op, []):
        check_entry(call, **options(op))


@pytest.mark.parametrize("call", HAND_MADE, ids=str)
def test_hand_made_calls(call):
    check_entry(call, order=3, **options(call.op))


@pytest.mark.parametrize("call", PROMOTED, ids=str)
def test_promoted_calls(call):
    check_entry(call, order=3, trust_forward=False)


@pytest.mark.parametrize(("call", "native"), SUBSTITUTES, ids=lambda x: str(x) if isinstance(x, Call) else "")
def test_calls_with_a_substitute(call, native):
    check_entry(call, order=3, native=native)


def test_prelu_at_0_takes_the_weight():
    # forward mode and second derivatives of PyTorch's take the other side there
    reverse = replace(DERIVATIVES.get(aten._prelu_kernel.default), tangent=None)
    check_entry(Call(aten._prelu_kernel.default, grid(X, X)), reverse, order=1)


def derivatives(op, x: torch.Tensor, count: int, *args) -> list[float]:
    """The value and derivatives of ``op(x, *args)`` by ``x``, the first by the table's formula."""
    entry = DERIVATIVES.get(op)
    x = x.detach().clone().requires_grad_()
    y = op(x, *args)
    names = dict(zip((a.name for a in op._schema.arguments), (x, *args), strict=False))
    known = {**names, "grad": torch.ones_like(y), "result": y}
    y1 = entry.formulas["self"](**{n: known[n] for n in entry.needs["self"]})
    found = [y, y1]
    while len(found) <= count:
        found.append(torch.autograd.grad(found[-1], x, create_graph=True)[0])
    return [v.item() for v in found]


def test_sinc_at_0_has_the_derivatives_of_its_taylor_series():
    square = math.pi**2
    expected = [1.0, 0.0, -square / 3, 0.0, square**2 / 5, 0.0, -(square**3) / 7]
    assert derivatives(aten.sinc.default, numbers(0.0)[0], 6) == pytest.approx(expected)


def test_pow_by_an_exponent_of_0_has_its_mixed_derivative():
    # d/dp of p * x ** (p - 1) at p = 0 is 1 / x; PyTorch has 0
    x, p = numbers(0.1, 0.5, 3.0), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    slope = DERIVATIVES.get(aten.pow.Tensor_Tensor).formulas["self"](torch.ones_like(x), x, p)
    assert slope.tolist() == [0.0, 0.0, 0.0]
    (mixed,) = torch.autograd.grad(slope.sum(), p)
    torch.testing.assert_close(mixed, 1 / x)


@pytest.mark.parametrize(("exponent", "mixed"), [(0.0, 1.0), (1.0, 1.0), (1.5, 0.0), (2.0, 0.0), (3.0, 0.0)])
def test_second_derivatives_of_pow_at_base_0_are_those_of_either_order(exponent, mixed):
    x, p = torch.tensor(0.0, dtype=torch.float64), torch.tensor(exponent, dtype=torch.float64)

    def slope(first, second):
        return functrans.grad(functrans.grad(torch.pow, argnums=first), argnums=second)(x, p).item()

    assert slope(0, 1) == slope(1, 0) == mixed
    assert slope(1, 1) == 0
    if exponent == 1.5:
        return  # by the base alone it is infinite
    hessian = functrans.jacfwd(functrans.jacrev(torch.pow, argnums=(0, 1)), argnums=(0, 1))(x, p)
    assert [entry.item() for row in hessian for entry in row] == [2.0 * (exponent == 2), mixed, mixed, 0]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_products_of_zeros_match_their_definition(order):
    # the polynomial x0 * x1 * x2 * x3, which PyTorch differentiates by mul
    def by_mul(x, _=0):
        return x[..., 0] * x[..., 1] * x[..., 2] * x[..., 3]

    for x in WITH_ZEROS:
        check_entry(Call(aten.prod.dim_int, (x, 0)), order=order, native=lambda x, dim, keepdim, dtype: by_mul(x))


def test_logcumsumexp_matches_its_definition():
    # PyTorch's own higher derivatives go through logarithms of cotangents and lose digits
    def by_prefixes(x, dim):
        return torch.stack([x[: k + 1].logsumexp(0) for k in range(x.shape[0])])

    for x in (some(7), some(7) * 30, numbers(1e4, -3.0, 1.0, 9999.0, 1.0), some(6, dtype=torch.complex128)):
        check_entry(Call(aten.logcumsumexp.default, (x, 0)), order=3, native=by_prefixes)


# ------------------------------------------------------------------------------------------- testing the tester


def entry(op, tangent="elementwise", **formulas) -> Derivative:
    """An entry beside the table."""
    names = tuple(a.name for a in op._schema.arguments)
    needs = {n: tuple(inspect.signature(f).parameters) for n, f in formulas.items()}
    if callable(tangent):
        needs["tangent"] = tuple(inspect.signature(tangent).parameters)
    return Derivative(op, formulas, tangent, names, 1, needs)


def cosine(grad, self):
    return grad * self.cos()


WRONG = {
    "value": entry(aten.sin.default, self=lambda grad, self: grad * self.sin()),
    "tangent": entry(aten.sin.default, self=cosine, tangent=lambda self, self_t: self_t * self.sin()),
    "second derivative": entry(
        aten.sin.default, self=lambda grad, self: grad * torch.from_numpy(self.detach().cos().numpy())
    ),
    "not linear in grad": entry(aten.sin.default, self=lambda grad, self: grad.abs() * grad.sgn() * 0.5 * self.cos()),
    "shape": entry(aten.sin.default, tangent=None, self=lambda grad, self: (grad * self.cos()).sum()),
    "dtype": entry(aten.sin.default, tangent=None, self=lambda grad, self: (grad * self.cos()).float()),
    "in place": entry(aten.sin.default, self=lambda grad, self: self.cos().mul_(grad)),
    "reads data": entry(aten.sin.default, self=lambda grad, self: grad * self.cos() * (1 if self[0] > -99 else 0)),
    "detach": entry(aten.sin.default, self=lambda grad, self: grad * self.detach().cos()),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checker_finds_a_wrong_entry(wrong):
    with pytest.raises(AssertionError, match="aten.sin.default"):
        check_entry(Call(aten.sin.default, (X,)), WRONG[wrong])


def test_the_checker_accepts_the_right_entry():
    check_entry(Call(aten.sin.default, (X,)), entry(aten.sin.default, self=cosine), order=3)


def test_the_checker_finds_a_missing_conjugate():
    plain = entry(aten.sin.default, self=cosine)
    with pytest.raises(AssertionError, match="cotangent of self"):
        check_entry(Call(aten.sin.default, (Z,)), plain)


def test_every_entry_is_exercised(recorded):
    by_hand = {call.op for call in [*HAND_MADE, *PROMOTED, *(call for call, _ in SUBSTITUTES)]}
    assert [str(op) for op in ENTRIES if op not in recorded and op not in by_hand] == []


@pytest.mark.parametrize("kind", ["cdist", "pdist"])
def test_distances_have_second_derivatives(kind: str) -> None:
    """PyTorch refuses them; the oracle is the norm of differences, by torch.func."""
    x, other = (torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 5))
    rows, columns = torch.triu_indices(4, 4, 1)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return (torch.cdist(x, other) if kind == "cdist" else torch.pdist(x)).sin().sum()

    def plain(x: torch.Tensor) -> torch.Tensor:
        differences = x[:, None] - other if kind == "cdist" else x[rows] - x[columns]
        return differences.norm(dim=-1).sin().sum()

    torch.testing.assert_close(functrans.hessian(ours)(x), torch.func.hessian(plain)(x))
    twice = functrans.grad(lambda x: (functrans.grad(ours)(x) * x.cos()).sum())(x)
    torch.testing.assert_close(twice, torch.func.grad(lambda x: (torch.func.grad(plain)(x) * x.cos()).sum())(x))
    batch = torch.stack([x, 2 * x])
    got = functrans.vmap(lambda x: functrans.jvp(functrans.grad(ours), (x,), (x,))[1])(batch)
    torch.testing.assert_close(
        got, torch.func.vmap(lambda x: torch.func.jvp(torch.func.grad(plain), (x,), (x,))[1])(batch)
    )


REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "mse_loss": (lambda x: F.mse_loss(x, x.sin()) + F.mse_loss(x.exp(), x), (4, 3)),
    "huber_loss": (lambda x: F.huber_loss(x**2, x.cos(), delta=0.7), (4, 3)),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q.sin(), q).square().sum(), (1, 2, 4, 3)),
    "embedding_bag": (lambda w: F.embedding_bag(torch.tensor([[0, 2], [3, 3]]), w).exp().sum(), (4, 3)),
    "grid_sample": (
        lambda x: (
            F.grid_sample(x[..., :4], x[0, :, :, 3:].unsqueeze(0).tanh() * 0.9, align_corners=False).square().sum()
        ),
        (1, 3, 3, 5),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forward_over_reverse_where_torch_func_refuses(name: str) -> None:
    """Against central differences of the gradient."""
    f, shape = REFUSED[name]
    x, t = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 0.5 for i in (3, 4))
    slope, step = functrans.grad(f), 1e-5
    if name == "grid_sample" and INSTALLED < (2, 12):  # where PyTorch has no second derivative of it
        with pytest.raises(NoFormulaError, match="grid_sampler_2d_backward"):
            functrans.jvp(slope, (x,), (t,))
        return
    expected = (slope(x + step * t) - slope(x - step * t)) / (2 * step)
    torch.testing.assert_close(functrans.jvp(slope, (x,), (t,))[1], expected, rtol=1e-6, atol=1e-7)
