"""What a transform by a table carries beside a value, outside of the transform."""

from __future__ import annotations

from typing import Any

import optree
from torch import Tensor

from functrans.api.checks import check_kind
from functrans.tensors.pytrees import NAMESPACE, Context, tree_flatten


class Carried:
    """A value and what a transform carries beside it, outside of the transform: an argument or result of ``transform``.

    It is a pytree: the tensors in it are batched by ``vmap``, differentiated by ``grad``, and so on.

    Args:
        value: a tensor.
        payload: by name, what is carried beside it. Each is an attribute too.

    Example:
        >>> import torch
        >>> from functrans.extend import Carried
        >>> interval = Carried(torch.tensor(1.0), upper=torch.tensor(2.0))
        >>> interval.value, interval.upper
        (tensor(1.), tensor(2.))
    """

    def __init__(self, value: Tensor, /, **payload: Any) -> None:
        check_kind("Carried(value, **payload)", "value", value, Tensor, "a tensor")
        self.value = value
        self.payload = payload
        #: the names of what has tensors in it; the rest belongs to the structure
        self.branches = tuple(n for n, x in payload.items() if any(isinstance(v, Tensor) for v in tree_flatten(x)[0]))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["payload"][name]
        except KeyError:
            raise AttributeError(f"Carried(...) has no {name!r}; it carries {sorted(self.payload)}") from None

    def __repr__(self) -> str:
        return f"Carried({self.value}{''.join(f', {name}={carried}' for name, carried in self.payload.items())})"


def flatten(x: Any) -> tuple[Any, Any]:
    fixed = {name: None if name in x.branches else carried for name, carried in x.payload.items()}
    return (x.value, *(x.payload[name] for name in x.branches)), Context((x.branches, fixed))


def unflatten(about: Any, children: Any) -> Carried:
    x = object.__new__(Carried)  # of whatever stands in the place of its tensors
    x.value, *carried = children
    x.branches, fixed = about.value
    x.payload = {**fixed, **dict(zip(x.branches, carried, strict=True))}
    return x


optree.register_pytree_node(Carried, flatten, unflatten, namespace=NAMESPACE)


def is_carried(x: Any) -> bool:
    return isinstance(x, Carried)
