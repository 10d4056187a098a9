"""torch.cond, while_loop, scan, associative_scan and map inside transforms: what a Python program with ``if`` and loops
gives, example by example."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan, wrap_combine_fn_flat
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.autograd import forward_ad

from functrans import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linear_transpose,
    linearize,
    vjp,
    vmap,
)
from functrans.errors import (
    BranchWriteError,
    CallError,
    CallTypeError,
    DataDependentError,
    HigherOrderError,
    RuleResultError,
    UndecidedError,
)
from functrans.extend import (
    DEFINITIONS,
    DERIVATIVES,
    RuleTable,
    TableInterpreter,
    WrapperTensor,
    interpreter_stack,
    overriding,
    run_transformed,
    running_at,
)
from functrans.pytorch.versions import INSTALLED

F64 = torch.float64
#: Before, PyTorch stacks the results of ``scan`` along the first dimension, whatever ``dim`` is.
SCANS_ALONG_DIM = INSTALLED >= (2, 13)
tree = torch.utils._pytree


class Torch:
    """PyTorch's operators."""

    cond = staticmethod(torch.cond)
    while_loop = staticmethod(while_loop)
    scan = staticmethod(scan)
    map = staticmethod(torch_map)

    @staticmethod
    def associative_scan(f: Any, xs: Any, dim: int, reverse: bool = False) -> Any:
        return associative_scan(f, xs, dim, reverse, combine_mode="generic")


class Python:
    """The same as Python: for one example, in plain PyTorch."""

    @staticmethod
    def cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
        return true_fn(*operands) if pred else false_fn(*operands)

    @staticmethod
    def while_loop(cond_fn: Any, body_fn: Any, carried: Any) -> Any:
        while cond_fn(*carried):
            carried = body_fn(*carried)
        return carried

    @staticmethod
    def steps(xs: Any, dim: int, reverse: bool) -> list[Any]:
        leaves, spec = tree.tree_flatten(xs)
        steps = [tree.tree_unflatten(group, spec) for group in zip(*[x.unbind(dim) for x in leaves], strict=True)]
        return steps[::-1] if reverse else steps

    @staticmethod
    def together(steps: list[Any], dim: int, reverse: bool) -> Any:
        flat = [tree.tree_flatten(s)[0] for s in (steps[::-1] if reverse else steps)]
        leaves = [torch.stack(group, min(dim, group[0].dim())) for group in zip(*flat, strict=True)]
        return tree.tree_unflatten(leaves, tree.tree_flatten(steps[0])[1])

    @classmethod
    def scan(cls, f: Any, init: Any, xs: Any, *, dim: int = 0, reverse: bool = False) -> Any:
        out = []
        for x in cls.steps(xs, dim, reverse):
            init, y = f(init, x)
            out.append(y)
        return init, cls.together(out, dim if SCANS_ALONG_DIM else 0, reverse)

    @classmethod
    def map(cls, f: Any, xs: Any, *args: Any) -> Any:
        return cls.together([f(x, *args) for x in cls.steps(xs, 0, False)], 0, False)

    @classmethod
    def associative_scan(cls, f: Any, xs: Any, dim: int, reverse: bool = False) -> Any:
        first, *rest = cls.steps(xs, dim, reverse)
        out = [first]
        for x in rest:
            out.append(f(out[-1], x))
        return cls.together(out, dim, reverse)


# Programs of x, float64[3], and w, float64[3]; ``do`` is one of the two above.

PROGRAMS: dict[str, Callable[..., Tensor]] = {}


def program(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    PROGRAMS[f.__name__] = f
    return f


@program
def cond_of_operands(do: Any, x: Tensor, w: Tensor) -> Tensor:
    return do.cond(x.sum() > 0, lambda x, w: x.sin() * w, lambda x, w: (x * w).cumsum(0), (x, w))


@program
def cond_of_captured(do: Any, x: Tensor, w: Tensor) -> Tensor:
    scale = w * 2
    return do.cond((x * w).sum() > 0, lambda: (x * scale).exp(), lambda: scale.sin() * x[0] + x.new_ones(3))


@program
def cond_root_of_negative(do: Any, x: Tensor, w: Tensor) -> Tensor:
    return do.cond(x.sum() > 0, lambda x: x.sum().sqrt() * w, lambda x: 0 * w, (x,))


@program
def cond_root_captured(do: Any, x: Tensor, w: Tensor) -> Tensor:
    total = (x * w).sum()
    return do.cond(total > 0, lambda: total.sqrt() * w + total.log(), lambda: w * total)


@program
def cond_in_cond(do: Any, x: Tensor, w: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return do.cond(y[0] > w[0], lambda: (y[0] - w[0]).sqrt() * y, lambda: (w[0] - y[0]).log() * w)

    total = x.sum()
    return do.cond(total > 0, lambda y: inner(y) + total.log(), lambda y: inner(2 * y) * (0.5 - total).rsqrt(), (x,))


@program
def cond_of_tree(do: Any, x: Tensor, w: Tensor) -> Tensor:
    out = do.cond(
        x[0] > x[1],
        lambda d: {"a": d["a"] * w, "b": (d["b"][0], 3, None)},
        lambda d: {"a": d["b"][0].sinh(), "b": (d["a"] / (1 + w * w), 3, None)},
        ({"a": x, "b": [w * x]},),
    )
    return out["a"] * out["b"][0] + out["b"][1]


@program
def cond_with_inverse(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """Of a matrix that is singular where the branch is not taken: LAPACK raises."""
    matrix = torch.diag(torch.stack([x[0], x[1], (x.sum() > 0) * 1.0])) + w * 0
    return do.cond(x.sum() > 0, lambda: torch.linalg.inv(matrix) @ w, lambda: matrix @ w)


@program
def cond_with_writes_inside(do: Any, x: Tensor, w: Tensor) -> Tensor:
    def taken(x: Tensor) -> Tensor:
        out = torch.zeros(3, dtype=F64)
        out[1:] = x[:2].sqrt()
        view = out[1]
        view.mul_(w[1])
        return out + torch.ones_like(out)

    return do.cond(x.min() > 0, taken, lambda x: x * w, (x,))


@program
def cond_by_index(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """An index that is out of range where the branch is not taken."""
    place = torch.where(x.sum() > 0, 2, 100)
    return do.cond(place < 3, lambda: x * w[place], lambda: x)


@program
def while_halving(do: Any, x: Tensor, w: Tensor) -> Tensor:
    def halve(n: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return n + 1, y * w.cos() / 2

    n, y = do.while_loop(lambda n, y: (y * y).sum() > 0.1, halve, (torch.zeros((), dtype=F64), x * 2))
    return y.sin() * (1 + n)


@program
def while_unbatched_start(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """The first predicate is the same for all; what is carried becomes different."""
    start = (torch.zeros((), dtype=F64), torch.ones(3, dtype=F64))
    n, y = do.while_loop(lambda n, y: n < 3, lambda n, y: (n + x[0].abs() + 0.4, y * x + w), start)
    return y * n


@program
def while_with_root(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """The body's derivative is infinite where an example is done."""
    out = do.while_loop(lambda y: (y > 0).all(), lambda y: ((y.sqrt() * w.abs()).cos() * y - 0.5,), (x.abs(),))
    return out[0] + w


@program
def while_counting(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """A Python number is carried."""
    n, y = do.while_loop(lambda n, y: (y.sum() < 9) & (n < 20), lambda n, y: (n + 1, y + w.exp() * (n + 1)), (0, x))
    return y * n


@program
def while_of_tree(do: Any, x: Tensor, w: Tensor) -> Tensor:
    carried = ({"y": x}, [w])
    out = do.while_loop(lambda d, v: v[0].sum() < 4, lambda d, v: ({"y": d["y"].sin() + v[0]}, [v[0] + 1]), carried)
    return out[0]["y"] * out[1][0]


@program
def cond_in_while(do: Any, x: Tensor, w: Tensor) -> Tensor:
    def body(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = do.cond(y > 2, lambda: z * (y - 2).sqrt(), lambda: z + w * (2 - y).log())
        return y - 0.75, z

    return do.while_loop(lambda y, z: y > 0, body, (x.abs().sum(), x))[1]


@program
def loops_in_cond(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """Loops that would not end, or divide by zero, for examples that do not take the branch."""

    def halved() -> Tensor:
        n, y = do.while_loop(lambda n, y: y > 0.1, lambda n, y: (n + y.sqrt(), y - y * w[0].abs() / 2), (x[0], x.sum()))
        return n * x + do.scan(lambda c, v: (c * v / y, c + v.log()), y, x.abs())[1]

    def mapped() -> Tensor:
        out = do.map(lambda v: (v * w) / (1 - x.sum()), x)
        return do.associative_scan(lambda a, b: a * b + a, out, 0)[2]

    return do.cond((x.sum() > 0) & (x != 0).all(), halved, mapped)


@program
def scan_running(do: Any, x: Tensor, w: Tensor) -> Tensor:
    last, out = do.scan(lambda c, y: ((c * y).tanh() + 1, c * y + w[0]), w.sum(), x)
    return last * out


@program
def scan_reverse_of_trees(do: Any, x: Tensor, w: Tensor) -> Tensor:
    xs = {"a": torch.outer(x, w), "b": (torch.outer(w, x.sin()),)}

    def step(carry: list[Tensor], y: dict[str, Any]) -> Any:
        total = carry[0] * y["a"].cos() + y["b"][0]
        return [total], {"t": total * w, "u": carry[0].sum()}

    carry, out = do.scan(step, [x * 0.5], xs, dim=1, reverse=True)
    return carry[0] + out["t"].sum(1) if out["u"].dim() == 1 else carry[0]


@program
def scan_with_cond(do: Any, x: Tensor, w: Tensor) -> Tensor:
    def step(c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        c = do.cond(y > 0, lambda c, y: c + y.sqrt(), lambda c, y: c - (1 - y).log(), (c, y))
        return c, c * w.sum()

    return do.scan(step, x.sum(), x * w)[1]


@program
def associative_of_captured(do: Any, x: Tensor, w: Tensor) -> Tensor:
    bound = (w * w).sum()
    return do.associative_scan(lambda a, b: a + b + a * b / bound, torch.outer(x, w), 1, reverse=True).sum(0)


@program
def associative_of_trees(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """A linear recurrence."""
    xs = (x.cos(), {"b": x * w})
    _, out = do.associative_scan(lambda s, t: (s[0] * t[0], {"b": t[0] * s[1]["b"] + t[1]["b"]}), xs, 0)
    return out["b"]


@program
def map_of_rows(do: Any, x: Tensor, w: Tensor) -> Tensor:
    return do.map(lambda row, v: (row * v).sum() * x.exp(), torch.outer(x, w), w.sin()).sum(0)


@program
def map_of_trees(do: Any, x: Tensor, w: Tensor) -> Tensor:
    out = do.map(lambda y: [y[0] * w, {"s": y[1] ** 2}], (x, x * w))
    return out[0].sum(0) * out[1]["s"]


@program
def map_with_cond(do: Any, x: Tensor, w: Tensor) -> Tensor:
    return do.map(lambda y: do.cond(y > 0, lambda: y.sqrt(), lambda: y * w.sum()), x)


@program
def cond_with_grad(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """A transform inside of a branch uses what is captured: tensors that would divide by zero elsewhere."""
    total = x.sum()

    def slope() -> Tensor:
        if do is Python:
            return 2 * x / total + (total * w.abs()).sqrt() + 1 / total
        return grad(lambda y: (y**2 / total + y * (total * w.abs()).sqrt()).sum())(x) + grad(lambda y: y / total)(w[0])

    return do.cond(total > 0, slope, lambda: w * x)


@program
def cond_with_vmap(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """The argument of a vmap inside of a branch is captured."""
    rows = torch.outer(x.abs(), w.abs()) * x.sum()

    def roots() -> Tensor:
        if do is Python:
            return rows.sqrt().sum(0) + rows[:, 0].log().sum()
        return vmap(torch.sqrt)(rows).sum(0) + vmap(lambda row: row[0].log())(rows).sum()

    return do.cond(rows.min() > 0, roots, lambda: w * x)


@program
def cond_with_borrowed_derivative(do: Any, x: Tensor, w: Tensor) -> Tensor:
    total = x.sum()

    def slope() -> Tensor:
        if do is Python:
            return -w / total**2
        with overriding(DERIVATIVES, torch.ops.aten.reciprocal.default):
            return w * grad(torch.reciprocal)(total)

    return do.cond(total > 0, slope, lambda: w * x)


@program
def cond_with_pullback(do: Any, x: Tensor, w: Tensor) -> Tensor:
    """Of a function outside of the branch."""
    total = x.sum()
    pull = vjp(lambda t: t.exp() * w, total)[1] if do is Torch else lambda c: [(c * w).sum() * total.exp()]
    return do.cond(total > 0, lambda: pull(x)[0] * w, lambda: w * x)


XS = torch.tensor(
    [[0.5, -0.2, 1.0], [-1.0, 0.3, -0.4], [2.0, 0.1, 0.4], [-0.3, 1.5, -2.0], [0.0, 0.0, 0.0], [1.0, -1.0, -0.25]],
    dtype=F64,
)
WS = torch.tensor([[0.7, 1.3, -0.4], [-0.5, 0.8, 1.1]], dtype=F64)


# --- the oracle: plain PyTorch, one example at a time ---------------------------------------------------------------


def gradient(f: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """By PyTorch's autograd; zero where it finds no way."""
    x = x.detach().requires_grad_() if not x.requires_grad else x
    out = f(x).sum()
    if not out.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(out, x, allow_unused=True, materialize_grads=True, **kwargs)[0]


def second(f: Any, x: Tensor) -> Tensor:
    """The Hessian of the sum, row by row."""
    x = x.detach().requires_grad_()
    slope = gradient(f, x, create_graph=True)
    return torch.stack([gradient(lambda _, i=i: slope[i], x, retain_graph=True) for i in range(len(x))])


def jacobian(f: Any, x: Tensor) -> Tensor:
    return torch.stack([gradient(lambda x, i=i: f(x)[i], x) for i in range(3)])


def along(f: Any, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t)))
        return out.primal * 0 if out.tangent is None else out.tangent


def forward_jacobian(f: Any, x: Tensor) -> Tensor:
    return torch.stack([along(f, x, t) for t in torch.eye(3, dtype=F64)], 1)


T = torch.tensor([0.3, -1.0, 0.7], dtype=F64)


def each(oracle: Any) -> Any:
    return lambda f: torch.stack([oracle(lambda x, w=WS[0]: f(x, w), x) for x in XS])


def of_weights(oracle: Any) -> Any:
    return lambda f: torch.stack([oracle(lambda w, x=x: f(x, w), WS[0]) for x in XS])


def with_weights(f: Any) -> Any:
    return lambda x: f(x, WS[0])


#: by name: what a transform makes of a program, and what plain PyTorch says that it is
WAYS: dict[str, tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {
    "grad": (
        lambda f: torch.stack([grad(lambda x: f(x, WS[0]).sum())(x) for x in XS]),
        each(gradient),
    ),
    "vmap": (lambda f: vmap(with_weights(f))(XS), each(lambda f, x: f(x))),
    "jvp": (
        lambda f: torch.stack([jvp(with_weights(f), (x,), (T,))[1] for x in XS]),
        each(lambda f, x: along(f, x, T)),
    ),
    "vmap of jvp": (
        lambda f: vmap(lambda x: jvp(with_weights(f), (x,), (T,))[1])(XS),
        each(lambda f, x: along(f, x, T)),
    ),
    "jvp of vmap": (
        lambda f: jvp(vmap(with_weights(f)), (XS,), (T.expand(6, 3),))[1],
        each(lambda f, x: along(f, x, T)),
    ),
    "vmap of grad": (lambda f: vmap(grad(lambda x: f(x, WS[0]).sum()))(XS), each(gradient)),
    "grad of vmap": (lambda f: grad(lambda xs: vmap(with_weights(f))(xs).sum())(XS), each(gradient)),
    "vmap of grad by what is shared": (
        lambda f: vmap(lambda x: grad(lambda w: f(x, w).sum())(WS[0]))(XS),
        of_weights(gradient),
    ),
    "grad of vmap by what is shared": (
        lambda f: grad(lambda w: vmap(lambda x: f(x, w))(XS).sum())(WS[0]),
        lambda f: of_weights(gradient)(f).sum(0),
    ),
    "jacrev": (lambda f: torch.stack([jacrev(with_weights(f))(x) for x in XS]), each(jacobian)),
    "vmap of jacfwd": (lambda f: vmap(jacfwd(with_weights(f)))(XS), each(forward_jacobian)),
    "grad of grad": (
        lambda f: torch.stack([grad(lambda x: (grad(lambda x: f(x, WS[0]).sum())(x) * T).sum())(x) for x in XS]),
        each(lambda f, x: second(f, x) @ T),
    ),
    "hessian": (lambda f: torch.stack([hessian(lambda x: f(x, WS[0]).sum())(x) for x in XS]), each(second)),
    "vmap of hessian": (lambda f: vmap(hessian(lambda x: f(x, WS[0]).sum()))(XS), each(second)),
    "grad of vmap of jvp": (
        lambda f: grad(lambda xs: vmap(lambda x: jvp(with_weights(f), (x,), (T,))[1])(xs).sum())(XS),
        each(lambda f, x: second(f, x) @ T),
    ),
    "jvp of vmap of grad": (
        lambda f: jvp(vmap(grad(lambda x: f(x, WS[0]).sum())), (XS,), (T.expand(6, 3),))[1],
        each(lambda f, x: second(f, x) @ T),
    ),
    "vmap of vmap": (
        lambda f: vmap(lambda w: vmap(lambda x: f(x, w))(XS))(WS),
        lambda f: torch.stack([torch.stack([f(x, w) for x in XS]) for w in WS]),
    ),
    "vmap of grad of vmap": (
        lambda f: vmap(grad(lambda w: vmap(lambda x: f(x, w))(XS).sum()))(WS),
        lambda f: torch.stack([sum(gradient(lambda w, x=x: f(x, w), w) for x in XS) for w in WS]),
    ),
    "linearize": (
        lambda f: torch.stack([linearize(with_weights(f), x)[1](T) for x in XS]),
        each(lambda f, x: along(f, x, T)),
    ),
    "autograd of vmap": (
        lambda f: torch.autograd.grad(
            vmap(lambda x: f(x, leaf[1]))(leaf[0]).sum() if (leaf := (XS.clone().requires_grad_(), WS[0])) else None,
            leaf[0],
        )[0],
        each(gradient),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_against_python(name: str, way: str) -> None:
    ours, oracle = WAYS[way]
    found = ours(lambda x, w: PROGRAMS[name](Torch, x, w))
    expected = oracle(lambda x, w: PROGRAMS[name](Python, x, w))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert interpreter_stack() == []


def test_a_truth_value_has_no_derivative() -> None:
    x = torch.tensor(0.3, dtype=F64)
    assert grad(lambda x: torch.cond(x, lambda: x * 2, lambda: x * 3))(x) == 2
    assert grad(lambda x: torch.cond(x * 0, lambda: x * 2, lambda: x * 3))(x) == 3


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("reverse", [False, True])
def test_associative_scan_of_every_length(length: int, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    xs = torch.randn(4, 2, length, 2, 2, dtype=F64, generator=generator)
    found = vmap(lambda x: Torch.associative_scan(torch.matmul, x, 1, reverse))(xs)
    expected = torch.stack([Python.associative_scan(torch.matmul, x, 1, reverse) for x in xs])
    torch.testing.assert_close(found, expected)
    slopes = vmap(grad(lambda x: Torch.associative_scan(torch.matmul, x, 1, reverse).sin().sum()))(xs)
    expected = [gradient(lambda x: Python.associative_scan(torch.matmul, x, 1, reverse).sin(), x) for x in xs]
    torch.testing.assert_close(slopes, torch.stack(expected))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_pointwise_associative_scan(length: int) -> None:
    """What comes to the operator on a GPU: a function that takes many pairs at once."""
    xs = torch.linspace(0.5, 1.5, 3 * length, dtype=F64).view(3, length)
    scan = torch.ops.higher_order.associative_scan
    (found,) = vmap(lambda x: scan(lambda a, b, c: [a * b * c], [x], (torch.tensor(2.0, dtype=F64),)))(xs)
    torch.testing.assert_close(found, (2 * xs).cumprod(1) / 2)
    slopes = vmap(grad(lambda x: scan(lambda a, b: [a * b], [x], ())[0].sum()))(xs)
    torch.testing.assert_close(slopes, torch.stack([gradient(lambda x: x.cumprod(0), x) for x in xs]))


@pytest.mark.parametrize("length", [1, 4])
def test_pointwise_associative_scan_of_a_tree(length: int) -> None:
    """As PyTorch comes to the operator, and with what it takes back."""
    xs = {"a": torch.linspace(0.5, 1.5, length), "b": (torch.linspace(-1, 1, length),)}
    leaves, spec = tree.tree_flatten(xs)

    def recurrence(s: Any, t: Any) -> Any:
        return {"a": s["a"] * t["a"], "b": (t["a"] * s["b"][0] + t["b"][0],)}

    flat = functools.partial(wrap_combine_fn_flat, combine_fn=recurrence, spec=spec, num_leaves=2)
    found = vmap(lambda *leaves: torch.ops.higher_order.associative_scan(flat, list(leaves), ()))(
        *[torch.stack([x, 2 * x]) for x in leaves]
    )
    for i, scale in enumerate((1, 2)):
        scaled = tree.tree_map(lambda x, scale=scale: scale * x, xs)
        expected = Python.associative_scan(recurrence, scaled, 0)
        torch.testing.assert_close(tree.tree_map(lambda x, i=i: x[i], found), expected)


def test_a_derivative_that_is_infinite_where_the_branch_is_taken() -> None:
    """By what all examples share: infinite for those that take the branch, zero for the others, and nowhere NaN."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return torch.cond(x > 0, lambda: w.sqrt() + x, lambda: x * 2)

    xs, w = torch.tensor([1.0, -1.0, 2.0]), torch.tensor(0.0)
    assert vmap(grad(f, argnums=1), in_dims=(0, None))(xs, w).tolist() == [torch.inf, 0, torch.inf]
    assert grad(lambda w: vmap(f, in_dims=(0, None))(xs, w).sum())(w) == torch.inf


@pytest.mark.parametrize(
    "taken", [torch.tensor([True, True]), torch.tensor([False, False]), torch.tensor([True, False])]
)
def test_a_branch_that_nobody_takes_is_not_run(taken: Tensor) -> None:
    called = []

    def branch(name: str) -> Tensor:
        called.append(name)
        return torch.ones(())

    vmap(lambda t: torch.cond(t, lambda: branch("yes"), lambda: branch("no")))(taken)
    assert called == ["yes"] * bool(taken.any()) + ["no"] * bool((~taken).any())


def test_no_examples() -> None:
    none = torch.zeros(0, 3)
    assert vmap(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))(none).shape == (0, 3)


def test_a_body_does_not_see_examples_that_are_done() -> None:
    seen = []

    def body(x: Tensor) -> tuple[Tensor]:
        seen.append(str(x))
        return (x - 1,)

    (out,) = vmap(lambda x: while_loop(lambda x: x > 0, body, (x,)))(torch.tensor([1, 3, 2]))
    assert out.tolist() == [0, 0, 0] and len(seen) == 3
    assert "[0, 2, 1]" not in seen[1] and "[2, 2, 1]" in seen[1]


def test_a_number_that_is_carried_stays_one_where_all_examples_agree() -> None:
    def loop(x: Tensor) -> Any:
        n, y = while_loop(lambda n, y: n < 3, lambda n, y: (n + 1, y * 2), (0, x))
        assert n == 3 and isinstance(n, int)
        return y

    assert vmap(loop)(torch.ones(2)).tolist() == [8, 8]


def test_no_iterations() -> None:
    def loop(x: Tensor) -> Tensor:
        d, (n,) = while_loop(lambda d, n: n[0] > 5, lambda d, n: ({"x": d["x"] * 2}, [n[0] - 1]), ({"x": x}, [x[0]]))
        return d["x"] * n

    x = torch.tensor([2.0, 3.0])
    assert grad(lambda x: loop(x).sum())(x).tolist() == [7, 2]
    assert vmap(loop)(torch.stack([x, x + 5])).tolist() == [[4, 6], [140, 160]]  # two iterations: 5 · 4 · (7, 8)


class Root(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * 7 * x.rsqrt()  # recognizably its own


def test_a_custom_function_in_a_branch() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.cond(x > 0, lambda: Root.apply(x), lambda: x)

    assert vmap(grad(f))(torch.tensor([4.0, -1.0, 0.0])).tolist() == [3.5, 1, 1]
    assert grad(lambda x: vmap(f)(x).sum())(torch.tensor([4.0, -1.0, 0.0])).tolist() == [3.5, 1, 1]


def test_a_custom_function_of_what_is_captured() -> None:
    """In a container, too: what it gets is of an example that takes the branch."""
    seen = []

    class Looking(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, more: Any) -> Tensor:
            seen.extend([x, *more.values()])
            return x * more["scale"]

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    def f(x: Tensor) -> Tensor:
        return torch.cond(x > 0, lambda: Looking.apply(x, {"scale": x}), lambda: x)

    assert vmap(f)(torch.tensor([4.0, -1.0, 0.0])).tolist() == [16, -1, 0]
    assert seen and all(bool((at_base(x) > 0).all()) for x in seen)


def test_no_grad_in_a_branch_is_for_what_is_in_it() -> None:
    """Also if something captured is used there first."""

    def f(x: Tensor) -> Tensor:
        def branch() -> Tensor:
            with torch.no_grad():
                constant = x.sqrt()
            return x * constant

        return torch.cond(x > 0, branch, lambda: x)

    assert vmap(grad(f))(torch.tensor([4.0, -1.0, 9.0])).tolist() == [2, 1, 3]


def test_a_module_in_a_branch() -> None:
    layer = torch.nn.Linear(3, 3, dtype=F64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def f(cond: Any) -> Any:
        return lambda weights, x: cond(x.sum() > 0, lambda x: functional_call(layer, weights, x), torch.sin, (x,)).sum()

    def by_hand(name: str, x: Tensor) -> Tensor:
        return gradient(lambda p: f(Python.cond)({**weights, name: p}, x), weights[name])

    found = vmap(grad(f(torch.cond)), in_dims=(None, 0))(weights, XS)
    for name, slopes in found.items():
        torch.testing.assert_close(slopes, torch.stack([by_hand(name, x) for x in XS]))


def test_random_numbers_in_a_branch() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.cond(x > 0, lambda: x + torch.rand(()), lambda: -x)

    xs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    out = vmap(f, randomness="different")(xs)
    assert out[1] == 1 and bool(((out[[0, 2, 3]] > 1) & (out[[0, 2, 3]] < 2)).all()) and len(set(out.tolist())) == 4
    same = vmap(f, randomness="same")(xs)
    assert len(set(same[[0, 2, 3]].tolist())) == 1
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(f)(xs)


def test_transposes_and_functionalize() -> None:
    flags, xs = torch.tensor([True, False]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    f = vmap(lambda t, x: torch.cond(t, lambda x: x * 2, lambda x: x.flip(0) * 3, (x,)))
    (found,) = linear_transpose(lambda x: f(flags, x), xs)(xs)
    assert found.tolist() == [[2, 4], [12, 9]]
    assert functionalize(f)(flags, xs).tolist() == [[2, 4], [12, 9]]


# --- what is refused ------------------------------------------------------------------------------------------------

captured = torch.zeros(2)


def add_to_captured(x: Tensor) -> Tensor:
    captured.add_(1)
    return x * 1


def write_view(x: Tensor) -> Tensor:
    x[0].fill_(3)
    return x.clone()


@pytest.mark.parametrize(
    "branch",
    [add_to_captured, write_view, lambda x: x.mul_(2).clone(), lambda x: torch.sin(x, out=captured),
     lambda x: torch.nn.functional.batch_norm(x.expand(3, 2), captured, captured + 1, training=True)[0]],
)  # fmt: skip
def test_a_branch_must_not_write_what_it_was_given_or_captured(branch: Any) -> None:
    xs = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    with pytest.raises(BranchWriteError, match=r"branch\(.*\) writes a tensor of shape \(2,\).*Write to a clone"):
        vmap(lambda x: torch.cond(x.sum() > 0, branch, lambda x: x * 2, (x,)))(xs)
    assert captured.tolist() == [0, 0] and xs.tolist() == [[1, 2], [-1, -2]]
    assert interpreter_stack() == []


def test_a_branch_for_all_examples_may_write() -> None:
    """As without a branch."""
    xs = torch.tensor([[1.0, 2.0], [1.0, -0.5]])
    f = vmap(lambda x: torch.cond(x.sum() > 0, lambda x: x.mul_(2) + 1, lambda x: x * 2, (x,)))
    assert f(xs).tolist() == [[3, 5], [3, 0]] and xs.tolist() == [[2, 4], [2, -1]]


@pytest.mark.parametrize(
    ("yes", "no", "message"),
    [
        (
            lambda x: x[:1],
            torch.sin,
            r"torch.cond: got float32\[1\] as result 0 of true_fn; expected float32\[2\], like",
        ),
        (lambda x: x.double(), torch.sin, r"got float64\[2\] as result 0 of true_fn; expected float32\[2\]"),
        (
            lambda x: (x, x),
            torch.sin,
            "got 2 results of true_fn; expected the structure of the result of false_fn, of 1",
        ),
        (lambda x: (x, 3), lambda x: (x, 4), "got 3 as result 1 of true_fn; expected 4"),
        (lambda x: (x, 3), lambda x: (x, 3.0), "got 3 as result 1 of true_fn; expected 3.0"),
        (lambda x: (x, 3), lambda x: (x, x), r"got 3 as result 1 of true_fn; expected float32\[2\]"),
    ],
)
def test_branches_that_do_not_fit(yes: Any, no: Any, message: str) -> None:
    with pytest.raises(CallError, match=message):
        vmap(lambda x: torch.cond(x.sum() > 0, yes, no, (x,)))(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: while_loop(lambda x: x, lambda x: (x,), (x,)),
            r"while_loop: got float32\[\] from cond_fn; expected a bool",
        ),
        (
            lambda x: while_loop(lambda x: x < 9, lambda x: (x.double() + 1,), (x,)),
            r"got float64\[\] as result 0 of body_fn",
        ),
        (
            lambda x: while_loop(lambda x: x < 9, lambda x: (x + 1, x), (x,)),
            "got 2 results of body_fn; expected the structure",
        ),
        (
            lambda x: scan(lambda c, y: (c.double(), y), x, x[None]),
            "scan: got float64.*as result 0 of combine_fn.*the carry",
        ),
        (lambda x: Torch.associative_scan(lambda a, b: a.double(), x.expand(3), 0), "associative_scan: got float64"),
        (lambda x: torch.ops.higher_order.cond(x.expand(2), torch.sin, torch.cos, (x,)), r"got .*\[2\] as predicate"),
    ],
)
@pytest.mark.parametrize(
    "transform", [lambda f: vmap(f)(torch.tensor([1.0, 2.0])), lambda f: grad(f)(torch.tensor(1.0))]
)
def test_functions_that_do_not_fit(call: Any, message: str, transform: Any) -> None:
    with pytest.raises((CallError, CallTypeError), match=message):
        transform(call)


def test_other_values_are_not_read_in_a_branch() -> None:
    def branch(x: Tensor) -> Tensor:
        return x if x[0] > 0 else -x

    with pytest.raises(DataDependentError, match=r"inside vmap\(<lambda>\) at level 1"):
        vmap(lambda x: torch.cond(x.sum() > 0, branch, torch.sin, (x,)))(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))


def test_an_exception_in_a_branch_passes() -> None:
    class OwnError(Exception):
        pass

    def fail(x: Tensor) -> Tensor:
        raise OwnError

    with pytest.raises(OwnError):
        vmap(grad(lambda x: torch.cond(x > 0, fail, torch.sin, (x,))))(torch.tensor([1.0, -2.0]))
    assert interpreter_stack() == []


def test_a_tensor_of_a_branch_that_has_ended() -> None:
    kept = []
    xs = torch.tensor([1.0, -2.0])
    vmap(lambda x: torch.cond(x > 0, lambda x: (kept.append(x * 2), x * 1)[1], torch.sin, (x,)))(xs)
    with pytest.raises(
        RuntimeError, match=r"belongs to branch\(<lambda>\) at level 2 was used after .* made at .*control_flow.py"
    ):
        vmap(lambda x: torch.cond(x > 0, lambda x: x + kept[0], torch.sin, (x,)))(xs)


# --- other operators, and new transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [lambda f: grad(lambda x: f(x).sum()), vmap])
def test_steps_that_do_not_fit(transform: Any) -> None:
    """Each result may be fit for a tensor of its own."""
    dtypes = iter([torch.float32, torch.float64])
    numbers = iter([1, 2])
    x = torch.ones(2, 2)
    with pytest.raises(
        CallError, match="map: got float64.* as result 0 of f; expected float32.* like that of the first"
    ):
        transform(lambda x: torch_map(lambda y: y.to(next(dtypes)), x))(x)
    with pytest.raises(
        CallError, match="scan: got 2 as result 1 of combine_fn; expected 1, like that of the first step"
    ):
        transform(lambda x: scan(lambda c, y: (c + y, (y * 1, next(numbers))), x[0] * 0, x)[0])(x)


def test_an_operator_without_definition() -> None:
    hints = torch.ops.higher_order.hints_wrapper

    def f(x: Tensor) -> Tensor:
        return hints(lambda x: x.sin(), (x,), {}, hints={})

    with pytest.raises(
        HigherOrderError,
        match=r"grad\(f\) at level 1 has no rule for torch.ops.higher_order.hints_wrapper,.*DEFINITIONS",
    ):
        grad(f)(torch.tensor(0.0))
    with overriding(DEFINITIONS, hints):
        DEFINITIONS.add(hints, lambda body, args, kwargs, hints: body(*args, **kwargs))
        assert vmap(grad(f))(torch.zeros(2)).tolist() == [1, 1]


class Interval(TableInterpreter):
    kind = "interval"
    payload = ("upper",)
    rules = RuleTable("interval")


def ends(x: Any) -> tuple[Tensor, Tensor]:
    return x.value, x.value if x.upper is None else x.upper


for _op in (torch.ops.aten.gt.Scalar, torch.ops.aten.exp.default):
    Interval.rules.add(_op, lambda i, x, *rest, op=_op: i.carry(op(x.value, *rest), upper=op(ends(x)[1], *rest)))


@Interval.rules.register(torch.ops.aten.add.Tensor)
def add(interval: Any, x: Any, y: Any) -> Any:
    (a, b), (c, d) = (ends(x), ends(y) if isinstance(y, Tensor) else (y, y))
    return interval.carry(a + c, upper=b + d)


def bounds(f: Any, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    interval = Interval(f)
    return run_transformed(interval, lambda: ends(interval.own(f(interval.carry(low, upper=high)))))


def piecewise(x: Tensor) -> Tensor:
    return torch.cond(x > 0, lambda x: x.exp(), lambda x: x + 0.5, (x,))


def hull(interval: Any, pred: Any, true_fn: Any, false_fn: Any, operands: Any) -> Any:
    surely, maybe = ends(pred)
    with running_at(interval):
        yes, no = (ends(interval.own(branch(*operands))) for branch in (true_fn, false_fn))
    low = torch.where(surely, yes[0], torch.where(maybe, torch.minimum(yes[0], no[0]), no[0]))
    high = torch.where(surely, yes[1], torch.where(maybe, torch.maximum(yes[1], no[1]), no[1]))
    return interval.carry(low, upper=high)


@Interval.rules.register(torch.ops.aten.where.self)
def where(interval: Any, condition: Any, x: Any, y: Any) -> Any:
    low, high = (torch.where(condition.value, a, b) for a, b in zip(ends(x), ends(y), strict=True))
    return interval.carry(low, upper=high)


def test_what_a_new_transform_carries_enters_a_branch() -> None:
    """Below and above the vmap whose examples differ; the logarithms of what is not positive would be NaN."""
    flags, low = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, -2.0, 2.0])

    def f(flag: Tensor, x: Any) -> Tensor:
        return torch.cond(flag > 0, lambda: x.log(), lambda: x.exp())

    def by_hand(flag: Tensor, x: Tensor) -> Tensor:
        return x.log() if flag > 0 else x.exp()

    with overriding(Interval.rules, torch.ops.aten.log.default):

        @Interval.rules.register(torch.ops.aten.log.default)
        def log(interval: Any, x: Any) -> Any:
            assert all(bool((end > 0).all()) for end in map(at_base, ends(x)))
            return interval.carry(x.value.log(), upper=ends(x)[1].log())

        found = vmap(lambda flag, low: torch.stack(bounds(lambda x: f(flag, x), low, low + 1)))(flags, low)
        expected = [torch.stack([by_hand(flag, x), by_hand(flag, x + 1)]) for flag, x in zip(flags, low, strict=True)]
        torch.testing.assert_close(found, torch.stack(expected))
        found = bounds(lambda x: vmap(lambda flag: f(flag, x))(flags), low[2], low[2] + 1)
        expected = [torch.stack([by_hand(flag, x) for flag in flags]) for x in (low[2], low[2] + 1)]
        torch.testing.assert_close(found, tuple(expected))


def at_base(x: Any) -> Tensor:
    return at_base(x.value) if type(x) is WrapperTensor else x


def test_a_new_transform_has_a_rule_of_its_own() -> None:
    cond = torch.ops.higher_order.cond
    low, high = torch.tensor([-2.0, -1.0, 1.0]), torch.tensor([-1.0, 0.5, 2.0])
    with pytest.raises(
        UndecidedError, match=r"interval\(piecewise\) at level 1 has no rule for torch.ops.higher_order.cond"
    ):
        bounds(piecewise, low[0], high[0])
    with overriding(Interval.rules, cond):
        Interval.rules.add(cond, hull)
        found = vmap(lambda low, high: torch.stack(bounds(piecewise, low, high)))(low, high)
        expected = torch.tensor([[-1.5, -0.5], [-0.5, torch.tensor(0.5).exp()], [torch.e, torch.tensor(2.0).exp()]])
        torch.testing.assert_close(found, expected)
        slope = grad(lambda high: bounds(piecewise, low[1], high)[1])(high[1])
        torch.testing.assert_close(slope, high[1].exp())
        with pytest.raises(UndecidedError, match="in no other transform inside"):
            bounds(lambda x: grad(piecewise)(x), low[0], high[0])
    with overriding(Interval.rules, cond):
        Interval.rules.add(cond, lambda interval, pred, true_fn, false_fn, operands: (operands[0], operands[0].value))
        with pytest.raises(
            RuleResultError, match=r"the rule for cond of interval.*got float32\[\] of no level as result 1"
        ):
            bounds(piecewise, low[0], high[0])


def test_what_is_constant_for_a_new_transform_decides() -> None:
    one = torch.tensor(1.0)
    assert bounds(lambda x: torch.cond(one > 0, torch.exp, torch.add, (x,)), one, one * 2) == (
        one.exp(),
        (one * 2).exp(),
    )
    found = bounds(lambda x: scan(lambda c, y: (c + y, y.exp()), x, one.expand(2))[0], one, one * 2)
    assert found == (3, 4)


def test_flex_attention() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, heads, 4, 8, dtype=F64, generator=generator) for heads in (4, 2, 2))
    slopes = torch.tensor([0.5, -0.2, 0.1, 1.0], dtype=F64)
    places = torch.arange(4)
    hidden = places[:, None] < places + 1  # of the first query all
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j + 1, 2, 4, 4, 4, device="cpu")

    def attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + slopes[h] * (i - j).abs()

        return flex.flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True)

    def by_hand(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) / 8**0.5 + slopes[:, None, None] * (places[:, None] - places).abs()
        weights = scores.exp().masked_fill(hidden, 0)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-9) @ v

    found = vmap(attention, in_dims=(0, 0, 0, None))(q, k, v, slopes)
    torch.testing.assert_close(found, torch.stack([by_hand(*one, slopes) for one in zip(q, k, v)]))
    for argnum in range(4):
        given = [q[0], k[0], v[0], slopes]

        def of(f: Any, x: Tensor, argnum: int = argnum, given: Any = given) -> Tensor:
            return f(*given[:argnum], x, *given[argnum + 1 :]).sin()

        x, t = given[argnum], given[argnum].cos()
        torch.testing.assert_close(grad(lambda x: of(attention, x).sum())(x), gradient(lambda x: of(by_hand, x), x))
        torch.testing.assert_close(
            jvp(lambda x: of(attention, x), (x,), (t,))[1], along(lambda x: of(by_hand, x), x, t)
        )


def test_in_a_graph() -> None:
    """What is traced cannot be read: both branches are in the graph."""

    def program(xs: Tensor) -> Tensor:
        return vmap(grad(lambda x: torch.cond(x.sum() > 0, lambda x: x.sum().sqrt(), lambda x: x.sum(), (x,))))(xs)

    def unbatched(x: Tensor) -> Tensor:
        return grad(lambda x: torch.cond(x.sum() > 0, lambda x: x.sum().sqrt(), lambda x: x.sum(), (x,)))(x)

    xs = torch.tensor([[1.0, 3.0], [-1.0, -2.0], [4.0, 5.0]])
    for f in (program, unbatched):
        graph = torch.fx.experimental.proxy_tensor.make_fx(f)(xs)
        for given in (xs, -xs, xs.abs(), -xs.abs()):
            torch.testing.assert_close(graph(given), f(given))
            assert f(given).isfinite().all()


def test_a_loop_in_a_graph_ends_by_no_tensor() -> None:
    counted = vmap(lambda x: while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (0, x))[1])
    xs = torch.tensor([1.0, 2.0])
    assert torch.equal(torch.fx.experimental.proxy_tensor.make_fx(counted)(xs)(xs), 8 * xs)
    doubled = lambda x: while_loop(lambda x: x < 5, lambda x: (x * 2,), (x,))[0]
    for f, given in ((vmap(doubled), xs), (grad(doubled), xs[0]), (functionalize(doubled), xs[0])):
        with pytest.raises(CallError, match="from cond_fn while a graph is traced, whose value is not known"):
            torch.fx.experimental.proxy_tensor.make_fx(f)(given)
        assert interpreter_stack() == []


def test_a_write_in_a_branch_of_a_graph() -> None:
    f = functionalize(lambda x: torch.cond(x.sum() > 0, lambda x: x.add_(1) * 2, lambda x: x.sin(), (x,)))
    x = torch.ones(3)
    assert f(x).tolist() == [4, 4, 4] and x.tolist() == [2, 2, 2]
    with pytest.raises(BranchWriteError, match="while a graph is traced"):
        torch.fx.experimental.proxy_tensor.make_fx(f)(x)


def test_compiled() -> None:
    torch.compiler.reset()

    def loss(x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda x: x.sum().sqrt(), lambda x: x.sum(), (x,))
        return y * scan(lambda c, v: (c * v, c + v), y, x)[1].sum()

    xs = torch.tensor([[1.0, 3.0], [-1.0, -2.0], [4.0, 5.0]])
    f = vmap(grad(loss))
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for given in (xs, -xs, xs.abs()):
        torch.testing.assert_close(compiled(given), f(given))
    torch.compiler.reset()
