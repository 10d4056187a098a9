"""Operators that work on each element by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.airy import airy_ai_slope
from functrans.derivatives.incomplete_gamma import gamma_density, igamma_by_shape, igamma_quotient
from functrans.derivatives.orthogonal import gegenbauer, laguerre
from functrans.derivatives.zeta import zeta_by_s
from functrans.interpreters.vmap.elementwise import align, elementwise, elementwise_nary
from functrans.interpreters.vmap.families import RuleDeclined, same_dims, tensor_positions
from functrans.interpreters.vmap.rules.factories import in_memory_format
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo, batching_rule, logical_rank, materialize
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------------------------
# By PyTorch's tag

#: Operators that are pointwise and not tagged so: other names of tagged ones, which are thus batched as a whole, too;
#: small composites; and those that PyTorch leaves out (leaky_relu until 2.11).
UNTAGGED = """
    absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh divide fix greater greater_equal less less_equal
    multiply negative not_equal special_digamma special_erf special_erfc special_erfinv special_exp2 special_expit
    special_expm1 special_gammainc special_gammaincc special_gammaln special_i0 special_log1p special_logit
    special_multigammaln special_ndtr special_polygamma special_psi special_round special_sinc special_xlogy subtract
    true_divide
    __and__ __or__ isreal
    complex fill floor_divide hardswish leaky_relu log_sigmoid polar rsub zero
"""


def load_tagged() -> None:
    """A rule for each operator that PyTorch tags as pointwise, by its public functions' names, if it has none yet."""
    public = {*dir(Tensor), *dir(torch.nn.functional), *(f"special_{name}" for name in torch.special.__all__)}
    untagged = set(UNTAGGED.split())
    for name in sorted(public | untagged):
        packet = getattr(aten, name, None)
        for op in (getattr(packet, overload) for overload in getattr(packet, "overloads", list)()):
            said = name in untagged or torch.Tag.pointwise in op.tags
            if said and is_function_of_tensors(op) and op not in BATCHING_RULES:
                elementwise(op)


def is_function_of_tensors(op: OpOverload) -> bool:
    """Whether ``op`` is pure, draws nothing, and both takes and returns tensors (it takes them one by one)."""
    schema = op._schema
    if schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags or "Tensor[]" in str(schema):
        return False
    return bool(tensor_positions(op)) and all(isinstance(one.type, torch.TensorType) for one in schema.returns)


# ---------------------------------------------------------------------------------------------------------------
# Their own reasons

# What derivatives of ours are made of.
elementwise(airy_ai_slope, gegenbauer, laguerre, gamma_density, igamma_by_shape, igamma_quotient, zeta_by_s)

# Of the draws from a simplex.
elementwise(aten._dirichlet_grad.default)

# The condition or mask takes no part in type promotion.
elementwise(aten.where.self, promoting=(1, 2))
elementwise(aten.where.Scalar)
elementwise(aten.where.ScalarOther, promoting=(1,))
elementwise(aten.where.ScalarSelf, promoting=(2,))
elementwise(aten.masked_fill.Scalar, promoting=())


clamp_of_three = elementwise_nary(aten.clamp.Tensor, (0, 1, 2), (0, 1, 2))


@batching_rule(aten.isclose.default)
def isclose(
    info: BatchInfo, in_dims: Sequence[Any], self: Tensor, other: Tensor, *options: Any
) -> tuple[Tensor, int]:
    """With ``equal_nan`` it writes into what is of the first one's shape (until PyTorch 2.11)."""
    self, other = align((self, other), in_dims, (0, 1))
    return aten.isclose.default(self.expand(broadcast_shapes(self.shape, other.shape)), other, *options), 0


@batching_rule(aten.clamp.Tensor)
def clamp(info: BatchInfo, in_dims: Sequence[Any], *args: Tensor | None) -> tuple[Any, Any]:
    """PyTorch's own derivative raises where one of two bounds is broadcast (2.14), as an unbatched one would be."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if len(tensors) == 3:
        args = tuple([materialize(x, d, info.batch_size) for x, d in zip(tensors, in_dims, strict=True)])
        in_dims = (0, 0, 0)
    return clamp_of_three(info, in_dims, *args)


@batching_rule(aten.masked_fill.Tensor)
def masked_fill_tensor(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, mask: Tensor, value: Tensor
) -> tuple[Any, Any]:
    """The value is a 0-d tensor; where it is batched, ``where`` takes it."""
    rank = max(logical_rank(x, in_dims[0]), logical_rank(mask, in_dims[1]))
    if in_dims[2] is None:
        x, mask = align((x, mask), in_dims, (0, 1))
        return aten.masked_fill.Tensor(x, mask, value), 0
    if value.dim() != 1 or not torch.can_cast(value.dtype, x.dtype):
        raise RuleDeclined("masked_fill: the value must be 0-d and of a dtype that self can hold")
    x, mask = align((x, mask), in_dims, (0, 1))
    value = value.to(x.dtype).view([info.batch_size, *([1] * rank)])
    return aten.where.self(mask, value, x), 0


@batching_rule(aten.fill.Tensor)
def fill_tensor(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, value: Tensor) -> tuple[Any, Any]:
    """Only the shape and dtype of ``x`` matter."""
    if in_dims[1] is None:
        return aten.fill.Tensor(x, value), in_dims[0]
    if value.dim() != 1:
        raise RuleDeclined("fill: the value must be 0-d")
    x = materialize(x, in_dims[0], info.batch_size)
    return written(x, value.view([info.batch_size, *([1] * (x.dim() - 1))])), 0


@batching_rule(aten.copy.default)
def copy(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, source: Tensor, non_blocking: bool = False
) -> tuple[Any, Any]:
    """The source is broadcast to ``x`` and takes its dtype."""
    if logical_rank(source, in_dims[1]) > logical_rank(x, in_dims[0]):
        raise RuleDeclined("copy: the source has more dimensions than self")
    x, source = materialize(x, in_dims[0], info.batch_size), align((x, source), in_dims, (0, 1))[1]
    return written(x, source), 0


def written(x: Tensor, source: Tensor) -> Tensor:
    """A tensor of its own with the shape, dtype and device of ``x`` and the values of ``source``."""
    return source.to(device=x.device, dtype=x.dtype).expand(x.shape).clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------
# Copies and casts: the memory format is the example's


@batching_rule(aten.clone.default)
def clone(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *, memory_format: torch.memory_format | None = None
) -> tuple[Any, Any]:
    """A copy; see ``in_memory_format``."""
    return in_memory_format(aten.clone.default, x, in_dims[0], memory_format)


@batching_rule(aten.contiguous.default)
def contiguous(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Any, Any]:
    """A copy if the example is not laid out so yet; see ``in_memory_format``."""
    return in_memory_format(aten.contiguous.default, x, in_dims[0], memory_format)


def cast_rule(op: Any) -> Callable[..., tuple[Any, Any]]:
    """``to`` in its forms: only the first tensor is data, another one gives its dtype and device."""
    names = [argument.name for argument in op._schema.arguments]
    place = names.index("memory_format") if "memory_format" in names else None
    keyword = place is not None and op._schema.arguments[place].kwarg_only

    def cast(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        bdim = in_dims[0]
        memory_format = None
        if keyword:
            memory_format = kwargs.pop("memory_format", None)
        elif place is not None and len(args) >= place:
            memory_format, args = args[place - 1], args[: place - 1]
        if bdim is None or memory_format is None or memory_format is torch.preserve_format:
            if memory_format is not None:
                kwargs["memory_format"] = memory_format
            output = op(x, *args, **kwargs)
            return output, same_dims(output, bdim)

        def run(y: Tensor, memory_format: torch.memory_format) -> Tensor:
            return op(y, *args, memory_format=memory_format, **kwargs)

        return in_memory_format(run, x, bdim, memory_format)

    return cast


for cast_op in (
    aten._to_copy.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
):
    batching_rule(cast_op)(cast_rule(cast_op))
