"""Pictures of the stack: the same text for the same arguments, everything inside its box, and no stale file."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import functrans
from functrans.errors import CallTypeError, CallValueError
from functrans.pictures import layers, running, stack_picture, text_width, value_picture, variables

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


def boxes(picture):
    """(x, y, width, height) of every box but the ground."""
    found = ElementTree.fromstring(picture).findall(f"{SVG}rect")[1:]
    return [tuple(int(box.get(side)) for side in ("x", "y", "width", "height")) for box in found]


def texts(picture):
    return [text.text for text in ElementTree.fromstring(picture).findall(f"{SVG}text")]


def test_the_files_are_what_is_drawn():
    drawn = {name: draw() for name, draw in runpy.run_path(str(FOLDER / "draw.py"))["PICTURES"].items()}
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")}
    assert on_disk == drawn, "run python docs/pictures/draw.py"


def test_every_file_is_on_a_page():
    pages = [*FOLDER.parent.rglob("*.md"), FOLDER.parent.parent / "README.md"]
    shown = {name for page in pages for name in re.findall(r"pictures/(\w+\.svg)\)", page.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in FOLDER.glob("*.svg")}


@pytest.mark.parametrize("depth", range(1, 8))
def test_levels_are_drawn_from_the_innermost_to_the_base(depth):
    levels = [f"vmap(f{i})" for i in range(1, depth + 1)]
    picture = stack_picture(levels, operator="sin(x)", steps={i: f"step {i}" for i in range(depth + 1)})
    shown = texts(picture)
    assert shown[0] == "sin(x)"
    assert [t for t in shown if t.startswith("vmap")] == levels[::-1]
    assert [t for t in shown if t.startswith("step")] == [f"step {i}" for i in reversed(range(depth + 1))]
    assert len(boxes(picture)) == 2 * (depth + 1)
    assert len(ElementTree.fromstring(picture).findall(f"{SVG}path")) == depth + 1


def test_every_box_is_in_the_picture_and_every_text_in_a_box():
    value = [(2, "grad: float32[]\na text that is longer than the others"), (1, "vmap: float32[]"), (0, "float32[3]")]
    picture = stack_picture(
        ["vmap(f)", "grad(f)"],
        operator="a long call(of, something)",
        steps={1: "a\nb\nc"},
        values={"x": value, "a name that is long": value},
    )
    root = ElementTree.fromstring(picture)
    width, height = int(root.get("width")), int(root.get("height"))
    for x, y, w, h in boxes(picture):
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for text in root.findall(f"{SVG}text"):
        x, y, wide = int(text.get("x")), int(text.get("y")), text_width(text.text)
        assert (x - wide // 2 if text.get("text-anchor") else x) >= 0
        assert (x + wide // 2 if text.get("text-anchor") else x + wide) <= width and y < height
    # the layers of a value: each inside of the one before
    outer, middle, inner = boxes(picture)[-3:]
    for (x, y, w, h), (a, b, c, d) in ((outer, middle), (middle, inner)):
        assert x < a and y < b and a + c < x + w and b + d < y + h


def test_what_is_drawn_is_escaped():
    picture = stack_picture(["grad(<lambda>)"], operator="f(\"a\" & '</svg><script>')", title="<b>")
    assert "<script>" not in picture and texts(picture)[0] == "f(\"a\" & '</svg><script>')"


def test_a_value_is_drawn_as_it_is_beside_a_stack():
    value = [(2, "grad: float32[]\ntracked"), (1, "vmap: float32[]"), (0, "float32[3]")]
    beside = boxes(stack_picture(["vmap(f)", "grad(f)"], values={"x": value}))[-3:]
    alone = boxes(value_picture(value))
    assert [(w, h) for _, _, w, h in alone] == [(w, h) for _, _, w, h in beside] and alone[0][:2] == (1, 1)
    assert "<title>grad: float32[], tracked, vmap: float32[], float32[3]</title>" in value_picture(value)


def test_what_xml_cannot_have_is_not_drawn():
    assert texts(stack_picture(["f\x00\x1b(\ud800)"]))[1] == "f��(�)"


@pytest.mark.parametrize("dark", [False, True])
def test_the_colours_of_a_page(dark):
    """Every variable that a picture asks for has a value; without dark ones it is that which the picture has itself."""
    picture = stack_picture([f"vmap(f{i})" for i in range(8)], operator="sin", steps={0: "sin"})
    values = dict(entry.split(":") for entry in variables(8, dark=dark).split(";"))
    asked = dict(re.findall(r"var\((--[\w-]+),(#\w+)\)", picture))
    assert asked.keys() == values.keys()
    assert (asked == values) is not dark


def test_nothing_is_drawn_of_nothing():
    assert texts(stack_picture([])) == ["base", "plain PyTorch"]


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_the_layers_of_live_wrappers(transform):
    seen = {}

    def f(x):
        seen[transform] = (running(), layers(x))
        return x.sin().sum()

    if transform == "grad":
        functrans.grad(f)(torch.ones(2))
        assert seen["grad"] == (["grad(f)"], [(1, "grad: float32[2]\ntracked, tape_index=1"), (0, "float32[2]")])
    elif transform == "jvp":
        functrans.jvp(functrans.vmap(f), (torch.ones(3, 2),), (torch.ones(3, 2),))
        assert seen["jvp"][0] == ["jvp(f)", "vmap(f)"]
        assert seen["jvp"][1] == [
            (2, "vmap: float32[2]\nbdim=0"), (1, "jvp: float32[3, 2]\ntangent: float32[3, 2]"), (0, "float32[3, 2]"),
        ]  # fmt: skip
    else:
        functrans.vmap(functrans.vmap(f))(torch.ones(4, 3, 2))
        assert [level for level, _ in seen["vmap"][1]] == [2, 1, 0]
    stack_picture(*seen[transform][:1], values={"x": seen[transform][1]})
    assert layers(torch.ones(2)) == [(0, "float32[2]")] and running() == []


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"levels": "grad(f)"}, CallTypeError, "the text 'grad(f)'"),
        ({"levels": ["grad(f)"], "steps": {2: "?"}}, CallValueError, "level 2 in steps"),
        ({"levels": [], "values": {"x": [(1, "grad")]}}, CallValueError, "level 1 in values['x']"),
        ({"levels": ["grad(f)"], "values": {"x": []}}, CallValueError, "no layers in values['x']"),
    ],
)
def test_what_cannot_be_drawn(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        stack_picture(**arguments)
    for nothing in ([], [(-1, "what")]):
        with pytest.raises(CallValueError, match=r"a list of \(level, text\)"):
            value_picture(nothing)
