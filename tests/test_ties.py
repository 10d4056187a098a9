"""At kinks, ties and poles derivatives are a choice, and functrans makes that of the installed PyTorch.

Every pointwise entry of the derivative table is compared with plain autograd on all combinations of special values, in
reverse mode, in forward mode with every choice of moving arguments, and at second order. Where PyTorch's modes
contradict each other or have no number, the operator is listed with the reason.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import functrans
from functrans.derivatives.table import DERIVATIVES
from functrans.pytorch.versions import INSTALLED, SPLITS_TIES

aten = torch.ops.aten

POINTS = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)
FEW = (-2.0, -0.5, 0.0, 0.5, 2.0)

#: Operators that choose between operands; NaN is a special value for these.
CHOICES = {
    aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default, aten.clamp.default,
    aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_min.Tensor, aten.clamp_max.default, aten.clamp_max.Tensor,
}  # fmt: skip

#: Pointwise entries whose arguments cannot be any tensors of one shape.
OTHER_ARGUMENTS = {
    aten.linear.default, aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default,
    aten.addr.default, aten._euclidean_dist.default, aten._cdist_forward.default, aten.masked_scatter.default,
    aten.linalg_solve_triangular.default, aten.linalg_pinv.atol_rtol_tensor,
    aten.cholesky_solve.default, aten._softmax_backward_data.default, aten._log_softmax_backward_data.default,
    aten.masked_fill.Tensor, aten.fill.Tensor, aten.complex.default, aten.outer.default, aten.ger.default,
    aten.matmul.default,
}  # fmt: skip

NO_FORMULA = "PyTorch has no derivative"
FORWARD_IS_NO_TRANSPOSE = "PyTorch's forward mode is not the transpose of its reverse mode at ties"
NAN = "PyTorch has NaN, zero times infinity, where the derivative is finite"

#: Where the installed PyTorch is not followed: (operator, what), and why.
DIFFERS: dict[tuple[Any, str], str] = {
    (aten.copy.default, "reverse"): NO_FORMULA,
    (aten.remainder.Scalar_Tensor, "reverse"): NO_FORMULA,
    (
        aten.nextafter.default,
        "reverse",
    ): "PyTorch has 0 at equal arguments, and none before 2.13; it moves with the first",
    (aten.heaviside.default, "reverse"): NO_FORMULA,
    (aten.special_zeta.self_scalar, "forward"): NO_FORMULA,
    (aten.special_zeta.default, "reverse"): NO_FORMULA,
    (aten.special_zeta.other_scalar, "reverse"): NO_FORMULA,
    (aten.igamma.default, "reverse"): NO_FORMULA,
    (aten.igammac.default, "reverse"): NO_FORMULA,
    (aten._standard_gamma_grad.default, "reverse"): NO_FORMULA,
    (aten.hardsigmoid.default, "second"): NO_FORMULA,
    (aten._prelu_kernel.default, "forward"): FORWARD_IS_NO_TRANSPOSE,
    (aten._prelu_kernel.default, "second"): "at 0 PyTorch's second derivative is not that of its first",
    (aten.atan2.default, "forward"): NAN,
    (aten.atan2.default, "second"): NAN,
    (aten.copysign.Tensor, "second"): NAN,
    (aten.copysign.Scalar, "second"): NAN,
    (aten.sinc.default, "second"): NAN,
    (aten.logit.default, "second"): NAN,
    (aten.logit.default, "forward"): "a negative eps is none; PyTorch's forward mode takes it for bounds",
    (aten.pow.Tensor_Tensor, "second"): "PyTorch drops the mixed derivative 1 / x where the exponent is 0",
}
#: What PyTorch calls non-differentiable (J, Y, I and K up to 2.14): derivatives/{airy,bessel,orthogonal}.py has the
#: derivatives, and test_derivatives_special.py their oracle.
WITHOUT_DERIVATIVE = re.compile(
    r"aten::special_(airy_ai|scaled_modified|spherical|.*_polynomial)_"
    if INSTALLED >= (2, 15)
    else r"aten::special_(airy_ai|bessel|modified_bessel|scaled_modified|spherical|.*_polynomial)_"
)
DIFFERS |= {(op, "reverse"): NO_FORMULA for op in DERIVATIVES if WITHOUT_DERIVATIVE.match(op.name() + "_")}
if INSTALLED >= (2, 15):
    DIFFERS[aten.special_bessel_y1.default, "second"] = "PyTorch has NaN at the pole, a difference of infinities"
if not SPLITS_TIES:
    DIFFERS[aten.fmax.default, "forward"] = FORWARD_IS_NO_TRANSPOSE
    DIFFERS[aten.clamp.Tensor, "forward"] = FORWARD_IS_NO_TRANSPOSE


def choices(op: Any, argument: Any, tensors: Iterator[Tensor]) -> list[Any]:
    """The values that are tried for one argument."""
    kind = str(argument.type)
    if argument.name in ("condition", "mask"):
        return [next(tensors) > 0]
    if kind == "Tensor":
        return [next(tensors)]
    if kind == "Optional[Tensor]":
        return [next(tensors), None]
    if kind in ("number", "float", "Optional[number]", "Optional[float]"):
        optional = [None] if kind.startswith("Optional") else []
        return (
            [argument.default_value] if argument.has_default_value() and not optional else [-0.5, 0.5, 1.0, *optional]
        )
    if argument.has_default_value() or kind == "Optional[str]":
        return [argument.default_value]
    return [1 if kind == "int" else False]


def calls(op: Any) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    schema = op._schema.arguments
    count = sum("Tensor" in str(a.type) for a in schema)
    points = (POINTS if count < 3 else FEW) + ((math.nan,) if op in CHOICES else ())
    columns = (torch.tensor(c, dtype=torch.float64) for c in zip(*itertools.product(points, repeat=count), strict=True))
    for values in itertools.product(*[choices(op, a, columns) for a in schema]):
        kwargs = {a.name: v for a, v in zip(schema, values, strict=True) if a.kwarg_only}
        if values[1:] != (None, None) or "clamp" not in op.name():
            yield [v for a, v in zip(schema, values, strict=True) if not a.kwarg_only], kwargs


class Case:
    """One call, as a function of what is differentiable, with directions that tell its elements apart."""

    def __init__(self, op: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        formulas = DERIVATIVES.get(op).formulas
        names = [a.name for a in op._schema.arguments]
        self.op, self.args, self.kwargs = op, args, kwargs
        self.places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and names[i] in formulas]
        self.inputs = tuple(args[i] for i in self.places)
        self.size = self.inputs[0].numel()
        self.cotangent = torch.linspace(0.5, 1.5, self.size, dtype=torch.float64)
        self.tangents = tuple(torch.linspace(0.3, 1.1 + i, self.size, dtype=torch.float64) for i in self.places)

    def __call__(self, *inputs: Any) -> Any:
        args = list(self.args)
        for i, x in zip(self.places, inputs, strict=True):
            args[i] = x
        out = self.op(*args, **self.kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def reverse(self) -> tuple[list[Any], list[Any]]:
        inputs = [x.clone().requires_grad_() for x in self.inputs]
        expected = torch.autograd.grad(self(*inputs), inputs, self.cotangent, allow_unused=True)
        return list(functrans.vjp(self, *self.inputs)[1](self.cotangent)), list(expected)

    def forward(self) -> tuple[list[Any], list[Any]]:
        """The tangent of the output for every choice of arguments that move."""
        got, expected = [], []
        for moves in itertools.product((False, True), repeat=len(self.inputs)):
            if not any(moves):
                continue
            with forward_ad.dual_level():
                triples = zip(self.inputs, self.tangents, moves, strict=True)
                out = self(*[forward_ad.make_dual(x, t) if m else x for x, t, m in triples])
                tangent = forward_ad.unpack_dual(out).tangent
                expected.append(None if tangent is None else tangent.clone())

            def moving(*xs: Any, moves: Any = moves) -> Any:
                given = iter(xs)
                return self(*[next(given) if m else x for x, m in zip(self.inputs, moves, strict=True)])

            pairs = [(x, t) for x, t, m in zip(self.inputs, self.tangents, moves, strict=True) if m]
            got.append(functrans.jvp(moving, *map(tuple, zip(*pairs, strict=True)))[1])
        # at NaN PyTorch's forward mode gives one operand all, its reverse mode all of them
        unknown = torch.stack([x.isnan() for x in self.inputs if x.is_floating_point()]).any(0)
        unknown |= torch.stack([a.isnan() for a in self.args if isinstance(a, Tensor)]).any(0)
        return [g.masked_fill(unknown, 0) for g in got], [
            None if e is None else e.masked_fill(unknown, 0) for e in expected
        ]

    def second(self) -> tuple[list[Any], list[Any]]:
        """The gradient of the pullback along the tangents."""

        def along(gradients: Any) -> Any:
            return sum((t * g).sum() for t, g in zip(self.tangents, gradients, strict=True) if g is not None)

        inputs = [x.clone().requires_grad_() for x in self.inputs]
        first = torch.autograd.grad(self(*inputs), inputs, self.cotangent, create_graph=True, allow_unused=True)
        total = along(first)
        if not isinstance(total, Tensor) or not total.requires_grad:
            expected: Any = [None] * len(inputs)
        else:
            expected = torch.autograd.grad(total, inputs, allow_unused=True)
        pulled = functrans.grad(
            lambda *xs: along(functrans.vjp(self, *xs)[1](self.cotangent)), argnums=tuple(range(len(inputs)))
        )
        return list(pulled(*self.inputs)), list(expected)


MODES = {"reverse": Case.reverse, "forward": Case.forward, "second": Case.second}
ENTRIES = [
    op
    for op in DERIVATIVES
    if op.namespace == "aten"
    and DERIVATIVES.get(op).pointwise
    and DERIVATIVES.get(op).formulas
    and op not in OTHER_ARGUMENTS
]


def difference(case: Case, mode: Callable[[Case], tuple[list[Any], list[Any]]]) -> str:
    """The first element at which the two differ, or nothing."""
    zero = torch.zeros(case.size, dtype=torch.float64)
    try:
        got, expected = mode(case)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, functrans.errors.FunctransError):
            raise
        return f"PyTorch: {error}"
    for n, (g, e) in enumerate(zip(got, expected, strict=True)):
        g, e = (zero if x is None else x.expand(case.size) for x in (g, e))
        # hardsigmoid's kernel has 1 / 6 in single precision
        same = torch.isclose(g, e, rtol=1e-7, atol=1e-12, equal_nan=True)
        if not bool(same.all()):
            k = int((~same).nonzero()[0])
            at = [a[k].item() if isinstance(a, Tensor) else a for a in case.args]
            return f"at {at}: result {n} is {g[k]:.4f}, PyTorch's {e[k]:.4f}"
    return ""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ENTRIES, ids=str)
def test_special_values(op: Any, mode: str) -> None:
    cases = [Case(op, args, kwargs) for args, kwargs in calls(op)]
    found = next(filter(None, (difference(case, MODES[mode]) for case in cases)), "")
    assert cases
    if (op, mode) in DIFFERS:
        assert found, f"{op} {mode} agrees now: delete it from DIFFERS"
    elif not (mode != "reverse" and (op, "reverse") in DIFFERS):
        assert not found


# ------------------------------------------------------------------------------------------- vectors with ties

TIED = torch.tensor([2.0, 0.0, 2.0, -1.0, 0.0, -1.0, 1.0], dtype=torch.float64)
EQUAL = torch.zeros(4, dtype=torch.float64)
GAPS = torch.tensor([1.0, math.nan, 1.0, 3.0], dtype=torch.float64)
SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(),
    "amin": lambda x: x.amin(),
    "amax dim": lambda x: x.amax(0),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max dim": lambda x: x.max(0).values,
    "min dim": lambda x: x.min(0).values,
    "aminmax": lambda x: torch.stack(torch.aminmax(x, dim=0)),
    "median": lambda x: x.median(),
    "nanmedian dim": lambda x: x.nanmedian(0).values,
    "mode": lambda x: x.mode(0).values,
    "kthvalue": lambda x: x.kthvalue(2).values,
    "cummax": lambda x: x.cummax(0).values,
    "cummin": lambda x: x.cummin(0).values,
    "sort": lambda x: x.sort().values,
    "topk": lambda x: x.topk(2).values,
    "prod": lambda x: x.prod(),
    "cumprod": lambda x: x.cumprod(0),
    "vector_norm": torch.linalg.vector_norm,
    "vector_norm inf": lambda x: torch.linalg.vector_norm(x, math.inf),
    "std": lambda x: x.std(),
    "dist": lambda x: torch.dist(x, x.detach()),
    "cdist": lambda x: torch.cdist(x.unsqueeze(1), x.detach().unsqueeze(1)),
    "pdist": lambda x: torch.pdist(x.unsqueeze(1)),
    "max_pool1d": lambda x: torch.nn.functional.max_pool1d(x[None, None], 3, 2),
    "adaptive_max_pool1d": lambda x: torch.nn.functional.adaptive_max_pool1d(x[None, None], 2),
}
if INSTALLED < (2, 12):  # PyTorch has no derivative
    del SELECTIONS["aminmax"]
#: PyTorch's forward mode is missing, or is not the transpose of its reverse mode.
REVERSE_ONLY = {"std", "dist", "cdist", "pdist", "cumprod", "prod", "vector_norm"}
#: At NaN, PyTorch's tangent is NaN whatever was chosen, and a NaN factor is multiplied into its own derivative.
OTHER_AT_NAN = {"max", "min", "median", "prod", "cumprod"}


@pytest.mark.parametrize(
    ("name", "x"),
    [
        pytest.param(name, x, id=f"{name}-{kind}")
        for name in SELECTIONS
        for kind, x in (("tied", TIED), ("equal", EQUAL))
    ]
    + [pytest.param(name, GAPS, id=f"{name}-nan") for name in SELECTIONS if name not in OTHER_AT_NAN],
)
def test_vectors_with_ties(name: str, x: Tensor) -> None:
    f = SELECTIONS[name]
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    cotangent = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).reshape(out.shape)
    (expected,) = torch.autograd.grad(out, leaf, cotangent)
    got = functrans.vjp(f, x)[1](cotangent)[0]
    torch.testing.assert_close(got, expected, equal_nan=True)
    if name not in REVERSE_ONLY:
        tangent = torch.linspace(0.3, 1.1, x.numel(), dtype=torch.float64)
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent
            torch.testing.assert_close(functrans.jvp(f, (x,), (tangent,))[1], moved, equal_nan=True)


@pytest.mark.parametrize("norm", [torch.linalg.vector_norm, torch.norm, lambda x: torch.dist(x, 0 * x)])
@pytest.mark.parametrize("modes", [m for k in (1, 2, 3) for m in itertools.product("gj", repeat=k)], ids="".join)
def test_norms_of_nothing_have_zeros(norm: Callable[[Tensor], Tensor], modes: tuple[str, ...]) -> None:
    """In every order and mode, where PyTorch has NaN from the second on."""

    def derivative(mode: str, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if mode == "g":
            return functrans.grad(lambda x: f(x).sum())
        return lambda x: functrans.jvp(f, (x,), (torch.ones_like(x),))[1]

    f = norm
    for mode in reversed(modes):
        f = derivative(mode, f)
    assert not f(torch.zeros(3, dtype=torch.float64)).any()


# ------------------------------------------------------------------------------------------- the numbers

#: name: function, arguments, derivatives up to PyTorch 2.13, derivatives since 2.14
NUMBERS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "clamp at the lower number": (lambda x: x.clamp(0, 1), (0.0,), (1.0,), (0.0,)),
    "clamp at the upper number": (lambda x: x.clamp(0, 1), (1.0,), (1.0,), (0.0,)),
    "clip, one bound": (lambda x: torch.clip(x, max=2.0), (2.0,), (1.0,), (0.0,)),
    "clamp_min at a number": (lambda x: torch.clamp_min(x, -1.0), (-1.0,), (1.0,), (0.0,)),
    "clamp_ in place": (lambda x: (x * 1).clamp_(min=3), (3.0,), (1.0,), (0.0,)),
    "clamp inside": (lambda x: x.clamp(0, 1), (0.5,), (1.0,), (1.0,)),
    "clamp at the lower tensor": (torch.clamp, (1.0, 1.0, 2.0), (1.0, 0.0, 0.0), (0.5, 0.5, 0.0)),
    "clamp at the upper tensor": (torch.clamp, (2.0, 1.0, 2.0), (1.0, 0.0, 0.0), (0.5, 0.0, 0.5)),
    "clamp at two equal tensors": (torch.clamp, (1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
    "clamp below two equal tensors": (torch.clamp, (0.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    "clamp, tensors in the wrong order": (torch.clamp, (1.0, 2.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 1.0)),
    "clamp_min at a tensor": (torch.clamp_min, (1.0, 1.0), (1.0, 0.0), (0.5, 0.5)),
    "clamp_max at a tensor": (torch.clamp_max, (1.0, 1.0), (1.0, 0.0), (0.5, 0.5)),
    "maximum": (torch.maximum, (1.0, 1.0), (0.5, 0.5), (0.5, 0.5)),
    "minimum": (torch.minimum, (1.0, 1.0), (0.5, 0.5), (0.5, 0.5)),
    "fmax": (torch.fmax, (1.0, 1.0), (1.0, 0.0), (0.5, 0.5)),
    "fmin": (torch.fmin, (1.0, 1.0), (1.0, 0.0), (0.5, 0.5)),
    "relu": (torch.relu, (0.0,), (0.0,), (0.0,)),
    "relu6": (torch.nn.functional.relu6, (6.0,), (0.0,), (0.0,)),
    "hardtanh": (torch.nn.functional.hardtanh, (1.0,), (0.0,), (0.0,)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_per_version(name: str) -> None:
    f, values, until_2_13, since_2_14 = NUMBERS[name]
    expected = since_2_14 if SPLITS_TIES else until_2_13
    xs = tuple(torch.tensor(v) for v in values)
    every = tuple(range(len(xs)))
    leaves = [x.clone().requires_grad_() for x in xs]
    assert torch.autograd.grad(f(*leaves), leaves) == expected
    assert functrans.grad(f, argnums=every)(*xs) == expected
    for i, (x, e) in enumerate(zip(xs, expected, strict=True)):
        assert functrans.jvp(lambda x, i=i: f(*xs[:i], x, *xs[i + 1 :]), (x,), (torch.tensor(1.0),))[1] == e
        # the batch: at the tie, and far on either side of it
        batch = torch.stack([x, x - 9, x + 9])
        args = (*xs[:i], batch, *xs[i + 1 :])
        in_dims = tuple(0 if j == i else None for j in every)
        assert functrans.vmap(functrans.grad(f, argnums=i), in_dims=in_dims)(*args)[0] == e
    # (f ** 2 / 2)'' = f' f' + f f''; what is linear on either side has no f''
    half_square = lambda *xs: f(*xs) ** 2 / 2
    for outer, inner in itertools.product((functrans.jacfwd, functrans.jacrev), repeat=2):
        found = outer(inner(half_square, argnums=every), argnums=every)(*xs)
        assert found == tuple(tuple(torch.tensor(a * b) for b in expected) for a in expected)
