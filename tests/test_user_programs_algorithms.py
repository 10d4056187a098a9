"""Programs of users: loops that fill buffers, dynamic programs, masks, segments, sorting, losses, and complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import for_each
from slow_ways import agree, gradient, jacobian, no_history
from torch import Tensor

from functrans import grad, hessian, jacfwd, jacrev, jvp, vmap

DOUBLE = torch.float64
MASK = torch.tensor([True, False, True, False, False])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def hessian_of(f: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    return torch.autograd.functional.hessian(lambda t: f(t, *rest), x)


def cumulative_by_setitem(x: Tensor) -> Tensor:
    out, total = torch.zeros_like(x), torch.zeros((), dtype=DOUBLE)
    for i in range(len(x)):
        total = total + x[i]
        out[i] = total
    return out


def cumulative_in_place(x: Tensor) -> Tensor:
    total, seen = torch.zeros((), dtype=DOUBLE), []
    for v in x:
        total += v
        seen.append(total.clone())
    return torch.stack(seen)


def the_same_tensor_many_times(x: Tensor) -> Tensor:
    total, seen = torch.zeros((), dtype=DOUBLE), []
    for v in x:
        total += v
        seen.append(total)
    return torch.stack(seen)


def sieve(x: Tensor) -> Tensor:
    x = x.clone()
    x[MASK] = 0
    x[~MASK] *= 2
    x[x > 1] = 1.0
    x.masked_fill_(x < -1, -1.0)
    return x


def running_median(x: Tensor) -> Tensor:
    window = torch.zeros(3, dtype=DOUBLE)
    for v in x:
        window = window.roll(1)
        window[0] = v
        window[1:].mul_(0.9)
    return torch.stack([window.median(), window.amax(), window.std()])


@pytest.mark.parametrize(
    "f",
    [cumulative_by_setitem, cumulative_in_place, the_same_tensor_many_times, sieve, running_median],
    ids=lambda f: f.__name__,
)
def test_buffers_and_masks(f: Callable[[Tensor], Tensor]) -> None:
    x = randn(4, 5)
    jacobians = torch.stack([jacobian(f, row) for row in x])
    agree(vmap(f)(x), for_each(f)(x))
    agree(vmap(jacrev(f))(x), jacobians)
    agree(vmap(jacfwd(f))(x), jacobians)
    agree(jacrev(f)(x[0]), jacobians[0])


def test_masks_and_indices_of_each_example() -> None:
    def masked(x: Tensor, m: Tensor) -> Tensor:
        x = x.clone()
        x[m] = 0
        return x * x

    x, m = randn(4, 5), torch.rand(4, 5) > 0.5
    agree(vmap(masked)(x, m), for_each(masked)(x, m))
    agree(vmap(grad(lambda x, m: masked(x, m).sum()))(x, m), 2 * x * ~m)

    def edited(x: Tensor, i: Tensor, w: Tensor) -> Tensor:
        y = x.clone()
        y[i] = y[i] * w
        y[i, 0] += 1
        return y.index_fill_(0, i[:1], 3.0)

    x, i, w = randn(3, 5, 2), torch.tensor([[0, 1], [2, 3], [4, 0]]), randn(3, 2, 2)
    agree(vmap(edited)(x, i, w), for_each(edited)(x, i, w))
    agree(
        vmap(jacrev(edited))(x, i, w),
        torch.stack([jacobian(lambda t, k=k: edited(t, i[k], w[k]), x[k]) for k in range(3)]),
    )


def test_soft_dynamic_time_warping() -> None:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        d = torch.full((len(a) + 1, len(b) + 1), torch.inf, dtype=DOUBLE)
        d[0, 0] = 0
        for i in range(len(a)):
            for j in range(len(b)):
                before = torch.stack([d[i, j], d[i, j + 1], d[i + 1, j]])
                d[i + 1, j + 1] = (a[i] - b[j]) ** 2 - torch.logsumexp(-before, 0)
        return d[-1, -1]

    a, b = randn(3, 4), randn(3, 5)
    agree(vmap(distance)(a, b), for_each(distance)(a, b))
    agree(vmap(grad(distance))(a, b), no_history(for_each(gradient(distance))(a, b)))
    agree(vmap(hessian(distance))(a, b), torch.stack([hessian_of(distance, x, y) for x, y in zip(a, b)]))


def test_viterbi_with_its_path() -> None:
    def decode(emissions: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor]:
        steps, states = emissions.shape
        score, back = torch.zeros(steps, states, dtype=DOUBLE), torch.zeros(steps, states, dtype=torch.long)
        score[0] = emissions[0]
        for t in range(1, steps):
            best, back[t] = (score[t - 1][:, None] + transitions).max(0)
            score[t] = best + emissions[t]
        path = torch.zeros(steps, dtype=torch.long)
        path[-1] = score[-1].argmax()
        for t in range(steps - 1, 0, -1):
            path[t - 1] = back[t][path[t]]  # a state of its own for each example
        return score[-1].max(), path

    def total(e: Tensor, t: Tensor) -> Tensor:
        return decode(e, t)[0]

    e, t = randn(4, 5, 3), randn(3, 3)
    agree(vmap(decode, (0, None))(e, t), for_each(decode, (0, None))(e, t))
    agree(vmap(grad(total), (0, None))(e, t), no_history(for_each(gradient(total), (0, None))(e, t)))
    agree(vmap(grad(total, 1), (0, None))(e, t), no_history(for_each(lambda e: gradient(lambda t: total(e, t))(t))(e)))


def test_connectionist_temporal_classification() -> None:
    def by_hand(logs: Tensor, target: Tensor) -> Tensor:
        labels = torch.zeros(2 * len(target) + 1, dtype=torch.long)
        labels[1::2] = target
        skips = torch.zeros(len(labels), dtype=torch.bool)
        skips[2:] = (labels[2:] != 0) & (labels[2:] != labels[:-2])
        alpha = torch.full((len(logs), len(labels)), -1e30, dtype=DOUBLE)
        alpha[0, 0] = logs[0, 0]
        alpha[0, 1] = logs[0, labels[1]]
        for t in range(1, len(logs)):
            stay = alpha[t - 1]
            ways = [
                stay,
                F.pad(stay[:-1], (1, 0), value=-1e30),
                torch.where(skips, F.pad(stay[:-2], (2, 0), value=-1e30), -1e30),
            ]
            alpha[t] = torch.logsumexp(torch.stack(ways), 0) + logs[t, labels]
        return -torch.logsumexp(alpha[-1, -2:], 0)

    def built_in(logs: Tensor, target: Tensor) -> Tensor:
        return F.ctc_loss(logs[:, None], target[None], [6], [2], reduction="sum")

    def of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y: loss(x.log_softmax(-1), y)

    x, y = randn(3, 6, 4), torch.tensor([[1, 2], [3, 3], [2, 1]])
    expected = no_history(for_each(gradient(of(built_in)))(x, y))
    for loss in (by_hand, built_in):
        agree(vmap(of(loss))(x, y), for_each(of(built_in))(x, y), rtol=1e-9, atol=1e-9)
    agree(vmap(grad(of(by_hand)))(x, y), expected, rtol=1e-7, atol=1e-9)
    agree(grad(of(built_in))(x[0], y[0]), expected[0], rtol=1e-7, atol=1e-9)


def test_sums_and_maxima_of_segments() -> None:
    def f(x: Tensor, segment: Tensor) -> Tensor:
        count = torch.zeros(3, dtype=DOUBLE)
        count.index_add_(0, segment, torch.ones_like(x))
        mean = torch.zeros(3, dtype=DOUBLE).index_add(0, segment, x) / count.clamp(min=1)
        largest = torch.zeros(3, dtype=DOUBLE).scatter_reduce(0, segment, x, "amax", include_self=False)
        spread = torch.zeros(3, dtype=DOUBLE)
        spread.scatter_add_(0, segment, (x - mean[segment]) ** 2)
        return spread + largest.exp()

    x, segment = randn(4, 6), torch.randint(0, 3, (4, 6))
    agree(vmap(f)(x, segment), for_each(f)(x, segment))
    agree(vmap(f, (0, None))(x, segment[0]), for_each(f, (0, None))(x, segment[0]))
    expected = torch.stack([jacobian(lambda t, s=s: f(t, s), row) for row, s in zip(x, segment)])
    agree(vmap(jacrev(f))(x, segment), expected)
    agree(vmap(jacfwd(f))(x, segment), expected)


def test_sorting_and_order_statistics() -> None:
    def f(x: Tensor) -> Tensor:
        values, order = x.sort(descending=True)
        weights = torch.arange(len(x), dtype=DOUBLE)
        picked = (values * weights).sum() + (x.gather(0, order) ** 3 * weights).sum() + (x.topk(3)[0] ** 2).sum()
        return picked + x.median() ** 2 + x.kthvalue(2)[0] * x.quantile(0.3) + x.cummax(0)[0].sin().sum()

    x = randn(4, 6)
    agree(vmap(grad(f))(x), no_history(for_each(gradient(f))(x)))
    agree(vmap(hessian(f))(x), torch.stack([hessian_of(f, row) for row in x]))

    def ranked(x: Tensor, y: Tensor) -> Tensor:
        return (torch.argsort(torch.argsort(x)) * y).sum() + (torch.searchsorted(x.sort()[0], y) * y).sum()

    x, y = randn(4, 5), randn(4, 5)
    agree(vmap(grad(ranked, 1))(x, y), for_each(lambda x, y: gradient(lambda y: ranked(x, y))(y).detach())(x, y))


@pytest.mark.parametrize(
    "options",
    [{"ignore_index": -100}, {"ignore_index": 1, "label_smoothing": 0.1}, {"weighted": True, "label_smoothing": 0.2},
     {"reduction": "none"}, {"reduction": "sum", "weighted": True, "ignore_index": 2}],
    ids=str,
)  # fmt: skip
def test_cross_entropies(options: dict[str, Any]) -> None:
    given = {k: v for k, v in options.items() if k != "weighted"}
    if options.get("weighted"):
        given["weight"] = torch.tensor([0.2, 1.5, 0.7], dtype=DOUBLE)
    x, y = randn(4, 5, 3), torch.randint(0, 3, (4, 5))
    y[0, 1] = y[2, 3] = given.get("ignore_index", -100)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y, **given).sum()

    agree(vmap(grad(f))(x, y), no_history(for_each(gradient(f))(x, y)))
    agree(vmap(hessian(f))(x, y), torch.stack([hessian_of(f, a, b) for a, b in zip(x, y)]))


def test_filters_in_the_frequency_domain() -> None:
    def f(h: Tensor, x: Tensor) -> Tensor:
        n = x.shape[-1]
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(h, n=n), n=n).pow(2).sum()

    h, x = randn(3), randn(4, 8)
    agree(
        vmap(grad(f, (0, 1)), (None, 0))(h, x),
        tuple(torch.stack(c) for c in zip(*[torch.autograd.functional.jacobian(f, (h, r)) for r in x])),
    )
    agree(vmap(hessian(f), (None, 0))(h, x), torch.stack([hessian_of(f, h, r) for r in x]))


def test_complex_numbers() -> None:
    def of_pairs(pairs: Tensor) -> Tensor:
        z = torch.view_as_complex(pairs)
        u = torch.fft.fft(z * z.conj() + z.exp())
        return (u.abs() ** 2).sum() + u.angle().sin().sum() + z.real.prod() + (z.conj().imag * 2).sum()

    x = randn(3, 4, 2)
    agree(vmap(grad(of_pairs))(x), no_history(for_each(gradient(of_pairs))(x)))
    agree(vmap(hessian(of_pairs))(x), torch.stack([hessian_of(of_pairs, r) for r in x]), rtol=1e-8, atol=1e-10)

    def of_complex(z: Tensor) -> Tensor:
        return (z * z.conj()).real.sum() + (z**3).imag.sum() + torch.linalg.norm(z)

    z, t = (torch.randn(4, 3, dtype=torch.complex128) for _ in range(2))
    expected = torch.stack([gradient(of_complex)(r).detach().resolve_conj() for r in z])
    agree(vmap(grad(of_complex))(z).resolve_conj(), expected)
    agree(vmap(lambda z, t: jvp(of_complex, (z,), (t,))[1])(z, t), (expected.conj() * t).real.sum(1))


def test_tensor_contractions() -> None:
    def f(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (
            torch.einsum("ij,jkl,k->il", a, b, c).tanh().pow(2).sum()
            + torch.einsum("ii", a @ a.mT)
            + torch.einsum("...k,j->", b, c)
        )

    a, b, c = randn(4, 2, 3), randn(4, 3, 4, 2), randn(4, 4)
    every = [gradient(lambda t: f(*t))((x, y, z)) for x, y, z in zip(a, b, c)]
    agree(vmap(grad(f, (0, 1, 2)))(a, b, c), no_history(tuple(torch.stack(g) for g in zip(*every))))
    every = [gradient(lambda t: f(t[0], b[0], t[1]))((x, z)) for x, z in zip(a, c)]
    agree(vmap(grad(f, (0, 2)), (0, None, 0))(a, b[0], c), no_history(tuple(torch.stack(g) for g in zip(*every))))
