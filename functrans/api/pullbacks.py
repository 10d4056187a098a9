"""The pullback: what ``vjp`` and ``linear_transpose`` return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import Inputs
from functrans.api.compiled import MADE_OUTSIDE, UNTRACED
from functrans.api.linear_functions import Like, LinearFunction, as_here_leaves, is_tree_node, like, stand_ins
from functrans.api.mismatches import convertible, refuse_cotangent
from functrans.api.structures import difference, path_of
from functrans.boundary.facades import bare, class_of_gradients, of_class
from functrans.boundary.made_at import note_results
from functrans.core.tensor import check_layout
from functrans.errors import CallError, MixedTransformsError
from functrans.interpreters.constants import as_own
from functrans.interpreters.grad.interpreter import GradInterpreter, check_versions
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import is_torch_func_active
from functrans.tensors.broadcasting import may_have_shape
from functrans.tensors.pytrees import TreeSpec, leaves_like, tree_map, tree_unflatten


@is_tree_node
class Pullback(LinearFunction):
    """From cotangents of a function's output to cotangents of its primals, along the tape that was recorded.

    It may be called repeatedly. As a pytree its leaves are the tensors that the tape saved; see NOTE [Recorded
    functions are pytrees].
    """

    def __init__(
        self,
        call: Any,
        interpreter: GradInterpreter,
        inputs: Inputs,
        outputs: list[Like],
        indices: list[int | None],
        spec: TreeSpec,
        *,
        conjugate: bool = False,
    ) -> None:
        self.call = call
        self.interpreter = interpreter
        #: per argument: the indices of its tensors, what these are like, its structure, the classes of gradients
        self.arguments = [
            (inputs.leaf_indices[i], [like(bare(x)) for x in leaves], tree, [class_of_gradients(x) for x in leaves])
            for i, (leaves, _, tree) in ((i, inputs.tracked[i]) for i in inputs.order)
        ]
        self.single = inputs.single
        self.outputs = outputs
        self.indices = indices
        self.spec = spec
        #: whether it is the transpose, and not its conjugate, that pullbacks of complex functions are
        self.conjugate = conjugate
        self.versions = interpreter.saved_versions()

    @property
    def name(self) -> str:
        return f"pullback of {self.call}"

    def saved(self) -> list[Any]:
        return [saved for _, _, _, saved in self.interpreter.tape]

    def with_leaves(self, leaves: list[Any]) -> Pullback:
        new = copy.copy(self)
        new.interpreter = copy.copy(self.interpreter)
        new.interpreter.tape = [(*record[:3], s) for record, s in zip(self.interpreter.tape, leaves, strict=True)]
        new.versions = new.interpreter.saved_versions()
        return new

    def same_as(self, other: Any) -> bool:
        return type(other) is Pullback and self.static() == other.static()

    def static(self) -> Any:
        interpreter = self.interpreter
        steps = [record[:3] for record in interpreter.tape]
        about = self.arguments, self.single, self.outputs, self.indices, self.spec, self.conjugate
        return steps, interpreter.hooks, about

    def __call__(self, cotangents: Any, retain_graph: bool = True, create_graph: bool | None = None) -> Any:
        """Cotangents of the primals, given cotangents of the output.

        (The other arguments are torch.func's and have no effect.)
        """
        if is_dynamo_compiling():
            return UNTRACED("a pullback", MADE_OUTSIDE, self, (cotangents,), {})
        seeds = self.seeds(cotangents)
        self.check_leaves()
        check_versions(self.versions)
        around = self.interpreter.below
        interpreter = self.interpreter if around is None or around.alive else as_here_leaves(self).interpreter
        found = self.collect(interpreter.pull(seeds, consume=False))
        if self.conjugate:
            found = tree_map(conjugated, found)
        if STATE.top is not None:
            note_results(1, found)
        return found

    def seeds(self, cotangents: Any) -> dict[int, Tensor]:
        """The cotangents by index, checked."""
        if is_torch_func_active():
            raise MixedTransformsError(self.name)
        spec, outputs = self.spec, self.outputs
        leaves, given = leaves_like(cotangents, spec)
        if given != spec:
            expected = stand_ins(spec, outputs)
            raise CallError(self.name, *difference("cotangents", cotangents, "the output", expected))
        seeds: dict[int, Tensor] = {}
        for place, (index, c, output) in enumerate(zip(self.indices, leaves, outputs, strict=True)):
            check_layout(c)
            dtype = output.dtype
            if (
                not isinstance(c, Tensor)
                or not may_have_shape(c, output.shape)
                or (c.dtype is not dtype and not convertible(c, dtype))
                or c.device != output.device
            ):
                path = path_of("cotangents", stand_ins(spec, outputs), place)
                refuse_cotangent(self.name, c, path, output)
            if index is not None:
                c = bare(c)
                c = c if c.dtype is dtype else c.to(dtype)
                c = c.conj() if self.conjugate else c
                seeds[index] = seeds[index] + c if index in seeds else c
        return seeds

    def collect(self, cotangents: dict[int, Tensor]) -> Any:
        """The cotangents of the arguments, zeros where none arrived, in their structure."""
        found = []
        for indices, likes, spec, kinds in self.arguments:
            grads = [None if index is None else cotangents.get(index) for index in indices]
            filled = [x.zeros() if g is None else as_own(STATE.top, g) for g, x in zip(grads, likes, strict=True)]
            shown = [g if kind is None else of_class(g, kind) for g, kind in zip(filled, kinds, strict=True)]
            found.append(tree_unflatten(spec, shown))
        return found[0] if self.single else tuple(found)

    def rows(self) -> tuple[Tensor, Callable[[Tensor], Any]] | None:
        """For one output, a vector: rows of cotangents behind its last steps, the pullback of the rest for one row."""
        interpreter, index = self.interpreter, self.indices[0] if len(self.indices) == 1 else None
        if index is None or self.outputs[0].dim() != 1 or self.outputs[0].dtype.is_complex:
            return None
        check_versions(self.versions)
        behind = interpreter.rows_behind(index, self.outputs[0].ones())
        if behind is None:
            return None
        cotangents, index, end = behind
        return cotangents, lambda row: self.collect(interpreter.pull({index: row}, consume=False, end=end))


def conjugated(x: Tensor) -> Tensor:
    """The conjugate, computed and not only noted; of a cotangent of a holomorphic function it is the derivative."""
    return x.conj().resolve_conj()
