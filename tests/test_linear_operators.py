"""linearize, linear_transpose and functionalize of every operator that PyTorch has samples of.

Of a few operators in a usual run, of all with ``-m slow``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import opinfo
import pytest
import torch
from opinfo_problem import UNINITIALIZED
from plain import difference
from recorder import Listing
from torch import Tensor

from functrans import functionalize, jvp, linear_transpose, linearize, vjp
from functrans.errors import FunctransError, NonLinearError
from functrans.operators.info import VIEW, WRITE, op_info

NAMES = sorted(opinfo.operators())
EVERY = [pytest.param(name, marks=() if i % 16 == 0 else pytest.mark.slow) for i, name in enumerate(NAMES)]


#: Operators of which tangent and gradient are no transposes of each other.
NO_TRANSPOSE = {
    # takes its argument for a symmetric matrix, which the argument moved along a random tangent is not
    "linalg.pinv.hermitian",
}


def problems(name: str) -> Iterator[Any]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for problem in opinfo.problems(opinfo.operators()[name], 3):
            if problem.diff and problem.float_outputs and not draws(problem):
                yield problem


def draws(problem: Any) -> bool:
    """Whether random numbers are drawn, which may give the same result twice by chance."""
    before = torch.get_rng_state()
    problem.call(*[leaf.clone() for leaf in problem.leaves])
    return not torch.equal(torch.get_rng_state(), before)


def inner(a: Any, b: Any) -> Tensor:
    return sum(((x.conj() * y).real.sum().to(torch.float64) for x, y in zip(a, b, strict=True)), torch.tensor(0.0))


def precision(problem: Any) -> float:
    """What operators that convert to another dtype leave of the precision of float64."""
    return max([1e-9, *(8 * torch.finfo(o.dtype).eps for o in problem.out if o.is_floating_point() or o.is_complex())])


def close(a: Tensor, b: Tensor, size: Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=0.01 * rtol * max(1.0, float(size)), equal_nan=True)


def dense(tensors: Any) -> bool:
    return all(t.layout is torch.strided for t in tensors)


@pytest.mark.parametrize("name", EVERY)
def test_linearize_is_adjoint_to_vjp(name: str) -> None:
    """The one comes from tangent formulas, the other from reverse ones."""
    for p in problems(name):
        primals, f = p.split(p.leaves)
        if not dense([*primals, *p.out]):
            continue
        tangents, cotangents = p.random_like(primals), p.random_like(p.out[i] for i in p.float_outputs)
        try:
            out, jvp_fn = linearize(f, *primals)
        except FunctransError:  # an operator that has no derivative, or none in forward mode
            continue
        moved = jvp_fn(*tangents)
        value, tangent = jvp(f, primals, tuple(tangents))
        torch.testing.assert_close((*out, *moved), (*value, *tangent), equal_nan=True)
        if name in NO_TRANSPOSE or any(t.isnan().any() for t in moved):
            continue
        pulled = vjp(f, *primals)[1](tuple(cotangents))
        size = torch.stack([abs(inner([u], [v])) for u, v in zip(cotangents, moved, strict=True)]).sum()
        close(inner(cotangents, moved), inner(pulled, tangents), size, max(1e-6, precision(p)))


@pytest.mark.parametrize("name", EVERY)
def test_what_linear_transpose_takes_is_linear_and_transposed(name: str) -> None:
    for p in problems(name):
        primals, f = p.split(p.leaves)
        if not dense([*primals, *p.out]):
            continue
        for i, x in enumerate(primals):  # in one argument, the others at values where they are no zeros

            def g(x: Tensor, i: int = i, primals: Any = primals, f: Any = f) -> Any:
                return f(*primals[:i], x, *primals[i + 1 :])

            try:
                transposed = linear_transpose(g, x)
            except (FunctransError, RuntimeError, ValueError, IndexError, NotImplementedError):
                continue  # not linear, or not to be computed at zeros
            y = p.random_like([x])[0]
            sums = [a + 2 * b for a, b in zip(g(x), g(y), strict=True)]
            for got, expected in zip(g(x + 2 * y), sums, strict=True):
                torch.testing.assert_close(got, expected, rtol=precision(p), atol=precision(p))
            cotangents = p.random_like(p.out[i] for i in p.float_outputs)
            (pulled,) = transposed(tuple(cotangents))
            # a transpose has no conjugates: the bilinear form is the same on both sides
            got = inner([c.conj() for c in cotangents], g(x))
            size = inner([c.abs() for c in cotangents], [o.abs() for o in g(x)])
            close(got, inner([pulled.conj()], [x]), size, max(1e-6, precision(p)))


@pytest.mark.parametrize("remove", ("mutations", "mutations_and_views"))
@pytest.mark.parametrize("name", EVERY)
def test_below_functionalize_nothing_is_written(name: str, remove: str) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = list(opinfo.problems(opinfo.operators()[name], 3))
    for p in given:
        if not dense([*p.leaves, *p.out]):
            continue
        pure = functionalize(p.call, remove=remove)
        leaves, expected = [leaf.clone() for leaf in p.leaves], [leaf.clone() for leaf in p.leaves]
        torch.manual_seed(p.seed)
        p.call(*expected)
        torch.manual_seed(p.seed)
        with Listing() as seen:
            out = pure(*leaves)
        if name not in UNINITIALIZED:
            assert not difference(out, p.out)
            assert not difference(tuple(leaves), tuple(expected))
        kinds = {op: op_info(op).kind_by_schema for op in seen.ops}
        written = [op for op, kind in kinds.items() if kind == WRITE]
        assert written == [torch.ops.aten.copy_.default] * bool(written)  # to an argument that the operator writes
        if remove == "mutations_and_views":
            assert [op for op, kind in kinds.items() if kind == VIEW] == []


def test_the_error_of_what_is_not_linear_has_the_operator_and_the_line() -> None:
    with pytest.raises(NonLinearError, match=r"aten\.sin\.default.*test_linear_operators\.py.*`.*x\.sin\(\)"):
        linear_transpose(lambda x: x.sin(), torch.ones(2))
