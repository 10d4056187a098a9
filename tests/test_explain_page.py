"""The page of an explanation, in a browser: what a click, a filter and a step do, and that it is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import BROWSER, Page, chromium
from torch import Tensor

from functrans import diff, explain, grad, vmap
from functrans.explanation import Explanation
from functrans.pictures import DARK, LIGHT

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed (Debian's package: chromium)")

ROWS = torch.tensor([[0.0, 1.0, 2.0], [3.0, 5.0, 4.0]])


def f(x: Tensor) -> Tensor:
    y = torch.logsumexp(x, 0)  # <b>&amp;</b> is text, and "</script>" is
    return y * torch.sin(x).sum()


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    f.__name__ = "<i>f</i>"
    return explain(vmap(grad(f)), ROWS, example=1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page, explanation: Explanation, tmp_path: Path) -> Page:
    explanation.save(tmp_path / "page.html")
    browser.problems.clear()
    browser.requests.clear()
    browser.open(tmp_path / "page.html")
    return browser


def number(explanation: Explanation, *args: Any, **kwargs: Any) -> int:
    return explanation.find(*args, **kwargs)[0].number


def shown_rows(page: Page) -> list[int]:
    visible = "[...document.querySelectorAll('#tree [data-event]')].filter((row) => row.checkVisibility())"
    return page.evaluate(f"{visible}.map((row) => Number(row.dataset.event))")


def details(page: Page) -> str:
    return page.evaluate("document.getElementById('details').innerText")


def test_it_loads_nothing_and_all_is_text(page: Page, explanation: Explanation, tmp_path: Path) -> None:
    assert page.problems == [] and [url for url in page.requests if not url.startswith("file:")] == []
    assert page.evaluate("document.title") == "explain: <i>f</i>"
    assert page.evaluate("document.querySelectorAll('main b, main i').length") == 0
    assert '# <b>&amp;</b> is text, and "</script>" is' in page.evaluate("document.getElementById('source').innerText")
    unchecked = [e.number for e in explanation if not any(around.kind == "check" for around in e.path())]
    assert shown_rows(page) == unchecked


def test_a_click_shows_path_pull_stack_and_numbers(page: Page, explanation: Explanation) -> None:
    chosen = explanation.find("sin", level=2, kind="operator")[0]
    page.click(f"#tree [data-event='{chosen.number}']")
    text = details(page)
    assert "derivatives/pointwise.py" in text and "3 ← 1" in text and "test_explain_page.py" in text
    levels = page.evaluate("[...document.querySelectorAll('#details .picture text')].map((text) => text.textContent)")
    assert levels[:4] == ["aten.sin.default", "level 2", "grad(<i>f</i>)", "▸ program, recorded as 3 <- 1"]
    assert levels[4:7] == ["level 1", "vmap(<i>f</i>)", "program"]
    assert levels[7:10] == ["base", "plain PyTorch", "aten.sin.default"]
    assert ["grad: float32[3]", "tracked, tape_index=1"] == levels[10:12]
    assert "[0.1411, -0.9589, -0.7568]" in text, "the numbers of example 1"
    assert page.evaluate("document.querySelector('#source .now').innerText.includes('torch.sin')")
    marked = page.evaluate("document.querySelector('#source mark')?.textContent ?? null")
    assert marked == (None if chosen.site is None or chosen.site.columns is None else "torch.sin(x)")
    assert page.evaluate(f"document.querySelector('#details [data-to=\"{chosen.children[0].number}\"]') !== null")
    pull = number(explanation, "sin", kind="pull")
    page.click(f"#details [data-to='{pull}']")
    assert page.evaluate("location.hash") == f"#{pull}" and "Recorded by".upper() in details(page).upper()
    page.click(f"#details [data-to='{chosen.number}']")
    assert page.evaluate("location.hash") == f"#{chosen.number}"


def test_filters(page: Page, explanation: Explanation) -> None:
    page.click("#operator")
    page.type("logsum")
    wanted = {e.number for e in explanation.find("logsumexp")}
    around = {a.number for number in wanted for a in explanation.events[number - 1].path()}
    assert set(shown_rows(page)) == around >= wanted
    page.evaluate("document.getElementById('operator').value = ''")
    page.evaluate("document.getElementById('operator').dispatchEvent(new Event('input'))")

    everything = len(shown_rows(page))
    page.click("#levels [data-level='0']")
    shown = shown_rows(page)
    assert {e.number for e in explanation.find(level=0, kind="base") if e.path()[-2].kind != "check"} <= set(shown)
    assert page.evaluate("document.querySelector('#levels [data-level=\"0\"]').getAttribute('aria-pressed')") == "true"
    page.click("#levels [data-level='0']")
    assert len(shown_rows(page)) == everything

    line = explanation.find("logsumexp", level=2)[0].site.line  # type: ignore[union-attr]
    page.click(f"#source [data-line$=':{line}']")
    shown = shown_rows(page)
    assert number(explanation, "logsumexp", level=2) in shown
    assert number(explanation, "sin", level=2) not in shown
    page.click("#line")
    assert len(shown_rows(page)) == everything
    page.click("#checks")
    assert len(shown_rows(page)) == len(explanation)


def test_steps(page: Page, explanation: Explanation) -> None:
    def here() -> int:
        return int(page.evaluate("location.hash.slice(1)"))

    page.click("#first")
    assert here() == 1
    page.click("#forward")
    page.press("ArrowRight")
    assert here() == 3 and "step 3 of" in page.evaluate("document.getElementById('step').innerText")
    page.press("ArrowLeft")
    assert here() == 2
    page.press("End")
    assert here() == shown_rows(page)[-1]
    page.press("ArrowRight")
    assert here() == shown_rows(page)[-1], "there is nothing behind the last step"


def test_an_address_with_a_step_shows_it(page: Page, explanation: Explanation) -> None:
    chosen = number(explanation, "sin", kind="pull")
    page.evaluate(f"location.hash = '#{chosen}'")
    assert "of the cotangent" in details(page) or "Recorded by".upper() in details(page).upper()
    assert page.evaluate("document.querySelector('#tree .now').closest('[data-event]').dataset.event") == str(chosen)


def test_lines_of_the_source_are_in_one_column(page: Page) -> None:
    texts = "[...document.querySelectorAll('#source .code > :last-child')]"
    assert len(set(page.evaluate(f"{texts}.map((text) => text.getBoundingClientRect().left)"))) == 1


def test_a_page_of_two_versions(browser: Page, tmp_path: Path) -> None:
    """The first difference is marked and open, a step unfolds at a click, and nothing sticks out."""

    def g(x: Tensor) -> Tensor:
        y = torch.logsumexp(x, 0)  # <b>bold</b>
        return y * torch.cos(x).sum()

    found = diff(grad(f), grad(g), ROWS[0])
    found.save(tmp_path / "diff.html")
    for dark, size in ((False, (1400, 900)), (True, (420, 800))):
        browser.problems.clear()
        browser.open(tmp_path / "diff.html", dark=dark, size=size)
        assert browser.problems == [] and browser.evaluate("document.querySelectorAll('main details b b').length") == 0
        assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert browser.evaluate("document.getElementById('first').innerText").startswith("▶ first difference")
        opened = "[...document.querySelectorAll('details')].map((row) => row.open)"
        assert sum(browser.evaluate(opened)) == 1
        assert browser.evaluate("document.querySelector('details[open]').previousElementSibling.id") == "first"
        browser.click("details:not([open]) summary")
        assert sum(browser.evaluate(opened)) == 2
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
        assert len(browser.screenshot(tmp_path / "diff.png")) > 20_000


def test_folding(page: Page, explanation: Explanation) -> None:
    chosen = explanation.find("logsumexp", level=2)[0]
    page.click(f"#tree [data-event='{chosen.number}'] .fold")
    assert chosen.children[0].number not in shown_rows(page)
    page.click(f"#tree [data-event='{chosen.number}'] .fold")
    assert chosen.children[0].number in shown_rows(page)


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn_in_light_and_dark(browser: Page, explanation: Explanation, tmp_path: Path, dark: bool) -> None:
    explanation.save(tmp_path / "page.html")
    browser.open(tmp_path / "page.html", dark=dark)
    paper = "getComputedStyle(document.body).backgroundColor"
    assert browser.evaluate(paper) == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    picture = browser.screenshot(tmp_path / "page.png")
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000, "more than an empty page"
    hues = browser.evaluate("['1', '2'].map((n) => getComputedStyle(document.querySelector("
                            "`#levels [data-level='${n}']`)).getPropertyValue('--hue'))")  # fmt: skip
    assert hues == [(DARK if dark else LIGHT).of(level)[1] for level in (1, 2)]
    filled = browser.evaluate(
        "['rect', 'text'].map((kind) => getComputedStyle(document.querySelector(`#details .picture ${kind}`)).fill)"
    )
    assert filled == (["rgb(28, 34, 41)", "rgb(227, 232, 238)"] if dark else ["rgb(255, 255, 255)", "rgb(31, 41, 51)"])
    browser.click("#theme")
    assert browser.evaluate(paper) == ("rgb(255, 255, 255)" if dark else "rgb(20, 24, 29)")


def test_a_narrow_window_has_one_column(browser: Page, explanation: Explanation, tmp_path: Path) -> None:
    explanation.save(tmp_path / "page.html")
    browser.open(tmp_path / "page.html", size=(420, 800))
    assert browser.evaluate("document.documentElement.scrollWidth") <= 420
    sections = "[...document.querySelectorAll('main > section')]"
    tops = browser.evaluate(f"{sections}.map((section) => section.getBoundingClientRect().top)")
    assert tops == sorted(tops) and len(set(tops)) == 3
