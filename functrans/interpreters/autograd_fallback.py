"""PyTorch's own derivative of one operator, borrowed at any level.

The operator runs on *shadows*: wrappers that do carry autograd state, and whose operators go to the level below.
PyTorch's autograd kernels record the one-operator graph on them and compute on values of that level; the pullback
runs ``torch.autograd.grad`` on that graph, the tangent comes from forward AD in the same way. So an operator needs no
entry in the derivative table to be differentiable at every level, and what PyTorch computes in its derivative is itself
differentiated by the levels below.

NOTE [Saved outputs of shadows]
PyTorch unpacks a saved output through ``aten.detach``; for a shadow that is an alias and must not reach the level
below, where it would cut the derivative.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functrans.core.dispatch import base, dispatch, entered, map_tensors
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, check_layout, strides_of, wrap_as
from functrans.derivatives.constants import PLACES
from functrans.errors import MissingRuleError, NoFormulaError
from functrans.operators.info import op_info
from functrans.pytorch.thread_state import STATE, Snapshot, forward_level, in_modes, running_at, unchanged
from functrans.pytorch.torch_private import (
    AUTOGRAD,
    OpOverload,
    is_forward_enabled,
    push_packing,
    set_forward_enabled,
    set_grad_enabled,
    set_key_excluded,
    without_torch_function,
)
from functrans.tensors.pytrees import tensors_in

aten = torch.ops.aten


#: What PyTorch's autograd itself calls on shadows, to make and to unpack saved and dual tensors.
ALIASES = frozenset((aten.detach.default, aten.alias.default, aten._make_dual.default, aten._fw_primal.default))


class ShadowInterpreter(Interpreter):
    """Sends every operator to the level below the transform that borrows a derivative."""

    kind = "native derivative"
    carries_autograd = True

    def __init__(self, borrower: Interpreter) -> None:
        self.below = borrower.below
        self.level = borrower.level
        self.alive = True
        self.func = borrower.func
        self.outer_grad_mode = True
        self.outer_forward_mode = True
        self.within = None if self.below is None else self.below.within
        #: the modes of the level below, which the autograd engine, and a Function such as a torch.library operator
        #: has, override while they run
        self.grad_mode = torch.is_grad_enabled() and borrower.outer_grad_mode
        self.forward_mode = is_forward_enabled() and borrower.outer_forward_mode
        if STATE.observer is not None:
            STATE.observer.watch(self)

    def process(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        if op in ALIASES:  # NOTE [Saved outputs of shadows]
            return shadow_of(self, args[0].value)
        if op is aten._has_same_storage_numel.default:
            return True
        args = [self.value_of(a) for a in args]
        kwargs = {k: self.value_of(v) for k, v in kwargs.items()}
        if op is aten.view_as_real.default:  # of ``real``: a shadow does not show that its value is a lazy conjugate
            args[0] = _below(self, aten.resolve_conj.default, args, {})
        with in_modes(self.grad_mode, self.forward_mode):
            out = _below(self, op, args, kwargs)
        return map_tensors(self.constant, out)

    def constant(self, value: Tensor) -> WrapperTensor:
        return shadow_of(self, value)

    def is_constant(self, wrapper: WrapperTensor) -> bool:
        return False

    def grad_fn(self, wrapper: WrapperTensor) -> Any:
        return without_torch_function(Tensor.grad_fn.__get__, (), (wrapper,), {})  # type: ignore[union-attr]


def _below(shadow: ShadowInterpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    if op_info(op).random:
        return base(op, args, kwargs) if shadow.below is None else shadow.below.process(op, args, kwargs)
    return dispatch(op, *entered(shadow.below, args, kwargs))


def shadow_of(shadow: ShadowInterpreter, value: Tensor, requires_grad: bool = False) -> WrapperTensor:
    check_layout(value)
    return wrap_as(shadow, value, value.shape, strides_of(value), requires_grad)


class _autograd_on(running_at):
    """Context: operators on shadows are recorded by PyTorch's autograd."""

    __slots__ = ()

    def switch(self) -> None:
        super().switch()
        # shadows are for this operator only: hooks that recompute or move what is saved have no use for them
        if self.before.hooks is not None:
            push_packing(unchanged, unchanged)
        set_key_excluded(AUTOGRAD, False)
        set_grad_enabled(True)


def recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: ``function`` runs outside of inference mode, the tensors that it makes included."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args)
        before = Snapshot()
        with torch.inference_mode(False):  # which switches more than that
            before.restore()
            return function(*args)

    return run


REFUSAL = re.compile("derivative for .* is not implemented|is not differentiable with respect to argument")


def tensor_names(op: OpOverload, places: list[int]) -> str:
    """The arguments that the tensors of these places, counted over all tensors of a call, stand for."""
    tensors = [a for a in op._schema.arguments if "Tensor" in str(a.type)]
    several = any("List[" in str(a.type) for a in tensors)
    return ", ".join(f"tensor {p}" if several or p >= len(tensors) else repr(tensors[p].name) for p in places)


class _refusals:
    """Context: where PyTorch itself says that an argument has no derivative, the error is ours."""

    def __init__(self, borrower: Interpreter, op: OpOverload) -> None:
        self.borrower = borrower
        self.op = op

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if type(error) in (RuntimeError, NotImplementedError) and REFUSAL.search(str(error)):
            raise NoFormulaError(self.op, self.borrower, str(error)) from error


# NOTE [Arguments without a formula]
# PyTorch's table may have no formula for an argument, or none for the whole operator; then autograd takes the output
# for a constant of it, in silence, however smoothly it depends on it. So a borrowed derivative is looked at when it is
# borrowed first: the graph must lead from the outputs to every argument. What is constant for a reason is declared so
# (``functrans.derivatives.constants``).
_with_formulas: set[tuple[OpOverload, tuple[int, ...]]] = set()


def check_formulas(borrower: Interpreter, op: OpOverload, out: Any, inputs: Mapping[int, Tensor]) -> None:
    """Refuse ``op`` if PyTorch has no derivative of ``out``, computed of shadows, by one of ``inputs`` (by place)."""
    outputs = [o for o in tensors_in([out]) if o.is_floating_point() or o.is_complex()]
    stack, nodes = [o.grad_fn for o in outputs], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(n for n, _ in node.next_functions)
    reached = {id(n.variable) for n in nodes if hasattr(n, "variable")}
    places = PLACES.get(op, ())
    missing = [i for i, t in inputs.items() if id(t) not in reached and tensor_names(op, [i]).strip("'") not in places]
    if outputs and missing:
        raise NoFormulaError(op, borrower, f"its output does not depend on {tensor_names(op, missing)} for PyTorch")
    _with_formulas.add((op, tuple(inputs)))


@recording
def run_recorded(
    borrower: Interpreter, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], tracked: Callable[[Any], bool]
) -> tuple[Any, list[bool], Callable[[list[Tensor | None]], list[Tensor | None]]]:
    """Run ``op`` and keep PyTorch's derivative of it.

    Args:
        borrower: the interpreter whose level ``args`` are lowered from.
        op: an operator with an autograd formula.
        args: arguments one level down.
        kwargs: keyword arguments one level down.
        tracked: called with the index of each tensor among the arguments, in order; whether to differentiate for it.

    Returns:
        the output one level down; for each tensor in it, whether it depends differentiably on the arguments; the
        pullback, from cotangents of these tensors to cotangents of the tracked arguments, in order.
    """
    shadow = ShadowInterpreter(borrower)
    inputs: dict[int, WrapperTensor] = {}
    count = -1

    def enter(a: Tensor) -> Any:
        nonlocal count
        count += 1
        wanted = tracked(count)
        t = shadow_of(shadow, a, requires_grad=wanted)
        if wanted:
            inputs[count] = t
        return t

    shadow_args = [map_tensors(enter, a) for a in args]
    shadow_kwargs = {k: map_tensors(enter, v) for k, v in kwargs.items()}
    with _autograd_on(shadow), _refusals(borrower, op):
        out = op(*shadow_args, **shadow_kwargs)
    outputs = tensors_in([out])
    # some autograd kernels set a grad_fn on integer outputs too (_embedding_bag)
    linked = [o.grad_fn is not None and (o.is_floating_point() or o.is_complex()) for o in outputs]
    nodes: list[Any] = [o.grad_fn for o, on in zip(outputs, linked, strict=True) if on]
    if any("WarnNotImplemented" in node.name() for node in nodes):
        raise MissingRuleError(
            op, borrower, "It has no autograd kernel: register one with torch.library.register_autograd."
        )
    if (op, tuple(inputs)) not in _with_formulas:
        check_formulas(borrower, op, out, inputs)

    @recording
    def pullback(cotangents: list[Tensor | None]) -> list[Tensor | None]:
        shadow.grad_mode, shadow.forward_mode = torch.is_grad_enabled(), is_forward_enabled()
        pairs = [(o, c) for o, c, on in zip(outputs, cotangents, linked, strict=True) if on and c is not None]
        with _autograd_on(shadow), _refusals(borrower, op):
            # With create_graph PyTorch computes by differentiable formulas also where it has faster ones
            # (LU factors in det); the levels below differentiate what it computes.
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                list(inputs.values()),
                [shadow_of(shadow, c) for _, c in pairs],
                allow_unused=True,
                create_graph=True,
            )
        return [None if g is None else g.value if type(g) is WrapperTensor else g for g in found]

    return map_tensors(lambda o: o.value if type(o) is WrapperTensor else o, out), linked, pullback


@recording
def run_forward_mode(
    borrower: Interpreter, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], tangents: dict[int, Tensor]
) -> tuple[Any, list[Tensor | None]]:
    """Run ``op`` with PyTorch's forward-mode formula.

    ``tangents`` gives the tangent of the n-th tensor among the arguments. Returns the output one level down and the
    tangent of each tensor in it (None: it has none). Raises NotImplementedError where PyTorch has no formula.
    """
    shadow = ShadowInterpreter(borrower)
    checking = (op, tuple(sorted(tangents))) not in _with_formulas
    inputs: dict[int, Tensor] = {}
    count = -1

    def enter(a: Tensor) -> Any:
        nonlocal count
        count += 1
        if count in tangents:
            t = inputs[count] = shadow_of(shadow, a, requires_grad=checking)
            return forward_ad.make_dual(t, shadow_of(shadow, tangents[count]))
        return shadow_of(shadow, a)

    # Shadows of different transforms are different tensors, so one level of forward AD serves all.
    with _autograd_on(shadow), forward_level():
        set_forward_enabled(True)
        with _refusals(borrower, op):
            out = op(*[map_tensors(enter, a) for a in args], **{k: map_tensors(enter, v) for k, v in kwargs.items()})
        if checking:
            check_formulas(borrower, op, out, inputs)
        found = []
        if any(o.layout is not torch.strided for o in tensors_in([out])):
            # PyTorch keeps a tangent in its tensor's layout; for sparse ones that loses its numbers
            raise MissingRuleError(op, borrower, "Its result is sparse: use to_dense() before it.")
        for o in tensors_in([out]):
            tangent = forward_ad.unpack_dual(o).tangent
            found.append(None if tangent is None else tangent.value if type(tangent) is WrapperTensor else tangent)
    return map_tensors(lambda o: o.value if type(o) is WrapperTensor else o, out), found
