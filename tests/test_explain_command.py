"""``functrans explain`` and ``python -m functrans.explain``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from functrans.cli import main

PROGRAM = '''
import torch
from functrans import grad, vmap

def loss(x):
    return (x.sin() * 3).sum()

def other(x):
    return (x.sin() * 4).sum()

def run():
    return vmap(grad(loss))(torch.ones(2, 3))
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "program_of_test_explain_command.py"
    path.write_text(PROGRAM)
    return str(path)


def test_a_function_of_a_file(file: str, capsys: Any) -> None:
    assert main(["explain", f"{file}:run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("explain(run)\n") and "return (x.sin() * 3).sum()" in out and "level 2 grad" in out


def test_an_expression_with_arguments(file: str, capsys: Any) -> None:
    assert main(["explain", f"{file}:vmap(loss)", "--args", "torch.zeros(2, 3)", "--numbers", "--costs"]) == 0
    out = capsys.readouterr().out
    assert "= value [0, 0, 0]" in out and "µs" in out


def test_a_page_and_records(file: str, tmp_path: Path, capsys: Any) -> None:
    for name in ("page.html", "records.json"):
        assert main(["explain", f"{file}:run", "--save", str(tmp_path / name), "--example", "1"]) == 0
        assert "written to" in capsys.readouterr().out
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()
    assert json.loads((tmp_path / "records.json").read_text())["example"] == 1


def test_a_comparison(file: str, capsys: Any) -> None:
    arguments = ["explain", f"{file}:grad(loss)", "--args", "torch.zeros(3)", "--against"]
    assert main([*arguments, "grad(loss)"]) == 0
    assert main([*arguments, "grad(lambda x: loss(2 * x))"]) == 1
    assert "first difference" in capsys.readouterr().out
    page = Path(file).with_name("diff.html")
    assert main([*arguments, "grad(other)", "--save", str(page)]) == 1
    assert 'id="first"' in page.read_text() and "6 steps, written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py:run"], "expected FILE:FUNCTION"),
        (["run"], "expected FILE:FUNCTION"),
        (["{file}:missing"], "name 'missing' is not defined"),
        (["{file}:run", "--args", "1 +"], "invalid syntax"),
        (["{file}:run", "--save", "page.pdf"], "expected a name that ends in .html, .json or .txt"),
        (["{file}:run", "--against", "run", "--save", "page.json"], "expected a name that ends in .html or .txt"),
        (["{file}:run", "--save", "nowhere/page.html"], "No such file or directory"),
    ],
)
def test_what_is_not_understood(file: str, arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", *(a.replace("{file}", file) for a in arguments)])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_demo_in_a_process_of_its_own() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "functrans.explain", "demo"], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.startswith("explain(demo)\n") and "prediction = torch.tanh(example @ weights)" in found.stdout
    assert "Warning" not in found.stderr
