"""The installed PyTorch's derivatives are those that functrans was compared with."""

from __future__ import annotations

from pathlib import Path

import derivatives_yaml
import pytest
import torch
from derivatives_yaml import changed, entries, installed, load, number, read, report


def test_no_derivative_has_changed_without_a_verdict() -> None:
    found = entries(read(installed()))
    names = changed(found, load(), torch.__version__)
    assert not names, (
        f"PyTorch {torch.__version__} changed derivatives that functrans has formulas for; docs/versions.md says how "
        f"to go on.{report(names, found, None)}"
    )


def test_every_change_in_the_list_has_a_verdict() -> None:
    known = load()
    assert [name for name, (versions, verdict) in known.items() if len(versions) > 1 and not verdict] == []
    for name, (versions, _) in known.items():
        assert [v for v, _ in versions] == sorted((v for v, _ in versions), key=number), name


YAML = """
# the first
- name: sin(Tensor self) -> Tensor
  self: grad * self.cos().conj()
  result: auto_element_wise

- name: clamp_min(Tensor self, Scalar min) -> Tensor
  # at the bound
  self: where(self > min, grad, 0)
"""


def test_changes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(derivatives_yaml, "LIST", tmp_path / "list.txt")
    monkeypatch.setattr(derivatives_yaml, "answered_for", lambda: {"sin", "clamp_min", "relu"})
    first, second = tmp_path / "3.0.0.yaml", tmp_path / "3.1.0.yaml"
    first.write_text(YAML)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["derivatives_yaml.py", *map(str, arguments)])
        code = derivatives_yaml.main()
        return code, capsys.readouterr().out

    assert run(first, "--accept", "3.0.0")[0] == 0
    assert run(first) == (0, "0 of 3 entries are not those listed for 3.0.0.\n\n")

    # comments and line breaks do not count; formulas, what is new and what is gone do
    second.write_text(YAML.replace("# at the bound", "# elsewhere").replace("conj()\n", "conj()\n\n"))
    assert run(second)[0] == 0
    new = YAML.replace("self > min", "self >= min").replace("- name: sin", "- name: relu")
    second.write_text(new)
    code, text = run(second, "--old", first)
    assert code == 1 and text.startswith("3 of 3 entries are not those listed for 3.1.0.")
    assert "old: clamp_min(Tensor self, Scalar min) -> Tensor\n         self: where(self > min, grad, 0)" in text
    assert "new: clamp_min(Tensor self, Scalar min) -> Tensor\n         self: where(self >= min, grad, 0)" in text
    assert "sin\n  old: sin(Tensor self) -> Tensor" in text and "new: (no entry)" in text

    assert run(second, "--accept", "3.1.0")[0] == 0
    assert run(second)[0] == run(first)[0] == 0  # each is what the list has for its version
    assert len(load()["clamp_min"][0]) == 2 and load()["clamp_min"][1] == ""
