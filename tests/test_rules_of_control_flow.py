"""Rules of an author's own for operators that take functions: a ``Primitive`` in the place of the definition, which
each level is asked about. And primitives in what such operators run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as tree
from slow_ways import close
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from functrans import grad, hessian, jacfwd, jvp, vmap
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.errors import BatchingRuleError, NotAnOverloadError, RegistrationError
from functrans.extend import (
    BATCHING_RULES,
    DEFINITIONS,
    Primitive,
    PullbackTable,
    VmapInterpreter,
    WrapperTensor,
    derivative,
    rules_in_scope,
)

higher_order: Any = torch.ops.higher_order
XS = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
asked: list[str] = []


def threefold(op: Any) -> Primitive:
    """``op`` whose derivative is three times that of the sum of its tensors, which no other rule would give."""
    p = Primitive(f"threefold {op}", DEFINITIONS.get(op))

    def pull(grad: Any, out: Any, *args: Any, **graph: Any) -> Any:
        asked.append("pullback")
        (g,) = [g for g in tree.tree_leaves(grad) if g is not None]
        of = lambda a: 3 * g.sum().expand(a.shape) if isinstance(a, Tensor) and a.is_floating_point() else None
        return tuple(type(a)(of(x) for x in a) if isinstance(a, list | tuple) else None for a in args)

    def push(tangents: Any, out: Any, *args: Any, **graph: Any) -> Any:
        asked.append("tangent")
        given = [t for t in tree.tree_leaves(tangents) if t is not None]
        total = 3 * sum(t.sum() for t in given)
        return tree.tree_map(lambda o: total.expand(o.shape), out)

    p.derivative(pullback=pull, tangent=push)

    def batched(level: Any, *args: Any, **graph: Any) -> Any:
        asked.append("batching")
        return p.by_base(level, *args, **graph)

    p.rule(VmapInterpreter)(batched)
    return p


PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "cond": lambda x: torch.cond(x > 0, torch.sin, torch.cos, (x,)),
    "while_loop": lambda x: while_loop(lambda y: y.abs() < 5, lambda y: (y * 2,), (x,))[0],
    "map_impl": lambda x: torch_map(torch.sin, x.reshape(1)).sum(),
    "scan": lambda x: scan(lambda c, y: (c * y, c.sin()), x, torch.ones(2, dtype=x.dtype))[0],
    "associative_scan": lambda x: associative_scan(torch.mul, x.reshape(1), 0, combine_mode="generic").sum(),
}


@pytest.fixture
def rules(request: pytest.FixtureRequest) -> Iterator[str]:
    asked.clear()
    op = getattr(higher_order, request.param)
    with rules_in_scope(DEFINITIONS, {op: threefold(op)}):
        yield request.param


@pytest.mark.parametrize("rules", PROGRAMS, indirect=True)
def test_rules_are_used_in_every_nesting(rules: str) -> None:
    f = PROGRAMS[rules]
    threes = torch.full((3,), 3.0, dtype=torch.float64)
    along = lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]
    for slopes, kinds in (
        (lambda: vmap(grad(f))(XS), {"pullback"}),
        (lambda: vmap(along)(XS), {"tangent"}),
        (lambda: vmap(vmap(grad(f)))(XS[None])[0], {"pullback"}),
        (lambda: torch.stack([grad(f)(x) for x in XS]), {"pullback"}),
        (lambda: torch.stack([jacfwd(f)(x) for x in XS]), {"tangent"}),
    ):
        asked.clear()
        torch.testing.assert_close(slopes(), threes)
        assert kinds <= set(asked)
    assert not vmap(hessian(f))(XS).any()  # three, whatever x is
    asked.clear()
    vmap(f)(XS)
    assert "batching" in asked


@pytest.mark.parametrize("rules", PROGRAMS, indirect=True)
def test_values_are_those_of_the_definition(rules: str) -> None:
    f = PROGRAMS[rules]
    found = vmap(f)(XS), vmap(lambda x: jvp(f, (x,), (x,))[0])(XS)
    expected = torch.stack([f(x) for x in XS])  # PyTorch's own, outside of transforms
    for values in found:
        torch.testing.assert_close(values, expected)


def product() -> Primitive:
    p = Primitive("product", lambda a, b: a * b)
    given = lambda *pairs: sum(t * other for t, other in pairs if t is not None)
    p.derivative(
        pullback=lambda g, out, a, b: (g * b, g * a), tangent=lambda t, out, a, b: given((t[0], b), (t[1], a))
    )
    p.rule(VmapInterpreter)(p.by_base)
    return p


@pytest.mark.parametrize(
    "running",
    [
        lambda p, x: associative_scan(p, x, 0, combine_mode="generic"),
        lambda p, x: higher_order.associative_scan(lambda a, b: [p(a, b)], [x], ())[0],
        lambda p, x: scan(lambda c, y: (p(c, y), p(c, y)), torch.ones_like(x[0]), x)[1],
    ],
)
def test_primitives_in_scans(running: Callable[[Primitive, Tensor], Tensor]) -> None:
    xs = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(3, 4)
    p = product()
    f, oracle = (lambda x: running(p, x)), lambda x: x.cumprod(0)
    for transform in (
        lambda f: vmap(f)(xs),
        lambda f: vmap(grad(lambda x: f(x).sum()))(xs),
        lambda f: grad(lambda x: vmap(f)(x).square().sum())(xs),
        lambda f: jvp(f, (xs[0],), (xs[1],))[1],
        lambda f: vmap(hessian(lambda x: f(x).sum()))(xs),
    ):
        torch.testing.assert_close(transform(f), transform(oracle))


def test_other_tables_say_where_rules_belong() -> None:
    for register in (
        DECOMPOSITIONS.register,
        lambda op: derivative(op, self=lambda grad: grad),
        lambda op: PullbackTable("a table").add(op, lambda step: None),
    ):
        with pytest.raises(
            (NotAnOverloadError, RegistrationError), match=r"takes functions.*functrans.extend.DEFINITIONS.*Primitive"
        ):
            register(higher_order.cond)


def test_batching_rules_of_operators_that_take_functions() -> None:
    """Functions take physical values, and may capture what is batched; NotImplemented asks for the definition."""
    cond, rows = torch.ops.higher_order.cond, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])
    asked: list[Any] = []

    def rule(info: Any, in_dims: Any, pred: Any, true_fn: Any, false_fn: Any, operands: Any) -> Any:
        asked.append((info.level, in_dims))
        assert info.batch_size == len(rows) and not isinstance(pred, WrapperTensor)
        if in_dims[0] is not None:
            return NotImplemented
        (y,) = (true_fn if pred else false_fn)(*operands, in_dims=tuple(in_dims[3]))
        assert y.shape[0] == len(rows)
        return (y.movedim(0, -1),), (-1,)

    def chosen(flag: bool, x: Tensor, shared: Tensor) -> Tensor:
        return cond(flag, lambda y: (y.sin() * x * shared,), lambda y: (y.cos() + x.sum(),), (x * 2,))[0]

    def per_row(x: Tensor) -> Tensor:
        return cond(x.sum() > 4, lambda y: (y.sin(),), lambda y: (y.cos(),), (x,))[0]

    shared = torch.tensor([0.5, 3.0])
    vmapped = vmap(chosen, in_dims=(None, 0, None))
    with rules_in_scope(BATCHING_RULES, {cond: rule}):
        for flag in (True, False):
            out = vmapped(flag, rows, shared)
            close(out, torch.stack([chosen(flag, x, shared) for x in rows]))
            slopes = grad(lambda x, flag=flag: vmapped(flag, x, shared).sum())(rows)
            expected = torch.stack([grad(lambda x, flag=flag: chosen(flag, x, shared).sum())(x) for x in rows])
            close(slopes, expected)
            nested = vmap(vmapped, in_dims=(None, None, 0))
            close(nested(flag, rows, rows), torch.stack([vmapped(flag, rows, s) for s in rows]))
        assert {level for level, _ in asked} == {1, 2} and asked[0][1] == [None, None, None, (0,)]
        close(vmap(per_row)(rows), torch.stack([x.sin() if x.sum() > 4 else x.cos() for x in rows]))
        assert asked[-1][1][0] == 0
    before = len(asked)
    close(vmapped(True, rows, shared), torch.stack([chosen(True, x, shared) for x in rows]))
    assert len(asked) == before
    each = higher_order.map_impl
    keywords = lambda *args, **kwargs: pytest.fail("no in_dims") if "xs" in kwargs else NotImplemented
    with rules_in_scope(BATCHING_RULES, {each: keywords}):
        (out,) = vmap(lambda x: each(lambda y: (y.sin(),), xs=(x,), pos_args=()))(rows)
        close(out, rows.sin())
    with (
        rules_in_scope(BATCHING_RULES, {cond: lambda info, in_dims, *args: torch.ones(3)}),
        pytest.raises(BatchingRuleError, match=r"rule of cond.*returned a tensor of shape \(3,\); expected a pair"),
    ):
        vmapped(True, rows, shared)
