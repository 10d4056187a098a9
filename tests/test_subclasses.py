"""Tensor subclasses inside transforms; sparse matrices in products, nested tensors as constants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow_ways import some
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from functrans import grad, hessian, hvp, jacfwd, jacrev, jvp, linearize, vjp, vmap
from functrans.errors import DataDependentError, LayoutError, NoFormulaError

Program = Callable[..., Any]


def squares(f: Program) -> Program:
    return lambda *args: (f(*args) ** 2).sum()


def slope(f: Program, x: Tensor) -> Tensor:
    """The gradient by plain autograd."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]


def gradient(f: Program, x: Tensor) -> Tensor:
    return slope(squares(f), x)


def pulled_back(f: Program, x: Tensor) -> Tensor:
    out, pullback = vjp(f, x)
    return pullback(out)[0]


# ------------------------------------------------------------------------------- classes that answer operators


class Strict(Tensor):
    """Holds a tensor, and computes with nothing but its like and numbers, as DTensor does."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        options = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **options)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        if any(type(a) is not Strict and a.dim() for a in tensors):
            raise RuntimeError(f"{func} of a Strict and another tensor")
        args, kwargs = tree_map_only(Strict, lambda s: s.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Strict, func(*args, **kwargs))


def spd(x: Tensor) -> Tensor:
    return torch.outer(x, x) + torch.diag(x * x + 1)


# (Complex programs are not among them: a class such as Strict loses the conjugate bit of what it holds, without any
# transform.)
OF_A_VECTOR: dict[str, Program] = {
    "sin": lambda x: x.sin(),
    "where": lambda x: torch.where(x > 0, x * x, 0.5 * x),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "softmax": lambda x: x.softmax(0),
    "logsumexp": lambda x: x.logsumexp(0),
    "cumsum": lambda x: x.cumsum(0),
    "prod": lambda x: x.prod(),
    "std": lambda x: x.std(),
    "norm": lambda x: x.norm(),
    "max": lambda x: x.max(0).values,
    "sort": lambda x: x.sort().values,
    "index": lambda x: x[1:3] * x[2],
    "pad": lambda x: F.pad(x, (1, 2)),
    "cat": lambda x: torch.cat([x, x * 2]),
    "view": lambda x: x.view(2, 2).t().reshape(-1),
    "tril": lambda x: torch.outer(x, x).tril(),
    "trace": lambda x: torch.outer(x, x).trace(),
    "product": lambda x: torch.outer(x, x) @ x,
    "linear": lambda x: F.linear(x, torch.outer(x, x)),
    "det": lambda x: torch.linalg.det(spd(x)),
    "solve": lambda x: torch.linalg.solve(spd(x), x),
    "cholesky": lambda x: torch.linalg.cholesky(spd(x)),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(spd(x)),
    "gelu": F.gelu,
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "cross_entropy": lambda x: F.cross_entropy(x.view(2, 2), x.view(2, 2).softmax(1)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 2, 2)] * 3, is_causal=True),
    "write": lambda x: torch.zeros_like(x).copy_(x).mul_(x),
    "conv": lambda x: F.conv1d(x.view(1, 1, 4), x[:2].view(1, 1, 2)),
    "pool": lambda x: F.max_pool1d(x.view(1, 1, 4), 2),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "gather": lambda x: x.gather(0, x.argsort()),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(0, x.argsort(), x),
    "embedding": lambda x: F.embedding(x.argsort(), torch.outer(x, x)),
    "new": lambda x: x.new_zeros(3) + x[:3],
}
X = some(4)

UNDER: dict[str, tuple[Program, Program]] = {  # a transform, and the same by plain autograd, loops and products
    "grad": (lambda f, x: grad(squares(f))(x), lambda f, x: gradient(f, x)),
    "vjp": (pulled_back, lambda f, x: gradient(f, x) / 2),
    "jacrev": (lambda f, x: jacrev(f)(x), lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "jacfwd": (lambda f, x: jacfwd(f)(x), lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "jvp": (lambda f, x: jvp(f, (x,), (x,))[1], lambda f, x: torch.autograd.functional.jacobian(f, x) @ x),
    "hessian": (lambda f, x: hessian(squares(f))(x), lambda f, x: torch.autograd.functional.hessian(squares(f), x)),
    "vmap of grad": (
        lambda f, x: vmap(grad(squares(f)))(torch.stack([x, x * 2])),
        lambda f, x: torch.stack([gradient(f, x), gradient(f, x * 2)]),
    ),
}


@pytest.mark.parametrize("name", OF_A_VECTOR)
def test_a_class_that_computes_with_nothing_else(name: str) -> None:
    f = OF_A_VECTOR[name]
    for transformed, by_hand in UNDER.values():
        got = transformed(f, Strict(X))
        assert type(got) is Strict
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative in plain autograd
            expected = by_hand(f, X)
        torch.testing.assert_close(got.inner, expected)


def test_what_nothing_depends_on_is_of_the_class() -> None:
    x, matrix = Strict(X), Strict(some(4, 4, seed=1))
    zeros = [
        grad(lambda a, b: a.sum(), argnums=(0, 1))(x, x)[1],
        vjp(lambda a, b: a * 2, x, x)[1](x)[1],
        jvp(lambda a: matrix[0], (x,), (x,))[1],
        linearize(lambda a: matrix[0], x)[1](x),
        jacrev(lambda a, b: a * 2, argnums=1)(x, x)[0],
    ]
    for zero in zeros:
        assert type(zero) is Strict and zero.shape == (4,) and not zero.inner.any()
    several = jacfwd(lambda a, b: a * b, argnums=(0, 1))(x, x)
    for block in several:
        assert type(block) is Strict
        torch.testing.assert_close(block.inner, torch.diag(X))
    assert type(hvp(lambda a: (a**3).sum(), (x,), (x,))[1][0]) is Strict


# ------------------------------------------------------------------------------- classes with __torch_function__ alone


class Quantity(Tensor):
    """A tensor with a unit, which products multiply and sums compare."""

    unit: dict[str, int]

    @staticmethod
    def __new__(cls, data: Any, unit: dict[str, int]) -> Any:
        return torch.as_tensor(data).as_subclass(cls)

    def __init__(self, data: Any, unit: dict[str, int]) -> None:
        self.unit = unit

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        name = getattr(func, "__name__", "").strip("_")
        units = [getattr(a, "unit", {}) for a in args if isinstance(a, Tensor)]
        if name in ("add", "sub") and units[0] != units[1]:
            raise ValueError(f"{units[0]} and {units[1]} do not add up")
        if isinstance(out, Quantity) and units:
            out.unit = dict(units[0])
            for unit, power in units[1].items() if name == "mul" and len(units) > 1 else ():
                out.unit[unit] = out.unit.get(unit, 0) + power
        return out

    def squared(self) -> Tensor:
        return self * self


class Plain(Tensor):
    """A class without a rule of its own: PyTorch keeps it for every function."""


METRES = Quantity(some(3), {"m": 1})
BARE = METRES.as_subclass(Tensor)


def area(q: Any) -> Any:
    assert isinstance(q, Quantity) and q.unit == {"m": 1}
    with pytest.raises(ValueError, match="do not add up"):
        q + q * q
    total = q.squared().sum()
    assert isinstance(total, Quantity) and total.unit == {"m": 2}
    return total


@pytest.mark.parametrize(
    ("transformed", "expected"),
    [
        (lambda: grad(area)(METRES), 2 * BARE),
        (lambda: vmap(grad(area))(Quantity(BARE.expand(2, 3).contiguous(), {"m": 1})), 2 * BARE.expand(2, 3)),
        (lambda: grad(lambda q: (grad(area)(q) ** 2).sum())(METRES), 8 * BARE),
        (lambda: jvp(area, (METRES,), (BARE,))[1], 2 * (BARE**2).sum()),
        (lambda: vjp(lambda q: q * q, METRES)[1](BARE)[0], 2 * BARE**2),
        (lambda: jacrev(lambda q: q * q)(METRES), torch.diag(2 * BARE)),
        (lambda: jacfwd(lambda q: q * q)(METRES), torch.diag(2 * BARE)),
        (lambda: hessian(area)(METRES), 2 * torch.eye(3, dtype=torch.float64)),
        (lambda: linearize(area, METRES)[1](BARE), 2 * (BARE**2).sum()),
        (lambda: grad(lambda s: (METRES * s).squared().sum())(some()), 2 * some() * (BARE**2).sum()),
        (lambda: grad(lambda q: area(q) * float(q.detach().sum()))(METRES), 2 * BARE * BARE.sum()),
        (lambda: grad(lambda q: copy.deepcopy(q).squared().sum())(METRES), 2 * BARE),
        (lambda: grad(lambda q: q.clone().mul_(3).squared().sum())(METRES), 18 * BARE),
    ],
)
def test_a_quantity_is_one_inside(transformed: Program, expected: Tensor) -> None:
    """Its derivatives are plain tensors: they are in other units."""
    got = transformed()
    assert type(got) is Tensor
    torch.testing.assert_close(got, expected)


def test_values_keep_class_and_attributes_on_the_way_out() -> None:
    batch = Quantity(BARE.expand(2, 3).contiguous(), {"m": 1})
    for got, unit in (
        (vmap(area)(batch), {"m": 2}),
        (jvp(area, (METRES,), (BARE,))[0], {"m": 2}),
        (vjp(lambda q: q.sin(), METRES)[0], {"m": 1}),
        (vmap(lambda q: q.amax(0) * q)(batch), {"m": 2}),
        (vmap(lambda s: METRES * s)(BARE), {"m": 1}),
        (vmap(vmap(lambda q: q * q))(batch), {"m": 2}),
        (vmap(lambda q: q.clone().unsqueeze_(0), out_dims=1)(batch), {"m": 1}),
        (grad(lambda q: (area(q), q * 2), has_aux=True)(METRES)[1], {"m": 1}),
    ):
        assert type(got) is Quantity and got.unit == unit
    torch.testing.assert_close(vmap(area)(batch).as_subclass(Tensor), (BARE**2).sum().expand(2))


def test_one_that_is_written_is_written_for_the_caller() -> None:
    given = Quantity(BARE.clone(), {"m": 1})
    grad(lambda q: (q.mul_(2), q.sum())[1])(given)
    torch.testing.assert_close(given.as_subclass(Tensor), 2 * BARE)
    batch = Quantity(BARE.clone(), {"m": 1})
    vmap(lambda q: q.mul_(2))(batch)
    torch.testing.assert_close(batch.as_subclass(Tensor), 2 * BARE)


def test_a_number_of_one_is_refused_as_of_any_tensor() -> None:
    with pytest.raises(DataDependentError):
        vmap(lambda q: q if q > q * 0 else -q)(METRES)
    shown: list[str] = []
    vmap(lambda q: (shown.append(f"{q}"), q)[1])(METRES)
    assert shown[0].startswith("Quantity, WrapperTensor(vmap level 1")


def test_a_class_without_rules_is_kept_everywhere() -> None:
    x = some(3).as_subclass(Plain)

    def f(x: Any) -> Any:
        assert isinstance(x, Plain) and isinstance(x.sin(), Plain)
        return x.sin().sum()

    for got, expected in (
        (grad(f)(x), x.cos()),
        (vmap(grad(f))(x.unsqueeze(1)), x.cos().unsqueeze(1)),
        (jacrev(torch.sin)(x), torch.diag(x.cos())),
        (hessian(f)(x), torch.diag(-x.sin())),
        (jvp(torch.sin, (x,), (x,))[1], x * x.cos()),
        (vmap(lambda s: x * s)(some(2)), some(2).unsqueeze(1) * x),
    ):
        assert type(got) is Plain
        torch.testing.assert_close(got, expected)


def a_leaf(x: Any) -> Any:
    w = (x.detach() * 1).requires_grad_()
    (w**2).sum().backward()
    yield from (w, w.grad, w.is_leaf, w.requires_grad)
    w.grad.zero_()
    torch.autograd.backward((w**3).sum())
    yield w.grad
    w.grad = torch.ones(3, dtype=torch.float64)
    yield w.grad


def an_optimizer(x: Any) -> Any:
    w = x.detach() * 1
    w.requires_grad = True
    optimizer = torch.optim.SGD([w], 0.1)
    (w * w).sum().backward()
    optimizer.step()
    yield w.detach()


def hooks_on_leaves(x: Any) -> Any:
    w, seen = (x.detach() * 1).requires_grad_(), []
    w.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad * 1))
    y = w * 2
    y.retain_grad()
    (y * y).sum().backward()
    yield from (seen[0], y.grad, y.retains_grad, w.retains_grad)


def a_parameter(x: Any) -> Any:
    w = nn.Parameter(x.detach())
    (w**2).sum().backward()
    yield from (isinstance(w, nn.Parameter), w.requires_grad, w.grad)


def data_assigned(x: Any) -> Any:
    y = x.detach() * 2
    y.data = torch.ones(5, dtype=torch.float64)
    yield from (y, y.data, y._version)
    y.add_(1)
    yield from (y, y._version)


@pytest.mark.parametrize("f", [a_leaf, an_optimizer, hooks_on_leaves, a_parameter, data_assigned])
def test_what_autograd_asks_of_one(f: Callable[[Any], Any]) -> None:
    """Leaves, gradients, hooks and data, and what class each is of: as in eager PyTorch."""

    def found(x: Any) -> tuple[list[Tensor], list[Any]]:
        facts = list(f(x))
        tensors = [y.as_subclass(Tensor).detach() for y in facts if isinstance(y, Tensor)]
        return tensors, [isinstance(y, Plain) if isinstance(y, Tensor) else y for y in facts]

    rows, seen = some(2, 3), []

    def noting(x: Any) -> list[Tensor]:
        tensors, facts = found(x)
        seen.append(facts)
        return tensors

    expected = [found(row.as_subclass(Plain)) for row in rows]
    vmapped = vmap(noting)(rows.as_subclass(Plain))
    of_grad = grad(lambda x: (x.sum().as_subclass(Tensor), noting(x)), has_aux=True)(rows[1].as_subclass(Plain))[1]
    assert seen == [expected[0][1], expected[1][1]]
    for i, (batch, one) in enumerate(zip(vmapped, of_grad, strict=True)):
        torch.testing.assert_close(batch, torch.stack([expected[0][0][i], expected[1][0][i]]))
        torch.testing.assert_close(one, expected[1][0][i])


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 5 * grad  # to be told from what the forward would have


def test_an_autograd_function_of_one() -> None:
    def f(q: Any) -> Any:
        return Doubling.apply(q.as_subclass(Tensor)).sum() + Doubling.apply(q).sum()

    torch.testing.assert_close(grad(f)(METRES), torch.full_like(BARE, 10))


def test_a_captured_one_keeps_its_place_in_the_graph_outside() -> None:
    leaf = some(3, seed=2).requires_grad_()
    captured = Quantity(leaf, {"m": 1})
    for read in (lambda: captured.as_subclass(Tensor), lambda: captured.squared().as_subclass(Tensor)):
        out = grad(lambda s: (read() * s).sum())(some())  # noqa: B023
        found = torch.autograd.grad(out, leaf)[0]
        torch.testing.assert_close(found, torch.autograd.grad(read().sum(), leaf)[0])


# ------------------------------------------------------------------------------- sparse and compressed matrices

A = some(4, 3, seed=3) * torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]])
LAYOUTS: dict[str, Tensor] = {"coo": A.to_sparse(), "csr": A.to_sparse_csr(), "csc": A.to_sparse_csc()}
V, M, Y, N = some(3, seed=4), some(3, 2, seed=5), some(4, seed=6), some(2, 4, seed=7)
WITH_A_MATRIX: dict[str, tuple[Program, Tensor]] = {
    "A @ x": (lambda A, x: (A @ x).sin(), V),
    "A @ M": (lambda A, M: (A @ M).sin(), M),
    "mv": (lambda A, x: torch.mv(A, x).sin(), V),
    "mm": (lambda A, M: torch.mm(A, M).sin(), M),
    "sparse.mm": (lambda A, M: (torch.mm if A.layout is torch.strided else torch.sparse.mm)(A, M).sin(), M),
    "N @ A": (lambda A, N: (N @ A).sin(), N),
    "y @ A": (lambda A, y: (y @ A).sin(), Y),
    "linear": (lambda A, x: F.linear(x, A).sin(), M.t()),
    "addmm": (lambda A, M: torch.addmm(N.t(), A, M).sin(), M),
    "A.t() @ y": (lambda A, y: (A.t() @ y).sin(), Y),
    "A.t() @ (A @ x)": (lambda A, x: A.t() @ (A @ x).sin(), V),
    "(2 A) @ x": (lambda A, x: ((A * 2) @ x).sin(), V),
    "(-A) @ x": (lambda A, x: ((-A) @ x).sin(), V),
    "A @ x + A @ x": (lambda A, x: A @ x.sin() + A @ x, V),
}
MATRIX_UNDER: dict[str, Program] = {
    "captured": lambda f, A, x: grad(lambda x: squares(f)(A, x))(x),
    "argument": lambda f, A, x: grad(squares(f), argnums=1)(A, x),
    "jacrev": lambda f, A, x: jacrev(lambda x: f(A, x))(x),
    "jacfwd": lambda f, A, x: jacfwd(lambda x: f(A, x))(x),
    "jvp": lambda f, A, x: jvp(lambda x: f(A, x), (x,), (x.cos(),))[1],
    "hessian": lambda f, A, x: hessian(lambda x: squares(f)(A, x))(x),
    "linearize": lambda f, A, x: linearize(lambda x: f(A, x), x)[1](x.cos()),
    "vmap": lambda f, A, x: vmap(lambda x: f(A, x))(torch.stack([x, x.sin()]))[1],
    "vmap of grad": lambda f, A, x: vmap(grad(squares(f), argnums=1), (None, 0))(A, torch.stack([x, x.sin()]))[0],
}


def by_autograd(under: str, f: Program, x: Tensor) -> Tensor:
    """What ``MATRIX_UNDER[under]`` is, with the dense matrix, by plain autograd."""
    jacobian = torch.autograd.functional.jacobian
    if under in ("captured", "argument", "vmap of grad"):
        return gradient(lambda x: f(A, x), x)
    if under in ("jacrev", "jacfwd"):
        return jacobian(lambda x: f(A, x), x)
    if under == "hessian":
        return torch.autograd.functional.hessian(lambda x: squares(f)(A, x), x)
    if under == "vmap":
        return f(A, x.sin())
    out = f(A, x)
    return (jacobian(lambda x: f(A, x), x).reshape(out.numel(), -1) @ x.cos().flatten()).view(out.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WITH_A_MATRIX)
def test_products_with_a_sparse_matrix(name: str, layout: str) -> None:
    f, x = WITH_A_MATRIX[name]
    for under, transformed in MATRIX_UNDER.items():
        got = transformed(f, LAYOUTS[layout], x)
        assert got.layout is torch.strided
        torch.testing.assert_close(got, by_autograd(under, f, x))


def test_a_sparse_matrix_that_is_differentiated_for() -> None:
    found = grad(lambda A: squares(lambda A: (A @ M).sin())(A))(LAYOUTS["coo"])
    torch.testing.assert_close(found, gradient(lambda A: (A @ M).sin(), A))
    for layout in ("csr", "csc"):
        with pytest.raises(LayoutError, match=r"Use its to_dense\(\), or to_sparse\(\)"):
            grad(lambda A: (A @ V).sum())(LAYOUTS[layout])


PLACES = torch.tensor([[0, 1, 1], [2, 0, 2]])
OF_EACH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "A @ M": lambda A, v: A @ M,
    "A @ v": lambda A, v: A @ v,
    "mv": lambda A, v: torch.mv(A, V),
    "mm": lambda A, v: torch.mm(A, torch.outer(v, v)),
    "M.t() @ A.t()": lambda A, v: M.t() @ A.t(),
    "outer(v, v) @ A.t()": lambda A, v: torch.outer(v, v) @ A.t(),
    "sparse.mm": lambda A, v: (torch.mm if A.layout is torch.strided else torch.sparse.mm)(A, M),
}


@pytest.mark.parametrize("name", OF_EACH)
def test_products_with_a_sparse_matrix_of_each_example(name: str) -> None:
    def program(v: Tensor) -> Tensor:
        return OF_EACH[name](torch.sparse_coo_tensor(PLACES, v, (2, 3)), v).sin()

    def dense(v: Tensor) -> Tensor:
        return OF_EACH[name](v.new_zeros(2, 3).index_put(tuple(PLACES), v), v).sin()

    rows = some(4, 3, seed=11)
    torch.testing.assert_close(vmap(program)(rows), torch.stack([dense(v) for v in rows]))
    expected = torch.stack([gradient(dense, v) for v in rows])
    torch.testing.assert_close(vmap(grad(lambda v: (program(v) ** 2).sum()))(rows), expected)


def test_compressed_tensors_come_out_as_they_went_in() -> None:
    csr = LAYOUTS["csr"]
    _, doubled = grad(lambda x: ((csr @ x).sum(), csr * 2), has_aux=True)(V)
    assert doubled.layout is torch.sparse_csr
    torch.testing.assert_close(doubled.to_dense(), 2 * A)
    with pytest.raises(LayoutError):
        vmap(lambda x: torch.outer(x, x).to_sparse_csr())(some(2, 3))


# ------------------------------------------------------------------------------- nested tensors

PARTS = [some(2, 3, seed=8), some(4, 3, seed=9)]
W = some(3, 3, seed=10)
JAGGED = torch.nested.nested_tensor(PARTS, layout=torch.jagged)
STRIDED = torch.nested.nested_tensor(PARTS)


def total(n: Any) -> Any:
    """The sum of all elements of a nested tensor, or of a list of tensors."""
    return sum(p.sum() for p in n) if isinstance(n, list) else n.values().sum()


#: by a weight: with the nested tensor, and with its parts one by one
OF_PARTS: dict[str, tuple[Program, Program]] = {
    "times": (lambda W: (JAGGED * W.sum()).sin(), lambda p, W: (p * W.sum()).sin()),
    "product": (lambda W: (JAGGED @ W).tanh(), lambda p, W: (p @ W).tanh()),
    "linear": (lambda W: F.linear(JAGGED, W).relu(), lambda p, W: F.linear(p, W).relu()),
    "softmax": (lambda W: (JAGGED @ W).softmax(-1) ** 2, lambda p, W: (p @ W).softmax(-1) ** 2),
    "layer_norm": (lambda W: F.layer_norm(JAGGED @ W, (3,)) ** 3, lambda p, W: F.layer_norm(p @ W, (3,)) ** 3),
    "cat": (lambda W: torch.cat([JAGGED @ W, JAGGED], -1) ** 2, lambda p, W: torch.cat([p @ W, p], -1) ** 2),
    "detach": (lambda W: (JAGGED @ W).detach() * (JAGGED @ W), lambda p, W: (p @ W).detach() * (p @ W)),
    "in place": (lambda W: (JAGGED @ W).mul_(2).sin(), lambda p, W: (p @ W).mul(2).sin()),
    "constant": (lambda W: JAGGED.sin() * W.sum(), lambda p, W: p.sin() * W.sum()),
    "made inside": (
        lambda W: torch.nested.as_nested_tensor([p @ W for p in PARTS], layout=torch.jagged).sin(),
        lambda p, W: (p @ W).sin(),
    ),
}


@pytest.mark.parametrize("name", OF_PARTS)
def test_a_jagged_tensor_as_a_constant(name: str) -> None:
    nested, of_part = OF_PARTS[name]
    f = lambda W: total(nested(W))
    by_parts = lambda W: total([of_part(p, W) for p in PARTS])
    torch.testing.assert_close(grad(f)(W), slope(by_parts, W))
    batch = torch.stack([W, W.sin()])
    torch.testing.assert_close(vmap(f)(batch), torch.stack([by_parts(w) for w in batch]))
    if name != "made inside":  # whose forward derivative PyTorch does not have
        torch.testing.assert_close(jvp(f, (W,), (W.cos(),))[1], (slope(by_parts, W) * W.cos()).sum())
    second = torch.autograd.functional.hessian(by_parts, W)
    torch.testing.assert_close(jacrev(grad(f))(W), second)


def test_a_jagged_tensor_as_an_argument_that_is_not_differentiated_for() -> None:
    f = lambda W, n: total((n @ W).sin())
    by_parts = lambda W: total([(p @ W).sin() for p in PARTS])
    torch.testing.assert_close(grad(f)(W, JAGGED), slope(by_parts, W))
    found = vmap(f, (0, None))(torch.stack([W, W]), JAGGED)
    torch.testing.assert_close(found, by_parts(W).expand(2))


def test_what_nested_tensors_cannot_do_inside_is_said() -> None:
    for refused in (
        lambda: grad(lambda s: (STRIDED * s).to_padded_tensor(0.0).sum())(some()),
        lambda: grad(lambda W: (STRIDED @ W).to_padded_tensor(0.0).sum())(W),
        lambda: vmap(lambda s: STRIDED * s)(some(2)),
        lambda: jvp(lambda s: STRIDED * s, (some(),), (some(),)),
        lambda: grad(lambda s: torch.nested.as_nested_tensor([p * s for p in PARTS]).sum())(some()),
        lambda: grad(lambda n: n.to_padded_tensor(0.0).sum())(STRIDED),
        lambda: grad(lambda n: n.values().sum())(JAGGED),
    ):
        with pytest.raises(LayoutError, match="a nested tensor came up inside a transform"):
            refused()
    with pytest.raises(NoFormulaError):
        grad(lambda W: (JAGGED @ W).to_padded_tensor(0.0).sum())(W)
    padded = STRIDED.to_padded_tensor(0.0)
    torch.testing.assert_close(grad(lambda s: (STRIDED.to_padded_tensor(0.0) * s).sum())(some()), padded.sum())


def test_a_module_on_a_captured_jagged_tensor() -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    found = grad(lambda b: total((layer(JAGGED) + b).tanh()))(some(2))
    torch.testing.assert_close(found, slope(lambda b: total([(layer(p) + b).tanh() for p in PARTS]), some(2)))
