"""The derivative table: facts of calculus, one entry per operator, shared by reverse and forward mode.

An entry is written in the vocabulary of PyTorch's own derivatives table. For each differentiable argument it
has a formula; the formula's parameter *names* say what it needs, so that nothing else is saved:

``grad``
    the cotangent of the output (``grads``: a tuple, one per output, None where none arrived, for operators with
    several outputs).
``self``, ``other``, ``dim``, ...
    an argument of the operator, by the name it has in the operator's schema.
``result``
    the output (``results``: the tuple of outputs).

A reverse formula returns the cotangent of its argument. The tangent is given as one of

``"elementwise"``
    the operator is pointwise: the tangent is the sum, over the arguments, of the reverse formula applied to the
    tangent (conjugated before and after where complex). Broadcasting and type promotion of such operators
    are undone for reverse mode by the table, not by the formulas.
``"linear"``
    the operator is linear in all its differentiable arguments taken together (``sum``, ``add``, ``cat``, views): the
    tangent is the operator applied to the tangents.
``"multilinear"``
    linear in each differentiable argument separately (``mm``, ``conv``): a sum of one call per argument that has a
    tangent.
a function
    of the same names and of ``self_t``, ``other_t``, ...: the tangents of the arguments, None where an argument has
    none. It returns the tangent of the output (a tuple of them for several outputs; None: no tangent).
``None``
    no formula: forward mode decomposes the operator, or borrows PyTorch's formula.

Formulas are plain ``torch`` code made of differentiable, pure operators; that is what makes every order of derivative
right. A formula that is None in the table's sense ("this argument has no derivative") is simply left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from functrans.errors import DerivativeEntryError, RegistrationError
from functrans.errors.wording import shown
from functrans.operators.rules import RuleTable, caller_place
from functrans.pytorch.torch_private import OpOverload

Formula = Callable[..., Any]


@dataclass(frozen=True, repr=False)
class Derivative:
    """One entry of the table."""

    op: OpOverload
    formulas: dict[str, Formula]
    tangent: str | Formula | None
    #: schema argument names, in positional order
    arguments: tuple[str, ...]
    #: number of tensor outputs; 1 means ``grad``/``result``, more means ``grads``/``results``
    outputs: int
    #: parameter names of each formula
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def pointwise(self) -> bool:
        """Whether the operator broadcasts and promotes its arguments like a pointwise one."""
        return self.tangent == "elementwise" or self.broadcasts

    broadcasts: bool = False
    #: cotangents of several arguments at once, where that takes less than one formula after the other
    joint: Formula | None = None

    def __repr__(self) -> str:
        formulas = [f"{name}({', '.join(self.needs[name])})" for name in self.formulas]
        tangent = "by a formula" if callable(self.tangent) else self.tangent
        return f"<Derivative of {self.op}: {', '.join([*formulas, f'tangent {tangent}'])}>"


#: The tangent of an operator that ``no_derivative`` declares constant.
NO_TANGENT = "none"

DERIVATIVES: RuleTable[Derivative] = RuleTable("derivative table", cached=True, kind=Derivative)


def derivative(
    op: OpOverload,
    /,
    *,
    tangent: str | Formula | None = None,
    broadcasts: bool = False,
    joint: Formula | None = None,
    **formulas: Formula,
) -> None:
    """Add an entry for ``op``.

    Args:
        op: the operator overload.
        tangent: ``"elementwise"``, ``"linear"``, ``"multilinear"``, a function, or None (see the module's text).
        broadcasts: the arguments broadcast and promote as in a pointwise operator although ``tangent`` is not
            ``"elementwise"`` (``add``, ``where``): reverse mode sums each cotangent to its argument's shape and casts
            it to its dtype.
        joint: a reverse formula for several arguments at once, run instead of theirs where more than one is asked for.
            It may ask for ``wanted``, the tuple of their names, and returns a dict from these names to cotangents.
        **formulas: reverse formulas, by argument name.

    Raises:
        NotAnOverloadError: ``op`` is no operator overload.
        DerivativeEntryError: there is no formula, or one names something that the operator does not have.

    Example:
        >>> import torch
        >>> from functrans.derivatives.table import DERIVATIVES
        >>> DERIVATIVES.get(torch.ops.aten.sin.default).needs
        {'self': ('grad', 'self')}
    """
    DERIVATIVES.check(op)
    schema = op._schema
    arguments = tuple(a.name for a in schema.arguments)
    if not formulas and not callable(tangent):
        raise DerivativeEntryError(
            op,
            "has no formula; give one per differentiable argument, by its name. "
            "(no_derivative(op) says that there is no derivative.)",
        )
    outputs = len(schema.returns)
    one_list = outputs == 1 and "List[" in str(schema.returns[0].type)
    known = set(arguments) | ({"grads", "results"} if outputs > 1 or one_list else {"grad", "result"})
    needs = {}
    for name, formula in formulas.items():
        if name not in arguments:
            raise DerivativeEntryError(op, f"has no argument {name!r}; its arguments are {', '.join(arguments)}")
        kind = str(schema.arguments[arguments.index(name)].type)
        if "Tensor" not in kind:
            raise DerivativeEntryError(op, f"has a formula for {name!r}, a {kind}; only tensors have cotangents")
        needs[name] = _parameters(op, formula, known)
    if joint is not None:
        needs["joint"] = _parameters(op, joint, known | {"wanted"})
    if callable(tangent):
        tangents = {f"{a}_t" for a in arguments}
        needs["tangent"] = _parameters(op, tangent, (known - {"grad", "grads"}) | tangents)
    elif not isinstance(tangent, str | None) or tangent not in ("elementwise", "linear", "multilinear", None):
        raise DerivativeEntryError(
            op, f"has tangent={shown(tangent)}; expected elementwise, linear, multilinear, a function or None"
        )
    entry = Derivative(op, formulas, tangent, arguments, 2 if one_list else outputs, needs, broadcasts, joint)
    DERIVATIVES.add(op, entry, place=caller_place())


def _parameters(op: OpOverload, formula: Formula, known: set[str]) -> tuple[str, ...]:
    if not callable(formula):
        raise DerivativeEntryError(op, f"has {shown(formula)} as a formula; expected a function")
    try:
        parameters = list(inspect.signature(formula).parameters.values())
    except ValueError:
        raise DerivativeEntryError(
            op, f"has {shown(formula)} as a formula, which does not say what it asks for; write a lambda around it"
        ) from None
    odd = [str(p) for p in parameters if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if odd:
        raise DerivativeEntryError(
            op, f"has a formula that takes {', '.join(odd)}; its parameters are given by position, each by a name"
        )
    while parameters and parameters[-1].name not in known and parameters[-1].default is not inspect.Parameter.empty:
        parameters.pop()  # what the formula holds: lambda grad, factor=factor: ...
    names = tuple(p.name for p in parameters)
    unknown = [n for n in names if n not in known]
    if unknown:
        raise DerivativeEntryError(op, f"has a formula that asks for {unknown}; known names are {sorted(known)}")
    return names


def no_derivative(*ops: OpOverload) -> None:
    """Declare that no output of these operators depends differentiably on their arguments."""
    if not ops:
        raise RegistrationError(
            "no_derivative(): expected at least one operator overload, such as torch.ops.aten.sign.default."
        )
    for op in ops:
        DERIVATIVES.check(op)
    for op in ops:
        arguments = tuple(a.name for a in op._schema.arguments)
        DERIVATIVES.add(op, Derivative(op, {}, NO_TANGENT, arguments, len(op._schema.returns)), place=caller_place())
