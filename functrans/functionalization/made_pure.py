"""Pure forms of operators of other libraries, which write to their arguments and have no other form.

The pure form is an operator of its own, ``ns::f_on_copies``, which takes all arguments by position and runs ``ns::f``
on copies of what that writes: tensors and lists of them. It has no derivative, and what is computed by it with an
argument that has one is refused, as of any operator without a formula; and no batching rule, so that vmap runs it once
per example.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from functrans.operators.info import OpInfo, op_info
from functrans.operators.schemas import arguments_by_position
from functrans.pytorch import thread_state
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import tensors_in

#: what the schema of the pure form leaves out: ``(a1!)``, which says that an argument is written; defaults; and the
#: star before arguments that are given by name
LEFT_OUT = re.compile(r"""\([a-z]\d*!\)|=(\[[^]]*]|"[^"]*"|[^,)]+)|\*, """)

#: What may be written and returned, and what is returned of it: a list where there may be no tensor.
RETURNED = {"Tensor": "Tensor", "List[Tensor]": "Tensor[]", "Optional[Tensor]": "Tensor[]"}


class OnCopies:
    """A writing operator's pure form: takes its arguments, returns a list of its outputs and of the tensors that it has
    written."""

    def __init__(self, known: OpInfo, op: OpOverload, outputs: int) -> None:
        self.known = known
        self.op = op
        self.outputs = outputs

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        out = thread_state.DOOR.enter(self.op, arguments_by_position(self.known.op, args, kwargs), {})
        results = list(out) if isinstance(out, tuple) else [out]
        return [*results[: self.outputs], *tensors_in(results[self.outputs :])]


@functools.cache
def made_pure(op: OpOverload) -> Any:
    """The pure form of ``op``, of a library that is not PyTorch's; NotImplemented if it cannot be made."""
    known, schema = op_info(op), op._schema
    written = [str(schema.arguments[i].type) for i in known.written]
    returned = [] if known.returns_written else [str(r.type) for r in schema.returns]
    if known.settled or not {*written, *returned} <= RETURNED.keys() or "Optional[Tensor]" in returned:
        return NotImplemented
    text = str(schema)
    given = LEFT_OUT.sub("", text[text.index("(") : text.rindex(" -> ")])
    outputs = ", ".join(RETURNED[kind] for kind in (*returned, *written))
    namespace, name = schema.name.split("::")
    name = "_".join([name, *filter(None, [schema.overload_name]), "on_copies"])
    run = on_copies(known, len(returned))
    made = torch.library.custom_op(f"{namespace}::{name}", run, mutates_args=(), schema=f"{given} -> ({outputs})")
    made.register_fake(run)
    return OnCopies(known, getattr(getattr(torch.ops, namespace), name).default, len(returned))


def on_copies(known: OpInfo, returned: int) -> Any:
    """What the pure form runs: the operator, which returns so many values of its own."""
    by_name = [a.name for a in known.op._schema.arguments if a.kwarg_only]

    def run(*args: Any) -> Any:
        given = list(args)
        for i in known.written:
            given[i] = copied(args[i])
        split = len(given) - len(by_name)
        out = known.op(*given[:split], **dict(zip(by_name, given[split:], strict=True)))
        results = [out] if returned == 1 else list(out) if returned else []
        for i in known.written:
            optional = str(known.op._schema.arguments[i].type) == "Optional[Tensor]"
            results.append(given[i] if not optional else [] if given[i] is None else [given[i]])
        return results[0] if len(results) == 1 else tuple(results)

    return run


def copied(written: Any) -> Any:
    if isinstance(written, list | tuple):
        return [x.clone() for x in written]
    return None if written is None else written.clone()
