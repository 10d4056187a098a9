"""sample, observe, condition, seed, log_density: against densities written out by hand, and loops."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Gamma, MultivariateNormal, Normal

from functrans import (
    condition,
    count,
    grad,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jvp,
    linear_transpose,
    linearize,
    log_density,
    observe,
    plant,
    reap,
    sample,
    sanitize,
    seed,
    vmap,
)
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError, MissingRuleError

F64 = torch.float64
X = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.1]], dtype=F64)
Y = torch.tensor([0.2, 1.5, -0.4], dtype=F64)
ZERO = torch.zeros(2, dtype=F64)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert interpreter_stack() == []


def gaussian(x: Tensor, center: Any, scale: Any) -> Tensor:
    """The sum of the logarithms of normal densities, by the formula."""
    scale = torch.as_tensor(scale, dtype=x.dtype)
    return (-0.5 * ((x - center) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum()


def regression(x: Tensor, y: Tensor) -> Tensor:
    """A scale for the noise, weights, and observations."""
    scale = sample(Normal(ZERO[0], 1.0), "log scale").exp()
    weights = sample(Normal(ZERO, 2.0), "weights")
    observe(Normal(x @ weights, scale), y)
    return x @ weights


def by_example(x: Tensor, y: Tensor) -> None:
    """The same with a vmap over the data."""
    scale = sample(Normal(ZERO[0], 1.0), "log scale").exp()
    weights = sample(Normal(ZERO, 2.0), "weights")
    vmap(lambda x, y: observe(Normal(x @ weights, scale), y))(x, y)


def by_hand(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    weights, scale = values["weights"], values["log scale"].exp()
    return gaussian(values["log scale"], 0, 1) + gaussian(weights, 0, 2) + gaussian(y, x @ weights, scale)


def some_values(*batch: int) -> dict[str, Tensor]:
    return {"weights": torch.randn((*batch, 2), dtype=F64), "log scale": torch.randn(batch, dtype=F64) / 3}


models = pytest.mark.parametrize("model", [regression, by_example])


@models
def test_the_density_and_its_derivatives(model: Any) -> None:
    density, values = log_density(model), some_values()
    torch.testing.assert_close(density(values, X, Y), by_hand(values, X, Y))
    flat = lambda t: {"weights": t[:2], "log scale": t[2]}
    t = torch.cat([values["weights"], values["log scale"].view(1)])
    plain, ours = lambda t: by_hand(flat(t), X, Y), lambda t: density(flat(t), X, Y)
    gradient = torch.autograd.functional.jacobian(plain, t)
    second = torch.autograd.functional.hessian(plain, t)
    torch.testing.assert_close(grad(density)(values, X, Y), flat(gradient))
    v = torch.randn(3, dtype=F64)
    for found in (grad(ours)(t), jacfwd(ours)(t), jacrev(ours)(t)):
        torch.testing.assert_close(found, gradient)
    torch.testing.assert_close(jvp(ours, (t,), (v,)), (plain(t), gradient @ v))
    torch.testing.assert_close(linearize(ours, t)[1](v), gradient @ v)
    torch.testing.assert_close(hessian(ours)(t), second)
    torch.testing.assert_close(hvp(ours, (t,), (v,))[1], (second @ v,))
    blocks = hessian(density)(values, X, Y)
    torch.testing.assert_close(blocks["weights"]["log scale"], second[:2, 2])
    by_data = grad(density, argnums=2)(values, X, Y)
    scale = values["log scale"].exp()
    torch.testing.assert_close(by_data, (X @ values["weights"] - Y) / scale**2)


@models
def test_a_batch_of_values_and_of_data(model: Any) -> None:
    density, values = log_density(model), some_values(4)
    one = lambda i: {name: v[i] for name, v in values.items()}
    found = vmap(density, in_dims=(0, None, None))(values, X, Y)
    torch.testing.assert_close(found, torch.stack([by_hand(one(i), X, Y) for i in range(4)]))
    found = vmap(grad(density), in_dims=(0, None, None))(values, X, Y)["weights"]
    plain = lambda i, weights: by_hand({**one(i), "weights": weights}, X, Y)
    expected = torch.stack([
        torch.autograd.functional.jacobian(lambda w, i=i: plain(i, w), values["weights"][i]) for i in range(4)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected)
    found = vmap(density, in_dims=(None, 0, 0))(one(0), torch.stack([X, 2 * X]), torch.stack([Y, Y + 1]))
    torch.testing.assert_close(found, torch.stack([by_hand(one(0), X, Y), by_hand(one(0), 2 * X, Y + 1)]))


def test_samples_in_a_vmap_of_the_model() -> None:
    """A value of its own for each group, and a constant that every example observes anew."""

    def model(y: Tensor) -> None:
        top = sample(Normal(ZERO[0], 1.0), "top")

        def group(y: Tensor) -> Tensor:
            center = sample(Normal(top, 0.5), "center")
            observe(Normal(center, 0.1), y)
            observe(Normal(top, 1.0), torch.tensor(0.3, dtype=F64))
            return center

        vmap(group)(y)

    values = {"top": torch.tensor(0.4, dtype=F64), "center": torch.randn(3, dtype=F64)}

    def written_out(values: dict[str, Tensor]) -> Tensor:
        total = gaussian(values["top"], 0, 1)
        for center, y in zip(values["center"], Y, strict=True):
            total = total + gaussian(center, values["top"], 0.5) + gaussian(y, center, 0.1)
            total = total + gaussian(torch.tensor(0.3, dtype=F64), values["top"], 1.0)
        return total

    density = log_density(model)
    torch.testing.assert_close(density(values, Y), written_out(values))
    step = 1e-6
    moved = lambda d: {"top": values["top"] + d, "center": values["center"]}
    difference = (written_out(moved(step)) - written_out(moved(-step))) / (2 * step)
    torch.testing.assert_close(grad(density)(values, Y)["top"], difference, rtol=1e-6, atol=1e-6)
    given = log_density(condition(model, {"center": values["center"]}))
    torch.testing.assert_close(given({"top": values["top"]}, Y), written_out(values))
    with pytest.raises(CallValueError, match="expected tensors with the 3 examples of vmap"):
        density({"top": values["top"], "center": torch.tensor(0.0)}, Y)


def test_other_distributions() -> None:
    def model(counts: Tensor) -> None:
        rate = sample(Gamma(torch.tensor(2.0, dtype=F64), 3.0), "rate")
        place = sample(MultivariateNormal(ZERO, torch.eye(2, dtype=F64) * 4), "place")
        kind = sample(Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=F64)), "kind")
        observe(Bernoulli(rate / (1 + rate)), counts)
        observe(Normal(place[0] * kind, 1.0), ZERO[0])

    values = {
        "rate": torch.tensor(0.7, dtype=F64), "place": torch.tensor([1.0, -2.0], dtype=F64), "kind": torch.tensor(2)
    }  # fmt: skip
    expected = math.log(9 * 0.7 * math.exp(-3 * 0.7)) - math.log(2 * math.pi * 4) - 5 / 8 + math.log(0.3)
    expected += 2 * math.log(0.7 / 1.7) + math.log(1 / 1.7) - 2.0 - 0.5 * math.log(2 * math.pi)
    density = log_density(model)
    counts = torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    torch.testing.assert_close(density(values, counts), torch.tensor(expected, dtype=F64))
    smooth = lambda rate: density({**values, "rate": rate}, counts)
    torch.testing.assert_close(
        grad(smooth)(values["rate"]), torch.tensor(1 / 0.7 - 3 + 2 / 0.7 - 3 / 1.7, dtype=F64)
    )


def test_condition() -> None:
    model = lambda: sample(Normal(sample(Normal(0.0, 1.0), "a"), 1.0), "b") * 2
    two = torch.tensor(2.0)
    assert condition(model, {"b": two})() == 4
    assert condition(condition(lambda: model() + 0, {"b": two}), {"a": two})() == 4
    density = log_density(condition(model, {"a": two}))
    torch.testing.assert_close(density({"b": torch.tensor(1.0)}), gaussian(two, 0, 1) + gaussian(two - 1, two, 1))
    outside = condition(log_density(model), {"a": two})
    torch.testing.assert_close(outside({"b": torch.tensor(1.0)}), density({"b": torch.tensor(1.0)}))
    assert grad(lambda a: condition(model, {"a": a, "b": a})())(two) == 2
    assert vmap(lambda b: condition(model, {"b": b})(), randomness="different")(torch.arange(3.0)).tolist() == [0, 2, 4]
    given = torch.zeros(2)
    condition(lambda: sample(Normal(torch.zeros(2), 1.0), "x").add_(1), {"x": given})()
    assert not given.any()


def test_seed() -> None:
    model = lambda scale: sample(Normal(torch.zeros(3), scale), "x") + sample(Normal(0.0, scale), "y")
    one = torch.tensor(1.0)
    state = torch.get_rng_state()
    first = seed(model, 7)(one)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(seed(model, 7)(one), first) and not torch.equal(seed(model, 8)(one), first)
    # reparametrized: linear in the scale
    torch.testing.assert_close(seed(model, 7)(3 * one), 3 * first)
    torch.testing.assert_close(jacrev(seed(model, 7))(one), first)
    torch.testing.assert_close(jvp(seed(model, 7), (one,), (one,))[1], first)
    # by the randomness of a vmap
    scales = torch.ones(4)
    same = vmap(seed(model, 7), randomness="same")(scales)
    torch.testing.assert_close(same, first.expand(4, 3))
    different = vmap(seed(model, 7), randomness="different")(scales)
    assert torch.equal(different, seed(vmap(model, randomness="different"), 7)(scales))
    assert len(different[:, 0].unique()) == 4
    # two draws are two, inside of a seed or not
    pair = lambda: torch.stack([sample(Normal(0.0, 1.0), "a"), sample(Normal(0.0, 1.0), "b")])
    a, b = seed(pair, 0)()
    assert a != b
    draws = torch.stack([seed(pair, i)() for i in range(500)])
    assert draws.mean(0).abs().max() < 0.2 and (draws.std(0) - 1).abs().max() < 0.15
    assert draws.T.corrcoef()[0, 1].abs() < 0.2


def test_named_values_of_a_model() -> None:
    out, drawn = reap(seed(regression, 3))(X, Y)
    torch.testing.assert_close(out, X @ drawn["weights"])
    torch.testing.assert_close(log_density(regression)(drawn, X, Y), by_hand(drawn, X, Y))
    _, drawn = reap(seed(vmap(regression, in_dims=(None, 0), randomness="different"), 3))(X, torch.stack([Y, Y]))
    assert drawn["weights"].shape == (2, 2) and drawn["log scale"].shape == (2,)
    torch.testing.assert_close(plant(regression, {"weights": ZERO + 1})(X, Y), X.sum(1))


def test_with_the_others() -> None:
    values = some_values()
    density = log_density(regression)
    expected = by_hand(values, X, Y)
    for program in (sanitize(density), lambda *args: count(density)(*args)[0], log_density(sanitize(regression)),
                    log_density(lambda *args: count(regression)(*args)[0])):  # fmt: skip
        torch.testing.assert_close(program(values, X, Y), expected)
    # a density in a model is a number as any other
    inner = lambda c: log_density(lambda: sample(Normal(c, 1.0), "z"))({"z": ZERO[0]})
    outer = log_density(lambda: observe(Normal(inner(ZERO[0] + 2), 1.0), ZERO[0]))
    torch.testing.assert_close(outer({}), gaussian(ZERO[0], gaussian(ZERO[0], 2, 1), 1))
    # the model may differentiate
    slope = lambda: observe(Normal(grad(lambda x: x**2)(sample(Normal(ZERO[0], 1.0), "x")), 1.0), ZERO[0])
    x = torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(log_density(slope)({"x": x}), gaussian(x, 0, 1) + gaussian(ZERO[0], 2 * x, 1))
    inside = lambda: jacfwd(lambda x: observe(Normal(x, 1.0), ZERO))(ZERO + 1)
    torch.testing.assert_close(log_density(inside)({}), gaussian(ZERO, 1, 1))
    inside = lambda: grad(lambda x: observe(Normal(x, 1.0), x * 2))(ZERO[0] + 1)
    torch.testing.assert_close(log_density(inside)({}), gaussian(ZERO[0] + 2, 1, 1))
    assert log_density(lambda: None)({}) == 0


def test_bad_input() -> None:
    normal, one = Normal(0.0, 1.0), torch.tensor(1.0)
    model = lambda: sample(normal, "x")
    with pytest.raises(CallTypeError, match="the str 'x' as distribution.*The distribution comes first"):
        sample("x", normal)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match="the int 3 as name; expected a string"):
        sample(normal, 3)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match=r"observe\(distribution, value\): got the float 1.0 as value"):
        observe(normal, 1.0)  # type: ignore[arg-type]
    for function in (condition, seed, log_density):
        with pytest.raises(CallTypeError, match="expected a function as the first argument"):
            function(one, *[{}] * (function is condition), *[0] * (function is seed))  # type: ignore[operator]
    with pytest.raises(CallTypeError, match="expected a dict from names to tensors"):
        condition(model, one)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match="the float 1.0 as the value of 'x'"):
        log_density(model)({"x": 1.0})
    with pytest.raises(CallTypeError, match="the str 'no' as number; expected an int"):
        seed(model, "no")  # type: ignore[arg-type]
    with pytest.raises(CallValueError, match=r"condition\(model, values\): got a value for 'z', .*: \['x'\]\."):
        condition(model, {"z": one})()
    with pytest.raises(CallValueError, match="got no value for 'x'; expected one for every name"):
        log_density(model)({})
    with pytest.raises(CallValueError, match=r"got a value for 'z', which the model did not ask for; .*\['x'\]"):
        log_density(model)({"x": one, "z": one})
    with pytest.raises(CallValueError, match="a name that was sampled before; expected a new name"):
        log_density(lambda: (model(), model()))({"x": one})
    with pytest.raises(CallValueError, match=r"a value of shape \(2,\) for 'x'; expected one of shape \(\)"):
        condition(model, {"x": torch.zeros(2)})()
    with pytest.raises(MissingRuleError, match="A linear function is transposed without values"):
        log_density(lambda: linear_transpose(lambda x: observe(Normal(x, 1.0, validate_args=False), x), one)(one))({})
