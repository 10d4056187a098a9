"""What torch.func 2.13 answers wrongly without a word, and the meaning of ``randomness``: right here, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Plain
from torch import nn

import functrans
from functrans import FunctransError, functional_call, grad, jvp, vjp, vmap

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
BATCH = torch.stack([X, X * 2 - 0.3])


def right_or_error(f: Callable[[], Any], expected: torch.Tensor) -> None:
    try:
        got = f()
    except FunctransError:
        return
    torch.testing.assert_close(got, expected)


def test_gradient_through_torch_tensor_of_a_value() -> None:
    right_or_error(lambda: grad(lambda x: torch.tensor([x, x]).sum())(X[0]), torch.tensor(2.0, dtype=torch.float64))
    right_or_error(lambda: jvp(lambda x: torch.tensor([x]), (X[0],), (X[1],))[1], X[1:2])


def test_integer_output() -> None:
    for call in (
        lambda: grad(lambda x: (x > 0).sum())(X),
        lambda: vjp(lambda x: (x > 0).long(), X),
        lambda: functrans.jacrev(lambda x: (x > 0).long())(X),
    ):
        with pytest.raises(FunctransError):
            call()


def test_tangent_of_the_wrong_dtype() -> None:
    with pytest.raises(FunctransError):
        jvp(torch.sin, (X,), (torch.ones(3),))
    with pytest.raises(FunctransError):
        jvp(torch.sin, (X,), (torch.ones(3, dtype=torch.long),))
    with pytest.raises(FunctransError):
        jvp(torch.sin, (X,), (torch.ones(3, dtype=torch.complex128),))


def test_parameter_made_of_an_inner_value() -> None:
    layer = nn.Linear(3, 1, bias=False, dtype=torch.float64)

    def f(w: torch.Tensor) -> torch.Tensor:
        layer.weight = nn.Parameter(w)
        return layer(X).sum()

    w = layer.weight.detach().clone()
    right_or_error(lambda: grad(f)(w), X.unsqueeze(0))


def test_an_in_place_op_on_a_captured_tensor_under_vmap() -> None:
    counter = torch.zeros(3, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        counter.add_(1)
        return x + counter

    with pytest.raises(FunctransError):
        vmap(f)(BATCH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, s: torch.where(x > 0, x, s), lambda x, s: torch.where(x > 0, s, x), lambda x, s: x + s,
        lambda x, s: x * s,
        lambda x, s: torch.addcmul(x, x, s), lambda x, s: torch.maximum(x, s), lambda x, s: torch.pow(x.abs(), s),
        lambda x, s: torch.cat([x, s.reshape(1)]), lambda x, s: torch.stack([x.sum(), s]), lambda x, s: x.lerp(x, s),
        lambda x, s: torch.clamp(x, max=s), lambda x, s: s.sub(x), lambda x, s: torch.atan2(x, s),
        lambda x, s: torch.fmod(x, s),
        lambda x, s: x.addcdiv(x, s), lambda x, s: x > s, lambda x, s: torch.hypot(x, s),
        lambda x, s: torch.logaddexp(x, s),
        lambda x, s: x.clone().mul_(s), lambda x, s: x.clone().fill_(s), lambda x, s: torch.full((2,), 3) * s,
    ],
)  # fmt: skip
def test_promotion_of_zero_dimensional_batched_values(f: Callable[..., Any], dtype: torch.dtype) -> None:
    x = torch.tensor([[0.5, -1.5, 2.0], [1.5, 0.25, -0.75]]).to(dtype)
    s = torch.tensor([2.0, 3.0], dtype=torch.float64)
    try:
        expected = Plain.vmap(f, in_dims=(0, 0))(x, s)
    except RuntimeError:
        with pytest.raises(Exception):  # noqa: B017 - what eager refuses is refused, in whatever words
            vmap(f)(x, s)
        return
    for args, dims in (((x, s), (0, 0)), ((x.t().contiguous(), s), (1, 0))):
        try:
            got = vmap(f, in_dims=dims)(*args)
        except RuntimeError:  # lerp of integers with a float weight, which eager only takes from a zero-dimensional one
            assert dtype == torch.int64
            continue
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


def test_resize_does_not_show_the_next_example() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.clone().resize_(2)

    right_or_error(lambda: vmap(f)(BATCH), BATCH[:, :2])
    try:
        got = vmap(lambda x: x[:1].clone().resize_(2))(BATCH)
    except RuntimeError:
        return
    torch.testing.assert_close(got[:, 0], BATCH[:, 0])
    assert got[0, 1] != BATCH[1, 0]


def test_linear_under_autocast_has_the_dtype_of_eager() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    params = {k: v.detach() for k, v in layer.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.stack([layer(row.unsqueeze(0)).squeeze(0) for row in x])
        got = vmap(lambda row: functional_call(layer, params, (row.unsqueeze(0),)).squeeze(0))(x)
        assert got.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected)
        gradient = vmap(
            grad(lambda p, row: functional_call(layer, p, (row.unsqueeze(0),)).float().sum()), in_dims=(None, 0)
        )(params, x)
        assert gradient["weight"].dtype == torch.float32


def test_third_derivative_of_batch_norm_in_training() -> None:
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (nn.functional.batch_norm(x, None, None, training=True) ** 3 * weights).sum()

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        centered = x - x.mean(0)
        return ((centered / (centered.square().mean(0) + 1e-5).sqrt()) ** 3 * weights).sum()

    def third(f: Callable[..., Any]) -> torch.Tensor:
        first = lambda x: (grad(f)(x) * weights).sum()
        second = lambda x: (grad(first)(x) * weights.cos()).sum()
        return grad(second)(x)

    torch.testing.assert_close(third(norm), third(by_hand))


def test_jvp_of_jvp_of_layer_norm() -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (3,), eps=0.1)

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 0.1).sqrt()

    def second(f: Callable[..., Any]) -> torch.Tensor:
        return jvp(lambda x: jvp(f, (x,), (X.sin(),))[1], (X,), (X.cos(),))[1]

    torch.testing.assert_close(second(norm), second(by_hand))


def test_kron_with_a_factor_that_is_written_later() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        factor = X.clone()
        product = torch.kron(factor, x)
        factor.mul_(0.5)
        return product.sum()

    # torch.func and autograd use the factor as it is after the write
    right_or_error(lambda: grad(f)(X), X.sum().expand(3))


def test_lazy_conjugate_and_negative_views() -> None:
    z = torch.complex(BATCH, BATCH.flip(1))
    for f in (
        lambda z: z.conj() * z,
        lambda z: z.conj().imag * 1,
        lambda z: (z.conj().imag + 1).sin(),
        lambda z: z.mH @ z,
    ):
        f_ = (lambda z, f=f: f(z.unsqueeze(0))) if f(z).dim() == 2 and f(z).shape[0] == 3 else f
        torch.testing.assert_close(vmap(f_)(z), torch.stack([f_(row) for row in z]))
    torch.testing.assert_close(grad(lambda z: (z.conj() * z).real.sum())(z), 2 * z)


def test_derivative_through_an_index_that_comes_from_the_values() -> None:
    torch.testing.assert_close(grad(lambda x: x[x.argmax()])(X), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(vmap(lambda x: x[x.argmax().reshape(1)])(BATCH), BATCH.amax(1, keepdim=True))


# ---- randomness


def draws(f: Callable[..., Any], randomness: str, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return vmap(f, randomness=randomness)(torch.zeros(4, 5))


RANDOM: list[Callable[..., Any]] = [
    lambda x: x + torch.randn(5), lambda x: x + torch.rand_like(x), lambda x: nn.functional.dropout(x + 1, 0.5),
    lambda x: torch.bernoulli(x + 0.5), lambda x: x + torch.randperm(5), lambda x: torch.normal(x, x + 1.0),
    lambda x: x.clone().uniform_(), lambda x: x.clone().normal_(), lambda x: torch.randint(0, 1000, (5,)) + x,
    lambda x: torch.multinomial(torch.full((50,), 0.1), 5) + x, lambda x: torch.zeros(5).uniform_() + x,
    lambda x: nn.functional.alpha_dropout(x + 1, 0.5, training=True), lambda x: x.clone().exponential_(),
]  # fmt: skip


@pytest.mark.parametrize("f", RANDOM)
def test_randomness(f: Callable[..., Any]) -> None:
    with pytest.raises(FunctransError):
        vmap(f)(torch.zeros(4, 5))
    try:
        torch.func.vmap(f, randomness="same")(torch.zeros(4, 5))
    except RuntimeError:  # one draw from distributions that differ between the examples means nothing
        with pytest.raises(FunctransError):
            draws(f, "same")
    else:
        same = draws(f, "same")
        assert torch.equal(same, same[:1].expand_as(same))
    different = draws(f, "different")
    assert len({tuple(row.tolist()) for row in different}) > 1
    assert torch.equal(different, draws(f, "different"))
    assert not torch.equal(different, draws(f, "different", seed=1))


@pytest.mark.parametrize(("outer", "inner"), [(a, b) for a in ("same", "different") for b in ("same", "different")])
def test_randomness_per_level(outer: str, inner: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(())

    torch.manual_seed(0)
    out = vmap(vmap(f, randomness=inner), randomness=outer)(torch.zeros(3, 4))
    rows, columns = len(set(out[:, 0].tolist())), len(set(out[0].tolist()))
    assert rows == (3 if outer == "different" else 1)
    assert columns == (4 if inner == "different" else 1)


def test_dropout_mask_of_forward_and_backward_agree() -> None:
    x = torch.ones(6, 50, dtype=torch.float64)
    f = lambda x: nn.functional.dropout(x * 3, 0.5)
    torch.manual_seed(0)
    value, pullback = vjp(lambda x: vmap(f, randomness="different")(x), x)
    torch.testing.assert_close(pullback(torch.ones_like(x))[0], value)
    torch.manual_seed(0)
    value, tangent = jvp(lambda x: vmap(f, randomness="different")(x), (x,), (x,))
    torch.testing.assert_close(tangent, value)
    torch.manual_seed(0)
    g, v = vmap(functrans.grad_and_value(lambda x: f(x).sum()), randomness="different")(x)
    torch.testing.assert_close(g.sum(1), v)


def test_same_randomness_with_chunks() -> None:
    torch.manual_seed(0)
    out = vmap(lambda x: x + torch.rand(()), randomness="same", chunk_size=2)(torch.zeros(5))
    assert len(set(out.tolist())) == 1
    out = vmap(lambda x: x + torch.rand(()), randomness="different", chunk_size=2)(torch.zeros(5))
    assert len(set(out.tolist())) == 5


OWN_DRAWS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "rand": lambda g: torch.rand(2, generator=g), "uniform_": lambda g: torch.empty(2).uniform_(generator=g),
    "randperm": lambda g: torch.randperm(40, generator=g),
    "bernoulli": lambda g: torch.bernoulli(torch.full((64,), 0.5), generator=g),
    "beside PyTorch's": lambda g: torch.rand(2) + torch.rand(2, generator=g),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_same_randomness_with_chunks_by_a_generator_of_ones_own(name: str) -> None:
    draw, generator, x = OWN_DRAWS[name], torch.Generator().manual_seed(5), torch.zeros(5, 2)
    chunked = vmap(lambda x: x.sum() + draw(generator), randomness="same", chunk_size=2)
    nested = vmap(vmap(lambda x: x + draw(generator), randomness="same"), randomness="same", chunk_size=1)
    for run in (chunked, lambda x: nested(x).flatten(0, 1)):
        first, second = run(x), run(x)
        assert (first == first[0]).all() and (second == second[0]).all() and not torch.equal(first, second)


def test_randomness_under_grad_and_jvp_needs_no_flag() -> None:
    torch.manual_seed(0)
    noise = torch.randn(3, dtype=torch.float64)
    torch.manual_seed(0)
    got = grad(lambda x: (x * torch.randn(3, dtype=torch.float64)).sum())(X)
    torch.testing.assert_close(got, noise)


def test_derivatives_of_tangents_of_solvers() -> None:
    """PyTorch's forward mode reads the factors that the operator returns, and takes them for constants."""
    a, d = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    a = a @ a.mT + 2 * torch.eye(3, dtype=torch.float64)
    d = d + d.mT
    b = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    inverse = torch.linalg.inv(a)
    second = {
        "solve": (lambda a: torch.linalg.solve(a, b), 2 * inverse @ d @ inverse @ d @ inverse @ b),
        "slogdet": (lambda a: torch.linalg.slogdet(a)[1], -(inverse @ d @ inverse @ d).trace()),
        "logdet": (torch.logdet, -(inverse @ d @ inverse @ d).trace()),
        "cholesky_inverse": (
            lambda a: torch.cholesky_inverse(torch.linalg.cholesky(a)),
            2 * inverse @ d @ inverse @ d @ inverse,
        ),
    }
    for f, expected in second.values():
        first = lambda a, f=f: jvp(f, (a,), (d,))[1]
        torch.testing.assert_close(jvp(first, (a,), (d,))[1], expected)
        torch.testing.assert_close((grad(lambda a, first=first: first(a).sum())(a) * d).sum(), expected.sum())
