"""Pages in a real browser (`make test-browser`): nothing is asked for or complained of; what can be pressed works."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from report_pages import HOSTILE, comparison, data, features

EXECUTABLE = browser.found()
WIDTHS = (360, 1280)
SCHEMES = ("light", "dark")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium here: apt install chromium, or set CHROMIUM"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    assert EXECUTABLE is not None
    with browser.browser(EXECUTABLE, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"runs": comparison(), "features": features(), "data": data()}
    for name, page in made.items():
        page.save(folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["runs", "features", "data"])
def test_a_page_opens_without_a_complaint_a_request_or_a_wider_screen(name, width, scheme, tab, pages, tmp_path):
    tab.open(pages[name], width, scheme)
    tab.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") == width
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert tab.complaints() == []
    assert tab.requests() == [pages[name].as_uri()]


def test_the_dark_page_is_dark(tab, pages):
    brightness = {}
    for scheme in SCHEMES:
        tab.open(pages["runs"], 1280, scheme)
        colour = tab.run("getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(", "))) / 3
    assert brightness["dark"] < 40
    assert brightness["light"] > 240


def test_a_page_fits_on_paper_and_is_printed_light(tab, pages):
    """A4 is 794 px wide at 96 dpi."""
    for name in pages:
        tab.open(pages[name], 794, "dark")
        tab.call("Emulation.setEmulatedMedia", media="print")
        assert tab.run("document.documentElement.scrollWidth") == 794
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        tab.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("width", WIDTHS)
def test_words_of_figures_stay_within_them(width, tab, pages):
    for name in ("runs", "features"):
        tab.open(pages[name], width)
        outside = """[...document.querySelectorAll("svg text")].filter((text) => {
            const [own, card] = [text.getBoundingClientRect(), text.closest("figure").getBoundingClientRect()];
            return own.left < card.left || own.right > card.right;
        }).map((text) => text.textContent)"""
        assert tab.run(outside) == []


def _column(tab: browser.Tab, number: int) -> list[str]:
    rows = "document.querySelector('table').tBodies[0].rows"
    values: list[str] = tab.run(f"[...{rows}].filter((row) => !row.hidden).map((row) => exact(row.cells[{number}]))")
    return values


def test_a_heading_sorts_by_all_digits_and_then_the_other_way(tab, pages):
    tab.open(pages["runs"], 1280)
    heading = "document.querySelectorAll('table th button')[3]"
    before = list(map(float, _column(tab, 3)))
    tab.run(f"{heading}.click()")
    assert list(map(float, _column(tab, 3))) == sorted(before, reverse=True)
    tab.run(f"{heading}.click()")
    assert list(map(float, _column(tab, 3))) == sorted(before)
    assert tab.run(f"{heading}.parentElement.ariaSort") == "ascending"
    tab.run("document.querySelectorAll('table th button')[0].click()")
    assert _column(tab, 0) == sorted(_column(tab, 0))


def test_a_filter_leaves_the_rows_that_say_it(tab, pages):
    tab.open(pages["runs"], 1280)
    tab.run(
        "const box = document.querySelector('.tools input'); box.value = 'TDPO2'; box.dispatchEvent(new Event('input'))"
    )
    assert set(_column(tab, 1)) == {"tdpo2"}
    assert tab.run("document.querySelector('.tools span').textContent") == "5 of 20 rows"


def test_a_table_is_copied_as_tab_separated_values_with_all_digits(tab, pages):
    tab.open(pages["runs"], 1280)
    tab.run("let copied = null; DataTransfer.prototype.setData = (kind, text) => { copied = text; }")
    tab.run("document.querySelector('.tools button').click()")
    rows = list(csv.reader(tab.run("copied").splitlines(), delimiter="\t"))
    own = comparison().data["runs"]
    assert [float(row[3]) for row in rows[1:]] == [run["accuracy"] for run in own]


def test_a_run_that_is_picked_stands_out_in_all_figures_until_it_is_picked_again(tab, pages):
    tab.open(pages["runs"], 1280)
    press = "document.querySelector('nav button[data-series=dpo-seed1]').click()"
    faint = (
        "[...document.querySelectorAll('.mark:not(button)')].filter((one) => getComputedStyle(one).opacity < 1).length"
    )
    everything = tab.run("document.querySelectorAll('.mark:not(button)').length")
    tab.run(press)
    assert everything - tab.run(faint) == tab.run("document.querySelectorAll('svg .on').length") == 5
    assert tab.run("document.querySelectorAll('tr.on').length") >= 1
    tab.run(press)
    assert tab.run(faint) == 0


def test_a_link_to_a_feature_opens_its_pairs_with_heat_by_activation(tab, pages):
    tab.open(pages["features"], 1280, anchor="#feature-7")
    tab.run("new Promise(requestAnimationFrame)")
    assert tab.run("document.querySelectorAll('details[open]').length") == 1
    assert tab.run("document.querySelectorAll('#feature-7 .pair').length") == 5
    heat = "(one) => [Number(one.title), one.style.getPropertyValue('--h')]"
    heats = tab.run(f"[...document.querySelectorAll('#feature-7 b')].map({heat})")
    hottest = max(heat for heat, _ in heats)
    assert all(float(shown) == pytest.approx(heat / hottest) for heat, shown in heats)
    first = features().sections[2].items[1].pairs[0]
    assert tab.run("document.querySelector('#feature-7 .side').lastChild.textContent") in "".join(first.chosen.tokens)


def test_a_hostile_label_does_nothing(tab, pages):
    tab.open(pages["features"], 1280)
    assert tab.run("document.querySelectorAll('img').length") == 0
    assert tab.run("document.querySelector('td.words').textContent").startswith(HOSTILE[:40])
