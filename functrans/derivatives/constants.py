"""Operators whose outputs count as constants, one by one with the reason.

Nothing else does: an operator without an entry that PyTorch has no derivative for is an error (NOTE [Arguments without
a formula]).
"""

import torch

from functrans.derivatives.table import no_derivative
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

#: names of operators, by the reason why a derivative of zero is right
CONSTANT = {
    "only the shape, dtype or memory of the arguments is used": (
        "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "zero",
        "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "is_same_size", "is_set_to",
        "_new_zeros_with_same_feature_meta",
        "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_is_zerotensor",
        # in these pure forms the numbers that are overwritten do not matter, and the parameters are Python numbers
        "normal_functional", "uniform", "exponential", "geometric", "log_normal", "cauchy", "random",
    ),
    "truth values": (
        "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isposinf", "isneginf", "signbit", "isin",
        "logical_and", "logical_or", "logical_xor", "logical_not", "any", "all", "is_nonzero", "equal", "allclose",
        "_assert_async",
    ),
    "positions and counts, which are constant between the points where they jump": (
        "argmax", "argmin", "count_nonzero", "nonzero", "nonzero_static", "bucketize", "searchsorted", "histc",
        "floor_divide", "one_hot",
    ),
    "a Python number: whoever asks for it has left what is differentiated": ("item", "_local_scalar_dense"),
    "a draw from a discrete distribution": ("bernoulli", "multinomial"),
    # a convention of PyTorch's, whose formulas are zeros: the derivative along the path of one draw is that of
    # mean + std * randn_like(mean)
    "a draw that PyTorch does not differentiate by its parameters": ("normal",),
}  # fmt: skip

#: Names of operators that answer a question about shapes or memory by a Python value.
ABOUT_METADATA = frozenset((
    "aten::is_same_size", "aten::is_set_to", "aten::_is_zerotensor", "aten::_has_same_storage_numel", "aten::sym_size",
    "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset", "aten::is_coalesced", "aten::sparse_dim",
    "aten::dense_dim", "aten::_nnz",
))  # fmt: skip

#: Operators that read nothing of their arguments but shape, dtype and device, so that their result is a constant of
#: every transform.
READS_NO_VALUES = frozenset(
    getattr(getattr(aten, name), overload)
    for name in (
        "empty_like", "full_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones_like",
        "rand_like", "randint_like", "randn_like", "zeros_like",
    )
    for overload in getattr(aten, name).overloads()
    if "out" not in overload and "Tensor" not in overload
)  # fmt: skip


#: arguments of which only the places of the elements are used
PLACES: dict[OpOverload, tuple[str, ...]] = {aten.sparse_mask.default: ("mask",)}


for _name in (name for names in CONSTANT.values() for name in names):
    _packet = getattr(aten, _name, None)
    for _overload in _packet.overloads() if _packet is not None else ():
        _op = getattr(_packet, _overload)
        if not any(a.alias_info is not None and a.alias_info.is_write for a in _op._schema.arguments):
            no_derivative(_op)
