"""What pulls back through a record of the tape: by the table, by a program, or by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import start, through_door
from functrans.core.tensor import WrapperTensor, tensor_of
from functrans.derivatives.helpers import sum_to_shape
from functrans.derivatives.table import DERIVATIVES, Derivative
from functrans.errors import DerivativeEntryError, ModifiedError
from functrans.errors.call_sites import definition, is_users
from functrans.interpreters.fitting import described, fitted, reduce_to
from functrans.operators.info import OpInfo
from functrans.operators.rules import place_in
from functrans.operators.scopes import rules_of
from functrans.programs.deriving import Derived, pullback
from functrans.programs.fusible import by_our_rules
from functrans.programs.program import Program
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.broadcasting import same_shape
from functrans.tensors.described import shown
from functrans.tensors.pytrees import tensors_in
from functrans.tensors.sparse import densified, has_sparse

aten = torch.ops.aten


class BackwardNode:
    """What pulls back through a record of the tape, and looks after what it saved: a list of values."""

    #: the operator, or what messages call it
    op: Any

    def rule_place(self, saved: Any) -> str | None:
        """``file:line`` of a derivative that the user wrote as a node, for messages; None: the table knows."""
        own = definition(type(self).pull)
        return own if own is not None and is_users(own.rpartition(":")[0]) else None

    def operator(self, saved: Any) -> Any:
        """The operator of a record, for messages."""
        return self.op

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.op}>"

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        """The cotangents of the record's inputs, given that of its output (or a list of them, one per output)."""
        raise NotImplementedError

    def protect(self, saved: list[Any], target: Tensor) -> list[Any]:
        """What to keep instead of ``saved`` when ``target`` is about to be written."""
        return [snapshot(s, target) for s in saved]

    def saved_tensors(self, saved: list[Any]) -> list[Tensor]:
        return tensors_in(saved)


class TableNode(BackwardNode):
    """The formulas for one operator and one choice of tracked arguments, and what they need saved."""

    def __init__(self, entry: Derivative, known: OpInfo, names: list[str], fixes: bool) -> None:
        self.op = entry.op
        self.names = tuple(names)
        self.entry = entry
        joint = entry.joint is not None and len(names) > 1
        formulas = ["joint"] if joint else names
        needed: list[str] = []
        for name in formulas:
            for need in entry.needs[name]:
                if need not in ("grad", "grads", "result", "results", "wanted") and need not in needed:
                    needed.append(need)
        #: positions of the arguments to save
        self.saves = [known.arguments.index(n) for n in needed]
        self.last_save = max(self.saves, default=-1)
        self.saves_result = any(n in ("result", "results") for name in formulas for n in entry.needs[name])
        place = {n: i for i, n in enumerate(needed)}
        place.update(grad=-1, grads=-1, result=len(needed), results=len(needed))
        #: where in what is saved each argument is
        self.place = place
        #: one formula for all, if there is one
        self.together = self.joint_pull(entry, names, place) if joint else None
        if not joint:
            self.steps = [bind(entry.formulas[n], tuple(place[need] for need in entry.needs[n])) for n in names]
        #: where in what is saved the shapes and dtypes of arguments that were broadcast or promoted begin
        self.first_fix = len(needed) + self.saves_result if fixes else None

    def __repr__(self) -> str:
        return f"<TableNode of {self.op} for {', '.join(self.names)}>"

    def joint_pull(
        self, entry: Derivative, names: list[str], place: dict[str, int]
    ) -> Callable[[list[Any], Any], list[Any]]:
        """The cotangents by one formula for all tracked arguments."""
        formula: Any = entry.joint
        wanted = tuple(names)
        picks = [None if need == "wanted" else place[need] for need in entry.needs["joint"]]

        def pull(saved: list[Any], grad: Any) -> list[Any]:
            found = formula(*[wanted if p is None else grad if p < 0 else saved[p] for p in picks])
            return [found[n] for n in names]

        return pull

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        try:
            found = [step(grad, saved) for step in self.steps] if self.together is None else self.together(saved, grad)
        except RuntimeError:
            if not has_sparse((saved, grad)):
                raise
            return self.pull(densified(saved), densified(grad))  # see NOTE [Sparse operands]
        if self.first_fix is not None:
            for i, fix in enumerate(saved[self.first_fix :]):
                if fix is not None and found[i] is not None:
                    found[i] = reduce_to(found[i], *fix)
        return found

    def pull_some(self, saved: list[Any], grad: Any, names: Sequence[str]) -> list[Any]:
        """The cotangents of some of the arguments, those in ``names``."""
        places = [self.names.index(n) for n in names]
        try:
            if self.together is None:
                found = [self.steps[i](grad, saved) for i in places]
            else:
                found = self.joint_pull(self.entry, list(names), self.place)(saved, grad)
        except RuntimeError:
            if not has_sparse((saved, grad)):
                raise
            return self.pull_some(densified(saved), densified(grad), names)
        if self.first_fix is not None:
            fixes = saved[self.first_fix :]
            for k, i in enumerate(places):
                if found[k] is not None and fixes[i] is not None:
                    found[k] = reduce_to(found[k], *fixes[i])
        return found


class CheckedNode(BackwardNode):
    """A user's entry: each cotangent fits its argument, whose shape and dtype are saved at the end, or is refused."""

    def __init__(self, node: TableNode) -> None:
        self.op = node.op
        self.node = node
        self.saves, self.last_save, self.saves_result = node.saves, node.last_save, node.saves_result

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        count = len(saved) - len(self.node.names)
        found = self.node.pull(saved[:count], grad)
        return [self.fit(name, f, given) for name, f, given in zip(self.node.names, found, saved[count:], strict=True)]

    def fit(self, name: str, found: Any, given: Any) -> Any:
        if type(given) is list and type(found) in (list, tuple) and len(found) == len(given):
            return [self.fit(name, f, g) for f, g in zip(found, given, strict=True)]
        if given is None or found is None:
            return None
        if type(given) is list:
            raise self.unfit(name, f"{described(found)} for a list of {len(given)} tensors", "a list of as many")
        return fitted(found, given, lambda got, wanted: self.unfit(name, got, wanted))

    def unfit(self, name: str, got: str, wanted: str) -> DerivativeEntryError:
        place = place_in(self.op, DERIVATIVES) or "a place that has been forgotten since"
        what = f"registered at {place} has a formula for {name!r} that returned {got}; expected {wanted}"
        return DerivativeEntryError(self.op, what)


#: Products of a matrix and the vector that is tracked: the matrix, and whether the vector stands in front of it.
MATRICES: dict[Any, tuple[str, bool]] = {
    (aten.linear.default, ("input",)): ("weight", False),
    (aten.mv.default, ("vec",)): ("self", False),
    (aten.matmul.default, ("other",)): ("self", False),
    (aten.matmul.default, ("self",)): ("other", True),
}


def matrix_of(node: Any, saved: list[Any], rows: int) -> Tensor | None:
    """The matrix whose product with a tracked vector ``node`` pulls back, a row per element of the result; or None."""
    if type(node) is not TableNode or not by_our_rules(node.op):
        return None
    name, transposed = MATRICES.get((node.op, node.names), ("", False))
    matrix = saved[node.place[name]] if name in node.place else None
    if matrix is None or matrix.layout is not torch.strided or matrix.dim() != 2:
        return None
    if matrix.shape[1 if transposed else 0] != rows:
        return None
    return matrix.transpose(0, 1) if transposed else matrix


class ProgramNode(BackwardNode):
    """A program's pullback on the tape.

    What is saved: ``saves``, then the tracked inputs' shapes where not all are the same.
    """

    def __init__(self, program: Program, places: tuple[int, ...]) -> None:
        self.operators = operators = tuple(instruction.op for instruction in program.instructions)
        self.op = operators[0] if len(operators) == 1 else f"the program of {', '.join(map(str, operators))}"
        self.places = places
        found = pullback(program, places)
        self.forward, self.saves, self.derive = found.forward, found.saves, found.pull
        self.scope = program.scope
        self.single = program.single
        #: whether ``forward`` returns more than the program's outputs
        self.keeps = len(self.forward.outputs) > len(program.outputs)
        self.reached = [any(i in places for i in sources) for sources in program.sources]
        self.derived: dict[tuple[int, ...], Derived] = {}
        if self.single:
            self.pull_one = self.derive((0,))
            #: what computes the cotangents of a single output, where they are just a program's outputs
            self.pull_program = self.pull_one.program if self.pull_one.plain and self.pull_one.uses is None else None

    def __repr__(self) -> str:
        return f"<ProgramNode of {self.op} for {', '.join(f'input {p}' for p in self.places)}>"

    def save(self, values: list[Any], outs: Any) -> list[Any]:
        if self.forward.single:
            saved = [values[-1 - i] if i < 0 else outs for i in self.saves]
        else:
            saved = [values[-1 - i] if i < 0 else outs[i] for i in self.saves]
        return saved

    def pull(self, saved: list[Any], grad: Any) -> list[Any]:
        count = len(self.saves)
        kept = saved if len(saved) == count else saved[:count]
        found: Any
        if self.single and self.pull_program is not None:
            found = start(self.pull_program, [grad, *kept], {})
            if self.pull_program.single:
                found = (found,)
        elif self.single:
            found = self.pull_one.of([grad, *kept], start)
        else:
            given = tuple(i for i, g in enumerate(grad) if g is not None)
            if given not in self.derived:
                with rules_of(self.scope):
                    self.derived[given] = self.derive(given)
            found = self.derived[given].of([*(grad[i] for i in given), *kept], start)
        if kept is not saved:
            found = [
                g if g is None or same_shape(g.shape, s) else through_door(sum_to_shape, tensor_of(g), s)
                for g, s in zip(found, saved[count:], strict=True)
            ]
        return found  # type: ignore[return-value]


def bind(formula: Callable[..., Any], picks: tuple[int, ...]) -> Callable[[Any, list[Any]], Any]:
    """``formula`` as a function of the cotangent (-1 in ``picks``) and the list of what was saved."""
    if picks == (-1,):
        return lambda grad, saved: formula(grad)
    if len(picks) == 2 and picks[0] == -1:
        one = picks[1]
        return lambda grad, saved: formula(grad, saved[one])
    return lambda grad, saved: formula(*[grad if p < 0 else saved[p] for p in picks])


def snapshot(x: Any, target: Tensor) -> Any:
    """``x``, or a copy of it if it is ``target`` or shares its memory."""
    if type(x) in (list, tuple):
        return [snapshot(v, target) for v in x]
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return x
    if type(x) is WrapperTensor:
        if x is not target:
            return x
        return x.interpreter.rewrap(x, x.value)
    if type(target) is WrapperTensor or target.layout is not torch.strided:
        return x
    return x.clone() if x.untyped_storage()._cdata == target.untyped_storage()._cdata else x


class BorrowedPullback:
    """A pullback that PyTorch keeps, with what it was made from."""

    def __init__(self, pullback: Callable[..., Any], inputs: list[Tensor], modified: list[bool]) -> None:
        self.pullback = pullback
        self.inputs = inputs
        self.modified = modified

    def __repr__(self) -> str:
        return f"<PyTorch's pullback, of inputs {shown(self.inputs)}>"


class BorrowedNode:
    op = "an operator by PyTorch's derivative"

    def operator(self, saved: tuple[OpOverload, BorrowedPullback]) -> OpOverload:
        return saved[0]

    def rule_place(self, saved: Any) -> None:
        return None

    def pull(self, saved: tuple[OpOverload, BorrowedPullback], grad: Any) -> list[Any]:
        op, kept = saved
        if kept.modified[0]:
            raise ModifiedError(op)
        return kept.pullback(grad)

    def __repr__(self) -> str:
        return f"<BorrowedNode of {self.op}>"

    def protect(self, saved: tuple[OpOverload, BorrowedPullback], target: Tensor) -> Any:
        kept = saved[1]
        if any(snapshot(x, target) is not x for x in kept.inputs):
            kept.modified[0] = True
        return saved

    def saved_tensors(self, saved: tuple[OpOverload, BorrowedPullback]) -> list[Tensor]:
        return saved[1].inputs


BORROWED = BorrowedNode()
