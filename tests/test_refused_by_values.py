"""What PyTorch refuses for the numbers, strings or dtypes that it is given, transforms refuse too: for one bad example
among good ones, in a captured tensor and in one made inside, whatever stands in the operator's place there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from functrans import functionalize, grad, jvp, linearize, vmap

DOUBLE, NAN, INF = torch.float64, float("nan"), float("inf")


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def i(*values: int) -> Tensor:
    return torch.tensor(values)


X = t(0.1, 0.2, 0.3, 0.4)
SQUARE = lambda x: x.view(2, 2)


def written(x: Tensor, place: Tensor) -> Tensor:
    y = x.clone()
    y[place] = x[0]
    return y


#: By name: a function of four numbers and of what is checked; what it takes; what it refuses.
CALLS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Tensor, list[Tensor]]] = {
    "quantile": (lambda x, q: torch.quantile(x, q), t(0.5, 0.2), [t(0.5, 1.2), t(-0.2, 0.5), t(NAN, 0.5)]),
    "quantile, one": (lambda x, q: torch.quantile(x, q), t(0.5)[0], [t(1.2)[0], t(-0.2)[0]]),
    "nanquantile": (lambda x, q: torch.nanquantile(x, q), t(0.5, 0.2), [t(0.5, 1.2), t(-0.2, 0.5)]),
    "multinomial": (lambda x, p: torch.multinomial(p, 1) + x[0], t(0.5, 0.2), [t(0.5, -0.2), t(0, 0), t(INF, 1)]),
    "bernoulli": (lambda x, p: torch.bernoulli(p) * x[0], t(0.5, 0.2), [t(0.5, -0.2), t(1.2, 0)]),
    "binary_cross_entropy": (lambda x, p: F.binary_cross_entropy(p, x[:2]), t(0.5, 0.2), [t(0.5, -0.2), t(1.2, 0)]),
    "cross_entropy": (lambda x, k: F.cross_entropy(x.expand(2, 4), k), i(0, 3), [i(0, 4), i(-1, 0)]),
    "cross_entropy, one": (lambda x, k: F.cross_entropy(x, k), i(3)[0], [i(4)[0], i(-1)[0]]),
    "multi_margin_loss": (lambda x, k: F.multi_margin_loss(x.expand(2, 4), k), i(0, 3), [i(0, 4), i(-1, 0)]),
    "embedding": (lambda x, k: F.embedding(k, x.view(4, 1)), i(0, 3), [i(0, 4), i(-1, 0)]),
    "embedding_bag": (lambda x, k: F.embedding_bag(k, x.view(4, 1), i(0)), i(0, 3), [i(0, 4), i(-1, 0)]),
    "bags": (lambda x, o: F.embedding_bag(i(0, 1), x.view(4, 1), o), i(0, 1), [i(1, 1), i(0, 3), i(0, -1)]),
    "gather": (lambda x, k: x.gather(0, k), i(0, 3), [i(0, 4), i(-1, 0)]),
    "take": (lambda x, k: x.take(k), i(0, 3), [i(0, 4), i(-5, 0)]),
    "index_select": (lambda x, k: SQUARE(x).index_select(1, k), i(0, 1), [i(0, 2), i(-1, 0)]),
    "x[k]": (lambda x, k: x[k], i(0, 3), [i(0, 4), i(-5, 0)]),
    "x[:, k]": (lambda x, k: SQUARE(x)[:, k], i(0, 1), [i(0, 2), i(-3, 0)]),
    "x[k, l]": (lambda x, k: SQUARE(x)[k, i(0, 1)], i(0, 1), [i(0, 2), i(-3, 0)]),
    "x[one]": (lambda x, k: x[k], i(3)[0], [i(4)[0], i(-5)[0]]),
    "x[k] = y": (written, i(0, 3), [i(0, 4), i(-5, 0)]),
    "x[one] = y": (written, i(3)[0], [i(4)[0], i(-5)[0]]),
    "index_put": (lambda x, k: x.index_put((k,), x[:2], accumulate=True), i(0, 3), [i(0, 4), i(-5, 0)]),
    "scatter": (lambda x, k: x.scatter(0, k, x[:2]), i(0, 3), [i(0, 4), i(-1, 0)]),
    "scatter_add": (lambda x, k: x.scatter_add(0, k, x[:2]), i(0, 3), [i(0, 4), i(-1, 0)]),
    "scatter_reduce": (lambda x, k: x.scatter_reduce(0, k, x[:2], "amax"), i(0, 3), [i(0, 4), i(-1, 0)]),
    "index_add": (lambda x, k: x.index_add(0, k, x[:2]), i(0, 3), [i(0, 4), i(-1, 0)]),
    "index_copy": (lambda x, k: x.index_copy(0, k, x[:2]), i(0, 3), [i(0, 4), i(-1, 0)]),
    "index_fill": (lambda x, k: x.index_fill(0, k, 2.0), i(0, 3), [i(0, 4), i(-5, 0)]),
    "index_reduce": (lambda x, k: x.index_reduce(0, k, x[:2], "amax"), i(0, 3), [i(0, 4), i(-1, 0)]),
    "put": (lambda x, k: x.put(k, x[:2]), i(0, 3), [i(0, 4), i(-5, 0)]),
    "one_hot": (lambda x, k: F.one_hot(k, 4) * x, i(0, 3), [i(0, 4), i(-1, 0)]),
    "bincount": (lambda x, k: torch.bincount(k, x[:2], minlength=4), i(0, 3), [i(-1, 0)]),
    "max_unpool1d": (lambda x, k: F.max_unpool1d(x[None, None, :2], k[None, None], 2), i(0, 3), [i(0, 4), i(-1, 0)]),
    "repeat_interleave": (
        lambda x, n: torch.repeat_interleave(x[:2], n, output_size=4), i(1, 3), [i(1, 2), i(5, -1)]
    ),
    "segment_reduce": (lambda x, n: torch.segment_reduce(x, "sum", lengths=n), i(1, 3), [i(1, 2), i(5, -1)]),
    "cholesky": (lambda x, d: torch.linalg.cholesky(d.diag() + 0 * x[0]), t(1, 2), [t(1, -2), t(0, 1)]),
    "inv": (lambda x, d: torch.linalg.inv(d.diag() + 0 * x[0]), t(1, 2), [t(0, 1)]),
    "solve": (lambda x, d: torch.linalg.solve(d.diag() + 0 * x[0], x[:2]), t(1, 2), [t(0, 1)]),
    "lu_factor": (lambda x, d: torch.linalg.lu_factor(d.diag() + 0 * x[0])[0], t(1, 2), [t(0, 1)]),
    "svdvals": (lambda x, d: torch.linalg.svdvals(d.diag() + 0 * x[0]), t(1, 2), [t(NAN, 1)]),
    "normal": (lambda x, s: torch.normal(0.0, s) + x[:2], t(1, 2), [t(1, -2)]),
    "poisson": (lambda x, r: torch.poisson(r) + x[:2], t(1, 2), [t(1, -2)]),
    "gaussian_nll_loss": (lambda x, v: F.gaussian_nll_loss(x[:2], x[2:], v), t(1, 2), [t(1, -2)]),
    "a // n": (lambda x, n: i(5, 6) // n * x[:2], i(1, 2), [i(1, 0)]),
    "a % n": (lambda x, n: i(5, 6) % n * x[:2], i(1, 2), [i(1, 0)]),
    "histogram": (lambda x, v: torch.histogram(v, 3)[0] + x[:3], t(1, 2), [t(1, NAN), t(INF, 1)]),
    "histc": (lambda x, v: torch.histc(v, 3) + x[:3], t(1, 2), [t(1, NAN), t(INF, 1)]),
    "Normal": (lambda x, s: torch.distributions.Normal(x[:2], s).log_prob(x[:2]), t(1, 2), [t(1, -2)]),
    "_assert_async": (lambda x, v: (torch._assert_async(v[0] > 0), x)[1], t(1, 2), [t(-1, 0)]),
}


def ways(f: Callable[[Tensor, Tensor], Any], good: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """How ``f`` is called with ``v``, alone or among good ones."""
    batch = torch.stack([X, X * 1.1, X * 0.9])
    drawn = lambda f, *dims: vmap(f, *dims, randomness="different")
    summed = lambda x, v: f(x, v).sum()
    found: dict[str, Callable[[Tensor], Any]] = {
        "vmap": lambda v: drawn(f)(batch, torch.stack([good, good, v])),
        "vmap, alone": lambda v: drawn(f, (None, -1))(X, torch.stack([good, v, good], -1)),
        "vmap, shared": lambda v: drawn(f, (0, None))(batch, v),
        "vmap, made inside": lambda v: drawn(lambda x: f(x, v.clone()))(batch),
        "two vmaps": lambda v: drawn(drawn(f))(
            batch.expand(2, 3, 4), torch.stack([torch.stack([good] * 3), torch.stack([good, v, good])])
        ),
        "grad": lambda v: grad(lambda x: summed(x, v))(X),
        "grad, made inside": lambda v: grad(lambda x: summed(x, v.clone()))(X),
        "jvp": lambda v: jvp(lambda x: f(x, v), (X,), (X,)),
        "jvp, made inside": lambda v: jvp(lambda x: f(x, v.clone()), (X,), (X,)),
        "vmap of grad": lambda v: drawn(grad(summed))(batch, torch.stack([good, v, good])),
        "grad of vmap": lambda v: grad(lambda x: drawn(f)(x, torch.stack([good, v, good])).sum())(batch),
        "grad of grad": lambda v: grad(lambda x: grad(lambda x: summed(x, v))(x).sum())(X),
        "functionalize": lambda v: functionalize(f)(X, v),
        "linearize": lambda v: linearize(lambda x: f(x, v), X),
    }
    if good.is_floating_point():
        found["grad by it"] = lambda v: grad(lambda v: summed(X, v))(v)
        found["jvp by it"] = lambda v: jvp(lambda v: f(X, v), (v,), (v,))
    return found


def answers(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:  # noqa: BLE001 (whatever it raises)
        return False
    return True


@pytest.mark.parametrize("name", CALLS)
def test_refused_for_its_values(name: str) -> None:
    f, good, bad = CALLS[name]
    f(X, good)
    assert not [v for v in bad if answers(lambda v=v: f(X, v))]
    taken = {how: way for how, way in ways(f, good).items() if answers(lambda way=way: way(good))}
    assert "vmap" in taken or name == "repeat_interleave"
    assert not [(how, v) for how, way in taken.items() for v in bad if answers(lambda way=way, v=v: way(v))]


ROWS = X.view(1, 2, 2)
#: Calls of one tensor that PyTorch refuses whatever its numbers are.
NEVER: dict[str, Callable[[Tensor], Any]] = {
    "index_reduce, another reduction": lambda x: x.index_reduce(0, i(0, 1), x[:2], "sum"),
    "index_reduce, too many": lambda x: x.index_reduce(0, i(0, 1), x[:3], "amax"),
    "scatter, another reduction": lambda x: x.scatter(0, i(0, 1), x[:2], reduce="amax"),
    "attention, another dtype": lambda x: F.scaled_dot_product_attention(ROWS.float(), SQUARE(x)[None], ROWS),
    "attention, vectors": lambda x: F.scaled_dot_product_attention(x, SQUARE(x), SQUARE(x)),
    "attention, a mask of integers": lambda x: F.scaled_dot_product_attention(
        SQUARE(x), SQUARE(x), SQUARE(x), i(0, 1, 1, 0).view(2, 2)
    ),
    "attention, a negative dropout": lambda x: F.scaled_dot_product_attention(*[SQUARE(x)[None, None]] * 3, None, -1.0),
    "polar, two dtypes": lambda x: torch.polar(x, X.float()),
    "triangular_solve, two dtypes": lambda x: torch.triangular_solve(SQUARE(x), SQUARE(X).float()),
    "renorm to NaN": lambda x: torch.renorm(SQUARE(x), 2, 0, NAN),
    "hardtanh, bounds in disorder": lambda x: F.hardtanh(x, 1.0, -1.0),
    "one_hot of floats": lambda x: F.one_hot(x, 4),
    "histogram, two dtypes": lambda x: torch.histogram(x, t(0, 1).float()),
    "histogram, no bin": lambda x: torch.histogram(x, 0),
    "searchsorted, no sequence": lambda x: torch.searchsorted(x[0], x[1]),
    "dropout of a part": lambda x: torch.dropout(x, 2.0, False),
}


@pytest.mark.parametrize("name", NEVER)
def test_refused_for_its_arguments(name: str) -> None:
    f = NEVER[name]
    assert not answers(lambda: f(X))
    assert not answers(lambda: vmap(f, randomness="different")(torch.stack([X, X])))
    assert not answers(lambda: grad(lambda x: (f(x), x.sum())[1])(X))
    assert not answers(lambda: jvp(lambda x: (f(x), x)[1], (X,), (X,)))


def cases_of_numbers() -> list[Any]:
    shapes, reductions = ((), (1,)), ("sum", "prod", "mean", "amax", "amin")
    return list(itertools.product(shapes, shapes, reductions, (True, False)))


@pytest.mark.parametrize(("shape", "index", "reduce", "include"), cases_of_numbers())
def test_numbers_are_scattered_as_vectors_of_one(shape: Any, index: Any, reduce: str, include: bool) -> None:
    place = torch.zeros(index, dtype=torch.long)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return x.scatter_reduce(0, place, y, reduce, include_self=include)

    x, y = torch.full(shape, 1.5, dtype=DOUBLE), torch.full(index, 2.5, dtype=DOUBLE)
    vector = lambda x, y: x.scatter_reduce(0, i(0), y, reduce, include_self=include)[0]
    wanted = grad(vector, argnums=(0, 1))(x.reshape(1), y.reshape(1))
    found = grad(lambda x, y: f(x, y).sum(), argnums=(0, 1))(x, y)
    assert [g.shape for g in found] == [x.shape, y.shape] and [g.sum() for g in found] == [g.sum() for g in wanted]
    tangent = jvp(f, (x, y), (2 * x, 3 * y))[1]
    assert tangent.shape == x.shape and tangent.sum() == (2 * wanted[0] * x + 3 * wanted[1] * y).sum()
