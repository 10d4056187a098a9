"""The operators that copy what a view operator views, for programs that have to be without views."""

from __future__ import annotations

import torch

from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

#: By view operator: the operator of the same arguments whose result shares no memory. (Views that are composite are
#: made of these.)
COPIES: dict[OpOverload, OpOverload] = {
    getattr(getattr(aten, name), overload): getattr(getattr(aten, f"{name}_copy"), overload)
    for name, overload in (
        ("_conj", "default"), ("_neg_view", "default"), ("_reshape_alias", "default"), ("alias", "default"),
        ("as_strided", "default"), ("detach", "default"), ("diagonal", "default"), ("expand", "default"),
        ("lift_fresh", "default"), ("permute", "default"), ("select", "int"), ("slice", "Tensor"), ("split", "Tensor"),
        ("split_with_sizes", "default"), ("squeeze", "default"), ("squeeze", "dim"), ("squeeze", "dims"),
        ("t", "default"), ("transpose", "int"), ("unbind", "int"), ("unfold", "default"), ("unsqueeze", "default"),
        ("view", "default"), ("view", "dtype"), ("view_as_complex", "default"), ("view_as_real", "default"),
    )
}  # fmt: skip
