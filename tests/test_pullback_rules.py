"""Rules for the way back: what they see, change and note, against module hooks in plain PyTorch and closed forms."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

from functrans import grad, jacrev, jvp, vjp, vmap
from functrans.core.stack import interpreter_stack
from functrans.errors import CallValueError, MissingRuleError, RegistrationError, RuleError, RuleResultError
from functrans.extend import GradInterpreter, PullbackInterpreter, PullbackTable, Step, overriding, run_transformed

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert interpreter_stack() == []


def level_of(rules: dict[Any, Callable[..., Any]], **options: Any) -> type[PullbackInterpreter]:
    class Ruled(PullbackInterpreter):
        pullbacks = PullbackTable("rules of a test", **options)

    for op, rule in rules.items():
        Ruled.pullbacks.add(op, rule)
    return Ruled


def pulled(cls: type[PullbackInterpreter], f: Callable[..., Tensor], *args: Tensor) -> tuple[list[Any], list[Any]]:
    """The cotangents of the arguments of a scalar function, and what was noted about each."""
    level = cls(f)
    tracked = [level.track(a) for a in args]
    out = run_transformed(level, lambda: f(*tracked), enable_grad=True)
    cotangents = level.pull({out.tape_index: torch.ones_like(out.value)}, consume=True)
    return [cotangents.get(t.tape_index) for t in tracked], [level.noted(t) for t in tracked]


def gradient_by(cls: type[PullbackInterpreter], f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: pulled(cls, f, *args)[0][0]


#: Numbers of the module do not depend on what ran before.
SEEDED = torch.Generator().manual_seed(0)
W, V, X = (torch.randn(shape, dtype=torch.float64, generator=SEEDED) for shape in ((8, 3), (2, 8), (5, 3)))


def net(x: Tensor) -> Tensor:
    return (F.linear(F.linear(x, W).relu(), V).relu() * torch.tensor([1.0, -2.0])).sum()


GUIDED = level_of({aten.relu.default: lambda step, grad: step.pull(grad.clamp(min=0))})


def guided_by_hooks(x: Tensor) -> Tensor:
    """Guided backpropagation of one example in plain PyTorch, by backward hooks on modules."""
    module = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False), nn.ReLU()).double()
    module[0].weight.data, module[2].weight.data = W, V
    for relu in (module[1], module[3]):
        relu.register_full_backward_hook(lambda m, before, after: (after[0].clamp(min=0) * (before[0] != 0),))
    x = x.clone().unsqueeze(0).requires_grad_()
    (module(x) * torch.tensor([1.0, -2.0])).sum().backward()
    return x.grad[0]


def test_a_rule_changes_what_goes_on() -> None:
    expected = torch.stack([guided_by_hooks(x) for x in X])
    assert not torch.allclose(expected, vmap(grad(net))(X))
    torch.testing.assert_close(torch.stack([gradient_by(GUIDED, net)(x) for x in X]), expected)
    torch.testing.assert_close(vmap(gradient_by(GUIDED, net))(X), expected)


def test_by_the_public_transforms() -> None:
    expected = torch.stack([guided_by_hooks(x) for x in X])
    torch.testing.assert_close(vmap(grad(net, interpreter=GUIDED))(X), expected)
    torch.testing.assert_close(jacrev(net, interpreter=GUIDED)(X[0]), expected[0])
    outs, pullback = vjp(vmap(net), X, interpreter=GUIDED)
    torch.testing.assert_close(pullback(torch.ones_like(outs))[0], expected)
    pullbacks = vmap(lambda x: vjp(net, x, interpreter=GUIDED)[1])(X)  # each saved what belongs to its example
    torch.testing.assert_close(vmap(lambda pullback: pullback(torch.ones((), dtype=X.dtype))[0])(pullbacks), expected)


def test_a_rule_is_differentiated() -> None:
    squared = level_of({aten.mul.Tensor: lambda step, grad, self: {"other": grad * self**2}})
    f = gradient_by(squared, lambda y, x: (x * y).sin())  # cos(x y) x^2
    x, y = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    expected = -(x * y).sin() * x**3
    torch.testing.assert_close(f(y, x), (x * y).cos() * x**2)
    torch.testing.assert_close(grad(f)(y, x), expected)
    torch.testing.assert_close(jvp(lambda y: f(y, x), (y,), (torch.ones_like(y),))[1], expected)
    torch.testing.assert_close(vmap(grad(f), in_dims=(0, None))(torch.stack([y, 2 * y]), x)[0], expected)


def factors(step: Step, grad: Tensor, input: Tensor) -> None:
    step.note("weight", (torch.outer(grad, grad), torch.outer(input, input)))


KFAC = level_of({aten.linear.default: factors})


def loss(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, w).tanh(), v).square().sum()


def factors_by_hooks(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same of one example by hooks on modules."""
    module = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False)).double()
    module[0].weight.data, module[2].weight.data = W, V
    found: dict[int, list[Tensor]] = {0: [], 2: []}
    for i, kept in found.items():
        module[i].register_forward_hook(lambda m, args, out, kept=kept: kept.append(torch.outer(args[0], args[0])))
        module[i].register_full_backward_hook(
            lambda m, before, after, kept=kept: kept.append(torch.outer(after[0], after[0])))
    module(x.clone().requires_grad_()).square().sum().backward()
    return [(kept[1].detach(), kept[0].detach()) for kept in found.values()]


def test_a_second_lane() -> None:
    kfac = lambda x: [noted for (noted,) in pulled(KFAC, lambda w, v: loss(w, v, x), W, V)[1]]
    of_batch = vmap(kfac)(X)
    for i, x in enumerate(X):
        expected = factors_by_hooks(x)
        torch.testing.assert_close(kfac(x), expected)
        torch.testing.assert_close([tuple(f[i] for f in pair) for pair in of_batch], expected)
    found = pulled(KFAC, lambda w, v: loss(w, v, X[0]), W, V)[0]
    torch.testing.assert_close(tuple(found), grad(loss, argnums=(0, 1))(W, V, X[0]))  # goes on as ever


def test_what_is_noted_has_derivatives() -> None:
    trace = lambda w: pulled(KFAC, lambda w: loss(w, V, X[0]), w)[1][0][0][0].trace()
    square = lambda w: grad(lambda y: F.linear(y.tanh(), V).square().sum())(w @ X[0]).square().sum()
    torch.testing.assert_close(trace(W), square(W))
    torch.testing.assert_close(grad(trace)(W), grad(square)(W))


def test_a_parameter_that_is_used_twice_has_two_entries() -> None:
    noting = level_of({aten.matmul.default: lambda step, grad, self: step.note("other", self)})
    f = lambda w, x: (x @ w @ w).sum()
    w, x = torch.randn(3, 3), torch.randn(3)
    (cotangent, _), (noted, unused) = pulled(noting, f, w, x)
    torch.testing.assert_close(noted, [x @ w, x])  # the last use first
    assert unused == []
    torch.testing.assert_close(cotangent, grad(f)(w, x))


OPS: dict[str, tuple[Any, Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "composite": (aten.conv2d.default, lambda x, w: F.conv2d(x, w, padding=1).sin().sum(),
        (torch.randn(2, 4, 4), torch.randn(3, 2, 3, 3))),
    "the same argument twice": (aten.mul.Tensor, lambda x: (x * x).sum(), (torch.randn(3),)),
    "a list": (aten.cat.default, lambda x, y: torch.cat([x, torch.ones(2), y]).sin().sum(),
        (torch.randn(2), torch.randn(3))),
    "several outputs": (aten.topk.default, lambda x: x.topk(2)[0].sin().sum(), (torch.randn(5),)),
    "outputs in a list": (aten.split.Tensor, lambda x: x.split(2)[1].sin().sum(), (torch.randn(5),)),
    "broadcast": (aten.add.Tensor, lambda x, y: torch.add(x, y, alpha=3).sin().sum(),
        (torch.randn(3, 1), torch.randn(4))),
    "joint": (aten.convolution.default, lambda x, w: F.conv1d(x, w).sin().sum(),
        (torch.randn(2, 5), torch.randn(3, 2, 2))),
    "borrowed": (aten.cummax.default, lambda x: x.cummax(0)[0].sin().sum(), (torch.randn(5),)),
    "keyword": (aten.addmm.default, lambda x, y: torch.addmm(x, y, y, beta=2, alpha=3).sin().sum(),
        (torch.randn(3), torch.randn(3, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_the_ordinary_cotangents(name: str) -> None:
    """By a rule that asks for them, one that leaves them, and one that asks for one argument only."""
    op, f, args = OPS[name]
    expected = list(grad(f, argnums=tuple(range(len(args))))(*args))
    seen = []

    def asks(step: Step) -> Any:
        seen.append(step.names)
        return step.pull()

    def asks_one(step: Step) -> Any:
        first = step.pull(None, step.names[0])
        assert list(first) == [step.names[0]]
        return {**step.pull(), **first}

    for rule in (asks, lambda step: None, lambda step: {}, asks_one):
        torch.testing.assert_close(pulled(level_of({op: rule}), f, *args)[0], expected)
    assert seen
    tracked = [vmap(gradient_by(level_of({op: asks}), f))(torch.stack([args[0], args[0].cos()]), *(
        torch.stack([a, a]) for a in args[1:]))]  # fmt: skip
    torch.testing.assert_close(tracked[0][0], expected[0])


def smooth(info: Any, sample: Any, *xs: Tensor) -> Tensor:
    """A number, of what one of PyTorch's samples returns with other tensors."""
    torch.manual_seed(0)
    rest = iter(xs)
    args = [next(rest) if is_float(a) else a for a in (sample.input, *sample.args)]
    outs = tree_leaves(info.op(*args, **sample.kwargs))
    reals = [torch.view_as_real(o.resolve_conj()) if isinstance(o, Tensor) and o.is_complex() else o for o in outs]
    return torch.stack([o.sin().sum() for o in reals if is_float(o)]).sum()


def is_float(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


@pytest.mark.filterwarnings("ignore")
def test_a_rule_that_does_nothing_for_whatever_runs() -> None:
    """A rule for each operator that grad is asked about, composites, their pieces and what has no derivative too."""
    compared = set()
    for info in op_db:
        if torch.float64 not in info.dtypes or not info.supports_autograd:
            continue
        for sample in sampled(info, 1):
            asked: set[Any] = set()

            class Looking(GradInterpreter):
                def process(self, op: Any, args: Any, kwargs: Any, asked: set[Any] = asked) -> Any:
                    asked.add(op)
                    return super().process(op, args, kwargs)

            f = lambda *xs, info=info, sample=sample: smooth(info, sample, *xs)
            args = [a for a in (sample.input, *sample.args) if is_float(a)]
            numbers = tuple(range(len(args)))
            try:
                expected = grad(f, numbers)(*args)
            except (RuntimeError, TypeError, ValueError):  # what grad refuses is for other tests
                continue
            grad(f, numbers, interpreter=Looking)(*args)
            nothing = level_of({op: lambda step: None for op in asked if not isinstance(op, HigherOrderOperator)})
            torch.testing.assert_close(grad(f, numbers, interpreter=nothing)(*args), expected, equal_nan=True)
            compared |= asked
    assert len(compared) > 400 and aten.layer_norm.default in compared


def sampled(info: Any, count: int) -> list[Any]:
    samples = itertools.islice(info.sample_inputs("cpu", torch.float64, requires_grad=False), count)
    return [s for s in samples if is_float(s.input)]


def test_none_is_no_cotangent() -> None:
    stop = level_of({aten.mul.Tensor: lambda step: {"other": None}})
    found, _ = pulled(stop, lambda x, y: (x * y).sum() + y.sum(), torch.ones(2), torch.ones(2))
    assert [f.tolist() for f in found] == [[1.0, 1.0], [1.0, 1.0]]


def test_lists() -> None:
    seen: list[Any] = []

    def rule(step: Step, grad: Tensor, tensors: list[Tensor]) -> Any:
        seen.extend([[t.shape for t in tensors], step.index("tensors")])
        step.note("tensors", ["first", "constant", "last"])
        return {"tensors": [2 * c if c is not None else None for c in step.pull()["tensors"]]}

    _, f, args = OPS["a list"]
    found, noted = pulled(level_of({aten.cat.default: rule}), f, *args)
    assert noted == [["first"], ["last"]] and seen == [[(2,), (2,), (3,)], [1, None, 2]]
    torch.testing.assert_close(found, [2 * a.cos() for a in args])


def test_what_a_rule_names() -> None:
    seen = {}

    def rule(step: Step, grad: Tensor, result: Tensor, self: Tensor, beta: float, threshold: float) -> None:
        seen.update(grad=grad, result=result, self=self, beta=beta, threshold=threshold)

    x = torch.randn(3)
    pulled(level_of({aten.softplus.default: rule}), lambda x: 2 * F.softplus(x, beta=2.0).sum(), x)
    assert torch.equal(seen["result"], F.softplus(x, beta=2.0)) and torch.equal(seen["self"], x)
    assert torch.equal(seen["grad"], torch.full((3,), 2.0)) and (seen["beta"], seen["threshold"]) == (2.0, 20.0)


def test_a_write_to_what_is_saved() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        out = (x * y).sum()
        y.mul_(0)
        return out

    keeping = level_of({aten.mul.Tensor: lambda step, grad, other: {"self": 2 * grad * other}})
    y = torch.tensor([1.0, 2.0])
    by_default = level_of({}, default=lambda step, inputs: {n: 2 * c for n, c in step.pull().items()})
    for cls, expected in ((keeping, [2.0, 4.0]), (by_default, [4.0, 8.0])):  # the default is asked for the sum, too
        level = cls(f)
        x = level.track(torch.ones(2))
        out = run_transformed(level, lambda x=x: f(x, y.clone()), enable_grad=True)
        assert level.pull({out.tape_index: torch.tensor(1.0)}, consume=True)[x.tape_index].tolist() == expected


def test_walks_by_turns() -> None:
    """The second lane is that of the last walk, and a walk inside of a rule is one of its own."""
    inner = level_of({aten.mul.Tensor: lambda step, grad: step.note("self", grad)})

    def rule(step: Step, grad: Tensor, self: Tensor) -> None:
        _, ((noted,),) = pulled(inner, lambda x: (x * 3).sin(), self)
        step.note("self", noted)

    level = level_of({aten.exp.default: rule})()
    x = level.track(torch.tensor(0.5))
    out = run_transformed(level, lambda: x.exp(), enable_grad=True)
    for _ in range(2):
        level.pull({out.tape_index: torch.tensor(1.0)}, consume=False)
        torch.testing.assert_close(level.noted(x), [torch.tensor(1.5).cos()])


def test_hooks_and_anomalies() -> None:
    """A hook on the result of an operator with a rule runs once; a NaN is reported as without rules."""
    calls = []

    def f(x: Tensor) -> Tensor:
        y = F.conv1d(x, torch.ones(1, 1, 2))
        y.register_hook(lambda g: calls.append(g) or 2 * g)
        return y.sum()

    ruled = level_of({aten.conv1d.default: lambda step: None})
    torch.testing.assert_close(gradient_by(ruled, f)(torch.randn(1, 3)), torch.tensor([[2.0, 4.0, 2.0]]))
    assert len(calls) == 1
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match=r"aten\.sqrt"):
        gradient_by(level_of({aten.sqrt.default: lambda step: None}), lambda x: (x * 0).sqrt().sum() * 0)(torch.ones(2))


def test_no_grad_and_constants() -> None:
    never = level_of({aten.sin.default: lambda step: pytest.fail("a rule for what is not recorded")})

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.sin()
        return (x * y * torch.ones(2).sin()).sum()

    x = torch.randn(2)
    torch.testing.assert_close(gradient_by(never, f)(x), x.sin() * torch.ones(2).sin())


def test_error_by_default() -> None:
    """As a bound needs it: what has no rule is no ordinary derivative."""
    rules = {op: lambda step: None for op in (aten.mul.Tensor, aten.addmm.default, aten.t.default, aten.sum.default,
                                              aten.unsqueeze.default, aten.squeeze.dim, aten.view.default)}  # fmt: skip
    strict = level_of(rules, default="error")
    f = lambda x: (x * 2 * (x > 0)).sum()  # a comparison has no derivative, and needs no rule
    assert gradient_by(strict, f)(torch.tensor([1.0, -1.0])).tolist() == [2.0, 0.0]
    with pytest.raises(MissingRuleError, match=r"aten.sin.default.*Ruled.pullbacks.register.torch.ops.aten.sin"):
        gradient_by(strict, lambda x: x.sin().sum())(torch.ones(2))


def test_a_rule_by_default() -> None:
    seen = []

    def rule(step: Step, grads: list[Any], results: list[Any], inputs: dict[str, Any]) -> Any:
        seen.append((str(step.op), len(grads), len(results), list(inputs)))
        return {n: c for n, c in step.pull().items()}

    f = lambda x, w: F.softmax(F.linear(x, w), -1).topk(2)[0].sin().sum()
    x, w = torch.randn(3), torch.randn(4, 3)
    found, _ = pulled(level_of({}, default=rule), f, x, w)
    torch.testing.assert_close(tuple(found), grad(f, argnums=(0, 1))(x, w))
    assert ("aten.topk.default", 2, 2, ["self"]) in seen
    assert all(op != "aten.linear.default" for op, *_ in seen), "composites are taken apart"


WRONG: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "unknown name": (lambda step: {"weight": None}, RuleResultError, "a dict with .'weight'.; expected a dict"),
    "no dict": (lambda step, grad: grad, RuleResultError, "float32 tensor of shape .2,.; expected a dict by names of"),
    "shape": (lambda step, grad: {"self": grad[:1]}, RuleResultError, r"\(1,\) for 'self'; expected .* \(2,\)"),
    "own level": (lambda step, grad: 1 / 0, RuleError, "ZeroDivisionError"),
    "unknown argument": (lambda step: step.note("weight", 1), CallValueError, "'weight' as argument; expected one of"),
    "other cotangent": (lambda step, grad: step.pull(grad[:1]), CallValueError, r"\(1,\); expected .* \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules(name: str) -> None:
    rule, kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        pulled(level_of({aten.sin.default: rule}), lambda x: x.sin().sum(), torch.ones(2))


def test_registration() -> None:
    table = PullbackTable("a table")
    with pytest.raises(RegistrationError, match=r"a table: got a rule for aten.sin.default that asks for \['input'\]"):
        table.add(aten.sin.default, lambda step, grad, input: None)
    with pytest.raises(RegistrationError, match="asks for .'grad'.*among .*'grads'"):
        table.add(aten.topk.default, lambda step, grad: None)
    with pytest.raises(RegistrationError, match="without parameters"):
        table.add(aten.sin.default, lambda: None)
    with pytest.raises(RegistrationError, match="which takes functions"):
        table.add(torch.ops.higher_order.cond, lambda step: None)
    with pytest.raises(RegistrationError, match="got default='jvp'; expected 'derivative', 'error' or a rule"):
        PullbackTable("a table", default="jvp")
    with pytest.raises(RegistrationError, match="the default rule that asks for .'self'"):
        PullbackTable("a table", default=lambda step, self: None)

    class Without(PullbackInterpreter):
        pass

    with pytest.raises(RegistrationError, match=r"class Without has no pullback rules; expected pullbacks = "):
        Without()


def test_rules_in_a_scope() -> None:
    x = torch.tensor([1.0, -1.0])
    f = lambda x: -x.relu().sum()
    assert gradient_by(GUIDED, f)(x).tolist() == [0.0, 0.0]
    with overriding(GUIDED.pullbacks, aten.relu.default):
        assert gradient_by(GUIDED, f)(x).tolist() == [-1.0, 0.0]
    assert gradient_by(GUIDED, f)(x).tolist() == [0.0, 0.0]


def test_places() -> None:
    level = GUIDED(net)
    place = level.rule_place(aten.relu.default)
    assert place is not None and "test_pullback_rules.py" in place
    assert level.rule_place(aten.mul.Tensor) == grad_level().rule_place(aten.mul.Tensor)


def grad_level() -> GradInterpreter:
    return GradInterpreter(net)
