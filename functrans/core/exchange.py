"""Objects put in the place of others, in every module that holds them under a name."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from functrans.core.torch_private import PLACES_OF_TORCH_FUNC, forget_rules_of_dynamo


def exchange(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Wherever a module that is loaded has the first of a pair as an attribute, let it have the second.

    Modules of functrans keep what they have, and so do PyTorch's own: it works with its transforms itself. Of these
    only the places change that others import the names from.
    """
    new_of = {id(old): (old, new) for old, new in pairs}  # which keeps what has the id
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        if package == "functrans" or (package in ("torch", "functorch") and name not in PLACES_OF_TORCH_FUNC):
            continue
        namespace = getattr(module, "__dict__", None)  # anything may stand in sys.modules
        if type(namespace) is not dict:
            continue
        kept = PLACES_OF_TORCH_FUNC.get(name, ())
        for attribute, value in list(namespace.items()):
            found = new_of.get(id(value))
            if found is not None and attribute not in kept:
                namespace[attribute] = found[1]
    forget_rules_of_dynamo()
