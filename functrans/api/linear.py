"""Linear functions of a function at a point: linearize; and of a linear function: linear_transpose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import ALL, refuse_argument, unwrap
from functrans.api.checks import check_callable, check_flag, check_interpreter
from functrans.api.compiled import MADE_OUTSIDE, TRACED, UNTRACED, manner
from functrans.api.forward import run_forward
from functrans.api.linear_functions import Like, LinearFunction, is_tree_node, like, stand_ins
from functrans.api.mismatches import refuse_tangent
from functrans.api.pullbacks import Pullback
from functrans.api.reverse import run_recorded
from functrans.api.structures import difference, path_of
from functrans.boundary.facades import bare
from functrans.boundary.made_at import note_results
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor, check_layout
from functrans.errors import Call, CallError, CallTypeError, MixedTransformsError
from functrans.errors.wording import shown, what
from functrans.interpreters.grad.interpreter import check_versions
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.linearize import LinearizeInterpreter, Step, Variable
from functrans.interpreters.transpose import TransposeInterpreter, vanishes
from functrans.operators.info import DIFFERENTIABLE
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import autocast_off, is_torch_func_active
from functrans.tensors.pytrees import TreeSpec, leaves_like, tensors_in, tree_flatten, tree_map, tree_unflatten


@manner(at_once=True, returns_function=True, records=True, once=True)
def linearize(
    func: Callable[..., Any],
    *primals: Any,
    has_aux: bool = False,
    interpreter: type[JvpInterpreter] = JvpInterpreter,
) -> Any:
    """The value of ``func`` and its jvp at a point, as a function of the tangents.

    ``func`` runs once. Of its derivative, all that depends on the primals alone is computed on the way and saved; a
    call of the function that is returned runs what is linear in the tangents, and nothing else. Many products with one
    Jacobian so cost less than many calls of ``jvp``, and more memory.

    Args:
        func: takes ``*primals``, returns a pytree of tensors (with ``has_aux``, a pair of that and anything).
        *primals: pytrees of floating-point or complex tensors.
        has_aux: ``func`` returns ``(output, aux)``.
        interpreter: as in ``jvp``.

    Returns:
        ``(output, jvp_fn)``, with ``has_aux`` ``(output, jvp_fn, aux)``. ``jvp_fn(*tangents)`` takes tangents of the
        structure, shapes and dtypes of the primals, and returns the tangent of the output, of its structure and shapes.
        It may be called repeatedly, and be batched and differentiated like any function.

    Raises:
        CallError: a primal, a tangent or an output is not what is described above.
        ModifiedError: a value that ``jvp_fn`` needs was modified in place before it was called.

    Example:
        >>> import torch
        >>> from functrans import linearize
        >>> out, jvp_fn = linearize(torch.exp, torch.zeros(2))
        >>> jvp_fn(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
        >>> jvp_fn
        <jvp of linearize(exp, ...): 1 record, 1 tensor saved, 8 bytes>
    """
    if is_dynamo_compiling():
        return TRACED(linearize, func, {"has_aux": has_aux, "interpreter": interpreter}, primals, {}, None)
    check_callable("linearize", func)
    call = Call("linearize", func, "..." if has_aux is False else f"..., has_aux={shown(has_aux)}")
    check_flag(call, "has_aux", has_aux)
    if interpreter is not JvpInterpreter:
        check_interpreter(call, interpreter, JvpInterpreter)
    check_primals(call, primals)
    leaves, spec = tree_flatten(primals)
    zeros = [torch.zeros_like(bare(p)) for p in leaves]
    recorder = LinearizeInterpreter(func)

    def body() -> Any:
        tangents = [recorder.track(z) for z in zeros]
        variables = [t.variable for t in tangents]
        values, found, out_spec, aux, inputs = run_forward(
            call, func, primals, tangents, ALL, False, has_aux, None, interpreter  # type: ignore[arg-type]
        )  # fmt: skip
        for wrapper, origin in inputs.wrapped:
            if wrapper.version:
                recorder.before_write(origin)
        outputs = [variable_of(recorder, t) for t in found]
        below = [unwrap(recorder, v) for v in values]
        return below, variables, outputs, out_spec, tree_map(lambda a: unwrap(recorder, a), aux), inputs

    values, variables, outputs, out_spec, aux, inputs = run_transformed(recorder, body, enable_grad=True)
    inputs.write_back()
    steps = recorder.steps_to([o.number for o in outputs if type(o) is Variable])
    primals_like = [like(bare(p)) for p in leaves]
    jvp_fn = JvpFunction(call, steps, variables, primals_like, spec, outputs, [like(bare(v)) for v in values], out_spec)
    if STATE.top is not None:
        note_results(1, values, aux)
    out = tree_unflatten(out_spec, values)
    return (out, jvp_fn, aux) if has_aux else (out, jvp_fn)


def variable_of(recorder: LinearizeInterpreter, tangent: Tensor | None) -> Variable | Tensor | None:
    """The variable of an output's tangent; a tensor that no tangent has a part in; or None, for zeros."""
    if tangent is None:
        return None
    below = unwrap(recorder, tangent)
    if recorder.owns(tangent) and tangent.variable is not None:
        return Variable(tangent.variable)
    return below


def check_primals(call: Call, primals: tuple[Any, ...]) -> None:
    if not primals:
        cure = f"The primals follow the function: {call.transform}(f, x, y)."
        raise CallTypeError(call, "no primals", "at least one", cure)
    found = 0
    for i, primal in enumerate(primals):
        for place, leaf in enumerate(tree_flatten(primal)[0]):
            if not isinstance(leaf, Tensor) or leaf.dtype not in DIFFERENTIABLE:
                refuse_argument(call, leaf, False, i, primals, place)
            check_layout(leaf)
            found += 1
    if not found:
        raise CallError(call, f"{what(primals)} as primals", "at least one tensor")


@is_tree_node
class JvpFunction(LinearFunction):
    """From tangents of a function's primals to tangents of its output, by the steps that ``linearize`` recorded.

    It may be called repeatedly. As a pytree its leaves are the tensors that the steps saved; see NOTE [Recorded
    functions are pytrees].
    """

    def __init__(
        self,
        call: Call,
        steps: list[Step],
        inputs: list[int],
        primals: list[Like],
        spec: TreeSpec,
        outputs: list[Any],
        outputs_like: list[Like],
        out_spec: TreeSpec,
    ) -> None:
        self.call = call
        self.steps = steps
        #: the variables of the tangents that are given
        self.inputs = inputs
        self.primals = primals
        self.spec = spec
        #: the tangents of the outputs: variables; a tensor that is always the same; None for zeros
        self.outputs = outputs
        self.outputs_like = outputs_like
        self.out_spec = out_spec
        self.note_versions()

    @property
    def name(self) -> str:
        return f"jvp of {self.call}"

    def note_versions(self) -> None:
        self.versions = [
            (step.op, x, x.version if type(x) is WrapperTensor else x._version)
            for step in self.steps
            for x in tensors_in([step.args, list(step.kwargs.values())])
            if type(x) is WrapperTensor or not x.is_inference()
        ]

    def saved(self) -> list[Any]:
        return [[step.args, list(step.kwargs.values())] for step in self.steps]

    def leaves(self) -> list[Any]:
        return [self.saved(), self.outputs]

    def with_leaves(self, leaves: list[Any]) -> JvpFunction:
        new = copy.copy(self)
        saved, new.outputs = leaves
        new.steps = [
            replace(step, args=args, kwargs=dict(zip(step.kwargs, kwargs, strict=True)))
            for step, (args, kwargs) in zip(self.steps, saved, strict=True)
        ]
        new.note_versions()
        return new

    def same_as(self, other: Any) -> bool:
        return type(other) is JvpFunction and self.static() == other.static()

    def static(self) -> Any:
        steps = [(step.op, list(step.kwargs), step.outs, step.cut) for step in self.steps]
        return steps, self.inputs, self.primals, self.spec, self.outputs_like, self.out_spec

    def __call__(self, *tangents: Any) -> Any:
        """The tangent of the output, given tangents of the primals."""
        if is_dynamo_compiling():
            return UNTRACED("a jvp function", MADE_OUTSIDE, self, tangents, {})
        if is_torch_func_active():
            raise MixedTransformsError(self.name)
        leaves, given = leaves_like(tangents, self.spec)
        if given != self.spec:
            expected = stand_ins(self.spec, self.primals)
            raise CallError(self.name, *difference("tangents", tangents, "primals", expected))
        for place, (p, t) in enumerate(zip(self.primals, leaves, strict=True)):
            check_layout(t)
            if not isinstance(t, Tensor) or p.shape != t.shape or p.dtype != t.dtype or p.device != t.device:
                refuse_tangent(self.name, p, t, place, stand_ins(self.spec, self.primals))
        self.check_leaves()
        check_versions(self.versions)
        values = dict(zip(self.inputs, map(bare, leaves), strict=True))
        with autocast_off():
            for step in self.steps:
                step.run(values)
        found = [
            values[o.number] if type(o) is Variable else x.zeros() if o is None else o.clone()
            for o, x in zip(self.outputs, self.outputs_like, strict=True)
        ]
        if STATE.top is not None:
            note_results(1, found)
        return tree_unflatten(self.out_spec, found)


@manner(at_once=True, returns_function=True, records=True)
def linear_transpose(func: Callable[..., Any], *primals: Any) -> Pullback:
    """The transpose of a linear function.

    Args:
        func: takes ``*primals``, returns a pytree of floating-point or complex tensors, and is linear in all primals
            together.
        *primals: pytrees of floating-point or complex tensors like those that ``func`` takes. Only their shapes, dtypes
            and devices count: ``func`` is run on zeros.

    Returns:
        ``transposed(cotangents)``, which takes cotangents of the structure and shapes of the output and returns a
        tuple with one cotangent per primal; it may be called repeatedly. It is the transpose in complex numbers too,
        without the conjugate that the pullback of ``vjp`` has.

    Raises:
        NonLinearError: ``func`` is not linear, as far as the operators that it is made of show; the error has the
            operator and the line. See NOTE [What is linear].
        CallError: a primal, a cotangent or an output is not what is described above.

    Example:
        >>> import torch
        >>> from functrans import linear_transpose
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> transposed = linear_transpose(lambda x: matrix @ x, torch.zeros(2))
        >>> transposed(torch.tensor([1.0, 0.0]))
        (tensor([1., 2.]),)
    """
    if is_dynamo_compiling():
        return TRACED(linear_transpose, func, {}, primals, {}, None)
    check_callable("linear_transpose", func)
    call = Call("linear_transpose", func, "...")
    check_primals(call, primals)
    zeros = tree_map(torch.zeros_like, primals)
    interpreter = TransposeInterpreter(func)
    values, spec, transposed, _ = run_recorded(interpreter, call, func, zeros, ALL, False, conjugate=True)
    interpreter.check_linear(transposed.indices)
    for place, (value, index) in enumerate(zip(values, transposed.indices, strict=True)):
        if index is None and not vanishes(value):
            path = path_of("output", tree_unflatten(spec, values), place)
            got = f"{path}, which does not depend on the primals and is no zero"
            raise CallError(call, got, "a linear function", "Leave it out, or use functrans.vjp.")
    return transposed
