"""Every deliberate error of functrans: one class each, with its sentence and its cure."""

from __future__ import annotations

import inspect
import sys
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch

from functrans.core.call_sites import definition, place, source_line, user_site
from functrans.core.versions import SUPPORTED
from functrans.core.wording import callable_name, shown, what

OpOverloadPacket = type(torch.ops.aten.sin)


class FunctransError(RuntimeError):
    """Base of all errors that functrans raises on purpose."""


class TorchMovedError(FunctransError, ImportError):
    """The installed PyTorch has no longer, or not yet, a private name that functrans uses.

    Cure: install a version of PyTorch that is supported, or a version of functrans that supports the installed one.
    """

    def __init__(self, name: str, purpose: str) -> None:
        first, last = (".".join(map(str, version)) for version in SUPPORTED)
        super().__init__(
            f"PyTorch {torch.__version__} has no {name}, which functrans needs {purpose}. "
            f"functrans supports PyTorch {first} to {last}: install one of these, or a functrans that supports "
            f"{torch.__version__}. (functrans/core/torch_private.py is the place to mend.)"
        )


class DuplicateRuleError(FunctransError):
    """An operator was given a second rule in the same table.

    Cure: change the first rule where it stands, or register yours for another operator.
    """

    def __init__(self, title: str, op: Any, place: str) -> None:
        super().__init__(f"{title}: {op} already has a rule, registered at {place}. Change that one instead.")


class NotAnOverloadError(FunctransError, TypeError):
    """A rule was registered for something that is not an operator overload.

    Cure: name the overload, e.g. ``torch.ops.aten.sin.default`` instead of ``torch.ops.aten.sin``.
    """

    def __init__(self, title: str, op: Any, overload: Any = None) -> None:
        super().__init__(
            f"{title}: expected an operator overload such as torch.ops.aten.sin.default, got {what_was_named(op)}. {overloads_meant(op, title, overload)}"
        )


def what_was_named(op: Any) -> str:
    """What was given for an operator overload, for a message."""
    if isinstance(op, OpOverloadPacket):
        return f"the packet torch.ops.{op}, which stands for all its overloads"
    return f"the function {op.__qualname__}" if inspect.isfunction(op) else what(op)


def overloads_meant(op: Any, title: str, overload: Any) -> str:
    """What to write instead of ``op``, which may be a custom operator with an ``overload``."""
    if isinstance(op, OpOverloadPacket):
        return f"Name one of its overloads: {', '.join(f'torch.ops.{op}.{name}' for name in op.overloads())}."
    if overload is not None:
        return f"Write torch.ops.{overload} for this custom operator."
    if isinstance(op, str):
        name = op.removeprefix("torch.ops.").replace("::", ".")
        return f"Write torch.ops.{name if name.count('.') > 1 else name + '.default'}, without quotes."
    name = getattr(op, "__name__", "")
    if isinstance(op, BuiltinFunctionType | MethodDescriptorType) and hasattr(torch.ops.aten, name):
        return f"Its operator is one of {', '.join(f'torch.ops.aten.{name}.{o}' for o in getattr(torch.ops.aten, name).overloads())}."
    if callable(op) and title == "derivative table":
        return "The operator comes first: derivative(torch.ops.aten.sin.default, self=lambda grad, self: grad * self.cos()). It is no decorator."
    if callable(op):
        return "A decorator takes the operator in parentheses, and the rule stands below it: @batching_rule(torch.ops.aten.sin.default)."
    return "Name one of its overloads."


class RegistrationError(FunctransError):
    """A rule that cannot be one: no function, for no operator, for one that no transform sees, or that does not take the arguments.

    Cure: what the message says.
    """


class DerivativeEntryError(FunctransError, ValueError):
    """An entry of the derivative table names something that its operator does not have.

    Cure: use the names of the operator's schema, printed by ``op._schema``.
    """

    def __init__(self, op: Any, what: str) -> None:
        super().__init__(f"derivative({op}, ...): the entry {what}. Schema: {op._schema}")


class DeadWrapperError(FunctransError):
    """A tensor was used after the transform that it belongs to had ended.

    Cure: return it from the transformed function (as an output, or as aux with has_aux=True) instead of storing it.
    """

    def __init__(self, wrapper: Any) -> None:
        i = wrapper.interpreter
        super().__init__(
            f"A tensor that belongs to {i.name} at level {i.level} was used after that transform had ended. "
            f"It was made {made_where(wrapper)}. "
            "Return it from the transformed function (has_aux=True for values beside the result) instead of storing it."
        )


def made_where(wrapper: Any) -> str:
    """``at file:line`` of the user code that made a wrapper; what has none is what the transform called its function with."""
    made_at = getattr(wrapper, "made_at", None)
    if made_at is not None:
        return f"at {place(made_at)}"
    where = definition(wrapper.interpreter.func)
    return "when the transform wrapped the arguments of its function" + (f", which is defined at {where}" if where else "")


class OtherThreadError(FunctransError):
    """A tensor was used in another thread than the one in which its transform runs.

    Cure: pass the thread plain tensors, before the transform or as its results, or run the whole transform in the thread.
    """

    def __init__(self, interpreter: Any) -> None:
        super().__init__(
            f"A tensor that belongs to {interpreter.name} at level {interpreter.level} was used in another thread than the one in which that "
            "transform runs. Each thread has a stack of transforms of its own: run the whole transform in the thread, or hand it plain tensors."
        )


class RuleError(FunctransError):
    """A rule of a transform, or a formula of the derivative table, failed. The original error is its ``__cause__``.

    Cure: mend the rule; the message names it, what it was called with, and the line that called the operator.
    """

    def __init__(self, call: Any, error: BaseException, failed: str, line: str | None) -> None:
        text = str(error)
        super().__init__(
            f"{call.what} of {call.interpreter.name} at level {call.interpreter.level} raised {type(error).__name__}{': ' if text else ''}{text}\n"
            f"  called with: {call.given}\n"
            + (f"  registered at: {call.registered}\n" if call.registered else "")
            + f"  failed at: {failed}"
            + (f"\n  operator called at: {line}" if line else "")
        )


class RuleResultError(FunctransError):
    """A rule returned something that is not a result of its operator at the level of its transform.

    Cure: return ``interpreter.carry(value, ...)`` for every tensor of the operator's outputs.
    """

    def __init__(self, op: Any, interpreter: Any, place: str, got: str, expected: str, cure: str) -> None:
        super().__init__(
            f"the rule for {op} of {interpreter.name} at level {interpreter.level}, registered at {place}: got {got}; expected {expected}. {cure}"
        )


class CarriedValueError(FunctransError, ValueError):
    """``carry`` was given something that a wrapper of the interpreter cannot hold: it holds values of the levels below.

    Cure: compute what is carried one level down, in a rule or inside ``with lowered(interpreter):``, from ``x.value``.
    """

    def __init__(self, interpreter: Any, name: str, got: str, expected: str, cure: str) -> None:
        super().__init__(f"carry of {interpreter.name} at level {interpreter.level}, {name}: got {got}; expected {expected}. {cure}")


class RequiresGradError(FunctransError):
    """``requires_grad_()`` or ``nn.Parameter(...)`` inside a transform would start a graph that nothing follows.

    Cure: pass the tensor as an argument of the function and differentiate with respect to it (argnums).
    """

    def __init__(self, transform: str) -> None:
        super().__init__(
            f"requires_grad was set on a tensor inside {transform} (torch.nn.Parameter(tensor) does this too). "
            "Inside a transform gradients are taken with respect to the function's arguments: pass the tensor as an argument "
            "and name it in argnums; to run a module with other weights use functrans.functional_call."
        )


class InsideTransformError(FunctransError):
    """Something that has no meaning for a tensor that stands for many values or carries a derivative."""

    def __init__(self, what: str, transform: str, cure: str) -> None:
        super().__init__(f"{what} inside {transform} is not possible. Use {cure}.")


class MixedTransformsError(FunctransError):
    """A transform of functrans ran inside one of torch.func, whose tensors hide what functrans has to see.

    Cure: take the outer transform from functrans as well.
    """

    def __init__(self, transform: str) -> None:
        super().__init__(
            f"{transform} was called inside a transform of torch.func, which cannot see into it. Use functrans for the outer transform too."
        )


class NoDataError(FunctransError):
    """The numbers of a tensor were asked for that are batched, tracked or carry a tangent.

    Cure: ``detach()`` it under grad and jvp; under vmap return the tensor and convert the result.
    """

    def __init__(self, what: str, wrapper: Any) -> None:
        i = wrapper.interpreter
        while i.is_constant(wrapper) and hasattr(wrapper.value, "interpreter"):
            wrapper = wrapper.value
            i = wrapper.interpreter
        cure = "Return the tensor from the function, and convert the result." if i.repeats_writes else "Call .detach() first."
        super().__init__(
            f"{what} was called on a tensor inside {i.name} at level {i.level}, where it stands for more than its numbers.{at_line()} {cure}"
        )


class CapturedWriteError(FunctransError):
    """A tensor from outside a transform was written with values of that transform.

    Cure: pass the tensor as an argument, create it inside, or return the new values.
    """

    def __init__(self, op: Any, target: Any, interpreter: Any, level: int) -> None:
        what = tuple(target.shape)
        outer = f"level {level}" if level else "outside all transforms"
        super().__init__(
            f"{op} writes a tensor of shape {what} that was captured from {outer} with a value of "
            f"{interpreter.name} at level {interpreter.level}; it cannot hold that value after the transform ends. "
            "Pass the tensor as an argument of the transformed function, create it inside the function, or return the new value. "
            "(Batch norm in training mode under vmap writes its running statistics so: see "
            "functrans.replace_all_batch_norm_modules_.)"
        )


class CapturedOnceError(FunctransError):
    """Under vmap, a write to a captured tensor would happen once instead of once per example.

    Cure: make the write outside of vmap, or return what is to be added.
    """

    def __init__(self, op: Any, interpreter: Any) -> None:
        super().__init__(
            f"{op} updates a tensor that was captured from outside {interpreter.name}. A loop over the {interpreter.batch_size} "
            "examples would update it each time, but under vmap the function runs once. "
            "Update the tensor outside of vmap, or return the update from the function and reduce over the batch. "
            "(Batch norm in training mode does this: see functrans.replace_all_batch_norm_modules_.)"
        )


class NoPureFormError(FunctransError):
    """An operator writes to its arguments and has no form that returns the new values instead."""

    def __init__(self, op: Any) -> None:
        super().__init__(
            f"{op} writes to its arguments and has no pure form, so it cannot run on tensors inside a transform. "
            "Call an operator that returns its result, or register one: an overload with the same arguments that returns the new values "
            "(for a custom operator `ns::f_`, define `ns::f`)."
        )


class WriteShapeError(FunctransError):
    """An in-place operator's result does not have the shape of what it writes."""

    def __init__(self, target: Any, new: Any) -> None:
        super().__init__(
            f"output with shape {list(target)} doesn't match the broadcast shape {list(new)}: an in-place operator keeps the shape of what it "
            "writes. Use the form without the trailing underscore."
        )


class MissingRuleError(FunctransError, NotImplementedError):
    """A transform has no rule for an operator and no other way to run it.

    Cure: register a rule; the message shows the lines to paste.
    """

    def __init__(self, op: Any, interpreter: Any, why: str = "") -> None:
        super().__init__(f"{interpreter.name} at level {interpreter.level} has no rule for {op}. {why}".rstrip())


class InterpreterError(FunctransError):
    """An interpreter was run that has run before, or that was made at another level than it is run at.

    Cure: make it where it is run, right before ``run_transformed``, and a new one for each run.
    """

    def __init__(self, interpreter: Any, what: str) -> None:
        super().__init__(
            f"run_transformed({interpreter.name}): {what}; expected one that was made here and has not run. "
            "Make a new interpreter for each run, inside the function that runs it."
        )


class PayloadError(FunctransError, TypeError):
    """A transform names its data like something that every wrapper has, which it would overwrite.

    Cure: another name in ``payload``.
    """

    def __init__(self, cls: type, what: str) -> None:
        super().__init__(
            f"class {cls.__name__}: {what}; expected payload = a tuple of names, such as ('upper',), that are no attributes of tensors. "
            "Take another name."
        )


class NoFormulaError(MissingRuleError):
    """Nobody has a derivative of an operator by an argument that carries one; it is not passed off as zero.

    Cure: give it an entry with ``functrans.extend.derivative``, or detach the argument if it is to count as a constant.
    """

    def __init__(self, op: Any, interpreter: Any, why: str) -> None:
        super().__init__(
            op,
            interpreter,
            f"PyTorch has no formula for this derivative ({why}), which is not taken for zero here. Register one with "
            f"functrans.extend.derivative(torch.ops.{op}, ...), or call detach() on the argument if it is to count as a constant.",
        )


class NumberArgumentError(FunctransError):
    """A function that takes a Python number was given a tensor that carries a derivative, which the number would not have.

    Cure: an expression of tensors, such as ``x.expand(size)`` for ``torch.full(size, x)``; or ``x.detach()``.
    """

    def __init__(self, function: str, transform: str, level: int) -> None:
        super().__init__(
            f"{function} takes a Python number where it was given a tensor of {transform} at level {level}; expected a "
            "number, since its derivative would be lost. Write it as an expression of tensors (x.expand(size) for torch.full(size, x), "
            "x + torch.arange(n) for torch.arange(x, x + n)), or pass x.detach() if it is to count as a constant."
        )


class ModifiedError(FunctransError):
    """A value that a derivative needs was modified after the forward pass."""

    def __init__(self, op: Any) -> None:
        super().__init__(
            f"A tensor that the derivative of {op} needs was modified in place after it was used. "
            "Modify a clone() of it, or call the pullback before the modification."
        )


class HookError(FunctransError):
    """A hook of a tensor returned something that cannot take its gradient's place.

    Cure: return a tensor of the gradient's shape and dtype, or None to leave it as it is.
    """

    def __init__(self, hook: Any, got: str, expected: str) -> None:
        name = getattr(hook, "__name__", hook)
        super().__init__(f"Tensor.register_hook({name}): the hook returned {got} for the gradient, {expected}. Return one like it, or None.")


class DataDependentError(FunctransError):
    """Under vmap, an operator's result would depend on the numbers of each example.

    Cure: an expression whose shape and type are the same for every example, such as torch.where.
    """

    def __init__(self, what: Any, interpreter: Any, cure: str) -> None:
        self.interpreter = interpreter
        super().__init__(
            f"{what} was called on a batched tensor inside {interpreter.name} at level {interpreter.level}; its result depends on the "
            f"numbers of each of the {interpreter.batch_size} examples, for all of which the function runs once.{at_line()} Cure: {cure}."
        )


def at_line() -> str:
    """Where the user's code is that called what raises an error, with the text of the line."""
    site = user_site(sys._getframe(2))
    if site is None:
        return ""
    text = source_line(site)
    return f" At {place(site)}: `{text}`." if text else f" At {place(site)}."


class BatchingRuleError(FunctransError):
    """A batching rule returned something else than the physical output and where its batch dimension is.

    Cure: return ``(output, out_dims)``; ``output.shape[out_dims]`` is the batch's size, None says that all examples have one output.
    """

    def __init__(self, rule: str, got: str, expected: str) -> None:
        super().__init__(f"{rule} returned {got}; expected {expected}. Correct the rule's out_dims, or its output.")


class LayoutError(FunctransError):
    """A nested tensor, or one of a compressed sparse layout, came up inside a transform; PyTorch cannot wrap those.

    Cure: ``to_dense()`` or ``to_sparse()`` (the COO layout), or ``to_padded_tensor()``, before the transform or in place of the conversion
    inside it.
    """

    def __init__(self, x: Any) -> None:
        came = "a nested tensor" if x.is_nested else f"a tensor of shape {tuple(x.shape)} and layout {x.layout}"
        cure = "Use its to_padded_tensor(0.0), with a mask" if x.is_nested else "Use its to_dense(), or to_sparse() for the COO layout"
        super().__init__(
            f"{came} came up inside a transform; expected torch.strided or torch.sparse_coo. {cure}: before the transform if it comes from "
            "outside, in place of the conversion if it is made inside."
        )


class CallError(FunctransError):
    """A transform was called with something it cannot work with: shows the call, what came, what was expected, the cure."""

    def __init__(self, call: Call | str, got: str, expected: str, cure: str = "") -> None:
        super().__init__(f"{call}: got {got}; expected {expected}." + (f" {cure}" if cure else ""))


class CallValueError(CallError, ValueError):
    """A CallError that torch.func raises as a ValueError."""


class CallTypeError(CallError, TypeError):
    """A CallError that Python or torch.func raises as a TypeError."""


class CallIndexError(CallError, IndexError):
    """A CallError that torch.func raises as an IndexError."""


class Call:
    """A call of a transform, as an error shows it; written out only then."""

    __slots__ = ("arguments", "func", "transform")

    def __init__(self, transform: str, func: Any, arguments: Any) -> None:
        self.transform = transform
        self.func = func
        #: text, or names and values
        self.arguments = arguments

    def __str__(self) -> str:
        rest = self.arguments
        if not isinstance(rest, str):
            rest = ", ".join(f"{name}={shown(value)}" for name, value in rest.items())
        return f"{self.transform}({callable_name(self.func)}, {rest})"


class CustomFunctionError(FunctransError):
    """An autograd.Function cannot take part in a transform as it is written."""

    def __init__(self, cls: Any, what: str, cure: str) -> None:
        super().__init__(f"autograd.Function {cls.__name__} {what}. {cure}")
