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
from functrans.interpreters.vmap.table import BatchInfo, logical_rank, logical_shape, materialize
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
    return torch.empty(logical_shape(x, bdim), dtype=x.dtype, device=x.device)


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
