"""What is the same tensor, what a view and of what: beside eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrans import functionalize, grad, jvp, vmap
from functrans.errors import InsideTransformError

X = torch.arange(6.0)


def views(x: Tensor) -> list[Tensor]:
    """Tensors, many of which share memory."""
    y, z = x * 2, torch.zeros(4)
    part, square = y[1:], y.reshape(2, 3)
    column = part.view(5, 1)
    detached, detached_part, data = y.detach(), part.detach(), column.data
    with torch.no_grad():
        unrecorded = y[2:]
    found = [x, y, z, part, square, column, column.t(), detached, detached[0], detached_part, detached_part[1:], data]
    found += [data.view(-1), unrecorded, y.clone(), square.t().reshape(6), y.expand(2, 6), y.split(2)[1], y.view_as(y)]
    found += [torch.view_as_complex(y.view(3, 2)), y[torch.tensor([0, 1])], y[None], y.as_strided((2,), (1,))]
    turned = z.view(2, 2)
    found += [turned, z.unsqueeze_(0), z[0], turned.t_(), turned[0]]
    part.mul_(2)
    found += [y[:2], torch.broadcast_to(y, (2, 6)), torch.movedim(square, 0, 1), y.unfold(0, 2, 1)]
    z.data = torch.ones(3)
    parameter = nn.Parameter(y.detach())
    return [*found, z[0], parameter, parameter[0]]


ITSELF: dict[str, Callable[[Tensor], Tensor]] = {
    "to a dtype": lambda y: y.to(torch.float32),
    "to a device": lambda y: y.to("cpu"),
    "to another's": lambda y: y.to(y),
    "to a copy": lambda y: y.to(torch.float32, copy=True),
    "to float64": lambda y: y.double(),
    "type": lambda y: y.type(torch.float32),
    "type_as": lambda y: y.type_as(y),
    "contiguous": lambda y: y.contiguous(),
    "contiguous columns": lambda y: y.contiguous(memory_format=torch.contiguous_format),
    "real": lambda y: y.real,
    "conj": lambda y: y.conj(),
    "conj_physical": lambda y: y.conj_physical(),
    "resolve_conj": lambda y: y.resolve_conj().resolve_neg(),
    "positive": lambda y: +y,
    "flatten": lambda y: y.flatten(),
    "flatten of two": lambda y: y.view(2, 3).flatten(),
    "reshape": lambda y: y.reshape(6),
    "as_tensor": lambda y: torch.as_tensor(y),
    "atleast_1d": lambda y: torch.atleast_1d(y),
    "sum_to_size": lambda y: y.sum_to_size((6,)),
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, torch.ones(()))[0],
    "expand": lambda y: y.expand(6),
    "to_dense": lambda y: y.to_dense(),
    "dropout": lambda y: F.dropout(y, 0.5, training=False),
    "squeeze": lambda y: y.squeeze(),
    "in place": lambda y: y.mul_(2),
    "out": lambda y: torch.sin(y, out=y),
}


def bases(found: list[Tensor]) -> list[Any]:
    """By tensor: whether it is a view, and which one its base is."""
    named = {id(x): i for i, x in enumerate(found)}
    return [(x._is_view(), None if x._base is None else named[id(x._base)]) for x in found]


def kinship(x: Tensor) -> dict[str, Any]:
    def how(y: Tensor, of: Tensor) -> str:
        return "itself" if y is of else "no view" if y._base is None else "a view" if y._base is of else "another's"

    fresh = {name: x * 1 for name in ITSELF}
    return {name: how(f(fresh[name]), fresh[name]) for name, f in ITSELF.items()}


def inside(look: Callable[[Tensor], Any]) -> dict[str, Any]:
    """What ``look`` sees in each transform."""
    seen: dict[str, Any] = {}

    def noting(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: (seen.__setitem__(name, look(x)), x.sum())[1]

    grad(noting("grad"))(X)
    vmap(noting("vmap"))(torch.stack([X, -X]))
    vmap(grad(noting("vmap of grad")))(torch.stack([X, -X]))
    grad(lambda x: vmap(noting("grad of vmap"))(torch.stack([x, -x])).sum())(X)
    jvp(noting("jvp"), (X,), (X,))
    functionalize(noting("functionalize"))(X)
    functionalize(noting("functionalize without views"), remove="mutations_and_views")(X)
    return seen


@pytest.mark.parametrize("look", [lambda x: bases(views(x)), kinship], ids=["views", "itself"])
def test_beside_eager(look: Callable[[Tensor], Any]) -> None:
    expected = look(X.clone())
    for name, found in inside(look).items():
        assert found == expected, name


def test_of_what_was_there_before() -> None:
    """An argument is a tensor of its own; views of captured tensors and of outer arguments are views of these."""
    captured = torch.ones(3)

    def f(x: Tensor) -> Tensor:
        assert x._base is None and not x._is_view()
        assert captured[0]._base is captured and captured[1:]._is_view()

        def inner(y: Tensor) -> Tensor:
            part = x[:3]
            assert part._base is x and not y._is_view()
            return (part * y[:3]).sum()

        return grad(inner)(x * 1).sum()

    grad(f)(X[:])
    vmap(f)(torch.stack([X, X]))


def test_hooks_see_what_is_returned_as_it_is() -> None:
    """A hook on what ``to`` returns is one on its argument, of which other results are made, too."""

    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.to(torch.float32).register_hook(lambda g: g * 10)
        return (y * y).sum()

    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(grad(f)(X), expected)
    torch.testing.assert_close(vmap(grad(f))(torch.stack([X, -X])), torch.stack([expected, -expected]))


def test_a_class_of_the_users() -> None:
    class Marked(Tensor):
        pass

    def f(x: Tensor) -> Tensor:
        y = x * 2
        part: Any = y[1:]
        assert isinstance(part._base, Marked) and torch.equal(part._base.detach(), y.detach()) and not y._is_view()
        return y.sum().as_subclass(Tensor)

    grad(f)(X.as_subclass(Marked))


def test_what_the_batch_hides_is_refused() -> None:
    with pytest.raises(InsideTransformError, match="has viewed or copied, which the batch hides, inside vmap"):
        vmap(lambda x: x.sin().flatten()._is_view(), in_dims=1)(torch.ones(2, 3, 4))
