"""``sanitize``: the first number that is not finite raises, where it comes up.

A level that looks on sees each operator as it arrives there: of a whole batch, or a piece of a rule. That is where a
number is found quickly; what is reported, and whether it is, says the operator that the user's code called. It is found
among the calls that are going on, and run once more, so that its whole result is at hand: the batch dimensions of every
vmap, above and below, and the tangent of every jvp. On the way back the same is done with the derivative of an
operator. What is infinite in the middle of a rule alone is nobody's concern.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import check_callable, check_flag
from functrans.api.compiled import UNTRACED, named_after
from functrans.boundary.calls import start
from functrans.core.dispatch import scan
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor, tensor_of
from functrans.errors import Call, LayoutError, NonFiniteError
from functrans.errors.call_sites import at_site, user_site
from functrans.extension.levels import PassThrough
from functrans.extension.primitives import Primitive
from functrans.extension.table_interpreter import TableInterpreter
from functrans.extension.transforming import transform
from functrans.interpreters.failures import meaning_at, name_of
from functrans.interpreters.grad.interpreter import GradInterpreter, total
from functrans.interpreters.grad.noted_tape import noting_lines, site_of
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tree_flatten


def sanitize(func: Callable[..., Any], *, nan: bool = True, inf: bool = True) -> Callable[..., Any]:
    """``func``, with an error where a number that is not finite comes up first.

    Everything that runs inside is looked at: the function, its tangents under ``jvp``, and the backward pass under
    ``grad``, whether that is inside or around (PyTorch's own ``backward()`` too). Each operator is judged by what it
    returns to the code that called it, each derivative by the cotangents that it returns.

    Args:
        func: any function; it may apply transforms and be transformed.
        nan: whether a NaN is an error.
        inf: whether an infinity is one; say False where they are meant, as in masks.

    Returns:
        A function of the same arguments, with the same result. It takes the time of a look at every result.

    Raises:
        NonFiniteError: names the operator, the transform and level of the code that called it, the user's line, the
            example's index under every vmap around the line and the place in the tensor.
        CustomFunctionError: an ``autograd.Function`` was applied inside, and is differentiated outside.

    Example:
        >>> import torch
        >>> from functrans import grad, sanitize, vmap
        >>> sanitize(torch.log)(torch.tensor([2.0, 1.0]))
        tensor([0.6931, 0.0000])
        >>> sanitize(vmap(grad(torch.sqrt)))(torch.tensor([1.0, 0.0]))
        Traceback (most recent call last):
            ...
        functrans.errors.NonFiniteError: ...got inf in a cotangent that the derivative of aten.sqrt.default
        returned, in the backward pass of grad(sqrt) at level 3, for example 1 of vmap(sqrt) at level 2...
    """
    check_callable("sanitize", func)
    call = Call("sanitize", func, {"nan": nan, "inf": inf})
    check_flag(call, "nan", nan)
    check_flag(call, "inf", inf)

    @named_after(func)
    def sanitized(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            why = "It looks at the numbers of every result, and a graph has none yet."
            return UNTRACED("sanitize", why, sanitize(func, nan=nan, inf=inf), args, kwargs)
        level = Sanitizing(func)
        level.call, level.nan, level.inf = call, bool(nan), bool(inf)
        with noting_lines():
            return transform(level, func)(*args, **kwargs)

    return sanitized


#: The vmaps whose examples a tensor holds, and their bdims, the innermost level first.
Dims = Sequence[tuple[VmapInterpreter, int]]


class Found(NamedTuple):
    """A number that is not finite."""

    number: float | complex
    #: for every vmap that has an example of its own, the outermost first
    examples: tuple[tuple[VmapInterpreter, int], ...]
    place: tuple[int, ...]
    #: what it is in, as the code at its level sees it
    shape: str
    #: whether it is in a tangent
    carried: str


class Sanitizing(PassThrough):
    """Looks at every result."""

    kind = "sanitize"
    call: Call
    nan = inf = True
    #: whether an operator is run once more
    judging = False

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__(func)
        #: by a grad and an index on its tape: the vmaps above it whose examples the value holds
        self.batches: dict[tuple[Interpreter, int], Dims] = {}

    def given(self, op: OpOverload, value: Tensor, own: bool) -> Tensor:
        x: Any = value
        while type(x) is WrapperTensor and not x.interpreter.records(x):
            x = x.value
        if type(x) is WrapperTensor:
            return watched(value, self, str(op), at_site(user_site(sys._getframe(3))), self.batch_of(value))
        if x is value and x.requires_grad and torch.is_grad_enabled():  # PyTorch's own autograd follows
            about = str(op), at_site(user_site(sys._getframe(3))), self.batch_of(value)
            value = x.view_as(x) if x.layout is torch.strided else x.clone()
            value.register_hook(lambda grad: self.check_cotangent(grad, *about))
        return value

    def before(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x, dims in self.batched():
            if isinstance(x, WrapperTensor) and isinstance(x.interpreter, GradInterpreter) and x.interpreter.records(x):
                self.batches[x.interpreter, x.tape_index] = dims

    def check_cotangent(self, grad: Tensor, op: str, line: str, dims: Dims = ()) -> None:
        """Raise if what the derivative of ``op`` returned around this level is not finite."""
        found = self.first(grad, dims)
        if found is not None:
            raise self.error(found, f"a cotangent that the derivative of {op} returned", self, op, line, backward=True)

    def after(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self.judging or "empty" in op._schema.name or self.first(out) is None:
            return
        self.judging = True
        try:
            self.judge(op, out)
        finally:
            self.judging = False

    def batched(self) -> Iterator[tuple[Any, Dims]]:
        """The values behind the arguments of what is being interpreted that hold examples of vmaps further in."""
        for frame, _ in self.calls():
            if frame.f_code is GradInterpreter.pull.__code__:
                continue
            names = frame.f_code.co_varnames
            for leaf in tree_flatten((frame.f_locals[names[2]], frame.f_locals[names[3]]))[0]:
                x: Any = tensor_of(leaf)
                dims: tuple[Any, ...] = ()
                while type(x) is WrapperTensor:
                    if isinstance(x.interpreter, VmapInterpreter) and x.bdim is not None:
                        dims = (*dims, (x.interpreter, x.bdim))
                    x = x.value
                    if dims:
                        yield x, dims

    def batch_of(self, value: Tensor) -> Dims:
        return max((dims for x, dims in self.batched() if x is value), key=len, default=())

    def enter(self, leaf: Any) -> Any:
        entered = super().enter(leaf)
        self.check(leaf, "an argument")
        return entered

    def leave(self, leaf: Any) -> Any:
        leaf = super().leave(leaf)
        self.check(leaf, "the result")
        return leaf

    def check(self, leaf: Any, of: str) -> None:
        found = self.first(leaf)
        if found is not None:
            raise self.error(found, of, self, None, "")

    def judge(self, op: OpOverload, out: Any) -> None:
        """Raise, unless what the user's code called returns finite numbers all the same."""
        *_, (frame, called) = self.calls()
        if frame.f_code is GradInterpreter.pull.__code__:
            return self.judge_derivative(out, called, frame.f_locals)
        level, op, args, kwargs = (frame.f_locals[name] for name in frame.f_code.co_varnames[:4])
        if level is not self:
            with once_more(level):
                out = start(op, args, kwargs)
        found = self.first(out)
        if found is not None:
            of = f"the {found.carried}result of {name_of(op)}"
            raise self.error(found, of, level, name_of(op), at_site(user_site(frame)))

    def judge_derivative(self, out: Any, called: Any, pull: Mapping[str, Any]) -> None:
        """The same for what is pulled back; ``pull``: the variables of ``GradInterpreter.pull``."""
        node, saved, level = pull["node"], pull["saved"], pull["self"]
        name = name_of(node.operator(saved))
        of = f"a cotangent that the derivative of {name} returned"
        if called is total.__code__:
            found = self.first(out)
            of = f"the sum of two cotangents, one of them what the derivative of {name} returned"
        else:
            with once_more(scan(tree_flatten((saved, pull["grad"]))[0])[0] or self):
                out = node.pull(saved, pull["grad"])
            pairs: list[tuple[int, Tensor]] = []  # of each tensor's index and its cotangent, of those in lists too
            for index, part in zip(pull["ins"], out, strict=True):
                if part is not None:
                    pairs += zip(index, part, strict=True) if isinstance(index, list | tuple) else [(index, part)]
            looked_at = (self.first(c, self.batches.get((level, i), ())) for i, c in pairs if c is not None)
            found = next((f for f in looked_at if f is not None), None)
        if found is not None:
            line = at_site(site_of(pull["tape"], pull["i"]))
            raise self.error(found, of, level, name, line, backward=True)

    def calls(self) -> Iterator[tuple[FrameType, Any]]:
        """The operators and derivatives that are being interpreted in this run, and what code each called."""
        frame: FrameType | None = sys._getframe(1)
        inner = None
        while frame is not None:
            code = frame.f_code
            if code is run_transformed.__code__ and frame.f_locals.get("interpreter") is self:
                return
            if code is GradInterpreter.pull.__code__ or meaning_at(frame) is not None:
                yield frame, inner
            frame, inner = frame.f_back, code

    def error(
        self, found: Found, of: str, level: Interpreter, op: str | None, line: str, *, backward: bool = False
    ) -> NonFiniteError:
        where = f"in {'the backward pass of ' * backward}{level.name} at level {level.level}"
        for vmap, i in found.examples:
            where += f", for example {i} of {vmap.name} at level {vmap.level}"
        where += f", at index {list(found.place)} of {found.shape}" if found.place else ""
        cure = "Where infinities are meant, say inf=False." if self.inf and found.number == found.number else ""
        error = NonFiniteError(self.call, found.number, of, where, line, cure)
        error.operator, error.level = op, level.level
        error.examples = tuple(i for _, i in found.examples)
        return error

    def first(self, tree: Any, dims: Dims = ()) -> Found | None:
        """The first number in ``tree`` that is not finite, by the order of the examples.

        ``dims``: of vmaps further in than the levels of ``tree``.
        """
        for leaf in tree_flatten(tree)[0]:
            for base, along, carried in bases(tensor_of(leaf), dims, ""):
                with running_at(None):
                    wrong = self.wrong(base)
                    if wrong is not None and wrong.any():
                        return found_in(wrong, base, along, carried)
        return None

    def wrong(self, base: Tensor) -> Tensor | None:
        """Where a plain tensor is not finite; None where it cannot be, or has no numbers."""
        if not (base.is_floating_point() or base.is_complex()) or base.is_meta:
            return None
        if base.is_nested or base.layout not in (torch.strided, torch.sparse_coo):
            raise LayoutError(base)
        if base.layout is not torch.strided:
            base = base.coalesce().values()
        elif base.dtype.itemsize == 1:
            base = base.float()
        if self.nan and self.inf:
            return ~base.detach().isfinite()
        return base.detach().isnan() if self.nan else base.detach().isinf()


@contextmanager
def once_more(level: Interpreter) -> Iterator[None]:
    """Context: code at ``level`` runs without drawing random numbers from those to come."""
    with running_at(None), torch.random.fork_rng(), running_at(level):
        yield


def bases(x: Any, dims: Dims, carried: str) -> Iterator[tuple[Tensor, Dims, str]]:
    """The plain tensors behind ``x``, each with the vmaps around it."""
    while type(x) is WrapperTensor:
        if x.view_link is not None:
            x.view_link.refresh(x)
        level = x.interpreter
        for name in level.payload:
            part = getattr(x, name)
            if isinstance(part, Tensor):
                yield from bases(part, dims, f"{name} of the ")
        if isinstance(level, VmapInterpreter) and x.bdim is not None:
            dims = (*dims, (level, x.bdim))
        x = x.value
    if isinstance(x, Tensor):
        yield x, dims, carried


#: A value on its way to an operator, whose cotangent is looked at on its way back.
watched = Primitive("sanitize", lambda x, level, op, line, dims=(): x)


def checked(grad: Tensor, result: Tensor, x: Tensor, level: Sanitizing, *about: Any) -> Tensor:
    level.check_cotangent(grad, *about)
    return watched(grad, level, *about)  # which may be differentiated in its turn


watched.derivative(pullback=checked, tangent=lambda tangents, result, x, *about: tangents[0], linear=True)


@watched.rule(VmapInterpreter)
def of_examples(level: VmapInterpreter, x: Any, sanitizing: Sanitizing, op: str, line: str, dims: Dims = ()) -> Any:
    if not level.owns(x) or x.bdim is None:
        return NotImplemented
    out = watched.below(level, x.value, sanitizing, op, line, (*dims, (level, x.bdim)))
    return level.batched(out, x.bdim)


@watched.rule(TableInterpreter)
def carrying(level: TableInterpreter, x: Any, *about: Any) -> Any:
    """The value is watched; what is carried beside it stays beside it."""
    return level.rewrap(x, watched.below(level, x.value, *about)) if level.owns(x) else NotImplemented


def found_in(wrong: Tensor, base: Tensor, dims: Dims, carried: str) -> Found:
    """What is first where ``base`` is ``wrong``."""
    if base.layout is not torch.strided:
        base, dims = base.coalesce().values(), ()
    axes, examples = list(range(base.dim())), []
    for level, bdim in reversed(dims):  # a bdim counts the dimensions that the levels below it left
        examples.append((level, axes.pop(bdim)))
    order = [axis for _, axis in examples] + axes
    wrong, base = wrong.permute(order), base.detach().permute(order)
    index = [int(i) for i in torch.unravel_index(wrong.reshape(-1).to(torch.uint8).argmax(), wrong.shape)]
    n = len(examples)
    return Found(
        base[tuple(index)].item(),
        tuple((level, i) for (level, _), i in zip(examples, index[:n], strict=True)),
        tuple(index[n:]),
        f"{str(base.dtype).removeprefix('torch.')}{list(base.shape[n:])}",
        carried,
    )
