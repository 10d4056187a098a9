"""What an exception says that was raised where an operator is interpreted: mistakes in rules,
and what PyTorch finds wrong with shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from identity_functions import identity
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functrans import FunctransError, functional_call, grad, jvp, vjp, vmap
from functrans.errors import RuleError
from functrans.extend import (
    BATCHING_RULES,
    DERIVATIVES,
    Interpreter,
    RuleTable,
    TableInterpreter,
    batching_rule,
    derivative,
    interpreter_stack,
    overriding,
    run_transformed,
    wrap,
)
from functrans.operators.info import op_info

aten = torch.ops.aten
X = torch.tensor([0.3, -0.7, 1.1])


class FailingInterpreter(TableInterpreter):
    kind = "failing"
    payload = ("mark",)
    rules = RuleTable("failing rules")


RAISED: list[Exception] = []


def failing(interpreter: Any, *args: Any, **kwargs: Any) -> Any:
    raise RAISED[0]


#: Operators as users write them, and what is called.
SPELLINGS: list[tuple[Any, Callable[[Any], Any]]] = [
    (aten.add.Tensor, lambda x: x + x),
    (aten.add.Tensor, lambda x: 1 + x),
    (aten.add.Tensor, lambda x: x.__radd__(1.0)),
    (aten.mul.Tensor, lambda x: x * x),
    (aten.mul.Tensor, lambda x: X * x),
    (aten.sub.Tensor, lambda x: x - x),
    (aten.rsub.Scalar, lambda x: 1 - x),
    (aten.div.Tensor, lambda x: x / 2),
    (aten.reciprocal.default, lambda x: 1 / x),
    (aten.pow.Tensor_Scalar, lambda x: x**2),
    (aten.pow.Tensor_Scalar, lambda x: x**2.5),
    (aten.pow.Tensor_Tensor, lambda x: x**x),
    (aten.pow.Scalar, lambda x: 2**x),
    (aten.floor_divide.default, lambda x: x // 2),
    (aten.remainder.Scalar, lambda x: x % 2),
    (aten.remainder.Tensor, lambda x: x % x),
    (aten.remainder.Scalar_Tensor, lambda x: 7 % x),
    (aten.matmul.default, lambda x: x @ x),
    (aten.matmul.default, lambda x: X @ x),
    (aten.lt.Scalar, lambda x: x < 1),
    (aten.eq.Tensor, lambda x: x == x),  # noqa: PLR0124
    (aten.neg.default, lambda x: -x),
    (aten.abs.default, lambda x: abs(x)),
    (aten.mul.Tensor, lambda x: x.mul(x)),
    (aten.sin.default, lambda x: torch.sin(x)),
    (aten.add.Tensor, lambda x: x.add_(1)),
    (aten.mul.Tensor, lambda x: x.__imul__(2)),
    (aten.pow.Tensor_Scalar, lambda x: x.__ipow__(2)),
]


def marked(f: Callable[..., Any], *xs: Tensor) -> Any:
    interpreter = FailingInterpreter(f)
    return run_transformed(interpreter, lambda: f(*[interpreter.carry(x, mark=1) for x in xs]))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    assert interpreter_stack() == []


@pytest.mark.parametrize(
    "kind",
    [
        TypeError,
        NotImplementedError,
        AttributeError,
        KeyError,
        ValueError,
        RuntimeError,
        AssertionError,
        ZeroDivisionError,
        IndexError,
    ],
)
@pytest.mark.parametrize(("op", "call"), SPELLINGS)
def test_a_mistake_in_a_rule_is_one_error(op: Any, call: Callable[..., Any], kind: type[Exception]) -> None:
    error = kind("inside")
    RAISED[:] = [error]
    FailingInterpreter.rules.add(op, failing)
    try:
        with pytest.raises(RuleError) as info:
            vmap(lambda x: marked(call, x))(torch.stack([X, 2 * X]))
    finally:
        FailingInterpreter.rules.remove(op)
    assert info.value.__cause__ is error
    message = str(info.value)
    for part in (
        str(op),
        "failing(<lambda>) at level 2",
        kind.__name__,
        "inside",
        "float32[3]",
        f"{__file__}:{failing.__code__.co_firstlineno + 1}, in failing",
    ):
        assert part in message
    assert f"operator called at: {__file__}:{call.__code__.co_firstlineno}, in <lambda>" in message


class Mine(Exception):
    """An exception of the user's."""


@pytest.mark.parametrize(
    "error", [Mine("mine"), KeyboardInterrupt(), SystemExit(), FunctransError("ours"), UserWarning("w")], ids=repr
)
def test_what_is_no_mistake_passes_as_it_is(error: BaseException) -> None:
    RAISED[:] = [error]  # type: ignore[list-item]
    FailingInterpreter.rules.add(aten.add.Tensor, failing)
    try:
        with pytest.raises(type(error)) as info:
            marked(lambda x: x + x, X)
    finally:
        FailingInterpreter.rules.remove(aten.add.Tensor)
    assert info.value is error


def test_operands_that_python_does_not_know_stay_pythons_error() -> None:
    for call in (lambda x: x + "a", lambda x: x * object(), lambda x: x**"a", lambda x: [1] - x):
        for transformed in (lambda f: grad(f)(X), lambda f: vmap(f)(X), lambda f: jvp(f, (X,), (X,))):
            with pytest.raises(TypeError):
                transformed(call)


def text(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    found = "\n".join([f"{type(error).__name__}: {error}", *notes])
    found = re.sub(r": (?:add)?mm: mat1", ": mat1", found)  # from PyTorch 2.15 on
    return re.sub(r"\S*(test_rule_errors.py):\d+", r"\1:N", found)


def test_texts_of_rules() -> None:
    found = []
    RAISED[:] = [TypeError("the operands do not fit")]
    FailingInterpreter.rules.add(aten.add.Tensor, failing)
    with pytest.raises(RuleError) as info:
        vmap(lambda x: marked(lambda x: x + 1, x))(torch.stack([X, X]))
    found.append(text(info.value))
    FailingInterpreter.rules.remove(aten.add.Tensor)

    @torch.library.custom_op("rule_errors::cube", mutates_args=())
    def cube(x: Tensor) -> Tensor:
        return x**3

    op = torch.ops.rule_errors.cube.default
    derivative(op, x=lambda grad, x: grad * x.no_such_thing, tangent="elementwise")

    @batching_rule(op)
    def batched(info: Any, in_dims: Any, x: Tensor) -> Any:
        return undefined_name(x), in_dims  # noqa: F821

    for call in (
        lambda: vmap(cube)(torch.stack([X, X])),
        lambda: jvp(cube, (X,), (X,)),
        lambda: grad(lambda x: cube(x).sum())(X),
        lambda: grad(lambda x: vjp(cube, x)[1](x)[0].sum())(X),
    ):
        with pytest.raises(RuleError) as info:
            call()
        found.append(text(info.value))
    DERIVATIVES.remove(op)
    BATCHING_RULES.remove(op)
    assert_expected_inline(
        "\n\n".join(found),
        """\
RuleError: the rule for aten.add.Tensor of failing(<lambda>) at level 2 raised TypeError: the operands do not fit
  called with: float32[3], 1
  registered at: test_rule_errors.py:N
  failed at: test_rule_errors.py:N, in failing
  operator called at: test_rule_errors.py:N, in <lambda>

RuleError: the rule for rule_errors.cube.default of vmap(CustomOpDef) at level 1 raised NameError: name 'undefined_name' is not defined
  called with: float32[3]
  registered at: test_rule_errors.py:N
  failed at: test_rule_errors.py:N, in batched
  operator called at: test_rule_errors.py:N, in <lambda>

RuleError: the rule for rule_errors.cube.default of jvp(CustomOpDef) at level 1 raised AttributeError: 'Tensor' object has no attribute 'no_such_thing'
  called with: float32[3]
  registered at: test_rule_errors.py:N
  failed at: test_rule_errors.py:N, in <lambda>
  operator called at: test_rule_errors.py:N, in <lambda>

RuleError: the derivative of rule_errors.cube.default of grad(<lambda>) at level 1 raised AttributeError: 'Tensor' object has no attribute 'no_such_thing'
  called with: cotangent float32[3]
  registered at: test_rule_errors.py:N
  failed at: test_rule_errors.py:N, in <lambda>

RuleError: the derivative of rule_errors.cube.default of grad(CustomOpDef) at level 2 raised AttributeError: 'WrapperTensor' object has no attribute 'no_such_thing'
  called with: cotangent float32[3]
  registered at: test_rule_errors.py:N
  failed at: test_rule_errors.py:N, in <lambda>""",  # noqa: E501
    )


def test_a_process_of_ones_own_that_fails() -> None:
    class Broken(Interpreter):
        kind = "broken"

        def process(self, op: Any, args: Any, kwargs: Any) -> Any:
            return args["x"]

        def constant(self, value: Tensor) -> Any:
            return wrap(self, value)

        def is_constant(self, wrapper: Any) -> bool:
            return False

    broken = Broken(None)
    with pytest.raises(RuleError, match="TypeError: tuple indices"):
        run_transformed(broken, lambda: broken.constant(X) * 2)


# ---- kernels


LAYER = torch.nn.Linear(4, 4).requires_grad_(False)
A, B = torch.ones(5, 2, 3), torch.ones(5, 2, 3)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (RuntimeError, lambda: vmap(torch.mm)(A, B)),
        (RuntimeError, lambda: vmap(grad(lambda x, y: (x @ y).sum()))(A, B)),
        (RuntimeError, lambda: vmap(lambda x, y: x + y)(torch.ones(5, 2), torch.ones(5, 3))),
        (RuntimeError, lambda: grad(lambda x: (x + torch.ones(7)).sum())(X)),
        (RuntimeError, lambda: jvp(lambda x: torch.linalg.inv(x), (A[0],), (A[0],))),
        (RuntimeError, lambda: vmap(lambda x: x.view(7))(A)),
        (RuntimeError, lambda: vmap(lambda x: torch.cat([x, x[0]]))(A)),
        (IndexError, lambda: vmap(lambda x: x.sum(2))(A)),
        (IndexError, lambda: vmap(grad(lambda x: x.sum(2).sum()))(A)),
        (IndexError, lambda: grad(lambda x: x.cumsum(5).sum())(X)),
        (IndexError, lambda: vmap(lambda x: x.transpose(0, 2))(A)),
        (ValueError, lambda: grad(lambda x: torch.nn.functional.cross_entropy(x, torch.tensor([1, 2, 3])))(A[0])),
        (RuntimeError, lambda: grad(lambda x: functional_call(torch.nn.Linear(4, 4), {}, (x,)).sum())(X)),
    ],
)
def test_what_a_kernel_raises_keeps_its_type(kind: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as info:
        call()
    assert not isinstance(info.value, FunctransError)
    line = call.__code__.co_firstlineno
    notes = getattr(info.value, "__notes__", [])
    assert any(note.startswith("in ") and "level 1" in note and "float32[" in note for note in notes), notes
    assert f"called at {__file__}:{line}, in <lambda>" in notes


def test_texts_of_kernels() -> None:
    for op in (aten.matmul.default, aten.linear.default, aten.cat.default):
        op_info(
            op
        # what one example says is heard at the first call of its kind; later the kernel speaks, of the batch
        ).specialized = {}
    found = []
    for call in (
        lambda: vmap(grad(lambda x, y: (x @ y).sum()))(A, B),
        lambda: vmap(grad(lambda x, y: (x.sin() + y).sum()))(torch.ones(5, 2), torch.ones(5, 3)),
        lambda: vmap(LAYER, in_dims=1)(A),
        lambda: vmap(lambda x: torch.cat([x, x[0]], dim=1))(A),
    ):
        with pytest.raises(RuntimeError) as info:
            call()
        found.append(text(info.value))
    assert_expected_inline("\n\n".join(found), """\
RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)
in vmap(<lambda>) at level 1: aten.matmul.default of float32[2, 3], float32[2, 3]
in grad(<lambda>) at level 2: aten.matmul.default of float32[2, 3], float32[2, 3]
called at test_rule_errors.py:N, in <lambda>

RuntimeError: The size of tensor a (2) must match the size of tensor b (3) at non-singleton dimension 1
in vmap(<lambda>) at level 1: aten.add.Tensor of float32[2], float32[3]
in grad(<lambda>) at level 2: aten.add.Tensor of float32[2], float32[3]
called at test_rule_errors.py:N, in <lambda>

RuntimeError: mat1 and mat2 shapes cannot be multiplied (5x3 and 4x4)
in vmap(Linear) at level 1: aten.linear.default of float32[5, 3], float32[4, 4], float32[4]
called at test_rule_errors.py:N, in <lambda>

RuntimeError: Tensors must have same number of dimensions: got 2 and 1
in vmap(<lambda>) at level 1: aten.cat.default of [float32[2, 3], float32[3]], 1
called at test_rule_errors.py:N, in <lambda>""")


def test_an_operators_own_code_keeps_its_errors() -> None:
    @torch.library.custom_op("rule_errors::picky", mutates_args=())
    def picky(x: Tensor) -> Tensor:
        raise KeyError("picky")

    op = torch.ops.rule_errors.picky.default

    @batching_rule(op)
    def batched(info: Any, in_dims: Any, x: Tensor) -> Any:
        return picky(x), in_dims[0]

    derivative(op, x=lambda grad: grad, tangent="elementwise")
    for call in (lambda: vmap(picky)(A), lambda: grad(lambda x: picky(x).sum())(X), lambda: jvp(picky, (X,), (X,))):
        with pytest.raises(KeyError, match="picky"):
            call()
    DERIVATIVES.remove(op)
    BATCHING_RULES.remove(op)


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise KeyError("listening")


def test_what_a_mode_of_the_users_raises_is_the_users() -> None:
    def inside(x: Tensor) -> Tensor:
        with Refusing():
            return x * x

    def outside(transformed: Callable[..., Any]) -> Any:
        with Refusing():
            return transformed()

    for call in (
        lambda: grad(inside)(X),
        lambda: outside(lambda: grad(lambda x: (x * x).sum())(X)),
        lambda: outside(lambda: vmap(torch.cumsum, in_dims=(0, None))(A, 0)),
        lambda: outside(lambda: jvp(torch.sigmoid, (X,), (X,))),
    ):
        with pytest.raises(KeyError, match="listening"):
            call()


def test_errors_of_custom_functions_are_the_users() -> None:
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("mine")

    function = identity(backward=backward)
    with pytest.raises(KeyError, match="mine") as info:
        grad(lambda x: function.apply(x).sum())(X)
    assert_expected_inline(text(info.value), """\
KeyError: 'mine'
in the derivative of Identity.apply of grad(<lambda>) at level 1, on cotangent float32[3], by the rule at test_rule_errors.py:N""")  # noqa: E501


def test_an_error_on_the_way_back_names_the_operator() -> None:
    op = aten.sin.default
    with overriding(DERIVATIVES, op):
        derivative(op, self=lambda grad, self: grad @ torch.ones(7, 7), tangent="elementwise")
        with pytest.raises(RuntimeError, match="cannot be multiplied") as info:
            vmap(grad(lambda x: x.sin().sum()))(torch.stack([X, X]))
    assert not isinstance(info.value, RuleError)
    assert_expected_inline(text(info.value), """\
RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 7x7)
in vmap(<lambda>) at level 1: aten.matmul.default of float32[3], float32[7, 7]
called at test_rule_errors.py:N, in <lambda>
in the derivative of aten.sin.default of grad(<lambda>) at level 2, on cotangent float32[3], by the rule at test_rule_errors.py:N""")  # noqa: E501
