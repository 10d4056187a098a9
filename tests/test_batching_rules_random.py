"""Random operators under the three randomness modes of vmap; PyTorch's own draws from the same seed are the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten

import functrans
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.rules.random import RANDOM_RULES, RandomnessError, random_rule
from functrans.interpreters.vmap.table import BatchInfo

aten = torch.ops.aten
X = torch.linspace(0.1, 0.9, 24).reshape(4, 6)
IMAGE = torch.linspace(0.5, 1.5, 120).reshape(3, 8, 5)

FACTORIES: dict[OpOverload, tuple[Any, ...]] = {
    aten.normal.float_float: (0.0, 1.0, [30]),
    aten.rand.default: ([5, 6],),
    aten.rand.generator: ([5, 6],),
    aten.randint.default: (1000, [30]),
    aten.randint.generator: (1000, [30]),
    aten.randint.low: (5, 1000, [30]),
    aten.randint.low_generator: (5, 1000, [30]),
    aten.randn.default: ([30],),
    aten.randn.generator: ([30],),
    aten.randperm.default: (30,),
    aten.randperm.generator: (30,),
}
SHAPED: dict[OpOverload, tuple[Any, ...]] = {
    aten.bernoulli.p: (X, 0.5),
    aten.cauchy.default: (X, 1.0, 2.0),
    aten.exponential.default: (X, 2.0),
    aten.geometric.default: (X, 0.01),
    aten.log_normal.default: (X,),
    aten.normal_functional.default: (X, 1.0, 2.0),
    aten.rand_like.default: (X,),
    aten.rand_like.generator: (X,),
    aten.randint_like.default: (X, 1000),
    aten.randint_like.generator: (X, 1000),
    aten.randint_like.low_dtype: (X, 5, 1000),
    aten.randint_like.low_generator_dtype: (X, 5, 1000),
    aten.randn_like.default: (X,),
    aten.randn_like.generator: (X,),
    aten.random.default: (X,),
    getattr(aten.random, "from"): (X, 3, 1000),
    aten.random.to: (X, 1000),
    aten.uniform.default: (X, -1.0, 1.0),
}
PARAMETERS: dict[OpOverload, tuple[Any, ...]] = {
    aten._sample_dirichlet.default: (X,),
    aten._standard_gamma.default: (X,),
    aten.bernoulli.default: (X,),
    aten.binomial.default: (X * 100, X),
    aten.multinomial.default: (X, 5),
    aten.normal.Tensor_Tensor: (X, X),
    aten.normal.Tensor_float: (X, 2.0),
    aten.normal.float_Tensor: (1.0, X),
    aten.poisson.default: (X * 100,),
}
DROPOUTS: dict[OpOverload, tuple[Any, ...]] = {
    aten.alpha_dropout.default: (IMAGE, 0.5, True),
    aten.dropout.default: (IMAGE, 0.5, True),
    aten.feature_alpha_dropout.default: (IMAGE, 0.5, True),
    aten.feature_dropout.default: (IMAGE, 0.5, True),
    aten.native_dropout.default: (IMAGE, 0.5, True),
}
SPECIAL: dict[OpOverload, tuple[Any, ...]] = {
    aten.bernoulli.Tensor: (torch.zeros(4, 6), X),
    aten.rrelu_with_noise_functional.default: (-X, X, 0.1, 0.9, True),
}
ALL = FACTORIES | SHAPED | PARAMETERS | DROPOUTS | SPECIAL


def keywords(op: OpOverload) -> dict[str, Any]:
    return {"generator": torch.default_generator} if "generator" in str(op) else {}


def seeded(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return run(*args, **kwargs)


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def run_rule(
    op: OpOverload, randomness: str, size: int, dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    return seeded(random_rule, BatchInfo(size, randomness), op, dims, args, keywords(op))


def batched(
    args: tuple[Any, ...], size: int, bdim: int = 1
) -> tuple[tuple[Any, ...], tuple[Any, ...], list[tuple[Any, ...]]]:
    """Physical arguments, their batch dimensions and the arguments of each example, all tensors batched."""
    examples = [tuple(a * (1 - 0.1 * i) if isinstance(a, Tensor) else a for a in args) for i in range(size)]
    physical = tuple(
        torch.stack(column, bdim) if isinstance(column[0], Tensor) else column[0] for column in zip(*examples)
    )
    return physical, tuple(bdim if isinstance(a, Tensor) else None for a in args), examples


def rows(output: Any, out_dim: Any) -> list[Tensor]:
    return list(first(output).unbind(out_dim[0] if isinstance(out_dim, tuple) else out_dim))


def test_every_rule_has_arguments_here() -> None:
    assert set(ALL) == set(RANDOM_RULES)


@pytest.mark.parametrize("op", ALL, ids=str)
def test_error_mode_refuses(op: OpOverload) -> None:
    with pytest.raises(RandomnessError, match="Pass randomness="):
        run_rule(op, "error", 3, (None,) * len(ALL[op]), ALL[op])


def test_messages() -> None:
    with pytest.raises(RandomnessError) as caught:
        run_rule(aten.rand.default, "error", 3, (None,), ([2],))
    assert str(caught.value) == (
        "aten.rand.default([2]) ran in vmap(..., randomness='error'): got a random operator, expected none. "
        'Pass randomness="different" for a draw of its own per example, '
        'or randomness="same" for one draw that all examples share.'
    )
    with pytest.raises(RandomnessError) as caught:
        run_rule(aten.bernoulli.default, "same", 4, (0,), (X,))
    assert str(caught.value) == (
        'aten.bernoulli.default(float32[4, 6]) ran in vmap(..., randomness="same") with arguments that differ between '
        'the examples, so there is no one draw to share. Pass randomness="different", or draw with parameters that '
        "are the same for all examples and transform the result."
    )


@pytest.mark.parametrize("op", ALL, ids=str)
def test_unbatched_and_different_is_a_draw_per_example(op: OpOverload) -> None:
    """One example draws what PyTorch draws; several draw different things."""
    args = ALL[op]
    expected = tree_flatten(seeded(op, *args, **keywords(op)))[0]
    output, out_dims = run_rule(op, "different", 1, (None,) * len(args), args)
    for got, dim, one in zip(tree_flatten(output)[0], tree_flatten(out_dims)[0], expected):
        torch.testing.assert_close(got.select(dim, 0), one)
    drawn = rows(*run_rule(op, "different", 4, (None,) * len(args), args))
    assert len(drawn) == 4
    assert all(one.shape == expected[0].shape and one.dtype == expected[0].dtype for one in drawn)
    assert not any(torch.equal(one, other) for k, one in enumerate(drawn) for other in drawn[:k])


@pytest.mark.parametrize("op", ALL, ids=str)
def test_unbatched_and_same_is_the_operator_itself(op: OpOverload) -> None:
    args = ALL[op]
    expected = seeded(op, *args, **keywords(op))
    output, out_dims = run_rule(op, "same", 4, (None,) * len(args), args)
    assert all(dim is None for dim in tree_flatten(out_dims)[0])
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("op", ALL, ids=str)
@pytest.mark.parametrize("size", [0, 2])
def test_shapes_and_dtypes_for_a_batch(op: OpOverload, size: int) -> None:
    args = ALL[op]
    physical, dims, _ = batched(args, 2)
    if size == 0:
        physical = tuple(a.narrow(1, 0, 0) if isinstance(a, Tensor) else a for a in physical)
    expected = tree_flatten(op(*args, **keywords(op)))[0]
    output, out_dims = run_rule(op, "different", size, dims, physical)
    for got, dim, one in zip(tree_flatten(output)[0], tree_flatten(out_dims)[0], expected):
        assert got.movedim(dim, 0).shape == (size, *one.shape)
        assert got.dtype is one.dtype


@pytest.mark.parametrize("op", SHAPED | DROPOUTS, ids=str)
def test_batched_and_same_shares_the_draw(op: OpOverload) -> None:
    """Each example gets what PyTorch draws for it alone from the same seed."""
    physical, dims, examples = batched(ALL[op], 3)
    output, out_dims = run_rule(op, "same", 3, dims, physical)
    for i, example in enumerate(examples):
        for got, dim, one in zip(
            tree_flatten(output)[0],
            (tree_flatten(out_dims)[0] or [None] * 2),
            tree_flatten(seeded(op, *example, **keywords(op)))[0],
        ):
            torch.testing.assert_close(got if dim is None else got.select(dim, i), one)


@pytest.mark.parametrize("op", PARAMETERS, ids=str)
def test_batched_parameters_have_no_shared_draw(op: OpOverload) -> None:
    physical, dims, _ = batched(PARAMETERS[op], 3)
    with pytest.raises(RandomnessError, match="differ between the examples"):
        run_rule(op, "same", 3, dims, physical)


@pytest.mark.parametrize("op", PARAMETERS | DROPOUTS | SPECIAL, ids=str)
def test_one_batched_example_draws_what_pytorch_draws(op: OpOverload) -> None:
    args = ALL[op]
    for bdim in 0, 1, 2:
        physical, dims, examples = batched(args, 1, bdim)
        output, out_dims = run_rule(op, "different", 1, dims, physical)
        expected = tree_flatten(seeded(op, *examples[0]))[0]
        for got, dim, one in zip(tree_flatten(output)[0], tree_flatten(out_dims)[0], expected):
            torch.testing.assert_close(got.select(dim, 0), one)


def test_parameters_stay_with_their_example() -> None:
    """Distributions that leave no choice: the row's parameter is the row's draw."""
    info = BatchInfo(3, "different")
    certain = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    by_column = certain.t().contiguous()

    def drawn(op: OpOverload, dims: tuple[Any, ...], *args: Any) -> Tensor:
        output, out_dim = random_rule(info, op, dims, args, {})
        return output.movedim(out_dim, 0)

    assert torch.equal(drawn(aten.bernoulli.default, (1,), by_column), certain)
    assert torch.equal(
        drawn(aten.bernoulli.Tensor, (None, 1), torch.zeros(2, 3), by_column), certain[:, None].expand(3, 2, 3)
    )
    assert torch.equal(
        drawn(aten.bernoulli.Tensor, (0, None), torch.zeros(3, 2, 3), certain[0]), certain[0].expand(3, 2, 3)
    )
    assert torch.equal(drawn(aten.poisson.default, (1,), by_column * 0), certain * 0)
    assert torch.equal(drawn(aten.normal.Tensor_float, (1, None), by_column, 0.0), certain)
    means, widths = torch.arange(3.0), torch.zeros(2, 3)
    assert torch.equal(drawn(aten.normal.Tensor_Tensor, (0, None), means, widths), means[:, None, None].expand(3, 2, 3))
    assert torch.equal(drawn(aten.normal.Tensor_Tensor, (None, 1), means, torch.zeros(3, 3)), means.expand(3, 3))
    assert torch.equal(drawn(aten.binomial.default, (None, 1), torch.full((3,), 9.0), by_column), certain * 9)
    assert drawn(aten.multinomial.default, (1, None), by_column, 1).flatten().tolist() == [1, 0, 2]
    stacked = torch.stack([certain, certain.flip(0)], 1)
    assert drawn(aten.multinomial.default, (0, None), stacked, 1).squeeze(-1).tolist() == [[1, 2], [0, 0], [2, 1]]


def test_feature_dropout_drops_channels_of_each_example() -> None:
    physical, dims, _ = batched((torch.ones(3, 8, 5),), 4)
    for op, randomness in ((aten.feature_dropout.default, "different"), (aten.feature_dropout.default, "same")):
        output, out_dim = run_rule(op, randomness, 4, (*dims, None, None), (physical[0], 0.5, True))
        for one in output.unbind(out_dim):
            assert ((one == 0).all(-1) | (one != 0).all(-1)).all()


def test_rrelu_same_shares_the_slopes() -> None:
    op = aten.rrelu_with_noise_functional.default
    x = torch.randn(3, 50)
    (output, noise), dims = run_rule(op, "same", 3, (0, None), (x, torch.empty(50), 0.1, 0.9, True))
    assert dims == (0, 0)
    torch.testing.assert_close(output, x * noise)
    assert (noise[x > 0] == 1).all()
    slopes = torch.where(x <= 0, noise, torch.nan)
    spread = slopes.nan_to_num(-1).amax(0) - slopes.nan_to_num(2).amin(0)
    assert ((spread == 0) | (spread == -3)).all()
    assert ((noise[x <= 0] >= 0.1) & (noise[x <= 0] <= 0.9)).all()


@pytest.mark.parametrize("op", DROPOUTS, ids=str)
def test_evaluation_draws_nothing(op: OpOverload) -> None:
    """Out of training, and with probability 0, dropout is allowed in every mode."""
    physical, dims, examples = batched((IMAGE,), 3)
    for p, train in ((0.5, False), (0.0, True)):
        output, out_dims = run_rule(op, "error", 3, (*dims, None, None), (*physical, p, train))
        for got, example in zip(rows(output, out_dims), examples):
            torch.testing.assert_close(got, first(op(*example, p, train)))
        unbatched, dims_unbatched = run_rule(op, "error", 3, (None, None, None), (IMAGE, p, train))
        assert all(dim is None for dim in tree_flatten(dims_unbatched)[0])
        torch.testing.assert_close(first(unbatched), first(op(IMAGE, p, train)))


def test_composites_and_attention_without_dropout_are_left_to_their_pieces() -> None:
    q = torch.randn(2, 3, 4, 5)
    for op in aten.scaled_dot_product_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default:
        with pytest.raises(RuleDeclined):
            run_rule(op, "error", 2, (0, 0, 0), (q, q, q))


# ---------------------------------------------------------------------------------------------------------------
# Through the public function


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.rand(3),
        lambda x: torch.randperm(5),
        lambda x: torch.rand_like(x),
        lambda x: torch.randint_like(x, 100),
        lambda x: torch.normal(0.0, 1.0, (20,)),
        lambda x: x.clone().uniform_(),
        lambda x: x.clone().bernoulli_(0.4),
        lambda x: torch.zeros_like(x).normal_(),
        lambda x: torch.nn.functional.dropout(x, 0.5, True),
    ],
)
def test_vmap_draws_what_torch_func_draws(draw: Callable[[Tensor], Tensor], randomness: str) -> None:
    x = torch.linspace(0.1, 0.9, 12).reshape(3, 4)
    expected = seeded(torch.vmap(draw, randomness=randomness), x)
    torch.testing.assert_close(seeded(functrans.vmap(draw, randomness=randomness), x), expected)


def test_vmap_in_vmap_has_two_modes() -> None:
    def outer(x: Tensor) -> Tensor:
        return functrans.vmap(lambda y: y * 0 + torch.rand(4), randomness="same")(x)

    drawn = functrans.vmap(outer, randomness="different")(torch.zeros(3, 2))
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert not torch.equal(drawn[0], drawn[1])
