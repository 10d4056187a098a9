"""Tensors of transforms that have ended, or that run in another thread: what may be read, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from slow_ways import close
from torch import Tensor, nn

from functrans import functionalize, grad, hessian, jacrev, jvp, linear_transpose, linearize, vjp, vmap
from functrans.errors import DeadWrapperError, FunctransError, ModifiedError, OtherThreadError

F64 = torch.float64
exactly = partial(close, rtol=1e-12, atol=1e-12)
X = torch.tensor([0.5, -1.2, 2.0], dtype=F64)
ROWS = torch.stack([X, 2 * X])
ENDED = "was used after that transform had ended"


def left_by(transformed: Callable[[Callable[[Tensor], Tensor]], Any], function: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``function`` returned inside of a transform that has ended."""
    kept: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        kept.append(function(x))
        return x.sum()

    transformed(f)
    return kept[0]


OF_ONE_VALUE: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: grad(f)(X),
    "vjp": lambda f: vjp(f, X),
    "jvp": lambda f: jvp(f, (X,), (X,)),
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).sum())(X),
    "hessian": lambda f: hessian(lambda x: jvp(f, (x,), (x,))[1])(X),
    "functionalize": lambda f: functionalize(f)(X),
    "grad inside linearize": lambda f: linearize(grad(f), X),
}
BATCHED: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "vmap": lambda f: vmap(f)(ROWS),
    "vmap of grad": lambda f: vmap(grad(f))(ROWS),
    "grad of vmap": lambda f: grad(lambda rows: vmap(f)(rows).sum())(ROWS),
    "vmap of jvp": lambda f: vmap(lambda x: jvp(f, (x,), (x,))[0])(ROWS),
}
USES: dict[str, Callable[[Any], Any]] = {
    "program": lambda t: t * 2 + 1,
    "with a plain tensor": lambda t: X * t,
    "operator": lambda t: torch.cumsum(t, 0),
    "several": lambda t: torch.stack([t, X, t]),
    "view": lambda t: t[1:].view(-1, 1),
    "numbers": lambda t: (t.tolist(), float(t.sum()), t.detach().numpy().tolist()),
    "captured by vmap": lambda t: vmap(lambda row: row * t)(ROWS),
    "captured by grad": lambda t: grad(lambda x: (x * t).sum())(X),
    "captured by jvp": lambda t: jvp(lambda x: x * t, (X,), (X,)),
    "argument of vmap": lambda t: vmap(torch.sin)(t),
    "argument of grad": lambda t: grad(lambda x, y: (x * y).sum())(t, t),
    "tangent": lambda t: jvp(torch.sin, (X,), (t,)),
    "returned": lambda t: grad(lambda x: (x.sum(), t), has_aux=True)(X),
    "returned by vmap": lambda t: vmap(lambda x: t)(X),
    "of a Function": lambda t: grad(lambda x: Scaled.apply(x, t).sum())(X),
    "of a module": lambda t: nn.functional.linear(t, ROWS),
}


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return x * t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.saved_tensors[0], None


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", OF_ONE_VALUE)
def test_a_tensor_of_one_value_is_read_as_a_constant(name: str, use: str) -> None:
    left = left_by(OF_ONE_VALUE[name], lambda x: x.sin() * 2)
    with pytest.warns(UserWarning, match=ENDED) as caught:
        found = USES[use](left)
    exactly(found, USES[use](X.sin() * 2))
    assert all(w.filename == __file__ for w in caught)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", BATCHED)
def test_a_batched_one_is_refused(name: str, use: str) -> None:
    left = left_by(BATCHED[name], lambda x: x.sin() * 2)
    with pytest.raises(DeadWrapperError, match=ENDED), warnings.catch_warnings():
        warnings.simplefilter("error")
        USES[use](left)


def test_outer_derivatives_go_on() -> None:
    """The value is of the level around, which follows it."""

    def f(x: Tensor) -> Tensor:
        left = left_by(lambda g: grad(g)(x), torch.sin)
        return (left * x).sum()

    with pytest.warns(UserWarning, match=ENDED):
        exactly(grad(f)(X), X.cos() * X + X.sin())
    with pytest.warns(UserWarning, match=ENDED):
        exactly(vmap(grad(f))(ROWS), ROWS.cos() * ROWS + ROWS.sin())
    with pytest.warns(UserWarning, match=ENDED):
        exactly(jvp(f, (X,), (X,))[1], ((X.cos() * X + X.sin()) * X).sum())


def test_parameters_that_a_function_keeps_in_a_dict() -> None:
    """As dattri does: a step of its own optimizer, kept for the next call."""
    store = {"w": X.clone()}

    def loss(x: Tensor) -> Tensor:
        w = store["w"] - 0.1 * store["w"] * x.detach()
        store["w"] = w
        return (w * x).sum()

    def steps() -> None:
        expected = X.clone()
        for _ in range(3):
            expected = expected - 0.1 * expected * X
            exactly(grad(loss)(X), expected)

    with pytest.warns(UserWarning, match=ENDED):
        steps()


def test_it_is_said_once_at_each_place() -> None:
    left = left_by(lambda f: grad(f)(X), torch.sin)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            left + 1
    assert len(caught) == 1 and f"It was made at {__file__}" in str(caught[0].message)


def test_what_is_written_or_was_written_since_is_refused() -> None:
    left = left_by(lambda f: grad(f)(X), torch.sin)
    for write in (lambda t: t.add_(1), lambda t: t.zero_(), lambda t: torch.sin(X, out=t), lambda t: t.unsqueeze_(0)):
        with pytest.raises(DeadWrapperError, match=ENDED):
            write(left)
    kept: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        y = x * 1
        kept.append(y[0])
        y.mul_(3)
        return y.sum()

    grad(f)(X)
    with pytest.raises(DeadWrapperError, match=ENDED):
        kept[0] + 1


def test_values_that_say_nothing_are_refused() -> None:
    """A transpose runs its function on zeros."""
    kept: list[Tensor] = []
    linear_transpose(lambda x: (kept.append(2 * x), 3 * x)[1], X)
    with pytest.raises(DeadWrapperError):
        kept[0] + 1


def test_a_pullback_outlives_the_grad_in_which_it_was_recorded() -> None:
    kept: list[Any] = []

    def f(x: Tensor) -> Tensor:
        out, pullback = vjp(lambda y: (y**3 + y.sin()) * torch.stack([*y]), x)
        kept.append(pullback)
        return out.sum()

    for transform in (grad, jacrev, lambda f: lambda x: jvp(f, (x,), (x,))):
        kept.clear()
        transform(f)(X)
        expected = vjp(lambda y: (y**3 + y.sin()) * y, X)[1]
        with pytest.warns(UserWarning, match=ENDED):
            exactly(kept[0](X), expected(X))
        with pytest.warns(UserWarning, match=ENDED):
            exactly(vmap(kept[0])(ROWS), vmap(expected)(ROWS))
    vmap(f)(ROWS)
    with pytest.raises(DeadWrapperError):
        kept[-1](X)
    x = X.clone()
    pullback = vjp(torch.sin, x)[1]
    x.mul_(2)
    with pytest.raises(ModifiedError):
        pullback(X)


# --- copies that leave


def test_pickling_and_loading_inside() -> None:
    net = nn.Linear(3, 2).double()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)

    def f(x: Tensor, w: Tensor) -> Tensor:
        file.seek(0)
        state = torch.load(file)
        other = copy.deepcopy(net)
        nn.init.zeros_(other.weight)
        other.load_state_dict(state)
        again = pickle.loads(pickle.dumps([w.detach(), net]))  # what says all of itself can be pickled
        inside = io.BytesIO()
        torch.save({"state": net.state_dict(), "weight": net.weight}, inside)
        inside.seek(0)
        kept = torch.load(inside)  # which takes plain tensors alone
        assert torch.equal(kept["weight"], net.weight) and kept["state"].keys() == state.keys()
        return (other(x) * again[1](x)).sum() + (again[0] * x).sum()

    expected = lambda x: (net(x) ** 2).sum() + (X * x).sum()
    exactly(grad(f)(X, X), grad(expected)(X))
    exactly(jvp(lambda x: f(x, X), (X,), (X,))[1], jvp(expected, (X,), (X,))[1])
    exactly(vmap(f, in_dims=(0, None))(ROWS, X), torch.stack([expected(row) for row in ROWS]).detach())
    exactly(grad(lambda x: (torch.from_dlpack(x.detach()) * x).sum())(X), X)
    exactly(grad(lambda x: (copy.deepcopy(net)(x) ** 2).sum())(X), grad(lambda x: (net(x) ** 2).sum())(X))


# --- threads

IN_THREADS: dict[str, Callable[[Tensor], Any]] = {
    "program": lambda x: x * 2,
    "operator": lambda x: torch.cumsum(x, 0),
    "view": lambda x: x[1:],
    "reshape": lambda x: x.reshape(3, 1),
    "detach": lambda x: x.detach(),
    "unbind": lambda x: list(x),
    "write": lambda x: x.add_(1),
    "setitem": lambda x: x.__setitem__(0, 1.0),
    "metadata": lambda x: x.unsqueeze_(0),
    "out": lambda x: torch.sin(x, out=torch.zeros(3, dtype=F64)),
    "number": lambda x: x.sum().item(),
    "captured": lambda x: vmap(lambda row: row * x)(ROWS),
    "argument": lambda x: grad(lambda y: y.sin().sum())(x),
    "Function": lambda x: Scaled.apply(x, X),
}


# (What two levels of the thread's own share with it is computed with, as a constant, by the level that it is of.)
@pytest.mark.parametrize("around", ["nothing", "a transform"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "functionalize"])
@pytest.mark.parametrize("how", IN_THREADS)
def test_a_tensor_used_in_another_thread_is_refused(how: str, transform: str, around: str) -> None:
    if around != "nothing" and how in ("captured", "argument"):
        pytest.skip("at a third level")
    errors: list[Any] = []

    def f(x: Tensor) -> Tensor:
        def work() -> None:
            try:
                if around == "nothing":
                    IN_THREADS[how](x)
                else:
                    grad(lambda y: (IN_THREADS[how](x), y.sum())[1])(X)
                errors.append(None)
            except FunctransError as error:
                errors.append(error)

        y = x * 1
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return (x + 0 * y).sum()

    transforms = {
        "grad": lambda: grad(f)(X),
        "vmap": lambda: vmap(f)(ROWS),
        "jvp": lambda: jvp(f, (X,), (X,)),
        "functionalize": lambda: functionalize(f)(X),
    }
    transforms[transform]()
    assert isinstance(errors[0], OtherThreadError), repr(errors[0])
