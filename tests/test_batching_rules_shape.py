"""Batching rules of views, pads and joins, against a loop over distinct examples."""

from __future__ import annotations

import pytest
import torch
from batching_checker import Call
from rule_cases import ByHand, by_hand, compare_all, declines, quiet_thread, record, rules_of, values
from torch._ops import OpOverload

import functrans
from functrans.interpreters.vmap.rules import joining, padding, view_writes, views

aten = torch.ops.aten
OPS = rules_of(views, view_writes, padding, joining)
quiet = pytest.fixture(scope="module", autouse=True)(quiet_thread)


@pytest.fixture(scope="module")
def recorded(quiet: None) -> dict[OpOverload, list[Call]]:
    return record(OPS)


S, V, M, T, Q = values(), values(4), values(3, 4), values(2, 3, 4), values(2, 4, 3, 5)
ONES = values(1, 3, 1)
Z = values(3, 4, dtype=torch.complex128)
LINE, PLANE, SPACE = values(2, 3, 5), values(2, 3, 4, 5), values(1, 2, 3, 4, 5)

BY_HAND: ByHand = {
    aten.lift.default: [(M,)],
    aten.lift_fresh_copy.default: [(M,)],
    aten.imag.default: [(Z,)],
    aten._neg_view.default: [(M,)],
    aten._reshape_alias.default: [(M, [12], [1]), (M, [2, 6], [6, 1])],
    aten.view.default: [(T, [-1]), (T, [6, -1]), (S, [1, 1]), (values(1), []), (values(2, 0), [0, 2])],
    aten.reshape.default: [(T.transpose(0, 2), [-1]), (S, [-1]), (V, [2, -1, 1])],
    aten.view.dtype: [(M, torch.int64), (M, torch.float32), (values(2, 4, dtype=torch.float32), torch.float64)],
    aten.view_copy.dtype: [(M, torch.int64), (M, torch.float32)],
    aten.view_as_complex.default: [(values(3, 2),), (values(2),)],
    aten.expand.default: [(ONES, [2, -1, 3, 5]), (S, [2, 3]), (S, []), (V, [3, 4]), (V, [-1])],
    aten.flatten.using_ints: [(S,), (T, 1), (T, 0, -2), (V, -1), (values(2, 0, 3), 0, 1)],
    aten.unflatten.int: [(M, -1, [2, 2]), (M, 0, [3, 1, -1]), (V, 0, [-1])],
    aten.squeeze.default: [(ONES,), (values(1),), (S,)],
    aten.squeeze.dim: [(ONES, 0), (ONES, -1), (ONES, 1), (S, 0), (values(1), 0)],
    aten.squeeze.dims: [(ONES, [0, -1]), (ONES, []), (S, [0]), (ONES, [1])],
    aten.unsqueeze.default: [(T, k) for k in range(-4, 4)] + [(S, 0), (S, -1)],
    aten.select.int: [(T, k, -1) for k in range(-3, 3)],
    aten.unbind.int: [(T, k) for k in range(-3, 3)],
    aten.slice.Tensor: [(T, k, 1, 3) for k in range(-3, 3)] + [(T, 1, None, None, 2), (V,)],
    aten.transpose.int: [(T, i, j) for i in range(-3, 1) for j in range(3)] + [(S, 0, -1)],
    aten.swapaxes.default: [(T, 0, -1)],
    aten.swapdims.default: [(T, 1, 0)],
    aten.t.default: [(S,), (V,), (M,)],
    aten.adjoint.default: [(M,), (Z,)],
    aten.mT.default: [(T,)],
    aten.numpy_T.default: [(T,), (S,), (V,)],
    aten.permute.default: [(T, [2, 0, 1]), (T, [-1, -3, -2]), (S, []), (V, [0])],
    aten.movedim.int: [(T, 0, 2), (T, -1, 0), (S, 0, 0)],
    aten.movedim.intlist: [(Q, [0, 2], [-1, 0]), (Q, [], []), (Q, [3, 1, 0], [0, 1, 2])],
    aten.moveaxis.int: [(T, 1, 2)],
    aten.moveaxis.intlist: [(T, [0, 1], [1, 2])],
    aten.diagonal.default: [(Q, 1, -1, 0), (Q, 0, 1, 2), (M,), (Q, -1, 2, 3)],
    aten.diag_embed.default: [(M, 1, 0, -1), (V,), (T, -1, 1, 2)],
    aten.diag.default: [(V, 1), (M,), (M, -1)],
    aten.unfold.default: [(T, -1, 2, 2), (T, 0, 1, 1), (V, 0, 3, 1)],
    aten.split.sizes: [(V, [1, 3]), (M, [2, 1, 1], -1)],
    aten.unsafe_split_with_sizes.default: [(M, [2, 2], 1)],
    aten.tensor_split.sections: [(V, 3), (M, 2, -1)],
    aten.select_scatter.default: [(M, values(4), 0, 1), (M, values(3), -1, 2)],
    aten.slice_scatter.default: [(M, values(3, 2), -1, 0, 4, 2), (M, M * 2)],
    aten.diagonal_scatter.default: [(M, values(3)), (T, values(4, 2), 0, 1, 0)],
    aten.unfold_backward.default: [(values(3, 2, 2), [3, 4], -1, 2, 2)],
    aten.select_backward.default: [(values(3), [3, 4], -1, 1), (values(4), [3, 4], 0, -1), (S, [3], 0, 2)],
    aten.slice_backward.default: [(values(3, 2), [3, 4], -1, 0, 4, 2)],
    aten.diagonal_backward.default: [(values(3), [3, 4], 0, 0, 1), (values(3, 2), [2, 3, 4], 1, 0, -1)],
    aten.repeat.default: [(M, [2, 1, 3]), (S, [2]), (S, []), (V, [0])],
    aten.tile.default: [(M, [2]), (T, []), (M, [2, 1, 2]), (S, [3])],
    aten.repeat_interleave.self_int: [(M, 2), (M, 2, -1), (S, 3), (V, 0, 0)],
    aten.repeat_interleave.self_Tensor: [(M, torch.tensor([1, 0, 2]), 0), (V, torch.tensor([2]))],
    aten.pad.default: [(M, [1, 2]), (M, [1, 0, -1, 2], "constant", 3.0), (V, [0, 1], "constant", None)],
    aten.pixel_unshuffle.default: [(values(1, 4, 6), 2)],
    aten.reflection_pad1d.default: [(LINE[0], [1, 2])],
    aten.reflection_pad2d.default: [(PLANE, [1, 2, 2, 0]), (PLANE[0], [1, 0, 0, 1])],
    aten.reflection_pad2d_backward.default: [(values(2, 3, 6, 8), PLANE, [1, 2, 2, 0]),
        (values(3, 4, 6), PLANE[0], [1, 0, 0, 0])],
    aten.reflection_pad3d.default: [(SPACE, [1, 2, 2, 0, 1, 1]), (SPACE[0], [1, 0, 0, 1, 0, 0])],
    aten.reflection_pad3d_backward.default: [(values(1, 2, 4, 4, 8), SPACE, [1, 2, 0, 0, 1, 0])],
    aten.replication_pad3d.default: [(SPACE, [1, 2, 2, 0, 1, 1]), (SPACE[0], [1, 0, 0, 1, 0, 0])],
    aten.replication_pad3d_backward.default: [(values(1, 2, 4, 4, 8), SPACE, [1, 2, 0, 0, 1, 0])],
    aten.native_channel_shuffle.default: [(Q, 2)],
    aten.cat.default: [
        ([M, values(2, 4)],),
        ([M, values(3, 2)], -1),
        ([M, torch.zeros(0), M.float()], 1),
        ([V.int(), V.float()], 0),
        ([values(0), V], -1),
    ],
    aten.concat.default: [([M, M * 2], 1)],
    aten.concatenate.default: [([M, M * 2], 0)],
    aten.stack.default: [([S, S.float() * 2],), ([M, M.float()], -1), ([V.long(), V.float()], 1)],
    aten.hstack.default: [([S, V],), ([M, M * 2],)],
    aten.row_stack.default: [([S, V[:1]],), ([M, V],)],
    aten.vstack.default: [([S, V[:1]],), ([M, V],)],
    aten.dstack.default: [([V, V * 2],), ([S, values(1, 1)],), ([T, M[:2, :3, None]],)],
    aten.column_stack.default: [([S, values(1)],), ([V, values(4, 2)],), ([values(0), values(0, 2)],)],
    aten.atleast_1d.default: [(S,), (M,)],
    aten.atleast_2d.default: [(S,), (V,), (T,)],
    aten.atleast_3d.default: [(S,), (V,), (M,), (Q,)],
    aten.broadcast_tensors.default: [([S, V, values(3, 1)],)],
    aten.meshgrid.default: [([V, values(3), S],)],
    aten.meshgrid.indexing: [([V, values(3), S], {"indexing": "xy"}), ([V], {"indexing": "xy"}),
        ([V, S], {"indexing": "ij"})],
    aten.block_diag.default: [([M, V, S, values(2, 0)],), ([M.float(), M],)],
}  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=str)
def test_rule_equals_the_loop(op: OpOverload, recorded: dict[OpOverload, list[Call]]) -> None:
    assert compare_all(op, recorded.get(op, []), by_hand(BY_HAND, op)), f"no call of {op} was compared"


def test_every_hand_made_call_has_a_rule() -> None:
    assert set(BY_HAND) <= set(OPS)


def test_a_batch_of_one_is_never_squeezed() -> None:
    x = values(1, 1, 4, 1)
    assert functrans.vmap(torch.squeeze)(x).shape == (1, 4)
    assert functrans.vmap(lambda x: x.squeeze(0).squeeze(-1))(x).shape == (1, 4)
    assert functrans.vmap(lambda x: x.squeeze((0, -1)), in_dims=3)(values(1, 1, 4, 1)).shape == (1, 1, 4)


def test_views_are_not_copied() -> None:
    x = values(3, 4, 5)
    assert (
        functrans.vmap(lambda x: x.t().unsqueeze(1)[1:, 0, 2].reshape(2, 2))(x).untyped_storage().data_ptr()
        == x.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize(
    ("op", "in_dims", "args"),
    [
        (aten.select.int, (0, None, None), (values(3), 0, 0)),
        (aten.diag.default, (0,), (values(3, 2, 2, 2),)),
        (aten.repeat_interleave.self_Tensor, (0, 0, None), (values(3, 2), torch.ones(3, 2).long(), 0)),
        (aten.tril.default, (0,), (values(3, 4),)),
        (aten.reflection_pad1d.default, (0, None), (values(3, 4), [1, 1])),
        (aten.constant_pad_nd.default, (0, None), (values(3, 4), [1, 1, 1, 1])),
    ],
)
def test_examples_that_pytorch_refuses_are_declined(op: OpOverload, in_dims: tuple, args: tuple) -> None:
    assert declines(op, in_dims, *args)


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x.transpose(0, 2),
        lambda x: x.unsqueeze(4),
        lambda x: x.permute(0, 1, 2),
        lambda x: x.reshape(7),
        lambda x: x.expand(4, -1, 4, 5),
        lambda x: x[4],
        lambda x: x.flatten(1, 0),
        lambda x: torch.cat([x, x], 2),
        lambda x: torch.cat([x, x[0]], 0),
        lambda x: x.repeat(2),
    ],
)
def test_errors_of_one_example_are_errors_of_the_batch(program: object) -> None:
    with pytest.raises((RuntimeError, IndexError)) as eager:
        program(values(4, 5))  # type: ignore[operator]
    with pytest.raises((RuntimeError, IndexError)) as batched:
        functrans.vmap(program)(values(3, 4, 5))  # type: ignore[arg-type]
    assert isinstance(batched.value, type(eager.value))


@pytest.mark.parametrize("op", [aten.t.default, aten.matrix_H.default], ids=str)
@pytest.mark.parametrize("batch", [values(2, 3, 4, 5), values(2, 3, 4, 5).long(), values(0, 3, 4, 5)])
def test_transposes_of_matrices_refuse_batches_of_them(op: OpOverload, batch: torch.Tensor) -> None:
    with pytest.raises(RuntimeError) as eager:
        op(torch.ones(3, 4, 5))
    with pytest.raises(RuntimeError) as batched:
        functrans.vmap(op)(batch)
    assert str(batched.value) == str(eager.value)


@pytest.mark.parametrize("op", [torch.median, torch.nanmedian])
@pytest.mark.parametrize("in_dim", [0, 1])
def test_the_median_of_what_is_expanded(op: object, in_dim: int) -> None:
    """Along a dimension PyTorch takes other elements of an expanded tensor, so that the loop over all is the oracle."""
    rows = torch.tensor([[3.0, 1.0, 2.0], [7.0, 9.0, 8.0]], dtype=torch.float64)
    for f in (lambda x: op(x[:1].expand(3)), lambda x: op(x.expand(4, 3)), lambda x: op(x[1:].expand(2, 2).t())):
        batch = rows if in_dim == 0 else rows.t()
        assert functrans.vmap(f, in_dim)(batch).tolist() == [f(row).item() for row in rows]
