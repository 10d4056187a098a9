"""Operators whose outputs do not depend differentiably on their inputs: truth values, positions, and copies of a shape."""

import torch

from functrans.derivatives.table import no_derivative

aten = torch.ops.aten

NAMES = (
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided",
    "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isposinf", "isneginf", "signbit", "isin",
    "logical_and", "logical_or", "logical_xor", "logical_not", "any", "all", "argmax", "argmin",
    "count_nonzero", "nonzero", "nonzero_static", "bucketize", "searchsorted", "histc",
    "item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "is_same_size", "bernoulli", "multinomial",
    "_assert_async", "is_set_to", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "floor_divide",
    "_is_zerotensor", "normal", "normal_functional", "uniform", "exponential",
    "geometric", "log_normal", "cauchy", "random", "zero",
)  # fmt: skip


for name in NAMES:
    packet = getattr(aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        op = getattr(packet, overload)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
        if not writes:
            no_derivative(op)
