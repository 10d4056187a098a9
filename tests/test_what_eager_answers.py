"""What a kernel answers for one example, though not for the batch, is answered under vmap; factories write ``out``; and
what shares memory in eager PyTorch does so inside, and nothing else."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functrans import grad, jvp, vmap
from functrans.errors import InsideTransformError

F64 = torch.float64


def random(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)


def outcome(f: Callable[..., Any], *args: Any) -> Any:
    """The result, or the class of the error."""
    try:
        return f(*args)
    except Exception as error:  # noqa: BLE001 - whatever it raises is the outcome
        return type(error)


def compose(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: outer(inner(x))


def check_each(f: Callable[..., Tensor], *examples: tuple[Tensor, ...], exact: bool = True) -> Any:
    """vmap over the last dimension gives what a loop gives, for every choice of batched arguments; an error where one
    example is refused. Returns what the first example gives."""
    first = outcome(f, *examples[0])
    count = len(examples[0])
    for batched in itertools.product((True, False), repeat=count):
        if not any(batched):
            continue
        rows = [tuple(r[k] if batched[k] else examples[0][k] for k in range(count)) for r in examples]
        args = [torch.stack([r[k] for r in rows], -1) if batched[k] else examples[0][k] for k in range(count)]
        found = outcome(vmap(f, in_dims=tuple(-1 if b else None for b in batched)), *args)
        if isinstance(first, Tensor):
            torch.testing.assert_close(
                found, torch.stack([f(*r) for r in rows]), rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3
            )
        else:
            assert isinstance(found, type) and issubclass(found, Exception), (batched, found)
    return first


@pytest.mark.parametrize("dtypes", [(F64, torch.float32), (F64, torch.int64), (torch.half, F64), (torch.float32, F64)])
@pytest.mark.parametrize("layer", [F.conv1d, F.conv2d, F.conv_transpose1d, F.conv_transpose2d])
def test_bias_of_another_dtype(layer: Callable[..., Tensor], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Some kernels of the CPU add it, and which one an example goes to is up to PyTorch."""
    rank = 1 if "1d" in layer.__name__ else 2
    shapes = (2, 3, *[5] * rank), (3, 3, *[2] * rank), (3,)
    examples = [
        tuple(random(*shape, dtype=dtypes[k == 2], seed=10 * row + k) for k, shape in enumerate(shapes))
        for row in (0, 1)
    ]
    answer = check_each(layer, *examples, exact=False)
    if isinstance(answer, Tensor) and dtypes[1].is_floating_point:
        x, weight, bias = examples[0]
        gradient = vmap(grad(lambda b: layer(x, weight, b).sum()))(torch.stack([e[2] for e in examples]))
        assert gradient.dtype is bias.dtype and torch.all(gradient == answer[:, 0].numel())


def test_some_kernel_adds_such_a_bias() -> None:
    """Or the test above would not have looked at a sum."""
    x, weight, bias = random(2, 3, 5), random(3, 3, 2), random(3, dtype=torch.float32)
    assert isinstance(outcome(F.conv_transpose1d, x, weight, bias), Tensor)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("at", [[0], 0, [0, 0], [], [1]], ids=str)
def test_index_select_of_a_number(at: Any, dtype: torch.dtype) -> None:
    at = torch.tensor(at, dtype=dtype)
    check_each(lambda x, i: torch.index_select(x, 0, i), (random(), at), (random(seed=1), at))


@pytest.mark.parametrize("operator", [F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle])
def test_images_in_any_layout(operator: Callable[..., Tensor]) -> None:
    """A batch of images may lie in memory as no image does."""
    for rank in (3, 4, 5):
        shape = [2, 2][: rank - 3] + [4, 2, 2]
        for order in itertools.permutations(range(rank)):
            rows = random(3, *[shape[d] for d in order]).permute(0, *[1 + order.index(d) for d in range(rank)])
            for axis in (0, -1):
                given = rows if axis == 0 else rows.movedim(0, -1).contiguous()
                expected = outcome(lambda rows: torch.stack([operator(row, 2) for row in rows]), rows)
                if not isinstance(expected, Tensor):
                    assert rank == 5  # an image in PyTorch's layout of volumes
                    continue
                assert torch.equal(vmap(lambda x: operator(x, 2), in_dims=axis)(given), expected)
    for empty in ((0, 4, 2, 2), (0, 3, 4, 2, 2), (2, 0, 4, 2, 2)):
        example = operator(torch.zeros(empty[1:]), 2)
        assert vmap(lambda x: operator(x, 2))(torch.zeros(empty)).shape == (empty[0], *example.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (3, 0), (0, 0)], ids=str)
def test_distances_of_no_pairs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """There is no kernel for half precision, and PyTorch's gradient of a set of no vectors crashes."""
    x = torch.ones(shape, dtype=dtype)
    two = torch.stack([x, x])
    for distances in (partial(F.pdist, p=p) for p in (0.0, 1.0, 2.0)):
        found, value = vmap(distances)(two), distances(x)
        assert torch.equal(found, torch.stack([value, value])) and found.dtype is dtype
        slope = grad(compose(torch.sum, distances))
        assert torch.equal(slope(x), torch.zeros_like(x)) and slope(x).dtype is dtype
        assert torch.equal(vmap(slope)(two), torch.zeros_like(two))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="a later PyTorch has it")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunked_cross_entropy_of_a_batch(reduction: str) -> None:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    labels = torch.tensor([0, 2, 1, 1, 0])

    def f(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, w, labels, reduction=reduction, options=options)

    examples = [(random(5, 4, seed=s), random(3, 4, seed=s + 5), labels.roll(s)) for s in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one example after the other would be slow, and says so
        check_each(f, *examples, exact=False)
        empty = [torch.stack([e[k] for e in examples])[:0] for k in range(3)]
        assert vmap(f)(*empty).shape == (0, *f(*examples[0]).shape)


# ---------------------------------------------------------------------------------------------------------------
# Factories

FACTORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda out: torch.zeros(3, out=out),
    "ones": lambda out: torch.ones(3, out=out),
    "full": lambda out: torch.full((3,), 2.5, out=out),
    "arange": lambda out: torch.arange(0, 6, 2, out=out),
    "range": lambda out: torch.range(0, 2, out=out),
    "linspace": lambda out: torch.linspace(0, 1, 3, out=out),
    "logspace": lambda out: torch.logspace(0, 1, 3, out=out),
    "eye": lambda out: torch.eye(1, 3, out=out),
    "rand": lambda out: torch.rand(3, out=out),
    "randn": lambda out: torch.randn(3, out=out),
    "rand of a generator": lambda out: torch.rand(3, out=out, generator=torch.Generator().manual_seed(1)),
    "randint": lambda out: torch.randint(5, (3,), out=out),
    "randint from": lambda out: torch.randint(2, 5, (3,), out=out),
    "randperm": lambda out: torch.randperm(3, out=out),
    "normal": lambda out: torch.normal(0.0, 1.0, (3,), out=out),
}
OUTS: dict[str, Callable[[], Tensor]] = {
    "double": lambda: torch.zeros(3, dtype=F64),
    "empty": lambda: torch.zeros(0, dtype=F64),
    "half": lambda: torch.zeros(3, dtype=torch.half),
    "integer": lambda: torch.zeros(3, dtype=torch.int64),
    "column": lambda: torch.zeros(3, 2, dtype=F64)[:, 1],
    "larger": lambda: torch.zeros(5, dtype=F64),
}


@pytest.mark.filterwarnings("ignore:.*deprecated.*:UserWarning", "ignore:.* elements in the out tensor:UserWarning")
@pytest.mark.parametrize("name", FACTORIES)
def test_factories_write_out(name: str) -> None:
    make = FACTORIES[name]

    def written(out: Tensor) -> Tensor:
        torch.manual_seed(0)
        made = make(out)
        assert made is out
        return out * 1

    x = torch.ones(1, 3)
    for kind, empty in OUTS.items():
        if name == "eye" and kind == "column":
            continue  # it would have to be resized
        expected = outcome(written, empty())
        f = lambda x, empty=empty: (x.sum(), written(empty()))
        inside = {
            "grad": lambda x, f=f: grad(f, has_aux=True)(x)[1],
            "vmap, same": lambda x, f=f: vmap(f, randomness="same")(x)[1][0],
            "vmap, different": lambda x, f=f: vmap(f, randomness="different")(x)[1][0],
        }
        for level, run in inside.items():
            found = outcome(run, x)
            if isinstance(expected, Tensor):
                assert isinstance(found, Tensor) and found.dtype is expected.dtype, (kind, level, found)
                assert torch.equal(found, expected), (kind, level)
            else:
                assert not isinstance(found, Tensor), (kind, level)


def test_draws_into_out_are_each_examples_own() -> None:
    draw = lambda x: x + torch.rand(3, out=torch.empty(3))
    different = vmap(draw, randomness="different")(torch.zeros(2, 3))
    assert not torch.equal(*different)
    assert torch.equal(*vmap(draw, randomness="same")(torch.zeros(2, 3)))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(torch.zeros(2, 3))


# ---------------------------------------------------------------------------------------------------------------
# Memory that is shared

SHARING: dict[str, Callable[[Tensor], Tensor]] = {
    "ravel": lambda x: x.ravel(),
    "ravel, turned": lambda x: x.mT.ravel(),
    "ravel of a part": lambda x: x[:, :1].ravel(),
    "reshape": lambda x: x.reshape(-1),
    "reshape, turned": lambda x: x.mT.reshape(-1),
    "flatten, turned": lambda x: x.mT.flatten(),
    "contiguous": lambda x: x.contiguous(),
    "contiguous, turned": lambda x: x.mT.contiguous(),
    "einsum, as it is": lambda x: torch.einsum("ij", x),
    "einsum, turned": lambda x: torch.einsum("ij->ji", x),
    "einsum, a diagonal": lambda x: torch.einsum("ii->i", x[:, :2]),
    "einsum, a sum": lambda x: torch.einsum("ij->i", x),
    "chain": lambda x: torch.chain_matmul(x),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0]),
    "dropout of nothing": lambda x: F.dropout(x, 0.5, training=False),
    "hsplit": lambda x: torch.hsplit(x, 3)[1],
}


@pytest.mark.filterwarnings("ignore:.*chain_matmul is deprecated:UserWarning")
@pytest.mark.parametrize("name", SHARING)
def test_memory_is_shared_where_it_is_in_a_loop(name: str) -> None:
    """A write to the result is seen in the argument, or the other way round, exactly where a loop says so; it is
    refused where a layout is not known."""
    op = SHARING[name]

    def result_written(x: Tensor) -> tuple[Tensor, Tensor]:
        op(x).mul_(2)
        return x * 1, op(x) * 1

    def argument_written(x: Tensor) -> tuple[Tensor, Tensor]:
        y = op(x)
        x.add_(5)
        return x * 1, y * 1

    def copy_written(x: Tensor) -> tuple[Tensor, Tensor]:
        return argument_written(x.clone())

    answered = 0
    for axis, f in itertools.product((0, 1, 2, -1), (result_written, argument_written, copy_written)):
        batch = (torch.arange(12, dtype=F64) + 1).view(2, 2, 3).movedim(0, axis).contiguous()
        rows = batch.clone().unbind(axis)
        expected = [torch.stack(part) for part in zip(*(f(row) for row in rows), strict=True)]
        try:
            found = vmap(f, in_dims=axis)(batch)
        except InsideTransformError:
            assert f is copy_written and axis != 0  # what is computed hides how it would lie in a loop
            continue
        answered += 1
        assert all(map(torch.equal, found, expected)), (axis, f.__name__)
        assert torch.equal(batch, torch.stack(rows, axis)), (axis, f.__name__)
    assert answered >= 9


@pytest.mark.filterwarnings("ignore:.*chain_matmul is deprecated:UserWarning")
@pytest.mark.parametrize("made_inside", [True, False], ids=["made inside", "captured"])
@pytest.mark.parametrize("name", SHARING)
def test_memory_of_constants_is_shared(name: str, made_inside: bool) -> None:
    """The same of tensors that no level tracks."""
    op, constant = SHARING[name], (torch.arange(6, dtype=F64) + 1).view(2, 3)

    def written(c: Tensor) -> list[Tensor]:
        c = c * 1 if made_inside else c
        y = op(c)
        y.mul_(2)
        return [c * 1, y * 1]

    expected = written(constant.clone())
    for transformed in (
        lambda c: grad(lambda x: (x.sum(), written(c)), has_aux=True)(torch.ones(2))[1],
        lambda c: jvp(lambda x: (x, written(c)), (torch.ones(2),), (torch.ones(2),), has_aux=True)[2],
        lambda c: [part[0] for part in vmap(lambda x: written(c.clone()))(torch.ones(2))],
    ):
        assert all(map(torch.equal, transformed(constant.clone()), expected))


def test_captured_copies_may_be_written() -> None:
    """What ravel returns of a turned matrix is new memory, also of a captured one."""
    captured = torch.arange(6.0).view(2, 3)

    def f(x: Tensor) -> Tensor:
        flat = captured.mT.ravel()
        flat[0] = x
        return flat

    assert vmap(f)(torch.tensor([7.0, 8.0]))[:, :2].tolist() == [[7, 3], [8, 3]]
    assert captured[0, 0] == 0


def test_the_order_in_memory_of_what_is_computed_is_not_guessed() -> None:
    """In a loop the sum is contiguous, and flat a view of it; in the batch it lies otherwise."""
    matrix, batch = random(3, 2), random(2, 3, seed=1)

    def f(x: Tensor) -> Tensor:
        total = matrix + x
        flat = total.flatten()
        total.add_(1.0)
        return flat * 1

    with pytest.raises(InsideTransformError, match="views or copies as strides say"):
        vmap(f, in_dims=-1)(batch)
    assert torch.equal(vmap(f)(batch.T.contiguous()), torch.stack([f(x) for x in batch.T.contiguous()]))
