"""The short ways in hand in what PyTorch's own parser would: the same operator, with the same arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import functrans
from functrans.core.tensor import WrapperTensor
from functrans.door import torch_dispatch
from functrans.operators.info import op_info
from functrans.programs.torch_functions import DIRECT

aten = torch.ops.aten
W, V, KERNEL = torch.rand(4, 4), torch.rand(4), torch.rand(2, 1, 2, 2)
INDEX, MASK = torch.tensor([0, 2]), torch.tensor([True, False, True, False])


def accumulated(x: Tensor) -> Tensor:
    x += W
    x *= 2
    return x


#: How people call what has an entrance, on ``x``, four by four.
CALLS: dict[str, Any] = {
    "view, sizes": lambda x: x.view(2, 8),
    "view, a tuple": lambda x: x.view((2, 8)),
    "view, a size": lambda x: x.view(torch.Size([16])),
    "view, a dtype": lambda x: x.view(torch.int32),
    "view, by name": lambda x: x.view(size=(2, 8)),
    "reshape, sizes": lambda x: x.reshape(-1, 8),
    "reshape, a list": lambda x: torch.reshape(x, [16]),
    "reshape, by name": lambda x: torch.reshape(x, shape=(16,)),
    "expand": lambda x: x.expand(3, -1, 4),
    "expand, a tuple": lambda x: x.expand((3, 4, 4)),
    "permute": lambda x: x.permute(1, 0),
    "permute, a list": lambda x: torch.permute(x, [1, 0]),
    "permute, by name": lambda x: torch.permute(x, dims=(1, 0)),
    "matmul": lambda x: x @ V,
    "matmul, by name": lambda x: torch.matmul(x, other=W),
    "mm": lambda x: torch.mm(W, x),
    "bmm": lambda x: torch.bmm(x.unsqueeze(0), W.unsqueeze(0)),
    "mv": lambda x: x.mv(V),
    "dot": lambda x: torch.dot(V, x[0]),
    "outer": lambda x: torch.outer(x[0], V),
    "addmm": lambda x: torch.addmm(V, x, W),
    "addmm, scaled": lambda x: torch.addmm(V, x, W, beta=2, alpha=0.5),
    "linear": lambda x: F.linear(x, W),
    "linear, bias": lambda x: F.linear(x, W, V),
    "linear, no bias": lambda x: F.linear(x, W, None),
    "linear, by name": lambda x: F.linear(x, weight=W, bias=V),
    "conv2d": lambda x: F.conv2d(x.view(1, 1, 4, 4), KERNEL),
    "conv2d, a number": lambda x: F.conv2d(x.view(1, 1, 4, 4), KERNEL, None, 2, 1),
    "conv2d, pairs": lambda x: F.conv2d(x.view(1, 1, 4, 4), KERNEL, None, (2, 1), (0, 1), (1, 1), 1),
    "conv2d, same": lambda x: F.conv2d(x.view(1, 1, 4, 4), KERNEL, None, 1, "same"),
    "conv2d, by name": lambda x: F.conv2d(x.view(1, 1, 4, 4), KERNEL, stride=2),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "layer_norm, constants first": lambda x: F.layer_norm(W, (4,), x[0], x[1]),
    "layer_norm, by name": lambda x: F.layer_norm(x, [4], weight=V, bias=V, eps=1e-3),
    "avg_pool2d": lambda x: F.avg_pool2d(x.view(1, 1, 4, 4), 2),
    "avg_pool2d, by name": lambda x: F.avg_pool2d(x.view(1, 1, 4, 4), (2, 1), stride=1, ceil_mode=True),
    "gelu": lambda x: F.gelu(x),
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "clone": lambda x: x.clone(),
    "clone, a format": lambda x: x.clone(memory_format=torch.contiguous_format),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "unsqueeze, by name": lambda x: x.unsqueeze(dim=0),
    "squeeze, two": lambda x: x.view(1, 16, 1).squeeze((0, 2)),
    "squeeze, by name": lambda x: x.view(1, 16).squeeze(dim=0),
    "select, by name": lambda x: torch.select(x, dim=1, index=-1),
    "unbind": lambda x: x.unbind(1)[2],
    "transpose, by name": lambda x: torch.transpose(x, dim0=0, dim1=1),
    "movedim": lambda x: x.movedim(0, 1),
    "movedim, lists": lambda x: torch.movedim(x, (0, 1), (1, 0)),
    "flatten": lambda x: x.flatten(0, -1),
    "flatten, by name": lambda x: x.flatten(start_dim=0),
    "sum": lambda x: x.sum(),
    "sum, dim": lambda x: x.sum(1),
    "sum, keepdim": lambda x: x.sum(1, True),
    "sum, by name": lambda x: x.sum(dim=(0, 1), keepdim=True),
    "sum, keepdim first": lambda x: x.sum(keepdim=True, dim=0),
    "sum, a dtype": lambda x: x.sum(0, dtype=torch.float64),
    "mean, NumPy's names": lambda x: x.mean(axis=0, keepdims=True),
    "mean, dims": lambda x: torch.mean(x, [0, 1]),
    "amax": lambda x: x.amax(),
    "amax, dims": lambda x: torch.amax(x, (0, 1), True),
    "amin, dim": lambda x: x.amin(dim=-1),
    "cumsum": lambda x: x.cumsum(0),
    "cumsum, a dtype": lambda x: torch.cumsum(x, dim=1, dtype=torch.float64),
    "softmax": lambda x: x.softmax(-1),
    "softmax, by name": lambda x: F.softmax(x, dim=0),
    "softmax, a dtype": lambda x: torch.softmax(x, 0, torch.float64),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "where": lambda x: torch.where(MASK, x, W),
    "masked_fill": lambda x: x.masked_fill(MASK, 0.5),
    "masked_fill, a tensor": lambda x: x.masked_fill(MASK, torch.tensor(2.0)),
    "index_select": lambda x: x.index_select(1, INDEX),
    "gather": lambda x: torch.gather(x, 0, INDEX.view(1, 2)),
    "gather, by name": lambda x: torch.gather(x, 0, INDEX.view(1, 2), sparse_grad=False),
    "tril": lambda x: x.tril(),
    "triu": lambda x: torch.triu(x, 1),
    "[]": lambda x: x[1],
    "[], a slice": lambda x: x[1:],
    "[], up to": lambda x: x[:-1],
    "[], in steps": lambda x: x[1:10:2],
    "[], nothing": lambda x: x[3:1],
    "[], a column": lambda x: x[:, 1],
    "[], the last": lambda x: x[..., -1],
    "[], a block": lambda x: x[1:3, -2:],
    "[], None": lambda x: x[None],
    "[], Nones": lambda x: x[:, None, 1:, None],
    "[], an ellipsis in between": lambda x: x[0, ..., 1:],
    "[], behind an ellipsis": lambda x: x[None, ..., None],
    "[], all numbers": lambda x: x[1, 2],
    "[], a tensor": lambda x: x[INDEX],
    "[], a matrix": lambda x: x[INDEX.view(1, 2)],
    "[], everything": lambda x: x[:],
    "[], everything twice": lambda x: x[:, 0:4],
    "[], an ellipsis alone": lambda x: x[...],
    "[], a mask": lambda x: torch.where(MASK, x, W)[MASK],
    "[], a list": lambda x: x[[0, 2]],
    "[], tensors": lambda x: x[INDEX, INDEX],
    "[], a tensor and a slice": lambda x: x[1:, INDEX],
    "[], a truth value": lambda x: x[True],
    "mT": lambda x: x.mT,
    "add_": lambda x: x.clone().add_(W),
    "add_, scaled": lambda x: x.clone().add_(W, alpha=2),
    "add_, a number": lambda x: x.clone().add_(2.5),
    "sub_": lambda x: x.clone().sub_(V),
    "mul_": lambda x: x.clone().mul_(x),
    "div_": lambda x: x.clone().div_(W + 1),
    "copy_": lambda x: x.clone().copy_(V),
    "+=": lambda x: accumulated(x.clone()),
    "flip": lambda x: x.flip(0),
    "flip, two": lambda x: torch.flip(x, (0, 1)),
    "flip, by name": lambda x: torch.flip(x, dims=[1]),
    "roll": lambda x: x.roll(1, 0),
    "roll, flat": lambda x: torch.roll(x, 2),
    "roll, lists": lambda x: x.roll((1, -1), (0, 1)),
    "roll, by name": lambda x: torch.roll(x, shifts=1, dims=1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "logsumexp, kept": lambda x: torch.logsumexp(x, (0, 1), keepdim=True),
    "cumprod": lambda x: x.cumprod(0),
    "addcmul": lambda x: torch.addcmul(x, x, W),
    "addcmul, scaled": lambda x: torch.addcmul(x, x, W, value=0.5),
    "addcdiv": lambda x: x.addcdiv(x, W + 1),
    "baddbmm": lambda x: torch.baddbmm(x.unsqueeze(0), x.unsqueeze(0), W.unsqueeze(0)),
    "addmv": lambda x: torch.addmv(V, x, V),
    "addr": lambda x: torch.addr(x, V, x[0]),
    "pad": lambda x: F.pad(x, (1, 0)),
    "pad, a value": lambda x: F.pad(x, [1, 0, 0, 2], value=2.0),
    "pad, reflected": lambda x: F.pad(x, (1, 1), mode="reflect"),
    "narrow": lambda x: x.narrow(0, 1, 2),
    "narrow, by name": lambda x: torch.narrow(x, dim=1, start=-2, length=2),
    "diagonal": lambda x: x.diagonal(),
    "diagonal, another": lambda x: torch.diagonal(x, 1, -1, 0),
    "scatter_add": lambda x: x.scatter_add(0, INDEX.view(1, 2), W),
    "scatter": lambda x: x.scatter(1, INDEX.view(1, 2), W),
    "scatter, a number": lambda x: torch.scatter(x, 0, INDEX.view(1, 2), 2.5),
    "scatter, reduced": lambda x: torch.scatter(x, 0, INDEX.view(1, 2), W, reduce="add"),
    "index_add": lambda x: x.index_add(0, INDEX, W[:2]),
    "index_add, scaled": lambda x: x.index_add(0, INDEX, W[:2], alpha=2),
    "argsort": lambda x: x.argsort(),
    "argsort, down": lambda x: torch.argsort(x, 0, True),
    "argsort, by name": lambda x: torch.argsort(x, dim=0, descending=True),
    "topk": lambda x: x.topk(2)[0],
    "topk, smallest": lambda x: torch.topk(x, 2, 0, False)[1],
    "topk, by name": lambda x: torch.topk(x, k=1, dim=0).values,
    "atan2": lambda x: torch.atan2(x, W),
    "max": lambda x: x.max(),
    "max, dim": lambda x: x.max(1)[0],
    "max, kept": lambda x: torch.max(x, dim=0, keepdim=True).values,
    "max, of two": lambda x: torch.max(x, W),
    "max, of two by name": lambda x: torch.max(x, other=W),
    "min": lambda x: torch.min(x),
    "min, dim": lambda x: x.min(dim=-1).indices,
    "min, of two": lambda x: x.min(W),
    "prod": lambda x: x.prod(),
    "prod, dim": lambda x: torch.prod(x, 0, True),
    "prod, a dtype": lambda x: x.prod(dtype=torch.float64),
    "lerp": lambda x: x.lerp(W, 0.5),
    "lerp, a tensor": lambda x: torch.lerp(x, W, W),
    "lerp, by name": lambda x: torch.lerp(x, end=W, weight=0.25),
    "eq, a number": lambda x: x == 0,
    "lt, a truth value": lambda x: x < True,
    "ge": lambda x: torch.ge(x, W),
    "an overload": lambda x: aten.sum.dim_IntList(x, [0], True),
    "an overload, a number for a list": lambda x: aten.sum.dim_IntList(x, 0),
    "an overload, a tuple": lambda x: aten.permute.default(x, (1, 0)),
    "an overload by name": lambda x: aten.sum.dim_IntList(x, [0], keepdim=True),
    "an overload of a constant first": lambda x: aten.mm.default(W, x),
    "an overload that is composite": lambda x: aten.conv2d.default(x.view(1, 1, 4, 4), KERNEL),
    "an overload that writes": lambda x: aten.add_.Tensor(x.clone(), W),
    "an overload that views": lambda x: aten.select.int(x, 0, 1),
    "an overload of TorchScript's": lambda x: aten.mT.a(x),
    "another": lambda x: aten.numpy_T.a(x),
    "a packet": lambda x: aten.softmax(x, -1, None),
}  # fmt: skip


def entered(call, x: Tensor, monkeypatch, *, closed: bool = False) -> tuple[list[Any], Any, int]:
    """The operators on wrappers that came in at vmap's level, with arguments and their defaults; the result; and how
    many of them came through PyTorch's dispatcher.

    ``closed``: the short ways are, as if autocast were on.
    """
    seen: list[Any] = []
    slowly = 0
    handle, dispatched = torch_dispatch.handle, torch_dispatch.Door.__torch_dispatch__

    def told(op, known, args, kwargs):
        if any(type(a) is WrapperTensor for a in args):
            full = [*args, *known.defaults[len(args) :]]
            for name, value in kwargs.items():
                full[known.arguments.index(name)] = value
            seen.append((str(op), [described(a) for a in full]))
        return handle(op, known, args, kwargs)

    def counted(self, op, types, args=(), kwargs=None):
        nonlocal slowly
        slowly += any(type(a) is WrapperTensor for a in args)
        return dispatched(self, op, types, args, kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch_dispatch, "handle", told)
        patched.setattr("functrans.door.operator_entrances.handle", told)
        patched.setattr(torch_dispatch.Door, "__torch_dispatch__", counted)
        for entrances in ("operator_entrances", "program_entrances") if closed else ():
            patched.setattr(f"functrans.door.{entrances}.autocast_enabled", lambda: True)
        out = functrans.vmap(call)(x)
    return seen, out, slowly


def described(a: Any) -> Any:
    if isinstance(a, list):
        return [described(one) for one in a]
    return (type(a), a.dtype, tuple(a.shape)) if isinstance(a, Tensor) else (type(a), a)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_comes_in(name, monkeypatch):
    x = torch.rand(3, 4, 4)
    call = CALLS[name]
    in_short, out, _ = entered(call, x, monkeypatch)
    through_pytorch, expected, slowly = entered(call, x, monkeypatch, closed=True)
    assert slowly, "the way through PyTorch was not taken, so there is nothing to compare with"
    assert in_short == through_pytorch
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(out, torch.stack([call(row) for row in x]))


@pytest.mark.parametrize("name", [n for n in CALLS if n not in (
    "view, a dtype", "addmm, scaled", "conv2d, same", "gelu, tanh", "clone, a format", "mean, NumPy's names",
    "sum, a dtype", "cumsum, a dtype", "softmax, by name", "gather, by name", "an overload by name", "a packet",
    "reshape, by name", "view, by name", "log_softmax", "an overload that is composite", "conv2d, by name",
    "avg_pool2d, by name", "an overload of TorchScript's", "another", "masked_fill, a tensor",
    "an overload that writes", "addcmul, scaled", "pad, reflected", "scatter, reduced", "index_add, scaled",
    "prod, a dtype", "[], everything", "[], everything twice", "[], an ellipsis alone", "[], a mask", "[], a list",
    "add_", "add_, scaled", "add_, a number", "sub_", "mul_", "div_", "+=",
    "[], tensors", "[], a tensor and a slice", "[], a truth value",
)])  # fmt: skip
def test_they_are_short(name, monkeypatch):
    """All but the calls in the list come in without the dispatcher: those give by name what does not follow the
    arguments by position, or are made of operators by PyTorch's code, or write: the pure form comes to the door."""
    for _ in range(2):  # of composites the pieces are found once
        functrans.vmap(CALLS[name])(torch.rand(3, 4, 4))
    _, _, slowly = entered(CALLS[name], torch.rand(3, 4, 4), monkeypatch)
    assert slowly == 0


def test_every_entrance_is_called():
    named = {name.partition(",")[0] for name in CALLS}
    assert named >= DIRECT.keys() - {"t", "detach", "eq", "ne", "lt", "le", "gt", "conv1d", "conv3d"}


@pytest.mark.parametrize("call", [
    lambda x: x.sum(0, 1), lambda x: x.sum([0.5]), lambda x: x.sum(dim=0, axis=1), lambda x: x.permute(0),
    lambda x: torch.mm(x), lambda x: torch.mm(x, W, W), lambda x: x.transpose(0), lambda x: x.transpose(0.0, 1),
    lambda x: aten.mm.default(x), lambda x: aten.mm.default(x, 2), lambda x: aten.mm.default(x, W, W),
    lambda x: aten.sum.dim_IntList(x, ["a"]), lambda x: F.layer_norm(x, 4), lambda x: x.softmax("a"),
    lambda x: torch.reshape(x, 2, 8), lambda x: torch.flip(x, 0, 1),
    lambda x: x[4], lambda x: x[0, 4], lambda x: x[0, 0, 0], lambda x: x[::-1], lambda x: x[::0], lambda x: x[1.5],
    lambda x: x["a"], lambda x: x[0:1.5],
    lambda x: x.sin(inplace=False), lambda x: x.clamp(0, 1, False), lambda x: x.clamp_min(0.1, inplace=False),
    lambda x: x.clamp(), lambda x: x.clamp(0, min=1), lambda x: F.leaky_relu(x, 0.1, slope=2),
    lambda x: x.view(2, 2.0), lambda x: x.unsqueeze(dims=0), lambda x: x.masked_fill(MASK, "a"),
])  # fmt: skip
def test_what_pytorch_refuses_is_refused_as_there(call):
    """The kind of error is PyTorch's, with the words of its parser."""
    with pytest.raises((TypeError, RuntimeError, IndexError, ValueError)) as plain:
        call(torch.rand(4, 4))
    with pytest.raises(type(plain.value)) as inside:
        functrans.vmap(call)(torch.rand(3, 4, 4))
    word = str(plain.value).split("(")[0].split()[0]
    assert word in str(inside.value) or type(plain.value) is not TypeError


def test_a_composite_overload_is_taken_apart_once(monkeypatch):
    """PyTorch's definition of an operator runs its pieces, and not the operator again."""
    seen, out, _ = entered(lambda x: aten.layer_norm.default(x, [4]), torch.rand(3, 4, 4), monkeypatch)
    assert [op for op, _ in seen].count("aten.layer_norm.default") == 1
    assert out.shape == (3, 4, 4)


def test_a_wrong_form_would_be_found(monkeypatch):
    """The test above, tested: an entrance that leaves a number where a list belongs."""
    info = op_info(aten.sum.dim_IntList)
    monkeypatch.setitem(info.forms, (WrapperTensor, int), ())
    with pytest.raises(AssertionError):
        test_the_same_comes_in("an overload, a number for a list", monkeypatch)
