"""Arguments and outputs of the transforms: checked, wrapped on the way in, unwrapped on the way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.api.checks import call_function
from functrans.api.structures import path_of
from functrans.boundary.facades import Facade, are_plain, bare, class_of_gradients, of_class, shown_like
from functrans.boundary.leftovers import as_here
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, check_layout, strides_of
from functrans.errors import Call, CallError, CallValueError, InsideTransformError
from functrans.errors.wording import what
from functrans.functionalization.views import contents_of
from functrans.functionalization.writes import invalidate_saved, write_for_caller
from functrans.interpreters.constants import as_own
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.operators.info import DIFFERENTIABLE
from functrans.tensors.pytrees import TENSORS, tree_flatten, tree_map, tree_unflatten

Argnums = int | tuple[int, ...]
#: In place of argnums: every argument, as in vjp and jvp, where they are called primals.
ALL: Any = object()


class Inputs:
    """A call's arguments as wrappers of ``interpreter``.

    Every tensor is wrapped, so that it can be written inside; those that ``argnums`` names are tracked (or given a
    tangent by ``enter``, where what has no derivative is a constant unless ``argnums`` names it).
    """

    def __init__(
        self,
        interpreter: Interpreter,
        call: Call,
        argnums: Argnums,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        enter: Callable[[Tensor], WrapperTensor] | None = None,
    ) -> None:
        self.interpreter = interpreter
        self.call = call
        self.named = argnums is not ALL
        if argnums is ALL:
            argnums = tuple(range(len(args)))
        self.wrapped: list[tuple[WrapperTensor, Tensor]] = []
        self.constants: dict[int, WrapperTensor] = {}
        self.single = isinstance(argnums, int)
        positions = check_argnums(call, argnums, len(args))
        track = enter if enter is not None else interpreter.track  # type: ignore[attr-defined]
        self.tracked: dict[int, tuple[list[Any], list[Any], Any]] = {}
        self.order = positions
        entered = list(args)
        for i in positions:
            leaves, spec = tree_flatten(args[i])
            moving = True
            for place, leaf in enumerate(leaves):
                if not isinstance(leaf, Tensor) or leaf.dtype not in DIFFERENTIABLE:
                    if enter is None or self.named:
                        refuse_argument(call, leaf, self.named, i, args, place)
                    moving = False
            if not moving:  # not all of it
                entered[i] = tree_unflatten(spec, [
                    shown_like(self._enter(leaf, track), leaf) if is_smooth(leaf) else self._constants(leaf)
                    for leaf in leaves
                ])  # fmt: skip
                self.tracked[i] = (leaves, leaves, spec)
                continue
            wrappers = [self._enter(leaf, track) for leaf in leaves]
            self.tracked[i] = (leaves, wrappers, spec)
            shown = wrappers if are_plain(leaves) else list(map(shown_like, wrappers, leaves))
            entered[i] = tree_unflatten(spec, shown)
        for i, a in enumerate(args):
            if i not in self.tracked:
                entered[i] = self._constants(a)
        self.args = tuple(entered)
        self.kwargs = {k: self._constants(v) for k, v in kwargs.items()}
        self.leaf_indices = {i: [getattr(w, "tape_index", None) for w in ws] for i, (_, ws, _) in self.tracked.items()}

    def run(self, func: Callable[..., Any], has_aux: bool) -> tuple[Any, Any]:
        """What ``func`` returns for the arguments; and aux, one level down."""
        out = call_function(self.call, func, self.args, self.kwargs)
        if not has_aux:
            return out, None
        out, aux = split_aux(self.call, out)
        return out, tree_map(self.leave, aux)

    def _enter(self, leaf: Tensor, track: Callable[[Tensor], WrapperTensor]) -> WrapperTensor:
        if type(leaf) not in TENSORS:
            leaf = bare(leaf)
        wrapper = track(as_here(leaf))
        self.wrapped.append((wrapper, leaf))
        return wrapper

    def _constants(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._constant(tree)
        if tree is None or isinstance(tree, int | float | str | bool):
            return tree
        leaves, spec = tree_flatten(tree)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return tree
        return tree_unflatten(spec, [self._constant(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    def _constant(self, leaf: Tensor) -> WrapperTensor:
        wrapper = self.constants.get(id(leaf))
        if wrapper is None:  # a tensor that is passed twice is one tensor inside, too
            origin = bare(leaf)
            wrapper = self.constants[id(leaf)] = self.interpreter.constant(as_here(origin))
            if wrapper is not origin:
                self.wrapped.append((wrapper, origin))
        return wrapper if type(leaf) in TENSORS else shown_like(wrapper, leaf)

    def collect(self, cotangents: dict[int, Tensor]) -> Any:
        """The cotangents of the tracked arguments, zeros where none arrived, in the arguments' structure."""
        found, below = [], self.interpreter.below
        if below is not None:
            cotangents = {index: as_own(below, cotangent) for index, cotangent in cotangents.items()}
        for i in self.order:
            leaves, _, spec = self.tracked[i]
            grads = [None if index is None else cotangents.get(index) for index in self.leaf_indices[i]]
            filled = [torch.zeros_like(bare(p)) if g is None else g for p, g in zip(leaves, grads, strict=True)]
            found.append(tree_unflatten(spec, gradients_by(leaves, filled)))
        return found[0] if self.single else tuple(found)

    def leave(self, x: Any) -> Any:
        """``x`` one level down. What an in-place function returns is the caller's tensor, as without the transform."""
        if type(x) is WrapperTensor and x.version and contents_of(x) is x:
            origin = next((origin for wrapper, origin in self.wrapped if wrapper is x), None)
            if origin is not None:
                return origin
        found, below = unwrap(self.interpreter, x), self.interpreter.below
        if below is None or found is x or type(found) not in TENSORS:
            return found
        made = as_own(below, found)
        return found if made is found or any(found is origin for _, origin in self.wrapped) else made

    def write_back(self) -> None:
        """Write the arguments that were written inside for the caller, as a call without the transform would have."""
        for wrapper, origin in self.wrapped:
            if wrapper.version:
                self.interpreter.before_write(origin)
                invalidate_saved(origin)
                write_for_caller(origin, wrapper, contents_of(wrapper).value)


def is_smooth(x: Any) -> bool:
    """Whether there are derivatives by ``x``."""
    return isinstance(x, Tensor) and x.dtype in DIFFERENTIABLE


def refuse_argument(call: Call, leaf: Any, named: bool, i: int, args: tuple[Any, ...], place: int) -> None:
    """``leaf``, number ``place`` of argument ``i``, is nothing to differentiate for; ``named``: by argnums."""
    other_way = "as an argument that argnums does not name" if named else "in another way: lambda x: f(x, value)"
    path = path_of(f"args[{i}]" if named else f"primals[{i}]", args[i], place)
    if not isinstance(leaf, Tensor):
        cure = argument_cure(leaf) or f"Pass it {other_way}."
        raise CallValueError(call, f"{what(leaf)} as {path}", "a tensor to differentiate for", cure)
    cure = f"Convert it, e.g. with .float(), or pass it {other_way}."
    raise CallValueError(
        call,
        f"a tensor of dtype {leaf.dtype} as {path}",
        "a floating-point or complex dtype to differentiate for",
        cure,
    )


def check_arguments(call: Call, args: tuple[Any, ...], argnums: Argnums) -> None:
    """All that ``argnums`` names is something to differentiate for."""
    for i in check_argnums(call, argnums, len(args)):
        for place, leaf in enumerate(tree_flatten(args[i])[0]):
            if not is_smooth(leaf):
                refuse_argument(call, leaf, True, i, args, place)
            check_layout(leaf)


def argument_cure(x: Any) -> str:
    """The cure where ``x`` came in place of a tensor."""
    if type(x) in (int, float):
        return f"Pass torch.tensor({float(x)})."
    if type(x) is complex:
        return f"Pass torch.tensor({x})."
    if hasattr(x, "__array__"):
        return "Pass torch.as_tensor(...) of it."
    return ""


def check_argnums_kind(call: Call, argnums: Any) -> None:
    """``argnums`` is an int or a tuple of ints, whatever the arguments."""
    if not isinstance(argnums, tuple | int) or isinstance(argnums, bool):
        cure = ""
        if isinstance(argnums, list) and argnums and all(type(n) is int for n in argnums):
            cure = f"Write argnums={tuple(argnums)}."
        elif isinstance(argnums, str):
            cure = "Arguments are named by position, not by name."
        elif isinstance(argnums, Tensor):
            cure = f"Write {call.transform}(f)(x): the arguments of the function come in a call of their own."
        raise CallError(call, f"{what(argnums)} as argnums", "an int or a tuple of ints", cure)
    if argnums == ():
        raise CallError(call, "argnums=()", "at least one position")
    for n in argnums if isinstance(argnums, tuple) else ():
        if not isinstance(n, int) or isinstance(n, bool):
            raise CallError(call, f"{what(n)} in argnums", "an int or a tuple of ints")


def check_argnums(call: Call, argnums: Argnums, count: int) -> tuple[int, ...]:
    """``argnums`` as non-negative positions."""
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    for n in numbers:
        if count == 0:
            raise CallError(
                call, "no positional arguments", "at least one", "Keyword arguments are not differentiated for."
            )
        if not -count <= n < count:
            takes = "position 0 or -1" if count == 1 else f"{-count} <= argnum < {count}"
            given = f"{count} positional argument{'s' * (count != 1)}"
            raise CallError(call, f"argnum {n} for {given}", takes, "Keyword arguments are not differentiated for.")
    positions = tuple(n % count for n in numbers)
    if len(set(positions)) != len(positions):
        raise CallError(call, f"argnums={argnums}", "distinct positions")
    return positions


def pick(call: Call, args: tuple[Any, ...], argnums: Argnums) -> Any:
    positions = check_argnums(call, argnums, len(args))
    return args[positions[0]] if isinstance(argnums, int) else tuple(args[i] for i in positions)


def split_aux(call: Call, out: Any) -> tuple[Any, Any]:
    if not (isinstance(out, tuple) and len(out) == 2):
        # libraries look for torch.func's words: the first sentence, up to True
        cure = "What it returns should be a tuple: (output, aux) if has_aux is True. Leave it out if there is none."
        raise CallError(call, f"{what(out)} from the function", "a pair", cure)
    return out


def check_outputs(
    call: Call, out: Any, leaves: list[Any], differentiable: bool = False, beside_tensors: bool = False
) -> None:
    """The function returned tensors and nothing else; ``differentiable``: with derivatives.

    ``beside_tensors``: other things may be among them, but for what may be a tensor's numbers.
    """
    if not leaves:
        raise CallError(call, f"{what(out)} from the function", "at least one tensor")
    beside_tensors = beside_tensors and any(isinstance(leaf, Tensor) for leaf in leaves)
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            if beside_tensors and not (isinstance(leaf, float | complex) or hasattr(leaf, "__array__")):
                continue
            cure = output_cure(leaf) or "Return it as aux, with has_aux=True."
            raise CallError(call, f"{what(leaf)} as {path_of('output', out, place)}", "only tensors", cure)
        if type(leaf) is Tensor:  # a constant: one that no wrapper could hold came out as it was
            strides_of(leaf)
        check_layout(leaf)
        if differentiable and leaf.dtype not in DIFFERENTIABLE:
            aux = "" if call.transform == "linear_transpose" else ": return it as aux, with has_aux=True"
            raise CallError(
                call,
                f"a tensor of dtype {leaf.dtype} as {path_of('output', out, place)}",
                "a floating-point or complex dtype",
                f"It has no derivative{aux}.",
            )


def first_of(is_complex: bool, root: str, values: Any, positions: Sequence[int] | None) -> str | None:
    """The first complex, or real, tensor of ``values``, or of what it has at ``positions``: said for an error."""
    for i in [None] if positions is None else positions:
        tree = values if i is None else values[i]
        for place, x in enumerate(tree_flatten(tree)[0]):
            if isinstance(x, Tensor) and x.is_complex() is is_complex:
                return f"a tensor of dtype {x.dtype} as {path_of(root if i is None else f'{root}[{i}]', tree, place)}"
    return None


def check_complex(call: Call, root: str, values: Any, positions: Sequence[int] | None = None) -> None:
    """What a holomorphic function takes at ``positions``, or returns, is complex."""
    if got := first_of(False, root, values, positions):
        raise CallError(call, got, "a complex dtype", "Leave holomorphic out for a function of real numbers.")


def refuse_complex(call: Call, root: str, values: Any, positions: Sequence[int] | None = None) -> None:
    """What a function that is not holomorphic takes at ``positions``, or returns, is real."""
    if got := first_of(True, root, values, positions):
        way = "Differentiate for torch.view_as_real(x)" if root == "args" else "Return torch.view_as_real(output)"
        raise CallError(call, got, "real tensors", f"{way}, or pass holomorphic=True if the function is that.")


def check_scalar(call: Call, out: Any, holomorphic: bool = False) -> None:
    """The function returned what a gradient can be taken of; ``holomorphic``: the derivative of a complex number."""
    if not isinstance(out, Tensor):
        cure = output_cure(out)
        if isinstance(out, tuple) and len(out) == 2:
            cure = (
                "Pass has_aux=True if the second is no part of the loss; "
                "for several losses use functrans.vjp or functrans.jacrev."
            )
        elif isinstance(out, tuple | list | dict):
            cure = "Add the losses up, or use functrans.vjp or functrans.jacrev for several."
        raise CallError(call, f"{what(out)} as output", "a tensor without dimensions", cure)
    if out.dim() != 0:
        cure = "Reduce it with .sum() or .mean(), or use functrans.vjp or functrans.jacrev."
        got = "a nested tensor as output" if out.is_nested else f"an output of shape {tuple(out.shape)}"
        raise CallError(call, got, "a scalar tensor, of shape ()", cure)
    if out.dtype in DIFFERENTIABLE and out.dtype.is_complex is holomorphic:
        return
    if holomorphic:
        check_complex(call, "output", out)
    if out.dtype.is_complex:
        cure = (
            "Return a real number of it, such as .abs() or .real, use functrans.vjp, or pass holomorphic=True "
            "for the derivative of a holomorphic function."
        )
        raise CallError(call, f"an output of dtype {out.dtype}", "a real floating-point dtype", cure)
    cure = "A count or a comparison has no gradient: return it as aux, with has_aux=True, beside a loss that has one."
    raise CallError(call, f"an output of dtype {out.dtype}", "a real floating-point dtype", cure)


def check_graph(interpreter: GradInterpreter) -> None:
    """The function's results do not depend on its arguments: not since gradients inside were taken without a graph."""
    if interpreter.detached:
        what = "a result that depends on the arguments by gradients without create_graph=True alone, or not at all,"
        raise InsideTransformError(what, interpreter.name, "create_graph=True, or functrans.grad")


def output_cure(x: Any) -> str:
    """The cure where a function returned ``x`` in place of a tensor."""
    if x is None:
        return "Is a return statement missing?"
    if isinstance(x, int | float | complex) or hasattr(x, "__array__"):
        return (
            "Return the tensor itself, without .item(), float() or NumPy on the way: they leave the derivative behind."
        )
    return ""


def gradients_by(leaves: list[Any], gradients: list[Any]) -> list[Any]:
    """``gradients`` by ``leaves``, each of the class that it has; see NOTE [Facades]."""
    if are_plain(leaves):
        return gradients
    kinds = [class_of_gradients(x) for x in leaves]
    return [g if kind is None else of_class(bare(g), kind) for g, kind in zip(gradients, kinds, strict=True)]


def unwrap(interpreter: Interpreter, x: Any) -> Any:
    """The value one level down of ``x`` if it belongs to ``interpreter``, else ``x``."""
    if type(x) is WrapperTensor:
        if x.view_link is not None and x.interpreter.alive:
            x.view_link.refresh(x)
        return x.value if x.interpreter is interpreter else as_here(x)
    if isinstance(x, Facade):
        return shown_like(unwrap(interpreter, x.wrapper), x)
    return x
