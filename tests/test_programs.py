"""Pointwise programs: what is derived, that they mean what their operators mean one by one,
and where they must not be used.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.func
from expecttest import assert_expected_inline
from recorder import noted
from slow_ways import close
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functrans import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from functrans.core.dispatch import base, dispatch, lower, map_tensors
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import wrap
from functrans.errors import DeadWrapperError
from functrans.extend import BATCHING_RULES, DERIVATIVES, derivative, overriding, run_transformed
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.operators.info import op_info
from functrans.programs.deriving import pullback, tangent
from functrans.programs.operators import operator_program, traced
from functrans.programs.torch_functions import BINARY, OPERATORS, UNARY
from functrans.programs.tracing import Untraceable

aten = torch.ops.aten
DOUBLE = torch.float64


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.2


# --- what is derived --------------------------------------------------------------------------------------------------


def test_programs_print_as_python() -> None:
    sin = operator_program(aten.sin.default)
    assert sin is not None
    assert_expected_inline(str(tangent(sin, (0,)).program), """\
def program(a, b):
    return sin(a), mul(b, cos(a))""")
    pull = pullback(sin, (0,)).pull((0,)).program
    assert_expected_inline(str(pull), """\
def program(a, b):
    return mul(a, cos(b))""")
    # x and its tangent, g and its tangent: the sum of products is one operator
    assert_expected_inline(str(tangent(pull, (0, 1)).program), """\
def program(a, b, c, d):
    e = cos(b)
    return mul(a, e), addcmul(mul(c, e), mul(d, neg(sin(b))), a)""")


def test_what_is_costly_is_kept_and_not_computed_again() -> None:
    sin = operator_program(aten.sin.default)
    assert sin is not None
    first = pullback(sin, (0,)).pull((0,)).program
    second = pullback(first, (0, 1))
    assert_expected_inline(str(second.forward), """\
def program(a, b):
    c = cos(b)
    return mul(a, c), c""")
    assert_expected_inline(str(second.pull((0,)).program), """\
def program(a, b, c, d):
    return mul(a, d), mul(mul(a, b), neg(sin(c)))""")


def test_a_cotangent_that_is_passed_on_is_not_computed_with() -> None:
    add = operator_program(aten.add.Tensor)
    assert add is not None
    pull = pullback(add, (0, 1)).pull((0,))
    assert pull.results == (-1, -1) and not pull.program.instructions


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_every_frequent_function_is_a_program(name: str) -> None:
    for kinds, op in OPERATORS[name].items():
        program = operator_program(op, *((3,) if op is aten.pow.Tensor_Scalar else ()))
        if op is aten.pow.Tensor_Tensor:
            assert program is None  # its formula looks at where the exponent is 0
            continue
        assert program is not None, (name, kinds)


def test_a_formula_that_looks_at_numbers_is_no_program() -> None:
    with pytest.raises(Untraceable):
        traced(lambda x: x if x > 0 else -x, 1)
    with pytest.raises(Untraceable):
        traced(lambda x: x * x.shape[0], 1)


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches programs off: every operator goes down the stack by itself."""

    def switch_off() -> None:
        for kind in (GradInterpreter, JvpInterpreter, VmapInterpreter):
            monkeypatch.setattr(kind, "whole", False)

    return switch_off


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sin": lambda x, y: torch.sin(x),
    "tanh": lambda x, y: x.tanh(),
    "exp": lambda x, y: (-x).exp(),
    "sigmoid": lambda x, y: torch.sigmoid(x) - 0.5,
    "reciprocal": lambda x, y: 1 / (x * x + 1.5),
    "sqrt": lambda x, y: (x * x + 1).sqrt(),
    "log": lambda x, y: torch.log1p(x.square()),
    "cube": lambda x, y: x**3 / 4,
    "relu": lambda x, y: x.relu() + 0.25 * x,
    "abs": lambda x, y: 2 - abs(x),
    "mul": lambda x, y: x * y,
    "rsub": lambda x, y: 1 - x * y,
    "div": lambda x, y: x / (y * y + 2),
    "add": lambda x, y: x + y,
    "number": lambda x, y: 0.7 * x + 0.1,
    "constant": lambda x, y: x * SCALE,
    "broadcast": lambda x, y: x + y.sum() if y.dim() else x - y,
}
SCALE = torch.tensor(0.8, dtype=DOUBLE)


def random_function(numbers: random.Random) -> Callable[[Tensor], Tensor]:
    names = [numbers.choice(list(STEPS)) for _ in range(numbers.randint(2, 6))]

    def function(x: Tensor) -> Tensor:
        previous, value = x, x
        for name in names:
            previous, value = value, STEPS[name](value, previous)
        return value

    function.__name__ = "_".join(names)
    return function


def transforms(api: Any) -> dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]]:
    ones = torch.ones_like

    def tangent(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: api.jvp(f, (x,), (x * 0.5 + 0.3,))[1]

    def cotangent(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def pulled(x: Tensor) -> Tensor:
            out, pullback = api.vjp(f, x)
            return pullback(ones(out) * 0.7)[0]

        return pulled

    def rows(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: api.vmap(f)(torch.stack([x, x * 0.5, x - 0.25])).sum(0)

    def columns(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: api.vmap(lambda c: f(x * c) + c, in_dims=1, out_dims=-1)(SLICES).mean(-1)

    def fixed_tangent(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: api.jvp(f, (x,), (FIXED[tuple(x.shape)],))[1]

    return {
        "jvp": tangent,
        "jvp along what is captured": fixed_tangent,
        "vjp": cotangent,
        "vmap": rows,
        "vmap with another batch dimension": columns,
    }


FIXED = {shape: torch.full(shape, 0.6, dtype=DOUBLE) for shape in ((), (3,), (2, 3), (1,), (4,), (1, 4))}
SLICES = double(2, 4, seed=5).sum(0, keepdim=True)


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_mean_what_their_operators_mean(seed: int, one_by_one: Callable[[], None]) -> None:
    import functrans

    numbers = random.Random(seed)
    function = random_function(numbers)
    chosen = [numbers.choice(list(transforms(functrans))) for _ in range(numbers.randint(1, 4))]
    x = double(*numbers.choice([(), (3,), (2, 3)]), seed=seed)

    def composed(api: Any) -> Tensor:
        f: Callable[..., Tensor] = function
        for name in chosen:
            f = transforms(api)[name](f)
        return f(x)

    got = composed(functrans)
    close(got, composed(torch.func))
    one_by_one()
    close(got, composed(functrans))


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_outputs_of_several_shapes_are_pulled_back_one_by_one() -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin() * x.sum()

    x, batch = double(3), double(4, 3)
    for outer, inner in itertools.product((jacrev, jacfwd), repeat=2):
        theirs = {jacrev: torch.func.jacrev, jacfwd: torch.func.jacfwd}
        close(outer(inner(f))(x), theirs[outer](theirs[inner](f))(x))
        close(vmap(outer(inner(f)))(batch), torch.func.vmap(theirs[outer](theirs[inner](f)))(batch))


@pytest.mark.parametrize("shapes", [((), (3,)), ((3,), ()), ((2, 3), (3,)), ((1, 3), (2, 1)), ((2, 1, 3), (4, 1))])
def test_broadcasting_is_undone(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, y = (double(*shape, seed=i) for i, shape in enumerate(shapes))

    def f(x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x * y + y) / (x * x + 1)

    for api in (torch.func,):
        close(jacrev(f, (0, 1))(x, y), api.jacrev(f, (0, 1))(x, y))
        close(hessian(lambda *a: f(*a).sum(), (0, 1))(x, y), api.hessian(lambda *a: f(*a).sum(), (0, 1))(x, y))
        close(jvp(f, (x, y), (x, y)), api.jvp(f, (x, y), (x, y)))
    pairs = [(torch.stack([v, v * 0.5]), v) for v in (x, y)]
    for (a, in_a), (b, in_b) in itertools.product(*([(batch, 0), (one, None)] for batch, one in pairs)):
        if in_a is None and in_b is None:
            continue
        got = vmap(lambda a, b: vjp(f, a, b)[1](f(a, b)), (in_a, in_b))(a, b)
        close(got, torch.func.vmap(lambda a, b: torch.func.vjp(f, a, b)[1](f(a, b)), (in_a, in_b))(a, b))


@pytest.mark.parametrize(
    "f", [lambda s: (0.3 * s).sin(), lambda s: 0.3 * s, lambda s: s * s + 1], ids=["sine", "multiple", "square"]
)
def test_a_captured_tangent_without_dimensions(f: Callable[[Tensor], Tensor]) -> None:
    """Of a program's results, the tangent depends on it alone, and has its shape and not that of the batch."""
    x, slope = double(3), lambda s: jvp(f, (s,), (SCALE,))[1]
    for around in (vmap(slope), lambda x: vmap(vmap(slope))(x[:, None])[:, 0], lambda x: vmap(slope)(x) * 2):
        loop = lambda x, around=around: torch.stack([around(s[None])[0] for s in x])
        close(jvp(around, (x,), (x,)), jvp(loop, (x,), (x,)))
        close(vmap(lambda x, around=around: jvp(around, (x,), (x,)))(x[None])[1], jvp(loop, (x,), (x,))[1][None])
        close(vjp(around, x)[1](x)[0], vjp(loop, x)[1](x)[0])


def test_results_that_are_the_same_for_every_example_are_not_batched() -> None:
    seen = []

    def f(t: Tensor) -> Tensor:
        x = torch.ones(2, dtype=DOUBLE)
        out, tangent = jvp(lambda x: x.sin() * x, (x,), (t,))
        seen.append((out.bdim, tangent.bdim))
        return tangent

    vmap(f)(double(3, 2))
    assert seen == [(None, 0)]


def test_batch_dimensions_in_different_places() -> None:
    x, y = double(4, 3, 2), double(2, 4, 3, seed=1)
    got = vmap(lambda x, y: torch.sin(x) * y + x, in_dims=(2, 0), out_dims=1)(x, y)
    close(got, torch.stack([torch.sin(x[..., i]) * y[i] + x[..., i] for i in range(2)], 1))


# --- where programs must not be used ----------------------------------------------------------------------------------


def test_replaced_derivatives_count_at_once() -> None:
    x = torch.tensor(0.3, dtype=DOUBLE)
    close(grad(torch.sin)(x), x.cos())
    with overriding(DERIVATIVES, aten.sin.default):
        derivative(aten.sin.default, tangent="elementwise", self=lambda grad: grad * 7)
        close(grad(torch.sin)(x), torch.tensor(7.0, dtype=DOUBLE))
        close(jvp(lambda x: 2 * x.sin(), (x,), (x,))[1], 14 * x)
    close(grad(torch.sin)(x), x.cos())
    with overriding(DERIVATIVES, aten.cos.default):  # sin's own derivative is made of cos
        derivative(aten.cos.default, tangent="elementwise", self=lambda grad: grad * 5)
        close(grad(grad(torch.sin))(x), torch.tensor(5.0, dtype=DOUBLE))
    close(grad(grad(torch.sin))(x), -x.sin())


def test_replaced_batching_rules_count_at_once() -> None:
    calls = []
    with overriding(BATCHING_RULES, aten.sin.default):

        @BATCHING_RULES.register(aten.sin.default)
        def sin(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
            calls.append(in_dims)
            return x.sin(), in_dims[0]

        close(vmap(torch.sin)(double(3)), double(3).sin())
    assert calls == [[0]]
    vmap(torch.sin)(double(3))
    assert len(calls) == 1


def test_a_program_is_an_operator() -> None:
    sin = operator_program(aten.sin.default)
    assert sin is not None
    known, x = op_info(sin), double(3)
    assert known.program and known.composite and not known.random and op_info(aten.sin.default).program is False
    for run in (known.direct, sin.decompose, sin, lambda x: dispatch(sin, (x,), {}), lambda x: base(sin, (x,), {})):
        close(run(x), x.sin())
    leaf = x.clone().requires_grad_()
    close(torch.autograd.grad(base(sin, (leaf,), {}).sum(), leaf)[0], x.cos())
    # one level down nobody but programs sees its results, which need not be tensors
    assert sin.inner.inner is sin.inner and sin.inner.pending and not sin.pending and str(sin.inner) == str(sin)


class Passing(Interpreter):
    """An interpreter with one method to write: it sends everything down, and notes what."""

    kind = "passing"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def process(self, op: Any, args: Any, kwargs: Any) -> Any:
        self.seen.append(str(op))
        values = [a.value if getattr(a, "interpreter", None) is self else a for a in args]
        return map_tensors(self.constant, lower(self, op, values, kwargs))

    def constant(self, value: Tensor) -> Any:
        return wrap(self, value)

    def is_constant(self, wrapper: Any) -> bool:
        return False


def test_an_interpreter_with_a_process_alone_gets_operators_one_by_one() -> None:
    x = double(3)

    def slopes(x: Tensor) -> Tensor:
        interpreter = Passing()
        inside = interpreter.constant(x)
        slope = grad(lambda x: (torch.tanh(x) * x).sum())
        out = run_transformed(interpreter, lambda: jvp(slope, (inside,), (inside,))[1])
        assert all(name.startswith("aten.") for name in interpreter.seen) and "aten.tanh.default" in interpreter.seen
        return out.value

    expected = torch.func.jvp(torch.func.grad(lambda x: (torch.tanh(x) * x).sum()), (x,), (x,))[1]
    close(slopes(x), expected)
    close(vmap(slopes)(torch.stack([x, x]))[1], expected)


class Counting(VmapInterpreter):
    """A vmap that knows which operators it has seen."""

    def __init__(self, size: int) -> None:
        super().__init__(size, "error")
        self.seen: list[str] = []

    def process(self, op: Any, args: Any, kwargs: Any) -> Any:
        self.seen.append(str(op))
        return super().process(op, args, kwargs)


def test_an_interpreter_of_ones_own_sees_every_operator() -> None:
    interpreter = Counting(3)
    x = interpreter.batched(double(3), 0)
    out = run_transformed(interpreter, lambda: grad(lambda x: torch.sin(x) * x)(x))
    close(out.value, double(3).sin() + double(3) * double(3).cos())
    assert interpreter.seen.count("aten.sin.default") == 1 and interpreter.seen.count("aten.cos.default") == 1


class Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_function_modes_see_functions_and_operators_but_no_tracing() -> None:
    def f(x: Tensor) -> Tensor:
        with Watch() as watch:
            out = torch.erfc(x) * x - 1
        seen.append([re.sub(r"__r?", "", name).strip("_") for name in watch.seen])
        return out

    seen: list[list[str]] = []
    x = double(2)
    derivative_of = grad(lambda x: f(x).sum())
    close(derivative_of(x), torch.func.grad(lambda x: f(x).sum())(x))
    assert seen[0] == seen[1] == ["erfc", "mul", "sub"]


def test_dispatch_modes_inside_see_operators_first_and_outside_what_runs() -> None:
    def f(x: Tensor) -> Tensor:
        with noted() as inside:
            out = torch.sin(x) * x
        assert [str(call.op) for call in inside] == ["aten.sin.default", "aten.mul.Tensor"]
        return out

    x = double(3)
    with noted() as outside:
        got = vmap(f)(x)
    seen = [str(call.op) for call in outside]
    assert seen.count("aten.sin.default") == seen.count("aten.mul.Tensor") == 1
    close(got, x.sin() * x)


def test_autocast_has_its_say() -> None:
    x = torch.rand(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vmap(lambda x: x.unsqueeze(0) @ x.unsqueeze(1))(x).dtype is torch.bfloat16
        assert grad(lambda x: (x @ x).float().sum())(x).dtype is torch.float32


@pytest.mark.parametrize(
    "pair",
    [
        (torch.float32, torch.float64), (torch.float64, torch.int64), (torch.complex64, torch.float32),
        (torch.float16, torch.float32), (torch.bool, torch.float32), (torch.bfloat16, torch.float16),
    ],
)  # fmt: skip
def test_mixed_dtypes_promote(pair: tuple[torch.dtype, torch.dtype]) -> None:
    x, y = ((torch.rand(2, 3) * 4).to(dtype) for dtype in pair)
    for f in (lambda x, y: x * y + y, lambda x, y: y / (x + 1), lambda x, y: (x + y) * 2):
        for in_dims in ((0, 0), (0, None), (None, 0)):
            a = x if in_dims[0] == 0 else x[0]
            b = y if in_dims[1] == 0 else y[0]
            got, expected = vmap(f, in_dims)(a, b), torch.func.vmap(f, in_dims)(a, b)
            assert got.dtype is expected.dtype
            torch.testing.assert_close(got, expected)


def test_the_switch_of_forward_mode_is_lowered_with_the_operator() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            return jvp(lambda y: y.sin() * torch.stack([y, y]).sum(), (x,), (torch.ones((), dtype=DOUBLE),))

    x = torch.tensor(0.5, dtype=DOUBLE)
    _, tangents = jvp(f, (x,), (x,))
    close(tangents, (torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)))


def test_views_are_brought_up_to_date_first() -> None:
    def f(x: Tensor, c: Tensor) -> Tensor:
        x = x.clone()
        view = x.view(-1)
        x.mul_(c)
        return (view * view + torch.sin(view)).sum()

    x, c = double(2, 2), double(2, 2, seed=1)
    close(grad(f)(x, c), c * (2 * x * c + (x * c).cos()))


def test_tensors_of_ended_transforms_are_refused_with_their_line() -> None:
    kept = []

    def f(x: Tensor) -> Tensor:
        kept.append(x * 2)  # made here
        return x.sum()

    vmap(f)(double(3, 2))
    line = f.__code__.co_firstlineno + 1
    for use in (
        lambda x: x * 1.0,
        lambda x: double(2) * x,
        torch.sin,
        lambda x: x**2,
        lambda x: 1 / x,
        lambda x: x @ double(2),
    ):
        with pytest.raises(DeadWrapperError, match=f"test_programs.py.*{line}"):
            use(kept[0])


# --- the wrapper's own metadata ---------------------------------------------------------------------------------------


def metadata() -> Iterator[Callable[[Tensor], Any]]:
    yield lambda x: (x.shape, x.dtype, x.layout, x.ndim, x.dim(), x.size(), x.size(0), x.size(-1), x.numel(), len(x))
    yield lambda x: (x.is_complex(), x.is_floating_point(), x.stride(), x.is_contiguous(), str(x.device))
    yield lambda x: (x.T.shape, x.T.stride(), x.t().is_contiguous(), x[:, ::2].stride(), x.unsqueeze_(0).shape)


def test_metadata_is_that_of_an_example() -> None:
    for read in metadata():
        found: list[Any] = []

        def f(x: Tensor, read: Callable[[Tensor], Any] = read, found: list[Any] = found) -> Tensor:
            x = x.clone()
            found.append(read(x))
            return x.sum()

        x = double(4, 3, 5)
        vmap(f)(x)
        vmap(grad(f))(x)
        assert found[0] == found[1] == read(x[0].clone())
    with pytest.raises(IndexError, match="Dimension out of range"):
        vmap(lambda x: x.size(3))(double(2, 2))
    with pytest.raises(TypeError):
        vmap(lambda x: len(x))(double(2))


class Units(Tensor):
    """Somebody else's tensor subclass, which takes part in every function by default."""


class Loud(Tensor):
    """One that answers for itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "loud"


def test_other_tensor_subclasses_have_their_say() -> None:
    plain = double(3)
    loud = plain.as_subclass(Loud)
    heard = []

    def f(x: Tensor) -> Tensor:
        heard.extend([x * loud, loud * x, torch.add(x, loud), x.matmul(loud), torch.logaddexp(loud, x)])
        return (x * plain).sum()

    grad(f)(double(3, seed=1))
    assert heard == ["loud"] * 5
    units = plain.as_subclass(Units)
    for product in (
        lambda x: x * units,
        lambda x: units * x,
        lambda x: torch.mul(units, x),
        lambda x: torch.logaddexp(x, units),
    ):
        expected = torch.func.grad(lambda x, product=product: product(x).as_subclass(Tensor).sum())(double(3, seed=1))
        close(grad(lambda x, product=product: product(x).sum())(double(3, seed=1)), expected.as_subclass(Tensor))


@pytest.mark.parametrize("exponent", [0, 1, 2, -3, 0.5, 2.5, 1.1, 17, -9.25, float("inf"), float("nan")])
def test_powers(exponent: float) -> None:
    x = double(3)
    for power in (lambda x: x**exponent, lambda x: torch.pow(x, exponent)):
        torch.testing.assert_close(vmap(power)(x), x**exponent, equal_nan=True)
        got, expected = (api.vmap(api.grad(power))(x) for api in (__import__("functrans"), torch.func))
        torch.testing.assert_close(got, expected, equal_nan=True)


MATRIX, VECTOR, BIAS = double(4, 3, seed=8), double(3, seed=9), double(4, seed=10)
LAYERED: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": lambda x: torch.tanh(x.sin()) * 2,
    "matrix times vector": lambda x: MATRIX @ x.sin(),
    "mv": lambda x: torch.tanh(torch.mv(MATRIX, x) + 1),
    "vector times matrix": lambda x: (x.exp() @ MATRIX.t()).cos(),
    "linear": lambda x: torch.nn.functional.linear(x, MATRIX, BIAS).sigmoid(),
    "two layers": lambda x: MATRIX @ torch.tanh(MATRIX.t() @ torch.sin(MATRIX @ x)),
    "used twice": lambda x: (MATRIX @ x) * x.sum(),
    "dead code after": lambda x: [MATRIX @ x, (x * 2).sum()][0],
    "a write": lambda x: (MATRIX @ x).mul_(x[0]),
    "not the last": lambda x: torch.cumsum(MATRIX @ x, 0),
    "no step at all": lambda x: x,
    "constant": lambda x: VECTOR.clone(),
    "matrix tracked, too": lambda x: torch.outer(x, x) @ x,
    "batched product": lambda x: (MATRIX.expand(2, 4, 3) @ x).flatten(),
    "ones": lambda x: torch.relu(x - 0.4),
}


@pytest.mark.parametrize("name", LAYERED)
def test_jacobians_do_not_multiply_out_the_identity(name: str) -> None:
    f, x = LAYERED[name], double(3, seed=3)
    for chunk_size in (None, 1, 2):
        close(jacrev(f, chunk_size=chunk_size)(x), torch.func.jacrev(f)(x))
    batch = torch.stack([x, x * 0.5])
    close(vmap(jacrev(f))(batch), torch.func.vmap(torch.func.jacrev(f))(batch))
    close(jacrev(jacrev(f))(x), torch.func.jacrev(torch.func.jacrev(f))(x))
    close(hessian(f)(x), torch.func.hessian(f)(x))
    close(jvp(jacrev(f), (x,), (x,)), torch.func.jvp(torch.func.jacrev(f), (x,), (x,)))
    leaf = x.clone().requires_grad_()
    total = jacrev(f)(leaf).sin().sum()
    assert total.requires_grad == torch.func.jacrev(f)(leaf).requires_grad
    if total.requires_grad:
        total.backward()
        close(leaf.grad, torch.func.grad(lambda x: torch.func.jacrev(f)(x).sin().sum())(x))


def test_a_replaced_derivative_of_a_product_counts_in_jacobians() -> None:
    x = double(3)
    with overriding(DERIVATIVES, aten.mv.default):
        derivative(
            aten.mv.default, self=lambda grad, vec: torch.outer(grad, vec), vec=lambda grad, self: 5 * self.t().mv(grad)
        )
        close(jacrev(lambda x: torch.mv(MATRIX, x))(x), 5 * MATRIX)
    close(jacrev(lambda x: torch.mv(MATRIX, x))(x), MATRIX)


def test_hooks_see_the_cotangents_of_jacobians() -> None:
    def f(x: Tensor) -> Tensor:
        y = MATRIX @ x
        y.register_hook(lambda c: c * 3)
        return y.sin()

    x = double(3)
    close(jacrev(f)(x), 3 * (MATRIX @ x).cos()[:, None] * MATRIX)


# --- batches of different ranks ---------------------------------------------------------------------------------------

#: Of the examples: shapes that broadcast, and where the batch of each is (None: it has none).
RANKS = [
    (shapes, dims)
    for shapes in (((), (3,)), ((3,), (2, 3)), ((2, 3), (3,)), ((1, 3), (2, 1)), ((3,), (4, 2, 3)), ((2, 3), (2, 3)))
    for dims in ((0, 0), (0, None), (None, 0), (-1, 0), (0, -1), (1, None), (-1, -1))
    if all(d is None or d != 1 or len(s) for s, d in zip(shapes, dims, strict=True))
]


@pytest.mark.parametrize(("shapes", "dims"), RANKS, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_batches_of_different_ranks(shapes: Any, dims: Any, contiguous: bool) -> None:
    """What is found of a placement once holds for every call that looks alike, and for no other."""

    def batch(shape: tuple[int, ...], dim: int | None, seed: int) -> Tensor:
        if dim is None:
            return double(*shape, seed=seed)
        x = double(5, *shape, seed=seed)
        return x.movedim(0, dim).contiguous() if contiguous else x.movedim(0, dim)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return (x.sin() * y + y.exp()).tanh() * x - y

    def examples(x: Tensor, dim: int | None) -> list[Tensor]:
        return [x] * 5 if dim is None else list(x.unbind(dim))

    def forward(x: Tensor, y: Tensor) -> Any:
        return jvp(f, (x, y), (x.cos(), y * y))

    def backward(x: Tensor, y: Tensor) -> Any:
        return grad(lambda x, y: f(x, y).sin().sum(), argnums=(0, 1))(x, y)

    for seed in (0, 7):  # the second time by what was found
        x, y = batch(shapes[0], dims[0], seed), batch(shapes[1], dims[1], seed + 1)
        pairs = list(zip(examples(x, dims[0]), examples(y, dims[1]), strict=True))
        for g in (f, forward, backward, lambda x, y: jvp(lambda x: backward(x, y), (x,), (x + 1,))[1]):
            by_loop = [g(*pair) for pair in pairs]
            expected = (
                torch.stack(by_loop)
                if isinstance(by_loop[0], Tensor)
                else tuple(torch.stack(parts) for parts in zip(*by_loop, strict=True))
            )
            close(vmap(g, in_dims=dims)(x, y), expected)
            rows = [vmap(g, in_dims=dims)(x * c, y) for c in SCALES]
            stacked = torch.stack(rows) if isinstance(rows[0], Tensor) else tuple(map(torch.stack, zip(*rows)))
            close(vmap(lambda c, g=g: vmap(g, in_dims=dims)(x * c, y))(SCALES), stacked)  # noqa: B023


SCALES = torch.tensor([0.5, -1.0, 2.0], dtype=DOUBLE)
