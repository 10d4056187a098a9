"""Transforms that nobody had in mind, of shapes that differ: named dimensions, packed booleans, feedback alignment, a
store of parameters, products that wait for each other. Each is written with the documented names alone and compared
with plain code, inside and outside of grad, vmap and jvp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import functrans as ft
from functrans import grad, hessian, jacrev, jvp, linearize, plant, psum, reap, sow, vjp, vmap
from functrans.errors import MissingRuleError, RegistrationError
from functrans.extend import (
    Carried,
    Handler,
    Primitive,
    PullbackInterpreter,
    PullbackTable,
    RuleTable,
    TableInterpreter,
    lowered,
    map_tensors,
    transform,
)

aten = torch.ops.aten
generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# --- named dimensions: a payload without tensors ----------------------------------------------------------------------


class NamesDiffer(Exception):
    pass


class Named(TableInterpreter):
    kind, payload, rules = "named", ("axes",), RuleTable("named dimensions", default="decompose")


def names_of(x: Any) -> tuple[Any, ...]:
    if not isinstance(x, Tensor):
        return ()
    return (None,) * x.dim() if x.axes is None else x.axes  # type: ignore[attr-defined, return-value]


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Tensor) else x  # type: ignore[attr-defined]


def unified(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    n = max(len(a), len(b))
    pairs = list(zip((None,) * (n - len(a)) + a, (None,) * (n - len(b)) + b, strict=True))
    for p, q in pairs:
        if None not in (p, q) and p != q:
            raise NamesDiffer(f"{p} and {q}")
    return tuple(q if p is None else p for p, q in pairs)


def pointwise(op: Any) -> Callable[..., Any]:
    def rule(named: Named, *args: Any, **kwargs: Any) -> Any:
        names: tuple[Any, ...] = ()
        for a in args:
            names = unified(names, names_of(a))
        return named.carry(op(*map(value_of, args), **kwargs), axes=names)

    return rule


def view(op: Any, of_names: Callable[..., Any]) -> Callable[..., Any]:
    return lambda named, x, *rest, **more: named.carry(
        op(x.value, *rest, **more), axes=tuple(of_names(list(names_of(x)), *rest))
    )


def product(op: Any, of_names: Callable[..., Any]) -> Callable[..., Any]:
    def rule(named: Named, a: Any, b: Any) -> Any:
        unified(names_of(a)[-1:], names_of(b)[:1])
        return named.carry(op(a.value, b.value), axes=of_names(names_of(a), names_of(b)))

    return rule


def summed(named: Named, x: Any, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = [d % x.dim() for d in dim or range(x.dim())]
    names = tuple(n for d, n in enumerate(names_of(x)) if keepdim or d not in dims)
    return named.carry(x.value.sum(dim, keepdim), axes=names)


for op in (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.sin.default,
    aten.cos.default, aten.neg.default, aten.pow.Tensor_Scalar, aten.tanh_backward.default, aten.rsub.Scalar,
):  # fmt: skip
    Named.rules.add(op, pointwise(op))
Named.rules.add(aten.mm.default, product(aten.mm.default, lambda a, b: (a[0], b[1])))
Named.rules.add(aten.sum.dim_IntList, summed)
Named.rules.add(aten.sum.default, lambda named, x: named.carry(x.value.sum(), axes=()))
Named.rules.add(aten.t.default, view(aten.t.default, lambda names: names[::-1]))
Named.rules.add(aten.permute.default, view(aten.permute.default, lambda names, dims: [names[d] for d in dims]))
Named.rules.add(aten.unsqueeze.default, view(aten.unsqueeze.default, lambda names, d: [*names[:d], None, *names[d:]]))
Named.rules.add(aten.squeeze.dim, view(aten.squeeze.dim, lambda names, d: names[:d] + names[d + 1 :]))
Named.rules.add(aten.select.int, view(aten.select.int, lambda names, d, i: names[:d] + names[d + 1 :]))
Named.rules.add(
    aten.expand.default, view(aten.expand.default, lambda names, size: [None] * (len(size) - len(names)) + names)
)


@Named.rules.register(aten.transpose.int)
def transposed(named: Named, x: Any, a: int, b: int) -> Any:
    names = list(names_of(x))
    names[a], names[b] = names[b], names[a]
    return named.carry(x.value.transpose(a, b), axes=tuple(names))


WEIGHT, ROWS = random(4, 3), random(5, 4)
NAMED_WEIGHT, NAMED_ROWS = Carried(WEIGHT, axes=("in", "out")), Carried(ROWS, axes=("n", "in"))


def layer(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w).tanh()


def loss(w: Tensor, x: Tensor) -> Tensor:
    return layer(w, x).square().sum()


#: functions of the weights and the rows, and the names of what they return
NAMED_INSIDE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "itself": (layer, ("n", "out")),
    "linear": (lambda w, x: F.linear(x, w.T), ("n", "out")),
    "written": (lambda w, x: layer(w, x).mul_(2), ("n", "out")),
    "grad": (grad(loss), ("in", "out")),
    "grad of grad": (lambda w, x: grad(lambda w: grad(loss)(w, x).square().sum())(w), ("in", "out")),
    "vmap": (vmap(layer, (None, 0)), ("n", "out")),
    "vmap of grad": (vmap(grad(loss), (None, 0)), ("n", "in", "out")),
    "jvp": (lambda w, x: jvp(lambda w: layer(w, x), (w,), (w,))[1], ("n", "out")),
    "linearize": (lambda w, x: linearize(lambda w: layer(w, x), w)[1](w), ("n", "out")),
    "vjp": (lambda w, x: vjp(lambda w: layer(w, x), w)[1](layer(w, x))[0], ("in", "out")),
    "jet": (lambda w, x: ft.jet(lambda w: layer(w, x), (w,), ([w, None],))[1][1], ("n", "out")),
}


@pytest.mark.parametrize("name", NAMED_INSIDE)
def test_named_dimensions(name: str) -> None:
    f, names = NAMED_INSIDE[name]
    found = transform(Named, f)(NAMED_WEIGHT, NAMED_ROWS)
    torch.testing.assert_close(found.value, f(WEIGHT, ROWS))
    assert found.axes == names
    with pytest.raises(NamesDiffer, match="in and out|out and in"):
        transform(Named, f)(Carried(WEIGHT, axes=("out", "in")), NAMED_ROWS)


def test_named_dimensions_inside_of_others() -> None:
    named = transform(Named, layer)
    of_weight = lambda w: named(Carried(w, axes=("in", "out")), NAMED_ROWS).value
    slopes = grad(lambda w: named(w, NAMED_ROWS).value.square().sum())(NAMED_WEIGHT)
    torch.testing.assert_close(slopes.value, grad(loss)(WEIGHT, ROWS))
    assert slopes.axes == ("in", "out")
    batched = vmap(named, (None, 0))(NAMED_WEIGHT, Carried(ROWS, axes=("in",)))
    torch.testing.assert_close(batched.value, layer(WEIGHT, ROWS))
    assert batched.axes == ("out",)
    tangent = jvp(lambda w: named(w, NAMED_ROWS), (NAMED_WEIGHT,), (NAMED_WEIGHT,))[1]
    torch.testing.assert_close(tangent.value, jvp(lambda w: layer(w, ROWS), (WEIGHT,), (WEIGHT,))[1])
    squared = lambda f: lambda w: f(w).square().sum()
    torch.testing.assert_close(hessian(squared(of_weight))(WEIGHT), hessian(squared(lambda w: layer(w, ROWS)))(WEIGHT))


def test_a_decomposition_that_ends_in_prims_is_an_error_about_the_operator() -> None:
    with pytest.raises(MissingRuleError, match=r"no rule for aten\.amax\.default") as caught:
        transform(Named, lambda x: x.softmax(0))(NAMED_ROWS)
    assert "prims" not in str(caught.value)


def test_sown_inside_of_a_transform_of_ones_own() -> None:
    """It is reaped with its payload, and planted with one."""

    def f(x: Tensor) -> Tensor:
        return sow({"sines": x.sin()}, "a")["sines"].cos()

    named = transform(Named, f)
    out, found = reap(named)(NAMED_ROWS)
    torch.testing.assert_close((out.value, found["a"]["sines"].value), (ROWS.sin().cos(), ROWS.sin()))
    assert found["a"]["sines"].axes == out.axes == ("n", "in")
    of_rows = reap(vmap(named))(Carried(ROWS, axes=("in",)))[1]["a"]["sines"]
    torch.testing.assert_close(of_rows.value, ROWS.sin())
    assert of_rows.axes == ("in",)
    planted = plant(named, {"a": {"sines": Carried(ROWS, axes=("n", "in"))}})(NAMED_ROWS)
    torch.testing.assert_close(planted.value, ROWS.cos())
    assert planted.axes == ("n", "in")


def test_across_the_examples() -> None:
    centered = transform(Named, vmap(lambda x: x - psum(x, "i") / 5, axis_name="i"))(NAMED_ROWS)
    torch.testing.assert_close(centered.value, ROWS - ROWS.mean(0))
    with pytest.raises(MissingRuleError, match="Call it outside of that transform"):
        vmap(transform(Named, lambda x: psum(x, "i")), axis_name="i")(Carried(ROWS, axes=("in",)))


# --- packed booleans: another shape and dtype than the value's --------------------------------------------------------


def on_booleans(packed: Any, op: Any, args: Any, kwargs: Any) -> Any:
    with lowered(packed):
        out = op(*map_tensors(booleans, args), **{name: map_tensors(booleans, a) for name, a in kwargs.items()})
    return map_tensors(packed.constant, out)


class Packed(TableInterpreter):
    """Eight truth values a byte."""

    kind, payload, rules = "packed", ("count",), RuleTable("packed booleans", default=on_booleans)

    def shows(self, value: Tensor, count: int) -> Any:  # type: ignore[override]
        return (*value.shape[:-1], count), torch.bool


BITS = torch.arange(8, dtype=torch.uint8)


def booleans(x: Any) -> Tensor:
    return x.value if x.count is None else (x.value.unsqueeze(-1) >> BITS & 1).flatten(-2)[..., : x.count].bool()


def pack(x: Tensor) -> Carried:
    padded = F.pad(x.to(torch.uint8), (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return Carried((padded << BITS).sum(-1, dtype=torch.uint8), count=x.shape[-1])


def on_bytes(op: Any) -> Callable[..., Any]:
    def rule(packed: Packed, a: Any, b: Any) -> Any:
        if a.count is None or b.count is None or a.shape != b.shape:
            return NotImplemented
        return packed.carry(op(a.value, b.value), count=a.count)

    return rule


for op in (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor):
    Packed.rules.add(op, on_bytes(op))

MASK, OTHER = torch.rand(2, 3, 13, generator=generator) > 0.5
NUMBERS = random(3, 13)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x * x, 0.0).sum()


def test_packed_booleans() -> None:
    either = transform(Packed, lambda a, b: (a & b) | (a ^ b))(pack(MASK), pack(OTHER))
    assert either.value.shape == (3, 2) and torch.equal(either.value, pack(MASK | OTHER).value)
    slopes = 2 * NUMBERS * MASK
    of_rows = (NUMBERS.square() * MASK).sum(1)
    inside: list[tuple[Callable[..., Any], Any]] = [
        (masked, of_rows.sum()),
        (grad(masked), slopes),
        (vmap(masked), of_rows),
        (vmap(grad(masked)), slopes),
        (lambda x, m: jvp(lambda x: masked(x, m), (x,), (x,))[1], 2 * of_rows.sum()),
        (lambda x, m: x[m].sum(), NUMBERS[MASK].sum()),
        (lambda x, m: m.sum(-1), MASK.sum(-1)),
    ]
    for f, expected in inside:
        torch.testing.assert_close(transform(Packed, f)(NUMBERS, pack(MASK)), expected)
    of_bytes = lambda x, value: transform(Packed, masked)(x, Carried(value, count=13))
    torch.testing.assert_close(grad(of_bytes)(NUMBERS, pack(MASK).value), slopes)
    torch.testing.assert_close(vmap(grad(of_bytes))(NUMBERS, pack(MASK).value), slopes)
    tangent = jvp(lambda x: of_bytes(x, pack(MASK).value), (NUMBERS,), (NUMBERS,))[1]
    torch.testing.assert_close(tangent, 2 * of_rows.sum())


# --- feedback alignment: a way back of its own ------------------------------------------------------------------------


class Feedback(PullbackInterpreter):
    """Cotangents go back through fixed random matrices (Lillicrap et al., Nature Communications 7, 2016)."""

    kind, pullbacks = "feedback", PullbackTable("feedback alignment")


FIRST, SECOND = random(6, 4), random(2, 6)
BACK = {FIRST.shape: random(6, 4), SECOND.shape: random(2, 6)}


@Feedback.pullbacks.register(aten.linear.default)
def by_feedback(step: Any, grad: Tensor, weight: Tensor) -> Any:
    found = step.pull(grad)
    return {**found, **({"input": grad @ BACK[weight.shape]} if "input" in found else {})}


def network(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, first).tanh(), second).square().sum()


def aligned_by_hand(first: Tensor, second: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    hidden = F.linear(x, first).tanh()
    cotangent = 2 * F.linear(hidden, second)
    through = (cotangent @ BACK[SECOND.shape]) * (1 - hidden * hidden)
    return through.unsqueeze(-1) * x.unsqueeze(-2), cotangent.unsqueeze(-1) * hidden.unsqueeze(-2)


def test_feedback_alignment() -> None:
    aligned = grad(network, (0, 1), interpreter=Feedback)
    one = ROWS[0]
    of_each = aligned_by_hand(FIRST, SECOND, ROWS)
    torch.testing.assert_close(aligned(FIRST, SECOND, one), aligned_by_hand(FIRST, SECOND, one))
    torch.testing.assert_close(aligned(FIRST, SECOND, ROWS), tuple(g.sum(0) for g in of_each))
    torch.testing.assert_close(vmap(aligned, (None, None, 0))(FIRST, SECOND, ROWS), of_each)
    by_row = lambda first, second: vmap(network, (None, None, 0))(first, second, ROWS).sum()
    inside = grad(by_row, (0, 1), interpreter=Feedback)(FIRST, SECOND)
    torch.testing.assert_close(inside, tuple(g.sum(0) for g in of_each))
    squared = lambda f: lambda first: f(first, SECOND, one)[0].square().sum()
    for outer in (grad, hessian, lambda f: lambda x: jvp(f, (x,), (x,))[1]):
        torch.testing.assert_close(outer(squared(aligned))(FIRST), outer(squared(aligned_by_hand))(FIRST))
    torch.testing.assert_close(
        jacrev(lambda x: aligned(FIRST, SECOND, x)[0])(one), jacrev(lambda x: aligned_by_hand(FIRST, SECOND, x)[0])(one)
    )


# --- a store of parameters: a level that answers ----------------------------------------------------------------------


class Store(Handler):
    kind = "store"
    given: Any = None

    def __init__(self, func: Any = None) -> None:
        super().__init__(func)
        self.made: dict[str, Tensor] = {}


parameter = Primitive("parameter", lambda name, make: make())


@parameter.rule(Store)
def stored(level: Store, name: str, make: Callable[[], Tensor]) -> Tensor:
    if level.given is not None:
        return level.given[name]
    if name not in level.made:
        level.made[name] = parameter.below(level, name, make)
    return level.made[name]


def initial(f: Callable[..., Any], *args: Any) -> dict[str, Tensor]:
    level = Store(f)
    transform(level, f)(*args)
    return level.made


def applied(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(parameters: Any, *args: Any) -> Any:
        level = Store(f)
        level.given = parameters
        return transform(level, f)(*args)

    return run


def perceptron(x: Tensor) -> Tensor:
    w = parameter("w", lambda: torch.full((3, 4), 0.5, dtype=torch.float64))
    return (w @ x + parameter("b", lambda: torch.ones(3, dtype=torch.float64))).tanh().sum()


def test_a_store_of_parameters() -> None:
    x, plain = ROWS[0], lambda p, x: (p["w"] @ x + p["b"]).tanh().sum()
    p = initial(perceptron, x)
    for f, arguments in ((perceptron, x), (vmap(perceptron), ROWS), (grad(perceptron), x)):
        torch.testing.assert_close(initial(f, arguments), p)
    torch.testing.assert_close(grad(applied(perceptron))(p, x), grad(plain)(p, x))
    of_each = vmap(grad(applied(perceptron)), (None, 0))(p, ROWS)
    torch.testing.assert_close(of_each, vmap(grad(plain), (None, 0))(p, ROWS))
    torch.testing.assert_close(applied(vmap(perceptron))(p, ROWS), vmap(plain, (None, 0))(p, ROWS))
    torch.testing.assert_close(applied(grad(perceptron))(p, x), grad(plain, 1)(p, x))
    torch.testing.assert_close(
        jvp(lambda p: applied(perceptron)(p, x), (p,), (p,)), jvp(lambda p: plain(p, x), (p,), (p,))
    )
    torch.testing.assert_close(hessian(applied(perceptron))(p, x), hessian(plain)(p, x))


# --- products that wait until one is needed, and are one batched product then -----------------------------------------


class Waiting:
    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.result: Any = None


class Deferred(TableInterpreter):
    """``sees_everything``: the products of constants, which carry nothing, are what has to be seen."""

    kind, payload, sees_everything = "deferred", ("waiting",), True

    def __init__(self, func: Any = None) -> None:
        super().__init__(func)
        self.queue: list[Waiting] = []
        self.batches: list[int] = []

    def flush(self) -> None:
        groups: dict[Any, list[Waiting]] = {}
        for entry in self.queue:
            groups.setdefault((entry.left.shape, entry.right.shape), []).append(entry)
        self.queue = []
        for group in groups.values():
            self.batches.append(len(group))
            outs = torch.bmm(torch.stack([e.left for e in group]), torch.stack([e.right for e in group]))
            for entry, out in zip(group, outs.unbind(), strict=True):
                entry.result = out

    def computed_value(self, x: Any) -> Any:
        if not self.owns(x) or x.waiting is None:
            return self.value_of(x)
        if x.waiting.result is None:
            self.flush()
        return x.waiting.result

    def leave(self, leaf: Any) -> Any:
        return self.computed_value(leaf) if isinstance(leaf, Tensor) else leaf


def on_values(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
    with lowered(level):
        args, *named = (map_tensors(level.computed_value, a) for a in (args, *kwargs.values()))
        kwargs = dict(zip(kwargs, named, strict=True))
        return map_tensors(level.constant, op(*args, **kwargs))


Deferred.rules = RuleTable("deferred products", default=on_values)


@Deferred.rules.register(aten.mm.default)
def deferred_mm(level: Any, x: Any, y: Any) -> Tensor:
    entry = Waiting(level.computed_value(x), level.computed_value(y))
    level.queue.append(entry)
    return level.carry(x.value.new_empty(x.shape[0], y.shape[1]), waiting=entry)


def deferring(f: Callable[..., Any], batches: list[int] | None = None) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        level = Deferred(f)
        out = transform(level, f)(*args)
        if batches is not None:
            batches.extend(level.batches)
        return out

    return run


def test_products_that_wait() -> None:
    ws = [random(3, 3) for _ in range(4)]

    def f(x: Tensor) -> Tensor:
        products = [w @ x for w in ws]
        last = products[0].clone()
        last[0].mul_(2)
        return (torch.stack([p.tanh() for p in products]).sum(0) @ last).sum()

    x = random(3, 3)
    xs = torch.stack([x, x.T, x.cos()])
    batches: list[int] = []
    torch.testing.assert_close(deferring(f, batches)(x), f(x))
    assert batches == [4, 1]
    pushed = lambda f: lambda x: jvp(f, (x,), (ws[0],))
    for derivative in (grad, hessian, pushed):
        plain = derivative(f)
        for deferred in (deferring(plain), derivative(deferring(f))):
            torch.testing.assert_close(deferred(x), plain(x))
            torch.testing.assert_close(vmap(deferred)(xs), vmap(plain)(xs))
    torch.testing.assert_close(deferring(vmap(f))(xs), torch.stack([f(x) for x in xs]))


@pytest.mark.parametrize("sees", [False, True])
def test_a_table_that_sees_everything_has_rules_for_what_carries_nothing(sees: bool) -> None:
    """For composites, pieces of others and what is drawn; what has no rule, or one that declines, runs as it is."""
    asked: list[Any] = []

    class Sees(TableInterpreter):
        kind, payload, sees_everything = "sees", ("label",), sees
        rules: RuleTable[Any] = RuleTable("a table")

    def note(op: Any) -> Callable[..., Any]:
        def rule(level: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(op)
            if op is aten.cos.default:
                return NotImplemented
            return map_tensors(level.constant, op(*[map_tensors(lambda a: a.value, a) for a in args], **kwargs))

        return rule

    operators = (aten.mv.default, aten.softmax.int, aten.cos.default, aten.randn.default)
    for op in operators:
        Sees.rules.add(op, note(op))
    w, x = ROWS[:3], ROWS[0]
    f = lambda: (w @ x).softmax(0) + x[:3].cos().exp() + 0 * torch.randn(3, dtype=x.dtype)
    torch.testing.assert_close(transform(Sees, f)(), f())
    assert asked == (list(operators) if sees else [])


def test_a_table_that_is_set_later_and_one_that_is_none() -> None:
    class Later(TableInterpreter):
        kind, payload = "later", ("label",)

    for wrong, got in ((None, "no rules"), ({}, "rules = {}")):
        Later.rules = wrong  # type: ignore[assignment]
        with pytest.raises(RegistrationError, match=f"class Later: got {got}; expected rules = RuleTable"):
            transform(Later, torch.sin)(Carried(ROWS[0], label="x"))
    Later.rules = RuleTable("set later", default="pass")
    torch.testing.assert_close(transform(Later, torch.sin)(Carried(ROWS[0], label="x")), ROWS[0].sin())
