"""In which of its arguments an operator is linear.

NOTE [What is linear]
An operator is linear if the derivative table says so: jointly in all arguments that have a formula (``tangent`` is
"linear"), or in each by itself ("multilinear"). Of the others ``JOINTLY`` lists those that are, by groups of arguments.
(That a derivative is the same everywhere is not enough: ``floor`` has such a one.)
"""

from __future__ import annotations

import torch

from functrans.derivatives.table import DERIVATIVES
from functrans.operators.products import PRODUCTS
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

#: Operators that are linear in groups of arguments, the rest of a group being zeros; numbers count as well.
JOINTLY: dict[OpOverload, tuple[frozenset[str], ...]] = {
    op: tuple(frozenset(group.split()) for group in groups)
    for groups, ops in (
        (("self other",), (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor,
                           aten.rsub.Scalar, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)),
        (("self", "other"), (aten.mul.Tensor, aten.mul.Scalar)),
        (("self",), (aten.div.Tensor, aten.div.Scalar, aten.ldexp.Tensor, aten.neg.default, aten.positive.default,
                     aten.deg2rad.default, aten.rad2deg.default, aten.view_as_real.default,
                     aten.cholesky_solve.default)),
        (("self end", "weight self", "weight end"), (aten.lerp.Scalar, aten.lerp.Tensor)),
        (("self value",), (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.fill.Scalar, aten.fill.Tensor,
                           aten.scatter.value, aten.index_fill.int_Scalar, aten.constant_pad_nd.default)),
        (("self src",), (aten.copy.default,)),
        (("real imag",), (aten.complex.default,)),
        (("self tensor1", "self tensor2"), (aten.addcmul.default,)),
        (("self tensor1",), (aten.addcdiv.default,)),
        *(((f"self {p.names[0]}", f"self {p.names[1]}"), (p.op,)) for p in PRODUCTS.values() if p.adds),
        (("input bias", "weight bias"), (aten.linear.default, aten.convolution.default)),
        (("B",), (aten.linalg_solve_triangular.default, aten._linalg_solve_ex.default, aten.linalg_lu_solve.default)),
        (("self", "other"), (aten.linalg_cross.default,)),
        (("self",), (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)),
        (("input",), (aten.native_dropout.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)),
        (("weight",), (aten.embedding.default,)),
        (("grad_output",), (aten.threshold_backward.default, aten.leaky_relu_backward.default,
                            aten.hardtanh_backward.default, aten.softshrink_backward.default,
                            aten.hardswish_backward.default, aten.sigmoid_backward.default,
                            aten.tanh_backward.default, aten.softplus_backward.default, aten.elu_backward.default,
                            aten.gelu_backward.default, aten._softmax_backward_data.default,
                            aten._log_softmax_backward_data.default)),
    )
    for op in ops
}  # fmt: skip


def linear_group(op: OpOverload, names: set[str], tensors: int) -> frozenset[str] | None:
    """Arguments, those in ``names`` among them, in which ``op`` is linear; None if there are none.

    ``tensors``: how many the arguments in ``names`` hold, lists of them being one argument.
    """
    entry = DERIVATIVES.get(op)
    if entry is not None and not names <= entry.formulas.keys():
        return None
    if entry is not None and entry.tangent == "linear":
        return frozenset(entry.formulas)
    if entry is not None and entry.tangent == "multilinear":
        return frozenset(names) if tensors == 1 else None
    return next((group for group in JOINTLY.get(op, ()) if names <= group), None)
