"""In-place ops, out=, setitem and writes through views: under every transform and composition, equal to eager."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Plain, difference

from functrans import FunctransError, grad, jvp, vjp, vmap
from functrans.errors import CapturedOnceError, CapturedWriteError

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
Y = torch.tensor([1.3, 0.2, -0.4], dtype=torch.float64)


def add(x: torch.Tensor) -> torch.Tensor:
    return x.sin().add_(x)


def several(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.mul_(x).sin_().add_(1, alpha=2)
    y -= x
    y **= 2
    return y


def setitem(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[0] = x[1] * x[2]
    y[1:] *= 2
    y[-1] = 0.5
    return y


def setitem_by_index(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[torch.tensor([2, 0])] = x[:2].sin()
    y[[1]] = x[0]
    return y * x


def setitem_by_mask(x: torch.Tensor) -> torch.Tensor:
    y = x * 3
    y[y > 0] = 0.25
    y[torch.tensor([True, False, False])] = x[1]
    return y * x


def buffer(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        out[i] = x[i] * x[(i + 1) % 3]
    return out


def matrix_buffer(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(2, 3, dtype=torch.float64)
    out[0] = x
    out[1].copy_(x.sin())
    out.t()[2].mul_(x[0])
    return out.sum(0)


def views(x: torch.Tensor) -> torch.Tensor:
    y = torch.outer(x, x)
    y.t()[0].add_(x)
    y.diagonal().mul_(2)
    y[1:].transpose(0, 1)[:, 0].copy_(x * x)
    y.view(9)[3:5].sin_()
    y.unsqueeze(0)[0, 2, 1:].fill_(0.5)
    return y.sum(1)


def view_made_before_the_write(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    tail = y[1:]
    y.mul_(x)
    tail.add_(1)
    y[2] = x[0]
    return y + tail.sum()


def view_of_view_and_sibling(x: torch.Tensor) -> torch.Tensor:
    y = torch.stack([x, x * 2])
    column, row = y[:, 1], y[1]
    row.add_(x)
    column.mul_(x[:2])
    return row + column.sum() + y.sum(0)


def out_argument(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    torch.mul(x, x, out=y)
    z = torch.zeros(3, dtype=torch.float64)
    torch.sin(y, out=z)
    torch.add(z, x, alpha=2, out=z)
    return z


def out_view(x: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(2, 3)
    torch.mul(x, 3, out=y[0])
    return y.sum(0) * x


def scatter_and_index_add(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.scatter_(0, torch.tensor([2]), x[:1])
    y.index_add_(0, torch.tensor([0, 0]), x[1:])
    y.index_copy_(0, torch.tensor([1]), x[2:])
    y.masked_fill_(torch.tensor([False, False, True]), 0.3)
    return y * x


def relu_inplace(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.relu(x * 2, inplace=True) + torch.nn.functional.silu(x.clone(), inplace=True)


def swap(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[0], y[1] = y[1].clone(), y[0].clone()
    return y * torch.arange(3.0, dtype=torch.float64)


def augmented_slices(x: torch.Tensor) -> torch.Tensor:
    y = x.expand(2, 3).clone()
    y[0, 1:] += y[1, :-1] * x[1:]
    y[:, 0] /= 2 + x[0] ** 2
    return y.sum(0)


def shape_changes(x: torch.Tensor) -> torch.Tensor:
    y = x.clone().unsqueeze_(0)
    y.transpose_(0, 1)
    y.mul_(x.unsqueeze(1))
    return y.squeeze_(1) if False else y.squeeze(1)


def zero_then_accumulate(x: torch.Tensor) -> torch.Tensor:
    total = x.sin()
    total.zero_()
    for k in range(3):
        total += x ** (k + 1)
    return total


PROGRAMS = [
    add, several, setitem, setitem_by_index, setitem_by_mask, buffer, matrix_buffer, views, view_made_before_the_write,
    view_of_view_and_sibling, out_argument, out_view, scatter_and_index_add, relu_inplace, swap, augmented_slices,
    shape_changes, zero_then_accumulate,
]  # fmt: skip


def numeric_jacobian(f: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    columns = [(f(x + 1e-6 * e) - f(x - 1e-6 * e)) / 2e-6 for e in torch.eye(x.numel(), dtype=x.dtype)]
    return torch.stack(columns, -1)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("f", PROGRAMS)
def test_under_one_transform(f: Callable[..., torch.Tensor]) -> None:
    jacobian = numeric_jacobian(f, X)
    close(grad(lambda x: (f(x) * Y).sum())(X), Y @ jacobian)
    value, pullback = vjp(f, X)
    assert not difference(value, f(X))
    close(pullback(Y)[0], Y @ jacobian)
    value, tangent = jvp(f, (X,), (Y,))
    assert not difference(value, f(X))
    close(tangent, jacobian @ Y)
    batch = torch.stack([X, Y, -X])
    assert not difference(vmap(f)(batch), torch.stack([f(row) for row in batch]))
    assert not difference(
        vmap(f, in_dims=1, out_dims=1)(batch.t().contiguous()), torch.stack([f(row) for row in batch], 1)
    )


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f: grad(lambda x: (f(x) * Y).sum()),
    "jvp": lambda f: lambda x: jvp(f, (x,), (Y,))[1],
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, x * Y])).sum(0),
}


@pytest.mark.parametrize("f", PROGRAMS)
@pytest.mark.parametrize("outer", TRANSFORMS)
@pytest.mark.parametrize("inner", TRANSFORMS)
def test_under_two_transforms(f: Callable[..., torch.Tensor], outer: str, inner: str) -> None:
    once = TRANSFORMS[inner](f)  # test_under_one_transform says that this is right
    if outer == "vmap":
        expected = torch.stack([once(X), once(X * Y)]).sum(0)
        assert not difference(TRANSFORMS[outer](once)(X), expected)
        return
    jacobian = numeric_jacobian(once, X)
    close(TRANSFORMS[outer](once)(X), Y @ jacobian if outer == "grad" else jacobian @ Y)


@pytest.mark.parametrize("f", PROGRAMS)
@pytest.mark.parametrize("order", list(itertools.permutations(["grad", "jvp", "vmap"])))
def test_under_three_transforms(f: Callable[..., torch.Tensor], order: tuple[str, ...]) -> None:
    inner = TRANSFORMS[order[1]](TRANSFORMS[order[2]](f))
    if order[0] == "vmap":
        assert not difference(TRANSFORMS["vmap"](inner)(X), inner(X) + inner(X * Y))
    else:
        jacobian = numeric_jacobian(inner, X)
        close(TRANSFORMS[order[0]](inner)(X), Y @ jacobian if order[0] == "grad" else jacobian @ Y)


# ---- whom a write reaches


def test_a_written_argument_is_written_for_the_caller() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        x.add_(1)
        return y.sum()

    for transformed in (
        grad(f),
        lambda x: vjp(f, x)[1](scalar())[0],
        lambda x: jvp(f, (x,), (torch.ones_like(x),)),
        lambda x: vmap(f)(x.unsqueeze(0) if x.dim() == 1 else x),
    ):
        x = X.clone()
        result = transformed(x)
        assert torch.equal(x, X + 1)
        if transformed is not None and isinstance(result, torch.Tensor) and result.shape == X.shape:
            torch.testing.assert_close(result, X.cos())  # the write comes after the sine


def scalar() -> torch.Tensor:
    return torch.tensor(1.0, dtype=torch.float64)


def test_gradient_of_a_function_that_writes_its_argument() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x.mul_(x)
        x[0] = x[1]
        return (x * Y).sum()

    x = X.clone()
    expected = torch.stack([0 * X[0], 2 * X[1] * (Y[0] + Y[1]), 2 * X[2] * Y[2]])
    torch.testing.assert_close(grad(f)(x), expected)
    torch.testing.assert_close(x, torch.stack([X[1] ** 2, X[1] ** 2, X[2] ** 2]))


def test_a_written_batched_argument_is_written_for_the_caller() -> None:
    batch = torch.stack([X, Y], 1)
    vmap(lambda x: x.mul_(x.sum()), in_dims=1)(batch)
    torch.testing.assert_close(batch, torch.stack([X * X.sum(), Y * Y.sum()], 1))
    parts = {"a": X.clone(), "b": [Y.clone()]}
    grad(lambda p: (p["a"].add_(1) * p["b"][0].mul_(2)).sum())(parts)
    torch.testing.assert_close(parts["a"], X + 1)
    torch.testing.assert_close(parts["b"][0], Y * 2)


def test_a_write_through_a_view_of_an_argument_reaches_the_caller() -> None:
    x = X.clone()
    vmap(lambda row: row[1:].add_(10))(x.unsqueeze(0))
    torch.testing.assert_close(x, X + torch.tensor([0.0, 10.0, 10.0], dtype=torch.float64))
    x = X.clone()
    jvp(lambda v: v.view(3, 1)[0].fill_(5.0), (x,), (Y,))
    assert x[0] == 5.0


def test_nested_levels_write_an_outer_argument() -> None:
    x = X.clone()
    grad(lambda v: grad(lambda w: (w.mul_(2) * v).sum())(v).sum())(x)
    reference = X.clone()
    torch.func.grad(lambda v: torch.func.grad(lambda w: (w.clone().mul_(2) * v).sum())(v).sum())(reference)
    torch.testing.assert_close(x, X * 2)


@pytest.mark.parametrize(
    "write",
    [
        lambda c, x: c.add_(x), lambda c, x: c.copy_(x), lambda c, x: c.__setitem__(0, x[0]),
        lambda c, x: c[1:].mul_(x[1:]),
        lambda c, x: torch.sin(x, out=c), lambda c, x: c.__setitem__(torch.tensor([0]), x[:1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: grad(lambda x: f(x).sum())(X),
        lambda f: vmap(f)(torch.stack([X, Y])),
        lambda f: jvp(f, (X,), (Y,)),
        lambda f: vmap(grad(lambda x: f(x).sum()))(torch.stack([X, Y])),
    ],
)
def test_a_captured_tensor_cannot_hold_inner_values(transformed: Any, write: Any) -> None:
    captured = torch.zeros(3, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        write(captured, x * 2)
        return x * captured

    with pytest.raises((CapturedWriteError, CapturedOnceError)):
        transformed(f)
    assert torch.equal(captured, torch.zeros(3, dtype=torch.float64))


def test_a_captured_tensor_of_an_outer_level_cannot_hold_inner_values() -> None:
    def outer(x: torch.Tensor) -> torch.Tensor:
        kept = x * 2
        return grad(lambda y: kept.add_(y).sum())(x).sum()

    for transformed in (grad(outer), vmap(outer), lambda x: jvp(outer, (x,), (x,))):
        with pytest.raises(FunctransError):
            transformed(torch.stack([X, Y]))


def test_a_captured_tensor_may_be_written_with_captured_values() -> None:
    captured = torch.zeros(3, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        captured.add_(Y)
        return (x * captured).sum()

    torch.testing.assert_close(grad(f)(X), Y)
    torch.testing.assert_close(captured, Y)


def test_a_captured_counter_under_vmap_is_refused_or_counts_every_example() -> None:
    counter = torch.zeros(())

    def f(x: torch.Tensor) -> torch.Tensor:
        counter.add_(1)
        return x

    with pytest.raises(CapturedOnceError):
        vmap(f)(torch.stack([X, Y]))
    assert counter == 0
    vmap(f)(X.unsqueeze(0))  # a loop over a single example counts once
    vmap(lambda x: vmap(f)(x))(X.view(1, 1, -1))
    assert counter == 2
    with pytest.raises(CapturedOnceError):
        vmap(lambda x: vmap(f)(x))(torch.stack([X, Y]).unsqueeze(1))
    assert counter == 2


def test_clone_of_a_captured_tensor_is_ours_to_write() -> None:
    captured = torch.zeros(3, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        mine = captured.clone()
        mine[1] = x[0]
        mine += x
        return mine

    batch = torch.stack([X, Y])
    assert not difference(vmap(f)(batch), Plain.vmap(f)(batch))
    close(grad(lambda x: (f(x) * Y).sum())(X), Y @ numeric_jacobian(f, X))
    assert torch.equal(captured, torch.zeros(3, dtype=torch.float64))


def test_tensors_made_from_python_numbers_can_be_written() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        t = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        t[0] = x[2]
        return t * x

    batch = torch.stack([X, Y])
    assert not difference(vmap(f)(batch), Plain.vmap(f)(batch))
    close(jvp(f, (X,), (Y,))[1], numeric_jacobian(f, X) @ Y)


def test_a_write_before_the_pullback_is_noticed() -> None:
    x = X.clone()
    weight = Y.clone()
    _, pullback = vjp(lambda v: v * weight, x)
    weight.mul_(2)
    try:
        gradient = pullback(torch.ones_like(X))[0]
    except RuntimeError:
        return
    torch.testing.assert_close(gradient, Y)


COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda m: m.transpose(0, 1).contiguous(),
    "reshape": lambda m: m.t().reshape(-1).view(3, 3),
    "flatten": lambda m: m.T.flatten().unflatten(0, (3, 3)),
    "to another dtype and back": lambda m: m.to(torch.float32).to(torch.float64),
    "reshape that is a view": lambda m: m.reshape(-1).reshape(3, 3),
    "to the same dtype": lambda m: m.to(torch.float64),
    "reshape of a row of a view": lambda m: m.t()[1:].reshape(2, 3),
}


@pytest.mark.parametrize("written", ["base", "copy"])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_might_have_been_a_view_stays_as_it_is(name: str, written: str) -> None:
    """Which of the two it is depends on the strides of what is viewed, and so does what a later write reaches."""

    def f(x: torch.Tensor) -> torch.Tensor:
        m = torch.outer(x, x) * 0.5
        copy = COPIES[name](m)
        row = copy[0]
        if written == "base":
            m[:, 1] = x
        else:
            copy.mul_(x)
        weights = torch.arange(3.0, dtype=x.dtype) + 1
        return (copy @ weights).sum() + (m.sin() @ weights).sum() + (row * weights).sum()

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def slope(row: torch.Tensor) -> torch.Tensor:
        row = row.clone().requires_grad_()
        return torch.autograd.grad(f(row), row)[0]

    rows = [slope(row) for row in x]
    for got, expected in (
        (grad(f)(x[0]), rows[0]),
        (vmap(grad(f))(x), torch.stack(rows)),
        (vmap(f)(x), torch.stack([f(row) for row in x])),
    ):
        torch.testing.assert_close(got, expected)


# operators that write lists of tensors


def foreach_writes():
    """Every overload that writes a list in place, with arguments after the list, by their types."""
    made = {
        "Tensor[]": [torch.full((3, 2), 0.5).double(), torch.full((3, 1), 3.0).double()],
        "number": 1.5,
        "Scalar": 1.5,
        "number[]": [1.5, 0.5],
        "List[number]": [1.5, 0.5],
        "Tensor": torch.tensor(1.5, dtype=torch.float64),
    }
    names = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas()}
    for name in sorted(n for n in names if n.startswith("_foreach") and n.endswith("_")):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            rest = [a for a in op._schema.arguments[1:] if not a.has_default_value()]
            args = [made[str(a.type).replace("List[Tensor]", "Tensor[]")] for a in rest]
            if rest and rest[-1].name == "scalars" and isinstance(args[-1], torch.Tensor):
                args[-1] = torch.tensor([1.5, 0.5])
            yield pytest.param(op, args, id=f"{name}.{overload}")


@pytest.mark.parametrize(("op", "args"), foreach_writes())
def test_lists_that_are_written(op, args):
    """Under vmap as in a loop over the examples, under grad as by differences: PyTorch's own operator in both."""
    first = torch.tensor([[0.2, 0.7], [0.1, 0.6], [0.3, 0.9]], dtype=torch.float64)
    second = torch.tensor([[0.4], [0.2], [0.6]], dtype=torch.float64)
    lists = [a for a in args if isinstance(a, list) and isinstance(a[0], torch.Tensor)]

    def f(a, b, *flat):
        given = iter([list(flat[i : i + 2]) for i in range(0, len(flat), 2)])
        own = [next(given) if any(x is y for y in lists) else x for x in args]
        a, b = a * 1, b * 1
        view = a[:1]
        op([a, b], *own)
        return a, b, view

    inputs = [first, second, *[x for a in lists for x in a]]
    found = vmap(f)(*inputs)
    expected = [torch.stack(out) for out in zip(*[f(*example) for example in zip(*inputs, strict=True)], strict=True)]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)

    total = lambda a, b, *flat: sum((x * x).sum() for x in f(a, b, *flat))
    found = grad(total, argnums=(0, 1))(*inputs)
    for place, own in enumerate(found):
        direction = torch.linspace(0.5, 1, own.numel(), dtype=own.dtype).view(own.shape)
        up, down = list(inputs), list(inputs)
        up[place], down[place] = inputs[place] + 1e-6 * direction, inputs[place] - 1e-6 * direction
        difference = (total(*up) - total(*down)) / 2e-6
        torch.testing.assert_close((own * direction).sum(), difference, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("other", [lambda a: a, lambda a: a[:1]], ids=["the same", "a view"])
def test_a_list_that_shares_memory_is_refused(other):
    def f(a):
        a = a * 1
        torch._foreach_add_([a, other(a)], 1.0)
        return a.sum()

    for call in (lambda: vmap(f)(torch.ones(3, 2)), lambda: grad(f)(torch.ones(2))):
        with pytest.raises(FunctransError, match="of tensors that share memory"):
            call()


@pytest.mark.parametrize("view", [lambda y: y[1], lambda y: y.view(3, 1)[1, 0], lambda y: y.unbind()[1]])
def test_a_view_is_returned_as_its_base_was_written(view):
    def f(x):
        y = x.clone()
        part = view(y)
        y.sin_()
        return part

    x = torch.tensor([0.5, 1.0, 2.0])
    slope = torch.tensor([0.0, 1.0, 0.0]) * x.cos()
    torch.testing.assert_close(grad(f)(x), slope)
    torch.testing.assert_close(vmap(grad(f))(x.expand(2, 3)), slope.expand(2, 3))
    value, pullback = vjp(lambda x: (f(x), x), x)
    torch.testing.assert_close((value[0], pullback((torch.ones(()), torch.zeros(3)))[0]), (x[1].sin(), slope))
    torch.testing.assert_close(jvp(f, (x,), (torch.ones(3),))[1], slope.sum())


def under_no_grad(w: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return w.mul_(2) + w


def initialized(w: torch.Tensor) -> torch.Tensor:
    return torch.nn.init.constant_(w, 3.0).sum()


def through_data(w: torch.Tensor) -> torch.Tensor:
    w.data -= 1
    w.data.mul_(2)
    return w.sum()


@pytest.mark.parametrize("write", [under_no_grad, initialized, through_data])
def test_a_parameter_is_written_as_in_pytorch(write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    start = torch.stack([X, Y])
    expected = start.clone()
    write(expected)
    parts = lambda w: write(w).sum()
    for transformed in (vmap(write), vmap(write, 1), vmap(vmap(write)), grad(parts), lambda w: vjp(write, w)):
        parameter = torch.nn.Parameter(start.clone())
        transformed(parameter)
        assert parameter.is_leaf and parameter.requires_grad
        torch.testing.assert_close(parameter.detach(), expected)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        vmap(lambda w: w.mul_(2))(torch.nn.Parameter(start))
