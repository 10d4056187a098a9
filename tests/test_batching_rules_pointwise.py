"""Batching rules of pointwise operators, reductions, operators along a dimension and factories, against a loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batching_checker import Call, WrongRule, check_rule, recorded_calls
from rule_cases import quiet_thread, rules_of
from torch import Tensor
from torch._ops import OpOverload

from functrans.extend import DERIVATIVES
from functrans.interpreters.vmap.elementwise import logical_result_type
from functrans.interpreters.vmap.families import positional_arguments, tensor_positions
from functrans.interpreters.vmap.rules import activations, along_dim, factories, pointwise, reductions
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo

aten = torch.ops.aten
F64, F32, I64, I32, BOOL, C64 = (
    torch.float64,
    torch.float32,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.complex64,
)
POINTWISE = rules_of(pointwise, activations)
MINE = [*rules_of(reductions, along_dim, factories), *POINTWISE]
UNINITIALIZED = {aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default}


quiet = pytest.fixture(scope="module", autouse=True)(quiet_thread)


@pytest.fixture(scope="module")
def recorded(quiet: None) -> dict[OpOverload, list[Call]]:
    """What PyTorch's samples call, forward in several dtypes and backward."""
    calls: dict[OpOverload, list[Call]] = {}
    for options in (
        {"dtypes": [F64], "per_op": 6},
        {"dtypes": [F64], "per_op": 4, "samples": 4, "backward": True},
        {"dtypes": [I64, BOOL, torch.complex128], "per_op": 4, "samples": 4},
    ):
        for op, found in recorded_calls(MINE, **options).items():  # type: ignore[arg-type]
            calls.setdefault(op, []).extend(found)
    return calls


# ---------------------------------------------------------------------------------------------------------------
# Arguments made from the schema, for every pointwise operator


def example(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Values between 0.1 and 0.9, or small positive integers: inside every operator's domain."""
    generator = torch.Generator().manual_seed(seed + 7 * len(shape))
    if dtype is BOOL:
        return torch.rand(shape, generator=generator) > 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return (torch.rand(shape, generator=generator, dtype=F64) * 0.8 + 0.1).to(dtype)
    return torch.randint(1, 5, shape, generator=generator, dtype=dtype)


SIMPLE: dict[str, Any] = {"number": 2, "int": 1, "float": 0.5, "bool": True}


def made_call(op: OpOverload, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]) -> Call:
    """Arguments after the schema; tensors take ``dtypes`` and ``shapes`` in turn."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    tensors = 0
    for argument in op._schema.arguments:
        kind = str(argument.type).removeprefix("Optional[").rstrip("]")
        value: Any
        if kind == "Tensor":
            value = example(dtypes[tensors % len(dtypes)], shapes[tensors % len(shapes)], tensors)
            tensors += 1
        elif argument.has_default_value() and argument.name not in ("n", "decimals"):
            continue
        elif argument.name == "rounding_mode":
            value = "floor"
        elif argument.name == "p":
            value = 1
        elif kind not in SIMPLE:
            raise TypeError(f"no value for an argument of type {kind}")
        else:
            value = SIMPLE[kind]
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def legal(op: OpOverload, call: Call) -> bool:
    """Whether PyTorch itself takes these arguments."""
    try:
        op(*call[0], **call[1])
    except Exception:  # noqa: BLE001 (each kernel refuses in its own way)
        return False
    return True


SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((), (), ()),
    ((2, 3), (2, 3), (2, 3)),
    ((3,), (), (2, 1)),
    ((), (3,), ()),
    ((2, 3), (3,), ()),
    ((1, 3), (2, 1), (3,)),
)


def made_calls(op: OpOverload) -> Iterator[Call]:
    """Legal calls of a pointwise operator in several dtypes and ranks."""
    several = len(tensor_positions(op)) > 1
    if any(str(argument.type) in ("Device", "Layout") for argument in positional_arguments(op)):
        return
    for dtype in (F64, I64, BOOL, C64):
        for shapes in SHAPES if several else SHAPES[:2]:
            call = made_call(op, (dtype,), shapes)
            if legal(op, call):
                yield call


# ---------------------------------------------------------------------------------------------------------------
# Arguments written by hand, for what the samples do not call

V, M, N0 = example(F64, (4,)), example(F64, (3, 4)), example(F64, ())
MASK = example(BOOL, (3, 4))
LAST = torch.channels_last
IMAGE = example(F64, (2, 3, 2, 4))

BY_HAND: dict[OpOverload, list[tuple[Any, ...] | Call]] = {
    aten._is_all_true.default: [(MASK,)],
    aten._is_any_true.default: [(MASK,)],
    aten._logcumsumexp.default: [(M, 1)],
    aten._to_copy.default: [((IMAGE,), {"dtype": F32, "memory_format": LAST}), ((M,), {"dtype": I64})],
    aten.all.dims: [(MASK, []), (MASK, None), (MASK, [0, 1], True), (N0, []), (N0, [0], True)],
    aten.amax.default: [(M, []), (N0, [], True), (N0, [-1], True), (M, [0, -1], True)],
    aten.aminmax.default: [((M,), {"keepdim": True}), ((N0,), {"dim": 0, "keepdim": True}), ((M,), {"dim": -1})],
    aten.any.dims: [(MASK, []), (MASK, None), (MASK, [0, 1], True), (N0, [])],
    aten.argmax.default: [(M,), (M, None, True), (N0,), (N0, 0, True), (M, 1, True), (M, -2)],
    aten.argmin.default: [(M,), (M, None, True), (N0,), (N0, 0, True), (M, 1, True), (M, -2)],
    aten.bucketize.Scalar: [(0.5, V.sort()[0]), (2, example(I64, (4,)).sort()[0])],
    aten.bucketize.Tensor: [(M, V.sort()[0]), (N0, V.sort()[0])],
    aten.clone.default: [((IMAGE,), {"memory_format": LAST}), ((M,), {"memory_format": torch.contiguous_format})],
    aten.contiguous.default: [((IMAGE,), {"memory_format": LAST}), (M.t(),)],
    aten.copy.default: [(M, V), (M, N0), (M.long(), M * 9), (N0, N0), (M, MASK)],
    aten.count_nonzero.default: [(MASK,), (MASK, 1), (N0,), (N0, 0)],
    aten.cummaxmin_backward.default: [(M, M, M.argsort(1), 1)],
    aten.cumprod_backward.default: [(M, M, 1, M.cumprod(1)), (N0, N0, 0, N0)],
    aten.fill.Tensor: [(M, N0), (N0, N0), (M.long(), N0 * 9)],
    aten.glu_jvp.default: [(V[:2], V, V * 2, 0)],
    aten.linalg_vector_norm.default: [(M,), (M, 1, [0], True), (N0, 2, None, True), (M, 3, [1, 0])],
    aten.log_sigmoid_backward.default: [(M, M * 2, M * 3)],
    aten.logsumexp.default: [(N0, []), (N0, [0], True), (M, [0, 1])],
    aten.masked_fill.Tensor: [(M, MASK, N0), (V, MASK, N0), (N0, MASK, N0), (M, MASK[0, 0], example(I64, ())),
        (M.long(), MASK, N0)],
    aten.median.default: [(M,), (N0,)],
    aten._new_zeros_with_same_feature_meta.default: [(M, M)],
    aten.new_empty_strided.default: [(M, [2, 3], [1, 2]), (M, [2, 0], [3, 1]), (M, [], [])],
    aten.norm.Scalar: [(M,), (M, 3)],
    aten.norm.ScalarOpt_dim_dtype: [((M.float(), 2, [1], True), {"dtype": F64})],
    aten.norm.ScalarOpt_dtype: [((M.float(), 2), {"dtype": F64})],
    aten.roll.default: [(M, [2]), (M, [1, -1], [0, 1]), (N0, [1]), (V, [1], [-1])],
    aten.searchsorted.Scalar: [(V.sort()[0], 0.5), (V.sort()[0], 2), (example(I64, (4,)).sort()[0], 2)],
    aten.searchsorted.Tensor: [(V.sort()[0], M), (V.sort()[0], N0), (M.sort(1)[0], M)],
    aten.special_log_softmax.default: [(M, 1), (N0, 0)],
    aten.special_logsumexp.default: [(M, [1]), (M, [0, 1], True)],
    aten.special_softmax.default: [(M, 1), ((M, 0, F32), {})],
    aten.sum.dim_IntList: [(M, []), (M, None), (M, None, True), (N0, []), (N0, [0], True),
        ((M.long(), [1]), {"dtype": F32})],
    aten.to.device: [(M, torch.device("cpu"), F32), (M, torch.device("cpu"), I64)],
    aten.to.other: [(M, V.float()), (M, V.long())],
    aten.trace.default: [(M,), (M.long(),), (MASK,), (M.t(),)],
    aten.type_as.default: [(M, V.float())],
    aten.zeros_like.default: [((IMAGE,), {"memory_format": LAST}), ((M,), {"dtype": I64})],
}  # fmt: skip


def by_hand(op: OpOverload) -> Iterator[Call]:
    for call in BY_HAND.get(op, ()):
        yield call if len(call) == 2 and isinstance(call[0], tuple) and isinstance(call[1], dict) else (call, {})


@pytest.mark.parametrize("op", MINE, ids=str)
def test_rule_equals_the_loop(op: OpOverload, recorded: dict[OpOverload, list[Call]]) -> None:
    calls = recorded.get(op, []) + list(by_hand(op)) + (list(made_calls(op)) if op in POINTWISE else [])
    compared = 0
    for k, (args, kwargs) in enumerate(calls):
        sizes = (3, 1, 0) if k == 0 else (3,)
        compared += check_rule(op, args, kwargs, batch_sizes=sizes, seed=k, values=op not in UNINITIALIZED)
    assert compared, f"{op}: no call was compared; give it arguments in BY_HAND"


#: Tagged as pointwise, and without a rule: one answer for two tensors, and a random one that is taken apart.
UNRULED = {aten.equal.default, aten.rrelu.default}


def test_what_pytorch_calls_pointwise_has_a_rule() -> None:
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    found = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    tagged = {op for op in found if torch.Tag.pointwise in op.tags and not op._schema.is_mutable}
    assert len(tagged) > 200
    assert {op for op in tagged if op not in BATCHING_RULES} == UNRULED


def test_what_has_the_derivative_of_a_pointwise_operator_is_batched_as_one() -> None:
    entries = {op for op in DERIVATIVES if DERIVATIVES.get(op).tangent == "elementwise"}
    assert len(entries) > 150
    assert [op for op in entries if op not in BATCHING_RULES] == []


# ---------------------------------------------------------------------------------------------------------------
# Type promotion is that of one example

MIXED = [(F64, F32), (F32, F64), (F32, I64), (I64, F64), (I32, I64), (I64, I32), (BOOL, I32), (C64, F64), (F64, C64)]
PROMOTING = [op for op in POINTWISE if len(tensor_positions(op)) > 1]


@pytest.mark.parametrize("op", PROMOTING, ids=str)
def test_promotion_is_that_of_one_example(op: OpOverload) -> None:
    places = len(tensor_positions(op))
    conditional = op.name().startswith("aten::where")
    for mixed in MIXED:
        dtypes = (BOOL, *mixed) if conditional else mixed
        for shapes in ((), ()), ((3,), ()), ((), (3,)), ((2, 3), (3,)):
            call = made_call(op, (*dtypes, dtypes[-1])[: max(places, 2)], (*shapes, ()))
            if legal(op, call):
                check_rule(op, *call, max_subsets=4, seed=places, rtol=1e-4, atol=1e-4)


def test_logical_result_type_is_pytorchs() -> None:
    dtypes = (F64, F32, torch.float16, I64, torch.uint8, BOOL, C64)
    operands: list[Any] = [torch.zeros(shape, dtype=dtype) for dtype in dtypes for shape in ((), (2,))]
    operands += [True, 2, 2.5, 2j]
    for x, y in itertools.product(operands, repeat=2):
        assert logical_result_type([(x, None), (y, None)]) is torch.result_type(x, y), (x, y)


def test_numbers_stay_numbers() -> None:
    for dtype, number in itertools.product((torch.float16, F32, I32, BOOL), (2, 2.5, True)):
        for shape in (), (3,):
            check_rule(aten.mul.Tensor, (example(dtype, shape), number))
            check_rule(aten.eq.Scalar, (example(dtype, shape), number))


# ---------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    "op", [aten.clone.default, aten.contiguous.default, aten.empty_like.default, aten.zeros_like.default]
)
@pytest.mark.parametrize("bdim", range(5))
def test_memory_format_is_that_of_the_example(op: OpOverload, bdim: int) -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    for memory_format in torch.channels_last, torch.contiguous_format:
        output, out_dim = BATCHING_RULES.get(op)(
            BatchInfo(x.shape[bdim], "error"), (bdim,), x, memory_format=memory_format
        )
        for one in output.unbind(out_dim):
            assert one.is_contiguous(memory_format=memory_format)


FACTORIES = [
    op
    for op in MINE
    if BATCHING_RULES.place(op).rpartition(":")[0].endswith("factories.py") and "_new_zeros_with_same" not in str(op)
]


@pytest.mark.parametrize("op", FACTORIES, ids=str)
def test_factories_give_each_example_its_own_storage(op: OpOverload) -> None:
    x = torch.randn(3, 1).expand(3, 4)
    extra = {
        aten.new_empty_strided.default: ([2, 2], [2, 1]),
        aten.new_full.default: ([2, 2], 1.5),
        aten.full_like.default: (1.5,),
    }.get(op, () if "_like" in str(op) else ([2, 2],))
    output, out_dim = BATCHING_RULES.get(op)(BatchInfo(4, "error"), (1,), x, *extra)
    for i, one in enumerate(output.unbind(out_dim)):
        one.fill_(i)
    for i, one in enumerate(output.unbind(out_dim)):
        assert (one == i).all()


# ---------------------------------------------------------------------------------------------------------------
# The tester is tested


def mixes_rows(info: BatchInfo, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
    return torch.sin(x).roll(1, in_dims[0]), in_dims[0]


def wrong_shape(info: BatchInfo, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
    return torch.sin(x), 0


def wrong_dtype(info: BatchInfo, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
    return torch.sin(x).float(), in_dims[0]


def writes(info: BatchInfo, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
    return x.sin_(), in_dims[0]


def first_row(info: BatchInfo, in_dims: Any, x: Tensor) -> tuple[Tensor, None]:
    return torch.sin(x.select(in_dims[0], 0)), None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (mixes_rows, "differs from the loop"),
        (first_row, "differs from the loop"),
        (wrong_dtype, "is torch.float32, the loop has torch.float64"),
        (writes, "writes to its arguments"),
    ],
)
def test_checker_catches_wrong_rules(rule: Any, message: str) -> None:
    with pytest.raises(WrongRule, match=message):
        check_rule(aten.sin.default, (torch.randn(4, 5, dtype=F64),), rule=rule)


def test_checker_moves_the_batch_dimension() -> None:
    with pytest.raises(WrongRule, match="has shape"):
        for seed in range(8):
            check_rule(aten.sin.default, (torch.randn(4, 5, dtype=F64),), rule=wrong_shape, seed=seed)


def test_every_rule_has_a_named_place() -> None:
    assert len(MINE) > 400
    assert all(positional_arguments(op) for op in MINE)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quantization_imitated_by_channels(axis: int) -> None:
    op, shape = aten.fake_quantize_per_channel_affine_cachemask.default, (4, 3, 5)
    scale, zero = torch.rand(shape[axis]) * 0.2 + 0.05, torch.arange(shape[axis], dtype=torch.int32) - 1
    assert check_rule(op, (torch.randn(shape), scale, zero, axis, -8, 7), max_subsets=7, batch_sizes=(3, 1)) >= 14


def test_the_gradient_of_a_draw_from_a_simplex() -> None:
    alpha = torch.rand(2, 4, dtype=F64) + 0.5
    given = torch.rand(2, 4, dtype=F64).softmax(-1), alpha, alpha.sum(-1, keepdim=True).expand(2, 4)
    assert check_rule(aten._dirichlet_grad.default, given, max_subsets=7) >= 7
