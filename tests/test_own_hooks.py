"""Methods that grad, jvp and vmap make wrappers and records by, overridden: they are asked for every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import functrans as ft
from functrans.errors import BatchingRuleError, RegistrationError
from functrans.extend import BackwardNode, GradInterpreter, JvpInterpreter, PullbackInterpreter, VmapInterpreter

aten = torch.ops.aten


@torch.library.custom_op("own_hooks::shifted", mutates_args=())
def shifted(x: Tensor) -> Tensor:
    return x - x.mean()


shifted.register_autograd(lambda ctx, grad: grad - grad.mean())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return Doubled.apply(x), in_dims[0]


torch.manual_seed(0)
NET = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU(), nn.Flatten(0), nn.Linear(16, 8), nn.LayerNorm(8)).double()
NET.requires_grad_(False)
X = torch.randn(12, dtype=torch.float64)


def model(x: Tensor) -> Tensor:
    """Operators of many kinds: by the table with one output and with several, in pieces, borrowed, without a derivative
    or of integers, views and writes, an autograd.Function."""
    y = NET(x.view(2, 6)).cumsum(0).softmax(0)
    q, r = torch.linalg.qr(torch.outer(y, y) + torch.eye(8, dtype=x.dtype))
    y = y + (q @ r).diagonal()
    s, order = y.sort()
    variance, mean = torch.var_mean(s)
    first, second = s.split(4)
    s = torch.cat([first * second.exp(), torch.stack([variance, mean]), y[order[:2]].round() * s[:2]])
    s[0] = 3 * s[1]
    s = torch.where(s > 0, s, s * s) + Doubled.apply(s) + shifted(s)
    return torch.logsumexp(s.flip(0), 0) + torch.special.i0(s).sum() + nn.functional.embedding(order, y[:, None]).sum()


def made_by(base: Any, name: str, made: list[Any]) -> Any:
    """A subclass that notes what its method ``name`` makes, and expects it of every result."""

    class Noting(base):  # type: ignore[misc]
        kind = "noting"

        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            out = super().process(op, args, kwargs)
            for x in pytree.tree_leaves(out):
                if self.owns(x) and not self.is_constant(x):
                    assert any(x is m for m in made), op
            return out

    def method(self: Any, *args: Any) -> Any:
        made.append(getattr(base, name)(self, *args))
        return made[-1]

    return type("Noting", (Noting,), {name: method})


CALLS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "grad": (GradInterpreter, "track", lambda i: ft.grad(model, **i)(X)),
    "jacrev": (GradInterpreter, "track", lambda i: ft.jacrev(lambda x: model(x) * x, **i)(X)),
    "grad in vmap": (GradInterpreter, "track", lambda i: ft.vmap(ft.grad(model, **i))(X.outer(X).cos())),
    "vmap": (VmapInterpreter, "batched", lambda i: ft.vmap(model, **i)(X.outer(X).cos())),
    "vmap of grad": (VmapInterpreter, "batched", lambda i: ft.vmap(ft.grad(model), **i)(X.outer(X).cos())),
    "jvp": (JvpInterpreter, "dual", lambda i: ft.jvp(model, (X,), (X.cos(),), **i)),
    "jacfwd": (JvpInterpreter, "dual", lambda i: ft.jacfwd(model, **i)(X)),
    "linearize": (JvpInterpreter, "dual", lambda i: ft.linearize(model, X, **i)[1](X.cos())),
    "jvp of grad": (JvpInterpreter, "dual", lambda i: ft.jvp(ft.grad(model), (X,), (X.cos(),), **i)),
}


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
@pytest.mark.parametrize("name", CALLS)
def test_every_wrapper_is_made_by_it(name: str) -> None:
    base, method, call = CALLS[name]
    made: list[Any] = []
    noting = made_by(base, method, made)
    for _ in range(2):  # the second time calls are known
        made.clear()
        torch.testing.assert_close(call({"interpreter": noting}), call({}))
        assert len(made) > 30


def test_every_record_is_made_by_it() -> None:
    recorded: list[Any] = []

    class Recording(GradInterpreter):
        def record(self, node: Any, outs: Any, ins: Any, saved: Any) -> None:
            recorded.append(node)
            super().record(node, outs, ins, saved)

        def pull(self, cotangents: Any, *, consume: bool, end: int | None = None) -> Any:
            assert [node for node, *_ in self.tape] == recorded
            return super().pull(cotangents, consume=consume, end=end)

    torch.testing.assert_close(ft.grad(model, interpreter=Recording)(X), ft.grad(model)(X))
    assert len(recorded) > 30


def test_a_record_of_ones_own_is_what_is_pulled_through() -> None:
    class Thrice(BackwardNode):
        def __init__(self, node: Any) -> None:
            self.node, self.op = node, node.op

        def pull(self, saved: list[Any], grad: Any) -> list[Any]:
            return [3 * c for c in self.node.pull(saved, grad)]

    class Thriced(GradInterpreter):
        def record(self, node: Any, outs: Any, ins: Any, saved: Any) -> None:
            super().record(Thrice(node), outs, ins, saved)

    f = lambda x: (x.sin().cumsum(0) * 2).sum()  # four operators
    torch.testing.assert_close(ft.grad(f, interpreter=Thriced)(X), 81 * ft.grad(f)(X))
    examples = X.view(3, 4)
    torch.testing.assert_close(ft.vmap(ft.grad(f, interpreter=Thriced))(examples), 81 * ft.vmap(ft.grad(f))(examples))


def test_constants_are_made_by_it() -> None:
    for base, call in ((GradInterpreter, ft.grad), (VmapInterpreter, ft.vmap), (JvpInterpreter, ft.jacfwd)):
        made: list[Any] = []
        method = lambda self, value, base=base, made=made: (made.append(value.dtype), base.constant(self, value))[1]
        own = type("Own", (base,), {"constant": method})
        f = lambda x: torch.where(x.cumsum(0).argsort() > torch.arange(12), x, 0 * x).sum()
        x = X.unsqueeze(0) if call is ft.vmap else X
        torch.testing.assert_close(call(f, interpreter=own)(x), call(f)(x))
        assert torch.int64 in made


def test_hooks_of_tensors_go_through_it() -> None:
    hooked: list[Any] = []

    class Hooking(GradInterpreter):
        def add_hook(self, wrapper: Any, hook: Any) -> Any:
            hooked.append(wrapper.tape_index)
            return super().add_hook(wrapper, lambda grad: hook(10 * grad))

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda grad: 2 * grad)
        torch.autograd.graph.register_multi_grad_hook([y], lambda grads: hooked.append(grads[0]))
        return y.sum()

    torch.testing.assert_close(ft.grad(f, interpreter=Hooking)(X), 20 * X.cos())
    assert hooked[:2] == [2, 2]
    torch.testing.assert_close(hooked[2], torch.full_like(X, 200))


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (GradInterpreter, "track"),
        (GradInterpreter, "record"),
        (GradInterpreter, "constant"),
        (PullbackInterpreter, "record"),
        (JvpInterpreter, "dual"),
        (VmapInterpreter, "batched"),
    ],
)
def test_programs_would_go_past_it(base: Any, name: str) -> None:
    with pytest.raises(RegistrationError) as caught:
        type("Own", (base,), {name: lambda self, *args: None}, whole=True)
    assert str(caught.value).startswith(f"class Own: got whole=True with {name} of its own; expected one of them")
    assert str(caught.value).endswith("Leave whole=True out: operators come one by one then.")


def test_what_a_rule_returned_is_checked_before_it() -> None:
    own = made_by(VmapInterpreter, "batched", [])
    with ft.extend.overriding(ft.extend.BATCHING_RULES, aten.cumsum.default):
        ft.batching_rule(aten.cumsum.default)(lambda info, in_dims, x, dim: (x, 1))
        with pytest.raises(BatchingRuleError, match=r"out_dim 1 for an output of shape \(3, 4\)"):
            ft.vmap(lambda x: x.cumsum(0), interpreter=own)(X.view(3, 4))


def test_a_view_of_an_argument_is_replayed_at_the_same_kind_of_level() -> None:
    asked: list[Any] = []

    class Asked(VmapInterpreter):
        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            asked.append((op, self.axis_name))
            return super().process(op, args, kwargs)

    def f(x: Tensor) -> Tensor:
        x.mul_(2)
        return x.t()[0]

    x = torch.arange(12.0).view(2, 2, 3)
    expected = 2 * x[:, :, 0]
    out = ft.vmap(f, interpreter=Asked, axis_name="rows")(x)
    assert torch.equal(out, expected) and out._base is not None and torch.equal(x[:, :, 0], expected)
    views = [(aten.t.default, "rows"), (aten.select.int, "rows")]
    assert asked == [(aten.mul.Tensor, "rows"), *views, *views]  # in the function, and for the caller


def test_explaining_a_gradient_inside_does_not_take_it_for_a_way_back_of_ones_own() -> None:
    def f(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        return g.square().sum()

    torch.testing.assert_close(ft.explain(ft.grad(f), X).result, 36 * X**3)

