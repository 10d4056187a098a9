"""count: against PyTorch's FlopCounterMode, a dispatch mode that adds up bytes, and formulas by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from functrans import (
    count,
    custom_jvp,
    custom_vjp,
    functional_call,
    grad,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jvp,
    psum,
    reap,
    sow,
    vmap,
)
from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CustomFunctionError, MissingRuleError


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert interpreter_stack() == []


class Bytes(TorchDispatchMode):
    """The bytes that operators at the base take and return, those of views left out."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None for r in func._schema.returns):
            read = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in [*read.values(), *written])
        return out


NET = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).requires_grad_(False)
WEIGHTS = dict(NET.named_parameters())
XS = torch.randn(4, 5)


def net(weights: Any, x: Tensor) -> Tensor:
    hidden = torch.tanh(F.linear(x, weights["0.weight"], weights["0.bias"]))
    return F.linear(hidden, weights["2.weight"], weights["2.bias"])


def loss(weights: Any, x: Tensor) -> Tensor:
    return net(weights, x).square().sum()


def conv(w: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1).square().sum()


Q = torch.randn(2, 2, 7, 8)
CONV = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 6)
attention = lambda q: F.scaled_dot_product_attention(q, q, q).sum()

PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "linear": (F.linear, (XS, WEIGHTS["0.weight"], WEIGHTS["0.bias"])),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (torch.randn(2, 3, 4), torch.randn(2, 4, 5))),
    "tensordot": (lambda a: torch.tensordot(a, a, dims=([0], [0])), (XS,)),
    "matmul": (torch.matmul, (torch.randn(2, 3, 4, 5), torch.randn(5, 6))),
    "addmm and baddbmm": (
        lambda a, b: torch.addmm(a, a, a) + torch.baddbmm(b, b, b).sum(0), (torch.randn(3, 3), torch.randn(2, 3, 3))
    ),
    "convolution": (conv, CONV),
    "network": (net, (WEIGHTS, XS)),
    "grad": (grad(loss), (WEIGHTS, XS)),
    "vmap of grad": (vmap(grad(loss), in_dims=(None, 0)), (WEIGHTS, XS)),
    "grad of vmap": (grad(lambda w, xs: vmap(net, in_dims=(None, 0))(w, xs).square().sum()), (WEIGHTS, XS)),
    "vmap over networks": (vmap(net, in_dims=(0, None)), ({k: torch.stack([w] * 3) for k, w in WEIGHTS.items()}, XS)),
    "jvp": (lambda x: jvp(lambda x: net(WEIGHTS, x), (x,), (x,)), (XS,)),
    "jacfwd": (jacfwd(net, argnums=1), (WEIGHTS, XS[0])),
    "jacrev": (jacrev(net, argnums=1), (WEIGHTS, XS[0])),
    "hessian": (hessian(loss, argnums=1), (WEIGHTS, XS[0])),
    "hvp": (lambda x, v: hvp(lambda x: loss(WEIGHTS, x), (x,), (v,)), (XS, XS)),
    "grad of convolution": (grad(conv, argnums=(0, 1)), CONV),
    "vmap of grad of convolution": (vmap(grad(conv), in_dims=(None, 0)), CONV),
    "hessian of convolution": (hessian(conv), (torch.randn(2, 1, 2, 2), torch.randn(1, 4, 4))),
    "grad of attention": (grad(attention), (Q,)),
    "vmap of grad of attention": (vmap(grad(attention)), (Q,)),
    "no products": (lambda x: x.sin().sum(0).cumsum(0), (XS,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_flops_are_those_at_the_base(name: str) -> None:
    f, args = PROGRAMS[name]
    with FlopCounterMode(display=False) as mode:
        expected = f(*args)
    out, counts = count(f)(*args)
    torch.testing.assert_close(out, expected)
    assert counts.flops == mode.get_total_flops()
    by_packet: dict[str, int] = {}
    for op, cost in counts.operators.items():
        packet = op.rpartition(".")[0]
        by_packet[packet] = by_packet.get(packet, 0) + cost.flops
    assert {p: n for p, n in by_packet.items() if n} == {
        str(p): n for p, n in mode.get_flop_counts()["Global"].items()
    }


@pytest.mark.parametrize("name", ["linear", "einsum", "tensordot", "matmul", "addmm and baddbmm", "no products"])
def test_bytes_are_those_at_the_base(name: str) -> None:
    f, args = PROGRAMS[name]
    with Bytes() as mode:
        f(*args)
    assert count(f)(*args)[1].bytes == mode.total > 0


def test_bytes_by_hand() -> None:
    x, y = torch.ones(3, 4), torch.ones(4, dtype=torch.float64)
    total = lambda f, *args: count(f)(*args)[1].bytes
    assert total(torch.add, x, y) == 3 * 4 * 4 + 4 * 8 + 3 * 4 * 8
    assert total(lambda x: x * x, x) == 2 * 48
    assert total(lambda x: x.t().unsqueeze(0).expand(2, 4, 3)[0], x) == 0
    assert total(lambda x: x.t().contiguous(), x) == 2 * 48
    assert total(lambda x: torch.cat([x, x, x + 1]), x) == 2 * 48 + (48 + 48 + 3 * 48)
    assert total(lambda: torch.ones(5)) == 20
    sparse = torch.eye(4).to_sparse()
    assert total(lambda s: torch.sparse.mm(s, torch.ones(4, 2)), sparse) >= 4 * (16 + 4) + 32


def test_inside_and_outside_of_vmap_and_grad() -> None:
    seen = []

    def inside(x: Tensor) -> Tensor:
        out, counts = count(loss)(WEIGHTS, x)
        seen.append(counts)
        return out

    one = 2 * (5 * 8 + 8 * 3)
    vmap(inside)(XS)
    assert seen[0].flops == one == count(loss)(WEIGHTS, XS[0])[1].flops
    assert seen[0].bytes == count(loss)(WEIGHTS, XS[0])[1].bytes
    assert count(vmap(loss, in_dims=(None, 0)))(WEIGHTS, XS)[1].flops == 4 * one
    torch.testing.assert_close(grad(inside)(XS[0]), grad(loss, argnums=1)(WEIGHTS, XS[0]))
    assert seen[1].flops == one
    vmap(grad(inside))(XS)
    assert seen[2].flops == one
    assert count(grad(inside))(XS[0])[1].flops == 2 * one  # by the input alone
    assert count(vmap(grad(inside)))(XS)[1].flops == 8 * one
    assert jvp(inside, (XS[0],), (XS[0],))[0] == loss(WEIGHTS, XS[0])


def test_with_itself_and_others() -> None:
    (_, inner), outer = count(count(loss))(WEIGHTS, XS)
    assert inner == outer
    x = XS[0]
    (_, named), counts = count(reap(lambda x: sow(x.sin(), "sin") @ x))(x)
    assert torch.equal(named["sin"], x.sin()) and counts.operators["aten.sin.default"].calls == 1
    assert count(vmap(lambda x: psum(x @ x, "i"), axis_name="i"))(XS)[0].shape == (4,)
    assert count(functional_call)(NET, WEIGHTS, (XS,))[1].flops == 4 * 2 * (5 * 8 + 8 * 3)


def test_writes_and_captured_tensors() -> None:
    captured = torch.zeros(3)

    def f(x: Tensor) -> Tensor:
        y = x * 2
        y[0].add_(1)
        captured.add_(x)
        return y @ captured

    out, counts = count(f)(torch.ones(3))
    assert out == 7 and captured.tolist() == [1.0] * 3
    assert counts.operators["aten.add.Tensor"].calls == 2


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


@custom_vjp
def cube(x: Tensor) -> Tensor:
    return x * x * x


cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x**2 * g,))


@custom_jvp
def cube_forward(x: Tensor) -> Tensor:
    return x * x * x


cube_forward.defjvp(lambda primals, tangents: (cube_forward(*primals), 3 * primals[0] ** 2 * tangents[0]))


@pytest.mark.parametrize(
    ("function", "expected"),
    [(Cube.apply, 8), (cube, 6), (cube_forward, 9)],
    ids=["Function", "custom_vjp", "custom_jvp"],
)
def test_functions_with_rules_are_seen_or_refused(function: Callable[..., Any], expected: int) -> None:
    """What nobody sees is not counted as nothing."""
    x = torch.tensor(2.0)
    out, counts = count(lambda x: function(x * 1))(x)
    assert out == 8 and counts.operators["aten.mul.Tensor"].calls == 3
    out, counts = count(grad(lambda x: function(x * 1)))(x)
    assert out == 12 and counts.operators["aten.mul.Tensor"].calls == expected
    assert vmap(lambda x: count(lambda x: function(x * 1))(x)[0])(x.expand(2)).tolist() == [8.0, 8.0]
    with pytest.raises((CustomFunctionError, MissingRuleError), match="Differentiate inside"):
        grad(lambda x: count(lambda x: function(x * 1))(x)[0])(x)


def test_written_arguments() -> None:
    x, y = torch.ones(3), torch.ones(3)

    def f(x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        y[0] = 5
        return x

    out, counts = count(f)(x, y)
    assert x.tolist() == out.tolist() == [2.0] * 3 and y.tolist() == [5.0, 1.0, 1.0]
    assert counts.operators["aten.add.Tensor"] == (1, 0, 36)
    assert grad(lambda x: count(f)(x * 1, x * 1)[0].sum())(x).tolist() == [2.0] * 3


@pytest.mark.parametrize("around", ["grad", "jvp", "vmap", "vmap of grad", "grad of vmap", "hessian"])
def test_every_way_in_is_seen(around: str) -> None:
    """The same operators as outside, by whatever way they come in, of arguments and of captured tensors."""
    ways = [torch.sin, lambda x: x * 2, lambda x: 2 * x, lambda x: x * x, lambda x: x**2, lambda x: 1 - x,
            lambda x: torch.add(x, 1), lambda x: x.sum(), lambda x: torch.stack([x, x]), lambda x: x.cumsum(0) + 1,
            lambda x: torch.ones(2), lambda x: x.clone().add_(1), lambda x: x.exp().sin()]  # fmt: skip
    calls = lambda f, x: {op: c.calls for op, c in count(f)(x)[1].operators.items()}
    found: list[Any] = []

    def inside(x: Tensor) -> Tensor:
        found.extend(calls(way, x) for way in ways)
        found.extend(calls(lambda _, way=way: way(x), x) for way in ways)
        return x.sum()

    x = torch.ones(3)
    transforms: dict[str, Callable[[], Any]] = {
        "grad": lambda: grad(inside)(x),
        "jvp": lambda: jvp(inside, (x,), (x,)),
        "vmap": lambda: vmap(inside)(x.expand(2, 3)),
        "vmap of grad": lambda: vmap(grad(inside))(x.expand(2, 3)),
        "grad of vmap": lambda: grad(lambda x: vmap(inside)(x).sum())(x.expand(2, 3)),
        "hessian": lambda: hessian(inside)(x),
    }
    transforms[around]()
    assert found == 2 * [calls(way, x) for way in ways] and all(found)


def test_bad_input() -> None:
    with pytest.raises(CallTypeError, match="expected a function as the first argument"):
        count(XS)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        count(lambda x: x / (1 // 0))(XS)
