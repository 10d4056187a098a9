"""What cannot be a rule is refused where it is registered, with what to write instead;
and rules get what calls leave out.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import functrans
from functrans import batching_rule, derivative, grad, jvp, vmap
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.errors import DerivativeEntryError, NotAnOverloadError, RegistrationError
from functrans.extend import (
    BATCHING_RULES,
    DERIVATIVES,
    MissingRuleError,
    RuleTable,
    TableInterpreter,
    no_derivative,
    overriding,
    run_transformed,
)
from functrans.extension.missing_rule import rule_to_paste
from functrans.functionalization.hidden_effects import stands_in_for
from functrans.interpreters.vmap.elementwise import elementwise
from functrans.interpreters.vmap.families import along_dim, reduction
from functrans.interpreters.vmap.rules.random import RandomnessError, random_family
from functrans.operators.defaults import completed
from functrans.operators.info import op_info
from functrans.operators.schemas import schema_default

aten = torch.ops.aten
X = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)


class Marking(TableInterpreter):
    kind = "marking"
    payload = ("mark",)
    rules: Any = RuleTable("marks")


@torch.library.custom_op("registration::scale", mutates_args=())
def scale(x: Tensor, factor: float = 3.0, shift: int = 1) -> Tensor:
    return x * factor + shift


def rule(info: Any, in_dims: Any, x: Tensor) -> Any:
    return x, in_dims[0]


# ---- operators

REGISTRARS = {
    "batching_rule": lambda op: batching_rule(op)(rule),
    "Table.register": lambda op: Marking.rules.register(op)(rule),
    "Table.add": lambda op: Marking.rules.add(op, rule),
    "derivative": lambda op: derivative(op, self=lambda grad: grad, tangent="elementwise"),
    "no_derivative": no_derivative,
    "stands_in_for": lambda op: stands_in_for(op)(rule),
    "random_family": lambda op: random_family(op)(rule),
    "elementwise": elementwise,
    "reduction": reduction,
    "along_dim": along_dim,
    "overriding": lambda op: functrans.extend.overriding(DERIVATIVES, op),
    "rules_in_scope": lambda op: functrans.extend.rules_in_scope(BATCHING_RULES, {op: rule}),
}

NO_OVERLOADS = {
    "packet": (aten.sin,
        ("got the packet torch.ops.aten.sin, which stands for all its overloads. "
         "Name one .*: torch.ops.aten.sin.default, torch")),
    "custom operator": (scale, "Write torch.ops.registration.scale.default for this custom operator."),
    "packet of a custom operator": (torch.ops.registration.scale,
        "Name one of its overloads: torch.ops.registration.scale.default."),
    "torch function": (torch.sin, "Its operator is one of torch.ops.aten.sin.default, "),
    "method": (Tensor.sin, "Its operator is one of torch.ops.aten.sin.default, "),
    "text": ("aten::sin", "Write torch.ops.aten.sin.default, without quotes."),
    "text of an overload": ("aten.sin.out", "Write torch.ops.aten.sin.out, without quotes."),
    "no parentheses": (rule,
        ("got the function rule. (A decorator takes the operator in parentheses, and the rule stands below"
         "|The operator comes first)")),
    "a number": (3, "got the int 3. Name one of its overloads."),
    "none": (None, "got None. Name one of its overloads."),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_OVERLOADS)
@pytest.mark.parametrize("registrar", REGISTRARS)
def test_no_overload(registrar: str, kind: str) -> None:
    op, text = NO_OVERLOADS[kind]
    sizes = len(BATCHING_RULES), len(DERIVATIVES), len(Marking.rules)
    with pytest.raises(NotAnOverloadError, match=text):
        REGISTRARS[registrar](op)
    assert (len(BATCHING_RULES), len(DERIVATIVES), len(Marking.rules)) == sizes


@pytest.mark.parametrize("decorator", [batching_rule, Marking.rules.register, stands_in_for, random_family, derivative])
def test_a_decorator_without_parentheses(decorator: Any) -> None:
    with pytest.raises(NotAnOverloadError, match="It is no decorator" if decorator is derivative else "in parentheses"):

        @decorator
        def mine(info: Any, in_dims: Any, x: Tensor) -> Any:
            return x, 0


@pytest.mark.parametrize("registrar", [batching_rule, Marking.rules.register, stands_in_for, no_derivative])
def test_for_no_operator(registrar: Any) -> None:
    with pytest.raises(RegistrationError, match="for no operator|expected at least one"):
        registrar()


@pytest.mark.parametrize("op", [aten.sin_.default, aten.sin.out, aten.copy_.default])
@pytest.mark.parametrize("registrar", ["batching_rule", "Table.add", "derivative", "no_derivative", "overriding"])
def test_an_operator_that_writes_never_reaches_a_rule(registrar: str, op: Any) -> None:
    with pytest.raises(RegistrationError, match=r"writes to its arguments .* a transform never sees it"):
        REGISTRARS[registrar](op)


# ---- rules


@pytest.mark.parametrize("bad", [None, 3, "rule", torch.ones(2)])
@pytest.mark.parametrize("table", [BATCHING_RULES, Marking.rules, DERIVATIVES, DECOMPOSITIONS])
def test_what_is_no_rule(table: RuleTable[Any], bad: Any) -> None:
    before = len(table)
    with pytest.raises(RegistrationError, match=r"as the rule of aten._fw_primal.default; expected"):
        table.register(aten._fw_primal.default)(bad)
    assert len(table) == before


ENTRIES: dict[str, tuple[Any, str]] = {
    "nothing": (lambda op: derivative(op), "has no formula; give one per differentiable argument"),
    "a word alone": (lambda op: derivative(op, tangent="linear"), "has no formula"),
    "joint alone": (lambda op: derivative(op, joint=lambda grad, wanted: {}), "has no formula"),
    "unknown argument": (
        lambda op: derivative(op, y=lambda grad: grad),
        "has no argument 'y'; its arguments are x, factor, shift",
    ),
    "a number's": (
        lambda op: derivative(op, factor=lambda grad: grad),
        "has a formula for 'factor', a float; only tensors have cotangents",
    ),
    "no function": (lambda op: derivative(op, x=3.0), "has 3.0 as a formula; expected a function"),
    "a function that does not say": (
        lambda op: derivative(op, x=torch.sin),
        "does not say what it asks for; write a lambda around it",
    ),
    "any arguments": (lambda op: derivative(op, x=lambda *args: args[0]), r"takes \*args"),
    "by name only": (lambda op: derivative(op, x=lambda grad, *, factor: grad), "takes factor"),
    "unknown name": (lambda op: derivative(op, x=lambda grad, fctor: grad), r"asks for \['fctor'\]"),
    "of several outputs": (lambda op: derivative(op, x=lambda grads: grads[0]), r"asks for \['grads'\]"),
    "unknown tangent": (lambda op: derivative(op, x=lambda grad: grad, tangent="bilinear"), "has tangent='bilinear'"),
    "tangent of the wrong kind": (lambda op: derivative(op, x=lambda grad: grad, tangent=3), "has tangent=3"),
    "tangent of the wrong names": (lambda op: derivative(op, tangent=lambda grad: grad), r"asks for \['grad'\]"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_no_entry(name: str) -> None:
    register, text = ENTRIES[name]
    with pytest.raises(DerivativeEntryError, match=text):
        register(torch.ops.registration.scale.default)
    assert torch.ops.registration.scale.default not in DERIVATIVES


# ---- the lines to paste


def every_overload() -> list[Any]:
    names = sorted({s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")})
    packets = [
        packet for name in names if (packet := getattr(torch.ops.aten, name.removeprefix("aten::"), None)) is not None
    ]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


class Scratch(TableInterpreter):
    kind = "scratch"
    payload = ("upper", "lower")
    rules: Any = RuleTable("scratch rules", writing=True)


class Carrying:
    @staticmethod
    def carry(*args: Any, **payload: Any) -> Any:
        return args, payload


def test_the_lines_to_paste_run_for_every_operator() -> None:
    overloads = every_overload()
    assert len(overloads) > 3000
    for op in overloads:
        text = rule_to_paste(Scratch, op)
        exec(text, {"torch": torch, "Scratch": Scratch})  # noqa: S102 - that it can be pasted is what is tested
        pasted = Scratch.rules.get(op)
        assert pasted is not None, text
        assert completed(pasted, op, 1) is pasted, text  # takes all arguments, with the schema's defaults
        required = [i for i, a in enumerate(op._schema.arguments) if not a.kwarg_only and not a.has_default_value()]
        named = {a.name: 0 for a in op._schema.arguments if a.kwarg_only and not a.has_default_value()}
        everything = {a.name: 0 for a in op._schema.arguments if a.kwarg_only}
        expected = ((...,), {"upper": ..., "lower": ...})
        assert pasted(Carrying, *required, **named) == expected, text
        assert pasted(Carrying, *[a for a in op._schema.arguments if not a.kwarg_only], **everything) == expected, text


MISSING = {
    "sum.dim_IntList": lambda x: x.sum(0),
    "var.correction": lambda x: x.var(0),
    "clamp.default": lambda x: x.clamp(0.1),
    "topk.default": lambda x: x.topk(2).values,
    "cat.default": lambda x: torch.cat([x, x]),
    "uniform.default": lambda x: torch.ops.aten.uniform(x),
    "lerp.Scalar": lambda x: torch.lerp(x, x, 0.5),
    "addcmul.default": lambda x: torch.addcmul(x, x, x),
}


class Empty(TableInterpreter):
    kind = "empty"
    payload = ("mark",)
    rules: Any = RuleTable("empty rules")


@Empty.rules.register(aten._to_copy.default)
def to_copy(interpreter: Any, x: Any, **kwargs: Any) -> Any:
    return interpreter.carry(x.value.to(kwargs["dtype"]), mark=x.mark)


@pytest.mark.parametrize("name", MISSING)
def test_pasted_and_completed_the_rule_is_used(name: str) -> None:
    """What the error says to paste, with a body, ends the error."""

    def run() -> Any:
        interpreter = Empty(MISSING[name])
        return run_transformed(interpreter, lambda: interpreter.own(MISSING[name](interpreter.carry(X, mark=1)))).mark

    with pytest.raises(MissingRuleError) as info:
        run()
    assert f"no rule for aten.{name}" in str(info.value)
    text = str(info.value).split("\n\n")[1]
    first = "tensors[0]" if name.startswith("cat") else "self"
    value = f"function({first}.value)"  # what the operator gives here
    result = (
        f"tuple(interpreter.carry(v, mark=7) for v in {first}.value.topk(2))"
        if "topk" in name
        else f"interpreter.carry({value}, mark=7)"
    )
    scope = {"torch": torch, "Empty": Empty, "function": MISSING[name]}
    exec(text.replace("interpreter.carry(..., mark=...)", result), scope)  # noqa: S102
    assert run() == 7


# ---- defaults reach rules

PACKAGE = str(Path(functrans.__file__).parent)


def test_every_rule_of_ours_has_the_defaults_of_its_operator() -> None:
    for table, before in ((BATCHING_RULES, 2), (DECOMPOSITIONS, 0)):
        for op in table:
            if not table.place(op).startswith(PACKAGE):
                continue  # another test's
            ours: Any = table.get(op)
            kept = completed(ours, op, before, listed=before == 2)
            # nothing has to be filled in (but for a memory format, which the schema writes as a number)
            assert kept is ours, (op, "has other defaults than its rule, or arguments that its rule does not take")


def test_defaults_of_a_schema_are_what_python_passes() -> None:
    arguments = {a.name: a for a in aten.randperm.default._schema.arguments}
    assert schema_default(arguments["dtype"]) is torch.int64 and schema_default(arguments["device"]) is None
    (memory_format,) = [a for a in aten.contiguous.default._schema.arguments if a.name == "memory_format"]
    assert schema_default(memory_format) is torch.contiguous_format
    assert op_info(aten.contiguous.default).defaults[1] is torch.contiguous_format


LIB = torch.library.Library("registration", "FRAGMENT")
LIB.define('mixed(Tensor x, Tensor? y=None, float k=2.0, int[] dims=[0, 1], *, bool flag=True, str name="n") -> Tensor')
LIB.impl("mixed", lambda x, *args, **kwargs: x * 2, "CompositeExplicitAutograd")
mixed = torch.ops.registration.mixed
MIXED = torch.ops.registration.mixed.default
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "nothing": (lambda x: mixed(x), (None, 2.0, [0, 1], True, "n")),
    "by position": (lambda x: mixed(x, None, 4.0), (None, 4.0, [0, 1], True, "n")),
    "by name": (lambda x: mixed(x, k=4.0, name="m"), (None, 4.0, [0, 1], True, "m")),
    "the last": (lambda x: mixed(x, dims=[2], flag=False), (None, 2.0, [2], False, "n")),
    "everything": (lambda x: mixed(x, None, 5.0, [1], flag=False, name="z"), (None, 5.0, [1], False, "z")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("signature", ["required", "other defaults", "own defaults"])
def test_what_a_call_leaves_out_reaches_every_kind_of_rule(signature: str, call: str) -> None:
    f, expected = CALLS[call]
    expected = tuple(list(e) if isinstance(e, list) else e for e in expected)
    seen: list[Any] = []

    def note(x: Any, y: Any, k: Any, dims: Any, flag: Any, name: Any) -> None:
        seen.append((y, k, list(dims), flag, name))

    if signature == "required":

        def arguments(x: Any, y: Any, k: Any, dims: Any, *, flag: Any, name: Any) -> Any:
            note(x, y, k, dims, flag, name)
            return x
    elif signature == "other defaults":

        def arguments(x: Any, y: Any = 1, k: Any = -1.0, dims: Any = (), *, flag: Any = None, name: Any = "") -> Any:
            note(x, y, k, dims, flag, name)
            return x
    else:

        def arguments(
            x: Any, y: Any = None, k: Any = 2.0, dims: Any = (0, 1), *, flag: Any = True, name: Any = "n"
        ) -> Any:
            note(x, y, k, dims, flag, name)
            return x

    own = list(inspect.signature(arguments).parameters.values())
    extra = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("first", "second")]

    def batching(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        assert len(in_dims) == len(args)
        return arguments(*args, **kwargs), in_dims[0]

    def table_rule(interpreter: Any, *args: Any, **kwargs: Any) -> Any:
        return arguments(*args, **kwargs)

    batching.__signature__ = inspect.Signature([*extra, *own])  # type: ignore[attr-defined]
    table_rule.__signature__ = inspect.Signature([extra[0], *own])  # type: ignore[attr-defined]
    with functrans.extend.rules_in_scope(BATCHING_RULES, {MIXED: batching}):
        vmap(f)(X)
    interpreter = Marking(f)
    with functrans.extend.rules_in_scope(Marking.rules, {MIXED: table_rule}):
        run_transformed(interpreter, lambda: f(interpreter.carry(X, mark=1)))
    with functrans.extend.rules_in_scope(DECOMPOSITIONS, {MIXED: arguments}):
        grad(lambda x: f(x).sum())(X)
    with functrans.extend.overriding(DERIVATIVES, MIXED):
        derivative(
            MIXED,
            x=lambda grad, x, y, k, dims, flag, name: (note(x, y, k, dims, flag, name), grad)[1],
            tangent="elementwise",
        )
        grad(lambda x: f(x).sum())(X)
        jvp(f, (X,), (X,))
    assert seen == [expected] * 5


def test_a_rule_that_does_not_take_the_arguments() -> None:
    op = torch.ops.registration.scale.default
    with functrans.extend.rules_in_scope(BATCHING_RULES, {op: lambda info, in_dims, x: (x, in_dims[0])}):
        assert torch.equal(vmap(scale)(X), X)
        with pytest.raises(
            RegistrationError,
            match=r"test_registration.py:\d+ has no parameter for factor, which this call gives. "
            r"Expected: 2 parameters",
        ):
            vmap(lambda x: scale(x, 4.0))(X)
    for bad, text in (
        (lambda info: None, "takes 1 arguments by position"),
        (lambda info, in_dims: None, "has no parameter for x"),
        (lambda info, in_dims, x, factor, shift, more: None, "asks for more, which the operator does not have"),
        (lambda info, in_dims, x, *, more: None, "asks for more, which the operator does not have"),
    ):
        with functrans.extend.rules_in_scope(BATCHING_RULES, {op: bad}), pytest.raises(RegistrationError, match=text):
            vmap(scale)(X)


# ---- random operators

counter = itertools.count()


def random_operator() -> Any:
    name = f"draw{next(counter)}"
    LIB.define(f"{name}(Tensor x, float p=0.5) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
    LIB.impl(name, lambda x, p=0.5: x + p * torch.rand_like(x), "CompositeExplicitAutograd")
    return getattr(torch.ops.registration, name).default


def asked(op: Any, f: Any, randomness: str, *args: Any, decline: bool = False) -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    def draw(info: Any, in_dims: Any, x: Tensor, p: float) -> Any:
        seen.append((info.randomness, in_dims, tuple(x.shape), p))
        if decline:
            raise functrans.interpreters.vmap.families.RuleDeclined("not here")
        return x + 100, in_dims[0]

    with functrans.extend.rules_in_scope(BATCHING_RULES, {op: draw}):
        return vmap(f, randomness=randomness)(*args), seen


def test_the_batching_rule_of_a_random_operator_is_asked() -> None:
    op = random_operator()
    for randomness in ("different", "same"):
        out, seen = asked(op, op, randomness, X)
        assert torch.equal(out, X + 100) and seen == [(randomness, [0, None], (3,), 0.5)]
    with pytest.raises(RandomnessError):
        asked(op, op, "error", X)


def test_where_nothing_is_batched_each_example_draws_or_all_share() -> None:
    op, constant = random_operator(), torch.zeros(2)
    out, seen = asked(op, lambda x: op(constant, 0.25) + 0 * x.sum(), "different", X)
    assert out.tolist() == [[100.0, 100.0]] * 3 and seen == [("different", [0, None], (3, 2), 0.25)]
    out, seen = asked(op, lambda x: op(constant) + 0 * x.sum(), "same", X)
    assert seen == [] and torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])  # one draw, one level down


def test_a_rule_that_declines_leaves_the_draws_to_the_loop() -> None:
    op = random_operator()
    with pytest.warns(UserWarning, match="once per example"):
        out, seen = asked(op, op, "different", torch.zeros(5), decline=True)
    assert len(out.unique()) == 5 and len(seen) in (1, 2)


def test_the_batching_rule_of_a_random_operator_of_pytorchs() -> None:
    seen = []

    def dropout(info: Any, in_dims: Any, x: Tensor, p: float, train: bool) -> Any:
        seen.append((in_dims, p, train))
        return x + 100, in_dims[0]

    with functrans.extend.rules_in_scope(BATCHING_RULES, {aten.dropout.default: dropout}):
        assert torch.equal(vmap(lambda x: torch.dropout(x, 0.5, True), randomness="different")(X), X + 100)
        with pytest.raises(RandomnessError):
            vmap(lambda x: torch.dropout(x, 0.5, True))(X)
        assert torch.equal(vmap(lambda x: torch.dropout(x, 0.5, False))(X), X)  # the door returns the argument itself
    assert seen == [([0, None, None], 0.5, True)]


def test_register_vmap_of_a_random_operator() -> None:
    @torch.library.custom_op("registration::noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
    def noise(x: Tensor) -> Tensor:
        return torch.rand_like(x)

    zeros = torch.zeros(4)
    with pytest.warns(UserWarning, match="once per example"):
        assert len(vmap(noise, randomness="different")(zeros).unique()) == 4
    noise.register_vmap(lambda info, in_dims, x: (x + 100, in_dims[0]))
    assert vmap(noise, randomness="different")(zeros).tolist() == [100.0] * 4
    with pytest.raises(RandomnessError):
        vmap(noise)(zeros)


def test_a_rule_may_be_an_object() -> None:
    @dataclasses.dataclass  # with an equality, so that it has no hash
    class Times:
        k: float

        def __call__(self, info: Any, in_dims: Any, x: Tensor, factor: float, shift: int) -> Any:
            return x * self.k * factor + shift, in_dims[0]

    with functrans.extend.rules_in_scope(BATCHING_RULES, {torch.ops.registration.scale.default: Times(10.0)}):
        assert torch.equal(vmap(scale)(X), X * 10.0 * 3.0 + 1)


def test_a_formula_may_hold_what_it_is_made_with() -> None:
    """A parameter with a default, after those that are asked for, is no name of the operator's."""
    x = torch.tensor([1.0, 2.0])
    for factor in (2.0, 3.0):
        with overriding(DERIVATIVES, torch.ops.aten.round.default):
            derivative(
                torch.ops.aten.round.default,
                self=lambda grad, self, factor=factor: factor * self * grad,
                tangent=lambda self, self_t, factor=factor: factor * self * self_t,
            )
            assert torch.equal(grad(lambda x: x.round().sum())(x), factor * x)
            assert torch.equal(jvp(torch.round, (x,), (x,))[1], factor * x * x)
