"""The tour in a small setting, its accountant against numerical integration, and the command around it."""

from __future__ import annotations

import math

import pytest
import torch

from functrans import cli
from functrans.tour import Settings, report, run
from functrans.tour.privacy import privacy_spent, sampled_gaussian_renyi
from functrans.tour.report import Report

SMALL = Settings(steps=8, batch=64, checked=4, hessians=2, members=2, member_steps=2)


@pytest.fixture
def installed():
    """Skip where the extra of the tour is not installed."""
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")


def test_every_station_agrees_with_plain_pytorch(installed, capsys):
    assert run(SMALL) == 0
    printed = capsys.readouterr()
    assert printed.out.count(" ok\n") == 5 and "FAILED" not in printed.out
    assert "test accuracy" in printed.out and "(epsilon, delta) = (" in printed.out
    assert "training" in printed.err, "the progress bar"
    assert printed.out.isascii() and printed.err.isascii(), "it must print on any terminal"


def test_a_wrong_gradient_is_noticed(installed, capsys, monkeypatch):
    from functrans.tour.stations import Tour

    right = Tour.clipped_sum

    def wrong(self, *args):
        return {name: value * (1 + 1e-6) for name, value in right(self, *args).items()}

    monkeypatch.setattr(Tour, "clipped_sum", wrong)
    assert run(SMALL) == 1
    printed = capsys.readouterr()
    assert printed.out.count("FAILED") == 1
    assert printed.err.endswith(
        "These differ from plain PyTorch: the gradients of 4 examples, clipped one by one and summed.\n"
    )


@pytest.mark.parametrize(
    "theirs", [torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0 + 1e-6]), torch.tensor([[1.0, 2.0]])]
)
def test_a_check_notices(theirs, capsys):
    report = Report()
    report.check("a thing", lambda: torch.tensor([1.0, 2.0]), lambda: theirs, ("one way", "another"))
    assert report.failed == ["a thing"]
    assert "FAILED" in capsys.readouterr().out


def test_the_state_of_the_process_is_as_before(installed, capsys):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run(SMALL)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    assert cli.main(["tour"]) == 2
    error = capsys.readouterr().err
    assert "needs sklearn" in error and "pip install 'functrans[tour]'" in error


def test_the_command_explains_itself(capsys):
    assert cli.main([]) == 2
    assert "tour" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tour", "--steps", "0"])
    assert stopped.value.code == 2
    assert "at least one step" in capsys.readouterr().err


def renyi_by_integration(order: int, rate: float, noise: float) -> float:
    """The definition: E over N(0, noise^2) of the density ratio to the power of ``order``."""
    x = torch.linspace(-60, 60, 400_001, dtype=torch.float64) * noise
    log_density = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    log_ratio = torch.logaddexp(torch.tensor(math.log1p(-rate)), math.log(rate) + (2 * x - 1) / (2 * noise**2))
    moment = torch.logsumexp(log_density + order * log_ratio, 0) + torch.log(x[1] - x[0])
    return moment.item() / (order - 1)


@pytest.mark.parametrize("order", [2, 3, 8, 32])
@pytest.mark.parametrize("rate, noise", [(0.01, 1.0), (0.178, 2.0), (0.5, 0.8)])
def test_the_divergence_is_that_of_its_definition(order, rate, noise):
    expected = renyi_by_integration(order, rate, noise)
    assert sampled_gaussian_renyi(order, rate, noise) == pytest.approx(expected, rel=1e-6)


def test_more_steps_and_less_noise_spend_more():
    spent = privacy_spent(300, 0.178, 2.0, 1e-5)
    assert 0 < privacy_spent(100, 0.178, 2.0, 1e-5) < spent < privacy_spent(300, 0.178, 1.5, 1e-5)
    assert spent < privacy_spent(300, 1.0, 2.0, 1e-5)
    assert spent < privacy_spent(300, 0.178, 2.0, 1e-7)


@pytest.mark.parametrize(("seconds", "turns"), [(0.01, report.TURNS), (5.0, 2)])
def test_times_are_the_shortest_of_turns(monkeypatch, seconds, turns):
    """What only the first call of either pays is in neither time, and long computations are not repeated much."""
    clock, called = [0.0], []
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])

    def computing(name, takes):
        def compute():
            clock[0] += takes if name in called else takes + 0.5
            called.append(name)
            return name

        return compute

    results, shortest = report._timed(computing("ours", seconds), computing("theirs", 2 * seconds))
    assert results == ["ours", "theirs"] and shortest == pytest.approx([seconds, 2 * seconds])
    assert called == ["ours", "theirs"] * turns
