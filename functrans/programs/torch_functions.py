"""What torch functions and methods mean, in operators: ``torch.sin``, ``Tensor.sin`` and ``x * y`` before PyTorch has
parsed them.

Only frequent functions stand here, called with arguments by position; for all others PyTorch's own parser decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

#: Functions of one tensor, whose operator is ``aten.<name>.default``.
UNARY = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "erfc", "erfinv", "exp",
    "exp2", "expm1", "floor", "frac", "hardsigmoid", "hardswish", "log", "log10", "log1p", "log2", "log_sigmoid",
    "mish", "neg", "reciprocal", "relu", "rsqrt", "sgn", "sigmoid", "sign", "silu", "sin", "sinh", "sqrt", "square",
    "tan", "tanh", "trunc",
)  # fmt: skip

#: Functions of one tensor and numbers, by the names of these; Python's functions take ``inplace`` behind them.
NUMERIC: dict[str, tuple[OpOverload, tuple[str, ...]]] = {
    "leaky_relu": (aten.leaky_relu.default, ("negative_slope",)),
    "elu": (aten.elu.default, ("alpha",)),
    "celu": (aten.celu.default, ("alpha",)),
    "softplus": (aten.softplus.default, ("beta", "threshold")),
    "hardtanh": (aten.hardtanh.default, ("min_val", "max_val")),
    "clamp": (aten.clamp.default, ("min", "max")),
    "clamp_min": (aten.clamp_min.default, ("min",)),
    "clamp_max": (aten.clamp_max.default, ("max",)),
}

#: Functions of two, by which of them are tensors (T) and which numbers (n).
BINARY: dict[str, dict[str, OpOverload]] = {
    "add": {"TT": aten.add.Tensor, "Tn": aten.add.Tensor},
    "sub": {"TT": aten.sub.Tensor, "Tn": aten.sub.Tensor},
    "rsub": {"TT": aten.rsub.Tensor, "Tn": aten.rsub.Scalar},
    "mul": {"TT": aten.mul.Tensor, "Tn": aten.mul.Tensor},
    "div": {"TT": aten.div.Tensor, "Tn": aten.div.Tensor},
    "pow": {"TT": aten.pow.Tensor_Tensor, "Tn": aten.pow.Tensor_Scalar},
    "maximum": {"TT": aten.maximum.default},
    "minimum": {"TT": aten.minimum.default},
}

#: Comparisons and choices: what derivatives' formulas are made of beside the above.
CHOICES: dict[str, dict[str, OpOverload]] = {
    **{
        name: {"TT": getattr(aten, name).Tensor, "Tn": getattr(aten, name).Scalar}
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
    "where": {"TTT": aten.where.self, "TTn": aten.where.ScalarOther, "TnT": aten.where.ScalarSelf},
    "zeros_like": {"T": aten.zeros_like.default},
}

OPERATORS: dict[str, dict[str, OpOverload]] = {
    **{name: {"T": getattr(aten, name).default} for name in UNARY},
    **BINARY,
    **CHOICES,
}

#: Methods whose sizes or dimensions may be given one by one.
BY_SIZES = ("view", "reshape", "expand", "permute", "flip")

#: Functions of other kinds, by their names in PyTorch's namespaces, and the overloads that they are.
DIRECT: dict[str, tuple[OpOverload, ...]] = {
    **{
        name: (getattr(aten, name).default,)
        for name in (
            *BY_SIZES, "matmul", "mm", "bmm", "mv", "dot", "outer", "addmm", "linear", "conv1d", "conv2d", "conv3d",
            "layer_norm", "avg_pool2d", "gelu", "t", "clone", "detach", "unsqueeze", "amax", "amin", "cumsum",
            "index_select", "gather", "tril", "triu", "roll", "logsumexp", "cumprod", "addcmul", "addcdiv",
            "baddbmm", "addmv", "addr", "pad", "narrow", "diagonal", "scatter_add", "index_add",
            "argsort", "topk", "atan2",
        )
    },
    **{name: (getattr(aten, name).Tensor, getattr(aten, name).Scalar) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "transpose": (aten.transpose.int,),
    "movedim": (aten.movedim.int, aten.movedim.intlist),
    "squeeze": (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    "select": (aten.select.int,),
    "unbind": (aten.unbind.int,),
    "flatten": (aten.flatten.using_ints,),
    "sum": (aten.sum.default, aten.sum.dim_IntList),
    "mean": (aten.mean.default, aten.mean.dim),
    "softmax": (aten.softmax.int,),
    "log_softmax": (aten.log_softmax.int,),
    "where": (aten.where.self,),
    "masked_fill": (aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    "max": (aten.max.default, aten.max.dim, aten.max.other),
    "min": (aten.min.default, aten.min.dim, aten.min.other),
    "prod": (aten.prod.default, aten.prod.dim_int),
    **{name: (getattr(aten, name).Tensor,) for name in ("add_", "sub_", "mul_", "div_")},
    "copy_": (aten.copy_.default,),
    "lerp": (aten.lerp.Scalar, aten.lerp.Tensor),
    "scatter": (aten.scatter.src, aten.scatter.value),
}  # fmt: skip

#: Functions of a list of tensors and a dimension.
JOINING = {"cat": aten.cat.default, "concat": aten.cat.default, "stack": aten.stack.default}

#: Python's operators.
DUNDERS = {
    "__neg__": "neg", "__abs__": "abs", "__add__": "add", "__radd__": "add", "__sub__": "sub", "__rsub__": "rsub",
    "__mul__": "mul",
    "__rmul__": "mul", "__truediv__": "div", "__pow__": "pow", "__eq__": "eq", "__ne__": "ne", "__lt__": "lt",
    "__le__": "le",
    "__gt__": "gt", "__ge__": "ge", "__matmul__": "matmul",
}  # fmt: skip

OTHER_NAMES = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "logsigmoid": "log_sigmoid",
}


def spellings() -> dict[Callable[..., Any], str]:
    """The function's name in ``OPERATORS``, by every torch function and method that means it."""
    found: dict[Callable[..., Any], str] = {}
    for place in (torch, Tensor, torch.nn.functional):
        for name in (*OPERATORS, *OTHER_NAMES, *NUMERIC, *DIRECT, *JOINING):
            function = getattr(place, name, None)
            if function is not None and function is not Tensor.where:  # which has its operands in another order
                found[function] = OTHER_NAMES.get(name, name)
    for dunder, name in DUNDERS.items():
        found[getattr(Tensor, dunder)] = name
    return found


def operator_of(name: str, operands: Any, is_tensor: Callable[[Any], bool]) -> OpOverload | None:
    """The operator that the function ``name`` is on these operands, or None if it takes PyTorch to say."""
    kinds = ""
    for a in operands:
        if is_tensor(a):
            kinds += "T"
        elif type(a) is float or type(a) is int:
            kinds += "n"
        else:
            return None
    return OPERATORS[name].get(kinds)
