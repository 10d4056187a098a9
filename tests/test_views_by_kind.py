"""Every view operator of PyTorch: a write through it reaches what is viewed, or it is refused; and in-place changes of
shape, on vmap's own argument too."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from slow_ways import some
from torch import Tensor

from functrans import grad, jvp, vmap
from functrans.errors import CapturedOnceError, InsideTransformError
from functrans.functionalization.write_back import BY_INDEX, WRITE_BACK
from functrans.operators.info import SPECIAL, VIEW, op_info

aten = torch.ops.aten
F64, C128 = torch.float64, torch.complex128


OF_NAMED_TENSORS = re.compile("name|align|ellipsis", re.IGNORECASE)


def view_operators() -> set[Any]:
    """The operators whose results share memory with their first argument, by their schemas; those of named tensors
    (until PyTorch 2.11) are not written through."""
    found = set()
    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    for name in sorted(names):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            try:
                known = op_info(op)
            except RuntimeError:
                continue  # an operator of TorchScript's own
            if known.kind_by_schema == VIEW and known.kind != SPECIAL and not OF_NAMED_TENSORS.search(str(op)):
                found.add(op)
    return found


SPARSE = "parts of a sparse tensor; a write through them is refused"
NOT_WRITTEN_THROUGH = {
    **dict.fromkeys(
        ("_indices", "_values", "ccol_indices", "coalesce", "col_indices", "crow_indices", "indices", "row_indices",
         "values", "_sparse_broadcast_to"), SPARSE,
    ),
    **dict.fromkeys(
        ("_nested_get_values", "_nested_view_from_jagged"), "parts of a nested tensor, which no wrapper holds",
    ),
    **dict.fromkeys(
        ("_autocast_to_full_precision", "_autocast_to_reduced_precision", "_fw_primal", "_nested_view_from_buffer",
         "_test_autograd_multiple_dispatch_view", "pin_memory", "slice_inverse"),
        "of PyTorch's own; a write through them is refused",
    ),
}  # fmt: skip


def test_every_view_operator_has_a_way_back_or_is_refused() -> None:
    without = view_operators() - set(WRITE_BACK) - BY_INDEX
    assert {op for op in without if op._schema.name[6:] not in NOT_WRITTEN_THROUGH} == set()
    assert not BY_INDEX & set(WRITE_BACK)


REAL = some(4, 3, 2)
SQUARE = some(3, 2, 2)
COMPLEX = some(3, 2, 2, dtype=C128)
#: Views of a base, by name: the base, and the view.
VIEWS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "adjoint": (COMPLEX, lambda x: x.adjoint()),
    "adjoint of a part": (COMPLEX, lambda x: x[1:].adjoint()),
    "part of an adjoint": (COMPLEX, lambda x: x.adjoint()[1:]),
    "alias": (REAL, lambda x: aten.alias(x)),
    "as_strided": (REAL, lambda x: x.as_strided((2, 2), (6, 1))),
    "as_strided of a tensor with gaps": (some(4, 6)[:, ::2], lambda x: x.as_strided((2, 2), (6, 2))),
    "broadcast_to": (REAL, lambda x: x.broadcast_to(4, 3, 2)),
    "chunk": (REAL, lambda x: x.chunk(2)[1]),
    "conj": (COMPLEX, lambda x: x.conj()),
    "conj, whole": (COMPLEX, lambda x: torch.conj(x)),
    "diagonal": (SQUARE, lambda x: x.diagonal(0, 1, 2)),
    "dsplit": (some(2, 2, 4), lambda x: x.dsplit(2)[0]),
    "expand": (REAL, lambda x: x.expand(4, 3, 2)),
    "expand_as": (REAL, lambda x: x.expand_as(torch.ones(4, 3, 2))),
    "flatten": (REAL, lambda x: x.flatten(1)),
    "H": (COMPLEX[0], lambda x: x.H),
    "hsplit": (some(2, 4), lambda x: x.hsplit(2)[1]),
    "imag": (COMPLEX, lambda x: x.imag),
    "imag of conj": (COMPLEX, lambda x: x.conj().imag),
    "linalg.diagonal": (SQUARE, lambda x: torch.linalg.diagonal(x)),
    "mH": (COMPLEX, lambda x: x.mH),
    "mH of a real one": (SQUARE, lambda x: x.mH),
    "mT": (SQUARE, lambda x: x.mT),
    "moveaxis": (REAL, lambda x: x.moveaxis(0, 1)),
    "movedim": (REAL, lambda x: x.movedim((0, 1), (1, 0))),
    "narrow": (REAL, lambda x: x.narrow(0, 1, 2)),
    "neg": (COMPLEX, lambda x: torch._neg_view(x)),
    "numpy_T": (REAL[0], lambda x: x.T),
    "permute": (REAL, lambda x: x.permute(2, 0, 1)),
    "real": (COMPLEX, lambda x: x.real),
    "reshape": (REAL, lambda x: x.reshape(12, 2)),
    "select": (REAL, lambda x: x.select(0, 1)),
    "slice": (REAL, lambda x: x[1:, ::2]),
    "split": (REAL, lambda x: x.split(2)[1]),
    "split_with_sizes": (REAL, lambda x: x.split([1, 3])[1]),
    "squeeze": (REAL[:1], lambda x: x.squeeze()),
    "squeeze of dims": (REAL[:1], lambda x: x.squeeze((0, 1))),
    "swapaxes": (REAL, lambda x: x.swapaxes(0, 1)),
    "swapdims": (REAL, lambda x: x.swapdims(0, 1)),
    "t": (REAL[0], lambda x: x.t()),
    "tensor_split": (REAL, lambda x: x.tensor_split(3)[0]),
    "transpose": (REAL, lambda x: x.transpose(0, 2)),
    "unbind": (REAL, lambda x: x.unbind(0)[2]),
    "unflatten": (REAL, lambda x: x.unflatten(0, (2, 2))),
    "unfold": (REAL, lambda x: x.unfold(0, 2, 2)),
    "unsqueeze": (REAL, lambda x: x.unsqueeze(1)),
    "view": (REAL, lambda x: x.view(-1)),
    "view of a dtype": (REAL, lambda x: x.view(torch.int64).view(F64)),
    "view of a smaller dtype": (REAL, lambda x: x.view(torch.float32).view(F64)),
    "view_as": (REAL, lambda x: x.view_as(torch.ones(24))),
    "view_as_complex": (REAL, lambda x: torch.view_as_complex(x)),
    "view_as_real": (COMPLEX, lambda x: torch.view_as_real(x)),
    "vsplit": (REAL, lambda x: x.vsplit(2)[1]),
}
MANY = ("chunk", "dsplit", "hsplit", "split", "split_with_sizes", "tensor_split", "unbind", "vsplit")


def written(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Write through the view, and to the base under it; what all of them show in the end, in one row."""

    def f(x: Tensor) -> Tensor:
        base = x.clone(memory_format=torch.preserve_format)
        part = view(base)
        part.mul_(2)
        part.add_(part.clone())
        base.mul_(3)
        again = view(base)
        parts = [torch.view_as_real(p.resolve_conj()) if p.is_complex() else p for p in (base, part, again)]
        return torch.cat([p.flatten() for p in parts])

    return f


@pytest.mark.parametrize("name", VIEWS)
def test_writes_through_views(name: str) -> None:
    x, view = VIEWS[name]
    f = written(view)
    batch = torch.stack([x, 2 * x, -x])
    expected = torch.stack([f(b) for b in batch])
    torch.testing.assert_close(vmap(f)(batch), expected)
    torch.testing.assert_close(jvp(f, (x,), (x,))[0], f(x))
    if "dtype" in name:
        return  # bits have no derivative
    torch.testing.assert_close(jvp(f, (x,), (2 * x,))[1], f(2 * x))  # f is linear
    if name in MANY:
        return  # plain autograd refuses to write one of several views
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    slope = torch.autograd.grad((f(leaf) ** 2).sum(), leaf)[0]
    torch.testing.assert_close(grad(lambda x: (f(x) ** 2).sum())(x), slope)
    torch.testing.assert_close(vmap(grad(lambda x: (f(x) ** 2).sum()))(batch), torch.stack([slope, 2 * slope, -slope]))


@pytest.mark.parametrize("name", VIEWS)
def test_writes_to_arguments_through_views(name: str) -> None:
    """The caller sees them, as without the transform."""
    x, view = VIEWS[name]

    def f(x: Tensor) -> Tensor:
        view(x).mul_(2)
        return x * 1

    batch = torch.stack([x, 2 * x, -x])
    if name.startswith("as_strided of"):  # a stack has no gaps
        batch = some(3, 4, 6)[..., ::2]
    ours, theirs = batch.clone(memory_format=torch.preserve_format), batch.clone(memory_format=torch.preserve_format)
    expected = torch.stack([f(b) for b in theirs])
    torch.testing.assert_close(vmap(f)(ours), expected)
    torch.testing.assert_close(ours, theirs)


def test_views_that_are_not_known_are_not_written_through() -> None:
    def f(x: Tensor) -> Tensor:
        sparse = torch.ones(3).to_sparse()
        sparse._values().mul_(2)
        return (sparse.to_dense() * x).sum()

    with pytest.raises(InsideTransformError, match="a write through a view that aten._values"):
        grad(f)(torch.ones(3))


# --- reshape and its like, which view or copy as strides say


def written_reshape(x: Tensor) -> Tensor:
    y = x * 2
    y.reshape(-1).mul_(0)
    return y


def written_before(x: Tensor) -> Tensor:
    y = x * 2
    r = y.flatten()
    y.mul_(0)
    return r * 1


def written_contiguous(x: Tensor) -> Tensor:
    y = x.clone()
    y.contiguous().mul_(0)
    return y


def written_part(x: Tensor) -> Tensor:
    y = x * 2
    y.reshape(-1)[:2].mul_(0)
    return y


def written_transposed(x: Tensor) -> Tensor:
    y = x @ torch.ones(x.shape[1], 2, dtype=F64)
    y.t().contiguous().mul_(0)
    y.reshape(-1).add_(1)
    return y


def written_argument(x: Tensor) -> Tensor:
    x.reshape(-1).mul_(0)
    return x * 1


def written_alone(x: Tensor) -> Tensor:
    return (x * 2).flatten().relu_()


def read_before(x: Tensor) -> Tensor:
    y = x * 2
    total = y.flatten().sum()
    y.mul_(2)
    return y * total


def turned_contiguous(x: Tensor) -> Tensor:
    y = x.clone()
    y.contiguous().t_()
    return y.reshape(-1) + y.shape[0]


def turned_before(x: Tensor) -> Tensor:
    y = x.clone()
    z = y.contiguous()
    y.t_()
    return z.reshape(-1) + z.shape[0]


def written_twice(x: Tensor) -> Tensor:
    y = x * 1
    y.masked_fill_(x > 0, 1.0)
    y.contiguous().mul_(2)
    return y


def written_twice_flat(x: Tensor) -> Tensor:
    y = x * 1
    y[0] = x[1]
    y.ravel()[2:].mul_(2)
    return y


def cured(x: Tensor) -> Tensor:
    y = (x * 2).clone(memory_format=torch.contiguous_format)
    y.reshape(-1).mul_(0)
    return y


RESHAPED = (
    written_reshape, written_before, written_contiguous, written_part, written_transposed, written_argument,
    written_alone, read_before, turned_contiguous, turned_before,
    written_twice, written_twice_flat, cured,
)  # fmt: skip
ANSWERED = (written_alone, read_before, cured)


@pytest.mark.parametrize("f", RESHAPED)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_reshape_views_or_copies_as_in_a_loop_or_what_follows_is_refused(f: Callable[..., Tensor], dim: int) -> None:
    """What is computed lies in memory as the batch does, which is not as the loop's: NOTE [Layouts that a batch hides].
    """
    x = some(3, 4, 5)
    expected = torch.stack([f(row) for row in x.clone().unbind(dim)])
    for run in (
        lambda: vmap(f, in_dims=dim)(x.clone()),
        lambda: vmap(vmap(f, in_dims=dim))(x.clone()[None])[0],
        lambda: vmap(vmap(f, in_dims=dim), in_dims=3)(x.clone()[..., None])[0],
        lambda: vmap(lambda row: jvp(f, (row,), (row,))[0], in_dims=dim)(x.clone()),
        lambda: jvp(vmap(f, in_dims=dim), (x.clone(),), (x,))[0],
    ):
        try:
            found = run()
        except InsideTransformError as error:
            assert dim and f not in ANSWERED and re.search("may (share its memory|be another one)", str(error))
        else:
            torch.testing.assert_close(found, expected)


# --- changes of shape in place


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "unsqueeze_ at the end": lambda x: x.unsqueeze_(-1),
    "squeeze_": lambda x: x.squeeze_(),
    "squeeze_ of a dim": lambda x: x.squeeze_(0),
    "squeeze_ of dims": lambda x: x.squeeze_((0, 1)),
    "t_": lambda x: x.t_() if x.dim() == 2 else x.transpose_(1, 2),
    "transpose_": lambda x: x.transpose_(0, 1),
    "swapaxes_": lambda x: x.swapaxes_(0, 1),
    "swapdims_": lambda x: x.swapdims_(0, 1),
    "there and back": lambda x: x.transpose_(0, 1).mul_(2).transpose_(0, 1),
    "unsqueeze_ and mul_": lambda x: x.unsqueeze_(0).mul_(2),
    "mul_ and unsqueeze_": lambda x: x.mul_(2).unsqueeze_(0),
    "a row of it": lambda x: (x.transpose_(0, 1)[0].mul_(2), x)[1],
}


@pytest.mark.parametrize("shape", [(3, 1, 4), (3, 4, 4), (4, 5)], ids=str)
@pytest.mark.parametrize("name", IN_PLACE)
def test_shapes_changed_in_place(name: str, shape: tuple[int, ...]) -> None:
    """Of vmap's own argument: the result has the new shape, and the caller's tensor keeps its own, with what was
    written: as in a loop over views."""
    op, x = IN_PLACE[name], some(*shape)
    if x.dim() == 2 and name not in ("unsqueeze_", "unsqueeze_ at the end", "squeeze_", "squeeze_ of a dim"):
        pytest.skip("examples of one dimension")
    for dim in range(x.dim()):
        ours, theirs = x.clone(), x.clone()
        expected = torch.stack([op(row) for row in theirs.unbind(dim)])
        out = vmap(op, in_dims=dim)(ours)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(vmap(lambda x: op(x) * 1, in_dims=dim)(x.clone()), expected)

    def loss(x: Tensor) -> Tensor:
        return (op(x.clone()) ** 3).sum()

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sum(loss(row) for row in leaf.unbind(0)), leaf)
    torch.testing.assert_close(vmap(grad(lambda x: (op(x) ** 3).sum()))(x.clone()), slope)
    torch.testing.assert_close(grad(lambda x: vmap(loss)(x).sum())(x), slope)
    tangent = jvp(lambda row: op(row) * 1, (x[0].clone(),), (x[1].clone(),))[1]
    torch.testing.assert_close(tangent, op(x[1].clone()))  # op is linear


def test_an_argument_that_is_written_and_returned_is_the_callers_own() -> None:
    x = torch.ones(2, 3)
    assert vmap(lambda x: x.mul_(2))(x) is x
    square = torch.arange(8.0).view(2, 2, 2)
    out = vmap(lambda x: x.t_())(square)
    assert torch.equal(out, torch.arange(8.0).view(2, 2, 2).mT) and torch.equal(square, torch.arange(8.0).view(2, 2, 2))


# --- truth values of one element as indices


MASKED: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: x.__setitem__(x.sum() > 0, 7.0),
    "a row": lambda x: x.__setitem__(x.sum() > 0, torch.tensor([5.0, 6.0], dtype=F64)),
    "what is computed": lambda x: x.__setitem__(x.sum() > 0, x * 2),
    "of shape [1, 2]": lambda x: x.__setitem__(x.sum() > 0, (x * 2)[None]),
    "one element": lambda x: x.__setitem__((0, x.sum() > 0), 7.0),
    "one element, mask first": lambda x: x.__setitem__((x.sum() > 0, 0), 7.0),
    "at the end": lambda x: x.__setitem__((..., x.sum() > 0), 7.0),
    "of an element": lambda x: x[0].__setitem__(x.sum() > 0, 7.0),
    "with an index that differs": lambda x: x.__setitem__((x.sum() > 0, (x[0] > 0).long()), 7.0),
    "never": lambda x: x.__setitem__(x.sum() > 100, 7.0),
    "a mask that is the same": lambda x: x.__setitem__(torch.tensor(1.0) > 0, 7.0),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_without_dimensions(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        MASKED[name](y)
        return y

    batch = torch.tensor([[1.0, 2.0], [-3.0, 1.0], [4.0, -1.0]], dtype=F64)
    torch.testing.assert_close(vmap(f)(batch), torch.stack([f(x) for x in batch]))
    leaf = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sum((f(x) ** 2).sum() for x in leaf.unbind(0)), leaf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no loop over the examples
        torch.testing.assert_close(vmap(grad(lambda x: (f(x) ** 2).sum()))(batch), slope)
        torch.testing.assert_close(grad(lambda b: (vmap(f)(b) ** 2).sum())(batch), slope)


def test_what_is_added_where_a_mask_without_dimensions_says() -> None:
    """Plain PyTorch fails an assertion of its own."""
    batch = torch.tensor([[1.0, 2.0], [-3.0, 1.0], [4.0, -1.0]])

    def f(x: Tensor) -> Tensor:
        return x.clone().index_put_((x.sum() > 0,), x * 2, accumulate=True)

    torch.testing.assert_close(vmap(f)(batch), torch.where(batch.sum(1, keepdim=True) > 0, 3 * batch, batch))
    captured = torch.ones(2)
    with pytest.raises(CapturedOnceError):  # a loop would add it for each example
        vmap(lambda x: captured.index_put_((torch.tensor(1.0) > 0,), captured, accumulate=True) * x)(batch)


def test_several_masks() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        y[x.sum() > 0, x > 1.5] = 7.0
        y[x.sum() > 0, x[0] > 0] = y[1].clone()
        return y

    batch = torch.tensor([[1.0, 2.0], [-3.0, 1.0], [4.0, -1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loops over the examples
        torch.testing.assert_close(vmap(f)(batch), torch.stack([f(x) for x in batch]))


def test_windows_that_overlap_are_not_written() -> None:
    """What eager PyTorch makes of it depends on the order in which a kernel goes through memory."""
    f = lambda x: x.clone().unfold(0, 2, 1).mul_(2)
    for run in (lambda x: vmap(f)(x), lambda x: vmap(f, in_dims=1)(x), lambda x: jvp(f, (x[0],), (x[0],))):
        with pytest.raises(RuntimeError, match="refers to a single memory location"):
            run(some(3, 4))

    def apart(x: Tensor) -> Tensor:
        y = x * 1
        y.unfold(0, 2, 2).mul_(3)
        return y

    x = some(3, 5)
    torch.testing.assert_close(vmap(apart)(x), torch.stack([apart(row) for row in x]))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_what_was_written_is_viewed_as_in_a_loop(dim: int) -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 1
        y.masked_fill_(x > 0, 1.0)
        y.view(-1)[1] = 7.0
        y.cumsum_(0)
        return y.view(-1) + y.view(x.shape[1], -1).sum()

    x = some(3, 4, 5)
    expected = torch.stack([f(row) for row in x.unbind(dim)])
    torch.testing.assert_close(vmap(f, in_dims=dim)(x), expected)
    torch.testing.assert_close(vmap(vmap(f), in_dims=dim + 1)(x[None])[:, 0], expected)


# --- views as other tensors say, which may change


def like_another(view: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        y, other = x * 2, torch.zeros(x.shape[1], x.shape[0], dtype=F64)
        if view is not Tensor.view_as:
            other = other.t()
        seen = view(y, other)
        other.unsqueeze_(0)
        y.mul_(3)
        return seen + y.sum()

    return f


def narrowed(x: Tensor) -> Tensor:
    y, start = x * 2, torch.tensor(1)
    seen = y.narrow(0, start, 1)
    start -= 1
    y.mul_(3)
    return seen + y.sum()


LIKE_ANOTHER = {
    "view_as": like_another(Tensor.view_as), "expand_as": like_another(Tensor.expand_as),
    "reshape_as": like_another(Tensor.reshape_as), "type_as": like_another(Tensor.type_as),
    "to": like_another(Tensor.to), "narrow": narrowed,
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE_ANOTHER)
def test_views_stay_what_they_were_made(name: str) -> None:
    f, x = LIKE_ANOTHER[name], some(2, 3, 4)
    expected = torch.stack([f(row) for row in x])
    torch.testing.assert_close(vmap(f)(x), expected)
    torch.testing.assert_close(jvp(f, (x[0],), (x[1],))[0], expected[0])
    assert grad(lambda x: f(x).sum())(x[0]).shape == x[0].shape


@pytest.mark.parametrize("written", [False, True])
def test_what_may_be_returned_as_it_is_under_no_grad(written: bool) -> None:
    """It has a derivative if it is, and none if it was copied."""

    def f(x: Tensor) -> Tensor:
        y = x * 1
        if written:
            y.masked_fill_(x > 0, 1.0)
        with torch.no_grad():
            z = y.contiguous()
        return (y * z).sum()

    x = some(3, 4, 5)
    plain = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(sum(f(row) for row in plain.unbind()), plain)  # type: ignore[arg-type]
    torch.testing.assert_close(vmap(grad(f))(x), wanted)
    with pytest.raises(InsideTransformError, match="aten.contiguous.default under no_grad"):
        vmap(grad(f), in_dims=1)(x.movedim(0, 1).contiguous())
