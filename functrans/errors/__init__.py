"""Every deliberate error of functrans: one class each, with its sentence, which ends with the cure."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

from functrans.errors.call_sites import at_line, by_pytorch, made_where
from functrans.errors.wording import callable_name, overloads_meant, shown, what_was_named


class FunctransError(RuntimeError):
    """Base of all errors that functrans raises on purpose.

    Most are a ``sentence``, whose fields are filled with what the error is given: by position under the names that its
    class ``takes``, or by keyword. How a sentence is broken into lines does not show; where it says all that is to
    say, it is the docstring too.
    """

    sentence: ClassVar[str] = ""
    takes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, takes: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.sentence = " ".join(cls.sentence.split())
        cls.__doc__ = cls.__doc__ or cls.sentence
        if takes is not None:
            cls.takes = tuple(takes.split())

    def __init__(self, *given: Any, **named: Any) -> None:
        if self.sentence:
            named.update(zip(self.takes, given, strict=True))
            given = (self.sentence.format(**named).rstrip(),)
        super().__init__(*given)

    def __reduce__(self) -> Any:
        # A copy takes the text over; to call the class again would take what the text was made of.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class DuplicateRuleError(FunctransError, takes="title op place"):
    sentence = "{title}: {op} already has a rule, registered at {place}. Change that one instead."


class NotAnOverloadError(FunctransError, TypeError):
    sentence = "{title}: expected an operator overload such as torch.ops.aten.sin.default, got {got}. {cure}"

    def __init__(self, title: str, op: Any, overload: Any = None) -> None:
        super().__init__(title=title, got=what_was_named(op), cure=overloads_meant(op, title, overload))


class RegistrationError(FunctransError):
    """A rule that cannot be one: no function, for no operator or one that no transform sees, or of other arguments."""


class DerivativeEntryError(FunctransError, ValueError, takes="op what"):
    sentence = "derivative({op}, ...): the entry {what}. Schema: {op._schema}"


class DeadWrapperError(FunctransError):
    sentence = """A tensor that belongs to {i.name} at level {i.level} was used after that transform had ended. It was
        made {where}. Return it from the transformed function (has_aux=True for values beside the result) instead of
        storing it."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__(i=wrapper.interpreter, where=made_where(wrapper))


class SameLevelError(FunctransError, takes="one other"):
    sentence = """Tensors that belong to {one.name} and to {other.name}, both at level {one.level}, met in one operator.
        A rule of one of them runs the other one in its own place, on a function that closes over a tensor of the rule's
        level: hand it over as an argument, as the value one level down."""


class OtherThreadError(FunctransError, takes="interpreter"):
    sentence = """A tensor that belongs to {interpreter.name} at level {interpreter.level} was used in another thread
        than the one in which that transform runs. Each thread has a stack of transforms of its own: run the whole
        transform in the thread, or hand it plain tensors."""


class RuleError(FunctransError):
    """A rule of a transform, or a formula of the derivative table, failed. The original error is its ``__cause__``."""

    sentence = "{call.what} of {call.interpreter.name} at level {call.interpreter.level} raised {error}{lines}"

    def __init__(self, call: Any, error: BaseException, failed: str, line: str | None) -> None:
        lines = f"\n  called with: {call.given}"
        lines += f"\n  registered at: {call.registered}" if call.registered else ""
        lines += f"\n  failed at: {failed}"
        lines += f"\n  operator called at: {line}" if line else ""
        super().__init__(call=call, error=": ".join(filter(None, (type(error).__name__, str(error)))), lines=lines)


class RuleResultError(FunctransError, takes="op interpreter place got expected cure"):
    sentence = """the rule for {op} of {interpreter.name} at level {interpreter.level}, registered at {place}: got
        {got}; expected {expected}. {cure}"""


class CarriedValueError(FunctransError, ValueError, takes="interpreter name got expected cure"):
    """``carry`` was given something that a wrapper of the interpreter cannot hold: it holds values of the levels below.

    Cure: compute what is carried one level down, in a rule or inside ``with lowered(interpreter):``, from ``x.value``.
    """

    sentence = """carry of {interpreter.name} at level {interpreter.level}, {name}: got {got}; expected {expected}.
        {cure}"""


class RequiresGradError(FunctransError, takes="transform"):
    sentence = """requires_grad was set on a tensor inside {transform} (torch.nn.Parameter(tensor) does this too).
        Inside a transform gradients are taken with respect to the function's arguments: pass the tensor as an argument
        and name it in argnums; to run a module with other weights use functrans.functional_call."""


class InsideTransformError(FunctransError, takes="what transform cure"):
    """Something that has no meaning for a tensor that stands for many values or carries a derivative."""

    sentence = "{what} inside {transform} is not possible. Use {cure}."


class MixedTransformsError(FunctransError, takes="transform"):
    sentence = """{transform} was called inside a transform of torch.func, which cannot see into it. Use functrans for
        the outer transform too; functrans.compat.install() does so for a whole program."""


class NoDataError(FunctransError):
    """The numbers of a tensor were asked for that are batched, tracked or carry a tangent."""

    sentence = """{what} was called on a tensor inside {i.name} at level {i.level}, where it stands for more than its
        numbers.{line} {cure}"""

    def __init__(self, what: str, wrapper: Any) -> None:
        i = wrapper.interpreter
        while i.is_constant(wrapper) and hasattr(wrapper.value, "interpreter"):
            wrapper = wrapper.value
            i = wrapper.interpreter
        batched = "Return the tensor from the function, and convert the result."
        super().__init__(what=what, i=i, line=at_line(), cure=batched if i.repeats_writes else "Call .detach() first.")


class CapturedWriteError(FunctransError):
    sentence = """{op} writes a tensor of shape {shape} that was captured from {outer} with a value of {i.name} at
        level {i.level}; it cannot hold that value after the transform ends. Pass the tensor as an argument of the
        transformed function, create it inside the function, or return the new value. (Batch norm in training mode under
        vmap writes its running statistics so: see functrans.replace_all_batch_norm_modules_.)"""

    def __init__(self, op: Any, target: Any, interpreter: Any, level: int) -> None:
        outer = f"level {level}" if level else "outside all transforms"
        super().__init__(op=op, shape=tuple(target.shape), outer=outer, i=interpreter)


class CapturedOnceError(FunctransError, takes="op interpreter"):
    sentence = """{op} updates a tensor that was captured from outside {interpreter.name}, or given to it with in_dim
        None. A loop over the {interpreter.batch_size} examples would update it each time, but under vmap the function
        runs once. Update the tensor outside of vmap, or return the update from the function and reduce over the batch.
        (Batch norm in training mode does this: see functrans.replace_all_batch_norm_modules_.)"""


class NoPureFormError(FunctransError, takes="op"):
    sentence = """{op} writes to its arguments and has no pure form, so it cannot run on tensors inside a transform.
        Call an operator that returns its result, or register one: an overload with the same arguments that returns the
        new values (for a custom operator `ns::f_`, define `ns::f`)."""


class WriteShapeError(FunctransError, takes="target new"):
    sentence = """output with shape {target} doesn't match the broadcast shape {new}: an in-place operator keeps the
        shape of what it writes. Use the form without the trailing underscore."""


class MissingRuleError(FunctransError, NotImplementedError, takes="op interpreter why"):
    sentence = "{interpreter.name} at level {interpreter.level} has no rule for {op}. {why}"

    def __init__(self, op: Any, interpreter: Any, why: str = "") -> None:
        super().__init__(op, interpreter, why)


class HigherOrderError(MissingRuleError, takes="op interpreter"):
    sentence = """{interpreter.name} at level {interpreter.level} has no rule for torch.ops.higher_order.{op}, an
        operator that takes functions. Call it outside of the transform, or say what it is in terms of other operators:
        functrans.extend.DEFINITIONS.add(torch.ops.higher_order.{op}, definition), where definition(*args, **kwargs) is
        plain torch code that calls the functions among its arguments."""

    def __init__(self, op: Any, interpreter: Any) -> None:
        FunctransError.__init__(self, op, interpreter)


class UndecidedError(MissingRuleError, takes="op interpreter"):
    sentence = """{interpreter.name} at level {interpreter.level} has no rule for torch.ops.higher_order.{op}, whose
        predicate has a meaning of that transform's own: no branch is taken by it. Register one for the operator in the
        table of the transform, which is asked where {op} is called at its level, in no other transform inside; or
        choose by torch.where."""

    def __init__(self, op: Any, interpreter: Any) -> None:
        FunctransError.__init__(self, op, interpreter)


class BranchWriteError(FunctransError):
    sentence = """{branch} writes a tensor of shape {shape} that it was given or captured. Both branches are run, since
        examples differ in which one they take (or cannot be asked, while a graph is traced), and those that do not take
        this one must not be written to. Write to a clone() inside of the branch, and return it."""

    def __init__(self, branch: Any, target: Any) -> None:
        super().__init__(branch=branch.name, shape=tuple(target.shape))


class NoFormulaError(MissingRuleError):
    sentence = """{interpreter.name} at level {interpreter.level} has no rule for {op}. PyTorch has no formula for this
        derivative ({why}), which is not taken for zero here. Register one with
        functrans.extend.derivative(torch.ops.{op}, ...), or call detach() on the argument if it is to count as a
        constant."""


class InterpreterError(FunctransError, takes="interpreter what"):
    sentence = """run_transformed({interpreter.name}): {what}; expected one that was made here and has not run. Make a
        new interpreter for each run, inside the function that runs it."""


class PayloadError(FunctransError, TypeError, takes="cls what"):
    """A transform names its data like something that every wrapper has, which it would overwrite."""

    sentence = """class {cls.__name__}: {what}; expected payload = a tuple of names, such as ('upper',), that are no
        attributes of tensors. Take another name."""


class NonLinearError(FunctransError, takes="op transform why line"):
    sentence = """{transform}: got {op}, and {why}; expected linear operators only, from the primals to the
        output.{line} Use functrans.vjp at a point for a function that is not linear."""


class NumberArgumentError(FunctransError, takes="function transform level"):
    sentence = """{function} takes a Python number where it was given a tensor of {transform} at level {level};
        expected a number, since its derivative would be lost. Write it as an expression of tensors (x.expand(size) for
        torch.full(size, x), x + torch.arange(n) for torch.arange(x, x + n)), or pass x.detach() if it is to count as a
        constant."""


class ModifiedError(FunctransError, takes="op"):
    sentence = """A tensor that the derivative of {op} needs was modified in place after it was used. Modify a clone()
        of it, or call the pullback before the modification."""


class HookError(FunctransError):
    sentence = """{how}({name}): the hook returned {got} for the gradient, {expected}. Return one like it, or None."""

    def __init__(self, hook: Any, got: str, expected: str, how: str = "Tensor.register_hook") -> None:
        super().__init__(how=how, name=getattr(hook, "__name__", hook), got=got, expected=expected)


class DataDependentError(FunctransError):
    sentence = """{what} was called on a batched tensor inside {i.name} at level {i.level}; its result depends on the
        numbers of each of the {i.batch_size} examples, for all of which the function runs once.{line} Cure: {cure}."""

    __slots__ = ("interpreter",)  # no part of vars(): pickling leaves it out

    def __init__(self, what: Any, interpreter: Any, cure: str) -> None:
        self.interpreter = interpreter
        theirs = by_pytorch()
        if theirs:
            cure = "run this part in a loop over the examples, outside of vmap, or use what reads no numbers"
        super().__init__(what=what, i=interpreter, line=at_line() + theirs, cure=cure)


class AnomalyError(FunctransError, takes="op name level position line"):
    sentence = """{op} returned nan values in its {position}th output in the backward pass of {name} at level
        {level}.{line} Anomaly detection (torch.autograd.set_detect_anomaly) is on: look for what has no derivative at
        this place, such as sqrt at 0."""


class NonFiniteError(FunctransError, ArithmeticError, takes="call number of where line cure"):
    """``sanitize`` found a number that is not finite.

    Attributes:
        operator: the operator's name, or None: it came from no operator.
        level: the level of the code that called it.
        examples: the example's index under every vmap, outermost first.
    """

    sentence = "{call}: got {number} in {of}, {where}.{line} Expected finite numbers. {cure}"
    operator: str | None = None
    level: int = 0
    examples: tuple[int, ...] = ()


class BatchingRuleError(FunctransError, takes="rule got expected"):
    """A batching rule returned something else than the physical output and where its batch dimension is.

    Cure: return ``(output, out_dims)``; ``output.shape[out_dims]`` is the batch's size, None says that all examples
    have one output.
    """

    sentence = "{rule} returned {got}; expected {expected}. Correct the rule's out_dims, or its output."


class SparseOperatorError(FunctransError, NotImplementedError, takes="what said"):
    """PyTorch has no form of an operator, its derivative or its batch for sparse tensors."""

    sentence = """{what} was called with a sparse tensor, for which PyTorch has no form of it ({said}). Use to_dense()
        of the tensor before it."""


class LayoutError(FunctransError):
    sentence = """{came} came up inside a transform; expected torch.strided or torch.sparse_coo. {cure}: before the
        transform if it comes from outside, in place of the conversion if it is made inside."""

    def __init__(self, x: Any) -> None:
        if x.is_nested:
            came, cure = "a nested tensor", "Use its to_padded_tensor(0.0), with a mask"
        else:
            came = f"a tensor of shape {tuple(x.shape)} and layout {x.layout}"
            cure = "Use its to_dense(), or to_sparse() for the COO layout"
        super().__init__(came=came, cure=cure)


class CustomFunctionError(FunctransError, NotImplementedError, takes="cls what cure"):
    sentence = "autograd.Function {cls.__name__} {what}. {cure}"


class CallError(FunctransError, takes="call got expected cure"):
    """A transform was called with something it cannot work with."""

    sentence = "{call}: got {got}; expected {expected}. {cure}"

    def __init__(self, call: Call | str, got: str, expected: str, cure: str = "") -> None:
        super().__init__(call, got, expected, cure)


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
        return f"{self.transform}({callable_name(self.func)}{', ' if rest else ''}{rest})"
