"""torch.compile of what asks the levels around it: shipped transforms, named axes, functions with rules, primitives.

The oracle is the same program uncompiled, which other files test.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch.distributions import Normal as CheckedNormal

import functrans
from functrans import (
    all_gather,
    axis_index,
    bilaplacian,
    bounds,
    clipped_grad,
    condition,
    count,
    custom_jvp,
    custom_vjp,
    custom_vmap,
    grad,
    hessian,
    jet,
    jvp,
    laplacian,
    linearize,
    log_density,
    lowp,
    observe,
    per_example_norms,
    plant,
    pmax,
    pmean,
    pmin,
    psum,
    reap,
    sample,
    sanitize,
    seed,
    sow,
    sparse_hessian,
    sparse_jacobian,
    sparsity,
    vjp,
    vmap,
)
from functrans.errors import CallValueError, MissingRuleError
from functrans.extend import Carried, Handler, Primitive, RuleTable, TableInterpreter, VmapInterpreter, transform

#: the numbers of one are checked by PyTorch, which Dynamo does not trace
Normal = functools.partial(CheckedNormal, validate_args=False)
BACKENDS = [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"]
Program = Callable[[Tensor], Any]
rows = torch.tensor([[0.5, 2.0, 3.0], [0.25, -1.0, 2.0], [1.0, 1.5, 0.0], [2.0, 0.5, -1.0]])


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def named(x: Tensor) -> Tensor:
    return sow(x * x, "square").sin().sum()


def model(data: Tensor) -> Tensor:
    """A value for all, and one for each row."""
    center = sample(Normal(0.0, 1.0), "center")

    def one(row: Tensor) -> Tensor:
        own = sample(Normal(center, 1.0), "own")
        observe(Normal(own, 0.5), row)
        return own

    return vmap(one)(data)


@custom_vjp
def septuple(x: Tensor) -> Tensor:
    """Its derivative is 7 x², and not that of its forward."""
    return x.sin()


septuple.defvjp(lambda x: (x.sin(), x), lambda x, g: (g * 7 * x * x,))


@custom_jvp
def nonuple(x: Tensor) -> Tensor:
    """Its derivative is 9 x²."""
    return x.sin()


@nonuple.defjvp
def nonuple_rule(primals: Any, tangents: Any) -> Any:
    return nonuple(*primals), tangents[0] * 9 * primals[0] ** 2


@custom_vmap
def tripled(x: Tensor) -> Tensor:
    """Of a batch it is three times as much."""
    return x.sin()


@tripled.def_vmap
def tripled_rule(size: int, batched: Any, x: Tensor) -> Any:
    return 3 * x.sin(), True


cubed = Primitive("cubed", lambda x: x**3)
cubed.derivative(pullback=lambda g, out, x: 5 * x * x * g, tangent=lambda t, out, x: 5 * x * x * t[0])
cubed.rule(VmapInterpreter)(cubed.by_base)


def sizes(level: VmapInterpreter) -> Any:
    return (*batch_sizes.below(level), level.batch_size)


batch_sizes = Primitive("batch_sizes", lambda: ())
batch_sizes.rule(VmapInterpreter)(sizes)


def over_rows(f: Program) -> Program:
    """``f`` with the rows by name, its gradient, and the gradient around."""
    by_row = vmap(f, axis_name="rows")
    slopes = vmap(grad(lambda x: f(x).sum()), axis_name="rows")
    return lambda x: (by_row(x), slopes(x), grad(lambda x: by_row(x).square().sum())(x))


class Pair(NamedTuple):
    first: Any
    second: Any


#: For every public function of the table in docs/compile.md that goes into a graph, programs of ``rows``.
INSIDE: dict[str, list[Program]] = {
    "jet": [lambda x: jet(torch.sin, (x,), ([torch.ones_like(x), None],))],
    "laplacian": [vmap(laplacian(lambda x: (x**3).sum(), with_value=True))],
    "bilaplacian": [
        vmap(bilaplacian(lambda x: (x**5).sum())),
        lambda x: bilaplacian(lambda x: (x**5).sum(), directions=x)(x[0]),
    ],
    "clipped_grad": [
        lambda x: clipped_grad(lambda w, x: (w * x).sin().sum(), 1.0)(x[0], x),
        lambda x: clipped_grad(lambda w, x: (w * x).sin().sum(), x.std())(x[0], x),
    ],
    "per_example_norms": [lambda x: per_example_norms(lambda w, x: (w * x).sin().sum())(x[0], x)],
    "lowp": [lambda x: lowp(lambda x: x.sin().sum(), torch.bfloat16)(x)],
    "bounds": [
        lambda x: bounds(lambda x: (x * x).sin())(x, x + 1),
        lambda x: bounds(lambda d: d["a"] @ d["b"], method="linear")({"a": x, "b": x.T}, {"a": x + 1, "b": x.T}),
        vmap(lambda x: bounds(grad(lambda x: (x**3).sum()))(x, x + 1)),
    ],
    "count": [lambda x: count(lambda x: x @ x.T)(x), lambda x: count(vmap(grad(lambda x: x @ x)))(x)],
    "reap": [
        reap(named),
        reap(vmap(grad(named))),
        lambda x: grad(lambda x: reap(named)(x)[1]["square"].sum())(x),
        lambda x: reap(lambda x: jet(lambda x: sow(x.sin(), "s"), (x,), ([torch.ones_like(x), None],)))(x),
        lambda x: reap(hessian(named))(x[0]),
    ],
    "sow": [vmap(named)],
    "plant": [
        lambda x: plant(named, {"square": x + 1})(x),
        lambda x: grad(lambda new: plant(vmap(named), {"square": new})(x).sum())(x),
    ],
    "sample": [lambda x: condition(model, {"center": x[0, 0], "own": x[:, 0]})(x)],
    "observe": [lambda x: log_density(lambda x: observe(Normal(0.0, 1.0), x))({}, x)],
    "condition": [lambda x: log_density(condition(model, {"center": x[0, 0]}))({"own": x[:, 0]}, x)],
    "log_density": [
        lambda x: log_density(model)({"center": x[0, 0], "own": x[:, 0]}, x),
        lambda x: grad(log_density(model))({"center": x[0, 0], "own": x[:, 0]}, x),
        lambda x: hessian(log_density(model))({"center": x[0, 0], "own": x[:, 0]}, x),
    ],
    "custom_vjp": [septuple, grad(lambda x: septuple(x).sum()), vmap(grad(lambda x: septuple(x).sum()))],
    "custom_jvp": [nonuple, vmap(grad(lambda x: nonuple(x).sum())), lambda x: jvp(nonuple, (x,), (x,))],
    "custom_vmap": [tripled, vmap(tripled), grad(lambda x: vmap(tripled)(x).sum())],
    "psum": [
        over_rows(lambda x: x * psum({"a": x * x, "n": 1.0}, "rows")["a"]),
        vmap(vmap(lambda x: x / psum(x * x, ("i", "j")), axis_name="i"), axis_name="j"),
        lambda x: vjp(vmap(lambda x: x * psum(x, "i"), axis_name="i"), x)[1](x),
        lambda x: linearize(vmap(lambda x: x * psum(x, "i"), axis_name="i"), x)[1](x),
    ],
    "pmean": [over_rows(lambda x: x.sin() * pmean(x, "rows"))],
    "pmax": [over_rows(lambda x: x.sin() * pmax(x, "rows"))],
    "pmin": [over_rows(lambda x: x.sin() * pmin(x, "rows"))],
    "all_gather": [over_rows(lambda x: all_gather(x, "rows", axis=1) @ torch.arange(4.0))],
    "axis_index": [over_rows(lambda x: x * axis_index("rows"))],
    "Primitive": [
        cubed,
        over_rows(cubed),
        lambda x: jet(cubed, (x,), ([torch.ones_like(x), None],)),
        vmap(vmap(lambda x: x * batch_sizes()[1] - batch_sizes()[0])),
    ],
}


class Dual(TableInterpreter):
    kind, payload, rules = "dual", ("slope",), RuleTable("dual numbers", default="jvp")


#: Those that do not, and what is said of each.
OUTSIDE: dict[str, tuple[Program, str]] = {
    "sanitize": (lambda x: sanitize(torch.sin)(x) + 1, "looks at the numbers"),
    "sparsity": (lambda x: sparsity(torch.diff)(x).to_dense().sum(), "found by numbers"),
    "sparse_jacobian": (lambda x: sparse_jacobian(lambda x: x**2)(x[0]).to_dense(), "found by numbers"),
    "sparse_hessian": (lambda x: sparse_hessian(lambda x: (x**3).sum())(x[0]).to_dense(), "found by numbers"),
    "seed": (lambda x: seed(lambda: sample(Normal(0.0, 1.0), "a"), 0)() + x, "starts anew"),
    "transform": (lambda x: transform(Dual, torch.sin)(Carried(x, slope=x)).slope + 1, "note, count or print"),
}


def table() -> dict[str, bool]:
    """Of the table in docs/compile.md: the functions, and whether they go into a graph."""
    text = Path(__file__).parent.parent.joinpath("docs", "compile.md").read_text()
    lines = re.findall(r"^\| (`.*`) \| (yes|no)\b.*\|$", text, flags=re.MULTILINE)
    return {name: said == "yes" for names, said in lines for name in re.findall(r"`(\w+)`", names)}


def test_the_table_in_the_docs() -> None:
    assert table() == {**dict.fromkeys(INSIDE, True), **dict.fromkeys(OUTSIDE, False)}
    of_shipped = {n for n, f in vars(functrans).items() if getattr(f, "__module__", "").startswith("functrans.shipped")}
    assert of_shipped - table().keys() == set(), "public, and not in the table"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", INSIDE)
def test_what_goes_into_a_graph(name: str, backend: str) -> None:
    for program in INSIDE[name]:
        compiled = torch.compile(program, backend=backend, fullgraph=True)
        for x in (rows, rows + 0.5):
            torch.testing.assert_close(compiled(x), program(x))


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_does_not_is_run_outside_of_it(name: str) -> None:
    program, said = OUTSIDE[name]
    torch.testing.assert_close(torch.compile(program, backend="eager")(rows), program(rows))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"This call of {name} cannot .*{said}"):
        torch.compile(program, backend="eager", fullgraph=True)(rows)


def test_the_function_that_is_planted_is_run_outside() -> None:
    def cotangent(x: Tensor) -> Tensor:
        return grad(lambda zero: plant(named, {"square": lambda square: square + zero})(x))(torch.zeros_like(x))

    torch.testing.assert_close(torch.compile(cotangent, backend="eager")(rows), (rows * rows).cos())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_outside(backend: str) -> None:
    programs: list[Program] = [
        septuple, vmap(nonuple), cubed, lambda x: reap(named)(x)[1]["square"],
        vmap(lambda x: x * psum(x * x, "i"), axis_name="i"), lambda x: bounds(torch.square)(x, x + 1)[1],
    ]  # fmt: skip
    for program in programs:
        compiled = torch.compile(program, backend=backend, fullgraph=True)
        found = [torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (compiled, program) for x in [rows.clone()]
                 if x.requires_grad_() is x]  # fmt: skip
        torch.testing.assert_close(*found)


def test_sizes_that_change() -> None:
    f = vmap(lambda x: x * psum(x, "i") + all_gather(x.sum(), "i").sum(), axis_name="i")
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (3, 4, 7):
        x = torch.randn(n, 3)
        torch.testing.assert_close(compiled(x), x * x.sum(0) + x.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_tuples_with_names(backend: str) -> None:
    def program(x: Tensor) -> Any:
        return vmap(lambda p: Pair(p.first.sin(), [{"a": Pair(p.second, 2 * p.first)}]))(Pair(x, x + 1))

    out = torch.compile(program, backend=backend, fullgraph=True)(rows)
    torch.testing.assert_close(out, Pair(rows.sin(), [{"a": Pair(rows + 1, 2 * rows)}]))
    assert type(out) is type(out.second[0]["a"]) is Pair


def test_errors_are_those_of_the_uncompiled_call() -> None:
    def twice(x: Tensor) -> Any:
        return reap(lambda x: sow(sow(x, "a"), "a"))(x)

    wrong: dict[str, Program] = {
        "a name that was sown before": twice,
        "none of a name is running": lambda x: psum(x, "i"),
        "low <= high": lambda x: bounds(torch.sin)(x + 1, x),
    }
    for said, program in wrong.items():
        with pytest.raises(CallValueError, match=said):
            torch.compile(program, backend="eager")(rows)


def test_the_wrong_way_round_is_nan_where_no_number_can_be_asked_for() -> None:
    compiled = torch.compile(lambda x: bounds(torch.exp)(x, x.flip(0)), backend="aot_eager", fullgraph=True)
    low, high = compiled(torch.tensor([0.0, 1.0]))
    assert low.isnan().tolist() == high.isnan().tolist() == [False, True]


def test_what_a_function_with_a_rule_captures() -> None:
    weight = torch.tensor(3.0)
    scaled = custom_jvp(lambda x: x * weight)
    scaled.defjvp(lambda primals, tangents: (scaled(*primals), tangents[0] * weight))
    program = vmap(grad(scaled))
    torch.testing.assert_close(torch.compile(program, backend="aot_eager")(rows[0]), torch.full((3,), 3.0))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="What it captures is no part of the graph"):
        torch.compile(program, backend="aot_eager", fullgraph=True)(rows[0])


class Scaling(Handler):
    kind = "scaling"


factor = Primitive("factor", lambda: 1.0)
factor.rule(Scaling)(lambda level: 3.0)

zero = torch.tensor(0)
CONTROL_FLOW: dict[str, Callable[[Program], Program]] = {
    "cond": lambda f: lambda x: torch.cond(x.sum() > 0, lambda x: f(x), lambda x: x + 0.0, (x,)),
    "while_loop": lambda f: lambda x: while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, f(x)), (zero, x))[1],
    "map": lambda f: lambda x: map_rows(lambda row: f(row), x),
    "scan": lambda f: lambda x: scan(lambda c, row: (c + f(row), f(row) * c), torch.zeros(()), x)[1],
}  # fmt: skip
UNROLLED: dict[str, Callable[[Program], Program]] = {
    "cond": lambda f: lambda x: torch.where(x.sum() > 0, f(x), x),
    "while_loop": lambda f: lambda x: f(f(x)),
    "map": lambda f: f,
    "scan": lambda f: lambda x: f(x) * (f(x).cumsum(0) - f(x)),
}
AROUND: dict[str, Callable[[Program], Program]] = {
    "nothing": lambda f: lambda x: f(x[0]),
    "vmap": vmap,
    "jvp": lambda f: lambda x: jvp(f, (x[0],), (x[1],)),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).sum())),
    "a handler": lambda f: lambda x: transform(Scaling, f)(x[0]),
}


@pytest.mark.parametrize("flow", CONTROL_FLOW)
def test_what_asks_the_levels_stands_in_control_flow(flow: str) -> None:
    bodies: list[Program] = [cubed, lambda x: x * factor(), lambda x: sow(x.sin(), "s"), nonuple]
    for name, around in AROUND.items():
        if (flow, name) == ("while_loop", "vmap of grad"):
            continue  # it has no derivative on the way back in PyTorch either
        for body in bodies:
            torch._dynamo.reset()
            program, by_hand = (around(form[flow](body)) for form in (CONTROL_FLOW, UNROLLED))
            torch.testing.assert_close(program(rows), by_hand(rows), msg=lambda m, name=name: f"{name}: {m}")


def test_in_a_branch_that_some_examples_take() -> None:
    def either(yes: Program, no: Program) -> Program:
        return lambda x: torch.cond(x.sum() > 2, lambda x: yes(x), lambda x: no(x), (x,))

    same: Program = lambda x: x + 0.0
    with pytest.raises(MissingRuleError, match="Only some of the examples of 'i' run it"):
        vmap(either(lambda x: psum(x, "i"), same), axis_name="i")(rows)
    with pytest.raises(MissingRuleError, match="Sow the value that is chosen"):
        reap(vmap(either(lambda x: sow(x * 2, "a"), same)))(rows)

    # all examples of the axis take the same branch
    def by_row(row: Tensor, chosen: Tensor) -> Tensor:
        one = lambda x: torch.cond(chosen > 0.5, lambda x: psum(x, "i"), same, (x,))
        return vmap(one, axis_name="i")(row)

    expected = torch.where(rows[:, :1] > 0.5, rows.sum(1, keepdim=True), rows)
    torch.testing.assert_close(vmap(by_row)(rows, rows[:, 0]), expected)

    # of a density only those have a part that come to it
    def scored(center: Tensor, x: Tensor) -> Tensor:
        branch = lambda scale: lambda x: observe(Normal(center, torch.tensor(scale)), x)
        return vmap(either(branch(1.0), branch(2.0)))(x)

    def by_hand(center: Tensor, x: Tensor) -> Tensor:
        scale = torch.where(x.sum(1, keepdim=True) > 2, 1.0, 2.0)
        return Normal(center, scale).log_prob(x).sum()

    center = torch.tensor(0.5)
    density = lambda center, x: log_density(scored)({}, center, x)
    torch.testing.assert_close(density(center, rows), by_hand(center, rows))
    torch.testing.assert_close(grad(density, (0, 1))(center, rows), grad(by_hand, (0, 1))(center, rows))


def test_numbers_made_in_a_branch_are_tensors_of_its_own() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 2, lambda x: x * torch.tensor([1.0, 2.0, 3.0]).mul_(2), lambda x: x + 0.0, (x,))

    expected = torch.where(rows.sum(1, keepdim=True) > 2, rows * torch.tensor([2.0, 4.0, 6.0]), rows)
    torch.testing.assert_close(vmap(f)(rows), expected)


class Noted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Any:
        shares = vmap(lambda x: self.weight * x * psum(x, "i"), axis_name="i")(x)
        slopes, named = reap(vmap(grad(lambda x: sow(x * self.weight, "h").sin().sum())))(x)
        return shares, slopes, named["h"], bounds(torch.sin)(x, x + 1)


@pytest.mark.slow
def test_export_and_inductor() -> None:
    module = Noted()
    for strict in (True, False):
        exported = torch.export.export(module, (rows,), strict=strict).module()
        torch.testing.assert_close(exported(rows + 1), module(rows + 1))
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(rows), module(rows))
