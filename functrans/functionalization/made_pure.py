"""Pure forms of operators of other libraries, which write to their arguments and have no other form.

The pure form is an operator of its own, ``ns::f_on_copies``, which runs ``ns::f`` on copies of what that writes. It has
no derivative, and what is computed by it with an argument that has one is refused, as of any operator without a
formula; and no batching rule, so that vmap runs it once per example.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from functrans.functionalization.out_of_place import Functional
from functrans.operators.info import OpInfo, op_info
from functrans.pytorch.torch_private import OpOverload

#: ``(a1!)`` in a schema: that an argument is written
WRITTEN = re.compile(r"\([a-z]\d*!\)")


@functools.cache
def made_pure(op: OpOverload) -> Any:
    """The pure form of ``op``, of a library that is not PyTorch's; NotImplemented if it cannot be made."""
    known = op_info(op)
    schema, arguments = str(op._schema), op._schema.arguments
    if known.settled or any(str(arguments[i].type) != "Tensor" or arguments[i].kwarg_only for i in known.written):
        return NotImplemented
    returned = [] if known.returns_written else [str(r.type) for r in op._schema.returns]
    if any(kind != "Tensor" for kind in returned):
        return NotImplemented
    given = WRITTEN.sub("", schema[schema.index("(") : schema.rindex(" -> ")])
    outputs = ", ".join(["Tensor"] * (len(returned) + len(known.written)))
    namespace, name = op._schema.name.split("::")
    name = "_".join([name, *filter(None, [op._schema.overload_name]), "on_copies"])
    made = torch.library.custom_op(
        f"{namespace}::{name}", on_copies(known), mutates_args=(), schema=f"{given} -> ({outputs})"
    )
    made.register_fake(on_copies(known))
    pure: OpOverload = getattr(getattr(torch.ops, namespace), name).default
    return Functional(pure, known)


def on_copies(known: OpInfo) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        copies = {i: args[i].clone() for i in known.written}
        out = known.op(*[copies.get(i, a) for i, a in enumerate(args)], **kwargs)
        outputs = [] if out is None or known.returns_written else list(out) if isinstance(out, tuple | list) else [out]
        results = (*outputs, *copies.values())
        return results[0] if len(results) == 1 else results

    return run
