"""clipped_grad and per_example_norms: against a loop over the examples in plain PyTorch, for distinct examples."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from identity_functions import Twice
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

import functrans as ft
from functrans import (
    clipped_grad,
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    per_example_norms,
    vmap,
)
from functrans.core.stack import interpreter_stack
from functrans.errors import CallError, CallTypeError, CallValueError
from functrans.interpreters.vmap.rules.random import RandomnessError
from functrans.shipped import clipping, gradient_parts
from functrans.shipped.example_gradients import ExampleInterpreter
from functrans.shipped.gradient_parts import Gradient

N = 5
Params = Any


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert interpreter_stack() == []


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts each gradient was kept in, beside a tensor; one list for all calls."""
    found: list[int] = []
    original = ExampleInterpreter.gradient

    def gradient(self: ExampleInterpreter, cotangents: Any, index: int | None) -> Gradient:
        made = original(self, cotangents, index)
        found.append(len(made.factors) + len(made.patches))
        return made

    monkeypatch.setattr(ExampleInterpreter, "gradient", gradient)
    return found


def gradients(loss: Callable[..., Tensor], params: Params, *batch: Tensor) -> list[list[Tensor]]:
    """One list per example, in plain PyTorch."""
    found = []
    for example in zip(*batch, strict=True):
        leaves = [p.detach().clone().requires_grad_() for p in tree_leaves(params)]
        own = tree_unflatten(leaves, torch.utils._pytree.tree_structure(params))
        out = torch.autograd.grad(loss(own, *example), leaves, allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, out, strict=True)])
    return found


def by_loop(loss: Callable[..., Tensor], bound: float, params: Params, *batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The norms, and the sum of the clipped gradients."""
    norms, total = [], [torch.zeros_like(p) for p in tree_leaves(params)]
    for own in gradients(loss, params, *batch):
        norm = torch.stack([g.abs().square().sum() for g in own]).sum().sqrt()
        scale = min(1.0, bound / norm.item()) if norm > 0 else 1.0
        total = [t + scale * g for t, g in zip(total, own, strict=True)]
        norms.append(norm)
    return torch.stack(norms), total


def agree(loss: Callable[..., Tensor], params: Params, *batch: Tensor) -> None:
    norms, _ = by_loop(loss, 1.0, params, *batch)
    bound = norms.sort().values[1:3].mean().item()  # some are clipped, and some are not
    _, total = by_loop(loss, bound, params, *batch)
    assert norms.unique().numel() == len(norms) and (norms < bound).any() and (norms > bound).any()
    torch.testing.assert_close(per_example_norms(loss)(params, *batch), norms)
    for chunk_size in (None, 2):
        found = clipped_grad(loss, bound, chunk_size=chunk_size)(params, *batch)
        torch.testing.assert_close(tree_leaves(found), total)


def of_net(net: nn.Module) -> tuple[Callable[..., Tensor], Params]:
    """The loss of one example, which goes through the module as a batch of one, as most modules want it."""
    params = {name: p.detach() for name, p in net.double().named_parameters()}

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(net, params, (x.unsqueeze(0),)) - y).square().mean()

    return loss, params


class Net(NamedTuple):
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    #: of each parameter's gradient, in how many parts it is kept
    parts: list[int]


NETS = {
    "mlp": Net(lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)), (6,),
        [1, 0, 1, 0, 1, 0]),
    "sequence": Net(lambda: nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 4, bias=False)), (3, 20),
        [1, 0, 1]),
    "long sequence": Net(lambda: nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 2)), (30, 4), [0] * 4),
    "layer norm": Net(lambda: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.LayerNorm((3, 12))), (3, 12),
        [0, 0, 1, 0, 0, 0]),
    "group norm": Net(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        (2, 5, 5), [1, 0, 0, 0, 0, 0]),
    "conv1d": Net(lambda: nn.Sequential(nn.Conv1d(24, 32, 3, stride=2, padding=2, dilation=2), nn.Tanh(),
        nn.Conv1d(32, 40, 2)), (24, 9), [1, 0, 1, 0]),
    "conv2d": Net(lambda: nn.Sequential(nn.Conv2d(24, 32, 3, stride=2, padding=1, groups=2), nn.Tanh(),
        nn.Conv2d(32, 40, (2, 1), dilation=(2, 1), bias=False)), (24, 8, 6), [1, 0, 1]),
    "conv2d, small": Net(lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 2, 2)), (3, 6, 6),
        [0] * 4),
    "conv2d, dilated": Net(lambda: nn.Sequential(
        nn.Conv2d(1, 20, (3, 2), stride=(2, 1), dilation=(1, 2), padding=1), nn.Tanh(),
        nn.Conv2d(20, 200, (1, 2), groups=10)),
        (1, 7, 6), [0] * 4),
    "conv2d, groups and strides": Net(lambda: nn.Conv2d(2, 40, 3, stride=2, groups=2), (2, 9, 8), [1, 0]),
    "conv2d, same": Net(lambda: nn.Conv2d(20, 20, 3, padding="same", padding_mode="reflect"), (20, 4, 4), [1, 0]),
    "conv3d": Net(lambda: nn.Conv3d(12, 20, 2, padding=1), (12, 3, 2, 3), [1, 0]),
    "transposed": Net(lambda: nn.ConvTranspose2d(8, 20, 3, stride=2), (8, 3, 3), [0, 0]),
    "gru": Net(lambda: Last(nn.GRU(8, 10, batch_first=True)), (4, 8), [1, 1, 0, 0]),
    "attention": Net(lambda: Attend(nn.MultiheadAttention(12, 3, batch_first=True)), (4, 12), [1, 0, 1, 0]),
}  # fmt: skip


class Last(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1]


class Attend(Last):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", NETS)
def test_networks(name: str, parts: list[int]) -> None:
    net = NETS[name]
    loss, params = of_net(net.module())
    agree(loss, params, torch.randn(N, *net.shape, dtype=torch.float64), torch.randn(N, dtype=torch.float64))
    assert parts[: len(net.parts)] == net.parts


@pytest.mark.parametrize("most", [1, 1 << 30])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "group norm", "conv2d, groups and strides", "conv3d"])
def test_convolutions_a_few_examples_at_a_time(
    name: str, most: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_parts, "MOST", most)
    test_networks(name, parts)


def test_two_halves_where_rows_outweigh_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []

    def loss(params: Params, x: Tensor) -> Tensor:
        runs.append(x)
        return ((x @ params["a"]).tanh() @ params["b"]).square().sum() + params["c"] @ x

    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in (("a", (6, 4)), ("b", (4, 5)), ("c", 6))}
    batch = torch.randn(31, 6, dtype=torch.float64)
    whole = clipped_grad(loss, 0.5, chunk_size=31)(params, batch)
    for large, count in ((1 << 27, 1), (300, 2), (700, 1)):
        monkeypatch.setattr(clipping, "LARGE", large)
        runs.clear()
        torch.testing.assert_close(clipped_grad(loss, 0.5)(params, batch), whole)
        assert len(runs) == count
    monkeypatch.setattr(clipping, "LARGE", 0)
    for options, examples, count in (
        ({}, batch[:2], 1),  # the matrices outweigh the rows
        ({"randomness": "different"}, batch, 1),  # which would draw others
        ({"in_dims": (None, 1)}, batch.T, 2),
        ({"chunk_size": 31}, batch, 1),
    ):
        runs.clear()
        norms = per_example_norms(loss, **options)(params, examples)
        assert len(runs) == count
        torch.testing.assert_close(norms, torch.stack([per_example_norms(loss)(params, x[None])[0] for x in (
            examples.T if "in_dims" in options else examples)]))  # fmt: skip


#: Numbers of the module do not depend on what ran before.
SEEDED = torch.Generator().manual_seed(0)
X, ROWS = (torch.randn(shape, dtype=torch.float64, generator=SEEDED) for shape in ((N, 6), (N, 2, 6)))
WORDS = torch.tensor([[0, 3, 3, 1], [2, 2, 2, 2], [1, 0, 4, 0], [5, 6, 7, 8], [3, 3, 0, 0]])


def weights(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    numbers = (torch.randn(shape, dtype=torch.float64, generator=SEEDED) / 2 for shape in shapes)
    return dict(zip("wvb", numbers, strict=False))


def flat(p: Params, x: Tensor) -> Tensor:
    return (x @ p["w"][:48].view(6, 8)).tanh() @ p["w"][48:]


def tied_language_model(p: Params, words: Tensor) -> Tensor:
    hidden = F.embedding(words[:-1], p["w"], padding_idx=0) @ p["v"]
    return F.cross_entropy(hidden.tanh() @ p["w"].T, words[1:])


def recurrent(p: Params, xs: Tensor) -> Tensor:
    h = torch.zeros(8, dtype=torch.float64)
    for x in xs:
        h = torch.tanh(p["w"] @ h + p["v"] @ x)
    return h.square().sum()


def written(p: Params, x: Tensor) -> Tensor:
    w = p["w"].clone()
    w.mul_(2)
    w[0] = x[0]
    return (x @ w).sin().sum()


def hooked(p: Params, x: Tensor) -> Tensor:
    p["w"].register_hook(lambda g: 3 * g)
    return (x @ p["w"]).sin().sum()


class Use(NamedTuple):
    loss: Callable[..., Tensor]
    params: dict[str, Tensor]
    batch: Tensor
    parts: int


W = (6, 8)
#: The ways to use a matrix, the loss of one example in each; how many parts the gradient for ``w`` is kept in.
USES = {
    "matmul": Use(lambda p, x: (x @ p["w"]).tanh().sum(), weights(W), X, 1),
    "matmul from the left": Use(lambda p, x: (p["w"] @ x.repeat(2)[:8]).tanh().sum(), weights(W), X, 1),
    "matmul of rows": Use(lambda p, x: (x @ p["w"]).tanh().sum(), weights(W), ROWS, 1),
    "matmul of columns": Use(lambda p, x: (p["w"].T @ x.mT).tanh().sum(), weights(W), ROWS, 1),
    "matmul of a batch": Use(lambda p, x: (x.unsqueeze(1) @ p["w"]).tanh().sum(), weights(W), ROWS, 1),
    "a batch from the left": Use(lambda p, x: (p["w"].mT @ x.view(2, 6, 1)).tanh().sum(), weights(W), ROWS, 1),
    "mm": Use(lambda p, x: torch.mm(x, p["w"]).tanh().sum(), weights(W), ROWS, 1),
    "mv": Use(lambda p, x: torch.mv(p["w"].t(), x).tanh().sum(), weights(W), X, 1),
    "addmm": Use(lambda p, x: torch.addmm(p["v"], x, p["w"], alpha=3, beta=2).sin().sum(), weights(W, (8,)), ROWS, 1),
    "addmv": Use(lambda p, x: torch.addmv(p["v"], p["w"].mT, x, alpha=3).sin().sum(), weights(W, (8,)), X, 1),
    "linear": Use(lambda p, x: F.linear(x, p["w"].T, p["v"]).sin().sum(), weights(W, (8,)), X, 1),
    "linear of rows": Use(lambda p, x: F.linear(x, p["w"].T, p["v"]).sin().sum(), weights(W, (8,)), ROWS, 1),
    "a parameter as input": Use(lambda p, x: F.linear(p["w"], x).sin().sum(), weights((8, 6)), ROWS, 0),
    "permuted, transposed": Use(
        lambda p, x: (x @ p["w"].permute(1, 0).transpose(-1, -2).contiguous()).sin().sum(), weights(W), X, 1),
    "einsum": Use(lambda p, x: torch.einsum("td,dk->tk", x, p["w"]).sin().sum(), weights(W), ROWS, 1),
    "einsum, turned": Use(
        lambda p, x: torch.einsum("kd,btd->bkt", p["w"], x).sin().sum(), weights((8, 6)), ROWS.unsqueeze(1), 1),
    "einsum of three": Use(lambda p, x: torch.einsum("i,ij,j->", x, p["w"], p["v"]).sin(), weights(W, (8,)), X, 1),
    "bmm": Use(lambda p, x: torch.bmm(x.unsqueeze(0), p["w"].unsqueeze(0)).sin().sum(), weights(W), ROWS, 1),
    "bmm of two": Use(lambda p, x: torch.bmm(x.unsqueeze(1), p["w"].expand(2, 6, 8)).sin().sum(), weights(W), ROWS, 0),
    "views": Use(
        lambda p, x: (x @ p["w"].view(6, 1, 8).transpose(0, 2).squeeze(1).mT.reshape(6, 8)).sin().sum(),
        weights(W), X, 1),
    "another shape": Use(lambda p, x: (x @ p["w"].view(6, 8)).sin().sum(), weights((8, 6)), X, 0),
    "of three dimensions": Use(lambda p, x: (x @ p["w"].squeeze(1)).sin().sum(), weights((6, 1, 8)), X, 0),
    "a column": Use(lambda p, x: (p["w"].T @ x).sin().sum() + (x @ p["w"]).sum(), weights((6, 1)), X, 0),
    "twice": Use(lambda p, x: ((x @ p["w"]).tanh() @ p["w"].T).tanh().sum(), weights((6, 40)), X, 1),
    "twice, once otherwise": Use(lambda p, x: (x @ p["w"]).tanh().sum() * p["w"].sum(), weights(W), X, 1),
    "recurrent": Use(recurrent, weights((8, 8), (8, 6)), ROWS, 1),
    "normalized": Use(lambda p, x: (x @ (p["w"] / p["w"].norm(dim=0))).tanh().sum(), weights(W), X, 0),
    "a flat vector": Use(flat, weights((56,)), X, 0),
    "written": Use(written, weights(W), X, 0),
    "hooked": Use(hooked, weights(W), X, 0),
    "a Function": Use(lambda p, x: (Twice.apply(x) @ Twice.apply(p["w"])).tanh().sum(), weights(W), X / 9, 0),
    "bias": Use(lambda p, x: (x.sum() + p["w"]).sin().sum(), weights((3,)), X, 0),
    "in an inner vmap": Use(
        lambda p, x: vmap(lambda row: torch.tanh(p["w"].T @ row))(x).square().sum(), weights(W), ROWS, 1),
    "in an inner grad": Use(
        lambda p, x: grad(lambda z: (torch.tanh(z @ p["w"]) @ p["v"]))(x).square().sum(), weights(W, (8,)), X, 1),
    "embedding": Use(lambda p, i: F.embedding(i, p["w"]).sin().sum(), weights((40, 3)), WORDS, 1),
    "embedding, padded": Use(lambda p, i: F.embedding(i, p["w"], 3).sin().sum(), weights((40, 3)), WORDS, 1),
    "embedding, int32": Use(lambda p, i: F.embedding(i, p["w"]).sin().sum(), weights((40, 3)), WORDS.int(), 1),
    "embedding, by frequency": Use(
        lambda p, i: F.embedding(i, p["w"], scale_grad_by_freq=True).sin().sum(), weights((40, 3)), WORDS, 0),
    "embedding, one word": Use(lambda p, i: F.embedding(i[0], p["w"]).sin().sum(), weights((40, 3)), WORDS, 1),
    "embedding, turned": Use(lambda p, i: F.embedding(i, p["w"].T).sin().sum(), weights((3, 40)), WORDS, 1),
    "embedding, small": Use(lambda p, i: F.embedding(i, p["w"]).sin().sum(), weights((9, 2)), WORDS, 0),
    "embedding, tied": Use(tied_language_model, weights((40, 6), (6, 6)), WORDS, 2),
    "embedding, tied, turned": Use(
        lambda p, i: (F.embedding(i, p["w"].T) @ p["w"]).tanh().sum(), weights((8, 90)), WORDS, 2),
    "embedding, tied with a sum": Use(
        lambda p, i: F.embedding(i, p["w"].T).sin().sum() * p["w"].sum(), weights((3, 40)), WORDS, 1),
    "convolution, tied": Use(
        lambda p, x: F.conv1d(F.conv1d(x.T, p["w"], padding=1).tanh(), p["w"], padding=1, stride=2).sum(),
        weights((6, 6, 3)), ROWS / 2, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_uses(name: str, parts: list[int]) -> None:
    use = USES[name]
    agree(use.loss, use.params, use.batch)
    assert parts[0] == use.parts


LOSS, PARAMS = USES["addmv"].loss, weights(W, (8,))


def naive(bound: float) -> Callable[..., Any]:
    """The clipped sum by vmap(grad)."""

    def clipped(params: Params, *batch: Tensor) -> Params:
        own = vmap(grad(LOSS), in_dims=(None, *[0] * len(batch)))(params, *batch)
        norms = sum(g.flatten(1).square().sum(1) for g in own.values()).sqrt()
        return {k: torch.tensordot(bound / norms.clamp(min=bound), g, 1) for k, g in own.items()}

    return clipped


def norms_by_grad(params: Params, x: Tensor) -> Tensor:
    own = vmap(grad(LOSS), in_dims=(None, 0))(params, x)
    return sum(g.flatten(1).square().sum(1) for g in own.values()).sqrt()


COMPOSED: dict[str, Callable[[Callable[..., Any], Callable[..., Tensor]], Any]] = {
    "vmap": lambda clip, norms: vmap(lambda w, x: clip({**PARAMS, "w": w}, x), in_dims=(0, None))(
        torch.stack([PARAMS["w"], -2 * PARAMS["w"]]), X),
    "vmap over batches": lambda clip, norms: vmap(clip, in_dims=(None, 1))(PARAMS, torch.stack([X, X.sin()], 1)),
    "grad of a norm": lambda clip, norms: grad(lambda p: (norms(p, X) ** 1.5).sum())(PARAMS),
    "grad by the data": lambda clip, norms: grad(lambda x: norms(PARAMS, x).square().sum())(X),
    "jvp": lambda clip, norms: jvp(lambda p: (clip(p, X), norms(p, X)), (PARAMS,), (tree_map(torch.sin, PARAMS),)),
    "jacrev": lambda clip, norms: jacrev(lambda v: clip({**PARAMS, "v": v}, X)["w"])(PARAMS["v"]),
    "jacfwd": lambda clip, norms: jacfwd(lambda v: clip({**PARAMS, "v": v}, X)["w"])(PARAMS["v"]),
    "hessian": lambda clip, norms: hessian(lambda v: norms({**PARAMS, "v": v}, X).sum())(PARAMS["v"]),
    "vmap of grad": lambda clip, norms: vmap(grad(lambda w, x: norms({**PARAMS, "w": w}, x).sum()), in_dims=(0, None))(
        torch.stack([PARAMS["w"], -2 * PARAMS["w"]]), X),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_composed(name: str) -> None:
    bound = norms_by_grad(PARAMS, X).median().item() * 0.9
    found = COMPOSED[name](clipped_grad(LOSS, bound), per_example_norms(LOSS))
    expected = COMPOSED[name](naive(bound), norms_by_grad)
    torch.testing.assert_close(tree_leaves(found), tree_leaves(expected))


A, ROWS_OF_3 = torch.randn(4, 3, dtype=torch.float64, generator=SEEDED), X[:, :3]


def smooth(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).tanh().square().sum()


#: Losses that use other transforms.
INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sanitize": ft.sanitize(smooth),
    "reap": lambda w, x: ft.reap(smooth)(w, x)[0],
    "count": lambda w, x: ft.count(smooth)(w, x)[0],
    "functionalize": ft.functionalize(smooth),
    "jvp": lambda w, x: jvp(lambda x: smooth(w, x), (x,), (x,))[1],
    "hvp": lambda w, x: ft.hvp(lambda x: smooth(w, x), (x,), (x,))[1][0].sum(),
    "jet": lambda w, x: ft.jet(lambda x: smooth(w, x), (x,), ([x],))[1][0],
    "laplacian": lambda w, x: ft.laplacian(lambda x: smooth(w, x))(x),
    "bounds": lambda w, x: ft.bounds(lambda x: (w @ x).sum())(x - 0.1, x + 0.1)[0],
    "per_example_norms": lambda w, x: per_example_norms(lambda v, y: smooth(w, v * y))(x, ROWS_OF_3).sum(),
    "cond": lambda w, x: torch.cond(x.sum() > 0, lambda x: smooth(w, x), lambda x: (w @ x).cos().sum(), (x,)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_other_transforms_inside(name: str) -> None:
    loss = INSIDE[name]
    own = vmap(grad(loss), in_dims=(None, 0))(A, ROWS_OF_3)
    norms = own.flatten(1).norm(dim=1)
    bound = norms.median().item() * 0.9
    torch.testing.assert_close(per_example_norms(loss)(A, ROWS_OF_3), norms)
    total = torch.tensordot((bound / norms).clamp(max=1), own, 1)
    torch.testing.assert_close(clipped_grad(loss, bound)(A, ROWS_OF_3), total)


AROUND: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "sanitize": lambda f: ft.sanitize(f)(A),
    "reap": lambda f: ft.reap(f)(A)[0],
    "count": lambda f: ft.count(f)(A)[0],
    "functionalize": lambda f: ft.functionalize(f)(A),
    "linearize": lambda f: ft.linearize(f, A)[1](A),
    "jet": lambda f: ft.jet(f, (A,), ([A, -A],)),
    "laplacian": lambda f: ft.laplacian(f)(A),
}


@pytest.mark.parametrize("name", AROUND)
def test_other_transforms_around(name: str) -> None:
    by_grad = lambda w: vmap(grad(smooth), in_dims=(None, 0))(w, ROWS_OF_3).flatten(1).norm(dim=1).sum()
    found = AROUND[name](lambda w: per_example_norms(smooth)(w, ROWS_OF_3).sum())
    torch.testing.assert_close(found, AROUND[name](by_grad))


def test_autocast() -> None:
    loss = lambda p, x: (F.linear(x, p["w"].T, p["v"]).tanh() @ p["v"]).sum()
    params, x = {k: p.float() for k, p in PARAMS.items()}, X.float()
    with torch.autocast("cpu", torch.bfloat16):
        own = vmap(grad(loss), in_dims=(None, 0))(params, x)
        found = per_example_norms(loss)(params, x)
        total = clipped_grad(loss, 1e9)(params, x)
    torch.testing.assert_close(found, sum(g.flatten(1).square().sum(1) for g in own.values()).sqrt(), rtol=0.02, atol=0)
    torch.testing.assert_close(total, {k: g.sum(0) for k, g in own.items()}, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(6, 6, 3), (6, 6, 1, 2)])
def test_derivatives_of_the_norm_of_a_convolution(shape: tuple[int, ...]) -> None:
    w, x = torch.randn(shape, dtype=torch.float64), torch.randn(3, 6, *[2] * (len(shape) - 2), dtype=torch.float64)
    conv: Any = F.conv1d if len(shape) == 3 else F.conv2d

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return conv(x, w, padding=1).tanh().sum()

    norms = lambda w: per_example_norms(loss)(w, x)
    assert torch.autograd.gradcheck(norms, w.requires_grad_())
    torch.testing.assert_close(jacrev(norms)(w), jacfwd(norms)(w))


def test_the_derivative_of_a_norm_of_zero() -> None:
    loss = lambda w, x: torch.dot(w, w * x)
    norms, zeros = lambda x: per_example_norms(loss)(torch.ones(3), x), torch.zeros(2, 3)
    assert norms(zeros).tolist() == [0.0, 0.0] and not jacrev(norms)(zeros).any()
    assert clipped_grad(loss, 1.0)(torch.ones(3), torch.zeros(2, 3)).tolist() == [0.0] * 3


def test_base_autograd() -> None:
    w = PARAMS["w"].clone().requires_grad_()
    per_example_norms(LOSS)({**PARAMS, "w": w}, X).sum().backward()
    torch.testing.assert_close(w.grad, grad(lambda w: norms_by_grad({**PARAMS, "w": w}, X).sum())(PARAMS["w"]))


def test_complex_parameters() -> None:
    w = torch.randn(6, 8, dtype=torch.complex128)
    agree(lambda p, x: ((x + 1j * x**2) @ p["w"]).abs().square().sum(), {"w": w}, X)


def test_complex_convolution() -> None:
    w, x = torch.randn(20, 1, 2, dtype=torch.complex128), torch.randn(N, 1, 6, dtype=torch.complex128)
    agree(lambda p, x: (F.conv1d(x, p["w"]).abs() ** 3).sum(), {"w": w}, x)


def test_half_precision() -> None:
    loss = lambda w, x: (x @ w).sin().sum()
    w, x = PARAMS["w"].bfloat16(), X.bfloat16()
    norms = per_example_norms(loss)(w, x)
    assert norms.dtype is torch.float32 and clipped_grad(loss, 1.0)(w, x).dtype is torch.bfloat16
    torch.testing.assert_close(norms.double(), by_loop(loss, 1.0, w.double(), x.double())[0], rtol=0.02, atol=0.02)


def test_compiled() -> None:
    def program(params: Params, x: Tensor) -> Any:
        total = clipped_grad(lambda x, p: LOSS(p, x), 0.5, argnums=1, in_dims=(1, None))(x.T, params)
        norms, sums = per_example_norms(lambda p, x: (LOSS(p, x), x.sum()), has_aux=True)(params, x)
        return total["w"] * norms.sum(), sums

    compiled = torch.compile(program, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(PARAMS, X), program(PARAMS, X))


def test_argnums() -> None:
    def loss(x: Tensor, w: Tensor, tree: list[Tensor], y: Tensor) -> Tensor:
        return (x @ w @ tree[0] - y).square() + tree[1].sum() * x.sum()

    w, v, b, y = PARAMS["w"], PARAMS["v"], torch.randn(2, dtype=torch.float64), torch.arange(5.0).double()
    swapped = lambda p, x, y: loss(x, p[1], p[0], y)
    norms, total = by_loop(swapped, 2.0, [[v, b], w], X, y)
    for argnums in ((2, 1), (-2, -3)):
        torch.testing.assert_close(per_example_norms(loss, argnums)(X, w, [v, b], y), norms)
        found = clipped_grad(loss, 2.0, argnums)(X, w, [v, b], y)
        assert isinstance(found, tuple) and isinstance(found[0], list)
        torch.testing.assert_close(tree_leaves(found), total)
    norms, total = by_loop(lambda w, x, y: loss(x, w, [v, b], y), 2.0, w, X, y)
    found = clipped_grad(loss, 2.0, 1, in_dims=(1, None, None, 0))(X.T, w, [v, b], y)
    torch.testing.assert_close(found, total[0])
    by_input = per_example_norms(loss, 0, in_dims=(0, None, None, 0))(X, w, [v, b], y)
    torch.testing.assert_close(by_input, vmap(grad(loss), in_dims=(0, None, None, 0))(X, w, [v, b], y).norm(dim=1))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_aux_and_keyword_arguments(chunk_size: int | None) -> None:
    def loss(p: Params, x: Tensor, *, shift: Tensor) -> Any:
        return LOSS(p, x + shift), {"sum": x.sum(), "name": "loss"}

    shift = torch.tensor(0.5, dtype=torch.float64)
    for f in (clipped_grad(loss, 1.0, has_aux=True, chunk_size=chunk_size),
              per_example_norms(loss, has_aux=True, chunk_size=chunk_size)):  # fmt: skip
        found, aux = f(PARAMS, X, shift=shift)
        assert torch.equal(aux["sum"], X.sum(1)) and aux["name"] == "loss"
    torch.testing.assert_close(found, norms_by_grad(PARAMS, X + shift))


def test_randomness() -> None:
    loss = lambda w, x: (F.dropout(x, 0.5) @ w).sum()
    w, x = PARAMS["w"], torch.ones(40, 6).double()
    with pytest.raises(RandomnessError):
        clipped_grad(loss, 1.0)(w, x)
    assert per_example_norms(loss, randomness="different")(w, x).unique().numel() > 1
    for chunk_size in (None, 7):
        assert per_example_norms(loss, randomness="same", chunk_size=chunk_size)(w, x).unique().numel() == 1


def test_no_examples_and_no_dependence() -> None:
    assert per_example_norms(LOSS)(PARAMS, X[:0]).shape == (0,)
    assert not any(g.any() for g in clipped_grad(LOSS, 1.0)(PARAMS, X[:0]).values())
    convolution, kernels = of_net(nn.Conv2d(20, 20, 3))
    for images in (torch.zeros(0, 20, 4, 4), torch.zeros(2, 20, 4, 4)):
        found = clipped_grad(convolution, 1.0)(kernels, images.double(), torch.zeros(len(images)).double())
        assert found["weight"].shape == (20, 20, 3, 3) and not found["weight"].any()
    assert not per_example_norms(lambda p, x: x.sum())(PARAMS, X).any()
    constant = lambda p, x: p["w"].square().sum()
    torch.testing.assert_close(per_example_norms(constant)(PARAMS, X), 2 * PARAMS["w"].norm().expand(N))
    found = clipped_grad(constant, 1.0)(PARAMS, X)
    torch.testing.assert_close(found["w"], N * PARAMS["w"] / PARAMS["w"].norm())
    assert not found["v"].any()


def test_bounds() -> None:
    bound = torch.tensor(0.5)
    torch.testing.assert_close(clipped_grad(LOSS, bound)(PARAMS, X), clipped_grad(LOSS, 0.5)(PARAMS, X))
    by_bound = jvp(lambda b: clipped_grad(LOSS, b)(PARAMS, X)["v"], (bound.double(),), (torch.tensor(1.0).double(),))
    step = clipped_grad(LOSS, 0.5 + 1e-6)(PARAMS, X)["v"] - clipped_grad(LOSS, 0.5 - 1e-6)(PARAMS, X)["v"]
    torch.testing.assert_close(by_bound[1], step / 2e-6, rtol=1e-5, atol=1e-7)
    everything = clipped_grad(LOSS, 1e9)(PARAMS, X)
    for none_reaches in (float("inf"), 10**400):
        torch.testing.assert_close(clipped_grad(LOSS, none_reaches)(PARAMS, X), everything)
    for wrong, kind in ((0, CallValueError), (-1.0, CallValueError), (float("nan"), CallValueError),
                        (torch.ones(2), CallValueError), (torch.tensor(-1.0), CallValueError),
                        ("1", CallTypeError), (True, CallTypeError), (torch.tensor(1), CallTypeError)):  # fmt: skip
        with pytest.raises(kind, match=r"clipped_grad\(<lambda>, bound=.*expected a positive number"):
            clipped_grad(LOSS, wrong)


def test_wrong_calls() -> None:
    with pytest.raises(CallError, match=r"per_example_norms\(.*an output of shape \(6,\); expected a scalar"):
        per_example_norms(lambda p, x: x)(PARAMS, X)
    with pytest.raises(CallValueError, match="in_dim 0 for args.0.; expected None for an argument to"):
        clipped_grad(LOSS, 1.0, in_dims=0)(PARAMS, X)
    with pytest.raises(CallValueError, match="no argument with a batch"):
        per_example_norms(lambda p: p["w"].sum())(PARAMS)
    with pytest.raises(CallError, match=r"argnum 2 for 2 positional arguments"):
        clipped_grad(LOSS, 1.0, argnums=2)(PARAMS, X)


def test_gradients_of_examples_are_not_made() -> None:
    """Of a linear layer, an embedding and a convolution with large weights, by what memory a call takes."""
    params = {"table": torch.randn(512, 64), "conv": torch.randn(64, 64, 9), "linear": torch.randn(256, 64)}
    words = torch.randint(0, 512, (64, 4))

    def loss(p: Params, words: Tensor) -> Tensor:
        hidden = F.embedding(words, p["table"])
        hidden = F.conv1d(hidden.T, p["conv"], padding=4).T.relu()
        return F.linear(hidden, p["linear"]).square().mean()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        clipped_grad(loss, 1.0)(params, words)
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    of_examples = 4 * len(words) * min(p.numel() for p in params.values())
    assert largest < of_examples / 4
