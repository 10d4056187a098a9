"""Wrong calls of every public function: a call that is right, with one argument, or two, of the wrong kind.

``python tests/checkers/wrong_calls.py`` prints what they end in.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import itertools
import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import wrong_values
from torch import nn
from wrong_values import FUNCTIONS, VALUES, Counting, OwnError, V, W, X

import functrans
from functrans import extend
from functrans.extend import interpreter_stack
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import (
    AUTOGRAD,
    VIEWS_AND_VERSIONS,
    is_forward_enabled,
    is_key_excluded,
    mode_stack_size,
)

aten = torch.ops.aten

#: The interpreter that runs.
IT = object()

def total(*args: Any, **kwargs: Any) -> Any:
    return sum((a**2).sum() for a in args if isinstance(a, torch.Tensor))


def square(x: Any, *_: Any, **__: Any) -> Any:
    return x**2


def double(x: Any, *_: Any, **__: Any) -> Any:
    return 2 * x


def total_of_first(x: Any, *_: Any, **__: Any) -> Any:
    return total(x)


def sowing(x: Any, *_: Any, **__: Any) -> Any:
    return functrans.sow(2 * x, "double")


def model(x: Any, *_: Any, **__: Any) -> Any:
    return functrans.observe(NORMAL, functrans.sample(NORMAL, "v") * x)


NORMAL = torch.distributions.Normal(torch.zeros(3), 1.0)


@dataclasses.dataclass
class Case:
    """A right call: the function, how it is called, and with what."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Callable[[], Any]]
    #: of these, the functions, which are also given FUNCTIONS
    functions: tuple[str, ...] = ("func",)
    #: the given function called without the transform
    plain: Callable[..., Any] | None = None
    #: whether ``call`` is code of a transform, in which no error is the user's
    extends: bool = False


_LIBRARY: list[Any] = [functrans]


def library() -> Any:
    """The library under test: functrans, or what ``using`` says."""
    return _LIBRARY[-1]


@contextlib.contextmanager
def using(other: Any) -> Iterator[None]:
    _LIBRARY.append(other)
    try:
        yield
    finally:
        _LIBRARY.pop()


def plain(func: Any, x: Any, y: Any, k: Any = None, **_: Any) -> Any:
    """The given function called as it is, and differentiated by PyTorch where that can be done."""
    if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.requires_grad:
        x = x.clone().requires_grad_()
    out = func(x, y) if k is None else func(x, y, k=k)
    if isinstance(out, torch.Tensor) and out.requires_grad and out.dim() == 0 and not out.is_complex():
        out.backward()
    return out


#: Options that torch.func does not have, as they are left out.
OURS: dict[str, tuple[Any, ...]] = {
    "holomorphic": (False,), "axis_name": (None,), "axis_size": (None,),
    "interpreter": (extend.GradInterpreter, extend.VmapInterpreter, extend.JvpInterpreter),
}  # fmt: skip


def asked(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` without those of ours that are as they are left out."""
    return {name: value for name, value in options.items() if not any(value is v for v in OURS.get(name, ()))}


def of_grad(name: str) -> Case:
    def call(func: Any, argnums: Any, has_aux: Any, x: Any, y: Any, k: Any, **options: Any) -> Any:
        return getattr(library(), name)(func, argnums, has_aux, **asked(options))(x, y, k=k)

    arguments = {
        "func": lambda: total,
        "argnums": lambda: 0,
        "has_aux": lambda: False,
        "holomorphic": lambda: False,
        "interpreter": lambda: extend.GradInterpreter,
        "x": V.clone,
        "y": X.clone,
        "k": V.clone,
    }
    return Case(name, call, arguments, plain=plain)


JACOBIAN_OPTIONS: dict[str, Callable[[], Any]] = {
    "has_aux": lambda: False, "chunk_size": lambda: None, "holomorphic": lambda: False,
}  # fmt: skip


def of_jacobian(name: str, **options: Callable[[], Any]) -> Case:
    def call(func: Any, argnums: Any, x: Any, y: Any, k: Any, **options: Any) -> Any:
        return getattr(library(), name)(func, argnums, **asked(options))(x, y, k=k)

    arguments = {"func": lambda: total, "argnums": lambda: 0, "x": V.clone, "y": X.clone, "k": V.clone}
    return Case(name, call, {**arguments, **JACOBIAN_OPTIONS, **options}, plain=plain)


def call_vmap(
    func: Any, in_dims: Any, out_dims: Any, randomness: Any, chunk_size: Any, x: Any, y: Any, k: Any, **named: Any
) -> Any:
    return library().vmap(func, in_dims, out_dims, randomness, chunk_size=chunk_size, **asked(named))(x, y, k=k)


def call_vjp(func: Any, x: Any, y: Any, cotangent: Any, **options: Any) -> Any:
    return library().vjp(func, x, y, **asked(options))[1](cotangent)


def with_tensors(module: Any, parameter_and_buffer_dicts: Any, args: Any, kwargs: Any, **_: Any) -> Any:
    """A module called with the tensors themselves in place of its own."""
    module = copy.deepcopy(module)
    dicts = [parameter_and_buffer_dicts] if isinstance(parameter_and_buffer_dicts, dict) else parameter_and_buffer_dicts
    for name, value in (item for d in dicts for item in d.items()):
        if name in dict(module.named_parameters()):
            module.register_parameter(name, nn.Parameter(value.detach()))
    return module(*(args if isinstance(args, tuple) else () if args is None else (args,)), **(kwargs or {}))


def body_of(action: Callable[..., Any]) -> Callable[..., Any]:
    """``action(interpreter, **arguments)`` while an interpreter runs."""

    def call(**arguments: Any) -> Any:
        interpreter = Counting(action)
        return extend.run_transformed(interpreter, lambda: action(interpreter, **arguments))

    return call


def registering(register: Callable[..., Any]) -> Callable[..., Any]:
    """``register``, of which nothing stays."""

    def call(op: Any, formula: Any = None, **rest: Any) -> Any:
        with (
            extend.overriding(extend.DERIVATIVES, aten.sin.default),
            extend.overriding(extend.BATCHING_RULES, aten.sin.default),
        ):
            register(op, **rest, **({} if formula is None else {"self": formula}))

    return call


def call_and(name: str) -> Callable[..., Any]:
    """A call of what the transform ``name`` makes of a function."""

    def call(func: Any, x: Any, y: Any, k: Any = None, **options: Any) -> Any:
        kwargs = {} if k is None else {"k": k}
        return getattr(library(), name)(func, **asked(options))(x, y, **kwargs)

    return call


ARGUMENTS: dict[str, Callable[[], Any]] = {"x": V.clone, "y": X.clone, "k": V.clone}

CASES = [
    of_grad("grad"),
    of_grad("grad_and_value"),
    of_grad("value_and_grad"),
    of_jacobian("jacrev", interpreter=lambda: extend.GradInterpreter),
    of_jacobian("jacfwd", randomness=lambda: "error", interpreter=lambda: extend.JvpInterpreter),
    of_jacobian("hessian", randomness=lambda: "error"),
    of_jacobian("jacrev_and_value", interpreter=lambda: extend.GradInterpreter),
    of_jacobian("jacfwd_and_value", randomness=lambda: "error", interpreter=lambda: extend.JvpInterpreter),
    Case("chunk_vmap", call_and("chunk_vmap"),
        {
            "func": lambda: square, "in_dims": lambda: 0, "out_dims": lambda: 0, "randomness": lambda: "error",
            "chunks": lambda: 2, "interpreter": lambda: extend.VmapInterpreter,
            "x": X.clone, "y": W.clone, "k": V.clone,
        }, plain=plain),
    Case("functionalize", call_and("functionalize"),
        {"func": lambda: square, "remove": lambda: "mutations_and_views", "x": V.clone, "y": X.clone, "k": V.clone},
        plain=plain),
    Case("linearize", lambda func, x, y, t, **options: library().linearize(func, x, y, **options)[1](t, X),
        {
            "func": lambda: square, "has_aux": lambda: False, "interpreter": lambda: extend.JvpInterpreter,
            "x": V.clone, "y": X.clone, "t": V.clone,
        }, plain=plain),
    Case("linear_transpose",
        lambda func, x, y, cotangent: library().linear_transpose(func, x, y)(cotangent),
        {"func": lambda: double, "x": V.clone, "y": X.clone, "cotangent": V.clone}, plain=plain),
    Case("hvp", lambda func, primals, tangents, **options: library().hvp(func, primals, tangents, **options),
        {"func": lambda: total, "primals": lambda: (V, X), "tangents": lambda: (V, X), "has_aux": lambda: False},
        plain=lambda func, primals, **_: func(*primals)),
    Case("sparsity", call_and("sparsity"),
        {"func": lambda: square, "argnums": lambda: 0, "x": V.clone, "y": X.clone, "k": V.clone}, plain=plain),
    *(Case(name, call_and(name),
        {"func": lambda: total, "argnums": lambda: 0, "chunk_size": lambda: None, "cache": lambda: False, "x": V.clone,
         "y": X.clone, "k": V.clone}, plain=plain) for name in ("sparse_jacobian", "sparse_hessian")),
    Case("bounds", lambda func, low, high, **options: library().bounds(func, **options)(low, high),
        {"func": lambda: torch.tanh, "method": lambda: "linear", "low": V.clone, "high": lambda: V + 1},
        plain=lambda func, low, high, **_: func(low)),
    Case("sow", lambda value, name: library().sow(value, name), {"value": V.clone, "name": lambda: "v"}, ()),
    Case("reap", call_and("reap"), {"func": lambda: sowing, **ARGUMENTS}, plain=plain),
    Case("plant", call_and("plant"), {"func": lambda: sowing, "values": lambda: {"double": V.clone()}, **ARGUMENTS},
        plain=plain),
    Case("count", call_and("count"), {"func": lambda: square, **ARGUMENTS}, plain=plain),
    Case("sanitize", call_and("sanitize"),
        {"func": lambda: square, "nan": lambda: True, "inf": lambda: True, **ARGUMENTS}, plain=plain),
    Case("lowp", call_and("lowp"), {"func": lambda: square, "dtype": lambda: torch.bfloat16, **ARGUMENTS}, plain=plain),
    Case("sample", lambda distribution, name: library().sample(distribution, name),
        {"distribution": lambda: NORMAL, "name": lambda: "v"}, ()),
    Case("observe", lambda distribution, value: library().observe(distribution, value),
        {"distribution": lambda: NORMAL, "value": V.clone}, ()),
    Case("condition", lambda model, values, x: library().condition(model, values)(x),
        {"model": lambda: model, "values": lambda: {"v": V.clone()}, "x": V.clone}, ("model",),
        plain=lambda model, values, x: model(x)),
    Case("seed", lambda model, number, x: library().seed(model, number)(x),
        {"model": lambda: model, "number": lambda: 0, "x": V.clone}, ("model",),
        plain=lambda model, number, x: model(x)),
    Case("log_density", lambda model, values, x: library().log_density(model)(values, x),
        {"model": lambda: model, "values": lambda: {"v": V.clone()}, "x": V.clone}, ("model",),
        plain=lambda model, values, x: (model(x), NORMAL.log_prob(values["v"]), NORMAL.log_prob(x))),
    Case("rearrange", lambda tensor, pattern, **lengths: library().rearrange(tensor, pattern, **lengths),
        {"tensor": X.clone, "pattern": lambda: "(a b) c -> c b a", "a": lambda: 2}, ()),
    Case("explain", lambda func, x, y, k, **options: library().explain(func, x, y, k=k, **options),
        {"func": lambda: square, "example": lambda: 0, "catch": lambda: False, **ARGUMENTS}, plain=plain),
    Case("diff", lambda f, g, x, **options: library().diff(f, g, x, **options),
        {"f": lambda: square, "g": lambda: double, "example": lambda: 0, "rtol": lambda: None, "x": V.clone},
        ("f", "g"), plain=lambda f, g, x, **_: (f(x), g(x))),
    Case("make_trace", call_and("make_trace"), {"func": lambda: square, **ARGUMENTS}, plain=plain),
    Case("debug_print", lambda template, value, y: library().debug_print(template, value, y=y),
        {"template": lambda: "{} {y}", "value": V.clone, "y": V.clone}, ()),
    Case("debug_unwrap", lambda tensor, recurse: library().debug_unwrap(tensor, recurse=recurse),
        {"tensor": V.clone, "recurse": lambda: True}, ()),
    Case(
        "vmap", call_vmap,
        {
            "func": lambda: square, "in_dims": lambda: 0, "out_dims": lambda: 0, "randomness": lambda: "error",
            "chunk_size": lambda: None, "axis_name": lambda: None, "axis_size": lambda: None,
            "interpreter": lambda: extend.VmapInterpreter,
            "x": X.clone, "y": W.clone, "k": V.clone,
        }, plain=plain,
    ),
    Case("jet", lambda f, primals, series: functrans.jet(f, primals, series),
        {"f": lambda: square, "primals": lambda: (V,), "series": lambda: ([V, V],)}, ("f",),
        plain=lambda f, primals, **_: f(*primals)),
    Case("bilaplacian", lambda f, x, y, **options: functrans.bilaplacian(f, **options)(x, y),
        {"f": lambda: total, "directions": lambda: None, "samples": lambda: None, "x": V.clone, "y": X.clone}, ("f",),
        plain=lambda f, x, y, **_: f(x, y)),
    Case("laplacian", lambda f, x, y, **options: functrans.laplacian(f, **options)(x, y),
        {
            "f": lambda: total, "with_value": lambda: False, "directions": lambda: None, "samples": lambda: None,
            "x": V.clone, "y": X.clone,
        }, ("f",), plain=lambda f, x, y, **_: f(x, y)),
    *(
        Case(name, lambda x, y, k, name=name, **options: getattr(functrans, name)(**options)(x, y, k=k),
            {
                "loss": lambda: total_of_first, **({"bound": lambda: 1.0} if name == "clipped_grad" else {}),
                "argnums": lambda: 0, "in_dims": lambda: None, "has_aux": lambda: False, "randomness": lambda: "error",
                "chunk_size": lambda: None, "x": V.clone, "y": X.clone, "k": V.clone,
            }, ("loss",), plain=lambda loss, x, y, k, **_: [plain(loss, x, row, k) for row in y])
        for name in ("clipped_grad", "per_example_norms")
    ),
    *(
        Case(name, lambda name=name, **arguments: functrans.vmap(
            lambda x: getattr(functrans, name)(**{"x": x, **arguments} if name != "axis_index" else arguments),
            axis_name="batch")(X),
            {**arguments, "axis_name": lambda: "batch"}, (), extends=True)
        for name, arguments in {
            **{name: {"x": V.clone} for name in ("psum", "pmean", "pmax", "pmin")},
            "all_gather": {"x": V.clone, "axis": lambda: 0}, "axis_index": {},
        }.items()
    ),
    Case("custom_vjp", lambda func, nondiff_argnums, fwd, bwd, x: functrans.grad(
        with_rule(functrans.custom_vjp(func, nondiff_argnums), "defvjp", fwd, bwd))(x),
        {
            "func": lambda: total, "nondiff_argnums": lambda: (), "fwd": lambda: lambda x: (total(x), x),
            "bwd": lambda: lambda x, grad: (2 * x * grad,), "x": V.clone,
        }, ("func", "fwd", "bwd"), plain=lambda func, fwd, bwd, x, **_: (func(x), bwd(fwd(x)[1], total(x)))),
    Case("custom_jvp", lambda func, nondiff_argnums, rule, x: functrans.grad(
        with_rule(functrans.custom_jvp(func, nondiff_argnums), "defjvp", rule))(x),
        {
            "func": lambda: total, "nondiff_argnums": lambda: (),
            "rule": lambda: lambda primals, tangents: (total(*primals), (2 * primals[0] * tangents[0]).sum()),
            "x": V.clone,
        }, ("func", "rule"), plain=lambda func, rule, x, **_: (func(x), rule((x,), (x,)))),
    Case("custom_vmap", lambda func, rule, x: functrans.vmap(
        with_rule(functrans.custom_vmap(func), "def_vmap", rule))(x),
        {"func": lambda: square, "rule": lambda: lambda size, batched, x: (x**2, True), "x": X.clone},
        ("func", "rule"), plain=lambda func, rule, x: (func(x), rule(2, [True], x))),
    Case("transform", lambda interpreter, func, x: extend.transform(interpreter, func)(x),
        {"interpreter": lambda: Counting, "func": lambda: square, "x": V.clone}, ("interpreter", "func"),
        plain=lambda interpreter, func, x: (interpreter(func), func(x))),
    Case("Carried", lambda value, count: extend.Carried(value, count=count), {"value": V.clone, "count": V.clone}, ()),
    Case("is_affine",
        body_of(lambda i, interpreter, op, args, kwargs:
            extend.is_affine(i if interpreter is IT else interpreter, op, args, kwargs)),
        {"interpreter": lambda: IT, "op": lambda: aten.sin.default, "args": lambda: (V,), "kwargs": dict}, (),
        extends=True),
    Case("as_function",
        body_of(lambda i, interpreter, op, args, kwargs:
            extend.as_function(i if interpreter is IT else interpreter, op, args, kwargs)),
        {"interpreter": lambda: IT, "op": lambda: aten.sin.default, "args": lambda: (V,), "kwargs": dict}, (),
        extends=True),
    Case("Primitive", lambda name, base, x: extend.Primitive(name, base)(x),
        {"name": lambda: "name", "base": lambda: square, "x": V.clone}, ("base",),
        plain=lambda base, x, **_: base(x)),
    Case("Primitive.rule", lambda cls: extend.Primitive("p", square).rule(cls), {"cls": lambda: Counting}, (),
        extends=True),
    Case("missing_rules", lambda cls, func, x: extend.missing_rules(cls, func, x),
        {"cls": lambda: Counting, "func": lambda: square, "x": V.clone}, plain=lambda func, x, **_: func(x)),
    Case("check_derivative", lambda func, x: extend.check_derivative(func, x, order=1),
        {"func": lambda: torch.sin, "x": V.double}, ("func",), plain=lambda func, x: func(x).sum().backward()),
    Case("check_batching_rule", lambda func, x: extend.check_batching_rule(func, x),
        {"func": lambda: torch.sin, "x": V.clone}, ("func",), plain=lambda func, x: func(x)),
    Case("check_transform", lambda transformed, oracle, x: extend.check_transform(transformed, oracle, x),
        {"transformed": lambda: total, "oracle": lambda: total, "x": V.double}, ("transformed", "oracle"),
        plain=lambda transformed, oracle, x: (transformed(x), oracle(x))),
    Case("vjp", call_vjp,
        {
            "func": lambda: square, "has_aux": lambda: False, "interpreter": lambda: extend.GradInterpreter,
            "x": V.clone, "y": X.clone, "cotangent": V.clone,
        },
        plain=plain),
    Case(
        "jvp", lambda func, primals, tangents, **options: library().jvp(func, primals, tangents, **asked(options)),
        {
            "func": lambda: square, "primals": lambda: (V, X), "tangents": lambda: (V, X), "strict": lambda: False,
            "has_aux": lambda: False, "interpreter": lambda: extend.JvpInterpreter,
        }, plain=lambda func, primals, **_: func(*primals),
    ),
    Case(
        "functional_call", lambda *args, **kwargs: library().functional_call(*args, **kwargs),
        {
            "module": lambda: nn.Linear(3, 2), "parameter_and_buffer_dicts": lambda: {"weight": X.clone()},
            "args": lambda: (V,),
            "kwargs": lambda: None, "tie_weights": lambda: True, "strict": lambda: False,
        }, (), plain=with_tensors,
    ),
    Case("stack_module_state", lambda *args, **kwargs: library().stack_module_state(*args, **kwargs),
        {"models": lambda: [nn.Linear(3, 2), nn.Linear(3, 2)]}, ()),
    Case("replace_all_batch_norm_modules_",
        lambda *args, **kwargs: library().replace_all_batch_norm_modules_(*args, **kwargs),
        {"root": lambda: nn.BatchNorm1d(3)}, ()),
    Case(
        "run_transformed", extend.run_transformed,
        {"interpreter": lambda: Counting(torch.sum), "body": lambda: lambda: 1, "enable_grad": lambda: False},
        ("body",), plain=lambda body, **_: body(),
    ),
    Case(
        "lower",
        body_of(
            lambda i, interpreter, op, args, kwargs:
                extend.lower(i if interpreter is IT else interpreter, op, args, kwargs)
        ),
        {"interpreter": lambda: IT, "op": lambda: aten.sin.default, "args": lambda: (V,), "kwargs": dict}, (),
        extends=True,
    ),
    Case(
        "decompose",
        body_of(
            lambda i, interpreter, op, args, kwargs:
                extend.decompose(i if interpreter is IT else interpreter, op, args, kwargs)
        ),
        {"interpreter": lambda: IT, "op": lambda: aten.square.default, "args": lambda: (V,), "kwargs": dict}, (),
        extends=True,
    ),
    Case(
        "wrap", body_of(lambda i, interpreter, value: extend.wrap(i if interpreter is IT else interpreter, value)),
        {"interpreter": lambda: IT, "value": lambda: V}, (), extends=True,
    ),
    Case("map_tensors", extend.map_tensors, {"function": lambda: torch.sin, "out": lambda: [V]}, ("function",),
        plain=lambda function, out: function(out if isinstance(out, torch.Tensor) else V)),
    Case("interpreter_stack", extend.interpreter_stack, {}, ()),
    Case("op_info", extend.op_info, {"op": lambda: aten.sin.default}, ()),
    Case("carry", body_of(lambda i, value, **payload: i.carry(value, **payload)),
        {"value": lambda: V, "count": lambda: V}, (), extends=True),
    Case("own", body_of(lambda i, x: i.own(x)), {"x": lambda: V}, (), extends=True),
    Case("constant", body_of(lambda i, value: i.constant(value)), {"value": lambda: V}, (), extends=True),
    Case(
        "missing_rule",
        body_of(lambda i, interpreter, op: extend.missing_rule(i if interpreter is IT else interpreter, op)),
        {"interpreter": lambda: IT, "op": lambda: aten.sin.default}, (), extends=True,
    ),
    Case("lowered", body_of(lambda i, interpreter: within(extend.lowered(i if interpreter is IT else interpreter))),
        {"interpreter": lambda: IT}, (), extends=True),
    Case("running_at", body_of(lambda i, level: within(extend.running_at(i if level is IT else level))),
        {"level": lambda: IT}, (), extends=True),
    Case(
        "derivative", registering(extend.derivative),
        {
            "op": lambda: aten.sin.default, "tangent": lambda: "elementwise", "broadcasts": lambda: False,
            "joint": lambda: None,
            "formula": lambda: lambda grad, self: grad * self.cos(),
        }, ("tangent", "joint", "formula"), extends=True,
    ),
    Case("no_derivative", registering(lambda op: extend.no_derivative(op)), {"op": lambda: aten.sin.default}, (),
        extends=True),
    Case(
        "batching_rule", registering(lambda op, rule: extend.batching_rule(op)(rule)),
        {"op": lambda: aten.sin.default, "rule": lambda: lambda info, in_dims, x: (x.sin(), in_dims[0])}, ("rule",),
        extends=True,
    ),
    Case(
        "overriding", lambda table, op: within(extend.overriding(table, op)),
        {"table": lambda: extend.DERIVATIVES, "op": lambda: aten.sin.default}, (), extends=True,
    ),
    Case(
        "rules_in_scope", lambda table, rules: within(extend.rules_in_scope(table, rules)),
        {"table": lambda: extend.BATCHING_RULES,
            "rules": lambda: {aten.sin.default: lambda info, in_dims, x: (x.sin(), in_dims[0])}}, (), extends=True,
    ),
    Case("RuleTable.add", lambda op, rule: extend.RuleTable("table").add(op, rule),
        {"op": lambda: aten.sin.default, "rule": lambda: torch.sin}, ("rule",), extends=True),
    Case("PullbackTable", lambda title, default: extend.PullbackTable(title, default=default),
        {"title": lambda: "table", "default": lambda: "derivative"}, (), extends=True),
    Case("PullbackTable.add", lambda op, rule: extend.PullbackTable("table").add(op, rule),
        {"op": lambda: aten.sin.default, "rule": lambda: lambda step, grad: None}, ("rule",), extends=True),
    Case("RuleTable.place", lambda op: extend.BATCHING_RULES.place(op), {"op": lambda: aten.sin.default}, (),
        extends=True),
    Case("RuleTable.get", lambda op: extend.BATCHING_RULES.get(op), {"op": lambda: aten.sin.default}, (), extends=True),
    Case("RuleTable.remove", lambda op: extend.RuleTable("table").remove(op), {"op": lambda: aten.sin.default}, (),
        extends=True),
]  # fmt: skip


def with_rule(custom: Any, method: str, *rules: Any) -> Any:
    getattr(custom, method)(*rules)
    return custom


def within(context: Any) -> Any:
    with context:
        return V + 1


def wrong_calls(
    cases: list[Case] = CASES, pairs: int = 0, seed: int = 0
) -> Iterator[tuple[Case, dict[str, str], dict[str, Any]]]:
    """Every case with one argument replaced by every value; with two replaced, ``pairs`` times each."""
    random_ = random.Random(seed)
    for case in cases:
        kinds = {name: {**VALUES, **(FUNCTIONS if name in case.functions else {})} for name in case.arguments}
        for name, values in kinds.items():
            for kind in values:
                yield replaced(case, kinds, {name: kind})
        for names in itertools.islice(itertools.cycle(list(itertools.combinations(kinds, 2)) or [()]), pairs):
            if names:
                yield replaced(case, kinds, {name: random_.choice(list(kinds[name])) for name in names})


def replaced(case: Case, kinds: Any, chosen: dict[str, str]) -> tuple[Case, dict[str, str], dict[str, Any]]:
    return (
        case,
        chosen,
        {name: kinds[name][chosen[name]]() if name in chosen else right() for name, right in case.arguments.items()},
    )


def thread_state() -> tuple[Any, ...]:
    """What a call must leave as it was."""
    return (
        interpreter_stack(), mode_stack_size(), STATE.door_depth, is_key_excluded(AUTOGRAD),
        is_key_excluded(VIEWS_AND_VERSIONS),
        torch.is_grad_enabled(), is_forward_enabled(),
    )  # fmt: skip


def outcome(case: Case, arguments: dict[str, Any]) -> BaseException | None:
    try:
        case.call(**arguments)
    except Exception as error:  # noqa: BLE001 - which kind is the question
        return error
    return None


def meant(error: BaseException | None) -> bool:
    """Whether a ``raise`` raised the error, as against a mistake on the way."""
    return error is not None and str(traceback.extract_tb(error.__traceback__)[-1].line).startswith("raise")


def is_deliberate(error: Exception, case: Case, arguments: dict[str, Any]) -> bool:
    """Whether the error is one that the library means to raise, or that the given function raises."""
    if isinstance(error, functrans.FunctransError | OwnError):
        return True
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    if innermost in (__file__, wrong_values.__file__) and not case.extends:
        return True
    if case.plain is not None:
        try:
            case.plain(**arguments)
        except Exception:  # noqa: BLE001 - what the function does by itself is its own affair
            return True
    return False


if __name__ == "__main__":
    counts: collections.Counter[str] = collections.Counter()
    for case, chosen, arguments in wrong_calls(pairs=100):
        error = outcome(case, arguments)
        if error is None:
            counts["succeeded"] += 1
        elif isinstance(error, functrans.FunctransError):
            counts["deliberate"] += 1
        elif is_deliberate(error, case, arguments):
            counts["of the function"] += 1
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            counts["raw"] += 1
            print(
                case.name,
                chosen,
                type(error).__name__,
                str(error)[:100].replace("\n", " "),
                f"{last.filename.rpartition('/')[2]}:{last.lineno}",
            )
    print(counts)
