"""What is written keeps its strides: random chains of writes and views, ended by ``as_strided``, against plain PyTorch.

A chain runs on tensors of many layouts. Plain PyTorch (a loop over the examples, autograd, a difference quotient) says
which elements ``as_strided`` reads, which strides every tensor shows, and what is refused.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functrans import grad, jvp, vmap
from functrans.errors import InsideTransformError

F64 = torch.float64

#: By name: the layout of the tensor that a chain starts from, as a function of an example of shape (2, 3, 4).
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda x: x.clone(),
    "product": lambda x: x * 1,
    "transposed copy": lambda x: x.mT.clone(),
    "permuted": lambda x: x.permute(2, 0, 1).clone(),
    "contiguous buffer": lambda x: x.new_empty_strided((4, 3, 2), (6, 2, 1)).copy_(x.permute(2, 1, 0)),
    "permuted buffer": lambda x: x.new_empty_strided((2, 3, 4), (1, 8, 2)).copy_(x),
    "buffer like": lambda x: torch.empty_like(x.transpose(0, 2)).copy_(x.permute(2, 1, 0) * 2),
    "channels last": lambda x: x.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last).clone()[0],
    "zeros like": lambda x: torch.zeros_like(x.mT).copy_((x * 3).mT.contiguous()),
    "columns of a buffer": lambda x: x.new_zeros(2, 3, 8)[..., ::2].copy_(x),
    "end of a buffer": lambda x: x.new_zeros(4, 3, 4)[2:].copy_(x),
    "expanded": lambda x: x[:, :1].clone().expand(2, 3, 4),
    "one matrix": lambda x: x[0].clone().t(),
    "out": lambda x: torch.add(x.mT, 1, out=x.new_empty(2, 4, 3)),
    "out, transposed": lambda x: torch.mul(x, 2, out=x.new_empty(2, 4, 3).mT),
}


def other(t: Tensor, x: Tensor, rng: random.Random) -> Tensor:
    """Values for the shape of ``t`` that depend on ``x`` and lie in memory otherwise."""
    v = x.flatten()[: 1 + rng.randrange(3)].sum() * (torch.arange(t.numel(), dtype=x.dtype) + 1).reshape(t.shape)
    if t.dim() > 1 and rng.random() < 0.7:
        v = v.transpose(0, -1).contiguous().transpose(0, -1)
    return v


WRITES: tuple[Callable[[Tensor, Tensor, random.Random], Any], ...] = (
    lambda t, x, rng: t.copy_(other(t, x, rng)),
    lambda t, x, rng: t.add_(other(t, x, rng)),
    lambda t, x, rng: t.mul_(2),
    lambda t, x, rng: t.fill_(1.5),
    lambda t, x, rng: t.zero_(),
    lambda t, x, rng: t.sin_(),
    lambda t, x, rng: t.sub_(other(t, x, rng).sum()),
    lambda t, x, rng: t.__setitem__(0, other(t[0], x, rng)),
    lambda t, x, rng: t.__setitem__((..., slice(1, None)), other(t[..., 1:], x, rng)),
    lambda t, x, rng: t.__setitem__((..., -1), x.sum()),
    lambda t, x, rng: t.__setitem__(torch.arange(t.shape[0]), other(t, x, rng)),
    lambda t, x, rng: t.transpose(0, -1).mul_(other(t.transpose(0, -1), x, rng)),
    lambda t, x, rng: t.select(-1, 0).copy_(other(t.select(-1, 0), x, rng)),
    lambda t, x, rng: t.masked_fill_(torch.arange(t.numel()).reshape(t.shape) % 3 == 0, 7.0),
    lambda t, x, rng: t.index_add_(0, torch.tensor([0]), other(t[:1], x, rng)),
    lambda t, x, rng: torch.add(t, other(t, x, rng), out=t),
    lambda t, x, rng: torch.cos(other(t, x, rng), out=t.contiguous() if 0 in t.stride() else t),
    lambda t, x, rng: t.addcmul_(other(t, x, rng), other(t, x, rng)),
    lambda t, x, rng: t.as_strided((t.shape[-1],), (t.stride(-1),)).mul_(3),
    lambda t, x, rng: t.transpose_(0, -1),
    lambda t, x, rng: t.unsqueeze_(0),
    lambda t, x, rng: t.squeeze_(0),
)
VIEWS: tuple[Callable[[Tensor, random.Random], Tensor], ...] = (
    lambda t, rng: t.transpose(0, -1),
    lambda t, rng: t[1:] if t.shape[0] > 1 else t,
    lambda t, rng: t[..., ::2],
    lambda t, rng: t.select(rng.randrange(t.dim()), 0) if t.dim() > 1 else t,
    lambda t, rng: t.unsqueeze(rng.randrange(t.dim() + 1)),
    lambda t, rng: t.permute(rng.sample(range(t.dim()), t.dim())),
    lambda t, rng: t.flatten(),
    lambda t, rng: t.reshape(-1, t.shape[-1]),
    lambda t, rng: t.contiguous(),
    lambda t, rng: t.clone(),
    lambda t, rng: torch.empty_like(t).copy_(t),
    lambda t, rng: t.narrow(0, 0, 1),
    lambda t, rng: t.diagonal() if t.dim() > 1 else t,
    lambda t, rng: t.movedim(0, -1),
)


def chain(start: str, seed: int) -> Callable[[Tensor, list[Any]], Tensor]:
    """A program of one example; notes in the list what its tensors show."""

    def program(x: Tensor, shown: list[Any]) -> Tensor:
        rng = random.Random(seed)
        held = [STARTS[start](x)]
        for _ in range(rng.randint(1, 5)):
            t = rng.choice(held)
            if rng.random() < 0.6:
                rng.choice(WRITES)(t, x, rng)
            else:
                held.append(rng.choice(VIEWS)(t, rng))
        read = []
        for t in held:
            shape, strides = tuple(t.shape), tuple(t.stride())
            shown.append((shape, tuple(s for s, n in zip(strides, shape) if n > 1), t.is_contiguous()))
            length = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
            places = t.as_strided((t.numel(),), (1,)) if t.numel() == length else t.as_strided(shape, strides)
            read += [places.flatten(), t.flatten()]
            if t.numel() == length:
                read.append(t.as_strided(((length + 1) // 2,), (2,)))
        return torch.cat([r.flatten() * (k + 1) for k, r in enumerate(read)])

    return program


def outcome(run: Callable[[list[Any]], Any]) -> tuple[Any, list[Any], Exception | None]:
    shown: list[Any] = []
    try:
        return run(shown), shown, None
    except (RuntimeError, IndexError) as error:
        return None, shown, error


def examples(seed: int, count: int = 3) -> Tensor:
    return torch.randn(count, 2, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))


def reverse(program: Any, x: Tensor, shown: list[Any]) -> Tensor:
    y = x.clone().requires_grad_()
    out = program(y, shown)
    return torch.autograd.grad(out, y, torch.arange(out.numel(), dtype=F64).cos(), allow_unused=True)[0]


def weighed(program: Any, x: Tensor, shown: list[Any]) -> Tensor:
    out = program(x, shown)
    return (out * torch.arange(out.numel(), dtype=F64).cos()).sum()


def forward(program: Any, x: Tensor, v: Tensor) -> Tensor:
    h = 1e-6
    return (program(x + h * v, []) - program(x - h * v, [])) / (2 * h)


COUNTS: Counter[str] = Counter()


def compare(kind: str, what: str, got: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Numbers, strides and refusals of a transform beside those of plain PyTorch."""
    (value, shown, error), (right, right_shown, refusal) = got, expected
    if isinstance(error, InsideTransformError):
        COUNTS[f"{kind} refused"] += 1
        return
    if refusal is not None:
        assert error is not None, f"{kind}, {what}: plain PyTorch raises {refusal}"
        COUNTS[f"{kind} error"] += 1
        return
    if error is not None:
        raise AssertionError(f"{kind}, {what}: plain PyTorch has no error") from error
    assert shown == right_shown, f"{kind}, {what}: shows {shown}, plain PyTorch {right_shown}"
    torch.testing.assert_close(value, right, rtol=tolerance, atol=tolerance, msg=lambda m: f"{kind}, {what}: {m}")
    COUNTS[kind] += 1


def check(start: str, seed: int, jvp_too: bool = True) -> None:
    program, xs = chain(start, seed), examples(seed)
    what = f"{start}, seed {seed}"
    x, v = xs[0], xs[1]

    def in_loop(f: Callable[[Tensor, list[Any]], Tensor]) -> tuple[Any, list[Any], Exception | None]:
        return outcome(lambda shown: torch.stack([f(x, shown if i == 0 else []) for i, x in enumerate(xs)]))

    looped = in_loop(program)
    compare("vmap", what, outcome(lambda shown: vmap(lambda x: program(x, shown))(xs)), looped)
    compare("vmap(vmap)", what, outcome(lambda shown: vmap(vmap(lambda x: program(x, shown)))(xs[None])[0]), looped)
    gradients = in_loop(lambda x, shown: reverse(program, x, shown))
    if gradients[0] is None and gradients[2] is None or isinstance(gradients[2], TypeError):
        return
    one = outcome(lambda shown: reverse(program, x, shown))
    if one[2] is None and looped[2] is None and one[0] is not None:
        compare("grad", what, outcome(lambda shown: grad(lambda x: weighed(program, x, shown))(x)), one)
        compare(
            "vmap(grad)", what, outcome(lambda shown: vmap(grad(lambda x: weighed(program, x, shown)))(xs)), gradients
        )
        summed = outcome(lambda shown: grad(lambda xs: vmap(lambda x: weighed(program, x, shown))(xs).sum())(xs))
        compare("grad(vmap)", what, summed, gradients)
        if jvp_too:
            straight = outcome(lambda shown: jvp(lambda x: program(x, shown), (x,), (v,))[1])
            compare("jvp", what, straight, (forward(program, x, v), one[1], None), 1e-4)
        check_recorded(program, x, what)


def check_recorded(program: Any, x: Tensor, what: str) -> None:
    """autograd's own graph, whose backward uses as_strided, walked for several cotangents at once."""
    y = x.clone().requires_grad_()
    out = program(y, [])
    cotangents = torch.randn(3, *out.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    pull = lambda c: torch.autograd.grad(out, y, c, retain_graph=True)[0]
    expected = torch.stack([pull(c) for c in cotangents])
    for name, batch, dim in (("first", cotangents, 0), ("last", cotangents.T.contiguous(), 1)):
        got = outcome(lambda shown, b=batch, d=dim: vmap(pull, in_dims=d)(b))
        compare(f"vmap(autograd.grad), batch {name}", what, got, (expected, [], None))


@pytest.mark.parametrize("start", STARTS)
def test_chains(start: str) -> None:
    COUNTS.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loops over examples, and out= of another shape
        for seed in range(40):
            check(start, seed)
    assert COUNTS["vmap"] > 8 or start in ("expanded", "columns of a buffer"), COUNTS


#: Batches of examples of shape (2, 3, 4) that lie in memory in many ways, and where the batch is.
BATCHES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "contiguous": (lambda z: z.clone(), 0),
    "transposed": (lambda z: z.mT.contiguous().mT, 0),
    "permuted": (lambda z: z.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), 0),
    "with gaps": (lambda z: torch.stack([z, -z], -1)[..., 0], 0),
    "with gaps, transposed": (lambda z: torch.stack([z, -z], 2)[:, :, 0].mT.contiguous().mT, 0),
    "not the first": (lambda z: torch.cat([z[:1], z])[1:], 0),
    "every second": (lambda z: torch.stack([z, -z], 1)[:, 0], 0),
    "batch last": (lambda z: z.movedim(0, -1).contiguous(), 3),
    "batch last, not contiguous": (lambda z: z.clone().movedim(0, -1), 3),
    "batch in the middle": (lambda z: z.movedim(0, 1).contiguous(), 1),
    "batch in the middle, not contiguous": (lambda z: z.clone().movedim(0, 2), 2),
}
STARTS_OF_ARGUMENTS = {
    "argument": lambda x: x,
    "view of the argument": lambda x: x[1:],
    "transposed argument": lambda x: x.mT,
}


@pytest.mark.parametrize("layout", BATCHES)
def test_arguments_that_are_written(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument itself is written: it shows the strides of the loop's, and so does the caller's tensor afterwards.
    """
    COUNTS.clear()
    make, dim = BATCHES[layout]
    for start, f in STARTS_OF_ARGUMENTS.items():
        monkeypatch.setitem(STARTS, start, f)
        for seed in range(25):
            program, z = chain(start, seed), examples(seed)
            mine, theirs = make(z), make(z)
            looped = outcome(
                lambda shown, p=program, t=theirs: torch.stack(
                    [p(t.select(dim, i), shown if i == 0 else []) for i in range(3)]
                )
            )
            got = outcome(lambda shown, p=program, m=mine: vmap(lambda x: p(x, shown), in_dims=dim)(m))
            if dim and isinstance(got[2], InsideTransformError):
                continue  # as_strided of examples that lie between each other
            compare("vmap", f"{layout}, {start}, seed {seed}", got, looped)
            if got[2] is None and looped[2] is None:
                torch.testing.assert_close(mine, theirs, check_stride=True)
    assert COUNTS["vmap"] > 30 or dim, COUNTS


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_many_chains(start: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(40, 600):
            check(start, seed)
