"""Reverse mode of linear functions: a tape of linear operators, or the one that is not.

NOTE [What is linear]
An operator is linear if the derivative table says so: jointly in all arguments that have a formula (``tangent`` is
"linear"), or in each by itself ("multilinear"). Of the others ``JOINTLY`` lists those that are, by groups of arguments.
(That a derivative is the same everywhere is not enough: ``floor`` has such a one.) What stands in the rest of a group
and is no zero makes an operator affine; so the function is run on zeros, and what does not return zeros is not linear.
An operator that is not linear is recorded as such, and refused if the output depends on it: with a gradient that is
linear (that of a quadratic function, say) the function itself, which is not, is computed on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.core.dispatch import lower, map_tensors, unwrap
from functrans.decompositions.table import decompose, decomposition
from functrans.derivatives.constants import ABOUT_METADATA, READS_NO_VALUES
from functrans.derivatives.table import DERIVATIVES, Derivative
from functrans.errors import NonLinearError
from functrans.errors.call_sites import at_line
from functrans.interpreters.function_context import unwrapped, without
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import BackwardNode, tensors_in
from functrans.interpreters.grad.recording import GRAD_RULES
from functrans.interpreters.jvp.fallback import is_zero
from functrans.operators.info import DIFFERENTIABLE, OpInfo, op_info
from functrans.operators.products import PRODUCTS
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import OpOverload


class NonLinear(BackwardNode):
    """In the place of a node: an operator that is not linear, why, and the user's line."""

    def __init__(self, op: Any, why: str) -> None:
        self.op = op
        self.why = why
        self.line = at_line()


class TransposeInterpreter(GradInterpreter):
    """Records linear operators as grad does, and notes the others. See NOTE [What is linear]."""

    kind = "linear_transpose"
    values_remain = False  # they are zeros

    def keeps_history(self, recording: bool, everywhere: bool) -> bool:
        return False  # a linear function has no values beside its derivative

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        known: OpInfo = op_info(op)
        values, below_kwargs, indices = unwrap(self, op, args, kwargs)
        if not indices or op in READS_NO_VALUES:
            return map_tensors(self.constant, lower(self, op, values, below_kwargs))
        if op._schema.name in ABOUT_METADATA:
            return lower(self, op, values, below_kwargs)
        entry = DERIVATIVES.get(op)
        tracked = {known.arguments[place] for place in indices}
        known_to_grad = op in GRAD_RULES or op in JOINTLY or (entry is not None and tracked <= entry.formulas.keys())
        if not known_to_grad and (known.composite or decomposition(op) is not None):
            return decompose(self, op, args, kwargs)
        group = group_of(op, entry, tracked, indices)
        if group is None or not torch.is_grad_enabled():
            named = " and ".join(repr(name) for name in known.arguments if name in tracked)
            why = f"it is not known to be linear in {named}" if group is None else "under torch.no_grad() it is cut off"
            return self.refuse_later(op, why, indices, lower(self, op, values, below_kwargs))
        out = super().process(op, args, kwargs)
        outs = tensors_in([out])
        if len(outs) == 1 and outs[0].dtype not in DIFFERENTIABLE:
            why = f"it returns {outs[0].dtype}"
        elif is_zero_beside(known, group - tracked, indices, values, below_kwargs) or all(vanishes(o) for o in outs):
            return out
        else:
            why = "it does not map zeros to zeros"
        return self.refuse_later(op, why, indices, map_tensors(lambda o: o.value, out))

    def refuse_later(self, op: Any, why: str, indices: dict[int, Any], out: Any) -> Any:
        """Outputs that are tracked, by a record that says that ``op`` is not linear."""
        node = NonLinear(op, why)
        if not all(isinstance(o, Tensor) for o in (out if isinstance(out, list | tuple) else [out])):
            raise NonLinearError(op, self.name, f"{why}, and its result is no tensor", node.line)
        wrapped = map_tensors(self.track, out)
        made = [w.tape_index for w in tensors_in([wrapped])]  # type: ignore[attr-defined]
        self.record(node, made, list(indices.values()), [])
        return wrapped

    def check_linear(self, outputs: list[int | None]) -> None:
        """Refuse what the outputs depend on and is not linear: the first in the order of computation."""
        needed, found = set(outputs) - {None}, None
        for node, outs, ins, _ in reversed(self.tape):
            if not needed.isdisjoint([outs] if type(outs) is int else outs):
                needed.update(i for i in flat(ins) if i is not None)
                found = node if type(node) is NonLinear else found
        if found is not None:
            raise NonLinearError(found.op, self.name, found.why, found.line)


def flat(indices: Any) -> list[Any]:
    return [i for index in indices for i in (flat(index) if isinstance(index, list | tuple) else [index])]


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


def group_of(
    op: OpOverload, entry: Derivative | None, tracked: set[str], indices: dict[int, Any]
) -> frozenset[str] | None:
    """Arguments, the tracked ones among them, in which ``op`` is linear; None if there are none."""
    if entry is not None and not tracked <= entry.formulas.keys():
        return None
    if entry is not None and entry.tangent == "linear":
        return frozenset(entry.formulas)
    if entry is not None and entry.tangent == "multilinear":
        return frozenset(tracked) if len([i for i in flat(indices.values()) if i is not None]) == 1 else None
    return next((group for group in JOINTLY.get(op, ()) if tracked <= group), None)


def is_zero_beside(
    known: OpInfo, rest: frozenset[str], indices: dict[int, Any], values: list[Any], kwargs: dict[str, Any]
) -> bool:
    """Whether nothing that is not tracked stands in a group of arguments; else the result has to be looked at."""
    if any(None in flat([index]) for index in indices.values()):
        return False
    for name in rest:
        place = known.arguments.index(name)
        value = values[place] if place < len(values) else kwargs.get(name, known.defaults[place])
        if value is not None and (isinstance(value, Tensor | list | tuple) or value != 0):
            return False
    return True


def vanishes(x: Tensor) -> bool:
    """Whether ``x`` holds zeros, as far as it holds numbers."""
    return x.device.type == "meta" or is_zero(x)


def transpose_rule(interpreter: TransposeInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    """An ``autograd.Function``, of which nothing says that it is linear."""
    _, values = unwrapped(interpreter, args)
    indices = {i: index for i, index in enumerate(map(interpreter.index_of, args)) if index is not None}
    with without(interpreter, cls), lowered(interpreter):
        out = cls.apply(*values)
    if not indices:
        return map_tensors(interpreter.constant, out)
    why = "nothing says of an autograd.Function that it is linear"
    return interpreter.refuse_later(f"{cls.__name__}.apply", why, indices, out)

