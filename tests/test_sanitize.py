"""sanitize: what it names, against plain PyTorch run on every example; and that what is finite passes."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from functrans import (
    count,
    custom_vjp,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    plant,
    psum,
    reap,
    sanitize,
    sow,
    vjp,
    vmap,
)
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CustomFunctionError, MissingRuleError, NonFiniteError


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert interpreter_stack() == [] and not torch.is_anomaly_enabled()


def root(x: Tensor) -> Tensor:
    y = x * 2
    z = y.sqrt()  # of root
    return (z * x).sum()


def logarithm(x: Tensor) -> Tensor:
    y = x - 1
    z = torch.log(y + 1)  # of logarithm
    return z.exp().sum()


def scaled(x: Tensor) -> Tensor:
    w = torch.stack([x, x + 1])
    return (x / x.norm()).sum() * w.sum()  # of scaled


#: By name: a function; what comes up first for an example with a zero; whether only the derivative is not finite.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str, bool]] = {
    "root": (root, "aten.sqrt.default", True),
    "logarithm": (logarithm, "aten.log.default", False),
    "scaled": (scaled, "aten.div.Tensor", False),
}

#: [2, 3, 4]; one example of three numbers, along each of the other dimensions, is not finite
GOOD = torch.rand(2, 3, 4) + 0.5
PLACES = [(0, 0), (1, 0), (0, 3), (1, 2)]


def with_zeros(place: tuple[int, int]) -> Tensor:
    x = GOOD.clone()
    x[place[0], :, place[1]] = 0
    x[1, :, 3] = 0  # the last one, too
    return x


def line_of(mark: str) -> int:
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# of {mark}"))


def check(error: NonFiniteError, operator: str, mark: str, examples: tuple[int, ...]) -> None:
    text = str(error)
    assert error.operator == operator and operator in text
    assert f"{__file__}:{line_of(mark)}, in {mark}" in text
    assert error.examples == examples and error.level > 0 and f"at level {error.level}" in text


# `f` is of one example: where sanitize and the vmaps stand
NESTINGS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "outside of both": lambda f: sanitize(vmap(vmap(f, in_dims=1))),
    "between": lambda f: vmap(sanitize(vmap(f, in_dims=1))),
    "inside of both": lambda f: vmap(vmap(sanitize(f), in_dims=1)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_first_example_is_named(name: str, nesting: str, place: tuple[int, int]) -> None:
    f, operator, only_derivative = FUNCTIONS[name]
    x = with_zeros(place)
    around = NESTINGS[nesting]
    torch.testing.assert_close(around(f)(GOOD), torch.stack([torch.stack([f(c) for c in r.T]) for r in GOOD]))
    bad = [(i, j) for i, j in itertools.product(range(2), range(4)) if not x[i, :, j].any()]
    if only_derivative:
        around(f)(x)
        transforms = [grad, lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))]
    else:
        transforms = [lambda f: f, grad, lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))]
    for transform in transforms:
        with pytest.raises(NonFiniteError) as info:
            around(transform(f))(x)
        check(info.value, operator, name, min(bad))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_differentiated_around_the_vmaps(name: str, place: tuple[int, int]) -> None:
    """The grad records the whole batch; the examples are named all the same, with sanitize outside and inside."""
    f, operator, _ = FUNCTIONS[name]
    x = with_zeros(place)
    bad = [(i, j) for i, j in itertools.product(range(2), range(4)) if not x[i, :, j].any()]
    for programs in (
        sanitize(grad(lambda x: vmap(vmap(f, in_dims=1))(x).sum())),
        grad(sanitize(lambda x: vmap(vmap(f, in_dims=1))(x).sum())),
        grad(lambda x: vmap(sanitize(vmap(f, in_dims=1)))(x).sum()),
        grad(lambda x: vmap(vmap(sanitize(f), in_dims=1))(x).sum()),
        sanitize(lambda x: vjp(vmap(vmap(f, in_dims=1)), x)[1](torch.ones(2, 4))),
        lambda x: sanitize(vmap(vmap(f, in_dims=1)))(x.requires_grad_()).sum().backward(),
    ):
        with pytest.raises(NonFiniteError) as info:
            programs(x)
        check(info.value, operator, name, min(bad))


def test_the_backward_pass_inside_and_around() -> None:
    x = torch.tensor([1.0, 0.0, 2.0])
    for program in (
        sanitize(grad(root)),
        grad(sanitize(root)),
        sanitize(jacrev(lambda x: root(x).sin())),
        jacrev(sanitize(lambda x: root(x).sin())),
        sanitize(grad(lambda x: grad(lambda x: root(x).sin())(x).sum())),
        lambda x: sanitize(root)(x.clone().requires_grad_()).backward(),
    ):
        with pytest.raises(NonFiniteError, match="in the backward pass of .*, at index") as info:
            program(x)
        check(info.value, "aten.sqrt.default", "root", ())
        assert "at index [1] of float32[3]" in str(info.value)
    with pytest.raises(NonFiniteError, match="in the tangent of the result of aten.sqrt.default"):
        sanitize(jacfwd(root))(x)
    with pytest.raises(NonFiniteError, match="in the tangent of the result of aten.sqrt.default"):
        jacfwd(sanitize(root))(x)


def test_derivatives_of_lists() -> None:
    """Where some of a list have a cotangent, and one of them is not finite."""
    f = lambda x, y: (torch.cat([x, torch.ones(1), y]).sqrt() * torch.cat([x, x, y])).sum()
    g = lambda x, y: torch.stack([x, x.detach(), y.sqrt()]).sum()
    for program in (f, g):
        sanitize(grad(program, argnums=(0, 1)))(torch.ones(1), torch.ones(1))
        for bad in (sanitize(grad(program, argnums=1)), grad(sanitize(program), argnums=1)):
            with pytest.raises(NonFiniteError, match="derivative of aten.sqrt.default"):
                bad(torch.ones(1), torch.zeros(1))


def test_the_second_derivative() -> None:
    """x ** 1.5 has a finite first derivative at 0, and no second one."""
    f = lambda x: (x**1.5).sum()
    x = torch.tensor([1.0, 0.0])
    for first in (sanitize(grad(f)), grad(sanitize(f))):
        torch.testing.assert_close(first(x), 1.5 * x.sqrt())
    for second in (
        sanitize(lambda x: grad(lambda x: grad(f)(x).sum())(x)),
        grad(lambda x: grad(sanitize(f))(x).sum()),
        sanitize(hessian(f)),
        hessian(sanitize(f)),
    ):
        with pytest.raises(NonFiniteError, match="pow|sqrt|mul|div"):
            second(x)


FINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "logsumexp": lambda x: x.logsumexp(0),
    "softmax with a mask": lambda x: (x.softmax(0) * torch.tensor([1.0, 2.0, 3.0])).sum(),
    "max": lambda x: x.max() * x.amin(),
    "cross entropy": lambda x: F.cross_entropy(x, torch.tensor(1)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.expand(1, 1, 2, 3)] * 3, is_causal=True).sum(),
    "norm at zero": lambda x: (x - x.detach()).norm() + x.sum(),
    "prod": lambda x: (x * torch.tensor([0.0, 1.0, 0.0])).prod() + x.prod(),
    "cumulative maximum": lambda x: x.cummax(0).values.sum(),
    "log softmax": lambda x: x.log_softmax(0)[0],
    "clamp": lambda x: x.clamp(max=1.0).sum(),
    "xlogy": lambda x: torch.xlogy(x.detach() * 0, x.detach() * 0).sum() + x.sum(),
    "empty and filled": lambda x: torch.empty(3).fill_(2.0) @ x,
    "writes": lambda x: x.new_zeros(3).index_put_((torch.tensor(1),), x[0]).sum(),
    "max pool": lambda x: F.max_pool1d(x.expand(1, 1, 3), 2, padding=1).sum(),
    "sort": lambda x: x.sort().values[0] * x.std(),
}


@pytest.mark.parametrize("name", FINITE)
def test_what_is_infinite_in_the_middle_of_a_rule_alone_passes(name: str) -> None:
    f = FINITE[name]
    x = torch.randn(4, 3)
    for transformed in (vmap(f), vmap(grad(f)), vmap(jacfwd(f)), vmap(hessian(f))):
        expected = transformed(x)
        if expected.isfinite().all():
            torch.testing.assert_close(sanitize(transformed)(x), expected)
    torch.testing.assert_close(grad(lambda x: sanitize(vmap(f))(x).sum())(x), vmap(grad(f))(x))


def test_nan_and_inf_by_themselves() -> None:
    mask = torch.tensor([False, True, False])
    f = lambda x: x.masked_fill(mask, -torch.inf).softmax(0)
    x = torch.randn(3)
    torch.testing.assert_close(sanitize(f, inf=False)(x), f(x))
    with pytest.raises(NonFiniteError, match=r"got -inf in the result of aten.masked_fill.*say inf=False\."):
        sanitize(f)(x)
    g = lambda x: (x - x) / (x - x)
    with pytest.raises(NonFiniteError, match="got nan in the result of aten.div.Tensor"):
        sanitize(g, inf=False)(x)
    assert sanitize(g, nan=False)(x).isnan().all()
    with pytest.raises(NonFiniteError, match="got inf"):
        sanitize(lambda x: 1 / (x - x), nan=False)(x)
    with pytest.raises(NonFiniteError, match="complex|nan"):
        sanitize(lambda x: torch.complex(x, x / (x - x)), inf=False)(x * 0)


def test_arguments_captured_tensors_and_overflow() -> None:
    bad = torch.tensor([1.0, torch.nan])
    with pytest.raises(NonFiniteError, match=r"got nan in an argument, in sanitize\(sin\) at level 1, at index \[1\]"):
        sanitize(torch.sin)(bad)
    with pytest.raises(NonFiniteError, match="got nan in an argument, .*for example 1 of vmap"):
        vmap(sanitize(torch.sin))(bad)
    with pytest.raises(NonFiniteError, match="the result of aten.mul.Tensor"):
        sanitize(lambda x: x * bad)(torch.ones(2))
    with pytest.raises(NonFiniteError, match="got nan in the result, in"):
        sanitize(lambda x: bad)(torch.ones(2))
    with pytest.raises(NonFiniteError, match="got inf in the result of aten.*float16"):
        sanitize(lambda x: x.half())(torch.tensor([1.0, 1e6]))
    with pytest.raises(NonFiniteError, match="got inf in the result of aten.exp"):
        sanitize(lambda x: x.exp_())(torch.tensor([1.0, 1e6]))


@custom_vjp
def wrong_rule(x: Tensor) -> Tensor:
    return x * 2


wrong_rule.defvjp(lambda x: (x * 2, x), lambda x, g: (g / (x - x),))


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / (ctx.saved_tensors[0] * 0)


def test_functions_with_rules_of_their_own() -> None:
    x = torch.ones(3)
    for function in (wrong_rule, Wrong.apply):
        f = lambda x, function=function: function(x).sum()
        assert sanitize(f)(x) == 6 and sanitize(vmap(f))(x).tolist() == [2.0] * 3
        with pytest.raises(NonFiniteError, match="got inf in a cotangent that the derivative of .*rong.*backward pass"):
            sanitize(grad(f))(x)
        with pytest.raises((CustomFunctionError, MissingRuleError), match="Differentiate inside"):
            grad(sanitize(lambda x, f=f: f(x * 1)))(x)


def test_with_the_others() -> None:
    f = lambda x: sow(x.log(), "log").sum()
    x, bad = torch.ones(2), torch.zeros(2)
    for program in (
        sanitize(lambda x: reap(f)(x)[0]),
        lambda x: reap(sanitize(f))(x)[0],
        lambda x: count(sanitize(f))(x)[0],
        sanitize(lambda x: count(f)(x)[0]),
        sanitize(sanitize(f)),
        lambda x: linearize(sanitize(f), x)[0],
        sanitize(lambda x: linearize(f, x)[0]),
    ):
        assert program(x) == 0
        with pytest.raises(NonFiniteError, match="aten.log.default"):
            program(bad)
    assert count(sanitize(f))(x)[1] == count(f)(x)[1]
    assert sanitize(plant(f, {"log": torch.zeros(2)}))(x) == 0
    g = vmap(lambda x: x / psum(x, "i"), axis_name="i")
    torch.testing.assert_close(sanitize(g)(x), x / 2)
    with pytest.raises(NonFiniteError, match="aten.div.Tensor.*for example 0"):
        sanitize(g)(bad)


def test_random_numbers_are_not_drawn_again() -> None:
    def f(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * torch.rand(3)

    torch.manual_seed(1)
    expected = f(torch.ones(3))
    torch.manual_seed(1)
    torch.testing.assert_close(sanitize(f)(torch.ones(3)), expected)


def test_modules_and_keywords() -> None:
    net = torch.nn.Linear(2, 2)
    x = torch.ones(2)
    torch.testing.assert_close(sanitize(net)(x), net(x))
    assert sanitize(torch.sum)(torch.ones(2, 2), dim=0).tolist() == [2.0, 2.0]
    sanitize(net)(x).sum().backward()
    torch.testing.assert_close(net.weight.grad, torch.ones(2, 2))


def test_bad_input() -> None:
    with pytest.raises(CallTypeError, match="expected a function as the first argument"):
        sanitize(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match=r"sanitize\(sin, nan='no', inf=True\): got the str 'no' as nan"):
        sanitize(torch.sin, nan="no")  # type: ignore[arg-type]


def test_a_sparse_tensor_that_autograd_follows() -> None:
    gradients = []
    for around in (lambda f: f, sanitize):
        weight = torch.eye(3, dtype=torch.float64).to_sparse().requires_grad_()
        around(lambda x, w=weight: torch.sparse.mm(w, x).sum())(torch.ones(3, 2, dtype=torch.float64)).backward()
        gradients.append(weight.grad.to_dense())
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()
