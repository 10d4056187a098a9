"""Copies, modules and autograd's own switches inside transforms."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from functrans import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from functrans.errors import AnomalyError, CallValueError, DeadWrapperError, InsideTransformError

F64 = torch.float64
X = torch.tensor([[1.0, 2.0, -1.0], [0.5, -2.0, 3.0]], dtype=F64)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


# --- copies


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy, "deepcopy": copy.deepcopy, "in a list": lambda x: copy.deepcopy([x])[0],
    "in a dict, twice": lambda x: copy.deepcopy({"a": x, "b": x})["b"],
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_has_the_derivative_of_what_is_copied(name: str) -> None:
    """As a function it is the identity, with history or without: 3x²."""
    copied = COPIES[name]

    def f(x: Tensor) -> Tensor:
        return (copied(x) ** 2 * copied(x * 1)).sum()

    x, h = X[0], 1e-6
    steps = h * torch.eye(3, dtype=F64)
    differences = torch.stack([(f(x + s) - f(x - s)) / (2 * h) for s in steps])
    torch.testing.assert_close(differences, 3 * x**2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad(f)(x), 3 * x**2)
    torch.testing.assert_close(vmap(grad(f))(X), 3 * X**2)
    torch.testing.assert_close(grad(lambda b: vmap(f)(b).sum())(X), 3 * X**2)
    torch.testing.assert_close(jvp(f, (x,), (x,))[1], 3 * (x**3).sum())
    torch.testing.assert_close(hessian(f)(x), torch.diag(6 * x))
    torch.testing.assert_close(vmap(lambda x: copied(x) * 2)(X), 2 * X)


def test_a_shallow_copy_shares_memory_and_a_deep_one_does_not() -> None:
    def f(x: Tensor, copied: Callable[[Tensor], Tensor]) -> Tensor:
        y = x * 1
        copied(y).mul_(2)
        return y

    for copied in (copy.copy, copy.deepcopy):
        expected = torch.stack([f(x, copied) for x in X])
        torch.testing.assert_close(vmap(lambda x, copied=copied: f(x, copied))(X), expected)
    assert torch.equal(grad(lambda x: f(x, copy.copy).sum())(X), torch.full_like(X, 2.0))
    assert torch.equal(grad(lambda x: f(x, copy.deepcopy).sum())(X), torch.ones_like(X))


def test_copies_of_what_is_captured() -> None:
    captured = X[0].clone()

    def f(x: Tensor) -> Tensor:
        mine = copy.deepcopy(captured)
        mine.mul_(x)  # it was made inside, and may hold what differs between the examples
        return mine

    torch.testing.assert_close(vmap(f)(X), X[0] * X)
    torch.testing.assert_close(vmap(grad(lambda x: f(x).sum()))(X), X[:1].expand_as(X))
    torch.testing.assert_close(grad(lambda x: f(x).sum())(X[1]), X[0])
    assert torch.equal(captured, X[0])

    def twice(x: Tensor) -> Tensor:
        a, b = copy.deepcopy([captured, captured])
        assert a is b
        return (a * x).sum()

    torch.testing.assert_close(grad(twice)(X[1]), X[0])
    strided = grad(lambda x: (copy.deepcopy(X.T)[:, 1] * x).sum())
    torch.testing.assert_close(strided(X[0]), X[1])
    nothing = grad(lambda x: (copy.deepcopy([torch.ones(0), torch.ones(0)])[0].sum() + x.sum()))
    torch.testing.assert_close(nothing(X[0]), torch.ones(3, dtype=F64))


def test_deep_copies_of_captured_tensors_that_share_memory_are_refused() -> None:
    """In plain PyTorch their copies share memory, too."""
    for run in (vmap, lambda f: grad(lambda x: f(x).sum())):
        with pytest.raises(InsideTransformError, match="share memory"):
            run(lambda x: copy.deepcopy([X, X[0]])[1] * x)(X)


def test_outside_of_transforms_copies_are_pytorchs() -> None:
    a, b = copy.deepcopy([X, X[0]])
    a.zero_()
    assert not b.any()
    leaf = X.clone().requires_grad_()
    assert copy.deepcopy(leaf).requires_grad and copy.deepcopy(leaf).is_leaf
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(leaf * 2)


def test_deep_copies_of_modules() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    before = copy.deepcopy(module.state_dict())

    def f(x: Tensor) -> Tensor:
        mine = copy.deepcopy(module)
        return (mine(x) ** 3).sum()

    leaf = X.clone().requires_grad_()
    torch.testing.assert_close(grad(f)(X), torch.autograd.grad(f(leaf), leaf)[0])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name

    class CopiesItsLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1, bias=False, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            return (copy.deepcopy(self.layer)(x) ** 2).sum()

    outer, weight = CopiesItsLayer(), torch.tensor([[1.0, -1.0, 2.0]], dtype=F64)
    found = grad(lambda w: functional_call(outer, {"layer.weight": w}, (X,)))(weight)
    torch.testing.assert_close(found, 2 * (X @ weight.T).T @ X)


# --- lazy modules


def by_transform(f: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], Any]]:
    return {
        "grad": lambda: grad(f)(X[0]),
        "jvp": lambda: jvp(f, (X[0],), (X[1],))[1],
        "vmap": lambda: vmap(f, randomness="same")(X),
        "vmap(grad)": lambda: vmap(grad(f), randomness="same")(X),
        "jacrev": lambda: jacrev(f)(X[0]),
    }


def lazy() -> nn.Module:
    return nn.LazyLinear(2, dtype=F64)


def expected_of(layer: Any) -> dict[str, Tensor]:
    weight = layer.weight.detach()
    return {
        "grad": weight.sum(0), "jvp": (weight @ X[1]).sum(), "vmap": layer(X).sum(1).detach(),
        "vmap(grad)": weight.sum(0).expand(2, 3), "jacrev": weight.sum(0),
    }  # fmt: skip


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "vmap(grad)", "jacrev"])
def test_a_lazy_module_called_first_inside(transform: str) -> None:
    """It draws its parameters as it would outside, and is an ordinary module afterwards."""
    module = lazy()
    torch.manual_seed(0)
    found = by_transform(lambda x: module(x).sum())[transform]()
    torch.manual_seed(0)
    outside = lazy()
    outside(X)
    assert type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_leaf
    assert torch.equal(module.weight, outside.weight) and torch.equal(module.bias, outside.bias)
    torch.testing.assert_close(found.detach(), expected_of(outside)[transform])


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "vmap(grad)", "jacrev"])
def test_a_lazy_module_made_inside(transform: str) -> None:
    made: list[Any] = []

    def f(x: Tensor) -> Tensor:
        made.append(lazy())
        return made[-1](x).sum()

    torch.manual_seed(0)
    found = by_transform(f)[transform]()
    torch.manual_seed(0)
    outside = lazy()
    outside(X)
    torch.testing.assert_close(found.detach(), expected_of(outside)[transform])
    assert torch.equal(made[0].weight, outside.weight)


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_a_lazy_module_draws_once_or_not_at_all(randomness: str) -> None:
    """What is refused leaves it as it was."""
    module = lazy()
    with pytest.raises(InsideTransformError, match="lazy module"):
        vmap(module, randomness=randomness)(X)
    assert module.has_uninitialized_params()
    with pytest.raises(InsideTransformError, match="lazy module"):
        vmap(lambda x: lazy()(x), randomness=randomness)(X)


def test_other_lazy_modules() -> None:
    images = torch.randn(2, 3, 5, 5)
    for make in (lambda: nn.LazyConv2d(4, 3), lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())):
        inside, outside = make(), make()
        torch.manual_seed(0)
        found = grad(lambda x, m=inside: (m(x) ** 3).sum())(images)
        torch.manual_seed(0)
        leaf = images.clone().requires_grad_()
        torch.testing.assert_close(found.detach(), torch.autograd.grad((outside(leaf) ** 3).sum(), leaf)[0])
        for name, value in outside.state_dict().items():
            torch.testing.assert_close(inside.state_dict()[name], value)


# --- modules under two names


class Shared(nn.Module):
    """One layer under two names, and a weight that is tied to another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3).double()
        self.second = self.first
        self.norm = nn.BatchNorm1d(3).double()
        self.again = self.norm
        self.last = nn.Linear(3, 3, bias=False).double()
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.second(torch.tanh(self.norm(self.first(x)))))).pow(3).sum()


@pytest.mark.parametrize("tie_weights", [True, False])
def test_functional_call_of_a_module_under_two_names(tie_weights: bool) -> None:
    module = Shared()
    own = {name: (value, value.clone()) for name, value in (*module.named_parameters(), *module.named_buffers())}
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    found = grad(lambda p: functional_call(module, p, (X,), tie_weights=tie_weights))(parameters)
    after = dict((*module.named_parameters(), *module.named_buffers()))
    for name, (value, _) in own.items():
        assert after[name] is value, name
    assert module.second.weight is module.first.weight is module.last.weight
    if tie_weights:
        twin = copy.deepcopy(module)
        expected = gradients(twin, twin(X))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_functional_call_that_fails_puts_back_a_module_under_two_names() -> None:
    module = Shared()
    weight = module.first.weight

    def f(w: Tensor) -> Tensor:
        functional_call(module, {"first.weight": w}, (torch.ones(2, 7, dtype=F64),))
        return w.sum()

    with pytest.raises(RuntimeError):
        grad(f)(weight.detach())
    assert module.first.weight is module.second.weight is weight


def test_two_values_for_one_place_are_refused() -> None:
    module, w = Shared(), torch.ones(3, 3, dtype=F64)
    same = {"first.weight": w, "second.weight": w, "last.weight": w}
    assert functional_call(module, same, (X,)) == functional_call(module, {"first.weight": w}, (X,))
    two = {**same, "second.weight": 2 * w}
    for tie_weights, error in ((True, ValueError), (False, CallValueError)):
        with pytest.raises(error):
            functional_call(module, two, (X,), tie_weights=tie_weights)


# --- parametrize.cached()


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()
        parametrize.register_parametrization(self.layer, "weight", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(self.layer(x)) ** 2).sum()


def test_cached_parametrizations() -> None:
    """What was computed of other parameters, or inside a transform that has ended, is not taken."""
    module = Twice()
    expected = gradients(module, module(X))
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def call(p: dict[str, Tensor]) -> Tensor:
        return functional_call(module, p, (X,))

    def inside(p: dict[str, Tensor]) -> Tensor:
        with parametrize.cached():
            return call(p)

    def compare(found: dict[str, Tensor], factor: float = 1) -> None:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], factor * value)

    compare(grad(inside)(parameters))
    with parametrize.cached():
        compare(grad(call)(parameters))
        module(X)  # keeps the weight of the module's own parameters
        compare(grad(call)(parameters))
        kept = module.layer.weight
        batched = vmap(grad(call))({name: value[None] for name, value in parameters.items()})
        compare({name: value[0] for name, value in batched.items()})
        assert module.layer.weight is kept
        zero = grad(call)({name: 0 * value for name, value in parameters.items()})
        assert not zero["layer.parametrizations.weight.original"].any()
        compare(gradients(module, module(X)))


# --- autograd's own switches


def test_retain_grad() -> None:
    kept: dict[str, Tensor] = {}

    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.retain_grad()
        y.retain_grad()  # once is enough
        assert y.retains_grad and y.grad is None and not x.retains_grad
        kept["y"] = y
        z = y.sin() + y
        return (z**2).sum()

    leaf = X[0].clone().requires_grad_()
    y = leaf * 2
    y.retain_grad()
    ((y.sin() + y) ** 2).sum().backward()
    torch.testing.assert_close(grad(f)(X[0]), leaf.grad)
    torch.testing.assert_close(kept["y"].grad, y.grad)
    torch.testing.assert_close(vmap(grad(f))(X)[0], leaf.grad)
    with pytest.raises(DeadWrapperError):  # a value of vmap's level
        kept["y"].grad + 1
    _, pull = vjp(f, X[0])
    pull(torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(kept["y"].grad, y.grad)


def test_retain_grad_of_a_tensor_that_is_written_is_that_of_its_last_value() -> None:
    def run(x: Tensor, retained: list[Tensor]) -> Tensor:
        y = x * 2
        y.retain_grad()
        y.register_hook(lambda g: g * 10)
        y.mul_(3)
        retained.append(y)
        return (y**2).sum()

    eager: list[Tensor] = []
    leaf = X[0].clone().requires_grad_()
    run(leaf, eager).backward()
    ours: list[Tensor] = []
    torch.testing.assert_close(grad(lambda x: run(x, ours))(X[0]), leaf.grad)
    torch.testing.assert_close(ours[0].grad, eager[0].grad)


def test_retain_grad_of_what_has_none() -> None:
    with pytest.raises(RuntimeError, match="requires_grad=False"):
        grad(lambda x: (torch.ones(3).retain_grad(), x.sum())[1])(X)
    with pytest.raises(RuntimeError, match="requires_grad=False"):
        vmap(lambda x: x.retain_grad() or x)(X)
    leaf = X.clone().requires_grad_()
    with pytest.raises(InsideTransformError, match="retain_grad"):  # the base's autograd would record it
        vmap(lambda x: (x * 2).retain_grad() or x)(leaf)


def test_the_interpreter_keeps_nothing_of_a_tensor_alive_for_longer_than_its_transform() -> None:
    seen: list[Any] = []

    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.retain_grad()
        seen.append(weakref.ref(y))
        return y.sum()

    grad(f)(X)
    gc.collect()
    assert seen[0]() is None


ANOMALIES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sqrt": (lambda x: (x.sqrt() * 0).sum(), "sqrt"),
    "a program of several operators": (lambda x: (x.exp().sub(1).sqrt() * 0).sum(), "sqrt"),
    "norm": (lambda x: torch.where(x > 0, x.log(), 0 * x.sqrt()).sum(), "sqrt"),
}


@pytest.mark.parametrize("name", ANOMALIES)
def test_anomaly_detection(name: str) -> None:
    f, op = ANOMALIES[name]
    x = torch.zeros(2, dtype=F64)
    runs: list[Callable[[], Any]] = [
        lambda: grad(f)(x),
        lambda: vmap(grad(f))(x[None]),
        lambda: grad(lambda b: vmap(f)(b).sum())(x[None]),
        lambda: jacrev(f)(x),
        lambda: vjp(f, x)[1](torch.tensor(1.0, dtype=F64)),
        lambda: grad(lambda x: grad(f)(x).sum())(x),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaf = x.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="returned nan values"):
            torch.autograd.grad(f(leaf), leaf)
        for run in runs:
            pattern = rf"aten\.{op}.* returned nan values .*test_copies_and_modules"
            with torch.autograd.set_detect_anomaly(True), pytest.raises(AnomalyError, match=pattern):
                run()
            with torch.autograd.set_detect_anomaly(True, check_nan=False):
                run()
            run()


def test_anomaly_detection_where_the_derivative_is_pytorchs() -> None:
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="returned nan values"):
        grad(lambda x: torch.linalg.eigh(torch.outer(x, x) * torch.nan)[1].sum())(torch.ones(2, dtype=F64))


def test_anomaly_detection_in_the_backward_pass_alone() -> None:
    out, pull = vjp(ANOMALIES["sqrt"][0], torch.zeros(2, dtype=F64))
    with torch.autograd.set_detect_anomaly(True), pytest.raises(AnomalyError, match="sqrt.* returned nan values"):
        pull(torch.ones_like(out))


def test_anomaly_detection_finds_nothing_where_nothing_is_wrong() -> None:
    with torch.autograd.set_detect_anomaly(True):
        for f in (lambda x: x.sin().sum(), lambda x: (x @ x).exp(), lambda x: torch.stack([x, x]).sum()):
            leaf = X[0].clone().requires_grad_()
            torch.testing.assert_close(grad(f)(X[0]), torch.autograd.grad(f(leaf), leaf)[0])
            torch.testing.assert_close(jacrev(f)(X[0]), grad(f)(X[0]))
            assert hessian(f)(X[0]).isfinite().all()


def test_pullbacks_that_are_kept() -> None:
    pulls = [vjp(lambda x, n=n: x**n, X[0])[1] for n in (1, 2, 3)]
    for n, pull in enumerate(pulls, 1):
        slope = n * X[0] ** (n - 1)
        torch.testing.assert_close(vmap(lambda c, pull=pull: pull(c)[0])(torch.eye(3, dtype=F64)), torch.diag(slope))
        torch.testing.assert_close(grad(lambda c, pull=pull: (pull(c)[0] ** 2).sum())(X[1]), 2 * slope**2 * X[1])
        torch.testing.assert_close(jvp(lambda c, pull=pull: pull(c)[0], (X[0],), (X[1],))[1], slope * X[1])
    inside: list[Any] = []
    vmap(lambda x: (inside.append(vjp(torch.sin, x)[1]), x)[1])(X)
    with pytest.raises(DeadWrapperError):
        vmap(lambda c: inside[0](c)[0])(X)
