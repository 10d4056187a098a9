"""Which functions have a short way in, and the entrance of each: a pointwise program's, or an operator's."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from functrans.core.tensor import NOT_READ, WrapperTensor
from functrans.door.operator_entrances import direct, indexed, joining, overload
from functrans.door.program_entrances import binary, numeric, power, unary
from functrans.door.torch_function import ENTRANCES, OF_ANY_TYPES, otherwise
from functrans.programs.operators import operator_program, traced_program
from functrans.programs.program import Program
from functrans.programs.torch_functions import (
    BINARY,
    BY_SIZES,
    DIRECT,
    DUNDERS,
    JOINING,
    NUMERIC,
    OPERATORS,
    OTHER_NAMES,
    UNARY,
    spellings,
)
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

# What takes the place of a function, an *entrance*, is made twice: to be called by ``torch_function``, and as a method
# of the wrapper, where the code that called it is one frame ``up``.
BY_METHOD = 1


def frames_above(function: Callable[..., Any]) -> int:
    """How many frames above ``torch_function`` the code is that called ``function``; one of Python's own calls
    handle_torch_function first."""
    return 3 if type(function) is FunctionType else 1


def reversed_div(x: Any, y: Any) -> Any:
    return x.reciprocal() * y


#: Python's reflected operators, whose program depends on what the other operand is.
REFLECTED: dict[str, Callable[[bool], Program | None]] = {
    "__rsub__": lambda tensor: operator_program(aten.sub.Tensor if tensor else aten.rsub.Scalar),
    "__rtruediv__": lambda tensor: operator_program(aten.div.Tensor) if tensor else traced_program(reversed_div, 2),
}


MATRIX_TRANSPOSE: Any = Tensor.mT.__get__  # type: ignore[attr-defined]
by_property = direct(Tensor.transpose, DIRECT["transpose"], 3)


def transposed(x: Any, *more: Any) -> Any:
    """``x.mT``, which PyTorch makes ``transpose`` of; a frame more than other entrances have."""
    return by_property(x, -2, -1) if len(x.shape) > 1 else otherwise(MATRIX_TRANSPOSE, (), (x, *more), {}, 3)


def made_like(function: Callable[..., Any]) -> Callable[..., Any]:
    """``x.new_tensor(...)`` and ``x.new(...)``, which read the device off dispatch keys; see NOTE [Scalar indices]."""

    def made(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if type(self) is WrapperTensor and not self.shape and self.dtype in NOT_READ:
            with running_at(None):
                self = torch.empty(0, dtype=self.dtype, device=self.device)
        return otherwise(function, (), (self, *args), kwargs, 3)

    return made


def of_kinds(operators: dict[str, OpOverload], kinds: str) -> Program | None:
    return operator_program(operators[kinds]) if kinds in operators else None


def entrance_of(function: Callable[..., Any], name: str, up: int) -> Callable[..., Any] | None:
    """What takes the place of the torch function or method that ``name`` stands for in programs/torch_functions.py."""
    if name == "pow":
        return power(function, up)
    if name in BINARY:
        operators = BINARY[name]
        return binary(function, lambda tensor: of_kinds(operators, "TT" if tensor else "Tn"), up)
    if name in UNARY:
        return unary(function, lambda: operator_program(getattr(aten, name).default), up)
    if name in NUMERIC:
        op, names = NUMERIC[name]
        return numeric(function, op, names, up)
    if name in REFLECTED:
        return binary(function, REFLECTED[name], up, reflected=True)
    if name in JOINING:
        return joining(function, JOINING[name], up)
    sizes = name in BY_SIZES and function is getattr(Tensor, name)
    return direct(function, DIRECT[name], up, sizes=sizes) if name in DIRECT else None


def set_up() -> None:
    """Fill ``ENTRANCES``, and give the wrapper methods of its own."""
    ENTRANCES[OpOverload] = overload
    names = spellings()
    names.update({getattr(Tensor, name): name for name in REFLECTED})
    for function, name in names.items():
        entrance = entrance_of(function, name, 1 + frames_above(function))
        if entrance is not None:
            ENTRANCES[function] = entrance
            if name in DIRECT:  # whose entrance looks at every argument's type
                OF_ANY_TYPES.add(function)
    for name in (*DUNDERS, *OPERATORS, *NUMERIC, *DIRECT, *OTHER_NAMES, *REFLECTED):
        method: Any = getattr(Tensor, name, None)
        if method in ENTRANCES:
            setattr(WrapperTensor, name, entrance_of(method, names[method], BY_METHOD))
    # Not a method as well: what has one in Python is a sequence to torch.tensor([x]), which would ask for its length.
    ENTRANCES[Tensor.__getitem__] = indexed(Tensor.__getitem__, 1 + frames_above(Tensor.__getitem__))
    ENTRANCES[MATRIX_TRANSPOSE] = transposed
    for function in (Tensor.new, Tensor.new_tensor):
        ENTRANCES[function] = made_like(function)
        OF_ANY_TYPES.add(function)
    for name in ("__repr__", "__format__", "tolist"):  # PyTorch's own, on whatever is a tensor, look into the wrapper
        ENTRANCES[getattr(Tensor, name)] = getattr(WrapperTensor, name)
    for function in (torch.is_conj, Tensor.is_conj):  # no operators, and PyTorch would look at the wrapper
        ENTRANCES[function] = lambda input: input.is_conj()
    for function in (torch.is_neg, Tensor.is_neg):
        ENTRANCES[function] = lambda input: input.is_neg()


set_up()
