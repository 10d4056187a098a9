"""``x.data = y`` inside of transforms, beside a loop; and other attributes of tensors that few programs use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functrans import functionalize, grad, jvp, vjp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import FunctransError, InsideTransformError, LayoutError, NoDataError

DOUBLE = torch.float64
ROWS = torch.randn(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
W = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
close = torch.testing.assert_close


def leaf(size: int = 3, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.ones(size, dtype=dtype, requires_grad=True)


def slope(w: Tensor) -> Any:
    (w**2).sum().backward()  # type: ignore[no-untyped-call]
    return w.grad


def of_another_shape(x: Tensor) -> Any:
    w = leaf(2)
    w.data = x.detach() * 2
    return slope(w)


def of_another_dtype(x: Tensor) -> Any:
    w = leaf(dtype=torch.float32)
    w.data = x.detach()
    assert w.dtype is DOUBLE and w.is_leaf and w.requires_grad
    return slope(w)


def sharing_memory(x: Tensor) -> Any:
    w, y = leaf(), x.detach() * 2
    w.data = y
    y.add_(1)
    first = slope(w)
    with torch.no_grad():
        w.mul_(3)
    return first + y * x


def sharing_a_row(x: Tensor) -> Any:
    w, y = leaf(), torch.stack([x.detach(), x.detach()])
    w.data = y[1]
    with torch.no_grad():
        w.mul_(3)
    return y.sum(0)


def views_of_before(x: Tensor) -> Any:
    w = torch.zeros(3, dtype=DOUBLE)
    view = w[1:]
    w.data = x.detach() * 2
    view.add_(1)
    w[0] = 7.0
    return torch.cat([w, view])


def assigned_again(x: Tensor) -> Any:
    w = leaf()
    w.data = x.detach() * 2
    w.data = w.data * 3
    w.data -= 1
    return w * x


def descent(x: Tensor) -> Any:
    w = leaf()
    for _ in range(3):
        (w * x).sin().sum().backward()
        w.data = w.data - 0.1 * w.grad  # type: ignore[operator]
        w.grad = None
    return w * 1


def strided(x: Tensor) -> Any:
    w = torch.ones(3, 3, dtype=DOUBLE)
    w.data = torch.outer(x, x * x).detach().t()
    return w @ W


def from_outside(x: Tensor) -> Any:
    w = leaf()
    w.data = W
    return slope(w) * x


def converted(x: Tensor) -> Any:
    layer = nn.Linear(3, 2).double()
    layer.half().to(DOUBLE)
    nn.init.constant_(layer.weight, 0.5)
    nn.init.zeros_(layer.bias)
    return layer(x)


def vectors(x: Tensor) -> Any:
    layer = nn.Linear(3, 2, dtype=DOUBLE)
    nn.utils.vector_to_parameters(torch.cat([x, x.sin(), x[:2]]).detach(), layer.parameters())
    layer(W).square().sum().backward()
    both = [[p.grad for p in layer.parameters()], list(layer.parameters())]
    return sum(nn.utils.parameters_to_vector(p) for p in both)  # type: ignore[arg-type]


def copied(x: Tensor) -> Any:
    layer = nn.Linear(3, 2, dtype=DOUBLE, bias=False)
    layer.weight.data = torch.stack([x, x * 2]).detach()
    other = copy.deepcopy(layer)
    other.weight.data = other.weight.data * 2
    return layer(W) + other(W)


FUNCTIONS: list[Callable[[Tensor], Any]] = [
    of_another_shape, of_another_dtype, sharing_memory, sharing_a_row, views_of_before, assigned_again, descent,
    strided, from_outside, converted, vectors, copied,
]  # fmt: skip


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_beside_a_loop(f: Callable[[Tensor], Any]) -> None:
    expected = torch.stack([f(x).detach() for x in ROWS])
    close(vmap(f, randomness="same")(ROWS).detach(), expected)
    close(vmap(f, 1, 1, randomness="same")(ROWS.T.contiguous()).detach().T, expected)
    nested = vmap(vmap(f, randomness="same"), randomness="same")(ROWS.view(2, 2, 3))
    close(nested.detach().flatten(0, 1), expected)
    close(functionalize(f)(ROWS[0]).detach(), expected[0])
    close(grad(lambda x: (x.sum(), f(x)), has_aux=True)(ROWS[0])[1].detach(), expected[0])
    close(jvp(f, (ROWS[0],), (ROWS[1],))[0].detach(), expected[0])
    assert interpreter_stack() == []


def test_of_an_argument() -> None:
    """A loop gives each example as a view, whose data is its own; what was written before is the caller's."""

    def f(x: Tensor) -> Tensor:
        x.mul_(2)
        x.data = torch.zeros(5, dtype=DOUBLE)
        x.add_(1)
        return x

    rows = ROWS.clone()
    assert torch.equal(vmap(f)(rows), torch.ones(4, 5, dtype=DOUBLE))
    close(rows, 2 * ROWS)
    with pytest.raises(InsideTransformError, match="of another shape, assigned to an argument"):
        functionalize(f)(ROWS[0].clone())


def with_a_derivative(x: Tensor) -> None:
    y = leaf() * x
    y.data = torch.zeros(3, dtype=DOUBLE)


def of_a_captured_tensor(x: Tensor) -> None:
    nn.Parameter(W).data = W  # plain: fine
    W.data = x.detach() * 2


def made_elsewhere(x: Tensor) -> None:
    torch.zeros(3, dtype=DOUBLE).data = W


def written_afterwards(x: Tensor) -> None:
    w = leaf()
    w.data = W
    w.data.add_(1)


def swapped(x: Tensor) -> None:
    torch.utils.swap_tensors(W, x.detach() * 1)


def swapped_leaves(x: Tensor) -> None:
    torch.utils.swap_tensors(leaf(), leaf())


REFUSED: dict[Callable[[Tensor], None], str] = {
    with_a_derivative: "assigning Tensor.data of what has a derivative .* x.data.copy_",
    of_a_captured_tensor: "assigning Tensor.data of a captured tensor .*functional_call",
    made_elsewhere: "assigning to Tensor.data what was made elsewhere .* x.data.copy_",
    written_afterwards: r"writing a leaf whose Tensor.data was assigned a tensor from outside .* y.clone\(\)",
    swapped: "swap_tensors with a captured tensor .*functional_call",
    swapped_leaves: "swap_tensors of a leaf made inside .* x.data = y",
}


@pytest.mark.parametrize("f", REFUSED, ids=lambda f: f.__name__)
def test_refused(f: Callable[[Tensor], None]) -> None:
    before = W.clone()
    inside = lambda x: (f(x), x.sum())[1]  # type: ignore[func-returns-value]
    for transform in (lambda: vmap(inside)(ROWS), lambda: grad(inside)(ROWS[0])):
        with pytest.raises(InsideTransformError, match=REFUSED[f]):
            transform()
        assert interpreter_stack() == []
    assert torch.equal(W, before) and type(W) is Tensor


def test_no_tensor() -> None:
    with pytest.raises(TypeError, match="Variable data has to be a tensor, but got int"):
        vmap(lambda x: setattr(leaf(), "data", 3) or x)(ROWS)


# other attributes and methods


def versions(x: Tensor) -> Tensor:
    y = x.clone()
    found = [y._version]
    y.add_(1)
    view = y[1:]
    found.append(view._version)
    view.mul_(2)
    y.zero_()
    found += [view._version, y._version]
    return torch.tensor(found) + 0 * x.sum()


def written_as_dense(x: Tensor) -> Tensor:
    y = x.clone()
    y.to_dense().mul_(3)
    return y


ATTRIBUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "copy_ of a number": lambda x: x.clone().copy_(2.5) * x,  # type: ignore[arg-type]
    "to_dense": lambda x: x.to_dense() * 2,
    "to_dense, written": written_as_dense,
    "to_dense, another dtype": lambda x: x.to_dense(torch.float32),
    "to_sparse and back": lambda x: torch.outer(x, x).to_sparse().to_dense(),
    "_version": versions,
    "storage of what is captured": lambda x: x * W.storage().size() * (W * 1).untyped_storage().nbytes(),
    "pow by truth values": lambda x: x ** (torch.arange(3) > 1),
    "logaddexp of truth values": lambda x: torch.logaddexp(x, torch.arange(3) > 1),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name: str) -> None:
    f = ATTRIBUTES[name]
    expected = torch.stack([f(x) for x in ROWS])
    close(vmap(f)(ROWS), expected)
    close(vmap(f, 1)(ROWS.T.contiguous()), expected)
    close(vjp(f, ROWS[0])[0], expected[0])
    close(jvp(f, (ROWS[0],), (ROWS[1],))[0], expected[0])
    close(functionalize(f)(ROWS[0]), expected[0])


def test_tangents_where_the_other_operand_is_a_truth_value() -> None:
    mask = torch.arange(3) > 1
    _, tangent = jvp(lambda x: x**mask, (ROWS[0],), (ROWS[1],))
    close(tangent, ROWS[1] * mask)
    _, tangent = jvp(lambda x: torch.logaddexp(x, mask), (ROWS[0],), (ROWS[1],))
    close(tangent, ROWS[1] * torch.sigmoid(ROWS[0] - mask.double()))
    assert torch.equal(grad(lambda x: (x**mask).sum())(ROWS[0]), mask.double())


NO_ANSWER: dict[str, tuple[Callable[[Tensor], Any], type[FunctransError], str]] = {
    "data_ptr": (lambda x: x.data_ptr(), NoDataError, r"data_ptr\(\) was called"),
    "const_data_ptr": (lambda x: x.const_data_ptr(), NoDataError, r"const_data_ptr\(\) was called"),  # type: ignore[attr-defined]
    "storage": (lambda x: x.storage(), NoDataError, r"storage\(\) was called"),
    "untyped_storage": (lambda x: x.untyped_storage().data_ptr(), NoDataError, r"untyped_storage\(\).data_ptr\(\)"),
    "share_memory_": (lambda x: x.share_memory_(), InsideTransformError, r"share_memory_\(\) .* was shared outside"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x[:2]]), LayoutError, "a nested tensor came up"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", NO_ANSWER)
def test_what_has_no_answer(name: str) -> None:
    f, error, why = NO_ANSWER[name]
    with pytest.raises(error, match=why):
        vmap(lambda x: (f(x), x)[1])(ROWS)
    assert interpreter_stack() == []


# What was detached shares the memory, and has a derivative of its own: that of what is written to it.

DETACHED: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda z: z.data,
    "detach": lambda z: z.detach(),
    "a copy": lambda z: z.clone().detach(),
    "twice": lambda z: z.detach()[:].detach(),
    "a view": lambda z: z.detach().view(2, 2).view(4),
    "of a view": lambda z: z.view(2, 2).detach().view(4),
    "viewed before": lambda z: (z.view(2, 2), z.detach())[1],
}
WRITTEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all": lambda d, z: d.copy_(z.sum()),
    "all, by index": lambda d, z: d.__setitem__(..., z.flip(0)),
    "one": lambda d, z: d.__setitem__(1, z.sum()),
    "one twice": lambda d, z: (d.__setitem__(1, z.sum()), d[1:].mul_(d[0] + z[3])),
    "added": lambda d, z: d.add_(z.sum()),
    "the base afterwards": lambda d, z: (d[1:].mul_(z[0].clone()), z.mul_(2)),
    "the base of a view": lambda d, z: (d.view(2, 2)[1].add_(z[:2].clone()), z[2:].mul_(z[:2].clone())),
    "without recording": lambda d, z: (d.__setitem__(1, z.sum()), silently(d)),
    "read before": lambda d, z: (d[1:] * 2, d.__setitem__(2, z.sum()), d[1:] * 2),
}


def silently(d: Tensor) -> None:
    with torch.no_grad():
        d[0] = 7.0
        d.mul_(2)


@pytest.mark.parametrize("write", WRITTEN)
@pytest.mark.parametrize("cut", DETACHED)
def test_what_was_detached_has_the_derivative_of_what_is_written_to_it(cut: str, write: str) -> None:
    weights = torch.tensor([0.3, -1.1, 0.7, 2.0], dtype=DOUBLE)

    def f(x: Tensor) -> Tensor:
        z = x * x
        d = DETACHED[cut](z)
        part = d[1:3]
        WRITTEN[write](d, z)
        return (d.sin() * weights).sum() + (part * d[:2]).sum() + (z * weights).sum()

    rows = torch.tensor([[0.5, 1.5, -0.7, 0.2], [1.1, -0.4, 0.9, 0.6]], dtype=DOUBLE)
    leaf = rows.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(sum(f(row) for row in leaf.unbind()), leaf, create_graph=True)
    (second,) = torch.autograd.grad(wanted.square().sum(), leaf)
    of_square = lambda x: grad(f)(x).square().sum()
    for place in (0, 1):
        batch = rows.movedim(0, place).contiguous()
        close(vmap(grad(f), in_dims=place)(batch), wanted)
        close(grad(lambda b, p=place: vmap(f, in_dims=p)(b).sum())(batch).movedim(place, 0), wanted)
        close(vmap(grad(of_square), in_dims=place)(batch), second)
        if write == "without recording":
            continue  # forward mode does not know no_grad
        along = vmap(lambda x: jvp(f, (x,), (weights,))[1], in_dims=place)(batch)
        close(along, wanted @ weights)
    close(torch.stack([grad(f)(row) for row in rows]), wanted)


# Shapes that change in place under no_grad, and views that are made there.

RESHAPED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]] = {
    "unsqueeze_": ((4,), lambda z: z.unsqueeze_(0)), "squeeze_": ((4, 1), lambda z: z.squeeze_()),
    "t_": ((2, 2), lambda z: z.t_()), "transpose_": ((2, 2), lambda z: z.transpose_(0, 1)),
    "swapaxes_": ((2, 2), lambda z: z.swapaxes_(0, 1)), "as_strided_": ((4,), lambda z: z.as_strided_((2, 2), (2, 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", RESHAPED)
def test_shapes_changed_under_no_grad_keep_the_derivative(name: str) -> None:
    """Eager PyTorch keeps it in the old shape, in which a matrix that was transposed has that of another element."""
    shape, change = RESHAPED[name]
    weights = torch.tensor([0.5, 1.0, -1.0, 2.0], dtype=DOUBLE)

    def f(x: Tensor, mode: Any = torch.no_grad) -> Tensor:
        z = x.view(shape) * 1
        with mode():
            change(z)
        return (z.sin() * z).reshape(-1) @ weights

    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.3, -1.0, 0.7, 0.2]], dtype=DOUBLE)
    wanted = vmap(grad(lambda x: f(x, torch.enable_grad)))(rows)
    close(torch.stack([grad(f)(row) for row in rows]), wanted)
    close(vmap(grad(f))(rows), wanted)
    if name != "as_strided_":  # which looks at places that are not the example's own
        close(vmap(grad(f), in_dims=1)(rows.t().contiguous()), wanted)
    close(vmap(lambda x: jvp(f, (x,), (weights,))[1])(rows), wanted @ weights)


@pytest.mark.parametrize("through", [True, False])
def test_views_made_under_no_grad_are_not_written_where_derivatives_are_recorded(through: bool) -> None:
    def f(x: Tensor) -> Tensor:
        z = x * 1
        with torch.no_grad():
            v = z.view(*z.shape, 1)
        if through:
            v[0] = v[0] * 3
        else:
            z[0] = z[1] * 2
        return (z * v.view(z.shape)).sum()

    def silent(x: Tensor) -> Tensor:
        z = x * 1
        with torch.no_grad():
            v = z.view(3, 1)
            v[0] = v[0] * 3
        return (z**2).sum()

    plain = leaf()
    with pytest.raises(RuntimeError, match="no_grad mode"):
        f(plain)
    for run in (grad(f), vmap(grad(lambda x: f(x))), lambda x: grad(lambda x: grad(f)(x).sum())(x)):
        with pytest.raises(InsideTransformError, match="made under no_grad"):
            run(ROWS[:3])
    close(vmap(f)(ROWS), torch.stack([f(row.detach()) for row in ROWS]))
    (wanted,) = torch.autograd.grad(silent(plain), plain)
    close(grad(silent)(plain.detach()), wanted)
