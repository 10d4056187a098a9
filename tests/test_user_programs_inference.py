"""Programs of users: likelihoods, filters, optimizers and distributions, inside the transforms."""

from __future__ import annotations

import math

import pytest
import torch
from loop import for_each
from slow_ways import agree, gradient, no_history
from torch import Tensor

from functrans import grad, hessian, jacrev, jvp, vmap

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_gaussian_process_likelihood() -> None:
    x, y = torch.rand(6, 2, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)
    hyper = torch.tensor([[0.1, -0.3, -1.0], [0.5, 0.2, -0.5]], dtype=DOUBLE)

    def likelihood(h: Tensor) -> Tensor:
        square = (x[:, None] - x).pow(2).sum(-1)
        k = h[0].exp() * torch.exp(-square / (2 * h[1].exp() ** 2)) + h[2].exp() * torch.eye(6, dtype=DOUBLE)
        factor = torch.linalg.cholesky(k)
        alpha = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        return -0.5 * (alpha**2).sum() - factor.diagonal().log().sum()

    def by_determinant(h: Tensor) -> Tensor:
        k = h[0].exp() * torch.exp(-(torch.cdist(x, x) ** 2) / (2 * h[1].exp() ** 2)) + h[2].exp() * torch.eye(
            6, dtype=DOUBLE
        )
        return -0.5 * y @ torch.linalg.solve(k, y) - 0.5 * torch.logdet(k)

    def by_cholesky_solve(h: Tensor) -> Tensor:
        k = h[0].exp() * torch.exp(-(torch.cdist(x, x) ** 2) / (2 * h[1].exp() ** 2)) + h[2].exp() * torch.eye(
            6, dtype=DOUBLE
        )
        factor = torch.linalg.cholesky(k)
        return -0.5 * y @ torch.cholesky_solve(y[:, None], factor)[:, 0] - 0.5 * torch.linalg.slogdet(k).logabsdet

    for form in (likelihood, by_determinant, by_cholesky_solve):
        agree(vmap(grad(form))(hyper), no_history(for_each(gradient(likelihood))(hyper)))
        agree(vmap(hessian(form))(hyper), for_each(lambda h: torch.autograd.functional.hessian(likelihood, h))(hyper))


def test_a_kalman_filter_s_likelihood() -> None:
    observations = torch.randn(3, 7, 1, dtype=DOUBLE)

    def likelihood(theta: Tensor, ys: Tensor) -> Tensor:
        a = torch.stack([torch.stack([theta[0], theta[1]]), torch.stack([-theta[1], theta[0]])])
        h, q, r = torch.tensor([[1.0, 0.5]], dtype=DOUBLE), theta[2].exp() * torch.eye(2, dtype=DOUBLE), theta[3].exp()
        mean, cov = torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
        total = torch.zeros((), dtype=DOUBLE)
        means = torch.zeros(len(ys), 2, dtype=DOUBLE)
        for t, y in enumerate(ys):
            mean, cov = a @ mean, a @ cov @ a.T + q
            s = h @ cov @ h.T + r
            gain = torch.linalg.solve(s, h @ cov).T
            error = y - h @ mean
            total += -0.5 * (error @ torch.linalg.solve(s, error) + torch.logdet(2 * math.pi * s))
            mean, cov = mean + gain @ error, cov - gain @ h @ cov
            means[t] = mean
        return total + 0.1 * means.pow(2).mean()

    theta = torch.tensor([0.9, 0.2, -1.0, -0.5], dtype=DOUBLE)
    agree(
        vmap(grad(likelihood), (None, 0))(theta, observations),
        no_history(for_each(gradient(likelihood), (None, 0))(theta, observations)),
    )
    got = vmap(hessian(likelihood), (None, 0))(theta, observations)
    agree(got, for_each(lambda y: torch.autograd.functional.hessian(lambda t: likelihood(t, y), theta))(observations))


def test_newton_and_lbfgs_inside_vmap() -> None:
    centers = torch.randn(4, 3, dtype=DOUBLE)

    def objective(x: Tensor, c: Tensor) -> Tensor:
        return ((x - c) ** 2).sum() + (x - c).pow(4).sum() + 0.1 * (x - c).prod() ** 2

    def newton(c: Tensor) -> Tensor:
        x = torch.zeros(3, dtype=DOUBLE)
        for _ in range(12):
            x = x - torch.linalg.solve(hessian(objective)(x, c), grad(objective)(x, c))
        return x

    def lbfgs(c: Tensor) -> Tensor:
        x, history = torch.zeros(3, dtype=DOUBLE), []
        g = grad(objective)(x, c)
        for _ in range(40):
            q, alphas = g, []
            for s, y in reversed(history):
                alphas.append((s @ q) / (y @ s + 1e-300))
                q = q - alphas[-1] * y
            q = q * 0.2
            for (s, y), alpha in zip(history, reversed(alphas)):
                q = q + s * (alpha - (y @ q) / (y @ s + 1e-300))
            new = x - 0.5 * q
            new_g = grad(objective)(new, c)
            history = [*history[-4:], (new - x, new_g - g)]
            x, g = new, new_g
        return x

    agree(vmap(newton)(centers), centers, rtol=1e-7, atol=1e-7)
    agree(vmap(lbfgs)(centers), centers, rtol=1e-4, atol=1e-4)
    agree(vmap(jacrev(newton))(centers), torch.eye(3, dtype=DOUBLE).expand(4, 3, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("validate_args", [True, False])
def test_distributions(validate_args: bool) -> None:
    def mixture(p: dict[str, Tensor], x: Tensor) -> Tensor:
        d = torch.distributions
        weights = d.Categorical(logits=p["logits"], validate_args=validate_args)
        parts = d.Normal(p["mean"], p["scale"].exp(), validate_args=validate_args)
        return d.MixtureSameFamily(weights, parts, validate_args=validate_args).log_prob(x)

    def by_hand(p: dict[str, Tensor], x: Tensor) -> Tensor:
        z = (x - p["mean"]) / p["scale"].exp()
        return torch.logsumexp(p["logits"].log_softmax(0) - 0.5 * z**2 - p["scale"] - 0.5 * math.log(2 * math.pi), 0)

    p = {n: torch.randn(3, dtype=DOUBLE) for n in ("logits", "mean", "scale")}
    x = torch.randn(5, dtype=DOUBLE)
    agree(grad(lambda p: mixture(p, x[0]))(p), no_history(gradient(by_hand)(p, x[0])))
    agree(jvp(lambda p: mixture(p, x[0]), (p,), (p,))[0], by_hand(p, x[0]))
    if not validate_args:  # validation branches on every example's numbers
        agree(vmap(grad(mixture), (None, 0))(p, x), no_history(for_each(gradient(by_hand), (None, 0))(p, x)))
        draw = vmap(
            lambda m: torch.distributions.Normal(m, 1.0, validate_args=False).rsample((2,)), randomness="different"
        )
        assert draw(x).shape == (5, 2) and len(draw(x).unique()) == 10

    def normal(mean: Tensor, factor: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(mean,
            scale_tril=factor.tril(-1) + torch.diag(factor.diagonal().exp()),
                                                      validate_args=False).log_prob(x[:3])  # fmt: skip

    def precision(factor: Tensor) -> Tensor:
        factor = factor.tril(-1) + torch.diag(factor.diagonal().exp())
        return torch.linalg.inv(factor @ factor.T)

    factors = torch.randn(2, 3, 3, dtype=DOUBLE)
    agree(vmap(hessian(normal), (None, 0))(x[2:], factors), -for_each(precision)(factors))
