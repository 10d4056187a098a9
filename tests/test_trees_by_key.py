"""Wherever two trees belong together, dicts are matched by key, never by the order in which they were written."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

import functrans
from functrans import jvp, stack_module_state, vjp, vmap
from functrans.errors import CallError, CallValueError

Pair = namedtuple("Pair", "first second")


@dataclass
class Box:
    """A node that only PyTorch's own pytree knows."""

    inside: Any


torch_pytree.register_pytree_node(Box, lambda b: ([b.inside], None), lambda leaves, _: Box(leaves[0]))

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(3, 2) + 10  # batched along 0 and 1

#: Each makes a tree of the values of "a" and "b", in the order given, and takes them out again by name.
TREES: dict[str, tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]] = {
    "dict": (dict, lambda t: t),
    "OrderedDict": (OrderedDict, lambda t: t),
    "defaultdict": (lambda items: defaultdict(list, items), lambda t: t),
    "in a tuple": (lambda items: (dict(items),), lambda t: t[0]),
    "in a list in a dict": (lambda items: {"z": [dict(items)]}, lambda t: t["z"][0]),
    "in a namedtuple": (lambda items: Pair(dict(items), ()), lambda t: t.first),
    "in a dataclass": (lambda items: Box(dict(items)), lambda t: t.inside),
}
both_orders = pytest.mark.parametrize("order", ("ab", "ba"))
every_tree = pytest.mark.parametrize("kind", TREES)


def tree(kind: str, order: str, **values: Any) -> Any:
    return TREES[kind][0]([(name, values[name]) for name in order])


@every_tree
@both_orders
def test_in_dims(kind: str, order: str) -> None:
    named = TREES[kind][1]
    f = lambda t: named(t)["a"].sum() - named(t)["b"].prod()
    dims = tree(kind, order, a=0, b=1)
    out = vmap(f, in_dims=(dims,))(tree(kind, "ab", a=A, b=B))
    torch.testing.assert_close(out, torch.stack([A[i].sum() - B[:, i].prod() for i in range(2)]))


@pytest.mark.parametrize("given", ("dict", "OrderedDict", "defaultdict"))
@pytest.mark.parametrize("taken", ("dict", "OrderedDict", "defaultdict"))
def test_in_dims_of_another_kind_of_dict(given: str, taken: str) -> None:
    out = vmap(lambda t: t["a"].sum() - t["b"].prod(), in_dims=(tree(given, "ba", a=0, b=1),))(
        tree(taken, "ab", a=A, b=B)
    )
    torch.testing.assert_close(out, torch.stack([A[i].sum() - B[:, i].prod() for i in range(2)]))


@every_tree
@both_orders
@pytest.mark.parametrize("chunk_size", (None, 1))
def test_out_dims(kind: str, order: str, chunk_size: int | None) -> None:
    named = TREES[kind][1]
    x = torch.arange(6.0).reshape(2, 3)
    run = vmap(lambda e: tree(kind, "ab", a=e, b=e * 2), out_dims=tree(kind, order, a=0, b=1), chunk_size=chunk_size)
    out = named(run(x))
    torch.testing.assert_close(out["a"], x)
    torch.testing.assert_close(out["b"], 2 * x.T)


def test_a_prefix_ends_above_the_leaves() -> None:
    args = {"b": {"y": B, "x": B + 1}, "a": [A]}
    out = vmap(lambda t: t["a"][0].sum() + (t["b"]["x"] * t["b"]["y"]).sum(), in_dims=({"a": 0, "b": 1},))(args)
    torch.testing.assert_close(out, torch.stack([A[i].sum() + (B[:, i] * (B + 1)[:, i]).sum() for i in range(2)]))


@both_orders
def test_in_and_out_dims_with_other_keys_name_them(order: str) -> None:
    args = {"a": A, "b": B}
    for dims, words in (
        ({"a": 0}, "without 'b'"),
        ({"a": 0, "b": 1, "c": 0}, "with 'c'"),
        ({"a": 0, "c": 0}, "without 'b' and with 'c'"),
    ):
        dims = {k: dims[k] for k in sorted(dims, reverse=order == "ba")}
        with pytest.raises(CallValueError, match=words):
            vmap(lambda t: t["a"], in_dims=(dims,))(args)
        with pytest.raises(CallValueError, match=words):
            vmap(lambda x: {"a": x, "b": x}, out_dims=dims)(A)


def test_chunks_may_differ_in_the_order_of_their_keys_but_not_in_the_keys() -> None:
    seen: list[int] = []

    def f(x: Tensor) -> dict[str, Tensor]:
        seen.append(1)
        return {"a": x, "b": -x} if len(seen) % 2 else {"b": -x, "a": x}

    out = vmap(f, chunk_size=1)(A)
    torch.testing.assert_close(out["a"], A)
    torch.testing.assert_close(out["b"], -A)
    with pytest.raises(CallValueError, match="chunk"):
        vmap(lambda x: (seen.append(1), {"a": x} if len(seen) % 2 else {"c": x})[1], chunk_size=1)(A)


@every_tree
@both_orders
def test_tangents_and_cotangents(kind: str, order: str) -> None:
    named = TREES[kind][1]
    x, y = torch.randn(3), torch.randn(3)
    f = lambda t: tree(kind, "ab", a=named(t)["a"] ** 2, b=named(t)["b"] * named(t)["a"])
    primals = tree(kind, "ab", a=x, b=y)
    _out, tangent = jvp(f, (primals,), (tree(kind, order, a=x + 1, b=y - 1),))
    torch.testing.assert_close(named(tangent)["a"], 2 * x * (x + 1))
    torch.testing.assert_close(named(tangent)["b"], (y - 1) * x + y * (x + 1))
    _, pull = vjp(f, primals)
    (cotangent,) = pull(tree(kind, order, a=x, b=y))
    torch.testing.assert_close(named(cotangent)["a"], 2 * x * x + y * y)
    torch.testing.assert_close(named(cotangent)["b"], y * x)


def test_tangents_and_cotangents_with_other_keys() -> None:
    x = torch.randn(3)
    with pytest.raises(CallError, match="keys of (the output|primals)"):
        jvp(lambda t: t["a"], ({"a": x, "b": x},), ({"a": x, "c": x},))
    with pytest.raises(CallError, match="keys of (the output|primals)"):
        vjp(lambda t: {"a": t, "b": t}, x)[1]({"a": x, "c": x})


def test_aux_keeps_its_own_order() -> None:
    _out, _pull, aux = vjp(lambda x: (x, {"b": x, "a": 2 * x}), torch.ones(2), has_aux=True)
    assert list(aux) == ["b", "a"] and torch.equal(aux["a"], 2 * torch.ones(2))
    grads, aux = functrans.grad(lambda t: ((t["b"] * t["a"]).sum(), {"b": 1, "a": t}), has_aux=True)(
        {"b": A, "a": A + 1}
    )
    assert list(grads) == ["b", "a"] and torch.equal(grads["b"], A + 1) and list(aux["a"]) == ["b", "a"]


def test_models_are_stacked_by_the_names_of_their_parameters() -> None:
    class Net(torch.nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, torch.nn.Parameter(torch.full((2,), float(ord(name)))))

    params, _ = stack_module_state([Net("ab"), Net("ba")])
    assert torch.equal(params["a"], torch.full((2, 2), float(ord("a"))))
    for names in ("a", "abc", "ac"):
        with pytest.raises(CallError, match="'[bc]'"):
            stack_module_state([Net("ab"), Net(names)])
