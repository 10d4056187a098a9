"""Programs: pointwise operators and the formulas of their derivatives, as operators that the library writes itself.

``torch.sin`` is a program of one instruction. Its tangent is one of three, ``(x, t) -> (sin(x), t * cos(x))``, made
from the derivative table by tracing the formula once; so is the pullback, and the tangent of the pullback. A program
goes down the stack as any operator does (core/dispatch.py). The three transforms have a rule for it, which gives every
derivative level and every batch one Python call and one wrapper per result; for every other interpreter it is taken
apart:

    vmap    runs a program as it is on the physical tensors, since code that is pointwise is pointwise in the batch, too
    jvp     runs its tangent one level down
    grad    runs it one level down, and its pullback when the tape is walked

>>> import torch
>>> from functrans.programs.deriving import tangent
>>> from functrans.programs.operators import operator_program
>>> print(tangent(operator_program(torch.ops.aten.sin.default), (0,)).program)
def program(a, b):
    return sin(a), mul(b, cos(a))

The modules, in the order to read them: ``program`` (what a program is), ``tracing`` (formulas written down),
``deriving`` (tangents and pullbacks), ``operators`` (the programs of operators), ``fusible`` (what may be in them).
The transforms' rules are in interpreters/grad/programs.py and beside.

NOTE [What programs cover]
Real floating-point tensors of one dtype and Python numbers: there is no promotion to undo, and no conjugate. Whatever
is outside of that, or an operator one of whose rules was replaced, goes down the stack as the aten operator that it is.
Both use the same table.
"""
