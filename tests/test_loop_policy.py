"""``RuleTable(default="loop")``: operators without a rule run once per case, against a loop over the whole function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_calls import thread_state

import functrans as ft
from functrans.errors import CallError, CarriedValueError, RegistrationError
from functrans.extend import Carried, RuleTable, TableInterpreter, overriding, transform

aten = torch.ops.aten


class Ensemble(TableInterpreter):
    """A value, and what it might be as well: [n, *shape]."""

    kind, payload = "ensemble", ("others",)
    rules = RuleTable("ensemble rules", default="loop")

    def cases(self, wrapper: Any) -> Sequence[Tensor]:
        return wrapper.value, *wrapper.others.unbind(0)

    def of_cases(self, values: Sequence[Tensor]) -> Any:
        return self.carry(values[0], others=torch.stack(list(values[1:])))


torch.manual_seed(0)
MEMBERS = torch.randn(4, 3, 3, dtype=torch.float64)
FACTOR = torch.randn(3, dtype=torch.float64)


def members(f: Callable[..., Any], xs: Tensor) -> Any:
    """``f`` of each member by the transform: a tree of tensors with the members in front."""

    class Leaving(Ensemble):
        def leave(self, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            x = self.own(leaf)
            return torch.stack(list(self.cases(x))) if not self.is_constant(x) else x.value.expand(len(xs), *x.shape)

    return transform(Leaving, f)(Carried(xs[0], others=xs[1:]))


def one_by_one(f: Callable[..., Any], xs: Tensor) -> Any:
    return stacked([f(x.clone()) for x in xs])


def stacked(outs: list[Any]) -> Any:
    if isinstance(outs[0], Tensor):
        return torch.stack(outs)
    return tuple(map(stacked, map(list, zip(*outs, strict=True))))


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = y[1] * FACTOR
    y.t()[2].mul_(2)
    return y


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: x.sin() * x + FACTOR,
    "two of them": lambda x: x @ x.t() - x.exp(),
    "sorted": lambda x: tuple(x.sort(1)),
    "whole numbers": lambda x: (x.argmax(1), (x > 0).sum(), x.long()),
    "a list": lambda x: tuple(x.split(2)),
    "several outputs": lambda x: tuple(torch.linalg.qr(x)),
    "a list as argument": lambda x: torch.cat([x, x.t(), torch.ones(1, 3, dtype=x.dtype)]),
    "an index that differs": lambda x: x.gather(1, x.argsort(1)),
    "composite": lambda x: torch.nn.functional.layer_norm(x, (3,)),
    "writes and views": written,
    "like": lambda x: (torch.ones_like(x), x.new_zeros(2)),
    "keywords": lambda x: torch.clamp(x, min=x.mean(), max=FACTOR),
    "grad": ft.grad(lambda x: (x.sin() @ x).sum()),
    "vmap": ft.vmap(lambda row: row.cumsum(0) * row.amax()),
    "vmap of grad": ft.vmap(ft.grad(lambda row: row.logsumexp(0))),
    "jvp": lambda x: ft.jvp(torch.tanh, (x,), (x.t(),)),
    "nothing of it": lambda x: FACTOR.sin(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_case_is_as_if_alone(name: str) -> None:
    f = FUNCTIONS[name]
    torch.testing.assert_close(members(f, MEMBERS), one_by_one(f, MEMBERS))


def test_transforms_around() -> None:
    def spread(scale: Tensor) -> Tensor:
        scaled = MEMBERS * scale
        out = transform(Ensemble, lambda x: (x.sin() @ x).sum())(Carried(scaled[0], others=scaled[1:]))
        return torch.stack([out.value, *out.others]).std()

    def plain(scale: Tensor) -> Tensor:
        return torch.stack([((x * scale).sin() @ (x * scale)).sum() for x in MEMBERS]).std()

    scales = torch.tensor([0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(ft.vmap(spread)(scales), torch.stack([plain(s) for s in scales]))
    torch.testing.assert_close(ft.vmap(ft.grad(spread))(scales), ft.vmap(ft.grad(plain))(scales))
    torch.testing.assert_close(ft.hessian(spread)(scales[0]), ft.hessian(plain)(scales[0]))


def test_a_rule_goes_first_and_pieces_too() -> None:
    seen: list[Any] = []
    with overriding(Ensemble.rules, aten.sin.default):

        @Ensemble.rules.register(aten.sin.default)
        def sin(level: Any, x: Any) -> Any:
            seen.append("rule")
            return level.carry(x.value.sin(), others=x.others.sin())

        torch.testing.assert_close(members(torch.sin, MEMBERS), MEMBERS.sin())
    assert seen == ["rule"]


def test_random_numbers_are_drawn_for_each_case() -> None:
    torch.manual_seed(0)
    found = members(lambda x: torch.nn.functional.dropout(x, 0.5, training=True), torch.ones(5, 50))
    torch.manual_seed(0)
    torch.testing.assert_close(found, torch.stack([torch.dropout(torch.ones(50), 0.5, True) for _ in range(5)]))
    assert len({tuple(row.tolist()) for row in found}) == 5


def refused(f: Callable[..., Any], cls: Any = Ensemble, kind: type[Exception] = CallError) -> str:
    before = thread_state()
    with pytest.raises(kind) as caught:
        transform(cls, f)(Carried(MEMBERS[0], others=MEMBERS[1:]))
    assert thread_state() == before
    return str(caught.value)


def test_results_that_do_not_fit_together() -> None:
    start = 'default="loop" for aten.{} of ensemble(<lambda>) at level 1: got '
    text = refused(lambda x: (x > 0.5).nonzero())
    assert text.startswith(start.format("nonzero.default") + "results of the shapes [")
    assert text.endswith("expected one shape in all cases. Give the operator a rule.")
    text = refused(lambda x: x.sum().item())
    assert text.startswith(start.format("_local_scalar_dense.default") + "the results ")
    assert text.endswith("expected one number in all cases. Keep it in a tensor.")
    assert transform(Ensemble, lambda x: (x * 0).sum().item())(Carried(MEMBERS[0], others=MEMBERS[1:])) == 0.0


def test_as_many_cases_of_each() -> None:
    with pytest.raises(CallError) as caught:
        transform(Ensemble, lambda x, y: x + y)(
            Carried(MEMBERS[0], others=MEMBERS[1:]), Carried(MEMBERS[0], others=MEMBERS[2:])
        )
    assert str(caught.value) == (
        'default="loop" for aten.add.Tensor of ensemble(<lambda>) at level 1: got 4 cases of float64[3, 3] and 3 cases '
        "of float64[3, 3]; expected as many cases of each argument."
    )


def with_methods(cases: Any = Ensemble.cases, of_cases: Any = Ensemble.of_cases) -> Any:
    return type("Other", (Ensemble,), {"cases": cases, "of_cases": of_cases})


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ({"cases": lambda self, x: None}, "got None from cases; expected a list or tuple of tensors."),
        ({"cases": lambda self, x: []}, "got an empty list from cases; expected a list or tuple of tensors."),
        ({"cases": lambda self, x: [x.value[0]]}, "from cases; expected a tensor like float64[3, 3]."),
        ({"cases": lambda self, x: [x.value.float()]}, "from cases; expected a tensor like float64[3, 3]."),
        ({"of_cases": lambda self, values: values[0]}, "from of_cases; expected what carry makes, like float64[3, 3]."),
        ({"of_cases": lambda self, values: None}, "got None from of_cases; expected what carry makes"),
        ({"of_cases": lambda self, values: self.carry(values[0][0], others=values)}, "got float64[3] from of_cases"),
        ({"of_cases": lambda self, values: self.carry(values[0].float(), others=values)}, "got float32[3, 3] from"),
    ],
)
def test_what_the_methods_return_is_checked(methods: Any, text: str) -> None:
    assert text in refused(lambda x: x.sin(), with_methods(**methods))


def test_cases_are_values_of_the_levels_below() -> None:
    text = refused(lambda x: x.sin(), with_methods(lambda self, x: [x]), CarriedValueError)
    assert "cases: got float64[3, 3] of ensemble(<lambda>) at level 1" in text


def test_an_interpreter_without_cases_has_no_loop() -> None:
    with pytest.raises(RegistrationError) as caught:

        class Without(TableInterpreter):
            kind, payload, rules = "without", ("others",), RuleTable("rules without cases", default="loop")

    assert str(caught.value) == (
        'rules without cases: got default="loop" for Without, which has no cases and no of_cases; expected '
        "cases(wrapper), the values that a wrapper stands for, and of_cases(values), a wrapper of as many."
    )


def test_one_case_is_what_a_coded_value_stands_for() -> None:
    """With ``shows``: the operator runs on what the wrapper shows."""

    class Halved(TableInterpreter):
        kind, payload, rules = "halved", ("scale",), RuleTable("halved rules", default="loop")

        def shows(self, value: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
            return value.shape, scale.dtype

        def cases(self, wrapper: Any) -> Sequence[Tensor]:
            return [wrapper.value * wrapper.scale]

        def of_cases(self, values: Sequence[Tensor]) -> Any:
            return self.constant(values[0])

    n, scale = torch.tensor([1, 2, 3]), torch.tensor(0.5)
    out = transform(Halved, lambda x: (x.sin() * x).sum())(Carried(n, scale=scale))
    torch.testing.assert_close(out, ((n * 0.5).sin() * (n * 0.5)).sum())
