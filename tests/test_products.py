"""Products by their index signatures: each declaration is what PyTorch computes, a wrong one is found, and what is made
of them agrees with nested jvp, sampled values and finite differences."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import bounds, grad, jacrev, jet, jvp, sparse_jacobian
from functrans.derivatives import matmul
from functrans.derivatives.table import DERIVATIVES
from functrans.extend import overriding
from functrans.operators.products import KERNELS, PRODUCTS, Product, product

aten = torch.ops.aten
F64, C128 = torch.float64, torch.complex128
DIFFERENT, SAME = {"b": 2, "i": 3, "j": 4, "k": 5}, dict.fromkeys("bijk", 3)


def random(indices: str, sizes: dict[str, int] = DIFFERENT, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    shape = [sizes[i] for i in indices]
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("signature", KERNELS)
def test_kernels_are_what_their_signatures_say(signature: str, dtype: torch.dtype) -> None:
    x, y = signature.partition("->")[0].split(",")
    factors = random(x, dtype=dtype), random(y, dtype=dtype, seed=1)
    torch.testing.assert_close(KERNELS[signature](*factors), torch.einsum(signature, *factors))


def is_true(declared: Product) -> bool:
    """Whether the operator computes what its declaration says, of numbers that tell any two indices apart."""
    for sizes, dtype in itertools.product((DIFFERENT, SAME), (F64, C128)):
        x, y = random(declared.x, sizes, dtype), random(declared.y, sizes, dtype, 1)
        expected = torch.einsum(f"{declared.x},{declared.y}->{declared.out}", x.conj() if declared.conjugates else x, y)
        options: dict[str, Any] = {}
        more = [random(declared.out, sizes, dtype, 2)] if declared.adds else []
        if declared.adds:
            options = {"beta": 2, "alpha": 3}
            expected = 2 * more[0] + 3 * expected
        try:
            found = declared.op(*more, x, y, **options)
        except RuntimeError:
            return False
        if found.shape != expected.shape or not torch.allclose(found, expected):
            return False
    return True


@pytest.mark.parametrize("op", PRODUCTS, ids=str)
def test_declarations_are_what_pytorch_computes(op: Any) -> None:
    assert is_true(PRODUCTS[op])


WRONG = {
    "another index summed": PRODUCTS[aten.mm.default]._replace(x="ki"),
    "the result turned": PRODUCTS[aten.mm.default]._replace(out="ji"),
    "the factor turned": PRODUCTS[aten.addmv.default]._replace(x="ji"),
    "no sum over the batch": PRODUCTS[aten.addbmm.default]._replace(out="bij"),
    "not conjugated": PRODUCTS[aten.vdot.default]._replace(conjugates=False),
    "a product of another rank": PRODUCTS[aten.dot.default]._replace(y="j", out="ij"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_is_found(name: str) -> None:
    assert not is_true(WRONG[name])


@pytest.mark.parametrize("signature", ["ki,kj->ij", "ik,kj->ji", "ik,jk->ij", "ik,kj->i", "ik,k->i"])
def test_a_signature_without_kernels_is_refused(signature: str) -> None:
    with pytest.raises(KeyError):
        product(aten.mm.default, signature)
    assert PRODUCTS[aten.mm.default].x == "ik"


def test_the_derivative_is_made_of_the_declaration() -> None:
    x, y, cotangent = random("ik", SAME), random("kj", SAME, seed=1), random("ij", SAME, seed=2)
    pulled = lambda: grad(lambda x: (x.mm(y) * cotangent).sum())(x)
    torch.testing.assert_close(pulled(), cotangent @ y.T)
    with overriding(DERIVATIVES, aten.mm.default):
        matmul.product_alone(PRODUCTS[aten.mm.default]._replace(to_x=torch.mm))
        torch.testing.assert_close(pulled(), cotangent @ y)


OPERATORS = [op for op in PRODUCTS if PRODUCTS[op].summed or PRODUCTS[op].adds]


def of_one_vector(op: Any) -> tuple[Callable[[Tensor], Tensor], int]:
    """The operator as a function of all of its tensors, which it takes out of one vector; and that vector's length."""
    declared = PRODUCTS[op]
    shapes = [random(indices).shape for indices in [*[declared.out] * declared.adds, declared.x, declared.y]]
    sizes = [shape.numel() for shape in shapes]
    return lambda x: op(*map(Tensor.reshape, x.split(sizes), shapes)).flatten(), sum(sizes)


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_sparsity(op: Any) -> None:
    """All that a result depends on, and nothing else: numbers have no zeros."""
    f, size = of_one_vector(op)
    x = torch.rand(size, dtype=F64) + 1
    expected = jacrev(f)(x)
    found = sparse_jacobian(f)(x)
    torch.testing.assert_close(found.to_dense(), expected)
    assert found._nnz() == expected.count_nonzero()


@pytest.mark.parametrize("method", ["intervals", "linear"])
@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_bounds(op: Any, method: str) -> None:
    f, size = of_one_vector(op)
    middle, radius = random("i", {"i": size}), 0.1 + random("i", {"i": size}, seed=1).abs()
    least, most = bounds(f, method=method)(middle - radius, middle + radius)
    corners = middle + radius * torch.randn(300, size, dtype=F64, generator=torch.Generator().manual_seed(2)).sign()
    values = torch.stack([f(x) for x in corners])
    assert bool((values >= least - 1e-11).all()) and bool((values <= most + 1e-11).all())
    # and not much more than that: every term is at its largest at some corner
    assert bool((most - least <= 6 * (values.amax(0) - values.amin(0)) + 1e-11).all())


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_jets(op: Any) -> None:
    f, size = of_one_vector(op)
    x, v = random("i", {"i": size}), random("i", {"i": size}, seed=1)
    first = lambda t: jvp(f, (x + t * v,), (v,))[1]
    zero = torch.zeros((), dtype=F64)
    second = jvp(first, (zero,), (torch.ones_like(zero),))[1]
    torch.testing.assert_close(jet(f, (x,), ([v, None],))[1], [first(zero), second])
