"""Wrappers that show another dtype or shape than their value: integers with a scale, two factors of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_calls import thread_state

import functrans as ft
from functrans.errors import CallError, CallTypeError, InsideTransformError, MissingRuleError
from functrans.extend import (
    Carried,
    RuleResultError,
    RuleTable,
    TableInterpreter,
    lowered,
    map_tensors,
    overriding,
    transform,
)

aten = torch.ops.aten


def on_what_is_shown(level: Any, op: Any, args: Any, kwargs: Any) -> Any:
    """A policy: the operator runs on what the wrappers stand for, and returns constants."""
    with lowered(level):
        out = op(*map_tensors(dense, args), **{name: map_tensors(dense, a) for name, a in kwargs.items()})
    return map_tensors(level.constant, out)


def dense(x: Any) -> Tensor:
    return x.interpreter.dense(x)


class Quantised(TableInterpreter):
    """Whole numbers and a scale, which show as floats of the scale's dtype."""

    kind, payload = "quantised", ("scale",)
    rules = RuleTable("quantised rules", default=on_what_is_shown)

    def shows(self, value: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
        return value.shape, scale.dtype

    def dense(self, x: Any) -> Tensor:
        return x.value if x.scale is None else x.value * x.scale


def moving(*ops: Any) -> None:
    for op in ops:
        Quantised.rules.add(op, moved(op))


def moved(op: Any) -> Callable[..., Any]:
    return lambda level, x, *rest, **more: level.carry(op(x.value, *rest, **more), scale=x.scale)


moving(aten.select.int, aten.slice.Tensor, aten.view.default, aten.transpose.int, aten.t.default, aten.neg.default,
       aten.unsqueeze.default, aten.permute.default, aten.expand.default, aten.detach.default,
       aten.clone.default)  # fmt: skip


@Quantised.rules.register(aten.mul.Tensor)
def mul(level: Any, x: Any, y: Any) -> Any:
    if getattr(x, "scale", None) is None or getattr(y, "scale", None) is None:  # or a number
        return on_what_is_shown(level, aten.mul.Tensor, (x, y), {})
    return level.carry(x.value.int() * y.value.int(), scale=x.scale * y.scale)


class LowRank(TableInterpreter):
    """The product of two factors, [n, r] and [r, m], which shows as [n, m]."""

    kind, payload = "low rank", ("right",)
    rules = RuleTable("low rank rules", default=on_what_is_shown)

    def shows(self, value: Tensor, right: Tensor) -> Any:  # type: ignore[override]
        return (value.shape[0], right.shape[1]), value.dtype

    def dense(self, x: Any) -> Tensor:
        return x.value if x.right is None else x.value @ x.right


for table in (Quantised.rules, LowRank.rules):
    table.add(aten.positive.default, lambda level, x: x)


@LowRank.rules.register(aten.mv.default)
def mv(level: Any, matrix: Any, x: Any) -> Any:
    if matrix.right is None or x.right is not None:
        return on_what_is_shown(level, aten.mv.default, (matrix, x), {})
    return level.constant(matrix.value @ (matrix.right @ x.value))


@LowRank.rules.register(aten.clone.default)
def clone(level: Any, matrix: Any, *, memory_format: Any = None) -> Any:
    return level.carry(matrix.value.clone(), right=matrix.right)


@LowRank.rules.register(aten.t.default)
def t(level: Any, matrix: Any) -> Any:
    return level.carry(matrix.right.t(), right=matrix.value.t())


N, SCALE = torch.tensor([[3, -7, 12], [1, 0, -127]], dtype=torch.int8), torch.tensor(0.5)
LEFT, RIGHT = torch.randn(4, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
FORMS: dict[str, tuple[type[TableInterpreter], Tensor, dict[str, Tensor], Tensor]] = {
    "quantised": (Quantised, N, {"scale": SCALE}, N * SCALE),
    "low rank": (LowRank, LEFT, {"right": RIGHT}, LEFT @ RIGHT),
}


def run(form: str, f: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """The function of the wrapper, what is left of it dense, and of what it stands for."""
    cls, value, payload, plain = FORMS[form]

    class Dense(cls):  # type: ignore[misc, valid-type]
        def leave(self, leaf: Any) -> Any:
            return self.dense(self.own(leaf)) if isinstance(leaf, Tensor) else leaf

    inside = lambda x: f(x.clone())  # which an in-place function may write to
    return transform(Dense, inside)(Carried(value, **payload)), f(plain.clone())


def total(x: Tensor) -> Tensor:
    return (x.sin() * x).sum()


def fill_row(x: Tensor) -> Tensor:
    x[1] = 0.25
    return x


def write_view_of_view(x: Tensor) -> Tensor:
    row = x.t()[0]
    row.mul_(3)
    return x + row.sum()


def read_after_write(x: Tensor) -> Tensor:
    row = x[0]
    x.mul_(2)
    return row * 1


def add_in_place(x: Tensor) -> Tensor:
    x += 1.5
    return x


def copy_into(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[0] = x[1]
    y.t()[1] = 7.0
    return y


def write_with_itself(x: Tensor) -> Tensor:
    x.copy_(x.flip(0))
    return x


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(2)
    x.detach().add_(1)
    return x


def detached(x: Tensor) -> Tensor:
    x.detach().mul_(x)
    return x + 0


def transposed_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    x.t_()
    x[0] = 9.0
    x.unsqueeze_(0)
    return x.sum(0) + y.t()


def saved_then_written(x: Tensor) -> Tensor:
    def f(scale: Tensor) -> Tensor:
        y = x * scale
        out = (y * y).sum()
        y.zero_()
        return out

    return ft.grad(f)(torch.ones((), dtype=x.dtype))


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: x.sin() * 2 + x * x,
    "reduced": lambda x: (x.sum(0), x.amax(1), x.mean()),
    "composite": lambda x: torch.nn.functional.softplus(torch.nn.functional.linear(x, x)),
    "views": lambda x: (x[1], x.t(), x[:, 1:], x.unsqueeze(0), x.reshape(-1), x.t().reshape(-1)),
    "like": lambda x: (torch.ones_like(x), x.new_full((2,), 3.0), torch.full_like(x, 2), x.new_zeros(x.shape)),
    "its metadata": lambda x: torch.tensor([*x.shape, x.dim(), x.numel(), x.is_floating_point(), x.is_contiguous()]),
    "fill a row": fill_row,
    "write a view of a view": write_view_of_view,
    "read after a write": read_after_write,
    "in place": add_in_place,
    "copy into": copy_into,
    "write with itself": write_with_itself,
    "without grad": without_grad,
    "detached": detached,
    "transposed in place": transposed_in_place,
    "saved, then written": saved_then_written,
    "by itself": lambda x: x.positive().mul_(2) + x,
    "cast": lambda x: (x.double(), x.to(torch.float16).float(), x.int()),
    "clone": lambda x: x.clone().neg_(),
    "grad": ft.grad(total),
    "jacrev": ft.jacrev(lambda x: x.sum(0) ** 2),
    "jvp": lambda x: ft.jvp(total, (x,), (torch.ones_like(x),)),
    "vmap": ft.vmap(lambda row: row.sin().sum() * row),
    "vmap by columns": ft.vmap(lambda column: column.cumsum(0), in_dims=1, out_dims=1),
    "vmap of grad": ft.vmap(ft.grad(total)),
    "hessian": lambda x: ft.hessian(lambda row: total(row))(x[0]),
    "other levels": lambda x: ft.functionalize(add_in_place)(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_it_shows(form: str, name: str) -> None:
    found, expected = run(form, FUNCTIONS[name])
    torch.testing.assert_close(found, expected)


def test_rules_keep_the_form() -> None:
    out = transform(Quantised, lambda x: -(x[0] * x[1]))(Carried(N, scale=SCALE))
    assert out.value.tolist() == [-3, 0, 12 * 127] and out.value.dtype is torch.int32 and out.scale == 0.25
    shown = []
    transform(Quantised, lambda x: shown.append((x[0].dtype, x[0].shape, x.value.dtype, repr(x))))(
        Carried(N, scale=SCALE)
    )
    assert shown[0][:3] == (torch.float32, (3,), torch.int8)
    assert shown[0][3].startswith("WrapperTensor(quantised level 1, float32[2, 3]\n  value=tensor([[   3,")
    assert "dtype=torch.int8" in shown[0][3] and "scale=tensor(0.5000)" in shown[0][3]
    out = transform(LowRank, lambda x: x.t())(Carried(LEFT, right=RIGHT))
    torch.testing.assert_close(out.value @ out.right, (LEFT @ RIGHT).t())


def test_transforms_around_it() -> None:
    """The scale is differentiated, the numbers are batched, from outside."""
    x = torch.tensor([0.5, 1.0, -2.0])

    def layer(n: Tensor, scale: Tensor) -> Tensor:
        return transform(Quantised, lambda w: (w @ x).tanh().sum())(Carried(n, scale=scale))

    plain = lambda n, scale: ((n * scale) @ x).tanh().sum()
    torch.testing.assert_close(ft.grad(layer, argnums=1)(N, SCALE), ft.grad(plain, argnums=1)(N, SCALE))
    batch, scales = torch.stack([N, N.flip(0), N // 2]), torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(ft.vmap(layer)(batch, scales), torch.stack(list(map(plain, batch, scales))))
    slopes = ft.vmap(ft.grad(layer, argnums=1))(batch, scales)
    torch.testing.assert_close(slopes, ft.vmap(ft.grad(plain, argnums=1))(batch, scales))
    torch.testing.assert_close(
        ft.jvp(lambda s: layer(N, s), (SCALE,), (torch.tensor(1.0),)),
        ft.jvp(lambda s: plain(N, s), (SCALE,), (torch.tensor(1.0),)),
    )
    product = lambda left, right: transform(LowRank, lambda m: (m @ right[0]).sum())(Carried(left, right=right))
    dense_product = lambda left, right: ((left @ right) @ right[0]).sum()
    torch.testing.assert_close(
        ft.grad(product, argnums=(0, 1))(LEFT, RIGHT), ft.grad(dense_product, argnums=(0, 1))(LEFT, RIGHT)
    )
    lefts = torch.stack([LEFT, 2 * LEFT])
    torch.testing.assert_close(
        ft.vmap(product, in_dims=(0, None))(lefts, RIGHT), torch.stack([dense_product(l, RIGHT) for l in lefts])
    )


def test_around_and_inside_at_once() -> None:
    x = torch.tensor([[0.5, 1.0, -2.0], [1.0, 1.0, 0.0]])
    f = lambda w: ft.vmap(ft.grad(lambda x: (w @ x).tanh().sum()))(x).square().sum()
    outer = ft.vmap(ft.grad(lambda s: transform(Quantised, f)(Carried(N, scale=s))))(torch.tensor([0.1, 0.4]))
    torch.testing.assert_close(outer, ft.vmap(ft.grad(lambda s: f(N * s)))(torch.tensor([0.1, 0.4])))


def refused(f: Callable[..., Any], carried: Carried, cls: Any, kind: type[Exception]) -> str:
    before = thread_state()
    with pytest.raises(kind) as caught:
        transform(cls, f)(carried)
    assert thread_state() == before
    return str(caught.value)


def with_default(default: Any) -> Any:
    class Other(Quantised):
        kind = "other"
        rules = RuleTable("others", default=default)

    return Other


def test_policies_do_not_run_on_what_is_not_shown() -> None:
    """``sin`` of the whole numbers would be another number."""
    for default in ("pass", "jvp"):
        text = refused(torch.sin, Carried(N, scale=SCALE), with_default(default), CallError)
        assert text == (
            f'default="{default}" for aten.sin.default of other(sin) at level 1: got float32[2, 3] around int8[2, 3]; '
            "expected values that are what their wrappers show. "
            "Give the operator a rule, or the table a function as default, which computes what is shown."
        )
    assert "no rule for aten.sin.default" in refused(
        torch.sin, Carried(N, scale=SCALE), with_default("error"), MissingRuleError
    )
    same = transform(with_default("pass"), torch.sin)(Carried(torch.ones(2), scale=SCALE))
    torch.testing.assert_close(same, torch.ones(2).sin())


def test_a_result_that_shows_another_dtype_is_refused() -> None:
    with overriding(Quantised.rules, aten.relu.default):
        Quantised.rules.add(aten.relu.default, lambda level, x: level.carry(x.value.relu()))  # the scale is forgotten
        text = refused(torch.relu, Carried(N, scale=SCALE), Quantised, RuleResultError)
    assert "got int8[2, 3]; expected dtype torch.float32, the operator's for these arguments. Mend the rule." in text


@pytest.mark.parametrize("said", [None, (3,), ((2, 3), "float32"), ((2, -3), torch.float32), ("ab", torch.float32)])
def test_what_shows_returns_is_checked(said: Any) -> None:
    class Wrong(Quantised):
        def shows(self, value: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
            return said

    text = refused(torch.sin, Carried(N, scale=SCALE), Wrong, CallTypeError)
    assert text.startswith("shows of quantised(sin): got ") and text.endswith("expected a pair (shape, dtype).")


def test_places_in_memory_and_unread_numbers_are_refused() -> None:
    text = refused(lambda x: x.as_strided((2,), (1,), 0), Carried(N, scale=SCALE), Quantised, InsideTransformError)
    assert text == (
        "aten.as_strided.default of what does not lie in memory as it shows inside quantised(<lambda>) "
        "is not possible. Use an index."
    )
    refused(lambda x: x.sum().item(), Carried(N, scale=SCALE), with_default("decompose"), MissingRuleError)
    refused(lambda x: x.numpy(), Carried(N, scale=SCALE), Quantised, RuntimeError)
    assert transform(Quantised, lambda x: x.tolist())(Carried(N, scale=SCALE)) == (N * SCALE).tolist()  # by the policy


def test_the_old_derivative_cannot_stay_with_new_numbers() -> None:
    def f(scale: Tensor) -> Tensor:
        def write(x: Tensor) -> Tensor:
            x = x.clone()
            with torch.no_grad():
                x.mul_(2)
            return x.sum()

        return transform(Quantised, write)(Carried(N, scale=scale))

    with pytest.raises(InsideTransformError, match="to what shows more than its value"):
        ft.grad(f)(SCALE)
    assert f(SCALE) == 2 * (N * SCALE).sum()


def test_an_argument_that_was_written_is_not_the_callers() -> None:
    cls = type("Keeps", (Quantised,), {"enter": lambda self, leaf: self.carry(leaf, scale=SCALE)})
    text = refused(lambda x: x.mul_(2).sum(), N, cls, CallError)  # type: ignore[arg-type]
    assert "a write to a tensor of shape (2, 3) and dtype torch.int8, an argument, that is read by the payload" in text
    assert N[0, 0] == 3


@torch.library.custom_op("own_metadata::cubed", mutates_args=())
def cubed(x: Tensor) -> Tensor:
    return x**3


cubed.register_autograd(
    lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@pytest.mark.parametrize("form", FORMS)
def test_a_borrowed_derivative_inside(form: str) -> None:
    for f in (ft.grad(lambda x: cubed(x).sum()), lambda x: ft.jvp(cubed, (x,), (x,)), ft.vmap(lambda x: cubed(x))):
        found, expected = run(form, f)
        torch.testing.assert_close(found, expected)
