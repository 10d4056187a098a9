"""Draw the pictures of the documentation.

    python docs/pictures/draw.py

Levels and values are not written by hand: they are what the stack says of itself while the program runs that the
picture is about. A test compares the files with what this draws.
"""

from __future__ import annotations

from pathlib import Path

import torch

from functrans import grad, vmap
from functrans.pictures import layers, running, stack_picture

FOLDER = Path(__file__).parent


def sent(drawn, steps, title, *, operator="torch.sin(x)", value="x"):
    """A function that appends to ``drawn`` the stack where it is called, with ``operator`` on its way down."""

    def f(x):
        values = {value: layers(x)}
        drawn.append(stack_picture(running(), operator=operator, steps=steps, values=values, title=title))
        return torch.sin(x)

    return f


def stack() -> str:
    """``torch.sin`` in ``vmap(grad(f))``: the picture of the README."""
    drawn: list[str] = []
    steps = {
        2: "grad lowers it to x's value,\nand notes it on its tape",
        1: "vmap lowers it to the physical value,\nthat of all examples",
        0: "torch.sin(tensor([0., 1., 2.]))",
    }
    f = sent(drawn, steps, "torch.sin in vmap(grad(f)): from level 2, grad, to level 1, vmap, to the base")
    vmap(grad(f))(torch.tensor([0.0, 1.0, 2.0]))
    return drawn[0]


def walk_back() -> str:
    """What the pull of grad in ``vmap(grad(torch.sin))`` runs, after grad's level has ended."""
    drawn: list[str] = []
    steps = {1: "vmap lowers it to the physical value,\nthat of all examples", 0: "torch.cos(tensor([0., 1., 2.]))"}
    title = "The walk back of grad in vmap(grad(f)) runs at level 1, vmap, and at the base"
    f = sent(drawn, steps, title, operator="cotangent * cos(x)", value="x, which sin saved")
    vmap(f)(torch.tensor([0.0, 1.0, 2.0]))
    return drawn[0]


def other_way_round() -> str:
    """``torch.sin`` in ``grad(lambda x: vmap(f)(x).sum())``."""
    drawn: list[str] = []
    steps = {
        2: "vmap lowers it to the physical value,\nthat of all examples",
        1: "grad lowers it to x's value, and\nnotes the whole batch on its tape",
        0: "torch.sin(tensor([0., 1., 2.]))",
    }
    f = sent(drawn, steps, "torch.sin in vmap inside of grad: from level 2, vmap, to level 1, grad, to the base")

    def total(x):
        return vmap(f)(x).sum()

    grad(total)(torch.tensor([0.0, 1.0, 2.0]))
    return drawn[0]


def confusion() -> str:
    """``x + y`` of two derivatives: each level takes apart what it wrapped itself."""
    drawn = []

    def outer(x):
        def inner(y):
            steps = {2: "y is mine: lowered to its value.\nx is not: a constant here", 1: "x is mine", 0: "1 + 1"}
            title = "x + y in grad of grad: level 2 takes y apart, level 1 x"
            values = {"x": layers(x), "y": layers(y)}
            drawn.append(stack_picture(running(), operator="x + y", steps=steps, values=values, title=title))
            return x + y

        return x * grad(inner)(torch.tensor(1.0))

    grad(outer)(torch.tensor(1.0))
    return drawn[0]


PICTURES = {
    "stack.svg": stack,
    "walk_back.svg": walk_back,
    "other_way_round.svg": other_way_round,
    "confusion.svg": confusion,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
