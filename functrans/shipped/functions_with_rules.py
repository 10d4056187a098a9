"""What custom_vjp, custom_jvp and custom_vmap have in common: calls taken apart into tensors, which a Function gets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import Function
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable, check_signature
from functrans.api.compiled import CALLED
from functrans.errors import Call, CallError, CallTypeError, CallValueError
from functrans.errors.wording import callable_name, shown, what
from functrans.operators.info import DIFFERENTIABLE
from functrans.tensors.pytrees import tree_flatten, tree_unflatten


class Arguments:
    """A call's arguments, taken apart into tensors, which a Function gets, and the rest, which is fixed."""

    def __init__(self, args: tuple[Any, ...], fixed: Sequence[int] = ()) -> None:
        self.args = args
        #: the arguments at the positions ``fixed``, and the positions of the others
        self.fixed = [args[i] for i in fixed]
        self.moving = [i for i in range(len(args)) if i not in fixed]
        self.leaves, self.spec = tree_flatten(args)
        owners = [i for i, a in enumerate(args) for _ in tree_flatten(a)[0]]
        #: places among the leaves of the tensors that the Function gets
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and owners[i] not in fixed]
        self.tensors = [self.leaves[i] for i in self.places]

    def whole(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with these in the place of the tensors."""
        leaves = list(self.leaves)
        for i, x in zip(self.places, tensors, strict=True):
            leaves[i] = x
        return tree_unflatten(self.spec, leaves)


class Results:
    """What a function returned, taken apart into tensors and the rest."""

    def __init__(self, out: Any) -> None:
        self.leaves, self.spec = tree_flatten(out)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors = tuple(self.leaves[i] for i in self.places)
        #: whether each tensor has a derivative
        self.smooth = [x.dtype in DIFFERENTIABLE for x in self.tensors]

    def whole(self, tensors: Sequence[Any]) -> Any:
        """The result with these in the place of the tensors."""
        leaves = list(self.leaves)
        for i, x in zip(self.places, tensors, strict=True):
            leaves[i] = x
        return tree_unflatten(self.spec, leaves)


class WithRule:
    """A function that has rules of its own."""

    #: what it is called in messages, and the method that its rule is given to
    kind: str
    definition: str
    #: what was given there
    rules: tuple[Callable[..., Any], ...] = ()

    def __init__(self, func: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        check_callable(self.kind, func)
        self.func = func
        self.fixed = self.checked(nondiff_argnums)
        functools.update_wrapper(self, func, updated=())  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<{self.kind} {callable_name(self.func)}>"

    def take(self, method: str, *rules: Callable[..., Any]) -> Callable[..., Any]:
        """Keep what ``method`` was given."""
        for rule in rules:
            check_callable(method, rule)
        self.rules = rules
        return rules[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return CALLED(self, args, kwargs)
        if not self.rules:
            raise self.error(CallError, "a call of the function", f"its rule first: {self.definition}")
        args = self.bound(args, kwargs)
        if any(i >= len(args) for i in self.fixed):
            got = f"nondiff_argnums={self.fixed} in a call with {len(args)} arguments"
            raise self.error(CallValueError, got, "positions of arguments that are given")
        given = Arguments(args, self.fixed)
        return self.of_tensors(given) if given.tensors else self.run(self.func, args)

    def of_tensors(self, given: Arguments) -> Any:
        """The result of a call that has tensors among its arguments."""
        raise NotImplementedError

    def error(self, kind: type[CallError], *said: str) -> CallError:
        return kind(Call(self.kind, self.func, {}), *said)

    def checked(self, nondiff_argnums: Any) -> tuple[int, ...]:
        """Positions of arguments, as a tuple."""
        found = tuple(nondiff_argnums) if isinstance(nondiff_argnums, tuple | list) else (nondiff_argnums,)
        if not all(type(i) is int and i >= 0 for i in found):
            raise self.error(CallTypeError, f"{what(nondiff_argnums)} as nondiff_argnums", "a tuple of positions")
        return found

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments by position, as rules get them."""
        if not kwargs:
            return args
        check_signature(Call(self.kind, self.func, {}), self.func, args, kwargs)
        signature = inspect.signature(self.func).bind(*args, **kwargs)
        signature.apply_defaults()
        if signature.kwargs:
            got = f"keyword-only arguments {sorted(signature.kwargs)}"
            raise self.error(CallTypeError, got, "arguments that can be given by position, as the rules get them")
        return signature.args

    def run(self, function: Any, args: Sequence[Any]) -> Any:
        """Call what the user gave."""
        return call_function(Call(self.kind, self.func, {}), function, tuple(args), {})

    def pair(self, args: Sequence[Any], second: str, rule: str = "its rule") -> tuple[Any, Any]:
        """What the first rule returns: the output, and what ``second`` names."""
        pair = self.run(self.rules[0], args)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise self.error(CallValueError, f"{what(pair)} from {rule}", f"a pair (output, {second})")
        return pair

    def apply(self, function: type[Function], given: Arguments) -> Any:
        """``function`` on the tensors of ``given``; it leaves the structure of the result in ``function.results``."""
        out = function.apply(*given.tensors)
        return function.results[-1].whole(out if isinstance(out, tuple) else (out,))  # type: ignore[attr-defined]


def keeping_inputs(custom: WithRule, given: Arguments, found: list[Results]) -> type[Function]:
    """A Function that runs ``custom``'s function and saves its inputs; the result is left in ``found``, taken apart."""

    class Keeping(Function):
        @staticmethod
        def forward(*tensors: Tensor) -> Any:
            out = Results(custom.run(custom.func, given.whole(tensors)))
            found[:] = [out]
            return unlike(out.tensors, tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)
            ctx.mark_non_differentiable(*[x for x in output if x.dtype not in DIFFERENTIABLE])
            ctx.smooth = [x.dtype in DIFFERENTIABLE for x in output]

    return Keeping


def unlike(outs: Sequence[Tensor], ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of which none is an input, so that PyTorch takes none for written."""
    return tuple(x.view_as(x) if any(x is t for t in ins) else x for x in outs)


def fitting(expected: Sequence[Tensor], found: Sequence[Any], refuse: Callable[[str, str], Exception]) -> list[Any]:
    """Derivatives of the shapes of what they belong to; ``refuse(got, expected)`` is the error where one is not."""
    for x, d in zip(expected, found, strict=True):
        if d is not None and (not isinstance(d, Tensor) or d.shape != x.shape):
            raise refuse(shown(d) if isinstance(d, Tensor) else what(d), f"a tensor of shape {list(x.shape)}")
    return list(found)
