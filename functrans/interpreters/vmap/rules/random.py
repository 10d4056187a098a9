"""Random operators: whether the examples of a vmap share a draw.

With ``randomness="different"`` each example draws for itself, also where nothing is batched. With ``"same"`` there is
one draw; it is shared by all examples, so the parameters of the distribution must not differ between them. With
``"error"`` a random operator is refused. The meanings are torch.func's; see the docs of ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.errors import FunctransError
from functrans.interpreters.vmap.elementwise import align
from functrans.interpreters.vmap.families import (
    RuleDeclined,
    argument_place,
    pad_rank,
    same_dims,
    tensor_positions,
    with_defaults,
)
from functrans.interpreters.vmap.rules.factories import in_memory_format
from functrans.interpreters.vmap.table import BatchInfo, logical_rank, materialize
from functrans.operators.rules import RuleTable
from functrans.operators.schemas import has_composite_kernel
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tree_flatten, tree_unflatten

aten = torch.ops.aten

RandomRule = Callable[[BatchInfo, OpOverload, Sequence[Any], Sequence[Any], dict[str, Any]], tuple[Any, Any]]
#: asked after a batching rule of the operator
RANDOM_RULES: RuleTable[RandomRule] = RuleTable("random rules")


class RandomnessError(FunctransError):
    """A random operator ran in a vmap whose ``randomness`` does not say what to draw.

    Cure: ``vmap(..., randomness="different")`` draws for each example, ``randomness="same"`` once for all of them.
    """

    def __init__(self, op: OpOverload, args: Sequence[Any], randomness: str) -> None:
        call = f"{op}({', '.join(shown(one) for one in args)})"
        if randomness == "same":
            text = (
                f'{call} ran in vmap(..., randomness="same") with arguments that differ between the examples, so there '
                'is no one draw to share. Pass randomness="different", or draw with parameters that are the same for '
                "all examples and transform the result."
            )
        else:
            text = (
                f"{call} ran in vmap(..., randomness={randomness!r}): got a random operator, expected none. "
                'Pass randomness="different" for a draw of its own per example, '
                'or randomness="same" for one draw that all examples share.'
            )
        super().__init__(text)


def shown(x: Any) -> str:
    """An argument, for a message."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else repr(x)


def random_rule(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """What ``op`` draws under the vmap's randomness; ``in_dims`` may be None throughout.

    Raises ``RuleDeclined`` for a call in which nothing is random and for a composite, whose pieces come by themselves.
    """
    rule = RANDOM_RULES.get(op)
    if draws_nothing(op, args):
        if rule is None:
            raise RuleDeclined(f"{op}: nothing is random in this call")
        return undrawn(info, op, in_dims, args, kwargs)
    if rule is None and has_composite_kernel(op):
        raise RuleDeclined(f"{op}: its pieces draw")
    if info.randomness not in ("same", "different"):
        raise RandomnessError(op, args, info.randomness)
    return (rule or unknown)(info, op, in_dims, args, dict(kwargs))


def all_unbatched(in_dims: Sequence[Any]) -> bool:
    """Whether no argument is batched, in lists neither."""
    return all(dim is None for dim in tree_flatten(list(in_dims))[0])


def draws_nothing(op: OpOverload, args: Sequence[Any]) -> bool:
    """Dropout, and what has dropout inside, out of training or with probability 0 or 1."""
    arguments = with_defaults(op, args)
    train = argument_place(op, "train", "training")
    if train is not None and arguments[train] is not None and not arguments[train]:
        return True
    if "drop" not in op.name() and "attention" not in op.name():
        dropout = argument_place(op, "dropout")
    else:
        dropout = argument_place(op, "p", "dropout_p", "dropout")
    return dropout is not None and arguments[dropout] in (0, 1)


def undrawn(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """An activation or dropout that is a fixed elementwise function in this call."""
    if all_unbatched(in_dims):
        output = op(*args, **kwargs)
        return output, same_dims(output, None)
    full = list(args)
    for place in tensor_positions(op):
        full[place] = materialize(args[place], in_dims[place], info.batch_size)
    output = op(*full, **kwargs)
    return output, same_dims(output, 0)


def unknown(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """A random operator that has no family below: one draw, or a loop of draws."""
    batched = not all_unbatched(in_dims)
    if info.randomness == "same":
        if batched:
            raise RandomnessError(op, args, info.randomness)
        output = op(*args, **kwargs)
        return output, same_dims(output, None)
    if batched or info.batch_size == 0:
        raise RuleDeclined(f"{op}: the loop over the examples draws for each")
    draws = [tree_flatten(op(*args, **kwargs)) for _ in range(info.batch_size)]
    output = tree_unflatten(draws[0][1], [torch.stack(column) for column in zip(*(leaves for leaves, _ in draws))])
    return output, same_dims(output, 0)


random_family = RANDOM_RULES.register


# ---------------------------------------------------------------------------------------------------------------
# Tensors from nothing


@random_family(
    aten.normal.float_float,
    aten.rand.default,
    aten.rand.generator,
    aten.randint.default,
    aten.randint.generator,
    aten.randint.low,
    aten.randint.low_generator,
    aten.randn.default,
    aten.randn.generator,
)
def random_factory(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """A longer size draws for all examples at once."""
    if info.randomness == "same":
        return op(*args, **kwargs), None
    place = argument_place(op, "size")
    assert place is not None
    sized = list(args)
    sized[place] = [info.batch_size, *args[place]]
    return op(*sized, **kwargs), 0


@random_family(aten.randperm.default, aten.randperm.generator)
def random_permutation(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """There is no operator for several permutations."""
    if info.randomness == "same":
        return op(*args, **kwargs), None
    if info.batch_size == 0:
        options = {name: value for name, value in kwargs.items() if name != "generator"}
        options.setdefault("dtype", torch.int64)
        return torch.empty((0, args[0]), **options), 0
    return torch.stack([op(*args, **kwargs) for _ in range(info.batch_size)]), 0


# ---------------------------------------------------------------------------------------------------------------
# After the model of a tensor, whose values do not matter


@random_family(
    aten.rand_like.default,
    aten.rand_like.generator,
    aten.randint_like.default,
    aten.randint_like.generator,
    aten.randint_like.low_dtype,
    aten.randint_like.low_generator_dtype,
    aten.randn_like.default,
    aten.randn_like.generator,
)
def random_like(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Drawn for a tensor of the example's shape, or for the whole batch."""
    x, *rest = args
    if info.randomness == "same":
        return op(example_like(x, in_dims[0]), *rest, **kwargs), None
    memory_format = kwargs.pop("memory_format", None)

    def run(y: Tensor, memory_format: torch.memory_format) -> Tensor:
        return op(y, *rest, memory_format=memory_format, **kwargs)

    return in_memory_format(run, materialize(x, in_dims[0], info.batch_size), 0, memory_format)


@random_family(
    aten.bernoulli.p,
    aten.cauchy.default,
    aten.exponential.default,
    aten.geometric.default,
    aten.log_normal.default,
    aten.normal_functional.default,
    aten.random.default,
    aten.random.to,
    getattr(aten.random, "from"),
    aten.uniform.default,
)
def random_fill(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """The pure forms of ``x.uniform_()`` and others: what fills a batched tensor is batched, a shared draw too."""
    x, *rest = args
    bdim = in_dims[0]
    if info.randomness == "different":
        return op(materialize(x, bdim, info.batch_size), *rest, **kwargs), 0
    drawn = op(example_like(x, bdim), *rest, **kwargs)
    return (drawn, None) if bdim is None else (shared(drawn, info.batch_size), 0)


def example_like(x: Tensor, bdim: int | None) -> Tensor:
    """An uninitialized tensor with the shape of one example."""
    if bdim is None:
        return x
    shape = [size for place, size in enumerate(x.shape) if place != bdim]
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def shared(x: Tensor, batch_size: int) -> Tensor:
    """One draw for all examples, in storage of their own."""
    return x.unsqueeze(0).expand(batch_size, *x.shape).clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------
# Distributions with tensors as parameters


@random_family(
    aten._standard_gamma.default,
    aten.bernoulli.default,
    aten.binomial.default,
    aten.normal.Tensor_Tensor,
    aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    aten.poisson.default,
)
def random_elementwise(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """One element is drawn for each element of the parameters, which broadcast."""
    if info.randomness == "same":
        if not all_unbatched(in_dims):
            raise RandomnessError(op, args, info.randomness)
        return op(*args, **kwargs), None
    places = tensor_positions(op)
    rank = max(logical_rank(args[place], in_dims[place]) for place in places)
    full = list(args)
    for place in places:
        full[place] = pad_rank(materialize(args[place], in_dims[place], info.batch_size), 0, rank)
    return op(*full, **kwargs), 0


@random_family(aten.bernoulli.Tensor)
def bernoulli_fill(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """The pure form of ``x.bernoulli_(p)``: the shape and dtype of ``x``, and ``p`` broadcast to it."""
    x, p = args
    x_dim, p_dim = in_dims
    if info.randomness == "same":
        if p_dim is not None:
            raise RandomnessError(op, args, info.randomness)
        drawn = op(example_like(x, x_dim), p, **kwargs)
        return (drawn, None) if x_dim is None else (shared(drawn, info.batch_size), 0)
    if logical_rank(p, p_dim) > logical_rank(x, x_dim):
        raise RuleDeclined(f"{op}: p has more dimensions than self")
    p = align((x, p), in_dims, (0, 1))[1]
    return op(materialize(x, x_dim, info.batch_size), p, **kwargs), 0


@random_family(aten._sample_dirichlet.default, aten.multinomial.default)
def random_rows(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """A distribution per row of the last dimension; multinomial takes one or two dimensions."""
    x, *rest = args
    if info.randomness == "same":
        if in_dims[0] is not None:
            raise RandomnessError(op, args, info.randomness)
        return op(x, *rest, **kwargs), None
    x = materialize(x, in_dims[0], info.batch_size)
    if x.dim() < 2 or (op is aten.multinomial.default and x.dim() > 3):
        raise RuleDeclined(f"{op}: the example's rank is left to the operator itself")
    if x.dim() == 2:
        return op(x, *rest, **kwargs), 0
    drawn = op(x.flatten(0, -2), *rest, **kwargs)
    return drawn.view([*x.shape[:-1], drawn.shape[-1]]), 0


# ---------------------------------------------------------------------------------------------------------------
# Dropout


@random_family(aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default)
def dropout(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """A factor for each element (each channel), which is what dropout makes of ones."""
    x, p, train = with_defaults(op, args)
    features = op is aten.feature_dropout.default
    if features and logical_rank(x, in_dims[0]) < 2:
        raise RuleDeclined(f"{op}: the example's rank is left to the operator itself")
    if info.randomness == "different":
        x = materialize(x, in_dims[0], info.batch_size)
        if features:
            return op(x.flatten(0, 1), p, train).unflatten(0, x.shape[:2]), 0
        output = op(x, p, train)
        if op is aten.native_dropout.default and info.batch_size == 0:
            output = output[0], output[1].bool()  # for no elements the mask is a copy of the input
        return output, same_dims(output, 0)
    if in_dims[0] is None:
        output = op(x, p, train)
        return output, same_dims(output, None)
    factor = op(torch.ones_like(example_like(x, in_dims[0])), p, train)
    x = materialize(x, in_dims[0], info.batch_size)
    if isinstance(factor, Tensor):
        return x * factor, 0
    return (x * factor[0], shared(factor[1], info.batch_size)), (0, 0)


@random_family(aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
def alpha_dropout(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """What is dropped takes a value that keeps mean and variance, so a shared draw is told from a run on zeros."""
    x, p, train = args
    features = op is aten.feature_alpha_dropout.default
    if features and logical_rank(x, in_dims[0]) < 2:
        raise RuleDeclined(f"{op}: the example's rank is left to the operator itself")
    if info.randomness == "different":
        x = materialize(x, in_dims[0], info.batch_size)
        if features:
            return op(x.flatten(0, 1), p, train).unflatten(0, x.shape[:2]), 0
        return op(x, p, train), 0
    if in_dims[0] is None:
        return op(x, p, train), None
    if p == 1:
        return x * 0, in_dims[0]
    # Klambauer et al., Self-Normalizing Neural Networks: dropped values become -alpha', then x -> a x + b.
    alpha = 1.7580993408473766
    a = ((alpha * alpha * p + 1) * (1 - p)) ** -0.5
    x = materialize(x, in_dims[0], info.batch_size)
    shape = list(x.shape[1:3]) + [1] * (x.dim() - 3) if features else list(x.shape[1:])
    kept = aten.bernoulli.p(torch.empty(shape, dtype=x.dtype, device=x.device), 1 - p)
    return x * (kept * a) + ((kept - 1) * (alpha * a) + alpha * a * p), 0


@random_family(aten.rrelu_with_noise_functional.default)
def rrelu(
    info: BatchInfo, op: OpOverload, in_dims: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """A random slope for what is not positive; slopes that all examples share are drawn for a negative tensor."""
    x, noise, lower, upper, training, generator = with_defaults(op, args)
    if info.randomness == "different":
        x = materialize(x, in_dims[0], info.batch_size)
        noise = materialize(noise, in_dims[1], info.batch_size)
        return op(x, noise, lower, upper, training, generator), (0, 0)
    if in_dims[0] is None:
        example = example_like(noise, in_dims[1])
        return op(x, example, lower, upper, training, generator), (None, None)
    negative = torch.full_like(example_like(x, in_dims[0]), -1)
    slope = op(negative, torch.empty_like(negative), lower, upper, training, generator)[1]
    x = materialize(x, in_dims[0], info.batch_size)
    slope = torch.where(x <= 0, slope, torch.ones_like(x))
    return (x * slope, slope), (0, 0)
