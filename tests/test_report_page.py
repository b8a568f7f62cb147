"""A page is one file that can do nothing but show itself, and its numbers are those of its JSON."""

import json
import re
from html.parser import HTMLParser

import pytest
from report_pages import HOSTILE, comparison, features

from fpo.report import Bar, Bars, Page, Section
from fpo.report.page import POLICY


class Read(HTMLParser):
    """What a browser makes of a page: elements, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    def data(self):
        kinds = [dict(attributes) for tag, attributes in self.elements if tag == "script"]
        return next(
            json.loads(text) for text, kind in zip(self.scripts, kinds, strict=True) if kind.get("id") == "data"
        )


PAGES = {"runs": comparison(), "features": features()}
READ = {name: Read(page.html()) for name, page in PAGES.items()}
pages = pytest.mark.parametrize("name", list(PAGES))


@pytest.mark.parametrize(("name", "most"), [("runs", 300_000), ("features", 1_000_000)])
def test_twenty_runs_and_two_hundred_features_are_a_small_file(name, most):
    assert len(PAGES[name].html().encode()) < most


@pages
def test_the_policy_allows_the_page_itself_and_nothing_else(name):
    policies = [one for tag, one in READ[name].elements if tag == "meta" and one.get("http-equiv")]
    assert [one["content"] for one in policies] == [POLICY]
    assert POLICY.startswith("default-src 'none'; ")
    assert "http" not in POLICY


@pages
def test_only_links_hold_addresses(name):
    """Neither an attribute but href of a link nor the style or script could ask for anything."""
    for tag, attributes in READ[name].elements:
        for key, value in attributes.items():
            assert "://" not in (value or "") or (tag, key) == ("a", "href")
    page = PAGES[name].html()
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|innerHTML", page)
    assert not {tag for tag, _ in READ[name].elements} & {"img", "link", "iframe", "object", "base", "form"}


@pages
def test_every_number_of_a_table_is_in_the_json(name):
    numbers = set(_numbers(READ[name].data()))
    shown = {float(one["data-v"]) for tag, one in READ[name].elements if tag == "td" and one.get("data-v")}
    assert len(shown) > 50
    assert shown <= numbers


@pages
def test_there_is_a_table_under_every_figure(name):
    order = [tag for tag, _ in READ[name].elements if tag in ("figure", "svg", "details", "table")]
    assert re.sub("(figure svg details table ?)+", "", " ".join(order)).count("figure") == 0
    assert "figure" in order


def test_data_cannot_leave_its_element():
    data = {"label": "</script><script>alert(1)</script>", "comment": "<!--<script>", "line": "\u2028&amp;"}
    page = Page("p", "", [], data)
    assert Read(page.html()).data() == data
    assert page.html().count("<script") == 2


def test_a_hostile_label_is_text_wherever_it_stands():
    page = Page(HOSTILE, HOSTILE, [Section(HOSTILE, HOSTILE, [HOSTILE, Bars(HOSTILE, HOSTILE, [Bar(HOSTILE, 1)])])])
    read = Read(page.html())
    assert not [one for tag, one in read.elements if tag == "img" or "onerror" in one]
    assert not set("\x1b\x07\u202e") & set(page.html())
    assert not set("\x1b\x07\u202e") & set(page.text())


def test_what_json_does_not_know_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        Page("p", "", [], {"x": float("nan")}).html()


def test_a_series_has_one_colour_on_all_of_a_page():
    classes: dict[str, set[str]] = {}
    for _, attributes in READ["runs"].elements:
        if (attributes.get("class") or "").startswith("mark"):
            classes.setdefault(attributes["data-series"] or "", set()).add(attributes["class"] or "")
    assert len(classes) == 20
    assert all(len(own) == 1 for own in classes.values())
    assert len({next(iter(own)) for own in classes.values()}) == 20


def test_a_terminal_gets_the_tables_without_the_figures():
    text = comparison(3).text()
    assert "reward accuracy" in text
    assert "IN PICTURES" not in text
    assert text.startswith("3 runs compared\n\nOne cache, several objectives.\n\nRUNS\n\n")


def test_a_page_is_saved_as_it_is(tmp_path):
    page = comparison(2)
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html()


def _numbers(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield float(value)
