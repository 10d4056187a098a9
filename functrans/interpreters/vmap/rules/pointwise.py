"""Operators that work on each element by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.airy import airy_ai_slope
from functrans.derivatives.orthogonal import gegenbauer, laguerre
from functrans.interpreters.vmap.families import (
    RuleDeclined,
    align,
    elementwise,
    same_dims,
)
from functrans.interpreters.vmap.rules.factories import in_memory_format
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, logical_rank, materialize

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------------------------
# One tensor

elementwise(
    aten.abs.default,
    aten.absolute.default,
    aten.acos.default,
    aten.acosh.default,
    aten.angle.default,
    aten.arccos.default,
    aten.arccosh.default,
    aten.arcsin.default,
    aten.arcsinh.default,
    aten.arctan.default,
    aten.arctanh.default,
    aten.asin.default,
    aten.asinh.default,
    aten.atan.default,
    aten.atanh.default,
    aten.bitwise_not.default,
    aten.ceil.default,
    aten.conj_physical.default,
    aten.cos.default,
    aten.cosh.default,
    aten.deg2rad.default,
    aten.digamma.default,
    aten.erf.default,
    aten.erfc.default,
    aten.erfinv.default,
    aten.exp.default,
    aten.exp2.default,
    aten.expm1.default,
    aten.fix.default,
    aten.floor.default,
    aten.frac.default,
    aten.frexp.Tensor,
    aten.i0.default,
    aten.isfinite.default,
    aten.isinf.default,
    aten.isnan.default,
    aten.isneginf.default,
    aten.isposinf.default,
    aten.isreal.default,
    aten.lgamma.default,
    aten.log.default,
    aten.log10.default,
    aten.log1p.default,
    aten.log2.default,
    aten.logical_not.default,
    aten.logit.default,
    aten.mvlgamma.default,
    aten.nan_to_num.default,
    aten.neg.default,
    aten.negative.default,
    aten.polygamma.default,
    aten.positive.default,
    aten.rad2deg.default,
    aten.reciprocal.default,
    aten.round.default,
    aten.round.decimals,
    aten.rsqrt.default,
    aten.sgn.default,
    aten.sign.default,
    aten.signbit.default,
    aten.sin.default,
    aten.sinc.default,
    aten.sinh.default,
    aten.sqrt.default,
    aten.square.default,
    aten.tan.default,
    aten.tanh.default,
    aten.trunc.default,
)

# Special functions of one tensor
elementwise(
    aten.special_airy_ai.default,
    aten.special_bessel_j0.default,
    aten.special_bessel_j1.default,
    aten.special_bessel_y0.default,
    aten.special_bessel_y1.default,
    aten.special_digamma.default,
    aten.special_entr.default,
    aten.special_erf.default,
    aten.special_erfc.default,
    aten.special_erfcx.default,
    aten.special_erfinv.default,
    aten.special_exp2.default,
    aten.special_expit.default,
    aten.special_expm1.default,
    aten.special_gammaln.default,
    aten.special_i0.default,
    aten.special_i0e.default,
    aten.special_i1.default,
    aten.special_i1e.default,
    aten.special_log1p.default,
    aten.special_log_ndtr.default,
    aten.special_logit.default,
    aten.special_modified_bessel_i0.default,
    aten.special_modified_bessel_i1.default,
    aten.special_modified_bessel_k0.default,
    aten.special_modified_bessel_k1.default,
    aten.special_multigammaln.default,
    aten.special_ndtr.default,
    aten.special_ndtri.default,
    aten.special_polygamma.default,
    aten.special_psi.default,
    aten.special_round.default,
    aten.special_scaled_modified_bessel_k0.default,
    aten.special_scaled_modified_bessel_k1.default,
    aten.special_sinc.default,
    aten.special_spherical_bessel_j0.default,
)

# A tensor and a number
elementwise(
    aten.__and__.Scalar,
    aten.__lshift__.Scalar,
    aten.__or__.Scalar,
    aten.__rshift__.Scalar,
    aten.__xor__.Scalar,
    aten.add.Scalar,
    aten.bitwise_and.Scalar,
    aten.bitwise_and.Scalar_Tensor,
    aten.bitwise_left_shift.Scalar_Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.bitwise_or.Scalar,
    aten.bitwise_or.Scalar_Tensor,
    aten.bitwise_right_shift.Scalar_Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.bitwise_xor.Scalar,
    aten.bitwise_xor.Scalar_Tensor,
    aten.clamp.default,
    aten.clamp_max.default,
    aten.clamp_min.default,
    aten.clip.default,
    aten.copysign.Scalar,
    aten.div.Scalar,
    aten.div.Scalar_mode,
    aten.divide.Scalar,
    aten.divide.Scalar_mode,
    aten.eq.Scalar,
    aten.fill.Scalar,
    aten.float_power.Scalar,
    aten.float_power.Tensor_Scalar,
    aten.floor_divide.Scalar,
    aten.fmod.Scalar,
    aten.ge.Scalar,
    aten.greater.Scalar,
    aten.greater_equal.Scalar,
    aten.gt.Scalar,
    aten.le.Scalar,
    aten.less.Scalar,
    aten.less_equal.Scalar,
    aten.lt.Scalar,
    aten.mul.Scalar,
    aten.multiply.Scalar,
    aten.ne.Scalar,
    aten.not_equal.Scalar,
    aten.pow.Scalar,
    aten.pow.Tensor_Scalar,
    aten.remainder.Scalar,
    aten.remainder.Scalar_Tensor,
    aten.rsub.Scalar,
    aten.special_chebyshev_polynomial_t.n_scalar,
    aten.special_chebyshev_polynomial_t.x_scalar,
    aten.special_chebyshev_polynomial_u.n_scalar,
    aten.special_chebyshev_polynomial_u.x_scalar,
    aten.special_chebyshev_polynomial_v.n_scalar,
    aten.special_chebyshev_polynomial_v.x_scalar,
    aten.special_chebyshev_polynomial_w.n_scalar,
    aten.special_chebyshev_polynomial_w.x_scalar,
    aten.special_hermite_polynomial_h.n_scalar,
    aten.special_hermite_polynomial_h.x_scalar,
    aten.special_hermite_polynomial_he.n_scalar,
    aten.special_hermite_polynomial_he.x_scalar,
    aten.special_laguerre_polynomial_l.n_scalar,
    aten.special_laguerre_polynomial_l.x_scalar,
    aten.special_legendre_polynomial_p.n_scalar,
    aten.special_legendre_polynomial_p.x_scalar,
    aten.special_shifted_chebyshev_polynomial_t.n_scalar,
    aten.special_shifted_chebyshev_polynomial_t.x_scalar,
    aten.special_shifted_chebyshev_polynomial_u.n_scalar,
    aten.special_shifted_chebyshev_polynomial_u.x_scalar,
    aten.special_shifted_chebyshev_polynomial_v.n_scalar,
    aten.special_shifted_chebyshev_polynomial_v.x_scalar,
    aten.special_shifted_chebyshev_polynomial_w.n_scalar,
    aten.special_shifted_chebyshev_polynomial_w.x_scalar,
    aten.special_xlog1py.other_scalar,
    aten.special_xlog1py.self_scalar,
    aten.special_xlogy.other_scalar,
    aten.special_xlogy.self_scalar,
    aten.special_zeta.other_scalar,
    aten.special_zeta.self_scalar,
    aten.sub.Scalar,
    aten.subtract.Scalar,
    aten.true_divide.Scalar,
    aten.where.Scalar,
    aten.xlogy.Scalar_Other,
    aten.xlogy.Scalar_Self,
    aten.zero.default,
)

# ---------------------------------------------------------------------------------------------------------------
# Two and three tensors

elementwise(
    aten.__and__.Tensor,
    aten.__lshift__.Tensor,
    aten.__or__.Tensor,
    aten.__rshift__.Tensor,
    aten.__xor__.Tensor,
    aten.add.Tensor,
    aten.arctan2.default,
    aten.atan2.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_left_shift.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_xor.Tensor,
    aten.clamp_max.Tensor,
    aten.clamp_min.Tensor,
    aten.complex.default,
    aten.copysign.Tensor,
    aten.div.Tensor,
    aten.div.Tensor_mode,
    aten.divide.Tensor,
    aten.divide.Tensor_mode,
    aten.eq.Tensor,
    aten.floor_divide.default,
    aten.fmax.default,
    aten.fmin.default,
    aten.fmod.Tensor,
    aten.gcd.default,
    aten.ge.Tensor,
    aten.greater.Tensor,
    aten.greater_equal.Tensor,
    aten.gt.Tensor,
    aten.heaviside.default,
    aten.hypot.default,
    aten.igamma.default,
    aten.igammac.default,
    aten.isclose.default,
    aten.lcm.default,
    aten.ldexp.Tensor,
    aten.le.Tensor,
    aten.lerp.Scalar,
    aten.less.Tensor,
    aten.less_equal.Tensor,
    aten.logaddexp.default,
    aten.logaddexp2.default,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.logical_xor.default,
    aten.lt.Tensor,
    aten.max.other,
    aten.maximum.default,
    aten.min.other,
    aten.minimum.default,
    aten.mul.Tensor,
    aten.multiply.Tensor,
    aten.ne.Tensor,
    aten.nextafter.default,
    aten.not_equal.Tensor,
    aten.polar.default,
    aten.pow.Tensor_Tensor,
    aten.remainder.Tensor,
    aten.rsub.Tensor,
    aten.special_chebyshev_polynomial_t.default,
    aten.special_chebyshev_polynomial_u.default,
    aten.special_chebyshev_polynomial_v.default,
    aten.special_chebyshev_polynomial_w.default,
    aten.special_gammainc.default,
    aten.special_gammaincc.default,
    aten.special_hermite_polynomial_h.default,
    aten.special_hermite_polynomial_he.default,
    aten.special_laguerre_polynomial_l.default,
    aten.special_legendre_polynomial_p.default,
    aten.special_shifted_chebyshev_polynomial_t.default,
    aten.special_shifted_chebyshev_polynomial_u.default,
    aten.special_shifted_chebyshev_polynomial_v.default,
    aten.special_shifted_chebyshev_polynomial_w.default,
    aten.special_xlog1py.default,
    aten.special_xlogy.default,
    aten.special_zeta.default,
    aten.sub.Tensor,
    aten.subtract.Tensor,
    aten.true_divide.Tensor,
    aten.xlogy.Tensor,
)

elementwise(
    aten.addcdiv.default,
    aten.addcmul.default,
    aten.clamp.Tensor,
    aten.clip.Tensor,
    aten.lerp.Tensor,
)

# What derivatives of ours are made of.
elementwise(airy_ai_slope, gegenbauer, laguerre)

# The condition or mask takes no part in type promotion.
elementwise(aten.where.self, promoting=(1, 2))
elementwise(aten.where.ScalarOther, promoting=(1,))
elementwise(aten.where.ScalarSelf, promoting=(2,))
elementwise(aten.masked_fill.Scalar, promoting=())

# ---------------------------------------------------------------------------------------------------------------
# Their own reasons


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
