"""Every check of arguments that torch.func makes has its counterpart: an exception of the same kind, with a pinned text.

``EXPECTTEST_ACCEPT=1 pytest tests/test_api_errors.py`` rewrites the texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import functrans


def square(x: Any, *_: Any, **__: Any) -> Any:
    return x**2


def total(x: Any, *_: Any) -> Any:
    return x.sum()


def with_aux(x: Any) -> Any:
    return x.sum(), x


def identity(x: Any) -> Any:
    return x


def constant(_: Any) -> Any:
    return 3.0


def pair(x: Any) -> Any:
    return x, x


def nothing(_: Any) -> Any:
    return None


def empty(_: Any) -> Any:
    return ()


def dictionary(x: Any) -> Any:
    return {"a": x, "b": x}


def integer(x: Any) -> Any:
    return (x > 0).long()


def to_complex(x: Any) -> Any:
    return x * 1j


def item(x: Any) -> Any:
    return x * x.sum().item()


def branch(x: Any) -> Any:
    return x if (x > 0).all() else -x


def nonzero(x: Any) -> Any:
    return torch.nonzero(x)


def random(x: Any) -> Any:
    return x + torch.randn(())


X = torch.arange(6.0).view(2, 3)
V = torch.tensor([1.0, 2.0, 3.0])
I3 = torch.arange(3)


def refused(call: Callable[[Any], Any], text: str) -> None:
    """``call(functrans)`` raises a deliberate error with this text, that whoever catches torch.func's catches."""
    theirs, ours = raised(call, torch.func), raised(call, functrans)
    assert ours is not None, f"no error; torch.func: {theirs!r}"
    assert isinstance(ours, functrans.FunctransError), f"not a deliberate error: {ours!r}"
    if isinstance(theirs, ValueError):
        assert isinstance(ours, ValueError), f"{type(ours).__name__} is not a ValueError, as torch.func's is"
    assert_expected_inline(re.sub(r"[^ ]*(test_api_errors.py):\d+", r"\1:N", str(ours)), text, skip=1)
    key = torch._C.DispatchKey.AutogradFunctionality
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.is_grad_enabled()


def raised(call: Callable[[Any], Any], backend: Any) -> Exception | None:
    try:
        call(backend)
    except Exception as error:  # noqa: BLE001 - which kind is the question
        return error
    return None


# ---- vmap: in_dims


def test_vmap_in_dims_is_a_list() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=[0])(X),
        """vmap(square, in_dims=[0], out_dims=0): got in_dims of type list; expected an int or a tuple with one entry per argument.""",
    )


def test_vmap_in_dims_is_a_string() -> None:
    refused(
        lambda F: F.vmap(square, in_dims="0")(X),
        """vmap(square, in_dims=0, out_dims=0): got in_dims of type str; expected an int or a tuple with one entry per argument.""",
    )


def test_vmap_no_inputs() -> None:
    refused(
        lambda F: F.vmap(constant)(),
        """vmap(constant, in_dims=0, out_dims=0): got no positional arguments; expected at least one. Keyword arguments are never batched.""",
    )


def test_vmap_in_dims_of_another_structure() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=(0, 0))(X),
        """vmap(square, in_dims=(0, 0), out_dims=0): got arguments of structure PyTreeSpec((*,), NoneIsLeaf, namespace='torch'); expected a structure that in_dims (0, 0) is a prefix of.""",
    )


def test_vmap_in_dims_of_another_nested_structure() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=({"a": 0},))({"b": X}),
        """vmap(square, in_dims=({'a': 0},), out_dims=0): got arguments of structure PyTreeSpec(({'b': *},), NoneIsLeaf, namespace='torch'); expected a structure that in_dims ({'a': 0},) is a prefix of.""",
    )


def test_vmap_in_dim_is_a_float() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=(0.5,))(X),
        """vmap(square, in_dims=(0.5,), out_dims=0): got an in_dim 0.5; expected an int or None.""",
    )


def test_vmap_in_dim_for_a_number() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=(0, 0))(X, 2.0),
        """vmap(square, in_dims=(0, 0), out_dims=0): got in_dim 0 for an argument of type float; expected None for what is not a tensor.""",
    )


def test_vmap_in_dim_default_for_a_number() -> None:
    refused(
        lambda F: F.vmap(square)(X, 2.0),
        """vmap(square, in_dims=0, out_dims=0): got in_dim 0 for an argument of type float; expected None for what is not a tensor.""",
    )


def test_vmap_in_dim_out_of_range() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=2)(X),
        """vmap(square, in_dims=2, out_dims=0): got in_dim 2 for a tensor of 2 dimensions; expected -2 <= in_dim < 2.""",
    )


def test_vmap_negative_in_dim_out_of_range() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=-3)(X),
        """vmap(square, in_dims=-3, out_dims=0): got in_dim -3 for a tensor of 2 dimensions; expected -2 <= in_dim < 2.""",
    )


def test_vmap_in_dim_of_a_scalar() -> None:
    refused(
        lambda F: F.vmap(square)(torch.tensor(1.0)),
        """vmap(square, in_dims=0, out_dims=0): got in_dim 0 for a tensor of 0 dimensions; expected -0 <= in_dim < 0.""",
    )


def test_vmap_in_dims_all_None() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=None)(X),
        """vmap(square, in_dims=None, out_dims=0): got in_dims of type NoneType; expected an int or a tuple with one entry per argument.""",
    )


def test_vmap_in_dims_tuple_of_None() -> None:
    refused(
        lambda F: F.vmap(square, in_dims=(None,))(X),
        """vmap(square, in_dims=(None,), out_dims=0): got in_dims without any int; expected at least one batched argument.""",
    )


def test_vmap_different_sizes() -> None:
    refused(
        lambda F: F.vmap(square)(X, V),
        """vmap(square, in_dims=0, out_dims=0): got batch sizes [2, 3]; expected the same size along every batched dimension.""",
    )


# ---- vmap: outputs and out_dims


def test_vmap_out_dims_of_another_structure() -> None:
    refused(
        lambda F: F.vmap(pair, out_dims=(0, 0, 0))(X),
        """vmap(pair, in_dims=0, out_dims=(0, 0, 0)): got outputs of structure PyTreeSpec((*, *), NoneIsLeaf, namespace='torch'); expected a structure that out_dims (0, 0, 0) is a prefix of.""",
    )


def test_vmap_out_dims_tuple_for_one_tensor() -> None:
    refused(
        lambda F: F.vmap(square, out_dims=(0, 0))(X),
        """vmap(square, in_dims=0, out_dims=(0, 0)): got outputs of structure PyTreeSpec(*, NoneIsLeaf, namespace='torch'); expected a structure that out_dims (0, 0) is a prefix of.""",
    )


def test_vmap_out_dims_is_a_string() -> None:
    refused(
        lambda F: F.vmap(square, out_dims="0")(X),
        """vmap(square, in_dims=0, out_dims=0): got an out_dim '0'; expected an int or None.""",
    )


def test_vmap_out_dims_holds_a_float() -> None:
    refused(
        lambda F: F.vmap(pair, out_dims=(0, 0.5))(X),
        """vmap(pair, in_dims=0, out_dims=(0, 0.5)): got an out_dim 0.5; expected an int or None.""",
    )


def test_vmap_out_dim_out_of_range() -> None:
    refused(
        lambda F: F.vmap(square, out_dims=2)(X),
        """vmap(square, in_dims=0, out_dims=2): got out_dim 2 for an output that has 2 dimensions with the batch; expected -2 <= out_dim < 2.""",
    )


def test_vmap_negative_out_dim_out_of_range() -> None:
    refused(
        lambda F: F.vmap(square, out_dims=-3)(X),
        """vmap(square, in_dims=0, out_dims=-3): got out_dim -3 for an output that has 2 dimensions with the batch; expected -2 <= out_dim < 2.""",
    )


def test_vmap_out_dim_None_for_a_batched_output() -> None:
    refused(
        lambda F: F.vmap(square, out_dims=None)(X),
        """vmap(square, in_dims=0, out_dims=None): got a batched output where out_dims is None; expected an output that is the same for every example. Give it an out_dim.""",
    )


def test_vmap_out_dims_dictionary_for_a_tuple() -> None:
    refused(
        lambda F: F.vmap(pair, out_dims={"a": 0, "b": 0})(X),
        """vmap(pair, in_dims=0, out_dims={'a': 0, 'b': 0}): got outputs of structure PyTreeSpec((*, *), NoneIsLeaf, namespace='torch'); expected a structure that out_dims {'a': 0, 'b': 0} is a prefix of.""",
    )


# ---- vmap: options


def test_vmap_unknown_randomness() -> None:
    refused(
        lambda F: F.vmap(square, randomness="sometimes")(X),
        """vmap(square, in_dims=0, out_dims=0): got randomness='sometimes'; expected 'error', 'different' or 'same'.""",
    )


def test_vmap_chunk_size_0() -> None:
    refused(
        lambda F: F.vmap(square, chunk_size=0)(X),
        """vmap(square, in_dims=0, out_dims=0): got chunk_size=0; expected a positive int or None.""",
    )


def test_vmap_chunk_size_negative() -> None:
    refused(
        lambda F: F.vmap(square, chunk_size=-1)(X),
        """vmap(square, in_dims=0, out_dims=0): got chunk_size=-1; expected a positive int or None.""",
    )


def test_vmap_random_op_with_randomness_error() -> None:
    refused(
        lambda F: F.vmap(random)(X),
        """aten.randn.default([]) ran in vmap(..., randomness='error'): got a random operator, expected none. Pass randomness="different" for a draw of its own per example, or randomness="same" for one draw that all examples share.""",
    )


# ---- vmap: what depends on the data of one example


def test_vmap_item() -> None:
    refused(
        lambda F: F.vmap(item)(X),
        """tensor.item() was called on a batched tensor inside vmap(item) at level 1; its result depends on the numbers of each of the 2 examples, for all of which the function runs once. At test_api_errors.py:N, in item: `return x * x.sum().item()`. Cure: keep it a tensor, which arithmetic takes as it takes a number; what is the same for every example can be passed as a number, or as a tensor with in_dims=None.""",
    )


def test_vmap_branch_on_data() -> None:
    refused(
        lambda F: F.vmap(branch)(X),
        """bool(tensor), which `if`, `while`, `assert`, `and`, `or` and `not` call, was called on a batched tensor inside vmap(branch) at level 1; its result depends on the numbers of each of the 2 examples, for all of which the function runs once. At test_api_errors.py:N, in branch: `return x if (x > 0).all() else -x`. Cure: torch.where(condition, a, b) computes both and chooses for each example; `&`, `|` and `~` take the place of `and`, `or` and `not`.""",
    )


def test_vmap_float_of_a_batched_value() -> None:
    refused(
        lambda F: F.vmap(lambda x: torch.tensor(float(x)))(V),
        """float(tensor) was called on a batched tensor inside vmap(<lambda>) at level 1; its result depends on the numbers of each of the 3 examples, for all of which the function runs once. At test_api_errors.py:N, in <lambda>: `lambda F: F.vmap(lambda x: torch.tensor(float(x)))(V),`. Cure: keep it a tensor, which arithmetic takes as it takes a number; what is the same for every example can be passed as a number, or as a tensor with in_dims=None.""",
    )


# ---- grad, grad_and_value: argnums


def test_grad_argnums_out_of_range() -> None:
    refused(
        lambda F: F.grad(total, argnums=1)(X),
        """grad(total, argnums=1): got argnum 1 for 1 positional argument(s); expected -1 <= argnum < 1. Keyword arguments are not differentiated for.""",
    )


def test_grad_negative_argnums_out_of_range() -> None:
    refused(
        lambda F: F.grad(total, argnums=-2)(X),
        """grad(total, argnums=-2): got argnum -2 for 1 positional argument(s); expected -1 <= argnum < 1. Keyword arguments are not differentiated for.""",
    )


def test_grad_argnums_tuple_out_of_range() -> None:
    refused(
        lambda F: F.grad(total, argnums=(0, 3))(X, X),
        """grad(total, argnums=(0, 3)): got argnum 3 for 2 positional argument(s); expected -2 <= argnum < 2. Keyword arguments are not differentiated for.""",
    )


def test_grad_argnums_empty() -> None:
    refused(
        lambda F: F.grad(total, argnums=())(X),
        """grad(total, argnums=()): got argnums=(); expected at least one position.""",
    )


def test_grad_argnums_repeated() -> None:
    refused(
        lambda F: F.grad(total, argnums=(0, 0))(X),
        """grad(total, argnums=(0, 0)): got argnums=(0, 0); expected distinct positions.""",
    )


def test_grad_argnums_repeated_by_a_negative() -> None:
    refused(
        lambda F: F.grad(total, argnums=(0, -1))(X),
        """grad(total, argnums=(0, -1)): got argnums=(0, -1); expected distinct positions.""",
    )


def test_grad_argnums_is_a_list() -> None:
    refused(
        lambda F: F.grad(total, argnums=[0])(X),
        """grad(total, argnums=[0]): got argnums of type list; expected an int or a tuple of ints.""",
    )


def test_grad_argnums_holds_a_float() -> None:
    refused(
        lambda F: F.grad(total, argnums=(0.0,))(X),
        """grad(total, argnums=(0.0,)): got argnums with an element of type float; expected an int or a tuple of ints.""",
    )


def test_grad_argnums_is_a_float() -> None:
    refused(
        lambda F: F.grad(total, argnums=0.0)(X),
        """grad(total, argnums=0.0): got argnums of type float; expected an int or a tuple of ints.""",
    )


def test_grad_no_arguments() -> None:
    refused(
        lambda F: F.grad(total)(),
        """grad(total, argnums=0): got argnum 0 for 0 positional argument(s); expected -0 <= argnum < 0. Keyword arguments are not differentiated for.""",
    )


# ---- grad: inputs and outputs


def test_grad_of_integers() -> None:
    refused(
        lambda F: F.grad(total)(I3),
        """grad(total, argnums=0): got an argument of dtype torch.int64 to differentiate for; expected a floating-point or complex dtype. Convert it, e.g. with .float().""",
    )


def test_grad_of_a_number() -> None:
    refused(
        lambda F: F.grad(square)(2.0),
        """grad(square, argnums=0): got an argument of type float to differentiate for; expected tensors. Name only tensor arguments in argnums.""",
    )


def test_grad_of_a_list_with_a_number() -> None:
    refused(
        lambda F: F.grad(lambda x: x[0].sum())([V, 2.0]),
        """grad(<lambda>, argnums=0): got an argument of type float to differentiate for; expected tensors. Name only tensor arguments in argnums.""",
    )


def test_grad_output_has_dimensions() -> None:
    refused(
        lambda F: F.grad(square)(V),
        """grad(square, argnums=0): got an output of shape (3,); expected a scalar tensor, of shape (). Reduce it with .sum() or .mean(), or use functrans.vjp or functrans.jacrev.""",
    )


def test_grad_output_of_one_element_with_a_dimension() -> None:
    refused(
        lambda F: F.grad(square)(torch.ones(1)),
        """grad(square, argnums=0): got an output of shape (1,); expected a scalar tensor, of shape (). Reduce it with .sum() or .mean(), or use functrans.vjp or functrans.jacrev.""",
    )


def test_grad_returns_a_number() -> None:
    refused(
        lambda F: F.grad(constant)(V),
        """grad(constant, argnums=0): got an output of type float; expected a tensor. Return (output, aux) and pass has_aux=True for more than one value.""",
    )


def test_grad_returns_None() -> None:
    refused(
        lambda F: F.grad(nothing)(V),
        """grad(nothing, argnums=0): got an output of type NoneType; expected a tensor. Return (output, aux) and pass has_aux=True for more than one value.""",
    )


def test_grad_returns_a_pair() -> None:
    refused(
        lambda F: F.grad(pair)(torch.tensor(1.0)),
        """grad(pair, argnums=0): got an output of type tuple; expected a tensor. Return (output, aux) and pass has_aux=True for more than one value.""",
    )


def test_grad_has_aux_without_aux() -> None:
    refused(
        lambda F: F.grad(total, has_aux=True)(V),
        """grad(total, argnums=0): got an output of type WrapperTensor; expected a tuple (output, aux), as has_aux=True.""",
    )


def test_grad_has_aux_with_three() -> None:
    refused(
        lambda F: F.grad(lambda x: (x.sum(), x, x), has_aux=True)(V),
        """grad(<lambda>, argnums=0): got an output of type tuple; expected a tuple (output, aux), as has_aux=True.""",
    )


def test_grad_has_aux_with_a_list() -> None:
    refused(
        lambda F: F.grad(lambda x: [x.sum(), x], has_aux=True)(V),
        """grad(<lambda>, argnums=0): got an output of type list; expected a tuple (output, aux), as has_aux=True.""",
    )


def test_grad_aux_without_has_aux() -> None:
    refused(
        lambda F: F.grad(with_aux)(V),
        """grad(with_aux, argnums=0): got an output of type tuple; expected a tensor. Return (output, aux) and pass has_aux=True for more than one value.""",
    )


def test_grad_and_value_output_has_dimensions() -> None:
    refused(
        lambda F: F.grad_and_value(square)(V),
        """grad_and_value(square, argnums=0): got an output of shape (3,); expected a scalar tensor, of shape (). Reduce it with .sum() or .mean(), or use functrans.vjp or functrans.jacrev.""",
    )


# ---- vjp


def test_vjp_integer_primal() -> None:
    refused(
        lambda F: F.vjp(square, I3),
        """vjp(square, ...): got an argument of dtype torch.int64 to differentiate for; expected a floating-point or complex dtype. Convert it, e.g. with .float().""",
    )


def test_vjp_number_primal() -> None:
    refused(
        lambda F: F.vjp(square, 2.0),
        """vjp(square, ...): got an argument of type float to differentiate for; expected tensors. Name only tensor arguments in argnums.""",
    )


def test_vjp_returns_a_number() -> None:
    refused(
        lambda F: F.vjp(constant, V),
        """vjp(constant, ...): got outputs of types (float); expected only tensors. Return other values as aux, with has_aux=True.""",
    )


def test_vjp_returns_None() -> None:
    refused(
        lambda F: F.vjp(nothing, V),
        """vjp(nothing, ...): got outputs of types (NoneType); expected only tensors. Return other values as aux, with has_aux=True.""",
    )


def test_vjp_returns_nothing() -> None:
    refused(
        lambda F: F.vjp(empty, V),
        """vjp(empty, ...): got a function without outputs; expected at least one tensor.""",
    )


def test_vjp_integer_output() -> None:
    refused(
        lambda F: F.vjp(integer, V),
        """vjp(integer, ...): got an output of dtype torch.int64; expected floating-point or complex outputs. Return others as aux, with has_aux=True.""",
    )


def test_vjp_has_aux_without_aux() -> None:
    refused(
        lambda F: F.vjp(square, V, has_aux=True),
        """vjp(square, ...): got an output of type WrapperTensor; expected a tuple (output, aux), as has_aux=True.""",
    )


def test_vjp_cotangent_of_another_structure() -> None:
    refused(
        lambda F: F.vjp(square, V)[1]((V,)),
        """pullback of vjp(square, ...): got cotangents of structure PyTreeSpec((*,), NoneIsLeaf, namespace='torch'); expected the output's structure PyTreeSpec(*, NoneIsLeaf, namespace='torch').""",
    )


def test_vjp_cotangents_too_few() -> None:
    refused(
        lambda F: F.vjp(pair, V)[1](V),
        """pullback of vjp(pair, ...): got cotangents of structure PyTreeSpec(*, NoneIsLeaf, namespace='torch'); expected the output's structure PyTreeSpec((*, *), NoneIsLeaf, namespace='torch').""",
    )


def test_vjp_cotangent_dictionary_for_a_tuple() -> None:
    refused(
        lambda F: F.vjp(pair, V)[1]({"a": V, "b": V}),
        """pullback of vjp(pair, ...): got cotangents of structure PyTreeSpec({'a': *, 'b': *}, NoneIsLeaf, namespace='torch'); expected the output's structure PyTreeSpec((*, *), NoneIsLeaf, namespace='torch').""",
    )


def test_vjp_cotangent_of_another_shape() -> None:
    refused(
        lambda F: F.vjp(square, V)[1](torch.ones(2)),
        """pullback of vjp(square, ...): got a cotangent of shape (2,); expected the output's shape (3,).""",
    )


# ---- jvp


def test_jvp_primals_not_a_tuple() -> None:
    refused(
        lambda F: F.jvp(square, V, (V,)),
        """jvp(square, primals, tangents): got primals of type Tensor; expected a tuple, so that f(*primals) is a valid call. Write (x,) for one primal.""",
    )


def test_jvp_tangents_not_a_tuple() -> None:
    refused(
        lambda F: F.jvp(square, (V,), V),
        """jvp(square, primals, tangents): got tangents of structure PyTreeSpec(*, NoneIsLeaf, namespace='torch'); expected the primals' structure PyTreeSpec((*,), NoneIsLeaf, namespace='torch').""",
    )


def test_jvp_tangents_too_many() -> None:
    refused(
        lambda F: F.jvp(square, (V,), (V, V)),
        """jvp(square, primals, tangents): got tangents of structure PyTreeSpec((*, *), NoneIsLeaf, namespace='torch'); expected the primals' structure PyTreeSpec((*,), NoneIsLeaf, namespace='torch').""",
    )


def test_jvp_tangents_of_another_structure() -> None:
    refused(
        lambda F: F.jvp(total, (V, {"a": V}), (V, V)),
        """jvp(total, primals, tangents): got tangents of structure PyTreeSpec((*, *), NoneIsLeaf, namespace='torch'); expected the primals' structure PyTreeSpec((*, {'a': *}), NoneIsLeaf, namespace='torch').""",
    )


def test_jvp_no_primals() -> None:
    refused(
        lambda F: F.jvp(constant, (), ()),
        """jvp(constant, primals, tangents): got primals of types (); expected at least one tensor, and only tensors.""",
    )


def test_jvp_number_primal() -> None:
    refused(
        lambda F: F.jvp(square, (2.0,), (1.0,)),
        """jvp(square, primals, tangents): got primals of types (float); expected at least one tensor, and only tensors.""",
    )


def test_jvp_number_tangent() -> None:
    refused(
        lambda F: F.jvp(square, (V,), (1.0,)),
        """jvp(square, primals, tangents): got tangents of types (float); expected only tensors.""",
    )


def test_jvp_tangent_of_another_shape() -> None:
    refused(
        lambda F: F.jvp(square, (V,), (torch.ones(2),)),
        """jvp(square, primals, tangents): got a tangent of shape (2,); expected the primal's shape (3,).""",
    )


def test_jvp_returns_a_number() -> None:
    refused(
        lambda F: F.jvp(constant, (V,), (V,)),
        """jvp(constant, primals, tangents): got outputs of types (float); expected only tensors. Return other values as aux, with has_aux=True.""",
    )


def test_jvp_returns_None() -> None:
    refused(
        lambda F: F.jvp(nothing, (V,), (V,)),
        """jvp(nothing, primals, tangents): got outputs of types (NoneType); expected only tensors. Return other values as aux, with has_aux=True.""",
    )


def test_jvp_returns_nothing() -> None:
    refused(
        lambda F: F.jvp(empty, (V,), (V,)),
        """jvp(empty, primals, tangents): got a function without outputs; expected at least one tensor.""",
    )


def test_jvp_has_aux_without_aux() -> None:
    refused(
        lambda F: F.jvp(square, (V,), (V,), has_aux=True),
        """jvp(square, primals, tangents): got an output of type WrapperTensor; expected a tuple (output, aux), as has_aux=True.""",
    )


def test_jvp_integer_primal() -> None:
    refused(
        lambda F: F.jvp(square, (I3,), (I3,)),
        """jvp(square, primals, tangents): got a primal of dtype torch.int64; expected a floating-point or complex dtype. Convert it, e.g. with .float().""",
    )


# ---- jacobians


def test_jacrev_argnums_out_of_range() -> None:
    refused(
        lambda F: F.jacrev(square, argnums=2)(V),
        """jacrev(square, ...): got argnum 2 for 1 positional argument(s); expected -1 <= argnum < 1. Keyword arguments are not differentiated for.""",
    )


def test_jacrev_argnums_empty() -> None:
    refused(
        lambda F: F.jacrev(square, argnums=())(V),
        """jacrev(square, ...): got argnums=(); expected at least one position.""",
    )


def test_jacrev_chunk_size_0() -> None:
    refused(
        lambda F: F.jacrev(square, chunk_size=0)(V),
        """jacrev(square, argnums=0): got chunk_size=0; expected a positive int or None.""",
    )


def test_jacrev_returns_a_number() -> None:
    refused(
        lambda F: F.jacrev(constant)(V),
        """jacrev(constant, ...): got outputs of types (float); expected only tensors. Return other values as aux, with has_aux=True.""",
    )


def test_jacrev_integer_input() -> None:
    refused(
        lambda F: F.jacrev(square)(I3),
        """jacrev(square, ...): got an argument of dtype torch.int64 to differentiate for; expected a floating-point or complex dtype. Convert it, e.g. with .float().""",
    )


def test_jacrev_has_aux_without_aux() -> None:
    refused(
        lambda F: F.jacrev(square, has_aux=True)(V),
        """jacrev(square, ...): got an output of type WrapperTensor; expected a tuple (output, aux), as has_aux=True.""",
    )


def test_jacfwd_argnums_out_of_range() -> None:
    refused(
        lambda F: F.jacfwd(square, argnums=2)(V),
        """jacfwd(square, argnums=2): got argnum 2 for 1 positional argument(s); expected -1 <= argnum < 1. Keyword arguments are not differentiated for.""",
    )


def test_jacfwd_argnums_repeated() -> None:
    refused(
        lambda F: F.jacfwd(square, argnums=(0, 0))(V),
        """jacfwd(square, argnums=(0, 0)): got argnums=(0, 0); expected distinct positions.""",
    )


def test_jacfwd_returns_a_number() -> None:
    refused(
        lambda F: F.jacfwd(constant)(V),
        """jacfwd(constant, primals, tangents): got outputs of types (float); expected only tensors. Return other values as aux, with has_aux=True.""",
    )


def test_jacfwd_unknown_randomness() -> None:
    refused(
        lambda F: F.jacfwd(square, randomness="sometimes")(V),
        """vmap(push, in_dims=0, out_dims=(0, None)): got randomness='sometimes'; expected 'error', 'different' or 'same'.""",
    )


def test_jacfwd_integer_input() -> None:
    refused(
        lambda F: F.jacfwd(square)(I3),
        """jacfwd(square, primals, tangents): got a primal of dtype torch.int64; expected a floating-point or complex dtype. Convert it, e.g. with .float().""",
    )


def test_hessian_argnums_out_of_range() -> None:
    refused(
        lambda F: F.hessian(total, argnums=2)(V),
        """jacfwd(total, argnums=2): got argnum 2 for 1 positional argument(s); expected -1 <= argnum < 1. Keyword arguments are not differentiated for.""",
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda F: F.grad(lambda n, x: (n * x).sum(), argnums=-1)(I3, V),
        lambda F: F.grad(lambda x, n: (x * n).sum())(V, 3),
        lambda F: F.grad(lambda d: (d["a"] * d["b"][0]).sum())({"a": V, "b": [V]}),
        lambda F: F.grad(lambda x, *, k: (x * k).sum())(V, k=V),
        lambda F: F.vmap(lambda d, n: d["a"] * n, in_dims=({"a": 0, "b": None}, None))({"a": X, "b": None}, 2.0),
        lambda F: F.vmap(lambda x: (x, {"b": x.sum()}), out_dims=(1, {"b": 0}))(X),
        lambda F: F.vmap(lambda x, y: x + y, in_dims=(0, None))(X, V),
        lambda F: F.vmap(lambda x: x, out_dims=(0,))(X),
        lambda F: F.vmap(lambda x: (x, V), out_dims=(0, None))(X),
        lambda F: F.vmap(lambda x: (x, V))(X),
        lambda F: F.vmap(lambda x: [x, 2 * x], out_dims=1)(X),
        lambda F: F.vmap(square, in_dims=1, out_dims=-1, chunk_size=2)(X),
        lambda F: F.vjp(lambda d: {"u": d["a"] + 1}, {"a": V})[1]({"u": V}),
        lambda F: F.jvp(lambda d, y: {"u": d["a"] * y}, ({"a": V}, V), ({"a": V}, V)),
        lambda F: F.jacrev(lambda d: {"u": d["a"] ** 2}, 0)({"a": V}),
        lambda F: F.jacfwd(lambda x, y: (x * y, x.sum()), (0, 1))(V, V + 1),
        lambda F: F.hessian(lambda x, y: (x**2 * y).sum(), (0, 1))(V, V),
        lambda F: F.jacrev(lambda x: (x**2, x), has_aux=True, chunk_size=2)(V),
        lambda F: F.grad_and_value(with_aux, has_aux=True)(V),
    ],
)
def test_structures_that_are_accepted_give_what_torch_func_gives(call: Callable[[Any], Any]) -> None:
    from plain import difference

    assert not difference(call(functrans), call(torch.func))


def test_outputs_of_vmap_that_are_not_tensors_are_passed_on() -> None:
    # torch.func refuses them unless out_dims is None
    assert functrans.vmap(constant)(X) == 3.0
    assert functrans.vmap(nothing)(X) is None
    squares, text = functrans.vmap(lambda x: (x**2, "text"))(X)
    assert torch.equal(squares, X**2) and text == "text"
