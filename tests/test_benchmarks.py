"""The benchmarks' candidates agree in float64, their arithmetic is right, and the page keeps what people wrote."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
try:
    import by_hand
    import cases
    import growth
    import in_jax
    import per_op
    import report
    import run
    import shipped
    import timing
    import workloads
finally:
    sys.path.remove(str(FOLDER))

SETTINGS = report.Settings(quick=True)


@pytest.mark.parametrize("name", cases.WORKLOADS)
def test_every_candidate_of_a_workload_agrees(name):
    candidates = workloads.makers(name, workloads.build(cases.WORKLOADS[name], "cpu", torch.float64), SETTINGS)
    part = report.Part()
    assert part.agreeing(name, candidates) == list(candidates), part.failures
    assert {"autograd", "functrans", "torch.func"} <= candidates.keys()
    assert ("by hand" in candidates) == (name != "HVP of a transformer block")
    assert ("jax.jit" in candidates) == in_jax.usable("cpu")


@pytest.mark.parametrize("name", shipped.CASES)
def test_a_transform_that_ships_agrees_with_what_is_written_without_it(name):
    part = report.Part()
    assert part.agreeing(name, shipped.makers(shipped.CASES[name][0]("cpu", torch.float64))) == ["plain", "transform"]
    assert not part.failures


@pytest.mark.parametrize("name", per_op.CASES)
def test_every_candidate_of_an_operation_agrees(name):
    for length in (1, 6):  # a single operation; each of the four kinds, and the first again on what they gave
        candidates = per_op.makers(per_op.CASES[name], length, "cpu", torch.float64)
        part = report.Part()
        assert part.agreeing(name, candidates) == list(candidates), part.failures


def test_names_of_versions_and_targets_are_those_of_cases():
    for names in (by_hand.BY_HAND, in_jax.IN_JAX, workloads.TIME_TARGETS):
        assert names.keys() <= cases.WORKLOADS.keys()
    assert per_op.PER_OP_TARGETS.keys() | per_op.PER_CALL_TARGETS.keys() <= per_op.CASES.keys()
    assert in_jax.IN_JAX.keys() == cases.WORKLOADS.keys()


@pytest.mark.parametrize("name", ["jvp with Python-number operands", "gradient of an ensemble of 10 MLPs"])
def test_what_is_timed_computes_in_float32(name):
    makers = workloads.makers(name, workloads.build(cases.WORKLOADS[name], "cpu", torch.float32), SETTINGS)
    for candidate, make in makers.items():
        leaves = torch.utils._pytree.tree_leaves(report.result_of(make()))
        assert {leaf.dtype for leaf in leaves} == {torch.float32}, candidate


def test_a_candidate_that_differs_or_fails_is_told_and_left_out():
    def fail():
        raise ValueError("broken")

    part = report.Part()
    right = {"x": torch.ones(2, dtype=torch.float64)}
    wrong = {"x": torch.ones(2, dtype=torch.float64) + 1e-6}
    agree = part.agreeing(
        "case", {"a": lambda: lambda: right, "b": lambda: lambda: wrong, "c": fail, "d": lambda: fail}
    )
    assert agree == ["a"]
    assert [failure.partition(":")[0] for failure in part.failures] == ["case, b", "case, c", "case, d"]
    assert part.agreeing("case", {"c": fail, "a": lambda: lambda: right, "b": lambda: lambda: wrong}) == ["a"]
    assert "b differs from a" in part.failures[-1]
    assert report.tell_failures([part]) == 1


def test_the_command_prints_every_figure_of_what_is_chosen(capsys, monkeypatch):
    page = run.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--case", "jvp with Python", "--case", "jvp, numbers"])
    assert run.main() == 0
    printed = capsys.readouterr().out
    assert re.search(r"^[0-3] of 3 are met\.$", printed, re.MULTILINE)
    rows = [line for line in printed.splitlines() if line.startswith("| jvp")]
    assert len(rows) == 4, "time and memory of one, and the cost per operation and per call of the other"
    empty = 0 if in_jax.usable("cpu") else 1
    assert all([cell.strip() for cell in row.split("|")[1:-1]].count("") <= empty for row in rows)
    assert run.PAGE.read_text(encoding="utf-8") == page, "the figures of some cases are not those of the page"


def test_a_curve_has_its_sizes_and_nothing_chosen_is_an_error(capsys):
    part = growth.run(report.Settings(quick=True, cases=("batch",)))
    assert part.failures == [] and [row[0] for row in part.tables[0].rows] == ["1", "8", "64", "512", "4,096"]
    assert report.tell_failures([part]) == 0
    assert report.tell_failures([growth.run(report.Settings(cases=("no such curve",)))]) == 1


@pytest.mark.parametrize(("figure", "met"), [(0.5, True), (0.504, True), (0.506, False), (float("nan"), False)])
def test_a_target_is_compared_as_it_is_printed(figure, met):
    target = report.Target("x", figure, 0.5)
    assert target.met is met
    row = report.targets_table([target]).rows[0]
    assert row == ["x", f"{figure:.2f}", "0.50", "met" if met else "**missed**"]


def test_peak_memory_is_what_a_call_holds_at_once():
    def two_at_once():
        a = torch.ones(1000)
        b = a.sin()
        del a
        return b.cos()

    assert timing.peak_memory(two_at_once, "cpu") == 2 * 4000


def test_the_ratio_is_taken_round_by_round():
    spread = timing.ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.5, 2.5)
    assert f"{spread:.1f}" == "2.0 (1.5-2.5)"


def test_the_page_keeps_what_people_wrote():
    begin, end = run.markers("cpu")
    page = f"# Title\n\ntext\n\n{begin}old\n{end}\nafter\n"
    new = run.with_figures(page, "cpu", "| new |\n")
    assert new == f"# Title\n\ntext\n\n{begin}\n| new |\n\n{end}\nafter\n"
    assert run.with_figures(new, "cpu", "| new |\n") == new
    both = run.with_figures(new, "cuda", "| other |\n")
    assert both.startswith(new.rstrip()) and run.markers("cuda")[0] in both and "| new |" in both
    assert run.with_figures(both, "cpu", "| newer |\n").count("figures: cpu") == 2


def test_the_page_has_a_place_for_the_figures():
    begin, end = run.markers("cpu")
    page = run.PAGE.read_text(encoding="utf-8")
    assert page.count(begin) == page.count(end) == 1
