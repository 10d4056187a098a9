"""Dynamo is told of transforms, once torch._dynamo is imported: NOTE [Compiled transforms] in api/compiled.py."""

from __future__ import annotations

from functrans.api.private_names import PAIRS
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.pytorch.dynamo import run_as_written_while, run_untraced, stand_in_graphs
from functrans.pytorch.imports import when_imported
from functrans.pytorch.thread_state import STATE, Snapshot


def connect() -> None:
    """Tell Dynamo, which has been imported, of transforms."""
    import functrans.api.dynamo_variables  # noqa: F401 - made of Dynamo's classes, and registered there

    for function in (Interpreter.__init__, Snapshot.__init__, Snapshot.restore, run_transformed):
        run_untraced(function)  # where a transform of somebody else's comes to it
    for original, answer in PAIRS:
        stand_in_graphs(answer, original)  # a function that is traced gets examples, which are no wrappers
    run_as_written_while(lambda: STATE.top is not None)


when_imported("torch._dynamo", connect)
