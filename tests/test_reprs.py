"""What things look like when they are printed."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import torch
from expecttest import assert_expected_inline
from identity_functions import Twice
from torch import Tensor

import functrans.door.autograd_function
from functrans import grad, jvp, vmap
from functrans.core.tensor import PendingWrapper
from functrans.derivatives.table import DERIVATIVES
from functrans.extend import RuleTable, TableInterpreter, interpreter_stack, run_transformed
from functrans.operators.info import op_info

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def printed(transformed: Any, *args: Any) -> str:
    """What is printed of the argument of the function that ``transformed`` makes of one."""
    seen: list[str] = []

    def look(x: Tensor) -> Tensor:
        seen.append(repr(x))
        return x.sum()

    transformed(look)(*args)
    return seen[0]


def test_a_tangent_of_several_rows() -> None:
    assert_expected_inline(
        printed(lambda f: lambda x: jvp(f, (x,), (2 * x,)), X),
        """\
WrapperTensor(jvp level 1, float32[2, 2]
  value=tensor([[1., 2.],
                [3., 4.]])
  tangent=tensor([[2., 4.],
                  [6., 8.]]))""",
    )


def test_tangents_in_other_levels() -> None:
    assert_expected_inline(
        printed(lambda f: vmap(grad(lambda x: jvp(f, (x,), (x.sin(),))[1])), torch.stack([X, -X]).double()),
        """\
WrapperTensor(jvp level 3, float64[2, 2]
  value=WrapperTensor(grad level 2, float64[2, 2], tracked, tape_index=1
    value=WrapperTensor(vmap level 1, float64[2, 2], bdim=0
      value=tensor([[[ 1.,  2.],
                     [ 3.,  4.]],

                    [[-1., -2.],
                     [-3., -4.]]], dtype=torch.float64)))
  tangent=WrapperTensor(grad level 2, float64[2, 2], tracked, tape_index=2
    value=WrapperTensor(vmap level 1, float64[2, 2], bdim=0
      value=tensor([[[ 0.8415,  0.9093],
                     [ 0.1411, -0.7568]],

                    [[-0.8415, -0.9093],
                     [-0.1411,  0.7568]]], dtype=torch.float64))))""",
    )
    assert_expected_inline(
        printed(lambda f: lambda x: jvp(lambda y: jvp(f, (y,), (y,))[1], (x,), (x,)), X),
        """\
WrapperTensor(jvp level 2, float32[2, 2]
  value=WrapperTensor(jvp level 1, float32[2, 2]
    value=tensor([[1., 2.],
                  [3., 4.]])
    tangent=tensor([[1., 2.],
                    [3., 4.]]))
  tangent=WrapperTensor(jvp level 1, float32[2, 2]
    value=tensor([[1., 2.],
                  [3., 4.]])
    tangent=tensor([[1., 2.],
                    [3., 4.]])))""",
    )


def test_batches() -> None:
    assert_expected_inline(printed(lambda f: vmap(f, in_dims=1), X), """\
WrapperTensor(vmap level 1, float32[2], bdim=1
  value=tensor([[1., 2.],
                [3., 4.]]))""")
    assert_expected_inline(printed(lambda f: vmap(vmap(f)), X.bool()), """\
WrapperTensor(vmap level 2, bool[], bdim=0
  value=WrapperTensor(vmap level 1, bool[2], bdim=0
    value=tensor([[True, True],
                  [True, True]])))""")


def test_constants() -> None:
    seen: list[str] = []

    def look(x: Tensor) -> Tensor:
        seen.append(repr(torch.zeros(2, dtype=torch.int64)))
        return x.sum()

    grad(look)(X)
    vmap(look)(X)
    jvp(look, (X,), (X,))
    assert_expected_inline("\n".join(seen), """\
WrapperTensor(grad level 1, int64[2], constant
  value=tensor([0, 0]))
WrapperTensor(vmap level 1, int64[2], bdim=None
  value=tensor([0, 0]))
WrapperTensor(jvp level 1, int64[2], constant
  value=tensor([0, 0]))""")


def test_wrappers_of_ended_transforms() -> None:
    kept: list[Tensor] = []
    vmap(grad(lambda x: (kept.append(x[0]), x.sum())[1]))(X)
    assert_expected_inline(repr(kept[0]), """\
WrapperTensor(grad level 2, ended, float32[], tracked, tape_index=2
  value=WrapperTensor(vmap level 1, ended, float32[], bdim=0
    value=tensor([1., 3.])))""")


class Taylor(TableInterpreter):
    kind = "taylor"
    payload = ("first", "rest")
    rules = RuleTable("taylor rules")


def test_what_a_transform_of_ones_own_carries() -> None:
    taylor = Taylor(None)
    x = taylor.carry(X, first=2 * X, rest=[1, "two"])
    assert_expected_inline(run_transformed(taylor, lambda: f"{x!r}\n{taylor.constant(X[0])!r}\n{taylor!r}"), """\
WrapperTensor(taylor level 1, float32[2, 2]
  value=tensor([[1., 2.],
                [3., 4.]])
  first=tensor([[2., 4.],
                [6., 8.]])
  rest=[1, 'two'])
WrapperTensor(taylor level 1, float32[2], constant
  value=tensor([1., 2.]))
<Taylor taylor(NoneType), level 1>""")
    assert repr(taylor) == "<Taylor taylor(NoneType), level 1, ended>"
    assert repr(Taylor.rules) == "<RuleTable 'taylor rules', 0 rules>"


def test_interpreters() -> None:
    seen: list[str] = []

    def look(x: Tensor) -> Tensor:
        y = x.sin()
        seen.extend(map(repr, interpreter_stack()))
        return y.sum()

    vmap(grad(lambda x: jvp(look, (x,), (x,))[1]), randomness="same")(X)
    assert_expected_inline("\n".join(seen), """\
<JvpInterpreter jvp(look), level 3>
<GradInterpreter grad(<lambda>), level 2, a tape of 1>
<VmapInterpreter vmap(<lambda>), level 1, batch_size=2, randomness='same'>""")


def test_the_tape_its_records_and_plans() -> None:
    seen: list[str] = []

    def look(x: Tensor) -> Tensor:
        y = Twice.apply(x.sin() @ x)
        z = torch.linalg.householder_product(y, torch.ones(2))
        values, _ = z[0].max(0)
        (tape,) = interpreter_stack()
        seen.append(tape.describe_tape())
        seen.extend(repr(record[0]) for record in tape.tape)
        seen.append(repr(tape.tape[0]))
        seen.append(repr(z[0].view_link))
        return values

    assert functrans.door.autograd_function is not None
    grad(look)(X)
    assert_expected_inline(
        "\n".join(seen),
        """\
2 = aten.sin.default(1), saved [float32[2, 2]]
3 = aten.matmul.default(2, 1), saved [float32[2, 2], float32[2, 2], None, None]
[4] = Twice.apply(3), saved <call of Twice>
[5] = aten.linalg_householder_product.default(4), saved [aten.linalg_householder_product.default, <PyTorch's pullback, of inputs [float32[2, 2], float32[2]]>]
6 = aten.select.int(5), saved [float32[2, 2], 0, 0]
[7, None] = aten.max.dim(6), saved [float32[2], 0, False, [float32[], int64[]]]
<ProgramNode of aten.sin.default for input 0>
<TableNode of aten.matmul.default for self, other>
<FunctionNode of an autograd.Function>
<BorrowedNode of an operator by PyTorch's derivative>
<TableNode of aten.select.int for self>
<TableNode of aten.max.dim for self>
(<ProgramNode of aten.sin.default for input 0>, 2, [1], [tensor([[1., 2.],
        [3., 4.]])])
<ViewLink aten.select.int(..., 0, 0)>""",  # noqa: E501
    )


def test_pending_wrappers_stay_pending() -> None:
    found: list[Any] = []

    def look(x: Tensor) -> Tensor:
        found.append(x.sin())
        assert type(found[0]._value) is PendingWrapper
        found.append(repr(found[0]))
        found.append(repr(found[0]._value))
        assert type(found[0]._value) is PendingWrapper
        return x

    vmap(lambda x: jvp(look, (x,), (x,))[0])(X)
    assert_expected_inline("\n".join(found[1:]), """\
WrapperTensor(jvp level 2, float32[2]
  value=WrapperTensor(vmap level 1, float32[2], bdim=0
    value=tensor([[ 0.8415,  0.9093],
                  [ 0.1411, -0.7568]]))
  tangent=WrapperTensor(vmap level 1, float32[2], bdim=0
    value=tensor([[ 0.5403, -0.8323],
                  [-2.9700, -2.6146]])))
PendingWrapper(vmap level 1, float32[2], bdim=0
  value=tensor([[ 0.8415,  0.9093],
                [ 0.1411, -0.7568]]))""")


def test_entries_of_the_tables() -> None:
    assert re.fullmatch(r"<RuleTable 'derivative table', \d+ rules>", repr(DERIVATIVES))
    mul, mm = torch.ops.aten.mul.Tensor, torch.ops.aten.mm.default
    assert_expected_inline(f"{DERIVATIVES.get(mul)}\n{DERIVATIVES.get(mm)}\n{op_info(mul)}", """\
<Derivative of aten.mul.Tensor: self(grad, other), other(grad, self), tangent elementwise>
<Derivative of aten.mm.default: self(grad, mat2), mat2(grad, self), tangent multilinear>
<OpInfo of aten.mul.Tensor>""")


def test_layers_that_fold_in_treescope(monkeypatch: Any) -> None:
    """What treescope, which is a package of its own, is told of a wrapper."""

    def constructor(object_type: type, attributes: dict[str, Any], path: Any, subtree_renderer: Any) -> Any:
        below = {name: subtree_renderer(v) for name, v in attributes.items()}
        return f"{object_type.__name__}({', '.join(f'{name}={text}' for name, text in below.items())})"

    def render(x: Any) -> Any:
        return x.__treescope_repr__(None, render) if hasattr(x, "__treescope_repr__") else repr(x)

    stand_in: Any = types.ModuleType("treescope")
    stand_in.repr_lib = types.SimpleNamespace(render_object_constructor=constructor)
    monkeypatch.setitem(sys.modules, "treescope", stand_in)
    shown: list[str] = []

    def look(x: Tensor) -> Tensor:
        shown.append(render(x.sin()))
        return x.sum()

    vmap(lambda x: jvp(look, (x,), (x,))[1])(X)
    (text,) = shown
    vmapped = "interpreter=<VmapInterpreter vmap(<lambda>), level 1, batch_size=2, randomness='error'>"
    inside = f"{vmapped}, dtype=torch.float32, shape=(2,), bdim=0, value=tensor([["
    assert text.startswith("WrapperTensor(interpreter=<JvpInterpreter jvp(look), level 2>, dtype=torch.float32, ")
    assert text.count(inside) == 2 and "tangent=PendingWrapper(" in text and "0.1411, -0.7568]])" in text
