"""What functrans.extend has beside rules: policies without one, transform, levels that look on, primitives."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import functrans
from functrans import bounds, grad, hessian, jacfwd, jacrev, jvp, vmap
from functrans.errors import (
    CallError,
    CallTypeError,
    DuplicateRuleError,
    FunctransError,
    MissingRuleError,
    RegistrationError,
    RuleResultError,
)
from functrans.extend import (
    Carried,
    GradInterpreter,
    Handler,
    Interpreter,
    PassThrough,
    Primitive,
    RuleTable,
    TableInterpreter,
    VmapInterpreter,
    as_function,
    interpreter_stack,
    lowered,
    op_info,
    run_transformed,
    transform,
)

aten = torch.ops.aten


class Dual(TableInterpreter):
    """Forward mode, all of it by policy."""

    kind = "dual"
    payload = ("slope",)
    rules = RuleTable("dual numbers", default="jvp")


def pushed(f: Callable[..., Any], x: Tensor, v: Tensor) -> Any:
    return transform(Dual, f)(Carried(x, slope=v))


W = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: (x.sin() * x + 2 / (1 + x * x)).exp(),
    "twice the same": lambda x: x * x,
    "linear": lambda x: nn.functional.linear(x, W).relu(),
    "softmax": lambda x: x.softmax(-1).log(),
    "layer_norm": lambda x: nn.functional.layer_norm(x, (3,)),
    "views and writes": lambda x: x.clone().view(3).mul_(2)[1:].add_(x[:2]),
    "cat": lambda x: torch.cat([x, x * 2, torch.ones(1)]),
    "stack": lambda x: torch.stack([x, x.cos()]).sum(0),
    "sort": lambda x: x.sort().values,
    "prod": lambda x: x.prod(),
    "solve": lambda x: torch.linalg.solve(torch.eye(3, dtype=x.dtype) * 3 + x.outer(x), x),
    "svdvals": lambda x: torch.linalg.svdvals(torch.diag(x) + 0.1),
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "logsumexp": lambda x: x.logsumexp(0),
    "where": lambda x: torch.where(x > 0, x**3, -x),
    "gather": lambda x: x.gather(0, torch.tensor([2, 0])),
    "unbind": lambda x: x.unbind()[1] * 3,
    "var_mean": lambda x: sum(torch.var_mean(x)),
    "conv": lambda x: nn.functional.conv1d(x.view(1, 1, 3), torch.ones(1, 1, 2, dtype=x.dtype)),
    "norm": lambda x: x.norm(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derived_rules(name: str) -> None:
    f = FUNCTIONS[name]
    x, v = torch.randn(2, 3, dtype=torch.float64)
    out = pushed(f, x, v)
    value, slope = torch.autograd.functional.jvp(f, x, v)
    torch.testing.assert_close(out.value, value)
    torch.testing.assert_close(out.slope, slope)
    rows, along = torch.randn(2, 2, 3, dtype=torch.float64)
    found = vmap(lambda x, v: pushed(f, x, v).slope)(rows, along)
    torch.testing.assert_close(
        found, torch.stack([torch.autograd.functional.jvp(f, a, b)[1] for a, b in zip(rows, along)])
    )
    second = grad(lambda x: pushed(f, x, v).slope.sum())(x)
    expected = torch.autograd.functional.hvp(lambda x: f(x).sum(), x, v)[1]
    torch.testing.assert_close(second, expected)


def test_derived_rules_of_what_is_no_number_line() -> None:
    """Outputs of whole numbers and truth values are constants, and so is what an integer carries."""
    x = Carried(torch.tensor([3.0, 1.0, 2.0]), slope=torch.ones(3))
    values, indices, flags, size = transform(Dual, lambda x: (*x.sort(), x > 1, x.numel()))(x)
    assert isinstance(values, Carried) and values.value.tolist() == [1.0, 2.0, 3.0]
    assert isinstance(indices, Tensor) and indices.tolist() == [1, 2, 0]
    assert flags.tolist() == [True, False, True] and size == 3
    out = transform(Dual, lambda n: n * 2)(Carried(torch.tensor([1, 2]), slope=torch.ones(2)))
    assert isinstance(out, Tensor) and out.tolist() == [2, 4]


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "int": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "sum": lambda x: x.sum(dtype=torch.long),
    "cumsum": lambda x: x.cumsum(0, dtype=torch.int32),
    "type": lambda x: x.type(torch.long),
    "view": lambda x: x.view(torch.int32),
    "copied": lambda x: torch.zeros(3, dtype=torch.long).copy_(x),
    "ones": lambda x: torch.ones_like(x, dtype=torch.int),
}


@pytest.mark.parametrize("name", WHOLE)
def test_derived_rules_of_conversions_to_whole_numbers(name: str) -> None:
    f, x = WHOLE[name], torch.tensor([3.7, 0.0, -2.2])
    found, times = transform(Dual, lambda x: (f(x), f(x).sum() * x))(Carried(x, slope=torch.ones(3)))
    torch.testing.assert_close((found, times.value), (f(x), f(x).sum() * x))
    torch.testing.assert_close(times.slope, f(x).sum() * torch.ones(3))


class Two(TableInterpreter):
    """Two tangents at once, either of which may be absent."""

    kind = "two"
    payload = ("a", "b")
    rules = RuleTable("two tangents", default="jvp")


def test_several_payloads() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return x * y.sin()

    x, y = torch.randn(2, 3)
    one = torch.ones(3)
    out = transform(Two, f)(Carried(x, a=one), y=Carried(y, b=one))
    torch.testing.assert_close(out.a, y.sin())
    torch.testing.assert_close(out.b, x * y.cos())
    assert transform(Two, f)(Carried(x, a=one), y).b is None


def table_with(default: Any, *rules: Any) -> type[TableInterpreter]:
    table: RuleTable[Any] = RuleTable("a table", default=default)
    for op, rule in rules:
        table.add(op, rule)

    class Labelled(TableInterpreter):
        kind = "labelled"
        payload = ("label",)
        rules = table

    return Labelled


def test_the_order_of_what_is_asked() -> None:
    """Rules, what carries nothing, pieces of composite operators, and only then the default."""
    asked = []

    def default(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        asked.append(str(op))
        f, (x, *_), values, rebuild = as_function(interpreter, op, args, kwargs)
        with lowered(interpreter):
            return rebuild([interpreter.carry(out, label=x.label) for out in f(*values)])

    kind = table_with(default, (aten.sin.default, lambda i, x: i.carry(x.value.sin(), label=x.label + "!")))
    x = torch.randn(2, 3)
    out = transform(kind, lambda x: torch.ones(2).cos().sum() * x.sin().cos().flatten().exp())(Carried(x, label="x"))
    assert out.label == "x!"
    assert asked[0] == "aten.cos.default" and "aten.sin.default" not in asked and "aten.flatten.using_ints" not in asked
    assert op_info(aten.flatten.using_ints).composite and "aten.view.default" in asked


def test_passing_and_decomposing() -> None:
    x = Carried(torch.randn(3), label="x")
    out = transform(table_with("pass"), lambda x: x.sin())(x)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, x.value.sin())
    seen = table_with("decompose", (aten.sub.Tensor, lambda i, x, y: i.carry(x.value - y.value, label="minus")))
    with pytest.raises(MissingRuleError, match="has no rule for"):
        transform(seen, lambda x: x.sin())(x)
    pieces = []

    class Pieces(TableInterpreter):
        kind = "pieces"
        payload = ("label",)
        rules = RuleTable("pieces", default="decompose")

        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            pieces.append(op)
            return super().process(op, args, kwargs)

    with pytest.raises(MissingRuleError):
        transform(Pieces, torch.nn.functional.hardtanh)(Carried(torch.randn(3), label="x"))
    assert pieces[0] is aten.hardtanh.default and len(pieces) > 1
    with pytest.raises(MissingRuleError):
        transform(table_with("error"), lambda x: x.sin())(x)
    assert interpreter_stack() == []


def test_a_default_that_is_none() -> None:
    with pytest.raises(RegistrationError, match="one of 'error', 'jvp', 'decompose', 'loop', 'pass', or a function"):
        table_with("guess")


def test_as_function() -> None:
    found = {}

    def default(interpreter: Any, op: Any, args: Any, kwargs: Any) -> Any:
        f, carrying, values, rebuild = as_function(interpreter, op, args, kwargs)
        with lowered(interpreter):
            outs = f(*values)
        found[str(op)] = [x.label for x in carrying], len(outs)
        return rebuild([interpreter.carry(out, label="out") for out in outs])

    kind = table_with(default)
    x, y = Carried(torch.randn(3), label="x"), Carried(torch.randn(3), label="y")

    def f(x: Tensor, y: Tensor) -> Any:
        return torch.cat([x, torch.ones(1), y, x]), x.topk(2), (x * y * torch.ones(3)).isnan()

    joined, top, flags = transform(kind, f)(x, y)
    assert found["aten.cat.default"] == (["x", "y"], 1)
    assert found["aten.topk.default"] == (["x"], 1)
    assert found["aten.isnan.default"] == (["out"], 0)
    torch.testing.assert_close(joined.value, torch.cat([x.value, torch.ones(1), y.value, x.value]))
    assert type(top).__name__ in ("topk", "tuple") and isinstance(top[0], Carried) and isinstance(top[1], Tensor)
    assert flags.dtype == torch.bool


def test_transform() -> None:
    x, one = torch.tensor(3.0), torch.tensor(1.0)
    f = transform(Dual, lambda tree, *, scale: {"y": tree["x"] ** 2 * scale, "none": None, "n": 5, "k": tree["k"]})
    for _ in range(2):  # a new interpreter for every call
        out = f({"x": Carried(x, slope=one), "k": x}, scale=torch.tensor(2.0))
        assert (out["y"].value, out["y"].slope, out["none"], out["n"]) == (18.0, 12.0, None, 5)
        assert out["k"] is x or torch.equal(out["k"], x)
    made = Dual(torch.sin)
    assert transform(made, torch.sin)(Carried(one * 0, slope=one)).slope == 1.0
    nested = transform(Dual, lambda x: transform(Dual, lambda y: y**3)(Carried(x, slope=one)).slope)
    assert nested(Carried(x, slope=one)).slope == 18.0
    assert repr(Carried(one, slope=x)) == "Carried(1.0, slope=3.0)"
    with pytest.raises(AttributeError, match="carries \\['slope'\\]"):
        _ = Carried(one, slope=x).upper
    for wrong in (3, "dual"):
        with pytest.raises(CallTypeError, match="as interpreter"):
            transform(wrong, torch.sin)  # type: ignore[arg-type]
    for wrong in (lambda f: None, lambda f: GradInterpreter(f)):
        with pytest.raises(CallTypeError):
            transform(wrong, torch.sin)(x)
    with pytest.raises(CallTypeError, match="value"):
        Carried(1.0)  # type: ignore[arg-type]
    assert interpreter_stack() == []


def watched(f: Callable[..., Any], *args: Any, pieces: bool = False) -> tuple[Any, list[str]]:
    seen = []

    class Watch(PassThrough):
        kind = "watch"

        def before(self, op: Any, args: Any, kwargs: Any) -> None:
            assert interpreter_stack() == [] or interpreter_stack()[0] is self.below
            seen.append(str(op).removeprefix("aten.").removesuffix(".default"))

    Watch.pieces = pieces
    return transform(Watch, f)(*args), seen


def test_pass_through_sees_what_runs() -> None:
    x = torch.randn(3)
    out, seen = watched(lambda x: (x.sin() + 1).exp(), x)
    torch.testing.assert_close(out, (x.sin() + 1).exp())
    assert seen == ["sin", "add.Tensor", "exp"]
    # captured tensors and factories, too
    assert watched(lambda: x.sin() * torch.ones(3))[1] == ["sin", "ones", "mul.Tensor"]
    # inside of it: each operator of each level, and the walk back
    out, seen = watched(vmap(grad(torch.sin)), x)
    torch.testing.assert_close(out, x.cos())
    assert "cos" in seen and "sin" in seen
    # constants of a level inside that never were of this one
    assert watched(lambda x: grad(lambda y: (y * x.cos()).sum())(torch.ones(3)), x)[1].count("cos") == 1
    # outside of it: what stands around has its say
    torch.testing.assert_close(vmap(grad(lambda x: watched(torch.sin, x)[0]))(x), x.cos())
    torch.testing.assert_close(hessian(lambda x: watched(lambda x: (x**3).sum(), x)[0])(x), torch.diag(6 * x))


def test_pass_through_takes_composites_whole_or_in_pieces() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    assert watched(nn.functional.linear, x, w)[1] == ["linear"]
    assert watched(nn.functional.linear, x, w, pieces=True)[1] == ["t", "mm"]


def test_pass_through_may_replace_results() -> None:
    class Rounded(PassThrough):
        kind = "rounded"

        def after(self, op: Any, args: Any, kwargs: Any, out: Any) -> Any:
            return out.round() if isinstance(out, Tensor) else None

    x = torch.tensor([0.4, 2.6])
    assert transform(Rounded, lambda x: x * 1.0)(x).tolist() == [0.0, 3.0]
    assert vmap(transform(Rounded, lambda x: x * 1.0))(x).tolist() == [0.0, 3.0]


class Remembered(PassThrough):
    """Each product of the same matrices is computed once."""

    kind = "remembered"

    def __init__(self, func: Any = None) -> None:
        super().__init__(func)
        self.known: list[tuple[Any, Any, Any]] = []
        self.seen: list[str] = []

    def instead(self, op: Any, args: Any, kwargs: Any) -> Any:
        found = (out for op_, args_, out in self.known if op_ is op and all(a is b for a, b in zip(args, args_)))
        return next(found, NotImplemented)

    def after(self, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.seen.append(str(op))
        if op is aten.matmul.default:
            self.known.append((op, args, out))


def test_pass_through_may_answer_in_an_operators_place() -> None:
    w, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    f = lambda x: ((w @ x) * (w @ x).sin()).sum()
    level = Remembered(f)
    torch.testing.assert_close(transform(level, f)(x[0]), f(x[0]))
    assert level.seen.count("aten.matmul.default") == 1 and level.seen.count("aten.sin.default") == 1
    level.known.clear()
    torch.testing.assert_close(vmap(transform(Remembered, f))(x), vmap(f)(x))
    torch.testing.assert_close(vmap(grad(transform(Remembered, f)))(x), vmap(grad(f))(x))
    torch.testing.assert_close(transform(Remembered, vmap(grad(f)))(x), vmap(grad(f))(x))
    torch.testing.assert_close(hessian(transform(Remembered, f))(x[0]), hessian(f)(x[0]))


@pytest.mark.parametrize(
    ("hook", "answer", "text"),
    [
        ("instead", lambda x: 3.0, "got a float; expected a tensor. Return a value of the level below"),
        ("instead", lambda x: x[:1], "got float64[1]; expected shape [2], the operator's for these arguments"),
        ("instead", lambda x: None, "got None; expected a tensor"),
        ("instead", lambda x: Answers.inside, "the result: got float64[2] of answers"),
        ("after", lambda x: x[:1], "got float64[1] of no level; expected a tensor of shape [2], as aten.sin.default"),
        ("after", lambda x: 3.0, "got a float; expected a tensor of shape [2]"),
        ("after", lambda x: Answers.inside, "the result: got float64[2] of answers"),
    ],
)
def test_what_is_no_result_in_its_place(hook: str, answer: Any, text: str) -> None:
    class Wrong(Answers):
        pass

    def of_sin(self: Any, op: Any, args: Any, kwargs: Any, *out: Any) -> Any:
        return answer(args[0]) if op is aten.sin.default else None if out else NotImplemented

    setattr(Wrong, hook, of_sin)

    def f(x: Tensor) -> Tensor:
        Answers.inside = x
        return x.sin()

    with pytest.raises(FunctransError) as caught:
        transform(Wrong, f)(torch.zeros(2, dtype=torch.float64))
    assert text in str(caught.value)
    Answers.inside = None
    assert interpreter_stack() == []


class Answers(PassThrough):
    kind = "answers"
    inside: Any = None


def test_arguments_that_are_written() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    watched(lambda x: x.add_(1), x)
    assert x.tolist() == [1.0, 1.0]
    vmap(lambda x: watched(lambda x: x.mul_(3), x)[0])(x)
    assert x.tolist() == [3.0, 3.0]
    transform(Dual, lambda x, y: y.add_(1))(Carried(x, slope=x), y)
    assert y.tolist() == [1.0, 1.0]
    with pytest.raises(CallError, match="a write to a Carried"):
        transform(Dual, lambda x: x.mul_(2))(Carried(x, slope=x))
    with pytest.raises(Exception, match="captured|argument"):
        transform(Dual, lambda x, y: y.add_(x))(Carried(x, slope=x), y)
    assert interpreter_stack() == []


def test_pass_through_leaves_nothing_behind() -> None:
    class Fails(PassThrough):
        kind = "fails"

        def before(self, op: Any, args: Any, kwargs: Any) -> None:
            raise ValueError("seen enough")

    with pytest.raises(Exception, match="seen enough"):
        vmap(transform(Fails, torch.sin))(torch.zeros(2))
    assert interpreter_stack() == []
    assert torch.equal(torch.zeros(2).sin(), torch.zeros(2))


class Scope(Handler):
    kind = "scope"


def test_a_handler_has_no_wrappers() -> None:
    kinds = []

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        kinds.append((type(y), [i.kind for i in interpreter_stack()]))
        return y * torch.ones(())

    assert transform(Scope, f)(torch.zeros(2)).tolist() == [0.0, 0.0]
    assert kinds == [(Tensor, ["scope"])]
    x = torch.randn(3)
    torch.testing.assert_close(vmap(grad(transform(Scope, torch.sin)))(x), x.cos())
    torch.testing.assert_close(transform(Scope, vmap(grad(torch.sin)))(x), x.cos())
    torch.testing.assert_close(vmap(transform(Scope, grad(torch.sin)))(x), x.cos())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(transform(Scope, lambda: torch.rand(3))(), expected)
    drawn = vmap(transform(Scope, lambda x: torch.rand(2)), randomness="different")(x)
    assert drawn.shape == (3, 2) and not torch.equal(drawn[0], drawn[1])
    y = torch.zeros(2)
    transform(Scope, lambda: y.add_(1))()
    assert y.tolist() == [1.0, 1.0]


def test_a_primitive_visits_every_level() -> None:
    visited: list[str] = []
    p = Primitive("p", lambda x, **options: (visited.append(f"base {options}"), x * 10)[1])

    @p.rule(Interpreter)
    def _(level: Interpreter, x: Any, **options: Any) -> Any:
        visited.append(level.kind)
        return NotImplemented

    assert transform(Scope, lambda: p(torch.tensor(2.0), name="n"))() == 20.0
    assert visited == ["scope", "base {'name': 'n'}"]
    visited.clear()
    vmap(grad(lambda x: x * p(torch.tensor(1.0))))(torch.ones(2))
    assert visited == ["grad", "vmap", "base {}"]


def test_a_primitive_takes_and_returns_any_values() -> None:
    p = Primitive("p", lambda f, d: {"got": f(d["x"]), "name": d["name"], "f": f})
    out = vmap(lambda x: x * p(torch.exp, {"x": torch.zeros(()), "name": "n"})["got"])(torch.ones(2))
    assert out.tolist() == [1.0, 1.0]
    assert p(torch.exp, {"x": torch.zeros(()), "name": "n"})["f"] is torch.exp


def test_a_primitive_with_rules_for_the_transforms() -> None:
    """A row's place in the batch, and a scaling that has derivatives of its own."""
    p = Primitive("scaled", lambda x, by: x * by)
    p.derivative(pullback=lambda grad, out, x, by: p(grad, 10 * by), tangent=lambda t, out, x, by: p(t[0], 100 * by))

    @p.rule(VmapInterpreter)
    def _(level: VmapInterpreter, x: Any, by: float) -> Any:
        return level.batched(p.below(level, x.value, by), x.bdim) if level.owns(x) else NotImplemented

    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(vmap(lambda x: p(x, 2.0))(x), 2 * x)
    torch.testing.assert_close(vmap(grad(lambda x: p(x, 2.0)))(x), torch.full_like(x, 20.0))
    torch.testing.assert_close(grad(lambda x: vmap(lambda x: p(x, 2.0))(x).sum())(x), torch.full_like(x, 20.0))
    torch.testing.assert_close(jvp(lambda x: p(x, 2.0), (x,), (x,))[1], 200 * x)
    torch.testing.assert_close(jacfwd(lambda x: p(x, 2.0))(x), 200 * torch.eye(4, dtype=x.dtype))
    square = lambda x: p(x, 2.0) ** 2
    # the pullback p(2·p(x, 2), 20) is pulled back by p(·, 200) and p(·, 20), pushed forward by p(·, 200) and p(·, 2000)
    torch.testing.assert_close(vmap(grad(grad(square)))(x), torch.full_like(x, 200.0 * 2 * 20))
    torch.testing.assert_close(vmap(lambda x: jvp(grad(square), (x,), (x,))[1])(x), 2000 * 2 * 200 * x)


def test_a_mode_that_is_missing() -> None:
    p = Primitive("p", lambda x: x)
    p.derivative(tangent=lambda t, out, x: t[0])
    assert jvp(p, (torch.tensor(1.0),), (torch.tensor(2.0),))[1] == 2.0
    with pytest.raises(MissingRuleError, match="p, which has no pullback. Give p.derivative"):
        grad(p)(torch.tensor(1.0))
    q = Primitive("q", lambda x: x)
    q.derivative(pullback=lambda grad, out, x: grad)
    assert grad(q)(torch.tensor(1.0)) == 1.0
    with pytest.raises(MissingRuleError, match="q, which has no tangent"):
        jvp(q, (torch.tensor(1.0),), (torch.tensor(2.0),))
    with torch.no_grad():
        assert grad(lambda x: x * 1.0)(torch.tensor(1.0)) == 1.0


def test_a_level_without_a_rule_for_what_it_carries() -> None:
    p = Primitive("p", lambda x: x)
    for run, level in ((lambda: grad(p)(torch.tensor(1.0)), "grad"), (lambda: vmap(p)(torch.zeros(2)), "vmap")):
        with pytest.raises(MissingRuleError, match=rf"{level}\(p\) at level 1 has no rule for p. Levels: 1 {level}"):
            run()
    with pytest.raises(MissingRuleError, match=r"@p.rule\(Dual\)"):
        pushed(p, torch.tensor(1.0), torch.tensor(1.0))
    assert interpreter_stack() == []


def test_registration_of_rules() -> None:
    p = Primitive("p", lambda: 0)
    for _ in range(2):  # a cell that runs again replaces its rule

        @p.rule(Scope)
        def first(level: Any) -> int:
            return 1

    with pytest.raises(DuplicateRuleError, match="rules of p: Scope already has a rule"):
        p.rule(Scope)(first)
    with pytest.raises(CallTypeError, match="classes of interpreters"):
        p.rule(int)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError, match="no class"):
        p.rule()
    with pytest.raises(CallTypeError):
        Primitive(3, lambda: 0)  # type: ignore[arg-type]
    with pytest.raises(CallTypeError):
        Primitive("p", 3)  # type: ignore[arg-type]
    level = Scope()
    run_transformed(level, lambda: p())
    with pytest.raises(CallError, match="has ended"):
        p.below(level)


def test_results_belong_to_who_asked() -> None:
    p = Primitive("p", lambda: torch.zeros(3))

    def f(x: Tensor) -> Tensor:
        out = p()
        out.add_(x)
        return out

    x = torch.randn(2, 3)
    torch.testing.assert_close(vmap(f)(x), x)
    torch.testing.assert_close(vmap(grad(lambda x: f(x).sum()))(x), torch.ones(2, 3))


def test_a_decomposition_that_leads_back_is_none() -> None:
    """``complex`` is written into its parts, and such a write makes it of its parts."""
    x = torch.zeros(2)
    for f in (lambda x: torch.complex(x, x), lambda x: float(x[0])):
        with pytest.raises(MissingRuleError, match=r"at level 1 has no rule for .* Levels: 1 bounds\("):
            bounds(f)(x, x + 1)
    assert interpreter_stack() == []


def test_what_given_may_return() -> None:
    class Given(PassThrough):
        kind = "given"
        returned: Any = None

        def given(self, op: Any, value: Tensor, own: bool) -> Any:
            return self.returned

    for wrong, got in ((3, "a int"), (None, "None")):
        Given.returned = wrong
        place = r"registered at .*test_extension_api.py:\d+"
        with pytest.raises(RuleResultError, match=rf"{place}: got {got}; expected a tensor"):
            transform(Given, torch.sin)(torch.zeros(3))
    with pytest.raises(CallTypeError, match=r"given\(<lambda>\): got 2 positional arguments"):
        transform(Given, lambda x: x)(torch.zeros(3), torch.zeros(3))


def test_a_handler_below_all_others_is_passed_by() -> None:
    """What a rule's code asks finds it, PyTorch's autograd records, and one with a ``process`` sees what is random."""

    class Outermost(Handler):
        kind = "outermost"

    class Draws(Handler):
        kind = "draws"

        def __init__(self, func: Any = None) -> None:
            super().__init__(func)
            self.seen: list[str] = []

        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            self.seen.append(str(op))
            return super().process(op, args, kwargs)

    scale = Primitive("scale", lambda: 1.0)
    scale.rule(Outermost)(lambda level: 3.0)
    scaled = Primitive("scaled", lambda x: x)
    scaled.batching(lambda info, in_dims, x: (x * scale() + torch.zeros(()), in_dims[0]))
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    out = transform(Outermost, transform(Outermost, vmap(scaled)))(x)
    out.sum().backward()
    assert out.tolist() == [3.0, 6.0] and x.grad.tolist() == [3.0, 3.0]  # type: ignore[union-attr]
    with torch.no_grad():
        assert transform(Outermost, vmap(scaled))(x).requires_grad is False
    level = Draws()
    transform(level, vmap(lambda x: torch.rand_like(x), randomness="different"))(x.detach())
    assert len(level.seen) == 1 and level.seen[0].startswith("aten.rand")


def test_jvp_of_what_is_no_tensor_beside_tensors() -> None:
    """It passes, and its tangent is None; a number may be a tensor's that has left its derivative behind."""
    x = torch.tensor([1.0, 2.0])

    def f(x: Tensor) -> Any:
        return {"y": x**3, "count": (len(x), True), "name": "cube", "nothing": None, "large": x > 1.5}

    out, tangent = jvp(f, (x,), (x,))
    assert torch.equal(out["y"], x**3) and torch.equal(tangent["y"], 3 * x**3)
    assert (out["count"], out["name"], out["nothing"]) == ((2, True), "cube", None)
    assert (tangent["count"], tangent["name"], tangent["nothing"]) == ((None, None), None, None)
    assert not tangent["large"].any()
    second = jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (torch.ones(2),))[1]
    assert torch.equal(second["y"], 9 * x**2) and second["name"] is None
    rows = torch.stack([x, x + 1])
    out, tangent = vmap(lambda x: jvp(f, (x,), (x,)))(rows)
    assert torch.equal(tangent["y"], 3 * rows**3) and out["count"] == (2, True) and tangent["name"] is None
    for number in (3.0, 2j, numpy.ones(2), numpy.float64(1)):
        with pytest.raises(CallError, match=r"as output\[1\]; expected only tensors. Return the tensor itself"):
            jvp(lambda x, number=number: (x, number), (x,), (x,))
    for out in (None, 3, (None, "a"), ()):
        with pytest.raises(CallError, match="expected (only tensors|at least one tensor)"):
            jvp(lambda x, out=out: out, (x,), (x,))
    with pytest.raises(CallError, match=r"output\['y'\], which does not depend on the primals"):
        jvp(lambda x: {"y": x.detach(), "name": "a"}, (x,), (x,), strict=True)


class Plain(TableInterpreter):
    kind, payload, rules = "plain", ("label",), RuleTable("plain rules", default="pass")


def test_a_table_inside_of_a_derivative_carries_what_has_none() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = x.sin() * 2
        return x * fixed

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    for derivative in (jacrev, lambda f: hessian(lambda x: f(x).sum()), lambda f: lambda x: jvp(f, (x,), (x,))):
        for inside in (transform(Plain, f), transform(Silent, f)):
            torch.testing.assert_close(vmap(derivative(inside))(x), vmap(derivative(f))(x))


class Silent(Handler):
    kind = "silent"


def in_parts(x: Tensor) -> Tensor:
    y = torch.zeros(5, dtype=x.dtype)
    y[:3] = x
    z = y.view(5, 1)
    z[4].add_(x[1])
    y[3:].mul_(2)
    return y.exp().sum()


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "parts": in_parts,
    "new": lambda x: x.new_zeros(4)[1:].copy_(x).sin().sum(),
    "stacked": lambda x: torch.stack([torch.ones(3, dtype=x.dtype)])[0].mul_(x).prod(),
    "computed": lambda x: (torch.arange(3) * 2.0).double().view(1, 3)[0].add_(x).cos().sum(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_code_in_a_handler_writes_to_what_it_makes(name: str) -> None:
    """What has nothing to do with the level around is of that level all the same, so that what it holds may be."""
    f, x = WRITTEN[name], torch.linspace(-1, 1, 3, dtype=torch.float64)
    rows = torch.stack([x, x * 2])
    transforms: list[Callable[[Any], Any]] = [
        lambda f: grad(f)(x), lambda f: vmap(f)(rows), lambda f: vmap(grad(f))(rows), lambda f: hessian(f)(x),
        lambda f: jvp(f, (x,), (rows[1],)), lambda f: functrans.jet(f, (x,), ([x, None],)),
        lambda f: functrans.laplacian(f)(x),
    ]  # fmt: skip
    for transformed in transforms:
        expected = transformed(f)
        for inside in (
            transform(Silent, f), transform(Silent, transform(Silent, f)), lambda x: functrans.reap(f)(x)[0],
            functrans.plant(f, {}), functrans.seed(f, 0), functrans.condition(f, {}),
        ):  # fmt: skip
            torch.testing.assert_close(transformed(inside), expected)
    assert functrans.log_density(lambda x: functrans.observe(torch.distributions.Normal(f(x), 1.0), f(x)))({}, x) < 0
