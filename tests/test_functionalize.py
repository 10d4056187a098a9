"""functionalize: the same results, and nothing below it that writes, or views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import difference
from recorder import Listing
from test_writes import PROGRAMS, X, Y, close, numeric_jacobian
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from wrong_calls import thread_state

from functrans import functionalize, grad, hessian, jacrev, jvp, linearize, vjp, vmap
from functrans.errors import FunctransError
from functrans.operators.info import VIEW, WRITE, op_info

REMOVE = ("mutations", "mutations_and_views")
XS = torch.stack([X, Y, -X])


@pytest.fixture(autouse=True)
def the_thread_is_as_before() -> Any:
    before = thread_state()
    yield
    assert thread_state() == before


@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("f", PROGRAMS)
def test_programs_that_write(f: Callable[[Tensor], Tensor], remove: str) -> None:
    pure = functionalize(f, remove=remove)
    with Listing() as seen:
        out = pure(X)
    assert not difference(out, f(X))
    assert out.stride() == f(X).stride()
    forbidden = {WRITE} if remove == "mutations" else {WRITE, VIEW}
    assert [op for op in seen.ops if op_info(op).kind_by_schema in forbidden] == []
    graph = make_fx(pure)(X)
    for x in XS:
        assert not difference(graph(x), f(x)) or "setitem_by_mask" in f.__name__
    called = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert called and not {op_info(op).kind_by_schema for op in called} & forbidden


@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("f", PROGRAMS)
def test_inside_and_around_other_transforms(f: Callable[[Tensor], Tensor], remove: str) -> None:
    def pure(g: Callable[..., Any]) -> Callable[..., Any]:
        return functionalize(g, remove=remove)

    jacobian = numeric_jacobian(f, X)
    loss = lambda x: (f(x) * Y).sum()
    for gradient in (grad(pure(loss)), pure(grad(loss)), pure(grad(pure(loss)))):
        close(gradient(X), Y @ jacobian)
    for moved in (lambda x: jvp(pure(f), (x,), (Y,))[1], pure(lambda x: jvp(f, (x,), (Y,))[1])):
        close(moved(X), jacobian @ Y)
    close(linearize(pure(f), X)[1](Y), jacobian @ Y)
    close(pure(lambda x: vjp(f, x)[1](Y)[0])(X), Y @ jacobian)
    rows = torch.stack([f(x) for x in XS])
    for batched in (vmap(pure(f)), pure(vmap(f)), pure(vmap(pure(f)))):
        assert not difference(batched(XS), rows)
    each = torch.stack([Y @ numeric_jacobian(f, x) for x in XS])
    for gradients in (vmap(pure(grad(loss))), pure(vmap(grad(loss))), vmap(grad(pure(loss)))):
        close(gradients(XS), each)


@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("f", PROGRAMS)
def test_pytorchs_own_autograd_goes_through(f: Callable[[Tensor], Tensor], remove: str) -> None:
    x = X.clone().requires_grad_()
    (functionalize(f, remove=remove)(x) * Y).sum().backward()
    close(x.grad, Y @ numeric_jacobian(f, X))


@pytest.mark.parametrize("remove", REMOVE)
def test_below_other_transforms_it_sees_what_they_do(remove: str) -> None:
    """Derivatives, batching rules and formulas run at its level."""

    def f(x: Tensor) -> Tensor:
        y = x.clone()
        y[1:].mul_(x[:-1].sin())
        return (y.view(3, 1) @ y.view(1, 3)).diagonal().prod()

    with Listing() as seen:
        out = functionalize(vmap(hessian(f)), remove=remove)(XS)
    close(out, torch.stack([hessian(f)(x) for x in XS]))
    forbidden = {WRITE} if remove == "mutations" else {WRITE, VIEW}
    assert [op for op in seen.ops if op_info(op).kind_by_schema in forbidden] == []


@pytest.mark.parametrize("remove", REMOVE)
def test_a_written_argument_is_written_once_at_the_end(remove: str) -> None:
    def f(x: Tensor, others: Any) -> Any:
        x.view(-1)[1:].mul_(2)
        others["y"].add_(x)
        return x, others["y"] * 1

    x, y = X.clone(), Y.clone()
    with Listing() as seen:
        out = functionalize(f, remove=remove)(x, others={"y": y})
    expected_x = torch.cat([X[:1], 2 * X[1:]])
    close(x, expected_x)
    close(y, Y + expected_x)
    assert out[0] is x
    close(out[1], y)
    assert {op for op in seen.ops if op_info(op).kind_by_schema == WRITE} == {torch.ops.aten.copy_.default}


def test_a_tensor_that_is_passed_twice_is_one() -> None:
    def f(x: Tensor, y: Tensor, d: dict[str, Tensor]) -> Tensor:
        x.mul_(2)
        return y + d["x"]

    x = X.clone()
    close(functionalize(f)(x, x, {"x": x}), 4 * X)
    close(x, 2 * X)


def test_what_follows_a_view_does_not_see_that_it_is_a_copy() -> None:
    def f(x: Tensor) -> Any:
        m = torch.outer(x, x)
        t = m.t()
        flat = t.reshape(-1)  # a copy, since t is not contiguous
        flat.zero_()
        row = m[1]
        row.mul_(2)  # seen through t
        rows = m[1:].unsqueeze(0)
        return m, t, flat, rows, t.stride(), t.is_contiguous(), row.storage_offset()

    assert not difference(functionalize(f, remove="mutations_and_views")(X), f(X))
    with pytest.raises(FunctransError, match="as_strided"):
        functionalize(lambda x: torch.outer(x, x).t().as_strided((3,), (1,)), remove="mutations_and_views")(X)
    strided = functionalize(lambda x: (2 * x).as_strided((2,), (2,)), remove="mutations_and_views")(X)
    assert torch.equal(strided, 2 * X[::2])


@pytest.mark.parametrize("remove", REMOVE)
def test_detach_cuts(remove: str) -> None:
    f = functionalize(lambda x: (x.detach() * x).sum(), remove=remove)
    x = X.clone().requires_grad_()
    f(x).backward()
    close(x.grad, X)
    close(grad(f)(X), X)
    close(jvp(f, (X,), (Y,))[1], (X * Y).sum())
    assert not functionalize(torch.detach, remove=remove)(x).requires_grad
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, Y)
        moved = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
    close(moved, (X * Y).sum())


@pytest.mark.parametrize("remove", REMOVE)
def test_a_network_in_training(remove: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 2)
    )  # fmt: skip
    z = torch.randn(4, 1, 5)
    before = net[1].running_mean.clone()
    torch.manual_seed(1)
    out = functionalize(net, remove=remove)(z)
    mean = net[1].running_mean.clone()
    with torch.no_grad():
        net[1].running_mean.copy_(before)
    torch.manual_seed(1)
    torch.testing.assert_close(out, net(z))
    torch.testing.assert_close(mean, net[1].running_mean)
    assert not torch.equal(mean, before)
    gradient = grad(lambda z: functionalize(net.eval(), remove=remove)(z).sum())(z)
    torch.testing.assert_close(gradient, grad(lambda z: net(z).sum())(z))


@pytest.mark.parametrize("remove", REMOVE)
def test_functions_with_a_derivative_of_their_own(remove: str) -> None:
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent.clamp(-1, 1)

    f = functionalize(lambda x: (Clip.apply(x) * 5).sum(), remove=remove)
    x = X.clone().requires_grad_()
    f(x).backward()
    close(x.grad, torch.ones_like(X))
    close(grad(f)(X), torch.ones_like(X))


def test_other_values_keyword_arguments_and_captured_tensors() -> None:
    captured = Y.clone()

    def f(x: Tensor, n: int, *, flag: bool = False) -> Any:
        captured.add_(x)
        return {"n": n + 1, "flag": flag, "x": x.mul(captured), "none": None}

    out = functionalize(f)(X, 3, flag=True)
    assert (out["n"], out["flag"], out["none"]) == (4, True, None)
    close(captured, X + Y)
    close(out["x"], X * (X + Y))
    assert functionalize(lambda x: float(x.sum()))(X) == float(X.sum())


def test_errors_pass_and_leave_the_thread_as_it_was() -> None:
    def f(x: Tensor) -> Tensor:
        x.mul_(2)
        raise ZeroDivisionError

    x = X.clone()
    with pytest.raises(ZeroDivisionError):
        functionalize(f)(x)
    kept: list[Tensor] = []
    functionalize(lambda x: kept.append(x * 2))(X)
    with pytest.warns(UserWarning, match="after that transform had ended"):  # one value, which is taken
        torch.testing.assert_close(kept[0] + 1, 2 * X + 1)
    with pytest.warns(UserWarning, match="after that transform had ended"):
        torch.testing.assert_close(jacrev(functionalize(lambda x: x + kept[0]))(X), jacrev(torch.clone)(X))
