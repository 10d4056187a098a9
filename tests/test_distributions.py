"""torch.distributions under every transform, with the checks of parameters and values that are on by default.

The truth is a loop over the examples with plain PyTorch and its autograd.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from loop import for_each
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints

from functrans import grad, jvp, vmap
from functrans.errors import DataDependentError, FunctransError
from functrans.interpreters.vmap.rules.random import RandomnessError

N = 3  # examples


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Numbers between 0.2 and 0.8, N times of this shape."""
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 0.6 * torch.rand(N, *shape, dtype=torch.float64, generator=generator)


def spd(size: int, seed: int = 0) -> Tensor:
    """Positive definite matrices."""
    a = draw(size, size, seed=seed)
    return a @ a.mT + size * torch.eye(size, dtype=torch.float64)


def simplex(size: int, seed: int = 0) -> Tensor:
    return torch.softmax(draw(size, seed=seed), -1)


def counts(*shape: int) -> Tensor:
    return (4 * draw(*shape)).floor()


class Case(NamedTuple):
    """A distribution: how one example's is made, of which parameters, and values in its support."""

    make: Callable[..., D.Distribution]
    parameters: tuple[Tensor, ...]
    values: Tensor
    #: a parameter's place, and what no example's parameter may be there; None: everything may be
    invalid: tuple[int, float] | None = (0, -1.0)


def mixture(weights: Tensor, loc: Tensor, scale: Tensor) -> D.Distribution:
    return D.MixtureSameFamily(D.Categorical(weights), D.Normal(loc, scale))


def mixture_of_vectors(weights: Tensor, loc: Tensor, scale: Tensor) -> D.Distribution:
    return D.MixtureSameFamily(D.Categorical(weights), D.Independent(D.Normal(loc, scale), 1))


def transformed(loc: Tensor, scale: Tensor) -> D.Distribution:
    steps = [D.AffineTransform(loc, scale), D.SigmoidTransform()]
    return D.TransformedDistribution(D.Normal(loc, scale), steps)


def correlation_factors(size: int) -> Tensor:
    factors = draw(size, size).tril()
    return factors / factors.norm(dim=-1, keepdim=True)


TRUTHS = torch.tensor([[0.0, 1.0]] * N).double()
LOWER = torch.linalg.cholesky(spd(3))
EYE = torch.eye(3, dtype=torch.float64)
A, B, C = draw(2), draw(2, seed=1), draw(2, seed=2)
CASES = {
    "Bernoulli": Case(D.Bernoulli, (A,), TRUTHS),
    "Bernoulli logits": Case(lambda logits: D.Bernoulli(logits=logits), (A,), TRUTHS, None),
    "Beta": Case(D.Beta, (A, B), C),
    "Binomial": Case(lambda p: D.Binomial(5, p), (A,), counts(2)),
    "Binomial counts": Case(D.Binomial, (counts(2) + 4, B), counts(2), (1, -1.0)),
    "Categorical": Case(D.Categorical, (simplex(4),), counts(), (0, math.nan)),
    "Categorical logits": Case(lambda logits: D.Categorical(logits=logits), (draw(4),), counts(), (0, math.nan)),
    "Cauchy": Case(D.Cauchy, (A, B), C, (1, -1.0)),
    "Chi2": Case(D.Chi2, (A,), C),
    "ContinuousBernoulli": Case(lambda p: D.ContinuousBernoulli(p, validate_args=True), (A,), C),
    "Dirichlet": Case(D.Dirichlet, (draw(3),), simplex(3)),
    "Exponential": Case(D.Exponential, (A,), C),
    "FisherSnedecor": Case(D.FisherSnedecor, (4 + A, 5 + B), C),
    "Gamma": Case(D.Gamma, (A, B), C),
    "GeneralizedPareto": Case(
        D.GeneralizedPareto, (A.float(), B.float(), C.float() / 2), 1 + A.float(), (1, -1.0)
    ),  # PyTorch's takes no float64
    "Geometric": Case(D.Geometric, (A,), counts(2)),
    "Gumbel": Case(D.Gumbel, (A, B), C, (1, -1.0)),
    "HalfCauchy": Case(D.HalfCauchy, (A,), C),
    "HalfNormal": Case(D.HalfNormal, (A,), C),
    "Independent": Case(lambda loc, scale: D.Independent(D.Normal(loc, scale), 1), (A, B), C, (1, -1.0)),
    "InverseGamma": Case(D.InverseGamma, (2 + A, B), C),
    "Kumaraswamy": Case(D.Kumaraswamy, (A, B), C),
    "LKJCholesky": Case(lambda c: D.LKJCholesky(3, c), (draw(),), correlation_factors(3)),
    "Laplace": Case(D.Laplace, (A, B), C, (1, -1.0)),
    "LogNormal": Case(D.LogNormal, (A, B), C, (1, -1.0)),
    "LogisticNormal": Case(D.LogisticNormal, (A, B), simplex(3), (1, -1.0)),
    "LowRankMultivariateNormal": Case(
        D.LowRankMultivariateNormal, (draw(3), draw(3, 2, seed=1), draw(3, seed=2)), draw(3, seed=3), (0, math.nan)
    ),
    "MixtureSameFamily": Case(mixture, (simplex(3), draw(3), draw(3, seed=1)), draw(seed=2), (2, -1.0)),
    "MixtureSameFamily of vectors": Case(
        mixture_of_vectors, (simplex(3), draw(3, 2), draw(3, 2, seed=1)), C, (2, -1.0)
    ),
    "Multinomial": Case(
        lambda p: D.Multinomial(4, p), (simplex(3),), torch.tensor([[1.0, 2.0, 1.0]] * N).double(), (0, math.nan)
    ),
    "MultivariateNormal": Case(D.MultivariateNormal, (draw(3), spd(3)), draw(3, seed=2), (1, -1.0)),
    "MultivariateNormal precision": Case(
        lambda m, p: D.MultivariateNormal(m, precision_matrix=p), (draw(3), spd(3)), draw(3, seed=2), (1, -1.0)
    ),
    "MultivariateNormal scale_tril": Case(
        lambda m, l: D.MultivariateNormal(m, scale_tril=l), (draw(3), LOWER), draw(3, seed=2), (1, -1.0)
    ),
    "NegativeBinomial": Case(D.NegativeBinomial, (3 + A, B), counts(2), (1, -1.0)),
    "Normal": Case(D.Normal, (A, B), C, (1, -1.0)),
    "Normal of numbers": Case(D.Normal, (draw(), draw(seed=1)), draw(seed=2), (1, -1.0)),
    "Normal expanded": Case(
        lambda loc, scale: D.Normal(loc, scale).expand((2,)), (draw(), draw(seed=1)), C, (1, -1.0)
    ),
    "OneHotCategorical": Case(D.OneHotCategorical, (simplex(3),), EYE, (0, math.nan)),
    "OneHotCategoricalStraightThrough": Case(D.OneHotCategoricalStraightThrough, (simplex(3),), EYE, (0, math.nan)),
    "Pareto": Case(D.Pareto, (A, 3 + B), 1 + C),
    "Poisson": Case(D.Poisson, (A,), counts(2)),
    "RelaxedBernoulli": Case(D.RelaxedBernoulli, (draw(), B), C, (1, -1.0)),
    "RelaxedOneHotCategorical": Case(
        D.RelaxedOneHotCategorical, (draw(), simplex(3)), simplex(3, seed=1), (1, math.nan)
    ),
    "StudentT": Case(D.StudentT, (3 + A, B, C), draw(2, seed=3)),
    "TransformedDistribution": Case(transformed, (A, B), C, (1, -1.0)),
    "Uniform": Case(D.Uniform, (A - 1, 1 + B), C, (0, 5.0)),
    "VonMises": Case(D.VonMises, (A, B), C, (1, -1.0)),
    "Weibull": Case(D.Weibull, (A, B), C),
    "Wishart": Case(D.Wishart, (5 + draw(), spd(3)), spd(3, seed=1), (1, -1.0)),
}
QUANTITIES = {
    "mean": lambda d, x: d.mean,
    "mode": lambda d, x: d.mode,
    "variance": lambda d, x: d.variance,
    "stddev": lambda d, x: d.stddev,
    "log_prob": lambda d, x: d.log_prob(x),
    "cdf": lambda d, x: d.cdf(x),
    "icdf": lambda d, x: d.icdf(x),
    "entropy": lambda d, x: d.entropy(),
    "perplexity": lambda d, x: d.perplexity(),
    "enumerate_support": lambda d, x: d.enumerate_support(),
    "in the support": lambda d, x: d.support.check(x),
    "expanded": lambda d, x: d.expand((2, *d.batch_shape)).log_prob(x),
}
#: What torch.distributions says of what it has not.
LACKING = (NotImplementedError, AttributeError)

#: What vmap refuses, with the reason.
REFUSED = {
    **dict.fromkeys(
        [("Binomial counts", quantity) for quantity in ("entropy", "perplexity", "enumerate_support")],
        "how many outcomes there are is another number for each example",
    ),
    ("kl", "Binomial counts", "Binomial"): "it writes x[mask] with what it computed of x[mask], of different sizes",
}

def first(batches: Sequence[Tensor]) -> list[Tensor]:
    return [x[0] for x in batches]


def test_all_distributions_are_here() -> None:
    abstract = {D.Distribution, D.ExponentialFamily}
    made = {type(case.make(*first(case.parameters))) for case in CASES.values()}
    exported = {x for x in vars(D).values() if isinstance(x, type) and issubclass(x, D.Distribution)}
    assert made == exported - abstract


@pytest.mark.parametrize("name", CASES)
def test_quantities(name: str) -> None:
    make, parameters, values, _ = CASES[name]
    checked = 0
    for quantity, ask in QUANTITIES.items():

        def f(*rows: Tensor, ask: Any = ask) -> Any:
            return ask(make(*rows[:-1]), rows[-1])

        if (name, quantity) in REFUSED:
            with pytest.raises(DataDependentError):
                vmap(f)(*parameters, values)
            continue
        try:
            expected = for_each(f)(*parameters, values)
        except LACKING as error:
            with pytest.raises(type(error)):
                vmap(f)(*parameters, values)
            continue
        torch.testing.assert_close(vmap(f)(*parameters, values), expected, equal_nan=True)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name: str) -> None:
    """Of log_prob by the parameters, and by the value where it is no count: in all orders of vmap, grad and jvp."""
    make, parameters, values, _ = CASES[name]
    arguments = (*parameters, values)
    numbers = tuple(range(len(arguments) - ("Categorical" in (name, name.removesuffix(" logits")))))

    def f(*rows: Tensor) -> Tensor:
        return make(*rows[:-1]).log_prob(rows[-1]).sum()

    def truth(*rows: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() if i in numbers else x for i, x in enumerate(rows)]
        wanted = [leaves[i] for i in numbers]
        return list(torch.autograd.grad(f(*leaves), wanted, allow_unused=True, materialize_grads=True))

    rows = zip(*arguments, strict=True)
    expected = tuple(torch.stack(parts) for parts in zip(*[truth(*row) for row in rows], strict=True))
    torch.testing.assert_close(vmap(grad(f, numbers))(*arguments), expected)
    torch.testing.assert_close(grad(lambda *a: vmap(f)(*a).sum(), numbers)(*arguments), expected)

    directions = [torch.randn_like(x) for x in expected]
    along = sum((g * d).flatten().sum() for g, d in zip(expected, directions, strict=True))

    def tangent(rows: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        return jvp(lambda *some: f(*some, *rows[len(some) :]), tuple(rows[: len(numbers)]), tuple(directions))[1]

    torch.testing.assert_close(vmap(tangent)(arguments, directions).sum(), along)

    def batched(*some: Tensor) -> Tensor:
        return vmap(f)(*some, *arguments[len(some) :]).sum()

    torch.testing.assert_close(jvp(batched, arguments[: len(numbers)], tuple(directions))[1], along)


@pytest.mark.parametrize("name", CASES)
def test_an_invalid_parameter_of_one_example(name: str) -> None:
    """It is refused as in a loop, by the check of torch.distributions itself, wherever the transforms are."""
    make, parameters, values, invalid = CASES[name]
    if invalid is None:
        pytest.skip("everything is valid")
    place, number = invalid
    bad = [x.clone() for x in parameters]
    bad[place][1] = number

    def f(*rows: Tensor) -> Tensor:
        return make(*rows[:-1]).log_prob(rows[-1])

    pattern = "to satisfy the constraint|is not defined when low>= high|probs has invalid values"
    for run in (
        lambda: for_each(f)(*bad, values),
        lambda: vmap(f)(*bad, values),
        lambda: vmap(grad(lambda *rows: f(*rows).sum()))(*bad, values),
        lambda: grad(lambda *batches: vmap(f)(*batches).sum())(*bad, values),
        lambda: vmap(vmap(f))(*[x[None] for x in bad], values[None]),
        lambda: jvp(lambda x: vmap(f)(*bad[:-1], x, values), (bad[-1],), (bad[-1],)),
    ):
        with pytest.raises(ValueError, match=pattern) as info:
            run()
        assert not isinstance(info.value, DataDependentError)


@pytest.mark.parametrize("name", CASES)
def test_an_invalid_value_of_one_example(name: str) -> None:
    make, parameters, values, _ = CASES[name]
    values = values.clone()
    values[1] = math.nan if values.is_floating_point() else -1

    def f(*rows: Tensor) -> Tensor:
        return make(*rows[:-1]).log_prob(rows[-1])

    for run in (lambda: for_each(f)(*parameters, values), lambda: vmap(f)(*parameters, values)):
        with pytest.raises(ValueError, match="Expected value argument"):
            run()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["sample", "rsample"])
def test_samples(name: str, how: str) -> None:
    """Examples with the same parameters draw different samples, or the same, as randomness says, or none."""
    make, parameters, _, _ = CASES[name]
    one = make(*first(parameters))
    if how == "rsample" and not one.has_rsample:
        pytest.skip("no rsample")
    alike = [x[:1].expand_as(x) for x in parameters]

    def f(*rows: Tensor) -> Tensor:
        return getattr(make(*rows), how)((5,))

    if name == "VonMises":
        pytest.skip("see below")
    expected = getattr(one, how)((5,))
    drawn = vmap(f, randomness="different")(*parameters)
    assert (drawn.shape, drawn.dtype) == ((N, *expected.shape), expected.dtype)
    for row, x in zip(zip(*parameters, strict=True), drawn, strict=True):
        d = make(*row)
        assert d.support.check(x.to(torch.float64) if name == "Wishart" else x).all()
    long = vmap(lambda *rows: getattr(make(*rows), how)((20,)), randomness="different")(*alike)
    assert not torch.equal(long[0], long[1]) and not torch.equal(long[1], long[2])
    with pytest.raises(RandomnessError):
        vmap(f)(*parameters)
    shared = vmap(lambda _: getattr(one, how)((20,)), randomness="same")(torch.zeros(N))
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[1], shared[2])


def test_samples_that_are_drawn_until_all_are_accepted() -> None:
    """If the examples would stop at different times it is an error, and no samples of another number of draws."""
    make, parameters, _, _ = CASES["VonMises"]
    refused = 0
    for seed in range(10):
        torch.manual_seed(seed)
        try:
            drawn = vmap(lambda *rows: make(*rows).sample((5,)), randomness="different")(*parameters)
        except DataDependentError:
            refused += 1
        else:
            assert drawn.shape == (N, 5, 2) and (drawn.abs() <= math.pi).all()
    assert refused


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.make(*first(case.parameters)).has_rsample])
def test_samples_have_the_mean_of_their_own_parameters(name: str) -> None:
    make, parameters, _, _ = CASES[name]
    count = 4000
    try:
        expected = [for_each(lambda *r, a=a: getattr(make(*r), a))(*parameters) for a in ("mean", "variance")]
    except LACKING:
        pytest.skip("no mean or variance")
    if not all(x.isfinite().all() for x in expected) or name == "Wishart":
        pytest.skip("no finite moments, or samples that PyTorch corrects")
    torch.manual_seed(0)
    drawn = vmap(lambda *rows: make(*rows).rsample((count,)), randomness="different")(*parameters)
    error = (drawn.mean(1) - expected[0]).abs() / (expected[1] / count).sqrt()
    assert error.max() < 6


def pairs() -> Iterator[tuple[str, str]]:
    """The cases of which PyTorch knows the divergence."""
    for p, one in CASES.items():
        for q, other in CASES.items():
            try:
                D.kl_divergence(one.make(*first(one.parameters)), other.make(*first(other.parameters)))
            except (NotImplementedError, ValueError, RuntimeError):
                continue
            yield p, q


PAIRS = list(pairs())


def test_many_divergences_are_here() -> None:
    assert len(PAIRS) > 150


@pytest.mark.parametrize("p", sorted({p for p, _ in PAIRS}))
def test_divergences(p: str) -> None:
    for other in [q for one, q in PAIRS if one == p]:
        count, batches = len(CASES[p].parameters), (*CASES[p].parameters, *[x.flip(0) for x in CASES[other].parameters])

        def f(*rows: Tensor, other: str = other, count: int = count) -> Tensor:
            return D.kl_divergence(CASES[p].make(*rows[:count]), CASES[other].make(*rows[count:]))

        if ("kl", p, other) in REFUSED:
            with pytest.raises(FunctransError):
                vmap(f)(*batches)
            continue
        try:
            expected = for_each(f)(*batches)
        except LACKING as error:
            with pytest.raises(type(error)):
                vmap(f)(*batches)
            continue
        torch.testing.assert_close(vmap(f)(*batches), expected, equal_nan=True)


X, S = draw(4) - 0.5, draw(4, seed=1)
TRANSFORMS: dict[str, tuple[Callable[[Tensor, Tensor], D.Transform], Tensor]] = {
    "AbsTransform": (lambda loc, scale: D.AbsTransform(), X),
    "AffineTransform": (D.AffineTransform, X),
    "AffineTransform cached": (lambda loc, scale: D.AffineTransform(loc, scale, cache_size=1), X),
    "CatTransform": (
        lambda loc, scale: D.CatTransform([D.AffineTransform(loc[:2], scale[:2]), D.ExpTransform()], lengths=[2, 2]), X
    ),
    "ComposeTransform": (lambda loc, scale: D.ComposeTransform([D.AffineTransform(loc, scale), D.TanhTransform()]), X),
    "CorrCholeskyTransform": (lambda loc, scale: D.CorrCholeskyTransform(), draw(3)),
    "CumulativeDistributionTransform": (lambda loc, scale: D.CumulativeDistributionTransform(D.Normal(loc, scale)), X),
    "ExpTransform": (lambda loc, scale: D.ExpTransform(), X),
    "IndependentTransform": (lambda loc, scale: D.IndependentTransform(D.AffineTransform(loc, scale), 1), X),
    "LowerCholeskyTransform": (lambda loc, scale: D.LowerCholeskyTransform(), draw(3, 3)),
    "PositiveDefiniteTransform": (lambda loc, scale: D.PositiveDefiniteTransform(), draw(3, 3)),
    "PowerTransform": (lambda loc, scale: D.PowerTransform(scale), S),
    "ReshapeTransform": (lambda loc, scale: D.ReshapeTransform((4,), (2, 2)), X),
    "SigmoidTransform": (lambda loc, scale: D.SigmoidTransform(), X),
    "SoftmaxTransform": (lambda loc, scale: D.SoftmaxTransform(), X),
    "SoftplusTransform": (lambda loc, scale: D.SoftplusTransform(), X),
    "StackTransform": (
        lambda loc, scale: D.StackTransform([D.AffineTransform(loc[0], scale[0]), *[D.ExpTransform()] * 3]), X
    ),
    "StickBreakingTransform": (lambda loc, scale: D.StickBreakingTransform(), X),
    "TanhTransform": (lambda loc, scale: D.TanhTransform(), X),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    make, x = TRANSFORMS[name]
    checked = 0
    for ask in (
        lambda t, x: t(x),
        lambda t, x: t.inv(t(x)),
        lambda t, x: t.log_abs_det_jacobian(x, t(x)),
        lambda t, x: torch.tensor(t == copy.copy(t)),
    ):

        def f(loc: Tensor, scale: Tensor, x: Tensor, ask: Any = ask) -> Tensor:
            return ask(make(loc, scale), x)

        try:
            expected = for_each(f)(X, S, x)
        except LACKING:
            continue
        torch.testing.assert_close(vmap(f)(X, S, x), expected)
        if expected.is_floating_point():
            slope = vmap(grad(lambda *rows, f=f: f(*rows).sum(), 2))(X, S, x)
            rows = [r.clone().requires_grad_() for r in x]
            out = sum(f(loc, scale, r).sum() for loc, scale, r in zip(X, S, rows, strict=True))
            # of an affine transform the determinant does not depend on x
            found = torch.autograd.grad(out + 0 * sum(r.sum() for r in rows), rows)
            torch.testing.assert_close(slope, torch.stack(found))
        checked += 1
    assert checked >= 2


def test_transforms_that_differ_for_one_example_are_different() -> None:
    """``==`` of transforms asks for all examples: code that goes the way of the different ones has to raise."""

    def same(loc: Tensor, other: Tensor) -> Tensor:
        if D.AffineTransform(loc, 1.0) != D.AffineTransform(other, 1.0):
            raise ValueError("different")
        return loc

    assert torch.equal(vmap(same)(X, X), X)
    with pytest.raises(ValueError, match="different"):
        vmap(same)(X, X.index_fill(0, torch.tensor(1), 0.0))
    with pytest.raises(DataDependentError):
        vmap(lambda a, b: a * (D.AffineTransform(a, 1.0) == D.AffineTransform(b, 1.0)))(
            X, X.index_fill(0, torch.tensor(1), 0.0)
        )


CONSTRAINTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "real": lambda low, high: constraints.real,
    "positive": lambda low, high: constraints.positive,
    "unit_interval": lambda low, high: constraints.unit_interval,
    "simplex": lambda low, high: constraints.simplex,
    "lower_cholesky": lambda low, high: constraints.lower_cholesky,
    "corr_cholesky": lambda low, high: constraints.corr_cholesky,
    "positive_definite": lambda low, high: constraints.positive_definite,
    "real_vector": lambda low, high: constraints.real_vector,
    "interval": constraints.interval,
    "half_open_interval": constraints.half_open_interval,
    "greater_than": lambda low, high: constraints.greater_than(low),
    "greater_than_eq": lambda low, high: constraints.greater_than_eq(low),
    "less_than": lambda low, high: constraints.less_than(low),
    "independent": lambda low, high: constraints.independent(constraints.interval(low, high), 1),
    "stack": lambda low, high: constraints.stack([constraints.positive, constraints.real, constraints.unit_interval]),
    "cat": lambda low, high: constraints.cat([constraints.positive, constraints.real], lengths=[1, 2]),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("registry", [D.biject_to, D.transform_to], ids=["biject_to", "transform_to"])
def test_constraints(name: str, registry: Any) -> None:
    low, high = draw(3), 1 + draw(3)
    x = draw(3, 3) if name in ("lower_cholesky", "positive_definite") else draw(3)
    try:
        registry(CONSTRAINTS[name](low[0], high[0]))
    except NotImplementedError:
        pytest.skip("PyTorch has no such transform")
    for ask in (
        lambda constraint, x: registry(constraint)(x),
        lambda constraint, x: constraint.check(registry(constraint)(x)),
        lambda constraint, x: registry(constraint).inv(registry(constraint)(x)),
    ):

        def f(low: Tensor, high: Tensor, x: Tensor, ask: Any = ask) -> Tensor:
            return ask(CONSTRAINTS[name](low, high), x)

        torch.testing.assert_close(vmap(f)(low, high, x), for_each(f)(low, high, x))


def test_a_mode_that_is_chosen_by_a_mask() -> None:
    """Where the mask has another number of elements for each example, no shape is right."""
    concentrations = torch.tensor([[0.5, 0.2], [0.1, 0.9]])
    mode = vmap(lambda c: D.Dirichlet(c).mode)
    torch.testing.assert_close(mode(concentrations), for_each(lambda c: D.Dirichlet(c).mode)(concentrations))
    with pytest.raises(DataDependentError):
        mode(torch.tensor([[0.5, 0.2], [3.0, 0.9]]))
