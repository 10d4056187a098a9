"""linearize, linear_transpose, and what vjp returns: linear functions that were recorded."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import Listing
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as torch_pytree
from wrong_calls import thread_state

from functrans import grad, jacfwd, jacrev, jvp, linear_transpose, linearize, vjp, vmap
from functrans.errors import CallError, FunctransError, InsideTransformError, ModifiedError, NonLinearError
from functrans.tensors.pytrees import tree_flatten, tree_map, tree_unflatten

torch.manual_seed(0)
X, Y, T, S = torch.randn(4, 3, dtype=torch.float64)
XS, TS = torch.randn(2, 5, 3, dtype=torch.float64)
M = torch.randn(2, 3, dtype=torch.float64)


def smooth(x: Tensor) -> Tensor:
    return torch.tanh(M @ x) * x.exp().sum() + torch.linalg.vector_norm(x)


def difference_quotient(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return (f(x + 1e-6 * t) - f(x - 1e-6 * t)) / 2e-6


def quotients(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian."""
    return torch.stack([difference_quotient(f, x, e) for e in torch.eye(3, dtype=x.dtype)], 1)


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.fixture(autouse=True)
def the_thread_is_as_before() -> Any:
    before = thread_state()
    yield
    assert thread_state() == before


# ---- linearize


def test_it_is_the_derivative() -> None:
    out, jvp_fn = linearize(smooth, X)
    close(out, smooth(X))
    for t in (T, S, 2 * T):
        close(jvp_fn(t), difference_quotient(smooth, X, t))


def test_the_function_runs_once() -> None:
    runs = []

    def f(x: Tensor) -> Tensor:
        runs.append(x)
        return x.sin()

    _, jvp_fn = linearize(f, X)
    jvp_fn(T), jvp_fn(S)
    assert len(runs) == 1


def test_only_what_is_linear_runs_when_it_is_called() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Softmax(0)).double().requires_grad_(False)

    def f(x: Tensor) -> Tensor:
        unused = (x.cosh() + x.erf()).sum()  # no part of the output
        return net(x) * x.exp().sum() + 0 * unused.detach()

    _, jvp_fn = linearize(f, X)
    with Listing() as seen:
        moved = jvp_fn(T)
    close(moved, difference_quotient(f, X, T))
    nonlinear = {"tanh", "exp", "cosh", "sinh", "erf", "_softmax", "sigmoid", "reciprocal"}
    assert not [name for name in seen.names if name.split(".")[1] in nonlinear]
    with Listing() as plain:
        jvp(f, (X,), (T,))
    assert len(plain.ops) > len(seen.ops) + 5


def test_the_steps_of_a_sine() -> None:
    with Listing() as seen:
        _, jvp_fn = linearize(torch.sin, X)
    assert "aten.cos.default" in seen.names
    with Listing() as seen:
        moved = jvp_fn(T)
    close(moved, X.cos() * T)
    assert seen.names == ["aten.mul.Tensor"]


def test_trees_and_aux() -> None:
    def f(x: Tensor, d: dict[str, Tensor]) -> Any:
        return {"product": x * d["w"], "same": torch.ones(2)}, ("text", x * 2)

    out, jvp_fn, aux = linearize(f, X, {"w": Y}, has_aux=True)
    close(out["product"], X * Y)
    assert aux[0] == "text"
    close(aux[1], 2 * X)
    moved = jvp_fn(T, {"w": S})
    close(moved["product"], T * Y + X * S)
    assert torch.equal(moved["same"], torch.zeros(2))


def test_an_output_that_is_an_input() -> None:
    out, jvp_fn = linearize(lambda x: (x, x.sum(), Y), X)
    assert torch.equal(out[0], X)
    moved = jvp_fn(T)
    close(moved[0], T)
    close(moved[1], T.sum())
    assert torch.equal(moved[2], torch.zeros_like(Y))


COMPOSED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "vmap of it": (
        lambda: vmap(linearize(smooth, X)[1])(TS),
        lambda: torch.stack([difference_quotient(smooth, X, t) for t in TS]),
    ),
    "its Jacobian by vmap": (
        lambda: vmap(linearize(smooth, X)[1], out_dims=1)(torch.eye(3, dtype=X.dtype)),
        lambda: quotients(smooth, X),
    ),
    "inside vmap": (
        lambda: vmap(lambda x, t: linearize(smooth, x)[1](t))(XS, TS),
        lambda: torch.stack([difference_quotient(smooth, x, t) for x, t in zip(XS, TS, strict=True)]),
    ),
    "inside vmap, for one tangent": (
        lambda: vmap(lambda x: linearize(smooth, x)[1](T))(XS),
        lambda: torch.stack([difference_quotient(smooth, x, T) for x in XS]),
    ),
    "gradient by the tangent": (
        lambda: grad(lambda t: (linearize(smooth, X)[1](t) ** 2).sum())(T),
        lambda: 2 * quotients(smooth, X).t() @ quotients(smooth, X) @ T,
    ),
    "gradient by the primal": (
        lambda: grad(lambda x: linearize(lambda x: (x**3).sum(), x)[1](T))(X),
        lambda: 6 * X * T,
    ),
    "jvp by primal and tangent": (
        lambda: jvp(lambda x, t: linearize(lambda x: (x**3).sum(), x)[1](t), (X, T), (S, Y))[1],
        lambda: (6 * X * S * T + 3 * X**2 * Y).sum(),
    ),
    "linearize of linearize": (
        lambda: linearize(lambda x: linearize(lambda x: (x**3).sum(), x)[1](T), X)[1](S),
        lambda: (6 * X * S * T).sum(),
    ),
    "linearize of grad": (
        lambda: linearize(grad(lambda x: (x**4).sum()), X)[1](T),
        lambda: 12 * X**2 * T,
    ),
    "linearize of vmap": (
        lambda: linearize(vmap(lambda x: (x**3).sum()), XS)[1](TS),
        lambda: (3 * XS**2 * TS).sum(1),
    ),
    "linearize of vmap of grad": (
        lambda: linearize(vmap(grad(lambda x: (x**3).sum())), XS)[1](TS),
        lambda: 6 * XS * TS,
    ),
    "linearize of jvp": (
        lambda: linearize(lambda x: jvp(torch.sin, (x,), (T,))[1], X)[1](S),
        lambda: -X.sin() * T * S,
    ),
    "vmap(grad) around it": (
        lambda: vmap(grad(lambda x, t: linearize(lambda x: (x**3).sum(), x)[1](t)), in_dims=(0, None))(XS, T),
        lambda: 6 * XS * T,
    ),
    "its transpose": (
        lambda: linear_transpose(linearize(smooth, X)[1], X)(torch.ones(2, dtype=X.dtype))[0],
        lambda: vjp(smooth, X)[1](torch.ones(2, dtype=X.dtype))[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_compositions_of_linearize(name: str) -> None:
    got, expected = COMPOSED[name]
    close(got(), expected())


def test_pytorchs_own_autograd_goes_through() -> None:
    x, t = X.clone().requires_grad_(), T.clone().requires_grad_()
    linearize(lambda x: (x**3).sum(), x)[1](t).backward()
    close(x.grad, 6 * X * T)
    close(t.grad, 3 * X**2)


def test_made_without_grad_and_called_with() -> None:
    t = T.clone().requires_grad_()
    with torch.no_grad():
        _, jvp_fn = linearize(lambda x: (x**3).sum(), X)
    jvp_fn(t).backward()
    close(t.grad, 3 * X**2)


def test_what_runs_without_grad_inside_is_cut_off_as_in_jvp() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.sin()
        return y + x

    results = []
    for moved in (lambda t: jvp(f, (X,), (t,))[1], lambda t: linearize(f, X)[1](t)):
        t = T.clone().requires_grad_()
        out = moved(t)
        close(out, X.cos() * T + T)
        results.append(torch.autograd.grad(out.sum(), t)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("through", ("no_grad", "detach"))
def test_a_write_that_is_not_recorded_leaves_the_history_of_what_it_writes_as_in_jvp(through: str) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        with torch.set_grad_enabled(through != "no_grad"):
            (y if through == "no_grad" else y.detach())[1:] = 3 * x[:-1]
        return y

    by_jvp, by_linearize = (lambda x, t: jvp(f, (x,), (t,))[1]), (lambda x, t: linearize(f, x)[1](t))
    close(by_linearize(X, T), by_jvp(X, T))
    for argnum in (0, 1):
        slopes = [grad(lambda x, t, g=g: (g(x, t) * S).sum(), argnum)(X, T) for g in (by_jvp, by_linearize)]
        close(*slopes)
        assert slopes[0].abs().sum() > 0
        leaves = [X.clone(), T.clone()]
        leaves[argnum].requires_grad_()
        (by_linearize(*leaves) * S).sum().backward()
        close(leaves[argnum].grad, slopes[0])


def test_an_argument_that_the_function_writes() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        x.mul_(2)
        return y * x

    x = X.clone()
    out, jvp_fn = linearize(f, x)
    close(x, 2 * X)
    close(out, X.sin() * 2 * X)
    close(jvp_fn(T), (X.cos() * 2 * X + 2 * X.sin()) * T)


def test_a_saved_value_that_is_written_inside() -> None:
    def f(x: Tensor) -> Tensor:
        scale = Y.clone()
        product = x * scale
        scale.mul_(0)
        return product

    close(linearize(f, X)[1](T), Y * T)


def test_a_saved_value_that_is_modified_afterwards() -> None:
    weight = Y.clone()
    _, jvp_fn = linearize(lambda x: x * weight, X)
    weight.add_(1)
    with pytest.raises(ModifiedError, match="needs was modified in place"):
        jvp_fn(T)


class Scaled(torch.autograd.Function):
    """Twice the input; its jvp draws, or asks for a number, or is as it should be."""

    how = "right"

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        if Scaled.how == "random":
            return t + torch.rand_like(t)
        if Scaled.how == "number":
            return t * float(t.detach().sum())
        if Scaled.how == "written":
            out = torch.zeros_like(t)
            out[:] = t
            return out.mul_(2)
        return 2 * t


@pytest.mark.parametrize("how", ("right", "written"))
def test_an_autograd_function_is_followed_by_its_jvp(how: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(Scaled, "how", how)
    _, jvp_fn = linearize(lambda x: Scaled.apply(x.sin()), X)
    close(jvp_fn(T), 2 * X.cos() * T)
    close(jvp_fn(S), 2 * X.cos() * S)


@pytest.mark.parametrize("how", ("random", "number"))
def test_a_jvp_that_is_no_linear_program_is_refused(how: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(Scaled, "how", how)
    with pytest.raises(InsideTransformError, match=r"of a tangent|by a tangent"):
        linearize(Scaled.apply, X)


def test_a_borrowed_derivative() -> None:
    square = torch.eye(3, dtype=X.dtype) + 0.1 * torch.outer(X, Y)
    f = lambda m: torch.linalg.qr(m)[1].sum()
    close(linearize(f, square)[1](square), difference_quotient(f, square, square))


def test_complex_numbers() -> None:
    z, t = torch.complex(X, Y), torch.complex(T, S)
    close(linearize(lambda z: z * z * z.conj(), z)[1](t), 2 * z * t * z.conj() + z * z * t.conj())


def test_it_can_be_traced() -> None:
    _, jvp_fn = linearize(torch.sin, X)
    graph = make_fx(jvp_fn)(T).graph
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == ["aten.mul.Tensor"]
    both = make_fx(lambda x, t: linearize(torch.sin, x)[1](t))(X, T)
    close(both(Y, S), Y.cos() * S)


def test_errors_leave_the_thread_as_it_was() -> None:
    def fails(x: Tensor) -> Tensor:
        x.sin()
        raise ZeroDivisionError

    for transform in (linearize, linear_transpose):
        with pytest.raises(ZeroDivisionError):
            transform(fails, X)
    _, jvp_fn = linearize(torch.sin, X)
    for wrong in ((), (T, T), (M,), (T.float(),), ({"a": T},), (3.0,)):
        with pytest.raises(CallError):
            jvp_fn(*wrong)


def test_used_after_its_vmap_it_says_so() -> None:
    kept = []
    vmap(lambda x: kept.append(linearize(torch.sin, x)[1]) or x)(XS)
    with pytest.raises(FunctransError, match="after that transform had ended"):
        kept[0](T)


# ---- linear_transpose

A = torch.randn(3, 3, dtype=torch.float64)
MASK = torch.tensor([True, False, True])
INDEX = torch.tensor([2, 0, 2])
GRID = torch.tensor([[[[0.1, -0.3], [0.5, 0.2]]]], dtype=torch.float64)


def into_buffer(x: Tensor) -> Tensor:
    out = torch.zeros(4, dtype=x.dtype)
    out[1:] = 2 * x
    out[0] -= x.sum()
    return out


def written_through_detach(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.detach().copy_(x)
    return out


LINEAR: dict[str, Callable[[Tensor], Any]] = {
    "a matrix": lambda x: M @ x,
    "a layer": lambda x: nn.functional.linear(x, M),
    "sums and scales": lambda x: (x + 2 * x - x / 3, -x.sum(), x.mean()),
    "parts": lambda x: torch.cat([x[1:], x[:1] * 3, torch.zeros(2, dtype=x.dtype)]),
    "a mask": lambda x: torch.where(MASK, x, 0.0),
    "a filled mask": lambda x: x.masked_fill(MASK, 0),
    "an index": lambda x: x[INDEX],
    "a scatter": lambda x: torch.zeros(4, dtype=x.dtype).index_add(0, INDEX, x),
    "a buffer that is written": into_buffer,
    "a write through detach": written_through_detach,
    "differences": lambda x: torch.diff(x),
    "running sums": lambda x: x.cumsum(0).flip(0).roll(1),
    "padding": lambda x: nn.functional.pad(x, (1, 2)),
    "a convolution": lambda x: nn.functional.conv1d(x[None, None], M[:, None, :2]),
    "an outer product": lambda x: torch.outer(x, Y),
    "einsum": lambda x: torch.einsum("ij,j,kj->ik", M, x, A),
    "a triangular system": lambda x: torch.linalg.solve_triangular(A.tril() + torch.eye(3), x[:, None], upper=False),
    "a system": lambda x: torch.linalg.solve(A, x),
    "a system with factors": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(A), x[:, None]),
    "a cross product": lambda x: torch.linalg.cross(Y, x),
    "samples of a grid": lambda x: nn.functional.grid_sample(x.outer(x.new_ones(3))[None, None], GRID),
    "a mask that is drawn": lambda x: (torch.manual_seed(0), nn.functional.dropout(x, 0.5))[1],
    "embeddings": lambda x: nn.functional.embedding(INDEX, x[:, None]),
    "a loss that is linear": lambda x: nn.functional.nll_loss(x.expand(2, 3), INDEX[:2]),
    "Fourier, and its real part": lambda x: torch.fft.fft(x).real,
    "another dtype": lambda x: (x.float() * 2).double(),
    "a gradient of a quadratic": lambda x: grad(lambda x: x @ (A @ x) / 2)(x),
    "a derivative at a point": lambda x: jvp(smooth, (Y,), (x,))[1],
    "a pullback": lambda x: vjp(smooth, Y)[1](x[:2])[0],
    "vmap inside": lambda x: vmap(lambda row: row * x)(A),
    "shapes that are read": lambda x: x.expand(2, 3) * torch.ones_like(x) + torch.zeros_like(x),
}


def matrix_of(f: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """The matrix of a linear function, a column per basis vector: f itself is applied."""
    columns = [torch.cat([o.reshape(-1) for o in tree_flatten(f(e))[0]]) for e in torch.eye(3, dtype=x.dtype)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", LINEAR)
def test_transposes(name: str) -> None:
    f = LINEAR[name]
    transposed = linear_transpose(f, X)
    leaves, spec = tree_flatten(f(X))
    cotangents = [torch.randn_like(o) for o in leaves]
    (got,) = transposed(tree_unflatten(spec, cotangents))
    expected = matrix_of(f, X).t() @ torch.cat([c.reshape(-1) for c in cotangents])
    torch.testing.assert_close(got, expected, rtol=1e-5 if "dtype" in name else 1e-9, atol=1e-9)


def affine_buffer(x: Tensor) -> Tensor:
    out = torch.ones(4, dtype=x.dtype)
    out[1:] = x
    return out


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * x


def written_under_no_grad(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    with torch.no_grad():
        out.copy_(x)
    return out


NOT_LINEAR: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a sine": (lambda x: x.sin(), "sin"),
    "a sine in between": (lambda x: M @ (2 * x).sin(), "sin"),
    "the first of several": (lambda x: (x.exp() * x).tanh(), "exp"),
    "a square": (lambda x: x * x, "mul"),
    "a product with itself": (lambda x: x.dot(x), "dot"),
    "a shift": (lambda x: x + 1, "add"),
    "a shift by a tensor": (lambda x: 2 * x - Y, "sub"),
    "a bias": (lambda x: nn.functional.linear(x, M, torch.ones(2, dtype=x.dtype)), "linear"),
    "a mask that fills": (lambda x: torch.where(MASK, x, 1.0), "where"),
    "padding with ones": (lambda x: nn.functional.pad(x, (1, 1), value=1.0), "constant_pad_nd"),
    "a buffer of ones": (affine_buffer, "slice_scatter|copy|add"),
    "a floor, whose derivative is the same everywhere": (lambda x: x.floor(), "floor"),
    "a remainder, whose derivative is the same everywhere": (lambda x: x % 1.0, "remainder"),
    "a rectifier": (lambda x: x.relu(), "relu"),
    "an absolute value": (lambda x: x.abs(), "abs"),
    "a maximum": (lambda x: x.amax(), "amax"),
    "the maximum of a bag": (
        lambda x: nn.functional.embedding_bag(INDEX[None], x[:, None], mode="max"), "_embedding_bag",
    ),
    "a comparison": (lambda x: torch.where(x > 0, x, 0.0), "gt"),
    "an index by values": (lambda x: A[x.argsort()] @ x, "sort"),
    "a cut": (lambda x: x.detach(), "detach"),
    "no_grad": (under_no_grad, "mul"),
    "a write under no_grad": (written_under_no_grad, "copy|clone|_to_copy"),
    "a number": (lambda x: x * x.sum().item(), "_local_scalar_dense"),
    "a rounding": (lambda x: x.long().double(), "to|_to_copy"),
    "an autograd.Function": (Scaled.apply, "Scaled"),
    "an inverse": (lambda x: 1 / x, "reciprocal|div|rdiv"),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_is_named(name: str) -> None:
    f, operator = NOT_LINEAR[name]
    with pytest.raises(NonLinearError, match=rf"got (aten\.)?({operator})\b.* At .*test_linear\.py:\d+") as caught:
        linear_transpose(f, X)
    assert re.search("expected linear operators only", str(caught.value))


def test_the_line_is_that_of_the_operator() -> None:
    def f(x: Tensor) -> Tensor:
        y = 2 * x
        return y.sin()

    line = f.__code__.co_firstlineno + 2
    with pytest.raises(NonLinearError, match=rf"test_linear\.py:{line}, in f: `return y\.sin\(\)`"):
        linear_transpose(f, X)


def test_a_branch_on_values_is_refused() -> None:
    with pytest.raises(FunctransError):
        linear_transpose(lambda x: x if x.sum() > 0 else 2 * x, X)


def test_a_constant_output() -> None:
    with pytest.raises(CallError, match=r"output\[1\], which does not depend on the primals and is no zero"):
        linear_transpose(lambda x: (x, Y), X)
    transposed = linear_transpose(lambda x: (x, torch.zeros(2)), X)
    close(transposed((T, torch.ones(2)))[0], T)


def test_it_is_the_transpose_of_complex_functions_without_conjugates() -> None:
    z, c = torch.complex(X, Y), torch.complex(T, S)
    matrix = torch.complex(A, A.t())
    close(linear_transpose(lambda z: matrix @ z, z)(c)[0], matrix.t() @ c)
    close(linear_transpose(lambda z: 1j * z, z)(c)[0], 1j * c)


def test_trees_and_values_that_do_not_matter() -> None:
    f = lambda x, d: {"sum": x + 2 * d["y"], "x": x.sum()}
    for scale in (1.0, float("nan")):
        transposed = linear_transpose(f, scale * X, {"y": scale * Y})
        x, d = transposed({"sum": T, "x": torch.tensor(2.0, dtype=X.dtype)})
        close(x, T + 2)
        close(d["y"], 2 * T)
    on_meta = linear_transpose(lambda x: x.sum(), torch.empty(3, device="meta"))
    assert on_meta(torch.ones((), device="meta"))[0].shape == (3,)


def test_compositions_of_linear_transpose() -> None:
    f = lambda w, x: linear_transpose(lambda x: torch.tanh(w) * x, x)(T)[0]  # linear in x, for every w
    close(vmap(f)(XS, TS), torch.tanh(XS) * T)
    close(jvp(f, (X, Y), (S, S))[1], (1 - torch.tanh(X) ** 2) * S * T)
    close(grad(lambda w: f(w, X).sum())(Y), (1 - torch.tanh(Y) ** 2) * T)
    transposed = linear_transpose(lambda x: M @ x, X)
    rows = vmap(transposed)(torch.eye(2, dtype=X.dtype))[0]
    close(rows, M)
    close(linear_transpose(lambda c: transposed(c)[0], torch.ones(2, dtype=X.dtype))(T)[0], M @ T)
    close(jacrev(lambda c: transposed(c)[0])(torch.ones(2, dtype=X.dtype)), M.t())
    close(jacfwd(lambda c: transposed(c)[0])(torch.ones(2, dtype=X.dtype)), M.t())


# ---- pullbacks and jvp functions as values


def recorded() -> dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]]:
    return {
        "vjp": (vjp(smooth, X)[1], lambda p, c: p(c[:2])[0]),
        "linearize": (linearize(smooth, X)[1], lambda p, t: p(t)),
        "linear_transpose": (linear_transpose(lambda x: M @ x, X), lambda p, c: p(c[:2])[0]),
    }


@pytest.mark.parametrize("name", recorded())
def test_they_are_pytrees(name: str) -> None:
    function, call = recorded()[name]
    for flatten, unflatten in (
        (tree_flatten, lambda leaves, spec: tree_unflatten(spec, leaves)),
        (torch_pytree.tree_flatten, torch_pytree.tree_unflatten),
    ):
        leaves, spec = flatten(function)
        assert leaves and all(isinstance(leaf, Tensor) for leaf in leaves)
        again = unflatten([leaf.clone() for leaf in leaves], spec)
        assert torch.equal(call(again, T), call(function, T))
        assert flatten(again)[1] == spec
        assert flatten(vjp(torch.sin, X)[1])[1] != spec
    single = tree_map(lambda x: x.float(), function) if name == "linear_transpose" else None
    assert single is None or [x.dtype for x in tree_flatten(single)[0]] == [torch.float32] * len(leaves)


MAKERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Tensor]]] = {
    "vjp": (lambda x: vjp(smooth, x)[1], lambda p, t: p(t[:2])[0]),
    "linearize": (lambda x: linearize(smooth, x)[1], lambda p, t: p(t)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_they_leave_the_vmap_in_which_they_were_recorded(name: str) -> None:
    make, call = MAKERS[name]
    expected = torch.stack([call(make(x), t) for x, t in zip(XS, TS, strict=True)])
    batch = vmap(make)(XS)
    close(vmap(call)(batch, TS), expected)
    close(vmap(call)(vmap(make, chunk_size=2)(XS), TS), expected)
    twice = vmap(vmap(make))(torch.stack([XS, 2 * XS]))
    close(vmap(vmap(call))(twice, torch.stack([TS, TS]))[0], expected)


@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_of_them_is_not_called_as_one(name: str) -> None:
    make, call = MAKERS[name]
    batch = vmap(make)(XS)
    with pytest.raises(CallError, match=r"got a leaf of shape \(5.*that it was recorded with. What left a vmap"):
        call(batch, T)
    one = tree_map(lambda leaf: leaf[1], batch)
    close(call(one, T), call(make(XS[1]), T))


@pytest.mark.parametrize("name", MAKERS)
def test_they_are_aux_of_other_transforms(name: str) -> None:
    make, call = MAKERS[name]
    _, function = grad(lambda x: (x.sum(), make(x)), has_aux=True)(X)
    close(call(function, T), call(make(X), T))


def test_a_pullback_with_a_borrowed_record_stays_where_it_was_recorded() -> None:
    square = torch.eye(3, dtype=X.dtype) + 0.1 * torch.outer(X, Y)
    pullback = vmap(lambda m: vjp(lambda m: torch.linalg.qr(m)[1], m)[1])(torch.stack([square, 2 * square]))
    with pytest.raises(FunctransError):
        vmap(lambda p: p(square)[0], in_dims=0)(pullback)


def test_what_they_say() -> None:
    x = X.clone()
    assert repr(vjp(torch.sin, x)[1]) == "<pullback of vjp(sin, ...): 1 record, 1 tensor saved, 24 bytes>"
    assert repr(linearize(torch.sin, x)[1]) == "<jvp of linearize(sin, ...): 1 record, 1 tensor saved, 24 bytes>"
    big = torch.ones(1000, 1000)
    assert repr(vjp(lambda x: (x * big, x * big), big)[1]).endswith("2 records, 1 tensor saved, 4.0 MB>")
    shown = []
    vmap(lambda x: shown.append(repr(vjp(torch.sin, x)[1])) or x)(XS.clone())
    assert shown == ["<pullback of vjp(sin, ...): 1 record, 1 tensor saved, 120 bytes>"]
    sparse = torch.eye(2).to_sparse()
    assert re.search(r"1 record, \d tensors saved, \d+ bytes", repr(vjp(lambda x: sparse @ x, torch.eye(2))[1]))


def test_they_do_not_keep_the_primals_that_they_do_not_need() -> None:
    import gc
    import weakref

    x = torch.randn(5)
    kept = weakref.ref(x)
    out, pullback = vjp(lambda x: 2 * x, x)
    _, jvp_fn = linearize(lambda x: 2 * x, x)
    del x, out, _
    gc.collect()
    assert kept() is None
    assert torch.equal(pullback(torch.ones(5))[0], 2 * torch.ones(5))
    assert torch.equal(jvp_fn(torch.ones(5)), 2 * torch.ones(5))


def test_copies() -> None:
    function = linearize(torch.sin, X)[1]
    close(copy.copy(function)(T), X.cos() * T)
