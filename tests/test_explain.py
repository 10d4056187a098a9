"""explain: what it shows, that it shows all of it, and that the run is the plain one."""

from __future__ import annotations

import copy
import gc
import html
import json
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import identity_functions
import injection
import pytest
import torch
from expecttest import assert_expected_inline
from recorder import Listing
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import functrans
from functrans import explain, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.explanation import Event, Explanation
from functrans.explanation.drawings import Drawings
from functrans.explanation.verdicts import WAYS
from functrans.explanation.watching import Watched
from functrans.extend import (
    BATCHING_RULES,
    DERIVATIVES,
    Carried,
    Primitive,
    RuleTable,
    TableInterpreter,
    VmapInterpreter,
    overriding,
    transform,
)
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.pictures import stack_picture, value_picture
from functrans.pytorch.torch_private import debug_mode

aten = torch.ops.aten
X = torch.tensor([0.0, 1.0, 2.0])
ROWS = torch.tensor([[0.0, 1.0, 2.0], [3.0, 5.0, 4.0]])


def shown(explanation: Explanation, **options: Any) -> str:
    """Its text without numbers of lines, which change, and without checks, which depend on what ran before."""
    return re.sub(r"(\.py):\d+", r"\1:N", explanation.text(**options).replace(str(Path.cwd()) + "/", ""))


def ways(explanation: Explanation) -> list[tuple[int, str, str]]:
    """Level, operator and what took it, for each operator that a level was asked about."""
    return [(e.level.level, e.name, e.way) for e in explanation if e.kind == "operator" and e.level is not None]


# ------------------------------------------------------------------------------------------------- what is shown


def scaled(x: Tensor) -> Tensor:
    y = torch.logsumexp(x, 0)
    return y * 3


def test_a_gradient_for_each_example() -> None:
    found = explain(vmap(grad(scaled)), ROWS)
    assert torch.equal(found.result, vmap(grad(scaled))(ROWS))
    assert_expected_inline(shown(found), """\
explain(scaled)
└ vmap(scaled) is level 1, batch_size=2, randomness='error'
  ├ grad(scaled) is level 2
  │ ├ tests/test_explain.py:N  y = torch.logsumexp(x, 0)
  │ │ └ level 2 grad  aten.logsumexp.default(float32[3], [0]) -> float32[]
  │ │   · derivative entry, functrans/derivatives/reductions.py:N, recorded as 2 <- 1
  │ │   · self: tracked, tape_index=1
  │ │   └ level 1 vmap  aten.logsumexp.default(float32[3], [0]) -> float32[]
  │ │     · rule, functrans/interpreters/vmap/rules/reductions.py:N
  │ │     · self: bdim=0
  │ │     └ base  aten.logsumexp.default(float32[2, 3], [1]) -> float32[2]
  │ └ tests/test_explain.py:N  return y * 3
  │   └ level 2 grad  aten.mul.Tensor(float32[], 3) -> float32[]
  │     · program, functrans/derivatives/binary.py:N, recorded as 3 <- 2
  │     · a: tracked, tape_index=2
  │     └ level 1 vmap  aten.mul.Tensor(float32[], 3) -> float32[]
  │       · program, functrans/interpreters/vmap/rules/pointwise.py:N
  │       · a: bdim=0
  │       └ base  aten.mul.Tensor(float32[2], 3) -> float32[2]
  ├ base  aten.ones.default([], dtype=torch.float32, device=device(type='cpu'), pin_memory=False) -> float32[]
  └ walk back along the tape of grad(scaled), level 2
    ├ pull 3 <- 2  aten.mul.Tensor of the cotangent float32[] -> [float32[]]
    │ · program, functrans/derivatives/binary.py:N, made at tests/test_explain.py:N
    │ └ base  aten.mul.Tensor(float32[], 3) -> float32[]
    └ pull 2 <- 1  aten.logsumexp.default of the cotangent float32[] -> [float32[3]]
      · derivative entry, functrans/derivatives/reductions.py:N, made at tests/test_explain.py:N
      ├ level 1 vmap  aten.eq.Scalar(float32[], -inf) -> bool[]
      │ · rule, functrans/interpreters/vmap/rules/pointwise.py:N
      │ · self: bdim=0
      │ └ base  aten.eq.Scalar(float32[2], -inf) -> bool[2]
      ├ level 1 vmap  aten.masked_fill.Scalar(float32[], bool[], 0) -> float32[]
      │ · rule, functrans/interpreters/vmap/rules/pointwise.py:N
      │ · self: bdim=0; mask: bdim=0
      │ └ base  aten.masked_fill.Scalar(float32[2], bool[2], 0) -> float32[2]
      ├ level 1 vmap  aten.sub.Tensor(float32[3], float32[]) -> float32[3]
      │ · program, functrans/interpreters/vmap/rules/pointwise.py:N
      │ · a: bdim=0; b: bdim=0
      │ ├ base  aten.view.default(float32[2], [2, 1]) -> float32[2, 1]
      │ └ base  aten.sub.Tensor(float32[2, 3], float32[2, 1]) -> float32[2, 3]
      ├ level 1 vmap  aten.exp.default(float32[3]) -> float32[3]
      │ · program, functrans/interpreters/vmap/rules/pointwise.py:N
      │ · a: bdim=0
      │ └ base  aten.exp.default(float32[2, 3]) -> float32[2, 3]
      └ level 1 vmap  aten.mul.Tensor(float32[3], float32[]) -> float32[3]
        · program, functrans/interpreters/vmap/rules/pointwise.py:N
        · a: bdim=0
        └ base  aten.mul.Tensor(float32[2, 3], float32[]) -> float32[2, 3]""")


def test_numbers_of_one_example_and_costs() -> None:
    found = explain(lambda x: jvp(vmap(torch.sin), (x,), (x,))[1], ROWS, example=1)
    assert_expected_inline(shown(found, numbers=True), """\
explain(<lambda>)
└ jvp(sin) is level 1
  └ vmap(sin) is level 2, batch_size=2, randomness='error'
    └ level 2 vmap  aten.sin.default(float32[3]) -> float32[3]
      · program, functrans/interpreters/vmap/rules/pointwise.py:N
      · a: bdim=0
      = value [0.1411, -0.9589, -0.7568]
      = tangent at level 1 [-2.97, 1.418, -2.615]
      └ level 1 jvp  aten.sin.default(float32[2, 3]) -> float32[2, 3]
        · program, functrans/derivatives/pointwise.py:N
        · a: tangent float32[2, 3]
        = value [[0, 0.8415, 0.9093], [0.1411, -0.9589, -0.7568]]
        = tangent at level 1 [[0, 0.5403, -0.8323], [-2.97, 1.418, -2.615]]
        ├ base  aten.sin.default(float32[2, 3]) -> float32[2, 3]
        │ = value [[0, 0.8415, 0.9093], [0.1411, -0.9589, -0.7568]]
        ├ base  aten.cos.default(float32[2, 3]) -> float32[2, 3]
        │ = value [[1, 0.5403, -0.4161], [-0.99, 0.2837, -0.6536]]
        └ base  aten.mul.Tensor(float32[2, 3], float32[2, 3]) -> float32[2, 3]
          = value [[0, 0.5403, -0.8323], [-2.97, 1.418, -2.615]]""")
    costs = [line for line in found.text(costs=True).splitlines() if "base" in line]
    assert costs and all(re.search(r"\[\d+ µs, 24 B\]$", line) for line in costs)
    assert all(event.nanoseconds > 0 for event in found)


def test_ways_of_taking_an_operator() -> None:
    with overriding(DERIVATIVES, aten.tanh.default):
        borrowed = explain(grad(lambda x: torch.tanh(x).sum()), X)
    assert (1, "aten.tanh.default", "borrowed") in ways(borrowed)
    assert (1, "aten.tanh.default", "passed on") in ways(borrowed)  # the shadow
    (pull,) = borrowed.find("tanh", kind="pull")
    assert pull.way == "borrowed" and pull.made_by is not None and pull.made_by.name == "aten.tanh.default"
    assert "! borrowed" in borrowed.text()

    linear = explain(vmap(grad(lambda x: torch.nn.functional.linear(x, ROWS).sum())), ROWS)
    assert ways(linear)[:2] == [(2, "aten.linear.default", "derivative entry"), (1, "aten.linear.default", "rule")]
    assert ways(explain(vmap(torch.cov), ROWS))[0] == (1, "aten.cov.default", "decomposed")

    constant = explain(grad(lambda x: (x * torch.ones(3).cos()).sum()), X)
    assert (1, "aten.cos.default", "constant") in ways(constant)


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
def test_what_is_looped_is_marked() -> None:
    op = aten.nonzero_static.default
    with overriding(BATCHING_RULES, op):
        found = explain(vmap(lambda x: torch.nonzero_static(x, size=2)), ROWS)
    assert found.result.tolist() == [[[1], [2]], [[0], [1]]]
    assert ways(found) == [(1, str(op), "looped")]
    assert "! looped" in found.text()
    assert [e.name for e in found.find("nonzero_static", level=0)] == [str(op)] * 2


class Taylor(TableInterpreter):
    kind = "taylor"
    payload = ("slope",)
    rules: RuleTable[Callable[..., Any]] = RuleTable("taylor of test_explain")


@Taylor.rules.register(aten.mul.Tensor)
def multiply(level: Taylor, a: Any, b: Any) -> Any:
    return level.carry(a.value * b.value, slope=a.slope * b.value + a.value * b.slope)


def test_a_transform_of_ones_own() -> None:
    found = explain(lambda x: transform(Taylor, lambda y: y * y)(Carried(x, slope=torch.ones(3))), X)
    (event,) = [e for e in found if e.kind == "operator"]
    assert event.way == "rule" and event.place is not None and event.place.startswith(__file__)
    assert event.takes[0].layers == ("level 1 taylor, slope float32[3]", "float32[3]")
    assert torch.equal(event.gives[0].numbers["slope at level 1"], 2 * X)
    assert [e.name for e in event.children] == ["aten.mul.Tensor"] * 3 + ["aten.add.Tensor"]


class Twice(identity_functions.Twice):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Twice.apply(x), in_dims[0]


def test_functions_and_primitives() -> None:
    found = explain(vmap(grad(lambda x: Twice.apply(x).sum())), ROWS)
    asked = [(e.level.level, e.way) for e in found if e.kind == "operator" and e.name == "Twice.apply" and e.level]
    assert asked == [(2, "rule"), (1, "rule")]
    (pull,) = found.find("Twice", kind="pull")
    assert pull.made_by is not None and (pull.made_by.name, pull.made_by.level.level) == ("Twice.apply", 2)

    sizes = Primitive("sizes", lambda: ())

    @sizes.rule(VmapInterpreter)
    def of_vmap(level: Any) -> Any:
        return (*sizes.below(level), level.batch_size)

    found = explain(vmap(lambda x: x * sizes()[0]), ROWS)
    assert torch.equal(found.result, 2 * ROWS)
    assert (1, "sizes", "rule") in ways(found)


def test_writes_and_views() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        y[0].mul_(2)
        return y.sum()

    found = explain(grad(f), X)
    names = [e.name for e in found if e.is_written and e.site and "mul_" in e.site.text]
    assert "aten.mul.Tensor" in names and "aten.select_scatter.default" in names
    assert torch.equal(found.result, torch.tensor([2.0, 1.0, 1.0]))


def test_every_pull_leads_to_the_operator_that_recorded_it() -> None:
    found = explain(hessian(lambda x: (x.sin() * x.cumsum(0)).prod()), X)
    pulls = [e for e in found if e.kind == "pull"]
    assert len(pulls) >= 4
    for pull in pulls:
        made = pull.made_by
        assert made is not None and made.number < pull.number and made.name == pull.name
        assert made.record == pull.record and made.level is pull.level


def test_the_parts_of_a_line() -> None:
    found = explain(vmap(scaled), ROWS)
    (event,) = found.find("logsumexp", level=1)
    assert event.site is not None and event.site.function == "scaled"
    assert event.site.text == "y = torch.logsumexp(x, 0)"
    if event.site.columns is not None:  # Python 3.11 says
        assert event.site.text[slice(*event.site.columns)] == "torch.logsumexp(x, 0)"
    assert [e.name for e in event.path()] == ["vmap(scaled)", "aten.logsumexp.default"]


def test_events_are_found() -> None:
    found = explain(vmap(grad(scaled)), ROWS)
    assert {e.level.level for e in found.find("mul", kind="operator") if e.level} == {1, 2}
    assert found.find("aten.*exp*", level=0) and found.find("nothing") == []
    line = found.find("logsumexp", level=2)[0].site.line  # type: ignore[union-attr]
    assert {e.name for e in found.find(line=line, level=2)} == {"aten.logsumexp.default"}
    assert found.find(kind="walk")[0].level is found.levels[1]
    assert len(found) == len(list(found)) == found.events[-1].number
    with pytest.raises(TypeError, match="got the int 3 as operator"):
        found.find(3)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- that it is the plain run


class Wrappers(TorchDispatchMode):
    """Writes down the operators that it is asked about with wrappers among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += [str(op) for x in tree_leaves(args) if isinstance(x, WrapperTensor)]
        return op(*args, **(kwargs or {}))


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def same_bits(a: Any, b: Any) -> bool:
    xs, ys = tensors(a), tensors(b)
    return len(xs) == len(ys) and all(
        x.dtype is y.dtype and x.shape == y.shape and torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(xs, ys, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("name", injection.PROGRAMS)
def test_the_run_is_the_plain_one_and_all_of_it_is_seen(name: str) -> None:
    """A mode around the explanation sees what it says that ran at the base; the results are those without both."""
    program = injection.PROGRAMS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):  # what is found once is found
            torch.manual_seed(0)
            expected = program()
        torch.manual_seed(0)
        plain = explain(program)
        unobserved = Listing()
        torch.manual_seed(0)
        with unobserved:
            program()
        before = injection.thread()
        listing = Listing()
        torch.manual_seed(0)
        with listing:
            found = explain(program)
    assert injection.thread() == before
    assert same_bits(plain.result, expected)
    assert [e.replace("higher_order::", "") for e in found.base_operators()] == listing.names != []
    assert listing.names == unobserved.names, "nothing runs for the sake of the explanation"
    assert {e.way for e in found} <= {"", *WAYS}
    json.loads(found.to_json())
    assert len(found.text(costs=True, numbers=True, checks=True).splitlines()) > len(found.find(kind="base"))


@pytest.mark.skipif(debug_mode() is None, reason="this PyTorch has no DebugMode")
@pytest.mark.parametrize(
    ("transformed", "x"),
    [
        (vmap(grad(scaled)), ROWS), (jacrev(scaled), X), (jacfwd(scaled), X), (hessian(scaled), X),
        (vmap(hessian(scaled)), ROWS),
    ],
)  # fmt: skip
def test_debug_mode_sees_the_same_operators(transformed: Callable[..., Any], x: Tensor) -> None:
    transformed(x)  # which makes the checks of a first call
    with debug_mode()() as mode:
        transformed(x)
    theirs = [line.split("(")[0].strip() for line in mode.debug_string().splitlines() if "(" in line]
    ours = explain(transformed, x).base_operators()
    assert [name.removesuffix(".default").replace("aten.", "aten::", 1) for name in ours] == theirs


def watched_left() -> list[Any]:
    kinds = [(x, type(x)) for x in gc.get_objects()]  # isinstance would ask what weak proxies stand for
    return [x for x, kind in kinds if issubclass(kind, GradInterpreter) and issubclass(kind, Watched)]


def test_an_exception_leaves_nothing_behind() -> None:
    kept: list[Any] = []

    def f(x: Tensor) -> Tensor:
        kept.extend(interpreter_stack())
        y = x.sin()
        raise ValueError(f"after {tuple(y.shape)}")

    before = injection.thread()
    with pytest.raises(ValueError, match="after") as raised:
        explain(vmap(grad(f)), ROWS)
    assert injection.thread() == before
    assert [type(i) for i in kept] == [GradInterpreter, VmapInterpreter] and watched_left() == []
    assert str(raised.value) == "after (3,)"

    found = explain(vmap(grad(f)), ROWS, catch=True)
    assert injection.thread() == before
    assert isinstance(found.error, ValueError) and found.result is None
    assert [e.name for e in found if e.error is not None] == ["vmap(f)", "grad(f)"]
    assert found.find("sin", level=0) and "ended by ValueError: after (3,)" in found.text()


def test_an_operator_that_fails_is_marked() -> None:
    found = explain(vmap(lambda x: torch.mm(x, x)), ROWS, catch=True)
    assert isinstance(found.error, RuntimeError)
    assert found.find("mm", level=1)[0].error is not None
    plain: Any = None
    try:
        vmap(lambda x: torch.mm(x, x))(ROWS)
    except RuntimeError as error:
        plain = error
    assert type(plain) is type(found.error) and str(plain) == str(found.error)


def test_interpreters_are_what_they_were() -> None:
    pullback: Any = None

    def f(x: Tensor) -> Tensor:
        nonlocal pullback
        _, pullback = vjp(torch.sin, x)
        kept.extend([*interpreter_stack(), copy.copy(interpreter_stack()[0])])
        assert all(isinstance(i, Watched) and type(i).__name__ == "VmapInterpreter" for i in kept)
        return vmap(lambda p, c: p(c)[0], in_dims=(None, 0))(pullback, torch.ones(4, 3))

    kept: list[Any] = []
    found = explain(vmap(f), ROWS)
    assert torch.equal(found.result, ROWS.cos()[:, None].expand(2, 4, 3))
    assert type(pullback.interpreter) is GradInterpreter
    assert [type(i) for i in kept] == [VmapInterpreter] * 2
    assert [e.made_by.name for e in found.find("sin", kind="pull") if e.made_by] == ["aten.sin.default"]


def test_a_pullback_by_itself() -> None:
    _, pullback = vjp(lambda x: x.sin().cumsum(0), X)
    found = explain(pullback, torch.ones(3))
    assert [e.name for e in found if e.kind == "pull"] == ["aten.cumsum.default", "aten.sin.default"]
    assert type(pullback.interpreter) is GradInterpreter
    assert torch.equal(found.result[0], pullback(torch.ones(3))[0])


def test_a_batch_of_pullbacks() -> None:
    def f(rows: Tensor) -> Any:
        pullbacks = vmap(lambda x: vjp(torch.sin, x)[1])(rows)
        return vmap(lambda p, c: p(c)[0])(pullbacks, torch.ones(2, 3))

    found = explain(f, ROWS)
    assert torch.equal(found.result, ROWS.cos())
    assert [e.made_by is not None for e in found.find("sin", kind="pull")] == [True]


def test_inside_of_a_transform_and_of_another_explanation() -> None:
    inner: list[Explanation] = []

    def f(x: Tensor) -> Tensor:
        inner.append(explain(grad(lambda y: (y.sin() * x).sum()), x))
        return inner[-1].result

    before = injection.thread()
    assert torch.equal(vmap(f)(ROWS), ROWS.cos() * ROWS)
    assert [(e.level.level, e.name) for e in inner[0].find("sin", kind="operator") if e.level] == [
        (2, "aten.sin.default"), (1, "aten.sin.default"),
    ]  # fmt: skip
    assert inner[0].find("sin", level=0)[0].given == "float32[2, 3]"
    outer = explain(vmap(f), ROWS)
    assert torch.equal(outer.result, ROWS.cos() * ROWS) and len(inner) == 2
    assert outer.find("sin", level=0) and inner[1].find("sin", level=0)
    assert ways(inner[1]) == ways(inner[0])
    assert injection.thread() == before and watched_left() == []


def test_nothing_is_kept_of_the_interpreters() -> None:
    seen: list[Any] = []

    def f(x: Tensor) -> Tensor:
        seen.extend(map(weakref.ref, interpreter_stack()))
        return x.sin().sum()

    found = explain(vmap(grad(f)), ROWS)
    assert len(seen) == 2 and len(found) > 0
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_it_costs_nothing_when_it_is_off() -> None:
    """No method of an interpreter is another than before, and no mode is on."""
    explain(vmap(grad(scaled)), ROWS)
    assert "process" not in vars(Watched) and GradInterpreter.process.__name__ == "process"
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda: torch.nested.nested_tensor([ROWS[0], ROWS[1, :2]]) * 2, "aten.mul.Tensor"),
        (lambda: torch.nested.nested_tensor([ROWS[0], ROWS[1, :2]], layout=torch.jagged) * 2, "aten.mul.Tensor"),
        (lambda: ROWS.to_sparse_csr().to_dense() + ROWS.to_sparse(), "aten.add.Tensor"),
        (lambda: torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8).dequantize(), "aten.dequantize.self"),
        (lambda: vmap(grad(lambda x: x.sin().sum()))(ROWS.to("meta")), "aten.cos.default"),
        (lambda: FakeTensorMode().from_tensor(ROWS).sin(), "aten.sin.default"),
        (lambda: torch.compile(lambda x: vmap(torch.sin)(x) + 1, backend="eager")(ROWS), "aten.add.Tensor"),
    ],
)
def test_what_has_no_numbers_to_show(function: Callable[[], Any], operator: str) -> None:
    found = explain(function)
    assert found.find(operator, level=0)
    assert found.text(numbers=True) and json.loads(found.to_json())["events"]


def test_other_threads_are_not_seen() -> None:
    results: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: results.append(vmap(torch.cos)(ROWS)))
        thread.start()
        thread.join()
        return x.sin()

    found = explain(vmap(f), ROWS)
    assert torch.equal(results[0], ROWS.cos()) and found.base_operators() == ["aten.sin.default"]


def test_modes_of_the_users_inside_see_what_the_code_there_calls() -> None:
    listing = Listing()

    def f(x: Tensor) -> Tensor:
        with listing:
            return x.sin().sum()

    found = explain(vmap(grad(f)), ROWS)
    assert torch.equal(found.result, ROWS.cos())
    assert listing.names == ["aten.sin.default", "aten.sum.default"]
    assert ways(found)[:2] == [(2, "aten.sin.default", "derivative entry"), (1, "aten.sin.default", "rule")]


BETWEEN_PROGRAMS = {
    "a sum of cotangents": lambda x: (torch.sin(x) * 2 + x.sum()).sin().sum(),
    "a sum to a shape": lambda x: ((x.exp() + 1).log() * x.mean() + x[0]).sum(),
    "a product": lambda x: torch.tanh(ROWS[:, :3] @ x * x.sum()).sum(),
    "a choice": lambda x: torch.where(x > 0, x * x.sum(), x.exp() * 2).sum(),
}
COMPOSED: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "hessian": hessian,
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "of examples": lambda f: lambda x: vmap(grad(f))(torch.stack([x, x + 1])),
    "hessians of examples": lambda f: lambda x: vmap(hessian(f))(torch.stack([x, x + 1])),
    "a product with the hessian": lambda f: lambda x: jvp(grad(f), (x,), (x,)),
}


@pytest.mark.parametrize("composition", COMPOSED)
@pytest.mark.parametrize("function", BETWEEN_PROGRAMS)
def test_what_comes_between_programs_is_no_operator_of_the_base(function: str, composition: str) -> None:
    """The walk back takes the door off for programs. What it does between them has wrappers among its arguments, which
    a mode around it must not be asked about."""
    composed = COMPOSED[composition](BETWEEN_PROGRAMS[function])
    plain = composed(X)
    with Wrappers() as mode:
        composed(X)
    assert mode.found == []
    found = explain(composed, X)
    assert all(map(torch.equal, tree_leaves(found.result), tree_leaves(plain)))
    assert not [e for e in found.find(level=0, kind="base") if any(len(look.layers) > 1 for look in e.takes)]


def test_random_numbers_are_those_of_the_plain_run() -> None:
    f = vmap(lambda x: x + torch.rand(3), randomness="different")
    torch.manual_seed(3)
    expected = f(ROWS)
    torch.manual_seed(3)
    assert torch.equal(explain(f, ROWS).result, expected)


# --------------------------------------------------------------------------------------------- what is seen, and when


def test_numbers_are_those_of_the_moment() -> None:
    def f(x: Tensor) -> Tensor:
        y = x + 1
        y.numpy()[0] = 7.0  # which nothing sees
        z = y * 2
        z.add_(1)
        z[1:].mul_(10)
        return z

    x = X.clone()
    found = explain(f, x)
    x.fill_(-1.0)
    found.result.fill_(-1.0)
    seen = {e.name: [looks[0].numbers["value"].tolist() for looks in (e.takes, e.gives)] for e in found}
    assert seen["aten.add.Tensor"] == [[0, 1, 2], [1, 2, 3]]
    assert seen["aten.mul.Tensor"] == [[7, 2, 3], [14, 4, 6]]
    assert seen["aten.add_.Tensor"] == [[14, 4, 6], [15, 5, 7]]
    assert seen["aten.slice.Tensor"] == [[15, 5, 7], [5, 7]]
    assert seen["aten.mul_.Tensor"] == [[5, 7], [50, 70]]


def test_a_wrapper_that_is_written_is_looked_at_again() -> None:
    """PyTorch's own derivative of linalg.eig fills the diagonal of what it has just made."""
    matrix = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    with overriding(DERIVATIVES, aten.linalg_eig.default):
        found = explain(grad(lambda a: torch.linalg.eig(a)[1].abs().sum()), matrix)
    for event in found:
        shadows = [look for look in event.takes if look.layers[0].startswith("level 1 native derivative")]
        below = [child for child in event.children if child.name == event.name and child.kind == "base"]
        for look, same in zip(shadows, below[0].takes if below else (), strict=False):
            assert torch.equal(look.numbers["value"], same.numbers["value"])


def test_of_a_large_tensor_a_selection_is_kept() -> None:
    rows = torch.arange(3 * 70_000.0).reshape(3, 70_000)
    found = explain(lambda x: jvp(vmap(lambda x: x.sin()), (x,), (x,)), rows, example=1)
    (event,) = found.find("sin", level=2)
    look = event.gives[0]
    assert torch.equal(look.numbers["value"], rows[1].sin()[::2])
    assert torch.equal(look.numbers["tangent at level 1"], (rows[1].cos() * rows[1])[::2])
    assert torch.equal(found.find("sin", level=0)[0].takes[0].numbers["value"], rows.reshape(-1)[::4])
    inner = explain(vmap(vmap(torch.sin)), rows[None].expand(2, 3, 70_000) + 1, example=1).find("sin", level=2)[0]
    assert torch.equal(inner.takes[0].numbers["value"], rows[1][::2] + 1)


def test_an_explanation_inside_of_what_is_compiled() -> None:
    seen: list[Explanation] = []

    def f(x: Tensor) -> Tensor:
        seen.append(explain(vmap(grad(scaled)), x * 2, example=1))
        return seen[-1].result + 1

    assert torch.equal(torch.compile(f, backend="eager")(ROWS), f(ROWS))
    assert ways(seen[0]) == ways(seen[1]) != []


# ------------------------------------------------------------------------------------------------------- what is saved


def test_json() -> None:
    found = explain(vmap(grad(scaled)), ROWS)
    records = json.loads(found.to_json())
    assert records["name"] == "scaled" and [level["kind"] for level in records["levels"]] == ["vmap", "grad"]
    assert [e["number"] for e in records["events"]] == [e.number for e in found]
    for record, event in zip(records["events"], found, strict=True):
        assert record["parent"] < record["number"] and record["name"] == event.name
        if record["line"] is not None:
            file = records["files"][record["file"]]
            assert file["lines"][record["line"] - file["first"]].strip() == record["text"]
    pulls = [e for e in records["events"] if e["kind"] == "pull"]
    assert [records["events"][e["made_by"] - 1]["name"] for e in pulls] == [e["name"] for e in pulls]


def test_a_page_needs_nothing_else_and_what_a_user_wrote_is_text(tmp_path: Path) -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin()  # </script><script>alert("&'")</script><!-- <b>bold</b>

    f.__name__ = "</title><img src=x onerror=alert(1)>"
    found = explain(vmap(f), ROWS)
    page = found.to_html()
    markup = re.sub(r'(?s)<script type="application/json".*?</script>', "", page.replace(html.escape(f.__name__), ""))
    assert not re.search(r"(src|href)=|url\(|@import|https?://", markup)
    assert "<img" not in page and "alert(1)>" not in page and "<b>bold" not in page
    assert page.count("</script>") == 2 and page.count("<script") == 2
    assert "default-src 'none'" in page
    notebook = found._repr_html_()
    assert notebook.startswith("<iframe srcdoc=") and "<script" not in notebook and "<img" not in notebook
    for name in ("a.html", "b.json", "c.txt"):
        found.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    with pytest.raises(functrans.FunctransError, match=r"expected a name that ends in \.html, \.json or \.txt"):
        found.save(tmp_path / "page.pdf")


def test_pictures_of_the_stack() -> None:
    """They are those of functrans.pictures, whatever the event is."""
    found = explain(vmap(grad(scaled)), ROWS)
    drawings = Drawings(found)
    svg = ["\n".join(drawings.lines[line] for line in lines) + "\n" for lines in drawings.pictures]
    (event,) = found.find("logsumexp", level=2, kind="operator")
    name = "aten.logsumexp.default"
    steps = {2: "▸ derivative entry, recorded as 2 <- 1", 1: "rule", 0: name}
    levels = ["vmap(scaled)", "grad(scaled)"]
    assert svg[drawings.stacks[event.number - 1]] == stack_picture(levels, operator=name, steps=steps)
    (place,) = drawings.values[event.number - 1][0]
    assert svg[place] == value_picture([
        (2, "grad: float32[3]\ntracked, tape_index=1"), (1, "vmap: float32[3]\nbdim=0"), (0, "float32[2, 3]"),
    ])  # fmt: skip
    (pull,) = found.find("logsumexp", kind="pull")
    assert "grad(scaled), ended" in svg[drawings.stacks[pull.number - 1]]
    assert f"pull of {name}" in svg[drawings.stacks[pull.number - 1]]
    assert svg[drawings.stacks[0]] == stack_picture(levels[:1])


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
def test_every_event_has_a_picture() -> None:
    for name in ("borrowed", "functions", "own_transforms", "looped", "pullbacks", "explained", "depth"):
        found = explain(injection.PROGRAMS[name])
        drawings = Drawings(found)
        assert len(drawings.stacks) == len(found)
        for lines in drawings.pictures:
            ElementTree.fromstring("\n".join(drawings.lines[line] for line in lines))


def test_wrong_calls() -> None:
    with pytest.raises(functrans.FunctransError, match=r"explain\(3, \.\.\.\): got the int 3"):
        explain(3, X)  # type: ignore[arg-type]
    with pytest.raises(functrans.FunctransError, match="expected an int from 0 on"):
        explain(scaled, X, example=-1)
    with pytest.raises(functrans.FunctransError, match="True or False"):
        explain(scaled, X, catch="yes")  # type: ignore[arg-type]


def test_events_have_reprs() -> None:
    found = explain(vmap(scaled), ROWS)
    assert repr(found.events[0]) == "<Event 1: transform vmap(scaled) at level 1, vmap>"
    assert isinstance(found.events[0], Event) and repr(found) == found.text()
