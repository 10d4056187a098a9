"""Hooks, and what is made of them, inside of transforms: of modules, of tensors, trackers, counters of operations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from recorder import Listing
from slow_ways import close
from torch import Tensor, nn
from torch.autograd import graph
from torch.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from functrans import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from functrans.errors import HookError, InsideTransformError
from functrans.pytorch.torch_private import debug_mode

F64 = torch.float64
torch.manual_seed(0)
X = torch.tensor([0.5, -1.2, 2.0], dtype=F64)
ROWS = torch.randn(4, 3, dtype=F64)
FACTORS = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def by_autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    f(x).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return x.grad


# --- backward hooks of modules

HOOKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "full": ("register_full_backward_hook", lambda module, into, out: tuple(2 * g * (1 + g) for g in into)),
    "full, looking": ("register_full_backward_hook", lambda module, into, out: None),
    "full, by both": ("register_full_backward_hook", lambda module, into, out: (into[0] * out[0].sum(-1, True),)),
    "before": ("register_full_backward_pre_hook", lambda module, out: tuple(g - 3 for g in out)),
    "of the last node": ("register_backward_hook", lambda module, into, out: tuple(2 * g for g in into)),
}
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda net: torch.stack([grad(lambda x: net(x).sum())(row) for row in ROWS]),
    "vmap of grad": lambda net: vmap(grad(lambda x: net(x).sum()))(ROWS),
    "grad of vmap": lambda net: grad(lambda rows: vmap(net)(rows).sum())(ROWS),
    "grad of vmap, in columns": lambda net: grad(lambda x: vmap(net, in_dims=1)(x).sum())(ROWS.T).T,
    "grad of vmap of vmap": lambda net: grad(lambda x: vmap(vmap(net))(x).sum())(ROWS.view(2, 2, 3)).view(4, 3),
    "vjp": lambda net: torch.stack([vjp(net, row)[1](torch.ones(2, dtype=F64))[0] for row in ROWS]),
    "jacrev": lambda net: vmap(jacrev(lambda x: net(x).sum()))(ROWS),
    "vmap": lambda net: by_autograd(lambda rows: vmap(net)(rows).sum(), ROWS),
    "jvp": lambda net: by_autograd(lambda rows: jvp(vmap(net), (rows,), (rows,))[0].sum(), ROWS),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", HOOKS)
def test_backward_hooks_of_modules(kind: str, way: str) -> None:
    register, hook = HOOKS[kind]
    calls: list[int] = []

    def noted(*args: Any) -> Any:
        calls.append(1)
        return hook(*args)

    net = network()
    getattr(net[1], register)(noted)
    expected = torch.stack([by_autograd(lambda x: net(x).sum(), row) for row in ROWS])
    assert len(calls) == 4
    calls.clear()
    if kind == "of the last node" and ("of vmap" in way or way in ("vmap", "jvp")):
        with pytest.raises(InsideTransformError, match="a hook on grad_fn"):
            WAYS[way](net)
        return
    close(WAYS[way](net), expected)
    assert len(calls) == (4 if way in ("grad", "vjp") else 1)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_where_only_parameters_are_differentiated(register: str) -> None:
    net = network()
    getattr(net[0], register)(lambda *args: None)
    getattr(net[2], register)(lambda module, grads, *_: tuple(2 * g for g in grads))
    expected = torch.autograd.grad(net(X).sum(), list(net.parameters()))
    weights = {name: p.detach() for name, p in net.named_parameters()}
    close(tuple(grad(lambda p: functional_call(net, p, (X,)).sum())(weights).values()), expected)


def test_second_derivatives_go_through_hooks_that_only_look() -> None:
    net = network()
    expected = torch.autograd.functional.hessian(lambda x: net(x).sum(), X)
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        getattr(net[1], register)(lambda *args: None)
        close(hessian(lambda x: net(x).sum())(X), expected)
        close(jacrev(grad(lambda x: net(x).sum()))(X), expected)


def test_what_a_hook_returns_is_checked() -> None:
    for returned, message in (
        ((torch.ones(2, dtype=F64),), "the hook returned a torch.float64 tensor of shape"),
        ((None, None), "the hook returned 2 gradients for the gradient, expected 1"),
    ):
        handle_of = lambda y, r=returned: y.grad_fn.register_hook(lambda into, out: r)

        def f(x: Tensor, handle_of: Callable[[Tensor], Any] = handle_of) -> Tensor:
            y = x.cumsum(0)
            handle_of(y)
            return y.sum()

        with pytest.raises(HookError, match=message):
            grad(f)(X)


def test_grad_fn_names_what_made_a_tensor() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.cumsum(0)
        z = y.sin()
        assert x.grad_fn is None and (x.detach() * 2).grad_fn is None
        assert y.grad_fn.name() == "aten.cumsum.default" and y.grad_fn == y.grad_fn != z.grad_fn
        assert z.grad_fn.next_functions == ((y.grad_fn, 0),) and y.grad_fn.next_functions == ((None, 0),)
        handle = z.grad_fn.register_hook(lambda into, out: (into[0] * 0,))
        z.grad_fn.register_prehook(lambda out: (out[0] * 2,))
        handle.remove()
        return z.sum()

    close(grad(f)(X), by_autograd(lambda x: 2 * x.cumsum(0).sin().sum(), X))


# --- hooks of tensors


def hooked(x: Tensor, factor: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: g * factor)  # closes over what may be batched, or tracked
    handle = y.register_hook(lambda g: g * 100)
    handle.remove()
    return (y**2).sum()


def test_hooks_of_tensors_at_every_level() -> None:
    expected = 8 * ROWS * FACTORS[:, None]
    close(grad(hooked)(X, FACTORS[1]), 8 * X * FACTORS[1])
    close(vmap(grad(hooked))(ROWS, FACTORS), expected)
    close(vmap(grad(hooked), in_dims=(1, 0))(ROWS.T, FACTORS), expected)
    close(grad(lambda rows: vmap(hooked)(rows, FACTORS).sum())(ROWS), expected)
    close(grad(lambda x: vmap(hooked, in_dims=(1, 0))(x, FACTORS).sum())(ROWS.T), expected.T)
    close(by_autograd(lambda rows: vmap(hooked)(rows, FACTORS).sum(), ROWS), expected)
    close(grad(lambda rows: vmap(vmap(hooked))(rows.view(2, 2, 3), FACTORS.view(2, 2)).sum())(ROWS), expected)
    twice = lambda x, c: grad(hooked)(x, c).pow(2).sum()
    close(vmap(grad(twice))(ROWS, FACTORS), 128 * ROWS * FACTORS[:, None] ** 2)


def test_a_hook_under_vmap_of_what_all_examples_share_is_refused() -> None:
    def f(x: Tensor) -> Tensor:
        def g(row: Tensor) -> Tensor:
            y = x * 2
            y.register_hook(lambda c: c)
            return (y * row).sum()

        return vmap(g)(ROWS).sum()

    with pytest.raises(InsideTransformError, match="not batched"):
        grad(f)(X)


def test_hooks_on_several_gradients() -> None:
    a, b = ROWS, ROWS.cos()
    shown: list[Any] = []

    def f(a: Tensor, b: Tensor) -> Tensor:
        c, d = a * b, a + b
        for mode in ("all", "any"):
            look = lambda g: shown.append([x is not None for x in g] if isinstance(g, list) else "any")
            graph.register_multi_grad_hook((a, b, c, d), look, mode=mode)
        return c.sum()

    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    f(x, y).backward()
    expected, shown[:] = list(shown), []
    assert expected == ["any", [True, True, True, False]]
    for run in (
        lambda: grad(f, (0, 1))(a, b),
        lambda: vmap(grad(f, (0, 1)))(a, b),
        lambda: grad(lambda a, b: vmap(f)(a, b).sum(), (0, 1))(a, b),
    ):
        close(run(), (b, a))
        assert shown == expected, shown
        shown.clear()
    pullback = vjp(f, a, b)[1]
    for _ in range(2):
        pullback(torch.tensor(1.0, dtype=F64))
    assert shown == 2 * expected


# --- trackers, counters, profilers


def counts(mode: FlopCounterMode) -> dict[str, int]:
    return {name: sum(by_op.values()) for name, by_op in mode.get_flop_counts().items()}


def test_operations_are_counted_by_module_on_both_ways() -> None:
    net = network().requires_grad_(False)
    with FlopCounterMode(display=False) as eager:
        expected = by_autograd(lambda x: net(x).sum(), ROWS)
    with FlopCounterMode(display=False) as around:
        close(grad(lambda x: net(x).sum())(ROWS), expected)
    assert counts(around) == counts(eager) and counts(eager)["Global"] > 0
    with FlopCounterMode(display=False) as forward:
        net(ROWS)
    inside: list[Any] = []

    def f(x: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as mode:
            out = net(x).sum()
        inside.append(counts(mode))
        return out

    close(grad(f)(ROWS), expected)
    assert inside == [counts(forward)]
    with FlopCounterMode(display=False) as batched:
        vmap(net)(ROWS)
    assert counts(batched) == counts(forward)


def test_a_tracker_knows_the_module_that_runs_and_is_at_the_beginning_again() -> None:
    net, seen = network(), []
    net[1].register_full_backward_hook(lambda *args: seen.append(set(tracker.parents)))
    for run in (grad(lambda x: net(x).sum()), vmap(grad(lambda x: net(x).sum())), lambda rows: vmap(net)(rows)):
        with ModuleTracker() as tracker:
            run(ROWS)
            assert tracker.parents == {"Global"}
    assert all("Global" in parents for parents in seen) and len(seen) == 2


@pytest.mark.slow  # the import
@pytest.mark.parametrize("place", ["inside", "around"])
def test_a_memory_tracker(place: str) -> None:
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    net = network()

    def f(x: Tensor) -> Tensor:
        with mem_tracker.MemTracker() if place == "inside" else nullcontext():
            return net(x).sum()

    with mem_tracker.MemTracker() if place == "around" else nullcontext():
        found = grad(f)(X)
    close(found, by_autograd(f, X))


def test_modes_inside_see_the_operators_that_the_level_sees() -> None:
    listing = Listing()

    def f(x: Tensor) -> Tensor:
        with listing:
            return (x.sin() * torch.ones(3, dtype=F64)).sum() + grad(lambda y: y.cos().sum())(x).sum()

    expected = X.cos() - X.cos()
    close(grad(f)(X), expected)
    first, listing.ops = listing.names, []
    assert {"aten.sin.default", "aten.ones.default", "aten.mul.Tensor", "aten.cos.default"} <= set(first)
    close(vmap(grad(f))(ROWS), 0 * ROWS)
    assert {"aten.sin.default", "aten.ones.default", "aten.mul.Tensor", "aten.cos.default"} <= set(listing.names)


@pytest.mark.skipif(debug_mode() is None, reason="this PyTorch has no DebugMode")
def test_debug_mode_inside_writes_down_what_an_example_sees() -> None:
    texts: list[str] = []

    def f(x: Tensor) -> Tensor:
        with debug_mode()() as mode:
            out = (x.sin() * X).sum()
        texts.append(mode.debug_string())
        return out

    close(grad(f)(X), X * X.cos())
    close(vmap(f)(ROWS), (ROWS.sin() * X).sum(1))
    for text in texts:
        names = [line.split("(")[0].split()[-1] for line in text.splitlines()]
        assert names == ["aten::sin", "aten::mul.Tensor", "aten::sum"]
        assert "f64[3]" in text and "f64[4" not in text


def test_a_profiler_inside() -> None:
    names: set[str] = set()

    def f(x: Tensor) -> Tensor:
        with profile() as run, record_function("mine"):
            out = x.sin().sum()
        names.update(event.key for event in run.key_averages())
        return out

    close(vmap(grad(f))(ROWS), ROWS.cos())
    assert {"mine", "aten::sin"} <= names


# --- autograd of captured tensors


def test_autograd_of_what_is_captured() -> None:
    net, w = network(), X.clone().requires_grad_()

    def f(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((w**3).sum(), w)
        slopes = torch.autograd.grad(net(X).sum(), list(net.parameters()), allow_unused=True)
        jacobian = torch.autograd.functional.jacobian(lambda v: v * v, X)
        return (x * g).sum() + slopes[0].sum() * x[0] + (jacobian @ x).sum()

    weight = torch.autograd.grad(net(X).sum(), net[0].weight)[0].sum()
    expected = 3 * X**2 + 2 * X + weight * torch.tensor([1.0, 0, 0], dtype=F64)
    close(grad(f)(X), expected)
    close(vmap(grad(f))(ROWS), expected.expand(4, 3))
    close(vmap(f)(ROWS), ROWS @ expected)

    def backwards(x: Tensor) -> Tensor:
        (w**3).sum().backward()
        return (x * w.grad).sum()

    close(grad(backwards)(X), 3 * X**2)
    w.grad = None
    with pytest.raises(InsideTransformError, match="backward"):  # a loop would add to w.grad for every example
        vmap(backwards)(ROWS)


@pytest.mark.parametrize("transform", [grad, vmap])
def test_autograd_of_what_has_no_graph_is_refused(transform: Any) -> None:
    for f in (
        lambda x: torch.autograd.grad((torch.ones(3, requires_grad=True) * 2).sum(), x)[0].sum(),
        lambda x: (x * x).sum().backward(),
    ):
        with pytest.raises(InsideTransformError, match=r"Use functrans.grad or functrans.vjp"):
            transform(f)(ROWS)


# --- modes that keep what they see


class Keeping(TorchDispatchMode):
    """Holds all arguments and results, as a recorder does: PyTorch hands out some results otherwise then."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.kept.append((args, out))
        return out


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.linspace(x[0], 2 * x[1], 4, dtype=F64),
        lambda x: torch.linspace(0, x.sum(), steps=4, dtype=F64),
        lambda x: torch.linspace(start=x[2], end=1, steps=3, dtype=F64),
        lambda x: torch.logspace(x[0], 0.5, 3, base=2.0, dtype=F64),
        lambda x: torch.logspace(0, x[0], 3, dtype=F64, requires_grad=False),
        lambda x: torch.linspace(x[0], x[1], 3, out=torch.empty(3, dtype=F64)),
        lambda x: torch.stack([torch.zeros_like(x) + x, torch.tensor([1.0, 2.0, 3.0], dtype=F64) * x]),
        lambda x: torch.histogram(x * x, 3)[1],
    ],
)
def test_a_mode_that_keeps_results_changes_none(f: Callable[[Tensor], Tensor]) -> None:
    def seen(x: Tensor) -> Tensor:
        with Keeping() as mode:
            out = f(x)
        assert mode.kept
        return out

    step = 1e-6 * torch.ones_like(X)
    slope = (f(X + step) - f(X - step)) / 2e-6
    for run in (f, seen):
        close(jvp(run, (X,), (torch.ones_like(X),))[1], slope, atol=1e-6, rtol=1e-6)
        close(grad(lambda x: run(x).sum())(X).sum(), slope.sum(), atol=1e-6, rtol=1e-6)  # noqa: B023
        close(vmap(run)(ROWS), torch.stack([f(x) for x in ROWS]))
