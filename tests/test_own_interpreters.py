"""Interpreters of a user's own in the place of grad's, vmap's and jvp's: ``interpreter=`` of every transform."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import Listing
from torch import Tensor
from wrong_calls import thread_state

import functrans as ft
from functrans import extend
from functrans.errors import CallTypeError
from functrans.extend import (
    BackwardNode,
    GradInterpreter,
    JvpInterpreter,
    RuleResultError,
    VmapInterpreter,
    interpreter_stack,
    lower,
    transform,
)

aten = torch.ops.aten


class Through(BackwardNode):
    op = "straight through"

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        return [grad]


class StraightGrad(GradInterpreter):
    """``round`` has the derivative of the identity."""

    kind = "straight grad"

    def process(self, op: Any, args: Any, kwargs: Any) -> Any:
        index = self.index_of(args[0]) if op is aten.round.default else None
        if index is None:
            return super().process(op, args, kwargs)
        out = self.track(lower(self, op, (args[0].value,), kwargs))
        self.record(Through(), out.tape_index, [index], [])
        return out


class StraightJvp(JvpInterpreter):
    kind = "straight jvp"

    def process(self, op: Any, args: Any, kwargs: Any) -> Any:
        if op is not aten.round.default:
            return super().process(op, args, kwargs)
        return self.dual(lower(self, op, (args[0].value,), kwargs), args[0].tangent)


class Estimator(torch.autograd.Function):
    """The same for PyTorch's autograd, as oracle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounding(round: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: round(3 * x) * x.sin() + round(x) ** 2


ours, oracle = rounding(torch.round), rounding(Estimator.apply)
X = torch.tensor([0.3, 1.7, -2.2], dtype=torch.float64)


def slope(x: Tensor) -> Tensor:
    """By PyTorch's autograd; the function is pointwise."""
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(oracle(x).sum(), x)
    return found


total = lambda x: ours(x).sum()

REVERSE: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": lambda x: ft.grad(total, interpreter=StraightGrad)(x),
    "grad_and_value": lambda x: ft.grad_and_value(total, interpreter=StraightGrad)(x)[0],
    "value_and_grad": lambda x: ft.value_and_grad(total, interpreter=StraightGrad)(x)[1],
    "vjp": lambda x: ft.vjp(ours, x, interpreter=StraightGrad)[1](torch.ones_like(x))[0],
    "jacrev": lambda x: ft.jacrev(ours, interpreter=StraightGrad)(x).diagonal(),
    "jacrev in chunks": lambda x: ft.jacrev(ours, interpreter=StraightGrad, chunk_size=1)(x).diagonal(),
    "jacrev_and_value": lambda x: ft.jacrev_and_value(ours, interpreter=StraightGrad)(x)[0].diagonal(),
    "grad of vmap": lambda x: ft.grad(lambda x: ft.vmap(ours)(x).sum(), interpreter=StraightGrad)(x),
    "vmap of grad": lambda x: ft.vmap(ft.grad(ours, interpreter=StraightGrad))(x),
    "with aux": lambda x: ft.grad(lambda x: (total(x), x), has_aux=True, interpreter=StraightGrad)(x)[0],
}
FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "jvp": lambda x: ft.jvp(ours, (x,), (torch.ones_like(x),), interpreter=StraightJvp)[1],
    "jacfwd": lambda x: ft.jacfwd(ours, interpreter=StraightJvp)(x).diagonal(),
    "jacfwd_and_value": lambda x: ft.jacfwd_and_value(ours, interpreter=StraightJvp)(x)[0].diagonal(),
    "linearize": lambda x: ft.linearize(ours, x, interpreter=StraightJvp)[1](torch.ones_like(x)),
    "vmap of jvp": lambda x: ft.vmap(lambda x: ft.jvp(ours, (x,), (x * 0 + 1,), interpreter=StraightJvp)[1])(x),
}


@pytest.mark.parametrize("name", [*REVERSE, *FORWARD])
def test_a_derivative_of_ones_own(name: str) -> None:
    torch.testing.assert_close({**REVERSE, **FORWARD}[name](X), slope(X))
    assert not torch.allclose(ft.grad(total)(X), slope(X)), "the oracle is another derivative than the plain one"


@pytest.mark.parametrize("inner", [REVERSE["grad"], FORWARD["jvp"]], ids=["grad", "jvp"])
@pytest.mark.parametrize("outer", ["grad", "jvp"])
def test_two_levels_of_ones_own(outer: str, inner: Callable[[Tensor], Tensor]) -> None:
    """Both are straight through: so is a pass of PyTorch's autograd through the gradient that the oracle left."""
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(oracle(x).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), x)
    if outer == "grad":
        found = ft.grad(lambda x: inner(x).sum(), interpreter=StraightGrad)(X)
    else:
        found = ft.jvp(inner, (X,), (torch.ones_like(X),), interpreter=StraightJvp)[1]
    torch.testing.assert_close(found, expected)


def noting(base: Any, asked: list[Any]) -> Any:
    class Noting(base):  # type: ignore[misc]
        kind = "noting"

        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            asked.append(op)
            return super().process(op, args, kwargs)

    return Noting


def pointwise(x: Tensor) -> Tensor:
    """What is interpreted as programs otherwise, by every spelling; no operator of it is composite."""
    y = torch.sin(x) * x + 2.0
    y = y / (1.0 + y.exp()) - torch.tanh(-y)
    return torch.nn.functional.gelu(y).sigmoid() ** 2


BASES: dict[str, Callable[[Any, Any], Any]] = {
    "grad": lambda f, noted: ft.grad(lambda x: f(x).sum(), interpreter=noted(GradInterpreter))(X),
    "jvp": lambda f, noted: ft.jvp(f, (X,), (X,), interpreter=noted(JvpInterpreter)),
    "vmap": lambda f, noted: ft.vmap(f, interpreter=noted(VmapInterpreter))(X),
    "grad in vmap": lambda f, noted: ft.vmap(ft.grad(f, interpreter=noted(GradInterpreter)))(X),
    "vmap in jvp": lambda f, noted: ft.jvp(ft.vmap(f, interpreter=noted(VmapInterpreter)), (X,), (X,)),
}


@pytest.mark.parametrize("name", BASES)
def test_it_is_asked_about_every_operator(name: str) -> None:
    asked: list[Any] = []
    BASES[name](pointwise, lambda base: noting(base, asked))
    with Listing() as plain:
        pointwise(X)
    assert [op for op in asked if op is not aten.sum.default] == plain.ops
    assert len(plain.ops) > 10


BELOW: dict[str, Callable[[Any, Any], Any]] = {
    "vmap": lambda f, noted: ft.vmap(ft.grad(f), interpreter=noted(VmapInterpreter))(X),
    "jvp": lambda f, noted: ft.jvp(ft.vmap(ft.grad(f)), (X,), (X,), interpreter=noted(JvpInterpreter)),
    "grad": lambda f, noted: ft.grad(lambda x: ft.vmap(ft.grad(f))(x).sum(), interpreter=noted(GradInterpreter))(X),
}


@pytest.mark.parametrize("name", BELOW)
def test_below_another_level_no_program_arrives(name: str) -> None:
    asked: list[Any] = []
    BELOW[name](pointwise, lambda base: noting(base, asked))
    assert len(asked) > 20
    assert all(isinstance(op, torch._ops.OpOverload) for op in asked)


@pytest.mark.parametrize("name", BASES)
def test_captured_tensors_are_for_those_who_ask_for_them(name: str) -> None:
    captured = torch.ones((), dtype=X.dtype)
    f = lambda x: x * torch.cos(captured) + torch.ones(())
    expected = BASES[name](f, lambda base: base)
    for sees, extra in ((False, []), (True, [aten.cos.default, aten.ones.default])):
        asked: list[Any] = []
        noted = lambda base, asked=asked, sees=sees: type("Sees", (noting(base, asked),), {"sees_everything": sees})
        torch.testing.assert_close(BASES[name](f, noted), expected)
        assert [op for op in asked if op in (aten.cos.default, aten.ones.default)] == extra


def test_whole_programs_are_for_those_who_ask_for_them() -> None:
    asked: list[Any] = []

    class Whole(GradInterpreter, whole=True):
        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            asked.append(op)
            return super().process(op, args, kwargs)

    torch.testing.assert_close(ft.vmap(ft.grad(pointwise, interpreter=Whole))(X), ft.vmap(ft.grad(pointwise))(X))
    assert any(hasattr(op, "instructions") for op in asked)


class Counting(VmapInterpreter):
    """Counts the operators that run once per example."""

    kind = "counting vmap"
    looped: list[Any]

    def loop(self, op: Any, args: Any, kwargs: Any) -> Any:
        self.looped.append((op, self.batch_size))
        return super().loop(op, args, kwargs)


@torch.library.custom_op("own_interpreters::centered", mutates_args=())
def centered(x: Tensor) -> Tensor:
    return x - x.mean()


OP = torch.ops.own_interpreters.centered.default


def test_a_vmap_that_counts_its_loops() -> None:
    Counting.looped = []
    rows = torch.arange(12.0).view(4, 3) ** 2
    f = lambda x: centered(x.sin()) * x
    expected = torch.stack([f(x) for x in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ft.vmap(f, interpreter=Counting)(rows), expected)
        assert Counting.looped == [(OP, 4)]
        torch.testing.assert_close(ft.vmap(f, interpreter=Counting, chunk_size=3)(rows), expected)
        assert Counting.looped == [(OP, 4), (OP, 3), (OP, 1)]
        torch.testing.assert_close(ft.chunk_vmap(f, interpreter=Counting)(rows), expected)
        assert Counting.looped == [(OP, 4), (OP, 3), (OP, 1), (OP, 2), (OP, 2)]
        torch.testing.assert_close(ft.chunk_vmap(f, interpreter=Counting, chunks=1)(rows), expected)
        assert Counting.looped[-1] == (OP, 4)


def test_methods_of_functions_run_at_the_same_kind_of_level() -> None:
    class Centering(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return centered(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return centered(grad)

    Counting.looped = []
    rows = torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slopes = ft.vmap(ft.grad(lambda x: Centering.apply(x)[0] ** 2 / 2), interpreter=Counting)(rows)
    first = rows[:, :1] - rows.mean(1, keepdim=True)
    torch.testing.assert_close(slopes, first * torch.tensor([2 / 3, -1 / 3, -1 / 3]))
    assert Counting.looped == [(OP, 4), (OP, 4)]


def test_hooks_and_a_walk_back_of_ones_own() -> None:
    """``add_hook`` sees cotangents; a ``pull`` that is overridden is used, where Jacobians take a short way, too."""
    seen, walks = [], []

    class Walking(GradInterpreter):
        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            out = super().process(op, args, kwargs)
            if op is aten.sin.default:
                self.add_hook(out, lambda grad: (seen.append(grad), 2 * grad)[1])
            return out

        def pull(self, cotangents: Any, *, consume: bool, end: int | None = None) -> Any:
            walks.append(end)
            return super().pull(cotangents, consume=consume, end=end)

    x = torch.tensor([0.5, 1.0])
    torch.testing.assert_close(ft.grad(lambda x: (x.sin() * 3).sum(), interpreter=Walking)(x), 6 * x.cos())
    assert len(seen) == 1 and seen[0].tolist() == [3.0, 3.0] and len(walks) == 1
    matrix = torch.randn(2, 2)
    walks.clear()
    torch.testing.assert_close(ft.jacrev(lambda x: matrix @ x, interpreter=Walking)(x), matrix)
    assert walks == [None]


GRAD, VMAP, JVP = "a subclass of GradInterpreter", "a subclass of VmapInterpreter", "a subclass of JvpInterpreter"
WANTED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{
        name: (GRAD, lambda cls, name=name: getattr(ft, name)(total, interpreter=cls))
        for name in ("grad", "grad_and_value", "value_and_grad", "jacrev", "jacrev_and_value")
    },
    "vjp": (GRAD, lambda cls: ft.vjp(ours, X, interpreter=cls)),
    **{
        name: (JVP, lambda cls, name=name: getattr(ft, name)(total, interpreter=cls))
        for name in ("jacfwd", "jacfwd_and_value")
    },
    "jvp": (JVP, lambda cls: ft.jvp(ours, (X,), (X,), interpreter=cls)),
    "linearize": (JVP, lambda cls: ft.linearize(ours, X, interpreter=cls)),
    "vmap": (VMAP, lambda cls: ft.vmap(ours, interpreter=cls)),
    "chunk_vmap": (VMAP, lambda cls: ft.chunk_vmap(ours, interpreter=cls)),
}
DERIVED = {GRAD: StraightGrad, VMAP: Counting, JVP: StraightJvp}


@pytest.mark.parametrize("name", WANTED)
def test_another_class_is_refused(name: str) -> None:
    expected, call = WANTED[name]
    before = thread_state()
    for cls in (*DERIVED.values(), extend.TableInterpreter, extend.PassThrough, extend.Interpreter, int, None, "grad"):
        if cls is DERIVED[expected]:
            continue
        with pytest.raises(CallTypeError) as caught:
            call(cls)
        assert f"as interpreter; expected {expected}." in str(caught.value)
        assert str(caught.value).startswith(f"{name}(") and f"interpreter={getattr(cls, '__name__', repr(cls))}" in str(
            caught.value
        )
        assert thread_state() == before


def test_the_cure_says_what_runs_the_class() -> None:
    def text(cls: Any) -> str:
        with pytest.raises(CallTypeError) as caught:
            ft.grad(torch.sum, interpreter=cls)
        return str(caught.value)

    start = "grad(sum, argnums=0, interpreter={}): got {} as interpreter; expected a subclass of GradInterpreter."
    assert text(StraightJvp) == start.format("StraightJvp", "the class StraightJvp") + (
        " Derive it from GradInterpreter."
    )
    assert text(extend.Handler) == start.format("Handler", "the class Handler") + (
        " It is run by functrans.extend.transform(Handler, func)."
    )
    assert text(3) == start.format("3", "the int 3")
    instance = StraightGrad(torch.sum)
    assert text(instance).endswith("Pass the class, of which each call makes one.")


def test_it_is_shown_by_its_own_name() -> None:
    shown = []
    ft.grad(lambda x: (shown.append(repr(x)), x.sum())[1], interpreter=StraightGrad)(X)
    assert "straight grad" in shown[0]


def test_compiled() -> None:
    f = torch.compile(lambda x: ft.vmap(ft.grad(ours, interpreter=StraightGrad))(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(f(X), slope(X))
    transform(extend.Handler, lambda: None)()  # nothing is left on the stack
    assert extend.interpreter_stack() == []


ROW = torch.tensor([0.3, 1.7, -2.2], dtype=torch.float64)


class WrongNode(BackwardNode):
    op = "wrong"

    def __init__(self, returned: Callable[[Tensor], Any]) -> None:
        self.returned = returned

    def pull(self, saved: Any, grad: Any) -> Any:
        return self.returned(grad)


def wrong_grad(returned: Callable[[Tensor], Any]) -> type[GradInterpreter]:
    class Wrong(GradInterpreter):
        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            index = self.index_of(args[0]) if op is aten.round.default else None
            if index is None:
                return super().process(op, args, kwargs)
            out = self.track(lower(self, op, (args[0].value,), kwargs))
            self.record(WrongNode(returned), out.tape_index, [index], [])
            return out

    return Wrong


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda g: [g.sum()], r"tensor of shape \(\) as what pull returned; expected a tensor of the argument's shape"),
        (lambda g: [1.0], "a float as what pull returned"),
        (lambda g: g, "a Tensor as what pull returned; expected a list of 1"),
        (lambda g: None, "a NoneType as what pull returned"),
        (lambda g: [g, g], "2 cotangents as what pull returned"),
    ],
)
def test_a_node_returns_what_fits(returned: Callable[[Tensor], Any], message: str) -> None:
    program = lambda x: (x.sin().round() * x).sum()  # further on, a number would be broadcast
    with pytest.raises(RuleResultError, match=message) as caught:
        ft.grad(program, interpreter=wrong_grad(returned))(ROW)
    assert "test_own_interpreters.py:" in str(caught.value) and interpreter_stack() == []


def test_a_node_may_return_what_broadcasting_made_of_it() -> None:
    found = ft.grad(lambda x: x.round().sum(), interpreter=wrong_grad(lambda g: [g.expand(5, *g.shape)]))(ROW)
    assert torch.equal(found, torch.full_like(ROW, 5.0))


@pytest.mark.parametrize("tangent", [lambda t: t.sum(), lambda t: 1.0, lambda t: t.float()])
def test_a_tangent_fits(tangent: Callable[[Tensor], Any]) -> None:
    class Wrong(JvpInterpreter):
        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            if op is not aten.round.default:
                return super().process(op, args, kwargs)
            return self.dual(lower(self, op, (args[0].value,), kwargs), tangent(args[0].tangent))

    with pytest.raises(RuleResultError, match=r"as tangent; expected a torch.float64 tensor of shape"):
        ft.jvp(lambda x: x.round().sin(), (ROW,), (ROW,), interpreter=Wrong)


@pytest.mark.parametrize(("size", "bdim"), [(None, 1), (2, 0)])
def test_a_batch_fits(size: int | None, bdim: int) -> None:
    class Wrong(VmapInterpreter):
        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            if op is not aten.round.default:
                return super().process(op, args, kwargs)
            return self.batched(args[0].value.round()[:size], bdim)

    rows = torch.stack([ROW] * (len(ROW) + 1))
    with pytest.raises(RuleResultError, match=r"as a physical value; expected the size of the batch"):
        ft.vmap(lambda x: x.round() * 2, interpreter=Wrong)(rows)
