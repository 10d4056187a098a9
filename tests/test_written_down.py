"""Batching rules that are written down as straight-line Python: what was seen of one batch holds for every other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from batching_checker import check_rule, recorded_calls
from loop import for_each
from rule_cases import quiet_thread
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

from functrans import extend, grad, vmap
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.specialized import Specialized
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo
from functrans.interpreters.vmap.written_down import Writer
from functrans.operators.info import op_info

aten = torch.ops.aten
quiet = pytest.fixture(autouse=True, scope="module")(quiet_thread)


#: Operators some of whose results PyTorch does not write, or that are refused by how a batch lies.
NOT_COMPARED = ("empty", "_ctc_loss", "as_strided")


@cache
def calls() -> dict[OpOverload, list[Any]]:
    options: dict[str, Any] = {"per_op": 3, "samples": 4, "backward": True}
    return recorded_calls(list(BATCHING_RULES), dtypes=[torch.float64], **options)


def rolled(x: Any, dim: Any) -> Any:
    """The same examples in another order."""
    if isinstance(x, list):
        return [rolled(one, d) for one, d in zip(x, dim, strict=True)] if isinstance(dim, list) else list(x)
    return x.roll(1, dim) if isinstance(dim, int) else x.clone() if isinstance(x, Tensor) else x


def written(rule: Callable[..., Any], count: Counter[str]) -> Callable[..., tuple[Any, Any]]:
    """The rule as it is written down from a batch of the same examples in another order."""

    def by_script(info: BatchInfo, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        other = [rolled(x, d) for x, d in zip(args, in_dims, strict=True)]
        with Writer(other) as writer:
            result = rule(info, in_dims, *other, **kwargs)
        script: Any = None if kwargs else writer.compiled(result)
        count["written" if script else "not"] += 1
        if not script:
            raise RuleDeclined("it is not written down")
        return script(*args)  # type: ignore[no-any-return]

    return by_script


def test_what_is_written_down_does_what_a_loop_does() -> None:
    """Every operator of the samples that has a rule."""
    count: Counter[str] = Counter()
    compared = {}
    for op, found in calls().items():
        known = op_info(op)
        if known.random or any(name in op.name() for name in NOT_COMPARED):
            continue
        rule = written(BATCHING_RULES.get(op), count)
        compared[op] = sum(
            check_rule(op, args, kwargs, max_subsets=3, seed=k, rule=rule) for k, (args, kwargs) in enumerate(found)
        )
    assert count["written"] > 5 * count["not"] > 0, count
    for op in (aten.convolution.default, aten.convolution_backward.default, aten.nll_loss_forward.default,
               aten.avg_pool2d.default, aten.native_layer_norm.default, aten.gather.default):  # fmt: skip
        assert compared[op], op


def test_a_wrong_script_is_found() -> None:
    """The check above sees a batch that was mistaken for another one."""
    remembered = torch.ones(3, 2, 4, 4, dtype=torch.float64)

    def of_one_batch(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *options: Any) -> tuple[Tensor, int]:
        return aten.avg_pool2d.default(remembered, *options), 0

    with pytest.raises(AssertionError):
        check_rule(aten.avg_pool2d.default, (torch.rand(2, 4, 4).double(), [2]), rule=of_one_batch)


def seen(op: OpOverload) -> dict[Any, Any]:
    return op_info(op).specialized[Specialized].seen  # type: ignore[no-any-return]


def test_layers_again_and_again() -> None:
    """By the third call of a look what was written down is what runs."""
    torch.manual_seed(0)
    weight, bias, target = torch.randn(3, 2, 3, 3), torch.randn(3), torch.tensor([1])

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        y = F.avg_pool2d(F.conv2d(x[None], weight, bias, padding=1), 2)
        return F.cross_entropy(F.layer_norm(y.flatten(1), (12,)), target)

    op_info(aten.convolution_backward.default).specialized.pop(Specialized, None)
    for _ in range(4):
        batch = torch.randn(5, 2, 4, 4)
        for argnums in (0, 1):
            by_loop = for_each(lambda x, n=argnums: grad(loss, argnums=n)(weight, x))(batch)
            torch.testing.assert_close(vmap(grad(loss, argnums=argnums), in_dims=(None, 0))(weight, batch), by_loop)
    assert any(call.script for call in seen(aten.convolution_backward.default).values())


def test_where_autograd_records() -> None:
    """A batch that requires grad, between batches that do not."""
    weight = torch.randn(3, 2, 3, 3)
    f = vmap(lambda x: F.conv2d(x, weight))
    for step in range(6):
        x = torch.randn(4, 1, 2, 5, 5, requires_grad=bool(step % 2))
        out = f(x)
        assert out.requires_grad is x.requires_grad
        if x.requires_grad:
            (g,) = torch.autograd.grad(out.square().sum(), x)
            y = x.detach().flatten(0, 1).requires_grad_()
            (expected,) = torch.autograd.grad(F.conv2d(y, weight).square().sum(), y)
            torch.testing.assert_close(g.flatten(0, 1), expected)


def test_one_tensor_twice() -> None:
    """A call whose arguments are one tensor looks like one of two tensors, and says nothing of it."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 1, 2, 3, 3)
    f = vmap(lambda a, b: aten.convolution.default(a, b, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1))
    for a, b in ((x, x), (x, x), (x, x), (x, y), (y, x), (y, y)):
        torch.testing.assert_close(f(a, b), torch.stack([F.conv2d(p, q) for p, q in zip(a, b, strict=True)]))


def test_a_rule_of_the_users_runs_every_time() -> None:
    ran = []
    with extend.overriding(BATCHING_RULES, aten.avg_pool2d.default):

        @extend.batching_rule(aten.avg_pool2d.default)
        def rule(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *options: Any) -> tuple[Tensor, int]:
            ran.append(1)
            return aten.avg_pool2d.default(x.flatten(0, 1), *options).unflatten(0, (x.shape[0], x.shape[1])), 0

        x = torch.rand(3, 1, 2, 4, 4)
        for _ in range(4):
            torch.testing.assert_close(vmap(lambda one: F.avg_pool2d(one, 2))(x), F.avg_pool2d(x[:, 0], 2)[:, None])
    assert len(ran) == 4


def test_what_reads_more_than_the_look_is_not_written() -> None:
    reads: dict[str, Callable[[Tensor], Any]] = {
        "a number": lambda x: x * float(x.sum()),
        "a truth value": lambda x: x if x.sum() > 0 else -x,
        "a device": lambda x: torch.zeros(x.shape, device=x.device) + x,
        "an address": lambda x: x + x.data_ptr() % 2,
        "how a result lies": lambda x: x.mT if x.mT.is_contiguous() else x,
        "another tensor": lambda x: x + weight,
        "a list": lambda x: x * len(x.tolist()),
    }
    weight = torch.ones(2)
    for name, f in reads.items():
        x = torch.ones(3, 2)
        with Writer([x]) as writer:
            result = f(x)
        assert not writer.compiled((result, 0)), name
    with Writer([x]) as writer:
        result = torch.zeros(x.shape).add_(x.mT.reshape(x.size(0), x.shape[-1]), alpha=0.5)
    script: Any = writer.compiled((result, None))
    y = torch.randn(3, 2)
    assert torch.equal(script(y)[0], 0.5 * y.mT.reshape(3, 2)) and script(y)[1] is None


def test_calls_without_outputs() -> None:
    """Of a dimension of size 0 there is nothing to unbind or write down, in the first calls and in later ones."""
    x = torch.zeros(3, 0, 2)
    for _ in range(4):
        for f in (torch.unbind, lambda x: x.clone().unbind(0), list, lambda x: x.tolist()):
            assert vmap(lambda x, f=f: x + len(f(x)))(x).shape == x.shape
