"""torch.cond, while_loop, scan, associative_scan and map inside transforms: what a Python program with ``if`` and loops
gives, example by example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.autograd import forward_ad

import functrans
from functrans import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from functrans.core.errors import (
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
    interpreter_stack,
    overriding,
    run_transformed,
    running_at,
)

F64 = torch.float64
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
        return init, cls.together(out, dim, reverse)

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
