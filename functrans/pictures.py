"""Pictures of the interpreter stack, as SVG: a band for each level, an operator's way down, wrappers as nested boxes.

They are text, the same for the same arguments, and need nothing else: no font that is measured, no style sheet, no
script. A page that embeds one can give it colours of its own by CSS variables: ``--level-1``, ``--level-1-line``, ...,
``--base``, ``--base-line``, ``--picture``, ``--picture-text``. ``variables`` writes down those of here, light or dark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from torch import Tensor

from functrans.core.stack import interpreter_stack
from functrans.errors import CallTypeError, CallValueError
from functrans.tensors.described import is_wrapper, shown


class Palette(NamedTuple):
    """The colours of pictures: what fills boxes, and what their lines are."""

    #: by level, from 1; further levels begin again
    levels: tuple[tuple[str, str], ...]
    base: tuple[str, str]
    ground: str
    text: str

    def of(self, level: int) -> tuple[str, str]:
        return self.levels[(level - 1) % len(self.levels)] if level else self.base


LIGHT = Palette(
    (
        ("#dbeafe", "#1d4ed8"), ("#fde9c8", "#b45309"), ("#d5f2df", "#15803d"), ("#f6dcef", "#a21caf"),
        ("#e3defb", "#6d28d9"),
    ),
    ("#eef1f4", "#56616f"), "#ffffff", "#1f2933",
)  # fmt: skip
DARK = Palette(
    (
        ("#1b3358", "#7fb2ff"), ("#4a3312", "#f0a95e"), ("#143f29", "#62d49a"), ("#471d46", "#ec93e2"),
        ("#30295f", "#b9a8ff"),
    ),
    ("#262d35", "#9aa4af"), "#1c2229", "#e3e8ee",
)  # fmt: skip

LINE, PAD = 17, 10  # the height of a line and the margin in a box, in pixels
FONT = "12px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def stack_picture(
    levels: Sequence[str],
    *,
    operator: str = "",
    steps: Mapping[int, str] | None = None,
    values: Mapping[str, Sequence[tuple[int, str]]] | None = None,
    title: str = "",
) -> str:
    """A stack of transforms as SVG.

    Args:
        levels: what runs at each level, from level 1 on, as ``running()`` returns it. The innermost is drawn on top, as
            it is the first that an operator comes to, and the base below.
        operator: what is called: the arrow down begins at it.
        steps: by level, 0 for the base, what becomes of the operator there; a text of one or more lines. The arrow
            passes by a level that is not among them.
        values: by name, tensors as nested boxes: each a list of (level, text), from the outermost layer to the value
            of the base, as ``layers(x)`` returns it.
        title: what the picture shows, for those who cannot see it.

    Returns:
        The text of an SVG file. It is the same whenever the arguments are.

    Raises:
        CallTypeError: ``levels`` is a text, and not a list of them.
        CallValueError: a step or a layer is of a level that is not there, or a value has no layers.

    Example:
        >>> from functrans.pictures import stack_picture
        >>> picture = stack_picture(["vmap(f)"], operator="sin(x)", steps={1: "sin of all rows", 0: "torch.sin"})
        >>> picture.startswith("<svg") and "sin of all rows" in picture
        True
    """
    steps, values = steps or {}, values or {}
    if isinstance(levels, str):
        raise CallTypeError("stack_picture(levels, ...)", f"the text {levels!r}", "a list of texts, one for each level")
    named = [("steps", list(steps)), *((f"values[{name!r}]", [level for level, _ in values[name]]) for name in values)]
    for where, found in named:
        if not found and where != "steps":
            raise CallValueError("stack_picture(levels, ...)", f"no layers in {where}", "a list of (level, text)")
        for level in found:
            if level not in range(len(levels) + 1):
                known = f"levels from 0, the base, to {len(levels)}"
                raise CallValueError("stack_picture(levels, ...)", f"level {level} in {where}", known)
    drawing = Drawing()
    right, bottom = draw_bands(drawing, levels, operator, steps)
    for name, its_layers in values.items():
        drawing.text(right + 2 * PAD, PAD + LINE - 4, name, bold=True)
        draw_nested(drawing, right + 2 * PAD, PAD + LINE + 4, its_layers)
        width, height = size(its_layers)
        right, bottom = right + 2 * PAD + max(width, text_width(name)), max(bottom, PAD + LINE + 4 + height)
    return drawing.svg(right + PAD, bottom + PAD, title or " in ".join(filter(None, (operator, ", ".join(levels)))))


def value_picture(layers: Sequence[tuple[int, str]], *, title: str = "") -> str:
    """A tensor as SVG: nested boxes, one for each layer.

    Args:
        layers: a list of (level, text), from the outermost layer to the value of the base, as ``layers(x)`` returns it.
        title: what the picture shows, for those who cannot see it.

    Returns:
        The text of an SVG file. It is the same whenever the arguments are.

    Raises:
        CallValueError: there is no layer, or one has no level.

    Example:
        >>> from functrans.pictures import value_picture
        >>> "bdim=0" in value_picture([(1, "vmap: float32[]\\nbdim=0"), (0, "float32[3]")])
        True
    """
    if not layers or any(level < 0 for level, _ in layers):
        raise CallValueError("value_picture(layers)", f"{list(layers)!r} as layers", "a list of (level, text)")
    drawing = Drawing()
    draw_nested(drawing, 1, 1, layers)
    width, height = size(layers)
    return drawing.svg(width + 2, height + 2, title or ", ".join(text.replace("\n", ", ") for _, text in layers))


def text_width(text: str) -> int:
    """That of its longest line; a character of a monospaced font of 12 pixels is at most 7.4 wide."""
    return max(-(-74 * len(line) // 10) for line in text.split("\n"))


def draw_bands(drawing: Drawing, levels: Sequence[str], operator: str, steps: Mapping[int, str]) -> tuple[int, int]:
    """The levels below each other, and the arrow through them; where they end on the right and below."""
    names = {0: "base\nplain PyTorch", **{i: f"level {i}\n{name}" for i, name in enumerate(levels, 1)}}
    column = 3 * PAD + max(map(text_width, names.values()))
    width = 2 * PAD + max(map(text_width, (operator, *steps.values())))
    right = column + (width + PAD if operator or steps else 0)
    if operator:
        drawing.text(column + width // 2, PAD + LINE - 4, operator, bold=True, anchor="middle")
    tip, y = PAD + LINE + 2, PAD + (LINE + PAD if operator else 0)
    for level in sorted(names, reverse=True):
        step = steps.get(level)
        height = max(2, len(step.split("\n")) if step else 0) * LINE + 3 * PAD
        drawing.box(PAD, y, right - PAD, height, level, faint=True)
        drawing.text(2 * PAD, y + height // 2 - 5, names[level].split("\n")[0], bold=True)
        drawing.text(2 * PAD, y + height // 2 + LINE - 5, names[level].split("\n")[1])
        if step:
            drawing.box(column, y + PAD, width, height - 2 * PAD, level)
            first = y + (height - LINE * len(step.split("\n"))) // 2 + 13
            drawing.text(column + PAD, first, step)
            if operator or tip > y:
                drawing.arrow(column + width // 2, tip, y + PAD)
            tip = y + height - PAD
        y += height + PAD // 2
    return right, y - PAD // 2


def size(layers: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """The width and height of nested boxes."""
    (_, text), *inner = layers
    width, height = text_width(text) + 2 * PAD, LINE * len(text.split("\n")) + PAD
    if inner:
        inner_width, inner_height = size(inner)
        return max(width, inner_width + 2 * PAD), height + inner_height + PAD
    return width, height


def draw_nested(drawing: Drawing, x: int, y: int, layers: Sequence[tuple[int, str]], width: int | None = None) -> None:
    """Boxes in boxes, from the outermost to the innermost."""
    (level, text), *inner = layers
    own_width, height = size(layers)
    width = width or own_width
    drawing.box(x, y, width, height, level)
    drawing.text(x + PAD, y + LINE + 1, text)
    if inner:
        draw_nested(drawing, x + PAD, y + height - PAD - size(inner)[1], inner, width - 2 * PAD)


class Drawing:
    """The elements of one picture, in the order in which they are drawn."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def box(self, x: int, y: int, width: int, height: int, level: int, faint: bool = False) -> None:
        fill, line = colours(level)
        look = f"fill:{fill};stroke:{line}" + (";fill-opacity:.45;stroke-opacity:.35" if faint else "")
        self.elements.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" style="{look}"/>')

    def text(self, x: int, y: int, text: str, bold: bool = False, anchor: str = "") -> None:
        look = (' font-weight="bold"' if bold else "") + (f' text-anchor="{anchor}"' if anchor else "")
        for i, line in enumerate(text.split("\n")):
            self.elements.append(f'<text x="{x}" y="{y + LINE * i}"{look} xml:space="preserve">{escaped(line)}</text>')

    def arrow(self, x: int, start: int, end: int) -> None:
        line = f"stroke:var(--picture-text,{LIGHT.text});stroke-width:1.6;fill:none"
        self.elements.append(f'<path d="M{x} {start}V{end - 1}m-4 -6l4 6l4 -6" style="{line}"/>')

    def svg(self, width: int, height: int, title: str) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" style="font:{escape(FONT)};fill:var(--picture-text,{LIGHT.text})">'
        )
        ground = f'<rect width="{width}" height="{height}" rx="8" style="fill:var(--picture,{LIGHT.ground})"/>'
        return "\n".join([head, f"<title>{escaped(title)}</title>", ground, *self.elements, "</svg>"]) + "\n"


def escaped(text: str) -> str:
    """``text`` as it stands in SVG, without the characters that it cannot have."""
    return escape(re.sub("[^\t\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def colours(level: int) -> tuple[str, str]:
    """What fills a box of a level, and its lines, as CSS."""
    fill, line = LIGHT.of(level)
    name = variable(level)
    return f"var({name},{fill})", f"var({name}-line,{line})"


def variable(level: int) -> str:
    return f"--level-{level}" if level else "--base"


def variables(levels: int, *, dark: bool = False) -> str:
    """The colours of pictures with so many levels as CSS, for the rule of a page that embeds them.

    Example:
        >>> from functrans.pictures import variables
        >>> variables(0)
        '--picture:#ffffff;--picture-text:#1f2933;--base:#eef1f4;--base-line:#56616f'
    """
    palette = DARK if dark else LIGHT
    found = [f"--picture:{palette.ground}", f"--picture-text:{palette.text}"]
    for level in range(levels + 1):
        fill, line = palette.of(level)
        found += [f"{variable(level)}:{fill}", f"{variable(level)}-line:{line}"]
    return ";".join(found)


def running() -> list[str]:
    """The transforms that are running in this thread, from level 1 on: the ``levels`` of a picture of here and now.

    Example:
        >>> import torch, functrans
        >>> from functrans.pictures import running
        >>> def f(x):
        ...     print(running())
        ...     return x.sin()
        >>> _ = functrans.vmap(functrans.grad(f))(torch.zeros(2))
        ['vmap(f)', 'grad(f)']
    """
    return [interpreter.name for interpreter in reversed(interpreter_stack())]


def layers(x: Tensor) -> list[tuple[int, str]]:
    """The layers of a wrapper, from the outermost to the tensor of the base, as ``stack_picture`` takes them.

    Example:
        >>> import torch, functrans
        >>> from functrans.pictures import layers
        >>> def f(x):
        ...     print(layers(x))
        ...     return x.sin()
        >>> _ = functrans.vmap(functrans.grad(f))(torch.zeros(2))
        [(2, 'grad: float32[]\\ntracked, tape_index=1'), (1, 'vmap: float32[]\\nbdim=0'), (0, 'float32[2]')]
    """
    found = []
    value: Any = x
    while is_wrapper(value):
        interpreter = value.interpreter
        parts = interpreter.parts(value).items()
        about = [interpreter.describe(value), *(f"{name}: {shown(part)}" for name, part in parts)]
        found.append((interpreter.level, "\n".join([f"{interpreter.kind}: {shown(value)}", *filter(None, about)])))
        value = value.value
    return [*found, (0, shown(value))]
