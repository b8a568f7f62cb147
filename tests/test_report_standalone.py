"""A figure as a file of its own."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fpo.report import Bar, Bars, Figure, Line, Point, Scatter, Series, save_figure, standalone

SVG = "{http://www.w3.org/2000/svg}"
NAMES = [f"a method with a name, number {number}" for number in range(5)]
SCATTER = Scatter("Gold <&> KL", "KL", "gold", [Point(name, i, i, series=name) for i, name in enumerate(NAMES)])
LINE = Line("Loss", "step", "loss", [Series(name, [0, 1], [1, 0]) for name in NAMES])
BARS = Bars("One series", "value", [Bar("a", 1.0), Bar("b", 2.0)])


@pytest.mark.parametrize("figure", [SCATTER, LINE, BARS], ids=lambda figure: type(figure).__name__)
def test_it_is_xml_that_asks_nobody_for_anything(figure: Figure) -> None:
    root = ElementTree.fromstring(standalone(figure))
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title") == figure.title
    text = standalone(figure)
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<script|href|@import|url\(", text)


@pytest.mark.parametrize("figure", [SCATTER, LINE], ids=lambda figure: type(figure).__name__)
def test_every_name_stands_in_its_colour_within_the_picture(figure: Figure) -> None:
    """As the marks are: the n-th name has class cn."""
    root = ElementTree.fromstring(standalone(figure))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for number, name in enumerate(NAMES):
        (group,) = [g for g in root.iter(f"{SVG}g") if g.findtext(f"{SVG}text") == name]
        assert f"c{number}" in group.attrib["class"].split()
        label = group.find(f"{SVG}text")
        assert 0 <= float(label.attrib["x"]) < width
        assert 0 < float(label.attrib["y"]) < height


def test_one_series_needs_no_legend_and_its_picture_is_lower() -> None:
    texts = [text.text for text in ElementTree.fromstring(standalone(BARS)).iter(f"{SVG}text")]
    assert texts[0] == "One series"
    assert texts.count("a") == texts.count("b") == 1


def test_it_has_colours_for_light_and_dark(tmp_path: Path) -> None:
    save_figure(BARS, tmp_path / "bars.svg")
    style = ElementTree.fromstring((tmp_path / "bars.svg").read_text(encoding="utf-8")).findtext(f"{SVG}style")
    assert "@media (prefers-color-scheme: dark)" in style
    for needed in (":root", "--paper: #fff", "--paper: #15171a", ".mark", "rect {", "circle {", ".error", ".grid"):
        assert needed in style
    assert "table" not in style
