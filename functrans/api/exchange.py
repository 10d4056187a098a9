"""Objects put in the place of others, in every module that holds them under a name."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import Any

from functrans.pytorch.dynamo import forget_rules_of_dynamo
from functrans.pytorch.torch_func import PLACES_OF_TORCH_FUNC

Pairs = Iterable[tuple[Any, Any]]


def put_in(pairs: Pairs) -> None:
    """Wherever a loaded module has the first of a pair as an attribute, let it have the second.

    PyTorch's own modules keep what they have, for they work with its transforms themselves; but for the places that
    others import the names from.
    """
    for name, namespace in namespaces():
        if name.partition(".")[0] not in ("torch", "functorch"):
            exchange(namespace, pairs)
        elif name in PLACES_OF_TORCH_FUNC:
            exchange(namespace, pairs, kept=PLACES_OF_TORCH_FUNC[name])


def take_out(pairs: Pairs) -> None:
    """Undo ``put_in``, also where a module has been imported since; PyTorch imports some of its own late."""
    back = [(new, old) for old, new in pairs]
    for _, namespace in namespaces():
        exchange(namespace, back)
    forget_rules_of_dynamo()


def namespaces() -> list[tuple[str, dict[str, Any]]]:
    """The attributes of every loaded module, by its name; without those of functrans, which stay as they are."""
    found = [(name, getattr(module, "__dict__", None)) for name, module in list(sys.modules.items())]
    # anything may stand in sys.modules
    return [(name, d) for name, d in found if type(d) is dict and name.partition(".")[0] != "functrans"]


def exchange(namespace: dict[str, Any], pairs: Pairs, kept: Collection[str] = ()) -> None:
    new_of = {id(old): new for old, new in pairs}
    for name, value in list(namespace.items()):
        if id(value) in new_of and name not in kept:
            namespace[name] = new_of[id(value)]
