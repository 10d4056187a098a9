"""Rules of an author's own for operators that take functions: a ``Primitive`` in the place of the definition, which
each level is asked about. And primitives in what such operators run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as tree
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from functrans import grad, hessian, jacfwd, jvp, vmap
from functrans.errors import NotAnOverloadError, RegistrationError
from functrans.extend import (
    DEFINITIONS,
    Primitive,
    PullbackTable,
    VmapInterpreter,
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
        lambda op: derivative(op, self=lambda grad: grad),
        lambda op: PullbackTable("a table").add(op, lambda step: None),
    ):
        with pytest.raises(
            (NotAnOverloadError, RegistrationError), match=r"takes functions.*functrans.extend.DEFINITIONS.*Primitive"
        ):
            register(higher_order.cond)
